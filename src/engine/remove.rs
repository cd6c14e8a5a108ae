//! `unlink` and `rmdir` in the mount.
//!
//! What one process removes within a few seconds goes into one transaction, so that one undo brings back what one
//! `rm -r` took.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use super::forgetting::Forget;
use super::{Engine, locked};
use crate::catalog::intern::NameId;
use crate::catalog::update::rescan;
use crate::catalog::{Catalog, Repository};
use crate::digest::Digest;
use crate::edit::{self, Removal};
use crate::error::{Error, Result};
use crate::layout;
use crate::printable::Printable;
use crate::trash::{Author, Transaction};
use crate::view::node::Node;
use crate::view::tree::{REVISIONS, TAGS, UPLOADS, parse_reference};

/// What the log says of a removal.
const MOVED: &str = "moved to the trash";
/// How long a transaction stays open for the process that began it.
const STAYS_OPEN: Duration = Duration::from_secs(2);

/// A transaction that the next removal of the same process joins.
pub(super) struct Open {
    author: Author,
    transaction: Transaction,
    last_used: Instant,
}

/// What is to be removed from a repository.
enum Target {
    Tag(NameId),
    Manifest(Digest),
    /// The tag, as long as it points there.
    TagAt(NameId, Digest),
    Upload(NameId),
}

impl Engine {
    /// Removes the name of a file or a symlink.
    pub fn unlink(self: &Arc<Engine>, parent: Node, name: &OsStr, author: &Author) -> Result<()> {
        let refused = |e| self.refused(author, "rm", parent, name, e);
        self.check_writable().map_err(refused)?;
        let target = self.target(parent, name).map_err(refused)?;
        let (repository, target, path) = target.ok_or_else(|| refused(refusal(parent)))?;
        let remove = || {
            self.change(&repository, author, |changing, catalog, found| match target {
                Target::Upload(upload) => {
                    let upload = catalog.name(upload);
                    let mut begin = || self.transaction(changing, author, &path);
                    edit::take_upload(&*self.store, &repository, &upload, self.settings.grace, &mut begin)?;
                    Ok(rescan(&*self.store, catalog, &repository))
                }
                _ => {
                    let removal = removal(catalog, found, &target)?;
                    let transaction = self.transaction(changing, author, &path)?;
                    let after = edit::take(&*self.store, catalog, found, &removal, &transaction)?;
                    for id in &removal.revisions {
                        self.forget(Forget::Manifest(repository.clone(), catalog.digest(*id)));
                    }
                    Ok(after)
                }
            })
        };
        // The open transaction holds an earlier thing of the same name; the failure closed it, so this begins another.
        let result = match remove() {
            Err(Error::Exists { .. }) => remove(),
            result => result,
        };
        self.note_result(author, "rm", &path, result.map(|()| MOVED.to_string()))
    }

    /// Removes an empty directory; of a repository, what is left of it.
    pub fn rmdir(&self, parent: Node, name: &OsStr, author: &Author) -> Result<()> {
        let refused = |e| self.refused(author, "rmdir", parent, name, e);
        self.check_writable().map_err(refused)?;
        let snapshot = self.snapshot();
        let view = self.view(&snapshot);
        let Some(node) = view.lookup(parent, name)? else {
            return Err(Error::NotFound { what: name.printable().to_string() });
        };
        match node {
            // These stand in every repository and are empty or not; they go with it.
            Node::Tags(id) | Node::Revisions(id) | Node::RevisionsOf(_, id) | Node::Uploads(id) => {
                let repository = snapshot.path(id).and_then(|name| snapshot.repository(&name).cloned());
                let is_empty = repository.is_none_or(|r| match node {
                    Node::Tags(_) => r.tags.is_empty(),
                    Node::Uploads(_) => r.uploads.is_empty(),
                    _ => r.revisions.is_empty(),
                });
                match is_empty {
                    true => Ok(()),
                    false => Err(refused(Error::NotEmpty { what: name.printable().to_string() })),
                }
            }
            Node::Namespace(path) => {
                // Never "" in its stead: that would mean the directory of all repositories.
                let missing = || Error::NotFound { what: name.printable().to_string() };
                let path = snapshot.path(path).ok_or_else(missing)?;
                let shown = format!("images/{}", path.printable());
                let mut changing = locked(&self.changing);
                let _lock = self.lock_for_change(author).map_err(refused)?;
                let current = self.current();
                let mut begin = || self.transaction(&mut changing, author, &shown);
                let result = edit::take_repository(&*self.store, &current.catalog, &path, &mut begin);
                let result = result.map(|catalog| {
                    self.publish(catalog, self.transactions(), &[]);
                    MOVED.to_string()
                });
                self.note_result(author, "rmdir", &shown, result)
            }
            _ => Err(refused(refusal(parent))),
        }
    }

