//! Guard: gives back what a manifest names again.
//!
//! A push can adopt a blob after the mark and before the sweep. As long as a transaction exists, whatever in it
//! is in use again moves back: blobs that a manifest names or that a layer link was written for (taking a blob
//! takes all links to it, so this one is newer), layer links that a manifest of their repository needs, revisions
//! that an index or a tag of their repository names.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::mark::{self, Untagged};
use crate::catalog::Catalog;
use crate::catalog::intern::{DigestId, IdSet};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layout::{self, Kind};
use crate::store::Store;
use crate::trash::{self, Contents};

/// Moves back what `catalog` names, and what that names in turn; returns the catalog afterwards and the paths, in the
/// order they came back.
///
/// A manifest whose bytes lie in the trash can't say what it names before they are back, so this looks again with
/// `look` until nothing more comes. Each round but the last empties the trash a bit, so there is a last one.
pub fn give_back(
    store: &dyn Store,
    mut catalog: Catalog,
    look: &dyn Fn(&Catalog) -> Result<Catalog>,
) -> Result<(Catalog, Vec<PathBuf>)> {
    let mut all = Vec::new();
    loop {
        let restored = give_back_once(store, &catalog)?;
        if restored.is_empty() {
            return Ok((catalog, all));
        }
        all.extend(restored);
        catalog = look(&catalog)?;
    }
}

fn give_back_once(store: &dyn Store, catalog: &Catalog) -> Result<Vec<PathBuf>> {
    let mut restored = Vec::new();
    let transactions = trash::contents(store)?;
    if transactions.is_empty() {
        return Ok(restored);
    }
    let mark = mark::mark(catalog, &Untagged::new());
    let linked = linked(store, catalog, &transactions)?;
    let id_of = |digest: &Digest| catalog.tables.digests.find(digest);
    let mut needs: HashMap<PathBuf, IdSet> = HashMap::new();
    for transaction in &transactions {
        let mut wanted: Vec<(u8, &Path)> = Vec::new();
        for path in transaction.units() {
            let is_wanted = match layout::classify(path) {
                Kind::Blob(digest) => {
                    id_of(&digest).is_some_and(|id| mark.is_reachable(id) || linked.contains(id))
                }
                Kind::LayerLink(name, digest) | Kind::Revision(name, digest) => {
                    id_of(&digest).is_some_and(|id| needs_of(catalog, &mut needs, name).contains(id))
                }
                Kind::Tag(..) | Kind::Other => false,
            };
            if is_wanted {
                wanted.push((trash::order_of_return(path), path));
            }
        }
        wanted.sort_unstable();
        give_back_from(store, transaction, &wanted, &mut restored)?;
    }
    if !restored.is_empty() {
        store.sync()?;
    }
    Ok(restored)
}

/// Blobs in the trash that a layer link in the store leads to.
///
/// # Cost
/// A `stat` for each layer link directory of a blob in the trash; registries and sweeps leave them there, empty.
fn linked(store: &dyn Store, catalog: &Catalog, transactions: &[Contents]) -> Result<IdSet> {
    let taken = transactions.iter().flat_map(|t| &t.files).filter_map(|path| match layout::classify(path) {
        Kind::Blob(digest) => catalog.tables.digests.find(&digest),
        _ => None,
    });
    let taken: IdSet = taken.collect();
    let mut linked = IdSet::default();
    for repository in catalog.repositories.values() {
        for layer in &repository.layers {
            let targets = catalog.aliases.get(layer).map_or(std::slice::from_ref(layer), Vec::as_slice);
            if !targets.iter().any(|id| taken.contains(*id)) {
                continue;
            }
            match store.stat(&layout::layer_link(&repository.name, &catalog.digest(*layer))) {
                Ok(None) => {}
                // Whatever stands there, a blob too many in the store does no harm.
                Ok(Some(_)) => linked.extend(targets),
                Err(e) if e.is_damage() => linked.extend(targets),
                Err(e) => return Err(e),
            }
        }
    }
    Ok(linked)
}

fn give_back_from(
    store: &dyn Store,
    transaction: &Contents,
    wanted: &[(u8, &Path)],
    restored: &mut Vec<PathBuf>,
) -> Result<()> {
    for (_, path) in wanted {
        match transaction.put_back(store, path) {
            Ok(true) => {
                log::info!("gave back {} from {}: it is in use again", path.display(), transaction.id);
                restored.push(path.to_path_buf());
            }
            // It came back by itself: a push wrote it again.
            Ok(false) | Err(Error::Exists { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    match wanted.is_empty() {
        true => Ok(()),
        false => transaction.discard_if_empty(store),
    }
}

/// What the manifests and tags of a repository name, manifests left out that neither a tag nor another one names.
fn needs_of<'a>(catalog: &Catalog, needs: &'a mut HashMap<PathBuf, IdSet>, name: PathBuf) -> &'a IdSet {
    needs.entry(name).or_insert_with_key(|name| {
        let Some(repository) = catalog.repository(name) else { return IdSet::default() };
        let targets = repository.revisions.iter().map(|r| r.target);
        let mut named: Vec<DigestId> = Vec::new();
        for target in targets {
            named.extend(catalog.closure(target).into_iter().skip(1));
        }
        // A push writes its tag last: one that points at nothing raced with a removal that could not see it yet.
        for target in repository.tags.iter().filter_map(|t| t.target) {
            named.extend(catalog.closure(target));
        }
        named.into_iter().collect()
    })
}
