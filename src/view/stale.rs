//! What of the tree is not any more as somebody may remember it: the difference of two snapshots.
//!
//! Made for caches of the kernel. Told apart as finely as it costs nothing to do: one push names a handful of things.
//! Of what is always asked anew ([`is_lasting`] says no) only symlinks count, of which the targets may be remembered.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Snapshot;
use super::node::Node;
use super::tree::{REVISIONS, TAGS, UPLOADS};
use crate::catalog::intern::{DigestId, NameId};
use crate::catalog::{Catalog, Keeps, Repository, Tag};
use crate::digest::Algorithm;

/// What changed between two snapshots.
#[derive(Debug, Default)]
pub struct Stale {
    /// Too much to name it.
    pub everything: bool,
    /// Names that came, went or mean something else, with the directory they stand in.
    pub names: HashSet<(Node, OsString)>,
    /// Directories with other entries, symlinks with other targets; their attributes, too.
    pub contents: HashSet<Node>,
    /// Nodes of which only attributes changed.
    pub attributes: HashSet<Node>,
}

/// More than that is too much to name; each takes some microseconds.
const MANY: usize = 200_000;

/// Whether what the tree says of a node, and of a name in it, holds until a [`Stale`] names it.
pub fn is_lasting(snapshot: &Snapshot, node: Node) -> bool {
    match node {
        Node::Root
        | Node::Readme
        | Node::Images
        | Node::Namespace(_)
        | Node::Tags(_)
        | Node::Tag(..)
        | Node::Revisions(_)
        | Node::RevisionsOf(..)
        | Node::Uploads(_)
        | Node::Blobs
        | Node::BlobsOf(_)
        | Node::BlobShard(..) => true,
        // The time of garbage is a matter of links and of the clock.
        Node::Blob(id) => snapshot.catalog.has_blob(id) && snapshot.mark().is_reachable(id),
        _ => false,
    }
}

impl Stale {
    /// Whether nothing is.
    pub fn is_empty(&self) -> bool {
        !self.everything && self.names.is_empty() && self.contents.is_empty() && self.attributes.is_empty()
    }

    /// Compares two snapshots of a store; `blobs` came or went on the disk, whatever the snapshots say of them.
    pub fn between(before: &Snapshot, after: &Snapshot, blobs: &[DigestId]) -> Stale {
        let mut stale = Stale::default();
        if before.is_judged() != after.is_judged() || before.catalog.aliases != after.catalog.aliases {
            // Links of all blobs are counted in another way.
            stale.everything = true;
            return stale;
        }
        if !Arc::ptr_eq(&before.directories, &after.directories) {
            stale.directories(before, after);
        }
        // Blobs of which the number of references may be another.
        let mut counted: HashSet<DigestId> = HashSet::new();
        for (name, old, new) in changed(&before.catalog.repositories, &after.catalog.repositories) {
            let pair = Pair {
                id: after.name_id(name),
                tables: &after.catalog,
                old: old.map(|r| (&before.catalog, r)),
                new: new.map(|r| (&after.catalog, r)),
            };
            stale.repository(&pair, &mut counted);
        }
        stale.attributes.extend(counted.into_iter().map(Node::Blob));
        let come_or_gone = before.catalog.present.difference(&after.catalog.present);
        for id in come_or_gone.chain(blobs.iter().copied()) {
            stale.blob(&before.catalog, &after.catalog, id);
        }
        if stale.names.len() + stale.contents.len() + stale.attributes.len() > MANY {
            stale = Stale { everything: true, ..Stale::default() };
        }
        stale
    }

    /// Namespaces and repositories that came or went.
    fn directories(&mut self, before: &Snapshot, after: &Snapshot) {
        let node = |path: &Path| match path.as_os_str().is_empty() {
            true => Node::Images,
            false => Node::Namespace(after.name_id(path)),
        };
        let paths: BTreeSet<&PathBuf> = before.directories.keys().chain(after.directories.keys()).collect();
        let none = BTreeSet::new();
        for path in paths {
            let [old, new] = [before, after].map(|s| s.directories.get(path).unwrap_or(&none));
            for name in old.symmetric_difference(new) {
                self.names.insert((node(path), name.clone()));
                self.contents.insert(node(path));
                self.attributes.insert(node(&path.join(name)));
            }
        }
    }

    fn repository(&mut self, pair: &Pair<'_>, counted: &mut HashSet<DigestId>) {
        let id = pair.id;
        let place = Node::Namespace(id);
        self.attributes.extend([place, Node::Tags(id), Node::Revisions(id)]);
        if pair.old.is_some() != pair.new.is_some() {
            let own = [TAGS, REVISIONS, UPLOADS];
            self.names.extend(own.map(|name| (place, OsString::from(name))));
            self.contents.insert(place);
        }
        self.tags(pair);
        self.revisions(pair, counted);
        let uploads = |r: Option<(&Catalog, &Arc<Repository>)>| -> BTreeSet<NameId> {
            r.into_iter().flat_map(|(_, r)| r.uploads.iter().copied()).collect()
        };
        for upload in uploads(pair.old).symmetric_difference(&uploads(pair.new)) {
            self.name_in(Node::Uploads(id), pair.name(*upload));
        }
        // What is kept because of damage counts as a reference, too.
        let [old, new] = [pair.old, pair.new].map(|r| r.map(|(_, r)| (&r.held, r.keeps)));
        if old != new {
            for (catalog, repository) in pair.old.into_iter().chain(pair.new) {
                let layers = (repository.keeps == Keeps::Everything).then_some(&repository.layers);
                let kept = repository.held.iter().chain(layers.into_iter().flatten());
                counted.extend(kept.flat_map(|id| catalog.closure(*id)));
            }
        }
    }

