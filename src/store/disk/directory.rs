//! Directories: what is in them, many files of one, making and removing them.

use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, RawMode, Uid};
use rustix::io::Errno;

use super::Disk;
use super::open::{kind_of, resolve_flags, stat_of};
use crate::error::Result;
use crate::layout;
use crate::printable::Printable;
use crate::store::{Directory, Kind, Stat, Store, is_too_deep};

/// Bytes for one `getdents64`; about 350 digests fit.
const LIST_BUFFER: usize = 32 << 10;
/// Bytes for a file that is read as a whole; most manifests and all links fit.
const READ_BUFFER: usize = 16 << 10;

/// A directory of [`Disk`], opened once.
pub(super) struct DiskDirectory<'a> {
    pub(super) disk: &'a Disk,
    pub(super) prefix: PathBuf,
    /// `None`: it is not there.
    pub(super) fd: Option<OwnedFd>,
    pub(super) buffer: Vec<u8>,
}

impl Directory for DiskDirectory<'_> {
    /// Three calls: open, read, close; with facts four. Anything unusual is left to [`Disk::read`].
    fn read(&mut self, name: &Path, limit: usize, facts: bool) -> Result<Option<(&[u8], Option<Stat>)>> {
        let Some(directory) = &self.fd else { return Ok(None) };
        if !self.disk.has_openat2 {
            return self.read_slowly(name, limit);
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = match fs::openat2(directory, name, flags, Mode::empty(), resolve_flags()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(None),
            Err(_) => return self.read_slowly(name, limit),
        };
        if self.buffer.len() < READ_BUFFER {
            self.buffer.resize(READ_BUFFER, 0);
        }
        let stat = if facts { fs::fstat(&file).ok() } else { None };
        let is_file = stat.as_ref().is_none_or(|s| kind_of(FileType::from_raw_mode(s.st_mode)) == Kind::File);
        match rustix::io::read(&file, &mut self.buffer[..READ_BUFFER]) {
            // A regular file gives all it has, so there is no more where it didn't fill the buffer.
            Ok(read)
                if (1..READ_BUFFER).contains(&read)
                    && read <= limit
                    && is_file
                    && facts == stat.is_some() =>
            {
                Ok(Some((&self.buffer[..read], stat.as_ref().map(stat_of))))
            }
            // Empty, large, a directory, a failure: as rare as they are.
            _ => self.read_slowly(name, limit),
        }
    }

    fn stat(&self, name: &Path) -> Result<Option<Stat>> {
        let Some(directory) = &self.fd else { return Ok(None) };
        // A symlink planted on the way could only make this tell the times of another file; nothing moves by that.
        match fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if kind_of(FileType::from_raw_mode(stat.st_mode)) == Kind::File => {
                Ok(Some(stat_of(&stat)))
            }
            Err(Errno::NOENT) => Ok(None),
            _ => self.disk.stat(&self.prefix.join(name)),
        }
    }
}

impl DiskDirectory<'_> {
    fn read_slowly(&mut self, name: &Path, limit: usize) -> Result<Option<(&[u8], Option<Stat>)>> {
        let Some((content, stat)) = self.disk.read(&self.prefix.join(name), limit)? else { return Ok(None) };
        self.buffer = content;
        Ok(Some((&self.buffer, Some(stat))))
    }
}

impl Disk {
    fn is_there(&self, directory: &Path) -> Result<bool> {
        match self.open_below(directory, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(e) => Err(self.error("look at the directory", directory, e)),
        }
    }

