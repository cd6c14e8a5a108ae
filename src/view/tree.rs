//! What is where: names below a directory, and the node of a name.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::View;
use super::node::{Node, Type};
use super::reachability::{broken_name, problem_number};
use crate::catalog::intern::{DigestId, IdSet, NameId};
use crate::catalog::{Descriptor, Parsed, Repository};
use crate::digest::{Algorithm, Digest};
use crate::error::Result;
use crate::gc::why;
use crate::layout;
use crate::printable::is_unsafe;
use crate::store;
use crate::trash;

/// Names in `images/<repository>`.
pub const TAGS: &str = "_tags";
/// Names in `images/<repository>`.
pub const REVISIONS: &str = "_manifests";
/// Names in `images/<repository>`.
pub const UPLOADS: &str = "_uploads";
/// Name of what says why, beside the symlinks in the directory of a reachable blob.
pub const WHY: &str = "why";

/// So many images of an index have their directory in `platforms`; nobody builds for nearly as many.
const MANY_PLATFORMS: usize = 64;

/// A directory's entries.
pub type Entries = Vec<(OsString, Node)>;

pub(super) fn entry(name: impl Into<OsString>, node: Node) -> (OsString, Node) {
    (name.into(), node)
}

/// What a path below `images` may mean, read as an image reference or as a name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reference<'a> {
    /// The last component of the repository's name.
    pub repository: &'a str,
    /// After the colon.
    pub tag: Option<&'a str>,
    /// After the `@`.
    pub digest: Option<Digest>,
}

/// Reads `alpine:3.8`, `alpine@sha256:…`, `alpine:3.8@sha256:…`; `None` for a plain name.
pub fn parse_reference(name: &OsStr) -> Option<Reference<'_>> {
    let name = name.to_str()?;
    let (rest, digest) = match name.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest.parse().ok()?)),
        None => (name, None),
    };
    let (repository, tag) = match rest.split_once(':') {
        Some((repository, tag)) => (repository, Some(tag)),
        None => (rest, None),
    };
    (tag.is_some() || digest.is_some()).then_some(Reference { repository, tag, digest })
}

