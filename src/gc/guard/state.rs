//! Where garbage stands on its way out, and when it moves on: for reports, `control/status` and
//! `reachability/unreachable/state`.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use bytesize::ByteSize;
use serde::Serialize;

use super::gate::Gate;
use super::is_remembered;
use super::ledger::Ledger;
use crate::catalog::Tables;
use crate::catalog::intern::DigestId;
use crate::clock::{Moment, Next, Now, promised};
use crate::digest::Digest;
use crate::error::{Result, count};
use crate::gc::Options;
use crate::gc::report::timestamp;
use crate::layout::{self, Kind};
use crate::manifest::MAX_SIZE;
use crate::store::Store;
use crate::trash::stage::{Stage, Step};
use crate::trash::{self, Contents, Record};

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
    /// When a run takes the next step.
    pub next: Next,
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
    pub old: Next,
}

/// Everything on its way out at `now`, going by what `options` say: `unreferenced` blobs in the store, and what the trash
/// holds of sweeps.
pub fn all(
    store: &dyn Store,
    tables: &Tables,
    unreferenced: impl Iterator<Item = Unreferenced>,
    options: &Options,
    now: &Now,
) -> Result<Vec<Standing>> {
    let options = &options.settled();
    let mut unreferenced: HashMap<DigestId, Unreferenced> =
        unreferenced.map(|blob| (blob.id, blob)).collect();
    let mut found = Vec::new();
    for transaction in trash::contents(store)?.into_iter().filter(|t| t.is_swept()) {
        let stage = transaction.stage.as_ref().and_then(|stage| stage.as_ref().ok());
        let standing = |digest: Digest,
                        state: State,
                        next: Next,
                        since: Option<Moment>,
                        place: &Path|
         -> Result<Standing> {
            let bytes = match store.stat(place) {
                Err(e) if e.is_damage() => None,
                stat => stat?.map(|stat| stat.size),
            };
            let (since, transaction) = (since.map(|at| at.wall()), Some(transaction.id.clone()));
            Ok(Standing { digest, bytes, state, since, next, transaction })
        };
        let next = purged(&transaction, options, now);
        let since = match stage {
            Some(stage) => stage.quarantined_at.clone().or(stage.fenced_at.clone()),
            None => transaction.record.as_ref().ok().and_then(Record::began),
        };
        for path in &transaction.files {
            if let Kind::Blob(digest) = layout::classify(path) {
                let place = transaction.path_of(path);
                found.push(standing(digest, State::Quarantined, next, since.clone(), &place)?);
            }
        }
        let Some(stage) = stage.filter(|stage| stage.step() != Step::Quarantined) else { continue };
        for digest in stage.blobs.iter().filter(|digest| !transaction.holds(&layout::blob_data(digest))) {
            let in_store = tables.digests.find(digest).and_then(|id| unreferenced.remove(&id));
            let next = match options.gate {
                // The bytes are where they were, and go by their age.
                Gate::Stopped(_) => in_store.map_or(Next::Open, |blob| blob.old),
                _ => quarantined(stage, options, now),
            };
            found.push(standing(
                *digest,
                State::Fenced,
                next,
                stage.fenced_at.clone(),
                &layout::blob_data(digest),
            )?);
        }
    }
    let ledger = Ledger::read(store, tables)?;
    let mut left: Vec<Unreferenced> = unreferenced.into_values().collect();
    left.sort_unstable_by_key(|blob| tables.digests.get(blob.id));
    for blob in left {
        found.push(candidate(store, tables, &ledger, blob, options, now)?);
    }
    Ok(found)
}

fn candidate(
    store: &dyn Store,
    tables: &Tables,
    ledger: &Ledger,
    blob: Unreferenced,
    options: &Options,
    now: &Now,
) -> Result<Standing> {
    let Unreferenced { id, bytes, old } = blob;
    let digest = tables.digests.get(id);
    let next = match options.gate {
        // At once, all of it.
        Gate::Stopped(_) => old,
        _ => old.and(leaves(ledger, id, options, now)),
    };
    let (state, next) = match next {
        Next::Due if !may_take(store, &options.gate, &digest, bytes)? => {
            (State::WaitingForRegistry, Next::Open)
        }
        next => (State::Candidate, next),
    };
    let since = ledger.since(id).map(|since| since.wall());
    Ok(Standing { digest, bytes: Some(bytes), state, since, next, transaction: None })
}

/// When an unreferenced blob may leave the store beside a registry, by what was seen of it.
pub(super) fn leaves(ledger: &Ledger, id: DigestId, options: &Options, now: &Now) -> Next {
    // The next run is the first to see it otherwise.
    let since = ledger.since(id).unwrap_or(&now.moment);
    since.over(now, options.drain, options.grace)
}

