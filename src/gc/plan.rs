//! Plan: every decision of a collection with its reason, as a value.
//!
//! [`Plan::new`] looks at the ages of what the mark found unreferenced, then for what crashes, deletions and sweeps leave
//! behind ([`super::leftovers`]) and what is broken ([`super::repair`]); [`decide`] is pure.
//!
//! # Rules kept here
//! 1. The age of a blob is the newest of its times and those of any layer link to it: uploading a blob that
//!    exists already changes only the link.
//! 2. What can't be looked at is not garbage: a failing call ends the run; a blob without bytes is none.
//! 3. The age of a revision is that of its link, which every push of the manifest renews.
//! 4. With a glob only what belongs to matching repositories goes. A blob belongs to all repositories with a layer
//!    link to it, and to the one whose untagged manifest led to it; without either, nobody can say whose it was.

mod going;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

pub use self::going::Going;
use super::mark::{self, Mark};
use super::repair::{self, Repair};
use super::{Options, leftovers};
use crate::catalog::intern::{DigestId, IdSet, NameId};
use crate::catalog::scan::spread;
use crate::catalog::{Catalog, Effect, Problem, Repository, Revision, Tables};
use crate::clock::{Next, Now};
use crate::error::Result;
use crate::layout;
use crate::store::{Directory, Store};

/// What decides about garbage, besides the mark.
#[derive(Clone, Debug)]
pub struct Policy {
    /// What was asked for.
    pub options: Options,
    /// The time to count from.
    pub now: Now,
    /// Into how many directories a sweep looks without being told to.
    pub thorough_up_to: usize,
}

/// So many directories are read in seconds from a cold disk.
const THOROUGH_UP_TO: usize = 100_000;

impl Policy {
    /// What `options` mean at a time.
    pub fn new(options: &Options, now: &Now) -> Policy {
        Policy { options: options.clone(), now: now.clone(), thorough_up_to: THOROUGH_UP_TO }
    }

    /// When something last used then becomes garbage.
    pub fn eligible(&self, last_used: SystemTime) -> Next {
        match self.is_young(last_used) {
            true => self.now.next(last_used.checked_add(self.options.grace).unwrap_or(last_used)),
            false => Next::Due,
        }
    }

    /// Whether something last used then is left. Without grace nothing is, whatever the clocks say.
    pub fn is_young(&self, last_used: SystemTime) -> bool {
        self.is_younger(last_used, self.options.grace)
    }

    /// Whether something last used then is younger than `age`.
    pub fn is_younger(&self, last_used: SystemTime, age: Duration) -> bool {
        !age.is_zero() && last_used.checked_add(age).unwrap_or(last_used) > self.now.trusted
    }

    /// How long ago an untagged manifest must have been pushed.
    pub fn untagged_age(&self) -> Duration {
        self.options.grace.max(self.options.untagged_for)
    }

    /// Whether a manifest stays although no tag leads to it; one that can't tell its age does.
    pub fn is_young_manifest(&self, revision: &Revision) -> bool {
        revision.version.last_change().is_none_or(|time| self.is_younger(time, self.untagged_age()))
    }

    /// Whether the repository (or namespace) of that name is collected in.
    pub fn includes(&self, repository: &Path) -> bool {
        let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::new() };
        self.options.repositories.as_ref().is_none_or(|glob| glob.matches_path_with(repository, options))
    }

    /// Whether every directory of a blob, a link or a tag is looked into: when asked for, and in a store with so few of
    /// them that it costs next to nothing.
    pub fn is_thorough(&self, catalog: &Catalog) -> bool {
        let links = |r: &Repository| r.layers.len() + r.revisions.len() + r.tags.len();
        let all = catalog.repositories.values().map(|r| links(r)).sum::<usize>() + catalog.blobs.len();
        let is_cheap = !self.options.quick && all <= self.thorough_up_to;
        is_cheap || self.options.thorough || self.options.repair
    }

    /// Whether directories that a sweep empties go at once: nobody pushes, or that is the caller's risk.
    pub fn is_eager(&self) -> bool {
        !self.options.gate.is_beside() && (self.options.now || self.options.grace.is_zero())
    }
}

