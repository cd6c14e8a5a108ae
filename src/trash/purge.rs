//! Purge: the bytes of a transaction are gone for good.
//!
//! # Rules kept here
//! 1. What a transaction that stays could bring back by undo is not purged: blobs, links and revisions that its tags
//!    and manifests name remain in theirs until it goes, too. A manifest there that can't be read protects everything.
//! 2. Order, over all transactions: tags, revisions, layer links, blobs, with a sync between; a tag's history before
//!    the tag, and the description last. So an undo after a crash in between gives back a valid registry.
//! 3. A transaction of which something can't be removed stays, and with it what its undo needs.
//!
//! The caller has given back what live manifests name ([`crate::gc::guard`]) and holds the lock.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::undo::Needs;
use super::{Contents, contents, find, order_of_return, remove_all};
use bytesize::ByteSize;

use crate::error::{Error, Result, count};
use crate::layout::{self, Kind};
use crate::printable::Printable;
use crate::progress::Progress;
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
    /// What was given back before, because it is in use again.
    pub restored: Vec<PathBuf>,
    /// What could not be removed.
    pub failures: Vec<Error>,
}

impl Purged {
    /// Whether all that was selected is gone.
    pub fn is_complete(&self) -> bool {
        self.failures.is_empty() && self.kept.is_empty()
    }

    /// What was done, for people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for path in &self.restored {
            text += &format!("given back: {} is in use again\n", path.printable());
        }
        for failure in &self.failures {
            text += &format!("failed: {failure}\n");
        }
        for kept in &self.kept {
            text += &format!("kept {}\n", kept.printable());
        }
        for id in &self.transactions {
            text += &format!("purged {}\n", id.printable());
        }
        if self.transactions.is_empty() && self.is_complete() {
            return text + "nothing in the trash matches, so nothing was purged\n";
        }
        let freed = ByteSize::b(self.bytes);
        text + &format!("freed {freed} from {}\n", count(self.transactions.len(), "transaction"))
    }
}

/// How many files are removed between two steps of the progress.
const AT_ONCE: usize = 1000;

