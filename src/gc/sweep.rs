//! Sweep: moves what a plan says into a transaction of the trash.
//!
//! Order: repairs, tags, revisions, layer links, blobs, then the rest of the leftovers; empty directories last.
//! Goes on after a failure and reports each one; what was moved by then can be undone or purged like the rest. What a
//! manifest or a link that could not be moved leads to stays, so that neither is left without its bytes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::plan::{Item, ItemKind, Plan, What};
use super::repair::{self, Repair};
use super::{Options, Progress, leftovers};
use crate::catalog::Catalog;
use crate::catalog::intern::IdSet;
use crate::error::{Error, Result, count};
use crate::layout;
use crate::printable::Printable;
use crate::store::{Stat, Store, Version};
use crate::trash::{self, Author, Transaction};

/// What was taken.
#[derive(Default)]
pub struct Taken {
    /// The transaction; `None` when there was nothing to take.
    pub transaction: Option<String>,
    /// Which items of the plan, by their place in it.
    pub items: Vec<usize>,
    /// Which repairs of the plan were made, by their place in it.
    pub repaired: Vec<usize>,
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
    let needs_repair = options.repair && !plan.repairs.is_empty();
    if plan.items.is_empty() && !needs_repair {
        return Ok(Taken::default());
    }
    let replaces = needs_repair && plan.repairs.iter().any(Repair::replaces);
    let moves = replaces || plan.items.iter().any(|item| item.kind().is_moved());
    let transaction = match moves {
        true => Some(Transaction::begin(store, trash::SWEEP, author, &reason(options))?),
        false => None,
    };
    let mut taken = Taken::default();
    if needs_repair {
        repair_all(store, plan, transaction.as_ref(), progress, &mut taken);
    }
    let mut emptied = Emptied::default();
    if let Some(transaction) = &transaction {
        move_all(store, catalog, plan, transaction, progress, &mut taken, &mut emptied);
    }
    remove_all(store, catalog, plan, progress, &mut taken, emptied);
    if let Some(transaction) = transaction {
        let has_moved = |at: &usize| plan.items.get(*at).is_some_and(|item| item.kind().is_moved());
        let has_replaced = |at: &usize| plan.repairs.get(*at).is_some_and(Repair::replaces);
        let is_empty = !taken.items.iter().any(has_moved) && !taken.repaired.iter().any(has_replaced);
        taken.transaction = Some(transaction.id().to_string());
        if is_empty {
            // Everything was gone or failed: an empty transaction would only puzzle people.
            taken.failures.extend(transaction.discard_if_empty(store).err());
            taken.transaction = None;
        }
    }
    taken.failures.extend(store.sync().err());
    Ok(taken)
}

/// Makes whole what can be.
fn repair_all(
    store: &dyn Store,
    plan: &Plan,
    transaction: Option<&Transaction>,
    progress: &dyn Progress,
    taken: &mut Taken,
) {
    progress.phase("repair", plan.repairs.len());
    for (at, repair) in plan.repairs.iter().enumerate() {
        if progress.is_stopped() {
            return;
        }
        match repair::execute(store, transaction, repair) {
            Ok(true) => taken.repaired.push(at),
            Ok(false) => {}
            Err(e) => taken.failures.push(e),
        }
        progress.step(1);
    }
    taken.failures.extend(store.sync().err());
}

/// What may be empty by now; followed up only where directories may go at once.
#[derive(Default)]
struct Emptied {
    /// Directories of links and blobs.
    leaves: Vec<PathBuf>,
    /// What is around those that are gone.
    shells: BTreeSet<PathBuf>,
}

impl Emptied {
    fn is_gone(&mut self, leaf: &Path) {
        let shell = leftovers::shell_of(leaf).filter(|shell| !self.shells.contains(*shell));
        self.shells.extend(shell.map(Path::to_path_buf));
    }

    fn remove(mut self, store: &dyn Store, taken: &mut Taken) {
        for leaf in std::mem::take(&mut self.leaves) {
            match store.remove_directory(&leaf) {
                Ok(true) => self.is_gone(&leaf),
                Ok(false) => {}
                Err(e) => taken.failures.push(e),
            }
        }
        for shell in self.shells {
            taken.failures.extend(store.remove_directory(&shell).err());
        }
    }
}

