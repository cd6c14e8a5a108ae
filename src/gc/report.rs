//! Report: what a run decided and did, as text and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use bytesize::ByteSize;
use serde::Serialize;

use super::Options;
use super::plan::{Item, ItemKind, Plan, Young};
use super::repair::Repair;
use super::sweep::Taken;
use crate::catalog::{Catalog, Problem, Tables};
use crate::digest::Digest;
use crate::error::count;
use crate::trash::purge::Purged;

/// What sort of run it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Nothing was changed.
    DryRun,
    /// Garbage was taken.
    Sweep,
}

/// What a run did. Its JSON form is stable.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What sort of run.
    pub mode: Mode,
    /// Repositories looked at.
    pub repositories: usize,
    /// Manifests looked at.
    pub manifests: usize,
    /// Blobs in the store, garbage included.
    pub blobs: usize,
    /// Bytes that are gone from the disk.
    pub freed_bytes: u64,
    /// Bytes that lie in the trash because of this run; what a dry run would take.
    pub quarantined_bytes: u64,
    /// The transaction with what was taken.
    pub transaction: Option<String>,
    /// What was taken, or would be.
    pub taken: Vec<TakenItem>,
    /// What is broken and can be made whole; of a sweep with `repair`, what was.
    pub repairs: Vec<ReportedRepair>,
    /// Whether every directory was looked into.
    pub thorough: bool,
    /// Garbage that is too young.
    pub kept_young: Vec<KeptYoung>,
    /// Transactions whose undo ended because their bytes are gone.
    pub dropped_transactions: Vec<String>,
    /// Transactions purged because the trash had kept them long enough.
    pub purged_transactions: Vec<String>,
    /// What was given back because it is in use again.
    pub restored: Vec<String>,
    /// What failed after the first change.
    pub failures: Vec<String>,
    /// What could not be read or does not belong, and what is kept because of it.
    pub problems: Vec<ReportedProblem>,
    #[serde(skip)]
    grace: Duration,
}

/// Something taken, or that would be.
#[derive(Clone, Debug, Serialize)]
pub struct TakenItem {
    /// What sort.
    pub kind: ItemKind,
    /// What moves, below the registry directory.
    pub path: PathBuf,
    /// The content it is or leads to.
    pub digest: Option<Digest>,
    /// Bytes that a purge frees.
    pub bytes: u64,
    /// Why it is garbage.
    pub reason: String,
}

impl TakenItem {
    fn new(item: &Item, tables: &Tables) -> TakenItem {
        TakenItem {
            kind: item.kind(),
            path: item.path(tables),
            digest: item.digest().map(|id| tables.digests.get(id)),
            bytes: item.bytes,
            reason: item.reason.to_string(),
        }
    }
}

/// Garbage that is too young.
#[derive(Clone, Debug, Serialize)]
pub struct KeptYoung {
    /// Which.
    pub digest: Digest,
    /// Bytes.
    pub bytes: u64,
    /// From when on it may be taken, RFC 3339.
    pub eligible_at: String,
}

/// Something broken that can be made whole.
#[derive(Clone, Debug, Serialize)]
pub struct ReportedRepair {
    /// Where, below the registry directory.
    pub path: PathBuf,
    /// What is wrong, and what belongs there.
    pub what: String,
    /// Whether it was made whole.
    pub done: bool,
}

/// Something that could not be read or does not belong.
#[derive(Clone, Debug, Serialize)]
pub struct ReportedProblem {
    /// Where, below the registry directory.
    pub path: String,
    /// What is wrong.
    pub what: String,
    /// What is kept because of it.
    pub effect: String,
}

/// The last second that RFC 3339 can write, the end of the year 9999.
const LAST_SECOND: Duration = Duration::from_secs(253_402_300_799);

/// RFC 3339, whole seconds; file times and ages beyond the year 9999 show as its end.
pub fn timestamp(time: SystemTime) -> String {
    let writable = time.clamp(SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH + LAST_SECOND);
    humantime::format_rfc3339_seconds(writable).to_string()
}

