//! Why something is kept, or since when it is garbage.
//!
//! In goes a digest, out comes a [`Why`]: what it is, a chain of references for each thing that keeps it, or its age and
//! where it lies in the trash. Changes nothing.
//!
//! # Rules kept here
//! 1. Kept is what the [`Mark`] says is: the chains explain it, they don't decide it.
//! 2. One chain, the shortest, for each tag (or other root) of each repository that leads there.
//! 3. A manifest that no tag leads to in its repository is a root of its own, unless its subject is kept there.
//!
//! # Cost
//! A pass over the manifests for each step upwards, one over tags and revisions, a list of the trash. A `stat` of the
//! blob; of garbage, one for each layer link to it as well.

mod chains;
mod text;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::mark::Mark;
use super::plan::{Policy, Reason};
use super::{Options, report};
use crate::advice::Advice;
use crate::catalog::intern::DigestId;
use crate::catalog::{Catalog, Manifest, Parsed};
use crate::clock::{Next, Now};
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result};
use crate::layout::{self, Kind};
use crate::manifest;
use crate::printable::Printable;
use crate::store::Store;
use crate::trash;
pub use chains::{Chain, Link, Root, Step};

/// How many chains are shown, unless told otherwise.
pub const FEW: usize = 10;
/// Fewest hex digits that are taken for the start of a digest.
const SHORTEST_PREFIX: usize = 6;

/// What is known of the store.
#[derive(Clone)]
pub struct Facts<'a> {
    /// Where ages are looked up.
    pub store: &'a dyn Store,
    /// The registry at one instant.
    pub catalog: &'a Catalog,
    /// What a plain collection of that keeps.
    pub mark: &'a Mark,
    /// What was used more recently than this is no garbage yet.
    pub grace: Duration,
    /// The time to count from.
    pub now: Now,
}

/// The answer.
#[derive(Clone, Debug)]
pub struct Why {
    /// What was asked about.
    pub digest: Digest,
    /// `manifest`, `index`, `config`, `layer`, `blob`, …
    pub kind: &'static str,
    /// Its media type, where something says it.
    pub media_type: Option<String>,
    /// Bytes: as they are, or else as a manifest claims.
    pub bytes: Option<u64>,
    /// Whether its bytes are in the store.
    pub is_present: bool,
    /// The blob that holds its bytes, if that has another digest.
    pub stored_as: Option<Digest>,
    /// How many manifests are about it.
    pub referrers: usize,
    /// The first chains that keep it.
    pub chains: Vec<Chain>,
    /// How many there are.
    pub chains_found: usize,
    /// Something leads to it.
    pub is_kept: bool,
    /// It lives only because manifests that no tag leads to stay unless told otherwise.
    pub is_untagged: bool,
    /// When and where it was used, if nothing leads to it.
    pub garbage: Option<Garbage>,
    /// Transactions of the trash that hold its bytes or a link to it, oldest first.
    pub trash: Vec<Trashed>,
    /// Why no collection can run.
    pub obstacles: Vec<String>,
    /// The grace period that counts here.
    pub grace: Duration,
}

/// What is known of garbage.
#[derive(Clone, Debug)]
pub struct Garbage {
    /// Why it is.
    pub reason: Reason,
    /// The newest of the times of its bytes and of the layer links to it; `None` when there is neither.
    pub last_used: Option<SystemTime>,
    /// When the grace period ends or ended.
    pub eligible_at: Option<SystemTime>,
    /// It ended.
    pub is_eligible: bool,
    /// Repositories with a layer link to it.
    pub links: Vec<PathBuf>,
}

/// What a transaction of the trash holds of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trashed {
    /// Its name.
    pub id: String,
    /// The bytes.
    pub has_bytes: bool,
    /// Repositories whose manifest it was.
    pub revisions: Vec<PathBuf>,
    /// Repositories with a layer link to it.
    pub links: Vec<PathBuf>,
}

