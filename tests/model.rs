//! Random registries, random steps: does regfs always do what a simple model of the rules says?
//!
//! The model ([`Model`]) is a set of things in their places and one for each transaction of the trash. It says
//! in a few lines each what `rm`, a sweep, an undo and a purge mean. After every step the store is compared with
//! it file by file, regfs's plans with what the model calls unreachable, and no image that was whole lacks anything.
//!
//! A failing sequence is made as short as it goes and printed as Rust; paste it below as a `regression_…` test.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;
mod memory;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::check::{blob_path, sha256, sha512};
use common::image::{OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, bytes, descriptor};
use memory::{Contents, Live, everything, layer_link, put, revision_link, tag_history_link, tag_link};
use regfs::catalog::Tables;
use regfs::catalog::scan::scan;
use regfs::edit;
use regfs::error::Error;
use regfs::gc::guard::gate::Gate;
use regfs::gc::{self, Options, Unwatched};
use regfs::store::Store;
use regfs::store::memory::Memory;
use regfs::trash::{Author, Selection, Transaction};
use serde_json::json;

/// How many sequences of how many steps.
const SEQUENCES: u64 = 600;
const STEPS: usize = 25;

const REPOSITORIES: [&str; 3] = ["app", "app/nested", "other"];
const SOMEONE_PUSHES: &str = "repositories/pushing/_uploads/1/startedat";
/// Older than any upload.
const NEVER: Duration = Duration::from_secs(1 << 40);
const TAGS: [&str; 3] = ["1", "2", "latest"];
/// The last one is pushed, and named, under its sha512 digest.
const LAYERS: usize = 5;
const STRONG: usize = LAYERS - 1;

/// One step. Numbers choose among what there is, modulo how much that is, so every step is possible.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The layers are the bits of a number. A registry with a warm `cache` does not ask for what a sweep took.
    PushImage {
        repository: usize,
        layers: usize,
        tag: usize,
        cache: bool,
    },
    /// With a warm `cache` also of children that `rm` or a sweep took.
    PushIndex {
        repository: usize,
        child: usize,
        other: usize,
        tag: usize,
        cache: bool,
    },
    /// With a subject, as a cosign tag, as an index under the fallback tag, with a subject and a tag.
    PushReferrer {
        repository: usize,
        subject: usize,
        how: usize,
    },
    Tag {
        repository: usize,
        manifest: usize,
        tag: usize,
    },
    /// The registry's own DELETE of a manifest.
    ApiDelete {
        repository: usize,
        manifest: usize,
    },
    RmTag {
        tag: usize,
    },
    RmManifest {
        manifest: usize,
    },
    Sweep {
        untagged: bool,
        grace: u64,
        now: bool,
    },
    Undo {
        transaction: usize,
    },
    Purge {
        transaction: usize,
    },
    PurgeAll,
    Wait {
        hours: u64,
    },
}

/// The smallest generator that is random enough: splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }

    fn step(&mut self) -> Step {
        let (repository, tag) = (self.below(REPOSITORIES.len()), self.below(TAGS.len() + 1));
        let mut any = || self.below(1000);
        let (one, two) = (any(), any());
        let cache = self.below(3) == 0;
        match self.below(20) {
            0..4 => Step::PushImage { repository, layers: one % (1 << LAYERS), tag, cache },
            4..6 => Step::PushIndex { repository, child: one, other: two, tag, cache },
            6..8 => Step::PushReferrer { repository, subject: one, how: two % 4 },
            8 => Step::Tag { repository, manifest: one, tag: two % TAGS.len() },
            9..11 => Step::ApiDelete { repository, manifest: one },
            11..13 => Step::RmTag { tag: one },
            13 => Step::RmManifest { manifest: one },
            14..16 => {
                Step::Sweep { untagged: one % 2 == 0, grace: [0, 0, 3][two % 3], now: cache && two % 2 == 0 }
            }
            16 | 17 => Step::Undo { transaction: one },
            18 if one % 4 == 0 => Step::PurgeAll,
            18 => Step::Purge { transaction: one },
            _ => Step::Wait { hours: 1 + self.next() % 3 },
        }
    }
}

/// Content, by its place in [`Model::things`].
type Thing = usize;
/// A repository, by its place in [`REPOSITORIES`].
type Name = usize;

/// What there can be to store.
#[derive(Clone)]
struct Content {
    bytes: Vec<u8>,
    /// The digest it is stored under.
    digest: String,
    /// What a manifest holds; `None` for what is no manifest.
    manifest: Option<Manifest>,
}

#[derive(Clone, Default)]
struct Manifest {
    blobs: Vec<Thing>,
    children: Vec<Thing>,
    subject: Option<Thing>,
}

/// Something that has a place in a registry. What comes first comes back first.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Item {
    Blob(Thing),
    Layer(Name, Thing),
    /// The layer link under the sha512 digest.
    StrongLayer(Name, Thing),
    Revision(Name, Thing),
    Tag(Name, String),
    /// That a tag has pointed at something, once that is gone.
    Past(Name, String, Thing),
}

/// What is to be known of an item besides its place.
#[derive(Clone, Default, Debug)]
struct Facts {
    /// When it was written.
    hour: u64,
    /// Of a tag: what it points at, and what it ever did.
    target: Option<Thing>,
    history: BTreeSet<Thing>,
}

type Items = BTreeMap<Item, Facts>;

/// What a registry with a trash should hold.
#[derive(Clone, Default)]
struct Model {
    things: Vec<Content>,
    hour: u64,
    store: Items,
    trash: BTreeMap<String, Items>,
}

impl Model {
    /// The number of some content.
    fn thing(&mut self, bytes: Vec<u8>, manifest: Option<Manifest>) -> Thing {
        let digest = sha256(&bytes);
        self.things.iter().position(|t| t.digest == digest).unwrap_or_else(|| {
            self.things.push(Content { bytes, digest, manifest });
            self.things.len() - 1
        })
    }