/// Bytes for people.
pub fn human(bytes: u64) -> String {
    ByteSize::b(bytes).to_string()
}

impl Report {
    /// The report of a plan; until it is executed, of what executing it would take.
    pub fn new(mode: Mode, options: &Options, catalog: &Catalog, plan: &Plan) -> Report {
        let problem = |p: &Problem| ReportedProblem {
            path: p.path.display().to_string(),
            what: p.what.clone(),
            effect: p.effect.to_string(),
        };
        let young = |y: &Young| KeptYoung {
            digest: catalog.digest(y.digest),
            bytes: y.bytes,
            eligible_at: timestamp(y.eligible_at),
        };
        let repair =
            |r: &Repair| ReportedRepair { path: r.path.clone(), what: r.fix.to_string(), done: false };
        Report {
            mode,
            repositories: catalog.repositories.len(),
            manifests: catalog.manifests.len(),
            blobs: catalog.blobs.len(),
            freed_bytes: 0,
            quarantined_bytes: plan.bytes(),
            transaction: None,
            taken: plan.items.iter().map(|i| TakenItem::new(i, &catalog.tables)).collect(),
            repairs: plan.repairs.iter().map(repair).collect(),
            thorough: plan.is_thorough,
            kept_young: plan.young.iter().map(young).collect(),
            dropped_transactions: Vec::new(),
            purged_transactions: Vec::new(),
            restored: Vec::new(),
            failures: Vec::new(),
            problems: catalog.problems.iter().chain(&plan.problems).map(problem).collect(),
            grace: options.grace,
        }
    }

    /// Adds what was given back.
    pub fn set_restored(&mut self, paths: &[PathBuf]) {
        self.restored.extend(paths.iter().map(|path| path.display().to_string()));
    }

    /// Describes what was taken of `plan`.
    pub fn set_taken(&mut self, tables: &Tables, plan: &Plan, taken: Taken) {
        let items = taken.items.iter().filter_map(|at| plan.items.get(*at));
        self.taken = items.map(|item| TakenItem::new(item, tables)).collect();
        self.quarantined_bytes = self.taken.iter().map(|i| i.bytes).sum();
        self.transaction = taken.transaction;
        for (at, repair) in self.repairs.iter_mut().enumerate() {
            repair.done = taken.repaired.contains(&at);
        }
        self.failures.extend(taken.failures.iter().map(ToString::to_string));
    }

    /// Describes what was purged; `now` purged what this run took, too.
    pub fn set_purged(&mut self, purged: Purged, now: bool) {
        self.freed_bytes += purged.bytes;
        let own = self.transaction.take_if(|id| now && purged.transactions.contains(id));
        if own.is_some() {
            self.quarantined_bytes = 0;
        }
        let ended = |id: &String| self.dropped_transactions.contains(id) || own.as_ref() == Some(id);
        self.purged_transactions = purged.transactions.iter().filter(|id| !ended(id)).cloned().collect();
        self.failures.extend(purged.failures.iter().map(ToString::to_string));
    }

    /// Whether all that was begun is done.
    pub fn is_complete(&self) -> bool {
        self.failures.is_empty()
    }

