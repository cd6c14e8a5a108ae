//! Manifests: no digest in a descriptor is lost, none is invented, every JSON object is taken.
#![no_main]

#[path = "../../tests/invariants/mod.rs"]
mod invariants;

libfuzzer_sys::fuzz_target!(|input: &[u8]| invariants::manifest(input));
