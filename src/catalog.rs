//! The registry in memory: an immutable snapshot of repositories, tags, manifests and blobs.
//!
//! [`scan::scan`] builds one from a [`crate::store::Store`]; given the one before, it reads only what changed.
//! View, mark and plan are functions of a catalog, so they are tested without disk, root or kernel.
//!
//! A catalog is lenient: what can't be read is a [`Problem`] in it, and each problem says what is kept because
//! of it. The mark obeys these effects; a collection refuses to start where one says so.
//!
//! # Layout
//! Digests and names are numbers ([`intern`]); whatever there is many of is a flat list of them.

pub mod cache;
pub mod intern;
mod manifests;
pub mod scan;
pub mod update;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::digest::{Algorithm, Digest};
use crate::layout;
use crate::manifest::{self, Kind};
use crate::printable::Printable;
use crate::store::Version;
use intern::{DigestId, Digests, IdSet, NameId, Names};

/// What two catalogs of the same store have in common: the numbers, and how the store is looked at.
#[derive(Clone)]
pub struct Tables {
    /// Numbers of digests.
    pub digests: Arc<Digests>,
    /// Numbers of names.
    pub names: Arc<Names>,
    /// Manifests parsed by an earlier process; their digests vouch for them.
    pub known: Arc<Manifests>,
    /// How many threads look at the store.
    pub threads: NonZeroUsize,
    /// Nobody said how many threads, so a sweep beside a registry may take one, and its time.
    pub is_patient: bool,
}

/// So many threads wait for a cold disk at once, 2.5 times as quick as two; with everything in memory they cost nothing.
const MANY_THREADS: NonZeroUsize = NonZeroUsize::new(32).unwrap();

impl Tables {
    /// Nothing known; as many threads as given, else [`MANY_THREADS`], or one for each processor if that is more.
    pub fn new(threads: Option<NonZeroUsize>) -> Tables {
        let processors = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        Tables {
            threads: threads.unwrap_or_else(|| processors().max(MANY_THREADS)),
            is_patient: threads.is_none(),
            ..Tables::default()
        }
    }
}

impl Default for Tables {
    /// Nothing known, one thread.
    fn default() -> Tables {
        Tables {
            digests: Arc::default(),
            names: Arc::default(),
            known: Arc::default(),
            threads: NonZeroUsize::MIN,
            is_patient: false,
        }
    }
}

/// Manifests by the number of their digest.
pub type Manifests = HashMap<DigestId, Arc<Manifest>>;
/// Digests that repositories serve under other ones.
pub type Aliases = HashMap<DigestId, Vec<DigestId>>;

/// A snapshot of a registry; a copy costs a few pointers for each repository.
#[derive(Clone)]
pub struct Catalog {
    /// The numbers used here.
    pub tables: Tables,
    /// By name (of the directory below `repositories`), in order; those with invalid names as well.
    pub repositories: BTreeMap<PathBuf, Arc<Repository>>,
    /// Directories below `repositories` with valid names, repositories or not; where a storage has such.
    pub namespaces: BTreeSet<PathBuf>,
    /// Every manifest that a repository, a tag or an index names.
    pub manifests: Arc<Manifests>,
    /// Blobs whose directory exists, by the first byte of their digests. Whether the bytes are there, a stat tells.
    pub blobs: Arc<[DigestId]>,
    /// The same as a set.
    pub present: Arc<IdSet>,
    /// Where a repository serves a digest under another one (sha512 names for blobs stored under sha256).
    pub aliases: Arc<Aliases>,
    /// What could not be read or does not belong.
    pub problems: Vec<Problem>,
    /// When the scan began.
    pub scanned_at: SystemTime,
}

/// One repository.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Repository {
    /// Its name, the path below `repositories`.
    pub name: PathBuf,
    /// Whether a registry can serve it: its name follows the grammar.
    pub is_valid: bool,
    /// Manifests of this repository, in order of the numbers of their digests.
    pub revisions: Vec<Revision>,
    /// Tags in order of the numbers of their names; only those a registry could serve by name.
    pub tags: Vec<Tag>,
    /// Blobs this repository may serve, by the digest in the path, in order of their numbers.
    pub layers: Vec<DigestId>,
    /// Further blobs it holds: targets of links under unknown algorithms, of tags with invalid names, signatures.
    pub held: Vec<DigestId>,
    /// Those of them that are manifests, as far as their place tells: what they lead to is held as well.
    pub held_manifests: Vec<DigestId>,
    /// Pushes in progress, by name.
    pub uploads: Vec<NameId>,
    /// How much is kept here because something could not be judged.
    pub keeps: Keeps,
}

