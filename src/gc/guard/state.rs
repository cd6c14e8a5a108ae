//! Where garbage stands on its way out, and when it moves on: for reports, `control/status` and
//! `reachability/unreachable/state`.

use std::collections::HashSet;
use std::path::Path;
use std::time::SystemTime;

use bytesize::ByteSize;
use serde::Serialize;

use super::gate::Gate;
use super::ledger::Ledger;
use crate::catalog::Tables;
use crate::catalog::intern::DigestId;
use crate::digest::Digest;
use crate::error::{Result, count};
use crate::gc::Options;
use crate::gc::report::timestamp;
use crate::layout::{self, Kind};
use crate::store::Store;
use crate::trash;
use crate::trash::stage::Step;

/// Where a blob stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Nothing leads to it; it waits for the grace period to end.
    Candidate,
    /// The same, and the grace period is over: it waits until no registry remembers it.
    WaitingForRegistry,
    /// The links to it lie in the trash; it waits for requests that saw them.
    Fenced,
    /// Its bytes lie in the trash; they wait to be purged.
    Quarantined,
}

impl State {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            State::Candidate => "candidate",
            State::WaitingForRegistry => "waiting-for-registry",
            State::Fenced => "fenced",
            State::Quarantined => "quarantined",
        }
    }
}

/// One blob on its way out.
#[derive(Clone, Debug)]
pub struct Standing {
    /// Which.
    pub digest: Digest,
    /// Bytes; `None` where they are not where they should be.
    pub bytes: Option<u64>,
    /// Where it stands.
    pub state: State,
    /// Since when; `None` where the next run will be the first to see it.
    pub since: Option<SystemTime>,
    /// From when on a run takes the next step; `None` where that does not depend on the time.
    pub next: Option<SystemTime>,
    /// The transaction that it lies in or is to follow its links to.
    pub transaction: Option<String>,
}

/// An unreferenced blob in the store.
#[derive(Clone, Copy, Debug)]
pub struct Unreferenced {
    /// Which.
    pub id: DigestId,
    /// Bytes.
    pub bytes: u64,
    /// From when on its file times call it old enough.
    pub old_at: SystemTime,
}

/// Everything on its way out at `now`: `unreferenced` blobs in the store, and what the trash holds of sweeps; what was due
/// when a sweep looked at `swept_at` and is no further waits for the registry.
pub fn all(
    store: &dyn Store,
    tables: &Tables,
    unreferenced: impl Iterator<Item = Unreferenced>,
    options: &Options,
    now: SystemTime,
    swept_at: Option<SystemTime>,
) -> Result<Vec<Standing>> {
    let mut found = Vec::new();
    let mut staged: HashSet<Digest> = HashSet::new();
    for transaction in trash::contents(store)?.into_iter().filter(|t| t.is_swept()) {
        let stage = transaction.stage.as_ref().and_then(|stage| stage.as_ref().ok());
        let began =
            transaction.record.as_ref().ok().and_then(|record| humantime::parse_rfc3339(&record.time).ok());
        let step = stage.map_or(Step::Quarantined, |stage| stage.step());
        let (state, since, wait) = match stage {
            Some(stage) if step == Step::Quarantined => (
                State::Quarantined,
                stage.quarantined_at.as_ref().map(|at| at.wall()),
                options.keep.max(stage.drain),
            ),
            Some(stage) => (State::Fenced, stage.fenced_at.as_ref().map(|at| at.wall()), stage.drain),
            None => (State::Quarantined, began, options.keep),
        };
        let next = since.and_then(|since| since.checked_add(wait));
        let standing = |digest: Digest, state: State, place: &Path| -> Result<Standing> {
            let bytes = match store.stat(place) {
                Err(e) if e.is_damage() => None,
                stat => stat?.map(|stat| stat.size),
            };
            Ok(Standing { digest, bytes, state, since, next, transaction: Some(transaction.id.clone()) })
        };
        for path in &transaction.files {
            if let Kind::Blob(digest) = layout::classify(path) {
                found.push(standing(digest, State::Quarantined, &transaction.path_of(path))?);
            }
        }
        if step != Step::Quarantined {
            for digest in transaction.staged().iter().filter(|d| !transaction.holds(&layout::blob_data(d))) {
                staged.insert(*digest);
                found.push(standing(*digest, state, &layout::blob_data(digest))?);
            }
        }
    }
    let ledger = Ledger::read(store, tables)?;
    for Unreferenced { id, bytes, old_at } in unreferenced {
        let digest = tables.digests.get(id);
        if staged.contains(&digest) {
            continue;
        }
        let since = ledger.since(id).map(|since| since.wall());
        let next = match options.gate {
            // At once, all of it.
            Gate::Stopped(_) => Some(old_at),
            _ => since.unwrap_or(old_at.max(now)).checked_add(options.grace).map(|next| next.max(old_at)),
        };
        let state = match (&options.gate, next) {
            // With a probe these are manifests.
            (Gate::Stop { .. } | Gate::Probe(_), Some(next)) if swept_at.is_some_and(|at| next <= at) => {
                State::WaitingForRegistry
            }
            _ => State::Candidate,
        };
        found.push(Standing { digest, bytes: Some(bytes), state, since, next, transaction: None });
    }
    Ok(found)
}