    /// What `name` in `parent` means to a removal, and how people write it; `None` where nothing can be removed.
    fn target(&self, parent: Node, name: &OsStr) -> Result<Option<(PathBuf, Target, String)>> {
        let snapshot = self.snapshot();
        let view = self.view(&snapshot);
        let missing = || Error::NotFound { what: name.printable().to_string() };
        let named = |id: NameId| snapshot.path(id).ok_or_else(missing);
        let found = || view.lookup(parent, name)?.ok_or_else(missing);
        Ok(match parent {
            Node::Tags(repository) => {
                let Node::Tag(tag, _) = found()? else { return Ok(None) };
                let repository = named(repository)?;
                let path = format!("images/{}/{TAGS}/{}", repository.printable(), name.printable());
                Some((repository, Target::Tag(tag), path))
            }
            Node::RevisionsOf(algorithm, repository) => {
                let Node::Blob(id) = found()? else { return Ok(None) };
                let repository = named(repository)?;
                let path = format!(
                    "images/{}/{REVISIONS}/{}/{}",
                    repository.printable(),
                    algorithm.name(),
                    name.printable()
                );
                Some((repository, Target::Manifest(snapshot.catalog.digest(id)), path))
            }
            Node::Uploads(repository) => {
                let Node::Upload(upload, _) = found()? else { return Ok(None) };
                let repository = named(repository)?;
                let path = format!("images/{}/{UPLOADS}/{}", repository.printable(), name.printable());
                Some((repository, Target::Upload(upload), path))
            }
            Node::Images | Node::Namespace(_) => {
                let Some(reference) = parse_reference(name) else { return Ok(None) };
                found()?;
                let repository = view.namespace(parent).unwrap_or_default().join(reference.repository);
                let tag = reference.tag.map(|tag| snapshot.catalog.tables.names.intern(OsStr::new(tag)));
                let target = match (tag, reference.digest) {
                    (Some(tag), Some(digest)) => Target::TagAt(tag, digest),
                    (Some(tag), None) => Target::Tag(tag),
                    (None, Some(digest)) => Target::Manifest(digest),
                    (None, None) => return Ok(None),
                };
                let path = format!("images/{}", repository.with_file_name(name).printable());
                Some((repository, target, path))
            }
            _ => None,
        })
    }

    /// Makes a change to one repository as it is now, and publishes what it left.
    fn change(
        &self,
        repository: &Path,
        author: &Author,
        act: impl FnOnce(&mut MutexGuard<'_, Option<Open>>, &Catalog, &Repository) -> Result<Catalog>,
    ) -> Result<()> {
        let mut changing = locked(&self.changing);
        let _lock = self.lock_for_change(author)?;
        let catalog = rescan(&*self.store, &self.current().catalog, repository);
        let found = catalog.repository(repository).cloned();
        let found = found.ok_or_else(|| Error::NotFound { what: repository.printable().to_string() })?;
        let result = act(&mut changing, &catalog, &found);
        if result.is_err() {
            // Whatever is in it, the next try gets one of its own.
            *changing = None;
        }
        // Also after a failure: the rescan may have found what has changed meanwhile.
        let (catalog, result) = match result {
            Ok(catalog) => (catalog, Ok(())),
            Err(e) => (rescan(&*self.store, &catalog, repository), Err(e)),
        };
        self.publish(catalog, self.transactions(), &[]);
        result
    }

    /// The transaction that a removal goes to: the open one of the same process, or a new one.
    fn transaction(
        &self,
        changing: &mut MutexGuard<'_, Option<Open>>,
        author: &Author,
        path: &str,
    ) -> Result<Transaction> {
        if let Some(open) =
            changing.as_mut().filter(|o| o.author == *author && o.last_used.elapsed() < STAYS_OPEN)
        {
            // Another regfs may have purged it, or a sweep begun to wait for it.
            let file = |name: &str| layout::transaction(open.transaction.id()).join(name);
            if self.store.stat(&file(layout::TRANSACTION_FILE))?.is_some()
                && self.store.stat(&file(layout::STAGE_FILE))?.is_none()
            {
                open.last_used = Instant::now();
                return Ok(open.transaction.clone());
            }
        }
        let transaction = Transaction::begin(
            &*self.store,
            "rm",
            author,
            &format!("removed through the mount, first {path}"),
        )?;
        let open =
            Open { author: author.clone(), transaction: transaction.clone(), last_used: Instant::now() };
        **changing = Some(open);
        Ok(transaction)
    }
}

fn removal(catalog: &Catalog, repository: &Repository, target: &Target) -> Result<Removal> {
    let gone = |what: String| Error::NotFound { what: format!("{what} in {}", repository.name.printable()) };
    let tag = |id: &NameId| {
        repository.tag(*id).ok_or_else(|| gone(format!("tag {}", catalog.name(*id).printable())))
    };
    match target {
        Target::Tag(id) => Ok(edit::removal_of_tag(catalog, repository, tag(id)?)),
        Target::TagAt(id, digest) => {
            let tag = tag(id)?;
            match tag.target.map(|target| catalog.digest(target)) == Some(*digest) {
                true => Ok(edit::removal_of_tag(catalog, repository, tag)),
                false => Err(Error::Changed { what: format!("tag {}", catalog.name(*id).printable()) }),
            }
        }
        Target::Manifest(digest) => {
            let id = catalog.tables.digests.find(digest).filter(|id| repository.revision(*id).is_some());
            let id = id.ok_or_else(|| gone(format!("manifest {digest}")))?;
            edit::removal_of_manifest(catalog, repository, id)
        }
        Target::Upload(id) => Err(gone(format!("tag {}", catalog.name(*id).printable()))),
    }
}

/// Why nothing can be removed from `parent`: where deleting means nothing, the tools say "not permitted".
fn refusal(parent: Node) -> Error {
    match parent {
        Node::Root | Node::BlobShard(..) | Node::UnreachableOf(_) | Node::Control => {
            Error::NotPermitted { why: "only what stands below images/ can be removed; a sweep takes blobs" }
        }
        _ => Error::ReadOnly,
    }
}
