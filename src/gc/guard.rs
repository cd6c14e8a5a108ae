//! Guard: collecting beside a registry that goes on.
//!
//! A push may say nothing on the disk before its manifest comes: a HEAD that finds a layer leaves no trace. So a blob goes
//! in steps, and between two of them every request that could have seen the earlier one has ended:
//!
//! ```text
//! candidate ──grace──▶ fenced ──drain, gate──▶ quarantined ──drain, keep──▶ purged
//!     ▲                   │                        │
//!     └───────────────────┴── in use again ────────┘
//! ```
//! - *candidate*: nothing leads to it, and nothing has since the first look that found it so ([`ledger`]).
//! - *fenced*: the links to it lie in the trash, the bytes where they were. Readers miss nothing; a client that asks for
//!   it is told to upload it, and that writes a link: the sign of use that the storage otherwise lacks.
//! - *quarantined*: the bytes lie in the trash, too. From here on an upload brings its own.
//! - *purged*: the bytes are gone.
//!
//! Each run does for each blob the one step that is due. The state is in the transaction ([`crate::trash::stage`]) and in
//! the ledger, so nothing is lost with the process, and a machine that was down for a week goes on where it was.
//!
//! # Rules kept here
//! 1. Before anything else, what is in use again goes back ([`mod@super::give_back`]): a manifest leads to it, a link to it
//!    was written, or one was written late into a file that had just moved.
//! 2. A step counts as waited for when the look that found the blob unused *began* after the wait was over. Waits are
//!    measured by a clock that nobody sets; after a reboot from the boot.
//! 3. The bytes move only while no registry remembers the blob ([`gate`]).
//! 4. Right before and right after the bytes move, the links are looked for once more; any that is there brings them back.
//! 5. Directories stay: a registry makes them first and then renames into them.
//! 6. Without a sweep that ends its course nothing is lost: what is fenced is still there, what is in quarantine comes
//!    back at the next start of anything.
//!
//! The manifest of an image needs no fence of its own: a registry without a cache looks for the bytes when it is pushed,
//! and writes them if they are gone; if it saw them right before they went, its link to them is written within the drain, which is over before a
//! purge. Beside a cache manifests stay: 2.8 and 3.1 do not write those again that they remember. Only a cache in redis can
//! be told to forget them. It outlives its registry, so one that was killed in a push may leave an entry without a link there:
//! it is asked once more before the purge ([`outliving`]).

pub mod gate;
pub mod ledger;
pub(super) mod outliving;
mod quarantine;
pub mod state;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use self::gate::Gate;
use self::ledger::Ledger;
use super::forget;
use super::give_back::target_of;
use super::mark;
use super::plan::{Item, Plan, Policy, Reason, What, Young};
use super::sweep::{self, Taken};
use super::{Options, Progress};
use crate::advice::Advice;
use crate::catalog::Catalog;
use crate::catalog::intern::{DigestId, IdSet};
use crate::clock::{Clock, Next, Now};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layout::{self, Kind};
use crate::store::Store;
use crate::trash::stage::{Stage, Step};
use crate::trash::{self, Author, Contents, Transaction};

/// How long a request of a client may be under way, unless told otherwise.
pub const DEFAULT_DRAIN: Duration = Duration::from_secs(10 * 60);

/// A run beside a registry: what it may rely on.
pub(super) struct Round<'a> {
    pub(super) store: &'a dyn Store,
    /// The second look.
    pub(super) catalog: &'a Catalog,
    pub(super) options: &'a Options,
    pub(super) policy: &'a Policy,
    /// When the first look began.
    pub(super) look: &'a Now,
    pub(super) clock: &'a Clock,
}

/// What is due, decided from two looks.
pub(super) struct Course {
    /// What moves at once, then links to fence, then bytes to quarantine; and what waits.
    pub(super) plan: Plan,
    /// So many items move at once.
    direct: usize,
    /// The blobs to fence, with the items that are their links.
    fence: Vec<(DigestId, Vec<usize>)>,
    /// The sweeps whose bytes are to move.
    due: Vec<Contents>,
    /// The layer links that the trash holds, of whichever transaction: a registry may be told to forget these.
    held: HashSet<(PathBuf, Digest)>,
}

impl Course {
    /// The blobs whose links are to move, which is all that shows of a fence.
    pub(super) fn fenced(&self) -> impl Iterator<Item = DigestId> {
        self.fence.iter().map(|(id, _)| *id)
    }
}

