//! Watch: what has changed in the storage since the last question, told by the kernel.
//!
//! fanotify reports the names that come and go on the whole filesystem, so nothing has to be set up for each of a
//! hundred thousand directories. It needs root (CAP_SYS_ADMIN) and a local filesystem. Without, each directory is
//! watched by itself (`tree`); where there are too many there is no watch, and whoever wants to know looks for himself. Nor is
//! there one where changes may come from elsewhere (`local`), or where a change of our own is not told ([`Watch::prove`]).
//!
//! # Rules kept here
//! 1. An event says only where to look: what is there now, a look at the storage tells.
//! 2. What can't be told apart ([`Changes::everything`]) means looking at all of it: lost events, something moved in.
//! 3. Of a filesystem nothing is remembered about places: a directory is asked for its path when its event is read.

pub mod held;
mod local;
pub(crate) mod openers;
pub mod opens;
mod tree;

use std::collections::{BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::digest::Digest;
use crate::error::Error;
use crate::layout::{self, Kind};
use crate::store::Store;
use crate::sys;
use tree::Tree;

/// Where to look.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Anywhere.
    pub everything: bool,
    /// Repositories of which a tag, a revision, a layer link or an upload came, changed or went.
    pub repositories: BTreeSet<PathBuf>,
    /// Directories below `repositories` that came or went, with all below them.
    pub namespaces: BTreeSet<PathBuf>,
    /// Layer links that came, changed or went: repositories and digests.
    pub links: BTreeSet<(PathBuf, Digest)>,
    /// Blobs that came or went.
    pub blobs: BTreeSet<Digest>,
    /// Something in the trash.
    pub trash: bool,
    /// The probe of somebody who finds out whether changes are told.
    probe: bool,
}

impl Changes {
    /// Whether there is nothing to look at.
    pub fn is_empty(&self) -> bool {
        Changes { probe: false, ..self.clone() } == Changes::default()
    }

    /// Notes that `path`, below the registry directory, came, changed or went; as a whole, if it was moved.
    pub fn note(&mut self, path: &Path, is_moved: bool) {
        if let Ok(below) = path.strip_prefix(layout::REPOSITORIES) {
            self.note_repository(below);
            if let Kind::LayerLink(repository, digest) = layout::classify(path) {
                self.links.insert((repository, digest));
            }
        } else if let Ok(below) = path.strip_prefix(layout::BLOBS) {
            self.note_blob(below, is_moved);
        } else {
            self.trash |= path.starts_with(layout::TRASH);
            self.probe |= path == Path::new(layout::PROBE);
        }
    }

    fn note_blob(&mut self, below: &Path, is_moved: bool) {
        let parts: Vec<&str> = below.components().filter_map(|c| c.as_os_str().to_str()).collect();
        match parts.as_slice() {
            [algorithm, _, hex, ..] => self.blobs.extend(Digest::from_parts(algorithm, hex)),
            // A shard that was made is empty, and one that was removed was.
            _ => self.everything |= is_moved || parts.is_empty(),
        }
    }

    fn note_repository(&mut self, below: &Path) {
        let own = [layout::MANIFESTS, layout::LAYERS, layout::UPLOADS];
        let mut name = PathBuf::new();
        for part in below.components() {
            if own.iter().any(|own| part.as_os_str() == *own) {
                self.repositories.insert(name);
                return;
            }
            name.push(part);
        }
        match name.as_os_str().is_empty() {
            true => self.everything = true,
            false => drop(self.namespaces.insert(name)),
        }
    }
}

/// A watch on a storage.
pub struct Watch(Source);

enum Source {
    Filesystem(Filesystem),
    Tree(Tree),
}

impl Watch {
    /// Watches the filesystem that the registry directory `root` lies on. For root only.
    pub fn of_filesystem(root: &Path) -> io::Result<Watch> {
        local::expect_local(root)?;
        Ok(Watch(Source::Filesystem(Filesystem::new(root)?)))
    }

    /// Watches each directory below `root`, which needs no privileges.
    ///
    /// # Cost
    /// About 20 µs for each directory whose inode is in memory, and a watch of the kernel's.
    pub fn of_directories(root: &Path) -> io::Result<Watch> {
        local::expect_local(root)?;
        Ok(Watch(Source::Tree(Tree::new(root)?)))
    }

