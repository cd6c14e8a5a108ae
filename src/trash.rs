//! Trash: the one way anything leaves the store.
//!
//! ```text
//! .regfs/trash/<id>/txn.json                            who, when, why
//! .regfs/trash/<id>/stage.json                          of a sweep beside a running registry: how far it has come
//! .regfs/trash/<id>/repositories/…, blobs/…             what was taken, under its own path
//! ```
//! A transaction is a small registry tree. Taking is a rename, one thing at a time, in an order that leaves a
//! valid registry at every instant: tag → revision → layer link → blob. [`undo`] renames back in the reverse
//! order; [`purge`] removes the bytes. There is no journal to replay: the tree is the state, so a crash at any
//! point leaves a transaction that can be listed, undone or purged.
//!
//! The description is written first and never changed; a transaction without one (a crash in between) still works.

pub mod purge;
pub mod stage;
pub mod undo;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::clock::{Clock, Moment, Next, Now};
use crate::digest::Digest;
use crate::error::{Error, Found, Result};
use crate::layout::{self, Kind};
use crate::printable::Printable;
use crate::store::{self, Store};
use stage::Stage;

/// Who asked for a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Author {
    /// User id.
    pub uid: u32,
    /// Process id.
    pub pid: u32,
    /// What was typed, as far as it is known.
    pub command: String,
}

impl Author {
    /// This process.
    pub fn current(command: &str) -> Author {
        Author {
            uid: rustix::process::getuid().as_raw(),
            pid: std::process::id(),
            command: command.to_string(),
        }
    }
}

/// The description of a transaction, `txn.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Name of the transaction, and of its directory.
    pub id: String,
    /// When it began, RFC 3339.
    pub time: String,
    /// Who asked for it.
    pub uid: u32,
    /// Which process asked for it.
    pub pid: u32,
    /// What was typed.
    pub command: String,
    /// Why it was done.
    pub reason: String,
    /// When it began, for what is counted in days; earlier versions did not note it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub began: Option<Moment>,
}

impl Record {
    /// When it began; `None` where that can't be read.
    pub fn began(&self) -> Option<Moment> {
        let by_time = || humantime::parse_rfc3339(&self.time).ok().map(Moment::of_time);
        self.began.clone().or_else(by_time)
    }

    /// Whether it began more than `keep` ago; one whose time is unknown never did.
    fn is_older_than(&self, keep: Duration, now: &Now) -> bool {
        self.began().is_some_and(|began| began.left(now, Duration::ZERO, keep).is_zero())
    }
}

/// What a transaction of a collection is called.
pub const SWEEP: &str = "sweep";
/// What a transaction has of its own, and what a crash or a full disk may leave of that, in the order in which it goes:
/// the description last, since what is left of one without it has no age.
const OWN_FILES: [&str; 4] = ["txn.json.tmp", "stage.json.tmp", layout::STAGE_FILE, layout::TRANSACTION_FILE];
/// Longest description in bytes.
const RECORD_LIMIT: usize = 1 << 20;

/// A transaction that is being filled.
#[derive(Clone, Debug)]
pub struct Transaction {
    record: Record,
}

impl Transaction {
    /// Starts a transaction; `what` (`rm`, `sweep`) becomes part of its name. The caller holds the lock.
    ///
    /// Its description is on disk before anything can be taken; a full disk fails here.
    pub fn begin(store: &dyn Store, what: &str, author: &Author, reason: &str) -> Result<Transaction> {
        let mut clock = Clock::open(store)?;
        let now = clock.now(store);
        let time = humantime::format_rfc3339_seconds(now.moment.wall()).to_string();
        let stem = format!("{}-{what}", time.replace(['-', ':'], "").replace('T', "-").replace('Z', ""));
        let mut id = stem.clone();
        let mut next = 2;
        while store.list(&layout::transaction(&id))?.is_some() {
            id = format!("{stem}-{next:03}");
            next += 1;
        }
        let record = Record {
            id: id.clone(),
            time,
            uid: author.uid,
            pid: author.pid,
            command: author.command.clone(),
            reason: reason.to_string(),
            began: Some(now.moment),
        };
        let path = layout::transaction(&id).join(layout::TRANSACTION_FILE);
        let mut text = serde_json::to_vec_pretty(&record).map_err(|e| Error::io("write", &path, e))?;
        text.push(b'\n');
        let transaction = Transaction { record };
        if let Err(e) = store.write(&path, &text) {
            // Only tidying up after what is reported: the start of a description would puzzle people.
            if let Err(e) = transaction.discard_if_empty(store) {
                log::debug!("{e}");
            }
            return Err(e);
        }
        clock.note_now_and_then(store);
        Ok(transaction)
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.record.id
    }

