//! Dangling: layer links whose bytes are nowhere. A registry that remembers one tells clients "exists", for ever, and every
//! image pushed on that lacks the blob.
//!
//! Such links come from a request that saw the bytes, slept until they were purged, and then went on; or from whoever
//! removes files below a registry. The link itself does no harm (a registry that looks finds no bytes and says so), what
//! a registry remembers of it does.

use std::path::Path;

use super::guard::gate::Registries;
use crate::catalog::Catalog;
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result};
use crate::layout;
use crate::store::Store;
use crate::trash::{self, Author, Transaction};

/// Makes registries forget a link without bytes, if they remember it; whether they did. The caller holds the lock.
///
/// The DELETE that makes one forget removes the link, too, also one that an upload writes in that moment. So ours lies in
/// the trash meanwhile, and comes back.
pub fn forget(
    store: &dyn Store,
    registries: &dyn Registries,
    author: &Author,
    repository: &Path,
    digest: &Digest,
) -> Result<bool> {
    let link = layout::layer_link(repository, digest);
    let Some(stored) = target(store, &link, digest)? else { return Ok(false) };
    if has_bytes(store, &stored)? || !registries.remembers(repository, digest)? {
        return Ok(false);
    }
    let transaction = Transaction::begin(
        store,
        trash::SWEEP,
        author,
        "a registry remembers a link to bytes that are nowhere",
    )?;
    transaction.take(store, &link)?;
    let told = registries.forget(repository, digest);
    match transaction.put_back(store, &link) {
        // An upload has written it; then the bytes are there as well.
        Ok(_) | Err(Error::Exists { .. }) => {}
        Err(e) => return Err(e),
    }
    transaction.discard_if_empty(store)?;
    told.map(|()| true)
}

/// The same for all links of a catalog whose blobs have no directory.
///
/// # Cost
/// No call for any other link. A question to each registry for each of these.
pub(super) fn forget_all(
    store: &dyn Store,
    registries: &dyn Registries,
    author: &Author,
    catalog: &Catalog,
) -> Result<()> {
    for repository in catalog.repositories.values() {
        let is_nowhere =
            |layer: &crate::catalog::intern::DigestId| !catalog.has_blob(catalog.stored_as(*layer));
        for layer in repository.layers.iter().copied().filter(is_nowhere) {
            let digest = catalog.digest(layer);
            if forget(store, registries, author, &repository.name, &digest)? {
                log::warn!(
                    "{}: a registry remembered {digest}, whose bytes are nowhere",
                    repository.name.display()
                );
            }
        }
    }
    Ok(())
}

/// The blob that a link leads to; `None` where there is none, or nobody can read it.
fn target(store: &dyn Store, link: &Path, digest: &Digest) -> Result<Option<Digest>> {
    if digest.algorithm() == Algorithm::Sha256 {
        return Ok(Some(*digest));
    }
    match store.read(link, layout::LINK_LIMIT) {
        Err(e) if e.is_damage() => Ok(None),
        content => Ok(content?.and_then(|(text, _)| layout::parse_link(&text).ok())),
    }
}

/// Whether there is anything where the bytes belong.
fn has_bytes(store: &dyn Store, digest: &Digest) -> Result<bool> {
    match store.stat(&layout::blob_data(digest)) {
        Err(e) if e.is_damage() => Ok(true),
        stat => Ok(stat?.is_some()),
    }
}
