//! `symlink`, `rename` and `mkdir` in the mount: tags that are made or moved, and a place for those of a new repository.
//!
//! A directory that `mkdir` makes is an empty one in the store, where registries and collectors pass it by: `rmdir`
//! removes it, and so does a sweep once it is older than the grace period. In every directory below `images` that may
//! become a repository, `_tags` can be walked into, although it is not listed before there is a tag in it.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use super::{Engine, locked};
use crate::catalog::Catalog;
use crate::catalog::update::rescan;
use crate::digest::Digest;
use crate::edit::tag;
use crate::error::{Error, Result};
use crate::layout;
use crate::printable::Printable;
use crate::trash::{Author, Transaction};
use crate::view::links::{Named, images_named};
use crate::view::node::Node;
use crate::view::tree::{TAGS, parse_reference};

/// Longest name of a repository in bytes (distribution `reference.RepositoryNameTotalLengthMax`).
const LONGEST_NAME: usize = 255;

/// Where a tag stands, or is to stand.
struct Place {
    repository: PathBuf,
    tag: OsString,
    /// As people write it.
    path: String,
    /// The directory in the mount that it stands in.
    directory: PathBuf,
}

impl Engine {
    /// Makes a tag: a symlink whose text ends in `sha256/<hex>`, or names another tag or an image.
    pub fn symlink(&self, parent: Node, name: &OsStr, text: &Path, author: &Author) -> Result<()> {
        let place = self.place(parent, name).map_err(|e| self.refused(author, "tag", parent, name, e))?;
        let named = images_named(text, &place.directory);
        let repositories = named.iter().map(|image| &image.repository).chain([&place.repository]);
        let result = place.check().and_then(|()| {
            self.edit_tags(&repositories.collect::<Vec<_>>(), author, |catalog| {
                let digest = match tag::named_by(text) {
                    Err(e) if named.is_empty() => return Err(e),
                    Err(_) => digest_of(catalog, &named)?,
                    Ok(digest) => digest,
                };
                tag::add(&*self.store, catalog, &place.repository, &place.tag, &digest)?;
                Ok(format!("leads to {digest}"))
            })
        });
        self.note_result(author, "tag", &place.path, result)
    }

    /// Moves a tag to another name, which it takes from another tag unless `may_replace` is false; or a directory with all
    /// repositories in it.
    pub fn rename(
        &self,
        from: (Node, &OsStr),
        to: (Node, &OsStr),
        may_replace: bool,
        author: &Author,
    ) -> Result<()> {
        let refused = |e| self.refused(author, "mv", from.0, from.1, e);
        if let Some(directory) = self.directory_at(from.0, from.1).map_err(refused)? {
            return self.move_directory(&directory, to, may_replace, author);
        }
        let from_place = self.place(from.0, from.1).map_err(refused)?;
        let to = self.place(to.0, to.1).map_err(refused)?;
        let from = from_place;
        let path = format!("{} → {}", from.path, to.path);
        let result = to.check().and_then(|()| {
            self.edit_tags(&[&from.repository, &to.repository], author, |catalog| {
                self.move_tag(catalog, &from, &to, may_replace, author, &path)
            })
        });
        self.note_result(author, "mv", &path, result)
    }

    fn move_tag(
        &self,
        catalog: &Catalog,
        from: &Place,
        to: &Place,
        may_replace: bool,
        author: &Author,
        path: &str,
    ) -> Result<String> {
        let found = catalog.repository(&from.repository);
        let found = found.and_then(|r| Some((&**r, tag::find(catalog, &from.repository, &from.tag)?)));
        let (repository, moved) = found.ok_or_else(|| Error::NotFound { what: from.path.clone() })?;
        if (&from.repository, &from.tag) == (&to.repository, &to.tag) {
            return Ok("it is there already".to_string());
        }
        if !may_replace && tag::find(catalog, &to.repository, &to.tag).is_some() {
            return Err(Error::Exists { path: self.store.full(&layout::tag_dir(&to.repository, &to.tag)) });
        }
        let mut id = String::new();
        let mut begin = || -> Result<Transaction> {
            let reason = format!("moved through the mount, {path}");
            let transaction = Transaction::begin(&*self.store, "mv", author, &reason)?;
            id = transaction.id().to_string();
            Ok(transaction)
        };
        tag::rename(&*self.store, catalog, (repository, moved), (&to.repository, &to.tag), &mut begin)?;
        Ok(format!("moved; what went is in the trash, in {id}"))
    }

    /// Makes a directory below `images`, for the tags of a repository that is to be.
    pub fn mkdir(&self, parent: Node, name: &OsStr, author: &Author) -> Result<()> {
        let refused = |e| self.refused(author, "mkdir", parent, name, e);
        self.check_writable().map_err(refused)?;
        let snapshot = self.snapshot();
        let view = self.view(&snapshot);
        let path = view.namespace(parent).ok_or_else(|| refused(Error::ReadOnly))?.join(name);
        if view.lookup(parent, name)?.is_some() {
            return Err(refused(Error::Exists { path }));
        }
        let shown = format!("images/{}", path.printable());
        let result = self.make_namespace(&path, author).map(|()| "made".to_string());
        self.note_result(author, "mkdir", &shown, result)
    }

