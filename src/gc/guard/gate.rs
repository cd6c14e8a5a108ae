//! Gate: whether a registry may still remember a blob that is about to go.
//!
//! A registry with a descriptor cache answers "exists" from memory, for ever, and without a call to the storage; an image
//! pushed on such an answer lacks the blob. So the bytes go only when nobody can give that answer any more.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::digest::Digest;
use crate::error::Result;
use crate::store::Store;

/// What is known of the registries that serve a store.
#[derive(Clone, Debug, PartialEq)]
pub enum Gate {
    /// None runs, or each refuses to be written to: a sweep may take all at once.
    Stopped,
    /// One may run and remembers nothing (`no cache` in its config.yml).
    Off,
    /// They can be asked, one by one, and told to forget.
    Probe(Probe),
    /// Nobody knows; with a cache, unless it is shown that there is none. Nothing is taken while one may run.
    Stop {
        /// Why, and what to do.
        why: String,
    },
}

/// What was said about registries when a run was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Said {
    /// Nothing.
    #[default]
    Nothing,
    /// That none runs.
    Stopped,
    /// The same, whatever this machine looks like.
    StoppedForSure,
}

/// The registries that can be asked.
#[derive(Clone)]
pub struct Probe(pub Arc<dyn Registries>);

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.name())
    }
}

impl PartialEq for Probe {
    fn eq(&self, other: &Probe) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// All registry processes that serve a store.
pub trait Registries: Send + Sync {
    /// What they are called.
    fn name(&self) -> String;

    /// Whether any of them says that the repository has the blob. An answer that is neither yes nor no is an error.
    fn remembers(&self, repository: &Path, digest: &Digest) -> Result<bool>;

    /// Tells each of them to forget that the repository has it, by a DELETE of the blob: that removes what it
    /// remembers first, then the link, if there is any.
    fn forget(&self, repository: &Path, digest: &Digest) -> Result<()>;

    /// Fails unless each of them is shown to write into this storage; `repository` is one that is there.
    fn verify(&self, store: &dyn Store, repository: &Path) -> Result<()>;
}

impl Gate {
    /// The word for it in reports.
    pub fn word(&self) -> &'static str {
        match self {
            Gate::Stopped => "stopped",
            Gate::Off => "off",
            Gate::Probe(_) => "probe",
            Gate::Stop { .. } => "stop",
        }
    }

    /// Whether a registry may be running.
    pub fn is_beside(&self) -> bool {
        *self != Gate::Stopped
    }

    /// What nobody said anything about.
    pub fn unknown() -> Gate {
        Gate::Stop { why: UNKNOWN.to_string() }
    }
}

/// Why nothing goes where nobody said anything.
pub const UNKNOWN: &str = "nothing tells whether a registry runs and what it remembers; give its config.yml as STORE, or its \
                           URL with --registry, or stop it and say registry-stopped";

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Gate::Stopped => f.write_str("no registry runs, or none can be written to"),
            Gate::Off => f.write_str("the registry remembers nothing (no cache.blobdescriptor)"),
            Gate::Probe(probe) => write!(f, "each registry is asked before a blob goes ({})", probe.0.name()),
            Gate::Stop { why } => write!(f, "waiting for the registry: {why}"),
        }
    }
}
