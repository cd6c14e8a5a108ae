//! The reserve for a full disk.
//!
//! Space is freed by a purge, which needs none; but what is purged was taken before, and taking needs a description
//! and on most filesystems a block for each new directory. So `.regfs/reserve` holds [`RESERVE_BYTES`]: whoever takes
//! the lock makes it, a change that meets a full disk gives it up and tries again, and whoever lets go of the lock
//! makes it anew when there is space again. A disk that was full before regfs first changed something has none.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, RawMode};

use super::Disk;
use super::open::kind_of;
use crate::error::{Error, Result};
use crate::layout;
use crate::printable::Printable;
use crate::store::Kind;

/// Space kept for a full disk: with 4 KiB for each directory enough to take more than a hundred blobs.
pub const RESERVE_BYTES: u64 = 1 << 20;

/// Name of the reserve in our own directory.
const RESERVE: &str = "reserve";

impl Disk {
    /// Does what may need space; on a full disk the reserve is given up for it.
    pub(super) fn with_reserve<T>(&self, act: impl Fn() -> Result<T>) -> Result<T> {
        match act() {
            Err(e) if is_full(&e) && self.release_reserve() => act(),
            result => result,
        }
    }

    /// Gives up the reserve; `false`: there is none.
    fn release_reserve(&self) -> bool {
        let own = self.open_below(Path::new(layout::OWN), OFlags::PATH | OFlags::DIRECTORY, Mode::empty());
        if own.and_then(|own| fs::unlinkat(&own, RESERVE, AtFlags::empty())).is_err() {
            return false;
        }
        log::warn!("the disk of {} is full; the reserve is used up", self.path.printable());
        // ext4 hands out freed blocks only after a commit. When that fails, the next try tells why.
        let _ = fs::syncfs(self.root.as_fd());
        true
    }
}

fn is_full(error: &Error) -> bool {
    matches!(error.errno(), libc::ENOSPC | libc::EDQUOT)
}

/// Makes the reserve, if it is not there. That there is no space for it, or no way to keep space on this
/// filesystem, stops nobody.
pub(super) fn make(own: &OwnedFd) {
    let is_whole = |stat: fs::Stat| {
        kind_of(FileType::from_raw_mode(stat.st_mode as RawMode)) == Kind::File
            && stat.st_nlink == 1
            && stat.st_size.max(0).unsigned_abs() >= RESERVE_BYTES
    };
    if fs::statat(own, RESERVE, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(is_whole) {
        return;
    }
    // A part of one goes, and so does something planted: a named pipe would keep us waiting for a reader, another
    // name of a blob would grow. What can't go fails the next call.
    let _ = fs::unlinkat(own, RESERVE, AtFlags::empty());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let reserve = match fs::openat(own, RESERVE, flags, Mode::from_raw_mode(0o600)) {
        Ok(reserve) => reserve,
        Err(e) => return log::debug!("could not make the reserve for a full disk: {e}"),
    };
    if let Err(e) = fs::fallocate(&reserve, fs::FallocateFlags::empty(), 0, RESERVE_BYTES) {
        log::debug!("could not make the reserve for a full disk: {e}");
        // A part of it would hold the space that is missing; whether it goes, the next one sees.
        let _ = fs::unlinkat(own, RESERVE, AtFlags::empty());
    }
}
