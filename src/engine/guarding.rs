//! The guard: a registry that works in a bind mount of its storage is held where it opens the link of a manifest, until
//! everything that the manifest names is there.
//!
//! At that moment the registry has accepted the manifest and nobody can pull it yet. Without a guard, what a sweep has taken
//! in the same moment comes back milliseconds later.
//!
//! # Rules kept here
//! 1. Nothing is waited for while a registry is held: not the lock of the store, whose holder may be asking that very
//!    registry, nor the network.
//! 2. Whatever fails, the registry goes on; also when we don't answer at all ([`crate::watch::held`]).

use std::path::{Path, PathBuf};

use super::{Engine, locked};
use crate::catalog::{Catalog, Revision};
use crate::digest::Digest;
use crate::error::Result;
use crate::gc::named::{self, Needs};
use crate::layout;
use crate::printable::Printable;
use crate::store::read_link;
use crate::trash::Author;
use crate::watch::Changes;

/// What the guard has done, for `control/status`.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub(super) struct Guarded {
    /// Where a registry works, guarded.
    pub(super) directory: String,
    /// Files that were opened there.
    opens: u64,
    /// Those that were links of manifests, and were looked at.
    manifests: u64,
    /// Files that came back from the trash for them.
    restored: usize,
    /// Opens of manifests that went on before they were looked at, because regfs was stopped or did not answer.
    missed: u64,
    /// So many times nobody looked for a moment, because the guardian had to be started again.
    gaps: u64,
}

impl Engine {
    /// What is opened in `directory` will be asked about.
    pub fn guards(&self, directory: &Path) {
        let guarded = Guarded { directory: directory.to_string_lossy().into_owned(), ..Guarded::default() };
        *locked(&self.guarded) = Some(guarded);
    }

    /// Makes whole what the link of a manifest leads to, which process `pid` opens; `path` is below the registry directory.
    pub fn let_through(&self, path: &Path, pid: u32) {
        let revision = layout::opened_revision(path);
        let restored = revision.as_ref().map(|(repository, digest)| {
            self.report_restored(repository, digest, self.make_whole(repository, digest, pid))
        });
        if let Some(guarded) = locked(&self.guarded).as_mut() {
            guarded.manifests += u64::from(restored.is_some());
            guarded.restored += restored.unwrap_or(0);
        }
    }

    /// So many more files were opened, of which so many went on without being looked at.
    pub fn count_opens(&self, opens: u64, missed: u64) {
        if let Some(guarded) = locked(&self.guarded).as_mut() {
            guarded.opens += opens;
            guarded.missed += missed;
        }
    }

    /// Says that so many opens of manifests went on without being looked at.
    pub fn say_missed(&self, missed: u64) {
        if missed > 0 {
            let opens = if missed == 1 {
                "1 open of a manifest".to_string()
            } else {
                format!("{missed} opens of manifests")
            };
            self.failed(&format!(
                "regfs did not answer in time: {opens} in the guarded directory went on before it had looked; it looks now"
            ));
        }
    }

    /// For a moment nobody was held.
    pub fn count_gap(&self, why: &str) {
        if let Some(guarded) = locked(&self.guarded).as_mut() {
            guarded.gaps += 1;
        }
        self.failed(why);
    }

    /// Gives back what is needed by manifests and layer links that came since the last snapshot: at once, whoever has the
    /// lock of the store. A comparison with all of the trash follows.
    pub(super) fn make_new_ones_whole(&self, catalog: &Catalog, changes: &Changes) {
        if self.settings.read_only {
            return;
        }
        let before = self.current();
        for name in &changes.repositories {
            let [Some(new), old] = [catalog, &before.catalog].map(|c| c.repository(name)) else { continue };
            let is_new =
                |revision: &&Revision| old.and_then(|o| o.revision(revision.digest)) != Some(revision);
            for revision in new.revisions.iter().filter(is_new) {
                let digest = catalog.digest(revision.digest);
                self.report_restored(name, &digest, self.make_whole(name, &digest, std::process::id()));
            }
        }
        for (name, digest) in &changes.links {
            self.report_restored(name, digest, self.fetch_linked(name, digest));
        }
    }

    /// Gives back the bytes that a layer link leads to.
    fn fetch_linked(&self, repository: &Path, digest: &Digest) -> Result<usize> {
        let link = layout::layer_link(repository, digest);
        let Some(stored) = read_link(&*self.store, &link)? else { return Ok(0) };
        self.fetch(&[layout::blob_data(&stored)], std::process::id(), "a link to it was written")
    }

    fn report_restored(&self, repository: &Path, digest: &Digest, restored: Result<usize>) -> usize {
        restored.unwrap_or_else(|e| {
            self.failed(&format!("could not give back what {}@{digest} needs: {e}", repository.printable()));
            0
        })
    }

    fn fetch(&self, paths: &[PathBuf], pid: u32, why: &str) -> Result<usize> {
        let restored = named::fetch(&*self.store, paths, &|| self.may_fetch_links())?;
        let author = Author { pid, ..Author::current("regfs mount") };
        for path in &restored {
            self.note(&author, "give back", &path.to_string_lossy(), why);
        }
        Ok(restored.len())
    }

    fn make_whole(&self, repository: &Path, digest: &Digest, pid: u32) -> Result<usize> {
        let needs = Needs::of(&*self.store, repository, digest)?;
        self.named.add(needs.digests.iter().copied());
        self.fetch(&needs.paths, pid, "a manifest names it")
    }

    /// Whether links that a sweep has moved may come back although it still goes on: it tells no registry to forget them.
    fn may_fetch_links(&self) -> bool {
        // With the lock, nobody sweeps.
        self.run.tells_nobody() || self.store.lock("regfs mount", std::time::Duration::ZERO).is_ok()
    }
}