/// Moves everything that moves into `transaction`.
fn move_all(
    store: &dyn Store,
    catalog: &Catalog,
    plan: &Plan,
    transaction: &Transaction,
    progress: &dyn Progress,
    taken: &mut Taken,
    emptied: &mut Emptied,
) {
    progress.phase("take", plan.items.len());
    let mut last = None;
    let mut needed = IdSet::default();
    for (at, item) in plan.items.iter().enumerate().filter(|(_, item)| item.kind().is_moved()) {
        if progress.is_stopped() {
            return;
        }
        // The next kind relies on the one before being gone for good: no link may outlive its blob in a crash.
        if last.is_some_and(|kind| kind != item.kind())
            && let Err(e) = store.sync()
        {
            taken.failures.push(e);
            return;
        }
        last = Some(item.kind());
        let id = item.digest();
        if id.is_some_and(|id| needed.contains(id)) {
            continue;
        }
        match take_one(store, transaction, catalog, item, plan.is_eager.then_some(&mut *emptied)) {
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
}

/// Moves one thing, with its directory where `emptied` is given.
fn take_one(
    store: &dyn Store,
    transaction: &Transaction,
    catalog: &Catalog,
    item: &Item,
    emptied: Option<&mut Emptied>,
) -> Result<bool> {
    let path = item.path(&catalog.tables);
    let was_there = match emptied {
        None => transaction.take(store, &path)?,
        Some(emptied) => match transaction.take_with_directory(store, &path)? {
            Some(moved) if moved != path => {
                emptied.is_gone(moved);
                true
            }
            moved => {
                let leaf = path.parent().filter(|leaf| moved.is_some() && layout::is_leaf(leaf));
                emptied.leaves.extend(leaf.map(Path::to_path_buf));
                moved.is_some()
            }
        },
    };
    if let What::Tag(repository, tag, target) = &item.what
        && was_there
    {
        let name = catalog.name(*repository);
        let link = layout::tag_link(Path::new(&*name), &catalog.name(*tag));
        let content = store.read(&transaction.path_of(&link), layout::LINK_LIMIT);
        let points_at = content.map(|read| read.and_then(|(text, _)| layout::parse_link(&text).ok()));
        // A push may have moved it in the last moment; what can't be told counts as that.
        if !points_at.is_ok_and(|digest| digest == Some(catalog.digest(*target))) {
            transaction.put_back(store, &path)?;
            return Err(Error::Changed { what: store.full(&path).printable().to_string() });
        }
    }
    if let What::Revision(repository, digest) = &item.what
        && was_there
    {
        let name = catalog.name(*repository);
        let known = catalog.repository(Path::new(&*name)).and_then(|r| r.revision(*digest));
        let moved = store.stat(&transaction.path_of(&path));
        let is_known =
            |stat: &Stat| known.is_some_and(|r| r.version.modified() == Version::from(stat).modified());
        // A push by digest writes this link and no more, so nothing but its time tells that there was one.
        if !moved.is_ok_and(|stat| stat.as_ref().is_some_and(is_known)) {
            transaction.put_back(store, &path)?;
            return Err(Error::Changed { what: store.full(&path).printable().to_string() });
        }
    }
    Ok(was_there)
}

/// Removes the directories that are empty, and those that are now if they may go at once.
fn remove_all(
    store: &dyn Store,
    catalog: &Catalog,
    plan: &Plan,
    progress: &dyn Progress,
    taken: &mut Taken,
    mut emptied: Emptied,
) {
    for (at, item) in plan.items.iter().enumerate().filter(|(_, item)| !item.kind().is_moved()) {
        if progress.is_stopped() {
            break;
        }
        let path = item.path(&catalog.tables);
        let removed = match item.kind() {
            ItemKind::Repository => leftovers::remove_repository(store, &path),
            _ => leftovers::remove_directory(store, &path),
        };
        match removed {
            Ok(true) => {
                taken.items.push(at);
                if plan.is_eager {
                    emptied.is_gone(&path);
                }
            }
            Ok(false) => {}
            Err(e) => taken.failures.push(e),
        }
        progress.step(1);
    }
    emptied.remove(store, taken);
    let is_removed = |at: &&usize| plan.items.get(**at).is_some_and(|item| !item.kind().is_moved());
    match taken.items.iter().filter(is_removed).count() {
        0 => {}
        removed => log::info!("removed {}", count(removed, "empty directory")),
    }
}

/// Why a sweep took what it took, for its transaction.
pub(super) fn reason(options: &Options) -> String {
    let age = humantime::format_duration(options.grace);
    let untagged = if options.untagged { ", untagged manifests included" } else { "" };
    let orphans = if options.orphans { ", referrers of what is gone included" } else { "" };
    let glob = options.repositories.as_ref().map_or(String::new(), |glob| format!(" in {glob}"));
    format!("garbage older than {age}{untagged}{orphans}{glob}")
}
