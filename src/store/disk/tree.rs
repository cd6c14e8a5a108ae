//! Trees that somebody made deeper than any path can be: what is in them is reached from directory to directory.
//!
//! # Cost
//! Each directory is opened and listed once, whatever the shape; at most three are open at a time.

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{self, AtFlags, Dir, FileType, Mode, OFlags, RawMode};
use rustix::io::Errno;

use super::Disk;
use crate::error::{Error, Result};
use crate::printable::Printable;
use crate::store::Store;

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// A directory on the way down: which one it is, and those in it that nobody has looked at yet.
struct Level {
    device: u64,
    inode: u64,
    waiting: Vec<CString>,
}

impl Disk {
    /// Whether there is anything but directories below `path`.
    pub(super) fn holds_files_below(&self, path: &Path) -> Result<bool> {
        let doing = "look for files below";
        let wrap = |e| self.error(doing, path, e);
        let mut here = match self.open_below(path, DIRECTORY, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(false),
            Err(e) => return Err(wrap(e)),
        };
        let mut levels: Vec<Level> = Vec::new();
        loop {
            let stat = fs::fstat(&here).map_err(wrap)?;
            let mut waiting = Vec::new();
            for (name, is_directory) in entries(&here).map_err(wrap)? {
                if !is_directory {
                    return Ok(true);
                }
                waiting.push(name);
            }
            levels.push(Level { device: stat.st_dev, inode: stat.st_ino, waiting });
            loop {
                let Some(level) = levels.last_mut() else { return Ok(false) };
                if let Some(name) = level.waiting.pop() {
                    here = fs::openat(&here, name, DIRECTORY, Mode::empty()).map_err(wrap)?;
                    break;
                }
                levels.pop();
                let Some(above) = levels.last() else { return Ok(false) };
                here = fs::openat(&here, "..", DIRECTORY, Mode::empty()).map_err(wrap)?;
                let stat = fs::fstat(&here).map_err(wrap)?;
                if (stat.st_dev, stat.st_ino) != (above.device, above.inode) {
                    return Err(Error::Changed { what: self.full(path).printable().to_string() });
                }
            }
        }
    }

    /// Removes a directory with all that is in it.
    ///
    /// What is in a directory of it moves to its top before that directory goes, so that nothing is ever deeper than
    /// two names.
    pub(super) fn remove_tree_at(&self, path: &Path) -> Result<()> {
        let doing = "remove the directory";
        let wrap = |e| self.error(doing, path, e);
        let Some((parent, name)) = self.parent(path, doing)? else { return Ok(()) };
        let top = match fs::openat(&parent, name, DIRECTORY, Mode::empty()) {
            Ok(top) => top,
            Err(Errno::NOENT) => return Ok(()),
            Err(e) => return Err(wrap(e)),
        };
        let mut waiting = remove_files(&top).map_err(wrap)?;
        let mut number = 0u64;
        while let Some(name) = waiting.pop() {
            let inner = fs::openat(&top, &name, DIRECTORY, Mode::empty()).map_err(wrap)?;
            for below in remove_files(&inner).map_err(wrap)? {
                waiting.push(move_up(&inner, &below, &top, &mut number).map_err(wrap)?);
            }
            fs::unlinkat(&top, &name, AtFlags::REMOVEDIR).map_err(wrap)?;
        }
        fs::unlinkat(&parent, name, AtFlags::REMOVEDIR).map_err(wrap)
    }
}

/// Moves a directory to the top of the tree under a name that nothing there has.
fn move_up(from: &OwnedFd, name: &CStr, top: &OwnedFd, number: &mut u64) -> rustix::io::Result<CString> {
    loop {
        *number += 1;
        let to = CString::new(format!(".{number}")).map_err(|_| Errno::INVAL)?;
        // Onto another directory it moves only if that is empty.
        match fs::renameat(from, name, top, &to) {
            Ok(()) => return Ok(to),
            Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// Removes all but the directories with something in them, which are told.
fn remove_files(directory: &OwnedFd) -> rustix::io::Result<Vec<CString>> {
    let mut full = Vec::new();
    for (name, is_directory) in entries(directory)? {
        let flags = if is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        match fs::unlinkat(directory, &name, flags) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::NOTEMPTY | Errno::EXIST) if is_directory => full.push(name),
            Err(e) => return Err(e),
        }
    }
    Ok(full)
}

/// What is in a directory, and whether each is one itself.
pub(super) fn entries(directory: &OwnedFd) -> rustix::io::Result<Vec<(CString, bool)>> {
    let mut found = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => {
                let stat =
                    fs::statat(directory, OsStr::from_bytes(name.to_bytes()), AtFlags::SYMLINK_NOFOLLOW)?;
                FileType::from_raw_mode(stat.st_mode as RawMode)
            }
            known => known,
        };
        found.push((name.to_owned(), kind == FileType::Directory));
    }
    Ok(found)
}
