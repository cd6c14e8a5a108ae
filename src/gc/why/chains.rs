//! The chains of references that lead to a digest.
//!
//! Upwards through manifests from the digest, whatever the repository; then, in each repository, whichever tag, manifest
//! or other root stands on one of these ways. Only where a manifest lives through its subject is the way from
//! the tags looked for from above.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::{kind_of, role};
use crate::catalog::intern::{DigestId, IdSet, NameId};
use crate::catalog::{Catalog, Effect, Keeps, Parsed, Repository, Revision};
use crate::digest::Digest;
use crate::layout;
use crate::printable::Printable;
use crate::store::Version;

/// A way from a root to the digest.
#[derive(Clone, Debug, PartialEq)]
pub struct Chain {
    /// Where.
    pub repository: PathBuf,
    /// What holds the first step.
    pub root: Root,
    /// Problems because of which the repository keeps it, each with its path.
    pub problems: Vec<String>,
    /// From what the root names to the digest.
    pub steps: Vec<Step>,
}

/// What keeps without being kept.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Root {
    /// A tag.
    Tag {
        /// Its name.
        name: String,
        /// When; unknown where its link is missing.
        pushed: Option<SystemTime>,
        /// Its manifest is in its repository.
        is_served: bool,
    },
    /// A manifest of the repository that no tag leads to.
    Untagged {
        /// When.
        pushed: Option<SystemTime>,
    },
    /// A link that no registry could have made, a signature, or a tag with a name that is none.
    Held,
    /// A layer link, in a repository in which something can't be judged.
    Kept,
}

/// A step of a chain.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// How the step before leads here; `None` for the first.
    pub link: Option<Link>,
    /// What is here.
    pub digest: Digest,
    /// `index`, `manifest`, `layer`, …
    pub kind: &'static str,
    /// Platform, for a child of an index.
    pub platform: Option<String>,
}

/// How one thing leads to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// The first names the second.
    Names,
    /// The second is about the first, and lives as long as that.
    Referrer,
    /// The bytes of the first lie under the second.
    StoredAs,
    /// The repository's link of the first says the second.
    ServedAs,
}

struct Raw<'a> {
    repository: &'a Repository,
    root: Root,
    way: Vec<DigestId>,
}

/// All chains, as numbers.
pub(super) struct Found<'a> {
    catalog: &'a Catalog,
    chains: Vec<Raw<'a>>,
    /// A manifest that names the digest.
    above: Option<DigestId>,
}

/// Finds the chains that lead to `id`.
pub(super) fn find(catalog: &Catalog, id: DigestId) -> Found<'_> {
    let above = Above::of(catalog, id);
    let mut chains: Vec<Raw<'_>> = Vec::new();
    for repository in catalog.repositories.values() {
        let mut look =
            Look { catalog, repository, above: &above, covered: IdSet::default(), chains: Vec::new() };
        look.tags();
        look.held();
        look.revisions();
        look.kept();
        look.chains.sort_by(|a, b| (&a.root, a.way.len()).cmp(&(&b.root, b.way.len())));
        chains.extend(look.chains);
    }
    Found { catalog, chains, above: above.order.get(1).copied() }
}

