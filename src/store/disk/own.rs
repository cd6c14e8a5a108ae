//! What regfs keeps in its own directory `.regfs`, which whoever owns the storage can write to as well.
//!
//! # Rules kept here
//! 1. A file of ours is believed only if it is a regular file with one name that we, root or the owner of the storage
//!    wrote. Another name of a blob is none, and neither is a file that somebody else may change.
//! 2. What stands in place of ours goes; it is never written through.
//! 3. Everything has the owner of the registry directory, and modes like it: who may read the one may read the other.
//!    Only the lock is for its owner alone: who can open a file can lock it for ever.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, RawMode, Uid};
use rustix::io::Errno;

use super::Disk;
use super::open::kind_of;
use crate::error::{Error, Found, Result};
use crate::layout;
use crate::printable::Printable;
use crate::store::{Kind, Store};

/// Mode of the lock.
pub(super) const LOCK_MODE: RawMode = 0o600;

impl Disk {
    /// Checks that a file of ours at `path` is what we would have made there.
    pub(super) fn expect_own(&self, path: &Path, stat: &fs::Stat) -> Result<()> {
        match self.foreign(stat)? {
            None => Ok(()),
            Some(found) => Err(Error::Misplaced { path: self.full(path), found }),
        }
    }

    /// What makes it impossible that regfs made this file; `None`: it may have.
    pub(super) fn foreign(&self, stat: &fs::Stat) -> Result<Option<Found>> {
        match kind_of(FileType::from_raw_mode(stat.st_mode as RawMode)) {
            Kind::File => {}
            other => return Ok(Some(other.into())),
        }
        if stat.st_nlink != 1 {
            return Ok(Some(Found::Linked));
        }
        let owner = self.registry_stat()?.st_uid;
        let is_ours = [0, owner, rustix::process::geteuid().as_raw()].contains(&stat.st_uid);
        Ok((!is_ours).then_some(Found::Foreign))
    }

    /// Facts about the registry directory, whose owner and mode everything of ours has.
    fn registry_stat(&self) -> Result<fs::Stat> {
        fs::fstat(&self.root).map_err(|e| Error::io("look at", &self.path, e))
    }

    /// Gives what is made at `path` the owner and the mode of the registry directory; nobody else can write to it, and
    /// files have no right to search.
    ///
    /// The cache stays its writer's: it is believed by that one alone.
    pub(super) fn adopt(&self, made: impl AsFd, path: &Path) -> Result<()> {
        let doing = "set owner and mode of";
        let wrap = |e| self.error(doing, path, e);
        let (made, wanted) = (made.as_fd(), self.registry_stat()?);
        let stat = fs::fstat(made).map_err(wrap)?;
        let is_directory = kind_of(FileType::from_raw_mode(stat.st_mode as RawMode)) == Kind::Directory;
        let mode = match is_directory {
            true => wanted.st_mode as RawMode & 0o2775 | 0o700,
            false if path == Path::new(layout::LOCK) => LOCK_MODE,
            false => wanted.st_mode as RawMode & 0o644 | 0o600,
        };
        let keeps_owner = path.starts_with(layout::CACHE) && !is_directory;
        let uid = if keeps_owner { stat.st_uid } else { wanted.st_uid };
        if (stat.st_uid, stat.st_gid) != (uid, wanted.st_gid) {
            match fs::fchown(made, Some(Uid::from_raw(uid)), Some(Gid::from_raw(wanted.st_gid))) {
                // Only root may give files away; whoever made it can use it all the same.
                Err(Errno::PERM) => {
                    log::debug!("could not {doing} {}: not root", self.full(path).printable())
                }
                result => result.map_err(wrap)?,
            }
        }
        if stat.st_mode as RawMode & 0o7777 != mode {
            fs::fchmod(made, Mode::from_raw_mode(mode)).map_err(wrap)?;
        }
        Ok(())
    }

    /// Removes what stands at `path` where something of ours belongs. A directory with something in it is only moved
    /// aside: nobody knows what that is.
    pub(super) fn clear(&self, path: &Path) -> Result<()> {
        let doing = "remove what stands in place of a file of regfs,";
        let wrap = |e| self.error(doing, path, e);
        let Some((parent, name)) = self.parent(path, doing)? else { return Ok(()) };
        let is_gone = |result| matches!(result, Ok(()) | Err(Errno::NOENT));
        match fs::unlinkat(&parent, name, AtFlags::empty()) {
            Err(Errno::ISDIR | Errno::PERM) => {}
            result if is_gone(result) => return Ok(()),
            result => return result.map_err(wrap),
        }
        match fs::unlinkat(&parent, name, AtFlags::REMOVEDIR) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            result if is_gone(result) => return Ok(()),
            result => return result.map_err(wrap),
        }
        for number in 1.. {
            let mut aside = name.to_os_string();
            aside.push(format!(".aside-{number}"));
            // Onto another directory it moves only if that is empty.
            match fs::renameat(&parent, name, &parent, &aside) {
                Ok(()) => {
                    let (there, here) = (self.full(path), self.full(&path.with_file_name(aside)));
                    log::warn!(
                        "{} stood in place of a file of regfs, and is now {}",
                        there.printable(),
                        here.printable()
                    );
                    break;
                }
                Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => {}
                Err(e) => return Err(wrap(e)),
            }
        }
        Ok(())
    }

    /// Gives everything of ours the modes it should have: an earlier regfs kept it for its own user.
    ///
    /// `.regfs` itself last: it tells that the rest is done.
    pub(super) fn mend_modes(&self, own: &OwnedFd) {
        if let Err(e) = self.try_mend_modes(own) {
            // Others can't read what lies there, which they could not before.
            log::debug!("{e}");
        }
    }

    fn try_mend_modes(&self, own: &OwnedFd) -> Result<()> {
        let (stat, wanted) = (
            fs::fstat(own).map_err(|e| self.error("look at", Path::new(layout::OWN), e))?,
            self.registry_stat()?,
        );
        let is_right = stat.st_mode as RawMode & 0o7777 == wanted.st_mode as RawMode & 0o2775 | 0o700;
        let may_mend = [0, stat.st_uid].contains(&rustix::process::geteuid().as_raw());
        if is_right || !may_mend {
            return Ok(());
        }
        let mut places = vec![Path::new(layout::OWN).to_path_buf()];
        while let Some(place) = places.pop() {
            for entry in self.list(&place)?.unwrap_or_default() {
                let path = place.join(entry.name);
                match entry.kind {
                    Kind::Directory if layout::is_own(&path) => {
                        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
                        let wrap = |e| self.error("open the directory", &path, e);
                        self.adopt(self.open_below(&path, flags, Mode::empty()).map_err(wrap)?, &path)?;
                        places.push(path);
                    }
                    Kind::File if layout::is_own(&path) => {
                        if let Some((file, _)) = self.open_file(&path).or_else(unless_damaged)? {
                            self.adopt(&file, &path)?;
                        }
                    }
                    _ => {}
                }
            }
        }
        self.adopt(own, Path::new(layout::OWN))
    }
}

/// What is none of ours is left alone.
fn unless_damaged(error: Error) -> Result<Option<(File, crate::store::Stat)>> {
    if error.is_damage() { Ok(None) } else { Err(error) }
}
