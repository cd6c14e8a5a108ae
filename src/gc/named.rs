//! Named: what a push is about to name, so that a sweep of the same process leaves it; and how that comes back while
//! somebody else has the lock of the store.
//!
//! Whoever holds a registry where it opens the link of a manifest knows, before anybody can pull it, what that needs.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result};
use crate::layout::{self, Kind};
use crate::manifest::{self, MAX_SIZE};
use crate::store::Store;
use crate::trash;
use crate::trash::stage::{Stage, Step};

/// A look of a sweep that begins so long after the push was let go on finds its manifest by itself.
const LASTS: Duration = Duration::from_secs(3600);

/// What pushes are about to name.
#[derive(Clone, Debug, Default)]
pub struct Named(Arc<Mutex<HashMap<Digest, Instant>>>);

impl PartialEq for Named {
    fn eq(&self, other: &Named) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Named {
    /// A push is about to name these. Call it before looking where they are.
    pub fn add(&self, digests: impl Iterator<Item = Digest>) {
        let now = Instant::now();
        let mut named = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        named.retain(|_, at| now.duration_since(*at) < LASTS);
        named.extend(digests.map(|digest| (digest, now)));
    }

    /// Whether a push may be about to name it. Ask after it was moved.
    pub fn contains(&self, digest: &Digest) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(digest)
    }
}

/// What a manifest needs in a repository in order to be served.
#[derive(Debug, Default)]
pub struct Needs {
    /// Bytes and links, each after what it leads to.
    pub paths: Vec<PathBuf>,
    /// The manifest and everything below it.
    pub digests: Vec<Digest>,
}

impl Needs {
    /// Of a manifest whose bytes are in the store or in the trash; what can't be read needs nothing.
    ///
    /// # Cost
    /// A read for each manifest.
    pub fn of(store: &dyn Store, repository: &Path, manifest: &Digest) -> Result<Needs> {
        let mut needs = Needs::default();
        let mut seen: HashSet<Digest> = [*manifest].into();
        let mut manifests = vec![*manifest];
        while let Some(digest) = manifests.pop() {
            needs.digests.push(digest);
            needs.paths.push(layout::blob_data(&digest));
            let Some(bytes) = read_anywhere(store, &layout::blob_data(&digest), MAX_SIZE)? else { continue };
            let Ok(parsed) = manifest::parse(&bytes) else { continue };
            for child in parsed.children.iter().map(|child| child.digest).filter(|child| seen.insert(*child))
            {
                needs.paths.push(layout::revision_link(repository, &child));
                manifests.push(child);
            }
            let blobs = parsed.config.iter().chain(&parsed.layers).map(|blob| blob.digest);
            for blob in blobs.chain(parsed.others.iter().copied()).filter(|blob| seen.insert(*blob)) {
                needs.blob(store, repository, blob)?;
            }
        }
        needs.paths.sort_by_key(|path| trash::order_of_return(path));
        Ok(needs)
    }

    fn blob(&mut self, store: &dyn Store, repository: &Path, digest: Digest) -> Result<()> {
        let link = layout::layer_link(repository, &digest);
        let stored = match digest.algorithm() {
            Algorithm::Sha256 => Some(digest),
            // A layer may be known by another digest than that of its bytes; its link tells.
            _ => read_anywhere(store, &link, layout::LINK_LIMIT)?
                .and_then(|text| layout::parse_link(&text).ok()),
        };
        for digest in [Some(digest), stored.filter(|stored| *stored != digest)].into_iter().flatten() {
            self.digests.push(digest);
            self.paths.push(layout::blob_data(&digest));
        }
        self.paths.push(link);
        Ok(())
    }
}

/// Reads a file where it belongs, or else in the trash.
fn read_anywhere(store: &dyn Store, path: &Path, limit: usize) -> Result<Option<Vec<u8>>> {
    let read = |path: &Path| match store.read(path, limit) {
        Ok(content) => Ok(content.map(|(bytes, _)| bytes)),
        Err(e) if e.is_damage() => Ok(None),
        Err(e) => Err(e),
    };
    if let Some(bytes) = read(path)? {
        return Ok(Some(bytes));
    }
    for id in trash::ids(store)? {
        if let Some(bytes) = read(&layout::transaction(&id).join(path))? {
            return Ok(Some(bytes));
        }
    }
    Ok(None)
}

/// Moves back from the trash what of `paths` is not in the store, without the lock of the store; what came back.
///
/// Whoever has that lock may be sweeping. `with_links`: whether links that a sweep has moved, and whose bytes are still in
/// the store, may come back, too. Not while the sweep tells registries to forget them: a DELETE would remove the link for
/// good, and what the trash holds comes back later.
pub fn fetch(store: &dyn Store, paths: &[PathBuf], with_links: &dyn Fn() -> bool) -> Result<Vec<PathBuf>> {
    let mut fetched = Vec::new();
    for path in paths {
        match store.stat(path) {
            Ok(None) => {}
            // What stands there is not ours to judge.
            Ok(Some(_)) => continue,
            Err(e) if e.is_damage() => continue,
            Err(e) => return Err(e),
        }
        let is_link = matches!(layout::classify(path), Kind::LayerLink(..));
        for id in trash::ids(store)?.iter().rev() {
            let place = layout::transaction(id).join(path);
            if !matches!(store.stat(&place), Ok(Some(_)))
                || is_link && is_in_progress(store, id)? && !with_links()
            {
                continue;
            }
            match store.rename(&place, path) {
                Ok(true) => {
                    fetched.push(path.clone());
                    break;
                }
                Ok(false) => {}
                // A push has written it.
                Err(Error::Exists { .. }) => break,
                Err(e) => return Err(e),
            }
        }
    }
    Ok(fetched)
}

/// Whether a sweep beside a registry has not yet come to its end.
fn is_in_progress(store: &dyn Store, id: &str) -> Result<bool> {
    Ok(match Stage::read(store, id)? {
        Some(Ok(stage)) => stage.step() != Step::Quarantined,
        Some(Err(_)) => true,
        None => false,
    })
}
