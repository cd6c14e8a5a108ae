//! What `rm` means: which tags and manifests go, decided from a catalog; and taking them. Tags that are made or moved
//! are the business of [`tag`].
//!
//! # Rules kept here
//! 1. A tag takes its manifest along when nothing else in the repository holds that: no other tag, no index that
//!    stays, no live subject. With a manifest go those of its children and referrers that nothing else holds, and
//!    the tags that are about it by name (`sha256-<hex>`, cosign's `.sig`, `.att`, `.sbom`).
//! 2. A manifest takes every tag that points at it along, and nothing else, as the registry's own DELETE does.
//!    While an index of the repository holds it, it stays.
//! 3. Taking goes tag → revision. What turns out to have changed meanwhile is put back as it was.

pub mod relocate;
pub mod tag;

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::advice::Advice;
use crate::catalog::intern::{DigestId, NameId};
use crate::catalog::update::rescan;
use crate::catalog::{Catalog, Effect, Keeps, Parsed, Repository, Tag};
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::layout;
use crate::printable::Printable;
use crate::store::{self, Store, read_link};
use crate::trash::Transaction;

/// What goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removal {
    /// Tags, by name.
    pub tags: BTreeSet<NameId>,
    /// Revisions.
    pub revisions: BTreeSet<DigestId>,
}

/// What goes with a tag. Pure.
pub fn removal_of_tag(catalog: &Catalog, repository: &Repository, tag: &Tag) -> Removal {
    let mut removal = Removal { tags: [tag.name].into(), ..Removal::default() };
    let target = tag.target.and_then(|target| repository.revision(target));
    // Where something could not be read, what holds the manifest is unknown: only the tag goes.
    if let (Some(target), Keeps::Named) = (target, repository.keeps) {
        let edges = Edges::new(catalog, repository);
        let below = edges.below(target.digest);
        let removed = edges.not_held_elsewhere(&below, tag.name);
        for id in &removed {
            removal.tags.extend(edges.tags_about(*id).map(|t| t.name));
        }
        removal.revisions = removed;
    }
    removal
}

/// What goes with a manifest. Pure.
///
/// # Errors
/// [`Error::Busy`] while an index of the repository holds it, [`Error::Unjudged`] when a call failed, so that what
/// holds it is unknown.
pub fn removal_of_manifest(catalog: &Catalog, repository: &Repository, digest: DigestId) -> Result<Removal> {
    let names_it =
        |m: &Parsed| m.children().iter().any(|d| d.digest == digest) || m.others().contains(&digest);
    let holder = repository
        .revisions
        .iter()
        .find(|r| r.digest != digest && catalog.parsed(r.target).is_some_and(names_it));
    if let Some(holder) = holder {
        let why = format!(
            "{} is part of {}, which {} holds; remove that first",
            catalog.digest(digest),
            catalog.digest(holder.digest),
            repository.name.printable(),
        );
        return Err(Error::Busy { why });
    }
    let problems: Vec<String> = catalog.obstacles_in(&repository.name).map(|p| p.what.clone()).collect();
    if !problems.is_empty() {
        return Err(Error::Unjudged { problems });
    }
    let tags = repository.tags.iter().filter(|t| t.target == Some(digest)).map(|t| t.name);
    Ok(Removal { tags: tags.collect(), revisions: [digest].into() })
}

/// Who leads to whom within one repository.
struct Edges<'a> {
    catalog: &'a Catalog,
    repository: &'a Repository,
    referrers: HashMap<DigestId, Vec<DigestId>>,
    tags_about: HashMap<DigestId, Vec<&'a Tag>>,
}

