//! A small registry to look at: what `regfs sample` writes, and what examples in the documentation show.
//!
//! Valid (a registry serves each image, `umoci` unpacks it) and the same bytes every time, so that digests
//! may be quoted. Written as the registry writes: blob first, then links, the tag last; the times of files
//! and directories tell the same story, one push a day from 2024-01-01 on.
//! ```text
//! alpine         3.19           one OCI image
//!                3.20, latest   one image index: amd64 and arm64/v8 (both tags had other images before)
//!                (untagged)     the first 3.20
//! library/nginx  1.27, stable   one Docker schema 2 image, on alpine's amd64 layer
//! library/redis  7              an OCI image; an upload in progress
//! team/app       1.0            an OCI image, on alpine's amd64 layer
//!                2.0, latest    its successor, with an SPDX document that refers to it
//!                0.9            broken: there is no such manifest
//! team/app/web   main           an OCI image, on alpine's amd64 layer; a layer whose manifest never came
//! blobs          manifest, config and layer of a repository that was removed
//! ```
//! Garbage are those last three blobs and the layer without a manifest; for whoever removes untagged images
//! also the manifest, config and layer of the first 3.20. (2.8.2's `garbage-collect` agrees about the four;
//! its `-m` would take 13, with both children of the image index and the SPDX document.)

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File, FileTimes};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bytesize::ByteSize;
use serde::Serialize;

use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result, count};
use crate::layout;
use crate::printable::Printable;

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Repositories.
    pub repositories: usize,
    /// Tags, the broken one included.
    pub tags: usize,
    /// Blobs, garbage included.
    pub blobs: usize,
    /// Bytes of all blobs.
    pub bytes: u64,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}, {}, {}, {}",
            count(self.repositories, "repository"),
            count(self.tags, "tag"),
            count(self.blobs, "blob"),
            ByteSize::b(self.bytes)
        )
    }
}

/// Writes the sample as the storage root `directory`, which must not exist yet or be empty.
///
/// A failure leaves what was written so far.
pub fn write(directory: &Path) -> Result<Summary> {
    create_empty(directory)?;
    let mut sample = Sample::new(directory.join(layout::REGISTRY_DIR));
    tell(&mut sample)?;
    date_directories(directory)?;
    Ok(sample.summary())
}

fn create_empty(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).map_err(|why| Error::io("create the directory", directory, why))?;
    let mut entries = fs::read_dir(directory).map_err(|why| Error::io("list", directory, why))?;
    match entries.next() {
        None => Ok(()),
        Some(_) => Err(Error::invalid(format_args!(
            "{} is not empty, and nothing is ever replaced; name a directory that does not exist yet",
            directory.printable()
        ))),
    }
}

