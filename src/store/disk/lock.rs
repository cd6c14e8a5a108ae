//! The lock of whoever changes the store.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{self, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::Disk;
use super::reserve;
use crate::error::{Error, Result};
use crate::layout;
use crate::printable::Printable;
use crate::store::Store;

impl Disk {
    pub(super) fn take_lock(&self, who: &str, wait: Duration) -> Result<Locked> {
        let (path, doing) = (Path::new(layout::LOCK), "lock");
        self.make_directories(Path::new(layout::OWN), None)?;
        let flags = OFlags::RDWR | OFlags::CREATE;
        let fd = self
            .open_below(path, flags, Mode::from_raw_mode(0o600))
            .map_err(|e| self.error(doing, path, e))?;
        let file = File::from(fd);
        let deadline = Instant::now() + wait;
        loop {
            match fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::INTR) => {}
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20))
                }
                Err(Errno::WOULDBLOCK) => return Err(held_by(&file)),
                Err(e) => return Err(self.error(doing, path, e)),
            }
        }
        // The text is only for people who wait; the lock itself is the kernel's and dies with the process.
        let text = format!("{} (pid {})\n", who, std::process::id());
        let described = file.set_len(0).and_then(|()| file.write_all_at(text.as_bytes(), 0));
        if let Err(e) = described {
            log::debug!("could not say in {} who holds the lock: {e}", self.full(path).printable());
        }
        let own = self
            .open_below(Path::new(layout::OWN), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
            .map_err(|e| self.error(doing, Path::new(layout::OWN), e))?;
        Ok(Locked::new(file, own))
    }
}

/// The lock of a store; with it comes the reserve.
pub(super) struct Locked {
    /// The lock ends when this is closed, after the reserve was made.
    _file: File,
    /// Our own directory.
    own: OwnedFd,
}

impl Locked {
    fn new(file: File, own: OwnedFd) -> Locked {
        reserve::make(&own);
        Locked { _file: file, own }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        reserve::make(&self.own);
    }
}

fn held_by(mut file: &File) -> Error {
    let mut holder = String::new();
    let holder = match file.read_to_string(&mut holder) {
        Ok(_) if !holder.trim().is_empty() => holder.trim(),
        // The name is a courtesy; who can't read it still learns that the store is locked.
        Ok(_) | Err(_) => "another regfs",
    };
    Error::Busy {
        why: format!("the store is being changed by {}; try again when it is done", holder.printable()),
    }
}
