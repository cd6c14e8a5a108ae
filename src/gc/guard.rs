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
//! purge. Beside a cache manifests stay: 2.8 and 3.1 do not write those again that they remember.

pub mod gate;
pub mod ledger;
pub mod state;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use self::gate::{Gate, Registries};
use self::ledger::Ledger;
use super::dangling;
use super::give_back::target_of;
use super::mark;
use super::plan::{Item, Plan, Policy, Reason, What, Young};
use super::sweep::{self, Taken};
use super::{Options, Progress};
use crate::catalog::Catalog;
use crate::catalog::intern::{DigestId, IdSet};
use crate::clock::Moment;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layout::{self, Kind};
use crate::manifest::MAX_SIZE;
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
    pub(super) look: &'a Moment,
}

/// What is due, decided from two looks.
pub(super) struct Course {
    /// What moves at once, then links to fence, then bytes to quarantine; and what waits.
    pub(super) plan: Plan,
    /// So many items move at once.
    direct: usize,
    /// The blobs to fence, with the items that are their links.
    fence: Vec<(DigestId, u64, Vec<usize>)>,
    /// The sweeps whose bytes are to move.
    due: Vec<Contents>,
    /// The layer links that the trash holds, of whichever transaction: a registry may be told to forget these.
    held: HashSet<(PathBuf, Digest)>,
}