/// All pushes, in the order of their days.
fn tell(sample: &mut Sample) -> Result<()> {
    sample.day = 1;
    let old_base = Layer::system("3.19", "amd64");
    let alpine_319 = sample.push_image("alpine", OCI, AMD64, &[&old_base])?;
    sample.tag("alpine", "3.19", &alpine_319)?;
    sample.tag("alpine", "latest", &alpine_319)?;

    sample.day = 2;
    leave_removed_repository(sample)?;

    sample.day = 3;
    let first = sample.push_image("alpine", OCI, AMD64, &[&Layer::system("3.20-rc1", "amd64")])?;
    sample.tag("alpine", "3.20", &first)?;

    sample.day = 5;
    let base = Layer::system("3.20", "amd64");
    let children = [
        sample.push_image("alpine", OCI, AMD64, &[&base])?,
        sample.push_image("alpine", OCI, ARM64, &[&Layer::system("3.20", "arm64")])?,
    ];
    let index = sample.push_index("alpine", children)?;
    sample.tag("alpine", "3.20", &index)?;
    sample.tag("alpine", "latest", &index)?;

    sample.day = 6;
    let nginx = Layer::program("nginx", "1.27", 120);
    let image = sample.push_image("library/nginx", DOCKER, AMD64, &[&base, &nginx])?;
    sample.tag("library/nginx", "1.27", &image)?;
    sample.tag("library/nginx", "stable", &image)?;

    sample.day = 7;
    let lost = describe(OCI.manifest, b"a manifest that somebody removed by hand");
    sample.write_tag("team/app", "0.9", &lost.digest)?;

    sample.day = 8;
    let image = sample.push_image("team/app", OCI, AMD64, &[&base, &Layer::program("app", "1.0", 60)])?;
    sample.tag("team/app", "1.0", &image)?;

    sample.day = 9;
    let assets = Layer::program("web", "main", 200);
    let image = sample.push_image("team/app/web", OCI, AMD64, &[&base, &assets])?;
    sample.tag("team/app/web", "main", &image)?;

    sample.day = 10;
    let image = sample.push_image("team/app", OCI, AMD64, &[&base, &Layer::program("app", "2.0", 80)])?;
    sample.tag("team/app", "2.0", &image)?;
    sample.tag("team/app", "latest", &image)?;
    sample.push_referrer("team/app", &image)?;

    sample.day = 11;
    let layers = [Layer::system("edge", "amd64"), Layer::program("redis", "7", 90)];
    let image = sample.push_image("library/redis", OCI, AMD64, &[&layers[0], &layers[1]])?;
    sample.tag("library/redis", "7", &image)?;

    sample.day = 12;
    sample.push_blob("team/app/web", &Layer::program("web", "never-finished", 150).gzip)?;

    sample.day = 13;
    sample.start_upload("library/redis", &Layer::program("redis", "8", 100).gzip[..4096])
}

/// What `rm -r repositories/attic` leaves: blobs that nothing links.
fn leave_removed_repository(sample: &mut Sample) -> Result<()> {
    let layer = Layer::program("attic", "1", 300);
    let config = json(&ImageConfig::new(AMD64, sample.timestamp(), &[&layer]));
    let manifest = Manifest {
        schema_version: 2,
        media_type: OCI.manifest,
        artifact_type: None,
        config: describe(OCI.config, &config),
        layers: vec![describe(OCI.layer, &layer.gzip)],
        subject: None,
    };
    for blob in [&layer.gzip, &config, &json(&manifest)] {
        sample.write_blob(blob)?;
    }
    Ok(())
}

/// The registry as far as it is written.
struct Sample {
    registry: PathBuf,
    /// Of January 2024; all that is written carries this date.
    day: u64,
    /// With their sizes.
    blobs: BTreeMap<Digest, u64>,
    /// Repository and tag.
    tags: BTreeSet<(String, String)>,
    repositories: BTreeSet<String>,
}

impl Sample {
    fn new(registry: PathBuf) -> Sample {
        Sample {
            registry,
            day: 1,
            blobs: BTreeMap::new(),
            tags: BTreeSet::new(),
            repositories: BTreeSet::new(),
        }
    }

    fn summary(&self) -> Summary {
        Summary {
            repositories: self.repositories.len(),
            tags: self.tags.len(),
            blobs: self.blobs.len(),
            bytes: self.blobs.values().sum(),
        }
    }

    /// RFC 3339, the same moment as [`Sample::time`].
    fn timestamp(&self) -> String {
        format!("2024-01-{:02}T09:00:00Z", self.day)
    }

    fn time(&self) -> SystemTime {
        /// 2024-01-01 09:00 UTC.
        const FIRST_DAY: u64 = 1_704_099_600;
        SystemTime::UNIX_EPOCH + Duration::from_secs(FIRST_DAY + (self.day - 1) * 86_400)
    }

