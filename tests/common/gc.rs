//! `regfs gc` with its JSON report, and `regfs trash`.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::run::{Bounded, Outcome, regfs};

/// The report of `regfs gc --json`.
#[derive(Debug, Deserialize)]
pub(crate) struct Report {
    pub(crate) mode: String,
    pub(crate) gate: String,
    pub(crate) gate_reason: String,
    pub(crate) states: Vec<State>,
    pub(crate) freed_bytes: u64,
    pub(crate) quarantined_bytes: u64,
    pub(crate) transaction: Option<Value>,
    pub(crate) taken: Vec<Taken>,
    pub(crate) kept_young: Vec<Young>,
    pub(crate) dropped_transactions: Vec<Value>,
    pub(crate) failures: Vec<Value>,
    pub(crate) restored: Vec<Value>,
    pub(crate) problems: Vec<Problem>,
}

/// How much garbage is how far on its way out.
#[derive(Debug, Deserialize)]
pub(crate) struct State {
    pub(crate) state: String,
    pub(crate) blobs: usize,
}

/// One thing taken (or in a dry run, that would be).
#[derive(Debug, Deserialize)]
pub(crate) struct Taken {
    pub(crate) kind: String,
    pub(crate) path: String,
    pub(crate) digest: Option<String>,
    pub(crate) bytes: u64,
    pub(crate) reason: String,
}

/// One blob that is garbage but younger than the grace period.
#[derive(Debug, Deserialize)]
pub(crate) struct Young {
    pub(crate) digest: String,
    pub(crate) bytes: u64,
    pub(crate) eligible_at: Value,
}

/// Something in the store that could not be read or judged.
#[derive(Debug, Deserialize)]
pub(crate) struct Problem {
    pub(crate) path: String,
    pub(crate) what: String,
    pub(crate) effect: String,
}

impl Report {
    /// Parses what `--json` printed.
    #[track_caller]
    pub(crate) fn parse(outcome: &Outcome) -> Report {
        serde_json::from_str(&outcome.stdout).unwrap_or_else(|why| panic!("no report ({why}): {outcome}"))
    }

    /// Digests of the blobs in `taken`.
    pub(crate) fn taken_blobs(&self) -> BTreeSet<String> {
        let blobs = self.taken.iter().filter(|taken| taken.kind == "blob");
        blobs.map(|taken| taken.digest.clone().expect("a blob has a digest")).collect()
    }

    /// Digests of all unreferenced blobs, old enough or not.
    pub(crate) fn unreferenced(&self) -> BTreeSet<String> {
        self.kept_young.iter().map(|young| young.digest.clone()).chain(self.taken_blobs()).collect()
    }
}

/// Runs `regfs gc <store> --json …`, which must exit with 0.
#[track_caller]
pub(crate) fn gc(store: &Path, arguments: &[&str]) -> Report {
    Report::parse(&gc_outcome(store, arguments).exits(0))
}

/// Runs `regfs gc <store> --json …` as if no registry ran, whether or not one does: most tests are about what is garbage,
/// and push nothing meanwhile.
#[track_caller]
pub(crate) fn gc_outcome(store: &Path, arguments: &[&str]) -> Outcome {
    regfs(["gc"]).arg(store).args(["--json", "--registry-stopped", "--force"]).args(arguments).outcome()
}

/// Runs `regfs gc <store> --json …` beside a registry, which must exit with 0, or with 3 where it holds back what is due.
#[track_caller]
pub(crate) fn gc_beside(store: &Path, arguments: &[&str]) -> Report {
    let outcome = regfs(["gc"]).arg(store).arg("--json").args(arguments).outcome().exits_one_of(&[0, 3]);
    let report = Report::parse(&outcome);
    let is_held_back = report.gate == "stop" && outcome.stderr.contains("nothing was taken");
    assert!(outcome.code == Some(0) || is_held_back && report.failures.is_empty(), "{outcome}");
    report
}

/// Ids of all transactions, the newest first; the list has the oldest first.
#[track_caller]
pub(crate) fn transactions(store: &Path) -> Vec<String> {
    let outcome = regfs(["trash"]).arg(store).args(["list", "--json"]).outcome().exits(0);
    let list: Vec<Value> = serde_json::from_str(&outcome.stdout)
        .unwrap_or_else(|why| panic!("no JSON array ({why}): {outcome}"));
    list.iter().rev().map(|entry| text(&entry["id"])).collect()
}

/// A string as it is, anything else as JSON.
pub(crate) fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), String::from)
}