/// What a repository keeps beyond what its manifests name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Keeps {
    /// Nothing.
    #[default]
    Named,
    /// Every revision, tagged or not.
    Revisions,
    /// Every revision and every blob that a layer link names.
    Everything,
}

/// A repository's claim on a manifest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Revision {
    /// The digest in the path, by which clients ask.
    pub digest: DigestId,
    /// The digest in the link, whose bytes are served; the same unless someone tampered.
    pub target: DigestId,
    /// Facts of the link file: its time is the last push. Unknown after a quick look, or where a call failed.
    pub version: Version,
    /// The content was read, and is a digest.
    pub is_readable: bool,
}

/// A tag.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tag {
    /// Its name.
    pub name: NameId,
    /// What it points at; `None` when its link can't be read.
    pub target: Option<DigestId>,
    /// Facts of `current/link`: its time is the push. Unknown when that file is missing.
    pub version: Version,
}

/// What is known of a manifest.
#[derive(Clone, Debug)]
pub enum Manifest {
    /// Read, and its bytes match its digest.
    Parsed(Parsed),
    /// It is there, but damaged: what it names is unknown.
    Damaged {
        /// Why.
        reason: String,
    },
    /// Its bytes are not in the store.
    Missing,
}

/// A manifest as numbers; see [`crate::manifest::Manifest`] for what they mean.
///
/// Kept small, there are as many as images: 40 bytes, and 16 for each descriptor.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed {
    /// Its media type.
    pub media_type: NameId,
    /// Bytes; no manifest is larger than 4 MiB.
    pub size: u32,
    /// What sort it is.
    pub kind: Kind,
    /// Config, layers, children, in this order.
    named: Box<[Descriptor]>,
    layers: u32,
    has_config: bool,
    /// No digest stands in it twice.
    is_simple: bool,
    rare: Option<Box<Rare>>,
}

/// What most manifests lack.
#[derive(Clone, Debug, Default, PartialEq)]
struct Rare {
    artifact_type: Option<NameId>,
    subject: Option<DigestId>,
    /// Of each child.
    platforms: Box<[Option<NameId>]>,
    others: Box<[DigestId]>,
    odd: Option<Box<str>>,
}

/// What a manifest names.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Descriptor {
    /// Bytes, as the manifest claims.
    pub size: u64,
    /// The content.
    pub digest: DigestId,
    /// Its media type.
    pub media_type: NameId,
}

impl Parsed {
    /// The numbers of a manifest of `size` bytes.
    pub fn new(manifest: &manifest::Manifest<'_>, size: usize, tables: &Tables) -> Parsed {
        let digest = |d: &Digest| tables.digests.intern(d);
        let name = |name: &str| tables.names.intern(OsStr::new(name));
        let descriptor = |d: &manifest::Descriptor<'_>| Descriptor {
            digest: digest(&d.digest),
            size: d.size,
            media_type: name(&d.media_type),
        };
        let named = manifest.config.iter().chain(&manifest.layers).chain(&manifest.children);
        let rare = Rare {
            artifact_type: manifest.artifact_type.as_deref().map(name),
            subject: manifest.subject.as_ref().map(digest),
            platforms: manifest.children.iter().map(|d| d.platform.as_deref().map(name)).collect(),
            others: manifest.others.iter().map(digest).collect(),
            odd: manifest.odd.as_deref().map(Into::into),
        };
        let parsed = Parsed {
            media_type: name(&manifest.media_type),
            size: u32::try_from(size).unwrap_or(u32::MAX),
            kind: manifest.kind,
            named: named.map(descriptor).collect(),
            layers: manifest.layers.len() as u32,
            has_config: manifest.config.is_some(),
            is_simple: false,
            rare: (rare != Rare::default()).then(|| Box::new(rare)),
        };
        parsed.with_simplicity()
    }

    fn with_simplicity(self) -> Parsed {
        let is_simple = self.others().is_empty() && self.named.len() == self.references().len();
        Parsed { is_simple, ..self }
    }

    /// The config.
    pub fn config(&self) -> Option<&Descriptor> {
        self.named.first().filter(|_| self.has_config)
    }

    /// The layers, the base first.
    pub fn layers(&self) -> &[Descriptor] {
        &self.named[self.has_config as usize..][..self.layers as usize]
    }

    /// The children of an index.
    pub fn children(&self) -> &[Descriptor] {
        &self.named[self.has_config as usize + self.layers as usize..]
    }

    /// The children and their platforms.
    pub fn platforms(&self) -> impl Iterator<Item = (&Descriptor, Option<NameId>)> {
        let platforms = self.rare.iter().flat_map(|r| r.platforms.iter().copied());
        self.children().iter().zip(platforms.chain(std::iter::repeat(None)))
    }

    /// Its artifact type.
    pub fn artifact_type(&self) -> Option<NameId> {
        self.rare.as_ref().and_then(|r| r.artifact_type)
    }

    /// What it is about.
    pub fn subject(&self) -> Option<DigestId> {
        self.rare.as_ref().and_then(|r| r.subject)
    }

    /// Further digests that count, and why they do.
    pub fn others(&self) -> &[DigestId] {
        self.rare.as_ref().map_or(&[], |r| &r.others)
    }

    /// Why [`Parsed::others`] was needed.
    pub fn odd(&self) -> Option<&str> {
        self.rare.as_ref().and_then(|r| r.odd.as_deref())
    }

    /// Config, layers and children with what is said about them.
    pub fn descriptors(&self) -> &[Descriptor] {
        &self.named
    }

    /// Everything this manifest holds, each once: config, layers, children, whatever odd text names. Not its subject.
    pub fn references(&self) -> Vec<DigestId> {
        let mut all: Vec<DigestId> =
            self.named.iter().map(|d| d.digest).chain(self.others().iter().copied()).collect();
        if !self.is_simple {
            all.sort_unstable();
            all.dedup();
        }
        all
    }

    /// The same, without making a list of it.
    pub fn each_reference(&self, mut each: impl FnMut(DigestId)) {
        match self.is_simple {
            true => self.named.iter().for_each(|d| each(d.digest)),
            false => self.references().into_iter().for_each(each),
        }
    }
}

