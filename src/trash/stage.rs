//! Stage: how far a sweep beside a running registry has come, `stage.json` of its transaction.
//!
//! ```text
//! fencing → fenced → quarantined
//! ```
//! While a transaction is fencing, links to its blobs move here; fenced, all are here and the bytes still in the store;
//! quarantined, the bytes are here, too. [`crate::gc::guard`] decides when it moves on; this only keeps it. It is written
//! before the first thing of a step moves and again after the last, so a crash in between leaves the earlier one, from
//! which going on is right.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::clock::{Clock, Moment, Now};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layout;
use crate::printable::Printable;
use crate::store::{Store, longest_list_of_blobs};

/// How far a sweep has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// How long a request of a client may be under way, as the run said that began it. Each run goes by its own words; this is
    /// for those that have none.
    pub drain: Duration,
    /// No link that was taken was written after this, by the clock of the storage; one that is by now was written
    /// late.
    pub links_until: SystemTime,
    /// When the last link was here; `None` before that.
    pub fenced_at: Option<Moment>,
    /// When the last of the bytes was here; `None` before that.
    pub quarantined_at: Option<Moment>,
    /// A registry did not answer when it was told to forget, and may yet do what it was told: it may remove a link that
    /// comes back, so that one leaves a copy here; and it has to be told once more.
    #[serde(default)]
    pub is_unanswered: bool,
    /// Which blobs it is about; those that came back are not among them.
    pub blobs: Vec<Digest>,
}

/// Where a sweep stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Links are being moved.
    Fencing,
    /// The links are moved; requests that saw them may still be under way.
    Fenced,
    /// The bytes are moved, too.
    Quarantined,
}

impl Stage {
    /// One that begins.
    pub fn begin(drain: Duration, links_until: SystemTime, blobs: Vec<Digest>) -> Stage {
        Stage { drain, links_until, fenced_at: None, quarantined_at: None, is_unanswered: false, blobs }
    }

    /// One of what has moved at once and is about no blob: its drain begins.
    pub fn removed(store: &dyn Store, drain: Duration, clock: &Clock) -> Stage {
        let stage = Stage::begin(drain, store.clocks().kernel, Vec::new());
        Stage { fenced_at: Some(clock.now(store).moment), ..stage }
    }

    /// Where it stands.
    pub fn step(&self) -> Step {
        match (&self.fenced_at, &self.quarantined_at) {
            (_, Some(_)) => Step::Quarantined,
            (Some(_), None) => Step::Fenced,
            (None, None) => Step::Fencing,
        }
    }

    /// Whether every request that saw the links has ended when a look began at `look`.
    pub fn is_drained(&self, look: &Now, drain: Duration) -> bool {
        self.fenced_at.as_ref().is_some_and(|fenced| fenced.left(look, drain, Duration::ZERO).is_zero())
    }

    /// Writes it into transaction `id`.
    pub fn write(&self, store: &dyn Store, id: &str) -> Result<()> {
        let path = layout::transaction(id).join(layout::STAGE_FILE);
        let text = serde_json::to_vec(self).map_err(|e| Error::io("write", &path, e))?;
        store.write(&path, &text)
    }

    /// Reads that of transaction `id`; `None` for one that never had any, an error in words for one that can't be read.
    pub fn read(store: &dyn Store, id: &str) -> Result<Option<std::result::Result<Stage, String>>> {
        let path = layout::transaction(id).join(layout::STAGE_FILE);
        match store.read(&path, longest_list_of_blobs(store, &path, &[id])?) {
            Ok(None) => Ok(None),
            Ok(Some((text, _))) => {
                let read = serde_json::from_slice(&text);
                Ok(Some(read.map_err(|e| format!("{}: {e}", store.full(&path).printable()))))
            }
            Err(e) if e.is_damage() => Ok(Some(Err(e.to_string()))),
            Err(e) => Err(e),
        }
    }
}
