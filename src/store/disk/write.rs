//! Writes and renames: as a whole or not at all, and nothing of a registry is ever replaced.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{self, AtFlags, Gid, Mode, OFlags, RawMode, Uid};
use rustix::io::Errno;

use super::Disk;
use super::moves::{Place, exchange, move_to};
use crate::error::{Error, Result};
use crate::layout;
use crate::printable::Printable;
use crate::store::Store;

impl Disk {
    pub(super) fn write_once(
        &self,
        path: &Path,
        write: &dyn Fn(&mut dyn Write) -> io::Result<()>,
    ) -> Result<()> {
        let doing = "write";
        self.make_directories(path.parent().unwrap_or(Path::new("")), None)?;
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(".tmp");
        let temporary = path.with_file_name(name);
        let mut file = BufWriter::new(self.create_own(&temporary, doing)?);
        let written = write(&mut file).and_then(|()| file.flush()).and_then(|()| file.get_ref().sync_all());
        if let Err(e) = written {
            // Half a file helps nobody, and may take the last space there was.
            self.remove(&[temporary]).iter().for_each(|e| log::debug!("{e}"));
            return Err(Error::io(doing, &self.full(path), e));
        }
        let Some((parent, name)) = self.parent(path, doing)? else {
            return Err(self.error(doing, path, Errno::NOENT));
        };
        let temporary_name = temporary.file_name().unwrap_or_default();
        match fs::renameat(&parent, temporary_name, &parent, name) {
            // A directory stands in its place.
            Err(Errno::ISDIR) if layout::is_own(path) => {
                self.clear(path)?;
                fs::renameat(&parent, temporary_name, &parent, name)
            }
            result => result,
        }
        .map_err(|e| self.error(doing, path, e))
    }

    pub(super) fn rename_once(&self, from: &Path, to: &Path) -> Result<bool> {
        let doing = "move";
        let Some((from_parent, from_name)) = self.parent(from, doing)? else { return Ok(false) };
        if fs::statat(&from_parent, from_name, AtFlags::SYMLINK_NOFOLLOW).is_err_and(|e| e == Errno::NOENT) {
            return Ok(false);
        }
        self.make_directories(to.parent().unwrap_or(Path::new("")), from.parent())?;
        let Some((to_parent, to_name)) = self.parent(to, doing)? else {
            return Err(self.error(doing, to, Errno::NOENT));
        };
        let place =
            |parent, name, path: &Path| Place { parent, name, is_ours: path.starts_with(layout::OWN) };
        match move_to(place(&from_parent, from_name, from), place(&to_parent, to_name, to)) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(Errno::EXIST) => Err(Error::Exists { path: self.full(to) }),
            Err(e) => Err(self.error(doing, from, e)),
        }
    }

    /// Makes a file of our own. What stands there goes: what a crash left, or something planted, as a named pipe that
    /// would keep us waiting for a reader, or another name of a blob.
    fn create_own(&self, path: &Path, doing: &'static str) -> Result<File> {
        self.clear(path)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let fd = self.open_below(path, flags, Mode::from_raw_mode(0o600));
        let file = fd.map(File::from).map_err(|e| self.error(doing, path, e))?;
        self.adopt(&file, path)?;
        Ok(file)
    }

    /// Writes what shall become `path` in `parent`, with owner and mode that fit there; returns where it lies.
    ///
    /// Not beside `path`: a crash must leave nothing where a registry looks.
    fn write_new(&self, parent: &OwnedFd, path: &Path, content: &[u8]) -> Result<(OwnedFd, &'static OsStr)> {
        let (doing, new) = ("write", Path::new(layout::NEW_FILE));
        let wrap = |e| self.error(doing, new, e);
        let wanted = fs::fstat(parent).map_err(|e| self.error(doing, path, e))?;
        self.make_directories(Path::new(layout::OWN), None)?;
        let mut file = self.create_own(new, doing)?;
        match fs::fchown(&file, Some(Uid::from_raw(wanted.st_uid)), Some(Gid::from_raw(wanted.st_gid))) {
            // Only root may give files away.
            Err(Errno::PERM) => log::warn!("{} is not its registry's: not root", self.full(path).printable()),
            result => result.map_err(wrap)?,
        }
        fs::fchmod(&file, Mode::from_raw_mode(wanted.st_mode as RawMode & 0o666)).map_err(wrap)?;
        let written = file.write_all(content).and_then(|()| file.sync_all());
        written.map_err(|e| Error::io(doing, &self.full(path), e))?;
        match self.parent(new, doing)? {
            Some(place) => Ok(place),
            None => Err(wrap(Errno::NOENT)),
        }
    }

    pub(super) fn create_once(&self, path: &Path, content: &[u8]) -> Result<()> {
        let doing = "write";
        self.make_directory_like_its_parent(path.parent().unwrap_or(Path::new("")))?;
        let Some((parent, name)) = self.parent(path, doing)? else {
            return Err(self.error(doing, path, Errno::NOENT));
        };
        let (new_parent, new_name) = self.write_new(&parent, path, content)?;
        let new = Place { parent: &new_parent, name: new_name, is_ours: true };
        match move_to(new, Place { parent: &parent, name, is_ours: false }) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => Err(Error::Exists { path: self.full(path) }),
            Err(e) => Err(self.error(doing, path, e)),
        }
    }

    pub(super) fn replace_once(&self, path: &Path, content: &[u8], saved: &Path) -> Result<()> {
        let doing = "replace";
        let Some((parent, name)) = self.parent(path, doing)? else {
            return Err(self.error(doing, path, Errno::NOENT));
        };
        let (new_parent, new_name) = self.write_new(&parent, path, content)?;
        // Owner and mode of directories in the trash are those of the store, so that an undo finds them.
        self.make_directories(saved.parent().unwrap_or(Path::new("")), path.parent())?;
        let Some((to_parent, to_name)) = self.parent(saved, doing)? else {
            return Err(self.error(doing, saved, Errno::NOENT));
        };
        let new = Place { parent: &new_parent, name: new_name, is_ours: true };
        let old = Place { parent: &parent, name, is_ours: false };
        match exchange(new, old, Place { parent: &to_parent, name: to_name, is_ours: true }) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => Err(Error::Exists { path: self.full(saved) }),
            Err(Errno::AGAIN) => Err(Error::Changed { what: self.full(path).printable().to_string() }),
            Err(e) => Err(self.error(doing, path, e)),
        }
    }
}
