//! An independent reader of the storage: what is live, and is it still there, bytes and all?
//!
//! Follows a registry's way of serving: tag link → revision link → manifest → children, layer link → blob.
//! Shares no code with regfs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256, Sha512};

/// `sha256:<hex>` of `content`.
pub(crate) fn sha256(content: &[u8]) -> String {
    format!("sha256:{}", to_hex(&Sha256::digest(content)))
}

/// `sha512:<hex>` of `content`.
pub(crate) fn sha512(content: &[u8]) -> String {
    format!("sha512:{}", to_hex(&Sha512::digest(content)))
}

fn to_hex(hash: &[u8]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The part after the colon.
pub(crate) fn hex(digest: &str) -> &str {
    digest.split_once(':').expect("a digest has a colon").1
}

/// `sha256:<hex>` → `sha256/<hex>`.
fn slashed(digest: &str) -> String {
    digest.replace(':', "/")
}

/// Where the marking starts.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Roots {
    /// Tags, and the referrers of what they reach.
    Tags,
    /// Every revision link.
    Revisions,
}

/// Everything that live images need, as it is now.
pub(crate) struct Live {
    registry: PathBuf,
    /// Path relative to the registry directory → digest of the bytes.
    files: BTreeMap<PathBuf, String>,
    /// Digests of all live blobs that are in the store, manifests included.
    pub(crate) blobs: BTreeSet<String>,
    /// What a live image needs and the store does not have, or not with the right bytes; a line each.
    pub(crate) problems: Vec<String>,
    /// Manifests visited, per repository.
    visited: BTreeSet<(PathBuf, String)>,
}

impl Live {
    /// Reads the registry whose `rootdirectory` is `store`.
    pub(crate) fn of(store: &Path, roots: Roots) -> Live {
        let registry = registry_dir(store);
        let mut live = Live {
            registry: registry.clone(),
            files: BTreeMap::new(),
            blobs: BTreeSet::new(),
            problems: Vec::new(),
            visited: BTreeSet::new(),
        };
        for repository in repositories(&registry) {
            live.mark_repository(&repository, roots);
        }
        live
    }

    /// What a pull of anything in `repository` needs.
    pub(crate) fn of_repository(store: &Path, repository: &str) -> Live {
        let mut live = Live::of(&store.join("nothing here"), Roots::Tags);
        live.registry = registry_dir(store);
        live.mark_repository(Path::new(repository), Roots::Tags);
        live
    }

    /// Asserts that whatever was live is there with the same bytes.
    #[track_caller]
    pub(crate) fn assert_intact(&self) {
        let lost = self.lost();
        assert!(lost.is_empty(), "live data lost:\n  {}", lost.join("\n  "));
    }

    /// What was live and is not there with the same bytes, a line each.
    pub(crate) fn lost(&self) -> Vec<String> {
        let lost = |(path, digest): (&PathBuf, &String)| match fs::read(self.registry.join(path)) {
            Ok(content) if sha256(&content) == *digest => None,
            Ok(_) => Some(format!("{} has other bytes now", path.display())),
            Err(why) => Some(format!("{}: {why}", path.display())),
        };
        self.files.iter().filter_map(lost).collect()
    }

    /// Asserts that nothing live lacks anything.
    #[track_caller]
    pub(crate) fn assert_complete(&self) {
        assert!(self.problems.is_empty(), "incomplete images:\n  {}", self.problems.join("\n  "));
    }

    fn mark_repository(&mut self, repository: &Path, roots: Roots) {
        let manifests = Path::new("repositories").join(repository).join("_manifests");
        for tag in directories(&self.registry.join(&manifests).join("tags")) {
            let link = manifests.join("tags").join(tag).join("current/link");
            if let Some(digest) = self.link(&link) {
                self.manifest(repository, &digest);
            }
        }
        let mut known = Vec::new();
        for algorithm in directories(&self.registry.join(&manifests).join("revisions")) {
            for hex in directories(&self.registry.join(&manifests).join("revisions").join(&algorithm)) {
                let digest = format!("{}:{}", algorithm.display(), hex.display());
                // An empty directory is what a deleted revision leaves behind.
                if self
                    .registry
                    .join(&manifests)
                    .join("revisions")
                    .join(slashed(&digest))
                    .join("link")
                    .exists()
                {
                    known.push(digest);
                }
            }
        }
        // A referrer that becomes live may itself have referrers.
        loop {
            let before = self.visited.len();
            for digest in &known {
                if roots == Roots::Revisions || self.has_live_subject(repository, digest) {
                    self.manifest(repository, digest);
                }
            }
            if self.visited.len() == before {
                break;
            }
        }
    }

    fn has_live_subject(&self, repository: &Path, digest: &str) -> bool {
        let path = self.registry.join(blob_path(digest));
        let manifest: Option<Value> = fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let subject = manifest.as_ref().and_then(|manifest| manifest["subject"]["digest"].as_str());
        subject.is_some_and(|subject| self.visited.contains(&(repository.to_path_buf(), subject.to_string())))
    }