/// An unreferenced blob and all that tells its age.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Which.
    pub digest: DigestId,
    /// Bytes.
    pub bytes: u64,
    /// The newest sign of use.
    pub last_used: SystemTime,
    /// Layer links to it: the repository, and the digest by which that knows it.
    pub links: Box<[(NameId, DigestId)]>,
}

/// What sort of thing is taken; the order of taking.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ItemKind {
    /// A tag with all that is in its directory.
    Tag,
    /// A repository's claim on a manifest.
    Revision,
    /// A repository's claim on a blob.
    LayerLink,
    /// Bytes.
    Blob,
    /// What a tag pointed at once.
    TagHistory,
    /// A push that was never finished.
    Upload,
    /// A file that a crashed writer left.
    Unfinished,
    /// A directory with nothing in it. Removed, not moved: there is nothing to lose.
    Directory,
    /// The empty directories of a repository without images.
    Repository,
}

impl ItemKind {
    /// The word for it in reports, for `count` of them.
    pub fn noun(self) -> &'static str {
        match self {
            ItemKind::Tag => "tag",
            ItemKind::Revision => "revision",
            ItemKind::LayerLink => "layer link",
            ItemKind::Blob => "blob",
            ItemKind::TagHistory => "tag history link",
            ItemKind::Upload => "upload",
            ItemKind::Unfinished => "unfinished file",
            ItemKind::Directory => "empty directory",
            ItemKind::Repository => "empty repository",
        }
    }

    /// Whether it moves to the trash; what holds nothing is removed.
    pub fn is_moved(self) -> bool {
        !matches!(self, ItemKind::Directory | ItemKind::Repository)
    }
}

/// Which thing; its path is made when it is asked for, there may be millions.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum What {
    /// Repository and name of a tag, and what it points at.
    Tag(NameId, NameId, DigestId),
    /// A repository's claim on a manifest.
    Revision(NameId, DigestId),
    /// A repository's claim on a blob.
    LayerLink(NameId, DigestId),
    /// Bytes.
    Blob(DigestId),
    /// Repository and name of a tag, and what it pointed at once.
    TagHistory(NameId, NameId, DigestId),
    /// Repository and name of an upload.
    Upload(NameId, NameId),
    /// A file that a crashed writer left.
    Unfinished(Box<PathBuf>),
    /// A directory with nothing, or only such directories, in it.
    Directory(Box<PathBuf>),
    /// The directories of a repository.
    Repository(NameId),
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
    /// It is about an image that is gone.
    Orphaned,
    /// Only what is about an image that is gone names it.
    BelowOrphaned,
    /// Nothing names it.
    Unnamed,
    /// Nothing in its repository names it.
    UnnamedHere,
    /// What it leads to is not in the store.
    Dangling,
    /// What it leads to is not in the repository any more.
    Past,
    /// It began too long ago.
    Stale,
    /// Its writer is gone.
    Crashed,
    /// Nothing is in it.
    Empty,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Reason::Untagged => "no tag leads to it",
            Reason::BelowUntagged => "only manifests that no tag leads to name it",
            Reason::Orphaned => "what it is about is gone",
            Reason::BelowOrphaned => "only manifests about an image that is gone name it",
            Reason::Unnamed => "no manifest names it",
            Reason::UnnamedHere => "no manifest of its repository names it",
            Reason::Dangling => "its blob is not in the store",
            Reason::Past => "its manifest is not in the repository any more",
            Reason::Stale => "its push began long ago and was never finished",
            Reason::Crashed => "its writer never finished it",
            Reason::Empty => "nothing is in it",
        })
    }
}

impl Item {
    /// What sort; the order of taking.
    pub fn kind(&self) -> ItemKind {
        match self.what {
            What::Tag(..) => ItemKind::Tag,
            What::Revision(..) => ItemKind::Revision,
            What::LayerLink(..) => ItemKind::LayerLink,
            What::Blob(_) => ItemKind::Blob,
            What::TagHistory(..) => ItemKind::TagHistory,
            What::Upload(..) => ItemKind::Upload,
            What::Unfinished(_) => ItemKind::Unfinished,
            What::Directory(_) => ItemKind::Directory,
            What::Repository(_) => ItemKind::Repository,
        }
    }

