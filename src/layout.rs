//! Names ⇄ paths of the storage layout; the only place that spells `_manifests`, `link`, `data`.
//!
//! Every path is relative to the registry directory, `<rootdirectory>/docker/registry/v2`:
//! ```text
//! blobs/<alg>/<2 hex>/<hex>/data
//! repositories/<name>/_layers/<alg>/<hex>/link
//! repositories/<name>/_manifests/revisions/<alg>/<hex>/link
//! repositories/<name>/_manifests/tags/<tag>/{current/link,index/<alg>/<hex>/link}
//! repositories/<name>/_uploads/<uuid>/{startedat,data,hashstates/…}
//! .regfs/{lock,reserve/…,registries.json,trash/<transaction>/…,cache/manifests}          ours
//! ```
//! Pure: no I/O, nothing can fail but parsing. Source: distribution `registry/storage/paths.go`.

use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};

use crate::digest::{Algorithm, Digest, ParseDigestError};

/// Where the registry directory lies below the storage root.
pub const REGISTRY_DIR: &str = "docker/registry/v2";
/// All blobs.
pub const BLOBS: &str = "blobs";
/// All repositories.
pub const REPOSITORIES: &str = "repositories";
/// Manifests and tags of a repository.
pub const MANIFESTS: &str = "_manifests";
/// Layer links of a repository.
pub const LAYERS: &str = "_layers";
/// Pushes in progress of a repository.
pub const UPLOADS: &str = "_uploads";
/// Revisions, below `_manifests`.
pub const REVISIONS: &str = "revisions";
/// Tags, below `_manifests`.
pub const TAGS: &str = "tags";
/// Our own directory, a sibling of `blobs`, where no registry looks.
pub const OWN: &str = ".regfs";
/// File in [`OWN`] that is locked by whoever changes the store.
pub const LOCK: &str = ".regfs/lock";
/// The parse cache.
pub const CACHE: &str = ".regfs/cache";
/// A file in [`OWN`] that is being written, before it moves to its place.
pub const NEW_FILE: &str = ".regfs/new.tmp";
/// A directory in [`OWN`] that comes and goes, to find out whether the kernel tells.
pub const PROBE: &str = ".regfs/probe";
/// Transactions.
pub const TRASH: &str = ".regfs/trash";
/// What was last seen of the registries that serve the storage.
pub const REGISTRIES: &str = ".regfs/registries.json";
/// Since when which blobs are dead.
pub const DEAD: &str = ".regfs/dead";
/// What regfs has seen of the time.
pub const CLOCK: &str = ".regfs/clock";
/// How far a sweep beside a running registry has come, inside its transaction.
pub const STAGE_FILE: &str = "stage.json";
/// The description of a transaction, inside it.
pub const TRANSACTION_FILE: &str = "txn.json";

/// Longest name of a repository in bytes that any registry serves: 255, and as long a first part that looks like a host,
/// which registries from 3.0 on do not count.
pub const LONGEST_NAME: usize = 255 + 1 + 255;
/// Longest path in bytes, below a repository's part or a transaction, that is looked at: no registry makes one as
/// long, and with what stands before it the kernel still takes it (`PATH_MAX`).
pub const LONGEST_PATH: usize = 1024;

/// Longest link in bytes that is worth reading: `sha512:` and 128 digits, and some more to show what is wrong.
pub const LINK_LIMIT: usize = 4096;

const LINK: &str = "link";
const DATA: &str = "data";
const CURRENT: &str = "current";

/// The storage root of a registry directory that is below it.
pub fn storage_root(registry: &Path) -> &Path {
    let depth = Path::new(REGISTRY_DIR).components().count();
    registry.ancestors().nth(depth).unwrap_or(registry)
}

/// Directory of the blobs whose hex begins with `prefix`: `blobs/sha256/ab`.
pub fn blob_shard(algorithm: Algorithm, prefix: &str) -> PathBuf {
    Path::new(BLOBS).join(algorithm.name()).join(prefix)
}