    fn push_image(
        &mut self,
        repository: &str,
        types: Types,
        on: Platform,
        layers: &[&Layer],
    ) -> Result<Descriptor> {
        for layer in layers {
            self.push_blob(repository, &layer.gzip)?;
        }
        let config = json(&ImageConfig::new(on, self.timestamp(), layers));
        self.push_blob(repository, &config)?;
        let manifest = json(&Manifest {
            schema_version: 2,
            media_type: types.manifest,
            artifact_type: None,
            config: describe(types.config, &config),
            layers: layers.iter().map(|layer| describe(types.layer, &layer.gzip)).collect(),
            subject: None,
        });
        self.push_manifest(repository, &manifest)?;
        Ok(Descriptor { platform: Some(on), ..describe(types.manifest, &manifest) })
    }

    fn push_index(&mut self, repository: &str, children: [Descriptor; 2]) -> Result<Descriptor> {
        let index = json(&Index { schema_version: 2, media_type: OCI_INDEX, manifests: children });
        self.push_manifest(repository, &index)?;
        Ok(describe(OCI_INDEX, &index))
    }

    /// An SPDX document about `subject`, found by whoever asks for its referrers; no tag names it.
    fn push_referrer(&mut self, repository: &str, subject: &Descriptor) -> Result<()> {
        let document = json(&Spdx::new(self.timestamp()));
        let config = b"{}";
        self.push_blob(repository, &document)?;
        self.push_blob(repository, config)?;
        let manifest = json(&Manifest {
            schema_version: 2,
            media_type: OCI.manifest,
            artifact_type: Some(SPDX),
            config: describe("application/vnd.oci.empty.v1+json", config),
            layers: vec![describe(SPDX, &document)],
            subject: Some(Descriptor { platform: None, ..*subject }),
        });
        self.push_manifest(repository, &manifest)
    }

    fn push_blob(&mut self, repository: &str, content: &[u8]) -> Result<()> {
        let digest = self.write_blob(content)?;
        self.write_link(&layout::layer_link(Path::new(repository), &digest), &digest)?;
        if self.repositories.insert(repository.to_string()) {
            self.leave_uploads_directory(repository)?;
        }
        Ok(())
    }

    fn push_manifest(&mut self, repository: &str, content: &[u8]) -> Result<()> {
        let digest = self.write_blob(content)?;
        self.write_link(&layout::revision_link(Path::new(repository), &digest), &digest)
    }

    fn tag(&mut self, repository: &str, tag: &str, manifest: &Descriptor) -> Result<()> {
        self.write_tag(repository, tag, &manifest.digest)
    }

    /// The tag's history first, then what it points at, as the registry does.
    fn write_tag(&mut self, repository: &str, tag: &str, digest: &Digest) -> Result<()> {
        let (path, name) = (Path::new(repository), OsStr::new(tag));
        self.write_link(&layout::tag_history_link(path, name, digest), digest)?;
        self.write_link(&layout::tag_link(path, name), digest)?;
        self.tags.insert((repository.to_string(), tag.to_string()));
        Ok(())
    }

    fn start_upload(&self, repository: &str, received: &[u8]) -> Result<()> {
        let (path, id) = (Path::new(repository), OsStr::new("5f2b6c1e-8d3a-4c47-9e10-7a4d2b90c6f1"));
        self.put(&layout::upload_started_at(path, id), self.timestamp().as_bytes())?;
        self.put(&layout::upload_data(path, id), received)?;
        // Nothing but the start of the hash: the connection broke before the registry saved its state again.
        let state = layout::upload_hash_state(path, id, Algorithm::Sha256, 0);
        self.put(&state, &empty_sha256_state())
    }

    /// Empty, as every finished push leaves it.
    fn leave_uploads_directory(&self, repository: &str) -> Result<()> {
        let path = self.registry.join(layout::uploads(Path::new(repository)));
        fs::create_dir_all(&path)
            .and_then(|()| File::open(&path))
            .and_then(|directory| set_time(&directory, self.time()))
            .map_err(|why| Error::io("create the directory", &path, why))
    }

    /// Keeps the blob that is there, with its time: a registry drops the second upload.
    fn write_blob(&mut self, content: &[u8]) -> Result<Digest> {
        let digest = Digest::of(Algorithm::Sha256, content);
        if self.blobs.insert(digest, content.len() as u64).is_none() {
            self.put(&layout::blob_data(&digest), content)?;
        }
        Ok(digest)
    }

