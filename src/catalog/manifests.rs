//! The part of a scan that reads manifests, and says what their repositories keep because of damage in them.
//!
//! # Rules kept here
//! 1. Bytes are verified against their digest before they are parsed; what was parsed once is never read again.
//! 2. A damaged manifest keeps everything linked in each repository that leads to it; so does one whose bytes are
//!    gone, in the repositories that have it.
//! 3. A child of an index that is not there is a normal state: images are pushed with some platforms left out.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::intern::{DigestId, IdSet};
use super::scan::Scan;
use super::{Descriptor, Effect, Keeps, Manifest, Manifests, Parsed};
use crate::digest::{Algorithm, Digest};
use crate::{layout, manifest};

impl Scan<'_> {
    /// Reads every manifest that a revision, a tag or an index names.
    pub(super) fn manifests(&mut self, present: &IdSet) -> Manifests {
        let mut manifests: Manifests = HashMap::new();
        let mut waiting: Vec<DigestId> = Vec::new();
        for repository in self.repositories.values() {
            waiting.extend(repository.revisions.iter().flat_map(|r| [r.digest, r.target]));
            waiting.extend(repository.tags.iter().filter_map(|t| t.target));
        }
        while let Some(id) = waiting.pop() {
            if manifests.contains_key(&id) {
                continue;
            }
            let known = self.previous.and_then(|p| p.manifests.get(&id)).filter(|m| m.parsed().is_some());
            let manifest = match known.filter(|_| present.contains(id)) {
                Some(known) => known.clone(),
                None => Arc::new(self.manifest(id)),
            };
            if let Manifest::Parsed(parsed) = &*manifest {
                // An index may name things that are no manifests; those are blobs to keep, not to parse.
                let is_manifest = |d: &&Descriptor| {
                    let media_type = self.tables.names.get(d.media_type);
                    media_type.is_empty() || media_type.to_str().is_some_and(manifest::is_manifest_type)
                };
                waiting.extend(parsed.children.iter().filter(is_manifest).map(|d| d.digest));
            }
            manifests.insert(id, manifest);
        }
        self.note_manifests(&manifests);
        manifests
    }

    fn manifest(&mut self, id: DigestId) -> Manifest {
        let digest = self.tables.digests.get(id);
        let path = layout::blob_data(&digest);
        let bytes = match self.store.read(&path, manifest::MAX_SIZE) {
            Ok(Some((bytes, _))) => bytes,
            Ok(None) => return Manifest::Missing,
            Err(e) => {
                if !e.is_damage() {
                    self.failed(&path, &e, Effect::StopsSweep);
                }
                return Manifest::Damaged { reason: e.to_string() };
            }
        };
        let full = self.store.full(&path);
        if Digest::of(digest.algorithm(), &bytes) != digest {
            return Manifest::Damaged { reason: format!("{} does not match its digest", full.display()) };
        }
        match manifest::parse(&bytes) {
            Ok(manifest) => Manifest::Parsed(self.numbered(manifest, bytes.len())),
            Err(e) => Manifest::Damaged { reason: format!("{} is no manifest: {}", full.display(), e.0) },
        }
    }

    fn numbered(&self, manifest: manifest::Manifest, size: usize) -> Parsed {
        let digest = |d: &Digest| self.tables.digests.intern(d);
        let name = |name: &str| self.tables.names.intern(OsStr::new(name));
        let descriptor = |d: &manifest::Descriptor| Descriptor {
            digest: digest(&d.digest),
            size: d.size,
            media_type: name(&d.media_type),
            platform: d.platform.as_deref().map(name),
        };
        Parsed {
            kind: manifest.kind,
            media_type: name(&manifest.media_type),
            artifact_type: manifest.artifact_type.as_deref().map(name),
            size: size as u64,
            config: manifest.config.as_ref().map(descriptor),
            layers: manifest.layers.iter().map(descriptor).collect(),
            children: manifest.children.iter().map(descriptor).collect(),
            subject: manifest.subject.as_ref().map(digest),
            others: manifest.others.iter().map(digest).collect(),
            odd: manifest.odd.map(Into::into),
        }
    }

    /// Notes damaged, missing and odd manifests, and what their repositories keep because of them.
    fn note_manifests(&mut self, manifests: &Manifests) {
        for (id, manifest) in manifests {
            let path = layout::blob_data(&self.tables.digests.get(*id));
            match &**manifest {
                Manifest::Parsed(Parsed { odd: Some(why), .. }) => {
                    let what = format!("{}: {why}", self.store.full(&path).display());
                    self.note(&path, what, Effect::KeepsNamed);
                }
                Manifest::Parsed(parsed) if parsed.kind == manifest::Kind::Schema1 => {
                    let what = format!(
                        "{} is a schema 1 manifest, which newer registries do not serve",
                        self.store.full(&path).display()
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
                        full.display(),
                        name.display()
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
