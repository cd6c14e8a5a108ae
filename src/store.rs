//! Every read, list, stat, rename and write of a registry's storage.
//!
//! [`Store`] is what regfs needs of a storage, and no more than an object store can give: list one level
//! below a prefix, read, write, remove many, move. Nothing above this module relies on directories existing
//! without files in them, or on the times of directories; the search for empty ones finds none where there are none.
//!
//! All paths are relative to the registry directory (see [`crate::layout`]). Implementations never follow a
//! symlink below it. [`disk::Disk`] is a local filesystem; [`memory::Memory`] keeps everything in a flat map of
//! keys, as an object store would, and serves tests.

pub mod disk;
pub mod imagined;
pub mod memory;
pub mod paced;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::clock::Reading;
use crate::digest::Digest;
use crate::error::{Error, Found, Result};
use crate::layout;

/// What a name stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A regular file (an object).
    File,
    /// A directory (a common prefix).
    Directory,
    /// A symlink; never followed.
    Symlink,
    /// A socket, a device, ….
    Other,
}

/// One name below a prefix.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Without slashes.
    pub name: OsString,
    /// What it stands for.
    pub kind: Kind,
}

/// Facts about a file; equal for the same version of a file, different after a change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stat {
    /// Bytes.
    pub size: u64,
    /// Blocks of 512 bytes that it takes on the disk.
    pub blocks: u64,
    /// Last change of the content.
    pub modified: SystemTime,
    /// Last change of content, name or attributes; the same as `modified` where a storage has no such time.
    pub changed: SystemTime,
    /// Identity on this storage, 0 where it has none.
    pub inode: u64,
}

/// What tells two versions of a file apart, in 24 bytes; there are as many as tags and revisions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Version {
    /// Nanoseconds since 1970, those after 2262 as its end.
    modified: i64,
    changed: i64,
    inode: u64,
}

impl Version {
    /// Nobody looked, or there is no file: from long ago and equal to no real one.
    pub const UNKNOWN: Version = Version { modified: 0, changed: 0, inode: u64::MAX };

    /// Last change of the content.
    pub fn modified(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_nanos(self.modified.unsigned_abs())
    }

    /// Last change of anything; `None` when it is unknown.
    pub fn last_change(&self) -> Option<SystemTime> {
        let since_epoch = Duration::from_nanos(self.modified.max(self.changed).unsigned_abs());
        (*self != Version::UNKNOWN).then(|| SystemTime::UNIX_EPOCH + since_epoch)
    }
}

impl From<&Stat> for Version {
    fn from(stat: &Stat) -> Version {
        let nanos = |time: SystemTime| {
            let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            i64::try_from(since_epoch.as_nanos()).unwrap_or(i64::MAX)
        };
        Version { modified: nanos(stat.modified), changed: nanos(stat.changed), inode: stat.inode }
    }
}

/// A file opened for reading.
pub trait Reader: Send + Sync {
    /// Reads up to `buffer.len()` bytes at `offset`; 0 at the end.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// The file on a local disk, if there is one.
    fn file(&self) -> Option<&File>;
}

/// A directory of which many files are looked at. Names are relative to it and may have several components.
pub trait Directory {
    /// A whole file of at most `limit` bytes; with facts at least if asked for.
    fn read(&mut self, name: &Path, limit: usize, facts: bool) -> Result<Option<(&[u8], Option<Stat>)>>;

    /// Facts about a regular file.
    fn stat(&self, name: &Path) -> Result<Option<Stat>>;
}

/// The directory of a storage that has no quicker way to its files.
struct Prefix<'a, S: ?Sized> {
    store: &'a S,
    prefix: PathBuf,
    buffer: Vec<u8>,
}

impl<S: Store + ?Sized> Directory for Prefix<'_, S> {
    fn read(&mut self, name: &Path, limit: usize, _facts: bool) -> Result<Option<(&[u8], Option<Stat>)>> {
        let Some((content, stat)) = self.store.read(&self.prefix.join(name), limit)? else { return Ok(None) };
        self.buffer = content;
        Ok(Some((&self.buffer, Some(stat))))
    }

    fn stat(&self, name: &Path) -> Result<Option<Stat>> {
        self.store.stat(&self.prefix.join(name))
    }
}

/// Space of the storage in blocks of `block_size` bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Space {
    /// All blocks.
    pub blocks: u64,
    /// Free ones.
    pub free: u64,
    /// Free ones for users other than root.
    pub available: u64,
    /// All inodes.
    pub files: u64,
    /// Free inodes.
    pub files_free: u64,
    /// Bytes per block.
    pub block_size: u32,
}

