//! Orphans: signatures, attestations and SBOMs of images that are gone.
//!
//! A referrer lives as long as its subject does in that repository. Some are manifests with a `subject`; others hang
//! on a tag that spells the digest of what they are about (`sha256-<hex>`, `sha256-<hex>.sig`, `.att`, `.sbom`), which
//! stays when that is deleted, and keeps all that it leads to.
//!
//! # Rules kept here
//! 1. A subject counts as there while the repository has it as a revision, or a tag or a manifest of it names it; that
//!    of a tag also while any other repository has it.
//! 2. A manifest that another tag or a manifest that stays leads to is no orphan.
//! 3. A tag younger than the grace period, or of a manifest that is, stays.
//! 4. What is about an orphan becomes one in the run after.

use std::collections::HashSet;
use std::sync::Arc;

use super::mark::{self, Untagged};
use super::plan::Policy;
use crate::catalog::intern::{DigestId, IdSet, NameId};
use crate::catalog::{Catalog, Keeps, Repository, Revision, Tag};
use crate::layout;
use crate::manifest::Kind;

/// What is about something that is gone.
#[derive(Default)]
pub(super) struct Orphans {
    /// Repository, tag, and what it points at.
    pub(super) tags: Vec<(NameId, NameId, DigestId)>,
    /// Manifests, by repository.
    pub(super) revisions: Untagged,
}

/// Finds them in the repositories that `policy` includes.
pub(super) fn orphans(catalog: &Catalog, policy: &Policy) -> Orphans {
    let mut found = Orphans::default();
    let repositories = catalog.repositories.values();
    let revisions = |r: &Arc<Repository>| r.revisions.iter().map(|r| r.digest).collect::<Vec<_>>();
    let anywhere: IdSet = repositories.flat_map(revisions).collect();
    for (name, repository) in &catalog.repositories {
        if repository.keeps != Keeps::Named || !policy.includes(name) {
            continue;
        }
        let look = Look::new(catalog, repository, policy, &anywhere);
        let tags: Vec<&Tag> = repository.tags.iter().filter(|tag| look.is_orphaned_tag(tag)).collect();
        let revisions = look.revisions(&tags);
        let id = catalog.tables.names.intern(name.as_os_str());
        found.tags.extend(tags.iter().filter_map(|tag| Some((id, tag.name, tag.target?))));
        if !revisions.is_empty() {
            found.revisions.insert(name.clone(), revisions);
        }
    }
    found
}

struct Look<'a> {
    catalog: &'a Catalog,
    repository: &'a Repository,
    policy: &'a Policy,
    /// The manifests there are, what tags point at and what manifests name.
    known: HashSet<DigestId>,
    /// The manifests of all repositories: cosign can keep the signatures of one repository in another.
    anywhere: &'a IdSet,
}

impl<'a> Look<'a> {
    fn new(
        catalog: &'a Catalog,
        repository: &'a Repository,
        policy: &'a Policy,
        anywhere: &'a IdSet,
    ) -> Look<'a> {
        let mut known: HashSet<DigestId> = repository.tags.iter().filter_map(|t| t.target).collect();
        for revision in &repository.revisions {
            known.insert(revision.digest);
            known.extend(catalog.closure(revision.target));
        }
        Look { catalog, repository, policy, known, anywhere }
    }

    fn is_gone(&self, subject: DigestId) -> bool {
        !self.known.contains(&subject)
    }

    fn is_old_revision(&self, id: DigestId) -> bool {
        let revision = self.repository.revision(id);
        revision.is_none_or(|r| r.version.last_change().is_some_and(|time| !self.policy.is_young(time)))
    }

    fn is_orphaned_tag(&self, tag: &Tag) -> bool {
        let name = self.catalog.name(tag.name);
        let Some(subject) = name.to_str().and_then(layout::subject_of_tag) else { return false };
        let subject = self.catalog.tables.digests.find(&subject);
        let is_gone = subject.is_none_or(|id| self.is_gone(id) && !self.anywhere.contains(id));
        let is_old = tag.version.last_change().is_some_and(|time| !self.policy.is_young(time));
        // Without a suffix it is a list of referrers only if it is an index: mirrors give such names to images, too.
        let is_list = |target| self.catalog.parsed(target).is_some_and(|m| m.kind == Kind::Index);
        let is_about = |target| name.as_encoded_bytes().contains(&b'.') || is_list(target);
        is_gone && is_old && tag.target.is_some_and(|t| self.is_old_revision(t) && is_about(t))
    }

    /// The manifests that go: those of `going` tags and those whose subject is gone, as far as nothing that stays
    /// leads to them.
    fn revisions(&self, going: &[&Tag]) -> Vec<DigestId> {
        let names: HashSet<NameId> = going.iter().map(|t| t.name).collect();
        let stays = |tag: &&Tag| !names.contains(&tag.name);
        let staying: HashSet<DigestId> =
            self.repository.tags.iter().filter(stays).filter_map(|t| t.target).collect();
        let of_tags: HashSet<DigestId> = going.iter().filter_map(|t| t.target).collect();
        let about_nothing = |target: DigestId| {
            self.catalog.parsed(target).and_then(|m| m.subject()).is_some_and(|subject| self.is_gone(subject))
        };
        let is_candidate = |digest: DigestId, target: DigestId| {
            !staying.contains(&digest)
                && self.is_old_revision(digest)
                && (of_tags.contains(&digest) || about_nothing(target))
        };
        let revisions = &self.repository.revisions;
        let (candidates, others): (Vec<&Revision>, Vec<&Revision>) =
            revisions.iter().partition(|r| is_candidate(r.digest, r.target));
        if candidates.is_empty() {
            return Vec::new();
        }
        let mut roots: Vec<DigestId> = staying.into_iter().collect();
        roots.extend(others.iter().flat_map(|r| [r.digest, r.target]));
        let of_going = |id: &&DigestId| !of_tags.contains(*id);
        roots.extend(self.repository.held.iter().filter(of_going));
        let live = mark::live_in(self.catalog, self.repository, roots);
        let is_dead = |r: &&Revision| !live.contains(r.digest) && !live.contains(r.target);
        candidates.into_iter().filter(is_dead).map(|r| r.digest).collect()
    }
}