    fn manifest(&mut self, repository: &Path, digest: &str) {
        if !self.visited.insert((repository.to_path_buf(), digest.to_string())) {
            return;
        }
        let link = Path::new("repositories").join(repository).join("_manifests/revisions");
        let target =
            self.link(&link.join(slashed(digest)).join("link")).unwrap_or_else(|| digest.to_string());
        let Some(content) = self.blob(&target, digest) else { return };
        let Ok(manifest) = serde_json::from_slice::<Value>(&content) else {
            self.problems.push(format!("manifest {digest} of {} is no JSON", repository.display()));
            return;
        };
        let list = |field: &str, inner: &str| -> Vec<String> {
            let items = manifest[field].as_array().into_iter().flatten();
            items.filter_map(|item| item[inner].as_str()).map(String::from).collect()
        };
        for child in list("manifests", "digest") {
            self.manifest(repository, &child);
        }
        let mut blobs =
            [list("layers", "digest"), list("blobs", "digest"), list("fsLayers", "blobSum")].concat();
        blobs.extend(manifest["config"]["digest"].as_str().map(String::from));
        if ["manifests", "layers", "config", "blobs", "fsLayers"]
            .iter()
            .all(|field| manifest[field].is_null())
        {
            digests_anywhere(&manifest, &mut blobs);
        }
        for blob in blobs {
            let link =
                Path::new("repositories").join(repository).join("_layers").join(slashed(&blob)).join("link");
            let target = self.link(&link).unwrap_or_else(|| blob.clone());
            self.blob(&target, &blob);
        }
    }

    /// Reads a blob that is stored under `stored` and must hash to `wanted`; it counts as live.
    fn blob(&mut self, stored: &str, wanted: &str) -> Option<Vec<u8>> {
        let path = blob_path(stored);
        match fs::read(self.registry.join(&path)) {
            Ok(content) => {
                let actual = if wanted.starts_with("sha512:") { sha512(&content) } else { sha256(&content) };
                if actual != wanted {
                    self.problems.push(format!("{} hashes to {actual}, not {wanted}", path.display()));
                }
                self.files.insert(path, sha256(&content));
                self.blobs.insert(stored.to_string());
                (actual == wanted).then_some(content)
            }
            Err(why) => {
                self.problems.push(format!("{}: {why}", path.display()));
                None
            }
        }
    }

    /// Reads a link file; it counts as live.
    fn link(&mut self, path: &Path) -> Option<String> {
        match fs::read(self.registry.join(path)) {
            Ok(content) => {
                self.files.insert(path.to_path_buf(), sha256(&content));
                let text = String::from_utf8_lossy(&content).into_owned();
                let valid = text.split_once(':').is_some_and(|(algorithm, hex)| {
                    let length = if algorithm == "sha512" { 128 } else { 64 };
                    hex.len() == length && hex.bytes().all(|byte| byte.is_ascii_hexdigit())
                });
                if !valid {
                    self.problems.push(format!("{} holds {text:?}", path.display()));
                }
                valid.then_some(text)
            }
            Err(why) => {
                self.problems.push(format!("{}: {why}", path.display()));
                None
            }
        }
    }
}

/// All digests in a manifest of a kind nobody knows.
fn digests_anywhere(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::String(text) if text.starts_with("sha256:") => found.push(text.clone()),
        Value::Array(items) => items.iter().for_each(|item| digests_anywhere(item, found)),
        Value::Object(fields) => fields.values().for_each(|field| digests_anywhere(field, found)),
        _ => {}
    }
}

/// Where the registry directory is below the `rootdirectory`.
pub(crate) fn registry_dir(store: &Path) -> PathBuf {
    store.join("docker/registry/v2")
}

/// `blobs/sha256/ab/ab…/data`, relative to the registry directory.
pub(crate) fn blob_path(digest: &str) -> PathBuf {
    let (algorithm, hex) = digest.split_once(':').expect("a digest has a colon");
    Path::new("blobs").join(algorithm).join(hex.get(..2).unwrap_or("")).join(hex).join("data")
}

/// Digests of all blobs that have bytes in the store.
pub(crate) fn blobs(store: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let all = registry_dir(store).join("blobs/sha256");
    for shard in directories(&all) {
        for hex in directories(&all.join(&shard)) {
            if all.join(&shard).join(&hex).join("data").is_file() {
                found.insert(format!("sha256:{}", hex.display()));
            }
        }
    }
    found
}

/// Names of all repositories: directories with `_manifests`, relative to `repositories`.
fn repositories(registry: &Path) -> Vec<PathBuf> {
    let base = registry.join("repositories");
    let mut found = Vec::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(name) = todo.pop() {
        for child in directories(&base.join(&name)) {
            if child == Path::new("_manifests") {
                found.push(name.clone());
            } else if !child.to_string_lossy().starts_with('_') {
                todo.push(name.join(child));
            }
        }
    }
    found.sort();
    found
}

/// Names of the directories in a directory; symlinks are none.
fn directories(dir: &Path) -> Vec<PathBuf> {
    let is_dir = |path: &PathBuf| fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    super::entries(dir).into_iter().filter(is_dir).map(|path| path.file_name().unwrap().into()).collect()
}
