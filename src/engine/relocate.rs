//! `rename` of a directory in the mount: a repository, or a namespace with all repositories below it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::forgetting::Forget;
use super::retag::check_name;
use super::{Engine, locked};
use crate::catalog::update::rescan;
use crate::catalog::{Catalog, Repository};
use crate::edit::relocate::{Move, relocate};
use crate::error::{Error, Result, count};
use crate::layout;
use crate::printable::Printable;
use crate::trash::{Author, Transaction};
use crate::view::node::Node;
use crate::view::renamed;

impl Engine {
    /// The directory below `images` that a name stands for; `None` for anything else.
    pub(super) fn directory_at(&self, parent: Node, name: &OsStr) -> Result<Option<PathBuf>> {
        let snapshot = self.snapshot();
        let view = self.view(&snapshot);
        match (parent, view.lookup(parent, name)?) {
            (Node::Images | Node::Namespace(_), Some(Node::Namespace(path))) => Ok(snapshot.path(path)),
            _ => Ok(None),
        }
    }

    /// Moves a directory below `images` to a name where nothing is, or an empty directory unless `may_replace` is false.
    pub(super) fn move_directory(
        &self,
        from: &Path,
        to: (Node, &OsStr),
        may_replace: bool,
        author: &Author,
    ) -> Result<()> {
        if self.settings.read_only {
            return Err(Error::ReadOnly);
        }
        let to = {
            let snapshot = self.snapshot();
            self.view(&snapshot).namespace(to.0).ok_or(Error::ReadOnly)?.join(to.1)
        };
        if from == to {
            return Ok(());
        }
        let shown = format!("images/{} → images/{}", from.printable(), to.printable());
        let result = self.move_repositories(from, &to, may_replace, author, &shown);
        self.note_result(author, "mv", &shown, result)
    }

    fn move_repositories(
        &self,
        from: &Path,
        to: &Path,
        may_replace: bool,
        author: &Author,
        shown: &str,
    ) -> Result<String> {
        check_name(to)?;
        let _changing = locked(&self.changing);
        let _lock = self.lock_for_change(author)?;
        let current = self.current();
        let is_there = |name: &PathBuf| name.starts_with(to);
        if current.catalog.repositories.keys().any(is_there) {
            return Err(Error::NotEmpty { what: format!("images/{}", to.printable()) });
        }
        if !may_replace && current.catalog.namespaces.iter().any(is_there) {
            return Err(Error::Exists { path: to.to_path_buf() });
        }
        // What lies deeper goes first, as with `rm -r`.
        let known = current.catalog.repositories.keys().rev();
        let names: Vec<(PathBuf, PathBuf)> =
            known.filter_map(|name| Some((name.clone(), renamed(name, from, to)?))).collect();
        names.iter().try_for_each(|(_, to)| check_name(to))?;
        let look = |catalog: &Catalog| {
            let all = names.iter().flat_map(|(from, to)| [from, to]);
            all.fold(catalog.clone(), |catalog, name| rescan(&*self.store, &catalog, name))
        };
        let catalog = look(&current.catalog);
        let result = self.relocate_all(&catalog, &names, author, shown);
        // Also after a failure: something may have been written.
        let mut after = look(&catalog);
        let moved = result.and_then(|said| {
            let directories: Vec<PathBuf> =
                catalog.namespaces.iter().filter(|name| name.starts_with(from)).cloned().collect();
            for directory in directories.iter().filter_map(|name| renamed(name, from, to)) {
                self.store.make_directory(&layout::repository(&directory))?;
                after.namespaces.insert(directory);
            }
            self.store.prune(&layout::repository(from))?;
            for directory in directories {
                if self.store.list(&layout::repository(&directory))?.is_none() {
                    after.namespaces.remove(&directory);
                }
            }
            Ok(said)
        });
        if moved.is_ok() {
            current.note_move(from, to);
        }
        self.publish(after, self.transactions(), &[]);
        moved
    }

    fn relocate_all(
        &self,
        catalog: &Catalog,
        names: &[(PathBuf, PathBuf)],
        author: &Author,
        shown: &str,
    ) -> Result<String> {
        let found: Vec<(&Arc<Repository>, &Path)> =
            names.iter().filter_map(|(from, to)| Some((catalog.repository(from)?, to.as_path()))).collect();
        if found.is_empty() {
            return Ok("moved".to_string());
        }
        let moves: Vec<Move<'_>> = found.iter().map(|(from, to)| Move { from, to }).collect();
        let mut id = String::new();
        let mut begin = || -> Result<Transaction> {
            let reason = format!("moved through the mount, {shown}");
            let transaction = Transaction::begin(&*self.store, "mv", author, &reason)?;
            id = transaction.id().to_string();
            Ok(transaction)
        };
        let gone = relocate(&*self.store, catalog, &moves, self.settings.grace, &mut begin)?;
        for (repository, digest) in gone {
            self.forget(Forget::Manifest(repository, digest));
        }
        Ok(format!("moved {}; what went is in the trash, in {id}", count(moves.len(), "repository")))
    }
}
