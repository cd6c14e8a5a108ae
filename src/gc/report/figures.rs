//! Figures: how many bytes are kept, and by whom; what a problem holds back; whose the garbage is.
//!
//! # Cost
//! One walk for each repository over what it keeps. Sizes of kept blobs are those that manifests claim, so only blobs
//! that no manifest names (kept because of a problem) take a `stat`. 8 bytes for each digest while it lasts.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use crate::catalog::intern::{DigestId, IdSet, NameId};
use crate::catalog::{Catalog, Effect, Keeps, Problem, Repository};
use crate::error::Result;
use crate::gc::mark;
use crate::gc::plan::{Item, Plan, What, Young};
use crate::layout::{self, Kind};
use crate::store::Store;

/// Bytes in the store, as far as this run judged them.
#[derive(Clone, Debug, Default)]
pub(super) struct Figures {
    /// Blobs that something leads to.
    pub(super) kept_blobs: usize,
    /// Their bytes, each blob once.
    pub(super) kept_bytes: u64,
    /// By repository, in order of their names.
    pub(super) repositories: Vec<Usage>,
    /// Garbage that no repository claims.
    pub(super) unclaimed: Usage,
    /// Bytes kept only because of each problem of the catalog.
    pub(super) held_back: Vec<u64>,
}

/// What a repository uses. A blob counts for each repository that has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    /// The name; empty where it is about no repository.
    pub(super) repository: PathBuf,
    /// Bytes of blobs that it leads to.
    pub(super) kept_bytes: u64,
    /// Bytes that were taken, or would be, of blobs that it has links to, and of its own things.
    pub(super) taken_bytes: u64,
    /// The same of all the garbage that is old enough, whether it goes now or later.
    pub(super) garbage_bytes: u64,
    /// Manifests among that.
    pub(super) garbage_manifests: usize,
    /// Bytes of garbage that is too young, of blobs that it has links to.
    pub(super) young_bytes: u64,
    /// Manifests that were taken, or would be.
    pub(super) manifests_taken: usize,
}

impl Figures {
    /// Counts what stays when `plan` is carried out.
    pub(super) fn new(store: &dyn Store, catalog: &Catalog, plan: &Plan) -> Result<Figures> {
        let gone = Gone::of(plan);
        let mut walk = Walk::new(catalog);
        let mut figures = Figures::default();
        let mut kept = IdSet::default();
        // Blobs without a claimed size, and the repositories that keep them.
        let mut unclaimed_sizes: HashMap<DigestId, Vec<usize>> = HashMap::new();
        for (at, (name, repository)) in catalog.repositories.iter().enumerate() {
            let mut usage = Usage { repository: name.clone(), ..Usage::default() };
            for id in walk.from(roots(catalog, repository, &gone), true) {
                if !catalog.has_blob(id) {
                    continue;
                }
                kept.insert(id);
                match walk.size(id) {
                    Some(size) => usage.kept_bytes = usage.kept_bytes.saturating_add(size),
                    None => unclaimed_sizes.entry(id).or_default().push(at),
                }
            }
            figures.repositories.push(usage);
        }
        for (id, repositories) in unclaimed_sizes {
            let size = match walk.size(id) {
                Some(size) => size,
                None => size_on_disk(store, catalog, id)?,
            };
            walk.set_size(id, size);
            for at in repositories {
                if let Some(usage) = figures.repositories.get_mut(at) {
                    usage.kept_bytes = usage.kept_bytes.saturating_add(size);
                }
            }
        }
        for id in catalog.blobs.iter().copied().filter(|id| kept.contains(*id)) {
            figures.kept_blobs += 1;
            figures.kept_bytes = figures.kept_bytes.saturating_add(walk.size(id).unwrap_or(0));
        }
        figures.held_back = held_back(catalog, &gone, &mut walk);
        drop(walk);
        figures.attribute(catalog, plan, &plan.young, None);
        for usage in figures.repositories.iter_mut().chain([&mut figures.unclaimed]) {
            usage.garbage_bytes = usage.taken_bytes;
            usage.garbage_manifests = usage.manifests_taken;
        }
        Ok(figures)
    }