    /// Moves `path` here. `false`: there is nothing at `path`.
    pub fn take(&self, store: &dyn Store, path: &Path) -> Result<bool> {
        store.rename(path, &self.path_of(path))
    }

    /// The same with the directory around it if nothing else is in that. What was moved.
    pub fn take_with_directory<'a>(&self, store: &dyn Store, path: &'a Path) -> Result<Option<&'a Path>> {
        move_with_directory(store, path, &self.path_of(path))
    }

    /// Moves `path` back to where it was taken from. `false`: it is not here.
    pub fn put_back(&self, store: &dyn Store, path: &Path) -> Result<bool> {
        store.rename(&self.path_of(path), path)
    }

    /// Where `path` lies after it was taken.
    pub fn path_of(&self, path: &Path) -> PathBuf {
        layout::transaction(&self.record.id).join(path)
    }

    /// Removes the transaction if nothing is in it.
    pub fn discard_if_empty(&self, store: &dyn Store) -> Result<()> {
        read(store, &self.record.id)?.discard_if_empty(store)
    }
}

/// Moves a file; with the directory of a digest around it, if nothing else is in that and there is none at the other
/// end: that is one change instead of three. What was moved.
fn move_with_directory<'a>(store: &dyn Store, from: &'a Path, to: &Path) -> Result<Option<&'a Path>> {
    if let (Some(directory), Some(to)) = (from.parent().filter(|d| layout::is_leaf(d)), to.parent()) {
        let entries = store.list(directory)?.unwrap_or_default();
        if let [only] = entries.as_slice()
            && from.file_name() == Some(&only.name)
        {
            match store.rename(directory, to) {
                Ok(true) => return Ok(Some(directory)),
                Ok(false) | Err(Error::Exists { .. }) => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(store.rename(from, to)?.then_some(from))
}

/// A transaction with the names of what is in it.
#[derive(Clone, Debug)]
pub struct Contents {
    /// Its name.
    pub id: String,
    /// Its description, or why that can't be read.
    pub record: std::result::Result<Record, String>,
    /// How far it has come, or why that can't be read; `None` for one that moved all it took at once.
    pub stage: Option<std::result::Result<Stage, String>>,
    /// The files in it under the paths they came from, in order; for what is nested too deep, the directory.
    pub files: Vec<PathBuf>,
}

impl Contents {
    /// What moves as one: the directory of a tag, otherwise each file by itself.
    pub fn units(&self) -> Vec<&Path> {
        let mut units: Vec<&Path> = self.files.iter().map(|path| self.unit_of(path)).collect();
        units.dedup();
        units
    }

    /// The part of `path` that moves as one. Of a tag that stayed only parts may have been taken.
    fn unit_of<'a>(&self, path: &'a Path) -> &'a Path {
        let is_tag = |above: &&Path| match layout::classify(above) {
            Kind::Tag(repository, tag) => self.holds(&layout::tag_link(&repository, &tag)),
            _ => false,
        };
        path.ancestors().find(is_tag).unwrap_or(path)
    }

    /// Whether a sweep took it: its name says so.
    pub fn is_swept(&self) -> bool {
        is_swept(&self.id)
    }

    /// Whether the file at `path` was taken by it.
    pub fn holds(&self, path: &Path) -> bool {
        self.files.binary_search_by(|file| file.as_path().cmp(path)).is_ok()
    }

    /// Where a path of this transaction lies.
    pub fn path_of(&self, path: &Path) -> PathBuf {
        layout::transaction(&self.id).join(path)
    }

    /// Moves a unit back to where it was taken from. `false`: it is not here any more.
    pub fn put_back(&self, store: &dyn Store, path: &Path) -> Result<bool> {
        Ok(move_with_directory(store, &self.path_of(path), path)?.is_some())
    }

    /// The blobs that are to follow their links here, or did.
    pub fn staged(&self) -> &[Digest] {
        self.stage.as_ref().and_then(|stage| stage.as_ref().ok()).map_or(&[], |stage| &stage.blobs)
    }

    /// From when on its bytes may be purged, beside registries whose requests take up to `drain` where a sweep goes in
    /// steps, and otherwise without any.
    pub fn kept_until(&self, now: &Now, drain: Option<Duration>, keep: Duration) -> Next {
        let record = || self.record.as_ref().ok().and_then(Record::began);
        let (since, drain) = match (&self.stage, drain) {
            (_, None) | (None, _) => (record(), Duration::ZERO),
            (Some(stage), Some(drain)) => {
                (stage.as_ref().ok().and_then(|stage| stage.quarantined_at.clone()), drain)
            }
        };
        since.map_or(Next::Open, |since| since.over(now, drain, keep))
    }

    /// Why a registry may rely on its bytes after a look that began at `look`; `None` when none can. `drain` is how long a
    /// request may take where the caller knows; what the sweep said that began it counts otherwise.
    pub fn is_waiting(&self, look: &Now, drain: Option<Duration>) -> Option<String> {
        let stage = match &self.stage {
            None => return None,
            Some(Err(why)) => {
                return Some(format!("regfs can't read how far this transaction has come ({why}); undo it"));
            }
            Some(Ok(stage)) => stage,
        };
        let drain = drain.unwrap_or(stage.drain);
        let Some(quarantined_at) = &stage.quarantined_at else {
            return Some(match stage.blobs.is_empty() {
                true => "a registry may remember what was removed; a sweep after the drain tells it to forget that once more".to_string(),
                false => "a sweep has begun to take it, and the next sweep goes on; its blobs are still in the store".to_string(),
            });
        };
        match quarantined_at.left(look, drain, Duration::ZERO) {
            Duration::ZERO => None,
            left => Some(format!(
                "a request of a client that is under way may still rely on it; purge it in {}",
                humantime::format_duration(Duration::from_secs(left.as_secs() + 1))
            )),
        }
    }

    /// Nothing more of it is to be taken: what is in it is all there will be.
    pub(crate) fn end_stage(&self, store: &dyn Store) -> Result<()> {
        match &self.stage {
            Some(Ok(stage)) if !stage.blobs.is_empty() => {
                Stage { blobs: Vec::new(), ..stage.clone() }.write(store, &self.id)
            }
            _ => Ok(()),
        }
    }

    /// Removes the transaction if nothing is in it any more, and nothing is to come.
    pub fn discard_if_empty(&self, store: &dyn Store) -> Result<()> {
        let now = read(store, &self.id)?;
        if !now.files.is_empty() || !now.staged().is_empty() {
            return Ok(());
        }
        let directory = layout::transaction(&self.id);
        let failures = remove_all(store, &OWN_FILES.map(|name| directory.join(name)));
        failures.into_iter().next().map_or(Ok(()), Err)?;
        store.prune(&directory)
    }

    /// Bytes of everything in it.
    pub fn bytes(&self, store: &dyn Store) -> Result<u64> {
        let mut bytes = 0;
        for file in &self.files {
            match store.stat(&self.path_of(file)) {
                Ok(stat) => bytes += stat.map_or(0, |s| s.size),
                Err(e) if e.is_damage() => {}
                Err(e) => return Err(e),
            }
        }
        Ok(bytes)
    }
}