impl Round<'_> {
    /// Decides which step is due for which garbage of `plan`.
    pub(super) fn decide(&self, plan: Plan) -> Result<Course> {
        let mut transactions = trash::contents(self.store)?;
        if matches!(self.options.gate, Gate::Probe(_)) {
            self.adopt(&mut transactions)?;
        }
        let id_of = |digest: &Digest| self.catalog.tables.digests.find(digest);
        let moves_on = state::moves_on(&transactions, self.options, self.look);
        let staged: IdSet = transactions.iter().flat_map(Contents::staged).filter_map(id_of).collect();
        let blobs: HashMap<DigestId, u64> = plan
            .items
            .iter()
            .filter_map(|item| if let What::Blob(id) = item.what { Some((id, item.bytes)) } else { None })
            .collect();
        let ledger = self.ledger(&plan, &blobs, &staged)?;
        let mut course = Course {
            plan: Plan { items: Vec::new(), ..plan },
            direct: 0,
            fence: Vec::new(),
            due: Vec::new(),
            held: transactions.iter().flat_map(|t| &t.files).filter_map(|path| claim(path)).collect(),
        };
        let old_items = plan.items;
        let mut fenced: HashMap<DigestId, usize> = HashMap::new();
        for (id, bytes) in blobs_in_order(&old_items) {
            let wait =
                |eligible: Next| Young { digest: id, bytes, last_used: None, eligible, is_held_back: false };
            if staged.contains(id) {
                let next = moves_on.get(&self.catalog.digest(id)).copied();
                course.plan.young.push(wait(next.unwrap_or(Next::Open)));
                continue;
            }
            let next = state::leaves(&ledger, id, self.options, self.look);
            if next != Next::Due {
                course.plan.young.push(wait(next));
                continue;
            }
            if !state::may_take(self.store, &self.options.gate, &self.catalog.digest(id), bytes)? {
                course.plan.young.push(Young { is_held_back: true, ..wait(Next::Open) });
                continue;
            }
            fenced.insert(id, course.fence.len());
            course.fence.push((id, Vec::new()));
        }
        for young in course.plan.young.iter_mut().filter(|young| young.last_used.is_some()) {
            young.eligible =
                young.eligible.and(state::leaves(&ledger, young.digest, self.options, self.look));
        }
        let mut links = Vec::new();
        for item in old_items {
            match item.what {
                What::Blob(_) => {}
                What::LayerLink(_, layer) => {
                    let targets = self.catalog.aliases.get(&layer).map_or(vec![layer], |t| t.to_vec());
                    match targets.iter().find_map(|target| fenced.get(target)) {
                        Some(at) => links.push((*at, item)),
                        None if targets.iter().any(|target| blobs.contains_key(target)) => {}
                        None => course.plan.items.extend(self.is_direct(&item).then_some(item)),
                    }
                }
                _ => course.plan.items.extend(self.is_direct(&item).then_some(item)),
            }
        }
        course.direct = course.plan.items.len();
        for (at, item) in links {
            course.fence[at].1.push(course.plan.items.len());
            course.plan.items.push(item);
        }
        if matches!(self.options.gate, Gate::Off | Gate::Probe(_)) {
            let is_due = |t: &Contents| match &t.stage {
                Some(Ok(stage)) => {
                    stage.step() != Step::Quarantined && stage.is_drained(self.look, self.options.drain)
                }
                _ => false,
            };
            course.due = transactions.into_iter().filter(is_due).collect();
        }
        for transaction in &course.due {
            for id in transaction.staged().iter().filter_map(id_of) {
                let bytes = blobs.get(&id).copied().unwrap_or(0);
                course.plan.items.push(Item { what: What::Blob(id), bytes, reason: Reason::Unnamed });
            }
        }
        let moving: HashSet<DigestId> =
            course.due.iter().flat_map(Contents::staged).filter_map(id_of).collect();
        course.plan.young.retain(|young| !moving.contains(&young.digest));
        Ok(course)
    }

    /// Manifests and links that were removed at once, by `rm` or because no tag led to them, wait like fenced blobs beside a
    /// registry that remembers: whoever saw one right before may have made it remember again after it was told to forget.
    fn adopt(&self, transactions: &mut [Contents]) -> Result<()> {
        let has_such = |t: &Contents| t.files.iter().any(|path| is_to_be_forgotten(t, path));
        for transaction in transactions.iter_mut().filter(|t| t.stage.is_none() && has_such(t)) {
            let stage = Stage::removed(self.store, self.options.drain, self.clock);
            stage.write(self.store, &transaction.id)?;
            transaction.stage = Some(Ok(stage));
        }
        Ok(())
    }

    /// Since when what is dead; written down, so that the next run knows.
    fn ledger(&self, plan: &Plan, blobs: &HashMap<DigestId, u64>, staged: &IdSet) -> Result<Ledger> {
        // With a glob, the plan is silent about other repositories.
        let mark =
            self.options.repositories.is_some().then(|| mark::mark(self.catalog, &mark::Untagged::new()));
        let is_still_dead = |id: DigestId| {
            mark.as_ref().is_some_and(|mark| !mark.is_reachable(id)) && self.catalog.has_blob(id)
        };
        let before = Ledger::read(self.store, &self.catalog.tables)?;
        // Also what its file times call young: a use that they show begins the wait anew by itself.
        let dead = blobs.keys().copied().chain(plan.young.iter().map(|young| young.digest));
        let dead = dead.filter(|id| !staged.contains(*id));
        let ledger = before.clone().after(&self.look.moment, dead, is_still_dead);
        if ledger != before
            && let Err(e) = ledger.write(self.store, &self.catalog.tables)
        {
            // What is dead is so from a later look on; on a full disk the purge goes on.
            log::warn!("{e}: what has become garbage waits for longer");
        }
        Ok(ledger)
    }

    /// Whether something that is not the bytes of a blob goes at once.
    fn is_direct(&self, item: &Item) -> bool {
        // The directory of a link tells that a registry may remember one there, as long as there is the blob.
        let has_blob = |layer: &DigestId| self.catalog.has_blob(self.catalog.stored_as(*layer));
        match (&self.options.gate, &item.what) {
            (Gate::Off, _) => true,
            (Gate::Probe(_), What::Directory(path)) => match layout::link_below(path) {
                Some(digest) => !self.catalog.tables.digests.find(&digest).is_some_and(|id| has_blob(&id)),
                None => true,
            },
            (Gate::Probe(_), What::Repository(name)) => {
                let repository = self.catalog.repository(Path::new(&*self.catalog.name(*name)));
                !repository.is_some_and(|repository| repository.layers.iter().any(has_blob))
            }
            (Gate::Probe(_), _) => true,
            (Gate::Stop { .. } | Gate::Stopped(_), _) => false,
        }
    }

    /// Does what is due; what fails is in the answer. Fails only before the first change.
    pub(super) fn act(&self, course: &Course, author: &Author, progress: &dyn Progress) -> Result<Taken> {
        let mut taken = Taken::default();
        progress.phase("quarantine", course.due.iter().map(|t| t.staged().len()).sum());
        for transaction in &course.due {
            if progress.is_stopped() {
                return Ok(taken);
            }
            if let Err(e) = self.quarantine(transaction, course, author, progress, &mut taken) {
                let is_over = is_of_registry(&e);
                taken.failures.push(e);
                if is_over {
                    return Ok(taken);
                }
            }
        }
        let direct = Plan { items: course.plan.items[..course.direct].to_vec(), ..course.plan.clone() };
        let moved = match sweep::take(self.store, self.catalog, &direct, self.options, author, progress) {
            Ok(moved) => moved,
            // Bytes may have moved by now, and a report tells of that.
            Err(e) => {
                taken.failures.push(e);
                return Ok(taken);
            }
        };
        if let Some(id) = &moved.transaction
            && let Err(e) = self.begin_wait(id)
        {
            taken.failures.push(e);
        }
        self.evict(&direct, &moved, author, &mut taken);
        taken.transaction = moved.transaction.or(taken.transaction);
        taken.items.extend(moved.items);
        taken.repaired = moved.repaired;
        taken.failures.extend(moved.failures);
        if let Gate::Probe(probe) = &self.options.gate {
            let forgotten =
                forget::dangling_ones(self.store, &*probe.0, author, self.options.drain, self.catalog);
            taken.failures.extend(forgotten.err());
        }
        if !progress.is_stopped()
            && !course.fence.is_empty()
            && let Err(e) = self.fence(course, author, progress, &mut taken)
        {
            taken.failures.push(e);
        }
        taken.items.sort_unstable();
        Ok(taken)
    }

    /// What moved at once waits for requests that have seen it; where a registry remembers, it is told once more then.
    fn begin_wait(&self, id: &str) -> Result<()> {
        let stage = Stage::removed(self.store, self.options.drain, self.clock);
        let quarantined_at = stage.fenced_at.clone().filter(|_| self.options.gate == Gate::Off);
        Stage { quarantined_at, ..stage }.write(self.store, id)
    }

    /// Tells registries that remember it what was taken.
    fn evict(&self, direct: &Plan, moved: &Taken, author: &Author, taken: &mut Taken) {
        let Gate::Probe(probe) = &self.options.gate else { return };
        for item in moved.items.iter().filter_map(|at| direct.items.get(*at)) {
            let (What::Revision(name, id) | What::LayerLink(name, id)) = item.what else { continue };
            let (repository, digest) = (self.catalog.name(name), self.catalog.digest(id));
            let (repository, path) = (Path::new(&*repository), item.path(&self.catalog.tables));
            if let Err(e) = forget::removed(self.store, &*probe.0, author, repository, &digest, &path) {
                // What it was not told of, it is told of after the drain.
                let is_over = is_of_registry(&e);
                taken.failures.push(e);
                if is_over {
                    return;
                }
            }
        }
    }

    /// Moves the links to what is dead for long enough into a transaction.
    fn fence(
        &self,
        course: &Course,
        author: &Author,
        progress: &dyn Progress,
        taken: &mut Taken,
    ) -> Result<()> {
        progress.phase("fence", course.fence.len());
        let digest = |id: DigestId| self.catalog.digest(id);
        let links_until =
            self.policy.now.trusted.checked_sub(self.options.grace).unwrap_or(SystemTime::UNIX_EPOCH);
        let blobs = course.fence.iter().map(|(id, ..)| digest(*id)).collect();
        let (transaction, mut stage) =
            self.begin_fence(Stage::begin(self.options.drain, links_until, blobs), author)?;
        let mut left: HashSet<Digest> = HashSet::new();
        let mut is_over = false;
        for (id, links) in &course.fence {
            if is_over || progress.is_stopped() {
                left.insert(digest(*id));
                continue;
            }
            match self.fence_one(&transaction, course, *id, links, links_until) {
                Ok(true) => taken.items.extend(links),
                Ok(false) => drop(left.insert(digest(*id))),
                // Of this one links have moved, so it waits with them: in use they bring it back, and the gate has it
                // forgotten.
                Err(e) => {
                    is_over = is_of_registry(&e);
                    stage.is_unanswered |= is_over;
                    taken.failures.push(e);
                }
            }
            progress.step(1);
        }
        stage.blobs.retain(|digest| !left.contains(digest));
        if !stage.blobs.is_empty() && taken.transaction.is_none() {
            taken.transaction = Some(transaction.id().to_string());
        }
        self.end_fence(&transaction, stage)
    }

    /// A transaction that says what is to move to it before anything does.
    fn begin_fence(&self, stage: Stage, author: &Author) -> Result<(Transaction, Stage)> {
        let reason = format!("{}, beside a registry", sweep::reason(self.options));
        let transaction = Transaction::begin(self.store, trash::SWEEP, author, &reason)?;
        stage.write(self.store, transaction.id())?;
        self.store.sync()?;
        Ok((transaction, stage))
    }

    /// All has moved and was told: the wait begins.
    fn end_fence(&self, transaction: &Transaction, stage: Stage) -> Result<()> {
        self.store.sync()?;
        Stage { fenced_at: Some(self.clock.now(self.store).moment), ..stage }
            .write(self.store, transaction.id())?;
        self.store.sync()?;
        transaction.discard_if_empty(self.store)
    }

    /// Moves the links to one blob; `false`: one of them is fresh, or a push is about to name the blob, and all are where
    /// they were.
    fn fence_one(
        &self,
        transaction: &Transaction,
        course: &Course,
        blob: DigestId,
        links: &[usize],
        links_until: SystemTime,
    ) -> Result<bool> {
        let is_named = || self.options.named.contains(&self.catalog.digest(blob));
        if is_named() {
            return Ok(false);
        }
        let mut moved = Vec::new();
        let mut is_used = false;
        for item in links.iter().filter_map(|at| course.plan.items.get(*at)) {
            let What::LayerLink(name, id) = item.what else { continue };
            let path = item.path(&self.catalog.tables);
            if !transaction.take(self.store, &path)? {
                continue;
            }
            let stat = self.store.stat(&transaction.path_of(&path));
            moved.push((path, name, id));
            is_used = !stat.is_ok_and(|stat| stat.is_some_and(|stat| stat.modified <= links_until));
            if is_used {
                break;
            }
        }
        for (path, ..) in &moved {
            is_used |= forget::is_there(self.store, path)?;
        }
        if is_used || is_named() {
            for (path, ..) in &moved {
                match transaction.put_back(self.store, path) {
                    // A push wrote it anew: no harm, it says the same.
                    Ok(_) | Err(Error::Exists { .. }) => {}
                    Err(e) => return Err(e),
                }
            }
            return Ok(false);
        }
        if let Gate::Probe(probe) = &self.options.gate {
            for (_, name, id) in moved {
                let repository = self.catalog.name(name);
                probe.0.forget(Path::new(&*repository), &self.catalog.digest(id))?;
            }
            probe.0.forget_bytes(&self.catalog.digest(blob))?;
        }
        Ok(true)
    }
}