    fn write_link(&self, path: &Path, digest: &Digest) -> Result<()> {
        self.put(path, digest.to_string().as_bytes())
    }

    fn put(&self, path: &Path, content: &[u8]) -> Result<()> {
        let path = self.registry.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|why| Error::io("create the directory", parent, why))?;
        }
        fs::write(&path, content)
            .and_then(|()| File::options().write(true).open(&path))
            .and_then(|file| set_time(&file, self.time()))
            .map_err(|why| Error::io("write", &path, why))
    }
}

fn set_time(file: &File, time: SystemTime) -> io::Result<()> {
    file.set_times(FileTimes::new().set_accessed(time).set_modified(time))
}

/// Gives each directory the time of the newest thing in it, and returns that; an empty one keeps its time.
fn date_directories(directory: &Path) -> Result<SystemTime> {
    let failed = |why| Error::io("set the times of", directory, why);
    let mut newest = None;
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let metadata = entry.metadata().map_err(failed)?;
        let time = match metadata.is_dir() {
            true => date_directories(&entry.path())?,
            false => metadata.modified().map_err(failed)?,
        };
        newest = newest.max(Some(time));
    }
    let opened = File::open(directory).map_err(failed)?;
    match newest {
        Some(time) => set_time(&opened, time).map(|()| time),
        None => opened.metadata().and_then(|metadata| metadata.modified()),
    }
    .map_err(failed)
}

/// What the registry saves when an upload begins: Go's encoding of a SHA-256 that has read nothing.
fn empty_sha256_state() -> Vec<u8> {
    const INITIAL: [u32; 8] = [
        0x6a09_e667,
        0xbb67_ae85,
        0x3c6e_f372,
        0xa54f_f53a,
        0x510e_527f,
        0x9b05_688c,
        0x1f83_d9ab,
        0x5be0_cd19,
    ];
    let mut state = b"sha\x03".to_vec();
    state.extend(INITIAL.iter().flat_map(|word| word.to_be_bytes()));
    // A block not yet begun, and the number of bytes read.
    state.extend([0; 64 + 8]);
    state
}

/// Media types of one kind of image.
#[derive(Clone, Copy)]
struct Types {
    manifest: &'static str,
    config: &'static str,
    layer: &'static str,
}

const OCI: Types = Types {
    manifest: "application/vnd.oci.image.manifest.v1+json",
    config: "application/vnd.oci.image.config.v1+json",
    layer: "application/vnd.oci.image.layer.v1.tar+gzip",
};
const DOCKER: Types = Types {
    manifest: "application/vnd.docker.distribution.manifest.v2+json",
    config: "application/vnd.docker.container.image.v1+json",
    layer: "application/vnd.docker.image.rootfs.diff.tar.gzip",
};
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const SPDX: &str = "application/spdx+json";

#[derive(Clone, Copy, Serialize)]
struct Platform {
    architecture: &'static str,
    os: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    variant: Option<&'static str>,
}

const AMD64: Platform = Platform { architecture: "amd64", os: "linux", variant: None };
const ARM64: Platform = Platform { architecture: "arm64", os: "linux", variant: Some("v8") };

// Structs, not `serde_json::json!`: the order of its keys depends on a feature that any crate may turn on.

#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: &'static str,
    digest: Digest,
    size: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    platform: Option<Platform>,
}