/// Finds what `argument` means: a digest or the start of one, `<repository>:<tag>`, `<repository>@<digest>`.
pub fn find(facts: &Facts<'_>, argument: &str) -> Result<Digest> {
    if let Some((repository, digest)) = argument.split_once('@') {
        // `alpine:3.8@sha256:…` is a reference, too; its digest decides.
        let name = repository.split_once(':').map_or(repository, |(name, _)| name);
        let found = by_prefix(facts, digest)?.ok_or_else(|| not_understood(argument))?;
        let known = facts.catalog.repository(Path::new(name)).ok_or_else(|| no_repository(name))?;
        let id = facts.catalog.tables.digests.find(&found);
        return match id.and_then(|id| known.revision(id)) {
            Some(_) => Ok(found),
            None => Err(Error::NotFound {
                what: format!(
                    "manifest {found} in repository {name} (to ask about it in the whole store, leave out the \
                     repository)"
                ),
            }),
        };
    }
    if let Some(digest) = by_prefix(facts, argument)? {
        return Ok(digest);
    }
    let (name, tag) = argument.rsplit_once(':').ok_or_else(|| not_understood(argument))?;
    let repository = facts.catalog.repository(Path::new(name)).ok_or_else(|| no_repository(name))?;
    let id = facts.catalog.tables.names.find(tag.as_ref());
    let found = id.and_then(|id| repository.tag(id)).ok_or_else(|| Error::NotFound {
        what: format!("tag {tag:?} in repository {name} (a mount shows its tags in images/{name}/_tags)"),
    })?;
    found.target.map(|id| facts.catalog.digest(id)).ok_or_else(|| {
        let link = layout::tag_link(Path::new(name), tag.as_ref());
        Error::invalid(format!(
            "the tag {argument} points nowhere: {} can't be read (a mount says why in reachability/broken; \
             {} mends it if its history tells)",
            link.printable(),
            Advice::Repair
        ))
    })
}

fn not_understood(argument: &str) -> Error {
    Error::invalid(format!(
        "{argument:?} is neither a digest nor a reference; give sha256:<hex>, at least the first \
         {SHORTEST_PREFIX} digits of it, <repository>:<tag> or <repository>@<digest>"
    ))
}

fn no_repository(name: &str) -> Error {
    Error::NotFound { what: format!("repository {name:?} in the store ({} lists them)", Advice::DryRun) }
}

/// The digest that `text` is or begins; `None` when it looks like something else.
fn by_prefix(facts: &Facts<'_>, text: &str) -> Result<Option<Digest>> {
    if let Ok(digest) = text.parse() {
        return Ok(Some(digest));
    }
    let (algorithm, hex) = match text.split_once(':') {
        None => (None, text),
        Some((name, hex)) => match Algorithm::from_name(name) {
            Some(algorithm) => (Some(algorithm), hex),
            None => return Ok(None),
        },
    };
    let is_hex = hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if !is_hex || hex.len() < SHORTEST_PREFIX {
        // With `sha256:` before it, it is no tag either.
        return if is_hex && algorithm.is_some() { Err(not_understood(text)) } else { Ok(None) };
    }
    let catalog = facts.catalog;
    let known = (0..catalog.tables.digests.bound() as u32).map(DigestId).filter(|id| is_known(facts, *id));
    let mut found: Vec<Digest> = known.filter_map(|id| catalog.tables.digests.checked(id)).collect();
    for transaction in trash::contents(facts.store)? {
        found.extend(transaction.files.iter().filter_map(|path| match layout::classify(path) {
            Kind::Blob(digest) => Some(digest),
            _ => None,
        }));
    }
    found.retain(|d| algorithm.is_none_or(|a| d.algorithm() == a) && d.hex().starts_with(hex));
    found.sort_unstable();
    found.dedup();
    match found.as_slice() {
        [] => Err(Error::NotFound {
            what: format!(
                "digest that begins with {text}: neither a blob nor anything that names one (look at \
                 blobs/ in a mount, or give <repository>:<tag>)"
            ),
        }),
        [one] => Ok(Some(*one)),
        many => {
            let shown: Vec<String> = many.iter().take(5).map(Digest::to_string).collect();
            Err(Error::invalid(format!(
                "{text} begins {} digests ({}{}); give more of it",
                many.len(),
                shown.join(", "),
                if many.len() > shown.len() { ", …" } else { "" },
            )))
        }
    }
}

