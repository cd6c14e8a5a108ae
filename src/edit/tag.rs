//! What `ln -s` and `mv` mean: which links a repository lacks to serve a manifest, and writing them, a tag last.
//!
//! A tag in a repository that has the manifest is two links. In another one (a promotion) the repository first gets
//! what a push of the image would write, like a cross-repository mount: a layer link for each config and layer, a
//! revision link for each manifest. No bytes are copied.
//!
//! # Rules kept here
//! 1. The order is that of a push: layer links, revisions (children before the index that names them), the history of
//!    the tag, its link; with a sync between. Whatever fails and whenever the process dies, no tag leads to something
//!    that isn't served. What may be left is what a push that broke off leaves: links too many, which a sweep takes, or
//!    a tag without its link.
//! 2. What is written stays, also when the rest fails: a push may rely on a link by then.
//! 3. Blobs are looked for in the store, not in the catalog, and manifests are read from it: the catalog may be a second
//!    old, and doesn't know manifests that nothing names any more.
//! 4. Nothing is replaced but the link of a tag that another one is moved onto, in one step: the name leads to the old
//!    manifest or to the new one, never nowhere. The old link goes to the trash. Its manifest stays, as after a push.
//!
//! # Sparse indexes
//! A registry serves an index whatever became of its children, and images are pushed with some platforms left out. So a
//! child that isn't there is passed over, unless none of them is. "There" means in the store; in a repository that has
//! the index already, it means in the repository: what was deleted from it by intention doesn't come back. A child that
//! is there must be whole.
//!
//! # Beside a collection
//! The caller holds the lock of the store, and so does a collection from its first look to its last move or purge.
//! What an earlier one took, rule 3 doesn't find, and nothing is written. A later one finds the new revisions, and
//! whatever a revision leads to is reachable, of whatever age. A dry run has no lock and only looks.
//!
//! # Beside a registry
//! It remembers what is there, never what is not, so it serves the links at once. It knows no lock: its DELETE removes
//! a revision, then the tags that it finds. A tag that came too late to be found is taken back ([`Error::Changed`]).

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use super::{Removal, removal_of_tag, take};
use crate::catalog::{Catalog, Repository, Tag};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layout;
use crate::manifest::{self, is_foreign_layer, is_manifest_type};
use crate::printable::Printable;
use crate::store::Store;
use crate::trash::{self, Transaction};

/// How deep indexes may nest; nobody nests more than two, and a stack has an end.
const DEEPEST: usize = 32;

/// The manifest that the text of a symlink names: it ends in `sha256/<hex>`, whatever stands before that.
pub fn named_by(text: &Path) -> Result<Digest> {
    let mut names = text.components().rev().map(|c| c.as_os_str().to_str());
    let digest = match (names.next().flatten(), names.next().flatten()) {
        (Some(hex), Some("sha256")) => Digest::from_parts("sha256", hex),
        _ => None,
    };
    digest.ok_or_else(|| {
        Error::invalid(format!(
            "{:?} names no image: a tag is a symlink to another tag, to an image reference (app:1.6) or to a path that ends \
             in sha256/<64 hex digits>",
            text.printable().to_string()
        ))
    })
}

/// A link to write: where, and the digest that it holds.
type Link = (PathBuf, Digest);

/// What a repository lacks so that it serves a manifest.
#[derive(Debug, PartialEq, Eq)]
pub struct Claim {
    repository: PathBuf,
    layers: Vec<Link>,
    /// Children before the indexes that name them.
    revisions: Vec<Link>,
}

impl Claim {
    /// Finds out what `repository` lacks so that it serves the manifest `digest`; writes nothing.
    ///
    /// # Errors
    /// [`Error::NotFound`] when the manifest or a blob that it leads to is not in the store.
    ///
    /// # Cost
    /// A `read` for each manifest and each link, a `stat` for each blob.
    pub fn plan(store: &dyn Store, catalog: &Catalog, repository: &Path, digest: &Digest) -> Result<Claim> {
        let has = |r: &&Repository| has_revision(catalog, r, digest);
        let holder = catalog.repository(repository).map(|r| &**r).filter(has);
        Claim::plan_all(store, catalog, holder, repository, [*digest])
    }

    /// The same for many manifests; of the children of indexes only those that `holder` has, if there is one.
    pub fn plan_all(
        store: &dyn Store,
        catalog: &Catalog,
        holder: Option<&Repository>,
        repository: &Path,
        digests: impl IntoIterator<Item = Digest>,
    ) -> Result<Claim> {
        let mut planner = Planner {
            store,
            catalog,
            holder,
            manifests: BTreeSet::new(),
            blobs: BTreeSet::new(),
            claim: Claim { repository: repository.to_path_buf(), layers: Vec::new(), revisions: Vec::new() },
        };
        for digest in digests {
            if !planner.manifest(&digest, 0)? {
                return Err(planner.missing("manifest", &digest));
            }
        }
        Ok(planner.claim)
    }

