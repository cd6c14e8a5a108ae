//! Whether what is about to be changed through the mount is ours to change: see [`crate::keeper`].

use std::time::{Duration, Instant};

use super::{Engine, LOCK_WAIT, locked};
use crate::error::Result;
use crate::keeper::{Change, Keeper};
use crate::trash::Author;

/// How long what configurations say is believed; lock files are looked at each time.
const FRESH: Duration = Duration::from_secs(5);

impl Engine {
    /// Who keeps the tags of this storage, as far as configurations say.
    pub(super) fn keeper(&self) -> Keeper {
        let mut known = locked(&self.keeper);
        match &*known {
            Some((at, keeper)) if at.elapsed() < FRESH => keeper.clone(),
            _ => {
                let keeper = self.registries.keeper();
                *known = Some((Instant::now(), keeper.clone()));
                keeper
            }
        }
    }

    /// Takes the lock of the store to change tags, manifests, uploads or repositories.
    ///
    /// # Errors
    /// Somebody else keeps them, or changes the store.
    pub(super) fn lock_for_change(&self, author: &Author) -> Result<Box<dyn Send>> {
        let keeper = self.keeper();
        keeper.allows(Change::Tags)?;
        let lock = self.store.lock(&author.command, LOCK_WAIT)?;
        // A registry may have been migrated while we waited.
        keeper.allows(Change::Tags)?;
        Ok(lock)
    }
}
