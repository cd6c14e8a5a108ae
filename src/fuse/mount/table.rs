//! What is mounted where: `/proc/<pid>/mountinfo` (proc(5))

use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::is_dead;
use crate::error::{Error, Result};

/// The type of our mounts.
const FILESYSTEM_TYPE: &str = "fuse.regfs";

/// What is mounted in our mount namespace.
pub(super) const OURS: &str = "/proc/self/mountinfo";

/// A mount.
pub(super) struct MountEntry {
    /// Tells it from all others in its mount namespace.
    pub(super) id: u64,
    /// `major:minor`, which tells it from others on the same directory.
    pub(super) device: String,
    /// Where it is mounted.
    pub(super) place: PathBuf,
    /// Whether a regfs serves it, alive or dead.
    pub(super) is_regfs: bool,
    /// Who mounted it, if it is one of FUSE.
    pub(super) user: Option<u32>,
}

/// All mounts, the later ones on top.
pub(super) fn mounts() -> Result<Vec<MountEntry>> {
    mounts_in(Path::new(OURS))
}

/// Those in the mount namespace of a process, whose table is `mountinfo`.
pub(super) fn mounts_in(mountinfo: &Path) -> Result<Vec<MountEntry>> {
    let text = std::fs::read(mountinfo).map_err(|e| Error::io("read", mountinfo, e))?;
    Ok(text.split(|b| *b == b'\n').filter_map(parse).collect())
}

/// The topmost mount on `mountpoint`; `None` when nothing is mounted there.
pub(super) fn topmost(mountpoint: &Path) -> Result<Option<MountEntry>> {
    Ok(mounts()?.into_iter().rfind(|mount| mount.place == mountpoint))
}

/// Whether the topmost mount on `mountpoint` is a regfs, alive or dead.
pub(super) fn is_mounted(mountpoint: &Path) -> Result<bool> {
    Ok(topmost(mountpoint)?.is_some_and(|mount| mount.is_regfs))
}

fn parse(line: &[u8]) -> Option<MountEntry> {
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let dash = fields.iter().position(|field| *field == b"-")?;
    let number = |digits: &[u8]| std::str::from_utf8(digits).ok()?.parse::<u64>().ok();
    let options = fields.get(dash + 3).copied().unwrap_or_default();
    let user = options.split(|b| *b == b',').find_map(|option| option.strip_prefix(b"user_id="));
    Some(MountEntry {
        id: number(fields.first()?)?,
        device: String::from_utf8_lossy(fields.get(2)?).into_owned(),
        place: unescape(fields.get(4)?),
        is_regfs: *fields.get(dash + 1)? == FILESYSTEM_TYPE.as_bytes(),
        user: user.and_then(number).and_then(|user| user.try_into().ok()),
    })
}

/// Reads the octal escapes: `\040` is a blank.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| *first == b'\\').and_then(|o| std::str::from_utf8(o).ok());
        match octal.and_then(|o| u8::from_str_radix(o, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

/// The name under which the kernel knows a mountpoint: absolute, without symlinks on the way; the last component is
/// not looked at, since the mount on it may be dead.
pub fn absolute(mountpoint: &Path) -> Result<PathBuf> {
    let error = |e| Error::io("find the mountpoint", mountpoint, e);
    match mountpoint.canonicalize() {
        Ok(path) => Ok(path),
        Err(e) if is_dead(&e) => {
            let path = std::path::absolute(mountpoint).map_err(error)?;
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
                return Ok(path);
            };
            Ok(parent.canonicalize().map_err(error)?.join(name))
        }
        Err(e) => Err(error(e)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn mountinfo_escapes_are_read() {
        assert_eq!(unescape(b"/a\\040b\\134c\\011"), Path::new("/a b\\c\t"));
        assert_eq!(unescape(b"/a\\04"), Path::new("/a\\04"));
        assert_eq!(unescape("/ä".as_bytes()).as_os_str().as_bytes(), "/ä".as_bytes());
    }

    #[test]
    fn a_line_has_optional_fields() {
        let line = b"36 35 0:52 / /mnt/a\\040b rw,noatime shared:7 master:1 - fuse.regfs /srv/registry rw,user_id=0,group_id=0";
        let mount = parse(line).expect("a mount");
        assert_eq!(
            (mount.id, mount.device.as_str(), mount.is_regfs, mount.user),
            (36, "0:52", true, Some(0))
        );
        assert_eq!(mount.place, Path::new("/mnt/a b"));
        assert!(parse(b"").is_none());
    }
}
