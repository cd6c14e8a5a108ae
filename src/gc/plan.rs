//! Plan: every decision of a collection with its reason, as a value.
//!
//! [`Plan::new`] looks at the ages of what the mark found unreferenced, and at nothing else; [`decide`] is pure.
//!
//! # Rules kept here
//! 1. The age of a blob is the newest of its times and those of any layer link to it: uploading a blob that
//!    exists already changes only the link.
//! 2. What can't be looked at is not garbage: a failing call ends the run; a blob without bytes is none.
//! 3. The age of a revision is that of its link, which every push of the manifest renews.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::mark::{self, Mark, Untagged};
use crate::catalog::intern::{DigestId, IdSet, NameId};
use crate::catalog::{Catalog, Effect, Problem, Tables};
use crate::error::Result;
use crate::layout;
use crate::store::{Stat, Store};

/// What decides about garbage, besides the mark.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Revisions that no tag leads to are garbage.
    pub untagged: bool,
    /// What was used more recently than this is left.
    pub grace: Duration,
    /// The time to count from.
    pub now: SystemTime,
}

impl Policy {
    /// When something last used then becomes garbage.
    pub fn eligible_at(&self, last_used: SystemTime) -> SystemTime {
        last_used.checked_add(self.grace).unwrap_or(last_used)
    }

    /// Whether something last used then is left. Without grace nothing is, whatever the clocks say.
    pub fn is_young(&self, last_used: SystemTime) -> bool {
        !self.grace.is_zero() && self.eligible_at(last_used) > self.now
    }
}

/// An unreferenced blob and all that tells its age.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Which.
    pub digest: DigestId,
    /// Facts of its bytes.
    pub stat: Stat,
    /// The newest sign of use.
    pub last_used: SystemTime,
    /// Layer links to it: the repository, and the digest by which that knows it.
    pub links: Vec<(NameId, DigestId)>,
}

/// What sort of thing is taken.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ItemKind {
    /// A repository's claim on a manifest.
    Revision,
    /// A repository's claim on a blob.
    LayerLink,
    /// Bytes.
    Blob,
}

/// Which thing; its path is made when it is asked for, there may be millions.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum What {
    /// A repository's claim on a manifest.
    Revision(NameId, DigestId),
    /// A repository's claim on a blob.
    LayerLink(NameId, DigestId),
    /// Bytes.
    Blob(DigestId),
}

/// One thing to take.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Item {
    /// Which.
    pub what: What,
    /// Bytes that a purge frees; 0 for links.
    pub bytes: u64,
    /// Why it is garbage.
    pub reason: Reason,
}

/// Why something is garbage.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Reason {
    /// A manifest that no tag leads to.
    Untagged,
    /// Only manifests that go name it.
    BelowUntagged,
    /// Nothing names it.
    Unnamed,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Reason::Untagged => "no tag leads to it",
            Reason::BelowUntagged => "only manifests that no tag leads to name it",
            Reason::Unnamed => "no manifest names it",
        })
    }
}

impl Item {
    /// What sort; the order of taking.
    pub fn kind(&self) -> ItemKind {
        match self.what {
            What::Revision(..) => ItemKind::Revision,
            What::LayerLink(..) => ItemKind::LayerLink,
            What::Blob(_) => ItemKind::Blob,
        }
    }

    /// What moves, below the registry directory.
    pub fn path(&self, tables: &Tables) -> PathBuf {
        let repository = |id: NameId| PathBuf::from(&*tables.names.get(id));
        let digest = |id: DigestId| tables.digests.get(id);
        match self.what {
            What::Revision(name, id) => layout::revision_link(&repository(name), &digest(id)),
            What::LayerLink(name, id) => layout::layer_link(&repository(name), &digest(id)),
            What::Blob(id) => layout::blob_data(&digest(id)),
        }
    }

    /// The content it is or leads to.
    pub fn digest(&self) -> Option<DigestId> {
        match self.what {
            What::Revision(_, id) | What::LayerLink(_, id) | What::Blob(id) => Some(id),
        }
    }

    /// The repository it belongs to; blobs belong to none.
    pub fn repository(&self) -> Option<NameId> {
        match self.what {
            What::Revision(name, _) | What::LayerLink(name, _) => Some(name),
            What::Blob(_) => None,
        }
    }
}

/// An unreferenced blob that is too young to be taken.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Young {
    /// Which.
    pub digest: DigestId,
    /// Bytes.
    pub bytes: u64,
    /// From when on it may be taken.
    pub eligible_at: SystemTime,
}

/// Everything a collection decided.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// What to take, in the order of taking.
    pub items: Vec<Item>,
    /// What is garbage but too young.
    pub young: Vec<Young>,
    /// What looks like garbage and is left, because its age could not be told.
    pub problems: Vec<Problem>,
}