    fn has(&self, item: &Item) -> bool {
        match item {
            Item::Past(name, tag, thing) => {
                let tag = self.store.get(&Item::Tag(*name, tag.clone()));
                tag.is_some_and(|facts| facts.history.contains(thing))
            }
            _ => self.store.contains_key(item),
        }
    }

    fn is_in_trash(&self, item: &Item) -> bool {
        self.trash.values().any(|items| items.contains_key(item))
    }

    fn write(&mut self, item: Item) {
        self.store.entry(item).or_default().hour = self.hour;
    }

    fn revisions(&self, name: Name) -> Vec<Thing> {
        let own = self.store.keys().filter_map(|item| match item {
            Item::Revision(of, thing) if *of == name => Some(*thing),
            _ => None,
        });
        own.collect()
    }

    /// Tags of a repository with what they point at.
    fn tags(&self, name: Name) -> Vec<(String, Thing)> {
        let own = self.store.iter().filter_map(|(item, facts)| match item {
            Item::Tag(of, tag) if *of == name => Some((tag.clone(), facts.target.unwrap())),
            _ => None,
        });
        own.collect()
    }

    /// What the tag is about by its name.
    fn about(&self, tag: &str) -> Option<Thing> {
        let hex = tag.strip_prefix("sha256-")?.split('.').next()?;
        self.things.iter().position(|t| t.digest.ends_with(hex))
    }

    /// The manifest, if its bytes are in the store.
    fn manifest(&self, thing: Thing) -> Option<&Manifest> {
        self.things[thing].manifest.as_ref().filter(|_| self.has(&Item::Blob(thing)))
    }

    /// The manifest, if its bytes are in the store or in the trash.
    fn manifest_anywhere(&self, thing: Thing) -> Option<&Manifest> {
        let blob = Item::Blob(thing);
        self.things[thing].manifest.as_ref().filter(|_| self.has(&blob) || self.is_in_trash(&blob))
    }