/// Directory of one blob: `blobs/sha256/ab/ab…`.
pub fn blob_dir(digest: &Digest) -> PathBuf {
    let hex = digest.hex();
    blob_shard(digest.algorithm(), &hex[..2]).join(hex)
}

/// Bytes of one blob: `blobs/sha256/ab/ab…/data`.
pub fn blob_data(digest: &Digest) -> PathBuf {
    blob_dir(digest).join(DATA)
}

/// Bytes of one blob, within the directory of [`blob_shard`]: `<hex>/data`.
pub fn blob_data_in_shard(digest: &Digest) -> String {
    let mut name = String::with_capacity(140);
    digest.push_hex(&mut name);
    name.push('/');
    name.push_str(DATA);
    name
}

/// The link within the directory of a digest or of a tag's `current`: `<name>/link`.
pub fn link_in(directory: &OsStr) -> PathBuf {
    let mut name = std::ffi::OsString::with_capacity(directory.len() + 16);
    name.push(directory);
    name.push("/");
    name.push(LINK);
    name.into()
}

/// A tag's link within the directory of [`tags`]: `<tag>/current/link`.
pub fn tag_link_in(tag: &OsStr) -> PathBuf {
    let mut name = std::ffi::OsString::with_capacity(tag.len() + 16);
    name.push(tag);
    name.push("/");
    name.push(CURRENT);
    name.push("/");
    name.push(LINK);
    name.into()
}

/// Directory of a repository (or of a namespace): `repositories/library/alpine`.
pub fn repository(name: &Path) -> PathBuf {
    Path::new(REPOSITORIES).join(name)
}

/// The repository that a path belongs to; `None` for what is in none.
pub fn repository_of(path: &Path) -> Option<PathBuf> {
    let inside = path.strip_prefix(REPOSITORIES).ok()?;
    let is_part = |part: &OsStr| [MANIFESTS, LAYERS, UPLOADS].iter().any(|name| part == *name);
    let name: PathBuf = inside.iter().take_while(|part| !is_part(part)).collect();
    (name != inside).then_some(name)
}

/// `…/_manifests/revisions/sha256/<hex>/link`.
pub fn revision_link(repository: &Path, digest: &Digest) -> PathBuf {
    revisions(repository).join(digest.algorithm().name()).join(digest.hex()).join(LINK)
}

/// `…/_manifests/revisions`.
pub fn revisions(repository: &Path) -> PathBuf {
    self::repository(repository).join(MANIFESTS).join(REVISIONS)
}

/// `…/_layers/sha256/<hex>/link`.
pub fn layer_link(repository: &Path, digest: &Digest) -> PathBuf {
    layers(repository).join(digest.algorithm().name()).join(digest.hex()).join(LINK)
}

/// `…/_layers`.
pub fn layers(repository: &Path) -> PathBuf {
    self::repository(repository).join(LAYERS)
}

/// `…/_manifests/tags`.
pub fn tags(repository: &Path) -> PathBuf {
    self::repository(repository).join(MANIFESTS).join(TAGS)
}

/// `…/_manifests/tags/<tag>`, which the registry lists.
pub fn tag_dir(repository: &Path, tag: &OsStr) -> PathBuf {
    tags(repository).join(tag)
}

/// `…/_manifests/tags/<tag>/current/link`, which the registry serves.
pub fn tag_link(repository: &Path, tag: &OsStr) -> PathBuf {
    tag_dir(repository, tag).join(CURRENT).join(LINK)
}

/// `…/_manifests/tags/<tag>/index/<alg>/<hex>/link`: the tag has pointed at `digest` at some time.
pub fn tag_history_link(repository: &Path, tag: &OsStr, digest: &Digest) -> PathBuf {
    tag_dir(repository, tag).join("index").join(digest.algorithm().name()).join(digest.hex()).join(LINK)
}

