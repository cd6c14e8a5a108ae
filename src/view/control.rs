//! The words written to control files.
//!
//! One write is one command: words separated by blanks, options as `key=value`, a trailing `&` to return at once.

use std::time::Duration;

use crate::error::{Error, Result};
use crate::gc::Options;
use crate::gc::guard::gate::Said;
use crate::trash::Selection;

/// What `control/gc` understands.
pub const GC_GRAMMAR: &str = "dry-run | sweep [untagged[=7d]] [repository=GLOB] [uploads=7d] [referrers=orphans] [repair] [thorough] \
     [grace=24h] [drain=10m] [keep=7d] [rate=N] [registry-stopped [force] [cache-emptied]] [allow-large] [now] | stop, with an optional & at the end";
/// What `control/trash` understands.
pub const TRASH_GRAMMAR: &str =
    "undo <transaction>|last | purge [<transaction>|older=7d] [registry-stopped [force] [cache-emptied]]";

/// A command to `control/gc`.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "there is one for each command that is written")]
pub enum GcCommand {
    /// Run a collection; what was said of registries; `true`: return at once.
    Run(Options, Said, bool),
    /// End the one that runs.
    Stop,
}

/// A command to `control/trash`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TrashCommand {
    /// Give a transaction back.
    Undo(String),
    /// Say which transaction is the newest.
    UndoWhich,
    /// Free what these hold; what was said of registries.
    Purge(Selection, Said),
}

/// For ever; added to a clock, it does not leave what that can show.
const LONGEST: Duration = Duration::from_secs(100 * 366 * 24 * 3600);

/// Reads a duration such as `24h`, `7d`, `1h30m`, `0`.
pub fn parse_duration(text: &str) -> std::result::Result<Duration, String> {
    match text {
        "0" => Ok(Duration::ZERO),
        _ => humantime::parse_duration(text)
            .map_err(|e| format!("{text:?} is no duration ({e}); write for example 24h, 7d or 0")),
    }
    .map(|duration| duration.min(LONGEST))
}

/// Reads the names of repositories: `*` and `?` stand for anything but a slash, `**` for any number of components.
pub fn parse_glob(text: &str) -> std::result::Result<glob::Pattern, String> {
    match text {
        "" => Err("an empty glob matches no repository".to_string()),
        _ => glob::Pattern::new(text).map_err(|e| format!("{text:?} is no glob: {e}")),
    }
}

/// Reads which referrers are collected: `orphans`.
pub fn parse_referrers(text: &str) -> std::result::Result<bool, String> {
    match text {
        "orphans" => Ok(true),
        _ => Err(format!("{text:?} are no referrers that can be collected; write orphans")),
    }
}

/// Reads how many calls to the storage are made in a second.
pub fn parse_rate(text: &str) -> std::result::Result<u32, String> {
    match text.parse() {
        Ok(0) | Err(_) => {
            Err(format!("{text:?} is no rate; write how many calls to the storage a second may have"))
        }
        Ok(rate) => Ok(rate),
    }
}

/// Applies one word to the options of a collection.
fn parse_option(word: &str, options: &mut Options) -> std::result::Result<(), String> {
    match word.split_once('=') {
        None if word == "untagged" => options.untagged = true,
        None if word == "now" => options.now = true,
        None if word == "allow-large" => options.allow_large = true,
        None if word == "repair" => options.repair = true,
        None if word == "thorough" => options.thorough = true,
        Some(("untagged", value)) => {
            options.untagged = true;
            options.untagged_for = parse_duration(value)?;
        }
        Some(("repository", value)) => options.repositories = Some(parse_glob(value)?),
        Some(("uploads", value)) => options.uploads = parse_duration(value)?,
        Some(("referrers", value)) => options.orphans = parse_referrers(value)?,
        Some(("grace", value)) => options.grace = parse_duration(value)?,
        Some(("rate", value)) => options.rate = Some(parse_rate(value)?),
        Some(("drain", value)) => options.drain = parse_duration(value)?,
        Some(("keep", value)) => options.keep = parse_duration(value)?,
        _ => return Err(format!("unknown word {word:?}")),
    }
    Ok(())
}

/// Reads what was written to `control/gc`; options not given are those of `defaults`.
pub fn parse_gc(text: &str, defaults: &Options) -> Result<GcCommand> {
    let wrong = |why: String| Error::invalid(format!("{why}; understood is: {GC_GRAMMAR}"));
    let text = text.trim();
    if text.contains('\n') {
        return Err(wrong("more than one line".to_string()));
    }
    let (text, background) = match text.strip_suffix('&') {
        Some(rest) => (rest, true),
        None => (text, false),
    };
    let mut words = text.split_whitespace();
    let mut options = defaults.clone();
    match words.next() {
        Some("dry-run") => options.dry_run = true,
        Some("sweep") => {}
        Some("stop") => {
            return match words.next() {
                None => Ok(GcCommand::Stop),
                Some(word) => Err(wrong(format!("unexpected {word:?} after stop"))),
            };
        }
        Some(other) => return Err(wrong(format!("unknown command {other:?}"))),
        None => return Err(wrong("empty command".to_string())),
    }
    let (mut is_stopped, mut is_sure, mut is_emptied) = (false, false, false);
    for word in words {
        match word {
            "registry-stopped" => is_stopped = true,
            "force" => is_sure = true,
            "cache-emptied" => is_emptied = true,
            _ => parse_option(word, &mut options).map_err(wrong)?,
        }
    }
    if (is_sure || is_emptied) && !is_stopped {
        return Err(wrong("force and cache-emptied belong to registry-stopped".to_string()));
    }
    Ok(GcCommand::Run(options, Said::of(is_stopped, is_sure, is_emptied), background))
}

