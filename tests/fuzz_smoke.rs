//! The invariants of the fuzz targets on some thousands of inputs: the same ones in every run, in a few seconds.
//!
//! `fuzz/` runs the same functions for as long as one likes, led by coverage. Here seeds that are valid are
//! mutated blindly, with the words that matter to each parser.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;
mod invariants;

use std::panic::{AssertUnwindSafe, catch_unwind};

use common::check::{sha256, sha512};
use common::image::{DOCKER_SCHEMA_1, Image, layer};
use common::random::Random;

/// Inputs for each parser.
const INPUTS: usize = 40_000;

/// Feeds `check` with the seeds and with what comes of them; `words` are put in here and there.
fn feed(check: fn(&[u8]), seeds: &[Vec<u8>], words: &[&str]) {
    seeds.iter().for_each(|seed| check(seed));
    let mut random = Random(1);
    for _ in 0..INPUTS {
        let mut input = random.choose(seeds).clone();
        for _ in 0..=random.below(4) {
            mutate(&mut input, seeds, words, &mut random);
        }
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(&input))) {
            println!("the input: {:?}", String::from_utf8_lossy(&input));
            std::panic::resume_unwind(panic);
        }
    }
}

/// Changes one place.
fn mutate(input: &mut Vec<u8>, seeds: &[Vec<u8>], words: &[&str], random: &mut Random) {
    let (what, word) = (random.below(8), *random.choose(words));
    let place = if what >= 4 { find(input, words, random) } else { None };
    // A word for a word leaves much of what is valid valid.
    let (from, to) = place.unwrap_or_else(|| {
        let from = random.below(input.len() + 1);
        (from, (from + random_length(random)).min(input.len()))
    });
    let insert = match what {
        // Removed.
        0 => Vec::new(),
        1 => vec![random.below(256) as u8],
        // Twice.
        2 => input[from..to].repeat(2),
        // From another seed.
        3 => {
            let other = random.choose(seeds);
            let start = random.below(other.len() + 1);
            other[start..(start + random_length(random)).min(other.len())].to_vec()
        }
        _ => word.as_bytes().to_vec(),
    };
    input.splice(from..to, insert);
}

/// Where one of the words stands in `input`, if the one that is chosen does.
fn find(input: &[u8], words: &[&str], random: &mut Random) -> Option<(usize, usize)> {
    let word = random.choose(words).as_bytes();
    let places: Vec<usize> = (0..input.len()).filter(|at| input[*at..].starts_with(word)).collect();
    let at = *places.get(random.below(places.len().max(1)))?;
    Some((at, at + word.len()))
}

/// Mostly short.
fn random_length(random: &mut Random) -> usize {
    let bits = random.below(8);
    random.below(1 << bits)
}

#[test]
fn no_manifest_loses_or_invents_a_digest() {
    let base = layer("base", "shared");
    let image = Image::oci("seed", &[base.clone(), layer("private", "of one")]);
    let digest = image.digest();
    let schema_1 = format!(
        r#"{{"schemaVersion":1,"mediaType":"{DOCKER_SCHEMA_1}","name":"a","fsLayers":[{{"blobSum":"{digest}"}}]}}"#
    );
    let strong = sha512(b"strong");
    let seeds = [
        image.manifest.clone(),
        Image::docker("seed", &[base]).manifest,
        Image::index(&[("amd64", &image), ("arm64", &image)]).manifest,
        image.referrer("application/vnd.example.sbom", "sbom").manifest,
        schema_1.into_bytes(),
        format!(r#"{{"layers":[{{"digest":"{strong}","size":1}}],"subject":null}}"#).into_bytes(),
        format!(r#"{{"mediaType":"application/x-new","parts":{{"{digest}":["sha256-{}"]}}}}"#, image.hex())
            .into_bytes(),
        b"{}".to_vec(),
        b"[null]".to_vec(),
    ];
    let quoted = format!("\"{}\"", sha256(b"other"));
    let escaped = format!("\"\\u0073ha256{}\"", &sha256(b"escaped")[6..]);
    let twice = format!("\"Digest\":{quoted},\"digest\":");
    let words = [
        &twice,
        "\"digest\":",
        "\"Digest\":",
        "\"di\\u0067est\":",
        "\"blobSum\":",
        "\"layers\":",
        "\"Layers\":",
        "\"LAYER\u{17f}\":",
        "\"config\":",
        "\"manifests\":",
        "\"subject\":",
        "\"blobs\":",
        "\"mediaType\":\"\",",
        "null",
        "{",
        "}",
        "[",
        "]",
        ",",
        "\"",
        "\\",
        "1e999",
        "-0",
        "\\ud800",
        "\u{feff}",
        "\0",
        &quoted,
        &escaped,
        "{\"layers\":[],",
    ];
    feed(invariants::manifest, &seeds, &words);
}

#[test]
fn a_link_is_one_digest_and_not_a_byte_more() {
    let seeds = [sha256(b"1"), sha512(b"1"), format!("sha384:{}", "0".repeat(96)), String::new()];
    let words =
        ["\n", " ", "\0", "sha256:", "sha512:", "sha384:", "md5:", "A", "g", "/", "..", "a", "0", ":"];
    feed(invariants::link, &seeds.map(String::into_bytes), &words);
}

#[test]
fn a_gc_command_does_only_what_it_says() {
    let seeds = ["dry-run", "sweep", "stop", "sweep untagged grace=24h keep=7d now &", "dry-run grace=0\n"];
    let words = [
        " ",
        "\n",
        "&",
        "=",
        "0",
        "24h",
        "1y ",
        "99999999999999999999h",
        "now ",
        "untagged ",
        "grace=",
        "keep=",
        "stop",
        "sweep ",
        "dry-run ",
        "\u{a0}",
        "\0",
        "repository=",
    ];
    feed(invariants::gc_command, &seeds.map(|seed| seed.as_bytes().to_vec()), &words);
}

#[test]
fn a_trash_command_purges_all_only_when_nothing_else_is_said() {
    let seeds = ["undo 20260101-000000-rm", "purge", "purge 20260101-000000-sweep-002\n", "purge older=7d"];
    let words = [
        " ", "\n", "=", "older=", "younger=", "0", "7d", "purge ", "undo ", "..", "/", "\u{a0}", "\0", "all",
    ];
    feed(invariants::trash_command, &seeds.map(|seed| seed.as_bytes().to_vec()), &words);
}
