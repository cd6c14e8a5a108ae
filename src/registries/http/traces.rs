//! What a probe leaves in the storage, and how it is removed, also after a crash.
//!
//! A probe begins an upload, of which only the registry chooses the name. So `.regfs/probes/<pid>-<number>` says, before,
//! that one begins and which uploads there are, and after, what it is called. The next probe removes what a dead one left.
//!
//! # Rules kept here
//! 1. Only an upload without a byte goes. Whoever began it for a push loses nothing but the beginning.
//! 2. One whose name was not learnt any more must have begun while it was asked for, and be at rest for a minute.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::TIMEOUT;
use crate::digest::Algorithm;
use crate::error::Result;
use crate::layout;
use crate::store::{Kind, Store};

const PROBES: &str = ".regfs/probes";
/// A probe that began so long ago is over, whoever has its number now.
const OVER: Duration = Duration::from_secs(60);
/// How much of a clock's grain or of a difference between two clocks is not held against an upload.
const SLACK: Duration = Duration::from_secs(2);
/// Of a file of ours.
const LIMIT: usize = 1 << 20;

/// A probe that is under way.
#[derive(Serialize, Deserialize)]
pub(super) struct Trace {
    #[serde(skip)]
    path: PathBuf,
    began: SystemTime,
    repository: PathBuf,
    /// Uploads that were there before.
    before: Vec<String>,
    /// The one that was begun.
    upload: Option<String>,
}

impl Trace {
    /// Notes that an upload is about to begin in a repository.
    pub(super) fn begin(store: &dyn Store, repository: &Path) -> Result<Trace> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("{}-{}", std::process::id(), NUMBER.fetch_add(1, Relaxed));
        let trace = Trace {
            path: Path::new(PROBES).join(name),
            began: SystemTime::now(),
            repository: repository.to_path_buf(),
            before: uploads(store, repository)?,
            upload: None,
        };
        trace.write(store)?;
        Ok(trace)
    }

    /// Notes what the upload is called.
    pub(super) fn found(&mut self, store: &dyn Store, upload: &str) -> Result<()> {
        self.upload = Some(upload.to_string());
        self.write(store)
    }

    /// Removes what is left of the upload, and the note.
    pub(super) fn end(self, store: &dyn Store) -> Result<()> {
        if let Some(upload) = &self.upload {
            tidy(store, &self.repository, upload)?;
        }
        self.forget(store)
    }

    fn write(&self, store: &dyn Store) -> Result<()> {
        // Whoever may not write here may look at a plan all the same.
        if !store.is_writable() {
            return Ok(());
        }
        let json = serde_json::to_vec(self).unwrap_or_default();
        store.write(&self.path, &json)
    }

    fn forget(&self, store: &dyn Store) -> Result<()> {
        if !store.is_writable() {
            return Ok(());
        }
        store.remove(std::slice::from_ref(&self.path)).into_iter().next().map_or(Ok(()), Err)?;
        store.remove_directory(Path::new(PROBES)).map(drop)
    }

    /// Whether its process may be at it still.
    fn is_under_way(&self) -> bool {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let pid = name.split('-').next().unwrap_or_default();
        let is_alive = pid.parse::<u32>().is_ok() && Path::new("/proc").join(pid).exists();
        is_alive && self.began.elapsed().is_ok_and(|age| age < OVER)
    }

    /// Uploads that can only be the one that was begun, and whether more of them may be found later.
    fn left(&self, store: &dyn Store) -> Result<(Vec<String>, bool)> {
        if let Some(upload) = &self.upload {
            return Ok((vec![upload.clone()], false));
        }
        let mut left = Vec::new();
        for upload in uploads(store, &self.repository)? {
            let Some(stat) = store.stat(&layout::upload_started_at(&self.repository, upload.as_ref()))?
            else {
                continue;
            };
            let is_of_then = match stat.modified.duration_since(self.began) {
                Ok(after) => after <= TIMEOUT + SLACK,
                Err(before) => before.duration() <= SLACK,
            };
            let is_at_rest = stat.modified.elapsed().is_ok_and(|age| age >= OVER);
            if !self.before.contains(&upload) && is_of_then && is_at_rest {
                left.push(upload);
            }
        }
        Ok((left, self.began.elapsed().is_ok_and(|age| age < OVER + TIMEOUT + SLACK)))
    }
}

/// Removes what interrupted probes left.
pub(super) fn settle(store: &dyn Store) -> Result<()> {
    if !store.is_writable() {
        return Ok(());
    }
    for entry in store.list(Path::new(PROBES))?.unwrap_or_default() {
        let path = Path::new(PROBES).join(entry.name);
        let content = store.read(&path, LIMIT)?.map(|(content, _)| content).unwrap_or_default();
        let Ok(read) = serde_json::from_slice::<Trace>(&content) else {
            // Cut off by a crash before anything was begun.
            store.remove(&[path]).into_iter().next().map_or(Ok(()), Err)?;
            continue;
        };
        let trace = Trace { path, ..read };
        if trace.is_under_way() || !layout::is_name(&trace.repository) {
            continue;
        }
        let (left, is_open) = trace.left(store)?;
        left.iter().try_for_each(|upload| tidy(store, &trace.repository, upload))?;
        if !is_open {
            trace.forget(store)?;
        }
    }
    Ok(())
}

/// The uploads of a repository, as far as a registry gave them their names.
fn uploads(store: &dyn Store, repository: &Path) -> Result<Vec<String>> {
    let entries = store.list(&layout::uploads(repository))?.unwrap_or_default();
    let directories = entries.into_iter().filter(|entry| entry.kind == Kind::Directory);
    Ok(directories.filter_map(|entry| entry.name.into_string().ok()).filter(|name| is_upload(name)).collect())
}

/// Whether a registry may have given an upload that name, and it leads nowhere else.
pub(super) fn is_upload(name: &str) -> bool {
    (1..=128).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_=".contains(&byte))
}

/// Removes what is left of an upload that has no bytes: 2.8 leaves the state of the hash and the directories.
fn tidy(store: &dyn Store, repository: &Path, upload: &str) -> Result<()> {
    let data = layout::upload_data(repository, upload.as_ref());
    if !is_upload(upload) || store.stat(&data)?.is_some_and(|stat| stat.size > 0) {
        return Ok(());
    }
    let state = layout::upload_hash_state(repository, upload.as_ref(), Algorithm::Sha256, 0);
    let files = [state, data, layout::upload_started_at(repository, upload.as_ref())];
    store.remove(&files).into_iter().next().map_or(Ok(()), Err)?;
    store.prune(&layout::upload_dir(repository, upload.as_ref()))
}
