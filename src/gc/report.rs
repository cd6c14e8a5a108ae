//! Report: what a run decided and did.
//!
//! One value, three forms: [`Report::write_text`] for people, [`Report::write_json`] for programs (its fields are
//! described in `docs/report.md`), [`Report::write_distribution`] in the words of the stock collector.
//!
//! # Cost
//! There may be millions of things: the report holds the plan and the numbers of the catalog, and makes a thing's text
//! when it is written, one at a time.

mod distribution;
mod figures;
mod json;
mod text;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytesize::ByteSize;
use serde::Serialize;

use super::Options;
use super::brake::Extent;
use super::guard::gate::Gate;
use super::guard::state::{self, State, Unreferenced};
use super::plan::{Item, ItemKind, Plan, Reason, Young};
use super::repair::Repair;
use super::sweep::Taken;
pub use crate::advice::Place;
use crate::catalog::intern::IdSet;
use crate::catalog::{Catalog, Problem, Tables};
use crate::clock::{Next, Now};
use crate::error::{Result, count};
use crate::keeper::Kept;
use crate::store::Store;
use crate::trash::purge::Purged;
use figures::Figures;
pub use json::SCHEMA;
pub use text::Details;
pub(super) use text::age;

/// What sort of run it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Nothing was changed.
    DryRun,
    /// Garbage was taken.
    Sweep,
}

/// What a run did.
#[derive(Clone)]
pub struct Report {
    /// What sort of run.
    pub mode: Mode,
    /// Bytes that are gone from the disk.
    pub freed_bytes: u64,
    /// Bytes that lie in the trash because of this run; what a dry run would take.
    pub quarantined_bytes: u64,
    /// The transaction with what was taken.
    pub transaction: Option<String>,
    /// Transactions whose undo ended because their bytes are gone.
    pub dropped_transactions: Vec<String>,
    /// Transactions purged because the trash had kept them long enough.
    pub purged_transactions: Vec<String>,
    /// What was given back because it is in use again.
    pub restored: Vec<PathBuf>,
    /// What failed after the first change.
    pub failures: Vec<String>,
    /// How much garbage is how far on its way out after this run.
    pub states: Vec<state::Total>,
    /// It was told to stop, and left out what was still to be done.
    pub is_stopped: bool,
    /// What is wrong with the clock, for people.
    pub clock: Option<String>,
    /// When the run began.
    pub started_at: SystemTime,
    /// When it ended.
    pub finished_at: SystemTime,
    options: Options,
    catalog: Catalog,
    plan: Arc<Plan>,
    /// What was taken, as places in the plan; `None`: all of it, or nothing yet.
    taken: Option<Vec<usize>>,
    /// What was made whole, as places among the repairs of the plan.
    repaired: Vec<usize>,
    figures: Figures,
    /// In a dry run that would not take all of it at once: all the garbage, of which `plan` is what goes now.
    garbage: Option<Arc<Plan>>,
    /// In a dry run: the blobs that would be fenced.
    fenced: Total,
    /// Why nothing was taken, or would be.
    refusal: Option<String>,
    /// Who keeps the tags.
    kept: Kept,
}

/// Things and their bytes.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Total {
    count: usize,
    bytes: u64,
}

/// The last second that RFC 3339 can write, the end of the year 9999.
const LAST_SECOND: Duration = Duration::from_secs(253_402_300_799);

