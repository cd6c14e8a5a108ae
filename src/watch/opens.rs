//! Opens: the files that are opened through one mount, each of which waits until it is let go on.
//!
//! A registry that works in a bind mount of its storage can be held for a moment where it opens a file. Opens through other
//! mounts, our own among them, are not held.
//!
//! # Rules kept here
//! 1. An [`Open`] that is dropped is let go on, so no error holds a registry.
//! 2. When the process ends, the kernel lets all of them go on. A process that is only stopped holds them, so who reads
//!    them sees to it that it ends then ([`super::held`]).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, openat, statx};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};

use super::{METADATA, number, place_of};
use crate::error::{Error, Result};
use crate::layout::REGISTRY_DIR;
use crate::printable::Printable;
use crate::sys;

/// Bytes for events that are read at once.
const BUFFER: usize = 4096;
/// `FAN_ALLOW` (fanotify(7)).
const ALLOW: u32 = libc::FAN_ALLOW;

/// The opens through a mount.
pub struct Opens {
    events: OwnedFd,
    /// The registry directory, as the mount shows it.
    registry: PathBuf,
}

/// A file that somebody is opening.
pub struct Open<'a> {
    opens: &'a Opens,
    file: OwnedFd,
    /// Who.
    pub pid: u32,
}

impl Opens {
    /// Those through `directory`: a bind mount of the storage root `storage`, which is made if it is not there yet, and
    /// which stays. For root only.
    pub fn through(directory: &Path, storage: &Path) -> Result<Opens> {
        let canonical = directory.canonicalize().map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::invalid(format!(
                "{} does not exist; make that directory, for the registry to work in",
                directory.printable()
            )),
            _ => failed(directory, e),
        })?;
        if !is_mount_of(&canonical, storage)? {
            bind(&canonical, storage)?;
        }
        Opens::through_mount(&canonical)
    }

    /// Those through the mount that `directory` is the root of.
    pub(crate) fn through_mount(directory: &Path) -> Result<Opens> {
        let failed = |e: io::Error| failed(directory, e);
        let directory = directory.canonicalize().map_err(failed)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, &directory, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
        let events = sys::mount_opens(root.as_fd()).map_err(failed)?;
        Ok(Opens { events, registry: directory.join(REGISTRY_DIR) })
    }

    /// Becomes readable when somebody opens a file.
    pub fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// Those that wait now.
    pub fn waiting(&self) -> io::Result<Vec<Open<'_>>> {
        let waiting = opened(&self.events)?.into_iter();
        Ok(waiting.map(|(file, pid)| Open { opens: self, file, pid }).collect())
    }
}

/// Files that were opened, and by whom; none where nothing more is to be read.
pub(super) fn opened(events: &OwnedFd) -> io::Result<Vec<(OwnedFd, u32)>> {
    let mut buffer = [0; BUFFER];
    let read = match rustix::io::read(events, &mut buffer) {
        Err(Errno::AGAIN | Errno::INTR) => 0,
        read => read?,
    };
    let (mut rest, mut found) = (&buffer[..read], Vec::new());
    while let Some(length) = number(rest, 0).map(|length| length as usize) {
        let Some((event, after)) = rest.split_at_checked(length.max(METADATA)) else { break };
        rest = after;
        let file = number(event, 16).and_then(|file| sys::opened_file(file.cast_signed()));
        let pid = number(event, 20).unwrap_or_default();
        found.extend(file.map(|file| (file, pid)));
    }
    Ok(found)
}

impl Open<'_> {
    /// Which file, below the registry directory; `None` for one elsewhere.
    pub fn path(&self) -> Option<PathBuf> {
        let path = place_of(self.file.as_fd()).ok()?;
        path.strip_prefix(&self.opens.registry).ok().map(Path::to_path_buf)
    }
}

impl Drop for Open<'_> {
    /// Lets it go on.
    fn drop(&mut self) {
        // `struct fanotify_response`: which file, and the answer.
        let mut answer = [0; 8];
        answer[..4].copy_from_slice(&self.file.as_raw_fd().to_ne_bytes());
        answer[4..].copy_from_slice(&ALLOW.to_ne_bytes());
        match rustix::io::write(&self.opens.events, &answer) {
            // It was killed meanwhile, and waits no more.
            Ok(_) | Err(Errno::NOENT) => {}
            Err(e) => log::warn!("could not let process {} open a file: {e}", self.pid),
        }
    }
}

fn failed(directory: &Path, e: io::Error) -> Error {
    Error::io("guard what is opened through", directory, e)
}

/// Whether `directory` is the storage, on a mount of its own.
fn is_mount_of(directory: &Path, storage: &Path) -> Result<bool> {
    let look = |path: &Path| {
        let flags = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        statx(CWD, path, AtFlags::empty(), flags).map_err(|e| Error::io("look at", path, e))
    };
    let (there, own) = (look(directory)?, look(storage)?);
    let device = |s: &rustix::fs::Statx| (s.stx_dev_major, s.stx_dev_minor, s.stx_ino);
    if device(&there) != device(&own) {
        return Ok(false);
    }
    match there.stx_mnt_id != own.stx_mnt_id {
        true => Ok(true),
        false => Err(Error::invalid(format!(
            "{} is the storage itself; give that as STORE (not a config.yml that names the guarded directory), and as the \
             guarded directory another one, which is the rootdirectory of the registry",
            directory.printable()
        ))),
    }
}

/// Makes the bind mount.
fn bind(directory: &Path, storage: &Path) -> Result<()> {
    let failed = |e: io::Error| Error::io("mount the storage for the registry on", directory, e);
    if directory.read_dir().map_err(failed)?.next().is_some() {
        return Err(Error::invalid(format!(
            "{} is neither empty nor a bind mount of {}; the guard takes an empty directory",
            directory.printable(),
            storage.printable()
        )));
    }
    mount_bind(storage, directory).map_err(|e| failed(e.into()))?;
    mount_change(directory, MountPropagationFlags::PRIVATE).map_err(|e| failed(e.into()))
}