    fn make_namespace(&self, path: &Path, author: &Author) -> Result<()> {
        check_name(path)?;
        let _changing = locked(&self.changing);
        let _lock = self.lock_for_change(author)?;
        let place = layout::repository(path);
        self.store.make_directory(&place)?;
        if self.store.list(&place)?.is_none() {
            return Err(Error::NotPermitted { why: "this storage has no directories" });
        }
        let mut catalog = rescan(&*self.store, &self.current().catalog, path);
        catalog.namespaces.insert(path.to_path_buf());
        self.publish(catalog, self.transactions(), &[]);
        Ok(())
    }

    /// What `name` in `parent` means as a tag, there or not: a name in `_tags`, or a reference like `alpine:3.8`.
    fn place(&self, parent: Node, name: &OsStr) -> Result<Place> {
        if self.settings.read_only {
            return Err(Error::ReadOnly);
        }
        let snapshot = self.snapshot();
        let missing = || Error::NotFound { what: name.printable().to_string() };
        let (repository, tag) = match parent {
            Node::Tags(repository) => (snapshot.path(repository).ok_or_else(missing)?, name),
            Node::Images | Node::Namespace(_) => {
                let reference =
                    parse_reference(name).filter(|r| r.digest.is_none() && !r.repository.is_empty());
                let (reference, tag) = reference.and_then(|r| Some((r, r.tag?))).ok_or(Error::ReadOnly)?;
                let above = self.view(&snapshot).namespace(parent).ok_or_else(missing)?;
                (above.join(reference.repository), OsStr::new(tag))
            }
            _ => return Err(Error::ReadOnly),
        };
        // A slip of the finger makes no repository; `mkdir` does.
        if snapshot.directory(&repository).is_none() {
            return Err(Error::NotFound { what: format!("images/{}", repository.printable()) });
        }
        let path = format!("images/{}/{TAGS}/{}", repository.printable(), tag.printable());
        let directory = match parent {
            Node::Tags(_) => Path::new("images").join(&repository).join(TAGS),
            _ => Path::new("images").join(repository.parent().unwrap_or(Path::new(""))),
        };
        Ok(Place { repository, tag: tag.to_os_string(), path, directory })
    }

    /// Makes a change to the tags of some repositories as they are now, and publishes what it left.
    fn edit_tags<T>(
        &self,
        repositories: &[&PathBuf],
        author: &Author,
        act: impl FnOnce(&Catalog) -> Result<T>,
    ) -> Result<T> {
        let _changing = locked(&self.changing);
        let _lock = self.lock_for_change(author)?;
        let look = |catalog: &Catalog| {
            repositories.iter().fold(catalog.clone(), |catalog, name| rescan(&*self.store, &catalog, name))
        };
        let catalog = look(&self.current().catalog);
        let result = act(&catalog);
        // Also after a failure: something may have been written.
        self.publish(look(&catalog), self.transactions(), &[]);
        result
    }
}

/// Whether a registry would take the name of a repository.
pub(super) fn check_name(path: &Path) -> Result<()> {
    if layout::is_name(path) && path.as_os_str().len() <= LONGEST_NAME {
        return Ok(());
    }
    let why = "lower-case letters and digits, between them single dots, one or two underscores, or hyphens";
    Err(Error::invalid(format!("{} is no name of a repository: {why}", path.printable())))
}

/// The manifest that the first of some images leads to that there is.
fn digest_of(catalog: &Catalog, named: &[Named]) -> Result<Digest> {
    for Named { repository, tag, digest } in named {
        let Some(repository) = catalog.repository(repository) else { continue };
        let tagged = match tag {
            Some(tag) => tag::find(catalog, &repository.name, tag).and_then(|tag| tag.target),
            None => digest.and_then(|digest| catalog.tables.digests.find(&digest)),
        };
        let found = tagged.filter(|id| repository.revision(*id).is_some()).map(|id| catalog.digest(id));
        if let Some(found) = found.filter(|found| digest.is_none_or(|digest| digest == *found)) {
            return Ok(found);
        }
    }
    let shown = |image: &Named| {
        let tag = image.tag.iter().map(|tag| format!(":{}", tag.printable()));
        let digest = image.digest.iter().map(|digest| format!("@{digest}"));
        format!("{}{}", image.repository.printable(), tag.chain(digest).collect::<String>())
    };
    let all: Vec<String> = named.iter().map(shown).collect();
    Err(Error::NotFound { what: format!("image {}", all.join(" nor ")) })
}

impl Place {
    /// Whether a registry would take the name of the tag.
    fn check(&self) -> Result<()> {
        match layout::is_tag(&self.tag) {
            true => Ok(()),
            false => Err(Error::invalid(format!(
                "{:?} is no tag: up to 128 letters, digits, `_`, `.` and `-`, the first no `.` or `-`",
                self.tag.printable().to_string()
            ))),
        }
    }
}