impl View<'_> {
    pub(super) fn names(&self, name: &OsStr) -> NameId {
        self.snapshot.catalog.tables.names.intern(name)
    }

    fn digest_id(&self, digest: &Digest) -> Option<DigestId> {
        self.snapshot.catalog.tables.digests.find(digest)
    }

    pub(super) fn hex(&self, id: DigestId) -> String {
        self.snapshot.catalog.digest(id).hex()
    }

    pub(super) fn repository(&self, id: NameId) -> Option<&Arc<Repository>> {
        self.snapshot.path(id).and_then(|name| self.snapshot.repository(&name))
    }

    /// The node of `name` in the directory `parent`.
    pub fn lookup(&self, parent: Node, name: &OsStr) -> Result<Option<Node>> {
        let by_digest = |algorithm: Algorithm| {
            let digest = Digest::from_parts(algorithm.name(), name.to_str()?)?;
            self.digest_id(&digest)
        };
        // Directories that may be large are not listed to find one name.
        let node = match parent {
            Node::Tags(repository) => {
                let tag = self.snapshot.catalog.tables.names.find(name);
                let tag =
                    tag.filter(|tag| self.repository(repository).is_some_and(|r| r.tag(*tag).is_some()));
                tag.map(|tag| Node::Tag(tag, repository))
            }
            Node::RevisionsOf(algorithm, repository) => by_digest(algorithm)
                .filter(|id| self.repository(repository).is_some_and(|r| r.revision(*id).is_some()))
                .map(Node::Blob),
            Node::ManifestsOf(algorithm) => {
                by_digest(algorithm).filter(|id| self.snapshot.is_listed(*id)).map(Node::Manifest)
            }
            Node::BlobShard(shard, algorithm) => by_digest(algorithm)
                .filter(|id| self.in_shard(*id, shard) && self.snapshot.catalog.has_blob(*id))
                .map(Node::Blob),
            Node::ReachableShard(shard, algorithm) => by_digest(algorithm)
                .filter(|id| self.in_shard(*id, shard) && self.is_kept(*id))
                .map(Node::ReachableBlob),
            Node::UnreachableOf(algorithm) => by_digest(algorithm)
                .filter(|id| self.snapshot.candidate(self.store, *id).is_some())
                .map(Node::Garbage),
            // Any digest of the store has an answer; the listing shows the garbage.
            Node::WhyOf(algorithm) => {
                by_digest(algorithm).filter(|id| why::is_known(&self.facts(), *id)).map(Node::WhyText)
            }
            Node::ReachableBlob(id) if name == WHY => Some(Node::WhyText(id)),
            Node::Images | Node::Namespace(_) => self.below_images(parent, name),
            Node::Broken => problem_number(name)
                .filter(|at| broken_name(self.snapshot, *at).is_some_and(|n| *n == *name))
                .map(|_| Node::BrokenFile(self.names(name))),
            _ => {
                let entries = self.list(parent)?.unwrap_or_default();
                entries.into_iter().find(|(n, _)| n == name).map(|(_, node)| node)
            }
        };
        Ok(node)
    }

    /// The path below `images` that a node stands for.
    pub fn namespace(&self, node: Node) -> Option<PathBuf> {
        match node {
            Node::Images => Some(PathBuf::new()),
            Node::Namespace(path) => self.snapshot.path(path),
            _ => None,
        }
    }

    /// A directory of a repository, a repository, or an image reference.
    fn below_images(&self, parent: Node, name: &OsStr) -> Option<Node> {
        let path = self.namespace(parent)?;
        if self.snapshot.repository(&path).is_some() {
            let id = self.snapshot.name_id(&path);
            match name.to_str() {
                Some(TAGS) => return Some(Node::Tags(id)),
                Some(REVISIONS) => return Some(Node::Revisions(id)),
                Some(UPLOADS) => return Some(Node::Uploads(id)),
                _ => {}
            }
        }
        let children = self.snapshot.directory(&path)?;
        // Not listed, but what may become a repository can be given a tag.
        if name == TAGS && !path.as_os_str().is_empty() {
            return Some(Node::Tags(self.snapshot.name_id(&path)));
        }
        match children.contains(name) {
            true => Some(Node::Namespace(self.snapshot.name_id(&path.join(name)))),
            false => self.reference(&path, name),
        }
    }

    fn reference(&self, parent: &Path, name: &OsStr) -> Option<Node> {
        let reference = parse_reference(name)?;
        let path = parent.join(reference.repository);
        let repository = self.snapshot.repository(&path)?;
        let repository_id = self.snapshot.name_id(&path);
        let tag = match reference.tag {
            Some(tag) => {
                let id = self.snapshot.catalog.tables.names.find(OsStr::new(tag))?;
                Some(repository.tag(id)?)
            }
            None => None,
        };
        match (tag, reference.digest) {
            (_, Some(digest)) => {
                let id = self.digest_id(&digest)?;
                repository.revision(id)?;
                // A tag beside a digest must agree with it.
                let agrees = tag.is_none_or(|t| t.target == Some(id));
                agrees.then_some(Node::DigestReference(id, repository_id))
            }
            (Some(tag), None) => Some(Node::TagReference(tag.name, repository_id)),
            (None, None) => None,
        }
    }

    fn in_shard(&self, id: DigestId, shard: u8) -> bool {
        self.snapshot.catalog.digest(id).as_bytes().first() == Some(&shard)
    }

    pub(super) fn is_kept(&self, id: DigestId) -> bool {
        self.snapshot.mark().is_reachable(id) && self.snapshot.catalog.has_blob(id)
    }

    /// The entries of a directory, without `.` and `..`; `None` when `node` is no directory or is gone.
    pub fn list(&self, node: Node) -> Result<Option<Entries>> {
        let entries = match node {
            Node::Root => Some(self.root()),
            Node::Images => self.images(Path::new("")),
            Node::Namespace(path) => self.snapshot.path(path).and_then(|path| self.images(&path)),
            Node::Tags(id) => match self.repository(id) {
                Some(repository) => Some(self.tags(id, repository)),
                None => {
                    self.snapshot.path(id).and_then(|p| self.snapshot.directory(&p)).map(|_| Entries::new())
                }
            },
            Node::Revisions(id) => self.repository(id).map(|r| {
                let ids: Vec<DigestId> = r.revisions.iter().map(|revision| revision.digest).collect();
                self.algorithms_of(&ids, |a| Node::RevisionsOf(a, id))
            }),
            Node::RevisionsOf(algorithm, id) => self.repository(id).map(|r| self.revisions(r, algorithm)),
            Node::Uploads(id) => self.repository(id).map(|r| {
                let upload = |upload: &NameId| {
                    (self.snapshot.catalog.name(*upload).to_os_string(), Node::Upload(*upload, id))
                };
                r.uploads.iter().map(upload).collect()
            }),
            Node::Manifests | Node::ManifestsOf(_) | Node::Manifest(_) => self.manifests(node),
            Node::LayoutBlobs(id) | Node::LayoutBlobsOf(id, _) => self.layout_blobs(node, id),
            Node::Layers(id) => self.snapshot.catalog.parsed(id).map(|m| self.layers(m.layers())),
            Node::Platforms(id) => self.snapshot.catalog.parsed(id).map(|m| self.platforms(m)),
            Node::Referrers(id) => Some(self.referrers(id)),
            Node::Blobs => Some(self.algorithms_of(&self.snapshot.catalog.blobs, Node::BlobsOf)),
            Node::BlobsOf(algorithm) => Some(self.shards(algorithm, &|_| true, Node::BlobShard)),
            Node::BlobShard(shard, algorithm) => Some(self.blobs(shard, algorithm)?),
            Node::Reachability
            | Node::Reachable
            | Node::ReachableOf(_)
            | Node::ReachableShard(..)
            | Node::ReachableBlob(_)
            | Node::Unreachable
            | Node::UnreachableOf(_)
            | Node::Untagged
            | Node::UntaggedIn(_)
            | Node::Missing
            | Node::MissingOf(_)
            | Node::Broken
            | Node::Why
            | Node::WhyOf(_) => self.reachability(node),
            Node::Trash => Some(self.trashed(Path::new(""))?),
            Node::Trashed(path) => match self.snapshot.plain_path(path) {
                Some(path) => Some(self.trashed(&path)?),
                None => None,
            },
            Node::Control => Some(vec![
                entry("gc", Node::ControlGc),
                entry("log", Node::ControlLog),
                entry("refresh", Node::ControlRefresh),
                entry("stop", Node::ControlStop),
                entry("status", Node::ControlStatus),
                entry("trash", Node::ControlTrash),
            ]),
            _ => None,
        };
        Ok(entries)
    }

    fn root(&self) -> Entries {
        vec![
            entry("README", Node::Readme),
            entry("blobs", Node::Blobs),
            entry("control", Node::Control),
            entry("images", Node::Images),
            entry("manifests", Node::Manifests),
            entry("reachability", Node::Reachability),
            entry("trash", Node::Trash),
        ]
    }

    fn images(&self, path: &Path) -> Option<Entries> {
        let children = self.snapshot.directory(path)?;
        let mut entries = Entries::new();
        // Tags first: `rm -r` then takes manifests along with their tags, indexes before their children.
        if self.snapshot.repository(path).is_some() {
            let id = self.snapshot.name_id(path);
            entries.push(entry(TAGS, Node::Tags(id)));
            entries.push(entry(REVISIONS, Node::Revisions(id)));
            entries.push(entry(UPLOADS, Node::Uploads(id)));
        }
        let below = children
            .iter()
            .map(|name| (name.clone(), Node::Namespace(self.snapshot.name_id(&path.join(name)))));
        entries.extend(below);
        Some(entries)
    }

    fn tags(&self, id: NameId, repository: &Repository) -> Entries {
        let tag = |tag: NameId| (self.snapshot.catalog.name(tag).to_os_string(), Node::Tag(tag, id));
        repository.tags.iter().map(|t| tag(t.name)).collect()
    }

    /// Manifests of a repository, what holds others first, so that `rm -r` never meets one that is still held.
    fn revisions(&self, repository: &Repository, algorithm: Algorithm) -> Entries {
        let catalog = &self.snapshot.catalog;
        let is_held_by = |holder: DigestId, id: DigestId| {
            catalog
                .parsed(holder)
                .is_some_and(|m| m.children().iter().any(|d| d.digest == id) || m.others().contains(&id))
        };
        let mut ids: Vec<DigestId> = repository.revisions.iter().map(|r| r.digest).collect();
        ids.retain(|id| catalog.digest(*id).algorithm() == algorithm);
        let (holders, plain): (Vec<DigestId>, Vec<DigestId>) = ids.into_iter().partition(|id| {
            catalog.parsed(*id).is_some_and(|m| !m.children().is_empty() || !m.others().is_empty())
        });
        // Few indexes hold indexes: an insertion sort by "holds" is enough for them.
        let mut ordered: Vec<DigestId> = Vec::new();
        for id in holders {
            let at = ordered.iter().position(|other| is_held_by(id, *other)).unwrap_or(ordered.len());
            ordered.insert(at, id);
        }
        ordered.into_iter().chain(plain).map(|id| entry(self.hex(id), Node::Blob(id))).collect()
    }

    /// A directory for each algorithm among `ids`; the one that nearly all are under is always there.
    pub(super) fn algorithms_of(&self, ids: &[DigestId], node: impl Fn(Algorithm) -> Node) -> Entries {
        let usual = std::iter::once(Digest::of(Algorithm::Sha256, b""));
        let digests = usual.chain(ids.iter().map(|id| self.snapshot.catalog.digest(*id)));
        algorithms(digests).map(|a| entry(a.name(), node(a))).collect()
    }

    fn manifests(&self, node: Node) -> Option<Entries> {
        match node {
            Node::Manifests => {
                let ids: Vec<DigestId> = self.snapshot.listed_manifests().collect();
                Some(self.algorithms_of(&ids, Node::ManifestsOf))
            }
            Node::ManifestsOf(algorithm) => {
                let mut ids: Vec<DigestId> = self.snapshot.listed_manifests().collect();
                ids.retain(|id| self.snapshot.catalog.digest(*id).algorithm() == algorithm);
                ids.sort_unstable();
                Some(ids.into_iter().map(|id| entry(self.hex(id), Node::Manifest(id))).collect())
            }
            Node::Manifest(id) if self.snapshot.is_listed(id) => self.manifest(id),
            _ => None,
        }
    }

    fn manifest(&self, id: DigestId) -> Option<Entries> {
        let manifest = self.snapshot.catalog.parsed(id)?;
        let mut entries = vec![
            entry("oci-layout", Node::OciLayout),
            entry("index.json", Node::LayoutIndex(id)),
            entry("blobs", Node::LayoutBlobs(id)),
            entry("manifest.json", Node::Blob(id)),
            entry("references", Node::References(id)),
        ];
        if let Some(config) = manifest.config() {
            let stored = self.snapshot.catalog.stored_as(config.digest);
            if self.snapshot.catalog.has_blob(stored) {
                entries.push(entry("config.json", Node::Blob(stored)));
            }
        }
        if !manifest.layers().is_empty() {
            entries.push(entry("layers", Node::Layers(id)));
        }
        if !manifest.children().is_empty() {
            entries.push(entry("platforms", Node::Platforms(id)));
        }
        if self.snapshot.uses().referrers.contains_key(&id) {
            entries.push(entry("referrers", Node::Referrers(id)));
        }
        if let Some(subject) = manifest.subject() {
            entries.push(entry("subject", Node::Pointer(subject)));
        }
        Some(entries)
    }

    /// The blobs of an image layout: the manifest and everything below it that is in the store.
    fn layout_blobs(&self, node: Node, id: DigestId) -> Option<Entries> {
        let catalog = &self.snapshot.catalog;
        if !self.snapshot.is_listed(id) {
            return None;
        }
        let closure = catalog.closure(id).into_iter().filter(|id| catalog.has_blob(catalog.stored_as(*id)));
        Some(match node {
            Node::LayoutBlobsOf(_, algorithm) => closure
                .filter(|id| catalog.digest(*id).algorithm() == algorithm)
                .map(|id| entry(self.hex(id), Node::Blob(catalog.stored_as(id))))
                .collect(),
            _ => algorithms(closure.map(|id| catalog.digest(id)))
                .map(|a| entry(a.name(), Node::LayoutBlobsOf(id, a)))
                .collect(),
        })
    }

    /// The layers in their order; one that stands several times, as empty ones do, at its first place.
    fn layers(&self, layers: &[Descriptor]) -> Entries {
        let catalog = &self.snapshot.catalog;
        let width = layers.len().to_string().len().max(2);
        let name = |at: usize, layer: &Descriptor| {
            let media_type = catalog.name(layer.media_type);
            let extension = extension(media_type.to_str().unwrap_or(""));
            format!("{at:0width$}-{}.{extension}", catalog.digest(layer.digest).short())
        };
        let mut said = IdSet::default();
        let stored = layers.iter().enumerate().map(|(at, l)| (at, l, catalog.stored_as(l.digest)));
        let shown = stored.filter(|(_, _, id)| catalog.has_blob(*id) && said.insert(*id));
        shown.map(|(at, l, id)| entry(name(at, l), Node::Blob(id))).collect()
    }

    /// What an index names, each once.
    ///
    /// An image is a symlink to its directory, from where no symlink leads on. An index is a file that says where it is, and
    /// so is what comes after [`MANY_PLATFORMS`]: who follows symlinks must not meet a circle, nor the same blobs ever again.
    fn platforms(&self, index: &Parsed) -> Entries {
        let catalog = &self.snapshot.catalog;
        let (mut said, mut taken, mut images) = (IdSet::default(), HashSet::new(), 0);
        let mut entries = Entries::new();
        for (child, platform) in index.platforms().filter(|(child, _)| said.insert(child.digest)) {
            let name = platform.map(|p| catalog.name(p));
            let name = name.map_or_else(|| "unknown".to_string(), |n| file_name(&n.to_string_lossy()));
            let name = match taken.insert(name.clone()) {
                true => name,
                false => format!("{name}-{}", catalog.digest(child.digest).hex()),
            };
            let is_image = catalog.parsed(child.digest).is_none_or(|m| m.children().is_empty());
            images += usize::from(is_image);
            entries.push(match is_image && images <= MANY_PLATFORMS {
                true => entry(name, Node::Sibling(child.digest)),
                false => entry(name, Node::Pointer(child.digest)),
            });
        }
        entries
    }

    /// Files that say where what is about a manifest is: it may have referrers itself, and leads back by `subject`.
    fn referrers(&self, id: DigestId) -> Entries {
        let catalog = &self.snapshot.catalog;
        let referrers = self.snapshot.uses().referrers.get(&id).into_iter().flatten();
        let name = |id: DigestId| {
            let artifact_type = catalog.parsed(id).and_then(|m| m.artifact_type()).map(|t| catalog.name(t));
            let artifact_type =
                artifact_type.map_or_else(|| "manifest".to_string(), |t| file_name(&t.to_string_lossy()));
            format!("{artifact_type}-{}", catalog.digest(id).short())
        };
        referrers.map(|id| entry(name(*id), Node::Pointer(*id))).collect()
    }

    pub(super) fn shards(
        &self,
        algorithm: Algorithm,
        shown: &dyn Fn(DigestId) -> bool,
        node: fn(u8, Algorithm) -> Node,
    ) -> Entries {
        let mut shards: Vec<u8> = Vec::new();
        for id in self.snapshot.catalog.blobs.iter().copied() {
            let digest = self.snapshot.catalog.digest(id);
            let Some(first) = digest.as_bytes().first().copied() else { continue };
            // Blobs stand in the order of their digests.
            if digest.algorithm() == algorithm && shards.last() != Some(&first) && shown(id) {
                shards.push(first);
            }
        }
        shards.into_iter().map(|shard| entry(format!("{shard:02x}"), node(shard, algorithm))).collect()
    }

    /// Blobs of a shard whose bytes are there: what a sweep took leaves its directory behind.
    fn blobs(&self, shard: u8, algorithm: Algorithm) -> Result<Entries> {
        let mut entries = Entries::new();
        for id in self.snapshot.catalog.blobs_in(algorithm, shard) {
            let digest = self.snapshot.catalog.digest(id);
            match self.store.stat(&layout::blob_data(&digest)) {
                Ok(None) => {}
                Ok(Some(_)) => entries.push(entry(digest.hex(), Node::Blob(id))),
                Err(e) if e.is_damage() => log::debug!("not shown: {e}"),
                Err(e) => return Err(e),
            }
        }
        Ok(entries)
    }

    fn trashed(&self, path: &Path) -> Result<Entries> {
        let node = |name: &OsStr| Node::Trashed(self.snapshot.name_id(&path.join(name)));
        if path.as_os_str().is_empty() {
            let ids = trash::ids(self.store)?;
            return Ok(ids
                .into_iter()
                .map(|id| {
                    let n = node(OsStr::new(&id));
                    entry(id, n)
                })
                .collect());
        }
        let entries = self.store.list(&Path::new(layout::TRASH).join(path))?.unwrap_or_default();
        let shown =
            entries.into_iter().filter(|e| matches!(e.kind, store::Kind::File | store::Kind::Directory));
        Ok(shown
            .map(|e| {
                let n = node(&e.name);
                (e.name, n)
            })
            .collect())
    }

    /// What a node is; `None` for paths in the trash that are gone.
    pub fn type_of(&self, node: Node) -> Result<Option<Type>> {
        Ok(match node {
            Node::Trashed(path) => match self.snapshot.plain_path(path) {
                Some(path) => self.type_in_trash(&path)?,
                None => None,
            },
            Node::Tag(..)
            | Node::TagReference(..)
            | Node::DigestReference(..)
            | Node::Sibling(_)
            | Node::Keeper(_)
            | Node::KeeperRevision(..)
            | Node::UntaggedManifest(..) => Some(Type::Symlink),
            Node::Readme
            | Node::Upload(..)
            | Node::OciLayout
            | Node::LayoutIndex(_)
            | Node::References(_)
            | Node::Pointer(_)
            | Node::Blob(_)
            | Node::Garbage(_)
            | Node::Summary
            | Node::States
            | Node::Usage
            | Node::MissingBlob(_)
            | Node::BrokenFile(_)
            | Node::WhyText(_)
            | Node::ControlGc
            | Node::ControlTrash
            | Node::ControlRefresh
            | Node::ControlStop
            | Node::ControlStatus
            | Node::ControlLog => Some(Type::File),
            _ => Some(Type::Directory),
        })
    }

    fn type_in_trash(&self, path: &Path) -> Result<Option<Type>> {
        let place = Path::new(layout::TRASH).join(path);
        if self.store.list(&place).is_ok_and(|entries| entries.is_some()) {
            return Ok(Some(Type::Directory));
        }
        Ok(self.store.stat(&place)?.map(|_| Type::File))
    }
}

