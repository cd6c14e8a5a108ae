//! Dry run: what a sweep with the same words would do now.
//!
//! It decides by the functions that a sweep uses, on a store in which changes are only imagined ([`Imagined`]): what is in
//! use again comes back there, what earlier sweeps began goes on there, the trash is purged there. Taking is left out, and so
//! is what would write something elsewhere: no registry has to show that it serves this storage, nor is told to forget.
//!
//! # Cost
//! One look, as far as nothing in the trash is in use again; in a small store, which a sweep looks through as a whole, a
//! second one where the first asked for no times.

use std::path::PathBuf;
use std::sync::Arc;

use super::collect::{Collection, judged};
use super::guard::{self, Round};
use super::plan::{Plan, Policy, What};
use super::report::{Mode, Report};
use super::{Options, give_back, purge};
use crate::catalog::Catalog;
use crate::catalog::cache::Place;
use crate::catalog::intern::IdSet;
use crate::catalog::scan::{Depth, scan_once, scan_strictly};
use crate::error::{Error, Result};
use crate::keeper::{Change, Kept};
use crate::store::Store;
use crate::store::imagined::Imagined;
use crate::trash::{self, Transaction};

/// What a sweep would take now.
struct Foreseen {
    plan: Plan,
    /// Why it would take nothing at all.
    refusal: Option<String>,
    /// The blobs that it would fence.
    fence: IdSet,
}

/// Says what a sweep would do; changes nothing.
pub(super) fn dry_run(mut run: Collection<'_>) -> Result<Report> {
    run.look.warn(run.store);
    let refusal = run.options.check().err();
    run.options = run.options.settled();
    let kept = run.options.keeper.now();
    if kept.refusal(Change::Tags).is_some() {
        // What a rule that goes by tags finds here says nothing.
        (run.options.untagged, run.options.orphans) = (false, false);
    }
    let catalog = look(&mut run)?;
    run.progress.phase("plan", 0);
    let store = Imagined::new(run.store);
    let again =
        |previous: &Catalog| Ok(judged(scan_strictly(&store, &run.tables, Some(previous))?, &run.options));
    let (catalog, restored) = give_back::give_back(&store, catalog, &again)?;
    let policy = run.policy();
    let garbage = match kept {
        Kept::Database(_) => Plan::default(),
        _ => Plan::new(&store, &catalog, &policy)?,
    };
    let foreseen = foresee(&run, &store, &catalog, &policy, &garbage, refusal)?;
    let mut report =
        Report::new(run.store, Mode::DryRun, &run.options, &run.look, &catalog, Arc::new(garbage))?;
    report.set_restored(&restored);
    report.set_states(&store, &run.tables, &run.look)?;
    let is_refused = foreseen.refusal.is_some();
    report.foresee(foreseen.plan, &foreseen.fence, foreseen.refusal);
    if !is_refused {
        foresee_purge(&run, &store, &mut report)?;
    }
    Ok(report)
}

/// One look, as thorough as a sweep's where that costs little.
fn look(run: &mut Collection<'_>) -> Result<Catalog> {
    run.progress.phase("mark", 0);
    let depth = depth(&run.options);
    let mut catalog = scan_once(run.store, &run.tables, run.links.as_ref(), depth)?;
    if depth != Depth::WHOLE && run.policy().is_thorough(&catalog) {
        catalog = scan_strictly(run.store, &run.tables, run.links.as_ref())?;
    }
    run.save_cache(&catalog);
    // All that is needed of it is in the catalog by now.
    catalog.tables.known = Arc::default();
    run.tables.known = Arc::default();
    Ok(judged(catalog, &run.options))
}

/// What has to be looked at.
fn depth(options: &Options) -> Depth {
    let judges_tags = options.untagged || options.orphans || options.thorough || options.repair;
    // What is kept for the next run is worth nothing without.
    let is_kept = matches!(options.cache, Some(Place::Directory(_)));
    Depth { tags: judges_tags || !options.quick, times: judges_tags || is_kept }
}

/// What of the garbage a sweep would take now.
fn foresee(
    run: &Collection<'_>,
    store: &dyn Store,
    catalog: &Catalog,
    policy: &Policy,
    garbage: &Plan,
    refusal: Option<Error>,
) -> Result<Foreseen> {
    let too_large = run.too_large(catalog, garbage).map(|extent| extent.refusal());
    if let Some(why) = refusal.map(|e| e.to_string()).or(too_large) {
        let plan = Plan { items: Vec::new(), repairs: garbage.repairs.clone(), ..garbage.clone() };
        return Ok(Foreseen { plan, refusal: Some(why), fence: IdSet::default() });
    }
    if !run.options.gate.is_beside() {
        return Ok(Foreseen { plan: garbage.clone(), refusal: None, fence: IdSet::default() });
    }
    guard::go_on(store, &run.clock)?;
    let round = Round { store, catalog, options: &run.options, policy, look: &run.look, clock: &run.clock };
    let course = round.decide(garbage.clone())?;
    let stays = round.remembered(&course)?;
    let mut plan = course.plan.clone();
    plan.items.retain(|item| !matches!(item.what, What::Blob(id) if stays.contains(id)));
    Ok(Foreseen { plan, refusal: None, fence: course.fenced().collect() })
}

/// What would be purged after that.
fn foresee_purge(run: &Collection<'_>, store: &Imagined<'_>, report: &mut Report) -> Result<()> {
    let mut doomed = purge::over_age(store, &run.options, &run.look)?;
    if run.options.now {
        // What is taken goes at once, and with it what its undo would need.
        let own = Transaction::begin(store, trash::SWEEP, run.author, "foreseen")?;
        for path in report.taken_blobs().collect::<Vec<PathBuf>>() {
            own.take(store, &path)?;
        }
        let ended = trash::purge::undone_only_with(store, own.id())?;
        doomed.extend(ended.iter().cloned());
        report.dropped_transactions = ended;
        doomed.sort_unstable();
        doomed.dedup();
    }
    if !doomed.is_empty() {
        let purged = trash::purge::purge(store, &doomed, run.progress)?;
        report.set_purged(purged, false);
    }
    if run.options.now {
        report.freed_bytes += std::mem::take(&mut report.quarantined_bytes);
    }
    Ok(())
}