    /// `roots` and all below them.
    fn closure<'a>(
        roots: impl IntoIterator<Item = Thing>,
        read: impl Fn(Thing) -> Option<&'a Manifest>,
    ) -> BTreeSet<Thing> {
        let mut waiting: Vec<Thing> = roots.into_iter().collect();
        let mut found: BTreeSet<Thing> = waiting.iter().copied().collect();
        while let Some(thing) = waiting.pop() {
            let below = read(thing).into_iter().flat_map(|m| m.blobs.iter().chain(&m.children));
            waiting.extend(below.copied().filter(|t| found.insert(*t)));
        }
        found
    }

    /// What a garbage collection keeps when the revisions in `without` are taken for gone.
    fn reachable(&self, without: &BTreeSet<Item>) -> BTreeSet<Thing> {
        let roots =
            self.store.iter().filter(|(item, _)| !without.contains(item)).filter_map(|(item, facts)| {
                match item {
                    Item::Revision(_, thing) => Some(*thing),
                    // It points at what the repository does not have: kept all the same.
                    Item::Tag(name, _) => facts.target.filter(|t| !self.has(&Item::Revision(*name, *t))),
                    _ => None,
                }
            });
        let mut found = Model::closure(roots, |thing| self.manifest(thing));
        // What is named by its sha512 digest is found through a link of any repository.
        let is_linked = |name| self.has(&Item::StrongLayer(name, STRONG));
        if !(0..REPOSITORIES.len()).any(is_linked) {
            found.remove(&STRONG);
        }
        found
    }

    /// Revisions that no tag leads to.
    fn untagged(&self, grace: u64) -> BTreeSet<Item> {
        let mut dead = BTreeSet::new();
        for name in 0..REPOSITORIES.len() {
            let revisions = self.revisions(name);
            let is_young = |t: &&Thing| self.hour - self.store[&Item::Revision(name, **t)].hour < grace;
            let mut roots: BTreeSet<Thing> = self.tags(name).into_iter().map(|(_, target)| target).collect();
            roots.extend(revisions.iter().filter(is_young));
            loop {
                let live = Model::closure(roots.clone(), |thing| self.manifest(thing));
                let is_about = |t: &&Thing| {
                    self.manifest(**t).and_then(|m| m.subject).is_some_and(|subject| live.contains(&subject))
                };
                let before = roots.len();
                roots.extend(revisions.iter().filter(is_about));
                if roots.len() == before {
                    let gone = revisions.iter().filter(|t| !live.contains(t));
                    dead.extend(gone.map(|t| Item::Revision(name, *t)));
                    break;
                }
            }
        }
        dead
    }

    /// What a sweep takes.
    fn garbage(&self, untagged: bool, grace: u64) -> BTreeSet<Item> {
        let mut garbage = if untagged { self.untagged(grace) } else { BTreeSet::new() };
        let reachable = self.reachable(&garbage);
        for thing in (0..self.things.len()).filter(|t| !reachable.contains(t)) {
            let links = (0..REPOSITORIES.len())
                .flat_map(|name| [Item::Layer(name, thing), Item::StrongLayer(name, thing)]);
            let own: BTreeSet<Item> =
                links.chain([Item::Blob(thing)]).filter(|item| self.has(item)).collect();
            let last_use = own.iter().map(|item| self.store[item].hour).max();
            if own.contains(&Item::Blob(thing)) && last_use.is_some_and(|hour| self.hour - hour >= grace) {
                garbage.extend(own);
            }
        }
        let leftovers: Vec<Item> = (0..REPOSITORIES.len())
            .flat_map(|name| self.leftovers(name, &garbage, &reachable, grace))
            .collect();
        garbage.extend(leftovers);
        garbage
    }

    /// Layer links that nothing in their repository names, and what tags pointed at that is gone. Links to
    /// unreferenced blobs go with those.
    fn leftovers(
        &self,
        name: Name,
        garbage: &BTreeSet<Item>,
        reachable: &BTreeSet<Thing>,
        grace: u64,
    ) -> Vec<Item> {
        let stays = |thing: &Thing| !garbage.contains(&Item::Revision(name, *thing));
        let revisions: Vec<Thing> = self.revisions(name).into_iter().filter(stays).collect();
        let tags = self.tags(name);
        let held = tags.iter().map(|(_, t)| *t).filter(|t| !self.has(&Item::Revision(name, *t)));
        let named = Model::closure(revisions.iter().copied().chain(held), |thing| self.manifest(thing));
        let is_linked = (0..REPOSITORIES.len()).any(|name| self.has(&Item::StrongLayer(name, STRONG)));
        let is_old = |hour: u64| self.hour - hour >= grace;
        let mut found = Vec::new();
        for (item, facts) in self.store.iter().filter(|(_, facts)| is_old(facts.hour)) {
            match item {
                Item::Layer(of, thing) | Item::StrongLayer(of, thing) if *of == name => {
                    let by_alias = *thing != STRONG || is_linked || matches!(item, Item::StrongLayer(..));
                    let is_named = named.contains(thing) && by_alias;
                    let goes_with_blob = self.has(&Item::Blob(*thing)) && !reachable.contains(thing);
                    found.extend((!is_named && !goes_with_blob).then(|| item.clone()));
                }
                Item::Tag(of, tag) if *of == name => {
                    let past = facts.history.iter().filter(|t| !revisions.contains(t));
                    let past = past.filter(|t| facts.target != Some(**t));
                    found.extend(past.map(|t| Item::Past(name, tag.clone(), *t)));
                }
                _ => {}
            }
        }
        found
    }

    fn take(&mut self, id: &str, items: impl IntoIterator<Item = Item>) {
        for item in items {
            let facts = match &item {
                Item::Past(name, tag, thing) => {
                    let tag = self.store.get_mut(&Item::Tag(*name, tag.clone())).unwrap();
                    assert!(tag.history.remove(thing));
                    Facts { hour: tag.hour, ..Facts::default() }
                }
                _ => self.store.remove(&item).unwrap(),
            };
            self.trash.entry(id.to_string()).or_default().insert(item, facts);
        }
    }

    /// Everything in the trash that a manifest of the store names comes back.
    fn give_back(&mut self) {
        loop {
            let reachable = self.reachable(&BTreeSet::new());
            let named_in = |name: Name| -> BTreeSet<Thing> {
                let revisions = self.revisions(name);
                let below = revisions.into_iter().filter_map(|t| self.manifest(t));
                let below = below.flat_map(|m| m.blobs.iter().chain(&m.children).copied());
                Model::closure(below.collect::<Vec<_>>(), |thing| self.manifest(thing))
            };
            let named: Vec<BTreeSet<Thing>> = (0..REPOSITORIES.len()).map(named_in).collect();
            let is_wanted = |item: &Item| match item {
                Item::Blob(thing) => reachable.contains(thing),
                Item::Layer(_, STRONG) | Item::Tag(..) | Item::Past(..) => false,
                Item::Layer(name, thing) | Item::StrongLayer(name, thing) | Item::Revision(name, thing) => {
                    named[*name].contains(thing)
                }
            };
            let in_trash = self.trash.iter().flat_map(|(id, items)| items.keys().map(move |item| (id, item)));
            let back = in_trash.filter(|(_, item)| is_wanted(item) && !self.has(item));
            let back: Vec<(String, Item)> = back.map(|(id, item)| (id.clone(), item.clone())).collect();
            if back.is_empty() {
                return;
            }
            back.iter().for_each(|(id, item)| self.put_back(id, item));
        }
    }

    /// Moves an item back unless it is there.
    fn put_back(&mut self, id: &str, item: &Item) {
        if let Item::Past(name, tag, thing) = item {
            if let Some(facts) = self.store.get_mut(&Item::Tag(*name, tag.clone()))
                && let Some(items) = self.trash.get_mut(id)
                && items.remove(item).is_some()
            {
                facts.history.insert(*thing);
            }
        } else if !self.has(item)
            && let Some(facts) = self.trash.get_mut(id).and_then(|items| items.remove(item))
        {
            self.store.insert(item.clone(), facts);
        }
        self.trash.retain(|_, items| !items.is_empty());
    }

    /// What goes with a tag.
    fn removal_of_tag(&self, name: Name, tag: &str) -> BTreeSet<Item> {
        let own = Item::Tag(name, tag.to_string());
        let target = self.store[&own].target.unwrap();
        let (revisions, tags) = (self.revisions(name), self.tags(name));
        let subject = |t: Thing| self.manifest(t).and_then(|m| m.subject);
        let names = |t: Thing, below: Thing| self.manifest(t).is_some_and(|m| m.children.contains(&below));
        let follows = |t: Thing, leader: Thing| {
            names(leader, t)
                || subject(t) == Some(leader)
                || tags.iter().any(|(tag, target)| self.about(tag) == Some(leader) && *target == t)
        };
        let mut going: BTreeSet<Thing> = revisions.iter().copied().filter(|t| *t == target).collect();
        loop {
            let more = revisions.iter().filter(|t| going.iter().any(|leader| follows(**t, *leader)));
            let more: BTreeSet<Thing> = going.iter().chain(more).copied().collect();
            if more == going {
                break;
            }
            going = more;
        }
        // Whatever something holds that stays, stays.
        loop {
            let stays = |t: &Thing| {
                let by_tag = tags.iter().any(|(other, target)| {
                    target == t && other != tag && !self.about(other).is_some_and(|s| going.contains(&s))
                });
                let holds = |r: &Thing| !going.contains(r) && (names(*r, *t) || subject(*t) == Some(*r));
                by_tag || revisions.iter().any(holds)
            };
            let left: BTreeSet<Thing> = going.iter().copied().filter(|t| !stays(t)).collect();
            if left == going {
                break;
            }
            going = left;
        }
        let about = tags.iter().filter(|(tag, _)| self.about(tag).is_some_and(|s| going.contains(&s)));
        let about = about.map(|(tag, _)| Item::Tag(name, tag.clone()));
        going.iter().map(|t| Item::Revision(name, *t)).chain(about).chain([own]).collect()
    }

    /// What goes with a manifest; `None` while an index holds it.
    fn removal_of_manifest(&self, name: Name, thing: Thing) -> Option<BTreeSet<Item>> {
        let mut others = self.revisions(name).into_iter().filter(|t| *t != thing);
        if others.any(|t| self.manifest(t).is_some_and(|m| m.children.contains(&thing))) {
            return None;
        }
        let tags = self.tags(name).into_iter().filter(|(_, target)| *target == thing);
        let tags = tags.map(|(tag, _)| Item::Tag(name, tag));
        Some(tags.chain([Item::Revision(name, thing)]).collect())
    }

    /// Everything that must be in the store so that the undo of a transaction is whole.
    fn needs(&self, id: &str) -> BTreeSet<Item> {
        let mut needs = BTreeSet::new();
        for (item, facts) in &self.trash[id] {
            let (name, root) = match item {
                Item::Revision(name, thing) => (*name, *thing),
                // While its revision stands, that needs what it needs.
                Item::Tag(name, _) if !self.has(&Item::Revision(*name, facts.target.unwrap())) => {
                    (*name, facts.target.unwrap())
                }
                _ => continue,
            };
            for thing in Model::closure([root], |thing| self.manifest_anywhere(thing)) {
                let strong = Item::StrongLayer(name, thing);
                if thing != STRONG || self.has(&strong) || self.is_in_trash(&strong) {
                    needs.extend([Item::Blob(thing), Item::Layer(name, thing), strong]);
                    needs.insert(Item::Revision(name, thing));
                }
            }
        }
        needs
    }

    /// Undoes a transaction; `false` where a tag stayed in the trash, since there is a newer one.
    fn undo(&mut self, id: &str) -> bool {
        let (conflicts, own): (Vec<Item>, Vec<Item>) =
            self.trash[id].keys().cloned().partition(|item| self.is_another_tag(id, item));
        let is_elsewhere = |item: &Item| !own.contains(item) && !self.has(item);
        let fetched: Vec<(String, Item)> = self
            .needs(id)
            .into_iter()
            .filter(is_elsewhere)
            .filter_map(|item| {
                let holder = self.trash.iter().find(|(_, items)| items.contains_key(&item));
                holder.map(|(id, _)| (id.clone(), item))
            })
            .collect();
        for item in &own {
            // The history of a tag that says the same is added to it.
            if let Some(history) = self.trash[id].get(item).map(|facts| facts.history.clone())
                && let Some(facts) = self.store.get_mut(item)
            {
                facts.history.extend(history);
            }
            self.put_back(id, item);
            if !self.trash.contains_key(id) {
                break;
            }
            // Of what is there again, bytes stay in the trash; a second link is dropped.
            if !matches!(item, Item::Blob(_) | Item::Past(..))
                && let Some(items) = self.trash.get_mut(id)
            {
                items.remove(item);
            }
        }
        fetched.iter().for_each(|(id, item)| self.put_back(id, item));
        self.trash.retain(|_, items| !items.is_empty());
        conflicts.is_empty()
    }

    /// Whether an item of the trash is a tag, and there is one of that name that leads elsewhere.
    fn is_another_tag(&self, id: &str, item: &Item) -> bool {
        let there = self.store.get(item).map(|facts| facts.target);
        matches!(item, Item::Tag(..)) && there.is_some_and(|target| target != self.trash[id][item].target)
    }

    fn purge(&mut self, ids: &BTreeSet<String>) {
        let staying: Vec<&String> = self.trash.keys().filter(|id| !ids.contains(*id)).collect();
        let is_elsewhere =
            |item: &Item| self.has(item) || staying.iter().any(|id| self.trash[*id].contains_key(item));
        let needed = staying.iter().flat_map(|id| self.needs(id));
        let protected: BTreeSet<Item> = needed.filter(|item| !is_elsewhere(item)).collect();
        for id in ids {
            self.trash.get_mut(id).unwrap().retain(|item, _| protected.contains(item));
        }
        self.trash.retain(|_, items| !items.is_empty());
    }

    /// What `sweep now` purges: what it took, and every transaction whose undo needed bytes of that.
    fn ended_with(&self, id: &str) -> BTreeSet<String> {
        let is_elsewhere = |item: &Item| {
            self.has(item) || self.trash.iter().any(|(other, items)| other != id && items.contains_key(item))
        };
        let is_lost = |item: &Item| {
            matches!(item, Item::Blob(_)) && self.trash[id].contains_key(item) && !is_elsewhere(item)
        };
        let ends = |other: &&String| *other == id || self.needs(other).iter().any(is_lost);
        self.trash.keys().filter(ends).cloned().collect()
    }

    /// The files of an item, with their content.
    fn files<'a>(&'a self, item: &Item, facts: &Facts) -> Vec<(PathBuf, &'a [u8])> {
        let digest = |thing: Thing| self.things[thing].digest.as_str();
        let link = |path, thing| vec![(path, digest(thing).as_bytes())];
        match item {
            Item::Blob(thing) => vec![(blob_path(digest(*thing)), self.things[*thing].bytes.as_slice())],
            Item::Layer(name, thing) => link(layer_link(REPOSITORIES[*name], digest(*thing)), *thing),
            Item::StrongLayer(name, thing) => {
                link(layer_link(REPOSITORIES[*name], &sha512(&self.things[*thing].bytes)), *thing)
            }
            Item::Revision(name, thing) => link(revision_link(REPOSITORIES[*name], digest(*thing)), *thing),
            Item::Past(name, tag, thing) => {
                link(tag_history_link(REPOSITORIES[*name], tag, digest(*thing)), *thing)
            }
            Item::Tag(name, tag) => {
                let name = REPOSITORIES[*name];
                let history = facts.history.iter();
                let history =
                    history.map(|t| (tag_history_link(name, tag, digest(*t)), digest(*t).as_bytes()));
                history.chain(link(tag_link(name, tag), facts.target.unwrap())).collect()
            }
        }
    }

    /// Every file there should be, descriptions of transactions left out.
    fn contents(&self) -> BTreeMap<PathBuf, &[u8]> {
        let mut contents = BTreeMap::new();
        let stored = self.store.iter().map(|(item, facts)| (PathBuf::new(), item, facts));
        let taken = self.trash.iter().flat_map(|(id, items)| {
            items.iter().map(move |(item, facts)| (Path::new(".regfs/trash").join(id), item, facts))
        });
        for (place, item, facts) in stored.chain(taken) {
            contents.extend(self.files(item, facts).into_iter().map(|(path, text)| (place.join(path), text)));
        }
        contents
    }
}