    /// What moves, below the registry directory.
    pub fn path(&self, tables: &Tables) -> PathBuf {
        let repository = |id: NameId| PathBuf::from(&*tables.names.get(id));
        let digest = |id: DigestId| tables.digests.get(id);
        match &self.what {
            What::Tag(name, tag, _) => layout::tag_dir(&repository(*name), &tables.names.get(*tag)),
            What::Revision(name, id) => layout::revision_link(&repository(*name), &digest(*id)),
            What::LayerLink(name, id) => layout::layer_link(&repository(*name), &digest(*id)),
            What::Blob(id) => layout::blob_data(&digest(*id)),
            What::TagHistory(name, tag, id) => {
                layout::tag_history_link(&repository(*name), &tables.names.get(*tag), &digest(*id))
            }
            What::Upload(name, upload) => layout::upload_dir(&repository(*name), &tables.names.get(*upload)),
            What::Unfinished(path) | What::Directory(path) => PathBuf::clone(path),
            What::Repository(name) => layout::repository(&repository(*name)),
        }
    }

    /// The content it is or leads to.
    pub fn digest(&self) -> Option<DigestId> {
        match self.what {
            What::Tag(_, _, id) | What::TagHistory(_, _, id) => Some(id),
            What::Revision(_, id) | What::LayerLink(_, id) | What::Blob(id) => Some(id),
            What::Upload(..) | What::Unfinished(_) | What::Directory(_) | What::Repository(_) => None,
        }
    }

    /// Which blob it is, if it is one, with its bytes.
    pub fn blob(&self) -> Option<(DigestId, u64)> {
        match self.what {
            What::Blob(id) => Some((id, self.bytes)),
            _ => None,
        }
    }

    /// The repository it belongs to, where its kind tells.
    pub fn repository(&self) -> Option<NameId> {
        match self.what {
            What::Tag(name, ..) | What::TagHistory(name, ..) => Some(name),
            What::Revision(name, _) | What::LayerLink(name, _) => Some(name),
            What::Upload(name, _) | What::Repository(name) => Some(name),
            What::Blob(_) | What::Unfinished(_) | What::Directory(_) => None,
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
    /// The newest sign of use that file times show, where they call it young.
    pub last_used: Option<SystemTime>,
    /// From when on it may be taken.
    pub eligible: Next,
    /// Whether it would be taken now if no registry could remember it.
    pub is_held_back: bool,
}

/// A manifest that no tag leads to and that is too young to be taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct YoungManifest {
    /// Its repository.
    pub repository: NameId,
    /// Which.
    pub digest: DigestId,
    /// From when on it may be taken; `None` where a younger one holds it, or its age can't be told.
    pub eligible_at: Option<SystemTime>,
}

/// Everything a collection decided.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// What to take, in the order of taking.
    pub items: Vec<Item>,
    /// What is garbage but too young.
    pub young: Vec<Young>,
    /// Untagged manifests that are too young, where those are to be taken; the first look finds them.
    pub young_manifests: Vec<YoungManifest>,
    /// What looks like garbage and is left, because its age could not be told.
    pub problems: Vec<Problem>,
    /// What is broken and can be made whole; known after a thorough search.
    pub repairs: Vec<Repair>,
    /// Whether every directory was looked into.
    pub is_thorough: bool,
    /// Whether directories that the sweep empties go at once.
    pub is_eager: bool,
}

impl Plan {
    /// Marks `catalog` and decides.
    pub fn new(store: &dyn Store, catalog: &Catalog, policy: &Policy) -> Result<Plan> {
        Plan::look(store, catalog, policy, None)
    }

    /// What a second look decides, as far as this one did, too. What took a search of every directory to find is looked
    /// at one by one.
    pub fn confirmed(&self, store: &dyn Store, catalog: &Catalog, policy: &Policy) -> Result<Plan> {
        let mut second = Plan::look(store, catalog, policy, Some(self))?;
        let first: BTreeSet<&What> = self.items.iter().map(|i| &i.what).collect();
        second.items.retain(|item| first.contains(&item.what));
        second.repairs.retain(|repair| self.repairs.contains(repair));
        second.young_manifests.clone_from(&self.young_manifests);
        Ok(second)
    }

