//! The reserve for a full disk, `.regfs/reserve/`.
//!
//! Space is freed by a purge, which needs none; but what is purged was taken before, and taking needs a description
//! and on most filesystems an inode and a block for each new directory. So the reserve holds [`RESERVE_BYTES`] in one
//! file, and [`RESERVE_INODES`] more files with nothing in them: whoever takes the lock makes it, a change that meets a full disk
//! gives it up and tries again, and whoever lets go of the lock makes it anew when there is space again.
//!
//! A disk that was full before regfs first changed something has none. Then what can be done without goes: the cache,
//! and the empty `_uploads` of repositories, which a registry makes anew for the next push.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, RawMode, Uid};
use rustix::io::Errno;

use super::Disk;
use super::open::kind_of;
use super::tree::entries;
use crate::error::Result;
use crate::layout;
use crate::printable::Printable;
use crate::store::{Kind, Store};

/// Space kept for a full disk: with 4 KiB for each directory enough to take more than a hundred blobs.
pub const RESERVE_BYTES: u64 = 1 << 20;
/// Inodes kept for a disk that has no more; fewer where it has few.
pub const RESERVE_INODES: u64 = 128;
/// The largest part of all inodes that is kept.
const PART_OF_INODES: u64 = 16;
/// So many empty directories of uploads go at most.
const UPLOADS_AT_MOST: usize = 64;

/// Name of the reserve in our own directory, and of the file in it that holds space.
const RESERVE: &str = "reserve";
const BYTES: &str = "bytes";

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl Disk {
    /// Does what may need space; on a full disk the reserve is given up for it, or what can be done without.
    pub(super) fn with_reserve<T>(&self, act: impl Fn() -> Result<T>) -> Result<T> {
        match act() {
            Err(e) if e.is_full() && (self.release_reserve() || self.make_room()) => act(),
            result => result,
        }
    }

    /// Gives up the reserve; `false`: there is none.
    fn release_reserve(&self) -> bool {
        let own = self.open_below(Path::new(layout::OWN), DIRECTORY, Mode::empty());
        if !own.is_ok_and(|own| release(&own)) {
            return false;
        }
        log::warn!("the disk of {} is full; the reserve is used up", self.path.printable());
        self.settle();
        true
    }

    /// Removes what costs nothing but time; `false`: there is no such thing.
    fn make_room(&self) -> bool {
        // What can't be listed gives no room.
        let names = |path: &Path| self.list(path).ok().flatten().unwrap_or_default();
        let cached: Vec<PathBuf> =
            names(Path::new(layout::CACHE)).iter().map(|e| Path::new(layout::CACHE).join(&e.name)).collect();
        let mut removed = cached.len() - self.remove(&cached).len();
        let mut places = vec![PathBuf::new()];
        while let Some(name) = places.pop().filter(|_| removed < UPLOADS_AT_MOST) {
            for entry in names(&layout::repository(&name)) {
                let below = name.join(&entry.name);
                match entry.kind {
                    // Not if there is an upload in it.
                    Kind::Directory if entry.name == layout::UPLOADS => {
                        removed += usize::from(
                            self.remove_directory(&layout::repository(&below)).is_ok_and(|is_gone| is_gone),
                        );
                    }
                    Kind::Directory if layout::is_name_component(&entry.name) => places.push(below),
                    _ => {}
                }
            }
        }
        if removed > 0 {
            log::warn!(
                "the disk of {} is full; the cache of regfs and empty directories of uploads are removed",
                self.path.printable()
            );
            self.settle();
        }
        removed > 0
    }

    /// ext4 hands out freed blocks only after a commit. When that fails, the next try tells why.
    fn settle(&self) {
        let _ = fs::syncfs(self.root.as_fd());
    }
}

/// Removes the reserve; whether there was any.
fn release(own: &OwnedFd) -> bool {
    // One that an earlier regfs made is a file; so may be something planted, of which only this name goes.
    if fs::unlinkat(own, RESERVE, AtFlags::empty()).is_ok() {
        return true;
    }
    let Ok(reserve) = fs::openat(own, RESERVE, DIRECTORY, Mode::empty()) else { return false };
    // What can't go gives no space, which the next try shows.
    let names = entries(&reserve).unwrap_or_default();
    let removed = names.iter().filter(|(n, _)| fs::unlinkat(&reserve, n, AtFlags::empty()).is_ok()).count();
    let _ = fs::unlinkat(own, RESERVE, AtFlags::REMOVEDIR);
    removed > 0
}

/// Makes the reserve, if it is not there. That there is no space for it, or no way to keep space on this
/// filesystem, stops nobody.
pub(super) fn make(own: &OwnedFd) {
    if is_whole(own) {
        return;
    }
    // A part of one goes, and so does something planted: a named pipe would keep us waiting for a reader, another
    // name of a blob would grow.
    release(own);
    if let Err(e) = try_make(own) {
        log::debug!("could not make the reserve for a full disk: {e}");
        // A part of it would hold the space that is missing; whether it goes, the next one sees.
        release(own);
    }
}

fn try_make(own: &OwnedFd) -> rustix::io::Result<()> {
    match fs::mkdirat(own, RESERVE, Mode::from_raw_mode(0o700)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(e),
    }
    let reserve = fs::openat(own, RESERVE, DIRECTORY, Mode::empty())?;
    // Whoever may change the store next may give it up.
    let wanted = fs::fstat(own)?;
    match fs::fchown(&reserve, Some(Uid::from_raw(wanted.st_uid)), Some(Gid::from_raw(wanted.st_gid))) {
        Err(Errno::PERM) => {}
        result => result?,
    }
    fs::fchmod(&reserve, Mode::from_raw_mode(wanted.st_mode as RawMode & 0o7777))?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let create = |name: &str| fs::openat(&reserve, name, flags, Mode::from_raw_mode(0o600));
    let bytes = create(BYTES)?;
    match fs::fallocate(&bytes, fs::FallocateFlags::empty(), 0, RESERVE_BYTES) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => fill(bytes)?,
        result => result?,
    }
    (0..inodes(own)).try_for_each(|number| create(&number.to_string()).map(drop))
}

/// Takes the space by writing, where a filesystem has no other way.
fn fill(file: OwnedFd) -> rustix::io::Result<()> {
    let zeros = vec![0; RESERVE_BYTES as usize];
    let written = File::from(file).write_all(&zeros);
    written.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))
}

fn is_whole(own: &OwnedFd) -> bool {
    let Ok(reserve) = fs::openat(own, RESERVE, DIRECTORY, Mode::empty()) else { return false };
    let is_ours = |stat: fs::Stat| {
        kind_of(FileType::from_raw_mode(stat.st_mode as RawMode)) == Kind::File
            && stat.st_nlink == 1
            && stat.st_size.max(0).unsigned_abs() >= RESERVE_BYTES
    };
    fs::statat(&reserve, BYTES, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(is_ours)
        && entries(&reserve).is_ok_and(|entries| entries.len() as u64 > inodes(own))
}

/// How many inodes are kept; none where a filesystem makes them as it needs them.
fn inodes(own: &OwnedFd) -> u64 {
    fs::fstatvfs(own).map_or(0, |stat| RESERVE_INODES.min(stat.f_files / PART_OF_INODES))
}
