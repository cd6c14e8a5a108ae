//! Garbage collection: `list → mark → plan → re-check → take → (keep) → purge`, each its own function.
//!
//! [`run`] is the one way a collection happens, from the command line and from the control file alike.
//!
//! # Rules kept here
//! 1. Unknown means reachable; a failing call ends the run before the first change ([`crate::catalog`]).
//! 2. Every decision is in the [`plan::Plan`], a value; a dry run prints it, a sweep executes the same.
//! 3. The first look needs no lock, and beside a registry takes its time ([`crate::store::resting`]). Before anything is
//!    taken the store is looked at again, with the lock, and what is no longer garbage is left; after it once
//!    more, and what a push relies on by then is given back before anything is purged.
//! 4. Taking is moving to the trash, in the order tag → revision → layer link → blob with a sync between the steps,
//!    so that the registry is valid at every instant; then the rest of the leftovers. Only a purge removes bytes; a
//!    sweep itself removes nothing but directories with nothing in them.
//! 5. What a manifest names again is given back before anything else ([`mod@give_back`]).
//! 6. Unless it is said that no registry runs, blobs go in steps, a run for each ([`guard`]).

pub mod forget;
pub mod give_back;
pub mod guard;
pub mod leftovers;
pub mod mark;
pub mod named;
mod orphans;
pub mod plan;
pub mod repair;
pub mod report;
pub mod sweep;
pub mod why;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::catalog::cache::{self, News, Place};
use crate::catalog::scan::{Depth, scan_once, scan_strictly};
use crate::catalog::{Catalog, Effect, Keeps, Tables};
use crate::clock::Moment;
use crate::digest::Digest;
use crate::error::{self, Error, Result};
use crate::layout;
pub use crate::progress::{Progress, Unwatched};
use crate::store::Store;
use crate::store::limited::Limited;
use crate::store::resting::Resting;
use crate::trash::purge::Purged;
use crate::trash::undo::Undone;
use crate::trash::{self, Author, Selection};
use guard::gate::Gate;
use guard::{DEFAULT_DRAIN, Round};
use named::Named;
use plan::{Plan, Policy};
use report::{Mode, Report};

/// What a run is asked to do.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Say what would be done, change nothing.
    pub dry_run: bool,
    /// Collect revisions that no tag leads to, too.
    pub untagged: bool,
    /// Only those pushed longer ago than this; the grace period counts as well.
    pub untagged_for: Duration,
    /// Collect in the repositories whose names match, and leave the others as they are; `None` is all.
    pub repositories: Option<glob::Pattern>,
    /// Uploads that began longer ago than this are stale.
    pub uploads: Duration,
    /// Collect signatures and the like whose image is gone.
    pub orphans: bool,
    /// Make whole what is broken, as far as its place tells what belongs there.
    pub repair: bool,
    /// Look into every directory; a sweep of a small store always does.
    pub thorough: bool,
    /// Damage no longer keeps what it might hold: only what can be read counts.
    pub ignore_damaged: bool,
    /// What was used more recently than this is left.
    pub grace: Duration,
    /// How long the trash keeps what was taken.
    pub keep: Duration,
    /// Free the bytes at once, for a registry that is stopped or read-only.
    pub now: bool,
    /// What is known of the registries that may be running.
    pub gate: Gate,
    /// How long a request to one of them may be under way.
    pub drain: Duration,
    /// What pushes are about to name, as far as this process knows.
    pub named: Named,
    /// At most so many calls to the storage in a second; `None` is as many as it takes.
    pub rate: Option<u32>,
    /// In a dry run, don't read tags: what only a tag names whose manifest was deleted is counted, although a sweep
    /// leaves it.
    pub quick: bool,
    /// Where parsed manifests are kept; nowhere if not given. A dry run writes nothing inside the store.
    pub cache: Option<Place>,
}

/// Youngest age that is touched, unless told otherwise.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(24 * 3600);
/// How long the trash keeps things, unless told otherwise.
pub const DEFAULT_KEEP: Duration = Duration::from_secs(7 * 24 * 3600);
/// How old an upload must be to count as stale, unless told otherwise; the registry's own purging says the same.
pub const DEFAULT_UPLOADS: Duration = Duration::from_secs(7 * 24 * 3600);