    /// The report for people: one line per thing, then a summary.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string can't fail.
        let _ = self.write_text(&mut text);
        text
    }

    fn write_text(&self, f: &mut String) -> std::fmt::Result {
        for p in &self.problems {
            writeln!(f, "problem: {}; {}", p.what, p.effect)?;
        }
        for path in &self.restored {
            writeln!(f, "given back {path}: it is in use again")?;
        }
        for item in &self.taken {
            match item.kind {
                ItemKind::Blob => {
                    let digest = item.digest.map(|digest| digest.to_string()).unwrap_or_default();
                    writeln!(f, "blob {digest} {} {}", item.bytes, item.reason)?;
                }
                kind => {
                    let word = kind.noun().replace(' ', "-");
                    writeln!(f, "{word} {} {}", item.path.display(), item.reason)?;
                }
            }
        }
        for repair in &self.repairs {
            let word = if repair.done { "repaired" } else { "repair" };
            writeln!(f, "{word} {}: {}", repair.path.display(), repair.what)?;
        }
        for young in &self.kept_young {
            writeln!(
                f,
                "young {} {} unreferenced, may be taken from {}",
                young.digest, young.bytes, young.eligible_at
            )?;
        }
        for id in &self.dropped_transactions {
            writeln!(f, "dropped {id} from the trash: its undo needed bytes that are gone now")?;
        }
        for id in &self.purged_transactions {
            writeln!(f, "purged {id}: the trash kept it long enough")?;
        }
        for failure in &self.failures {
            writeln!(f, "failed: {failure}")?;
        }
        self.write_summary(f)
    }

    /// What came of it, in a line.
    pub fn outcome(&self) -> String {
        let what = self.what();
        match (self.mode, &self.transaction) {
            (Mode::DryRun, _) if self.taken.is_empty() => "nothing to free".to_string(),
            (Mode::DryRun, _) => format!("a sweep would take {what}"),
            (Mode::Sweep, Some(id)) => {
                format!("took {what} into the trash as {id}; undo or purge brings them back or frees them")
            }
            (Mode::Sweep, None) if self.taken.is_empty() => "nothing to take".to_string(),
            (Mode::Sweep, None) if !self.taken.iter().any(|i| i.kind.is_moved()) => format!("removed {what}"),
            (Mode::Sweep, None) => format!("took and purged {what}"),
        }
    }

    /// What was taken, counted by kind; blobs first, with the bytes of all of it.
    fn what(&self) -> String {
        let mut counts: BTreeMap<ItemKind, usize> = BTreeMap::new();
        self.taken.iter().for_each(|item| *counts.entry(item.kind).or_default() += 1);
        let blobs = counts.remove(&ItemKind::Blob).unwrap_or(0);
        let bytes = human(self.taken.iter().map(|i| i.bytes).sum());
        let others = counts.into_iter().map(|(kind, number)| count(number, kind.noun()));
        let all: Vec<String> =
            std::iter::once(format!("{} ({bytes})", count(blobs, "blob"))).chain(others).collect();
        all.join(", ")
    }

    fn write_summary(&self, f: &mut String) -> std::fmt::Result {
        writeln!(
            f,
            "looked at {}, {}, {}",
            count(self.repositories, "repository"),
            count(self.manifests, "manifest"),
            count(self.blobs, "blob"),
        )?;
        writeln!(f, "{}", self.outcome())?;
        if self.mode == Mode::Sweep && self.freed_bytes > 0 {
            writeln!(f, "freed {} in all", human(self.freed_bytes))?;
        }
        if !self.kept_young.is_empty() {
            let bytes = self.kept_young.iter().map(|y| y.bytes).sum();
            writeln!(
                f,
                "left {} ({}) that {} younger than the grace period of {}",
                count(self.kept_young.len(), "unreferenced blob"),
                human(bytes),
                if self.kept_young.len() == 1 { "is" } else { "are" },
                humantime::format_duration(self.grace),
            )?;
        }
        let broken = self.repairs.iter().filter(|r| !r.done).count();
        if broken > 0 {
            writeln!(
                f,
                "{} can be made whole by a sweep with repair",
                count(broken, "broken or missing link")
            )?;
        }
        if !self.thorough {
            writeln!(
                f,
                "a sweep also looks into every directory for leftovers; so does a dry run with thorough"
            )?;
        }
        match self.failures.len() {
            0 => Ok(()),
            failed => {
                writeln!(f, "not finished: {}; run it again when that is mended", count(failed, "failure"))
            }
        }
    }
}