/// Whether `id` is in the store, or anything there names it.
pub fn is_known(facts: &Facts<'_>, id: DigestId) -> bool {
    let catalog = facts.catalog;
    catalog.has_blob(id)
        || catalog.manifests.contains_key(&id)
        || facts.mark.is_reachable(id)
        || catalog.repositories.values().any(|r| r.layers.binary_search(&id).is_ok())
}

/// Says why `digest` is kept, in at most `limit` chains, or since when it is garbage.
///
/// # Errors
/// [`Error::NotFound`] when neither the store nor the trash has it and nothing names it; failing calls.
pub fn why(facts: &Facts<'_>, digest: &Digest, limit: usize) -> Result<Why> {
    let catalog = facts.catalog;
    let id = catalog.tables.digests.find(digest);
    let trash = in_trash(facts.store, digest)?;
    let mut why = Why {
        digest: *digest,
        kind: "blob",
        media_type: None,
        bytes: None,
        is_present: false,
        stored_as: None,
        referrers: 0,
        chains: Vec::new(),
        chains_found: 0,
        is_kept: false,
        is_untagged: false,
        garbage: None,
        trash,
        obstacles: catalog.obstacles(),
        grace: facts.grace,
    };
    let Some(id) = id else { return unless_unknown(why) };
    let stored = catalog.stored_as(id);
    why.stored_as = (stored != id).then(|| catalog.digest(stored));
    why.referrers = catalog.manifests.values().filter(|m| subject(m) == Some(id)).count();
    let stat = match facts.store.stat(&layout::blob_data(&catalog.digest(stored))) {
        Err(e) if e.is_damage() => None,
        stat => stat?,
    };
    why.is_present = stat.is_some();
    let found = chains::find(catalog, id);
    why.describe(catalog, id, found.above(id));
    why.bytes = stat.as_ref().map(|s| s.size).or(why.bytes);
    why.chains_found = found.len();
    why.is_untagged = found.len() > 0 && found.is_untagged();
    why.chains = found.chains(limit);
    why.is_kept = facts.mark.is_reachable(id) || found.len() > 0;
    if !why.is_kept {
        why.garbage = Some(garbage(facts, id, stat.map(|s| s.modified.max(s.changed)))?);
    }
    unless_unknown(why)
}

fn subject(manifest: &Manifest) -> Option<DigestId> {
    manifest.parsed().and_then(Parsed::subject)
}

fn unless_unknown(why: Why) -> Result<Why> {
    let has_links = why.garbage.as_ref().is_some_and(|g| !g.links.is_empty());
    match why.is_kept || why.is_present || has_links || why.referrers > 0 || !why.trash.is_empty() {
        true => Ok(why),
        false => Err(Error::NotFound {
            what: format!(
                "{}: neither a blob nor anything that names it, in the store or in its trash (look at blobs/ in \
                 a mount, or give <repository>:<tag>)",
                why.digest
            ),
        }),
    }
}

impl Why {
    /// Fills in what it is, from itself or from a manifest above it.
    fn describe(&mut self, catalog: &Catalog, id: DigestId, above: Option<DigestId>) {
        let named = above.and_then(|parent| catalog.parsed(parent)).map(|parent| role(parent, id));
        if let Some((kind, descriptor)) = named {
            self.kind = kind;
            self.bytes = descriptor.map(|d| d.size);
            self.media_type = descriptor.map(|d| catalog.name(d.media_type).to_string_lossy().into_owned());
        }
        if let Some(kind) = kind_of(catalog, id) {
            self.kind = kind;
        }
        if let Some(parsed) = catalog.parsed(id) {
            self.media_type = Some(catalog.name(parsed.media_type).to_string_lossy().into_owned());
            self.bytes = Some(u64::from(parsed.size));
        }
        self.media_type = self.media_type.take().filter(|text| !text.is_empty());
    }

