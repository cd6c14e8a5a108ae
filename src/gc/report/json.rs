//! The report for programs. Its fields are described in `docs/report.md`; a test compares the two.

use std::io::{self, Write};

use serde::{Serialize, Serializer};

use super::{Mode, Report, timestamp};
use crate::advice::Place;
use crate::clock::promised;
use crate::digest::Digest;
use crate::gc::guard::state::Total;
use crate::gc::plan::ItemKind;

/// The version of the form: a number more when a field changes its meaning or goes; fields may be added without.
pub const SCHEMA: u32 = 1;

/// The report; lists are made while they are written.
#[derive(Serialize)]
struct Json<'a> {
    schema: u32,
    mode: Mode,
    started_at: String,
    finished_at: String,
    stopped: bool,
    grace_seconds: u64,
    thorough: bool,
    repositories: usize,
    manifests: usize,
    blobs: usize,
    kept_blobs: usize,
    kept_bytes: u64,
    freed_bytes: u64,
    quarantined_bytes: u64,
    young_bytes: u64,
    transaction: Option<&'a str>,
    gate: &'a str,
    gate_reason: String,
    metadata: &'static str,
    held_back: Option<String>,
    clock: Option<&'a str>,
    states: &'a [Total],
    by_kind: Vec<KindTotal>,
    by_reason: Vec<ReasonTotal>,
    by_repository: Repositories<'a>,
    taken: Taken<'a>,
    kept_young: Young<'a>,
    kept_young_manifests: YoungManifests<'a>,
    repairs: Vec<ReportedRepair>,
    dropped_transactions: &'a [String],
    purged_transactions: &'a [String],
    restored: Vec<String>,
    failures: Vec<String>,
    problems: Problems<'a>,
}

#[derive(Serialize)]
struct KindTotal {
    kind: ItemKind,
    count: usize,
    bytes: u64,
}

#[derive(Serialize)]
struct ReasonTotal {
    kind: ItemKind,
    reason: String,
    count: usize,
    bytes: u64,
}

#[derive(Serialize)]
struct RepositoryUsage {
    /// `null`: garbage that no repository claims.
    repository: Option<String>,
    kept_bytes: u64,
    taken_bytes: u64,
    garbage_bytes: u64,
    young_bytes: u64,
    manifests_taken: usize,
}

#[derive(Serialize)]
struct TakenItem {
    kind: ItemKind,
    path: String,
    digest: Option<Digest>,
    bytes: u64,
    reason: String,
}

#[derive(Serialize)]
struct KeptYoung {
    digest: Digest,
    bytes: u64,
    eligible_at: Option<String>,
}

#[derive(Serialize)]
struct KeptYoungManifest {
    repository: String,
    digest: Digest,
    /// `null`: a younger manifest holds it.
    eligible_at: Option<String>,
}

#[derive(Serialize)]
struct ReportedRepair {
    path: String,
    what: String,
    done: bool,
}

#[derive(Serialize)]
struct ReportedProblem<'a> {
    path: String,
    what: &'a str,
    effect: String,
    held_back_bytes: u64,
}

struct Repositories<'a>(&'a Report);
struct Taken<'a>(&'a Report);
struct Young<'a>(&'a Report);
struct YoungManifests<'a>(&'a Report);
struct Problems<'a>(&'a Report);

impl Serialize for Repositories<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let figures = &self.0.figures;
        serializer.collect_seq(figures.repositories.iter().chain([&figures.unclaimed]).map(|usage| {
            let name = usage.repository.to_string_lossy().into_owned();
            RepositoryUsage {
                repository: (!name.is_empty()).then_some(name),
                kept_bytes: usage.kept_bytes,
                taken_bytes: usage.taken_bytes,
                garbage_bytes: usage.garbage_bytes,
                young_bytes: usage.young_bytes,
                manifests_taken: usage.manifests_taken,
            }
        }))
    }
}

impl Serialize for Taken<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let tables = &self.0.catalog.tables;
        serializer.collect_seq(self.0.taken().map(|item| TakenItem {
            kind: item.kind(),
            path: item.path(tables).to_string_lossy().into_owned(),
            digest: item.digest().map(|id| tables.digests.get(id)),
            bytes: item.bytes,
            reason: item.reason.to_string(),
        }))
    }
}

impl Serialize for Young<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Report { catalog, plan, .. } = self.0;
        serializer.collect_seq(plan.young.iter().map(|young| KeptYoung {
            digest: catalog.digest(young.digest),
            bytes: young.bytes,
            eligible_at: young.eligible.time().map(promised),
        }))
    }
}

impl Serialize for YoungManifests<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Report { catalog, plan, .. } = self.0;
        serializer.collect_seq(plan.young_manifests.iter().map(|young| KeptYoungManifest {
            repository: catalog.name(young.repository).to_string_lossy().into_owned(),
            digest: catalog.digest(young.digest),
            eligible_at: young.eligible_at.map(promised),
        }))
    }
}

impl Serialize for Problems<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.problems().map(|(problem, held_back_bytes)| ReportedProblem {
            path: problem.path.to_string_lossy().into_owned(),
            what: &problem.what,
            effect: problem.effect.to_string(),
            held_back_bytes,
        }))
    }
}

impl Report {
    /// Writes the report for programs, with a line feed at the end.
    pub fn write_json(&self, out: &mut dyn Write, place: Place<'_>) -> io::Result<()> {
        let by_kind = self.totals_by_kind().into_iter();
        let by_reason = Report::totals_by_reason(self.taken()).into_iter();
        let json = Json {
            schema: SCHEMA,
            mode: self.mode,
            started_at: timestamp(self.started_at),
            finished_at: timestamp(self.finished_at),
            stopped: self.is_stopped,
            grace_seconds: self.options.grace.as_secs(),
            thorough: self.plan.is_thorough,
            repositories: self.catalog.repositories.len(),
            manifests: self.catalog.manifests.len(),
            blobs: self.catalog.blobs.len(),
            kept_blobs: self.figures.kept_blobs,
            kept_bytes: self.figures.kept_bytes,
            freed_bytes: self.freed_bytes,
            quarantined_bytes: self.quarantined_bytes,
            young_bytes: self.plan.young.iter().map(|y| y.bytes).sum(),
            transaction: self.transaction.as_deref(),
            gate: self.options.gate.word(),
            gate_reason: place.say(&self.options.gate.to_string()),
            metadata: self.kept.word(),
            held_back: self.held_back().map(|why| place.say(&why)),
            clock: self.clock.as_deref(),
            states: &self.states,
            by_kind: by_kind.map(|(kind, t)| KindTotal { kind, count: t.count, bytes: t.bytes }).collect(),
            by_reason: by_reason
                .map(|(kind, reason, t)| ReasonTotal {
                    kind,
                    reason: reason.to_string(),
                    count: t.count,
                    bytes: t.bytes,
                })
                .collect(),
            by_repository: Repositories(self),
            taken: Taken(self),
            kept_young: Young(self),
            kept_young_manifests: YoungManifests(self),
            repairs: self
                .repairs()
                .map(|(repair, done)| ReportedRepair {
                    path: repair.path.to_string_lossy().into_owned(),
                    what: repair.fix.to_string(),
                    done,
                })
                .collect(),
            dropped_transactions: &self.dropped_transactions,
            purged_transactions: &self.purged_transactions,
            restored: self.restored.iter().map(|path| path.to_string_lossy().into_owned()).collect(),
            failures: self.failures.iter().map(|failure| place.say(failure)).collect(),
            problems: Problems(self),
        };
        serde_json::to_writer_pretty(&mut *out, &json)?;
        writeln!(out)
    }
}