impl Plan {
    /// Marks `catalog` and decides.
    pub fn new(store: &dyn Store, catalog: &Catalog, policy: &Policy) -> Result<Plan> {
        let untagged = match policy.untagged {
            true => mark::untagged(catalog, &|r| policy.is_young(r.version.last_change())),
            false => Untagged::new(),
        };
        let mark = mark::mark(catalog, &untagged);
        let (candidates, problems) = candidates(store, catalog, &mark)?;
        Ok(Plan { problems, ..decide(catalog, &untagged, &candidates, policy) })
    }

    /// What a second look decided, as far as this one did, too.
    pub fn confirmed_by(&self, mut second: Plan) -> Plan {
        let first: BTreeSet<&What> = self.items.iter().map(|i| &i.what).collect();
        second.items.retain(|item| first.contains(&item.what));
        second
    }

    /// Bytes of the blobs to take.
    pub fn bytes(&self) -> u64 {
        self.items.iter().map(|i| i.bytes).sum()
    }
}

/// Unreferenced blobs, with what tells their age; those of which that is damaged are left out, and noted.
///
/// # Cost
/// A `stat` for each of them and for each layer link to them; nothing for blobs that are referenced.
pub fn candidates(
    store: &dyn Store,
    catalog: &Catalog,
    mark: &Mark,
) -> Result<(Vec<Candidate>, Vec<Problem>)> {
    let mut links: HashMap<DigestId, Vec<(NameId, DigestId)>> = HashMap::new();
    for repository in catalog.repositories.values() {
        let name = catalog.tables.names.intern(repository.name.as_os_str());
        for layer in repository.layers.iter().copied().filter(|id| !mark.is_reachable(*id)) {
            let targets = catalog.aliases.get(&layer).map_or(std::slice::from_ref(&layer), Vec::as_slice);
            for target in targets {
                links.entry(*target).or_default().push((name, layer));
            }
        }
    }
    let (mut found, mut problems) = (Vec::new(), Vec::new());
    for digest in catalog.blobs.iter().copied().filter(|id| !mark.is_reachable(*id)) {
        let path = layout::blob_data(&catalog.digest(digest));
        match candidate(store, catalog, digest, &path, links.remove(&digest).unwrap_or_default()) {
            Ok(candidate) => found.extend(candidate),
            Err(e) if e.is_damage() => {
                let what = format!("{e}, so the age of {} is unknown", catalog.digest(digest));
                problems.push(Problem { path, what, effect: Effect::Ignored });
            }
            Err(e) => return Err(e),
        }
    }
    Ok((found, problems))
}

/// Looks at one unreferenced blob; `None` when its bytes are not there: what a sweep took leaves its directory.
fn candidate(
    store: &dyn Store,
    catalog: &Catalog,
    digest: DigestId,
    path: &Path,
    links: Vec<(NameId, DigestId)>,
) -> Result<Option<Candidate>> {
    let Some(stat) = store.stat(path)? else { return Ok(None) };
    let mut candidate =
        Candidate { digest, stat, last_used: stat.modified.max(stat.changed), links: Vec::new() };
    for (repository, layer) in links {
        let path = layout::layer_link(Path::new(&*catalog.name(repository)), &catalog.digest(layer));
        if let Some(stat) = store.stat(&path)? {
            candidate.last_used = candidate.last_used.max(stat.modified).max(stat.changed);
            candidate.links.push((repository, layer));
        }
    }
    Ok(Some(candidate))
}

/// Decides. Pure.
pub fn decide(catalog: &Catalog, untagged: &Untagged, candidates: &[Candidate], policy: &Policy) -> Plan {
    let mut plan = Plan::default();
    let mut below_untagged = IdSet::default();
    for (name, revisions) in untagged {
        let repository = catalog.tables.names.intern(name.as_os_str());
        for id in revisions.iter().copied() {
            let what = What::Revision(repository, id);
            plan.items.push(Item { what, bytes: 0, reason: Reason::Untagged });
            below_untagged.extend(&catalog.closure(id));
        }
    }
    let mut links: Vec<Item> = Vec::new();
    let mut blobs = Vec::new();
    for candidate in candidates {
        let (digest, bytes) = (candidate.digest, candidate.stat.size);
        if policy.is_young(candidate.last_used) {
            plan.young.push(Young { digest, bytes, eligible_at: policy.eligible_at(candidate.last_used) });
            continue;
        }
        let reason = match below_untagged.contains(digest) {
            true => Reason::BelowUntagged,
            false => Reason::Unnamed,
        };
        let link = |(repository, layer)| Item { what: What::LayerLink(repository, layer), bytes: 0, reason };
        links.extend(candidate.links.iter().copied().map(link));
        blobs.push(Item { what: What::Blob(digest), bytes, reason });
    }
    links.sort_unstable_by(|a, b| a.what.cmp(&b.what));
    links.dedup_by(|a, b| a.what == b.what);
    plan.items.extend(links);
    plan.items.extend(blobs);
    plan
}
