//! Whether what is about to be changed through the mount is ours to change: see [`crate::keeper`].

use std::ffi::OsStr;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{Engine, LOCK_WAIT, locked};
use crate::error::{Error, Result};
use crate::keeper::{Change, Keeper};
use crate::printable::Printable;
use crate::trash::Author;
use crate::view::node::Node;

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

    /// Fails where the whole view is read-only.
    pub(super) fn check_writable(&self) -> Result<()> {
        match self.settings.read_only {
            true => Err(Error::ReadOnly),
            false => Ok(()),
        }
    }

    /// The error of something that was refused before it began, with a line in `control/log` that says why. A name that is
    /// not there is no refusal.
    pub(super) fn refused(
        &self,
        author: &Author,
        action: &str,
        parent: Node,
        name: &OsStr,
        error: Error,
    ) -> Error {
        if !matches!(error, Error::NotFound { .. }) {
            let snapshot = self.snapshot();
            let directory = self.view(&snapshot).namespace(parent);
            let path =
                directory.map_or_else(|| name.into(), |path| Path::new("images").join(path).join(name));
            self.note(author, action, &path.printable().to_string(), &error.to_string());
        }
        error
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
