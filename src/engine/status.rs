//! `control/status`: what a mounted registry is doing, as JSON.

use std::sync::atomic::Ordering;

use super::guarding::Guarded;
use super::{Engine, locked};
use crate::advice::Place;
use crate::gc::guard::gate::Gate;
use crate::gc::guard::state;
use crate::gc::report::timestamp;
use crate::view::Snapshot;

/// What `control/status` says.
#[derive(serde::Serialize)]
struct Status {
    /// `idle` or `running`: a collection.
    state: &'static str,
    /// What it is doing, how much of that is done, and of how much; 0 where that is not known.
    phase: &'static str,
    done: usize,
    total: usize,
    /// Bytes dealt with in this phase.
    bytes: u64,
    /// When the run began, RFC 3339, and how long ago that was; `null` when none runs.
    started_at: Option<String>,
    elapsed_seconds: Option<f64>,
    /// How long this phase may yet take; `null` where that is not known.
    eta_seconds: Option<f64>,
    last_error: Option<String>,
    pid: u32,
    version: &'static str,
    store: String,
    read_only: bool,
    repositories: usize,
    manifests: usize,
    blobs: usize,
    problems: usize,
    transactions: usize,
    /// What sweeps rely on, as of the mount or the last sweep: `stopped`, `off`, `probe` or `stop`, and the same for people;
    /// `null` before that is known.
    gate: Option<&'static str>,
    gate_reason: Option<String>,
    /// Who keeps the tags: `storage`, `harbor` (they are in Harbor's database) or `database` (in that of a GitLab registry,
    /// and nothing is changed here); and what tells it, for people.
    metadata: &'static str,
    metadata_reason: String,
    /// What is wrong with the clock, for people; `null` where nothing is.
    clock: Option<String>,
    /// How much garbage is how far on its way out.
    garbage: Vec<state::Total>,
    /// When the next one begins by itself, RFC 3339; `null` where none does.
    next_sweep: Option<String>,
    /// What `--guard` has done; `null` without.
    guard: Option<Guarded>,
    /// `events`: the kernel tells of changes; `looks`: the storage is looked at when somebody looks here.
    freshness: &'static str,
    /// Why the kernel does not tell; `null` where it does, or is just being asked to.
    freshness_reason: Option<String>,
    /// When the storage was last found changed, RFC 3339.
    looked_at: String,
    /// How long the last look took.
    look_seconds: f64,
}

impl Engine {
    /// How much garbage is how far on its way out, by what this mount says of ages.
    pub(super) fn garbage(&self, snapshot: &Snapshot) -> Vec<state::Total> {
        self.garbage.get(|| match self.standings(snapshot) {
            Ok(standings) => state::totals(&standings),
            Err(e) => {
                log::warn!("could not look at how far garbage is: {e}");
                Vec::new()
            }
        })
    }

    /// The content of `control/status`.
    pub(super) fn status(&self) -> String {
        let snapshot = self.current();
        let is_running = self.run.is_running.load(Ordering::Relaxed);
        let cost = locked(&self.looked).cost;
        let run = is_running.then(|| self.run.watched.look());
        // Nothing is locked any more when garbage is looked for, which wants the same.
        let (gate, next_sweep, unwatched, last_error) = {
            let reports = locked(&self.reports);
            (reports.gate.clone(), reports.next_sweep, reports.unwatched.clone(), reports.last_error.clone())
        };
        let guard = locked(&self.guarded).clone();
        let kept = self.keeper().now();
        let status = Status {
            state: if is_running { "running" } else { "idle" },
            phase: run.map_or("", |r| r.phase),
            done: run.map_or(0, |r| r.done),
            total: run.map_or(0, |r| r.total),
            bytes: run.map_or(0, |r| r.bytes),
            started_at: run.map(|r| timestamp(r.started_at)),
            elapsed_seconds: run.map(|r| r.elapsed.as_secs_f64()),
            eta_seconds: run.and_then(|r| r.eta).map(|eta| eta.as_secs_f64()),
            last_error: last_error.map(|e| Place::ControlFile.say(&e)),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION"),
            store: self.store.full(std::path::Path::new("")).to_string_lossy().into_owned(),
            read_only: self.settings.read_only,
            repositories: snapshot.catalog.repositories.len(),
            manifests: snapshot.catalog.manifests.len(),
            blobs: snapshot.catalog.blobs.len(),
            problems: snapshot.catalog.problems.len(),
            transactions: snapshot.trash.len(),
            gate: gate.as_ref().map(Gate::word),
            gate_reason: gate.as_ref().map(|gate| Place::ControlFile.say(&gate.to_string())),
            metadata: kept.word(),
            metadata_reason: kept.to_string(),
            clock: self.view(&snapshot).now().jump.map(|jump| jump.text(&*self.store)),
            garbage: self.garbage(&snapshot),
            next_sweep: next_sweep.map(timestamp),
            guard,
            freshness: if self.is_watching() { "events" } else { "looks" },
            freshness_reason: unwatched,
            looked_at: timestamp(snapshot.catalog.scanned_at),
            look_seconds: cost.as_secs_f64(),
        };
        // Pretty-printing a value made here can't fail.
        serde_json::to_string_pretty(&status).unwrap_or_default() + "\n"
    }
}