/// The model and a real store, side by side.
struct World {
    model: Model,
    store: Arc<Memory>,
    began: SystemTime,
    /// How many transactions there have been.
    transactions: usize,
}

/// What is wrong, or nothing.
type Verdict = Result<(), String>;

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Verdict {
    if holds { Ok(()) } else { Err(what()) }
}

fn author() -> Author {
    Author { uid: 0, pid: 1, command: "test".to_string() }
}

impl World {
    fn new() -> World {
        let mut model = Model::default();
        for layer in 0..LAYERS {
            model.thing(format!("layer {layer}").into_bytes(), None);
        }
        let began = SystemTime::now() - Duration::from_secs(10_000 * 3600);
        let world = World { model, store: Arc::default(), began, transactions: 0 };
        world.set_clock();
        // A store with blobs and no repository at all is one that regfs refuses to judge.
        put(&world.store, SOMEONE_PUSHES, b"2020-01-01T00:00:00Z");
        world
    }

    fn set_clock(&self) {
        self.store.set_clock(self.began + Duration::from_secs(self.model.hour * 3600));
    }

    /// A grace period of `hours` in the time of the model; half an hour less, so that no test depends on seconds.
    fn grace(&self, hours: u64) -> Duration {
        let real = SystemTime::now().duration_since(self.began).unwrap();
        match hours {
            0 => Duration::ZERO,
            _ => {
                real - Duration::from_secs(self.model.hour * 3600) + Duration::from_secs(hours * 3600 - 1800)
            }
        }
    }

