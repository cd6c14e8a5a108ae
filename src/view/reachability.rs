//! The directory `reachability/`: what the mark found, for people.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use super::node::Node;
use super::tree::{Entries, WHY, entry, file_name, flat};
use super::{Settings, Snapshot, View};
use crate::catalog::intern::DigestId;
use crate::clock::{Clock, Now};
use crate::error::Result;
use crate::gc::Options;
use crate::gc::guard::gate::Gate;
use crate::gc::guard::state::{self, Standing, Unreferenced};
use crate::gc::plan::Policy;

impl View<'_> {
    pub(super) fn reachability(&self, node: Node) -> Option<Entries> {
        let snapshot = self.snapshot;
        let catalog = &snapshot.catalog;
        Some(match node {
            Node::Reachability => vec![
                entry("broken", Node::Broken),
                entry("missing", Node::Missing),
                entry("reachable", Node::Reachable),
                entry("summary", Node::Summary),
                entry("unreachable", Node::Unreachable),
                entry("untagged", Node::Untagged),
                entry("usage.tsv", Node::Usage),
                entry("why", Node::Why),
            ],
            Node::Reachable => {
                let kept: Vec<DigestId> =
                    catalog.blobs.iter().copied().filter(|id| self.is_kept(*id)).collect();
                self.algorithms_of(&kept, Node::ReachableOf)
            }
            Node::ReachableOf(algorithm) => {
                self.shards(algorithm, &|id| self.is_kept(id), Node::ReachableShard)
            }
            Node::ReachableShard(shard, algorithm) => self
                .snapshot
                .catalog
                .blobs_in(algorithm, shard)
                .filter(|id| self.is_kept(*id))
                .map(|id| entry(self.hex(id), Node::ReachableBlob(id)))
                .collect(),
            Node::ReachableBlob(id) => self.keepers(id),
            Node::Unreachable => {
                let ids: Vec<DigestId> = snapshot.candidates(self.store).iter().map(|c| c.digest).collect();
                let mut entries = self.algorithms_of(&ids, Node::UnreachableOf);
                entries.push(entry("state", Node::States));
                entries
            }
            Node::UnreachableOf(algorithm) => snapshot
                .candidates(self.store)
                .iter()
                .filter(|c| catalog.digest(c.digest).algorithm() == algorithm)
                .map(|c| entry(self.hex(c.digest), Node::Garbage(c.digest)))
                .collect(),
            Node::Why => self.reachability(Node::Unreachable)?.into_iter().filter_map(why_of).collect(),
            Node::WhyOf(algorithm) => {
                let listed = self.reachability(Node::UnreachableOf(algorithm))?;
                listed.into_iter().filter_map(why_of).collect()
            }
            Node::Untagged => self.untagged(Path::new("")),
            Node::UntaggedIn(path) => self.untagged(&snapshot.plain_path(path)?),
            Node::Missing => self.algorithms_of(snapshot.missing(self.store), Node::MissingOf),
            Node::MissingOf(algorithm) => snapshot
                .missing(self.store)
                .iter()
                .filter(|id| catalog.digest(**id).algorithm() == algorithm)
                .map(|id| entry(self.hex(*id), Node::MissingBlob(*id)))
                .collect(),
            Node::Broken => {
                let names = (0..catalog.problems.len()).filter_map(|at| broken_name(snapshot, at));
                names.map(|name| entry(&name, Node::BrokenFile(self.names(OsStr::new(&name))))).collect()
            }
            _ => return None,
        })
    }

    /// Symlinks to whatever keeps a blob: manifests that name it, repositories that have it as a manifest, and
    /// repositories that keep it because something in them can't be judged.
    fn keepers(&self, id: DigestId) -> Entries {
        let uses = self.snapshot.uses();
        let manifests = uses.manifests.get(&id).into_iter().flatten();
        let mut entries: Entries = manifests.map(|m| entry(self.hex(*m), Node::Keeper(*m))).collect();
        for name in uses.revisions.get(&id).into_iter().flatten() {
            let text = format!("{}@{}", file_name(&flat(name)), self.snapshot.catalog.digest(id));
            entries.push(entry(text, Node::KeeperRevision(id, self.snapshot.name_id(name))));
        }
        for name in uses.keepers.get(&id).into_iter().flatten() {
            let text = format!("{}+kept", file_name(&flat(name)));
            if self.snapshot.repository(name).is_some() && !entries.iter().any(|(n, _)| *n == *text) {
                entries.push(entry(text, Node::KeeperRevision(id, self.snapshot.name_id(name))));
            }
        }
        entries.push(entry(WHY, Node::WhyText(id)));
        entries
    }

    fn untagged(&self, path: &Path) -> Entries {
        let mut entries = Entries::new();
        for (name, digests) in self.snapshot.untagged().iter() {
            let Ok(rest) = name.strip_prefix(path) else { continue };
            let mut components = rest.components();
            let Some(first) = components.next() else { continue };
            let first = first.as_os_str();
            if components.next().is_some() {
                if !entries.iter().any(|(n, _)| n == first) {
                    entries.push(entry(first, Node::UntaggedIn(self.snapshot.name_id(&path.join(first)))));
                }
                continue;
            }
            let repository = self.snapshot.name_id(name);
            for id in digests.iter().copied() {
                let mut text = first.to_os_string();
                text.push(format!("@{}", self.snapshot.catalog.digest(id)));
                entries.push(entry(text, Node::UntaggedManifest(id, repository)));
            }
        }
        entries
    }
}

