//! Undo: gives back what a transaction took, and what that names.
//!
//! # Rules kept here
//! 1. What a manifest names and is nowhere is listed, not refused: it may never have been here, and an undo gives back what
//!    was, damage included.
//! 2. Nothing newer is replaced. Content under the same digest is the same content, so it is no obstacle. Where there is a
//!    newer tag, the old one stays in the trash and all else comes back, its manifest included.
//! 3. A manifest comes back with all it names: what a later sweep took is fetched from its transaction.
//! 4. Parts that a sweep took of a tag come back only while there is that tag.
//! 5. Order: blobs, layer links, revisions, tags, with a sync between, so that the registry is valid throughout.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::{Contents, began_at, contents, find, ids, order_of_return, read};
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result, count};
use crate::layout::{self, Kind};
use crate::manifest::{self, MAX_SIZE, is_foreign_layer};
use crate::printable::Printable;
use crate::store::{Store, read_link};

/// What an undo did.
#[derive(Debug, Default)]
pub struct Undone {
    /// The transaction.
    pub id: String,
    /// Paths that came back.
    pub restored: Vec<PathBuf>,
    /// Paths that were there again already.
    pub present: Vec<PathBuf>,
    /// Parts of tags that are gone by now; they stay in the trash, or there would be a tag that points nowhere.
    pub left: Vec<PathBuf>,
    /// Tags, with their repository, of which there is a newer one; the old link stays in the trash.
    pub conflicts: Vec<(PathBuf, OsString)>,
    /// What could not come back because of what stands in its way; it stays in the trash.
    pub failures: Vec<Error>,
    /// Digests that a manifest or a tag names and that are nowhere; they may never have been here.
    pub missing: Vec<Digest>,
}

impl Undone {
    /// Whether all came back that was to.
    pub fn is_complete(&self) -> bool {
        self.conflicts.is_empty() && self.failures.is_empty() && self.missing.is_empty()
    }

