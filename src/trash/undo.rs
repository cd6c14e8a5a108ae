//! Undo: gives back what a transaction took, and what that names.
//!
//! # Rules kept here
//! 1. Conflicts are found before the first rename. What a manifest names and is nowhere is listed, not refused: it may
//!    never have been here, and an undo gives back what was, damage included.
//! 2. Nothing newer is replaced. Content under the same digest is the same content, so it is no obstacle; a tag is.
//! 3. A manifest comes back with all it names: what a later sweep took is fetched from its transaction.
//! 4. Parts that a sweep took of a tag come back only while there is that tag.
//! 5. Order: blobs, layer links, revisions, tags, with a sync between, so that the registry is valid throughout.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::{Contents, contents, find, order_of_return};
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result, count};
use crate::layout::{self, Kind};
use crate::manifest::{self, MAX_SIZE};
use crate::printable::Printable;
use crate::store::{Store, read_link};

/// What an undo did.
#[derive(Debug, Default)]
pub struct Undone {
    /// Paths that came back.
    pub restored: Vec<PathBuf>,
    /// Paths that were there again already.
    pub present: Vec<PathBuf>,
    /// Parts of tags that are gone by now; they stay in the trash, or there would be a tag that points nowhere.
    pub left: Vec<PathBuf>,
    /// Digests that a manifest or a tag names and that are nowhere; they may never have been here.
    pub missing: Vec<Digest>,
}

impl Undone {
    /// What was done, for people.
    pub fn text(&self, id: &str) -> String {
        let mut text = String::new();
        for digest in &self.missing {
            text += &format!(
                "missing {digest}: a manifest names it, and it is neither in the store nor in the trash\n"
            );
        }
        for path in &self.present {
            text += &format!("present {}: it is there again, and is not replaced\n", path.printable());
        }
        for path in &self.left {
            text += &format!("left {}: its tag is gone\n", path.printable());
        }
        for path in &self.restored {
            text += &format!("restored {}\n", path.printable());
        }
        text + &format!("undid {id}: {} restored\n", count(self.restored.len(), "path"))
    }
}

/// Gives back transaction `id`. The caller holds the lock.
///
/// # Errors
/// [`Error::NotFound`] for an unknown transaction, [`Error::Exists`] where a newer tag stands; nothing was changed then.
pub fn undo(store: &dyn Store, id: &str) -> Result<Undone> {
    let all = contents(store)?;
    let own = find(&all, id)?;
    let mut undone = Undone::default();
    let mut moves: BTreeMap<(u8, PathBuf), &Contents> = BTreeMap::new();
    for unit in own.units() {
        if let Kind::Tag(repository, tag) = layout::classify(unit) {
            let link = layout::tag_link(&repository, &tag);
            let is_there = store.list(unit)?.is_some();
            // A sweep that repairs takes the link alone, of which nobody needs to know what it said. No other takes a
            // broken one; a tag that was removed after the repair does not come back broken.
            if own.is_swept() && is_broken(store, &own.path_of(&link))? {
                if is_there { &mut undone.present } else { &mut undone.left }.push(link);
                continue;
            }
            if is_there {
                return Err(Error::Exists { path: store.full(unit) });
            }
        }
        if own.is_swept() && lacks_its_tag(store, unit)? {
            undone.left.push(unit.to_path_buf());
            continue;
        }
        moves.insert((order_of_return(unit), unit.to_path_buf()), own);
    }
    let needs = Needs::of(store, &all, own)?;
    let mut missing = BTreeSet::new();
    for path in needs.paths {
        if store.stat(&path)?.is_some() {
            continue;
        }
        match (all.iter().find(|t| t.holds(&path)), layout::classify(&path)) {
            (Some(holder), _) => drop(moves.entry((order_of_return(&path), path)).or_insert(holder)),
            (None, Kind::Blob(digest)) if digest.algorithm() == Algorithm::Sha256 => {
                missing.insert(digest);
            }
            (None, Kind::Revision(repository, digest)) => {
                // Of a child there may never have been a revision.
                missing.extend(needs.claims.contains(&(repository, digest)).then_some(digest));
            }
            (None, _) => {}
        }
    }
    undone.missing = missing.into_iter().collect();
    own.end_stage(store)?;
    let mut last = None;
    for ((order, path), holder) in &moves {
        if last.is_some_and(|last| last != order) {
            store.sync()?;
        }
        last = Some(order);
        match holder.put_back(store, path) {
            Ok(true) => undone.restored.push(path.clone()),
            Ok(false) => {}
            Err(Error::Exists { .. }) => undone.present.push(path.clone()),
            Err(e) => return Err(e),
        }
    }
    store.sync()?;
    drop_what_is_back(store, own, &undone.present)?;
    // Its own also when nothing was left in it: a run that died may have emptied it.
    let touched: BTreeSet<&str> = moves.values().map(|t| t.id.as_str()).chain([id]).collect();
    for transaction in all.iter().filter(|t| touched.contains(t.id.as_str())) {
        transaction.discard_if_empty(store)?;
    }
    Ok(undone)
}

