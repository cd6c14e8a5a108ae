//! A storage that is asked little of: whoever works with it rests for most of the time.
//!
//! The priority of a process does not help everywhere (sched(7): with autogroups it counts only within a session), and
//! those who wait for a registry wait for its processor, its disk and the locks of its filesystem alike. So a sweep that
//! looks at a storage beside a registry takes breaks, several times as long as it has worked.

use std::cell::Cell;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::{Directory, Entry, Kind, Reader, Space, Stat, Store};
use crate::error::{Error, Result};
use crate::progress::Progress;

/// So long is worked without a break.
const WORKS: Duration = Duration::from_millis(1);
/// So many times as long is each break.
const RESTS: u32 = 9;
/// The longest break: where a single call took seconds, the disk is slow, and resting does not help it.
const LONGEST: Duration = Duration::from_millis(50);

thread_local! {
    /// Since when this thread has worked.
    static BEGAN: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Passes calls on, with breaks.
pub struct Resting<'a> {
    inner: &'a dyn Store,
    /// A run that was told to stop rests no more.
    progress: &'a dyn Progress,
}

impl<'a> Resting<'a> {
    /// With breaks, as long as `progress` goes on.
    pub fn new(inner: &'a dyn Store, progress: &'a dyn Progress) -> Resting<'a> {
        Resting { inner, progress }
    }

    fn rested(&self) -> &'a dyn Store {
        let now = Instant::now();
        let worked = BEGAN.get().map_or(Duration::ZERO, |began| now.duration_since(began));
        if worked >= WORKS && !self.progress.is_stopped() {
            std::thread::sleep((worked * RESTS).min(LONGEST));
        }
        if worked >= WORKS || BEGAN.get().is_none() {
            BEGAN.set(Some(Instant::now()));
        }
        self.inner
    }
}

impl Store for Resting<'_> {
    fn list(&self, prefix: &Path) -> Result<Option<Vec<Entry>>> {
        self.rested().list(prefix)
    }

    fn list_each(&self, prefix: &Path, each: &mut dyn FnMut(&OsStr, Kind)) -> Result<bool> {
        self.rested().list_each(prefix, each)
    }

    fn stat(&self, path: &Path) -> Result<Option<Stat>> {
        self.rested().stat(path)
    }

    fn read(&self, path: &Path, limit: usize) -> Result<Option<(Vec<u8>, Stat)>> {
        self.rested().read(path, limit)
    }

    fn directory<'s>(&'s self, path: &Path) -> Result<Box<dyn Directory + 's>> {
        self.rested().directory(path)
    }

    fn open(&self, path: &Path) -> Result<Option<Box<dyn Reader>>> {
        self.rested().open(path)
    }

    fn write(&self, path: &Path, content: &[u8]) -> Result<()> {
        self.rested().write(path, content)
    }

    fn write_with(&self, path: &Path, write: &dyn Fn(&mut dyn io::Write) -> io::Result<()>) -> Result<()> {
        self.rested().write_with(path, write)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<bool> {
        self.rested().rename(from, to)
    }

    fn remove(&self, paths: &[PathBuf]) -> Vec<Error> {
        self.rested().remove(paths)
    }

    fn prune(&self, prefix: &Path) -> Result<()> {
        self.rested().prune(prefix)
    }

    fn directory_changed(&self, path: &Path) -> Result<Option<SystemTime>> {
        self.rested().directory_changed(path)
    }

    fn remove_directory(&self, path: &Path) -> Result<bool> {
        self.rested().remove_directory(path)
    }

    fn make_directory(&self, path: &Path) -> Result<()> {
        self.rested().make_directory(path)
    }

    fn create(&self, path: &Path, content: &[u8]) -> Result<()> {
        self.rested().create(path, content)
    }

    fn replace(&self, path: &Path, content: &[u8], saved: &Path) -> Result<()> {
        self.rested().replace(path, content, saved)
    }

    fn sync(&self) -> Result<()> {
        self.rested().sync()
    }

    fn lock(&self, who: &str, wait: Duration) -> Result<Box<dyn Send>> {
        self.inner.lock(who, wait)
    }

    fn is_writable(&self) -> bool {
        self.inner.is_writable()
    }

    fn space(&self) -> Result<Space> {
        self.rested().space()
    }

    fn full(&self, path: &Path) -> PathBuf {
        self.inner.full(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Unwatched;
    use crate::store::memory::Memory;

    #[test]
    fn who_works_rests_for_longer() {
        let memory = Memory::default();
        let resting = Resting::new(&memory, &Unwatched);
        let began = Instant::now();
        for _ in 0..3 {
            assert!(resting.stat(Path::new("nothing")).is_ok());
            std::thread::sleep(WORKS);
        }
        assert!(resting.stat(Path::new("nothing")).is_ok());
        assert!(began.elapsed() >= WORKS * 3 * (1 + RESTS), "{:?}", began.elapsed());
    }
}
