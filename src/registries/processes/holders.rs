//! Who has to do with a storage although nothing shows that it is a registry: programs that nobody has seen yet, servers of
//! files, containers whose processes say nothing.
//!
//! A registry that does nothing at the moment holds no file open, so to find nobody proves nothing alone; to find
//! somebody does. Shells and backups below the storage are found as well: whoever asks says that they don't matter.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, OFlags};

use super::handle::Handle;
use super::{Table, is_refused};
use crate::error::{Error, Result};
use crate::layout;
use crate::printable::Printable;

/// What was found.
#[derive(Default)]
pub(in crate::registries) struct Holders {
    /// Each process, and what it has to do with the storage.
    pub(in crate::registries) found: Vec<String>,
    /// So many processes can't be looked into from here.
    pub(in crate::registries) hidden: usize,
}

impl Table {
    /// Those of the processes that can write to the storage below `root` and hold files of it, or see it in a container.
    ///
    /// # Errors
    /// The storage can't be looked at.
    pub(in crate::registries) fn holders(&self, root: &Path) -> Result<Holders> {
        let storage = Storage::of(root).map_err(|e| Error::io("find out what is mounted at", root, e))?;
        let mut holders = Holders { hidden: self.hidden, ..Holders::default() };
        let mut containers = HashSet::new();
        for handle in &self.writers {
            match storage.relation(handle, &mut containers) {
                Ok(None) => {}
                Ok(Some(relation)) => {
                    let words = handle.words().unwrap_or_default().join(OsStr::new(" "));
                    holders.found.push(format!("process {} ({}) {relation}", handle.pid, words.printable()));
                }
                Err(e) => holders.hidden += usize::from(is_refused(&e)),
            }
        }
        Ok(holders)
    }
}

/// Where a storage is, for whoever sees it under another name.
struct Storage {
    registry: PathBuf,
    /// The storage root and the registry directory, as parts of their filesystems.
    spots: Vec<Spot>,
    /// The filesystem of our root directory.
    system: Option<String>,
    /// Our root directory.
    top: (u32, u32, u64),
    /// This program.
    program: (u32, u32, u64),
}

/// A directory as part of a filesystem.
struct Spot {
    device: String,
    path: PathBuf,
}

impl Storage {
    fn of(root: &Path) -> io::Result<Storage> {
        let us = Handle::ours()?;
        let mounts = mounts(&us)?;
        let registry = root.join(layout::REGISTRY_DIR);
        let mut spots = vec![Spot::of(root, &mounts)?];
        match Spot::of(&registry, &mounts) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            spot => spots.push(spot?),
        }
        Ok(Storage {
            registry,
            spots,
            system: mounts.iter().rfind(|mount| mount.at == Path::new("/")).map(|mount| mount.device.clone()),
            top: us.identity("root")?,
            program: us.identity("exe")?,
        })
    }

    /// What a process has to do with the storage; `containers` are those that were looked at.
    fn relation(
        &self,
        handle: &Handle,
        containers: &mut HashSet<(PathBuf, u64)>,
    ) -> io::Result<Option<String>> {
        if self.is_regfs(handle)? {
            return Ok(None);
        }
        for name in handle.names("fd")? {
            if let Some(file) = self.file(handle, &format!("fd/{name}")) {
                return Ok(Some(format!("has {} open", file.printable())));
            }
        }
        let top = handle.identity("root")?;
        if top == self.top || !containers.insert((handle.link("ns/mnt")?, top.2)) {
            return Ok(None);
        }
        let mounts = mounts(handle)?;
        let mount = mounts.iter().find(|mount| self.is_seen_by(mount));
        Ok(mount.map(|mount| {
            format!("runs in a container in which this storage is mounted on {}", mount.at.printable())
        }))
    }

    /// A mount of this store, another command: what they hold is what the lock is for.
    fn is_regfs(&self, handle: &Handle) -> io::Result<bool> {
        Ok(handle.identity("exe")? == self.program
            || super::handle::base_name(&handle.link("exe")?) == env!("CARGO_PKG_NAME"))
    }

    /// The file of the storage that a descriptor is open on. Whatever path it was opened by, the end of the path is that
    /// in the storage, where the same file has to be.
    fn file(&self, handle: &Handle, descriptor: &str) -> Option<PathBuf> {
        let target = handle.link(descriptor).ok()?;
        let inside = [layout::BLOBS, layout::REPOSITORIES].iter().flat_map(|part| tails(&target, part));
        let candidates: Vec<PathBuf> = inside.map(|tail| self.registry.join(tail)).collect();
        if candidates.is_empty() {
            return None;
        }
        let opened = handle.facts(descriptor).ok()?;
        if FileType::from_raw_mode(opened.stx_mode.into()) != FileType::RegularFile {
            return None;
        }
        candidates.into_iter().find(|path| {
            fs::symlink_metadata(path).is_ok_and(|there| {
                let device = rustix::fs::makedev(opened.stx_dev_major, opened.stx_dev_minor);
                (there.dev(), there.ino()) == (device, opened.stx_ino)
            })
        })
    }

    /// Whether a container that has this mount can write to the storage. One that has all of the machine is a tool of it.
    fn is_seen_by(&self, mount: &Mount) -> bool {
        let is_whole_machine = mount.root == Path::new("/") && Some(&mount.device) == self.system.as_ref();
        let holds = |spot: &Spot| {
            spot.device == mount.device
                && (spot.path.starts_with(&mount.root) || mount.root.starts_with(&spot.path))
        };
        mount.is_writable && !is_whole_machine && self.spots.iter().any(holds)
    }
}

