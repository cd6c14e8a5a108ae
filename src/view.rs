//! The tree that people see, as functions of a snapshot.
//!
//! Knows neither the kernel nor any command line: [`tree`] and [`reachability`] tell what is where, [`attributes`] what `stat` says,
//! [`text`] what generated files read like, [`control`] what the words written to `control/` mean.
//!
//! What costs a pass over the catalog is made when someone first looks at it, once for each [`Snapshot`].

pub mod attributes;
pub mod control;
pub mod links;
pub mod node;
pub mod reachability;
pub mod stale;
pub mod text;
pub mod tree;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use crate::catalog::intern::{DigestId, IdSet, NameId};
use crate::catalog::{Catalog, Keeps, Manifest, Repository};
use crate::costly::Costly;
use crate::gc::mark::{self, Mark, Untagged};
use crate::gc::plan::{self, Candidate};
use crate::layout;
use crate::store::Store;
use node::Node;
use stale::Stale;

/// What of the mount does not change.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Nothing can be removed and nothing be commanded.
    pub read_only: bool,
    /// Owner of everything.
    pub uid: u32,
    /// Group of everything.
    pub gid: u32,
    /// Youngest age that a sweep touches unless told otherwise.
    pub grace: Duration,
    /// How long a request to a registry may be under way, unless told otherwise.
    pub drain: Duration,
    /// How long the trash keeps things unless told otherwise.
    pub keep: Duration,
    /// At most so many calls to the storage in a second of a sweep, unless told otherwise.
    pub rate: Option<u32>,
    /// When the mount began; the time of what has no other.
    pub mounted_at: SystemTime,
}

/// A catalog with all that the tree makes of it.
pub struct Snapshot {
    /// The registry.
    pub catalog: Catalog,
    /// Names of the transactions in the trash.
    pub trash: Vec<String>,
    /// Children of each directory below `images`, the root of it included.
    directories: Arc<Directories>,
    /// Directories that were moved, the oldest first; shared with the snapshots that follow.
    moved: Arc<RwLock<Vec<(PathBuf, PathBuf)>>>,
    /// When the entries of directories were found changed; of those that never were, nothing.
    changed_at: Arc<HashMap<Node, SystemTime>>,
    pushed: OnceLock<HashMap<DigestId, SystemTime>>,
    mark: OnceLock<Mark>,
    listed: OnceLock<IdSet>,
    uses: OnceLock<Uses>,
    is_judged: OnceLock<bool>,
    candidates: OnceLock<Vec<Candidate>>,
    /// From when on a sweep takes the next step with what is unreferenced.
    moves_on: Costly<Arc<HashMap<DigestId, SystemTime>>>,
    stored: OnceLock<Stored>,
    untagged: OnceLock<Untagged>,
    usage: OnceLock<Arc<[u8]>>,
}

/// Children of directories, by the path of these.
type Directories = BTreeMap<PathBuf, BTreeSet<OsString>>;

/// What of all that is named is in the store.
#[derive(Default)]
struct Stored {
    /// Bytes of each blob that is, by the digest that it is stored under.
    sizes: HashMap<DigestId, u64>,
    /// Digests that are not, in order.
    missing: Vec<DigestId>,
}

/// Who names what, backwards.
#[derive(Default)]
pub struct Uses {
    /// Reachable manifests that name a digest.
    pub manifests: HashMap<DigestId, Vec<DigestId>>,
    /// Repositories that have a manifest.
    pub revisions: HashMap<DigestId, Vec<PathBuf>>,
    /// Tags that point at a manifest.
    pub tags: HashMap<DigestId, Vec<(PathBuf, NameId)>>,
    /// Manifests that are about a manifest.
    pub referrers: HashMap<DigestId, Vec<DigestId>>,
    /// Repositories that keep a digest for safety's sake.
    pub keepers: HashMap<DigestId, Vec<PathBuf>>,
}

/// So many moves are remembered; the kernel is told of each at once.
const MOST_MOVED: usize = 1000;

