//! A mount that is served before it has a place (fsopen(2), fsmount(2), move_mount(2))
//!
//! So nobody meets a mount that does not answer yet, one that fails was never there, and another regfs can be
//! replaced while it is in use.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};

use super::MountOptions;
use crate::error::{Error, Result};
use crate::printable::Printable;

/// `MOVE_MOUNT_BENEATH` (Linux 6.5), which rustix has no name for.
const BENEATH: MoveMountFlags = MoveMountFlags::from_bits_retain(0x200);

/// A mount without a place: goes when it is dropped.
pub(super) struct Detached {
    /// The kernel's end of the FUSE connection.
    pub(super) fuse: OwnedFd,
    /// An `O_PATH` descriptor of the root.
    pub(super) root: OwnedFd,
}

/// Makes a FUSE mount that has no place yet.
pub(super) fn detached(options: &MountOptions) -> Result<Detached> {
    let device = Path::new("/dev/fuse");
    let file = OpenOptions::new().read(true).write(true).open(device);
    let fuse: OwnedFd = file.map_err(|e| Error::io("open (is the fuse module loaded?)", device, e))?.into();
    let root = configured(options, fuse.as_fd());
    let root = root.map_err(|e| Error::io("mount on", &options.mountpoint, e))?;
    Ok(Detached { fuse, root })
}

fn configured(options: &MountOptions, fuse: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    let context = fsopen(c"fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let context = context.as_fd();
    fsconfig_set_string(context, "source", &options.source)?;
    fsconfig_set_string(context, "subtype", "regfs")?;
    fsconfig_set_string(context, "fd", fuse.as_raw_fd().to_string())?;
    fsconfig_set_string(context, "rootmode", "40000")?;
    fsconfig_set_string(context, "user_id", rustix::process::geteuid().as_raw().to_string())?;
    fsconfig_set_string(context, "group_id", rustix::process::getegid().as_raw().to_string())?;
    fsconfig_set_flag(context, "default_permissions")?;
    if options.allow_other {
        fsconfig_set_flag(context, "allow_other")?;
    }
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_NOATIME;
    if options.read_only {
        fsconfig_set_flag(context, "ro")?;
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    fsconfig_create(context)?;
    fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Gives a mount its place.
pub(super) fn attach(root: &OwnedFd, mountpoint: &Path) -> Result<()> {
    put(root, mountpoint, MoveMountFlags::empty()).map_err(|e| Error::io("mount on", mountpoint, e))
}

/// Gives a mount the place of the one that is there: puts it beneath, then takes the other one's name away. Who is
/// inside the other one stays there until they leave.
pub(super) fn replace(root: &OwnedFd, mountpoint: &Path) -> Result<()> {
    let error = |e: Errno| Error::io("replace the mount on", mountpoint, e);
    // By descriptor, so that nothing else can be what goes. The link of a descriptor leads to its very mount.
    let old = rustix::fs::open(mountpoint, OFlags::PATH | OFlags::CLOEXEC, rustix::fs::Mode::empty());
    let old = old.map_err(error)?;
    let take_away = || match unmount(format!("/proc/self/fd/{}", old.as_raw_fd()), UnmountFlags::DETACH) {
        // It was unmounted meanwhile, so its place is free already.
        Err(Errno::INVAL) | Ok(()) => Ok(()),
        Err(e) => Err(error(e)),
    };
    match put(root, mountpoint, BENEATH) {
        Ok(()) => take_away(),
        // Before 6.5, or a parent mount whose mounts spread to others.
        Err(Errno::INVAL) => {
            log::warn!(
                "this kernel can't mount beneath {}: for a moment nothing was mounted there",
                mountpoint.printable()
            );
            take_away()?;
            attach(root, mountpoint)
        }
        Err(e) => Err(error(e)),
    }
}

fn put(root: &OwnedFd, mountpoint: &Path, flags: MoveMountFlags) -> rustix::io::Result<()> {
    move_mount(root, "", CWD, mountpoint, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | flags)
}