/// Removes files in the trash; a directory among them, which no registry made, goes with all that is in it.
fn remove_all(store: &dyn Store, paths: &[PathBuf]) -> Vec<Error> {
    let remove = |failure: Error| match &failure {
        Error::Misplaced { path, found: Found::Directory } => {
            let place = paths.iter().find(|place| store.full(place) == *path);
            place.map_or(Some(failure), |place| store.remove_tree(place).err())
        }
        _ => Some(failure),
    };
    store.remove(paths).into_iter().filter_map(remove).collect()
}

/// Whether a transaction of that name is that of a sweep.
pub fn is_swept(id: &str) -> bool {
    id.split('-').any(|part| part == SWEEP)
}

/// When the transaction of that name began; `None` for a name that is none of ours.
pub fn began_at(id: &str) -> Option<SystemTime> {
    let at = |part: std::ops::Range<usize>| id.get(part);
    let (date, time) = ((at(0..4)?, at(4..6)?, at(6..8)?), (at(9..11)?, at(11..13)?, at(13..15)?));
    let text = format!("{}-{}-{}T{}:{}:{}Z", date.0, date.1, date.2, time.0, time.1, time.2);
    (at(8..9)? == "-").then(|| humantime::parse_rfc3339(&text).ok())?
}

/// Where a path stands in the order in which things come back; taking goes the other way.
pub fn order_of_return(path: &Path) -> u8 {
    match layout::classify(path) {
        Kind::Blob(_) => 0,
        Kind::LayerLink(..) => 1,
        Kind::Other => 2,
        Kind::Revision(..) => 3,
        Kind::Tag(..) => 4,
    }
}