impl Snapshot {
    /// Prepares the tree of `catalog`.
    pub fn new(catalog: Catalog, trash: Vec<String>) -> Snapshot {
        let directories = Arc::new(directories(&catalog));
        Snapshot::with(catalog, trash, directories)
    }

    /// The snapshot that follows this one, and what is not in it as it was here; `blobs` came or went on the disk.
    pub fn next(&self, catalog: Catalog, trash: Vec<String>, blobs: &[DigestId]) -> (Snapshot, Stale) {
        let is_same_tree = self.catalog.namespaces == catalog.namespaces
            && self.catalog.repositories.len() == catalog.repositories.len()
            && self.catalog.repositories.iter().zip(&catalog.repositories).all(|((a, old), (b, new))| {
                Arc::ptr_eq(old, new) || (a == b && old.is_valid == new.is_valid)
            });
        let directories =
            if is_same_tree { self.directories.clone() } else { Arc::new(directories(&catalog)) };
        let mut next = Snapshot::with(catalog, trash, directories);
        let stale = Stale::between(self, &next, blobs);
        next.changed_at = self.changed_at.clone();
        next.moved = self.moved.clone();
        if !stale.contents.is_empty() {
            let now = SystemTime::now();
            // Grows with the directories that ever changed, not with how often they do.
            Arc::make_mut(&mut next.changed_at).extend(stale.contents.iter().map(|node| (*node, now)));
        }
        (next, stale)
    }

    fn with(catalog: Catalog, trash: Vec<String>, directories: Arc<Directories>) -> Snapshot {
        Snapshot {
            catalog,
            trash,
            directories,
            changed_at: Arc::default(),
            moved: Arc::default(),
            pushed: OnceLock::new(),
            mark: OnceLock::new(),
            listed: OnceLock::new(),
            uses: OnceLock::new(),
            is_judged: OnceLock::new(),
            candidates: OnceLock::new(),
            moves_on: Costly::default(),
            stored: OnceLock::new(),
            untagged: OnceLock::new(),
            usage: OnceLock::new(),
        }
    }

    /// When the entries of a directory were last found changed.
    pub fn changed_at(&self, node: Node) -> Option<SystemTime> {
        self.changed_at.get(&node).copied()
    }

    /// When a manifest was last pushed to any repository.
    pub fn pushed_at(&self, id: DigestId) -> Option<SystemTime> {
        let pushed = self.pushed.get_or_init(|| {
            let mut pushed: HashMap<DigestId, SystemTime> = HashMap::new();
            for revision in self.catalog.repositories.values().flat_map(|r| &r.revisions) {
                let at = revision.version.modified();
                let known = pushed.entry(revision.digest).or_insert(at);
                *known = at.max(*known);
            }
            pushed
        });
        pushed.get(&id).copied()
    }

    /// Names below a directory of `images`; `None` when there is no such directory.
    pub fn directory(&self, path: &Path) -> Option<&BTreeSet<OsString>> {
        self.directories.get(path)
    }

    /// The repository of that name, if a registry could serve it.
    pub fn repository(&self, name: &Path) -> Option<&Arc<Repository>> {
        self.catalog.repository(name).filter(|r| r.is_valid)
    }

    /// The mark without any policy: what a plain `sweep` keeps.
    pub fn mark(&self) -> &Mark {
        self.mark.get_or_init(|| mark::mark(&self.catalog, &Untagged::new()))
    }

    /// Whether `manifests/` shows it: it could be read, and a repository has it or an index that names it.
    pub fn is_listed(&self, id: DigestId) -> bool {
        self.listed().contains(id)
    }

    /// All that `manifests/` shows.
    pub fn listed_manifests(&self) -> impl Iterator<Item = DigestId> {
        let listed = self.listed();
        self.catalog.manifests.keys().copied().filter(|id| listed.contains(*id))
    }

