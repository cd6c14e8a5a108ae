//! The part of a scan that reads manifests, and says what their repositories keep because of damage in them.
//!
//! # Rules kept here
//! 1. Bytes are verified against their digest before they are parsed; what was parsed once is never read again.
//! 2. A damaged manifest keeps everything linked in each repository that leads to it; so does one whose bytes are
//!    gone, in the repositories that have it.
//! 3. A child of an index that is not there is a normal state: images are pushed with some platforms left out.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::intern::{DigestId, IdSet};
use super::scan::{Scan, spread};
use super::{Descriptor, Effect, Keeps, Manifest, Manifests, Parsed};
use crate::digest::{Algorithm, Digest};
use crate::printable::Printable;
use crate::store::Directory;
use crate::{layout, manifest};

impl Scan<'_> {
    /// Reads every manifest that a revision, a tag or an index names.
    pub(super) fn manifests(&mut self, present: &IdSet) -> Manifests {
        let mut manifests: Manifests = HashMap::new();
        let mut seen = IdSet::default();
        let mut waiting: Vec<DigestId> = Vec::new();
        for repository in self.repositories.values() {
            let revisions = repository.revisions.iter().flat_map(|r| [r.digest, r.target]);
            let tags = repository.tags.iter().filter_map(|t| t.target);
            let held = repository.held_manifests.iter().copied();
            waiting.extend(revisions.chain(tags).chain(held).filter(|id| seen.insert(*id)));
        }
        while !waiting.is_empty() {
            manifests.reserve(waiting.len());
            let mut next = Vec::new();
            let mut unknown = Vec::new();
            let mut found = |id: DigestId, manifest: Arc<Manifest>, scan: &Scan<'_>| {
                if let Manifest::Parsed(parsed) = &*manifest {
                    // An index may name things that are no manifests; those are blobs to keep, not to parse.
                    let children = parsed.children().iter().filter(|d| scan.is_manifest(d));
                    next.extend(children.map(|d| d.digest).filter(|id| seen.insert(*id)));
                }
                manifests.insert(id, manifest);
            };
            for id in waiting {
                let known = self.previous.and_then(|p| p.manifests.get(&id));
                let known = known.or_else(|| self.tables.known.get(&id)).filter(|m| m.parsed().is_some());
                match known.filter(|_| present.contains(id)) {
                    Some(known) => found(id, known.clone(), self),
                    None => unknown.push(id),
                }
            }
            for (id, manifest) in self.read_manifests(unknown).into_iter().flatten() {
                found(id, manifest, self);
            }
            waiting = next;
        }
        self.note_manifests(&manifests);
        manifests
    }

    fn is_manifest(&self, child: &Descriptor) -> bool {
        let media_type = self.tables.names.get(child.media_type);
        media_type.is_empty() || media_type.to_str().is_some_and(manifest::is_manifest_type)
    }

    /// Reads manifests, those that lie in one directory together; a list from each thread.
    fn read_manifests(&mut self, ids: Vec<DigestId>) -> Vec<Vec<(DigestId, Arc<Manifest>)>> {
        let mut shards: BTreeMap<(Algorithm, u8), Vec<DigestId>> = BTreeMap::new();
        for id in ids {
            let digest = self.tables.digests.get(id);
            shards.entry((digest.algorithm(), digest.as_bytes()[0])).or_default().push(id);
        }
        let shards: Vec<((Algorithm, u8), Vec<DigestId>)> = shards.into_iter().collect();
        let whole = &*self;
        let start = || (whole.part(), Vec::new());
        let parts = spread(self.tables.threads, &shards, start, |(part, read), (shard, ids)| {
            let path = layout::blob_shard(shard.0, &format!("{:02x}", shard.1));
            match part.store.directory(&path) {
                Ok(mut directory) => {
                    let mut manifest = |id| Arc::new(part.manifest(&mut *directory, &path, id));
                    read.extend(ids.iter().map(|id| (*id, manifest(*id))));
                }
                Err(e) => {
                    if !e.is_damage() {
                        part.failed(&path, &e, Effect::StopsSweep);
                    }
                    let damaged = || Arc::new(Manifest::Damaged { reason: e.to_string() });
                    read.extend(ids.iter().map(|id| (*id, damaged())));
                }
            }
        });
        let mut all = Vec::new();
        for (part, read) in parts {
            self.absorb(part);
            all.push(read);
        }
        all
    }

    fn manifest(&mut self, directory: &mut dyn Directory, shard: &Path, id: DigestId) -> Manifest {
        let digest = self.tables.digests.get(id);
        let name = layout::blob_data_in_shard(&digest);
        let bytes = match directory.read(Path::new(&name), manifest::MAX_SIZE, false) {
            Ok(Some((bytes, _))) => bytes,
            Ok(None) => return Manifest::Missing,
            Err(e) => {
                if !e.is_damage() {
                    self.failed(&shard.join(&name), &e, Effect::StopsSweep);
                }
                return Manifest::Damaged { reason: e.to_string() };
            }
        };
        let full = || self.store.full(&shard.join(&name));
        if Digest::of(digest.algorithm(), bytes) != digest {
            return Manifest::Damaged { reason: format!("{} does not match its digest", full().printable()) };
        }
        match manifest::parse(bytes) {
            Ok(manifest) => Manifest::Parsed(Parsed::new(&manifest, bytes.len(), self.tables)),
            Err(e) => Manifest::Damaged { reason: format!("{} is no manifest: {}", full().printable(), e.0) },
        }
    }

    /// Notes damaged, missing and odd manifests, and what their repositories keep because of them.
    fn note_manifests(&mut self, manifests: &Manifests) {
        for (id, manifest) in manifests {
            let path = || layout::blob_data(&self.tables.digests.get(*id));
            match &**manifest {
                Manifest::Parsed(parsed) if parsed.odd().is_some() => {
                    let (path, why) = (path(), parsed.odd().unwrap_or_default());
                    let what = format!("{}: {why}", self.store.full(&path).printable());
                    self.note(&path, what, Effect::KeepsNamed);
                }
                Manifest::Parsed(parsed) if parsed.kind == manifest::Kind::Schema1 => {
                    let path = path();
                    let what = format!(
                        "{} is a schema 1 manifest, which newer registries do not serve",
                        self.store.full(&path).printable()
                    );
                    self.note(&path, what, Effect::KeepsNamed);
                }
                Manifest::Parsed(_) | Manifest::Damaged { .. } | Manifest::Missing => {}
            }
        }
        let unclear: HashSet<DigestId> = manifests
            .iter()
            .filter(|(_, m)| matches!(***m, Manifest::Damaged { .. }))
            .map(|(id, _)| *id)
            .collect();
        let names: Vec<PathBuf> = self.repositories.keys().cloned().collect();
        for name in names {
            self.judge(&name, manifests, &unclear);
        }
    }

    /// Raises what a repository keeps where one of its manifests is damaged or missing, or has old signatures.
    fn judge(&mut self, name: &Path, manifests: &Manifests, unclear: &HashSet<DigestId>) {
        let Some(repository) = self.repositories.get(name) else { return };
        let everything = Effect::KeepsEverything(name.to_path_buf());
        let targets: Vec<DigestId> =
            repository.revisions.iter().map(|r| r.target).chain(repository.held.iter().copied()).collect();
        let mut found: Vec<(DigestId, String)> = Vec::new();
        let mut schema1: Vec<DigestId> = Vec::new();
        for revision in &repository.revisions {
            match manifests.get(&revision.target).map(|m| &**m) {
                Some(Manifest::Missing) => {
                    let full = self.store.full(&layout::blob_data(&self.tables.digests.get(revision.target)));
                    let what = format!(
                        "{} is missing: {} has a manifest without bytes",
                        full.printable(),
                        name.printable()
                    );
                    found.push((revision.target, what));
                }
                Some(Manifest::Parsed(parsed)) if parsed.kind == manifest::Kind::Schema1 => {
                    schema1.push(revision.digest);
                }
                _ => {}
            }
        }
        if !unclear.is_empty() {
            for id in closure(manifests, targets) {
                if let Some(Manifest::Damaged { reason }) = manifests.get(&id).map(|m| &**m) {
                    found.push((id, reason.clone()));
                }
            }
        }
        for (id, what) in found {
            self.note(&layout::blob_data(&self.tables.digests.get(id)), what, everything.clone());
            self.raise(name, Keeps::Everything);
        }
        for id in schema1 {
            self.signatures(name, id);
        }
    }

    /// Blobs that registries before 2.5 wrote beside a schema 1 manifest.
    fn signatures(&mut self, name: &Path, id: DigestId) {
        let digest = self.tables.digests.get(id);
        for algorithm in Algorithm::ALL {
            let path = layout::signatures(name, &digest, algorithm);
            for hex in self.directories(&path, Effect::StopsSweep) {
                let signature = Digest::from_parts(algorithm.name(), hex.to_str().unwrap_or(""));
                let signature = signature.map(|d| self.tables.digests.intern(&d));
                if let Some(repository) = self.repositories.get_mut(name) {
                    repository.held.extend(signature);
                }
            }
        }
    }

    fn raise(&mut self, name: &Path, keeps: Keeps) {
        if let Some(repository) = self.repositories.get_mut(name) {
            repository.keeps = repository.keeps.max(keeps);
        }
    }
}

/// Everything that the manifests in `from` lead to.
fn closure(manifests: &Manifests, from: Vec<DigestId>) -> HashSet<DigestId> {
    let mut seen: HashSet<DigestId> = from.iter().copied().collect();
    let mut waiting = from;
    while let Some(id) = waiting.pop() {
        let Some(Manifest::Parsed(parsed)) = manifests.get(&id).map(|m| &**m) else { continue };
        waiting
            .extend(parsed.references().into_iter().filter(|r| manifests.contains_key(r) && seen.insert(*r)));
    }
    seen
}