fn describe(media_type: &'static str, content: &[u8]) -> Descriptor {
    Descriptor {
        media_type,
        digest: Digest::of(Algorithm::Sha256, content),
        size: content.len(),
        platform: None,
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    schema_version: u32,
    media_type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    artifact_type: Option<&'static str>,
    config: Descriptor,
    layers: Vec<Descriptor>,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<Descriptor>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    schema_version: u32,
    media_type: &'static str,
    manifests: [Descriptor; 2],
}

#[derive(Serialize)]
struct ImageConfig {
    created: String,
    #[serde(flatten)]
    platform: Platform,
    config: Process,
    rootfs: RootFs,
    history: Vec<History>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Process {
    env: [&'static str; 1],
    cmd: [&'static str; 1],
}

#[derive(Serialize)]
struct RootFs {
    r#type: &'static str,
    diff_ids: Vec<Digest>,
}

#[derive(Serialize)]
struct History {
    created: String,
    created_by: String,
}

impl ImageConfig {
    fn new(platform: Platform, created: String, layers: &[&Layer]) -> ImageConfig {
        let history =
            |layer: &&Layer| History { created: created.clone(), created_by: layer.made_by.clone() };
        ImageConfig {
            platform,
            config: Process { env: ["PATH=/usr/bin:/bin"], cmd: ["/bin/hello"] },
            rootfs: RootFs { r#type: "layers", diff_ids: layers.iter().map(|layer| layer.diff_id).collect() },
            history: layers.iter().map(history).collect(),
            created,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Spdx {
    spdx_version: &'static str,
    #[serde(rename = "SPDXID")]
    id: &'static str,
    data_license: &'static str,
    name: &'static str,
    document_namespace: &'static str,
    creation_info: SpdxCreation,
    packages: [SpdxPackage; 1],
}

#[derive(Serialize)]
struct SpdxCreation {
    created: String,
    creators: [&'static str; 1],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SpdxPackage {
    #[serde(rename = "SPDXID")]
    id: &'static str,
    name: &'static str,
    version_info: &'static str,
    download_location: &'static str,
}

impl Spdx {
    fn new(created: String) -> Spdx {
        Spdx {
            spdx_version: "SPDX-2.3",
            id: "SPDXRef-DOCUMENT",
            data_license: "CC0-1.0",
            name: "team/app",
            document_namespace: "https://example.com/spdx/team/app/2.0",
            creation_info: SpdxCreation { created, creators: ["Organization: Example"] },
            packages: [SpdxPackage {
                id: "SPDXRef-app",
                name: "app",
                version_info: "2.0",
                download_location: "NOASSERTION",
            }],
        }
    }
}

#[expect(clippy::expect_used, reason = "the only values are the structs above")]
fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("structs of strings and numbers have a JSON form")
}

/// A layer: a few files.
struct Layer {
    gzip: Vec<u8>,
    /// Digest of the tar before compression.
    diff_id: Digest,
    made_by: String,
}

impl Layer {
    fn new(made_by: String, files: &[(&str, u32, String)]) -> Layer {
        let tar = tar(files);
        Layer { diff_id: Digest::of(Algorithm::Sha256, &tar), gzip: gzip(&tar), made_by }
    }

    /// The ground of an image.
    fn system(version: &str, architecture: &str) -> Layer {
        let release = format!(
            "NAME=\"Sample Linux\"\nID=sample\nVERSION_ID={version}\nPRETTY_NAME=\"Sample Linux {version}\"\n"
        );
        let hello = format!("#!/bin/sh\necho 'hello from sample {version} on {architecture}'\n");
        let files = [
            ("bin/hello", 0o755, hello),
            ("etc/arch", 0o644, format!("{architecture}\n")),
            ("etc/os-release", 0o644, release),
            (
                "etc/passwd",
                0o644,
                "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n".into(),
            ),
            ("usr/share/doc/system.txt", 0o644, prose(version, 250)),
        ];
        Layer::new(format!("ADD sample-{version}-{architecture}.tar /"), &files)
    }

    /// A program upon it, with `lines` lines of documentation.
    fn program(name: &str, version: &str, lines: usize) -> Layer {
        let (script, settings, document) = (
            format!("usr/bin/{name}"),
            format!("etc/{name}/{name}.conf"),
            format!("usr/share/doc/{name}.txt"),
        );
        let files = [
            (settings.as_str(), 0o644, format!("# {name} {version}\nlisten = 8080\n")),
            (script.as_str(), 0o755, format!("#!/bin/sh\necho '{name} {version}'\n")),
            (document.as_str(), 0o644, prose(&format!("{name} {version}"), lines)),
        ];
        Layer::new(format!("COPY {name} / # {version}"), &files)
    }
}

fn prose(about: &str, lines: usize) -> String {
    (1..=lines).map(|line| format!("{line:4}  what there is to say about {about}\n")).collect()
}

/// Packs `(path, mode, content)` in the ustar format, with the directories above them.
fn tar(files: &[(&str, u32, String)]) -> Vec<u8> {
    let mut archive = Vec::new();
    let mut directories = BTreeSet::new();
    for (path, mode, content) in files {
        let mut above: Vec<_> = Path::new(path).ancestors().skip(1).filter(|a| *a != Path::new("")).collect();
        above.reverse();
        for directory in above {
            if directories.insert(directory) {
                archive.extend(tar_header(&format!("{}/", directory.to_string_lossy()), b'5', 0o755, 0));
            }
        }
        archive.extend(tar_header(path, b'0', *mode, content.len()));
        archive.extend(content.as_bytes());
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

/// One header block; `name` has at most 100 bytes.
fn tar_header(name: &str, kind: u8, mode: u32, size: usize) -> [u8; 512] {
    let mut header = [0; 512];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, &format!("{mode:07o}"));
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{size:011o}"));
    // 2024-01-01 00:00 UTC
    put(136, &format!("{:011o}", 1_704_067_200));
    // The checksum counts its own field as spaces.
    put(148, "        ");
    put(257, "ustar\x0000root");
    put(297, "root");
    header[156] = kind;
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

/// A gzip file that stores its content as it is (RFC 1952, RFC 1951 §3.2.4): no compressor's version may
/// change a digest.
fn gzip(content: &[u8]) -> Vec<u8> {
    // Deflate, no flags, no time, no hint, "unknown system".
    let mut file = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    let mut blocks = content.chunks(usize::from(u16::MAX)).peekable();
    while let Some(block) = blocks.next() {
        let length = block.len() as u16;
        file.push(u8::from(blocks.peek().is_none()));
        file.extend(length.to_le_bytes());
        file.extend((!length).to_le_bytes());
        file.extend(block);
    }
    file.extend(crc32(content).to_le_bytes());
    file.extend((content.len() as u32).to_le_bytes());
    file
}

fn crc32(content: &[u8]) -> u32 {
    let step = |crc: u32, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
    !content.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    /// Every path below `directory` with its time and content (none for a directory).
    fn tree(directory: &Path) -> BTreeMap<PathBuf, (SystemTime, Option<Vec<u8>>)> {
        let mut found = BTreeMap::new();
        let mut pending = vec![PathBuf::new()];
        while let Some(path) = pending.pop() {
            for entry in fs::read_dir(directory.join(&path)).unwrap() {
                let entry = entry.unwrap();
                let path = path.join(entry.file_name());
                let metadata = entry.metadata().unwrap();
                let content = (!metadata.is_dir()).then(|| fs::read(entry.path()).unwrap());
                if metadata.is_dir() {
                    pending.push(path.clone());
                }
                found.insert(path, (metadata.modified().unwrap(), content));
            }
        }
        found
    }

    fn written() -> (tempfile::TempDir, Summary, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let summary = write(directory.path()).unwrap();
        let registry = directory.path().join(layout::REGISTRY_DIR);
        (directory, summary, registry)
    }

    #[test]
    fn two_samples_are_the_same_byte_for_byte_and_second_for_second() {
        let ((one, summary, _), (two, again, _)) = (written(), written());
        assert_eq!(summary, again);
        assert!(tree(one.path()) == tree(two.path()));
    }

    #[test]
    fn the_digests_in_the_documentation_stay_true() {
        let (_directory, summary, registry) = written();
        let link =
            fs::read_to_string(registry.join(layout::tag_link(Path::new("alpine"), OsStr::new("3.20"))));
        assert_eq!(link.unwrap(), "sha256:437d09ab50fc31440a4dcc75608bbffd19778b9a828b0f0730c8498da73541d9");
        assert_eq!(summary.to_string(), "5 repositories, 11 tags, 36 blobs, 188.9 KiB");
    }

    #[test]
    fn links_and_blobs_are_as_the_registry_writes_them() {
        let (_directory, summary, registry) = written();
        let (mut blobs, mut links) = (0, 0);
        for (path, (_, content)) in tree(&registry) {
            let Some(content) = content else { continue };
            if let layout::Kind::Blob(digest) = layout::classify(&path) {
                assert_eq!(Digest::of(Algorithm::Sha256, &content), digest);
                blobs += 1;
            } else if path.ends_with("link") {
                let digest = layout::parse_link(&content).unwrap();
                let is_current = path.parent().unwrap().ends_with("current");
                assert!(is_current || path.parent().unwrap().ends_with(digest.hex()), "{}", path.printable());
                links += 1;
            }
        }
        assert_eq!(blobs, summary.blobs);
        assert!(links > blobs);
    }

    #[test]
    fn exactly_four_blobs_are_garbage_and_one_of_them_is_linked() {
        let (_directory, summary, registry) = written();
        let tree = tree(&registry);
        let blob = |digest: &Digest| tree.get(&layout::blob_data(digest)).and_then(|(_, c)| c.clone());
        let (mut named, mut linked) = (BTreeSet::new(), BTreeSet::new());
        for path in tree.keys() {
            match layout::classify(path) {
                layout::Kind::LayerLink(_, digest) => drop(linked.insert(digest)),
                layout::Kind::Revision(_, digest) => {
                    let manifest: Value = serde_json::from_slice(&blob(&digest).unwrap()).unwrap();
                    named.insert(digest);
                    let lists = ["layers", "manifests"].map(|key| manifest[key].as_array().cloned());
                    let all = lists.into_iter().flatten().flatten().chain([manifest["config"].clone()]);
                    for descriptor in all.filter(|d| d.is_object()) {
                        let digest = descriptor["digest"].as_str().unwrap().parse().unwrap();
                        assert_eq!(blob(&digest).unwrap().len() as u64, descriptor["size"]);
                        named.insert(digest);
                    }
                }
                _ => {}
            }
        }
        assert_eq!(summary.blobs - named.len(), 4);
        assert_eq!(linked.difference(&named).count(), 1);
    }

    #[test]
    fn only_the_broken_tag_points_at_nothing() {
        let (_directory, summary, registry) = written();
        let tree = tree(&registry);
        let mut broken = Vec::new();
        let mut tags = 0;
        for path in tree.keys() {
            let layout::Kind::Tag(repository, tag) = layout::classify(path) else { continue };
            tags += 1;
            let (_, link) = &tree[&layout::tag_link(&repository, &tag)];
            let digest = layout::parse_link(link.as_ref().unwrap()).unwrap();
            assert!(tree.contains_key(&layout::tag_history_link(&repository, &tag, &digest)));
            if !tree.contains_key(&layout::revision_link(&repository, &digest)) {
                broken.push((repository, tag));
            }
        }
        assert_eq!(tags, summary.tags);
        assert_eq!(broken, [(PathBuf::from("team/app"), "0.9".into())]);
    }

    #[test]
    fn what_is_there_is_never_touched() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("mine"), "x").unwrap();
        let error = write(directory.path()).unwrap_err().to_string();
        assert!(error.contains("is not empty"), "{error}");
        assert!(write(&directory.path().join("mine")).is_err());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        assert!(write(&directory.path().join("new/deep")).is_ok());
    }

    #[test]
    fn checksums_follow_the_standards() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(gzip(&[7; 70_000]).len(), 10 + 2 * 5 + 70_000 + 8);
    }
}