    fn listed(&self) -> &IdSet {
        self.listed.get_or_init(|| {
            let revisions = self.catalog.repositories.values().flat_map(|r| &r.revisions);
            let mut listed = IdSet::default();
            let mut waiting: Vec<DigestId> = revisions.flat_map(|r| [r.digest, r.target]).collect();
            while let Some(id) = waiting.pop() {
                let Some(parsed) = self.catalog.parsed(id) else { continue };
                if listed.insert(id) {
                    waiting.extend(
                        parsed.children().iter().map(|d| d.digest).chain(parsed.others().iter().copied()),
                    );
                }
            }
            listed
        })
    }

    /// Who names what.
    pub fn uses(&self) -> &Uses {
        self.uses.get_or_init(|| {
            let mut uses = Uses::default();
            for (id, manifest) in
                self.catalog.manifests.iter().filter(|(id, _)| self.mark().is_reachable(**id))
            {
                let Manifest::Parsed(parsed) = &**manifest else { continue };
                for named in parsed.references().into_iter().filter(|named| named != id) {
                    uses.manifests.entry(named).or_default().push(*id);
                    for target in self.catalog.aliases.get(&named).into_iter().flatten() {
                        uses.manifests.entry(*target).or_default().push(*id);
                    }
                }
                if let Some(subject) = parsed.subject() {
                    uses.referrers.entry(subject).or_default().push(*id);
                }
            }
            for (name, repository) in &self.catalog.repositories {
                for revision in &repository.revisions {
                    uses.revisions.entry(revision.digest).or_default().push(name.clone());
                }
                for tag in &repository.tags {
                    if let Some(target) = tag.target {
                        uses.tags.entry(target).or_default().push((name.clone(), tag.name));
                    }
                }
                let layers = (repository.keeps == Keeps::Everything).then_some(&repository.layers);
                for kept in repository.held.iter().chain(layers.into_iter().flatten()) {
                    uses.keepers.entry(*kept).or_default().push(name.clone());
                }
            }
            uses
        })
    }

    /// Whether a collection could run; otherwise nothing can be called garbage.
    pub fn is_judged(&self) -> bool {
        *self.is_judged.get_or_init(|| self.catalog.obstacles().is_empty())
    }

    /// Unreferenced blobs with their ages, in the order of their numbers.
    pub fn candidates(&self, store: &dyn Store) -> &[Candidate] {
        if !self.is_judged() {
            return &[];
        }
        self.candidates.get_or_init(|| match plan::candidates(store, &self.catalog, self.mark()) {
            Ok((mut candidates, _)) => {
                candidates.sort_unstable_by_key(|c| c.digest);
                candidates
            }
            // The view shows what it can; a collection meets the same error and says it.
            Err(e) => {
                log::warn!("could not look at what is unreferenced: {e}");
                Vec::new()
            }
        })
    }

    /// The unreferenced blob `id`.
    pub fn candidate(&self, store: &dyn Store, id: DigestId) -> Option<&Candidate> {
        if self.mark().is_reachable(id) {
            return None;
        }
        let candidates = self.candidates(store);
        candidates.binary_search_by_key(&id, |c| c.digest).ok().and_then(|at| candidates.get(at))
    }

    /// Referenced digests whose bytes are not in the store.
    ///
    /// # Cost
    /// A `stat` for each referenced blob, when this or [`Snapshot::stored_size`] is first asked.
    pub fn missing(&self, store: &dyn Store) -> &[DigestId] {
        &self.stored(store).missing
    }

    /// Bytes of a digest in the store, 0 where they are not there. What manifests claim is no measure: a layer may lie at
    /// another server (`urls`), be lost, or have any number beside it, which registries take as it is.
    pub fn stored_size(&self, store: &dyn Store, id: DigestId) -> u64 {
        self.stored(store).sizes.get(&self.catalog.stored_as(id)).copied().unwrap_or(0)
    }

