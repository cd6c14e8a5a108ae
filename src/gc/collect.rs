//! One collection: its looks, its plan, and what comes of that. Each step is a function; [`Collection::sweep`] is their order.

use std::path::PathBuf;
use std::sync::Arc;

use super::brake::Extent;
use super::foresee;
use super::guard::gate::Gate;
use super::guard::{self, Round, outliving};
use super::plan::{Plan, Policy};
use super::report::{Mode, Report};
use super::{Options, Progress, give_back as give, leftovers, purge, room, still, sweep};
use crate::catalog::cache::{self, News, Place};
use crate::catalog::scan::scan_strictly;
use crate::catalog::{Catalog, Effect, Keeps, Tables};
use crate::clock::{Clock, Now, Reading};
use crate::error::{Error, Result};
use crate::keeper::Change;
use crate::layout;
use crate::printable::Printable;
use crate::store::Store;
use crate::store::paced::Paced;
use crate::trash::{self, Author};

/// A collection that goes on.
pub(super) struct Collection<'a> {
    pub(super) store: &'a dyn Store,
    pub(super) tables: Tables,
    /// What the cache knows of links, until it was written anew.
    pub(super) links: Option<Catalog>,
    pub(super) options: Options,
    pub(super) author: &'a Author,
    pub(super) progress: &'a dyn Progress,
    /// When the first look began, so what was under way then, it may not have seen.
    pub(super) look: Now,
    /// What the clocks said then.
    began: Reading,
    pub(super) clock: Clock,
}

/// What the looks under the lock decided.
struct Decided {
    catalog: Catalog,
    plan: Plan,
    restored: Vec<PathBuf>,
}