/// `…/_manifests/tags/<tag>/index`: by algorithm and digest what the tag has pointed at.
pub fn tag_history(repository: &Path, tag: &OsStr) -> PathBuf {
    tag_dir(repository, tag).join("index")
}

/// `…/_uploads`.
pub fn uploads(repository: &Path) -> PathBuf {
    self::repository(repository).join(UPLOADS)
}

/// `…/_uploads/<uuid>`.
pub fn upload_dir(repository: &Path, upload: &OsStr) -> PathBuf {
    uploads(repository).join(upload)
}

/// `…/_uploads/<uuid>/data`: the bytes received so far.
pub fn upload_data(repository: &Path, upload: &OsStr) -> PathBuf {
    upload_dir(repository, upload).join(DATA)
}

/// `…/_uploads/<uuid>/startedat`: RFC 3339, UTC.
pub fn upload_started_at(repository: &Path, upload: &OsStr) -> PathBuf {
    upload_dir(repository, upload).join("startedat")
}

/// `…/_uploads/<uuid>/hashstates/<alg>/<offset>`: the hash of what was received up to `offset`, to go on from.
pub fn upload_hash_state(repository: &Path, upload: &OsStr, algorithm: Algorithm, offset: u64) -> PathBuf {
    upload_dir(repository, upload).join("hashstates").join(algorithm.name()).join(offset.to_string())
}

/// Whether a file of an upload, by its path below the upload's directory, is one that a registry writes.
pub fn is_of_upload(inside: &Path) -> bool {
    match inside.components().next() {
        Some(Component::Normal(first)) => {
            [DATA, "startedat", "hashstates"].iter().any(|own| first == *own) || is_unfinished(first)
        }
        _ => false,
    }
}

/// Signatures of an old schema 1 manifest: `…/revisions/<alg>/<hex>/signatures/<alg>`.
pub fn signatures(repository: &Path, digest: &Digest, algorithm: Algorithm) -> PathBuf {
    revisions(repository)
        .join(digest.algorithm().name())
        .join(digest.hex())
        .join("signatures")
        .join(algorithm.name())
}

/// `.regfs/trash/<id>`.
pub fn transaction(id: &str) -> PathBuf {
    Path::new(TRASH).join(id)
}

/// Whether `path` is regfs's own, and not something that was taken from a registry.
pub fn is_own(path: &Path) -> bool {
    let taken = path.strip_prefix(TRASH).ok().and_then(|inside| inside.components().nth(1));
    path.starts_with(OWN)
        && !taken.is_some_and(|first| [BLOBS, REPOSITORIES].iter().any(|part| first.as_os_str() == *part))
}

/// Whether a directory is one of a link or a blob: its name is the hexadecimal part of a digest.
pub fn is_leaf(directory: &Path) -> bool {
    let is_hex = |name: &OsStr| name.len() >= 64 && name.as_encoded_bytes().iter().all(u8::is_ascii_hexdigit);
    directory.file_name().is_some_and(is_hex)
}

/// Whether a path is that of a link file.
pub fn is_link(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == LINK)
}

/// Whether a file in the directory of a link or a blob is what a writer that crashed has left:
/// `link.<uuid>.tmp`, `data.<uuid>.tmp`. Registries from 3.1 on write such and rename them.
pub fn is_unfinished(name: &OsStr) -> bool {
    let is_uuid = |text: &str| {
        let lengths = text.split('-').map(str::len);
        lengths.eq([8, 4, 4, 4, 12]) && text.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit())
    };
    let parts =
        name.to_str().and_then(|name| name.strip_suffix(".tmp")).and_then(|name| name.split_once('.'));
    parts.is_some_and(|(stem, uuid)| matches!(stem, LINK | DATA | "startedat") && is_uuid(uuid))
}

/// Parses the content of a link file: exactly one digest, nothing else.
pub fn parse_link(text: &[u8]) -> Result<Digest, ParseDigestError> {
    std::str::from_utf8(text).map_err(|_| ParseDigestError)?.parse()
}