    /// Says whose the garbage is, that which is `young` included; of the items only those at the places `taken` of the plan,
    /// `None` for all.
    pub(super) fn attribute(
        &mut self,
        catalog: &Catalog,
        plan: &Plan,
        young: &[Young],
        taken: Option<&[usize]>,
    ) {
        let items: Box<dyn Iterator<Item = &Item>> = match taken {
            None => Box::new(plan.items.iter()),
            Some(taken) => Box::new(taken.iter().filter_map(|at| plan.items.get(*at))),
        };
        let mut blobs = Vec::new();
        let mut own: HashMap<NameId, u64> = HashMap::new();
        let mut manifests: HashMap<NameId, Vec<DigestId>> = HashMap::new();
        for item in items {
            match item.what {
                What::Blob(id) => blobs.push(Blob::new(id, item.bytes, false)),
                What::Revision(name, id) => manifests.entry(name).or_default().push(id),
                _ => {}
            }
            if let Some(name) = item.repository() {
                *own.entry(name).or_default() += item.bytes;
            }
        }
        blobs.extend(young.iter().map(|y| Blob::new(y.digest, y.bytes, true)));
        let mut garbage = Garbage::new(catalog, blobs);
        for (at, (name, repository)) in catalog.repositories.iter().enumerate() {
            let Some(usage) = self.repositories.get_mut(at) else { continue };
            let id = catalog.tables.names.intern(name.as_os_str());
            let taken = manifests.get(&id).map_or(&[][..], Vec::as_slice);
            usage.manifests_taken = taken.len();
            (usage.taken_bytes, usage.young_bytes) =
                garbage.claimed_by(at, repository.layers.iter().chain(taken).copied());
            usage.taken_bytes += own.get(&id).copied().unwrap_or(0);
        }
        let (taken_bytes, young_bytes) = garbage.unclaimed();
        let garbage_bytes = self.unclaimed.garbage_bytes;
        self.unclaimed = Usage { taken_bytes, young_bytes, garbage_bytes, ..Usage::default() };
    }
}

/// Revisions that a plan takes.
struct Gone(HashSet<(NameId, DigestId)>);

impl Gone {
    fn of(plan: &Plan) -> Gone {
        let revision = |item: &Item| match item.what {
            What::Revision(name, id) => Some((name, id)),
            _ => None,
        };
        Gone(plan.items.iter().filter_map(revision).collect())
    }
}

/// Where the mark of a repository starts, as [`mark::mark`] does.
fn roots(catalog: &Catalog, repository: &Repository, gone: &Gone) -> Vec<DigestId> {
    let mut roots = revisions(catalog, repository, gone);
    roots.extend(&repository.held);
    if repository.keeps == Keeps::Everything {
        roots.extend(&repository.layers);
    }
    roots
}

fn revisions(catalog: &Catalog, repository: &Repository, gone: &Gone) -> Vec<DigestId> {
    let name = catalog.tables.names.intern(repository.name.as_os_str());
    let stay = repository.revisions.iter().filter(|r| !gone.0.contains(&(name, r.digest)));
    stay.flat_map(|r| [r.digest, r.target]).collect()
}

/// Bytes kept only because of each problem: what a walk that ignores all their effects does not reach. Problems with
/// the same effect on the same repository show the same number.
fn held_back(catalog: &Catalog, gone: &Gone, walk: &mut Walk<'_>) -> Vec<u64> {
    let by_problem: Vec<Vec<DigestId>> =
        catalog.problems.iter().map(|problem| kept_by(catalog, problem)).collect();
    if by_problem.iter().all(Vec::is_empty) {
        return vec![0; by_problem.len()];
    }
    let named = catalog.problems.iter().zip(&by_problem).filter(|(p, _)| p.effect == Effect::KeepsNamed);
    let named: HashSet<DigestId> = named.flat_map(|(_, roots)| roots.iter().copied()).collect();
    let untagged = match gone.0.is_empty() {
        // Nothing is taken for being untagged, so nothing is kept in spite of it.
        true => mark::Untagged::new(),
        false => untagged_but_for_problems(catalog),
    };
    let mut without = IdSet::default();
    for repository in catalog.repositories.values() {
        let spared = untagged.get(&repository.name);
        let mut roots = revisions(catalog, repository, gone);
        roots.retain(|id| !spared.is_some_and(|spared| spared.contains(id)));
        roots.extend(repository.held.iter().filter(|id| !named.contains(id)));
        without.extend(&walk.from(roots, false));
    }
    by_problem
        .into_iter()
        .map(|roots| {
            let kept = walk.from(roots, true).into_iter();
            let only = kept.filter(|id| catalog.has_blob(*id) && !without.contains(*id));
            only.fold(0, |sum: u64, id| sum.saturating_add(walk.size(id).unwrap_or(0)))
        })
        .collect()
}

