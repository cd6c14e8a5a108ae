//! What a sweep relies on that takes all at once because no registry can write: that it is so until the end.
//!
//! Three times it is looked whether a registry runs by now ([`Gate::look_again`]): right before anything is taken, before
//! bytes are freed, and after that. And what two looks at the storage find is compared: whoever pushes writes something
//! that was not there.
//!
//! # Why that is enough
//! An image is lost only if a registry says of a blob that it is there, the blob goes, and the image is then pushed on that
//! word. A registry that begins after all was taken finds nothing of it, so it can't say so. One that began before still runs
//! when it is looked before bytes are freed, or what it remembered is gone with it. Then nothing is freed, and all that was
//! taken goes back, so that whoever was told "exists" is right.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::guard::gate::Gate;
use crate::catalog::Catalog;
use crate::error::{Error, Result};
use crate::layout;
use crate::printable::Printable;

/// Fails if somebody wrote to the storage between two looks, as far as they tell, while a witness of `gate` says that
/// nobody can.
pub(super) fn is_unwritten(gate: &Gate, before: &Catalog, after: &Catalog) -> Result<()> {
    match written(before, after).filter(|_| gate.has_witness()) {
        None => Ok(()),
        Some(path) => Err(came(&path)),
    }
}

/// Somebody wrote `path`.
pub(super) fn came(path: &Path) -> Error {
    Error::invalid(format!(
        "{} was written meanwhile, so a registry may run although none was seen; stop it, then run this again",
        path.printable()
    ))
}

/// Something that `after` has and `before` has not, or that is newer there.
fn written(before: &Catalog, after: &Catalog) -> Option<PathBuf> {
    let tables = &after.tables;
    for (name, repository) in &after.repositories {
        let Some(old) = before.repositories.get(name) else { return Some(layout::repository(name)) };
        if Arc::ptr_eq(old, repository) {
            continue;
        }
        if let Some(upload) = repository.uploads.iter().find(|upload| !old.uploads.contains(upload)) {
            return Some(layout::repository(name).join(layout::UPLOADS).join(&*tables.names.get(*upload)));
        }
        if let Some(revision) = repository.revisions.iter().find(|revision| !old.revisions.contains(revision))
        {
            return Some(layout::revision_link(name, &tables.digests.get(revision.digest)));
        }
        if let Some(tag) = repository.tags.iter().find(|tag| !old.tags.contains(tag)) {
            return Some(layout::tag_link(name, &tables.names.get(tag.name)));
        }
        if let Some(layer) = repository.layers.iter().find(|layer| old.layers.binary_search(layer).is_err()) {
            return Some(layout::layer_link(name, &tables.digests.get(*layer)));
        }
    }
    let blob = after.blobs.iter().find(|id| !before.has_blob(**id))?;
    Some(layout::blob_data(&tables.digests.get(*blob)))
}