/// How many there are in one state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Total {
    /// Which.
    pub state: State,
    /// Blobs.
    pub blobs: usize,
    /// Their bytes.
    pub bytes: u64,
    /// When the first of them moves on, RFC 3339; `null` where that does not depend on the time.
    #[serde(serialize_with = "rfc3339")]
    pub next: Option<SystemTime>,
}

/// How many there are in each state.
pub fn totals(standings: &[Standing]) -> Vec<Total> {
    let mut states: Vec<State> = standings.iter().map(|s| s.state).collect();
    states.sort_unstable();
    states.dedup();
    let total = |state: State| {
        let of_state = || standings.iter().filter(move |s| s.state == state);
        Total {
            state,
            blobs: of_state().count(),
            bytes: of_state().filter_map(|s| s.bytes).sum(),
            next: of_state().filter_map(|s| s.next).min(),
        }
    };
    states.into_iter().map(total).collect()
}

impl Total {
    /// A line for people.
    pub fn text(&self, gate: &Gate) -> String {
        let what = count(self.blobs, "blob");
        let bytes = if self.bytes == 0 { String::new() } else { format!(" ({})", ByteSize::b(self.bytes)) };
        let next = self.next.map_or_else(|| "the first that sees it".to_string(), timestamp);
        match self.state {
            State::Candidate if !gate.is_beside() => {
                format!("candidate: {what}{bytes}, taken from {next} on")
            }
            State::Candidate => {
                format!("candidate: {what}{bytes}, fenced by a run after {next} if still unused")
            }
            State::WaitingForRegistry => match gate {
                Gate::Probe(_) => format!(
                    "waiting for the registry: {what}{bytes}, which may be a manifest that it remembers: taken by a run while it is \
                     stopped ({{+registry-stopped}})"
                ),
                _ => format!("waiting for the registry: {what}{bytes}"),
            },
            State::Fenced => format!("fenced: {what}{bytes}, quarantined by a run after {next}"),
            State::Quarantined => format!("quarantined: {what}{bytes}, purged by a run after {next}"),
        }
    }
}

/// A line for each, with a line of titles: digest, bytes (`-`: not there), state, since when, when it moves on (`-`:
/// not a matter of time), transaction.
pub fn table(standings: &[Standing]) -> String {
    let mut text = String::from("digest\tbytes\tstate\tsince\tnext\ttransaction\n");
    let time = |time: Option<SystemTime>| time.map_or_else(|| "-".to_string(), timestamp);
    for standing in standings {
        let Standing { digest, bytes, state, since, next, transaction } = standing;
        let bytes = bytes.map_or_else(|| "-".to_string(), |bytes| bytes.to_string());
        let transaction = transaction.as_deref().unwrap_or("-");
        let (since, next) = (time(*since), time(*next));
        text += &format!("{digest}\t{bytes}\t{}\t{since}\t{next}\t{transaction}\n", state.word());
    }
    text
}

fn rfc3339<S: serde::Serializer>(
    time: &Option<SystemTime>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    time.map(timestamp).serialize(serializer)
}
