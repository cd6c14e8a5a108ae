//! Makes a large registry to measure on:
//! `cargo bench --bench make_store -- DIRECTORY REPOSITORIES TAGS_EACH [UNTAGGED_PERCENT]`.
//!
//! Deterministic. What a registry would have written after these pushes and deletes, except that contents are short:
//! - Each tag is an image with a config and two or three layers of its own and one base layer that its repository
//!   shares; every twentieth tag is an index over the two images before it.
//! - `UNTAGGED_PERCENT` of the image tags have been pushed twice: the older image is a revision without a tag.
//! - One blob in ten is garbage. Half of that are deleted images: manifest, config and two layers, of which layer links
//!   and the revision's empty directory are left. The other half has no link at all.
//!
//! Prints what it made and, when all of it is there, writes the same to `DIRECTORY/make_store.txt`.
//!
//! # Cost
//! One `mkdirat`, `openat`, `write` and `close` for each blob and link; all processors take repositories from a counter.

use std::error::Error;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use regfs::digest::{Algorithm, Digest};
use regfs::layout;
use rustix::fs::{Mode, OFlags, mkdirat, openat};
use rustix::io::Errno;

/// Every how many tags there is an index.
const INDEX_EVERY: usize = 20;
/// Blobs of a deleted image that nothing else uses.
const BLOBS_OF_DELETED: usize = 4;
/// Namespaces that the repositories are spread over.
const TEAMS: usize = 40;

#[derive(Clone, Copy)]
struct Size {
    repositories: usize,
    tags: usize,
    untagged_percent: usize,
}

#[derive(Default)]
struct Counts {
    tags: usize,
    manifests: usize,
    untagged: usize,
    blobs: usize,
    garbage: usize,
}

/// A repository while it is being written.
struct Repository<'a> {
    /// The registry directory, which all paths are relative to.
    registry: &'a File,
    name: PathBuf,
    number: usize,
    counts: Counts,
}

/// Makes one directory; one that is there already is fine.
fn make_dir(registry: &File, path: &Path) -> io::Result<()> {
    match mkdirat(registry, path, Mode::from_raw_mode(0o777)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(named(path, e.into())),
    }
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("could not make {}: {error}", path.display()))
}

impl Repository<'_> {
    /// Writes a file; makes its directory, whose own parent exists.
    fn put(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        if let Some(parent) = path.parent() {
            make_dir(self.registry, parent)?;
        }
        let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = openat(self.registry, path, flags, Mode::from_raw_mode(0o666));
        file.map_err(io::Error::from)
            .and_then(|f| File::from(f).write_all(content))
            .map_err(|e| named(path, e))
    }

    fn blob(&mut self, content: &str) -> io::Result<Digest> {
        let digest = Digest::of(Algorithm::Sha256, content.as_bytes());
        self.put(&layout::blob_data(&digest), content.as_bytes())?;
        self.counts.blobs += 1;
        Ok(digest)
    }

    fn layer(&mut self, content: &str) -> io::Result<Digest> {
        let digest = self.blob(content)?;
        self.put(&layout::layer_link(&self.name, &digest), digest.to_string().as_bytes())?;
        Ok(digest)
    }

    /// Uploads an image without its manifest, and returns the manifest's text. `id` tells images apart.
    fn image(&mut self, base: &Digest, id: &str, layers: usize) -> io::Result<String> {
        let number = self.number;
        let mut list = layer_descriptor(base);
        for l in 0..layers {
            let layer = self.layer(&format!("layer {number} {id} {l}"))?;
            list = format!("{list},{}", layer_descriptor(&layer));
        }
        let config =
            self.layer(&format!(r#"{{"architecture":"amd64","os":"linux","n":"{number}.{id}"}}"#))?;
        Ok(format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":45}},"layers":[{list}]}}"#
        ))
    }

    /// Pushes a manifest under a tag, as a registry does: blob, revision, tag history, tag.
    fn push(&mut self, tag: &str, manifest: &str) -> io::Result<Digest> {
        let digest = self.blob(manifest)?;
        let link = digest.to_string();
        self.put(&layout::revision_link(&self.name, &digest), link.as_bytes())?;
        let history = layout::tag_history_link(&self.name, tag.as_ref(), &digest);
        let above: Vec<&Path> = history.ancestors().skip(2).take(3).collect(); // index/sha256, index, the tag
        for directory in above.into_iter().rev() {
            make_dir(self.registry, directory)?;
        }
        self.put(&history, link.as_bytes())?;
        self.put(&layout::tag_link(&self.name, tag.as_ref()), link.as_bytes())?;
        self.counts.manifests += 1;
        Ok(digest)
    }

    /// Writes everything that is in use.
    fn push_all(&mut self, size: Size) -> io::Result<Digest> {
        let base = self.layer(&format!("base {}", self.number))?;
        let mut images: Vec<Digest> = Vec::new();
        for t in 0..size.tags {
            let tag = format!("v{t}");
            self.counts.tags += 1;
            if let (INDEX_LAST, [.., b, a]) = (t % INDEX_EVERY, images.as_slice()) {
                let index = index(a, b);
                self.push(&tag, &index)?;
                continue;
            }
            let moved = |images: usize| images * size.untagged_percent / 100;
            if moved(images.len() + 1) > moved(images.len()) {
                let older = self.image(&base, &format!("{t} older"), layers_of(t))?;
                self.push(&tag, &older)?;
                self.counts.untagged += 1;
            }
            let manifest = self.image(&base, &t.to_string(), layers_of(t))?;
            images.push(self.push(&tag, &manifest)?);
        }
        Ok(base)
    }

    /// Leaves the garbage: a tenth of all blobs, over the whole store.
    fn leave_garbage(&mut self, base: &Digest) -> io::Result<()> {
        let live = self.counts.blobs;
        // Every repository has as many live blobs, so rounding evens out from one to the next.
        let share = |part: usize| (self.number + 1) * live / part - self.number * live / part;
        let (deleted, loose) = (share(18 * BLOBS_OF_DELETED), share(18));
        for n in 0..deleted {
            let manifest = self.image(base, &format!("deleted {n}"), BLOBS_OF_DELETED - 2)?;
            let digest = self.blob(&manifest)?;
            let link = layout::revision_link(&self.name, &digest);
            if let Some(directory) = link.parent() {
                make_dir(self.registry, directory)?;
            }
        }
        for n in 0..loose {
            self.blob(&format!("garbage {} {n}", self.number))?;
        }
        self.counts.garbage = self.counts.blobs - live;
        Ok(())
    }

    /// Makes the directories that every repository has.
    fn make_dirs(&self) -> io::Result<()> {
        let sha256 = Algorithm::Sha256.name();
        let (layers, revisions) = (layout::layers(&self.name), layout::revisions(&self.name));
        for directory in [
            &layout::repository(&self.name),
            &layout::repository(&self.name).join(layout::MANIFESTS),
            &layout::tags(&self.name),
            &layout::uploads(&self.name),
            &revisions,
            &revisions.join(sha256),
            &layers,
            &layers.join(sha256),
        ] {
            make_dir(self.registry, directory)?;
        }
        Ok(())
    }
}