/// When the bytes of what is fenced move.
fn quarantined(stage: &Stage, options: &Options, now: &Now) -> Next {
    match options.gate {
        Gate::Off | Gate::Probe(_) => {
            let since = stage.fenced_at.as_ref().unwrap_or(&now.moment);
            since.over(now, options.drain, Duration::ZERO)
        }
        Gate::Stop { .. } | Gate::Stopped(_) => Next::Open,
    }
}

/// When a run purges a transaction by itself.
pub(in crate::gc) fn purged(transaction: &Contents, options: &Options, now: &Now) -> Next {
    match options.gate.is_beside() {
        true if is_remembered(transaction, &options.gate).is_some() => Next::Open,
        true => transaction.kept_until(now, Some(options.drain), options.keep),
        false => transaction.kept_until(now, None, options.keep),
    }
}

/// When the blobs that sweeps are about move on.
pub(super) fn moves_on(transactions: &[Contents], options: &Options, now: &Now) -> HashMap<Digest, Next> {
    let stages = transactions.iter().filter_map(|t| t.stage.as_ref()?.as_ref().ok());
    let of_stage = |stage: &Stage| {
        let next = quarantined(stage, options, now);
        stage.blobs.iter().map(|digest| (*digest, next)).collect::<Vec<_>>()
    };
    stages.flat_map(of_stage).collect()
}

/// Whether a blob may leave the store in steps, as far as registries are concerned.
pub(super) fn may_take(store: &dyn Store, gate: &Gate, digest: &Digest, bytes: u64) -> Result<bool> {
    match gate {
        Gate::Off | Gate::Stopped(_) => Ok(true),
        Gate::Probe(probe) => Ok(probe.0.forgets_bytes() || !may_be_manifest(store, digest, bytes)?),
        Gate::Stop { .. } => Ok(false),
    }
}

/// Whether a registry may know a blob as a manifest.
fn may_be_manifest(store: &dyn Store, digest: &Digest, bytes: u64) -> Result<bool> {
    if bytes > MAX_SIZE as u64 {
        return Ok(false);
    }
    let content = match store.read(&layout::blob_data(digest), MAX_SIZE) {
        Err(e) if e.is_damage() => return Ok(true),
        content => content?,
    };
    let Some((bytes, _)) = content else { return Ok(true) };
    if !bytes.trim_ascii_start().starts_with(b"{") {
        return Ok(false);
    }
    // Every type of manifest that a registry takes has this; no config of an image does.
    match serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&bytes) {
        Ok(fields) => Ok(fields.keys().any(|key| key.eq_ignore_ascii_case("schemaVersion"))),
        // Registries read what is no JSON for us: invalid UTF-8, deep nesting, large numbers.
        Err(_) => Ok(true),
    }
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
    /// So many of them move on with the next run.
    pub due: usize,
    /// When the first of the others does, RFC 3339; `null` where that is not a matter of time.
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
            due: of_state().filter(|s| s.next == Next::Due).count(),
            next: of_state().filter_map(|s| s.next.time()).min(),
        }
    };
    states.into_iter().map(total).collect()
}

impl Total {
    /// A line for people.
    pub fn text(&self, gate: &Gate) -> String {
        let what = count(self.blobs, "blob");
        let bytes = if self.bytes == 0 { String::new() } else { format!(" ({})", ByteSize::b(self.bytes)) };
        let word = self.state.word().replace('-', " ");
        let step = match (self.state, gate) {
            (State::WaitingForRegistry, Gate::Probe(_)) => {
                ", which may be a manifest that it remembers: taken by a run while it is stopped ({+registry-stopped})".to_string()
            }
            (State::WaitingForRegistry, _) => String::new(),
            (State::Candidate, Gate::Stopped(_)) | (State::Fenced, Gate::Stopped(_)) => self.step("taken", ""),
            (State::Candidate, _) => self.step("fenced", " if still unused"),
            (State::Fenced, Gate::Stop { .. }) => ", goes on when the registry is known".to_string(),
            (State::Fenced, _) => self.step("quarantined", ""),
            (State::Quarantined, _) => self.step("purged", ""),
        };
        format!("{word}: {what}{bytes}{step}")
    }

    /// Which run does it.
    fn step(&self, done: &str, unless: &str) -> String {
        let next = self.next.map(promised);
        match (self.due, next) {
            (0, None) => String::new(),
            (0, Some(next)) => format!(", {done} by a run after {next}{unless}"),
            (due, None) if due == self.blobs => format!(", {done} by the next run{unless}"),
            (due, None) => format!(", {due} {done} by the next run{unless}"),
            (due, Some(next)) => {
                format!(", {due} {done} by the next run, others by one after {next}{unless}")
            }
        }
    }
}