    /// Takes one step in the store and in the model, and compares.
    fn step(&mut self, step: Step) -> Verdict {
        let before = self.store.snapshot();
        let is_ours = match step {
            Step::RmTag { tag } => self.rm_tag(tag)?,
            Step::RmManifest { manifest } => self.rm_manifest(manifest)?,
            Step::Sweep { untagged, grace, now } => self.sweep(untagged, grace, now)?,
            Step::Undo { transaction } => self.undo(transaction)?,
            Step::Purge { transaction } => {
                let ids: Vec<String> = self.model.trash.keys().cloned().collect();
                ids.is_empty() || self.purge(Some(&ids[transaction % ids.len()]))?
            }
            Step::PurgeAll => self.purge(None)?,
            others => self.others_do(others),
        };
        let after = self.store.snapshot();
        self.compare(&after)?;
        if is_ours {
            whole(&before, &after)?;
        }
        self.dry_run(false)?;
        self.dry_run(true)
    }

    /// What other programs do to the registry; never ours.
    fn others_do(&mut self, step: Step) -> bool {
        match step {
            Step::PushImage { repository, layers, tag, cache } => {
                let image = self.image(layers);
                self.push(repository, TAGS.get(tag).copied(), image, cache);
            }
            Step::PushIndex { repository, child, other, tag, cache } => {
                let mut revisions = self.model.revisions(repository);
                let taken = self.model.trash.values().flat_map(Items::keys).filter_map(|item| match item {
                    Item::Revision(name, thing) if *name == repository => Some(*thing),
                    _ => None,
                });
                revisions.extend(taken.filter(|_| cache));
                if !revisions.is_empty() {
                    let children = [child, other].map(|n| revisions[n % revisions.len()]);
                    let index = self.index(&BTreeSet::from(children));
                    self.push(repository, TAGS.get(tag).copied(), index, false);
                }
            }
            Step::PushReferrer { repository, subject, how } => {
                let revisions = self.model.revisions(repository);
                if !revisions.is_empty() {
                    self.push_referrer(repository, revisions[subject % revisions.len()], how);
                }
            }
            Step::Tag { repository, manifest, tag } => {
                let revisions = self.model.revisions(repository);
                if !revisions.is_empty() {
                    let target = revisions[manifest % revisions.len()];
                    self.push(repository, Some(TAGS[tag]), target, false);
                }
            }
            Step::ApiDelete { repository, manifest } => {
                let revisions = self.model.revisions(repository);
                if !revisions.is_empty() {
                    self.api_delete(repository, revisions[manifest % revisions.len()]);
                }
            }
            Step::Wait { hours } => {
                self.model.hour += hours;
                self.set_clock();
            }
            _ => unreachable!("ours: {step:?}"),
        }
        false
    }

