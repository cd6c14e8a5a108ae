//! What must hold of each parser for any input at all.
//!
//! Shared by the fuzz targets (`fuzz/`, endless) and `tests/fuzz_smoke.rs` (some thousands of inputs in every test
//! run). Each function panics when something does not hold, and has its own eyes: no digest, no JSON string is
//! found here with regfs's code.
#![allow(dead_code, reason = "each fuzz target uses one of these")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a broken invariant is a panic")]

use std::collections::BTreeSet;
use std::path::Path;

use regfs::digest::Digest;
use regfs::gc::Options;
use regfs::gc::guard::gate::Said;
use regfs::layout;
use regfs::manifest::{self, Kind};
use regfs::trash::Selection;
use regfs::view::control::{GC_GRAMMAR, GcCommand, TRASH_GRAMMAR, TrashCommand, parse_gc, parse_trash};
use serde_json::Value;

/// `manifest::parse`.
///
/// 1. Any JSON object is a manifest; nothing else is.
/// 2. Every digest that stands where a descriptor's digest does, in any spelling that Go's decoder takes, is among
///    the references. Losing one is losing a layer.
/// 3. Every reference stands in some string of the text: none is invented.
/// 4. What is odd is of an unknown kind, and every digest in it counts.
pub(crate) fn manifest(bytes: &[u8]) {
    let value = serde_json::from_slice::<Value>(bytes);
    let manifest = match manifest::parse(bytes) {
        Ok(manifest) => manifest,
        Err(why) => {
            assert!(!value.is_ok_and(|value| value.is_object()), "a JSON object is refused: {why:?}");
            return;
        }
    };
    let text = std::str::from_utf8(bytes).expect("what is parsed is text");
    assert!(text.trim_start().starts_with('{'), "this is no object");
    let named = manifest.config.iter().chain(&manifest.layers).chain(&manifest.children).map(|d| d.digest);
    let references: BTreeSet<String> = named
        .chain(manifest.subject)
        .chain(manifest.others.iter().copied())
        .map(|digest| digest.to_string())
        .collect();

    let mut wanted = BTreeSet::new();
    if let Ok(value) = &value {
        for field in ["config", "subject", "layers", "blobs", "manifests", "fslayers"] {
            for found in fields(value, field) {
                let descriptors = found.as_array().map_or(std::slice::from_ref(found), Vec::as_slice);
                let digests = descriptors.iter().flat_map(|d| [fields(d, "digest"), fields(d, "blobsum")]);
                wanted.extend(digests.flatten().filter_map(Value::as_str).filter(|text| is_digest(text)));
            }
        }
    }
    for digest in wanted {
        assert!(references.contains(digest), "{digest} is not among {references:?}");
    }

    let strings = strings(text);
    for reference in &references {
        let dashed = reference.replace(':', "-");
        let stands_there = |text: &String| text.contains(reference) || text.contains(&dashed);
        assert!(strings.iter().any(stands_there), "{reference} stands nowhere");
    }
    assert_eq!(manifest.odd.is_some(), manifest.kind == Kind::Unknown, "{:?}", manifest.odd);
    if manifest.odd.is_some() {
        for digest in strings.iter().filter(|text| is_digest(text)) {
            assert!(references.contains(digest), "{digest} does not count, in what is odd");
        }
    }
}

/// `layout::parse_link`: exactly one digest and not a byte more is a link; what is read is what stands there, and
/// it leads to paths below the store that mean the same digest.
pub(crate) fn link(bytes: &[u8]) {
    let is_link = std::str::from_utf8(bytes).is_ok_and(is_digest);
    let Ok(digest) = layout::parse_link(bytes) else {
        assert!(!is_link, "a good link is refused");
        return;
    };
    assert!(is_link, "this is no digest");
    let text = digest.to_string();
    assert_eq!(text.as_bytes(), bytes);
    let (algorithm, hex) = text.split_once(':').unwrap();
    assert_eq!(Digest::from_parts(algorithm, hex), Some(digest));
    assert_eq!(layout::classify(&layout::blob_data(&digest)), layout::Kind::Blob(digest));
    let name = Path::new("library/alpine");
    let expected = layout::Kind::LayerLink(name.to_path_buf(), digest);
    assert_eq!(layout::classify(&layout::layer_link(name, &digest)), expected);
    let expected = layout::Kind::Revision(name.to_path_buf(), digest);
    assert_eq!(layout::classify(&layout::revision_link(name, &digest)), expected);
}