impl<'a> Collection<'a> {
    /// Reads the cache.
    pub(super) fn begin(
        store: &'a dyn Store,
        tables: &Tables,
        options: &Options,
        author: &'a Author,
        progress: &'a dyn Progress,
    ) -> Result<Collection<'a>> {
        let (tables, links) = match &options.cache {
            Some(place) => {
                let (tables, links) = cache::load(store, place, tables);
                (tables, Some(links))
            }
            None => (tables.clone(), None),
        };
        let clock = Clock::open(store)?;
        let began = store.clocks();
        let look = clock.judge(&began);
        let options = options.clone();
        Ok(Collection { store, tables, links, options, author, progress, look, began, clock })
    }

    pub(super) fn run(self) -> Result<Report> {
        match self.options.dry_run {
            true => foresee::dry_run(self),
            false => self.sweep(),
        }
    }

    fn sweep(mut self) -> Result<Report> {
        self.options.check()?;
        self.options = self.options.settled();
        let (first, plan) = self.first_look()?;
        self.stop_if_told()?;
        if let Some(report) = self.brake(&first, &plan)? {
            return Ok(report);
        }
        let _lock = room::lock(&self, &first, &plan)?;
        self.options.keeper.allows(self.options.change())?;
        // The storage has a clock, too.
        self.clock.note(self.store);
        self.look = self.clock.judge(&self.began);
        self.look.warn(self.store);
        let Decided { catalog, plan, restored } = self.second_look(first, plan)?;
        self.stop_if_told()?;
        if let Some(report) = self.brake(&catalog, &plan)? {
            return Ok(report);
        }
        // The look may have taken long, and a registry may have been migrated meanwhile.
        self.options.keeper.allows(self.options.change())?;
        self.options.gate.look_again()?;
        let mut report = self.take(&catalog, plan)?;
        report.set_restored(&restored);
        // Things were taken by now: whatever fails from here on belongs into the report of that.
        if let Err(e) = self.look_back(&catalog, &mut report) {
            report.failures.push(e.to_string());
        }
        report.finished_at = self.clock.now(self.store).wall;
        Ok(report)
    }

    /// The report of a run that stops because it would remove most of a registry; `None`: go on.
    fn brake(&self, catalog: &Catalog, plan: &Plan) -> Result<Option<Report>> {
        let Some(extent) = self.too_large(catalog, plan) else { return Ok(None) };
        let plan = Arc::new(plan.clone());
        let mut report = Report::new(self.store, Mode::Sweep, &self.options, &self.look, catalog, plan)?;
        report.brake(extent);
        report.set_states(self.store, &self.tables, &self.look)?;
        report.finished_at = self.clock.now(self.store).wall;
        Ok(Some(report))
    }

    /// How much of the registry a plan removes, if that is more than may go without being asked for.
    pub(super) fn too_large(&self, catalog: &Catalog, plan: &Plan) -> Option<Extent> {
        let is_held_back = matches!(self.options.gate, Gate::Stop { .. });
        let extent = Extent::of(plan, catalog);
        (!self.options.allow_large && !is_held_back && extent.is_large()).then_some(extent)
    }

    /// By far the longest part; others may change the store meanwhile, as pushes do.
    fn first_look(&self) -> Result<(Catalog, Plan)> {
        self.progress.phase("mark", 0);
        let resting = Paced::with_breaks(self.store, self.progress);
        let store: &dyn Store = if self.tables.is_patient { &resting } else { self.store };
        let catalog = judged(scan_strictly(store, &self.tables, self.links.as_ref())?, &self.options);
        self.progress.phase("plan", 0);
        let plan = Plan::new(store, &catalog, &self.policy())?;
        Ok((catalog, plan))
    }

    /// Looks again, under the lock: what is in use again comes back, and what is no longer garbage stays.
    fn second_look(&mut self, first: Catalog, mut plan: Plan) -> Result<Decided> {
        self.progress.phase("re-check", 0);
        let (mut catalog, mut restored) = give_back(self.store, &self.tables, Some(&first), &self.options)?;
        if restored.is_empty() {
            still::is_unwritten(&self.options.gate, &first, &catalog)?;
        }
        drop(first);
        self.save_cache(&catalog);
        self.options.gate = self.options.gate.verified(self.store, &catalog)?;
        let policy = self.policy();
        if !restored.is_empty() {
            // With what came back something else may be garbage, which takes two looks as well.
            plan = Plan::new(self.store, &catalog, &policy)?;
            let (again, more) = give_back(self.store, &self.tables, Some(&catalog), &self.options)?;
            catalog = again;
            restored.extend(more);
        }
        let plan = plan.confirmed(self.store, &catalog, &policy)?;
        Ok(Decided { catalog, plan, restored })
    }

    /// Takes what is due now.
    fn take(&self, catalog: &Catalog, plan: Plan) -> Result<Report> {
        let Collection { store, options, .. } = self;
        let policy = self.policy();
        if !options.gate.is_beside() {
            let plan = Arc::new(plan);
            let mut report = Report::new(*store, Mode::Sweep, options, &self.look, catalog, plan.clone())?;
            outliving::tell(&options.gate, catalog, &plan.items)?;
            report.set_taken(sweep::take(*store, catalog, &plan, options, self.author, self.progress)?);
            return Ok(report);
        }
        let unclear = guard::go_on(*store, &self.clock)?;
        let round =
            Round { store: *store, catalog, options, policy: &policy, look: &self.look, clock: &self.clock };
        let course = round.decide(plan)?;
        let plan = Arc::new(course.plan.clone());
        let mut report = Report::new(*store, Mode::Sweep, options, &self.look, catalog, plan)?;
        report.set_taken(round.act(&course, self.author, self.progress)?);
        report.failures.extend(unclear);
        Ok(report)
    }

    /// Gives back what a push relies on that came meanwhile, then purges what the trash has kept long enough and, with
    /// `now`, what was just taken.
    fn look_back(&self, catalog: &Catalog, report: &mut Report) -> Result<()> {
        self.progress.phase("look back", 0);
        let (after, restored) = give_back(self.store, &self.tables, Some(catalog), &self.options)?;
        report.set_restored(&restored);
        if let Err(why) = self.is_still(catalog, &after, &restored, report) {
            self.take_back(&why, report);
            return report.set_states(self.store, &self.tables, &self.clock.now(self.store));
        }
        if self.progress.is_stopped() {
            report.is_stopped = true;
            return Ok(());
        }
        let doomed = self.doomed(report)?;
        if !doomed.is_empty() {
            self.options.keeper.allows(Change::Garbage)?;
            self.purge(doomed, report)?;
        }
        report.set_states(self.store, &self.tables, &self.clock.now(self.store))
    }

    /// Fails if a registry may have begun since nothing of that was seen.
    fn is_still(
        &self,
        before: &Catalog,
        after: &Catalog,
        restored: &[PathBuf],
        report: &Report,
    ) -> Result<()> {
        let gate = &self.options.gate;
        gate.look_again()?;
        match restored.first() {
            Some(path) if gate.has_witness() => Err(still::came(path)),
            // Repairs are written, too.
            _ if report.repairs().any(|(_, is_made)| is_made) => Ok(()),
            _ => still::is_unwritten(gate, before, after),
        }
    }

    /// Gives back what this sweep took: a registry that has begun may have said of it that it is there.
    fn take_back(&self, why: &Error, report: &mut Report) {
        let Some(id) = report.transaction.clone() else {
            return report.failures.push(format!("nothing was freed: {why}"));
        };
        match trash::undo::undo(self.store, &id) {
            Ok(undone) => {
                report.set_taken_back(&undone.restored);
                report
                    .failures
                    .extend(undone.failures.iter().map(|e| format!("stays in the trash as {id}: {e}")));
                report
                    .failures
                    .push(format!("nothing was freed, and what was taken is back where it was: {why}"));
            }
            Err(e) => {
                let stays = "nothing was freed, and what was taken stays in the trash";
                report.failures.push(format!("{stays} ({e}), from where undo brings it back: {why}"));
            }
        }
    }

    /// The transactions that go now; those whose undo ends with them are in the report.
    fn doomed(&self, report: &mut Report) -> Result<Vec<String>> {
        let left = trash::ids(self.store)?;
        let own = report.transaction.clone().filter(|id| left.contains(id));
        let mut doomed = purge::over_age(self.store, &self.options, &self.look)?;
        doomed.retain(|id| Some(id) != own.as_ref());
        if let Some(own) = own.filter(|_| self.options.now) {
            let ended = trash::purge::undone_only_with(self.store, &own)?;
            report.dropped_transactions = ended.clone();
            doomed.extend(ended);
            doomed.push(own);
            doomed.sort_unstable();
            doomed.dedup();
        }
        Ok(doomed)
    }

    fn purge(&self, doomed: Vec<String>, report: &mut Report) -> Result<()> {
        let doomed = outliving::purgeable(self.store, &self.options.gate, doomed)?;
        let blobs = purge::blobs_in(self.store, &doomed)?;
        purge::look_before(&self.options.gate)?;
        let purged = trash::purge::purge(self.store, &doomed, self.progress)?;
        purge::say_purged(&purged, &self.author.command);
        for id in &report.dropped_transactions {
            log::info!("dropped {} from the trash: its undo needed bytes that are gone", id.printable());
        }
        report.set_purged(purged, self.options.now);
        report.failures.extend(purge::look_after(&self.options.gate));
        let policy = self.policy();
        for blob in blobs {
            // Without it, a link to the blob is seen to be one without bytes.
            leftovers::remove_old_directory(self.store, &layout::blob_dir(&blob), &policy)?;
        }
        Ok(())
    }

    pub(super) fn policy(&self) -> Policy {
        Policy::new(&self.options, &self.look)
    }

    fn stop_if_told(&self) -> Result<()> {
        match self.progress.is_stopped() {
            true => Err(Error::Busy { why: "stopped before the first change".to_string() }),
            false => Ok(()),
        }
    }

    /// Keeps what was found out; a cache that can't be written costs the next run some time, and nothing else.
    pub(super) fn save_cache(&mut self, catalog: &Catalog) {
        let Options { cache, dry_run, .. } = &self.options;
        let place = cache.as_ref().filter(|place| !dry_run || **place != Place::Store);
        if let (Some(place), Some(links)) = (place, self.links.take())
            && let Err(e) = cache::save(self.store, place, catalog, News::of(catalog, &links))
        {
            log::warn!("{e}");
        }
    }
}

/// Looks at the store, at what changed if there is a `previous` look, and gives back what is in use again; the catalog
/// afterwards, and what came back.
pub(super) fn give_back(
    store: &dyn Store,
    tables: &Tables,
    previous: Option<&Catalog>,
    options: &Options,
) -> Result<(Catalog, Vec<PathBuf>)> {
    let look = |previous: Option<&Catalog>| Ok(judged(scan_strictly(store, tables, previous)?, options));
    give::give_back(store, look(previous)?, &|previous| look(Some(previous)))
}

/// The catalog as the caller wants it judged: with `ignore_damaged` no damage keeps what it might hold.
///
/// What can't be read at all has ended the run before; repositories whose names no registry gives stay as they are.
pub(super) fn judged(mut catalog: Catalog, options: &Options) -> Catalog {
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