/// The layer links in a transaction, by the blobs that they lead to.
fn links_in(store: &dyn Store, transaction: &Contents) -> Result<HashMap<Digest, Vec<PathBuf>>> {
    let mut links: HashMap<Digest, Vec<PathBuf>> = HashMap::new();
    for path in &transaction.files {
        if let Kind::LayerLink(_, digest) = layout::classify(path)
            && let Some(target) = target_of(store, transaction, path, digest)?
        {
            links.entry(target).or_default().push(path.clone());
        }
    }
    Ok(links)
}

/// The repository that has a link, and by which digest.
fn claim(path: &Path) -> Option<(PathBuf, Digest)> {
    match layout::classify(path) {
        Kind::LayerLink(repository, digest) => Some((repository, digest)),
        _ => None,
    }
}

/// Whether a registry may remember what was taken from `path`, and nothing but a drain has been waited for. Links to the
/// blobs that a sweep is about have a gate.
fn is_to_be_forgotten(transaction: &Contents, path: &Path) -> bool {
    match layout::classify(path) {
        Kind::Revision(..) => true,
        Kind::LayerLink(..) => transaction.staged().is_empty(),
        _ => false,
    }
}

/// Why what was removed at once, and never told to a registry, is not to be purged: a registry that remembers takes pushes
/// for it, and as long as it lies in the trash it then comes back. `None` where that can't be.
pub(super) fn is_remembered(transaction: &Contents, gate: &Gate) -> Option<String> {
    let holds_links = transaction.files.iter().any(|path| is_to_be_forgotten(transaction, path));
    match gate {
        Gate::Stopped(_) | Gate::Off => None,
        _ if transaction.stage.is_some() || !holds_links => None,
        Gate::Probe(_) => Some(
            "a registry may remember what was removed; sweeps have it forgotten first, so sweep, and purge when the drain is over"
                .to_string(),
        ),
        Gate::Stop { .. } if transaction.is_swept() => None,
        Gate::Stop { why } => Some(format!("a registry may remember what was removed, and take pushes for it ({why})")),
    }
}