    /// The transaction whose undo brings most of it back: an `rm` also fetches what a sweep took after it.
    fn best_undo(&self) -> Option<&Trashed> {
        let of = |is: fn(&Trashed) -> bool| self.trash.iter().rev().find(|t| is(t));
        of(|t| !t.revisions.is_empty()).or_else(|| of(|t| t.has_bytes)).or_else(|| of(|_| true))
    }
}

/// What a manifest is called; `None` for what is no manifest.
fn kind_of(catalog: &Catalog, id: DigestId) -> Option<&'static str> {
    Some(match &**catalog.manifests.get(&id)? {
        Manifest::Parsed(parsed) => match parsed.kind {
            manifest::Kind::Index => "index",
            manifest::Kind::Image => "manifest",
            manifest::Kind::Schema1 => "schema 1 manifest",
            manifest::Kind::Unknown => "manifest of an unknown type",
        },
        Manifest::Damaged { .. } => "damaged manifest",
        Manifest::Missing => "missing manifest",
    })
}

/// What `id` is to the manifest that names it, and what that says about it.
fn role(parent: &Parsed, id: DigestId) -> (&'static str, Option<&crate::catalog::Descriptor>) {
    let is_it = |d: &&crate::catalog::Descriptor| d.digest == id;
    let among = |list| Iterator::find(&mut <[_]>::iter(list), is_it);
    if let Some(config) = parent.config().filter(is_it) {
        return ("config", Some(config));
    }
    if let Some(layer) = among(parent.layers()) {
        return ("layer", Some(layer));
    }
    match among(parent.children()) {
        Some(child) => ("manifest", Some(child)),
        None => ("blob", None),
    }
}

fn garbage(facts: &Facts<'_>, id: DigestId, used: Option<SystemTime>) -> Result<Garbage> {
    let catalog = facts.catalog;
    let other_names =
        catalog.aliases.iter().filter(|(_, targets)| targets.contains(&id)).map(|(name, _)| *name);
    let names: Vec<DigestId> = std::iter::once(id).chain(other_names).collect();
    let (mut last_used, mut links) = (used, Vec::new());
    for (repository, known) in &catalog.repositories {
        for name in names.iter().filter(|name| known.layers.binary_search(name).is_ok()) {
            let Some(stat) = facts.store.stat(&layout::layer_link(repository, &catalog.digest(*name)))?
            else {
                continue;
            };
            last_used = last_used.max(Some(stat.modified.max(stat.changed)));
            links.push(repository.clone());
        }
    }
    links.dedup();
    let policy = Policy::new(&Options { grace: facts.grace, ..Options::default() }, &facts.now);
    let eligible_at = |used: SystemTime| match policy.eligible(used) {
        Next::At(time) => Some(time),
        _ => used.checked_add(facts.grace),
    };
    Ok(Garbage {
        reason: Reason::Unnamed,
        last_used,
        eligible_at: last_used.and_then(eligible_at),
        is_eligible: last_used.is_some_and(|time| !policy.is_young(time)),
        links,
    })
}

fn in_trash(store: &dyn Store, digest: &Digest) -> Result<Vec<Trashed>> {
    let mut found = Vec::new();
    for transaction in trash::contents(store)? {
        let mut holds =
            Trashed { id: transaction.id, has_bytes: false, revisions: Vec::new(), links: Vec::new() };
        for path in &transaction.files {
            match layout::classify(path) {
                Kind::Blob(d) if d == *digest => holds.has_bytes = true,
                Kind::Revision(name, d) if d == *digest => holds.revisions.push(name),
                Kind::LayerLink(name, d) if d == *digest => holds.links.push(name),
                _ => {}
            }
        }
        if holds.has_bytes || !holds.revisions.is_empty() || !holds.links.is_empty() {
            found.push(holds);
        }
    }
    Ok(found)
}
