//! Gate: whether a registry may still remember a blob that is about to go.
//!
//! A registry with a descriptor cache answers "exists" from memory, for ever, and without a call to the storage; an image
//! pushed on such an answer lacks the blob. So the bytes go only when nobody can give that answer any more.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::catalog::Catalog;
use crate::catalog::intern::DigestId;
use crate::digest::Digest;
use crate::error::Result;
use crate::printable::Printable;
use crate::store::Store;

/// What is known of the registries that serve a store.
#[derive(Clone, Debug, PartialEq)]
pub enum Gate {
    /// None runs, or each refuses to be written to: a sweep may take all at once, as long as the witness says so.
    Stopped(Witness),
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

impl Said {
    /// What the words registry-stopped and force say.
    pub fn of(is_stopped: bool, is_sure: bool) -> Said {
        match (is_stopped, is_sure) {
            (false, _) => Said::Nothing,
            (true, false) => Said::Stopped,
            (true, true) => Said::StoppedForSure,
        }
    }
}

/// Looks whether it is still true that no registry can write to a store.
pub trait Looks: Send + Sync {
    /// Looks again.
    ///
    /// # Errors
    /// One can, or that can't be told; what to do.
    fn look(&self) -> Result<()>;

    /// What the last look relied on.
    fn relied_on(&self) -> String;
}

/// Who looks, again and again while a sweep goes on, whether no registry can write; nobody, where it was said that nothing
/// of this machine matters.
#[derive(Clone, Default)]
pub struct Witness(pub Option<Arc<dyn Looks>>);

impl fmt::Display for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(looks) => f.write_str(&looks.relied_on()),
            None => f.write_str("it was said so, and nobody looked"),
        }
    }
}

impl fmt::Debug for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// What a gate lets through is the same, whoever looks.
impl PartialEq for Witness {
    fn eq(&self, _other: &Witness) -> bool {
        true
    }
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

    /// Fails unless each of them is shown to write into this storage; `repository` is one that is there, and `witness` a
    /// blob that it has.
    fn verify(&self, store: &dyn Store, repository: &Path, witness: Option<&Digest>) -> Result<()>;
}

impl Gate {
    /// No registry runs, and nobody needs to look again.
    pub const STOPPED: Gate = Gate::Stopped(Witness(None));

    /// Looks again where no registry can write, so that everything goes at once.
    ///
    /// # Errors
    /// It is not so any more, or that can't be told; what to do.
    pub(in crate::gc) fn look_again(&self) -> Result<()> {
        match self {
            Gate::Stopped(Witness(Some(looks))) => looks.look(),
            _ => Ok(()),
        }
    }

    /// The word for it in reports.
    pub fn word(&self) -> &'static str {
        match self {
            Gate::Stopped(_) => "stopped",
            Gate::Off => "off",
            Gate::Probe(_) => "probe",
            Gate::Stop { .. } => "stop",
        }
    }

    /// Whether a registry may be running.
    pub fn is_beside(&self) -> bool {
        !matches!(self, Gate::Stopped(_))
    }

    /// The same, if each registry that is to be asked is shown to serve this storage; otherwise one that takes nothing.
    pub(in crate::gc) fn verified(&self, store: &dyn Store, catalog: &Catalog) -> Gate {
        let Gate::Probe(probe) = self else { return self.clone() };
        // One that has images: an upload in it changes nothing about what is garbage.
        let valid = || catalog.repositories.values().filter(|r| r.is_valid);
        let Some(repository) = valid().find(|r| !r.revisions.is_empty()).or_else(|| valid().next()) else {
            return self.clone();
        };
        let named = repository.revisions.iter().flat_map(|revision| catalog.closure(revision.target));
        let linked = |id: &DigestId| repository.layers.binary_search(id).is_ok() && catalog.has_blob(*id);
        let witness = named.into_iter().find(linked).map(|id| catalog.digest(id));
        match probe.0.verify(store, &repository.name, witness.as_ref()) {
            Ok(()) => self.clone(),
            Err(e) => Gate::Stop { why: e.to_string() },
        }
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
            Gate::Stopped(witness) => write!(f, "no registry runs, or none can be written to ({witness})"),
            Gate::Off => f.write_str("the registry remembers nothing (no cache.blobdescriptor)"),
            Gate::Probe(probe) => {
                write!(f, "each registry is asked before a blob goes ({})", probe.0.name().printable())
            }
            Gate::Stop { why } => write!(f, "held back: {}", why.printable()),
        }
    }
}
