//! The least that a collector has to do, to measure collectors against: `floor DIRECTORY [THREADS]`.
//!
//! Lists the repositories, of each the revisions and the tags, and lists the blobs; reads every tag and every manifest
//! that a revision names. Parses, hashes, sorts and remembers nothing. What is left out although a collector must do
//! it is left out on purpose: whoever comes close to this has little left to gain.
//!
//! Made for stores of `make_store`, in which no two repositories have a manifest in common; where they have, it is
//! read twice. Needs a filesystem that tells the types of directory entries.

use std::error::Error;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use regfs::layout;
use rustix::fs::{CWD, FileType, Mode, OFlags, RawDir, openat};
use rustix::io::Errno;
use rustix::path::Arg;

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
const FILE: OFlags = OFlags::RDONLY.union(OFlags::CLOEXEC);
/// Blob directories there are: one for each two hex digits.
const SHARDS: usize = 256;

#[derive(Default)]
struct Counts {
    tags: usize,
    revisions: usize,
    manifests: usize,
    manifest_bytes: usize,
    blobs: usize,
}

/// What all threads share.
struct Registry {
    repositories: OwnedFd,
    /// `blobs/sha256`.
    blobs: OwnedFd,
    /// Repositories below `repositories`, each name with a slash at its end.
    names: Vec<Vec<u8>>,
    /// What to do next: first the repositories, then the shards.
    next: AtomicUsize,
}

/// What one thread uses again and again.
struct Worker<'a> {
    registry: &'a Registry,
    entries: Vec<u8>,
    content: Vec<u8>,
    path: Vec<u8>,
    counts: Counts,
}

/// Room for directory entries; about 3,000 digests.
fn entry_buffer() -> Vec<u8> {
    Vec::with_capacity(256 << 10)
}

/// Calls `visit` with the name and type of each entry.
fn list(
    directory: impl AsFd,
    buffer: &mut Vec<u8>,
    mut visit: impl FnMut(&[u8], FileType) -> io::Result<()>,
) -> io::Result<()> {
    let mut entries = RawDir::new(directory, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let entry = entry?;
        match entry.file_name().to_bytes() {
            b"." | b".." => {}
            name => visit(name, entry.file_type())?,
        }
    }
    Ok(())
}

/// Joins `parts` to a path in `path`.
fn join<'a>(path: &'a mut Vec<u8>, parts: &[&[u8]]) -> io::Result<&'a CStr> {
    path.clear();
    for part in parts {
        path.extend_from_slice(part);
    }
    path.push(0);
    CStr::from_bytes_with_nul(path).map_err(io::Error::other)
}

/// Opens, reads and closes a file; returns its length.
fn read(directory: impl AsFd, path: &CStr, content: &mut [u8]) -> rustix::io::Result<usize> {
    let file = openat(directory, path, FILE, Mode::empty())?;
    let mut length = 0;
    loop {
        let read = rustix::io::read(&file, &mut *content)?;
        length += read;
        // A short read is the end: one call for nearly every file.
        if read < content.len() {
            return Ok(length);
        }
    }
}

fn open_directory(directory: impl AsFd, path: impl Arg) -> rustix::io::Result<OwnedFd> {
    openat(directory, path, DIRECTORY, Mode::empty())
}

/// Finds the repositories: directories with a `_manifests`.
fn walk(repositories: &OwnedFd) -> io::Result<Vec<Vec<u8>>> {
    let (mut buffer, mut found, mut pending) = (entry_buffer(), Vec::new(), vec![Vec::new()]);
    while let Some(name) = pending.pop() {
        let path = if name.is_empty() { b".".as_slice() } else { &name };
        let mut is_repository = false;
        list(open_directory(repositories, path)?, &mut buffer, |entry, kind| {
            if entry == layout::MANIFESTS.as_bytes() {
                is_repository = true;
            } else if kind == FileType::Directory && !entry.starts_with(b"_") {
                pending.push([&name, entry, b"/"].concat());
            }
            Ok(())
        })?;
        if is_repository {
            found.push(name);
        }
    }
    Ok(found)
}