    fn look(store: &dyn Store, catalog: &Catalog, policy: &Policy, first: Option<&Plan>) -> Result<Plan> {
        let going = Going::of(catalog, policy);
        let mark = mark::mark(catalog, &going.revisions);
        let (candidates, problems) = candidates(store, catalog, &mark)?;
        let mut plan = Plan { problems, ..decide(catalog, &going, &candidates, policy) };
        if first.is_none() {
            plan.young_manifests = going.young_manifests(catalog, policy);
        }
        let decided = leftovers::Decided::of(&candidates);
        // There may be millions of them.
        drop(candidates);
        plan.is_thorough = first.map_or_else(|| policy.is_thorough(catalog), |first| first.is_thorough);
        plan.is_eager = policy.is_eager();
        if plan.is_thorough {
            plan.repairs = repair::search(store, catalog, policy, &going, first.map(|p| &*p.repairs))?;
        }
        let facts = leftovers::Facts {
            store,
            catalog,
            policy,
            going: &going,
            mark: &mark,
            is_thorough: plan.is_thorough,
        };
        let found = leftovers::search(&facts, decided, &plan.items, first.map(|p| &*p.items))?;
        plan.items.extend(found);
        plan.items.sort_by_key(Item::kind);
        plan.items.shrink_to_fit();
        Ok(plan)
    }

    /// Bytes of what is to be taken.
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
    // The blob, the repository, the digest by which that knows it.
    let mut links: Vec<(DigestId, NameId, DigestId)> = Vec::new();
    for repository in catalog.repositories.values() {
        let name = catalog.tables.names.intern(repository.name.as_os_str());
        for layer in repository.layers.iter().copied().filter(|id| !mark.is_reachable(*id)) {
            let targets = catalog.aliases.get(&layer).map_or(std::slice::from_ref(&layer), Vec::as_slice);
            links.extend(targets.iter().map(|target| (*target, name, layer)));
        }
    }
    links.sort_unstable();
    let unreferenced: Vec<DigestId> =
        catalog.blobs.iter().copied().filter(|id| !mark.is_reachable(*id)).collect();
    // One part for each thread: what they find is long, and put together.
    let part = unreferenced.len().div_ceil(catalog.tables.threads.get()).max(1);
    let parts: Vec<(usize, &[DigestId])> = unreferenced.chunks(part).enumerate().collect();
    let looked = spread(catalog.tables.threads, &parts, Vec::new, |looked, (at, part)| {
        let room = if *at == 0 { unreferenced.len() } else { part.len() };
        looked.push((*at, look_at(store, catalog, part, &links, room)));
    });
    let mut looked: Vec<_> = looked.into_iter().flatten().collect();
    looked.sort_unstable_by_key(|(at, _)| *at);
    let (mut found, mut problems) = (Vec::new(), Vec::new());
    for (_, looked) in looked {
        let (mut more, odd) = looked?;
        if found.is_empty() {
            found = more
        } else {
            found.append(&mut more)
        }
        problems.extend(odd);
    }
    Ok((found, problems))
}

