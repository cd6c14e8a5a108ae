//! Gives back what is in use again.
//!
//! A push can adopt a blob after the mark and before the sweep. As long as a transaction exists, whatever in it
//! is in use again moves back: blobs that a manifest names or that a layer link was written for (taking a blob
//! takes all links to it, so this one is newer), layer links that a manifest of their repository needs, revisions
//! that an index or a tag of their repository names.
//!
//! Of a sweep beside a running registry all links that it took to a blob come back with it, also when only one of these
//! was written late, into the file that had just moved away; and the sweep is no longer about that blob.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::forget;
use super::mark::{self, Untagged};
use crate::catalog::Catalog;
use crate::catalog::intern::{DigestId, IdSet};
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result};
use crate::layout::{self, Kind};
use crate::printable::Printable;
use crate::store::{Store, read_link};
use crate::trash::stage::{Stage, Step};
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
    let is_used =
        |digest: &Digest| id_of(digest).is_some_and(|id| mark.is_reachable(id) || linked.contains(id));
    for transaction in &transactions {
        let alive = alive(store, transaction, &is_used)?;
        let mut wanted: Vec<(u8, &Path)> = Vec::new();
        for path in transaction.units() {
            let is_wanted = match layout::classify(path) {
                Kind::Blob(digest) => is_used(&digest) || alive.contains(&digest),
                Kind::LayerLink(name, digest) => {
                    let is_named =
                        id_of(&digest).is_some_and(|id| needs_of(catalog, &mut needs, name).contains(id));
                    let target = match is_named || !alive.is_empty() {
                        true => target_of(store, transaction, path, digest)?,
                        false => None,
                    };
                    // A link to bytes that are nowhere would only make a registry say that it has them.
                    target.is_some_and(|d| alive.contains(&d))
                        || is_named && target.map_or(Ok(true), |d| has_bytes(store, &transactions, &d))?
                }
                Kind::Revision(name, digest) => {
                    id_of(&digest).is_some_and(|id| needs_of(catalog, &mut needs, name).contains(id))
                        || is_written_late(store, transaction, path)?
                }
                Kind::Tag(..) | Kind::Other => false,
            };
            if is_wanted {
                wanted.push((trash::order_of_return(path), path));
            }
        }
        wanted.sort_unstable();
        give_back_from(store, transaction, &wanted, &mut restored)?;
        // Last: as long as it is about a blob, whatever of that is still here comes back.
        end_sweep_of(store, transaction, &alive)?;
        if !wanted.is_empty() || !alive.is_empty() {
            transaction.discard_if_empty(store)?;
        }
    }
    if !restored.is_empty() {
        store.sync()?;
    }
    Ok(restored)
}

/// Whether the bytes of a blob are in the store or in the trash.
fn has_bytes(store: &dyn Store, transactions: &[Contents], digest: &Digest) -> Result<bool> {
    let path = layout::blob_data(digest);
    Ok(forget::is_there(store, &path)? || transactions.iter().any(|t| t.holds(&path)))
}

/// The blobs that a sweep is about and that are in use again.
fn alive(
    store: &dyn Store,
    transaction: &Contents,
    is_used: &dyn Fn(&Digest) -> bool,
) -> Result<HashSet<Digest>> {
    let Some(Ok(stage)) = &transaction.stage else { return Ok(HashSet::new()) };
    let mut alive: HashSet<Digest> = stage.blobs.iter().filter(|digest| is_used(digest)).copied().collect();
    if stage.step() != Step::Quarantined {
        alive.extend(written_late(store, transaction)?);
    }
    Ok(alive)
}

/// A sweep is no longer about the blobs that are in use again.
fn end_sweep_of(store: &dyn Store, transaction: &Contents, alive: &HashSet<Digest>) -> Result<()> {
    match &transaction.stage {
        Some(Ok(stage)) if stage.blobs.iter().any(|digest| alive.contains(digest)) => {
            let blobs = stage.blobs.iter().filter(|digest| !alive.contains(digest)).copied().collect();
            Stage { blobs, ..stage.clone() }.write(store, &transaction.id)
        }
        _ => Ok(()),
    }
}

/// Whether a link was written after it had moved here, by a sweep beside a registry.
fn is_written_late(store: &dyn Store, transaction: &Contents, path: &Path) -> Result<bool> {
    let stage = match &transaction.stage {
        Some(Ok(stage)) if transaction.is_swept() => stage,
        _ => return Ok(false),
    };
    match store.stat(&transaction.path_of(path)) {
        Ok(stat) => Ok(stat.is_some_and(|stat| stat.modified > stage.links_until)),
        Err(e) if e.is_damage() => Ok(true),
        Err(e) => Err(e),
    }
}

/// The blobs to which a link was written after it had moved here: registries before 3.1 write links in place, so a file
/// that was open then is written wherever it is.
fn written_late(store: &dyn Store, transaction: &Contents) -> Result<Vec<Digest>> {
    let mut late = Vec::new();
    for path in &transaction.files {
        let Kind::LayerLink(_, digest) = layout::classify(path) else { continue };
        if is_written_late(store, transaction, path)? {
            late.extend(target_of(store, transaction, path, digest)?);
        }
    }
    Ok(late)
}

/// The blob that a link in the trash leads to; a layer may be known by another digest than that of its bytes.
pub(super) fn target_of(
    store: &dyn Store,
    transaction: &Contents,
    link: &Path,
    digest: Digest,
) -> Result<Option<Digest>> {
    if digest.algorithm() == Algorithm::Sha256 {
        return Ok(Some(digest));
    }
    read_link(store, &transaction.path_of(link))
}

/// Blobs that the trash is about and a layer link in the store leads to.
///
/// # Cost
/// A `stat` for each layer link directory of a blob in the trash; registries and sweeps leave them there, empty.
fn linked(store: &dyn Store, catalog: &Catalog, transactions: &[Contents]) -> Result<IdSet> {
    let taken = transactions.iter().flat_map(|t| &t.files).filter_map(|path| match layout::classify(path) {
        Kind::Blob(digest) => catalog.tables.digests.find(&digest),
        _ => None,
    });
    let staged = transactions.iter().flat_map(Contents::staged);
    let taken: IdSet = taken.chain(staged.filter_map(|d| catalog.tables.digests.find(d))).collect();
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
        match bring_back(store, transaction, path) {
            Ok(true) => {
                log::info!("gave back {} from {}: it is in use again", path.printable(), transaction.id);
                restored.push(path.to_path_buf());
            }
            // It came back by itself: a push wrote it again.
            Ok(false) | Err(Error::Exists { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Moves it back; of a link that a registry may yet remove, because it did not answer a DELETE, a copy stays.
fn bring_back(store: &dyn Store, transaction: &Contents, path: &Path) -> Result<bool> {
    let is_unanswered = matches!(&transaction.stage, Some(Ok(stage)) if stage.is_unanswered);
    if !is_unanswered || !matches!(layout::classify(path), Kind::LayerLink(..)) {
        return transaction.put_back(store, path);
    }
    let Some((link, _)) = store.read(&transaction.path_of(path), layout::LINK_LIMIT)? else {
        return Ok(false);
    };
    store.create(path, &link).map(|()| true)
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