impl Default for Options {
    fn default() -> Options {
        Options {
            dry_run: false,
            untagged: false,
            untagged_for: Duration::ZERO,
            repositories: None,
            uploads: DEFAULT_UPLOADS,
            orphans: false,
            repair: false,
            thorough: false,
            ignore_damaged: false,
            grace: DEFAULT_GRACE,
            keep: DEFAULT_KEEP,
            now: false,
            gate: Gate::unknown(),
            drain: DEFAULT_DRAIN,
            named: Named::default(),
            rate: None,
            quick: false,
            cache: None,
        }
    }
}

impl Options {
    /// As they are meant beside a registry: nothing is younger than a request that is under way.
    fn settled(&self) -> Result<Options> {
        if !self.gate.is_beside() {
            return Ok(self.clone());
        }
        if self.now && !self.dry_run {
            return Err(Error::invalid(format!(
                "now frees the bytes at once, which loses images unless no registry runs or each is read-only: stop it and say \
                 registry-stopped, too, or leave out now ({})",
                self.gate
            )));
        }
        let at_least = |time: Duration| time.max(self.drain);
        let (grace, keep) = (at_least(self.grace), at_least(self.keep));
        Ok(Options { grace, keep, uploads: at_least(self.uploads), ..self.clone() })
    }
}

/// The priority of a run beside a registry (nice(2)).
const LEAST_PRIORITY: i32 = 19;