fn look_at(
    store: &dyn Store,
    catalog: &Catalog,
    unreferenced: &[DigestId],
    links: &[(DigestId, NameId, DigestId)],
    room: usize,
) -> Result<(Vec<Candidate>, Vec<Problem>)> {
    let (mut found, mut problems) = (Vec::with_capacity(room), Vec::new());
    let mut shard: Option<(PathBuf, Box<dyn Directory + '_>)> = None;
    for digest in unreferenced.iter().copied() {
        let path = layout::blob_data(&catalog.digest(digest));
        let from = links.partition_point(|(target, ..)| *target < digest);
        let own = links[from..].iter().take_while(|(target, ..)| *target == digest);
        let own = own.map(|(_, name, layer)| (*name, *layer));
        match candidate(store, catalog, digest, &path, own, &mut shard) {
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
///
/// Blobs come by the first byte of their digests: `shard` is the directory of the one before.
fn candidate<'a>(
    store: &'a dyn Store,
    catalog: &Catalog,
    digest: DigestId,
    path: &Path,
    links: impl Iterator<Item = (NameId, DigestId)>,
    shard: &mut Option<(PathBuf, Box<dyn Directory + 'a>)>,
) -> Result<Option<Candidate>> {
    let above = path.ancestors().nth(2).unwrap_or(Path::new(layout::BLOBS));
    let directory = match shard {
        Some((place, directory)) if place == above => directory,
        _ => &mut shard.insert((above.to_path_buf(), store.directory(above)?)).1,
    };
    let Some(stat) = directory.stat(path.strip_prefix(above).unwrap_or(path))? else { return Ok(None) };
    let mut last_used = stat.modified.max(stat.changed);
    let mut found = Vec::new();
    for (repository, layer) in links {
        let path = layout::layer_link(Path::new(&*catalog.name(repository)), &catalog.digest(layer));
        if let Some(stat) = store.stat(&path)? {
            last_used = last_used.max(stat.modified).max(stat.changed);
            found.push((repository, layer));
        }
    }
    Ok(Some(Candidate { digest, bytes: stat.size, last_used, links: found.into() }))
}

/// Decides. Pure.
pub fn decide(catalog: &Catalog, going: &Going, candidates: &[Candidate], policy: &Policy) -> Plan {
    let mut plan = Plan::default();
    let tags = going.orphans.tags.iter();
    let tag = |(name, tag, id): &(NameId, NameId, DigestId)| What::Tag(*name, *tag, *id);
    plan.items.extend(tags.map(|t| Item { what: tag(t), bytes: 0, reason: Reason::Orphaned }));
    let (mut below_untagged, mut below_orphaned) = (IdSet::default(), IdSet::default());
    for (name, revisions) in &going.revisions {
        let repository = catalog.tables.names.intern(name.as_os_str());
        for id in revisions.iter().copied() {
            let is_untagged = going.untagged.get(name).is_some_and(|ids| ids.contains(&id));
            let (reason, below) = match is_untagged {
                true => (Reason::Untagged, &mut below_untagged),
                false => (Reason::Orphaned, &mut below_orphaned),
            };
            plan.items.push(Item { what: What::Revision(repository, id), bytes: 0, reason });
            below.extend(&catalog.closure(id));
        }
    }
    let mut links: Vec<(NameId, DigestId, Reason)> = Vec::new();
    let mut blobs: Vec<(&Candidate, Reason)> = Vec::new();
    for candidate in candidates {
        let (digest, bytes) = (candidate.digest, candidate.bytes);
        let reason = match (below_untagged.contains(digest), below_orphaned.contains(digest)) {
            (true, _) => Reason::BelowUntagged,
            (false, true) => Reason::BelowOrphaned,
            (false, false) => Reason::Unnamed,
        };
        if policy.options.repositories.is_some() {
            let is_ours = |(name, _): &(NameId, DigestId)| policy.includes(Path::new(&*catalog.name(*name)));
            let is_owned = reason != Reason::Unnamed || !candidate.links.is_empty();
            if !is_owned || !candidate.links.iter().all(is_ours) {
                continue;
            }
        }
        if policy.is_young(candidate.last_used) {
            let eligible = policy.eligible(candidate.last_used);
            let last_used = Some(candidate.last_used);
            plan.young.push(Young { digest, bytes, last_used, eligible, is_held_back: false });
            continue;
        }
        links.extend(candidate.links.iter().map(|(repository, layer)| (*repository, *layer, reason)));
        blobs.push((candidate, reason));
    }
    links.sort_unstable();
    links.dedup_by_key(|(repository, layer, _)| (*repository, *layer));
    // There may be millions of them: no more room than they need.
    plan.items.reserve_exact(links.len() + blobs.len());
    let link =
        |(repository, layer, reason)| Item { what: What::LayerLink(repository, layer), bytes: 0, reason };
    plan.items.extend(links.into_iter().map(link));
    let item =
        |(of, reason): (&Candidate, Reason)| Item { what: What::Blob(of.digest), bytes: of.bytes, reason };
    plan.items.extend(blobs.into_iter().map(item));
    plan
}
