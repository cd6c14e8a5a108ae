//! Which manifests and tags go, because a rule says so. Pure.

use std::path::Path;

use super::{Policy, YoungManifest};
use crate::catalog::Catalog;
use crate::catalog::intern::{DigestId, IdSet, NameId};
use crate::gc::mark::{self, Untagged};
use crate::gc::orphans::{self, Orphans};

/// Manifests and tags that go.
#[derive(Default)]
pub struct Going {
    pub(super) untagged: Untagged,
    pub(super) orphans: Orphans,
    /// All revisions of the two.
    pub(super) revisions: Untagged,
}

impl Going {
    /// Decides which go.
    pub fn of(catalog: &Catalog, policy: &Policy) -> Going {
        let mut untagged = match policy.options.untagged {
            true => mark::untagged(catalog, &|revision| policy.is_young_manifest(revision)),
            false => Untagged::new(),
        };
        untagged.retain(|name, _| policy.includes(name));
        let orphans = match policy.options.orphans {
            true => orphans::orphans(catalog, policy),
            false => Orphans::default(),
        };
        let mut revisions = untagged.clone();
        for (name, orphaned) in &orphans.revisions {
            let all = revisions.entry(name.clone()).or_default();
            all.extend(orphaned);
            all.sort_unstable();
            all.dedup();
        }
        Going { untagged, orphans, revisions }
    }

    /// Manifests that no tag leads to and that stay because they are young, or because such a one holds them.
    pub(super) fn young_manifests(&self, catalog: &Catalog, policy: &Policy) -> Vec<YoungManifest> {
        let mut all = catalog.repositories.values().flat_map(|repository| &repository.revisions);
        if !policy.options.untagged || !all.any(|revision| policy.is_young_manifest(revision)) {
            return Vec::new();
        }
        let mut found = Vec::new();
        let names = &catalog.tables.names;
        for (name, untagged) in mark::untagged(catalog, &|_| false) {
            let (Some(repository), true) = (catalog.repository(&name), policy.includes(&name)) else {
                continue;
            };
            let going: IdSet = self.revisions_of(&name).iter().copied().collect();
            for digest in untagged.into_iter().filter(|id| !going.contains(*id)) {
                let revision = repository.revision(digest).filter(|r| policy.is_young_manifest(r));
                let eligible_at =
                    revision.and_then(|r| r.version.last_change()?.checked_add(policy.untagged_age()));
                found.push(YoungManifest { repository: names.intern(name.as_os_str()), digest, eligible_at });
            }
        }
        found
    }

    /// The manifests of a repository that go.
    pub fn revisions_of(&self, repository: &Path) -> &[DigestId] {
        self.revisions.get(repository).map_or(&[], Vec::as_slice)
    }

    /// The tags of a repository that go.
    pub fn tags_of(&self, repository: NameId) -> impl Iterator<Item = NameId> {
        self.orphans.tags.iter().filter(move |(name, ..)| *name == repository).map(|(_, tag, _)| *tag)
    }
}