    /// Writes it.
    pub fn write(&self, store: &dyn Store) -> Result<()> {
        if !self.revisions.is_empty() {
            // An index names no layer. The collector of 2.8.2 frees all blobs of a repository without this directory.
            store.make_directory(&layout::layers(&self.repository))?;
        }
        for links in [&self.layers, &self.revisions] {
            links.iter().try_for_each(|(path, digest)| write_link(store, path, digest))?;
            if !links.is_empty() {
                store.sync()?;
            }
        }
        Ok(())
    }
}

struct Planner<'a> {
    store: &'a dyn Store,
    catalog: &'a Catalog,
    /// The repository that has the manifest already, if it is about that one's children only.
    holder: Option<&'a Repository>,
    /// What was looked at and is there.
    manifests: BTreeSet<Digest>,
    blobs: BTreeSet<Digest>,
    claim: Claim,
}

impl Planner<'_> {
    /// Plans for a manifest and all that it leads to. `false`: its bytes are not in the store.
    fn manifest(&mut self, digest: &Digest, depth: usize) -> Result<bool> {
        if self.manifests.contains(digest) {
            return Ok(true);
        }
        let no_manifest =
            |why: &str| Error::invalid(format!("{digest} is no manifest that a tag can lead to: {why}"));
        let path = layout::blob_data(digest);
        let bytes = match self.store.read(&path, manifest::MAX_SIZE) {
            Ok(Some((bytes, _))) => bytes,
            Ok(None) => return Ok(false),
            Err(e @ Error::TooLarge { .. }) => return Err(no_manifest(&e.to_string())),
            Err(e) => return Err(e),
        };
        if Digest::of(digest.algorithm(), &bytes) != *digest {
            return Err(self.unusable(&path, "it does not match its digest"));
        }
        let manifest = manifest::parse(&bytes).map_err(|e| no_manifest(&e.0))?;
        if let Some(why) = &manifest.odd {
            return Err(no_manifest(why));
        }
        if depth > DEEPEST {
            return Err(no_manifest(&format!("indexes nest deeper than {DEEPEST} levels")));
        }
        self.manifests.insert(*digest);
        for blob in manifest.config.iter().chain(&manifest.layers) {
            // Clients fetch foreign layers elsewhere; a registry takes their manifests without them.
            if !self.blob(&blob.digest)? && !is_foreign_layer(&blob.media_type) {
                return Err(self.missing("blob", &blob.digest));
            }
        }
        let mut absent = Vec::new();
        for child in &manifest.children {
            let is_there = match child.media_type.is_empty() || is_manifest_type(&child.media_type) {
                true => self.child(&child.digest, depth + 1)?,
                false => self.blob(&child.digest)?,
            };
            if !is_there {
                absent.push(child.digest);
            }
        }
        match absent.first() {
            Some(first) if absent.len() == manifest.children.len() => {
                return Err(self.missing("child", first));
            }
            Some(_) => log::info!("{digest} is tagged without its children {absent:?}, which are not there"),
            None => {}
        }
        let link = layout::revision_link(&self.claim.repository, digest);
        if self.is_lacking(&link, digest)? {
            self.claim.revisions.push((link, *digest));
        }
        Ok(true)
    }

    /// The same for a child of an index.
    fn child(&mut self, digest: &Digest, depth: usize) -> Result<bool> {
        match self.holder {
            Some(holder) if !has_revision(self.catalog, holder, digest) => Ok(false),
            _ => self.manifest(digest, depth),
        }
    }

    /// Plans for a config or a layer. `false`: it is not in the store.
    fn blob(&mut self, digest: &Digest) -> Result<bool> {
        if self.blobs.contains(digest) {
            return Ok(true);
        }
        let id = self.catalog.tables.digests.find(digest);
        let stored = id.map_or(*digest, |id| self.catalog.digest(self.catalog.stored_as(id)));
        if self.store.stat(&layout::blob_data(&stored))?.is_none() {
            return Ok(false);
        }
        self.blobs.insert(*digest);
        // One that was pushed under SHA-512 has a link by either digest.
        for name in BTreeSet::from([stored, *digest]) {
            let link = layout::layer_link(&self.claim.repository, &name);
            if self.is_lacking(&link, &stored)? {
                self.claim.layers.push((link, stored));
            }
        }
        Ok(true)
    }

    /// Whether `link` is not there; one that holds anything but `digest` is in the way.
    fn is_lacking(&self, link: &Path, digest: &Digest) -> Result<bool> {
        match self.store.read(link, layout::LINK_LIMIT)? {
            None => Ok(true),
            Some((text, _)) if layout::parse_link(&text).is_ok_and(|found| found == *digest) => Ok(false),
            Some(_) => Err(self.unusable(
                link,
                "it does not hold the digest of its path; if no push is writing it, a sweep with `repair` mends it",
            )),
        }
    }

    fn unusable(&self, path: &Path, why: &str) -> Error {
        Error::io("use", &self.store.full(path), io::Error::new(io::ErrorKind::InvalidData, why))
    }

    fn missing(&self, what: &str, digest: &Digest) -> Error {
        // Only a hint to what is reported; without the trash there is none.
        let transactions = trash::contents(self.store).unwrap_or_default();
        let holder = transactions.iter().find(|t| t.holds(&layout::blob_data(digest)));
        let hint = holder.map_or(String::new(), |t| format!("; it lies in the trash, in {}", t.id));
        Error::NotFound { what: format!("{what} {digest} in the store{hint}") }
    }
}