    fn image(&mut self, layers: usize) -> Thing {
        let config = format!("{{\"layers\":{layers}}}").into_bytes();
        let blobs: Vec<Thing> = (0..LAYERS).filter(|layer| layers >> layer & 1 == 1).collect();
        let named = |layer: &Thing| {
            let content = &self.model.things[*layer].bytes;
            let mut named = descriptor(OCI_LAYER, content);
            if *layer == STRONG {
                named["digest"] = json!(sha512(content));
            }
            named
        };
        let manifest = bytes(&json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor(OCI_CONFIG, &config),
            "layers": blobs.iter().map(named).collect::<Vec<_>>(),
        }));
        let config = self.model.thing(config, None);
        let blobs = blobs.into_iter().chain([config]).collect();
        self.model.thing(manifest, Some(Manifest { blobs, ..Manifest::default() }))
    }

    fn index(&mut self, children: &BTreeSet<Thing>) -> Thing {
        let named = |child: &Thing| descriptor(self.media_type(*child), &self.model.things[*child].bytes);
        let manifests: Vec<_> = children.iter().map(named).collect();
        let text = bytes(&json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}));
        let children = children.iter().copied().collect();
        self.model.thing(text, Some(Manifest { children, ..Manifest::default() }))
    }

    fn media_type(&self, thing: Thing) -> &'static str {
        let manifest = self.model.things[thing].manifest.as_ref();
        if manifest.is_some_and(|m| m.children.is_empty()) { OCI_MANIFEST } else { OCI_INDEX }
    }

    fn push_referrer(&mut self, name: Name, subject: Thing, how: usize) {
        let about = self.model.things[subject].digest.replace(':', "-");
        let config = b"{}".to_vec();
        let mut manifest = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor(OCI_CONFIG, &config),
            "layers": [], "annotations": {"about": about},
        });
        if matches!(how, 0 | 3) {
            let subject = descriptor(self.media_type(subject), &self.model.things[subject].bytes);
            manifest["subject"] = subject;
        }
        let blobs = vec![self.model.thing(config, None)];
        let subject = matches!(how, 0 | 3).then_some(subject);
        let referrer =
            self.model.thing(bytes(&manifest), Some(Manifest { blobs, subject, ..Manifest::default() }));
        match how {
            0 => self.push(name, None, referrer, false),
            1 => self.push(name, Some(&format!("{about}.sig")), referrer, false),
            3 => self.push(name, Some(TAGS[0]), referrer, false),
            _ => {
                self.push(name, None, referrer, false);
                let index = self.index(&BTreeSet::from([referrer]));
                self.push(name, Some(&about), index, false);
            }
        }
    }

    /// A push in the order of a registry: blobs, layer links, manifest, revision, tag.
    fn push(&mut self, name: Name, tag: Option<&str>, manifest: Thing, cache: bool) {
        let blobs = self.model.things[manifest].manifest.clone().unwrap().blobs;
        for blob in blobs {
            let mut links = vec![Item::Layer(name, blob)];
            links.extend((blob == STRONG).then_some(Item::StrongLayer(name, blob)));
            let items = || links.iter().cloned().chain([Item::Blob(blob)]);
            let is_cached = |item: Item| self.model.has(&item) || self.model.is_in_trash(&item);
            let is_needless = items().all(|item| self.model.has(&item)) || cache && items().all(is_cached);
            if is_needless {
                continue;
            }
            if !self.model.has(&Item::Blob(blob)) {
                self.write(Item::Blob(blob));
            }
            links.into_iter().for_each(|link| self.write(link));
        }
        if !self.model.has(&Item::Blob(manifest)) {
            self.write(Item::Blob(manifest));
        }
        self.write(Item::Revision(name, manifest));
        if let Some(tag) = tag {
            let item = Item::Tag(name, tag.to_string());
            let facts = self.model.store.entry(item.clone()).or_default();
            facts.target = Some(manifest);
            facts.history.insert(manifest);
            self.write(item);
        }
    }

    /// Writes an item to both.
    fn write(&mut self, item: Item) {
        self.model.write(item.clone());
        for (path, content) in self.model.files(&item, &self.model.store[&item]) {
            put(&self.store, path, content);
        }
    }

    fn api_delete(&mut self, name: Name, manifest: Thing) {
        let tags = self.model.tags(name).into_iter().filter(|(_, target)| *target == manifest);
        let tags = tags.map(|(tag, _)| Item::Tag(name, tag));
        for item in tags.chain([Item::Revision(name, manifest)]).collect::<Vec<_>>() {
            let facts = self.model.store.remove(&item).unwrap();
            let files = self.model.files(&item, &facts).into_iter().map(|(path, _)| path);
            assert!(self.store.remove(&files.collect::<Vec<_>>()).is_empty());
        }
    }

    /// Gives the transaction `id` a name that does not depend on the time.
    fn named(&mut self, id: &str) -> String {
        self.transactions += 1;
        let name = format!("{:03}", self.transactions);
        let place = |id: &str| Path::new(".regfs/trash").join(id);
        assert!(self.store.rename(&place(id), &place(&name)).unwrap());
        name
    }

    /// `rm` of whatever `decide` finds in the catalog of the store; `None` where it refuses.
    fn rm(
        &mut self,
        name: Name,
        decide: impl FnOnce(&regfs::catalog::Catalog, &regfs::catalog::Repository) -> Result<edit::Removal, Error>,
    ) -> Result<Option<String>, String> {
        let catalog = scan(&*self.store, &Tables::default(), None);
        let repository = catalog.repository(Path::new(REPOSITORIES[name])).ok_or("the repository is gone")?;
        let removal = match decide(&catalog, repository) {
            Ok(removal) => removal,
            Err(Error::Busy { .. }) => return Ok(None),
            Err(e) => return Err(e.to_string()),
        };
        let transaction = Transaction::begin(&*self.store, "rm", &author(), "").map_err(|e| e.to_string())?;
        edit::take(&*self.store, &catalog, repository, &removal, &transaction).map_err(|e| e.to_string())?;
        Ok(Some(self.named(transaction.id())))
    }

    fn rm_tag(&mut self, tag: usize) -> Result<bool, String> {
        let all = (0..REPOSITORIES.len())
            .flat_map(|name| self.model.tags(name).into_iter().map(move |(tag, _)| (name, tag)));
        let all: Vec<(Name, String)> = all.collect();
        if all.is_empty() {
            return Ok(true);
        }
        let (name, tag) = all[tag % all.len()].clone();
        let removal = self.model.removal_of_tag(name, &tag);
        let id = self.rm(name, |catalog, repository| {
            let tag = repository.tag(catalog.tables.names.intern(OsStr::new(&tag))).unwrap();
            Ok(edit::removal_of_tag(catalog, repository, tag))
        })?;
        self.model.take(&id.unwrap(), removal);
        Ok(true)
    }

    fn rm_manifest(&mut self, manifest: usize) -> Result<bool, String> {
        let all = (0..REPOSITORIES.len())
            .flat_map(|name| self.model.revisions(name).into_iter().map(move |thing| (name, thing)));
        let all: Vec<(Name, Thing)> = all.collect();
        if all.is_empty() {
            return Ok(true);
        }
        let (name, thing) = all[manifest % all.len()];
        let digest = self.model.things[thing].digest.parse().unwrap();
        let id = self.rm(name, |catalog, repository| {
            edit::removal_of_manifest(catalog, repository, catalog.tables.digests.find(&digest).unwrap())
        })?;
        match (id, self.model.removal_of_manifest(name, thing)) {
            (Some(id), Some(removal)) => self.model.take(&id, removal),
            (None, None) => {}
            (id, removal) => return Err(format!("rm {digest}: took {id:?}, should take {removal:?}")),
        }
        Ok(true)
    }

    fn sweep(&mut self, untagged: bool, grace: u64, now: bool) -> Result<bool, String> {
        let options = Options {
            untagged,
            now,
            grace: self.grace(grace),
            uploads: NEVER,
            gate: Gate::STOPPED,
            ..Options::default()
        };
        let report = gc::run(&*self.store, &Tables::default(), &options, &author(), &Unwatched);
        let report = report.map_err(|e| e.to_string())?;
        ensure(report.is_complete(), || report.failures.join("\n"))?;
        self.model.give_back();
        let garbage = self.model.garbage(untagged, grace);
        if garbage.is_empty() {
            return Ok(true);
        }
        if now {
            self.model.take("now", garbage);
            let ended = self.model.ended_with("now");
            self.model.purge(&ended);
            // What the undo of others needs stays.
            if let Some(left) = self.model.trash.remove("now") {
                let id = self.named(&report.transaction.ok_or("all was purged")?);
                self.model.trash.insert(id, left);
            }
        } else {
            let id = self.named(&report.transaction.ok_or("nothing was taken")?);
            self.model.take(&id, garbage);
        }
        Ok(true)
    }

    fn undo(&mut self, transaction: usize) -> Result<bool, String> {
        let ids: Vec<String> = self.model.trash.keys().cloned().collect();
        if ids.is_empty() {
            return Ok(true);
        }
        let id = &ids[transaction % ids.len()];
        let undone = gc::undo(&*self.store, &author(), id).map_err(|e| e.to_string())?;
        let is_done = self.model.undo(id);
        ensure(undone.failures.is_empty(), || format!("the undo of {id}: {:?}", undone.failures))?;
        ensure(is_done == undone.conflicts.is_empty(), || {
            format!("the undo of {id} met {:?}, and the model says it is whole: {is_done}", undone.conflicts)
        })?;
        Ok(true)
    }

    fn purge(&mut self, id: Option<&str>) -> Result<bool, String> {
        self.model.give_back();
        let is_gone = id.is_some_and(|id| !self.model.trash.contains_key(id));
        let selection = id.map_or(Selection::All, |id| Selection::One(id.to_string()));
        match gc::purge_trash(
            &*self.store,
            &Tables::default(),
            &author(),
            &selection,
            &Options { gate: Gate::STOPPED, ..Options::default() },
        ) {
            Ok(purged) => ensure(purged.failures.is_empty(), || format!("{:?}", purged.failures))?,
            // All that was in it has been given back.
            Err(Error::NotFound { .. }) if is_gone => return Ok(true),
            Err(e) => return Err(e.to_string()),
        }
        let ids = self.model.trash.keys().filter(|own| id.is_none_or(|id| id == *own)).cloned().collect();
        self.model.purge(&ids);
        Ok(true)
    }

    /// Asserts that the store holds what the model says, file by file.
    fn compare(&self, contents: &Contents) -> Verdict {
        let expected = self.model.contents();
        let own = |path: &Path| {
            path.ends_with("txn.json")
                || path == Path::new(".regfs/clock")
                || path == Path::new(SOMEONE_PUSHES)
        };
        let missing =
            expected.iter().filter(|(path, text)| contents.get(*path).map(|c| &**c) != Some(**text));
        let missing: Vec<&PathBuf> = missing.map(|(path, _)| path).collect();
        let extra = contents.keys().filter(|path| !expected.contains_key(*path) && !own(path));
        let extra: Vec<&PathBuf> = extra.collect();
        ensure(missing.is_empty() && extra.is_empty(), || {
            format!("not as the model says\n  missing: {missing:#?}\n  extra: {extra:#?}")
        })
    }

    /// Asserts that a sweep without grace would take exactly what the model calls garbage.
    fn dry_run(&self, untagged: bool) -> Verdict {
        let looks = Options {
            dry_run: true,
            thorough: true,
            uploads: NEVER,
            gate: Gate::STOPPED,
            ..Options::default()
        };
        let options = Options { untagged, grace: Duration::ZERO, ..looks };
        let tables = Tables::default();
        let report = gc::run(&*self.store, &tables, &options, &author(), &Unwatched);
        let report = report.map_err(|e| e.to_string())?;
        let moved = report.taken().filter(|item| item.kind().is_moved());
        let taken: BTreeSet<PathBuf> = moved.map(|item| item.path(&tables)).collect();
        // A sweep gives back first.
        let mut model = self.model.clone();
        model.give_back();
        let garbage = model.garbage(untagged, 0);
        let facts = |item: &Item| model.store.get(item).cloned().unwrap_or_default();
        let expected = garbage.iter().flat_map(|item| model.files(item, &facts(item)));
        let expected: BTreeSet<PathBuf> = expected.map(|(path, _)| path).collect();
        let kept: Vec<_> = expected.difference(&taken).collect();
        // A link to what lies in the trash brings it back, to go with the link.
        let trashed = model.trash.values().flatten().filter(|(item, _)| !model.has(item));
        let trashed: BTreeSet<PathBuf> =
            trashed.flat_map(|(item, facts)| model.files(item, facts)).map(|(path, _)| path).collect();
        let goes_again = |path: &PathBuf| trashed.contains(path) && report.restored.contains(path);
        let lost: Vec<_> = taken.difference(&expected).filter(|path| !goes_again(path)).collect();
        ensure(kept.is_empty() && lost.is_empty(), || {
            format!(
                "untagged {untagged}: garbage that would be kept {kept:#?}, live data that would go {lost:#?}"
            )
        })
    }
}

