//! Advice: every command and word that a message proposes, as it is typed where the message is read.
//!
//! The same message may be read on a terminal, after `regfs gc /srv/registry`, or in a control file of a mount. What to type
//! next differs: `--registry-stopped` there, `registry-stopped` here. Whoever makes a message rarely knows, so it says what is
//! meant, and [`Place::say`] puts it into words where the text leaves the program:
//!
//! ```text
//! stop the registry and add {+registry-stopped}      an option: a word of the control file, a flag of the command line
//! {undo 20261120-091502-rm} brings it back           a whole command
//! ```
//! Braces around anything else stay as they are.
//!
//! # Rules kept here
//! 1. A command works as it is printed: paths are quoted for a shell where they need it, and a test runs each [`Advice`].
//! 2. An option is one of [`OPTIONS`], which a test gives to the command line and to the control file.

use std::ffi::OsStr;
use std::fmt;
use std::path::Path;

use crate::printable::Printable;

/// Where a message is read.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// The command line, about this store.
    CommandLine(&'a Path),
    /// A control file of a mount, its log, or the log of its daemon.
    ControlFile,
}

/// A command to go on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Gives a transaction of the trash back.
    Undo(String),
    /// Frees a transaction.
    Purge(String),
    /// Frees the whole trash.
    PurgeAll,
    /// Shows what is in the trash.
    Trash,
    /// Says what a sweep would take, with all its details.
    DryRun,
    /// Makes links whole.
    Repair,
    /// Says why a digest is kept, with every chain.
    Why(String),
}

/// Options that messages propose: a word of a control file, a flag of the command line.
pub const OPTIONS: [&str; 12] = [
    "allow-large",
    "cache-emptied",
    "force",
    "grace=0",
    "ignore-damaged",
    "now",
    "referrers=orphans",
    "registry-stopped",
    "repair",
    "thorough",
    "untagged",
    "verbose",
];

/// What follows the opening brace of an option.
const OPTION: char = '+';

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Advice::Undo(id) => write!(f, "{{undo {}}}", id.printable()),
            Advice::Purge(id) => write!(f, "{{purge {}}}", id.printable()),
            Advice::PurgeAll => f.write_str("{purge-all}"),
            Advice::Trash => f.write_str("{trash}"),
            Advice::DryRun => f.write_str("{dry-run}"),
            Advice::Repair => f.write_str("{repair}"),
            Advice::Why(what) => write!(f, "{{why {}}}", what.printable()),
        }
    }
}

impl Advice {
    /// What stands between braces.
    fn parse(text: &str) -> Option<Advice> {
        Some(match text.split_once(' ').map_or((text, ""), |(verb, about)| (verb, about)) {
            ("undo", id) if !id.is_empty() => Advice::Undo(id.to_string()),
            ("purge", id) if !id.is_empty() => Advice::Purge(id.to_string()),
            ("why", what) if !what.is_empty() => Advice::Why(what.to_string()),
            ("purge-all", "") => Advice::PurgeAll,
            ("trash", "") => Advice::Trash,
            ("dry-run", "") => Advice::DryRun,
            ("repair", "") => Advice::Repair,
            _ => return None,
        })
    }

    /// The command as it is typed there.
    pub fn at(&self, place: Place<'_>) -> String {
        match place {
            Place::CommandLine(store) => self.on_command_line(&quoted(store)),
            Place::ControlFile => self.in_mount(),
        }
    }

    fn on_command_line(&self, store: &str) -> String {
        match self {
            Advice::Undo(id) => format!("regfs trash {store} undo {}", quoted(id)),
            Advice::Purge(id) => format!("regfs trash {store} purge {}", quoted(id)),
            Advice::PurgeAll => format!("regfs trash {store} purge --all"),
            Advice::Trash => format!("regfs trash {store} list"),
            Advice::DryRun => format!("regfs gc {store} --dry-run"),
            Advice::Repair => format!("regfs gc {store} --repair"),
            Advice::Why(what) => format!("regfs why {store} {} --all", quoted(what)),
        }
    }

    /// In the root of the mount.
    fn in_mount(&self) -> String {
        let write = |words: &str, file: &str| format!("echo {} > control/{file}", quoted(words));
        match self {
            Advice::Undo(id) => write(&format!("undo {id}"), "trash"),
            Advice::Purge(id) => write(&format!("purge {id}"), "trash"),
            Advice::PurgeAll => write("purge", "trash"),
            Advice::Trash => "cat control/trash".to_string(),
            Advice::DryRun => format!("{}; cat control/gc", write("dry-run", "gc")),
            Advice::Repair => write("sweep repair", "gc"),
            Advice::Why(what) => format!("cat reachability/why/{}", what.replacen(':', "/", 1)),
        }
    }
}

impl Place<'_> {
    /// The text with what it proposes as it is typed here.
    pub fn say(&self, text: &str) -> String {
        let mut said = String::with_capacity(text.len());
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            said.push_str(before);
            match after.split_once('}').and_then(|(inside, after)| Some((self.word(inside)?, after))) {
                Some((word, after)) => {
                    said.push_str(&word);
                    rest = after;
                }
                None => {
                    said.push('{');
                    rest = after;
                }
            }
        }
        said + rest
    }

    /// What stands between braces, as it is typed here.
    fn word(&self, inside: &str) -> Option<String> {
        match inside.strip_prefix(OPTION) {
            Some(option) if OPTIONS.contains(&option) => Some(match self {
                Place::CommandLine(_) => format!("--{}", option.replace('=', " ")),
                Place::ControlFile => option.to_string(),
            }),
            Some(_) => None,
            None => Some(Advice::parse(inside)?.at(*self)),
        }
    }
}

/// The command after which nothing is known of the registries of the storage below `root`. No control file has a word for it.
pub fn forget_registries(root: &Path) -> String {
    format!("regfs gc {} --forget-registries", quoted(root))
}

/// A word for a shell.
pub fn quoted(word: &(impl AsRef<OsStr> + ?Sized)) -> String {
    // What a terminal would obey is shown, not typed: whoever has such a name has to find it with `ls`.
    let word = word.printable().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:@%+,".contains(c);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => word,
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_proposes_what_is_typed_where_it_is_read() {
        let text = format!(
            "stop it and add {{+registry-stopped}} and {{+force}}; {} or {}; {{x}} {{+rm}} {{",
            Advice::Undo("20260101-sweep".into()),
            Advice::PurgeAll
        );
        assert_eq!(
            Place::CommandLine(Path::new("/srv/my registry")).say(&text),
            "stop it and add --registry-stopped and --force; regfs trash '/srv/my registry' undo 20260101-sweep or \
             regfs trash '/srv/my registry' purge --all; {x} {+rm} {"
        );
        assert_eq!(
            Place::ControlFile.say(&text),
            "stop it and add registry-stopped and force; echo 'undo 20260101-sweep' > control/trash or \
             echo purge > control/trash; {x} {+rm} {"
        );
        assert_eq!(Place::ControlFile.say("nothing to say"), "nothing to say");
    }

    #[test]
    fn words_are_quoted_where_a_shell_would_read_more_into_them() {
        assert_eq!(quoted("/srv/registry"), "/srv/registry");
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
        assert_eq!(quoted(""), "''");
    }
}