impl Found<'_> {
    pub(super) fn len(&self) -> usize {
        self.chains.len()
    }

    /// A manifest right above the digest, whether it is kept or not; the nearest one if it has another name.
    pub(super) fn above(&self, id: DigestId) -> Option<DigestId> {
        let of_chains = self.chains.iter().find_map(|c| c.way.iter().rev().nth(1).copied());
        of_chains.or(self.above).filter(|above| *above != id)
    }

    /// Whether nothing but untagged manifests that a collection could be told to take lead there.
    pub(super) fn is_untagged(&self) -> bool {
        let is_free =
            |c: &Raw<'_>| matches!(c.root, Root::Untagged { .. }) && c.repository.keeps == Keeps::Named;
        self.chains.iter().all(is_free)
    }

    /// The first of them.
    pub(super) fn chains(&self, limit: usize) -> Vec<Chain> {
        self.chains.iter().take(limit).map(|raw| self.chain(raw)).collect()
    }

    fn chain(&self, raw: &Raw<'_>) -> Chain {
        let mut before = None;
        let steps = raw.way.iter().map(|id| {
            let step = self.step(raw.repository, before, *id);
            before = Some(*id);
            step
        });
        let steps = steps.collect();
        let is_problematic = match raw.root {
            Root::Tag { is_served, .. } => !is_served,
            _ => raw.repository.keeps != Keeps::Named || raw.root == Root::Held,
        };
        let problems = if is_problematic { self.problems(raw) } else { Vec::new() };
        Chain { repository: raw.repository.name.clone(), root: raw.root.clone(), problems, steps }
    }

    fn step(&self, repository: &Repository, before: Option<DigestId>, id: DigestId) -> Step {
        let catalog = self.catalog;
        let parent = before.and_then(|before| catalog.parsed(before));
        let child = parent.and_then(|p| p.platforms().find(|(d, _)| d.digest == id));
        let platform =
            child.and_then(|(_, platform)| platform).map(|p| catalog.name(p).to_string_lossy().into_owned());
        let link = before.map(|before| match parent {
            Some(parent) if parent.references().contains(&id) => Link::Names,
            _ if catalog.aliases.get(&before).is_some_and(|targets| targets.contains(&id)) => Link::StoredAs,
            _ if repository.revision(before).is_some_and(|r| r.target == id) => Link::ServedAs,
            _ => Link::Referrer,
        });
        let named = parent.filter(|_| link == Some(Link::Names)).map(|parent| role(parent, id).0);
        Step {
            link,
            digest: catalog.digest(id),
            kind: kind_of(catalog, id).or(named).unwrap_or("blob"),
            platform,
        }
    }

    /// What can't be judged in the repository of a chain, as far as that is why the chain keeps something.
    fn problems(&self, raw: &Raw<'_>) -> Vec<String> {
        let name = &raw.repository.name;
        let place = layout::repository(name);
        let tags = layout::tags(name);
        let is_reason = |problem: &&crate::catalog::Problem| match &raw.root {
            Root::Tag { name: tag, .. } => problem.path == layout::tag_link(name, tag.as_ref()),
            Root::Held => problem.path.starts_with(&tags),
            Root::Untagged { .. } | Root::Kept => match &problem.effect {
                Effect::KeepsEverything(of) | Effect::KeepsRevisions(of) => of == name,
                Effect::StopsSweep => problem.path.starts_with(&place),
                // An invalid name, of the repository or of a directory above it.
                Effect::Ignored => {
                    !raw.repository.is_valid
                        && place.starts_with(&problem.path)
                        && problem.path.starts_with(layout::REPOSITORIES)
                }
                Effect::KeepsNamed => false,
            },
        };
        // What a problem says holds its path.
        self.catalog.problems.iter().filter(is_reason).map(|p| p.what.clone()).collect()
    }
}

/// Everything that leads to a digest through manifests.
struct Above {
    /// The digest first, then the nearest.
    order: Vec<DigestId>,
    set: IdSet,
    /// The next step towards the digest.
    next: HashMap<DigestId, DigestId>,
}

impl Above {
    fn of(catalog: &Catalog, id: DigestId) -> Above {
        let mut above = Above { order: vec![id], set: [id].into_iter().collect(), next: HashMap::new() };
        let mut edge = above.set.clone();
        loop {
            let mut found: Vec<(DigestId, DigestId)> = Vec::new();
            for (id, manifest) in catalog.manifests.iter().filter(|(id, _)| !above.set.contains(**id)) {
                let Some(parsed) = manifest.parsed() else { continue };
                let mut next = None;
                parsed.each_reference(|r| next = next.or(edge.contains(r).then_some(r)));
                found.extend(next.map(|next| (*id, next)));
            }
            for (id, targets) in catalog.aliases.iter().filter(|(id, _)| !above.set.contains(**id)) {
                found.extend(targets.iter().find(|t| edge.contains(**t)).map(|next| (*id, *next)));
            }
            if found.is_empty() {
                return above;
            }
            found.sort_unstable();
            edge = IdSet::default();
            for (id, next) in found {
                if above.set.insert(id) {
                    edge.insert(id);
                    above.order.push(id);
                    above.next.insert(id, next);
                }
            }
        }
    }

    fn way_from(&self, id: DigestId) -> Vec<DigestId> {
        let next = |id: &DigestId| self.next.get(id).copied();
        std::iter::successors(Some(id), next).collect()
    }
}

/// Looks at one repository.
struct Look<'a, 'b> {
    catalog: &'a Catalog,
    repository: &'a Repository,
    above: &'b Above,
    /// What the roots found so far lead to, of what leads to the digest.
    covered: IdSet,
    chains: Vec<Raw<'a>>,
}

impl Look<'_, '_> {
    /// The way from `id` to the digest, through what the repository serves under `id` if need be.
    fn way(&self, id: DigestId) -> Option<Vec<DigestId>> {
        if self.above.set.contains(id) {
            return Some(self.above.way_from(id));
        }
        let served = self.repository.revision(id)?.target;
        self.above.set.contains(served).then(|| [vec![id], self.above.way_from(served)].concat())
    }

    fn add(&mut self, root: Root, way: Vec<DigestId>) {
        self.chains.push(Raw { repository: self.repository, root, way });
    }

    /// Notes all that `id` leads to.
    fn cover(&mut self, id: DigestId) {
        let mut waiting = vec![id];
        while let Some(id) = waiting.pop() {
            if !self.covered.insert(id) {
                continue;
            }
            waiting.extend(self.repository.revision(id).map(|r| r.target));
            waiting.extend(self.catalog.aliases.get(&id).into_iter().flatten());
            if let Some(parsed) = self.catalog.parsed(id) {
                parsed.each_reference(|r| {
                    if self.above.set.contains(r) {
                        waiting.push(r);
                    }
                });
            }
        }
    }