fn is_broken(store: &dyn Store, link: &Path) -> Result<bool> {
    match store.read(link, layout::LINK_LIMIT) {
        Ok(content) => Ok(content.is_none_or(|(text, _)| layout::parse_link(&text).is_err())),
        Err(e) if e.is_damage() => Ok(true),
        Err(e) => Err(e),
    }
}

/// Whether `path` is part of a tag that is not in the store; what moves as a whole tag is none.
fn lacks_its_tag(store: &dyn Store, path: &Path) -> Result<bool> {
    let tag = path.ancestors().skip(1).find_map(|above| match layout::classify(above) {
        Kind::Tag(repository, tag) => Some(layout::tag_link(&repository, &tag)),
        _ => None,
    });
    match tag.map(|link| store.stat(&link)) {
        None => Ok(false),
        Some(Ok(stat)) => Ok(stat.is_none()),
        // Something stands there, so a tag is there, whatever it is worth.
        Some(Err(e)) if e.is_damage() => Ok(false),
        Some(Err(e)) => Err(e),
    }
}

/// Removes the copies of links that say the same in the store again. Bytes are left for a purge: whether two blobs
/// are the same, only their hashes would tell.
fn drop_what_is_back(store: &dyn Store, own: &Contents, present: &[PathBuf]) -> Result<()> {
    let mut copies = Vec::new();
    for path in present {
        let copy = own.path_of(path);
        if layout::is_link(path) && content(store, path)? == content(store, &copy)? {
            copies.push(copy);
        }
    }
    store.remove(&copies).into_iter().next().map_or(Ok(()), Err)
}

fn content(store: &dyn Store, path: &Path) -> Result<Option<Vec<u8>>> {
    Ok(store.read(path, layout::LINK_LIMIT)?.map(|(content, _)| content))
}

/// What must be in the store so that the undo of a transaction is whole.
pub(super) struct Needs {
    /// The manifests that it lays claim to, by repository.
    claims: BTreeSet<(PathBuf, Digest)>,
    /// Where all that these lead to belongs: blobs, and the links of their repositories; more than there ever was.
    pub(super) paths: BTreeSet<PathBuf>,
    /// A manifest among them can't be read, so there may be more.
    pub(super) is_unclear: bool,
}

impl Needs {
    /// Looks at the transaction `own`, one of `all`.
    pub(super) fn of(store: &dyn Store, all: &[Contents], own: &Contents) -> Result<Needs> {
        let mut needs = Needs { claims: claims(store, own)?, paths: BTreeSet::new(), is_unclear: false };
        for (repository, digest) in &needs.claims {
            let named = named_by(store, all, repository, digest)?;
            needs.is_unclear |= named.is_unclear;
            for named in named.digests {
                needs.paths.insert(layout::blob_data(&named));
                needs.paths.insert(layout::layer_link(repository, &named));
                // A child that was taken by another transaction comes back as a revision, too.
                needs.paths.insert(layout::revision_link(repository, &named));
            }
        }
        Ok(needs)
    }
}

