//! Repair: makes whole what is broken, where its place tells what belongs there.
//!
//! | broken | becomes |
//! |---|---|
//! | a link of a manifest or a layer that holds no digest | the digest in its path, if that blob is in the store |
//! | a tag whose link holds no digest | the one manifest in its history, if it is the only one and still there |
//! | a manifest whose repository has no link to one of its blobs | that link, if the blob is in the store |
//! | a repository with manifests and without `_layers`: 2.8.2's own collector then takes all its blobs | the directory |
//!
//! Anything else is reported as a problem and left to people.
//!
//! # Rules kept here
//! 1. Only what is older than the grace period: registries before 3.1 rewrite links in place, and an empty one may be in
//!    the middle of that.
//! 2. A broken link moves to the trash while the new one takes its place, in one step: never is there none, for then a
//!    manifest would look deleted.
//! 3. A repair only makes more reachable, so the plan is made from what was there before it.
//! 4. Nothing is written that the registry did not write: 71 bytes, owner and mode of the directory.
//!
//! # Cost
//! A `read` for each layer link that a manifest needs, a `stat` for each blob whose link is missing.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::leftovers::{digests_below, roots, unless_misplaced};
use super::mark::Reach;
use super::plan::{Going, Policy};
use crate::catalog::intern::{DigestId, IdSet};
use crate::catalog::{Catalog, Repository};
use crate::digest::{Algorithm, Digest};
use crate::error::Result;
use crate::layout;
use crate::manifest::Kind;
use crate::store::Store;
use crate::trash::Transaction;

/// One thing that can be made whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Repair {
    /// Where.
    pub path: PathBuf,
    /// How.
    pub fix: Fix,
}

/// How something is made whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fix {
    /// A link that holds no digest shall hold this one.
    Rewrite(Digest),
    /// A link that is missing shall be there.
    Link(Digest),
    /// A directory that is missing shall be there.
    Directory,
}

impl std::fmt::Display for Fix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Fix::Rewrite(digest) => write!(f, "holds no digest, and must hold {digest}"),
            Fix::Link(digest) => write!(f, "is missing, and a manifest names {digest}"),
            Fix::Directory => f.write_str("is missing, and there are manifests beside it"),
        }
    }
}

impl Repair {
    /// Whether something broken moves to the trash for it.
    pub(super) fn replaces(&self) -> bool {
        matches!(self.fix, Fix::Rewrite(_))
    }
}

/// Finds what can be made whole, in the repositories that `policy` includes.
///
/// A second look gives what the `first` one found: there are too many layer links to read them twice, and making one
/// looks at it again.
pub(super) fn search(
    store: &dyn Store,
    catalog: &Catalog,
    policy: &Policy,
    going: &Going,
    first: Option<&[Repair]>,
) -> Result<Vec<Repair>> {
    let mut search = Search { store, catalog, policy, named: Reach::new(catalog), repairs: Vec::new() };
    for repository in catalog.repositories.values().filter(|r| r.is_valid && policy.includes(&r.name)) {
        let going = going.revisions_of(&repository.name);
        search.revisions(repository, going)?;
        search.tags(repository)?;
        match first {
            None => search.layer_links(repository, going)?,
            Some(first) => {
                let (root, all) = (layout::layers(&repository.name), !repository.revisions.is_empty());
                let known = first.iter().filter(|repair| all && repair.path.starts_with(&root));
                search.repairs.extend(known.cloned());
            }
        }
    }
    Ok(search.repairs)
}

struct Search<'a> {
    store: &'a dyn Store,
    catalog: &'a Catalog,
    policy: &'a Policy,
    /// What the repository that is looked at leads to.
    named: Reach,
    repairs: Vec<Repair>,
}

