//! A catalog from the one before, by looking only where something changed.
//!
//! # Rules kept here
//! 1. The result is what a whole scan would give, but for manifests that nobody names any more: those stay known.
//! 2. Blobs come first, as in a scan: what a repository names is judged by the blobs there are.
//! 3. Where a change may be felt elsewhere (a manifest that comes or goes under the repositories that name it), or a
//!    call fails, there is no result: a whole scan tells.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::intern::DigestId;
use super::scan::{Scan, sort};
use super::{Catalog, Effect, Manifest, Repository};
use crate::layout;
use crate::store::Store;
use crate::watch::Changes;

/// From so many repositories on a whole scan is as quick.
const MANY: usize = 256;

/// Looks again at what `changes` names; `None` when only a whole scan can tell.
pub fn update(store: &dyn Store, previous: &Catalog, changes: &Changes) -> Option<Catalog> {
    if changes.everything || changes.repositories.len() + changes.namespaces.len() > MANY {
        return None;
    }
    let mut catalog = previous.clone();
    update_blobs(store, &mut catalog, changes)?;
    let mut names = changes.repositories.clone();
    let mut scan = Scan::new(store, &previous.tables, Some(previous));
    for place in &changes.namespaces {
        let is_below = |name: &PathBuf| name.starts_with(place);
        names.extend(catalog.repositories.keys().filter(|name| is_below(name)).cloned());
        catalog.namespaces.retain(|name| !is_below(name));
        let below = layout::repository(place);
        catalog.problems.retain(|p| !p.path.starts_with(&below));
        if store.list(&below).ok()?.is_some() {
            let mut found = Vec::new();
            scan.namespace(place, layout::is_name(place), &mut found);
            names.extend(found.into_iter().map(|(name, _)| name));
        }
    }
    catalog.namespaces.append(&mut scan.namespaces);
    Some(look_again(store, catalog, &names, scan))
}

/// Looks at one repository again; everything else is as in `previous`.
pub fn rescan(store: &dyn Store, previous: &Catalog, name: &Path) -> Catalog {
    let scan = Scan::new(store, &previous.tables, Some(previous));
    look_again(store, previous.clone(), &BTreeSet::from([name.to_path_buf()]), scan)
}

/// Takes the blobs that came or went into account.
fn update_blobs(store: &dyn Store, catalog: &mut Catalog, changes: &Changes) -> Option<()> {
    let (mut come, mut gone): (Vec<DigestId>, BTreeSet<DigestId>) = Default::default();
    for digest in &changes.blobs {
        let is_there = store.list(&layout::blob_dir(digest)).ok()?.is_some();
        let id = match (catalog.tables.digests.find(digest), is_there) {
            (Some(id), _) => id,
            (None, true) => catalog.tables.digests.intern(digest),
            (None, false) => continue,
        };
        let was_there = catalog.has_blob(id);
        // What it says, or that it is gone, changes what the repositories keep that name it.
        let is_news = |m: &Arc<Manifest>| m.parsed().is_none() || is_there != was_there;
        if catalog.manifests.get(&id).is_some_and(is_news) {
            return None;
        }
        match (was_there, is_there) {
            (false, true) => come.push(id),
            (true, false) => drop(gone.insert(id)),
            _ => {}
        }
    }
    if come.is_empty() && gone.is_empty() {
        return Some(());
    }
    let tables = &catalog.tables;
    let key = |id: &DigestId| {
        let digest = tables.digests.get(*id);
        (digest.algorithm(), digest.as_bytes().first().copied(), *id)
    };
    come.sort_unstable_by_key(key);
    // Both are in order: a look at each new one's place is cheaper than asking every blob for its digest.
    let mut blobs = Vec::with_capacity(catalog.blobs.len() + come.len());
    let mut rest = &catalog.blobs[..];
    for id in &come {
        let (before, after) = rest.split_at(rest.partition_point(|other| key(other) < key(id)));
        blobs.extend_from_slice(before);
        blobs.push(*id);
        rest = after;
    }
    blobs.extend_from_slice(rest);
    blobs.retain(|id| !gone.contains(id));
    let present = Arc::make_mut(&mut catalog.present);
    present.extend(&come);
    gone.iter().for_each(|id| present.remove(*id));
    catalog.blobs = blobs.into();
    Some(())
}

/// Looks again at the repositories `names`; what is nowhere any more goes. What fails is noted as a problem.
fn look_again(
    store: &dyn Store,
    mut catalog: Catalog,
    names: &BTreeSet<PathBuf>,
    mut scan: Scan<'_>,
) -> Catalog {
    let own = [layout::MANIFESTS, layout::LAYERS, layout::UPLOADS];
    for name in names {
        let place = layout::repository(name);
        let entries = match store.list(&place) {
            Ok(Some(entries)) => entries,
            Ok(None) => {
                catalog.namespaces.remove(name);
                Vec::new()
            }
            Err(e) => {
                scan.failed(&place, &e, Effect::StopsSweep);
                Vec::new()
            }
        };
        if entries.iter().any(|e| own.iter().any(|own| e.name == *own)) {
            scan.repository(name, layout::is_name(name));
        }
    }
    let manifests = scan.manifests(&catalog.present);
    let Scan { problems, aliases, mut repositories, .. } = scan;
    for name in names {
        let known = catalog.repositories.get(name);
        let same = |found: &Repository| known.filter(|known| ***known == *found).cloned();
        match repositories.remove(name) {
            // The same one as before, where it says the same.
            Some(found) => {
                let shared = same(&found).unwrap_or_else(|| Arc::new(found));
                catalog.repositories.insert(name.clone(), shared);
            }
            None => drop(catalog.repositories.remove(name)),
        }
    }
    let is_news = |(id, m): (&DigestId, &Arc<Manifest>)| {
        catalog.manifests.get(id).is_none_or(|known| !known.says_the_same_as(m))
    };
    if manifests.iter().any(is_news) {
        Arc::make_mut(&mut catalog.manifests).extend(manifests);
    }
    if aliases.iter().any(|(id, targets)| catalog.aliases.get(id) != Some(targets)) {
        Arc::make_mut(&mut catalog.aliases).extend(aliases);
    }
    let parts: Vec<PathBuf> =
        names.iter().flat_map(|name| own.map(|part| layout::repository(name).join(part))).collect();
    catalog.problems.retain(|p| !parts.iter().any(|part| p.path.starts_with(part)));
    catalog.problems.extend(problems);
    sort(&mut catalog.problems);
    catalog
}