/// The manifests that a transaction lays claim to: its revisions, and what its tags point at. Of two tags of one
/// manifest that two transactions took, only the later one holds the revision. A tag whose revision stands needs
/// nothing: that holds all it names itself.
fn claims(store: &dyn Store, contents: &Contents) -> Result<BTreeSet<(PathBuf, Digest)>> {
    let mut claims = BTreeSet::new();
    for unit in contents.units() {
        match layout::classify(unit) {
            Kind::Revision(repository, digest) => {
                claims.insert((repository, digest));
            }
            Kind::Tag(repository, tag) => {
                let link = contents.path_of(&layout::tag_link(&repository, &tag));
                // A broken tag leads nowhere.
                if let Some(digest) = read_link(store, &link)?
                    && store.stat(&layout::revision_link(&repository, &digest))?.is_none()
                {
                    claims.insert((repository, digest));
                }
            }
            Kind::Blob(_) | Kind::LayerLink(..) | Kind::Other => {}
        }
    }
    Ok(claims)
}

/// What a manifest leads to.
struct Named {
    /// The manifest itself and everything below it.
    digests: BTreeSet<Digest>,
    /// A manifest among them can't be read, so there may be more.
    is_unclear: bool,
}

/// Everything that the manifest `digest` of a repository leads to, read from the store or from the trash.
fn named_by(store: &dyn Store, all: &[Contents], repository: &Path, digest: &Digest) -> Result<Named> {
    let mut named = Named { digests: [*digest].into(), is_unclear: false };
    let mut waiting = vec![(*digest, true)];
    while let Some((current, must_be_manifest)) = waiting.pop() {
        if let Some(target) = stored_as(store, all, repository, &current)?
            && named.digests.insert(target)
        {
            waiting.push((target, must_be_manifest));
        }
        if !must_be_manifest {
            continue;
        }
        let Some(place) = find_file(store, all, &layout::blob_data(&current))? else { continue };
        let bytes = match store.read(&place, MAX_SIZE) {
            Ok(content) => content.map(|(bytes, _)| bytes),
            Err(e) if e.is_damage() => None,
            Err(e) => return Err(e),
        };
        let bytes = bytes.filter(|bytes| Digest::of(current.algorithm(), bytes) == current);
        let Some(parsed) = bytes.as_deref().and_then(|bytes| manifest::parse(bytes).ok()) else {
            named.is_unclear = true;
            continue;
        };
        let blobs = parsed.config.iter().chain(&parsed.layers).map(|d| (d.digest, false));
        let is_manifest =
            |d: &manifest::Descriptor| d.media_type.is_empty() || manifest::is_manifest_type(&d.media_type);
        let children = parsed.children.iter().map(|d| (d.digest, is_manifest(d)));
        let others = parsed.others.iter().map(|d| (*d, false));
        waiting.extend(blobs.chain(children).chain(others).filter(|(d, _)| named.digests.insert(*d)));
    }
    Ok(named)
}

/// The blob behind a digest that is not SHA-256, as the repository's layer link says.
fn stored_as(
    store: &dyn Store,
    all: &[Contents],
    repository: &Path,
    digest: &Digest,
) -> Result<Option<Digest>> {
    if digest.algorithm() == Algorithm::Sha256 {
        return Ok(None);
    }
    let Some(link) = find_file(store, all, &layout::layer_link(repository, digest))? else { return Ok(None) };
    let content = store.read(&link, layout::LINK_LIMIT)?;
    Ok(content.and_then(|(text, _)| layout::parse_link(&text).ok()))
}

/// Where a file of the store lies now: in its place, or in the trash.
fn find_file(store: &dyn Store, all: &[Contents], path: &Path) -> Result<Option<PathBuf>> {
    if store.stat(path)?.is_some() {
        return Ok(Some(path.to_path_buf()));
    }
    let holder = all.iter().find(|t| t.holds(path));
    Ok(holder.map(|t| t.path_of(path)))
}
