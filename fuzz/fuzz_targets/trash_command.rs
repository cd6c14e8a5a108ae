//! `control/trash`: everything is purged only when nothing else was said.
#![no_main]

#[path = "../../tests/invariants/mod.rs"]
mod invariants;

libfuzzer_sys::fuzz_target!(|input: &[u8]| invariants::trash_command(input));
