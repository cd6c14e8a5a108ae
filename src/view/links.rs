//! Where symlinks lead.
//!
//! Targets are relative to where the symlink stands, so they hold wherever the mount is.

use std::path::{Path, PathBuf};

use super::View;
use super::node::Node;
use super::tree::REVISIONS;
use crate::catalog::intern::{DigestId, NameId};

impl View<'_> {
    /// Where a symlink leads, relative to where it stands.
    pub fn target(&self, node: Node) -> Option<PathBuf> {
        let catalog = &self.snapshot.catalog;
        let up = |levels: usize| -> PathBuf { std::iter::repeat_n("..", levels).collect() };
        let depth =
            |repository: NameId| self.snapshot.path(repository).map_or(0, |name| name.components().count());
        let manifest = |id: DigestId| {
            let digest = catalog.tables.digests.checked(id)?;
            Some(Path::new("manifests").join(digest.algorithm().name()).join(digest.hex()))
        };
        match node {
            Node::Tag(tag, repository) => {
                Some(up(depth(repository) + 2).join(self.tag_target(repository, tag)?))
            }
            Node::TagReference(tag, repository) => {
                Some(up(depth(repository)).join(self.tag_target(repository, tag)?))
            }
            Node::DigestReference(id, repository) => Some(up(depth(repository)).join(manifest(id)?)),
            // All manifests are stored under sha256, so it stands in the same directory two levels up.
            Node::Sibling(id) => Some(up(2).join(catalog.tables.digests.checked(id)?.hex())),
            Node::Keeper(id) => Some(up(5).join(manifest(id)?)),
            Node::KeeperRevision(id, repository) => {
                let digest = catalog.tables.digests.checked(id)?;
                let name = self.snapshot.path(repository)?;
                let place = up(5).join("images").join(name);
                Some(match self.repository(repository)?.revision(id) {
                    Some(_) => place.join(REVISIONS).join(digest.algorithm().name()).join(digest.hex()),
                    None => place,
                })
            }
            Node::UntaggedManifest(id, repository) => Some(up(depth(repository) + 1).join(manifest(id)?)),
            _ => None,
        }
    }

    /// What a tag leads to, from the root of the mount; nowhere for one that can't be served.
    fn tag_target(&self, repository: NameId, tag: NameId) -> Option<PathBuf> {
        let repository = self.repository(repository)?;
        let tag = repository.tag(tag)?;
        Some(match tag.target {
            Some(id) => {
                let digest = self.snapshot.catalog.digest(id);
                // The name tells the digest even where nothing stands under it.
                let place =
                    if repository.is_served(tag) { "manifests" } else { "manifests/not-in-this-repository" };
                Path::new(place).join(digest.algorithm().name()).join(digest.hex())
            }
            None => PathBuf::from("reachability/broken/this-tag-can-not-be-read"),
        })
    }
}
