//! Room for the first sweep on a disk that is full: there is none for the lock and the trash.
//!
//! What needs no room is a rename into a directory that is there. So the directory of a dead blob becomes `.regfs`, and
//! those of others move into it under their digests. Then another look shows whether anything leads to them by now; if
//! not, their bytes make room for all the rest, which is swept like anywhere else.
//!
//! Only a sweep that frees at once does this, while no registry runs; nobody else can have the lock, for which there is
//! no room. A run that died leaves `.regfs/<hex>`, which the next one gives back before it looks.

use std::path::{Path, PathBuf};

use super::LOCK_WAIT;
use super::collect::{Collection, judged};
use super::guard::gate::Gate;
use super::guard::outliving;
use super::mark::{Untagged, mark};
use super::plan::{Item, Plan};
use crate::catalog::Catalog;
use crate::catalog::scan::scan_strictly;
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result, count};
use crate::layout;
use crate::printable::Printable;
use crate::store::{Kind, Store};
use crate::trash::undo::needed;

/// So many blobs at most: their names fit into the directory of one.
const MOST: usize = 32;

fn place_of(digest: &Digest) -> PathBuf {
    Path::new(layout::OWN).join(digest.hex())
}

/// Takes the lock of the store for a run, on a full disk after it made room. `plan` was made of `catalog`.
pub(super) fn lock(run: &Collection<'_>, catalog: &Catalog, plan: &Plan) -> Result<Box<dyn Send>> {
    let lock = || run.store.lock(&run.author.command, LOCK_WAIT);
    let may_free = run.options.now && matches!(run.options.gate, Gate::Stopped(_));
    let locked = match lock() {
        Err(e) if may_free && e.is_full() && make(run, catalog, plan)? => lock()?,
        result => result?,
    };
    give_back(run.store)?;
    if may_free && !plan.items.is_empty() && is_full(run.store)? {
        make(run, catalog, plan)?;
    }
    Ok(locked)
}

/// Whether there is no room for the description of a transaction.
fn is_full(store: &dyn Store) -> Result<bool> {
    let path = Path::new(layout::OWN).join("room");
    match store.write(&path, &[b' '; 512]) {
        Err(e) if e.is_full() => Ok(true),
        Err(e) => Err(e),
        Ok(()) => store.remove(&[path]).pop().map_or(Ok(false), Err),
    }
}

/// Frees some dead blobs of `plan`; `false`: there are none.
fn make(run: &Collection<'_>, catalog: &Catalog, plan: &Plan) -> Result<bool> {
    let store = run.store;
    run.options.keeper.allows(run.options.change())?;
    outliving::tell(&run.options.gate, catalog, &plan.items)?;
    // Whose undo ends is for the sweep to say, and to tell.
    let Some(needed) = needed(store)? else { return Ok(false) };
    let reached = mark(catalog, &Untagged::new());
    let is_dead = |item: &Item| {
        item.blob().filter(|(id, _)| !reached.is_reachable(*id) && catalog.parsed(*id).is_none())
    };
    let mut dead: Vec<(u64, Digest)> = plan
        .items
        .iter()
        .filter_map(is_dead)
        .map(|(id, bytes)| (bytes, catalog.tables.digests.get(id)))
        .filter(|(_, digest)| digest.algorithm() == Algorithm::Sha256)
        .filter(|(_, digest)| !needed.contains(&layout::blob_data(digest)))
        .collect();
    dead.sort_unstable_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
    let mut moved = Vec::new();
    let is_ours_missing = store.list(Path::new(layout::OWN))?.is_none();
    for (bytes, digest) in dead.into_iter().take(MOST) {
        if move_out(store, &digest, is_ours_missing && moved.is_empty())? {
            moved.push((bytes, digest));
        } else if moved.is_empty() {
            return Ok(false);
        }
    }
    let again = scan_strictly(store, &run.tables, Some(catalog)).map(|again| judged(again, &run.options));
    let gate = again.as_ref().ok().map(|again| run.options.gate.verified(store, again));
    let is_stopped = matches!(gate, Some(Ok(Gate::Stopped(_)))) && run.options.gate.look_again().is_ok();
    let mut freed = (0, 0);
    if let (Ok(again), true) = (&again, is_stopped) {
        let reached = mark(again, &Untagged::new());
        for (at, (bytes, digest)) in moved.iter().enumerate() {
            let place = place_of(digest);
            if reached.is_reachable(again.tables.digests.intern(digest)) {
                continue;
            }
            match at {
                // Its directory is `.regfs` now.
                0 if is_ours_missing => store.remove(&[place]).pop().map_or(Ok(()), Err)?,
                _ => store.remove_tree(&place)?,
            }
            freed = (freed.0 + 1, freed.1 + bytes);
        }
        store.sync()?;
    }
    give_back(store)?;
    again?;
    log::warn!(
        "the disk of {} is full: freed {} ({} bytes) at once to make room for the trash",
        store.full(Path::new("")).printable(),
        count(freed.0, "blob"),
        freed.1
    );
    Ok(freed.0 > 0)
}

/// Moves a blob to regfs's own directory, or makes its directory that one.
fn move_out(store: &dyn Store, digest: &Digest, becomes_ours: bool) -> Result<bool> {
    let directory = layout::blob_dir(digest);
    let entries = store.list(&directory)?.unwrap_or_default();
    let data = layout::blob_data(digest);
    if entries.len() != 1 || entries.iter().any(|entry| Some(entry.name.as_os_str()) != data.file_name()) {
        return Ok(false);
    }
    if !becomes_ours {
        return store.rename(&directory, &place_of(digest));
    }
    let own = Path::new(layout::OWN);
    match store.rename(&directory, own) {
        Ok(true) => store.rename(&own.join(data.file_name().unwrap_or_default()), &place_of(digest)),
        // Something else had no room, then.
        Ok(false) | Err(Error::Exists { .. }) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Gives back what [`make`] moved and did not free.
fn give_back(store: &dyn Store) -> Result<()> {
    for entry in store.list(Path::new(layout::OWN))?.unwrap_or_default() {
        let hex = entry.name.to_str().unwrap_or_default();
        let Some(digest) = Digest::from_parts(Algorithm::Sha256.name(), hex) else { continue };
        let to = if entry.kind == Kind::Directory {
            layout::blob_dir(&digest)
        } else {
            layout::blob_data(&digest)
        };
        match store.rename(&place_of(&digest), &to) {
            Ok(_) => {}
            Err(e @ Error::Exists { .. }) => log::warn!("{e}"),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