/// The algorithms of some digests, each once.
fn algorithms(digests: impl Iterator<Item = Digest>) -> impl Iterator<Item = Algorithm> {
    let mut found: Vec<Algorithm> = Vec::new();
    for digest in digests {
        if !found.contains(&digest.algorithm()) {
            found.push(digest.algorithm());
        }
    }
    found.into_iter()
}

/// A path as one component: no repository name holds a `+`.
pub(super) fn flat(path: &Path) -> String {
    String::from_utf8_lossy(path.as_os_str().as_bytes()).replace('/', "+")
}

/// A text as a file name; with the longest digest behind it, it is not too long either.
pub(super) fn file_name(text: &str) -> String {
    match text {
        // As names these mean directories.
        "." | ".." => text.replace('.', "_"),
        _ => {
            let fitting = text.char_indices().take_while(|(at, c)| at + c.len_utf8() <= 180);
            fitting.map(|(_, c)| if c == '/' || is_unsafe(c) { '_' } else { c }).collect()
        }
    }
}

/// What programs expect a layer's file name to end in.
fn extension(media_type: &str) -> &'static str {
    match media_type {
        "" => "tar.gz",
        t if t.ends_with("tar+gzip") || t.ends_with("tar.gzip") => "tar.gz",
        t if t.ends_with("tar+zstd") || t.ends_with("tar.zstd") => "tar.zst",
        t if t.ends_with("tar") => "tar",
        t if t.ends_with("json") => "json",
        _ => "bin",
    }
}