impl<'a> Edges<'a> {
    fn new(catalog: &'a Catalog, repository: &'a Repository) -> Edges<'a> {
        let mut referrers: HashMap<DigestId, Vec<DigestId>> = HashMap::new();
        for revision in &repository.revisions {
            if let Some(subject) = catalog.parsed(revision.target).and_then(|m| m.subject()) {
                referrers.entry(subject).or_default().push(revision.digest);
            }
        }
        let mut tags_about: HashMap<DigestId, Vec<&Tag>> = HashMap::new();
        for tag in &repository.tags {
            let subject = catalog.name(tag.name).to_str().and_then(layout::subject_of_tag);
            let subject = subject.and_then(|digest| catalog.tables.digests.find(&digest));
            // One that points at its own subject is a tag like any other.
            if let Some(subject) = subject.filter(|subject| tag.target != Some(*subject)) {
                tags_about.entry(subject).or_default().push(tag);
            }
        }
        Edges { catalog, repository, referrers, tags_about }
    }

    fn tags_about(&self, id: DigestId) -> impl Iterator<Item = &'a Tag> {
        self.tags_about.get(&id).into_iter().flatten().copied()
    }

    fn parsed(&self, id: DigestId) -> Option<&'a Parsed> {
        self.repository.revision(id).and_then(|r| self.catalog.parsed(r.target))
    }

    /// Revisions that go where `id` goes: its children, its referrers, what tags about it point at.
    fn followers(&self, id: DigestId) -> Vec<DigestId> {
        let children = self.parsed(id).map(Parsed::references).unwrap_or_default();
        let referrers = self.referrers.get(&id).into_iter().flatten().copied();
        let about = self.tags_about(id).filter_map(|t| t.target);
        let all = children.into_iter().chain(referrers).chain(about);
        all.filter(|id| self.repository.revision(*id).is_some()).collect()
    }

    /// `id` and all that follows it.
    fn below(&self, id: DigestId) -> BTreeSet<DigestId> {
        self.reach([id].into())
    }

    fn reach(&self, from: BTreeSet<DigestId>) -> BTreeSet<DigestId> {
        let mut reached = from.clone();
        let mut waiting: Vec<DigestId> = from.into_iter().collect();
        while let Some(id) = waiting.pop() {
            waiting.extend(self.followers(id).into_iter().filter(|next| reached.insert(*next)));
        }
        reached
    }

    /// The part of `set` that nothing outside of it holds once the tag `leaving` is gone.
    fn not_held_elsewhere(&self, set: &BTreeSet<DigestId>, leaving: NameId) -> BTreeSet<DigestId> {
        let mut held: BTreeSet<DigestId> = BTreeSet::new();
        let about: BTreeSet<NameId> =
            set.iter().flat_map(|id| self.tags_about(*id)).map(|t| t.name).collect();
        for tag in &self.repository.tags {
            if tag.name != leaving && !about.contains(&tag.name) {
                held.extend(tag.target);
            }
        }
        for revision in self.repository.revisions.iter().filter(|r| !set.contains(&r.digest)) {
            if let Some(parsed) = self.catalog.parsed(revision.target) {
                let named =
                    parsed.descriptors().iter().map(|d| d.digest).chain(parsed.others().iter().copied());
                held.extend(named.filter(|id| set.contains(id)));
            }
        }
        for id in set {
            let subject = self.parsed(*id).and_then(|m| m.subject());
            let is_live = |s: &DigestId| !set.contains(s) && self.repository.revision(*s).is_some();
            if subject.is_some_and(|s| is_live(&s)) {
                held.insert(*id);
            }
        }
        let held = self.reach(held.intersection(set).copied().collect());
        set.difference(&held).copied().collect()
    }
}

/// Takes what `removal` says out of `repository`, into `transaction`; returns the catalog afterwards.
///
/// # Errors
/// [`Error::Changed`] when a push came in between; everything is back in its place then.
pub fn take(
    store: &dyn Store,
    catalog: &Catalog,
    repository: &Repository,
    removal: &Removal,
    transaction: &Transaction,
) -> Result<Catalog> {
    let mut taken: Vec<PathBuf> = Vec::new();
    let result = take_in_order(store, catalog, repository, removal, transaction, &mut taken);
    if result.is_err() {
        for path in taken.iter().rev() {
            match transaction.put_back(store, path) {
                Ok(_) => {}
                // What a push wrote meanwhile is newer; ours stays in the trash.
                Err(Error::Exists { .. }) => log::info!("{} was written again meanwhile", path.printable()),
                Err(e) => log::error!(
                    "could not put back {}: {e}; run {}",
                    path.printable(),
                    Advice::Undo(transaction.id().to_string())
                ),
            }
        }
        transaction.discard_if_empty(store)?;
    }
    result
}

fn take_in_order(
    store: &dyn Store,
    catalog: &Catalog,
    repository: &Repository,
    removal: &Removal,
    transaction: &Transaction,
    taken: &mut Vec<PathBuf>,
) -> Result<Catalog> {
    let name = &repository.name;
    for tag in removal.tags.iter().filter_map(|name| repository.tag(*name)) {
        let tag_name = catalog.name(tag.name);
        let path = layout::tag_dir(name, &tag_name);
        if !take_noted(store, transaction, path, taken)? {
            continue;
        }
        let moved = transaction.path_of(&layout::tag_link(name, &tag_name));
        // A broken tag is removed like any other.
        let points_at = read_link(store, &moved)?;
        if points_at != tag.target.map(|id| catalog.digest(id)) {
            return Err(Error::Changed {
                what: format!("tag {} of {}", tag_name.printable(), name.printable()),
            });
        }
    }
    for id in &removal.revisions {
        take_noted(store, transaction, layout::revision_link(name, &catalog.digest(*id)), taken)?;
    }
    let after = rescan(store, catalog, name);
    let fresh = after.obstacles_in(name).filter(|p| !catalog.problems.contains(p));
    let problems: Vec<String> = fresh.map(|p| p.what.clone()).collect();
    if !problems.is_empty() {
        return Err(Error::Unjudged { problems });
    }
    if let Some(now) = after.repository(name) {
        let tagged = now.tags.iter().filter_map(|t| t.target);
        let named = now
            .revisions
            .iter()
            .filter_map(|r| after.parsed(r.target))
            .flat_map(|m| m.children().iter().map(|d| d.digest));
        let fresh =
            |id: &DigestId| removal.revisions.contains(id) && !was_named(catalog, repository, removal, *id);
        if tagged.chain(named).any(|id| fresh(&id)) {
            return Err(Error::Changed { what: format!("repository {}", name.printable()) });
        }
    }
    store.sync()?;
    Ok(after)
}