impl Manifest {
    /// The parsed manifest, if it could be read.
    pub fn parsed(&self) -> Option<&Parsed> {
        match self {
            Manifest::Parsed(parsed) => Some(parsed),
            Manifest::Damaged { .. } | Manifest::Missing => None,
        }
    }

    /// Of two manifests with the same digest: whether as much is known of both.
    fn says_the_same_as(&self, other: &Manifest) -> bool {
        match (self, other) {
            // The digest vouches for all that was parsed.
            (Manifest::Parsed(_), Manifest::Parsed(_)) | (Manifest::Missing, Manifest::Missing) => true,
            (Manifest::Damaged { reason }, Manifest::Damaged { reason: other }) => reason == other,
            _ => false,
        }
    }
}

/// Something that could not be read or does not belong where it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// Where, below the registry directory.
    pub path: PathBuf,
    /// What is wrong with it.
    pub what: String,
    /// What follows from it.
    pub effect: Effect,
}

/// What a problem does to a collection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effect {
    /// Nothing depends on it; it stays where it is.
    Ignored,
    /// Every digest that stands in it is kept.
    KeepsNamed,
    /// This repository keeps all its manifests, tagged or not.
    KeepsRevisions(PathBuf),
    /// This repository keeps everything that is linked in it.
    KeepsEverything(PathBuf),
    /// No collection can run before it is mended.
    StopsSweep,
}

impl std::fmt::Display for Effect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Effect::Ignored => f.write_str("nothing depends on it; regfs leaves it where it is"),
            Effect::KeepsNamed => f.write_str("every digest that stands in it is kept"),
            Effect::KeepsRevisions(name) => {
                write!(f, "every manifest of {} is kept, tagged or not", name.printable())
            }
            Effect::KeepsEverything(name) => write!(f, "everything linked in {} is kept", name.printable()),
            Effect::StopsSweep => f.write_str("no collection runs before it is mended"),
        }
    }
}

impl Repository {
    /// The revision that clients ask for by `digest`.
    pub fn revision(&self, digest: DigestId) -> Option<&Revision> {
        let at = self.revisions.binary_search_by_key(&digest, |r| r.digest).ok()?;
        self.revisions.get(at)
    }

    /// The tag of that name.
    pub fn tag(&self, name: NameId) -> Option<&Tag> {
        let at = self.tags.binary_search_by_key(&name, |t| t.name).ok()?;
        self.tags.get(at)
    }

    /// Whether a tag can be served: it points at a revision.
    pub fn is_served(&self, tag: &Tag) -> bool {
        tag.target.is_some_and(|target| self.revision(target).is_some_and(|r| r.is_readable))
    }
}