impl Round<'_> {
    /// Decides which step is due for which garbage of `plan`.
    pub(super) fn decide(&self, plan: Plan) -> Result<Course> {
        let mut transactions = trash::contents(self.store)?;
        if let Gate::Probe(probe) = &self.options.gate
            && let Some(repository) = self.catalog.repositories.values().find(|r| r.is_valid)
            && (!plan.items.is_empty() || transactions.iter().any(|t| t.stage.is_some()))
        {
            probe.0.verify(self.store, &repository.name)?;
        }
        if matches!(self.options.gate, Gate::Probe(_)) {
            self.adopt(&mut transactions)?;
        }
        let id_of = |digest: &Digest| self.catalog.tables.digests.find(digest);
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
            let wait = |until: SystemTime| Young { digest: id, bytes, eligible_at: until };
            if staged.contains(id) {
                course.plan.young.push(wait(self.moves_on(&transactions, &self.catalog.digest(id))));
                continue;
            }
            let since = ledger.since(id).unwrap_or(self.look);
            let is_due =
                since.age(self.look) >= self.options.grace && since.elapsed(self.look) >= self.options.drain;
            if !is_due || !self.may_take(id, bytes)? {
                let until = since.wall().checked_add(self.options.grace).unwrap_or(since.wall());
                course.plan.young.push(wait(until));
                continue;
            }
            fenced.insert(id, course.fence.len());
            course.fence.push((id, bytes, Vec::new()));
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
                        None => course.plan.items.extend(self.is_direct().then_some(item)),
                    }
                }
                _ => course.plan.items.extend(self.is_direct().then_some(item)),
            }
        }
        course.direct = course.plan.items.len();
        for (at, item) in links {
            course.fence[at].2.push(course.plan.items.len());
            course.plan.items.push(item);
        }
        if matches!(self.options.gate, Gate::Off | Gate::Probe(_)) {
            let is_due = |t: &Contents| match &t.stage {
                Some(Ok(stage)) => stage.step() != Step::Quarantined && stage.is_drained(self.look),
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
            let stage = Stage {
                fenced_at: Some(Moment::now()),
                ..Stage::begin(self.options.drain, SystemTime::now(), Vec::new())
            };
            stage.write(self.store, &transaction.id)?;
            transaction.stage = Some(Ok(stage));
        }
        Ok(())
    }

    /// Since when what is dead; written down, so that the next run knows.
    fn ledger(&self, plan: &Plan, blobs: &HashMap<DigestId, u64>, staged: &IdSet) -> Result<Ledger> {
        let young: IdSet = plan.young.iter().map(|young| young.digest).collect();
        // With a glob, the plan is silent about other repositories.
        let mark =
            self.options.repositories.is_some().then(|| mark::mark(self.catalog, &mark::Untagged::new()));
        let is_still_dead = |id: DigestId| {
            mark.as_ref().is_some_and(|mark| !mark.is_reachable(id))
                && self.catalog.has_blob(id)
                && !young.contains(id)
        };
        let before = Ledger::read(self.store, &self.catalog.tables)?;
        let dead = blobs.keys().copied().filter(|id| !staged.contains(*id));
        let ledger = before.clone().after(self.look, dead, is_still_dead);
        if ledger != before {
            ledger.write(self.store, &self.catalog.tables)?;
        }
        Ok(ledger)
    }

    /// When a blob that a sweep is about moves on.
    fn moves_on(&self, transactions: &[Contents], digest: &Digest) -> SystemTime {
        let of = |t: &Contents| match &t.stage {
            Some(Ok(stage)) if stage.blobs.contains(digest) => {
                stage.fenced_at.as_ref().map(|at| at.wall() + stage.drain)
            }
            _ => None,
        };
        transactions.iter().find_map(of).unwrap_or(self.policy.now)
    }

    /// Whether a blob may be fenced at all.
    fn may_take(&self, id: DigestId, bytes: u64) -> Result<bool> {
        match &self.options.gate {
            Gate::Off => Ok(true),
            Gate::Probe(_) => Ok(!self.may_be_manifest(id, bytes)?),
            Gate::Stop { .. } | Gate::Stopped => Ok(false),
        }
    }

    /// Whether a registry may know a blob as a manifest.
    fn may_be_manifest(&self, id: DigestId, bytes: u64) -> Result<bool> {
        if bytes > MAX_SIZE as u64 {
            return Ok(false);
        }
        let content = match self.store.read(&layout::blob_data(&self.catalog.digest(id)), MAX_SIZE) {
            Err(e) if e.is_damage() => return Ok(true),
            content => content?,
        };
        let Some((bytes, _)) = content else { return Ok(true) };
        if !bytes.trim_ascii_start().starts_with(b"{") {
            return Ok(false);
        }
        // Every type of manifest that a registry takes has this; no config of an image does.
        match serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&bytes) {
            Ok(fields) => Ok(fields.keys().any(|key| key.eq_ignore_ascii_case("schemaVersion"))),
            Err(_) => Ok(false),
        }
    }

    /// Whether something that is not the bytes of a blob goes at once.
    fn is_direct(&self) -> bool {
        matches!(self.options.gate, Gate::Off | Gate::Probe(_))
    }

    /// Does what is due; what fails is in the answer. Fails only before the first change.
    pub(super) fn act(&self, course: &Course, author: &Author, progress: &dyn Progress) -> Result<Taken> {
        let mut taken = Taken::default();
        let mut refused = Vec::new();
        progress.phase("quarantine", course.due.iter().map(|t| t.staged().len()).sum());
        for transaction in &course.due {
            if progress.is_stopped() {
                return Ok(taken);
            }
            match self.quarantine(transaction, course, progress, &mut taken) {
                Ok(more) => refused.extend(more),
                Err(e) => {
                    let is_over = is_of_registry(&e);
                    taken.failures.push(e);
                    if is_over {
                        return Ok(taken);
                    }
                }
            }
        }
        let direct = Plan { items: course.plan.items[..course.direct].to_vec(), ..course.plan.clone() };
        let moved = sweep::take(self.store, self.catalog, &direct, self.options, author, progress)?;
        self.evict(&direct, &moved, &mut taken);
        taken.transaction = moved.transaction.or(taken.transaction);
        taken.items.extend(moved.items);
        taken.repaired = moved.repaired;
        taken.failures.extend(moved.failures);
        if let Gate::Probe(probe) = &self.options.gate {
            let forgotten = dangling::forget_all(self.store, &*probe.0, author, self.catalog);
            taken.failures.extend(forgotten.err());
        }
        if !progress.is_stopped()
            && (!course.fence.is_empty() || !refused.is_empty())
            && let Err(e) = self.fence(course, refused, author, progress, &mut taken)
        {
            taken.failures.push(e);
        }
        taken.items.sort_unstable();
        Ok(taken)
    }

    /// Tells registries that remember it what was taken.
    fn evict(&self, direct: &Plan, moved: &Taken, taken: &mut Taken) {
        let Gate::Probe(probe) = &self.options.gate else { return };
        for item in moved.items.iter().filter_map(|at| direct.items.get(*at)) {
            let (What::Revision(name, id) | What::LayerLink(name, id)) = item.what else { continue };
            let repository = self.catalog.name(name);
            if let Err(e) = probe.0.forget(Path::new(&*repository), &self.catalog.digest(id)) {
                // What it was not told of, it is told of after the drain.
                let is_over = is_of_registry(&e);
                taken.failures.push(e);
                if is_over {
                    return;
                }
            }
        }
    }

    /// Moves the links to what is dead for long enough into a transaction, together with what has to wait once more.
    fn fence(
        &self,
        course: &Course,
        refused: Vec<Refused>,
        author: &Author,
        progress: &dyn Progress,
        taken: &mut Taken,
    ) -> Result<()> {
        progress.phase("fence", course.fence.len());
        let digest = |id: DigestId| self.catalog.digest(id);
        let again = refused.iter().map(|refused| refused.digest);
        let mut blobs: Vec<Digest> = course.fence.iter().map(|(id, ..)| digest(*id)).chain(again).collect();
        let links_until = self.policy.now.checked_sub(self.options.grace).unwrap_or(SystemTime::UNIX_EPOCH);
        let reason = format!("{}, beside a registry", sweep::reason(self.options));
        let transaction = Transaction::begin(self.store, trash::SWEEP, author, &reason)?;
        let stage = |blobs: &[Digest], fenced_at| Stage {
            fenced_at,
            ..Stage::begin(self.options.drain, links_until, blobs.to_vec())
        };
        stage(&blobs, None).write(self.store, transaction.id())?;
        self.store.sync()?;
        let mut left: HashSet<Digest> = HashSet::new();
        for refused in refused {
            if let Err(e) = refused.join(self.store, &transaction) {
                taken.failures.push(e);
                left.insert(refused.digest);
            }
        }
        let mut is_over = false;
        for (id, _, links) in &course.fence {
            if is_over || progress.is_stopped() {
                left.insert(digest(*id));
                continue;
            }
            match self.fence_one(&transaction, course, *id, links, links_until) {
                Ok(true) => taken.items.extend(links),
                Ok(false) => drop(left.insert(digest(*id))),
                Err(e) => {
                    // What it is about is still in the store; links of it that moved come back when it is used.
                    is_over = is_of_registry(&e);
                    taken.failures.push(e);
                    left.insert(digest(*id));
                }
            }
            progress.step(1);
        }
        blobs.retain(|digest| !left.contains(digest));
        self.store.sync()?;
        stage(&blobs, Some(Moment::now())).write(self.store, transaction.id())?;
        self.store.sync()?;
        transaction.discard_if_empty(self.store)?;
        if !blobs.is_empty() && taken.transaction.is_none() {
            taken.transaction = Some(transaction.id().to_string());
        }
        Ok(())
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
        if is_used || self.options.named.contains(&self.catalog.digest(blob)) {
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
        }
        Ok(true)
    }

    /// Moves the bytes of what is fenced; what must wait once more is in the answer.
    fn quarantine(
        &self,
        transaction: &Contents,
        course: &Course,
        progress: &dyn Progress,
        taken: &mut Taken,
    ) -> Result<Vec<Refused>> {
        let Some(Ok(stage)) = &transaction.stage else { return Ok(Vec::new()) };
        let mut links = links_in(self.store, transaction)?;
        let places: HashMap<DigestId, usize> = course
            .plan
            .items
            .iter()
            .enumerate()
            .filter_map(|(at, item)| if let What::Blob(id) = item.what { Some((id, at)) } else { None })
            .collect();
        let known = self.places_of_links(stage);
        let mut refused = Vec::new();
        for digest in &stage.blobs {
            if progress.is_stopped() {
                return Ok(refused);
            }
            let own = links.remove(digest).unwrap_or_default();
            let mut repositories: HashSet<(PathBuf, Digest)> =
                own.iter().filter_map(|path| claim(path)).collect();
            repositories.extend(known.get(digest).into_iter().flatten().cloned());
            if self.is_remembered(&repositories, &course.held)? || self.options.named.contains(digest) {
                refused.push(Refused { from: transaction.id.clone(), digest: *digest, links: own });
                continue;
            }
            if self.quarantine_one(transaction, digest, &repositories)? {
                let id = self.catalog.tables.digests.find(digest);
                taken.items.extend(id.and_then(|id| places.get(&id)));
                taken.transaction = Some(transaction.id.clone());
            }
            progress.step(1);
        }
        if let Gate::Probe(probe) = &self.options.gate {
            for path in &transaction.files {
                if let Kind::Revision(repository, digest) | Kind::LayerLink(repository, digest) =
                    layout::classify(path)
                    && is_to_be_forgotten(transaction, path)
                {
                    probe.0.forget(&repository, &digest)?;
                }
            }
        }
        let waits: HashSet<&Digest> = refused.iter().map(|refused| &refused.digest).collect();
        self.store.sync()?;
        let blobs = stage.blobs.iter().filter(|digest| !waits.contains(digest)).copied().collect();
        Stage { blobs, quarantined_at: Some(Moment::now()), ..stage.clone() }
            .write(self.store, &transaction.id)?;
        self.store.sync()?;
        Ok(refused)
    }

    /// Where a link to the blobs of a sweep could be written to: every place that has ever had one.
    fn places_of_links(&self, stage: &Stage) -> HashMap<Digest, Vec<(PathBuf, Digest)>> {
        let staged: IdSet =
            stage.blobs.iter().filter_map(|digest| self.catalog.tables.digests.find(digest)).collect();
        let mut places: HashMap<Digest, Vec<(PathBuf, Digest)>> = HashMap::new();
        for repository in self.catalog.repositories.values() {
            for layer in repository.layers.iter().copied().filter(|layer| staged.contains(*layer)) {
                let digest = self.catalog.digest(layer);
                places.entry(digest).or_default().push((repository.name.clone(), digest));
            }
        }
        places
    }

    /// Whether a registry would say that it has the blob. If so it is told to forget it; but only where we hold the link:
    /// a DELETE also removes one that an upload writes in this moment, and ours is what then comes back.
    fn is_remembered(
        &self,
        repositories: &HashSet<(PathBuf, Digest)>,
        fenced: &HashSet<(PathBuf, Digest)>,
    ) -> Result<bool> {
        let registries: &dyn Registries = match &self.options.gate {
            Gate::Off => return Ok(false),
            Gate::Probe(probe) => &*probe.0,
            Gate::Stop { .. } | Gate::Stopped => return Ok(true),
        };
        let mut is_remembered = false;
        for place in repositories {
            let (repository, digest) = place;
            if registries.remembers(repository, digest)? {
                is_remembered = true;
                if fenced.contains(place) {
                    registries.forget(repository, digest)?;
                }
            }
        }
        Ok(is_remembered)
    }

    /// Moves the bytes unless a link has come; brings them back if one comes meanwhile.
    fn quarantine_one(
        &self,
        transaction: &Contents,
        digest: &Digest,
        repositories: &HashSet<(PathBuf, Digest)>,
    ) -> Result<bool> {
        let is_linked = || -> Result<bool> {
            for (repository, digest) in repositories {
                match self.store.stat(&layout::layer_link(repository, digest)) {
                    Ok(None) => {}
                    Ok(Some(_)) => return Ok(true),
                    Err(e) if e.is_damage() => return Ok(true),
                    Err(e) => return Err(e),
                }
            }
            Ok(false)
        };
        if is_linked()? {
            return Ok(false);
        }
        let path = layout::blob_data(digest);
        match self.store.rename(&path, &transaction.path_of(&path)) {
            Ok(true) => {}
            // An upload has brought the same bytes once more: those go when these are purged.
            Ok(false) | Err(Error::Exists { .. }) => return Ok(false),
            Err(e) => return Err(e),
        }
        // Whatever can't be told brings the bytes back.
        let linked = is_linked().map(|is_linked| is_linked || self.options.named.contains(digest));
        if linked.as_ref().is_ok_and(|linked| !linked) {
            return Ok(true);
        }
        match self.store.rename(&transaction.path_of(&path), &path) {
            // An upload has brought them.
            Ok(_) | Err(Error::Exists { .. }) => linked.map(|_| false),
            Err(e) => Err(e),
        }
    }
}