/// Takes `path` and notes it in `taken`, also when the call fails: then it may have moved all the same.
fn take_noted(
    store: &dyn Store,
    transaction: &Transaction,
    path: PathBuf,
    taken: &mut Vec<PathBuf>,
) -> Result<bool> {
    taken.push(path.clone());
    let was_there = transaction.take(store, &path)?;
    if !was_there {
        taken.pop();
    }
    Ok(was_there)
}

/// Whether something that stays named `id` already before the removal; then the removal was decided knowing it.
fn was_named(catalog: &Catalog, repository: &Repository, removal: &Removal, id: DigestId) -> bool {
    let by_tag = repository.tags.iter().any(|t| !removal.tags.contains(&t.name) && t.target == Some(id));
    by_tag
        || repository.revisions.iter().any(|r| {
            let names_it = |m: &Parsed| m.children().iter().any(|d| d.digest == id);
            !removal.revisions.contains(&r.digest) && catalog.parsed(r.target).is_some_and(names_it)
        })
}

/// When an upload began: by its `startedat`, else by the newest time in it.
pub fn upload_started(store: &dyn Store, repository: &Path, upload: &OsStr) -> Result<Option<SystemTime>> {
    let started_at = store.read(&layout::upload_started_at(repository, upload), layout::LINK_LIMIT)?;
    let text = started_at.and_then(|(text, _)| String::from_utf8(text).ok());
    if let Some(time) = text.and_then(|text| humantime::parse_rfc3339(text.trim()).ok()) {
        return Ok(Some(time));
    }
    let mut files = Vec::new();
    store::walk(store, &layout::upload_dir(repository, upload), &mut |path, kind| {
        if kind == store::Kind::File {
            files.push(path);
        }
    })?;
    let mut newest = None;
    for file in files {
        newest = newest.max(store.stat(&file)?.map(|s| s.modified.max(s.changed)));
    }
    Ok(newest)
}

/// Takes an upload; one that began less than `grace` ago is a push in progress.
pub fn take_upload(
    store: &dyn Store,
    repository: &Path,
    upload: &OsStr,
    grace: Duration,
    begin: &mut dyn FnMut() -> Result<Transaction>,
) -> Result<()> {
    refuse_young_upload(store, repository, upload, grace)?;
    begin()?.take(store, &layout::upload_dir(repository, upload))?;
    store.sync()
}

/// Fails for an upload that began less than `grace` ago.
fn refuse_young_upload(store: &dyn Store, repository: &Path, upload: &OsStr, grace: Duration) -> Result<()> {
    let started = upload_started(store, repository, upload)?;
    let now = Clock::open(store)?.now(store);
    let is_young = |s: SystemTime| s.checked_add(grace).is_none_or(|end| !now.until(end).is_zero());
    if grace.is_zero() || !started.is_some_and(is_young) {
        return Ok(());
    }
    let why = format!(
        "upload {} of {} may still be in progress: it began less than {} ago",
        upload.printable(),
        repository.printable(),
        humantime::format_duration(grace)
    );
    Err(Error::Busy { why })
}

/// Takes what is left of a repository without images: `_manifests`, `_uploads`, `_layers`, in this order.
///
/// # Errors
/// [`Error::NotEmpty`] while there are tags, manifests, uploads or repositories below it.
pub fn take_repository(
    store: &dyn Store,
    catalog: &Catalog,
    name: &Path,
    begin: &mut dyn FnMut() -> Result<Transaction>,
) -> Result<Catalog> {
    let fresh = rescan(store, catalog, name);
    let place = layout::repository(name);
    if let Some(problem) = fresh.problems.iter().find(|p| p.path == place && p.effect == Effect::StopsSweep) {
        return Err(Error::Unjudged { problems: vec![problem.what.clone()] });
    }
    let below = fresh.repositories.keys().any(|other| other != name && other.starts_with(name));
    let is_empty = |r: &Repository| {
        r.tags.is_empty() && r.revisions.is_empty() && r.uploads.is_empty() && r.keeps == Keeps::Named
    };
    if below || !fresh.repository(name).is_none_or(|r| is_empty(r)) {
        return Err(Error::NotEmpty { what: name.printable().to_string() });
    }
    let mut files = Vec::new();
    for part in [layout::MANIFESTS, layout::UPLOADS, layout::LAYERS] {
        store::walk(store, &layout::repository(name).join(part), &mut |path, _| files.push(path))?;
    }
    if !files.is_empty() {
        let transaction = begin()?;
        for file in &files {
            transaction.take(store, file)?;
        }
        if !rescan(store, &fresh, name).repository(name).is_none_or(|r| is_empty(r)) {
            for file in files.iter().rev() {
                match transaction.put_back(store, file) {
                    Ok(_) | Err(Error::Exists { .. }) => {}
                    Err(e) => return Err(e),
                }
            }
            transaction.discard_if_empty(store)?;
            return Err(Error::Changed { what: format!("repository {}", name.printable()) });
        }
    }
    store.prune(&layout::repository(name))?;
    store.sync()?;
    Ok(rescan(store, &fresh, name))
}
