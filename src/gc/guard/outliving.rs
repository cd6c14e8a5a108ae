//! A memory that outlives its registry, as one in redis does: what it is told, and when.
//!
//! While no registry runs, nobody makes it remember anything anew. So it is told to forget what goes right before that goes.
//! Beside a registry it is told and asked like any other ([`super::quarantine`]), and once more before the purge: a registry
//! that is killed in the push of a manifest leaves an entry and no link, and whoever pushes that manifest next would write no
//! bytes.

use std::path::Path;

use super::gate::{Gate, Registries};
use crate::catalog::Catalog;
use crate::clock::Clock;
use crate::error::Result;
use crate::gc::plan::{Item, What};
use crate::layout::{self, Kind};
use crate::store::Store;
use crate::trash::{self, Contents};

/// Tells it to forget all of `items`, which are to go while no registry runs.
pub(in crate::gc) fn tell(gate: &Gate, catalog: &Catalog, items: &[Item]) -> Result<()> {
    let Some(registries) = gate.outliving() else { return Ok(()) };
    for item in items {
        match item.what {
            What::Blob(id) => registries.forget_bytes(&catalog.digest(id))?,
            What::Revision(name, id) | What::LayerLink(name, id) => {
                registries.forget(Path::new(&*catalog.name(name)), &catalog.digest(id))?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Which of `doomed` may be purged, now that nobody remembers what they hold. What was remembered is forgotten, and waits
/// for one more drain.
pub(in crate::gc) fn purgeable(store: &dyn Store, gate: &Gate, doomed: Vec<String>) -> Result<Vec<String>> {
    let mut purgeable = Vec::new();
    for id in doomed {
        let transaction = trash::read(store, &id)?;
        if let Some(registries) = gate.outliving() {
            tell_of(registries, &transaction)?;
        }
        let is_remembered = match gate {
            Gate::Probe(probe) => forget_again(store, &*probe.0, &transaction)?,
            _ => false,
        };
        if !is_remembered {
            purgeable.push(id);
        }
    }
    Ok(purgeable)
}

/// Tells of all that a transaction holds.
fn tell_of(registries: &dyn Registries, transaction: &Contents) -> Result<()> {
    transaction.files.iter().try_for_each(|path| match layout::classify(path) {
        Kind::Blob(digest) => registries.forget_bytes(&digest),
        Kind::Revision(repository, digest) | Kind::LayerLink(repository, digest) => {
            registries.forget(&repository, &digest)
        }
        _ => Ok(()),
    })
}

/// Whether the bytes of a sweep were remembered; then they are no more, and the drain begins anew.
fn forget_again(store: &dyn Store, registries: &dyn Registries, transaction: &Contents) -> Result<bool> {
    let Some(Ok(stage)) = &transaction.stage else { return Ok(false) };
    let mut is_remembered = false;
    for path in &transaction.files {
        if let Kind::Blob(digest) = layout::classify(path)
            && registries.remembers_bytes(&digest)?
        {
            is_remembered = true;
            registries.forget_bytes(&digest)?;
        }
    }
    if is_remembered {
        let stage = crate::trash::stage::Stage {
            quarantined_at: Some(Clock::open(store)?.now(store).moment),
            ..stage.clone()
        };
        stage.write(store, &transaction.id)?;
    }
    Ok(is_remembered)
}