    fn tag(&self, name: NameId) -> Root {
        let tag = self.repository.tag(name);
        Root::Tag {
            name: self.catalog.name(name).to_string_lossy().into_owned(),
            pushed: tag.and_then(|tag| time(&tag.version)),
            is_served: tag.and_then(|tag| tag.target).is_some_and(|t| self.repository.revision(t).is_some()),
        }
    }

    fn tags(&mut self) {
        for tag in &self.repository.tags {
            if let Some((target, way)) = tag.target.and_then(|target| Some((target, self.way(target)?))) {
                self.add(self.tag(tag.name), way);
                self.cover(target);
            }
        }
    }

    fn held(&mut self) {
        let mut held = self.repository.held.clone();
        held.sort_unstable();
        held.dedup();
        for id in held {
            // What a tag without a manifest points at is held, too.
            if let Some(way) =
                self.way(id).filter(|_| !self.repository.tags.iter().any(|t| t.target == Some(id)))
            {
                self.add(Root::Held, way);
                self.cover(id);
            }
        }
    }

    /// Manifests that no tag names, directly or through an index.
    fn revisions(&mut self) {
        let is_above = |r: &&Revision| self.above.set.contains(r.digest) || self.above.set.contains(r.target);
        let is_covered = |r: &&Revision| self.covered.contains(r.digest) || self.covered.contains(r.target);
        let rest = self.repository.revisions.iter().filter(is_above).filter(|r| !is_covered(r));
        let mut rest: Vec<(&Revision, Vec<DigestId>)> =
            rest.filter_map(|r| Some((r, self.way(r.digest)?))).collect();
        if rest.is_empty() {
            return;
        }
        let from_tags = Ways::from_tags(self.catalog, self.repository);
        // Indexes before their children.
        rest.sort_by_key(|(_, way)| std::cmp::Reverse(way.len()));
        for (revision, way) in rest {
            if self.covered.contains(revision.digest) {
                continue;
            }
            match from_tags.to(revision.digest) {
                Some(subject) => {
                    let first = subject.first().copied();
                    let tag = self.repository.tags.iter().find(|t| t.target.is_some() && t.target == first);
                    let root = tag.map_or(Root::Held, |tag| self.tag(tag.name));
                    self.add(root, [&subject[..], &way[1..]].concat());
                }
                None => self.add(Root::Untagged { pushed: time(&revision.version) }, way),
            }
            self.cover(revision.digest);
        }
    }

    /// What is kept because something in the repository can't be judged.
    fn kept(&mut self) {
        if self.repository.keeps != Keeps::Everything {
            return;
        }
        let ways = self.repository.layers.iter().filter(|id| self.above.set.contains(**id));
        if let Some(way) = ways.map(|id| self.above.way_from(*id)).min_by_key(Vec::len) {
            self.add(Root::Kept, way);
        }
    }
}

fn time(version: &Version) -> Option<SystemTime> {
    (*version != Version::UNKNOWN).then(|| version.modified())
}

/// The ways from the tags of a repository downwards, and from a subject to its referrers.
struct Ways {
    /// The step before; `None` for what a tag points at.
    before: HashMap<DigestId, Option<DigestId>>,
}

impl Ways {
    /// The same walk as [`crate::gc::mark::live_in`], with the way it took.
    fn from_tags(catalog: &Catalog, repository: &Repository) -> Ways {
        let mut about: HashMap<DigestId, Vec<DigestId>> = HashMap::new();
        for revision in &repository.revisions {
            if let Some(subject) = catalog.parsed(revision.target).and_then(Parsed::subject) {
                about.entry(subject).or_default().push(revision.digest);
            }
        }
        let roots = repository.tags.iter().filter_map(|t| t.target).chain(repository.held.iter().copied());
        let mut waiting: VecDeque<(DigestId, Option<DigestId>)> = roots.map(|id| (id, None)).collect();
        let mut before = HashMap::new();
        while let Some((id, from)) = waiting.pop_front() {
            if before.contains_key(&id) {
                continue;
            }
            before.insert(id, from);
            let below = catalog.parsed(id).map(Parsed::references).unwrap_or_default();
            let served = repository.revision(id).map(|r| r.target);
            let all = below.into_iter().chain(served).chain(about.get(&id).into_iter().flatten().copied());
            waiting.extend(all.map(|next| (next, Some(id))));
        }
        Ways { before }
    }

    fn to(&self, id: DigestId) -> Option<Vec<DigestId>> {
        self.before.get(&id)?;
        let mut way: Vec<DigestId> =
            std::iter::successors(Some(id), |id| self.before.get(id).copied().flatten()).collect();
        way.reverse();
        Some(way)
    }
}

/// Where a chain begins, as people write it.
pub(super) fn reference(chain: &Chain) -> String {
    let name: &Path = &chain.repository;
    match (&chain.root, chain.steps.first()) {
        (Root::Tag { name: tag, .. }, _) => format!("{}:{}", name.printable(), tag.printable()),
        (_, Some(step)) => format!("{}@{}", name.printable(), step.digest),
        (_, None) => name.printable().to_string(),
    }
}