    fn stored(&self, store: &dyn Store) -> &Stored {
        self.stored.get_or_init(|| {
            let uses = self.uses();
            let is_named = |id: &DigestId| {
                uses.manifests.contains_key(id)
                    || uses.revisions.contains_key(id)
                    || uses.keepers.contains_key(id)
            };
            let all: BTreeSet<DigestId> = uses
                .manifests
                .keys()
                .chain(uses.revisions.keys())
                .chain(uses.keepers.keys())
                .chain(uses.tags.keys())
                .copied()
                .collect();
            let mut stored = Stored::default();
            for id in all {
                let place = self.catalog.stored_as(id);
                let stat = match self.catalog.has_blob(place) {
                    true => store.stat(&layout::blob_data(&self.catalog.digest(place))),
                    false => Ok(None),
                };
                match stat {
                    Ok(Some(stat)) => drop(stored.sizes.insert(place, stat.size)),
                    Ok(None) if is_named(&id) => stored.missing.push(id),
                    Ok(None) => {}
                    // Something stands there; a collection meets the same error and says it.
                    Err(e) => log::debug!("{e}"),
                }
            }
            stored
        })
    }

    /// Revisions that no tag leads to: what `sweep untagged` adds, once they are older than the grace period.
    pub fn untagged(&self) -> &Untagged {
        self.untagged.get_or_init(|| mark::untagged(&self.catalog, &|_| false))
    }

    /// The number of a repository's name.
    pub fn name_id(&self, name: &Path) -> NameId {
        self.catalog.tables.names.intern(name.as_os_str())
    }

    /// The path that a number stands for; `None` for a number from outside. That of a directory below `images` which was
    /// moved is its new one, as long as nothing is at the old one: the kernel goes on with the number until it is told.
    pub fn path(&self, id: NameId) -> Option<PathBuf> {
        let mut path = self.plain_path(id)?;
        if self.directory(&path).is_none() {
            for (from, to) in self.moved.read().unwrap_or_else(PoisonError::into_inner).iter() {
                if self.directory(&path).is_none()
                    && let Some(now) = renamed(&path, from, to)
                {
                    path = now;
                }
            }
        }
        Some(path)
    }

    /// The path that a number stands for, whatever was moved.
    pub fn plain_path(&self, id: NameId) -> Option<PathBuf> {
        self.catalog.tables.names.checked(id).map(|name| PathBuf::from(&*name))
    }

    /// Notes that a directory below `images` is about to move.
    pub fn note_move(&self, from: &Path, to: &Path) {
        let mut moved = self.moved.write().unwrap_or_else(PoisonError::into_inner);
        if moved.len() == MOST_MOVED {
            moved.remove(0);
        }
        moved.push((from.to_path_buf(), to.to_path_buf()));
    }

    /// The name that a number stands for; `None` for a number from outside.
    pub fn name(&self, id: NameId) -> Option<Arc<OsStr>> {
        self.catalog.tables.names.checked(id)
    }
}

/// The name of `name` after `from` has become `to`; `None` for one that is not in it.
pub fn renamed(name: &Path, from: &Path, to: &Path) -> Option<PathBuf> {
    let rest = name.strip_prefix(from).ok()?;
    Some(if rest.as_os_str().is_empty() { to.to_path_buf() } else { to.join(rest) })
}

fn directories(catalog: &Catalog) -> Directories {
    let mut directories = Directories::new();
    directories.insert(PathBuf::new(), BTreeSet::new());
    let repositories = catalog.repositories.values().filter(|r| r.is_valid).map(|r| &r.name);
    for directory in repositories.chain(&catalog.namespaces) {
        directories.entry(directory.clone()).or_default();
        for path in directory.ancestors() {
            if let (Some(parent), Some(name)) = (path.parent(), path.file_name()) {
                directories.entry(parent.to_path_buf()).or_default().insert(name.to_os_string());
            }
        }
    }
    directories
}

/// A snapshot with what is needed to answer from it.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// The registry at one instant.
    pub snapshot: &'a Snapshot,
    /// Where sizes and bytes of blobs come from.
    pub store: &'a dyn Store,
    /// What does not change.
    pub settings: &'a Settings,
}