/// The storage of one registry.
///
/// "Absent" is `None`; every other failure is an error that names the full path.
pub trait Store: Send + Sync {
    /// What all clocks say where this runs.
    fn clocks(&self) -> Reading {
        Reading::take()
    }

    /// The names one level below `prefix`, in no particular order.
    fn list(&self, prefix: &Path) -> Result<Option<Vec<Entry>>>;

    /// Calls `each` for the names one level below `prefix`, in no particular order; `false`: there is no such prefix.
    fn list_each(&self, prefix: &Path, each: &mut dyn FnMut(&OsStr, Kind)) -> Result<bool> {
        let Some(entries) = self.list(prefix)? else { return Ok(false) };
        entries.iter().for_each(|entry| each(&entry.name, entry.kind));
        Ok(true)
    }

    /// Many files below one prefix; those of a prefix that is not there are absent.
    fn directory<'a>(&'a self, prefix: &Path) -> Result<Box<dyn Directory + 'a>> {
        Ok(Box::new(Prefix { store: self, prefix: prefix.to_path_buf(), buffer: Vec::new() }))
    }

    /// Facts about a regular file; anything else there is [`Error::Misplaced`].
    fn stat(&self, path: &Path) -> Result<Option<Stat>>;

    /// A whole file with the facts about the version read; [`Error::TooLarge`] beyond `limit` bytes.
    fn read(&self, path: &Path, limit: usize) -> Result<Option<(Vec<u8>, Stat)>>;

    /// Opens a file for reading.
    fn open(&self, path: &Path) -> Result<Option<Box<dyn Reader>>>;

    /// Writes a file as a whole, replacing what is there at once or not at all.
    fn write(&self, path: &Path, content: &[u8]) -> Result<()>;

    /// The same for content that is made piece by piece.
    fn write_with(&self, path: &Path, write: &dyn Fn(&mut dyn io::Write) -> io::Result<()>) -> Result<()> {
        let mut content = Vec::new();
        write(&mut content).map_err(|e| Error::io("write", &self.full(path), e))?;
        self.write(path, &content)
    }

    /// Moves a file, or everything below a prefix, with owner and mode; never replaces anything
    /// ([`Error::Exists`]). `Ok(false)`: there is nothing at `from`.
    ///
    /// Directories that `to` needs are made with owner and mode of the ones of the same name above `from`.
    /// At once on a disk; object by object elsewhere, so a crash may leave both.
    fn rename(&self, from: &Path, to: &Path) -> Result<bool>;

    /// Removes files; those that are absent count as removed. Returns each failure.
    fn remove(&self, paths: &[PathBuf]) -> Vec<Error>;

    /// Removes empty directories at and below `prefix`, bottom up. Nothing to do where a storage has none.
    fn prune(&self, prefix: &Path) -> Result<()>;

    /// Removes everything below `prefix`, and it; nothing to do where there is none.
    fn remove_tree(&self, prefix: &Path) -> Result<()> {
        let mut paths = Vec::new();
        for_each_below(self, prefix, &mut |path, _| paths.push(path))?;
        self.remove(&paths).into_iter().next().map_or(Ok(()), Err)?;
        self.prune(prefix)
    }

    /// Whether there is anything but directories below `prefix`, however deep.
    fn holds_files(&self, prefix: &Path) -> Result<bool> {
        let mut has_files = false;
        for_each_below(self, prefix, &mut |_, _| has_files = true)?;
        Ok(has_files)
    }

    /// When something was last added to a directory or removed from it; `None` where there is no such directory, or
    /// the storage has none.
    fn directory_changed(&self, path: &Path) -> Result<Option<SystemTime>>;

    /// Removes a directory if it is empty. `Ok(false)`: it is not, or there is none.
    fn remove_directory(&self, path: &Path) -> Result<bool>;

    /// Makes a directory, and those above it, each with owner and mode of the one above.
    fn make_directory(&self, path: &Path) -> Result<()>;

    /// Writes a file that is not there yet, at once or not at all, with the owner of the directory it lies in and its
    /// mode but for the right to search; directories as [`Store::make_directory`] does. [`Error::Exists`] otherwise.
    fn create(&self, path: &Path, content: &[u8]) -> Result<()>;

    /// Writes a file in place of the one at `path`, at once or not at all, and moves that to `saved`.
    ///
    /// A crash in between may lose the old one; it never leaves `path` without either.
    fn replace(&self, path: &Path, content: &[u8], saved: &Path) -> Result<()>;

    /// Makes everything done so far durable.
    fn sync(&self) -> Result<()>;

    /// Takes the lock of whoever changes this store, for as long as the guard lives or the process does.
    ///
    /// Waits for up to `wait`, then fails with [`Error::Busy`] that says who has it. `who` is shown to others.
    fn lock(&self, who: &str, wait: Duration) -> Result<Box<dyn Send>>;

    /// Whether we may change it at all.
    fn is_writable(&self) -> bool;

    /// How much space there is.
    fn space(&self) -> Result<Space>;

    /// The full name of `path`, for messages.
    fn full(&self, path: &Path) -> PathBuf;
}