/// Whether a registry failed to answer: the next question would only take as long.
fn is_of_registry(error: &Error) -> bool {
    matches!(error, Error::Busy { .. })
}

/// The blobs among items.
fn blobs_in_order(items: &[Item]) -> Vec<(DigestId, u64)> {
    let blob = |item: &Item| if let What::Blob(id) = item.what { Some((id, item.bytes)) } else { None };
    items.iter().filter_map(blob).collect()
}

/// A sweep that was being fenced when its process ended: what has moved by then is what it is about. Returns what of the
/// trash can't be told.
///
/// All links to what is still not in use have moved, or they would have brought it back by now.
pub(super) fn go_on(store: &dyn Store, clock: &Clock) -> Result<Vec<String>> {
    let mut unclear = Vec::new();
    for transaction in trash::contents(store)? {
        match &transaction.stage {
            Some(Ok(stage)) if stage.step() == Step::Fencing => {
                let fenced_at = Some(clock.now(store).moment);
                Stage { fenced_at, ..stage.clone() }.write(store, &transaction.id)?;
                log::info!("{}: a sweep that was interrupted goes on", transaction.id);
            }
            Some(Err(why)) => unclear.push(format!(
                "transaction {} stays: regfs can't read how far it has come ({why}); run {}",
                transaction.id,
                Advice::Undo(transaction.id.clone())
            )),
            _ => {}
        }
    }
    Ok(unclear)
}
