//! What `mv` of a directory below `images` means: each repository in it gets another name.
//!
//! A registry knows a repository by its name and may be serving it, so no directory is renamed under its feet. The new
//! repository gets what a push of each image would write, then the old one is removed as `rm -r` does: two steps that each
//! leave every tag whole.
//!
//! # Rules kept here
//! 1. All is planned before the first change: what can't be judged, an image that lacks something, or a push in progress
//!    refuses the whole.
//! 2. Everything of the new names is durable before anything of the old ones goes, so a crash leaves both.
//! 3. What goes is in one transaction. Its undo brings the old names back; the new ones stay.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::tag::{Claim, confirm, create};
use super::{Removal, refuse_young_upload, take, take_repository};
use crate::catalog::{Catalog, Keeps, Repository};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layout;
use crate::printable::Printable;
use crate::store::Store;
use crate::trash::Transaction;

/// A repository and the name that it gets.
#[derive(Clone, Copy)]
pub struct Move<'a> {
    /// As it is.
    pub from: &'a Repository,
    /// Where nothing is yet.
    pub to: &'a Path,
}

/// Gives repositories other names; those that lie deeper stand first. What goes, `transaction` gets; returns the manifests
/// that are in their old repositories no more.
///
/// # Errors
/// Before the first change those that [`Claim::plan`] has, [`Error::Unjudged`] and [`Error::Busy`]; later ones leave both
/// names of what has not been removed.
pub fn relocate(
    store: &dyn Store,
    catalog: &Catalog,
    moves: &[Move<'_>],
    grace: Duration,
    transaction: &mut dyn FnMut() -> Result<Transaction>,
) -> Result<Vec<(PathBuf, Digest)>> {
    let mut claims = Vec::new();
    for Move { from, to } in moves {
        judge(store, catalog, from, grace)?;
        let revisions = from.revisions.iter().map(|revision| catalog.digest(revision.digest));
        claims.push(Claim::plan_all(store, catalog, Some(from), to, revisions)?);
    }
    for (claim, Move { from, to }) in claims.iter().zip(moves) {
        claim.write(store)?;
        write_tags(store, catalog, from, to)?;
    }
    store.sync()?;
    let transaction = transaction()?;
    let (mut gone, mut catalog) = (Vec::new(), catalog.clone());
    for Move { from, .. } in moves {
        let removal = Removal {
            tags: from.tags.iter().map(|tag| tag.name).collect(),
            revisions: from.revisions.iter().map(|revision| revision.digest).collect(),
        };
        catalog = take(store, &catalog, from, &removal, &transaction)?;
        for upload in &from.uploads {
            transaction.take(store, &layout::upload_dir(&from.name, &catalog.name(*upload)))?;
        }
        catalog = take_repository(store, &catalog, &from.name, &mut || Ok(transaction.clone()))?;
        gone.extend(removal.revisions.iter().map(|id| (from.name.clone(), catalog.digest(*id))));
    }
    transaction.discard_if_empty(store)?;
    Ok(gone)
}

/// Fails where something of a repository would not be moved.
fn judge(store: &dyn Store, catalog: &Catalog, from: &Repository, grace: Duration) -> Result<()> {
    if from.keeps != Keeps::Named {
        let place = layout::repository(&from.name);
        let problems = catalog.problems.iter().filter(|problem| problem.path.starts_with(&place));
        return Err(Error::Unjudged { problems: problems.map(|problem| problem.what.clone()).collect() });
    }
    if let Some(tag) = from.tags.iter().find(|tag| !from.is_served(tag)) {
        let (name, tag) = (from.name.printable(), catalog.name(tag.name));
        return Err(Error::NotFound {
            what: format!("manifest behind the tag {} of {name}", tag.printable()),
        });
    }
    from.uploads
        .iter()
        .try_for_each(|upload| refuse_young_upload(store, &from.name, &catalog.name(*upload), grace))
}

fn write_tags(store: &dyn Store, catalog: &Catalog, from: &Repository, to: &Path) -> Result<()> {
    let tags = from.tags.iter().filter_map(|tag| Some((catalog.name(tag.name), catalog.digest(tag.target?))));
    tags.clone().try_for_each(|(tag, digest)| create(store, to, &tag, &digest))?;
    store.sync()?;
    tags.into_iter().try_for_each(|(tag, digest)| confirm(store, to, &tag, &digest))
}
