//! A mount that has lost its place: it was unmounted while somebody is inside, or another regfs has taken its place.
//!
//! It goes on serving, and gives back what is in use again, but sweeps no more: whoever took it away wants it to end, or
//! the one that came after it sweeps.

use std::path::Path;
use std::sync::atomic::Ordering;

use super::{Engine, locked};
use crate::advice::quoted;
use crate::error::Error;
use crate::layout;
use crate::printable::Printable;

impl Engine {
    /// Begins no sweep any more, and ends the one that runs after its current step.
    pub fn retire(&self, mountpoint: &Path) {
        self.is_retired.store(true, Ordering::SeqCst);
        self.run.watched.stop();
        locked(&self.reports).next_sweep = None;
        log::info!("{} is no longer ours: this regfs sweeps no more", mountpoint.printable());
    }

    pub(super) fn is_retired(&self) -> bool {
        self.is_retired.load(Ordering::SeqCst)
    }

    /// What somebody is told who is still inside.
    pub(super) fn sweeps_no_more(&self) -> Error {
        let full = self.store.full(Path::new(""));
        let store = quoted(layout::storage_root(&full));
        let why =
            format!("this mount was unmounted and sweeps no more; use the command line: regfs gc {store}");
        Error::Busy { why }
    }
}