/// Asserts that images of repositories in which all were whole lack nothing that is or was anywhere.
///
/// Others wait for the next collection, which gives back what a registry with a warm cache took for present.
fn whole(before: &Contents, after: &Contents) -> Verdict {
    let name_of = |line: &str| line.split(' ').nth(1).unwrap().to_string();
    let waiting: BTreeSet<String> = Live::of(before).lacks.iter().map(|line| name_of(line)).collect();
    let had: BTreeSet<PathBuf> = everything(before).into_iter().map(|(path, _)| path).collect();
    let is_loss = |line: &String| {
        let words: Vec<&str> = line.split(' ').collect();
        let (name, digest) = (words[1], words[2]);
        let was_there = match words[0] {
            "revision" => had.contains(&revision_link(name, digest)),
            "manifest" => had.contains(&blob_path(digest)),
            "layer" => had.contains(&layer_link(name, digest)),
            _ => true,
        };
        was_there && !waiting.contains(name)
    };
    let lost: Vec<String> = Live::of(after).lacks.into_iter().filter(is_loss).collect();
    ensure(lost.is_empty(), || format!("live images lack {lost:#?}"))
}

/// Takes the steps in a new world; the number of the one that failed, and why.
fn run(steps: &[Step]) -> Result<(), (usize, String)> {
    let mut world = World::new();
    steps.iter().enumerate().try_for_each(|(at, step)| world.step(*step).map_err(|why| (at, why)))
}

