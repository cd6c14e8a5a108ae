//! Registries in memory, for tests of the core rooms without disk, root or kernel.
//!
//! [`put_image`] writes what a push would, [`Live`] tells with its own eyes what a pull of each tag needs, and
//! [`everything`] what has not been lost. None of them shares code with regfs but for the map they are kept in.
#![allow(dead_code, reason = "each test binary uses its own part of this")]

pub(crate) mod faulty;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use regfs::store::Store;
use regfs::store::memory::Memory;
use serde_json::{Value, json};

use crate::common::check::{blob_path, sha256, sha512};
use crate::common::image::{Image, OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, bytes, descriptor};

/// Every key of a store with its content.
pub(crate) type Contents = BTreeMap<PathBuf, Arc<[u8]>>;

/// Where transactions lie.
pub(crate) const TRASH: &str = ".regfs/trash";

/// A month ago: older than any grace period.
pub(crate) fn long_ago() -> SystemTime {
    SystemTime::now() - Duration::from_secs(30 * 24 * 3600)
}

/// A store in which everything was written long ago.
pub(crate) fn old_store(contents: &Contents) -> Arc<Memory> {
    let store = Memory::default();
    store.set_clock(long_ago());
    contents.iter().for_each(|(path, content)| put(&store, path, content));
    Arc::new(store)
}

/// Writes a file.
pub(crate) fn put(store: &Memory, path: impl AsRef<Path>, content: &[u8]) {
    store.write(path.as_ref(), content).unwrap();
}

/// Stores bytes under their digest.
pub(crate) fn put_blob(store: &Memory, content: &[u8]) -> String {
    let digest = sha256(content);
    put(store, blob_path(&digest), content);
    digest
}

/// Stores an image as a push does; without a tag as a push by digest does.
pub(crate) fn put_image(store: &Memory, name: &str, tag: Option<&str>, image: &Image) -> String {
    for blob in &image.blobs {
        let digest = put_blob(store, blob);
        put(store, layer_link(name, &digest), digest.as_bytes());
    }
    image.children.iter().for_each(|child| drop(put_image(store, name, None, child)));
    let digest = put_blob(store, &image.manifest);
    put(store, revision_link(name, &digest), digest.as_bytes());
    if let Some(tag) = tag {
        put_tag(store, name, tag, &digest);
    }
    digest
}

/// Points a tag at a digest.
pub(crate) fn put_tag(store: &Memory, name: &str, tag: &str, digest: &str) {
    put(store, tag_history_link(name, tag, digest), digest.as_bytes());
    put(store, tag_link(name, tag), digest.as_bytes());
}

/// `…/_layers/<alg>/<hex>/link`.
pub(crate) fn layer_link(name: &str, digest: &str) -> PathBuf {
    format!("repositories/{name}/_layers/{}/link", digest.replace(':', "/")).into()
}

/// `…/_manifests/revisions/<alg>/<hex>/link`.
pub(crate) fn revision_link(name: &str, digest: &str) -> PathBuf {
    format!("repositories/{name}/_manifests/revisions/{}/link", digest.replace(':', "/")).into()
}

/// `…/_manifests/tags/<tag>/current/link`.
pub(crate) fn tag_link(name: &str, tag: &str) -> PathBuf {
    format!("repositories/{name}/_manifests/tags/{tag}/current/link").into()
}

/// `…/_manifests/tags/<tag>/index/<alg>/<hex>/link`.
pub(crate) fn tag_history_link(name: &str, tag: &str, digest: &str) -> PathBuf {
    format!("repositories/{name}/_manifests/tags/{tag}/index/{}/link", digest.replace(':', "/")).into()
}

/// The files of the registry, without those that are regfs's own.
pub(crate) fn registry(contents: &Contents) -> Contents {
    let own = |path: &Path| path.starts_with(".regfs");
    contents.iter().filter(|(path, _)| !own(path)).map(|(path, c)| (path.clone(), c.clone())).collect()
}

/// What lies in each transaction, under the path it came from.
pub(crate) fn trash(contents: &Contents) -> BTreeMap<String, BTreeSet<PathBuf>> {
    let mut found: BTreeMap<String, BTreeSet<PathBuf>> = BTreeMap::new();
    for inside in contents.keys().filter_map(|path| path.strip_prefix(TRASH).ok()) {
        let id = inside.iter().next().unwrap();
        let files = found.entry(id.to_string_lossy().into_owned()).or_default();
        let path = inside.strip_prefix(id).unwrap();
        if path != Path::new("txn.json") {
            files.insert(path.to_path_buf());
        }
    }
    found
}

/// Every file that is in its place or in the trash, with its content: what has not been lost.
pub(crate) fn everything(contents: &Contents) -> BTreeSet<(PathBuf, Arc<[u8]>)> {
    let taken = contents.iter().filter_map(|(path, content)| {
        let inside: PathBuf = path.strip_prefix(TRASH).ok()?.iter().skip(1).collect();
        (inside != Path::new("txn.json")).then(|| (inside, content.clone()))
    });
    registry(contents).into_iter().chain(taken).collect()
}