impl View<'_> {
    /// What time it is.
    pub(crate) fn now(&self) -> Now {
        let clock = Clock::open(self.store).unwrap_or_else(|e| {
            // Who only looks is not stopped by that.
            log::debug!("{e}");
            Clock::default()
        });
        clock.now(self.store)
    }

    /// Where each unreferenced blob stands, beside registries that are dealt with by `gate`.
    pub fn standings(&self, gate: Gate) -> Result<Vec<Standing>> {
        let Settings { grace, drain, keep, .. } = *self.settings;
        let options = Options { grace, drain, keep, gate, ..Options::default() }.settled();
        let policy = Policy::new(&options, &self.now());
        let candidates = self.snapshot.candidates(self.store).iter();
        let unreferenced = candidates.map(|c| Unreferenced {
            id: c.digest,
            bytes: c.bytes,
            old: policy.eligible(c.last_used),
        });
        state::all(self.store, &self.snapshot.catalog.tables, unreferenced, &options, &policy.now)
    }

    /// From when on a sweep takes the next step with an unreferenced blob; `None` for others.
    pub(super) fn moves_on(&self, id: DigestId) -> Option<SystemTime> {
        self.snapshot.candidate(self.store, id)?;
        let all = self.snapshot.moves_on.get(|| {
            let standings = self.standings(Gate::Off).unwrap_or_else(|e| {
                log::warn!("could not look at how far garbage is: {e}");
                Vec::new()
            });
            let digests = &self.snapshot.catalog.tables.digests;
            let times = standings.iter().filter_map(|s| Some((digests.find(&s.digest)?, s.next.time()?)));
            Arc::new(times.collect())
        });
        all.get(&id).copied()
    }
}

/// What `reachability/why` has in the place of an entry of `reachability/unreachable`.
fn why_of((name, node): (OsString, Node)) -> Option<(OsString, Node)> {
    match node {
        Node::UnreachableOf(algorithm) => Some((name, Node::WhyOf(algorithm))),
        Node::Garbage(id) => Some((name, Node::WhyText(id))),
        _ => None,
    }
}

/// Name of the file in `reachability/broken` of the `at`th problem.
pub fn broken_name(snapshot: &Snapshot, at: usize) -> Option<String> {
    let problem = snapshot.catalog.problems.get(at)?;
    let width = snapshot.catalog.problems.len().to_string().len();
    let path = flat(&problem.path);
    // Its end tells most.
    let end = path.char_indices().rev().nth(119).map_or(0, |(start, _)| start);
    Some(format!("{:0width$}-{}", at + 1, file_name(&path[end..])))
}

/// Which problem the name of a file in `reachability/broken` counts.
pub fn problem_number(name: &OsStr) -> Option<usize> {
    let (number, _) = name.to_str()?.split_once('-')?;
    number.parse::<usize>().ok()?.checked_sub(1)
}
