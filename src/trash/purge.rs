//! Purge: the bytes of a transaction are gone for good.
//!
//! # Rules kept here
//! 1. What a transaction that stays could bring back by undo is not purged: blobs, links and revisions that its tags
//!    and manifests name remain in theirs until it goes, too. A manifest there that can't be read protects everything.
//! 2. Order: tags, revisions, layer links, blobs, and the description last, so that an undo after a crash in
//!    between gives back a valid registry.
//!
//! The caller has given back what live manifests name ([`crate::gc::guard`]) and holds the lock.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::undo::{claims, named_by};
use super::{Contents, contents, find, order_of_return};
use bytesize::ByteSize;

use crate::digest::Digest;
use crate::error::{Error, Result, count};
use crate::layout::{self, Kind};
use crate::store::Store;

/// What a purge did.
#[derive(Debug, Default)]
pub struct Purged {
    /// Transactions that are gone.
    pub transactions: Vec<String>,
    /// Transactions of which something stays, and why.
    pub kept: Vec<String>,
    /// Bytes freed.
    pub bytes: u64,
    /// What could not be removed.
    pub failures: Vec<Error>,
}

impl Purged {
    /// What was done, for people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for failure in &self.failures {
            text += &format!("failed: {failure}\n");
        }
        for kept in &self.kept {
            text += &format!("kept {kept}\n");
        }
        for id in &self.transactions {
            text += &format!("purged {id}\n");
        }
        let freed = ByteSize::b(self.bytes);
        text + &format!("freed {freed} from {}\n", count(self.transactions.len(), "transaction"))
    }
}

/// Purges the transactions `ids`.
pub fn purge(store: &dyn Store, ids: &[String]) -> Result<Purged> {
    let all = contents(store)?;
    let mut doomed = Vec::new();
    for id in ids {
        doomed.push(find(&all, id)?);
    }
    let staying = all.iter().filter(|t| !ids.contains(&t.id));
    let mut protected = Protected::default();
    let mut unclear = None;
    for transaction in staying {
        for (repository, digest) in claims(store, transaction)? {
            let named = named_by(store, &all, &repository, &digest)?;
            let own = |digest: &&Digest| {
                let link = layout::revision_link(&repository, digest);
                transaction.files.binary_search(&link).is_err()
            };
            let revisions = named.digests.iter().filter(own);
            protected.revisions.extend(revisions.map(|digest| (repository.clone(), *digest)));
            protected.contents.extend(named.digests);
            if named.is_unclear {
                unclear = Some(&transaction.id);
            }
        }
    }
    if let Some(id) = unclear {
        return Err(Error::Busy {
            why: format!(
                "transaction {id} holds a manifest that can't be read, so what its undo needs is unknown; purge {id} first"
            ),
        });
    }
    let mut purged = Purged::default();
    for transaction in doomed {
        purge_one(store, transaction, &protected, &mut purged)?;
    }
    store.sync()?;
    Ok(purged)
}

/// What the undo of transactions that stay needs.
#[derive(Default)]
struct Protected {
    /// Blobs and layer links.
    contents: BTreeSet<Digest>,
    /// Revisions that the transaction which needs them doesn't hold itself.
    revisions: BTreeSet<(PathBuf, Digest)>,
}

fn purge_one(
    store: &dyn Store,
    transaction: &Contents,
    protected: &Protected,
    purged: &mut Purged,
) -> Result<()> {
    let is_protected = |path: &PathBuf| match layout::classify(path) {
        Kind::Blob(digest) | Kind::LayerLink(_, digest) => protected.contents.contains(&digest),
        Kind::Revision(repository, digest) => protected.revisions.contains(&(repository, digest)),
        Kind::Tag(..) | Kind::Other => false,
    };
    let (kept, mut gone): (Vec<PathBuf>, Vec<PathBuf>) =
        transaction.files.iter().cloned().partition(is_protected);
    gone.sort_by_key(|path| std::cmp::Reverse(order_of_return(super::unit_of(path))));
    let mut bytes = 0;
    for path in &gone {
        match store.stat(&transaction.path_of(path)) {
            Ok(stat) => bytes += stat.map_or(0, |s| s.size),
            // Only counting: the removal below meets what is wrong and reports it.
            Err(e) => log::debug!("{e}"),
        }
    }
    let failures = store.remove(&gone.iter().map(|path| transaction.path_of(path)).collect::<Vec<_>>());
    let failed = !failures.is_empty();
    purged.failures.extend(failures);
    purged.bytes += bytes;
    store.prune(&layout::transaction(&transaction.id))?;
    if failed {
        return Ok(());
    }
    if kept.is_empty() {
        transaction.discard_if_empty(store)?;
        purged.transactions.push(transaction.id.clone());
    } else {
        let what = count(kept.len(), "file");
        purged
            .kept
            .push(format!("{}: {what} stay, the undo of another transaction needs them", transaction.id));
    }
    Ok(())
}

/// The transactions whose undo needs something that lies in transaction `id`.
pub fn undone_only_with(store: &dyn Store, id: &str) -> Result<Vec<String>> {
    let all = contents(store)?;
    let blobs = find(&all, id)?.files.iter().filter_map(|path| match layout::classify(path) {
        Kind::Blob(digest) => Some(digest),
        _ => None,
    });
    let blobs: BTreeSet<Digest> = blobs.collect();
    let mut dependent = Vec::new();
    for transaction in all.iter().filter(|t| t.id != id) {
        for (repository, digest) in claims(store, transaction)? {
            if !named_by(store, &all, &repository, &digest)?.digests.is_disjoint(&blobs) {
                dependent.push(transaction.id.clone());
                break;
            }
        }
    }
    Ok(dependent)
}
