//! A registry's storage written straight to disk, as a push would leave it, without a registry.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::check::{blob_path, registry_dir, sha256};
use super::image::{Image, layer};
use super::scratch;

/// A storage root that removes itself.
pub(crate) struct Store {
    dir: TempDir,
}

impl Store {
    /// An empty registry.
    pub(crate) fn new() -> Store {
        Store::of(scratch())
    }

    /// An empty registry in `dir`.
    pub(crate) fn of(dir: TempDir) -> Store {
        let store = Store { dir };
        for part in ["blobs", "repositories"] {
            fs::create_dir_all(registry_dir(store.root()).join(part)).unwrap();
        }
        store
    }

    /// The `rootdirectory`.
    pub(crate) fn root(&self) -> &Path {
        self.dir.path()
    }

    /// A path below the registry directory.
    pub(crate) fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        registry_dir(self.root()).join(relative)
    }

    /// A repository, or a path below it.
    pub(crate) fn repository(&self, name: &str, relative: &str) -> PathBuf {
        let path = self.path("repositories").join(name);
        if relative.is_empty() { path } else { path.join(relative) }
    }

    /// `…/_manifests/tags/<tag>/current/link`.
    pub(crate) fn tag_link(&self, name: &str, tag: &str) -> PathBuf {
        self.repository(name, &format!("_manifests/tags/{tag}/current/link"))
    }

    /// `…/_manifests/revisions/sha256/<hex>/link`.
    pub(crate) fn revision_link(&self, name: &str, digest: &str) -> PathBuf {
        self.repository(name, &format!("_manifests/revisions/{}/link", digest.replace(':', "/")))
    }

    /// `…/_layers/sha256/<hex>/link`.
    pub(crate) fn layer_link(&self, name: &str, digest: &str) -> PathBuf {
        self.repository(name, &format!("_layers/{}/link", digest.replace(':', "/")))
    }

    /// `…/data` of a blob.
    pub(crate) fn blob(&self, digest: &str) -> PathBuf {
        self.path(blob_path(digest))
    }

    /// A store with an image, an untagged one, and garbage.
    pub(crate) fn with_garbage() -> Store {
        let store = Store::new();
        store.push("app", Some("1"), &Image::oci("app", &[layer("a", "1")]));
        store.push("app", None, &Image::oci("untagged", &[layer("b", "1")]));
        store.put_blob(b"garbage");
        store
    }

    /// Stores bytes under their digest.
    pub(crate) fn put_blob(&self, content: &[u8]) -> String {
        let digest = sha256(content);
        put(&self.blob(&digest), content);
        digest
    }

    /// Stores all of an image in a repository: blobs, layer links, revision links; then the tag, if any.
    pub(crate) fn push(&self, name: &str, tag: Option<&str>, image: &Image) -> String {
        for blob in &image.blobs {
            let digest = self.put_blob(blob);
            put(&self.layer_link(name, &digest), digest.as_bytes());
        }
        for child in &image.children {
            self.push(name, None, child);
        }
        let digest = self.put_blob(&image.manifest);
        // A repository always has both, also when it holds nothing but an index.
        fs::create_dir_all(self.repository(name, "_layers")).unwrap();
        put(&self.revision_link(name, &digest), digest.as_bytes());
        if let Some(tag) = tag {
            self.tag(name, tag, &digest);
        }
        digest
    }

    /// Points a tag at a digest.
    pub(crate) fn tag(&self, name: &str, tag: &str, digest: &str) {
        let history = format!("_manifests/tags/{tag}/index/{}/link", digest.replace(':', "/"));
        put(&self.repository(name, &history), digest.as_bytes());
        put(&self.tag_link(name, tag), digest.as_bytes());
    }

    /// What the registry's DELETE of a manifest does: its link, then every tag that points at it.
    pub(crate) fn delete(&self, name: &str, digest: &str) {
        fs::remove_file(self.revision_link(name, digest)).unwrap();
        for tag in super::entries(&self.repository(name, "_manifests/tags")) {
            if fs::read(tag.join("current/link")).is_ok_and(|text| text == digest.as_bytes()) {
                fs::remove_dir_all(tag).unwrap();
            }
        }
    }
}

/// Writes a file and the directories above it.
pub(crate) fn put(path: &Path, content: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}