    /// One that fails at the first question, as one does of whose queue the kernel can tell no more.
    #[cfg(test)]
    pub(crate) fn failing() -> io::Result<Watch> {
        let directory = || std::fs::File::open("/").map(OwnedFd::from);
        Ok(Watch(Source::Filesystem(Filesystem {
            events: directory()?,
            root: directory()?,
            buffer: vec![0; BUFFER],
        })))
    }

    /// Makes a change in the storage's own directory, and fails unless the kernel tells of it. What else it tells meanwhile
    /// is lost, so everything has to be looked at afterwards.
    pub fn prove(mut self, store: &dyn Store) -> crate::error::Result<Watch> {
        let own = Path::new(layout::OWN);
        let was_there = store.list(own)?.is_some();
        let is_told = self.is_told_of_a_probe(store);
        if !was_there {
            // Where it is not empty, somebody else needs it by now.
            store.remove_directory(own)?;
        }
        match is_told? {
            true => Ok(self),
            false => {
                Err(Error::invalid("regfs changed a file in .regfs to try it, and the kernel told nothing"))
            }
        }
    }

    fn is_told_of_a_probe(&mut self, store: &dyn Store) -> crate::error::Result<bool> {
        let probe = Path::new(layout::PROBE);
        for _ in 0..PROBES {
            store.make_directory(probe)?;
            store.remove_directory(probe)?;
            let mut ready = [PollFd::from_borrowed_fd(self.events(), PollFlags::IN)];
            let waited = poll(&mut ready, Some(&PROBE_WAITS));
            let told = waited.map_err(io::Error::from).and_then(|_| self.changes());
            if told.map_err(|e| Error::io("watch", &store.full(probe), e))?.probe {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Becomes readable when something has changed, on the filesystem at least.
    pub fn events(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Source::Filesystem(filesystem) => filesystem.events.as_fd(),
            Source::Tree(tree) => tree.events(),
        }
    }

    /// All changes since the last question. Those that were made before this call are among them.
    pub fn changes(&mut self) -> io::Result<Changes> {
        match &mut self.0 {
            Source::Filesystem(filesystem) => filesystem.changes(),
            Source::Tree(tree) => tree.changes(),
        }
    }
}

/// A watch on the filesystem that the storage lies on.
struct Filesystem {
    events: OwnedFd,
    /// The registry directory.
    root: OwnedFd,
    buffer: Vec<u8>,
}

/// So often it is tried whether a change is told, and how long each time: a directory that has just come may not be
/// watched the first time.
const PROBES: usize = 10;
const PROBE_WAITS: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Bytes for events that are read at once.
const BUFFER: usize = 64 << 10;
/// `struct fanotify_event_metadata` and the headers behind it (fanotify(7)).
const METADATA: usize = 24;
const INFO_HEADER: usize = 4;
const FILESYSTEM_ID: usize = 8;
const HANDLE_HEADER: usize = 8;

impl Filesystem {
    fn new(root: &Path) -> io::Result<Filesystem> {
        use rustix::fs::{CWD, Mode, OFlags, openat};
        let root = openat(CWD, root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let events = sys::filesystem_events(root.as_fd())?;
        Ok(Filesystem { events, root, buffer: vec![0; BUFFER] })
    }

    fn changes(&mut self) -> io::Result<Changes> {
        let mut changes = Changes::default();
        let mut places: HashMap<Vec<u8>, Option<PathBuf>> = HashMap::new();
        let root = place_of(self.root.as_fd())?;
        loop {
            let read = match rustix::io::read(&self.events, &mut self.buffer[..]) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(changes),
                Ok(read) => read,
                Err(Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
            };
            for event in Events(&self.buffer[..read]) {
                let Some((handle, name)) = event.place else {
                    changes.everything = true;
                    continue;
                };
                let place = match places.get(handle) {
                    Some(place) => place,
                    None => {
                        let found = sys::open_by_handle(self.root.as_fd(), handle);
                        // Gone: its own going is an event of the directory above.
                        let place = found.and_then(|directory| place_of(directory.as_fd())).ok();
                        let inside = place.and_then(|p| p.strip_prefix(&root).map(Path::to_path_buf).ok());
                        places.entry(handle.to_vec()).or_insert(inside)
                    }
                };
                if let Some(place) = place {
                    changes.note(&place.join(name), event.is_moved);
                }
            }
        }
    }
}

/// Where a directory lies now.
fn place_of(directory: BorrowedFd<'_>) -> io::Result<PathBuf> {
    let link = format!("/proc/self/fd/{}", directory.as_raw_fd());
    let path = rustix::fs::readlink(link, Vec::new())?;
    Ok(PathBuf::from(OsString::from_vec(path.into_bytes())))
}

/// One event.
struct Event<'a> {
    /// The handle of a directory, and a name in it; `None` where events were lost.
    place: Option<(&'a [u8], &'a OsStr)>,
    is_moved: bool,
}

/// The events in a buffer.
struct Events<'a>(&'a [u8]);

impl<'a> Iterator for Events<'a> {
    type Item = Event<'a>;

