//! A storage of which only so much is asked in a second.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::{Entry, Reader, Space, Stat, Store};
use crate::error::{Error, Result};
use crate::progress::Progress;

/// How soon a run that was told to stop does.
const STOPS_WITHIN: Duration = Duration::from_millis(100);

/// Passes calls on, so many in a second at most; whoever comes too early waits.
pub struct Limited<'a> {
    inner: &'a dyn Store,
    /// A run that was told to stop waits no more.
    progress: &'a dyn Progress,
    /// Between two calls.
    pause: Duration,
    /// When the next call may be made.
    next: Mutex<Instant>,
}

impl<'a> Limited<'a> {
    /// At most `rate` calls in a second.
    pub fn new(inner: &'a dyn Store, rate: u32, progress: &'a dyn Progress) -> Limited<'a> {
        Limited {
            inner,
            progress,
            pause: Duration::from_secs(1) / rate.max(1),
            next: Mutex::new(Instant::now()),
        }
    }

    fn turns(&self, count: usize) -> &dyn Store {
        let now = Instant::now();
        let until = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let until = (*next).max(now);
            *next = until + self.pause * u32::try_from(count).unwrap_or(u32::MAX);
            until
        };
        while !self.progress.is_stopped() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(STOPS_WITHIN));
        }
        self.inner
    }

    fn turn(&self) -> &dyn Store {
        self.turns(1)
    }
}

impl Store for Limited<'_> {
    fn list(&self, prefix: &Path) -> Result<Option<Vec<Entry>>> {
        self.turn().list(prefix)
    }

    fn stat(&self, path: &Path) -> Result<Option<Stat>> {
        self.turn().stat(path)
    }

    fn read(&self, path: &Path, limit: usize) -> Result<Option<(Vec<u8>, Stat)>> {
        self.turn().read(path, limit)
    }

    fn open(&self, path: &Path) -> Result<Option<Box<dyn Reader>>> {
        self.turn().open(path)
    }

    fn write(&self, path: &Path, content: &[u8]) -> Result<()> {
        self.turn().write(path, content)
    }

    fn write_with(&self, path: &Path, write: &dyn Fn(&mut dyn io::Write) -> io::Result<()>) -> Result<()> {
        self.turn().write_with(path, write)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<bool> {
        self.turn().rename(from, to)
    }

    fn remove(&self, paths: &[PathBuf]) -> Vec<Error> {
        self.turns(paths.len()).remove(paths)
    }

    fn prune(&self, prefix: &Path) -> Result<()> {
        self.turn().prune(prefix)
    }

    fn directory_changed(&self, path: &Path) -> Result<Option<SystemTime>> {
        self.turn().directory_changed(path)
    }

    fn remove_directory(&self, path: &Path) -> Result<bool> {
        self.turn().remove_directory(path)
    }

    fn make_directory(&self, path: &Path) -> Result<()> {
        self.turn().make_directory(path)
    }

    fn create(&self, path: &Path, content: &[u8]) -> Result<()> {
        self.turn().create(path, content)
    }

    fn replace(&self, path: &Path, content: &[u8], saved: &Path) -> Result<()> {
        self.turn().replace(path, content, saved)
    }

    fn sync(&self) -> Result<()> {
        self.turn().sync()
    }

    fn lock(&self, who: &str, wait: Duration) -> Result<Box<dyn Send>> {
        self.inner.lock(who, wait)
    }

    fn is_writable(&self) -> bool {
        self.inner.is_writable()
    }

    fn space(&self) -> Result<Space> {
        self.turn().space()
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
    fn calls_are_made_one_after_the_other() {
        let memory = Memory::default();
        let limited = Limited::new(&memory, 1000, &Unwatched);
        let began = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10).for_each(|_| drop(limited.stat(Path::new("nothing")))));
            }
        });
        assert!(limited.remove(&vec![PathBuf::from("nothing"); 10]).is_empty());
        assert!(limited.list(Path::new("nothing")).is_ok());
        // 51 calls, the first at once.
        assert!(began.elapsed() >= Duration::from_millis(50), "{:?}", began.elapsed());
    }
}
