//! Gate: whether a registry may still remember a blob that is about to go.
//!
//! A registry with a descriptor cache answers "exists" from memory, for ever, and without a call to the storage; an image
//! pushed on such an answer lacks the blob. So the bytes go only when nobody can give that answer any more.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::catalog::intern::DigestId;
use crate::catalog::{Catalog, Repository};
use crate::digest::Digest;
use crate::error::Result;
use crate::layout;
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
    /// That none runs, and that the cache which outlives them was emptied since.
    Emptied,
    /// The same, whatever this machine looks like.
    EmptiedForSure,
}

impl Said {
    /// What the words registry-stopped, force and cache-emptied say.
    pub fn of(is_stopped: bool, is_sure: bool, is_emptied: bool) -> Said {
        match (is_stopped, is_sure, is_emptied) {
            (false, ..) => Said::Nothing,
            (true, false, false) => Said::Stopped,
            (true, true, false) => Said::StoppedForSure,
            (true, false, true) => Said::Emptied,
            (true, true, true) => Said::EmptiedForSure,
        }
    }

    /// Whether none runs, whatever this machine looks like.
    pub fn is_sure(self) -> bool {
        matches!(self, Said::StoppedForSure | Said::EmptiedForSure)
    }

    /// Whether what outlives registries was emptied.
    pub fn is_emptied(self) -> bool {
        matches!(self, Said::Emptied | Said::EmptiedForSure)
    }
}

/// Looks whether it is still true that no registry can write to a store.
pub trait Looks: Send + Sync {
    /// Looks again.
    ///
    /// # Errors
    /// One can, or that can't be told; what to do.
    fn look(&self) -> Result<()>;

    /// Whether it looks at all; not, where it was said that nothing of this machine matters.
    fn sees(&self) -> bool {
        true
    }

    /// What the last look relied on.
    fn relied_on(&self) -> String;

    /// What registries remember that outlives them, so that it has to be told to forget what goes.
    fn outliving(&self) -> Option<&dyn Registries> {
        None
    }
}

/// Who looks, again and again while a sweep goes on, whether no registry can write; nobody, where it was said that nothing
/// of this machine matters.
#[derive(Clone, Default)]
pub struct Witness(pub Option<Arc<dyn Looks>>);

impl fmt::Display for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(looks) => f.write_str(&looks.relied_on()),
            None => f.write_str("that was said with {+force}, so regfs did not look"),
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

    /// Whether each can be asked what it remembers of a blob in all repositories together, and told to forget that. Else
    /// manifests stay: 2.8 and 3.1 do not write those again that they remember.
    fn forgets_bytes(&self) -> bool {
        false
    }

    /// Whether any remembers a blob, in whatever repository or in none; `false` where nobody can be asked.
    fn remembers_bytes(&self, _digest: &Digest) -> Result<bool> {
        Ok(false)
    }

    /// Tells each that can be told to forget a blob in every repository.
    fn forget_bytes(&self, _digest: &Digest) -> Result<()> {
        Ok(())
    }

    /// Whether to forget removes the layer link, too.
    fn removes_links(&self) -> bool {
        true
    }
}

/// Several of them, of whatever kinds, as one.
pub struct All(pub Vec<Arc<dyn Registries>>);

impl All {
    /// Does something with each, also after one that fails; the first failure.
    fn each(&self, act: impl Fn(&dyn Registries) -> Result<()>) -> Result<()> {
        self.0.iter().map(|one| act(&**one)).fold(Ok(()), Result::and)
    }

