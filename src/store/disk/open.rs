//! Opens what lies below the registry directory, and never anything else.
//!
//! Neither `..` nor a symlink planted in the store leads out of it, and nothing in it keeps us waiting.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, RawMode, ResolveFlags};
use rustix::io::Errno;

use super::Disk;
use crate::error::{Error, Result};
use crate::layout;
use crate::store::{Kind, Reader, Stat, Store, expect_file};

impl Disk {
    /// Opens `path` below the root without following any symlink.
    pub(super) fn open_below(&self, path: &Path, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        if self.has_openat2 {
            loop {
                match fs::openat2(&self.root, path, flags, mode, resolve_flags()) {
                    // A rename elsewhere in the tree made the kernel unsure; it asks to try again.
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    result => return result,
                }
            }
        }
        let mut parent = fs::openat(&self.root, ".", DIRECTORY_PATH, Mode::empty())?;
        for component in path.parent().into_iter().flat_map(Path::components) {
            let next = fs::openat(&parent, component.as_os_str(), DIRECTORY_PATH, Mode::empty());
            parent = next.map_err(|e| {
                if e == Errno::NOTDIR && is_symlink(&parent, component.as_os_str()) { Errno::LOOP } else { e }
            })?;
        }
        match path.file_name() {
            Some(name) => fs::openat(&parent, name, flags, mode),
            None => fs::openat(&parent, ".", flags, mode),
        }
    }

    /// The directory that holds `path`, and the last name; `None` when there is no such directory.
    pub(super) fn parent<'a>(
        &self,
        path: &'a Path,
        doing: &'static str,
    ) -> Result<Option<(OwnedFd, &'a OsStr)>> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Error::io(doing, &self.full(path), Errno::INVAL));
        };
        match self.open_below(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) {
            Ok(fd) => Ok(Some((fd, name))),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(self.error(doing, parent, e)),
        }
    }

    pub(super) fn kind(&self, path: &Path) -> Result<Option<Kind>> {
        let doing = "look at";
        let Some((parent, name)) = self.parent(path, doing)? else { return Ok(None) };
        match fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(kind_of(FileType::from_raw_mode(stat.st_mode as RawMode)))),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(self.error(doing, path, e)),
        }
    }

    pub(super) fn open_file(&self, path: &Path) -> Result<Option<(File, Stat)>> {
        let doing = "open";
        // Non-blocking, so that a named pipe planted in the store can't hang us; no effect on regular files.
        let fd = match self.open_below(path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(self.error(doing, path, e)),
        };
        let stat = fs::fstat(&fd).map_err(|e| self.error(doing, path, e))?;
        match layout::is_own(path) {
            true => self.expect_own(path, &stat)?,
            false => {
                expect_file(kind_of(FileType::from_raw_mode(stat.st_mode as RawMode)), self.full(path))?;
            }
        }
        Ok(Some((File::from(fd), stat_of(&stat))))
    }
}

const DIRECTORY_PATH: OFlags =
    OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

pub(super) fn resolve_flags() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

fn is_symlink(parent: &OwnedFd, name: &OsStr) -> bool {
    fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode as RawMode) == FileType::Symlink)
}

pub(super) fn kind_of(file_type: FileType) -> Kind {
    match file_type {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        _ => Kind::Other,
    }
}

pub(super) fn stat_of(stat: &fs::Stat) -> Stat {
    Stat {
        size: stat.st_size.max(0).unsigned_abs(),
        blocks: stat.st_blocks.max(0).unsigned_abs(),
        modified: time(stat.st_mtime, stat.st_mtime_nsec),
        changed: time(stat.st_ctime, stat.st_ctime_nsec),
        inode: stat.st_ino,
    }
}

/// A time of `stat(2)`; those before 1970 or past what a clock can hold count as 1970.
fn time(seconds: i64, nanoseconds: impl TryInto<u32>) -> SystemTime {
    let since_epoch = Duration::new(seconds.max(0).unsigned_abs(), nanoseconds.try_into().unwrap_or(0));
    SystemTime::UNIX_EPOCH.checked_add(since_epoch).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// An open file of a disk.
pub(super) struct DiskFile(pub(super) File);

impl Reader for DiskFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buffer, offset)
    }

    fn file(&self) -> Option<&File> {
        Some(&self.0)
    }
}