    fn next(&mut self) -> Option<Event<'a>> {
        let length = number(self.0, 0)? as usize;
        if length < METADATA || length > self.0.len() {
            // Not as documented: whatever follows can't be told apart.
            let event = (!self.0.is_empty()).then_some(Event { place: None, is_moved: false });
            self.0 = &[];
            return event;
        }
        let (event, rest) = self.0.split_at(length);
        self.0 = rest;
        let mask = u64::from(number(event, 8)?) | u64::from(number(event, 12)?) << 32;
        let place = if mask & libc::FAN_Q_OVERFLOW != 0 { None } else { place_in(&event[METADATA..]) };
        let is_moved = mask & (libc::FAN_MOVED_FROM | libc::FAN_MOVED_TO) != 0;
        Some(Event { place, is_moved })
    }
}

/// The handle and the name in the first record behind an event.
fn place_in(record: &[u8]) -> Option<(&[u8], &OsStr)> {
    let length = usize::from(u16::from_ne_bytes([*record.get(2)?, *record.get(3)?]));
    let record = record.get(..length)?;
    let handle = record.get(INFO_HEADER + FILESYSTEM_ID..)?;
    let end = HANDLE_HEADER + number(handle, 0)? as usize;
    let name = handle.get(end..)?;
    let name = &name[..name.iter().position(|b| *b == 0).unwrap_or(name.len())];
    Some((handle.get(..end)?, OsStr::from_bytes(name)))
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::digest::Algorithm;

    fn noted(paths: &[&str]) -> Changes {
        let mut changes = Changes::default();
        paths.iter().for_each(|path| changes.note(Path::new(path), false));
        changes
    }

    #[test]
    fn a_path_tells_where_to_look() {
        let digest = Digest::of(Algorithm::Sha256, b"x");
        let blob = layout::blob_data(&digest);
        let changes = noted(&[
            "repositories/team/app/_manifests/tags/1/current/link",
            "repositories/team/app/_layers",
            "repositories/other",
            blob.to_str().unwrap(),
            "blobs/sha256/ab",
            ".regfs/lock",
        ]);
        let expected = Changes {
            repositories: [PathBuf::from("team/app")].into(),
            namespaces: [PathBuf::from("other")].into(),
            blobs: [digest].into(),
            ..Changes::default()
        };
        assert_eq!(changes, expected);
        assert!(noted(&[".regfs/trash/1/txn.json"]).trash);
        assert!(noted(&[".regfs/cache/manifests", "elsewhere"]).is_empty());
        assert!(noted(&["repositories"]).everything && noted(&["blobs"]).everything);
        let mut moved = Changes::default();
        moved.note(Path::new("blobs/sha256/ab"), true);
        assert!(moved.everything);
    }

    #[test]
    fn what_is_no_event_means_looking_at_everything() {
        assert!(Events(&[0; 24]).next().unwrap().place.is_none());
        assert!(Events(&[0xff; 30]).next().unwrap().place.is_none());
        assert_eq!(Events(&[]).count(), 0);
        assert_eq!(Events(&[0xff; 30]).count(), 1);
    }
}
