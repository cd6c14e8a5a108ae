//! What `stat` says of a node.

use std::ffi::OsStr;
use std::path::Path;
use std::time::SystemTime;

use super::View;
use super::node::{Node, Type};
use crate::catalog::intern::{DigestId, NameId};
use crate::edit;
use crate::error::Result;
use crate::layout;
use crate::trash;

/// What `stat` says, apart from the inode number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attributes {
    /// What it is.
    pub node_type: Type,
    /// Bytes.
    pub size: u64,
    /// Blocks of 512 bytes that it takes on the disk: what is made up takes none.
    pub blocks: u64,
    /// When it was written; of a tag and of a manifest, when it was last pushed; of a directory in the trash, when what is
    /// in it was removed; in `reachability/unreachable`, from when on a sweep takes the next step.
    pub modified: SystemTime,
    /// Permissions.
    pub mode: u16,
    /// Names it has. For a blob: one, and one for each reference to it.
    pub links: u32,
}

impl View<'_> {
    /// What `stat` says; `None` when the node is gone. Sizes of made-up files come from `size_of`.
    pub fn attributes(&self, node: Node, size_of: &dyn Fn(Node) -> u64) -> Result<Option<Attributes>> {
        let Some(node_type) = self.type_of(node)? else { return Ok(None) };
        let plain = Attributes {
            node_type,
            size: 0,
            blocks: 0,
            modified: self.settings.mounted_at,
            mode: 0o444,
            links: 1,
        };
        Ok(match node {
            Node::Blob(id) => self.blob(id, plain)?,
            Node::Garbage(id) => {
                let modified = self.moves_on(id);
                self.blob(id, plain)?
                    .map(|blob| Attributes { modified: modified.unwrap_or(blob.modified), ..blob })
            }
            Node::Trashed(path) => self.trashed_attributes(path, plain)?,
            Node::Upload(upload, repository) => self.upload(repository, upload, plain)?,
            Node::Tag(tag, repository) | Node::TagReference(tag, repository) => {
                let found = self.repository(repository).and_then(|r| r.tag(tag));
                let Some(found) = found else { return Ok(None) };
                let modified = found.version.modified();
                Some(Attributes { modified, ..self.symlink(node, plain) })
            }
            _ if node_type == Type::Symlink => Some(self.symlink(node, plain)),
            _ if node_type == Type::Directory => self.directory(node, plain)?,
            // Only the one who mounts gives commands; where others are let in, they may see what goes on.
            Node::ControlGc
            | Node::ControlTrash
            | Node::ControlRefresh
            | Node::ControlStop
            | Node::ControlStatus
            | Node::ControlLog => {
                let mode = match node {
                    Node::ControlStatus | Node::ControlLog => 0o444,
                    _ if self.settings.read_only => 0o400,
                    _ => 0o600,
                };
                Some(Attributes { mode, size: size_of(node), modified: SystemTime::now(), ..plain })
            }
            // As in /proc: it takes a pass over all manifests to write it, too much for every `stat` of a `find`.
            Node::WhyText(_) | Node::States => Some(plain),
            _ => Some(Attributes { size: size_of(node), ..plain }),
        })
    }

    fn symlink(&self, node: Node, plain: Attributes) -> Attributes {
        let size = self.target(node).map_or(0, |t| t.as_os_str().len() as u64);
        Attributes { size, mode: 0o777, ..plain }
    }

    fn blob(&self, id: DigestId, plain: Attributes) -> Result<Option<Attributes>> {
        let Some(digest) = self.snapshot.catalog.tables.digests.checked(id) else { return Ok(None) };
        // A single link says "garbage", which nobody can say while something can't be judged.
        let least = if self.snapshot.is_judged() { 1 } else { 2 };
        let links = self.snapshot.mark().references(id).saturating_add(1).max(least);
        if let Some(attributes) = self.manifest_blob(id, links, plain) {
            return Ok(Some(attributes));
        }
        let stat = match self.store.stat(&layout::blob_data(&digest)) {
            Ok(stat) => stat,
            // Shown as an empty file, so that a revision whose bytes are hidden can be removed.
            Err(e) if e.is_damage() => None,
            Err(e) => return Err(e),
        };
        let Some(stat) = stat else {
            let is_revision = self.snapshot.uses().revisions.contains_key(&id);
            return Ok(is_revision.then_some(Attributes {
                modified: SystemTime::UNIX_EPOCH,
                links,
                ..plain
            }));
        };
        let modified = stat.modified;
        Ok(Some(Attributes { size: stat.size, blocks: stat.blocks, modified, links, ..plain }))
    }

    /// A manifest that a repository has: what is known of it spares a look at the disk for each of many thousands. Its
    /// time is that of its last push.
    fn manifest_blob(&self, id: DigestId, links: u32, plain: Attributes) -> Option<Attributes> {
        let parsed = self.snapshot.catalog.parsed(id).filter(|_| self.snapshot.catalog.has_blob(id))?;
        let modified = self.snapshot.pushed_at(id)?;
        let size = u64::from(parsed.size);
        // Filesystems give out space by 4 KiB.
        Some(Attributes { size, blocks: size.div_ceil(4096) * 8, modified, links, ..plain })
    }

    fn trashed_attributes(&self, path: NameId, plain: Attributes) -> Result<Option<Attributes>> {
        let Some(path) = self.snapshot.plain_path(path) else { return Ok(None) };
        if plain.node_type == Type::Directory {
            let removed_at = path.iter().next().and_then(|id| self.removed_at(id)).unwrap_or(plain.modified);
            return Ok(Some(Attributes { mode: 0o555, links: 2, modified: removed_at, ..plain }));
        }
        let stat = self.store.stat(&Path::new(layout::TRASH).join(path))?;
        Ok(stat.map(|s| Attributes { size: s.size, blocks: s.blocks, modified: s.modified, ..plain }))
    }

    /// When a transaction began: what its name says, or the time of its description.
    fn removed_at(&self, id: &OsStr) -> Option<SystemTime> {
        let named = id.to_str().and_then(trash::began_at);
        named.or_else(|| {
            let file = Path::new(layout::TRASH).join(id).join(layout::TRANSACTION_FILE);
            // Without either, the directory has the time of everything that has none.
            Some(self.store.stat(&file).ok()??.modified)
        })
    }

    fn upload(&self, repository: NameId, upload: NameId, plain: Attributes) -> Result<Option<Attributes>> {
        let (Some(repository), Some(upload)) = (self.snapshot.path(repository), self.snapshot.name(upload))
        else {
            return Ok(None);
        };
        if self.store.list(&layout::upload_dir(&repository, &upload))?.is_none() {
            return Ok(None);
        }
        let started = edit::upload_started(self.store, &repository, &upload)?;
        let stat = self.store.stat(&layout::upload_data(&repository, &upload))?;
        Ok(Some(Attributes {
            size: stat.map_or(0, |s| s.size),
            blocks: stat.map_or(0, |s| s.blocks),
            modified: started.unwrap_or(SystemTime::UNIX_EPOCH),
            ..plain
        }))
    }

    fn directory(&self, node: Node, plain: Attributes) -> Result<Option<Attributes>> {
        let removable = matches!(
            node,
            Node::Images
                | Node::Namespace(_)
                | Node::Tags(_)
                | Node::Revisions(_)
                | Node::RevisionsOf(..)
                | Node::Uploads(_)
        );
        let mode = match node {
            _ if removable && !self.settings.read_only => 0o755,
            _ => 0o555,
        };
        let repository = match node {
            Node::Namespace(path) | Node::Tags(path) | Node::Revisions(path) | Node::Uploads(path) => {
                let Some(path) = self.snapshot.path(path) else { return Ok(None) };
                if self.snapshot.directory(&path).is_none() {
                    return Ok(None);
                }
                self.snapshot.repository(&path)
            }
            _ => None,
        };
        let pushes = repository.into_iter().flat_map(|r| {
            let tags = r.tags.iter().map(|t| t.version);
            tags.chain(r.revisions.iter().map(|r| r.version)).map(|v| v.modified())
        });
        let changed = self.snapshot.changed_at(node);
        let modified = pushes.chain(changed).max().unwrap_or(plain.modified);
        Ok(Some(Attributes { mode, modified, links: 2, ..plain }))
    }
}