    fn name_in(&mut self, directory: Node, name: OsString) {
        self.names.insert((directory, name));
        self.contents.insert(directory);
    }

    fn tags(&mut self, pair: &Pair<'_>) {
        let facts = |r: Option<(&Catalog, &Arc<Repository>)>| -> BTreeMap<NameId, (Tag, bool)> {
            let tags = r.into_iter().flat_map(|(_, r)| r.tags.iter().map(|t| (t.name, (*t, r.is_served(t)))));
            tags.collect()
        };
        let (old, new) = (facts(pair.old), facts(pair.new));
        for name in old.keys().chain(new.keys().filter(|name| !old.contains_key(name))) {
            let (old, new) = (old.get(name), new.get(name));
            if old == new {
                continue;
            }
            if old.is_some() != new.is_some() {
                self.contents.insert(Node::Tags(pair.id));
            }
            // Also of one that moved: a rename onto a tag leaves the node of another one under its name.
            self.names.insert((Node::Tags(pair.id), pair.name(*name)));
            self.contents.extend([Node::Tag(*name, pair.id), Node::TagReference(*name, pair.id)]);
        }
    }

    fn revisions(&mut self, pair: &Pair<'_>, counted: &mut HashSet<DigestId>) {
        let digests = |r: Option<(&Catalog, &Arc<Repository>)>| -> BTreeSet<(DigestId, DigestId, bool)> {
            r.into_iter()
                .flat_map(|(_, r)| &r.revisions)
                .map(|r| (r.digest, r.target, r.is_readable))
                .collect()
        };
        let (old, new) = (digests(pair.old), digests(pair.new));
        for changed in old.symmetric_difference(&new) {
            let (id, target, _) = *changed;
            let digest = pair.tables.digest(id);
            self.name_in(Node::RevisionsOf(digest.algorithm(), pair.id), digest.hex().into());
            // The directory of the usual algorithm is always there, and forgetting it forgets all that is in it.
            if digest.algorithm() != Algorithm::Sha256 {
                self.name_in(Node::Revisions(pair.id), digest.algorithm().name().into());
            }
            self.contents.insert(Node::KeeperRevision(id, pair.id));
            for (catalog, _) in pair.old.into_iter().chain(pair.new) {
                counted.extend([id, target].into_iter().flat_map(|id| catalog.closure(id)));
            }
        }
    }

    fn blob(&mut self, before: &Catalog, after: &Catalog, id: DigestId) {
        let digest = after.digest(id);
        let algorithm = digest.algorithm();
        let Some(shard) = digest.as_bytes().first().copied() else { return };
        self.name_in(Node::BlobShard(shard, algorithm), digest.hex().into());
        // Forgetting a directory forgets all that is in it, so only where it came or went.
        let [old, new] = [before, after].map(|c| c.blobs_in(algorithm, shard).next().is_some());
        if old != new {
            self.name_in(Node::BlobsOf(algorithm), format!("{shard:02x}").into());
            self.name_in(Node::Blobs, algorithm.name().into());
        }
        self.attributes.insert(Node::Blob(id));
    }
}

/// A repository as it was and as it is.
struct Pair<'a> {
    id: NameId,
    /// One that knows all numbers.
    tables: &'a Catalog,
    old: Option<(&'a Catalog, &'a Arc<Repository>)>,
    new: Option<(&'a Catalog, &'a Arc<Repository>)>,
}

impl Pair<'_> {
    fn name(&self, id: NameId) -> OsString {
        self.tables.name(id).to_os_string()
    }
}

/// A name, and the repository as it was and as it is.
type Change<'a> = (&'a Path, Option<&'a Arc<Repository>>, Option<&'a Arc<Repository>>);

/// Repositories that are not the same in both, in order of their names.
fn changed<'a>(
    old: &'a BTreeMap<PathBuf, Arc<Repository>>,
    new: &'a BTreeMap<PathBuf, Arc<Repository>>,
) -> Vec<Change<'a>> {
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    let mut changed = Vec::new();
    loop {
        let order = match (old.peek(), new.peek()) {
            (None, None) => return changed,
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (Some((a, _)), Some((b, _))) => a.cmp(b),
        };
        let (a, b) = (old.next_if(|_| order.is_le()), new.next_if(|_| order.is_ge()));
        let is_same = matches!((a, b), (Some((_, a)), Some((_, b))) if Arc::ptr_eq(a, b));
        if let Some((name, _)) = a.or(b).filter(|_| !is_same) {
            changed.push((name.as_path(), a.map(|(_, r)| r), b.map(|(_, r)| r)));
        }
    }
}