/// Revisions without a tag in repositories that keep them because of a problem.
fn untagged_but_for_problems(catalog: &Catalog) -> mark::Untagged {
    let mut lenient = catalog.clone();
    lenient.repositories.retain(|_, r| r.keeps != Keeps::Named);
    for repository in lenient.repositories.values_mut() {
        let mut named = Repository::clone(repository);
        named.keeps = Keeps::Named;
        *repository = named.into();
    }
    mark::untagged(&lenient, &|_| false)
}

/// Where the walk starts that a problem adds.
fn kept_by(catalog: &Catalog, problem: &Problem) -> Vec<DigestId> {
    let all_of = |name: &Path, with_layers: bool| -> Vec<DigestId> {
        let Some(repository) = catalog.repository(name) else { return Vec::new() };
        let revisions = repository.revisions.iter().flat_map(|r| [r.digest, r.target]);
        let layers = repository.layers.iter().filter(|_| with_layers).copied();
        revisions.chain(layers).collect()
    };
    match &problem.effect {
        Effect::Ignored | Effect::StopsSweep => Vec::new(),
        Effect::KeepsEverything(name) => all_of(name, true),
        Effect::KeepsRevisions(name) => all_of(name, false),
        Effect::KeepsNamed => named_in(catalog, &problem.path),
    }
}

/// What the odd thing at `path` names: the further digests of a manifest, or the target of a tag.
fn named_in(catalog: &Catalog, path: &Path) -> Vec<DigestId> {
    if let Kind::Blob(digest) = layout::classify(path) {
        let parsed = catalog.tables.digests.find(&digest).and_then(|id| catalog.parsed(id));
        return parsed.map_or_else(Vec::new, |p| p.others().to_vec());
    }
    let tag = path.ancestors().find_map(|above| match layout::classify(above) {
        Kind::Tag(repository, tag) => Some((repository, tag)),
        _ => None,
    });
    let Some((repository, tag)) = tag else { return Vec::new() };
    let tag = catalog.tables.names.intern(&tag);
    let target = catalog.repository(&repository).and_then(|r| r.tag(tag)?.target);
    target.into_iter().collect()
}

/// The size of a blob that no manifest names; 0 for one whose bytes are not there.
fn size_on_disk(store: &dyn Store, catalog: &Catalog, id: DigestId) -> Result<u64> {
    match store.stat(&layout::blob_data(&catalog.digest(id))) {
        Ok(stat) => Ok(stat.map_or(0, |s| s.size)),
        // Something else stands there; it is kept, and takes no bytes that a blob would.
        Err(e) if e.is_damage() => Ok(0),
        Err(e) => Err(e),
    }
}

/// A walk over manifests that learns sizes on its way.
struct Walk<'a> {
    catalog: &'a Catalog,
    /// The last walk that came by, for each digest.
    seen: Vec<u32>,
    turn: u32,
    /// Bytes as claimed, for each digest; [`LARGE`] where they stand in `large`.
    sizes: Vec<u32>,
    large: HashMap<DigestId, u64>,
}

const UNKNOWN: u32 = u32::MAX;
const LARGE: u32 = u32::MAX - 1;

