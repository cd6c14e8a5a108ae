//! A watch without root: inotify, which reports the names in one directory for each watch on it.
//!
//! Watched is what the registry changes below: every directory of a repository, the shards of the blobs, the trash.
//! Not each blob's own directory: the registry makes one for each blob, and a push writes a link after the blob.
//!
//! # Rules kept here
//! 1. A directory that came is watched before anybody is told of it, so what comes into it later is an event, and what
//!    was in it by then a look shows.
//! 2. Where the watches don't suffice (too many directories, [`MOST`] or the kernel's own limit), there is no watch
//!    at all: half of one would show what is gone.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, ReadFlags, WatchFlags};
use rustix::io::Errno;

use super::{BUFFER, Changes};
use crate::layout;

/// So many watches take a few seconds to set up, and the kernel a kilobyte each.
const MOST: usize = 200_000;

/// Watches on the directories of a store.
pub(super) struct Tree {
    events: OwnedFd,
    /// The registry directory.
    root: PathBuf,
    /// Where the directory of each watch lies, below the registry directory.
    places: HashMap<i32, PathBuf>,
}

impl Tree {
    pub(super) fn new(root: &Path) -> io::Result<Tree> {
        let mut tree = Tree { events: start()?, root: root.to_path_buf(), places: HashMap::new() };
        tree.add(PathBuf::new())?;
        Ok(tree)
    }

    pub(super) fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// All changes since the last question.
    pub(super) fn changes(&mut self) -> io::Result<Changes> {
        let mut changes = Changes::default();
        let events = self.events.try_clone()?;
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut reader = inotify::Reader::new(&events, &mut buffer);
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => return Ok(changes),
                Err(Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
            };
            let flags = event.events();
            if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                // Directories may have come, moved or gone of which nobody told. The descriptor stays: others wait for it.
                self.places.clear();
                self.add(PathBuf::new())?;
                changes.everything = true;
                continue;
            }
            if flags.contains(ReadFlags::IGNORED) {
                self.places.remove(&event.wd());
                continue;
            }
            let (Some(place), Some(name)) = (self.places.get(&event.wd()), event.file_name()) else {
                continue;
            };
            let path = place.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
            if flags.contains(ReadFlags::ISDIR) {
                if flags.contains(ReadFlags::MOVED_FROM) {
                    self.forget(&path);
                }
                if flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
                    self.add(path.clone())?;
                }
            }
            changes.note(&path, flags.intersects(ReadFlags::MOVED_FROM | ReadFlags::MOVED_TO));
        }
    }

    /// Watches a directory and those below it, as far as they matter.
    fn add(&mut self, from: PathBuf) -> io::Result<()> {
        let mut waiting = vec![from];
        while let Some(place) = waiting.pop() {
            if !matters(&place) {
                continue;
            }
            let flags = WatchFlags::CREATE
                | WatchFlags::DELETE
                | WatchFlags::MOVED_FROM
                | WatchFlags::MOVED_TO
                | WatchFlags::CLOSE_WRITE
                | WatchFlags::ONLYDIR
                | WatchFlags::DONT_FOLLOW
                | WatchFlags::EXCL_UNLINK;
            let full = self.root.join(&place);
            let watch = match inotify::add_watch(&self.events, &full, flags) {
                Ok(watch) => watch,
                // Gone again, or nothing that this user is shown.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS) => continue,
                Err(e) => return Err(e.into()),
            };
            if self.places.len() >= MOST {
                return Err(io::Error::other(format!("there are more than {MOST} directories")));
            }
            let entries = match std::fs::read_dir(&full) {
                Ok(entries) => entries,
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {
                    continue;
                }
                Err(e) => return Err(e),
            };
            for entry in entries {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    waiting.push(place.join(entry.file_name()));
                }
            }
            self.places.insert(watch, place);
        }
        Ok(())
    }

    /// Forgets what was moved away: its watches would tell of it under its old name.
    fn forget(&mut self, moved: &Path) {
        let events = &self.events;
        self.places.retain(|watch, place| {
            let is_moved = place.starts_with(moved);
            if is_moved {
                // It may have ended by itself.
                let _ = inotify::remove_watch(events, *watch);
            }
            !is_moved
        });
    }
}

fn start() -> io::Result<OwnedFd> {
    Ok(inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?)
}

/// Whether names that come and go in a directory tell anything.
fn matters(place: &Path) -> bool {
    let depth = place.components().count();
    match place.components().next().map(|first| Path::new(first.as_os_str())) {
        None => true,
        Some(first) if first == Path::new(layout::REPOSITORIES) => true,
        Some(first) if first == Path::new(layout::BLOBS) => depth <= 3,
        _ => Path::new(layout::TRASH).starts_with(place),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::fs;

    use super::*;

    #[test]
    fn tells_what_comes_into_directories_that_came() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("repositories/app/_manifests/tags")).unwrap();
        let mut tree = Tree::new(root.path()).unwrap();
        assert!(tree.changes().unwrap().is_empty());

        let tag = root.path().join("repositories/app/_manifests/tags/1/current");
        fs::create_dir_all(&tag).unwrap();
        let app = Changes { repositories: [PathBuf::from("app")].into(), ..Changes::default() };
        assert_eq!(tree.changes().unwrap(), app);
        fs::write(tag.join("link"), "x").unwrap();
        assert_eq!(tree.changes().unwrap(), app);

        // What was moved away tells nothing any more, or under its new name.
        let (from, to) = (root.path().join("repositories/app"), root.path().join("repositories/b"));
        fs::rename(&from, &to).unwrap();
        let moved = ["app", "b"].map(PathBuf::from);
        assert_eq!(tree.changes().unwrap(), Changes { namespaces: moved.into(), ..Changes::default() });
        fs::write(to.join("_manifests/tags/1/current/link"), "y").unwrap();
        let b = Changes { repositories: [PathBuf::from("b")].into(), ..Changes::default() };
        assert_eq!(tree.changes().unwrap(), b);

        fs::create_dir_all(root.path().join(".regfs/trash/1")).unwrap();
        fs::write(root.path().join(".regfs/lock"), "").unwrap();
        let changes = tree.changes().unwrap();
        fs::create_dir_all(root.path().join(".regfs/trash/2")).unwrap();
        assert!(changes.repositories.is_empty() && tree.changes().unwrap().trash);
        fs::remove_dir_all(&to).unwrap();
        assert!(tree.changes().unwrap().namespaces.contains(Path::new("b")));
    }

    #[test]
    fn after_lost_events_it_goes_on_with_the_same_descriptor() {
        let root = tempfile::tempdir().unwrap();
        let tags = root.path().join("repositories/app/_manifests/tags");
        fs::create_dir_all(&tags).unwrap();
        let mut tree = Tree::new(root.path()).unwrap();
        let waiting = tree.events().try_clone_to_owned().unwrap();
        let is_ready = || {
            let mut fds = [rustix::event::PollFd::new(&waiting, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default())).unwrap() == 1
        };
        let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
        // Each is at least one event.
        for at in 0..=limit.trim().parse::<usize>().unwrap() {
            fs::write(tags.join(at.to_string()), "").unwrap();
        }
        fs::create_dir(tags.join("unseen")).unwrap();
        assert!(is_ready() && tree.changes().unwrap().everything && !is_ready());
        fs::write(tags.join("unseen/link"), "x").unwrap();
        let app = Changes { repositories: [PathBuf::from("app")].into(), ..Changes::default() };
        assert!(is_ready());
        assert_eq!(tree.changes().unwrap(), app);
    }
}
