//! Garbage collection: `list → mark → plan → re-check → take → (keep) → purge`, each its own function.
//!
//! [`run`] is the one way a collection happens, from the command line and from the control file alike.
//!
//! # Rules kept here
//! 1. Unknown means reachable; a failing call ends the run before the first change ([`crate::catalog`]).
//! 2. Every decision is in the [`plan::Plan`], a value; a dry run prints it, a sweep executes the same.
//! 3. Before anything is taken the store is looked at again, and what is no longer garbage is left.
//! 4. Taking is moving to the trash, in the order revision → layer link → blob with a sync between the steps,
//!    so that the registry is valid at every instant. Only a purge removes bytes.
//! 5. What a manifest names again is given back before anything else ([`guard`]).

pub mod guard;
pub mod mark;
pub mod plan;
pub mod report;
pub mod sweep;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use crate::catalog::scan::scan_strictly;
use crate::catalog::{Catalog, Tables};
use crate::error::{Error, Result};
use crate::store::Store;
use crate::trash::purge::Purged;
use crate::trash::undo::Undone;
use crate::trash::{self, Author, Selection};
use plan::{Plan, Policy};
use report::{Mode, Report};

/// What a run is asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Say what would be done, change nothing.
    pub dry_run: bool,
    /// Collect revisions that no tag leads to, too.
    pub untagged: bool,
    /// What was used more recently than this is left.
    pub grace: Duration,
    /// How long the trash keeps what was taken.
    pub keep: Duration,
    /// Free the bytes at once, for a registry that is stopped or read-only.
    pub now: bool,
}

/// Youngest age that is touched, unless told otherwise.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(24 * 3600);
/// How long the trash keeps things, unless told otherwise.
pub const DEFAULT_KEEP: Duration = Duration::from_secs(7 * 24 * 3600);

impl Default for Options {
    fn default() -> Options {
        Options { dry_run: false, untagged: false, grace: DEFAULT_GRACE, keep: DEFAULT_KEEP, now: false }
    }
}

/// Where a run is, for whoever watches, and how to stop it.
pub trait Progress: Sync {
    /// A phase begins; `total` things are to be done in it, 0 where that is not known.
    fn phase(&self, name: &'static str, total: usize);
    /// One thing is done.
    fn step(&self);
    /// Asked between two steps; a run that is told to stop ends cleanly.
    fn is_stopped(&self) -> bool;
}

/// Nobody watches.
#[derive(Default)]
pub struct Unwatched(AtomicBool);

impl Progress for Unwatched {
    fn phase(&self, _name: &'static str, _total: usize) {}
    fn step(&self) {}
    fn is_stopped(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// How long a run waits for another regfs that changes the store.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// Collects the garbage of a store, or says what there is.
///
/// # Errors
/// Everything up to the first change: [`Error::Unjudged`] with all that can't be judged, [`Error::Busy`] when
/// another regfs changes the store, failing calls. After it, failures are listed in the report.
pub fn run(
    store: &dyn Store,
    tables: &Tables,
    options: &Options,
    author: &Author,
    progress: &dyn Progress,
) -> Result<Report> {
    let now = SystemTime::now();
    if options.dry_run {
        let (catalog, plan) = look(store, tables, None, options, now, progress)?;
        return Ok(Report::new(Mode::DryRun, options, &catalog, &plan));
    }
    let _lock = store.lock(&author.command, LOCK_WAIT)?;
    progress.phase("give back", 0);
    let restored = give_back(store, tables)?;
    let (catalog, plan) = look(store, tables, None, options, now, progress)?;
    let mut report = Report::new(Mode::Sweep, options, &catalog, &plan);
    report.set_restored(&restored);

    progress.phase("re-check", 0);
    let (again, confirmed) = look(store, tables, Some(&catalog), options, now, progress)?;
    let plan = plan.confirmed_by(&confirmed);
    report.set_plan(&again, &plan);
    let taken = sweep::take(store, &again, &plan, options, author, progress);
    report.set_taken(&plan, taken)?;

    if !progress.is_stopped() {
        progress.phase("purge", 0);
        // Things were taken by now: whatever fails belongs into the report of that.
        if let Err(e) = purge(store, tables, options, now, &mut report) {
            report.failures.push(e.to_string());
        }
    }
    Ok(report)
}

/// Gives back a transaction of the trash and what it names.
pub fn undo(store: &dyn Store, author: &Author, id: &str) -> Result<Undone> {
    let _lock = store.lock(&author.command, LOCK_WAIT)?;
    trash::undo::undo(store, id)
}

/// Purges transactions of the trash, after giving back what a manifest names again.
pub fn purge_trash(
    store: &dyn Store,
    tables: &Tables,
    author: &Author,
    selection: &Selection,
) -> Result<Purged> {
    let _lock = store.lock(&author.command, LOCK_WAIT)?;
    give_back(store, tables)?;
    trash::purge::purge(store, &selection.of(store, SystemTime::now())?)
}

/// Gives back what a manifest names again.
fn give_back(store: &dyn Store, tables: &Tables) -> Result<Vec<PathBuf>> {
    let look = |previous: &Catalog| scan_strictly(store, tables, Some(previous));
    let (_, restored) = guard::give_back(store, scan_strictly(store, tables, None)?, &look)?;
    Ok(restored)
}

/// List, mark and plan.
fn look(
    store: &dyn Store,
    tables: &Tables,
    previous: Option<&Catalog>,
    options: &Options,
    now: SystemTime,
    progress: &dyn Progress,
) -> Result<(Catalog, Plan)> {
    progress.phase("mark", 0);
    let catalog = scan_strictly(store, tables, previous)?;
    let policy = Policy { untagged: options.untagged, grace: options.grace, now };
    progress.phase("plan", 0);
    let plan = Plan::new(store, &catalog, &policy)?;
    match progress.is_stopped() {
        true => Err(Error::Busy { why: "stopped before the first change".to_string() }),
        false => Ok((catalog, plan)),
    }
}

/// Purges what the trash has kept long enough and, with `now`, what was just taken.
fn purge(
    store: &dyn Store,
    tables: &Tables,
    options: &Options,
    now: SystemTime,
    report: &mut Report,
) -> Result<()> {
    let expired =
        trash::contents(store)?.into_iter().filter(|t| t.is_older_than(options.keep, now)).map(|t| t.id);
    let mut doomed: Vec<String> = expired.collect();
    if let Some(id) = report.transaction.clone().filter(|_| options.now) {
        let ended = trash::purge::undone_only_with(store, &id)?;
        report.dropped_transactions = ended.clone();
        doomed.extend(ended);
        doomed.push(id);
        doomed.sort_unstable();
        doomed.dedup();
    }
    if !doomed.is_empty() {
        // A push may have named what is about to go while this run looked and took.
        report.set_restored(&give_back(store, tables)?);
        let left = trash::ids(store)?;
        doomed.retain(|id| left.contains(id));
        let purged = trash::purge::purge(store, &doomed)?;
        report.set_purged(purged, options.now);
    }
    Ok(())
}
