//! Moves that replace nothing, and what a filesystem without renameat2(2) offers instead.
//!
//! NFS, some FUSE and network filesystems know neither `RENAME_NOREPLACE` nor `RENAME_EXCHANGE`. There
//!
//! - a directory moves by rename(2), which replaces nothing but an empty directory;
//! - a file moves into regfs's own directory by rename(2) if there is nothing of that name: nobody else writes there
//!   while we have the lock;
//! - a file comes back, or is made, by link(2), which replaces nothing, and then loses its name in regfs's own directory;
//!   a crash in between leaves both names of the same file;
//! - a file is replaced by link(2), which keeps the old one, and rename(2). Its name never leads nowhere. What a
//!   registry writes in the moment between the two is replaced by what we write, as if it had come before.
//!
//! Which of these there is, is found out by doing it, once, by whoever takes the lock or mounts.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, RawMode, RenameFlags};
use rustix::io::{self, Errno};

use super::Disk;
use super::open::kind_of;
use crate::error::{Error, Result};
use crate::layout;
use crate::printable::Printable;
use crate::store::{Kind, Store};

/// A name in an open directory.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) parent: &'a OwnedFd,
    pub(super) name: &'a OsStr,
    /// Whether it is in regfs's own directory.
    pub(super) is_ours: bool,
}

/// Whether a call is one that the filesystem does not know.
fn is_unknown(errno: Errno) -> bool {
    matches!(errno, Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP)
}

/// Moves a file or a directory; `EEXIST` where there is something already.
pub(super) fn move_to(from: Place<'_>, to: Place<'_>) -> io::Result<()> {
    match fs::renameat_with(from.parent, from.name, to.parent, to.name, RenameFlags::NOREPLACE) {
        Err(e) if is_unknown(e) => move_otherwise(from, to),
        result => result,
    }
}

/// The same where there is no `RENAME_NOREPLACE`.
fn move_otherwise(from: Place<'_>, to: Place<'_>) -> io::Result<()> {
    let stat = fs::statat(from.parent, from.name, AtFlags::SYMLINK_NOFOLLOW)?;
    let rename = || fs::renameat(from.parent, from.name, to.parent, to.name);
    if kind_of(FileType::from_raw_mode(stat.st_mode as RawMode)) == Kind::Directory {
        return match rename() {
            Err(Errno::NOTEMPTY | Errno::NOTDIR) => Err(Errno::EXIST),
            result => result,
        };
    }
    if to.is_ours {
        return match fs::statat(to.parent, to.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Err(Errno::EXIST),
            Err(Errno::NOENT) => rename(),
            Err(e) => Err(e),
        };
    }
    fs::linkat(from.parent, from.name, to.parent, to.name, AtFlags::empty())?;
    fs::unlinkat(from.parent, from.name, AtFlags::empty())
}

/// Puts `new` in the place of the file `old`, which becomes `saved`. `EAGAIN`: another one is there by now.
pub(super) fn exchange(new: Place<'_>, old: Place<'_>, saved: Place<'_>) -> io::Result<()> {
    match fs::renameat_with(new.parent, new.name, old.parent, old.name, RenameFlags::EXCHANGE) {
        Ok(()) => move_to(new, saved),
        Err(e) if is_unknown(e) => {
            fs::linkat(old.parent, old.name, saved.parent, saved.name, AtFlags::empty())?;
            let inode = |of: Place<'_>| {
                fs::statat(of.parent, of.name, AtFlags::SYMLINK_NOFOLLOW).map(|s| (s.st_dev, s.st_ino))
            };
            if inode(old)? != inode(saved)? {
                fs::unlinkat(saved.parent, saved.name, AtFlags::empty())?;
                return Err(Errno::AGAIN);
            }
            fs::renameat(new.parent, new.name, old.parent, old.name)
        }
        Err(e) => Err(e),
    }
}

impl Disk {
    /// Finds out by doing it in regfs's own directory whether things can be taken out of this storage and come back.
    ///
    /// # Errors
    /// [`Error::Incapable`] when they can't.
    pub fn expect_able(&self) -> Result<()> {
        if *self.is_able.get().unwrap_or(&false) {
            return Ok(());
        }
        let own = Path::new(layout::OWN);
        let was_there = self.list(own)?.is_some();
        self.with_reserve(|| self.make_directories(own, None))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let own = self.open_below(own, flags, Mode::empty()).map_err(|e| self.error("open", own, e))?;
        let names = ["a", "b"].map(|part| format!("able-{}-{part}.tmp", std::process::id()));
        let tried = self.try_moves(&own, &names);
        for name in &names {
            self.clear(&Path::new(layout::OWN).join(name))?;
        }
        if !was_there {
            // Where it is not empty, somebody else needs it by now.
            self.remove_directory(Path::new(layout::OWN))?;
        }
        match tried {
            // What is full now is no reason to do without; the change itself meets it again.
            Ok(()) | Err(Errno::NOSPC | Errno::DQUOT) => {}
            Err(why) => return Err(Error::Incapable { path: self.path.clone(), source: why.into() }),
        }
        // Somebody else may have said the same.
        let _ = self.is_able.set(true);
        Ok(())
    }

    fn try_moves(&self, own: &OwnedFd, names: &[String; 2]) -> io::Result<()> {
        let place = |at: usize, is_ours| Place { parent: own, name: OsStr::new(&names[at]), is_ours };
        let make = |at: usize| {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            fs::openat(own, &names[at], flags, Mode::from_raw_mode(0o600)).map(drop)
        };
        make(0)?;
        let result = fs::renameat_with(own, &names[0], own, &names[1], RenameFlags::NOREPLACE);
        match result {
            Err(e) if is_unknown(e) => {
                log::info!(
                    "the filesystem of {} has no rename that replaces nothing (renameat2); regfs moves by link and rename",
                    self.path.printable()
                );
                // As if it came back to the registry.
                move_otherwise(place(0, true), place(1, false))
            }
            result => result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a filesystem without renameat2 does, on one that has it.
    #[test]
    fn what_moves_otherwise_replaces_nothing_either() {
        let directory = tempfile::tempdir().unwrap();
        let open = fs::open(directory.path(), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let path = |name: &str| directory.path().join(name);
        let place = |name: &'static str, is_ours| Place { parent: &open, name: OsStr::new(name), is_ours };
        for is_ours in [false, true] {
            std::fs::write(path("from"), "new").unwrap();
            std::fs::write(path("there"), "old").unwrap();
            assert_eq!(move_otherwise(place("from", true), place("there", is_ours)), Err(Errno::EXIST));
            assert_eq!(std::fs::read(path("there")).unwrap(), b"old");
            assert_eq!(move_otherwise(place("from", true), place("to", is_ours)), Ok(()));
            assert_eq!(std::fs::read(path("to")).unwrap(), b"new");
            assert!(!path("from").exists());
            std::fs::remove_file(path("to")).unwrap();
        }
        std::fs::create_dir_all(path("full/x")).unwrap();
        std::fs::create_dir(path("directory")).unwrap();
        for there in ["full", "there"] {
            assert_eq!(
                move_otherwise(place("directory", true), place(there, false)),
                Err(Errno::EXIST),
                "{there}"
            );
        }
        assert_eq!(move_otherwise(place("directory", true), place("moved", false)), Ok(()));
        assert_eq!(move_otherwise(place("nothing", true), place("to", false)), Err(Errno::NOENT));
    }
}