    /// `None`: it was removed after it was opened and before it gave an entry; there may be a new one.
    pub(super) fn list_once(
        &self,
        prefix: &Path,
        each: &mut dyn FnMut(&OsStr, Kind),
    ) -> Result<Option<bool>> {
        let doing = "list the directory";
        let fd = match self.open_below(prefix, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(Some(false)),
            // Ours to replace with the next change: until then there is nothing of ours.
            Err(e @ (Errno::NOTDIR | Errno::LOOP)) if layout::is_own(prefix) => {
                log::warn!("{}: regfs ignores it", self.error(doing, prefix, e));
                return Ok(Some(false));
            }
            Err(e) => return Err(self.error(doing, prefix, e)),
        };
        let mut buffer = [MaybeUninit::uninit(); LIST_BUFFER];
        let mut entries = fs::RawDir::new(&fd, &mut buffer);
        let mut is_first = true;
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Err(Errno::NOENT) if is_first => return Ok(None),
                // It was removed meanwhile, so whatever was in it had left. In a new one there may be more.
                Err(Errno::NOENT) if !self.is_there(prefix)? => return Ok(Some(true)),
                entry => entry.map_err(|e| self.error(doing, prefix, e))?,
            };
            is_first = false;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let kind = match entry.file_type() {
                FileType::Unknown => match self.kind(&prefix.join(name))? {
                    Some(kind) => kind,
                    None => continue,
                },
                known => kind_of(known),
            };
            each(name, kind);
        }
        Ok(Some(true))
    }

    /// Makes the directory `path`, and those above it, like the ones above `like` that carry the same names.
    pub(super) fn make_directories(&self, path: &Path, like: Option<&Path>) -> Result<()> {
        if path.as_os_str().is_empty() {
            return Ok(());
        }
        match self.open_below(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) {
            Ok(_) => return Ok(()),
            Err(Errno::NOENT) => {}
            Err(Errno::NOTDIR | Errno::LOOP) if layout::is_own(path) => {
                self.make_directories(path.parent().unwrap_or(Path::new("")), None)?;
                self.clear(path)?;
            }
            Err(e) => return Err(self.error("open the directory", path, e)),
        }
        let like = like.filter(|model| model.file_name() == path.file_name());
        self.make_directories(path.parent().unwrap_or(Path::new("")), like.and_then(Path::parent))?;
        let doing = "make the directory";
        let Some((parent, name)) = self.parent(path, doing)? else {
            return Err(self.error(doing, path, Errno::NOENT));
        };
        let mode = if path.starts_with(layout::OWN) { 0o700 } else { 0o777 };
        match fs::mkdirat(&parent, name, Mode::from_raw_mode(mode)) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Ok(()),
            Err(e) => return Err(self.error(doing, path, e)),
        }
        if like.is_none() && path.starts_with(layout::OWN) {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            let made = self.open_below(path, flags, Mode::empty()).map_err(|e| self.error(doing, path, e))?;
            return self.adopt(&made, path);
        }
        match like.map(|model| self.open_below(model, OFlags::PATH, Mode::empty())) {
            Some(Ok(model)) => self.copy_ownership(&model, path),
            Some(Err(Errno::NOENT)) | None => Ok(()),
            Some(Err(e)) => Err(self.error(doing, path, e)),
        }
    }

    /// Gives the directory `path` the owner and the mode of `model`.
    fn copy_ownership(&self, model: &OwnedFd, path: &Path) -> Result<()> {
        let doing = "set owner and mode of the directory";
        let wrap = |e| self.error(doing, path, e);
        let wanted = fs::fstat(model).map_err(wrap)?;
        let target =
            self.open_below(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).map_err(wrap)?;
        let made = fs::fstat(&target).map_err(wrap)?;
        if (made.st_uid, made.st_gid) != (wanted.st_uid, wanted.st_gid) {
            let chown =
                fs::fchown(&target, Some(Uid::from_raw(wanted.st_uid)), Some(Gid::from_raw(wanted.st_gid)));
            match chown {
                // Only root may give files away; the files in it keep their owner, which is what a registry reads.
                Err(Errno::PERM) => log::warn!("could not {doing} {}: not root", self.full(path).printable()),
                result => result.map_err(wrap)?,
            }
        }
        let mode = Mode::from_raw_mode(wanted.st_mode as RawMode & 0o7777);
        fs::fchmod(&target, mode).map_err(wrap)
    }

    pub(super) fn make_directory_like_its_parent(&self, path: &Path) -> Result<()> {
        let doing = "make the directory";
        match self.open_below(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) {
            Ok(_) => return Ok(()),
            Err(Errno::NOENT) => {}
            Err(e) => return Err(self.error(doing, path, e)),
        }
        let above = path.parent().unwrap_or(Path::new(""));
        self.make_directory_like_its_parent(above)?;
        let Some((parent, name)) = self.parent(path, doing)? else {
            return Err(self.error(doing, path, Errno::NOENT));
        };
        match fs::mkdirat(&parent, name, Mode::from_raw_mode(0o777)) {
            Ok(()) => self.copy_ownership(&parent, path),
            Err(Errno::EXIST) => Ok(()),
            Err(e) => Err(self.error(doing, path, e)),
        }
    }

    pub(super) fn prune_below(&self, prefix: &Path) -> Result<()> {
        let mut directories = vec![prefix.to_path_buf()];
        let mut next = 0;
        while let Some(directory) = directories.get(next).cloned() {
            for entry in self.list(&directory)?.unwrap_or_default() {
                let path = directory.join(entry.name);
                // What is deeper than anything of a registry stays, and with it what is above.
                if entry.kind == Kind::Directory && !is_too_deep(prefix, &path) {
                    directories.push(path);
                }
            }
            next += 1;
        }
        let doing = "remove the empty directory";
        // Each comes after the one that it is in.
        for directory in directories.iter().rev() {
            let Some((parent, name)) = self.parent(directory, doing)? else { continue };
            match fs::unlinkat(&parent, name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST) => {}
                Err(e) => return Err(self.error(doing, directory, e)),
            }
        }
        Ok(())
    }
}
