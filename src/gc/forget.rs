//! What registries are to forget: layer links whose bytes are nowhere, and what was removed.
//!
//! A registry that remembers a blob tells clients "exists", for ever, and every image pushed on that lacks the blob. Links
//! without bytes come from a request that saw the bytes, slept until they were purged, and then went on; or from whoever
//! removes files below a registry. Such a link goes to the trash: a registry remembers blobs in each repository, which a
//! DELETE makes it forget, and in all of them, which nothing does but that is of no use without a link. It is told once
//! more after the drain, and the link comes back when the bytes are there again and a manifest names them.
//!
//! The DELETE that makes a registry forget removes the layer link, too, also one that an upload writes in that moment. So
//! where a link is to stay it lies in the trash meanwhile, and comes back.

use std::path::Path;
use std::time::Duration;

use super::guard::gate::Registries;
use crate::catalog::Catalog;
use crate::catalog::intern::DigestId;
use crate::clock::Clock;
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result};
use crate::layout;
use crate::printable::Printable;
use crate::store::{Store, read_link};
use crate::trash::stage::Stage;
use crate::trash::{self, Author, Transaction};

/// Takes a link without bytes and makes registries forget it, if one remembers it; whether that was so. The caller holds
/// the lock.
pub fn dangling(
    store: &dyn Store,
    registries: &dyn Registries,
    author: &Author,
    drain: Duration,
    repository: &Path,
    digest: &Digest,
) -> Result<bool> {
    let link = layout::layer_link(repository, digest);
    let Some(stored) = target(store, &link, digest)? else { return Ok(false) };
    let is_remembered = || -> Result<bool> {
        // With a link, to remember the bytes is enough.
        Ok(registries.remembers(repository, digest)? || registries.remembers_bytes(&stored)?)
    };
    if is_there(store, &layout::blob_data(&stored))? || !is_remembered()? {
        return Ok(false);
    }
    let reason = "a registry remembers a link to bytes that are nowhere";
    let clock = Clock::open(store)?;
    let transaction = Transaction::begin(store, trash::SWEEP, author, reason)?;
    transaction.take(store, &link)?;
    Stage::removed(store, drain, &clock).write(store, transaction.id())?;
    store.sync()?;
    registries.forget(repository, digest)?;
    registries.forget_bytes(&stored)?;
    Ok(true)
}

/// The same for all links of a catalog whose blobs have no directory.
///
/// # Cost
/// No call for any other link. A question to each registry for each of these.
pub(super) fn dangling_ones(
    store: &dyn Store,
    registries: &dyn Registries,
    author: &Author,
    drain: Duration,
    catalog: &Catalog,
) -> Result<()> {
    for repository in catalog.repositories.values() {
        let is_nowhere = |layer: &DigestId| !catalog.has_blob(catalog.stored_as(*layer));
        for layer in repository.layers.iter().copied().filter(is_nowhere) {
            let digest = catalog.digest(layer);
            if dangling(store, registries, author, drain, &repository.name, &digest)? {
                let name = repository.name.printable();
                log::warn!("{name}: a registry remembered {digest}, whose bytes are nowhere");
            }
        }
    }
    Ok(())
}

/// Makes registries forget what was removed from `path`, the revision or the layer link of `digest`, unless it is there
/// again by now. The caller holds the lock.
pub fn removed(
    store: &dyn Store,
    registries: &dyn Registries,
    author: &Author,
    repository: &Path,
    digest: &Digest,
    path: &Path,
) -> Result<()> {
    if is_there(store, path)? {
        return Ok(());
    }
    // The bytes of a manifest may be a layer, too, and a DELETE means that.
    match registries.removes_links() && is_there(store, &layout::layer_link(repository, digest))? {
        true => forget_keeping(store, registries, author, repository, digest),
        false => registries.forget(repository, digest),
    }
}

/// A DELETE that leaves the link.
fn forget_keeping(
    store: &dyn Store,
    registries: &dyn Registries,
    author: &Author,
    repository: &Path,
    digest: &Digest,
) -> Result<()> {
    let link = layout::layer_link(repository, digest);
    let transaction =
        Transaction::begin(store, trash::SWEEP, author, "while a registry is told to forget it")?;
    transaction.take(store, &link)?;
    let told = registries.forget(repository, digest);
    match transaction.put_back(store, &link) {
        // An upload has written it.
        Ok(_) | Err(Error::Exists { .. }) => {}
        Err(e) => return Err(e),
    }
    transaction.discard_if_empty(store)?;
    told
}

/// The blob that a link leads to; `None` where there is none, or nobody can read it.
fn target(store: &dyn Store, link: &Path, digest: &Digest) -> Result<Option<Digest>> {
    if digest.algorithm() == Algorithm::Sha256 {
        return Ok(is_there(store, link)?.then_some(*digest));
    }
    read_link(store, link)
}

/// Whether anything stands at `path`.
pub(super) fn is_there(store: &dyn Store, path: &Path) -> Result<bool> {
    match store.stat(path) {
        Err(e) if e.is_damage() => Ok(true),
        stat => Ok(stat?.is_some()),
    }
}