/// What a path of the registry directory is, as far as trash and undo must know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `blobs/<alg>/<2 hex>/<hex>/data`.
    Blob(Digest),
    /// `repositories/<name>/_layers/<alg>/<hex>/link`.
    LayerLink(PathBuf, Digest),
    /// `repositories/<name>/_manifests/revisions/<alg>/<hex>/link`.
    Revision(PathBuf, Digest),
    /// `repositories/<name>/_manifests/tags/<tag>`, the directory.
    Tag(PathBuf, std::ffi::OsString),
    /// Anything else.
    Other,
}

/// Tells what `path` is; the inverse of the functions above.
pub fn classify(path: &Path) -> Kind {
    let parts: Vec<&OsStr> = path
        .components()
        .filter_map(|c| match c {
            Component::Normal(part) => Some(part),
            _ => None,
        })
        .collect();
    let digest = |algorithm: &OsStr, hex: &OsStr| {
        Digest::from_parts(algorithm.to_str().unwrap_or(""), hex.to_str().unwrap_or(""))
    };
    let kind = match parts.as_slice() {
        [blobs, algorithm, _, hex, data] if *blobs == BLOBS && *data == DATA => {
            digest(algorithm, hex).map(Kind::Blob)
        }
        [repositories, name @ .., layers, algorithm, hex, link]
            if *repositories == REPOSITORIES && *layers == LAYERS && *link == LINK =>
        {
            digest(algorithm, hex).map(|d| Kind::LayerLink(name.iter().collect(), d))
        }
        [repositories, name @ .., manifests, revisions, algorithm, hex, link]
            if *repositories == REPOSITORIES
                && *manifests == MANIFESTS
                && *revisions == REVISIONS
                && *link == LINK =>
        {
            digest(algorithm, hex).map(|d| Kind::Revision(name.iter().collect(), d))
        }
        [repositories, name @ .., manifests, tags, tag]
            if *repositories == REPOSITORIES && *manifests == MANIFESTS && *tags == TAGS =>
        {
            Some(Kind::Tag(name.iter().collect(), tag.to_os_string()))
        }
        _ => None,
    };
    kind.unwrap_or(Kind::Other)
}

/// The repository and the manifest whose revision link is written or read when `path` is opened: registries from 3.1 on
/// write `link.<uuid>.tmp` and rename that.
pub fn opened_revision(path: &Path) -> Option<(PathBuf, Digest)> {
    let name = path.file_name()?;
    let path = if is_unfinished(name) { path.with_file_name(LINK) } else { path.to_path_buf() };
    match classify(&path) {
        Kind::Revision(repository, digest) => Some((repository, digest)),
        _ => None,
    }
}

/// The digest of the layer link whose directory this is: `repositories/<name>/_layers/<alg>/<hex>`.
pub fn link_below(directory: &Path) -> Option<Digest> {
    match classify(&directory.join(LINK)) {
        Kind::LayerLink(_, digest) => Some(digest),
        _ => None,
    }
}

/// Whether all of `name` may be the name of a repository, or the start of one.
pub fn is_name(name: &Path) -> bool {
    name.components().all(|c| is_name_component(c.as_os_str()))
}

