//! What of the trash is purged, by a command or because the trash has kept it long enough.

use super::guard::{self, gate::Gate};
use super::{LOCK_WAIT, Options, collect};
use crate::catalog::Tables;
use crate::clock::{Clock, Next, Now};
use crate::digest::Digest;
use crate::error::{self, Error, Result};
use crate::keeper::Change;
use crate::layout;
use crate::printable::Printable;
use crate::progress::Unwatched;
use crate::store::Store;
use crate::trash::purge::Purged;
use crate::trash::{self, Author, Selection};

/// Purges transactions of the trash, after giving back what a manifest names again. What a registry may rely on, going by
/// the gate of `options`, stays.
pub fn purge_trash(
    store: &dyn Store,
    tables: &Tables,
    author: &Author,
    selection: &Selection,
    options: &Options,
) -> Result<Purged> {
    options.keeper.allows(Change::Garbage)?;
    let _lock = store.lock(&author.command, LOCK_WAIT)?;
    // A registry may have been migrated while we waited.
    options.keeper.allows(Change::Garbage)?;
    let gate = &options.gate;
    let look = Clock::open(store)?.now(store);
    look.warn(store);
    let (_, restored) = collect::give_back(store, tables, None, &Options::default())?;
    let (mut doomed, mut kept) = (Vec::new(), Vec::new());
    for id in selection.of(store, &look)? {
        let transaction = trash::read(store, &id)?;
        let why = match gate {
            Gate::Stopped(_) => None,
            _ => transaction.is_waiting(&look, None).or_else(|| guard::is_remembered(&transaction, gate)),
        };
        match why {
            None => doomed.push(id),
            Some(why) => kept.push(format!("{id}: {why}")),
        }
    }
    let doomed = guard::outliving::purgeable(store, gate, doomed)?;
    look_before(gate)?;
    let mut purged = trash::purge::purge(store, &doomed, &Unwatched)?;
    purged.failures.extend(look_after(gate).map(Error::invalid));
    say_purged(&purged, &author.command);
    purged.kept.extend(kept);
    Ok(Purged { restored, ..purged })
}

/// Looks again right before bytes are freed.
pub(super) fn look_before(gate: &Gate) -> Result<()> {
    let stays = |e| Error::invalid(format!("nothing was freed, and all stays in the trash: {e}"));
    gate.look_again().map_err(stays)
}

/// Looks again right after that; what is to be said if a registry runs by now. One that began after the things were taken
/// never saw them, but that is more than a look can tell.
pub(super) fn look_after(gate: &Gate) -> Option<String> {
    let why = gate.look_again().err()?;
    Some(format!(
        "bytes were freed, and right after that: {why}. If it ran before, images that were pushed meanwhile may lack layers; a \
         dry run lists what is broken, push that again"
    ))
}

/// What can't be undone is logged by whoever does it.
pub(super) fn say_purged(purged: &Purged, who: &str) {
    for id in &purged.transactions {
        log::info!("purged {} ({})", id.printable(), who.printable());
    }
    if purged.bytes > 0 {
        log::info!("freed {} ({})", bytesize::ByteSize::b(purged.bytes), who.printable());
    }
}

/// The blobs in transactions of the trash.
pub(super) fn blobs_in(store: &dyn Store, ids: &[String]) -> Result<Vec<Digest>> {
    let mut blobs = Vec::new();
    for id in ids {
        let files = trash::read(store, id)?.files;
        blobs.extend(files.iter().filter_map(|path| match layout::classify(path) {
            layout::Kind::Blob(digest) => Some(digest),
            _ => None,
        }));
    }
    Ok(blobs)
}

/// The transactions that a run purges by itself: what has been in the trash for `keep`, and no registry may rely on.
/// `look` is when the look began that found nothing of them in use.
pub(super) fn over_age(store: &dyn Store, options: &Options, look: &Now) -> Result<Vec<String>> {
    let (mut doomed, mut stay) = (Vec::new(), Vec::new());
    for transaction in trash::contents(store)? {
        let drain = options.gate.is_beside().then_some(options.drain);
        if transaction.kept_until(look, drain, options.keep) != Next::Due {
            continue;
        }
        match guard::is_remembered(&transaction, &options.gate) {
            Some(why) => stay.push(why),
            None => doomed.push(transaction.id),
        }
    }
    if let Some(why) = stay.first() {
        let what = error::count(stay.len(), "transaction");
        log::warn!("{what} of the trash older than keep, and what their undo needs, stay: {why}");
    }
    Ok(doomed)
}
