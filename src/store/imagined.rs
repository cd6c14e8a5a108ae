//! A storage in which changes are only imagined: what is moved, written or removed shows here, and nowhere else.
//!
//! A dry run gives back, goes on with earlier sweeps and purges in one of these, so it decides by the very code that a sweep
//! does, and changes nothing.
//!
//! # Cost
//! Memory for each imagined change, and none for the rest. Calls go to the storage as they are while nothing has been
//! imagined.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, SystemTime};

use super::{Directory, Entry, Kind, Prefix, Reader, Space, Stat, Store};
use crate::clock::Reading;
use crate::error::{Error, Result};

/// See the module.
pub struct Imagined<'a> {
    inner: &'a dyn Store,
    changes: RwLock<BTreeMap<PathBuf, Change>>,
}

/// What became of a path, and of all below it that has no change of its own.
#[derive(Clone)]
enum Change {
    /// It is not there any more.
    Gone,
    /// It is what the storage has at another path.
    Moved(PathBuf, Kind),
    /// It was written.
    Written(Vec<u8>, SystemTime),
}

/// What a path means.
enum Place {
    Nowhere,
    /// In the storage, there.
    Stored(PathBuf),
    Written(Vec<u8>, SystemTime),
}

/// A file that was written.
struct Content(Vec<u8>);

impl Reader for Content {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.0.get(offset..)).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn file(&self) -> Option<&File> {
        None
    }
}

impl<'a> Imagined<'a> {
    /// The storage as it is.
    pub fn new(inner: &'a dyn Store) -> Imagined<'a> {
        Imagined { inner, changes: RwLock::default() }
    }

    fn changes(&self) -> RwLockReadGuard<'_, BTreeMap<PathBuf, Change>> {
        self.changes.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn changing(&self) -> RwLockWriteGuard<'_, BTreeMap<PathBuf, Change>> {
        self.changes.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, path: &Path) -> Place {
        let changes = self.changes();
        if changes.is_empty() {
            return Place::Stored(path.to_path_buf());
        }
        for above in path.ancestors() {
            let Some(change) = changes.get(above) else { continue };
            let is_itself = above == path;
            return match change {
                Change::Moved(from, _) if is_itself => Place::Stored(from.clone()),
                Change::Moved(from, _) => match path.strip_prefix(above) {
                    Ok(below) => Place::Stored(from.join(below)),
                    Err(_) => Place::Nowhere,
                },
                Change::Written(content, time) if is_itself => Place::Written(content.clone(), *time),
                Change::Written(..) | Change::Gone => Place::Nowhere,
            };
        }
        Place::Stored(path.to_path_buf())
    }

    /// What stands at a path, if anything does.
    fn kind(&self, path: &Path) -> Result<Option<Kind>> {
        let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(Some(Kind::Directory));
        };
        let entries = self.list(above)?.unwrap_or_default();
        Ok(entries.into_iter().find(|entry| entry.name == name).map(|entry| entry.kind))
    }

    fn stat_of(content: &[u8], time: SystemTime) -> Stat {
        let size = content.len() as u64;
        Stat { size, blocks: size.div_ceil(512), modified: time, changed: time, inode: 0 }
    }
}

