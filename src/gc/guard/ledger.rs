//! Ledger: since when we have seen which blobs dead, `.regfs/dead`.
//!
//! A push that finds its blobs leaves nothing on the disk before its manifest comes, so no file time tells how long a
//! blob has been of no use; only having looked does. Losing the ledger only makes things wait longer.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::catalog::Tables;
use crate::catalog::intern::DigestId;
use crate::clock::Moment;
use crate::digest::Digest;
use crate::error::{Result, count};
use crate::layout;
use crate::printable::Printable;
use crate::store::{Store, longest_list_of_blobs};

/// A line of the file: what was first seen dead at one look.
#[derive(Serialize, Deserialize)]
struct Line {
    since: Moment,
    blobs: Vec<Digest>,
}

/// Since when which blobs are dead.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ledger {
    looks: Vec<Moment>,
    /// Which of the looks saw it first.
    dead: HashMap<DigestId, u32>,
}

impl Ledger {
    /// Reads it; what can't be read was never seen dead.
    pub fn read(store: &dyn Store, tables: &Tables) -> Result<Ledger> {
        let path = Path::new(layout::DEAD);
        let text = match store.read(path, longest_list_of_blobs(store, path, &[])?) {
            Ok(content) => content.map_or_else(Vec::new, |(text, _)| text),
            Err(e) if e.is_damage() => {
                log::warn!("{e}: what is dead is so from now on");
                Vec::new()
            }
            Err(e) => return Err(e),
        };
        let mut ledger = Ledger::default();
        let (mut unread, mut first) = (0, None);
        for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice::<Line>(line) {
                Ok(Line { since, blobs }) => {
                    let known = blobs.iter().filter_map(|digest| tables.digests.find(digest));
                    ledger.add(&since, known);
                }
                Err(e) => {
                    unread += 1;
                    first.get_or_insert(e);
                }
            }
        }
        if let Some(e) = first {
            let (path, lines) = (store.full(path), count(unread, "line"));
            log::warn!(
                "{}: {lines} can't be read ({e}); what they say is dead is so from now on",
                path.printable()
            );
        }
        Ok(ledger)
    }

    fn add(&mut self, since: &Moment, blobs: impl Iterator<Item = DigestId>) {
        let look = u32::try_from(self.looks.len()).unwrap_or(u32::MAX);
        self.looks.push(since.clone());
        for blob in blobs {
            self.dead.entry(blob).or_insert(look);
        }
    }

    /// The ledger after a look that began at `look`: `dead` are dead, since then where they were not before; of the
    /// others only those are that `is_still_dead`.
    pub fn after(
        mut self,
        look: &Moment,
        dead: impl Iterator<Item = DigestId>,
        is_still_dead: impl Fn(DigestId) -> bool,
    ) -> Ledger {
        let now: HashMap<DigestId, ()> = dead.map(|id| (id, ())).collect();
        self.dead.retain(|id, _| now.contains_key(id) || is_still_dead(*id));
        self.add(look, now.into_keys());
        self
    }

    /// Since when a blob is dead.
    pub fn since(&self, blob: DigestId) -> Option<&Moment> {
        self.dead.get(&blob).and_then(|look| self.looks.get(*look as usize))
    }

    /// Writes it.
    pub fn write(&self, store: &dyn Store, tables: &Tables) -> Result<()> {
        let mut lines: HashMap<u32, Vec<Digest>> = HashMap::new();
        for (blob, look) in &self.dead {
            lines.entry(*look).or_default().push(tables.digests.get(*blob));
        }
        store.write_with(Path::new(layout::DEAD), &|out: &mut dyn Write| {
            for (at, since) in self.looks.iter().enumerate() {
                let Some(blobs) = u32::try_from(at).ok().and_then(|at| lines.get(&at)) else { continue };
                serde_json::to_writer(&mut *out, &Line { since: since.clone(), blobs: blobs.clone() })?;
                out.write_all(b"\n")?;
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::digest::Algorithm;
    use crate::store::memory::Memory;

    #[test]
    fn a_blob_is_dead_since_the_first_look_that_has_seen_it_so_without_a_break() {
        let (store, tables) = (Memory::default(), Tables::default());
        let blob = |text: &str| tables.digests.intern(&Digest::of(Algorithm::Sha256, text.as_bytes()));
        let (a, b, c) = (blob("a"), blob("b"), blob("c"));
        let look = |hour: u64| {
            Moment::of_time(std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(3600 * hour))
        };
        let (first, second, third) = (look(1), look(2), look(3));
        let none = |_| false;
        let ledger = Ledger::read(&store, &tables).unwrap().after(&first, [a, b].into_iter(), none);
        ledger.write(&store, &tables).unwrap();
        let ledger = Ledger::read(&store, &tables).unwrap().after(&second, [a, c].into_iter(), none);
        assert_eq!((ledger.since(a), ledger.since(b), ledger.since(c)), (Some(&first), None, Some(&second)));
        ledger.write(&store, &tables).unwrap();
        let ledger = Ledger::read(&store, &tables).unwrap();
        let ledger = ledger.after(&third, [a, b].into_iter(), |id| id == c);
        assert_eq!((ledger.since(a), ledger.since(b)), (Some(&first), Some(&third)));
        assert_eq!(ledger.since(c), Some(&second), "nobody asked about it this time");

        // Damage delays.
        store.write(Path::new(layout::DEAD), b"{\"since\":\n\xff").unwrap();
        assert_eq!(Ledger::read(&store, &tables).unwrap(), Ledger::default());
    }
}