    /// What was done, for people; `again` is the command that undoes the rest.
    pub fn text(&self, again: &str) -> String {
        let mut text = String::new();
        for digest in &self.missing {
            text += &format!(
                "missing {digest}: a manifest names it, and it is neither in the store nor in the trash; if it was here before, \
                 push the image once more\n"
            );
        }
        for (repository, tag) in &self.conflicts {
            let tag = format!("{}:{}", repository.printable(), tag.printable());
            text += &format!(
                "conflict {tag}: there is a newer tag of that name, which stays. The old one waits in the trash: remove the \
                 newer one (in the mount: rm images/{tag}), then {again}\n"
            );
        }
        for failure in &self.failures {
            text += &format!("failed: {failure}\n");
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
        let restored = count(self.restored.len(), "path");
        let id = self.id.printable();
        match self.conflicts.len() + self.failures.len() {
            0 => text + &format!("undid {id}: {restored} restored\n"),
            left => text + &format!("undid {id} but for {}: {restored} restored\n", count(left, "conflict")),
        }
    }
}

/// The word for the newest transaction.
pub const LAST: &str = "last";

/// The newest transaction, by its name and then by the time of its description.
pub fn newest(store: &dyn Store) -> Result<Option<String>> {
    let mut newest: Option<(Option<SystemTime>, Option<SystemTime>, String)> = None;
    for id in ids(store)? {
        let file = layout::transaction(&id).join(layout::TRANSACTION_FILE);
        let written = match store.stat(&file) {
            Ok(stat) => stat.map(|stat| stat.modified),
            Err(e) if e.is_damage() => None,
            Err(e) => return Err(e),
        };
        newest = newest.max(Some((began_at(&id), written, id)));
    }
    Ok(newest.map(|(_, _, id)| id))
}

/// What somebody is told who named no transaction; `undo_last` is the command that undoes the newest.
pub fn which(store: &dyn Store, undo_last: &str) -> Result<String> {
    let Some(newest) = newest(store)? else {
        return Ok("the trash is empty, so there is nothing to undo".to_string());
    };
    let newest = read(store, &newest)?;
    let what = match &newest.record {
        Ok(record) => format!("`{}`: {}", record.command.printable(), record.reason.printable()),
        Err(why) => why.printable().to_string(),
    };
    let files = count(newest.files.len(), "file");
    Ok(format!(
        "which transaction? The newest is {}, {files} ({what}); `{undo_last}` gives it back",
        newest.id.printable()
    ))
}

/// Gives back transaction `id`, or the newest one for [`LAST`]. The caller holds the lock.
///
/// # Errors
/// [`Error::NotFound`] for an unknown transaction; nothing was changed then.
pub fn undo(store: &dyn Store, id: &str) -> Result<Undone> {
    let all = contents(store)?;
    let newest = if id == LAST { newest(store)? } else { None };
    let own = find(&all, newest.as_deref().unwrap_or(id))?;
    let mut undone = Undone { id: own.id.clone(), ..Undone::default() };
    let mut moves = own_moves(store, own, &mut undone)?;
    let needs = Needs::of(store, &all, own)?;
    let mut missing = BTreeSet::new();
    for path in needs.paths {
        if store.stat(&path)?.is_some() {
            continue;
        }
        match (all.iter().find(|t| t.holds(&path)), layout::classify(&path)) {
            (Some(holder), _) => drop(moves.entry((order_of_return(&path), path)).or_insert(holder)),
            (None, Kind::Blob(digest)) if digest.algorithm() == Algorithm::Sha256 => {
                missing.extend((!needs.elsewhere.contains(&digest)).then_some(digest));
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
    put_back_all(store, &moves, &mut undone)?;
    drop_what_is_back(store, own, &undone.present)?;
    // Its own also when nothing was left in it: a run that died may have emptied it.
    let touched: BTreeSet<&str> = moves.values().map(|t| t.id.as_str()).chain([own.id.as_str()]).collect();
    for transaction in all.iter().filter(|t| touched.contains(t.id.as_str())) {
        transaction.discard_if_empty(store)?;
    }
    Ok(undone)
}

/// What the undo of any transaction needs, wherever it is now; `None` where a manifest in the trash can't be read.
pub fn needed(store: &dyn Store) -> Result<Option<BTreeSet<PathBuf>>> {
    let all = contents(store)?;
    let mut paths = BTreeSet::new();
    for transaction in &all {
        let needs = Needs::of(store, &all, transaction)?;
        if needs.is_unclear {
            return Ok(None);
        }
        paths.extend(needs.paths);
    }
    Ok(Some(paths))
}

/// What comes back, in its order, and from which transaction.
type Moves<'a> = BTreeMap<(u8, PathBuf), &'a Contents>;

/// What of `own` comes back; what does not, and why, goes to `undone`.
fn own_moves<'a>(store: &dyn Store, own: &'a Contents, undone: &mut Undone) -> Result<Moves<'a>> {
    let mut moves = Moves::new();
    for unit in own.units() {
        if let Kind::Tag(repository, tag) = layout::classify(unit) {
            let link = layout::tag_link(&repository, &tag);
            let is_there = match store.list(unit) {
                Ok(entries) => entries.is_some(),
                // Whatever stands there, no tag can.
                Err(e) if e.is_damage() => true,
                Err(e) => return Err(e),
            };
            // A sweep that repairs takes the link alone, of which nobody needs to know what it said. No other takes a
            // broken one; a tag that was removed after the repair does not come back broken.
            if own.is_swept() && is_broken(store, &own.path_of(&link))? {
                if is_there { &mut undone.present } else { &mut undone.left }.push(link);
                continue;
            }
            // The same tag, or the directory of one without its link: only what it lacks.
            if is_there && !is_another_tag(store, own, &link)? {
                let files = own.files.iter().filter(|file| file.starts_with(unit));
                moves.extend(files.map(|file| ((order_of_return(unit), file.clone()), own)));
                continue;
            }
            if is_there {
                undone.conflicts.push((repository, tag));
                continue;
            }
        }
        if own.is_swept() && lacks_its_tag(store, unit)? {
            undone.left.push(unit.to_path_buf());
            continue;
        }
        moves.insert((order_of_return(unit), unit.to_path_buf()), own);
    }
    Ok(moves)
}

/// Whether the store has a tag at `link` that says anything else than the one in the trash.
fn is_another_tag(store: &dyn Store, own: &Contents, link: &Path) -> Result<bool> {
    match content(store, link) {
        Ok(None) => Ok(false),
        Ok(there) => Ok(there != content(store, &own.path_of(link))?),
        // Whatever stands there, nothing can be put in its place.
        Err(e) if e.is_damage() => Ok(true),
        Err(e) => Err(e),
    }
}

/// Moves what comes back, with a sync between the kinds of things. Where something stands in the way of a repository, what
/// would come after it in that repository stays in the trash: no tag leads to what is not there.
fn put_back_all(store: &dyn Store, moves: &Moves<'_>, undone: &mut Undone) -> Result<()> {
    let mut blocked: BTreeSet<PathBuf> = BTreeSet::new();
    let mut last = None;
    for ((order, path), holder) in moves {
        let repository = layout::repository_of(path);
        if repository.as_ref().is_some_and(|name| blocked.contains(name)) {
            continue;
        }
        if last.is_some_and(|last| last != order) {
            store.sync()?;
        }
        last = Some(order);
        match (holder.put_back(store, path), repository) {
            (Ok(true), _) => undone.restored.push(path.clone()),
            (Ok(false), _) => {}
            (Err(Error::Exists { .. }), _) => undone.present.push(path.clone()),
            (Err(e), Some(name)) if e.is_damage() => {
                undone.failures.push(e);
                blocked.insert(name);
            }
            (Err(e), _) => return Err(e),
        }
    }
    store.sync()
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
    /// Layers that clients fetch from another server.
    elsewhere: BTreeSet<Digest>,
    /// A manifest among them can't be read, so there may be more.
    pub(super) is_unclear: bool,
}

impl Needs {
    /// Looks at the transaction `own`, one of `all`.
    pub(super) fn of(store: &dyn Store, all: &[Contents], own: &Contents) -> Result<Needs> {
        let mut needs = Needs {
            claims: claims(store, own)?,
            paths: BTreeSet::new(),
            elsewhere: BTreeSet::new(),
            is_unclear: false,
        };
        for (repository, digest) in &needs.claims {
            let named = named_by(store, all, repository, digest)?;
            needs.is_unclear |= named.is_unclear;
            needs.elsewhere.extend(named.elsewhere);
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
    /// Those of them that are layers at another server, and need not be here.
    elsewhere: BTreeSet<Digest>,
    /// A manifest among them can't be read, so there may be more.
    is_unclear: bool,
}

/// Everything that the manifest `digest` of a repository leads to, read from the store or from the trash.
fn named_by(store: &dyn Store, all: &[Contents], repository: &Path, digest: &Digest) -> Result<Named> {
    let mut named = Named { digests: [*digest].into(), elsewhere: BTreeSet::new(), is_unclear: false };
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
        let foreign = parsed.layers.iter().filter(|layer| is_foreign_layer(&layer.media_type));
        named.elsewhere.extend(foreign.map(|layer| layer.digest));
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
