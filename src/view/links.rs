//! Where symlinks lead, and which tags the text of a new one may mean.
//!
//! Targets are relative to where the symlink stands, so they hold wherever the mount is.

use std::ffi::{OsStr, OsString};
use std::path::{Component, Path, PathBuf};

use super::View;
use super::node::Node;
use super::tree::{REVISIONS, TAGS, parse_reference};
use crate::catalog::intern::{DigestId, NameId};
use crate::digest::Digest;
use crate::layout;

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

/// An image that the text of a symlink may mean: a tag, a manifest of a repository, or a tag as long as it leads there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Named {
    /// The repository.
    pub repository: PathBuf,
    /// Its tag.
    pub tag: Option<OsString>,
    /// Its manifest.
    pub digest: Option<Digest>,
}

/// What the text of a symlink in `directory` may mean, the likeliest first: read as a path from there, as one that goes
/// through the `images` of a mount, as an image reference.
pub fn images_named(text: &Path, directory: &Path) -> Vec<Named> {
    let names: Vec<&OsStr> = text.iter().collect();
    let mut inside: Vec<PathBuf> = Vec::new();
    if text.is_relative() {
        inside.extend(
            resolved(&directory.join(text)).and_then(|p| Some(p.strip_prefix("images").ok()?.into())),
        );
    }
    let through = names.iter().enumerate().filter(|(_, name)| **name == "images");
    inside.extend(through.map(|(at, _)| names[at + 1..].iter().collect()));
    if text.is_relative() {
        inside.push(text.to_path_buf());
    }
    let mut named: Vec<Named> = Vec::new();
    for image in inside.iter().filter_map(|path| image_at(path)) {
        if layout::is_name(&image.repository) && !named.contains(&image) {
            named.push(image);
        }
    }
    named
}

/// The image at a path below `images`.
fn image_at(inside: &Path) -> Option<Named> {
    let name = inside.file_name()?;
    let above = inside.parent()?;
    if above.file_name() == Some(OsStr::new(TAGS)) && layout::is_tag(name) {
        let repository = above.parent()?.to_path_buf();
        return Some(Named { repository, tag: Some(name.to_os_string()), digest: None });
    }
    let reference = parse_reference(name).filter(|reference| !reference.repository.is_empty())?;
    let repository = above.join(reference.repository);
    Some(Named { repository, tag: reference.tag.map(OsString::from), digest: reference.digest })
}

/// The path without `.` and `..`; `None` where it leads out of the mount.
fn resolved(path: &Path) -> Option<PathBuf> {
    let mut resolved = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => resolved.push(name),
            Component::ParentDir => resolved.pop().then_some(())?,
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(resolved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_of_a_symlink_is_a_path_or_a_reference() {
        let hex = "5".repeat(64);
        for (text, directory, expected) in [
            ("1.6", "images/app/_tags", "app:1.6"),
            ("./1.6", "images/app/_tags", "app:1.6"),
            ("../_tags/1.6", "images/app/_tags", "app:1.6"),
            ("../../lib/x/_tags/1", "images/app/_tags", "lib/x:1"),
            ("../../lib/x:1", "images/app/_tags", "lib/x:1"),
            ("app:1.6", "images/app/_tags", "app:1.6"),
            ("lib/x:1", "images/app/_tags", "lib/x:1"),
            ("x:1", "images/lib", "lib/x:1"),
            ("x/_tags/1", "images/lib", "lib/x:1"),
            ("images/lib/x/_tags/1", "images/app/_tags", "lib/x:1"),
            ("/mnt/r/images/lib/x/_tags/1", "images/app/_tags", "lib/x:1"),
            ("/mnt/r/images/lib/x:1", "images/app/_tags", "lib/x:1"),
            ("/srv/images/r/images/x:1", "images/app/_tags", "r/images/x:1 x:1"),
            ("app@sha256:5", "images/app/_tags", "app@sha256:5"),
            ("app:1@sha256:5", "images/app/_tags", "app:1@sha256:5"),
            ("../../../../etc/passwd", "images/app/_tags", ""),
            ("/etc/passwd", "images/app/_tags", ""),
            ("..", "images/app/_tags", ""),
            ("plain", "images/lib", ""),
        ] {
            let text = text.replace("sha256:5", &format!("sha256:{hex}"));
            let named = images_named(Path::new(&text), Path::new(directory));
            let shown = named.iter().map(|named| {
                let tag = named.tag.iter().map(|tag| format!(":{}", tag.to_str().unwrap()));
                let digest = named.digest.iter().map(|_| "@sha256:5".to_string());
                named.repository.to_str().unwrap().to_string() + &tag.chain(digest).collect::<String>()
            });
            let shown: Vec<String> = shown.collect();
            assert!(shown.join(" ").starts_with(expected), "{text}: {shown:?}");
            assert_eq!(shown.is_empty(), expected.is_empty(), "{text}: {shown:?}");
        }
    }
}
