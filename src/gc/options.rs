//! What a run is asked to do, and what that means beside a registry.

use std::time::Duration;

use super::guard::DEFAULT_DRAIN;
use super::guard::gate::Gate;
use super::named::Named;
use crate::catalog::cache::Place;
use crate::error::{Error, Result};
use crate::keeper::{Change, Keeper};

/// What a run is asked to do.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Say what would be done, change nothing.
    pub dry_run: bool,
    /// Collect revisions that no tag leads to, too.
    pub untagged: bool,
    /// Only those pushed longer ago than this; the grace period counts as well.
    pub untagged_for: Duration,
    /// Collect in the repositories whose names match, and leave the others as they are; `None` is all.
    pub repositories: Option<glob::Pattern>,
    /// Uploads that began longer ago than this are stale.
    pub uploads: Duration,
    /// Collect signatures and the like whose image is gone.
    pub orphans: bool,
    /// Make whole what is broken, as far as its place tells what belongs there.
    pub repair: bool,
    /// Look into every directory; a sweep of a small store always does.
    pub thorough: bool,
    /// Damage no longer keeps what it might hold: only what can be read counts.
    pub ignore_damaged: bool,
    /// What was used more recently than this is left.
    pub grace: Duration,
    /// How long the trash keeps what was taken.
    pub keep: Duration,
    /// Free the bytes at once, for a registry that is stopped or read-only.
    pub now: bool,
    /// Remove also more than half of all manifests.
    pub allow_large: bool,
    /// Who keeps the tags and manifests.
    pub keeper: Keeper,
    /// Why a sweep would not even begin, as the caller found out before a dry run.
    pub refusal: Option<String>,
    /// What is known of the registries that may be running.
    pub gate: Gate,
    /// How long a request to one of them may be under way.
    pub drain: Duration,
    /// What pushes are about to name, as far as this process knows.
    pub named: Named,
    /// At most so many calls to the storage in a second; `None` is as many as it takes.
    pub rate: Option<u32>,
    /// In a dry run, don't read tags: what only a tag names whose manifest was deleted is counted, although a sweep
    /// leaves it.
    pub quick: bool,
    /// Where parsed manifests are kept; nowhere if not given. A dry run writes nothing inside the store.
    pub cache: Option<Place>,
}

/// Youngest age that is touched, unless told otherwise.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(24 * 3600);
/// How long the trash keeps things, unless told otherwise.
pub const DEFAULT_KEEP: Duration = Duration::from_secs(7 * 24 * 3600);
/// How old an upload must be to count as stale, unless told otherwise; the registry's own purging says the same.
pub const DEFAULT_UPLOADS: Duration = Duration::from_secs(7 * 24 * 3600);

impl Default for Options {
    fn default() -> Options {
        Options {
            dry_run: false,
            untagged: false,
            untagged_for: Duration::ZERO,
            repositories: None,
            uploads: DEFAULT_UPLOADS,
            orphans: false,
            repair: false,
            thorough: false,
            ignore_damaged: false,
            grace: DEFAULT_GRACE,
            keep: DEFAULT_KEEP,
            now: false,
            allow_large: false,
            refusal: None,
            keeper: Keeper::default(),
            gate: Gate::unknown(),
            drain: DEFAULT_DRAIN,
            named: Named::default(),
            rate: None,
            quick: false,
            cache: None,
        }
    }
}

impl Options {
    /// What a sweep changes, beyond what nothing leads to.
    pub(super) fn change(&self) -> Change {
        match self.untagged || self.orphans {
            true => Change::Tags,
            false => Change::Garbage,
        }
    }

    /// Fails where a sweep with these options is refused, whatever there is to take.
    pub(super) fn check(&self) -> Result<()> {
        self.keeper.allows(self.change())?;
        if let Some(why) = &self.refusal {
            return Err(Error::invalid(why));
        }
        match self.now && self.gate.is_beside() {
            true => Err(Error::invalid(format!(
                "{{+now}} frees the bytes at once, which loses images unless no registry runs or each is read-only: stop it \
                 and add {{+registry-stopped}}, or leave out {{+now}} ({})",
                self.gate
            ))),
            false => Ok(()),
        }
    }

    /// As they are meant beside a registry: nothing is younger than a request that is under way.
    pub(crate) fn settled(&self) -> Options {
        if !self.gate.is_beside() {
            return self.clone();
        }
        let [grace, keep, uploads] = [self.grace, self.keep, self.uploads].map(|time| time.max(self.drain));
        Options { grace, keep, uploads, ..self.clone() }
    }
}

/// The priority of a run beside a registry (nice(2)).
const LEAST_PRIORITY: i32 = 19;

/// Gives this thread, and those that it starts, the least priority if a registry may be running: its clients come first.
pub fn yield_to_clients(options: &Options) {
    if options.gate.is_beside()
        && let Err(e) = rustix::process::setpriority_process(None, LEAST_PRIORITY)
    {
        log::debug!("could not lower the priority of the collection: {e}");
    }
}