impl Store for Imagined<'_> {
    fn clocks(&self) -> Reading {
        self.inner.clocks()
    }

    fn list(&self, prefix: &Path) -> Result<Option<Vec<Entry>>> {
        let stored = match self.place(prefix) {
            Place::Stored(at) => self.inner.list(&at)?,
            Place::Nowhere | Place::Written(..) => None,
        };
        let changes = self.changes();
        if changes.is_empty() {
            return Ok(stored);
        }
        let mut is_there = stored.is_some();
        let mut entries: BTreeMap<OsString, Kind> =
            stored.into_iter().flatten().map(|entry| (entry.name, entry.kind)).collect();
        let below = changes.range(prefix.to_path_buf()..).take_while(|(path, _)| path.starts_with(prefix));
        for (path, change) in below {
            let Ok(inside) = path.strip_prefix(prefix) else { continue };
            let mut names = inside.iter();
            let Some(name) = names.next() else { continue };
            let kind = match (names.next().is_some(), change) {
                (_, Change::Gone) => None,
                (true, _) => Some(Kind::Directory),
                (false, Change::Moved(_, kind)) => Some(*kind),
                (false, Change::Written(..)) => Some(Kind::File),
            };
            match kind {
                Some(kind) => {
                    is_there = true;
                    entries.insert(name.to_os_string(), kind);
                }
                None if inside.iter().count() == 1 => drop(entries.remove(name)),
                None => {}
            }
        }
        Ok(is_there.then(|| entries.into_iter().map(|(name, kind)| Entry { name, kind }).collect()))
    }

    fn directory<'b>(&'b self, prefix: &Path) -> Result<Box<dyn Directory + 'b>> {
        match self.changes().is_empty() {
            true => self.inner.directory(prefix),
            false => Ok(Box::new(Prefix { store: self, prefix: prefix.to_path_buf(), buffer: Vec::new() })),
        }
    }

    fn stat(&self, path: &Path) -> Result<Option<Stat>> {
        match self.place(path) {
            Place::Stored(at) => self.inner.stat(&at),
            Place::Written(content, time) => Ok(Some(Imagined::stat_of(&content, time))),
            Place::Nowhere => Ok(None),
        }
    }

    fn read(&self, path: &Path, limit: usize) -> Result<Option<(Vec<u8>, Stat)>> {
        match self.place(path) {
            Place::Stored(at) => self.inner.read(&at, limit),
            Place::Written(content, _) if content.len() > limit => {
                Err(Error::TooLarge { path: self.full(path), limit })
            }
            Place::Written(content, time) => {
                let stat = Imagined::stat_of(&content, time);
                Ok(Some((content, stat)))
            }
            Place::Nowhere => Ok(None),
        }
    }

    fn open(&self, path: &Path) -> Result<Option<Box<dyn Reader>>> {
        match self.place(path) {
            Place::Stored(at) => self.inner.open(&at),
            Place::Written(content, _) => Ok(Some(Box::new(Content(content)))),
            Place::Nowhere => Ok(None),
        }
    }

    fn write(&self, path: &Path, content: &[u8]) -> Result<()> {
        self.changing().insert(path.to_path_buf(), Change::Written(content.to_vec(), SystemTime::now()));
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<bool> {
        let Some(kind) = self.kind(from)? else { return Ok(false) };
        if self.kind(to)?.is_some() {
            return Err(Error::Exists { path: self.full(to) });
        }
        let change = match self.place(from) {
            Place::Stored(at) => Change::Moved(at, kind),
            Place::Written(content, time) => Change::Written(content, time),
            // A directory that only imagined things are in.
            Place::Nowhere => Change::Gone,
        };
        let mut changes = self.changing();
        let inside: Vec<PathBuf> = changes.keys().filter(|path| path.starts_with(from)).cloned().collect();
        for path in inside {
            let Some(change) = changes.remove(&path) else { continue };
            if let Ok(below) = path.strip_prefix(from).map(Path::to_path_buf)
                && !below.as_os_str().is_empty()
            {
                changes.insert(to.join(below), change);
            }
        }
        changes.insert(from.to_path_buf(), Change::Gone);
        changes.insert(to.to_path_buf(), change);
        Ok(true)
    }

    fn remove(&self, paths: &[PathBuf]) -> Vec<Error> {
        let mut changes = self.changing();
        changes.extend(paths.iter().map(|path| (path.clone(), Change::Gone)));
        Vec::new()
    }

    fn prune(&self, prefix: &Path) -> Result<()> {
        let mut files = 0;
        super::walk(self, prefix, &mut |_, _| files += 1)?;
        if files == 0 {
            self.changing().insert(prefix.to_path_buf(), Change::Gone);
        }
        Ok(())
    }

    fn directory_changed(&self, path: &Path) -> Result<Option<SystemTime>> {
        match self.place(path) {
            Place::Stored(at) => self.inner.directory_changed(&at),
            Place::Nowhere | Place::Written(..) => Ok(None),
        }
    }

    fn remove_directory(&self, path: &Path) -> Result<bool> {
        let is_empty = self.list(path)?.is_some_and(|entries| entries.is_empty());
        if is_empty {
            self.changing().insert(path.to_path_buf(), Change::Gone);
        }
        Ok(is_empty)
    }

    fn make_directory(&self, _path: &Path) -> Result<()> {
        Ok(())
    }

    fn create(&self, path: &Path, content: &[u8]) -> Result<()> {
        match self.kind(path)? {
            Some(_) => Err(Error::Exists { path: self.full(path) }),
            None => self.write(path, content),
        }
    }

    fn replace(&self, path: &Path, content: &[u8], saved: &Path) -> Result<()> {
        self.rename(path, saved)?;
        self.write(path, content)
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn lock(&self, _who: &str, _wait: Duration) -> Result<Box<dyn Send>> {
        Ok(Box::new(()))
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn space(&self) -> Result<Space> {
        self.inner.space()
    }

    fn full(&self, path: &Path) -> PathBuf {
        self.inner.full(path)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::store::memory::Memory;

    /// Everything in a store, with its content.
    fn all(store: &dyn Store) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = Vec::new();
        super::super::walk(store, Path::new(""), &mut |path, _| files.push(path)).unwrap();
        let read = |path: &PathBuf| store.read(path, 1 << 20).unwrap().unwrap().0;
        files.iter().map(|path| (path.clone(), read(path))).collect()
    }

    /// The same steps in a storage that is imagined, and in one that is not.
    #[test]
    fn what_is_imagined_shows_as_if_it_were_done_and_nothing_is() {
        let path = |name: &str| PathBuf::from(name);
        let filled = || {
            let store = Memory::default();
            for name in ["a/b/1", "a/b/2", "a/c/3", "trash/t/a/d/4", "e"] {
                store.write(&path(name), name.as_bytes()).unwrap();
            }
            store
        };
        let untouched = filled();
        let imagined = Imagined::new(&untouched);
        let real = filled();
        type Step<'a> = Box<dyn Fn(&dyn Store) + 'a>;
        let steps: Vec<Step<'_>> = vec![
            Box::new(|s| assert!(s.rename(&path("a/b"), &path("trash/u/a/b")).unwrap())),
            Box::new(|s| assert!(s.rename(&path("trash/t/a/d/4"), &path("a/d/4")).unwrap())),
            Box::new(|s| s.write(&path("trash/u/note"), b"new").unwrap()),
            Box::new(|s| assert!(s.remove(&[path("e"), path("nothing")]).is_empty())),
            Box::new(|s| assert!(s.rename(&path("trash/u/a/b/2"), &path("a/b/2")).unwrap())),
            Box::new(|s| assert!(!s.rename(&path("nowhere"), &path("a/x")).unwrap())),
            Box::new(|s| assert!(s.rename(&path("a/c/3"), &path("a/b/2")).is_err())),
            Box::new(|s| s.create(&path("a/n"), b"made").unwrap()),
            Box::new(|s| s.replace(&path("a/n"), b"again", &path("trash/u/a/n")).unwrap()),
            Box::new(|s| assert!(s.create(&path("a/n"), b"twice").is_err())),
            Box::new(|s| assert!(s.rename(&path("trash/u"), &path("trash/w")).unwrap())),
        ];
        for (at, step) in steps.iter().enumerate() {
            step(&imagined);
            step(&real);
            assert_eq!(all(&imagined), all(&real), "after step {at}");
            for name in ["a/b/1", "a/b/2", "trash/u/a/b/1", "trash/w/note", "e"] {
                let size = |store: &dyn Store| store.stat(&path(name)).unwrap().map(|stat| stat.size);
                assert_eq!(size(&imagined), size(&real), "{name} after step {at}");
            }
        }
        assert_eq!(all(&untouched), all(&filled()));
    }
}
