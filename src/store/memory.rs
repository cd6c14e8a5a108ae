//! A store in memory: a flat map from key to bytes, as an object store is one.
//!
//! It has no directories (they are what keys have in common), no inodes and no second time. What works on
//! it works on an object store. Its clock is set by hand, so tests of ages need not sleep.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use super::{Entry, Kind, Reader, Space, Stat, Store};
use crate::clock::Reading;
use crate::error::{Error, Result};

/// A store in memory.
#[derive(Debug, Default)]
pub struct Memory {
    objects: Mutex<BTreeMap<PathBuf, Object>>,
    clock: Mutex<Option<SystemTime>>,
    clocks: Mutex<Option<Reading>>,
    lock: Arc<Mutex<Option<String>>>,
}

#[derive(Clone, Debug)]
struct Object {
    content: Arc<[u8]>,
    modified: SystemTime,
}

impl Object {
    fn stat(&self) -> Stat {
        let size = self.content.len() as u64;
        Stat { size, blocks: size.div_ceil(512), modified: self.modified, changed: self.modified, inode: 0 }
    }
}

/// A poisoned map is still a map: every change below is a single insert or remove.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Memory {
    /// Writes from now on carry this time.
    pub fn set_clock(&self, now: SystemTime) {
        *locked(&self.clock) = Some(now);
    }

    /// What the clocks of the machine say from now on; times of files are another thing, see [`set_clock`](Self::set_clock).
    pub fn set_clocks(&self, reading: Reading) {
        *locked(&self.clocks) = Some(reading);
    }

    /// Every key with its content.
    pub fn snapshot(&self) -> BTreeMap<PathBuf, Arc<[u8]>> {
        locked(&self.objects).iter().map(|(k, o)| (k.clone(), o.content.clone())).collect()
    }

    fn get(&self, path: &Path) -> Option<Object> {
        locked(&self.objects).get(path).cloned()
    }
}

impl Store for Memory {
    fn clocks(&self) -> Reading {
        locked(&self.clocks).clone().unwrap_or_else(Reading::take)
    }

    fn list(&self, prefix: &Path) -> Result<Option<Vec<Entry>>> {
        let objects = locked(&self.objects);
        let mut entries: Vec<Entry> = Vec::new();
        for key in objects.range(prefix.to_path_buf()..).map(|(k, _)| k) {
            let Ok(rest) = key.strip_prefix(prefix) else { break };
            let mut components = rest.components();
            let Some(first) = components.next() else { continue };
            let kind = if components.next().is_some() { Kind::Directory } else { Kind::File };
            let name = first.as_os_str().to_os_string();
            if entries.last().is_none_or(|last| last.name != name) {
                entries.push(Entry { name, kind });
            }
        }
        Ok((!entries.is_empty()).then_some(entries))
    }

    fn stat(&self, path: &Path) -> Result<Option<Stat>> {
        Ok(self.get(path).map(|o| o.stat()))
    }

    fn read(&self, path: &Path, limit: usize) -> Result<Option<(Vec<u8>, Stat)>> {
        match self.get(path) {
            Some(o) if o.content.len() > limit => Err(Error::TooLarge { path: path.to_path_buf(), limit }),
            Some(o) => Ok(Some((o.content.to_vec(), o.stat()))),
            None => Ok(None),
        }
    }

    fn open(&self, path: &Path) -> Result<Option<Box<dyn Reader>>> {
        Ok(self.get(path).map(|o| Box::new(MemoryFile(o.content)) as Box<dyn Reader>))
    }

    fn write(&self, path: &Path, content: &[u8]) -> Result<()> {
        // What regfs writes for itself has the true time.
        let set = locked(&self.clock).filter(|_| !path.starts_with(crate::layout::OWN));
        let modified = set.unwrap_or_else(|| self.clocks().kernel);
        locked(&self.objects).insert(path.to_path_buf(), Object { content: content.into(), modified });
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<bool> {
        let mut objects = locked(&self.objects);
        let below = |prefix: &Path, objects: &BTreeMap<PathBuf, Object>| -> Vec<PathBuf> {
            objects
                .range(prefix.to_path_buf()..)
                .map(|(k, _)| k)
                .take_while(|k| k.starts_with(prefix))
                .cloned()
                .collect()
        };
        if !below(to, &objects).is_empty() {
            return Err(Error::Exists { path: to.to_path_buf() });
        }
        let keys = below(from, &objects);
        for key in &keys {
            if let (Some(object), Ok(rest)) = (objects.remove(key), key.strip_prefix(from)) {
                let target = if rest.as_os_str().is_empty() { to.to_path_buf() } else { to.join(rest) };
                objects.insert(target, object);
            }
        }
        Ok(!keys.is_empty())
    }

    fn remove(&self, paths: &[PathBuf]) -> Vec<Error> {
        let mut objects = locked(&self.objects);
        for path in paths {
            objects.remove(path);
        }
        Vec::new()
    }

    fn prune(&self, _prefix: &Path) -> Result<()> {
        Ok(())
    }

    fn directory_changed(&self, _path: &Path) -> Result<Option<SystemTime>> {
        Ok(None)
    }

    fn remove_directory(&self, _path: &Path) -> Result<bool> {
        Ok(false)
    }

    fn make_directory(&self, _path: &Path) -> Result<()> {
        Ok(())
    }

    fn create(&self, path: &Path, content: &[u8]) -> Result<()> {
        match self.get(path) {
            Some(_) => Err(Error::Exists { path: path.to_path_buf() }),
            None => self.write(path, content),
        }
    }

    fn replace(&self, path: &Path, content: &[u8], saved: &Path) -> Result<()> {
        if let Some(old) = self.get(path) {
            locked(&self.objects).insert(saved.to_path_buf(), old);
        }
        self.write(path, content)
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn lock(&self, who: &str, _wait: Duration) -> Result<Box<dyn Send>> {
        let mut holder = locked(&self.lock);
        if let Some(other) = &*holder {
            return Err(Error::Busy { why: format!("the store is being changed by {other}") });
        }
        *holder = Some(who.to_string());
        Ok(Box::new(Unlock(self.lock.clone())))
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn space(&self) -> Result<Space> {
        Ok(Space { block_size: 4096, ..Space::default() })
    }

    fn full(&self, path: &Path) -> PathBuf {
        path.to_path_buf()
    }
}

struct Unlock(Arc<Mutex<Option<String>>>);

impl Drop for Unlock {
    fn drop(&mut self) {
        *locked(&self.0) = None;
    }
}

struct MemoryFile(Arc<[u8]>);

impl Reader for MemoryFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(self.0.len());
        let count = buffer.len().min(self.0.len() - start);
        buffer[..count].copy_from_slice(&self.0[start..start + count]);
        Ok(count)
    }

    fn file(&self) -> Option<&File> {
        None
    }
}