/// A line for each, with a line of titles: digest, bytes (`-`: not there), state, since when, when it moves on (`due`: with
/// the next run, `-`: not a matter of time), transaction.
pub fn table(standings: &[Standing]) -> String {
    let mut text = String::from("digest\tbytes\tstate\tsince\tnext\ttransaction\n");
    for standing in standings {
        let Standing { digest, bytes, state, since, next, transaction } = standing;
        let bytes = bytes.map_or_else(|| "-".to_string(), |bytes| bytes.to_string());
        let transaction = transaction.as_deref().unwrap_or("-");
        let since = since.map_or_else(|| "-".to_string(), timestamp);
        text += &format!("{digest}\t{bytes}\t{}\t{since}\t{next}\t{transaction}\n", state.word());
    }
    text
}

fn rfc3339<S: serde::Serializer>(
    time: &Option<SystemTime>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    time.map(promised).serialize(serializer)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::clock::Reading;
    use crate::digest::Algorithm;
    use crate::gc::{self, Unwatched};
    use crate::store::memory::Memory;
    use crate::trash::Author;

    const MINUTE: Duration = Duration::from_secs(60);

    /// A registry with a blob of garbage, and what its clocks say.
    fn store() -> (Memory, Reading) {
        let (store, reading) = (Memory::default(), Reading::take());
        store.set_clocks(reading.clone());
        store.write(&layout::repository("app".as_ref()).join("_uploads/1/startedat"), b"").unwrap();
        let blob = layout::blob_data(&Digest::of(Algorithm::Sha256, b"garbage"));
        store.write(&blob, b"garbage").unwrap();
        (store, reading)
    }

    /// Where the blob stands after a run at `reading`.
    fn run(store: &Memory, reading: &Reading, options: &Options) -> Vec<Total> {
        store.set_clocks(reading.clone());
        let author = Author { uid: 0, pid: 1, command: "test".to_string() };
        let report = gc::run(store, &Tables::default(), options, &author, &Unwatched).unwrap();
        assert!(report.is_complete(), "{:?}", report.failures);
        report.states
    }

    fn options(drain: Duration, keep: Duration) -> Options {
        Options { gate: Gate::Off, grace: 60 * MINUTE, drain, keep, ..Options::default() }
    }

    #[test]
    fn what_is_promised_is_what_a_sweep_does_and_not_a_moment_earlier() {
        let (store, begin) = store();
        let words = options(10 * MINUTE, 600 * MINUTE);
        let mut reading = begin.clone();
        for state in [State::Candidate, State::Fenced, State::Quarantined] {
            let after = run(&store, &reading, &words);
            let [total] = after.as_slice() else { panic!("{after:?}") };
            assert_eq!((total.state, total.due), (state, 0));
            let shown = run(&store, &reading, &Options { dry_run: true, ..words.clone() });
            assert_eq!(shown, after, "a dry run says the same");
            let wait = total.next.unwrap().duration_since(reading.wall).unwrap();
            let before = reading.after(wait - Duration::from_secs(1));
            assert_eq!(run(&store, &before, &words)[0].state, state, "not earlier");
            // A clock that jumps changes nothing.
            let jumped = Reading { wall: begin.wall + 9_000 * 60 * MINUTE, ..before.clone() };
            let jumped = Reading { kernel: jumped.wall, ..jumped };
            assert_eq!(run(&store, &jumped, &words)[0].state, state, "not by a jump");
            reading = reading.after(wait + Duration::from_millis(2));
        }
        assert_eq!(run(&store, &reading, &words), [], "purged");
    }

    #[test]
    fn the_words_of_the_run_that_takes_a_step_count() {
        let (store, begin) = store();
        let (long, short) = (options(50 * MINUTE, 9000 * MINUTE), options(5 * MINUTE, 20 * MINUTE));
        run(&store, &begin, &long);
        let fenced = begin.after(61 * MINUTE);
        assert_eq!(run(&store, &fenced, &long)[0].state, State::Fenced);
        assert_eq!(run(&store, &fenced.after(6 * MINUTE), &long)[0].state, State::Fenced);
        assert_eq!(run(&store, &fenced.after(6 * MINUTE), &short)[0].state, State::Quarantined);
        assert_eq!(run(&store, &fenced.after(27 * MINUTE), &long)[0].state, State::Quarantined);
        assert_eq!(run(&store, &fenced.after(27 * MINUTE), &short), []);
    }
}