fn has_revision(catalog: &Catalog, repository: &Repository, digest: &Digest) -> bool {
    let id = catalog.tables.digests.find(digest);
    id.is_some_and(|id| repository.revision(id).is_some_and(|r| r.is_readable && r.target == id))
}

/// Makes a tag that is not there yet, in a repository that then serves the manifest `digest`.
///
/// # Errors
/// [`Error::Exists`] when there is such a tag; those of [`Claim::plan`]; [`Error::Changed`] when the manifest was deleted
/// meanwhile.
pub fn add(
    store: &dyn Store,
    catalog: &Catalog,
    repository: &Path,
    tag: &OsStr,
    digest: &Digest,
) -> Result<()> {
    if find(catalog, repository, tag).is_some() {
        return Err(Error::Exists { path: store.full(&layout::tag_dir(repository, tag)) });
    }
    Claim::plan(store, catalog, repository, digest)?.write(store)?;
    create(store, repository, tag, digest)?;
    confirm(store, repository, tag, digest)?;
    store.sync()
}

/// The tag of that name in a repository.
pub fn find<'a>(catalog: &'a Catalog, repository: &Path, tag: &OsStr) -> Option<&'a Tag> {
    let id = catalog.tables.names.find(tag)?;
    catalog.repository(repository)?.tag(id)
}

/// Moves the tag `tag` of `from` to the name `new` in the repository `to`, in place of one that is there.
///
/// The new name is durable before the old one goes, so a crash leaves both. In another repository this is a promotion,
/// then the removal of the tag from the first. What goes, the transaction made by `begin` gets.
///
/// # Errors
/// [`Error::NotFound`] when the tag leads nowhere; otherwise those of [`add`]. After [`Error::Changed`] and failing calls
/// both names may stand.
pub fn rename(
    store: &dyn Store,
    catalog: &Catalog,
    (from, tag): (&Repository, &Tag),
    (to, new): (&Path, &OsStr),
    begin: &mut dyn FnMut() -> Result<Transaction>,
) -> Result<()> {
    let target = tag.target.filter(|_| from.is_served(tag)).map(|id| catalog.digest(id));
    let digest = target.ok_or_else(|| {
        let (name, tag) = (from.name.printable(), catalog.name(tag.name));
        Error::NotFound { what: format!("manifest behind the tag {} of {name}", tag.printable()) }
    })?;
    // Within one repository nothing is claimed anew: a tag of something damaged can be renamed like any other.
    let removal = if from.name == to {
        Removal { tags: [tag.name].into(), ..Removal::default() }
    } else {
        Claim::plan(store, catalog, to, &digest)?.write(store)?;
        removal_of_tag(catalog, from, tag)
    };
    let transaction = begin()?;
    let result = point(store, to, new, &digest, &transaction)
        .and_then(|()| store.sync())
        .and_then(|()| take(store, catalog, from, &removal, &transaction).map(drop));
    if result.is_err()
        && let Err(e) = transaction.discard_if_empty(store)
    {
        log::warn!("{e}");
    }
    result
}

