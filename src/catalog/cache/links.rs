//! Where tags and revisions point, kept between processes with the facts of their link files.
//!
//! A scan compares: a link whose size, times and inode are the same as then, and which had been at rest when it was read,
//! is not read again. That costs one call instead of three, and is what a scan does with the catalog before, too; see
//! rule 6 of [`crate::catalog::scan`].

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::{DigestList, Digests, NEWS};
use crate::catalog::{Catalog, Repository, Revision, Tag};
use crate::store::Version;

pub(super) const MAGIC: &[u8] = b"regfs links 1\n";
pub(super) const FILE: &str = "links";
/// From so many links on a block is full: about 300 KiB.
const BLOCK: usize = 4096;

/// Links of some repositories. Numbers count the digests of the block.
#[derive(Serialize, Deserialize)]
struct Block<'a> {
    /// When the scan began, in nanoseconds since 1970.
    scanned_at: u64,
    #[serde(borrow)]
    digests: DigestList<'a>,
    #[serde(borrow)]
    repositories: Vec<Links<'a>>,
}

#[derive(Serialize, Deserialize)]
struct Links<'a> {
    repository: &'a [u8],
    /// Name, target.
    #[serde(borrow)]
    tags: Vec<(&'a [u8], u32, Version)>,
    /// Digests; each points at itself.
    revisions: Vec<(u32, Version)>,
}

/// Takes in a block.
pub(super) fn read(block: &[u8], links: &mut Catalog) -> Result<(), String> {
    let block: Block<'_> = postcard::from_bytes(block).map_err(|e| e.to_string())?;
    let wrong = || "a block holds numbers out of range".to_string();
    let tables = &links.tables;
    let digests = block.digests.intern(tables).ok_or_else(wrong)?;
    let digest = |number: u32| digests.get(number as usize).copied().ok_or_else(wrong);
    for of in block.repositories {
        let mut repository =
            Repository { name: PathBuf::from(OsStr::from_bytes(of.repository)), ..Repository::default() };
        for (name, target, version) in of.tags {
            let name = tables.names.intern(OsStr::from_bytes(name));
            repository.tags.push(Tag { name, target: Some(digest(target)?), version });
        }
        for (digest_of, version) in of.revisions {
            let digest = digest(digest_of)?;
            repository.revisions.push(Revision { digest, target: digest, version, is_readable: true });
        }
        repository.tags.sort_unstable_by_key(|tag| tag.name);
        repository.revisions.sort_unstable_by_key(|revision| revision.digest);
        links.repositories.insert(repository.name.clone(), Arc::new(repository));
    }
    links.scanned_at = SystemTime::UNIX_EPOCH + Duration::from_nanos(block.scanned_at);
    Ok(())
}

/// What can be kept of a repository: what was read and is in order.
fn kept(repository: &Repository) -> (impl Iterator<Item = &Tag>, impl Iterator<Item = &Revision>) {
    let is_known = |version: &Version| *version != Version::UNKNOWN;
    let tags = repository.tags.iter().filter(move |tag| tag.target.is_some() && is_known(&tag.version));
    let revisions = repository
        .revisions
        .iter()
        .filter(move |r| r.is_readable && r.target == r.digest && is_known(&r.version));
    (tags, revisions)
}

/// Whether many links are not as they were, or not there any more.
pub(super) fn is_news(found: &Catalog, known: &Catalog) -> bool {
    let (mut same, mut new) = (0, 0);
    for (name, repository) in &found.repositories {
        let before = known.repositories.get(name);
        let (tags, revisions) = kept(repository);
        let tags = tags.map(|tag| before.is_some_and(|b| b.tag(tag.name) == Some(tag)));
        let revisions = revisions.map(|r| before.is_some_and(|b| b.revision(r.digest) == Some(r)));
        for is_same in tags.chain(revisions) {
            *(if is_same { &mut same } else { &mut new }) += 1;
        }
    }
    let before: usize = known.repositories.values().map(|r| r.tags.len() + r.revisions.len()).sum();
    // A scan that does not look at times knows nothing to keep.
    new + same > 0 && (new + before.saturating_sub(same)) * NEWS > before
}

/// Makes the blocks.
pub(super) fn blocks(catalog: &Catalog, each: &mut dyn FnMut(Vec<u8>) -> io::Result<()>) -> io::Result<()> {
    let mut waiting: Vec<&Repository> = Vec::new();
    let mut links = 0;
    for repository in catalog.repositories.values() {
        waiting.push(repository);
        links += repository.tags.len() + repository.revisions.len();
        if links >= BLOCK {
            each(block(catalog, &waiting).map_err(io::Error::other)?)?;
            waiting.clear();
            links = 0;
        }
    }
    each(block(catalog, &waiting).map_err(io::Error::other)?)
}