/// What must wait once more, because a registry remembers it.
struct Refused {
    from: String,
    digest: Digest,
    links: Vec<PathBuf>,
}

impl Refused {
    /// Joins the sweep that begins its wait now.
    fn join(&self, store: &dyn Store, transaction: &Transaction) -> Result<()> {
        for link in &self.links {
            store.rename(&layout::transaction(&self.from).join(link), &transaction.path_of(link))?;
        }
        Ok(())
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

/// Whether a registry failed to answer: the next question would only take as long.
fn is_of_registry(error: &Error) -> bool {
    matches!(error, Error::Busy { .. })
}

/// The blobs among items.
fn blobs_in_order(items: &[Item]) -> Vec<(DigestId, u64)> {
    let blob = |item: &Item| if let What::Blob(id) = item.what { Some((id, item.bytes)) } else { None };
    items.iter().filter_map(blob).collect()
}

/// A sweep that was being fenced when its process ended: what has moved by then is what it is about.
///
/// All links to what is still not in use have moved, or they would have brought it back by now.
pub(super) fn go_on(store: &dyn Store) -> Result<()> {
    for transaction in trash::contents(store)? {
        if let Some(Ok(stage)) = &transaction.stage
            && stage.step() == Step::Fencing
        {
            Stage { fenced_at: Some(Moment::now()), ..stage.clone() }.write(store, &transaction.id)?;
            log::info!("{}: a sweep that was interrupted goes on", transaction.id);
        }
    }
    Ok(())
}