/// Reads what was written to `control/trash`.
pub fn parse_trash(text: &str) -> Result<TrashCommand> {
    let wrong = |why: String| Error::invalid(format!("{why}; understood is: {TRASH_GRAMMAR}"));
    let mut words: Vec<&str> = text.split_whitespace().collect();
    let is_purge = words.first() == Some(&"purge");
    let is_emptied = is_purge && words.pop_if(|word| *word == "cache-emptied").is_some();
    let is_sure = is_purge && words.pop_if(|word| *word == "force").is_some();
    let is_stopped = is_purge && words.pop_if(|word| *word == "registry-stopped").is_some();
    if (is_sure || is_emptied) && !is_stopped {
        return Err(wrong("force and cache-emptied belong behind registry-stopped".to_string()));
    }
    let purge = |selection| Ok(TrashCommand::Purge(selection, Said::of(is_stopped, is_sure, is_emptied)));
    match words.as_slice() {
        ["undo"] => Ok(TrashCommand::UndoWhich),
        ["undo", id] => Ok(TrashCommand::Undo(id.to_string())),
        ["purge"] => purge(Selection::All),
        ["purge", word] => match word.split_once('=') {
            Some(("older", age)) => purge(Selection::Older(parse_duration(age).map_err(wrong)?)),
            Some((key, _)) => Err(wrong(format!("unknown word {key:?}"))),
            None => purge(Selection::One(word.to_string())),
        },
        [] => Err(wrong("empty command".to_string())),
        [other, ..] => Err(wrong(format!("cannot read {:?}, which begins with {other:?}", words.join(" ")))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gc_commands_are_words_and_options() {
        let defaults = Options::default();
        let run = |text: &str| match parse_gc(text, &defaults) {
            Ok(GcCommand::Run(options, Said::Nothing, background)) => (options, background),
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(run("sweep\n"), (defaults.clone(), false));
        assert_eq!(run(" dry-run "), (Options { dry_run: true, ..defaults.clone() }, false));
        let all = Options {
            untagged: true,
            now: true,
            grace: Duration::ZERO,
            keep: Duration::from_secs(3600),
            ..defaults.clone()
        };
        assert_eq!(run("sweep now untagged grace=0 keep=1h &"), (all.clone(), true));
        assert_eq!(run("sweep keep=1h grace=0 untagged now&"), (all, true));
        let policies = Options {
            untagged: true,
            untagged_for: Duration::from_secs(7 * 24 * 3600),
            repositories: Some(glob::Pattern::new("team/**").unwrap()),
            uploads: Duration::ZERO,
            orphans: true,
            repair: true,
            thorough: true,
            ..defaults.clone()
        };
        let text = "sweep untagged=7d repository=team/** uploads=0 referrers=orphans repair thorough";
        assert_eq!(run(text), (policies, false));
        assert_eq!(parse_gc("stop", &defaults).unwrap(), GcCommand::Stop);
        let stopped = Options { now: true, drain: Duration::from_secs(60), ..defaults.clone() };
        assert_eq!(
            parse_gc("sweep now registry-stopped drain=1m", &defaults).unwrap(),
            GcCommand::Run(stopped.clone(), Said::Stopped, false)
        );
        assert_eq!(
            parse_gc("sweep force registry-stopped now drain=1m &", &defaults).unwrap(),
            GcCommand::Run(stopped, Said::StoppedForSure, true)
        );
        for wrong in [
            "",
            "&",
            "sweeep",
            "sweep grace",
            "sweep grace=",
            "sweep grace=x",
            "sweep later",
            "sweep untagged=",
            "sweep repository=",
            "sweep repository=a**b",
            "sweep uploads",
            "sweep referrers=all",
            "sweep ignore-damaged",
            "sweep force",
            "sweep drain",
            "sweep rate=0",
            "sweep rate=fast",
            "stop now",
            "\0",
            "sweep\nnow",
        ] {
            let error = parse_gc(wrong, &defaults).unwrap_err();
            assert_eq!(error.errno(), libc::EINVAL);
            assert!(error.to_string().contains(GC_GRAMMAR), "{wrong:?}: {error}");
        }
    }

    #[test]
    fn trash_commands_name_transactions() {
        assert_eq!(parse_trash("undo x\n").unwrap(), TrashCommand::Undo("x".into()));
        assert_eq!(parse_trash("undo").unwrap(), TrashCommand::UndoWhich);
        assert_eq!(parse_trash("purge").unwrap(), TrashCommand::Purge(Selection::All, Said::Nothing));
        assert_eq!(
            parse_trash("purge x").unwrap(),
            TrashCommand::Purge(Selection::One("x".into()), Said::Nothing)
        );
        let older = Selection::Older(Duration::from_secs(60));
        assert_eq!(parse_trash("purge older=1m").unwrap(), TrashCommand::Purge(older.clone(), Said::Nothing));
        let both = parse_trash("purge older=1m registry-stopped force").unwrap();
        assert_eq!(both, TrashCommand::Purge(older, Said::StoppedForSure));
        let all = parse_trash("purge registry-stopped").unwrap();
        assert_eq!(all, TrashCommand::Purge(Selection::All, Said::Stopped));
        for wrong in [
            "",
            "undo a b",
            "purge a b",
            "purge younger=1d",
            "older=7d",
            "purge older=x",
            "purge force",
            "undo x force",
        ] {
            assert_eq!(parse_trash(wrong).unwrap_err().errno(), libc::EINVAL, "{wrong:?}");
        }
    }
}
