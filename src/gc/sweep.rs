//! Sweep: moves what a plan says into a transaction of the trash.
//!
//! Goes on after a failure and reports each one; what was moved by then can be undone or purged like the rest. What a
//! manifest or a link that could not be moved leads to stays, so that neither is left without its bytes.

use std::path::Path;

use super::plan::{Item, ItemKind, Plan};
use super::{Options, Progress};
use crate::catalog::Catalog;
use crate::catalog::intern::IdSet;
use crate::error::{Error, Result};
use crate::layout;
use crate::store::Store;
use crate::trash::{Author, Transaction};

/// What was taken.
#[derive(Default)]
pub struct Taken {
    /// The transaction; `None` when there was nothing to take.
    pub transaction: Option<String>,
    /// Which items of the plan, by their place in it.
    pub items: Vec<usize>,
    /// What could not be taken.
    pub failures: Vec<Error>,
}

/// Takes the items of `plan` in their order; fails only before the first change. `catalog` is what the plan was made of.
pub fn take(
    store: &dyn Store,
    catalog: &Catalog,
    plan: &Plan,
    options: &Options,
    author: &Author,
    progress: &dyn Progress,
) -> Result<Taken> {
    if plan.items.is_empty() {
        return Ok(Taken::default());
    }
    let transaction = Transaction::begin(store, "sweep", author, &reason(options))?;
    let mut taken = Taken { transaction: Some(transaction.id().to_string()), ..Taken::default() };
    progress.phase("take", plan.items.len());
    let mut last = None;
    let mut needed = IdSet::default();
    for (at, item) in plan.items.iter().enumerate() {
        if progress.is_stopped() {
            break;
        }
        // The next kind relies on the one before being gone for good: no link may outlive its blob in a crash.
        if last.is_some_and(|kind| kind != item.kind())
            && let Err(e) = store.sync()
        {
            taken.failures.push(e);
            break;
        }
        last = Some(item.kind());
        let id = item.digest();
        if id.is_some_and(|id| needed.contains(id)) {
            continue;
        }
        match take_one(store, &transaction, item, &item.path(&catalog.tables), options) {
            Ok(true) => taken.items.push(at),
            Ok(false) => {}
            Err(e) => {
                taken.failures.push(e);
                for below in id.into_iter().flat_map(|id| catalog.closure(id)) {
                    needed.insert(below);
                    for stored in catalog.aliases.get(&below).into_iter().flatten() {
                        needed.insert(*stored);
                    }
                }
            }
        }
        progress.step(1);
        progress.bytes(item.bytes);
    }
    if taken.items.is_empty() {
        // Everything was gone or failed: an empty transaction would only puzzle people.
        taken.failures.extend(transaction.discard_if_empty(store).err());
        taken.transaction = None;
    }
    taken.failures.extend(store.sync().err());
    Ok(taken)
}

fn take_one(
    store: &dyn Store,
    transaction: &Transaction,
    item: &Item,
    path: &Path,
    options: &Options,
) -> Result<bool> {
    let was_there = transaction.take(store, path)?;
    // Beside a live registry directories stay: it makes them, then renames into them. `now` says there is none.
    if options.now && item.kind() == ItemKind::Blob && was_there {
        store.prune(path.parent().unwrap_or(Path::new(layout::BLOBS)))?;
    }
    Ok(was_there)
}

fn reason(options: &Options) -> String {
    let untagged = if options.untagged { ", untagged manifests included" } else { "" };
    format!("garbage older than {}{untagged}", humantime::format_duration(options.grace))
}