impl<'a> Walk<'a> {
    fn new(catalog: &'a Catalog) -> Walk<'a> {
        let digests = catalog.tables.digests.bound();
        Walk {
            catalog,
            seen: vec![0; digests],
            turn: 0,
            sizes: vec![UNKNOWN; digests],
            large: HashMap::new(),
        }
    }

    /// Everything that `roots` lead to, each once; without the further digests of odd manifests if told so.
    fn from(&mut self, roots: Vec<DigestId>, with_others: bool) -> Vec<DigestId> {
        self.turn += 1;
        let catalog = self.catalog;
        let mut reached = Vec::new();
        let mut waiting = roots;
        while let Some(id) = waiting.pop() {
            // Numbers handed out since the walk began belong to a newer catalog.
            let Some(seen) = self.seen.get_mut(id.index()) else { continue };
            if std::mem::replace(seen, self.turn) == self.turn {
                continue;
            }
            reached.push(id);
            waiting.extend(catalog.aliases.get(&id).into_iter().flatten());
            let Some(parsed) = catalog.parsed(id) else { continue };
            self.set_size(id, u64::from(parsed.size));
            for descriptor in parsed.descriptors() {
                if descriptor.size > 0 && self.size(descriptor.digest).is_none() {
                    self.set_size(descriptor.digest, descriptor.size);
                    // Bytes lie under the other name, if it has one.
                    for stored in catalog.aliases.get(&descriptor.digest).into_iter().flatten() {
                        self.set_size(*stored, descriptor.size);
                    }
                }
                waiting.push(descriptor.digest);
            }
            if with_others {
                waiting.extend(parsed.others());
            }
        }
        reached
    }

    fn size(&self, id: DigestId) -> Option<u64> {
        match self.sizes.get(id.index()).copied()? {
            UNKNOWN => None,
            LARGE => self.large.get(&id).copied(),
            size => Some(size.into()),
        }
    }

    fn set_size(&mut self, id: DigestId, size: u64) {
        let Some(known) = self.sizes.get_mut(id.index()) else { return };
        *known = u32::try_from(size).unwrap_or(LARGE).min(LARGE);
        if *known == LARGE {
            self.large.insert(id, size);
        }
    }
}

/// Unreferenced blobs, and who has links to them.
struct Garbage<'a> {
    catalog: &'a Catalog,
    /// In order of their numbers.
    blobs: Vec<Blob>,
    /// The same as a set: most layers are not among them.
    ids: IdSet,
}

struct Blob {
    id: DigestId,
    /// The last repository that claimed it, from 1.
    claimed_by: u32,
    bytes: u64,
    is_young: bool,
}

impl Blob {
    fn new(id: DigestId, bytes: u64, is_young: bool) -> Blob {
        Blob { id, claimed_by: 0, bytes, is_young }
    }
}

impl<'a> Garbage<'a> {
    fn new(catalog: &'a Catalog, mut blobs: Vec<Blob>) -> Garbage<'a> {
        blobs.sort_unstable_by_key(|b| b.id);
        let ids = blobs.iter().map(|b| b.id).collect();
        Garbage { catalog, blobs, ids }
    }

    /// Bytes to take and young bytes of what the repository at place `at` has.
    fn claimed_by(&mut self, at: usize, digests: impl Iterator<Item = DigestId>) -> (u64, u64) {
        let (mut taken, mut young) = (0, 0);
        let number = at as u32 + 1;
        for id in digests {
            let targets = self.catalog.aliases.get(&id).map_or(std::slice::from_ref(&id), Vec::as_slice);
            for target in targets.iter().filter(|id| self.ids.contains(**id)) {
                let Ok(found) = self.blobs.binary_search_by_key(target, |b| b.id) else { continue };
                let blob = &mut self.blobs[found];
                if std::mem::replace(&mut blob.claimed_by, number) != number {
                    *(if blob.is_young { &mut young } else { &mut taken }) += blob.bytes;
                }
            }
        }
        (taken, young)
    }

    fn unclaimed(&self) -> (u64, u64) {
        let of = |is_young: bool| {
            let blobs = self.blobs.iter().filter(|b| b.claimed_by == 0 && b.is_young == is_young);
            blobs.map(|b| b.bytes).sum()
        };
        (of(false), of(true))
    }
}