/// Makes a tag lead to `digest`; the link that it has moves to `transaction`.
fn point(
    store: &dyn Store,
    repository: &Path,
    tag: &OsStr,
    digest: &Digest,
    transaction: &Transaction,
) -> Result<()> {
    let link = layout::tag_link(repository, tag);
    let Some((text, _)) = store.read(&link, layout::LINK_LIMIT)? else {
        create(store, repository, tag, digest)?;
        return confirm(store, repository, tag, digest);
    };
    if layout::parse_link(&text).is_ok_and(|found| found == *digest) {
        return Ok(());
    }
    write_link(store, &layout::tag_history_link(repository, tag, digest), digest)?;
    store.replace(&link, digest.to_string().as_bytes(), &transaction.path_of(&link))?;
    let confirmed = confirm(store, repository, tag, digest);
    if let Err(Error::Changed { .. }) = confirmed {
        match transaction.put_back(store, &link) {
            // A push has moved it on; that is newer than both.
            Ok(_) | Err(Error::Exists { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    confirmed
}

/// Writes the two links of a tag that is not there.
pub(super) fn create(store: &dyn Store, repository: &Path, tag: &OsStr, digest: &Digest) -> Result<()> {
    let history = layout::tag_history_link(repository, tag, digest);
    let link = layout::tag_link(repository, tag);
    let written =
        write_link(store, &history, digest).and_then(|()| store.create(&link, digest.to_string().as_bytes()));
    match written {
        // A push of the same tag was quicker; all of it is that push's.
        Err(Error::Exists { .. }) | Ok(()) => {}
        // Tidying up after what is reported: registries list a directory without a link as a tag, and can't serve it.
        Err(_) => {
            let tidied = store.remove(&[history]).into_iter().next().map_or(Ok(()), Err);
            if let Err(e) = tidied.and_then(|()| store.prune(&layout::tag_dir(repository, tag))) {
                log::warn!("{e}");
            }
        }
    }
    written
}

/// Takes back the tag that was just written if its manifest was deleted meanwhile.
pub(super) fn confirm(store: &dyn Store, repository: &Path, tag: &OsStr, digest: &Digest) -> Result<()> {
    if store.stat(&layout::revision_link(repository, digest))?.is_some() {
        return Ok(());
    }
    let link = layout::tag_link(repository, tag);
    let text = store.read(&link, layout::LINK_LIMIT)?.map(|(text, _)| text);
    // A push may have moved it on.
    if text.is_some_and(|text| text == digest.to_string().as_bytes()) {
        let ours = [link, layout::tag_history_link(repository, tag, digest)];
        store.remove(&ours).into_iter().next().map_or(Ok(()), Err)?;
        store.prune(&layout::tag_dir(repository, tag))?;
    }
    Err(Error::Changed { what: format!("manifest {digest} of {}", repository.printable()) })
}

fn write_link(store: &dyn Store, path: &Path, digest: &Digest) -> Result<()> {
    match store.create(path, digest.to_string().as_bytes()) {
        // A push was quicker and wrote the same.
        Ok(()) | Err(Error::Exists { .. }) => Ok(()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Algorithm;
    use crate::store::memory::Memory;

    #[test]
    fn a_text_names_what_it_ends_in() {
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let digest = format!("sha256:{hex}").parse().unwrap();
        for good in ["sha256/@", "/mnt/manifests/sha256/@/", "../../x y/sha256/@", "manifests/none/sha256/@"]
        {
            assert_eq!(named_by(Path::new(&good.replace('@', hex))).unwrap(), digest, "{good}");
        }
        for bad in
            ["", "@", "sha256:@", "sha256/@0", "sha256/@/manifest.json", "sha512/@", "sha256/../@", "3.8"]
        {
            let refused = named_by(Path::new(&bad.replace('@', hex))).unwrap_err();
            assert_eq!(refused.errno(), libc::EINVAL, "{bad}");
        }
        assert!(named_by(Path::new(&format!("sha256/{}", hex.to_uppercase()))).is_err());
    }

    #[test]
    fn a_tag_whose_manifest_was_deleted_meanwhile_is_taken_back() {
        let (name, tag) = (Path::new("app"), OsStr::new("1"));
        let [ours, theirs] = ["ours", "theirs"].map(|c| Digest::of(Algorithm::Sha256, c.as_bytes()));
        let store = Memory::default();
        create(&store, name, tag, &ours).unwrap();
        assert_eq!(confirm(&store, name, tag, &ours).unwrap_err().errno(), libc::EAGAIN);
        assert!(store.snapshot().is_empty());
        // A push has moved it on by then: that tag is not ours.
        create(&store, name, tag, &theirs).unwrap();
        assert_eq!(confirm(&store, name, tag, &ours).unwrap_err().errno(), libc::EAGAIN);
        assert_eq!(store.snapshot().len(), 2);
        write_link(&store, &layout::revision_link(name, &theirs), &theirs).unwrap();
        confirm(&store, name, tag, &theirs).unwrap();
    }
}
