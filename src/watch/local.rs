//! Whether all changes of a storage are made through this kernel, which then tells of them.
//!
//! On a filesystem that lies elsewhere (NFS, another daemon of FUSE, virtiofs, a cluster) others write without our kernel,
//! which would still tell of our own writes, so trying shows nothing. Only filesystems that are known to be local count.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags, statfs, statx};
use rustix::io::Errno;

use crate::layout;
use crate::printable::Printable;

/// Filesystems on a disk or in the memory of this machine, by the number that statfs(2) tells.
const LOCAL: &[u64] = &[
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // XFS
    0x9123_683e, // Btrfs
    0xf2f5_2010, // F2FS
    0xca45_1a4e, // bcachefs
    0x2fc1_2fc1, // ZFS
    0x0102_1994, // tmpfs
    0x8584_58f6, // ramfs
    0x3153_464a, // JFS
    0x5265_4973, // ReiserFS
    0x3434,      // NILFS
    0x2011_bab0, // exFAT
    0x4d44,      // FAT
    0x7366_746e, // NTFS
];

/// What they are called that people meet.
const ELSEWHERE: &[(u64, &str)] = &[
    (0x6573_5546, "FUSE or virtiofs"),
    (0x6969, "NFS"),
    (0xff53_4d42, "SMB"),
    (0xfe53_4d42, "SMB"),
    (0x0102_1997, "9p"),
    (0x00c3_6400, "CephFS"),
    (0x0bd0_0bd0, "Lustre"),
    (0x0116_1970, "GFS2"),
    (0x7461_636f, "OCFS2"),
    (0x794c_7630, "overlayfs"),
];

/// Fails where changes may be made that our kernel does not see; `root` is the registry directory.
pub(super) fn expect_local(root: &Path) -> io::Result<()> {
    // A number of 32 bits, whatever the type; on some machines it comes with a sign.
    let number = statfs(root)?.f_type as u64 & 0xffff_ffff;
    if !LOCAL.contains(&number) {
        let name = ELSEWHERE.iter().find(|(other, _)| *other == number).map(|(_, name)| *name);
        let what = name.map_or_else(|| format!("a filesystem of type {number:#x}"), str::to_string);
        return Err(io::Error::other(format!("the storage lies on {what}, where others may write unseen")));
    }
    match parts_elsewhere(root)?.first() {
        Some(part) => Err(io::Error::other(format!("{} is a mount of its own", part.printable()))),
        None => Ok(()),
    }
}

/// Parts of the registry directory that are mounts of their own: events name places on the one that was asked about.
fn parts_elsewhere(root: &Path) -> io::Result<Vec<PathBuf>> {
    let place = |path: &Path| {
        let there =
            statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID)?;
        Ok((there.stx_dev_major, there.stx_dev_minor, there.stx_mnt_id))
    };
    let own = place(root)?;
    let mut parts = Vec::new();
    for part in [layout::BLOBS, layout::REPOSITORIES, layout::OWN].map(|part| root.join(part)) {
        match place(&part) {
            Ok(there) if there != own => parts.push(part),
            Ok(_) | Err(Errno::NOENT) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_to_be_local_is_not() {
        let said = expect_local(Path::new("/proc")).expect_err("no disk").to_string();
        assert!(said.contains("0x9fa0"), "{said}");
        assert!(ELSEWHERE.iter().all(|(number, _)| !LOCAL.contains(number)));
    }
}