/// So much later than it is due a step is tried: the wait is over when a look begins after it.
const STEP_MARGIN: Duration = Duration::from_millis(20);

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
    ///
    /// # Errors
    /// Looking at the size of a blob that is kept because of a problem fails.
    pub fn new(
        store: &dyn Store,
        mode: Mode,
        options: &Options,
        now: &Now,
        catalog: &Catalog,
        plan: Arc<Plan>,
    ) -> Result<Report> {
        Ok(Report {
            mode,
            freed_bytes: 0,
            quarantined_bytes: plan.bytes(),
            transaction: None,
            dropped_transactions: Vec::new(),
            purged_transactions: Vec::new(),
            restored: Vec::new(),
            failures: Vec::new(),
            states: Vec::new(),
            is_stopped: false,
            clock: now.jump.map(|jump| jump.text(store)),
            started_at: now.wall,
            finished_at: store.clocks().wall,
            options: options.clone(),
            figures: Figures::new(store, catalog, &plan)?,
            catalog: catalog.clone(),
            plan,
            taken: None,
            repaired: Vec::new(),
            garbage: None,
            fenced: Total::default(),
            refusal: None,
            kept: options.keeper.now(),
        })
    }

    /// The run stops before its first change, because it would remove too much.
    pub(super) fn brake(&mut self, extent: Extent) {
        self.set_taken(Taken::default());
        self.refusal = Some(extent.refusal());
    }

    /// Describes what a sweep would do now about the garbage that this is a report of: what it would take, which blobs it
    /// would fence, or why it would take nothing.
    pub(super) fn foresee(&mut self, plan: Plan, fence: &IdSet, refusal: Option<String>) {
        let blobs = self.plan.items.iter().filter_map(Item::blob);
        blobs.filter(|(id, _)| fence.contains(*id)).for_each(|(_, bytes)| self.fenced.add(bytes));
        self.refusal = refusal;
        self.quarantined_bytes = plan.bytes();
        self.figures.attribute(&self.catalog, &plan, &self.plan.young, None);
        self.garbage = Some(std::mem::replace(&mut self.plan, Arc::new(plan)));
    }

    /// Adds what was given back.
    pub fn set_restored(&mut self, paths: &[PathBuf]) {
        self.restored.extend_from_slice(paths);
    }

    /// All that was taken is back.
    pub(super) fn set_taken_back(&mut self, paths: &[PathBuf]) {
        let repaired = std::mem::take(&mut self.repaired);
        self.set_taken(Taken { repaired, ..Taken::default() });
        self.set_restored(paths);
    }

    /// Describes what was taken of the plan.
    pub fn set_taken(&mut self, taken: Taken) {
        let Taken { transaction, items, repaired, failures } = taken;
        self.repaired = repaired;
        if items.len() < self.plan.items.len() {
            self.figures.attribute(&self.catalog, &self.plan, &self.plan.young, Some(&items));
            self.taken = Some(items);
        }
        self.quarantined_bytes = self.taken().map(|i| i.bytes).sum();
        self.transaction = transaction;
        self.failures.extend(failures.iter().map(ToString::to_string));
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

    /// All that is garbage and old enough, whether it goes now or later; after a sweep what was taken.
    fn garbage(&self) -> Box<dyn Iterator<Item = &Item> + '_> {
        match &self.garbage {
            Some(garbage) => Box::new(garbage.items.iter()),
            None => Box::new(self.taken()),
        }
    }

    /// Whether all of the garbage that is old enough goes now.
    fn takes_all(&self) -> bool {
        self.garbage.as_ref().is_none_or(|garbage| garbage.items.len() == self.plan.items.len())
    }

    /// Who keeps the tags of the storage.
    pub fn kept(&self) -> &Kept {
        &self.kept
    }

    /// What was taken, or would be, in that order.
    pub fn taken(&self) -> impl Iterator<Item = &Item> {
        let all = self.plan.items.iter().filter(|_| self.taken.is_none());
        let some = self.taken.iter().flatten().filter_map(|at| self.plan.items.get(*at));
        all.chain(some)
    }

    /// How long until a run could take the next step of what is to be taken; `None` where nothing is, or where that does
    /// not depend on the time.
    pub fn next_step(&self) -> Option<Duration> {
        let moves_on = |total: &&state::Total| matches!(total.state, State::Candidate | State::Fenced);
        if self.states.iter().filter(moves_on).any(|total| total.due > 0) {
            return Some(STEP_MARGIN);
        }
        let times = self.states.iter().filter(moves_on).filter_map(|total| total.next);
        times.min().map(|next| next.duration_since(self.finished_at).unwrap_or_default() + STEP_MARGIN)
    }

    /// Finds out how much garbage is how far on its way out at `now`.
    pub(super) fn set_states(&mut self, store: &dyn Store, tables: &Tables, now: &Now) -> Result<()> {
        let young = self.plan.young.iter();
        let old = |young: &Young| young.last_used.map_or(Next::Due, |_| young.eligible);
        let young = young.map(|y| Unreferenced { id: y.digest, bytes: y.bytes, old: old(y) });
        let old = self.plan.items.iter().filter(|_| self.mode == Mode::DryRun).filter_map(Item::blob);
        let old = old.map(|(id, bytes)| Unreferenced { id, bytes, old: Next::Due });
        self.states = state::totals(&state::all(store, tables, young.chain(old), &self.options, now)?);
        Ok(())
    }

    /// Why nothing was taken, or would be, although there is something to take.
    pub fn held_back(&self) -> Option<String> {
        if let Some(why) = &self.refusal {
            return Some(why.clone());
        }
        let Gate::Stop { why } = &self.options.gate else { return None };
        let mut held = Total::default();
        let young = self.plan.young.iter().filter(|young| young.is_held_back);
        young.for_each(|young| held.add(young.bytes));
        if held.count == 0 {
            return None;
        }
        let what = format!("{} ({})", count(held.count, "blob"), human(held.bytes));
        let would = if self.mode == Mode::DryRun { "would be" } else { "was" };
        Some(format!("nothing {would} taken: {what} may go by age, but {why}"))
    }

    /// What the run relied on.
    pub fn gate(&self) -> &Gate {
        &self.options.gate
    }

    /// What could not be read or does not belong, with the bytes that are kept only because of it.
    fn problems(&self) -> impl Iterator<Item = (&Problem, u64)> {
        let held_back = self.figures.held_back.iter().copied().chain(std::iter::repeat(0));
        self.catalog.problems.iter().chain(&self.plan.problems).zip(held_back)
    }

    /// Where the blobs among that were, or are.
    pub(super) fn taken_blobs(&self) -> impl Iterator<Item = PathBuf> {
        let blobs = self.taken().filter(|item| item.kind() == ItemKind::Blob);
        blobs.map(|item| item.path(&self.catalog.tables))
    }

    /// Where that was, or is, below the registry directory.
    pub fn taken_paths(&self) -> impl Iterator<Item = PathBuf> {
        self.taken().map(|item| item.path(&self.catalog.tables))
    }

    /// What is broken and can be made whole, and whether it was.
    pub fn repairs(&self) -> impl Iterator<Item = (&Repair, bool)> {
        self.plan.repairs.iter().enumerate().map(|(at, repair)| (repair, self.repaired.contains(&at)))
    }

    /// What was taken, by kind; in the order of taking.
    fn totals_by_kind(&self) -> BTreeMap<ItemKind, Total> {
        let mut totals: BTreeMap<ItemKind, Total> = BTreeMap::new();
        for item in self.taken() {
            totals.entry(item.kind()).or_default().add(item.bytes);
        }
        totals
    }

    /// Some of what is garbage by kind and reason; the most bytes first.
    fn totals_by_reason<'a>(items: impl Iterator<Item = &'a Item>) -> Vec<(ItemKind, &'a Reason, Total)> {
        let mut totals: BTreeMap<(ItemKind, &Reason), Total> = BTreeMap::new();
        for item in items {
            totals.entry((item.kind(), &item.reason)).or_default().add(item.bytes);
        }
        let mut totals: Vec<_> = totals.into_iter().map(|((kind, reason), t)| (kind, reason, t)).collect();
        totals.sort_by_key(|(_, _, total)| std::cmp::Reverse((total.bytes, total.count)));
        totals
    }

    /// `2 manifests, 5 layer links and 7 blobs (1.2 MiB)`: what was taken.
    fn taken_in_words(&self) -> String {
        let totals = self.totals_by_kind();
        let bytes = match totals.values().map(|t| t.bytes).sum() {
            0 => String::new(),
            bytes => format!(" ({})", human(bytes)),
        };
        let words: Vec<String> = totals.iter().map(|(kind, t)| count(t.count, kind.noun())).collect();
        match words.split_last() {
            None => "nothing".to_string(),
            Some((last, [])) => format!("{last}{bytes}"),
            Some((last, before)) => format!("{} and {last}{bytes}", before.join(", ")),
        }
    }

    /// What came of it, in a line.
    pub fn outcome(&self) -> String {
        let is_nothing = self.taken().next().is_none();
        let what = self.taken_in_words();
        match (self.mode, &self.transaction) {
            (Mode::DryRun, _) => self.foreseen(is_nothing, &what),
            (Mode::Sweep, _) if self.refusal.is_some() => "nothing was taken".to_string(),
            (Mode::Sweep, Some(id)) => format!("took {what} into the trash as {id}"),
            (Mode::Sweep, None) if is_nothing => "nothing to take".to_string(),
            (Mode::Sweep, None) if !self.taken().any(|i| i.kind().is_moved()) => format!("removed {what}"),
            (Mode::Sweep, None) => format!("took and purged {what}"),
        }
    }

    /// What a sweep would do now, in a line.
    fn foreseen(&self, is_nothing: bool, what: &str) -> String {
        let has_garbage = self.garbage().next().is_some() || self.refusal.is_some();
        let fence = match self.fenced {
            Total { count: 0, .. } => None,
            Total { count: number, bytes } => {
                Some(format!("fence {} ({})", count(number, "blob"), human(bytes)))
            }
        };
        match (is_nothing, fence) {
            (true, None) if has_garbage => "a sweep would take nothing now".to_string(),
            (true, None) => "nothing to free".to_string(),
            (true, Some(fence)) => format!("a sweep would {fence}"),
            (false, None) => format!("a sweep would take {what}"),
            (false, Some(fence)) => format!("a sweep would take {what}, and {fence}"),
        }
    }

    /// The report for people as it reads by default.
    pub fn text(&self, place: Place<'_>, details: Details) -> String {
        let mut text = Vec::new();
        // Writing to memory can't fail.
        let _ = self.write_text(&mut text, place, details);
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl Total {
    fn add(&mut self, bytes: u64) {
        self.count += 1;
        self.bytes += bytes;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::catalog::Tables;
    use crate::digest::{Algorithm, Digest};
    use crate::gc::guard::gate::Gate;
    use crate::gc::{self, Progress};
    use crate::layout;
    use crate::store::memory::Memory;
    use crate::trash::Author;

    /// A registry of nothing but so many blobs of garbage, and a push in progress.
    fn store(garbage: usize) -> Memory {
        let store = Memory::default();
        store.write(&layout::repository("app".as_ref()).join("_uploads/1/startedat"), b"").unwrap();
        for number in 0..garbage {
            let content = format!("garbage {number}");
            let digest = Digest::of(Algorithm::Sha256, content.as_bytes());
            store.write(&layout::blob_data(&digest), content.as_bytes()).unwrap();
        }
        store
    }

    fn author() -> Author {
        Author { uid: 0, pid: 1, command: "test".to_string() }
    }

    fn options() -> Options {
        Options { grace: Duration::ZERO, gate: Gate::STOPPED, ..Options::default() }
    }

    /// Told to stop after so many steps.
    struct StopsAfter(AtomicUsize);

    impl Progress for StopsAfter {
        fn phase(&self, _name: &'static str, _total: usize) {}
        fn step(&self, count: usize) {
            self.0.fetch_sub(count, Ordering::Relaxed);
        }
        fn is_stopped(&self) -> bool {
            self.0.load(Ordering::Relaxed) == 0
        }
    }

    #[test]
    fn a_run_that_was_stopped_says_what_it_took_and_the_next_takes_the_rest() {
        let store = store(10);
        let stops = StopsAfter(AtomicUsize::new(3));
        let report = gc::run(&store, &Tables::default(), &options(), &author(), &stops).unwrap();
        assert!(report.is_stopped && report.is_complete() && report.transaction.is_some());
        assert_eq!(report.taken().count(), 3);
        assert_eq!(report.quarantined_bytes, 27);
        let text = report.text(Place::ControlFile, Details::Everything);
        assert!(text.contains("took 3 blobs (27 B)") && text.contains("\nstopped before the end"), "{text}");
        assert_eq!(text.lines().filter(|line| line.starts_with("blob ")).count(), 3, "{text}");

        let report = gc::run(&store, &Tables::default(), &options(), &author(), &gc::Unwatched).unwrap();
        assert!(!report.is_stopped);
        assert_eq!(report.taken().count(), 7);
    }

    #[test]
    fn a_control_file_lists_single_things_where_they_are_few() {
        let details = |garbage: usize| {
            let store = store(garbage);
            let options = Options { dry_run: true, ..options() };
            let report = gc::run(&store, &Tables::default(), &options, &author(), &gc::Unwatched).unwrap();
            report.details_for_control_file()
        };
        assert_eq!(details(1000), Details::Everything);
        assert_eq!(details(1001), Details::Totals);
    }
}