impl Catalog {
    /// The empty catalog, for a registry never looked at.
    pub fn empty() -> Catalog {
        Catalog {
            tables: Tables::default(),
            repositories: BTreeMap::new(),
            namespaces: BTreeSet::new(),
            manifests: Arc::default(),
            blobs: Arc::default(),
            present: Arc::default(),
            aliases: Arc::default(),
            problems: Vec::new(),
            scanned_at: SystemTime::UNIX_EPOCH,
        }
    }

    /// The digest that a number stands for.
    pub fn digest(&self, id: DigestId) -> Digest {
        self.tables.digests.get(id)
    }

    /// The name that a number stands for.
    pub fn name(&self, id: NameId) -> Arc<OsStr> {
        self.tables.names.get(id)
    }

    /// A repository by its name.
    pub fn repository(&self, name: &Path) -> Option<&Arc<Repository>> {
        self.repositories.get(name)
    }

    /// A manifest that could be read.
    pub fn parsed(&self, id: DigestId) -> Option<&Parsed> {
        self.manifests.get(&id).and_then(|m| m.parsed())
    }

    /// Whether the blob has a directory in the store.
    pub fn has_blob(&self, id: DigestId) -> bool {
        self.present.contains(id)
    }

    /// The blobs of one directory like `blobs/sha256/ab`.
    pub fn blobs_in(&self, algorithm: Algorithm, shard: u8) -> impl Iterator<Item = DigestId> {
        let key = |id: &DigestId| {
            let digest = self.digest(*id);
            (digest.algorithm(), digest.as_bytes().first().copied().unwrap_or(0))
        };
        let start = self.blobs.partition_point(|id| key(id) < (algorithm, shard));
        self.blobs[start..].iter().copied().take_while(move |id| key(id) == (algorithm, shard))
    }

    /// The blob that holds the bytes of `id`: itself, or what layer links say it is stored under.
    pub fn stored_as(&self, id: DigestId) -> DigestId {
        match self.aliases.get(&id).map(Vec::as_slice) {
            Some([target, ..]) if !self.has_blob(id) => *target,
            _ => id,
        }
    }

    /// `id` and everything below it, each once, in the order of a walk; what is damaged or missing has nothing below.
    pub fn closure(&self, id: DigestId) -> Vec<DigestId> {
        let mut order = vec![id];
        let mut seen: std::collections::HashSet<DigestId> = [id].into();
        let mut next = 0;
        while let Some(current) = order.get(next) {
            next += 1;
            let references = self.parsed(*current).map(Parsed::references).unwrap_or_default();
            order.extend(references.into_iter().filter(|r| seen.insert(*r)));
        }
        order
    }

    /// Whether `other` says the same about the store; the times of the two scans don't count.
    pub fn says_the_same_as(&self, other: &Catalog) -> bool {
        let same_repositories = || {
            let mut both = self.repositories.iter().zip(&other.repositories);
            self.repositories.len() == other.repositories.len()
                && both.all(|((a, x), (b, y))| a == b && (Arc::ptr_eq(x, y) || x == y))
        };
        let same_manifests = || {
            if Arc::ptr_eq(&self.manifests, &other.manifests) {
                return true;
            }
            let known = |(id, m): (&DigestId, &Arc<Manifest>)| {
                other.manifests.get(id).is_some_and(|o| m.says_the_same_as(o))
            };
            self.manifests.len() == other.manifests.len() && self.manifests.iter().all(known)
        };
        same_repositories()
            && self.namespaces == other.namespaces
            && self.blobs == other.blobs
            && self.aliases == other.aliases
            && self.problems == other.problems
            && same_manifests()
    }

    /// What stops collections and lies in a repository: in its directory, or in the bytes of one of its manifests.
    pub fn obstacles_in<'a>(&'a self, name: &Path) -> impl Iterator<Item = &'a Problem> {
        let parts = [layout::MANIFESTS, layout::LAYERS].map(|part| layout::repository(name).join(part));
        let (place, repository) = (layout::repository(name), self.repository(name).cloned());
        self.problems.iter().filter(|p| p.effect == Effect::StopsSweep).filter(move |problem| {
            let is_bytes = |r: &Repository| {
                let manifests = r.revisions.iter().flat_map(|r| self.closure(r.target));
                manifests.into_iter().any(|id| layout::blob_data(&self.digest(id)) == problem.path)
            };
            problem.path == place
                || parts.iter().any(|part| problem.path.starts_with(part))
                || repository.as_ref().is_some_and(|r| is_bytes(r))
        })
    }

    /// The lines to print when a collection can't run; empty when it can.
    pub fn obstacles(&self) -> Vec<String> {
        let stops = self.problems.iter().filter(|p| p.effect == Effect::StopsSweep);
        stops.map(|p| p.what.clone()).collect()
    }
}