impl Search<'_> {
    /// Whether a link is there, holds no digest, and has done so for long.
    fn is_broken(&self, link: &Path) -> Result<bool> {
        let Some((content, stat)) = unless_misplaced(self.store.read(link, layout::LINK_LIMIT))? else {
            return Ok(false);
        };
        let is_old = !self.policy.is_young(stat.modified.max(stat.changed));
        Ok(layout::parse_link(&content).is_err() && is_old)
    }

    fn has_bytes(&self, digest: &Digest) -> Result<bool> {
        // Links by other algorithms hold the SHA-256 digest, which their path does not tell.
        let is_stored = digest.algorithm() == Algorithm::Sha256;
        Ok(is_stored && unless_misplaced(self.store.stat(&layout::blob_data(digest)))?.is_some())
    }

    fn rewrite(&mut self, link: PathBuf, digest: Digest) -> Result<()> {
        if self.is_broken(&link)? && self.has_bytes(&digest)? {
            self.repairs.push(Repair { path: link, fix: Fix::Rewrite(digest) });
        }
        Ok(())
    }

    fn revisions(&mut self, repository: &Repository, going: &[DigestId]) -> Result<()> {
        let broken = |r: &&crate::catalog::Revision| !r.is_readable && !going.contains(&r.digest);
        for revision in repository.revisions.iter().filter(broken) {
            let digest = self.catalog.digest(revision.digest);
            self.rewrite(layout::revision_link(&repository.name, &digest), digest)?;
        }
        Ok(())
    }

    fn tags(&mut self, repository: &Repository) -> Result<()> {
        for tag in repository.tags.iter().filter(|t| t.target.is_none()) {
            let name = self.catalog.name(tag.name);
            let history = digests_below(self.store, &layout::tag_history(&repository.name, &name))?;
            let [(digest, _)] = history.as_slice() else { continue };
            let id = self.catalog.tables.digests.find(digest);
            if id.is_some_and(|id| repository.revision(id).is_some()) {
                self.rewrite(layout::tag_link(&repository.name, &name), *digest)?;
            }
        }
        Ok(())
    }

    fn layer_links(&mut self, repository: &Repository, going: &[DigestId]) -> Result<()> {
        if repository.revisions.is_empty() {
            return Ok(());
        }
        let root = layout::layers(&repository.name);
        // Something else in its place is a problem of its own.
        let is_absent = match self.store.list(&root) {
            Ok(entries) => entries.is_none(),
            Err(e) if e.is_damage() => return Ok(()),
            Err(e) => return Err(e),
        };
        self.named.walk(self.catalog, roots(repository, going));
        let mut links = self.store.directory(&root)?;
        // Links that are there, whatever they hold.
        let mut present = IdSet::default();
        for layer in repository.layers.iter().copied() {
            if !self.named.contains(layer) {
                continue;
            }
            let digest = self.catalog.digest(layer);
            let link = layout::layer_link(&repository.name, &digest);
            let name = link.strip_prefix(&root).unwrap_or(&link);
            let is_whole = match links.read(name, layout::LINK_LIMIT, false) {
                Ok(None) => continue,
                Ok(Some((content, _))) => layout::parse_link(content).is_ok(),
                Err(e) if e.is_damage() => true,
                Err(e) => return Err(e),
            };
            present.insert(layer);
            if !is_whole {
                self.rewrite(link, digest)?;
            }
        }
        let mut asked: HashSet<DigestId> = HashSet::new();
        let mut is_written = false;
        for revision in repository.revisions.iter().filter(|r| !going.contains(&r.digest)) {
            let Some(manifest) = self.catalog.parsed(revision.target) else { continue };
            if manifest.kind == Kind::Index
                || revision.version.last_change().is_none_or(|time| self.policy.is_young(time))
            {
                continue;
            }
            let blobs: Vec<DigestId> = manifest.descriptors().iter().map(|d| d.digest).collect();
            for id in blobs.into_iter().filter(|id| asked.insert(*id)) {
                if !present.contains(id) {
                    is_written |= self.missing_link(repository, id)?;
                }
            }
        }
        if is_absent
            && !is_written
            && self.store.directory_changed(&layout::repository(&repository.name))?.is_some()
        {
            self.repairs.push(Repair { path: root, fix: Fix::Directory });
        }
        Ok(())
    }

    /// Notes that the link to `id` is missing, if it is and the blob is there.
    fn missing_link(&mut self, repository: &Repository, id: DigestId) -> Result<bool> {
        let digest = self.catalog.digest(id);
        let link = layout::layer_link(&repository.name, &digest);
        let has_directory = repository.layers.binary_search(&id).is_ok();
        // What stands in its place, whatever it is, is not replaced.
        let is_there = has_directory
            && match self.store.stat(&link) {
                Ok(stat) => stat.is_some(),
                Err(e) if e.is_damage() => true,
                Err(e) => return Err(e),
            };
        if is_there || !self.catalog.has_blob(id) || !self.has_bytes(&digest)? {
            return Ok(false);
        }
        self.repairs.push(Repair { path: link, fix: Fix::Link(digest) });
        Ok(true)
    }
}

/// Makes one thing whole; what was broken moves to `transaction`. `false`: it is not broken any more.
pub(super) fn execute(store: &dyn Store, transaction: Option<&Transaction>, repair: &Repair) -> Result<bool> {
    let path = &repair.path;
    match &repair.fix {
        Fix::Directory => store.make_directory(path).map(|()| true),
        Fix::Link(digest) => match store.create(path, digest.to_string().as_bytes()) {
            Ok(()) => Ok(true),
            Err(crate::error::Error::Exists { .. }) => Ok(false),
            Err(e) => Err(e),
        },
        Fix::Rewrite(digest) => {
            let Some(transaction) = transaction else { return Ok(false) };
            let Some((content, _)) = store.read(path, layout::LINK_LIMIT)? else { return Ok(false) };
            if layout::parse_link(&content).is_ok() {
                return Ok(false);
            }
            let saved = transaction.path_of(path);
            store.replace(path, digest.to_string().as_bytes(), &saved)?;
            give_way(store, transaction, path, digest, &saved)
        }
    }
}

/// A registry may have written the link in the moment before ours took its place: then what it wrote counts.
fn give_way(
    store: &dyn Store,
    transaction: &Transaction,
    path: &Path,
    ours: &Digest,
    saved: &Path,
) -> Result<bool> {
    let Some((content, _)) = store.read(saved, layout::LINK_LIMIT)? else { return Ok(true) };
    match layout::parse_link(&content) {
        Ok(theirs) if theirs != *ours => {
            let again = transaction.path_of(&path.with_extension("regfs"));
            store.replace(path, &content, &again)?;
            Ok(false)
        }
        _ => Ok(true),
    }
}