/// Whether `component` may stand between the slashes of a repository name:
/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`.
pub fn is_name_component(component: &OsStr) -> bool {
    let bytes = component.as_encoded_bytes();
    let ends = [bytes.first(), bytes.last()];
    bytes.len() <= 255
        && ends.into_iter().all(|end| end.is_some_and(|b| is_plain(*b)))
        && separators(bytes).all(|s| matches!(s, b"." | b"_" | b"__") || s.iter().all(|b| *b == b'-'))
}

/// The runs of bytes that are neither letters nor digits.
fn separators(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.chunk_by(|a, b| is_plain(*a) == is_plain(*b)).filter(|run| !is_plain(run[0]))
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

/// Whether `name` is a tag: `[A-Za-z0-9_][A-Za-z0-9._-]{0,127}`.
pub fn is_tag(name: &OsStr) -> bool {
    let bytes = name.as_encoded_bytes();
    let word = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_';
    bytes.len() <= 128
        && bytes.first().is_some_and(word)
        && bytes.iter().all(|b| word(b) || matches!(b, b'.' | b'-'))
}

/// The manifest that a fallback referrers tag or a cosign tag is about.
///
/// `sha256-<hex>` (OCI distribution 1.1 referrers fallback), and cosign's `sha256-<hex>.sig`, `.att`, `.sbom`.
pub fn subject_of_tag(tag: &str) -> Option<Digest> {
    let (algorithm, rest) = tag.split_once('-')?;
    let hex = match rest.split_once('.') {
        None => rest,
        Some((hex, "sig" | "att" | "sbom")) => hex,
        Some(_) => return None,
    };
    Digest::from_parts(algorithm, hex)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repository_components_follow_the_grammar() {
        for good in ["a", "alpine", "a1", "a.b", "a_b", "a__b", "a-b", "a---b", "0"] {
            assert!(is_name_component(OsStr::new(good)), "{good}");
        }
        for bad in ["", "_a", "a_", ".a", "a..b", "a___b", "a._b", "A", "a b", "ä", "a-", "_layers", "a-_b"]
        {
            assert!(!is_name_component(OsStr::new(bad)), "{bad}");
        }
    }

    #[test]
    fn tags_follow_the_grammar() {
        let longest = "a".repeat(128);
        for good in ["1", "3.8", "_x", "A-b_c.d", &longest] {
            assert!(is_tag(OsStr::new(good)), "{good}");
        }
        let too_long = "a".repeat(129);
        for bad in ["", ".a", "-a", "a/b", "a:b", "ä", &too_long] {
            assert!(!is_tag(OsStr::new(bad)), "{bad}");
        }
    }

    #[test]
    fn classify_is_the_inverse_of_the_path_functions() {
        let digest = Digest::of(Algorithm::Sha256, b"x");
        let name = Path::new("library/alpine");
        let cases = [
            (blob_data(&digest), Kind::Blob(digest)),
            (layer_link(name, &digest), Kind::LayerLink(name.into(), digest)),
            (revision_link(name, &digest), Kind::Revision(name.into(), digest)),
            (tag_dir(name, OsStr::new("3.8")), Kind::Tag(name.into(), "3.8".into())),
            (tag_link(name, OsStr::new("3.8")), Kind::Other),
            (blob_dir(&digest), Kind::Other),
            (upload_dir(name, OsStr::new("u")), Kind::Other),
        ];
        for (path, kind) in cases {
            assert_eq!(classify(&path), kind, "{path:?}");
        }
    }

    #[test]
    fn only_what_a_registry_writes_is_unfinished() {
        let uuid = "0b4e8a4e-5d1f-4b7a-9d39-0d5a3f1c2b6e";
        for name in ["link", "data", "startedat"] {
            assert!(is_unfinished(OsStr::new(&format!("{name}.{uuid}.tmp"))), "{name}");
        }
        let foreign = [
            "link".to_string(),
            "link.tmp".into(),
            format!("other.{uuid}.tmp"),
            format!("link.{uuid}"),
            format!("link.{}.tmp", &uuid[1..]),
        ];
        for name in foreign {
            assert!(!is_unfinished(OsStr::new(&name)), "{name}");
        }
    }

    #[test]
    fn referrer_tags_name_their_subject() {
        let digest = Digest::of(Algorithm::Sha256, b"x");
        let hex = digest.hex();
        for suffix in ["", ".sig", ".att", ".sbom"] {
            assert_eq!(subject_of_tag(&format!("sha256-{hex}{suffix}")), Some(digest));
        }
        for other in [format!("sha256-{hex}.txt"), format!("sha256-{}", &hex[1..]), "3.8-x".into()] {
            assert_eq!(subject_of_tag(&other), None, "{other}");
        }
    }
}