/// `parse_gc`: nothing is done that was not asked for in so many words, and an error says what is understood.
pub(crate) fn gc_command(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let defaults = Options::default();
    let command = match parse_gc(&text, &defaults) {
        Ok(command) => command,
        Err(e) => {
            assert_eq!(e.errno(), libc_einval());
            assert!(e.to_string().contains(GC_GRAMMAR), "{e}");
            return;
        }
    };
    assert_eq!(parse_gc(&text, &defaults).unwrap(), command, "the same words, another meaning");
    assert_eq!(text.trim().lines().count(), 1, "one command is one line");
    let in_background = text.trim().ends_with('&');
    let words: Vec<&str> = text.trim().trim_end_matches('&').split_whitespace().collect();
    let says = |word: &str| words.contains(&word);
    let sets = |key: &str| words.iter().any(|word| word.split_once('=').is_some_and(|(k, _)| k == key));
    match command {
        GcCommand::Stop => assert_eq!(words, ["stop"]),
        GcCommand::Run(options, said, background) => {
            assert!(matches!(words[0], "dry-run" | "sweep"), "{words:?}");
            assert_eq!(options.dry_run, says("dry-run"));
            assert_eq!(options.untagged, says("untagged"));
            assert_eq!(options.now, says("now"));
            assert!(options.grace == defaults.grace || sets("grace"), "the grace period changed by itself");
            assert!(options.keep == defaults.keep || sets("keep"), "what is kept changed by itself");
            assert_eq!(said != Said::Nothing, says("registry-stopped"));
            assert_eq!(said.is_sure(), says("force"));
            assert_eq!(said.is_emptied(), says("cache-emptied"));
            assert_eq!(background, in_background);
        }
    }
}

/// `parse_trash`: as [`gc_command`]; and "all" is purged only when nothing else was said.
pub(crate) fn trash_command(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut words: Vec<&str> = text.split_whitespace().collect();
    let command = parse_trash(&text);
    if let Ok(TrashCommand::Purge(_, said)) = &command {
        let of_registries: &[&str] = match said {
            Said::Nothing => &[],
            Said::Emptied => &["registry-stopped", "cache-emptied"],
            Said::EmptiedForSure => &["registry-stopped", "force", "cache-emptied"],
            Said::Stopped => &["registry-stopped"],
            Said::StoppedForSure => &["registry-stopped", "force"],
        };
        assert_eq!(words.split_off(words.len() - of_registries.len()), of_registries);
    }
    match command {
        Err(e) => {
            assert_eq!(e.errno(), libc_einval());
            assert!(e.to_string().contains(TRASH_GRAMMAR), "{e}");
        }
        Ok(TrashCommand::UndoWhich) => assert_eq!(words, ["undo"]),
        Ok(TrashCommand::Undo(id)) => assert_eq!(words, ["undo", id.as_str()]),
        Ok(TrashCommand::Purge(Selection::All, _)) => assert_eq!(words, ["purge"]),
        Ok(TrashCommand::Purge(Selection::One(id), _)) => {
            assert_eq!(words, ["purge", id.as_str()]);
            assert!(!id.contains('='), "an option taken for a name: {id}");
        }
        Ok(TrashCommand::Purge(Selection::Older(_), _)) => {
            assert!(words.len() == 2 && words[0] == "purge" && words[1].starts_with("older="), "{words:?}");
        }
    }
}

/// `EINVAL`, the same on all systems that regfs runs on.
fn libc_einval() -> i32 {
    22
}

/// The values of an object's fields that are spelled `name`, or as Go's decoder takes for it; `name` in lower case.
fn fields<'a>(value: &'a Value, name: &str) -> Vec<&'a Value> {
    let folded = |key: &str| key.to_lowercase().replace('\u{17f}', "s");
    let fields = value.as_object().into_iter().flatten();
    fields.filter(|(key, _)| folded(key) == name).map(|(_, value)| value).collect()
}

/// Whether this is a digest and nothing else.
fn is_digest(text: &str) -> bool {
    let Some((algorithm, hex)) = text.split_once(':') else { return false };
    let length = match algorithm {
        "sha256" => 64,
        "sha384" => 96,
        "sha512" => 128,
        _ => return false,
    };
    hex.len() == length && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Every string and key of a JSON text, those of fields that stand there twice included.
fn strings(json: &str) -> Vec<String> {
    let (mut found, mut start, mut is_escaped) = (Vec::new(), None, false);
    for (at, byte) in json.bytes().enumerate() {
        match (start, byte) {
            (None, b'"') => start = Some(at),
            (None, _) => {}
            (Some(_), _) if is_escaped => is_escaped = false,
            (Some(_), b'\\') => is_escaped = true,
            (Some(from), b'"') => {
                // A half of a surrogate pair is no text; nothing in it counts.
                found.extend(serde_json::from_str::<String>(&json[from..=at]));
                start = None;
            }
            (Some(_), _) => {}
        }
    }
    found
}