/// Purges the transactions `ids`.
pub fn purge(store: &dyn Store, ids: &[String], progress: &dyn Progress) -> Result<Purged> {
    let all = contents(store)?;
    let mut doomed = Vec::new();
    for id in ids {
        doomed.push(find(&all, id)?);
    }
    let (mut staying, mut unclear) = (Staying::default(), None);
    for transaction in all.iter().filter(|t| !ids.contains(&t.id)) {
        if staying.add(store, &all, transaction)? {
            unclear = Some(&transaction.id);
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
    let mut doomed: Vec<Doomed<'_>> = doomed.into_iter().map(Doomed::new).collect();
    progress.phase("purge", doomed.iter().map(|d| d.contents.files.len()).sum());
    for step in STEPS {
        if remove_step(store, step, &mut doomed, &mut staying, &mut purged, progress)? {
            // The next step relies on this one being done for good.
            store.sync()?;
        }
    }
    for transaction in &doomed {
        transaction.finish(store, &mut purged)?;
    }
    store.remove_directory(Path::new(layout::TRASH))?;
    store.sync()?;
    Ok(purged)
}

/// What stays in the trash.
#[derive(Default)]
struct Staying {
    /// What its undo needs.
    needs: BTreeSet<PathBuf>,
    /// What lies in it.
    files: BTreeSet<PathBuf>,
}

impl Staying {
    /// Notes what a transaction holds and needs; whether that is unclear.
    fn add(&mut self, store: &dyn Store, all: &[Contents], transaction: &Contents) -> Result<bool> {
        let needs = Needs::of(store, all, transaction)?;
        self.needs.extend(needs.paths);
        self.files.extend(transaction.files.iter().cloned());
        Ok(needs.is_unclear)
    }

    /// Whether a file of a transaction that goes must stay: it is needed, and nowhere else.
    fn needs(&self, store: &dyn Store, path: &Path) -> Result<bool> {
        Ok(self.needs.contains(path) && !self.files.contains(path) && store.stat(path)?.is_none())
    }
}

/// The steps of a purge; see [`step_of`].
const STEPS: std::ops::RangeInclusive<u8> = 0..=5;

/// When a file goes: what leads to it goes before it does.
fn step_of(contents: &Contents, path: &Path) -> u8 {
    let unit = contents.unit_of(path);
    match layout::classify(unit) {
        Kind::Tag(repository, tag) if path != layout::tag_link(&repository, &tag) => 0,
        _ => 5 - order_of_return(unit),
    }
}

/// Removes the part of each transaction that belongs to `step`; whether there was any.
fn remove_step(
    store: &dyn Store,
    step: u8,
    doomed: &mut [Doomed<'_>],
    staying: &mut Staying,
    purged: &mut Purged,
    progress: &dyn Progress,
) -> Result<bool> {
    let failures_before = purged.failures.len();
    let mut has_removed = false;
    for transaction in doomed.iter_mut().filter(|t| !t.is_stuck) {
        has_removed |= transaction.remove(store, step, staying, purged, progress)?;
    }
    if purged.failures.len() > failures_before {
        let all = contents(store)?;
        let mut is_unclear = false;
        for stuck in doomed.iter().filter(|t| t.is_stuck) {
            is_unclear |= staying.add(store, &all, find(&all, &stuck.contents.id)?)?;
        }
        doomed.iter_mut().for_each(|t| t.is_stuck |= is_unclear);
    }
    Ok(has_removed)
}

/// A transaction that is being purged.
struct Doomed<'a> {
    contents: &'a Contents,
    /// How many of its files stay, because the undo of another one needs them.
    kept: usize,
    /// Something of it could not be removed, so nothing more is.
    is_stuck: bool,
}

impl<'a> Doomed<'a> {
    fn new(contents: &'a Contents) -> Doomed<'a> {
        Doomed { contents, kept: 0, is_stuck: false }
    }

    fn remove(
        &mut self,
        store: &dyn Store,
        step: u8,
        staying: &Staying,
        purged: &mut Purged,
        progress: &dyn Progress,
    ) -> Result<bool> {
        let mut gone = Vec::new();
        for path in self.contents.files.iter().filter(|path| step_of(self.contents, path) == step) {
            if staying.needs(store, path)? {
                self.kept += 1;
                continue;
            }
            gone.push(self.contents.path_of(path));
        }
        for some in gone.chunks(AT_ONCE) {
            let mut bytes = 0;
            for path in some {
                match store.stat(path) {
                    Ok(stat) => bytes += stat.map_or(0, |s| s.size),
                    // Only counting: the removal below meets what is wrong and reports it.
                    Err(e) => log::debug!("{e}"),
                }
            }
            let failures = remove_all(store, some);
            match failures.is_empty() {
                true => purged.bytes += bytes,
                false => self.is_stuck = true,
            }
            purged.failures.extend(failures);
            progress.step(some.len());
            progress.bytes(bytes);
        }
        Ok(!gone.is_empty())
    }

    fn finish(&self, store: &dyn Store, purged: &mut Purged) -> Result<()> {
        let id = &self.contents.id;
        store.prune(&layout::transaction(id))?;
        if self.is_stuck {
            return Ok(());
        }
        if self.kept == 0 {
            self.contents.end_stage(store)?;
            self.contents.discard_if_empty(store)?;
            purged.transactions.push(id.clone());
        } else {
            let what = count(self.kept, "file");
            purged.kept.push(format!("{id}: {what} stay, the undo of another transaction needs them"));
        }
        Ok(())
    }
}

/// The transactions whose undo needs bytes that lie in transaction `id` and nowhere else.
pub fn undone_only_with(store: &dyn Store, id: &str) -> Result<Vec<String>> {
    let all = contents(store)?;
    let (own, others): (Vec<&Contents>, Vec<&Contents>) = all.iter().partition(|t| t.id == id);
    let is_only_here = |path: &Path| -> Result<bool> {
        Ok(matches!(layout::classify(path), Kind::Blob(_))
            && own.iter().any(|t| t.holds(path))
            && !others.iter().any(|t| t.holds(path))
            && store.stat(path)?.is_none())
    };
    let mut dependent = Vec::new();
    for transaction in &others {
        for path in Needs::of(store, &all, transaction)?.paths {
            if is_only_here(&path)? {
                dependent.push(transaction.id.clone());
                break;
            }
        }
    }
    Ok(dependent)
}