/// Gives this thread, and those that it starts, the least priority if a registry may be running: its clients come first.
pub fn yield_to_clients(options: &Options) {
    if options.gate.is_beside()
        && let Err(e) = rustix::process::setpriority_process(None, LEAST_PRIORITY)
    {
        log::debug!("could not lower the priority of the collection: {e}");
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
    let limited = options.rate.map(|rate| Limited::new(store, rate, progress));
    let store: &dyn Store = limited.as_ref().map_or(store, |limited| limited);
    // Clients of the registry come first.
    let is_patient = options.gate.is_beside() && !options.dry_run && tables.is_patient;
    let tables = match is_patient {
        true => Tables { threads: NonZeroUsize::MIN, ..tables.clone() },
        false => Tables { is_patient, ..tables.clone() },
    };
    collect(store, &tables, options, author, progress)
}

fn collect(
    store: &dyn Store,
    tables: &Tables,
    options: &Options,
    author: &Author,
    progress: &dyn Progress,
) -> Result<Report> {
    let (mut tables, links) = match &options.cache {
        Some(place) => {
            let (tables, links) = cache::load(store, place, tables);
            (tables, Some(links))
        }
        None => (tables.clone(), None),
    };
    if options.dry_run {
        let policy = Policy::new(options, SystemTime::now());
        progress.phase("mark", 0);
        let mut catalog = judged(scan_once(store, &tables, links.as_ref(), depth(options))?, options);
        save_cache(store, options, &catalog, links.as_ref());
        drop(links);
        // All that is needed of it is in the catalog by now.
        catalog.tables.known = Arc::default();
        tables.known = Arc::default();
        progress.phase("plan", 0);
        let plan = Plan::new(store, &catalog, &policy)?;
        let mut report = Report::new(store, Mode::DryRun, options, policy.now, &catalog, Arc::new(plan))?;
        report.set_states(store, &tables, policy.now)?;
        return Ok(report);
    }
    let mut options = options.settled()?;
    // Before the look: what was under way then, it may not see.
    let (look, now) = (Moment::now(), SystemTime::now());
    progress.phase("mark", 0);
    let first;
    let plan = {
        // By far the longest part; others may change the store meanwhile, as pushes do.
        let resting = Resting::new(store, progress);
        let store: &dyn Store = if tables.is_patient { &resting } else { store };
        first = judged(scan_strictly(store, &tables, links.as_ref())?, &options);
        progress.phase("plan", 0);
        Plan::new(store, &first, &Policy::new(&options, now))?
    };
    if progress.is_stopped() {
        return Err(stopped());
    }
    let _lock = store.lock(&author.command, LOCK_WAIT)?;
    progress.phase("re-check", 0);
    let (mut catalog, mut restored) = give_back(store, &tables, Some(&first), &options)?;
    drop(first);
    save_cache(store, &options, &catalog, links.as_ref());
    drop(links);
    options.gate = options.gate.verified(store, &catalog);
    let options = &options;
    let policy = Policy::new(options, now);
    let mut plan = plan;
    if !restored.is_empty() {
        // With what came back something else may be garbage, which takes two looks as well.
        plan = Plan::new(store, &catalog, &policy)?;
        let (again, more) = give_back(store, &tables, Some(&catalog), options)?;
        catalog = again;
        restored.extend(more);
    }
    let plan = plan.confirmed(store, &catalog, &policy)?;
    if progress.is_stopped() {
        return Err(stopped());
    }
    let mut report;
    if options.gate.is_beside() {
        let unclear = guard::go_on(store)?;
        let round = Round { store, catalog: &catalog, options, policy: &policy, look: &look };
        let course = round.decide(plan)?;
        let plan = Arc::new(course.plan.clone());
        report = Report::new(store, Mode::Sweep, options, policy.now, &catalog, plan)?;
        report.set_taken(round.act(&course, author, progress)?);
        report.failures.extend(unclear);
    } else {
        let plan = Arc::new(plan);
        report = Report::new(store, Mode::Sweep, options, policy.now, &catalog, plan.clone())?;
        report.set_taken(sweep::take(store, &catalog, &plan, options, author, progress)?);
    }
    report.set_restored(&restored);

    // Things were taken by now: whatever fails from here on belongs into the report of that.
    if let Err(e) = finish(store, &tables, &catalog, options, &policy, &look, progress, &mut report) {
        report.failures.push(e.to_string());
    }
    report.finished_at = SystemTime::now();
    Ok(report)
}

fn stopped() -> Error {
    Error::Busy { why: "stopped before the first change".to_string() }
}

/// What a dry run has to look at.
fn depth(options: &Options) -> Depth {
    let judges_tags = options.untagged || options.orphans || options.thorough || options.repair;
    // What is kept for the next run is worth nothing without.
    let is_kept = matches!(options.cache, Some(Place::Directory(_)));
    Depth { tags: judges_tags || !options.quick, times: judges_tags || is_kept }
}

/// Keeps what was found out; a cache that can't be written costs the next run some time, and nothing else.
fn save_cache(store: &dyn Store, options: &Options, catalog: &Catalog, links: Option<&Catalog>) {
    let place = options.cache.as_ref().filter(|place| !options.dry_run || **place != Place::Store);
    if let (Some(place), Some(links)) = (place, links)
        && let Err(e) = cache::save(store, place, catalog, News::of(catalog, links))
    {
        log::warn!("{e}");
    }
}

/// Gives back a transaction of the trash and what it names.
pub fn undo(store: &dyn Store, author: &Author, id: &str) -> Result<Undone> {
    let _lock = store.lock(&author.command, LOCK_WAIT)?;
    trash::undo::undo(store, id)
}

/// Purges transactions of the trash, after giving back what a manifest names again. What a registry may rely on, going by
/// `gate`, stays.
pub fn purge_trash(
    store: &dyn Store,
    tables: &Tables,
    author: &Author,
    selection: &Selection,
    gate: &Gate,
) -> Result<Purged> {
    let _lock = store.lock(&author.command, LOCK_WAIT)?;
    let look = Moment::now();
    let (_, restored) = give_back(store, tables, None, &Options::default())?;
    let (mut doomed, mut kept) = (Vec::new(), Vec::new());
    for id in selection.of(store, SystemTime::now())? {
        let transaction = trash::read(store, &id)?;
        let why = match gate {
            Gate::Stopped => None,
            _ => transaction
                .is_waiting(&look, Duration::ZERO)
                .or_else(|| guard::is_remembered(&transaction, gate)),
        };
        match why {
            None => doomed.push(id),
            Some(why) => kept.push(format!("{id}: {why}")),
        }
    }
    let mut purged = trash::purge::purge(store, &doomed, &Unwatched)?;
    purged.kept.extend(kept);
    Ok(Purged { restored, ..purged })
}

/// The blobs in transactions of the trash.
fn blobs_in(store: &dyn Store, ids: &[String]) -> Result<Vec<Digest>> {
    let mut blobs = Vec::new();
    for id in ids {
        let files = trash::read(store, id)?.files;
        blobs.extend(files.iter().filter_map(|path| match layout::classify(path) {
            layout::Kind::Blob(digest) => Some(digest),
            _ => None,
        }));
    }
    Ok(blobs)
}

/// The transactions that a run purges by itself: what has been in the trash for `keep`, and no registry may rely on.
/// `look` is when the look began that found nothing of them in use.
fn over_age(store: &dyn Store, options: &Options, now: SystemTime, look: &Moment) -> Result<Vec<String>> {
    let old = Selection::Older(options.keep).of(store, now)?;
    let (mut doomed, mut stay) = (Vec::new(), Vec::new());
    for transaction in trash::contents(store)? {
        let is_over = match &transaction.stage {
            _ if !options.gate.is_beside() => old.contains(&transaction.id),
            Some(_) => transaction.is_waiting(look, options.keep).is_none(),
            None if !old.contains(&transaction.id) => false,
            None => match guard::is_remembered(&transaction, &options.gate) {
                None => true,
                Some(why) => {
                    stay.push(why);
                    false
                }
            },
        };
        doomed.extend(is_over.then_some(transaction.id));
    }
    if let Some(why) = stay.first() {
        let what = error::count(stay.len(), "transaction");
        log::warn!("{what} of the trash older than keep, and what their undo needs, stay: {why}");
    }
    Ok(doomed)
}

/// Looks at the store, at what changed if there is a `previous` look, and gives back what is in use again; the catalog
/// afterwards, and what came back.
fn give_back(
    store: &dyn Store,
    tables: &Tables,
    previous: Option<&Catalog>,
    options: &Options,
) -> Result<(Catalog, Vec<PathBuf>)> {
    let look = |previous: Option<&Catalog>| Ok(judged(scan_strictly(store, tables, previous)?, options));
    give_back::give_back(store, look(previous)?, &|previous| look(Some(previous)))
}

/// The catalog as the caller wants it judged: with `ignore_damaged` no damage keeps what it might hold.
///
/// What can't be read at all has ended the run before; repositories whose names no registry gives stay as they are.
fn judged(mut catalog: Catalog, options: &Options) -> Catalog {
    if !options.ignore_damaged {
        return catalog;
    }
    for repository in catalog.repositories.values_mut().filter(|r| r.is_valid && r.keeps != Keeps::Named) {
        Arc::make_mut(repository).keeps = Keeps::Named;
    }
    for problem in &mut catalog.problems {
        if matches!(problem.effect, Effect::KeepsEverything(_) | Effect::KeepsRevisions(_)) {
            problem.effect = Effect::KeepsNamed;
        }
    }
    catalog
}

/// Gives back what a push relies on that came meanwhile, then purges what the trash has kept long enough and, with
/// `now`, what was just taken.
#[allow(clippy::too_many_arguments, reason = "the end of one function, split for reading")]
fn finish(
    store: &dyn Store,
    tables: &Tables,
    catalog: &Catalog,
    options: &Options,
    policy: &Policy,
    look: &Moment,
    progress: &dyn Progress,
    report: &mut Report,
) -> Result<()> {
    progress.phase("look back", 0);
    report.set_restored(&give_back(store, tables, Some(catalog), options)?.1);
    if progress.is_stopped() {
        report.is_stopped = true;
        return Ok(());
    }
    let left = trash::ids(store)?;
    let own = report.transaction.clone().filter(|id| left.contains(id));
    let mut doomed = over_age(store, options, policy.now, look)?;
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
        let blobs = blobs_in(store, &doomed)?;
        let purged = trash::purge::purge(store, &doomed, progress)?;
        report.set_purged(purged, options.now);
        for blob in blobs {
            // Without it, a link to the blob is seen to be one without bytes.
            leftovers::remove_old_directory(store, &layout::blob_dir(&blob), policy)?;
        }
    }
    report.set_states(store, tables, look.wall())
}
