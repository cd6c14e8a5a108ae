//! Tells registries what they are to forget, behind whoever changed something: what `rm` took, and layer links without
//! bytes.
//!
//! A registry may not answer for seconds, so no lock is held while the first question is under way.

use std::path::{Path, PathBuf};
use std::sync::Weak;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::{Engine, LOCK_WAIT, locked};
use crate::digest::{Algorithm, Digest};
use crate::error::Result;
use crate::gc::forget;
use crate::gc::guard::gate::Registries;
use crate::keeper::Change;
use crate::layout;
use crate::printable::Printable;
use crate::trash::Author;
use crate::watch::Changes;

/// How often it is asked whether something is due.
const TICK: Duration = Duration::from_millis(500);

/// What registries are to forget.
#[derive(Clone)]
pub(super) enum Forget {
    /// A manifest of a repository, which was removed.
    Manifest(PathBuf, Digest),
    /// A layer link of a repository, if its bytes are nowhere.
    Dangling(PathBuf, Digest),
    /// The same after the drain: a request that wrote the link may make a registry remember it after that was told.
    DanglingAgain(PathBuf, Digest),
}

impl Engine {
    /// Makes registries forget links that came without bytes: whoever is told "exists" would push an image without them.
    pub(super) fn forget_dangling(&self, changes: &Changes) {
        if self.settings.read_only || self.keeper().allows(Change::Garbage).is_err() || self.is_retired() {
            return;
        }
        for (repository, digest) in &changes.links {
            // Where that can't be told, a sweep finds out.
            let is_missing = |path: &Path| matches!(self.store.stat(path), Ok(None));
            if digest.algorithm() == Algorithm::Sha256
                && is_missing(&layout::blob_data(digest))
                && !is_missing(&layout::layer_link(repository, digest))
            {
                self.forget(Forget::Dangling(repository.clone(), *digest));
            }
        }
    }

    /// Tells registries behind the caller what they are to forget.
    pub(super) fn forget(&self, what: Forget) {
        // Without a mount nobody is there to do it.
        let _ = self.forgetting.send(what);
    }

    fn tell(&self, registries: &dyn Registries, what: &Forget) -> Result<()> {
        match what {
            Forget::Manifest(repository, digest) => self.forget_manifest(registries, repository, digest),
            Forget::Dangling(repository, digest) => self.forget_link(registries, repository, digest),
            Forget::DanglingAgain(repository, digest) => {
                // Where it still is, nobody remembered it then.
                self.forget_link(registries, repository, digest)?;
                let link = layout::layer_link(repository, digest);
                let author = Author::current("regfs mount");
                forget::removed(&*self.store, registries, &author, repository, digest, &link)
            }
        }
    }

    fn forget_manifest(&self, registries: &dyn Registries, repository: &Path, digest: &Digest) -> Result<()> {
        let author = Author::current("regfs mount");
        let revision = layout::revision_link(repository, digest);
        // Only where a layer has the same bytes is there something to keep meanwhile.
        let has_link = self.store.stat(&layout::layer_link(repository, digest))?.is_some();
        let _lock = has_link.then(|| self.store.lock(&author.command, LOCK_WAIT)).transpose()?;
        forget::removed(&*self.store, registries, &author, repository, digest, &revision)
    }

    fn forget_link(&self, registries: &dyn Registries, repository: &Path, digest: &Digest) -> Result<()> {
        if !registries.remembers(repository, digest)? {
            return Ok(());
        }
        let author = Author::current("regfs mount");
        let _lock = self.store.lock(&author.command, LOCK_WAIT)?;
        if forget::dangling(&*self.store, registries, &author, self.settings.drain, repository, digest)? {
            let what = layout::layer_link(repository, digest);
            let why = "a registry remembered it, and its bytes are nowhere";
            self.note(&author, "forget", &what.to_string_lossy(), why);
        }
        Ok(())
    }

    /// Tells all of it; what can't be told is said, and stays in the trash, from where it comes back when it is used.
    fn tell_all(&self, all: &[Forget]) {
        let registries = match self.registries.rememberers() {
            Ok(Some(registries)) => registries,
            Ok(None) => return,
            Err(why) => return self.failed(&format!("no registry was told of what was removed: {why}")),
        };
        for what in all {
            if let Err(e) = self.tell(&registries, what) {
                let (Forget::Manifest(repository, digest)
                | Forget::Dangling(repository, digest)
                | Forget::DanglingAgain(repository, digest)) = what;
                self.failed(&format!(
                    "{}@{digest} is gone, and a registry may still remember it: {e}",
                    repository.printable()
                ));
            }
        }
    }
}

/// Tells registries what they are to forget, as long as there is an engine.
pub fn run(engine: &Weak<Engine>) {
    let receiver = engine.upgrade().and_then(|engine| locked(&engine.forgotten).take());
    if let Some(receiver) = receiver {
        forgetting(engine, &receiver);
    }
}

fn forgetting(engine: &Weak<Engine>, receiver: &Receiver<Forget>) {
    let mut later: Vec<(Instant, Forget)> = Vec::new();
    loop {
        let mut due: Vec<Forget> = match receiver.recv_timeout(TICK) {
            Ok(first) => std::iter::once(first).chain(receiver.try_iter()).collect(),
            Err(RecvTimeoutError::Timeout) => Vec::new(),
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let Some(engine) = engine.upgrade() else { return };
        let now = Instant::now();
        for what in &due {
            if let Forget::Dangling(repository, digest) = what {
                let again = Forget::DanglingAgain(repository.clone(), *digest);
                later.push((now + engine.settings.drain, again));
            }
        }
        due.extend(later.extract_if(.., |(at, _)| *at <= now).map(|(_, what)| what));
        if !due.is_empty() {
            engine.tell_all(&due);
        }
    }
}