impl Worker<'_> {
    fn run(mut self) -> io::Result<Counts> {
        let names = &self.registry.names;
        loop {
            let task = self.registry.next.fetch_add(1, Ordering::Relaxed);
            if let Some(name) = names.get(task) {
                self.revisions(name)?;
                self.tags(name)?;
            } else if task < names.len() + SHARDS {
                self.shard(task - names.len())?;
            } else {
                return Ok(self.counts);
            }
        }
    }

    /// Opens a directory of a repository, `None` where it has none.
    fn open(&mut self, name: &[u8], directory: &str) -> io::Result<Option<OwnedFd>> {
        let parts = [name, layout::MANIFESTS.as_bytes(), b"/", directory.as_bytes()];
        match open_directory(&self.registry.repositories, join(&mut self.path, &parts)?) {
            Ok(opened) => Ok(Some(opened)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    fn revisions(&mut self, name: &[u8]) -> io::Result<()> {
        let Some(directory) = self.open(name, "revisions/sha256")? else { return Ok(()) };
        let Worker { registry, entries, content, path, counts } = self;
        list(directory, entries, |hex, _| {
            counts.revisions += 1;
            match read(&registry.blobs, join(path, &[&hex[..2], b"/", hex, b"/data"])?, content) {
                Ok(bytes) => {
                    counts.manifests += 1;
                    counts.manifest_bytes += bytes;
                    Ok(())
                }
                // Deleted, and collected after that.
                Err(Errno::NOENT) => Ok(()),
                Err(e) => Err(e.into()),
            }
        })
    }

    fn tags(&mut self, name: &[u8]) -> io::Result<()> {
        let Some(directory) = self.open(name, layout::TAGS)? else { return Ok(()) };
        let Worker { entries, content, path, counts, .. } = self;
        list(&directory, entries, |tag, _| {
            counts.tags += 1;
            read(&directory, join(path, &[tag, b"/current/link"])?, content)?;
            Ok(())
        })
    }

    fn shard(&mut self, number: usize) -> io::Result<()> {
        match open_directory(&self.registry.blobs, format!("{number:02x}")) {
            Ok(directory) => list(directory, &mut self.entries, |_, _| {
                self.counts.blobs += 1;
                Ok(())
            }),
            Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let (directory, threads) = match arguments.as_slice() {
        [directory] => (directory, 1),
        [directory, threads] => (directory, threads.parse::<usize>()?.max(1)),
        _ => return Err("usage: floor DIRECTORY [THREADS]".into()),
    };
    let root = Path::new(directory).join(layout::REGISTRY_DIR);
    let repositories = open_directory(CWD, root.join(layout::REPOSITORIES))?;
    let blobs = open_directory(CWD, root.join(layout::BLOBS).join("sha256"))?;
    let names = walk(&repositories)?;
    let registry = &Registry { repositories, blobs, names, next: AtomicUsize::new(0) };

    let mut total = Counts::default();
    thread::scope(|scope| -> Result<(), Box<dyn Error>> {
        let work = || {
            Worker {
                registry,
                entries: entry_buffer(),
                content: vec![0; 64 << 10],
                path: Vec::new(),
                counts: Counts::default(),
            }
            .run()
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            let counts = worker.join().map_err(|_| "a thread panicked")??;
            total.tags += counts.tags;
            total.revisions += counts.revisions;
            total.manifests += counts.manifests;
            total.manifest_bytes += counts.manifest_bytes;
            total.blobs += counts.blobs;
        }
        Ok(())
    })?;
    println!(
        "{} repositories, {} tags, {} revisions, {} manifests with {} bytes, {} blobs",
        registry.names.len(),
        total.tags,
        total.revisions,
        total.manifests,
        total.manifest_bytes,
        total.blobs
    );
    Ok(())
}
