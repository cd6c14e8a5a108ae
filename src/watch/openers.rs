//! Openers: which processes open one file, from a moment on.
//!
//! The kernel tells it at the open, so nobody has to look in the right moment, and of the file itself, so it is told as well
//! when a process in a container has another name for it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::opens::opened;
use crate::sys;

/// Who opens a file.
pub(crate) struct Openers(OwnedFd);

impl Openers {
    /// Begins to watch; for root only.
    pub(crate) fn of(file: &File) -> io::Result<Openers> {
        Ok(Openers(sys::file_opens(file.as_fd())?))
    }

    /// The processes that opened it meanwhile, in the order in which they did.
    pub(crate) fn so_far(&self) -> io::Result<Vec<u32>> {
        let mut pids = Vec::new();
        loop {
            let more = opened(&self.0)?;
            if more.is_empty() {
                return Ok(pids);
            }
            pids.extend(more.into_iter().map(|(_, pid)| pid));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn who_opens_a_file_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let file = File::create(&path).unwrap();
        let openers = match Openers::of(&file) {
            Ok(openers) => openers,
            Err(e) => return eprintln!("skipped: {e}"),
        };
        assert_eq!(openers.so_far().unwrap(), Vec::<u32>::new());
        drop(File::open(&path).unwrap());
        let mut child = std::process::Command::new("cat").arg(&path).spawn().unwrap();
        let other = child.id();
        child.wait().unwrap();
        drop(File::create(directory.path().join("other")).unwrap());
        assert_eq!(openers.so_far().unwrap(), [std::process::id(), other]);
    }
}