/// How long a file may be that names each blob of the store and of the transactions `ids` once at most.
///
/// Blobs are counted only for a file that is longer than few names need.
pub fn longest_list_of_blobs(store: &dyn Store, path: &Path, ids: &[&str]) -> Result<usize> {
    /// Bytes that hold whatever else stands in such a file.
    const FEW: usize = 1 << 20;
    /// Bytes for a digest of the longest sort, with quotes and a comma.
    const FOR_EACH: usize = 140;
    match store.stat(path) {
        Ok(Some(stat)) if stat.size > FEW as u64 => {}
        // Whoever reads it meets what is wrong with it.
        Ok(_) => return Ok(FEW),
        Err(e) if e.is_damage() => return Ok(FEW),
        Err(e) => return Err(e),
    }
    let directories = |path: &Path| -> Result<Vec<PathBuf>> {
        let entries = store.list(path)?.unwrap_or_default().into_iter();
        Ok(entries.filter(|e| e.kind == Kind::Directory).map(|e| path.join(e.name)).collect())
    };
    let mut blobs = 0usize;
    let left = ids.iter().map(|id| layout::transaction(id).join(layout::BLOBS));
    for root in left.chain([layout::BLOBS.into()]) {
        for algorithm in directories(&root)? {
            for shard in directories(&algorithm)? {
                store.list_each(&shard, &mut |_, _| blobs += 1)?;
            }
        }
    }
    Ok(FEW.saturating_add(blobs.saturating_mul(FOR_EACH)))
}

/// The digest that a link file holds; `None` where there is no file, or none that holds one.
pub fn read_link(store: &dyn Store, path: &Path) -> Result<Option<Digest>> {
    match store.read(path, layout::LINK_LIMIT) {
        Err(e) if e.is_damage() => Ok(None),
        content => Ok(content?.and_then(|(text, _)| layout::parse_link(&text).ok())),
    }
}

/// Every file below `prefix`, in no particular order; symlinks and the like too, with their kind.
///
/// A directory that is nested too deep for anything in it to be a registry's is told itself, instead of what is in it.
pub fn walk(store: &dyn Store, prefix: &Path, each: &mut dyn FnMut(PathBuf, Kind)) -> Result<()> {
    for_each_below(store, prefix, each)
}

fn for_each_below<S: Store + ?Sized>(
    store: &S,
    prefix: &Path,
    each: &mut dyn FnMut(PathBuf, Kind),
) -> Result<()> {
    let mut directories = vec![prefix.to_path_buf()];
    while let Some(directory) = directories.pop() {
        for entry in store.list(&directory)?.unwrap_or_default() {
            let path = directory.join(&entry.name);
            match entry.kind {
                Kind::Directory if !is_too_deep(prefix, &path) => directories.push(path),
                kind => each(path, kind),
            }
        }
    }
    Ok(())
}

/// Whether a directory below `prefix` is nested so deep that nothing in it can be a registry's.
pub fn is_too_deep(prefix: &Path, directory: &Path) -> bool {
    directory.as_os_str().len() > prefix.as_os_str().len() + layout::LONGEST_PATH
}

/// Checks that `kind` is a file's; the error of all implementations otherwise.
fn expect_file(kind: Kind, full: PathBuf) -> Result<()> {
    match kind {
        Kind::File => Ok(()),
        other => Err(Error::Misplaced { path: full, found: other.into() }),
    }
}

impl From<Kind> for Found {
    fn from(kind: Kind) -> Found {
        match kind {
            Kind::File => Found::File,
            Kind::Directory => Found::Directory,
            Kind::Symlink => Found::Symlink,
            Kind::Other => Found::Other,
        }
    }
}