/// Takes the steps; a sequence that fails is made shorter, then printed as Rust.
fn check(origin: &str, steps: &[Step]) {
    let Err((last, _)) = run(steps) else { return };
    let mut steps = steps[..=last].to_vec();
    let mut at = 0;
    while at < steps.len() {
        let mut shorter = steps.clone();
        shorter.remove(at);
        match run(&shorter) {
            Err((last, _)) => steps = shorter[..=last].to_vec(),
            Ok(()) => at += 1,
        }
    }
    let why = run(&steps).unwrap_err().1;
    let list: String = steps.iter().map(|step| format!("        Step::{step:?},\n")).collect();
    panic!(
        "{origin}: {why}\n\n#[test]\nfn regression_() {{\n    check(\"regression\", &[\n{list}    ]);\n}}\n"
    );
}

fn check_seeds(seeds: impl Iterator<Item = u64>) {
    for seed in seeds {
        let mut random = Random(seed);
        let steps: Vec<Step> = (0..STEPS).map(|_| random.step()).collect();
        check(&format!("seed {seed}"), &steps);
    }
}

#[test]
fn regfs_does_what_the_model_says() {
    check_seeds((0..SEQUENCES).filter(|seed| seed % 2 == 0));
}

#[test]
fn regfs_does_what_the_model_says_on_the_other_seeds() {
    check_seeds((0..SEQUENCES).filter(|seed| seed % 2 == 1));
}

/// Bytes that were pushed again after a sweep lie in the trash as well; the undo that needs them finds them there.
#[test]
fn regression_sweep_now_ends_only_what_needs_its_bytes() {
    let steps = [
        Step::PushImage { repository: 2, layers: 17, tag: 3, cache: false },
        Step::Sweep { untagged: true, grace: 0, now: false },
        Step::PushImage { repository: 1, layers: 24, tag: 3, cache: false },
        Step::Sweep { untagged: true, grace: 0, now: true },
    ];
    check("regression", &steps);
}

/// An `rm` of another repository needs a layer of the same digest, not this link to it.
#[test]
fn regression_a_purge_keeps_only_what_an_undo_fetches() {
    let steps = [
        Step::PushImage { repository: 0, layers: 22, tag: 0, cache: false },
        Step::RmTag { tag: 494 },
        Step::PushImage { repository: 1, layers: 21, tag: 0, cache: false },
        Step::RmTag { tag: 803 },
        Step::Undo { transaction: 19 },
        Step::ApiDelete { repository: 1, manifest: 371 },
        Step::Sweep { untagged: false, grace: 0, now: false },
        Step::Purge { transaction: 975 },
    ];
    check("regression", &steps);
}