impl Spot {
    fn of(path: &Path, mounts: &[Mount]) -> io::Result<Spot> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, rustix::fs::Mode::empty())?;
        let own = |what| format!("/proc/self/{what}/{}", directory.as_raw_fd());
        let facts = fs::read_to_string(own("fdinfo"))?;
        let id = facts.lines().find_map(|line| line.strip_prefix("mnt_id:")).map(str::trim);
        let full = fs::read_link(own("fd"))?;
        let mount = mounts.iter().find(|mount| Some(mount.id.as_str()) == id);
        let spot = mount.and_then(|mount| {
            let path = mount.root.join(full.strip_prefix(&mount.at).ok()?);
            Some(Spot { device: mount.device.clone(), path })
        });
        spot.ok_or_else(|| io::Error::other("it is not among the mounts of this process"))
    }
}

/// The ends of a path that begin with a directory called `part`.
fn tails<'a>(path: &'a Path, part: &'a str) -> impl Iterator<Item = PathBuf> + 'a {
    let parts: Vec<&OsStr> = path.iter().collect();
    let starts: Vec<usize> = (0..parts.len()).filter(|at| parts[*at] == part).collect();
    starts.into_iter().map(move |at| parts[at..].iter().collect())
}

/// One line of `mountinfo` (proc(5)).
struct Mount {
    id: String,
    /// `major:minor`
    device: String,
    /// Which directory of its filesystem is mounted.
    root: PathBuf,
    /// Where, for the process.
    at: PathBuf,
    is_writable: bool,
}

/// What a process sees mounted.
fn mounts(handle: &Handle) -> io::Result<Vec<Mount>> {
    Ok(handle.read("mountinfo")?.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

fn parse(line: &[u8]) -> Option<Mount> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let dash = fields.iter().position(|field| *field == b"-")?;
    let text = |at: usize| fields.get(at).map(|field| String::from_utf8_lossy(field).into_owned());
    let is_read_only =
        |at: usize| text(at).is_some_and(|options| options.split(',').any(|option| option == "ro"));
    Some(Mount {
        id: text(0)?,
        device: text(2)?,
        root: unescape(fields.get(3)?),
        at: unescape(fields.get(4)?),
        is_writable: !is_read_only(5) && !is_read_only(dash + 3),
    })
}

/// Reads the octal escapes: `\040` is a blank.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal =
            after.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        let byte = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_that_can_write_to_the_storage_is_told_from_the_rest() {
        let spot = Spot { device: "8:1".to_string(), path: "/srv/reg".into() };
        let storage = Storage {
            registry: "/srv/reg/docker/registry/v2".into(),
            spots: vec![spot],
            system: Some("8:1".to_string()),
            top: (0, 0, 0),
            program: (0, 0, 0),
        };
        let line = |device: &str, root: &str, options: &str, all: &str| {
            format!("61 55 {device} {root} /var/lib/registry {options} shared:3 - ext4 /dev/sda1 {all}")
        };
        let cases = [
            ("the storage", line("8:1", "/srv/reg", "rw,noatime", "rw"), true),
            ("the registry directory", line("8:1", "/srv/reg/docker/registry/v2", "rw", "rw"), true),
            ("what the storage is in", line("8:1", "/srv", "rw", "rw"), true),
            ("a neighbour", line("8:1", "/srv/regular", "rw", "rw"), false),
            ("read-only", line("8:1", "/srv/reg", "ro,noatime", "rw"), false),
            ("a read-only filesystem", line("8:1", "/srv/reg", "rw", "ro"), false),
            ("the whole machine", line("8:1", "/", "rw", "rw"), false),
            ("another filesystem", line("8:2", "/srv/reg", "rw", "rw"), false),
        ];
        for (name, line, wanted) in cases {
            assert_eq!(
                parse(line.as_bytes()).map(|mount| storage.is_seen_by(&mount)),
                Some(wanted),
                "{name}"
            );
        }
        let odd = parse(b"1 2 0:3 /a\\040b /c\\134d rw - tmpfs none rw");
        assert!(odd.is_some_and(|mount| mount.root == Path::new("/a b") && mount.at == Path::new("/c\\d")));
    }

    #[test]
    fn the_end_of_a_path_tells_which_file_of_a_storage_it_may_be() {
        let ends: Vec<PathBuf> = tails(Path::new("/blobs/x/blobs/sha256/ab/data"), "blobs").collect();
        assert_eq!(ends, [Path::new("blobs/x/blobs/sha256/ab/data"), Path::new("blobs/sha256/ab/data")]);
        assert_eq!(tails(Path::new("/var/lib/blobs.db"), "blobs").count(), 0);
    }
}
