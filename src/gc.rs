//! Garbage collection: `list → mark → plan → re-check → take → (keep) → purge`, each its own function.
//!
//! [`run`] is the one way a collection happens, from the command line and from the control file alike.
//!
//! # Rules kept here
//! 1. Unknown means reachable; a failing call ends the run before the first change ([`crate::catalog`]).
//! 2. Every decision is in the [`plan::Plan`], a value; a dry run prints it, a sweep executes the same.
//! 3. Before anything is taken the store is looked at again, and what is no longer garbage is left; after it once
//!    more, and what a push relies on by then is given back before anything is purged.
//! 4. Taking is moving to the trash, in the order revision → layer link → blob with a sync between the steps,
//!    so that the registry is valid at every instant. Only a purge removes bytes.
//! 5. What a manifest names again is given back before anything else ([`guard`]).

pub mod guard;
pub mod mark;
pub mod plan;
pub mod report;
pub mod sweep;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::catalog::scan::scan_strictly;
use crate::catalog::{Catalog, Tables};
use crate::error::{Error, Result};
pub use crate::progress::{Progress, Unwatched};
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
    let policy = Policy { untagged: options.untagged, grace: options.grace, now: SystemTime::now() };
    if options.dry_run {
        progress.phase("mark", 0);
        let catalog = scan_strictly(store, tables, None)?;
        progress.phase("plan", 0);
        let plan = Plan::new(store, &catalog, &policy)?;
        return Report::new(store, Mode::DryRun, options, policy.now, &catalog, Arc::new(plan));
    }
    let _lock = store.lock(&author.command, LOCK_WAIT)?;
    progress.phase("mark", 0);
    let (catalog, restored) = give_back(store, tables)?;
    progress.phase("plan", 0);
    let plan = Plan::new(store, &catalog, &policy)?;

    progress.phase("re-check", 0);
    let catalog = scan_strictly(store, tables, Some(&catalog))?;
    let plan = Arc::new(plan.confirmed_by(Plan::new(store, &catalog, &policy)?));
    if progress.is_stopped() {
        return Err(Error::Busy { why: "stopped before the first change".to_string() });
    }
    let mut report = Report::new(store, Mode::Sweep, options, policy.now, &catalog, plan.clone())?;
    report.set_restored(&restored);
    let taken = sweep::take(store, &catalog, &plan, options, author, progress)?;
    report.set_taken(taken);

    // Things were taken by now: whatever fails from here on belongs into the report of that.
    if let Err(e) = finish(store, tables, options, policy.now, progress, &mut report) {
        report.failures.push(e.to_string());
    }
    report.finished_at = SystemTime::now();
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
    let (_, restored) = give_back(store, tables)?;
    let doomed = selection.of(store, SystemTime::now())?;
    let purged = trash::purge::purge(store, &doomed, &Unwatched)?;
    Ok(Purged { restored, ..purged })
}

/// Looks at the store and gives back what is in use again; the catalog afterwards, and what came back.
fn give_back(store: &dyn Store, tables: &Tables) -> Result<(Catalog, Vec<PathBuf>)> {
    let look = |previous: &Catalog| scan_strictly(store, tables, Some(previous));
    guard::give_back(store, scan_strictly(store, tables, None)?, &look)
}

/// Gives back what a push relies on that came meanwhile, then purges what the trash has kept long enough and, with
/// `now`, what was just taken.
fn finish(
    store: &dyn Store,
    tables: &Tables,
    options: &Options,
    now: SystemTime,
    progress: &dyn Progress,
    report: &mut Report,
) -> Result<()> {
    progress.phase("look back", 0);
    report.set_restored(&give_back(store, tables)?.1);
    if progress.is_stopped() {
        report.is_stopped = true;
        return Ok(());
    }
    let left = trash::ids(store)?;
    let own = report.transaction.clone().filter(|id| left.contains(id));
    let mut doomed = Selection::Older(options.keep).of(store, now)?;
    doomed.retain(|id| Some(id) != own.as_ref());
    if let Some(own) = own.filter(|_| options.now) {
        let ended = trash::purge::undone_only_with(store, &own)?;
        report.dropped_transactions = ended.clone();
        doomed.extend(ended);
        doomed.push(own);
        doomed.sort_unstable();
        doomed.dedup();
    }
    if !doomed.is_empty() {
        let purged = trash::purge::purge(store, &doomed, progress)?;
        report.set_purged(purged, options.now);
    }
    Ok(())
}