/// The names of all transactions, oldest first.
pub fn ids(store: &dyn Store) -> Result<Vec<String>> {
    let entries = store.list(Path::new(layout::TRASH))?.unwrap_or_default();
    let directories = entries.into_iter().filter(|e| e.kind == store::Kind::Directory);
    let mut ids: Vec<String> = directories.filter_map(|e| e.name.into_string().ok()).collect();
    ids.sort_unstable();
    Ok(ids)
}

/// All transactions, oldest first.
pub fn contents(store: &dyn Store) -> Result<Vec<Contents>> {
    ids(store)?.iter().map(|id| read(store, id)).collect()
}

/// One transaction; one without anything in it when there is none of that name.
pub fn read(store: &dyn Store, id: &str) -> Result<Contents> {
    let directory = layout::transaction(id);
    let record = read_record(store, &directory.join(layout::TRANSACTION_FILE))?;
    let mut files = Vec::new();
    store::walk(store, &directory, &mut |path, _| {
        if let Ok(inside) = path.strip_prefix(&directory)
            && !OWN_FILES.iter().any(|own| inside.starts_with(own))
        {
            files.push(inside.to_path_buf());
        }
    })?;
    files.sort_unstable();
    Ok(Contents { id: id.to_string(), record, stage: Stage::read(store, id)?, files })
}

fn read_record(store: &dyn Store, path: &Path) -> Result<std::result::Result<Record, String>> {
    match store.read(path, RECORD_LIMIT) {
        Ok(Some((text, _))) => Ok(serde_json::from_slice(&text)
            .map_err(|e| format!("{}: {e}", path.printable()).printable().to_string())),
        Ok(None) => Ok(Err(format!("{} is missing", path.printable()))),
        Err(e) if e.is_damage() => Ok(Err(e.to_string())),
        Err(e) => Err(e),
    }
}

/// Which transactions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// All.
    All,
    /// One.
    One(String),
    /// Those that began longer ago.
    Older(Duration),
}

impl Selection {
    /// The names of those it selects, without looking at what is in them.
    pub fn of(&self, store: &dyn Store, now: &Now) -> Result<Vec<String>> {
        let mut selected = ids(store)?;
        match self {
            Selection::All => {}
            Selection::One(id) => match selected.contains(id) {
                true => selected = vec![id.clone()],
                false => return Err(not_found(id, &selected)),
            },
            Selection::Older(age) => {
                let mut old = Vec::new();
                for id in selected {
                    let record =
                        read_record(store, &layout::transaction(&id).join(layout::TRANSACTION_FILE))?;
                    if record.is_ok_and(|record| record.is_older_than(*age, now)) {
                        old.push(id);
                    }
                }
                selected = old;
            }
        }
        Ok(selected)
    }
}

/// The transaction `id` among `all`.
///
/// # Errors
/// [`Error::NotFound`] that names the ones there are.
pub fn find<'a>(all: &'a [Contents], id: &str) -> Result<&'a Contents> {
    let known = || all.iter().map(|t| t.id.clone()).collect::<Vec<_>>();
    all.iter().find(|t| t.id == id).ok_or_else(|| not_found(id, &known()))
}

fn not_found(id: &str, known: &[String]) -> Error {
    let known = if known.is_empty() { "the trash is empty".to_string() } else { known.join(", ") };
    Error::NotFound { what: format!("transaction {id:?} in the trash ({known})") }
}

/// A transaction as `regfs trash list` and `control/trash` show it.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Its name.
    pub id: String,
    /// When it began, RFC 3339; empty when unknown.
    pub time: String,
    /// What was typed.
    pub command: String,
    /// Why it was done, or why its description can't be read.
    pub reason: String,
    /// Who asked for it.
    pub uid: Option<u32>,
    /// Which process asked for it.
    pub pid: Option<u32>,
    /// Files in it.
    pub files: usize,
    /// Bytes in it.
    pub bytes: u64,
}

/// All transactions with what they hold, oldest first.
///
/// # Cost
/// A `stat` for each file in the trash.
pub fn summaries(store: &dyn Store) -> Result<Vec<Summary>> {
    let summary = |contents: Contents| {
        let (files, bytes) = (contents.files.len(), contents.bytes(store)?);
        Ok(match contents.record {
            Ok(Record { time, uid, pid, command, reason, .. }) => Summary {
                id: contents.id,
                time,
                command,
                reason,
                uid: Some(uid),
                pid: Some(pid),
                files,
                bytes,
            },
            Err(why) => Summary {
                id: contents.id,
                time: String::new(),
                command: String::new(),
                reason: why,
                uid: None,
                pid: None,
                files,
                bytes,
            },
        })
    };
    contents(store)?.into_iter().map(summary).collect()
}