/// What pulls need.
pub(crate) struct Live {
    /// What is needed and not there, or not with the right bytes; a line each.
    pub(crate) lacks: BTreeSet<String>,
    /// Digests of the blobs that are needed and there.
    pub(crate) blobs: BTreeSet<String>,
}

impl Live {
    /// Follows every tag as a registry would serve it, and every referrer of what it meets on the way.
    pub(crate) fn of(contents: &Contents) -> Live {
        let mut walk = Walk {
            contents,
            live: Live { lacks: BTreeSet::new(), blobs: BTreeSet::new() },
            visited: BTreeSet::new(),
        };
        let mut revisions: BTreeSet<(String, String)> = BTreeSet::new();
        for (path, content) in contents {
            let text = path.to_str().unwrap();
            let Some(text) = text.strip_prefix("repositories/") else { continue };
            if let Some((name, rest)) = text.split_once("/_manifests/tags/")
                && rest.ends_with("/current/link")
            {
                walk.manifest(name, &String::from_utf8_lossy(content));
            } else if let Some((name, rest)) = text.split_once("/_manifests/tags/") {
                let tag = rest.split_once('/').unwrap().0;
                if !contents.contains_key(&tag_link(name, tag)) {
                    walk.lack(format!("tag {name} {tag}"));
                }
            } else if let Some((name, rest)) = text.split_once("/_manifests/revisions/") {
                let digest = rest.trim_end_matches("/link").replace('/', ":");
                revisions.insert((name.to_string(), digest));
            }
        }
        loop {
            let before = walk.visited.len();
            for (name, digest) in &revisions {
                if walk.has_live_subject(name, digest) {
                    walk.manifest(name, digest);
                }
            }
            if walk.visited.len() == before {
                return walk.live;
            }
        }
    }
}

struct Walk<'a> {
    contents: &'a Contents,
    live: Live,
    visited: BTreeSet<(String, String)>,
}

impl Walk<'_> {
    fn lack(&mut self, what: String) {
        self.live.lacks.insert(what);
    }

    fn has_live_subject(&self, name: &str, digest: &str) -> bool {
        let manifest = self.contents.get(&blob_path(digest)).and_then(|c| serde_json::from_slice(c).ok());
        let subject = manifest.as_ref().and_then(|m: &Value| m["subject"]["digest"].as_str());
        subject.is_some_and(|subject| self.visited.contains(&(name.to_string(), subject.to_string())))
    }

    fn manifest(&mut self, name: &str, digest: &str) {
        if !self.visited.insert((name.to_string(), digest.to_string())) {
            return;
        }
        match self.contents.get(&revision_link(name, digest)) {
            Some(link) if **link == *digest.as_bytes() => {}
            Some(_) => self.lack(format!("revision {name} {digest} is another one")),
            None => self.lack(format!("revision {name} {digest}")),
        }
        let Some(content) = self.blob(digest, digest) else {
            self.lack(format!("manifest {name} {digest}"));
            return;
        };
        let manifest: Value = serde_json::from_slice(&content).unwrap();
        let digests = |list: &str| -> Vec<String> {
            let list = manifest[list].as_array().into_iter().flatten();
            list.map(|d| d["digest"].as_str().unwrap().to_string()).collect()
        };
        digests("manifests").iter().for_each(|child| self.manifest(name, child));
        let config = manifest["config"]["digest"].as_str().map(String::from);
        for wanted in config.into_iter().chain(digests("layers")) {
            let link = self.contents.get(&layer_link(name, &wanted)).cloned();
            let content = link.and_then(|link| self.blob(&String::from_utf8_lossy(&link), &wanted));
            if content.is_none() {
                self.lack(format!("layer {name} {wanted}"));
            }
        }
    }

    /// The bytes stored under `stored`, which must hash to `wanted`.
    fn blob(&mut self, stored: &str, wanted: &str) -> Option<Arc<[u8]>> {
        let content = self.contents.get(&blob_path(stored)).cloned()?;
        let actual = if wanted.starts_with("sha512") { sha512(&content) } else { sha256(&content) };
        self.live.blobs.extend((actual == wanted).then(|| stored.to_string()));
        (actual == wanted).then_some(content)
    }
}

/// Digests of all blobs in their places.
pub(crate) fn blobs(contents: &Contents) -> BTreeSet<String> {
    let data = contents.keys().filter(|path| path.starts_with("blobs/sha256"));
    data.map(|path| format!("sha256:{}", path.iter().nth(3).unwrap().to_string_lossy())).collect()
}

/// An image whose layer was pushed, and is named, under its sha512 digest.
pub(crate) fn put_sha512_image(store: &Memory, name: &str, tag: Option<&str>, content: &str) -> String {
    let (config, layer) = (b"{\"sha512\":1}".as_slice(), content.as_bytes());
    let mut named = descriptor(OCI_LAYER, layer);
    named["digest"] = json!(sha512(layer));
    let manifest = bytes(&json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": descriptor(OCI_CONFIG, config), "layers": [named],
    }));
    let image = Image::odd(OCI_MANIFEST, manifest, &[config, layer]);
    put(store, layer_link(name, &sha512(layer)), sha256(layer).as_bytes());
    put_image(store, name, tag, &image)
}