const INDEX_LAST: usize = INDEX_EVERY - 1;

/// Two or three, for one million blobs in 2,000 repositories of 100 tags.
fn layers_of(tag: usize) -> usize {
    if tag.is_multiple_of(3) { 2 } else { 3 }
}

fn layer_descriptor(digest: &Digest) -> String {
    format!(r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{digest}","size":16}}"#)
}

fn index(amd64: &Digest, arm64: &Digest) -> String {
    let child = |digest: &Digest, architecture: &str| {
        format!(
            r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{digest}","size":600,"platform":{{"architecture":"{architecture}","os":"linux"}}}}"#
        )
    };
    format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{},{}]}}"#,
        child(amd64, "amd64"),
        child(arm64, "arm64")
    )
}

fn write_repository(registry: &File, number: usize, size: Size) -> io::Result<Counts> {
    let name = team(number).join(format!("app{number}"));
    let mut repository = Repository { registry, name, number, counts: Counts::default() };
    repository.make_dirs()?;
    let base = repository.push_all(size)?;
    repository.leave_garbage(&base)?;
    Ok(repository.counts)
}

fn team(number: usize) -> PathBuf {
    PathBuf::from(format!("team{}", number % TEAMS))
}

/// Writes the repositories whose turn it is, until there are no more.
fn write_repositories(registry: &File, next: &AtomicUsize, size: Size) -> io::Result<Counts> {
    let mut counts = Counts::default();
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= size.repositories {
            return Ok(counts);
        }
        counts.add(&write_repository(registry, number, size)?);
    }
}

impl Counts {
    fn add(&mut self, other: &Counts) {
        self.tags += other.tags;
        self.manifests += other.manifests;
        self.untagged += other.untagged;
        self.blobs += other.blobs;
        self.garbage += other.garbage;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} tags", self.tags)?;
        writeln!(f, "{} manifests", self.manifests)?;
        writeln!(f, "{} untagged manifests", self.untagged)?;
        writeln!(f, "{} blobs", self.blobs)?;
        writeln!(f, "{} garbage blobs", self.garbage)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let (directory, size) = match arguments.as_slice() {
        [directory, repositories, tags, rest @ ..] if rest.len() < 2 => {
            let untagged_percent = rest.first().map_or(Ok(0), |percent| percent.parse())?;
            let size = Size { repositories: repositories.parse()?, tags: tags.parse()?, untagged_percent };
            (Path::new(directory), size)
        }
        _ => return Err("usage: make_store DIRECTORY REPOSITORIES TAGS_EACH [UNTAGGED_PERCENT]".into()),
    };
    let root = directory.join(layout::REGISTRY_DIR);
    if root.exists() {
        return Err(format!("{} exists already", root.display()).into());
    }
    fs::create_dir_all(root.join(layout::BLOBS).join(Algorithm::Sha256.name()))?;
    fs::create_dir(root.join(layout::REPOSITORIES))?;
    let registry = &File::open(&root)?;
    for prefix in 0..256 {
        make_dir(registry, &layout::blob_shard(Algorithm::Sha256, &format!("{prefix:02x}")))?;
    }
    for number in 0..TEAMS.min(size.repositories) {
        make_dir(registry, &layout::repository(&team(number)))?;
    }

    let next = &AtomicUsize::new(0);
    let mut counts = Counts::default();
    thread::scope(|scope| -> Result<(), Box<dyn Error>> {
        let threads = thread::available_parallelism()?.get();
        let writers: Vec<_> =
            (0..threads).map(|_| scope.spawn(move || write_repositories(registry, next, size))).collect();
        for writer in writers {
            counts.add(&writer.join().map_err(|_| "a thread panicked")??);
        }
        Ok(())
    })?;
    let made = format!("{} repositories\n{counts}", size.repositories);
    print!("{made}");
    Ok(fs::write(directory.join("make_store.txt"), made)?)
}
