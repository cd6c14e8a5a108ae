//! The lock of whoever changes the store: `.regfs/lock`, locked by flock(2).
//!
//! # Rules kept here
//! 1. Who has the lock has that of the file which is there: one that was replaced meanwhile counts for nothing.
//! 2. What is no file of ours is replaced. Its lock is taken first if it can be, since another regfs may have it, and
//!    only one process at a time replaces it.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{self, AtFlags, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::open::kind_of;
use super::own::LOCK_MODE;
use super::{Disk, reserve};
use crate::error::{Error, Result};
use crate::layout;
use crate::printable::Printable;
use crate::store::{Kind, Store};

/// Longest text of a lock in bytes.
const TEXT_LIMIT: u64 = 4096;
/// How often the lock may be replaced by others before somebody is told.
const TRIES: usize = 100;
/// Name of the lock in our own directory.
const LOCK: &str = "lock";

impl Disk {
    pub(super) fn take_lock(&self, who: &str, wait: Duration) -> Result<Locked> {
        let (path, own_path, doing) = (Path::new(layout::LOCK), Path::new(layout::OWN), "lock");
        self.with_reserve(|| self.make_directories(own_path, None))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let own =
            self.open_below(own_path, flags, Mode::empty()).map_err(|e| self.error(doing, own_path, e))?;
        self.mend_modes(&own);
        let file = self.lock_file(&own, Instant::now() + wait)?;
        self.expect_able()?;
        // The text is only for people who wait; the lock itself is the kernel's and dies with the process.
        let text = format!("{} (pid {})\n", who, std::process::id());
        let described = file.set_len(0).and_then(|()| file.write_all_at(text.as_bytes(), 0));
        if let Err(e) = described {
            log::debug!("could not say in {} who holds the lock: {e}", self.full(path).printable());
        }
        reserve::make(&own);
        Ok(Locked { _file: file, own })
    }

    /// The file with its lock.
    fn lock_file(&self, own: &OwnedFd, deadline: Instant) -> Result<File> {
        // Those that were replaced; whoever waits for one finds out when this ends.
        let mut replaced = Vec::new();
        for _ in 0..TRIES {
            let Some(file) = self.with_reserve(|| self.open_lock(own))? else {
                self.replace_lock(own, deadline)?;
                continue;
            };
            self.wait_for(&file, Some(&file), deadline)?;
            match self.is_still(own, &file)? {
                Some(stat) if self.foreign(&stat)?.is_none() => return Ok(file),
                Some(_) => {
                    self.replace_lock(own, deadline)?;
                    replaced.push(file);
                }
                None => {}
            }
        }
        let path = self.full(Path::new(layout::LOCK));
        Err(Error::Busy { why: format!("{} is replaced again and again by somebody", path.printable()) })
    }

    /// Opens the lock, or makes it; `None`: what is there is no file.
    fn open_lock(&self, own: &OwnedFd) -> Result<Option<File>> {
        let wrap = |e| self.error("open the lock", Path::new(layout::LOCK), e);
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::CLOEXEC;
        loop {
            // Before it is opened: opening alone may do something to a device.
            match fs::statat(own, LOCK, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) if kind_of(FileType::from_raw_mode(stat.st_mode)) != Kind::File => return Ok(None),
                Ok(_) | Err(Errno::NOENT) => {}
                Err(e) => return Err(wrap(e)),
            }
            match fs::openat(own, LOCK, flags, Mode::empty()) {
                Ok(file) => return Ok(Some(File::from(file))),
                Err(Errno::LOOP | Errno::ISDIR | Errno::NXIO) => return Ok(None),
                Err(Errno::NOENT) => {}
                Err(e) => return Err(wrap(e)),
            }
            let made =
                fs::openat(own, LOCK, flags | OFlags::CREATE | OFlags::EXCL, Mode::from_raw_mode(LOCK_MODE));
            match made {
                Ok(file) => {
                    self.adopt(&file, Path::new(layout::LOCK))?;
                    return Ok(Some(File::from(file)));
                }
                Err(Errno::EXIST) => {}
                Err(e) => return Err(wrap(e)),
            }
        }
    }

    /// Removes what is no lock of ours; the lock of the directory sees to it that nobody removes the one that another
    /// has just made.
    fn replace_lock(&self, own: &OwnedFd, deadline: Instant) -> Result<()> {
        let path = Path::new(layout::LOCK);
        let alone = fs::openat(own, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| self.error("open", Path::new(layout::OWN), e))?;
        self.wait_for(&alone, None, deadline)?;
        match fs::statat(own, LOCK, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if self.foreign(&stat)?.is_none() => Ok(()),
            Ok(_) => {
                log::warn!("{} is no lock of regfs, and is replaced", self.full(path).printable());
                self.clear(path)
            }
            Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(self.error("look at", path, e)),
        }
    }

    /// Waits until `what` is locked.
    fn wait_for(&self, what: impl AsFd, text: Option<&File>, deadline: Instant) -> Result<()> {
        loop {
            match fs::flock(&what, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20))
                }
                Err(Errno::WOULDBLOCK) => return Err(held_by(text)),
                Err(e) => return Err(self.error("lock", Path::new(layout::LOCK), e)),
            }
        }
    }

    /// Facts about the lock if it is this file, and not another one by now.
    fn is_still(&self, own: &OwnedFd, file: &File) -> Result<Option<fs::Stat>> {
        let wrap = |e| self.error("look at", Path::new(layout::LOCK), e);
        let ours = fs::fstat(file).map_err(wrap)?;
        match fs::statat(own, LOCK, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(there) => Ok(((there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)).then_some(there)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(wrap(e)),
        }
    }
}

/// The lock of a store; with it comes the reserve.
pub(super) struct Locked {
    /// The lock ends when this is closed, after the reserve was made.
    _file: File,
    /// Our own directory.
    own: OwnedFd,
}

impl Drop for Locked {
    fn drop(&mut self) {
        reserve::make(&self.own);
    }
}

fn held_by(file: Option<&File>) -> Error {
    let mut holder = Vec::new();
    // The name is a courtesy; who can't read it still learns that the store is locked.
    let is_read = file.is_some_and(|file| file.take(TEXT_LIMIT).read_to_end(&mut holder).is_ok());
    let text = String::from_utf8_lossy(&holder);
    let holder = if is_read && !text.trim().is_empty() { text.trim() } else { "another regfs" };
    Error::Busy {
        why: format!("the store is being changed by {}; try again when it is done", holder.printable()),
    }
}
