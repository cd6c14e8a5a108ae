//! Garbage collection: `list → mark → plan → re-check → take → (keep) → purge`, each its own function.
//!
//! [`run`] is the one way a collection happens, from the command line and from the control file alike.
//!
//! # Rules kept here
//! 1. Unknown means reachable; a failing call ends the run before the first change ([`crate::catalog`]).
//! 2. Every decision is in the [`plan::Plan`], a value; a dry run prints it, a sweep executes the same.
//! 3. The first look needs no lock, and beside a registry takes its time ([`crate::store::paced`]). Before anything is
//!    taken the store is looked at again, with the lock, and what is no longer garbage is left; after it once
//!    more, and what a push relies on by then is given back before anything is purged.
//! 4. Taking is moving to the trash, in the order tag → revision → layer link → blob with a sync between the steps,
//!    so that the registry is valid at every instant; then the rest of the leftovers. Only a purge removes bytes; a
//!    sweep itself removes nothing but directories with nothing in them.
//! 5. What a manifest names again is given back before anything else ([`mod@give_back`]).
//! 6. Unless it is said that no registry runs, blobs go in steps, a run for each ([`guard`]).

pub mod brake;
mod collect;
mod foresee;
pub mod forget;
pub mod give_back;
pub mod guard;
pub mod leftovers;
pub mod mark;
pub mod named;
mod options;
mod orphans;
pub mod plan;
mod purge;
pub mod repair;
pub mod report;
mod room;
mod still;
pub mod sweep;
pub mod why;

use std::num::NonZeroUsize;
use std::time::Duration;

use crate::catalog::Tables;
use crate::error::Result;
pub use crate::progress::{Progress, Unwatched};
use crate::store::Store;
use crate::store::paced::Paced;
use crate::trash::undo::Undone;
use crate::trash::{self, Author};
use collect::Collection;
pub use options::{DEFAULT_GRACE, DEFAULT_KEEP, DEFAULT_UPLOADS, Options, yield_to_clients};
pub use purge::purge_trash;
use report::Report;

/// How long a run waits for another regfs that changes the store.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// Collects the garbage of a store, or says what there is.
///
/// # Errors
/// Everything up to the first change: [`crate::error::Error::Unjudged`] with all that can't be judged, [`crate::error::Error::Busy`] when
/// another regfs changes the store, failing calls. After it, failures are listed in the report.
pub fn run(
    store: &dyn Store,
    tables: &Tables,
    options: &Options,
    author: &Author,
    progress: &dyn Progress,
) -> Result<Report> {
    let limited = options.rate.map(|rate| Paced::at_rate(store, rate, progress));
    let store: &dyn Store = limited.as_ref().map_or(store, |limited| limited);
    // Clients of the registry come first.
    let is_patient = options.gate.is_beside() && !options.dry_run && tables.is_patient;
    let tables = match is_patient {
        true => Tables { threads: NonZeroUsize::MIN, ..tables.clone() },
        false => Tables { is_patient, ..tables.clone() },
    };
    Collection::begin(store, &tables, options, author, progress)?.run()
}

/// Gives back a transaction of the trash and what it names.
pub fn undo(store: &dyn Store, author: &Author, id: &str) -> Result<Undone> {
    let _lock = store.lock(&author.command, LOCK_WAIT)?;
    trash::undo::undo(store, id)
}
