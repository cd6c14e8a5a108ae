//! `control/gc`: nothing is done that was not asked for, errors say what is understood.
#![no_main]

#[path = "../../tests/invariants/mod.rs"]
mod invariants;

libfuzzer_sys::fuzz_target!(|input: &[u8]| invariants::gc_command(input));