    fn any(&self, ask: impl Fn(&dyn Registries) -> Result<bool>) -> Result<bool> {
        for one in &self.0 {
            if ask(&**one)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Registries for All {
    fn name(&self) -> String {
        self.0.iter().map(|one| one.name()).collect::<Vec<_>>().join(", ")
    }

    fn remembers(&self, repository: &Path, digest: &Digest) -> Result<bool> {
        self.any(|one| one.remembers(repository, digest))
    }

    fn forget(&self, repository: &Path, digest: &Digest) -> Result<()> {
        self.each(|one| one.forget(repository, digest))
    }

    fn verify(&self, store: &dyn Store, repository: &Path, witness: Option<&Digest>) -> Result<()> {
        self.0.iter().try_for_each(|one| one.verify(store, repository, witness))
    }

    fn forgets_bytes(&self) -> bool {
        self.0.iter().all(|one| one.forgets_bytes())
    }

    fn remembers_bytes(&self, digest: &Digest) -> Result<bool> {
        self.any(|one| one.remembers_bytes(digest))
    }

    fn forget_bytes(&self, digest: &Digest) -> Result<()> {
        self.each(|one| one.forget_bytes(digest))
    }

    fn removes_links(&self) -> bool {
        self.0.iter().any(|one| one.removes_links())
    }
}

impl Gate {
    /// No registry runs, and nobody needs to look again.
    pub const STOPPED: Gate = Gate::Stopped(Witness(None));

    /// Whether somebody looks again and again that no registry can write.
    pub(in crate::gc) fn has_witness(&self) -> bool {
        matches!(self, Gate::Stopped(Witness(Some(looks))) if looks.sees())
    }

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

    /// What has to be told to forget what goes although no registry runs.
    pub(in crate::gc) fn outliving(&self) -> Option<&dyn Registries> {
        match self {
            Gate::Stopped(Witness(Some(looks))) => looks.outliving(),
            _ => None,
        }
    }

    /// Whether there is anybody to ask.
    pub fn has_asked(&self) -> bool {
        matches!(self, Gate::Probe(_)) || self.outliving().is_some()
    }

    /// The same, if each registry that is to be asked is shown to serve this storage; otherwise one that takes nothing.
    ///
    /// # Errors
    /// No registry runs, and what outlives them is not shown to be theirs.
    pub(in crate::gc) fn verified(&self, store: &dyn Store, catalog: &Catalog) -> Result<Gate> {
        let registries = match self {
            Gate::Probe(probe) => Some(&*probe.0),
            _ => self.outliving(),
        };
        let Some(registries) = registries else { return Ok(self.clone()) };
        let Some((repository, witness)) = witness(store, catalog)? else { return Ok(self.clone()) };
        match registries.verify(store, &repository.name, witness.as_ref()) {
            Ok(()) => Ok(self.clone()),
            Err(e) if !self.is_beside() => Err(e),
            Err(e) => Ok(Gate::Stop { why: e.to_string() }),
        }
    }

    /// The gate of a run, and why it is refused: a dry run goes on all the same, and says so.
    pub fn of_run(gate: Result<Gate>, is_dry_run: bool) -> Result<(Gate, Option<String>)> {
        match gate {
            Err(e) if is_dry_run => Ok((Gate::Stop { why: e.to_string() }, Some(e.to_string()))),
            gate => Ok((gate?, None)),
        }
    }

    /// What nobody said anything about.
    pub fn unknown() -> Gate {
        Gate::Stop { why: UNKNOWN.to_string() }
    }
}

/// A repository, and a blob that it has, if any has one. One that has images is better: an upload in it changes nothing
/// about what is garbage.
fn witness<'a>(store: &dyn Store, catalog: &'a Catalog) -> Result<Option<(&'a Repository, Option<Digest>)>> {
    let valid = || catalog.repositories.values().filter(|r| r.is_valid).map(|r| &**r);
    for repository in valid() {
        let named = repository.revisions.iter().flat_map(|revision| catalog.closure(revision.target));
        let linked = |id: &DigestId| repository.layers.binary_search(id).is_ok() && catalog.has_blob(*id);
        if let Some(id) = named.into_iter().find(linked) {
            return Ok(Some((repository, Some(catalog.digest(id)))));
        }
    }
    for repository in valid() {
        for id in repository.layers.iter().filter(|id| catalog.has_blob(**id)) {
            let digest = catalog.digest(*id);
            // The directory may be all that is left.
            if store.stat(&layout::layer_link(&repository.name, &digest))?.is_some() {
                return Ok(Some((repository, Some(digest))));
            }
        }
    }
    Ok(valid().next().map(|repository| (repository, None)))
}

/// Why nothing goes where nobody said anything.
pub const UNKNOWN: &str = "nothing tells whether a registry runs and what it remembers; give its config.yml as STORE, or its \
                           URL with --registry, or stop it and add {+registry-stopped}";

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Gate::Stopped(witness) => write!(f, "stopped or read-only: {witness}"),
            Gate::Off => f.write_str("the registry remembers nothing (no cache.blobdescriptor)"),
            Gate::Probe(probe) => {
                write!(f, "each registry is asked before a blob goes ({})", probe.0.name().printable())
            }
            Gate::Stop { why } => write!(f, "held back: {}", why.printable()),
        }
    }
}
