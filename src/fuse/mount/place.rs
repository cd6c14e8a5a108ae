//! Whether a mount still has its place: somebody may unmount it while others are inside, or mount another regfs there.
//!
//! Such a mount goes on for those who are inside, but does nothing by itself any more. The kernel tells of each change of
//! the table of mounts (proc(5)), whoever makes it: `regfs umount`, umount(8), fusermount3, `regfs mount --replace`.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{AtFlags, StatxFlags, statx};

use super::table::{self, MountEntry};
use crate::engine::Engine;
use crate::error::{Error, Result};

/// On a busy machine the table changes all the time.
const SETTLES: Duration = Duration::from_millis(50);

/// What tells a mount from all others, wherever it is moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// `major:minor` of the filesystem.
    pub(super) device: String,
    /// The number of this mount of it; `None` where the kernel does not tell (before 5.8).
    id: Option<u64>,
}

impl Identity {
    /// The mount that `path` below `directory` is the root of.
    pub(super) fn of(directory: impl AsFd, path: &Path) -> rustix::io::Result<Identity> {
        let there =
            statx(directory, path, AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID)?;
        let id = StatxFlags::from_bits_retain(there.stx_mask).contains(StatxFlags::MNT_ID);
        Ok(Identity {
            device: format!("{}:{}", there.stx_dev_major, there.stx_dev_minor),
            id: id.then_some(there.stx_mnt_id),
        })
    }

    fn is(&self, mount: &MountEntry) -> bool {
        mount.device == self.device && self.id.is_none_or(|id| id == mount.id)
    }
}

/// Tells the engine when the mount has lost its place.
pub(super) fn watch(engine: Arc<Engine>, mount: Identity, mountpoint: &Path) -> Result<()> {
    let file = File::open(table::OURS).map_err(|e| Error::io("open", Path::new(table::OURS), e))?;
    let (weak, place) = (Arc::downgrade(&engine), mountpoint.to_path_buf());
    let watching = move || watching(&weak, &mount, &file, &place);
    let spawned = std::thread::Builder::new().name("place".into()).spawn(watching);
    spawned.map(drop).map_err(|e| Error::io("watch", mountpoint, e))
}

fn watching(engine: &Weak<Engine>, mount: &Identity, table: &File, mountpoint: &Path) {
    loop {
        match table::mounts() {
            Ok(mounts) if mounts.iter().any(|other| mount.is(other)) => {}
            Ok(_) => {
                let Some(engine) = engine.upgrade() else { return };
                return engine.retire(mountpoint);
            }
            Err(e) => log::warn!("{e}"),
        }
        // Readable at any time; a change is told as an error.
        let mut changed = [PollFd::new(table, PollFlags::PRI | PollFlags::ERR)];
        if let Err(e) = poll(&mut changed, None) {
            log::debug!("could not wait for mounts to change: {e}");
        }
        std::thread::sleep(SETTLES);
    }
}