fn block(catalog: &Catalog, repositories: &[&Repository]) -> postcard::Result<Vec<u8>> {
    let occurring = repositories.iter().flat_map(|repository| {
        let (tags, revisions) = kept(repository);
        tags.filter_map(|tag| tag.target).chain(revisions.map(|r| r.digest))
    });
    let mut digests = Digests::of(occurring, &catalog.tables);
    let names: Vec<Vec<Arc<OsStr>>> =
        repositories.iter().map(|r| kept(r).0.map(|tag| catalog.name(tag.name)).collect()).collect();
    let mut all = Vec::with_capacity(repositories.len());
    for (repository, names) in repositories.iter().zip(&names) {
        let (tags, revisions) = kept(repository);
        let mut number = |id| digests.numbers.number(id);
        let tags = tags
            .zip(names)
            .filter_map(|(tag, name)| Some((name.as_bytes(), number(tag.target?), tag.version)));
        let tags = tags.collect();
        let revisions = revisions.map(|r| (number(r.digest), r.version)).collect();
        all.push(Links { repository: repository.name.as_os_str().as_bytes(), tags, revisions });
    }
    let since_epoch = catalog.scanned_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    postcard::to_allocvec(&Block {
        scanned_at: u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX),
        digests: digests.list(),
        repositories: all,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::catalog::Tables;
    use crate::catalog::cache::{News, Place, load, save};
    use crate::catalog::scan::scan;
    use crate::digest::{Algorithm, Digest};
    use crate::layout;
    use crate::store::Store;
    use crate::store::memory::Memory;

    const LINKS: News = News { manifests: false, links: true };

    fn digest(text: &str) -> Digest {
        Digest::of(Algorithm::Sha256, text.as_bytes())
    }

    fn tag_to(store: &Memory, target: &Digest) {
        let link = layout::tag_link(Path::new("a/b"), OsStr::new("1"));
        store.write(&link, target.to_string().as_bytes()).unwrap();
    }

    /// One tag, and as many revisions.
    fn store() -> Memory {
        let store = Memory::default();
        for text in ["{}", "[]"] {
            store.write(&layout::blob_data(&digest(text)), text.as_bytes()).unwrap();
            let link = layout::revision_link(Path::new("a/b"), &digest(text));
            store.write(&link, digest(text).to_string().as_bytes()).unwrap();
        }
        tag_to(&store, &digest("{}"));
        store
    }

    /// A catalog that was made long after the last change.
    fn at_rest(store: &Memory) -> Catalog {
        let mut catalog = scan(store, &Tables::default(), None);
        catalog.scanned_at += Duration::from_secs(60);
        catalog
    }

    fn target(catalog: &Catalog) -> Digest {
        let repository = catalog.repository(Path::new("a/b")).unwrap();
        catalog.digest(repository.tags[0].target.unwrap())
    }

    #[test]
    fn a_link_is_read_again_unless_it_is_as_it_was() {
        let store = store();
        let first = at_rest(&store);
        save(&store, &Place::Store, &first, LINKS).unwrap();
        let links = load(&store, &Place::Store, &Tables::default()).1;
        let known_as = |of: &Catalog| {
            let repository = of.repository(Path::new("a/b")).unwrap();
            (repository.tags.len(), repository.revisions.len(), target(of))
        };
        assert_eq!(known_as(&links), (1, 2, digest("{}")));
        assert!(!is_news(&scan(&store, &links.tables, Some(&links)), &links));

        // That it was not read shows in a catalog that remembers something else.
        let mut forged = links.clone();
        let mut repository = (**forged.repository(Path::new("a/b")).unwrap()).clone();
        repository.tags[0].target = Some(forged.tables.digests.intern(&digest("[]")));
        forged.repositories.insert("a/b".into(), Arc::new(repository));
        assert_eq!(target(&scan(&store, &forged.tables, Some(&forged))), digest("[]"));
        let mut restless = forged.clone();
        restless.scanned_at = SystemTime::now();
        assert_eq!(target(&scan(&store, &restless.tables, Some(&restless))), digest("{}"));
        tag_to(&store, &digest("{}"));
        assert_eq!(target(&scan(&store, &forged.tables, Some(&forged))), digest("{}"));
    }

    #[test]
    fn a_revision_that_points_elsewhere_is_never_kept() {
        let store = store();
        let link = layout::revision_link(Path::new("a/b"), &digest("[]"));
        store.write(&link, digest("{}").to_string().as_bytes()).unwrap();
        let first = at_rest(&store);
        let says_so = |catalog: &Catalog| catalog.problems.iter().any(|p| p.path == link);
        assert!(says_so(&first));
        save(&store, &Place::Store, &first, LINKS).unwrap();
        let links = load(&store, &Place::Store, &Tables::default()).1;
        assert_eq!(links.repository(Path::new("a/b")).unwrap().revisions.len(), 1);
        assert!(says_so(&scan(&store, &links.tables, Some(&links))));
        assert!(says_so(&scan(&store, &first.tables, Some(&first))), "nor is it taken over from a scan");
    }

    #[test]
    fn a_damaged_cache_is_never_believed() {
        let store = store();
        let first = at_rest(&store);
        let directory = tempfile::tempdir().unwrap();
        let place = Place::Directory(directory.path().to_path_buf());
        save(&store, &place, &first, LINKS).unwrap();
        let path = directory.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        let is_empty = || load(&store, &place, &Tables::default()).1.repositories.is_empty();
        assert!(!is_empty());
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, &damaged).unwrap();
            assert!(is_empty(), "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert!(is_empty(), "cut at {at}");
        }
    }
}
