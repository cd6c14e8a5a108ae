//! Mark: what can be reached, and by how many references.
//!
//! Reads a [`Catalog`], changes nothing, does no I/O.
//!
//! # Rules kept here
//! 1. Manifests are decided per repository, to a fixpoint; blobs globally, since repositories share them.
//! 2. Every revision is a mark root; with the `untagged` policy those that [`untagged`] found are not.
//! 3. From a manifest the mark follows config, layers, children at any depth, and every digest of an odd
//!    manifest. A child counts although its repository has no revision of it: its index still names it.
//! 4. A referrer lives as long as its subject does in that repository; it does not hold its subject.
//! 5. A digest that a repository serves under another one (sha512 layers) holds that other one.
//! 6. A repository in which something could not be judged keeps all that is linked in it ([`Keeps`]).

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use crate::catalog::intern::{DigestId, IdSet};
use crate::catalog::{Catalog, Keeps, Parsed, Repository, Revision};

/// What the mark found.
pub struct Mark {
    /// References to each digest, by its number; 0 is unreferenced.
    references: Vec<u32>,
}

/// Revisions that no tag leads to, by repository.
pub type Untagged = BTreeMap<PathBuf, Vec<DigestId>>;

impl Mark {
    /// How many references lead to `id`: one for each manifest that names it, each repository that has it as a
    /// revision, each that keeps it for safety.
    pub fn references(&self, id: DigestId) -> u32 {
        self.references.get(id.index()).copied().unwrap_or(0)
    }

    /// Whether anything leads to `id`.
    pub fn is_reachable(&self, id: DigestId) -> bool {
        self.references(id) > 0
    }
}

/// Marks everything that can be reached when the revisions in `without` are taken for gone.
pub fn mark(catalog: &Catalog, without: &Untagged) -> Mark {
    let mut walk = Walk { catalog, references: vec![0; catalog.tables.digests.bound()], waiting: Vec::new() };
    for (name, repository) in &catalog.repositories {
        let gone = without.get(name);
        for revision in &repository.revisions {
            if !gone.is_some_and(|gone| gone.contains(&revision.digest)) {
                walk.refer(revision.digest);
                if revision.target != revision.digest {
                    walk.refer(revision.target);
                }
            }
        }
        repository.held.iter().for_each(|id| walk.refer(*id));
        if repository.keeps == Keeps::Everything {
            repository.layers.iter().for_each(|id| walk.refer(*id));
        }
        walk.finish();
    }
    Mark { references: walk.references }
}

struct Walk<'a> {
    catalog: &'a Catalog,
    references: Vec<u32>,
    waiting: Vec<DigestId>,
}

impl Walk<'_> {
    /// Counts a reference to `id`, and to what it is stored as; the first one queues a manifest.
    fn refer(&mut self, id: DigestId) {
        // Numbers handed out since the walk began belong to a newer catalog.
        let Some(count) = self.references.get_mut(id.index()) else { return };
        *count = count.saturating_add(1);
        if *count > 1 {
            return;
        }
        if self.catalog.parsed(id).is_some() {
            self.waiting.push(id);
        }
        for target in self.catalog.aliases.get(&id).into_iter().flatten() {
            self.refer(*target);
        }
    }

    fn finish(&mut self) {
        while let Some(id) = self.waiting.pop() {
            let Some(parsed) = self.catalog.parsed(id) else { continue };
            parsed.each_reference(|r| {
                if r != id {
                    self.refer(r);
                }
            });
        }
    }
}

/// What some digests lead to within one repository, again and again for one after the other.
pub(super) struct Reach {
    /// The last walk that came by, for each digest.
    seen: Vec<u32>,
    turn: u32,
}

impl Reach {
    pub(super) fn new(catalog: &Catalog) -> Reach {
        Reach { seen: vec![0; catalog.tables.digests.bound()], turn: 0 }
    }

    /// Forgets the walk before, and follows `roots` downwards under all the digests that things are known by.
    pub(super) fn walk(&mut self, catalog: &Catalog, roots: Vec<DigestId>) {
        self.turn += 1;
        let mut waiting = roots;
        while let Some(id) = waiting.pop() {
            // Numbers handed out since this was made belong to a newer catalog.
            let Some(seen) = self.seen.get_mut(id.index()) else { continue };
            if std::mem::replace(seen, self.turn) != self.turn {
                if let Some(parsed) = catalog.parsed(id) {
                    parsed.each_reference(|r| waiting.push(r));
                }
                waiting.extend(catalog.aliases.get(&id).into_iter().flatten());
            }
        }
    }

    /// Whether the walk came by `id`.
    pub(super) fn contains(&self, id: DigestId) -> bool {
        self.turn > 0 && self.seen.get(id.index()) == Some(&self.turn)
    }
}

/// The revisions that no tag leads to; those for which `is_protected` answers yes are left out, with all they lead to.
pub fn untagged(catalog: &Catalog, is_protected: &dyn Fn(&Revision) -> bool) -> Untagged {
    let mut found = Untagged::new();
    for (name, repository) in &catalog.repositories {
        if repository.keeps != Keeps::Named {
            continue;
        }
        let tagged = repository.tags.iter().filter_map(|t| t.target);
        let protected = repository.revisions.iter().filter(|r| is_protected(r)).map(|r| r.digest);
        let roots = tagged.chain(protected).chain(repository.held.iter().copied()).collect();
        let live = live_in(catalog, repository, roots);
        let is_dead = |r: &&Revision| !live.contains(r.digest) && !live.contains(r.target);
        let dead: Vec<DigestId> = repository.revisions.iter().filter(is_dead).map(|r| r.digest).collect();
        if !dead.is_empty() {
            found.insert(name.clone(), dead);
        }
    }
    found
}

/// What `roots` lead to within a repository: downwards through manifests, and from a subject to its referrers.
pub fn live_in(catalog: &Catalog, repository: &Repository, roots: Vec<DigestId>) -> IdSet {
    let mut referrers: HashMap<DigestId, Vec<DigestId>> = HashMap::new();
    let mut served_as: HashMap<DigestId, DigestId> = HashMap::new();
    for revision in &repository.revisions {
        if revision.digest != revision.target {
            served_as.insert(revision.digest, revision.target);
        }
        if let Some(subject) = catalog.parsed(revision.target).and_then(Parsed::subject) {
            referrers.entry(subject).or_default().push(revision.digest);
        }
    }
    let mut live: IdSet = roots.iter().copied().collect();
    let mut waiting = roots;
    while let Some(id) = waiting.pop() {
        let below = catalog.parsed(id).map(Parsed::references).unwrap_or_default();
        let about = referrers.get(&id).into_iter().flatten().chain(served_as.get(&id)).copied();
        waiting.extend(below.into_iter().chain(about).filter(|next| live.insert(*next)));
    }
    live
}
