//! Builds a [`Catalog`] from a store; from the one before, reads only what changed.
//!
//! # Rules kept here
//! 1. Blobs are listed first: a push writes blobs first and its tag last, so a blob that appears during the
//!    scan is not in the list and can't be called garbage.
//! 2. Nothing is skipped in silence. A failing call stops collections ([`Effect::StopsSweep`]); damage keeps what
//!    it might hold; what merely lies around is noted.
//! 3. A symlink where the registry would look for content hides what it holds, so it stops collections too.
//! 4. Layer links under sha256 are not read: their path says all there is to know, and there are too many of them.
//! 5. An empty link is read again before it is called broken: registries before 3.1 rewrite links in place.
//! 6. A link counts as unchanged by size, times and inode, and only if it had been at rest when last read: two
//!    writes within one tick of the clock can't be told apart.
//!
//! # Cost
//! A `list` per directory; a `read` per tag, revision and manifest. Again: a `stat` per tag and revision.
//! No call per layer or per blob.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use super::intern::{DigestId, IdSet, NameId};
use super::{Aliases, Catalog, Effect, Keeps, Problem, Repository, Revision, Tables, Tag};
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Found, Result};
use crate::layout;
use crate::printable::Printable;
use crate::store::{Directory, Entry, Kind, Stat, Store, Version};

/// How often, and how long apart, an empty link is read again.
const EMPTY_LINK_READS: u32 = 4;
const EMPTY_LINK_PAUSE: Duration = Duration::from_millis(5);
/// How long a file must have been at rest for its times to tell versions apart.
const AT_REST: Duration = Duration::from_secs(2);

/// What a scan looks at besides what decides about every image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Depth {
    /// Tags. Without them, what only a tag names whose manifest was deleted looks like garbage.
    pub tags: bool,
    /// Times of links: a scan after this one then reads only what changed. Without them a tag that is in order is
    /// looked at and not kept: its manifest is a revision anyway.
    pub times: bool,
}

impl Depth {
    /// At everything.
    pub const WHOLE: Depth = Depth { tags: true, times: true };
}

/// Looks at the whole store.
///
/// With `previous`, manifests are taken from it (their digests vouch for them) and links with the same facts
/// are not read again. Never fails: what fails is a [`Problem`].
pub fn scan(store: &dyn Store, tables: &Tables, previous: Option<&Catalog>) -> Catalog {
    scan_to(store, tables, previous, Depth::WHOLE)
}

fn scan_to(store: &dyn Store, tables: &Tables, previous: Option<&Catalog>, depth: Depth) -> Catalog {
    let mut scan = Scan { depth, ..Scan::new(store, tables, previous) };
    let scanned_at = SystemTime::now();
    let blobs = scan.blobs();
    let mut found = Vec::new();
    scan.namespace(Path::new(""), true, &mut found);
    scan.all_repositories(&found);
    if !blobs.is_empty() && scan.repositories.is_empty() {
        scan.expect_repositories();
    }
    let present: IdSet = blobs.iter().copied().collect();
    let manifests = Arc::new(scan.manifests(&present));
    let Scan { mut problems, aliases, repositories, namespaces, .. } = scan;
    sort(&mut problems);
    let known = |name: &Path| previous.and_then(|p| p.repositories.get(name));
    let shared = |name: &Path, repository: Repository| match known(name) {
        Some(known) if **known == repository => known.clone(),
        _ => Arc::new(repository),
    };
    let repositories = repositories.into_iter().map(|(name, r)| (name.clone(), shared(&name, r))).collect();
    let (blobs, present, aliases) = (blobs.into(), Arc::new(present), Arc::new(aliases));
    Catalog {
        tables: tables.clone(),
        repositories,
        namespaces,
        manifests,
        blobs,
        present,
        aliases,
        problems,
        scanned_at,
    }
}

pub(super) fn sort(problems: &mut Vec<Problem>) {
    problems.sort_by(|a, b| a.path.cmp(&b.path).then_with(|| a.what.cmp(&b.what)));
    problems.dedup();
}

pub(super) struct Scan<'a> {
    pub(super) store: &'a dyn Store,
    pub(super) tables: &'a Tables,
    pub(super) previous: Option<&'a Catalog>,
    depth: Depth,
    pub(super) problems: Vec<Problem>,
    pub(super) aliases: Aliases,
    pub(super) repositories: BTreeMap<PathBuf, Repository>,
    pub(super) namespaces: BTreeSet<PathBuf>,
}

/// What stands in a link file.
enum Link {
    Absent,
    /// It could not be read, or is no digest; noted already.
    Bad(Version),
    To(Digest, Version),
}

impl<'a> Scan<'a> {
    pub(super) fn new(store: &'a dyn Store, tables: &'a Tables, previous: Option<&'a Catalog>) -> Scan<'a> {
        Scan {
            store,
            tables,
            previous,
            depth: Depth::WHOLE,
            problems: Vec::new(),
            aliases: HashMap::new(),
            repositories: BTreeMap::new(),
            namespaces: BTreeSet::new(),
        }
    }

    /// One that looks at a part, for another thread.
    pub(super) fn part(&self) -> Scan<'a> {
        Scan { depth: self.depth, ..Scan::new(self.store, self.tables, self.previous) }
    }

    /// Takes over what a part found.
    pub(super) fn absorb(&mut self, part: Scan<'_>) {
        self.problems.extend(part.problems);
        self.repositories.extend(part.repositories);
        for (id, targets) in part.aliases {
            let known = self.aliases.entry(id).or_default();
            targets.into_iter().for_each(|target| {
                if !known.contains(&target) {
                    known.push(target);
                }
            });
        }
    }

    fn all_repositories(&mut self, found: &[(PathBuf, bool)]) {
        let whole = &*self;
        let parts = spread(
            self.tables.threads,
            found,
            || whole.part(),
            |part, (name, is_valid)| {
                part.repository(name, *is_valid);
            },
        );
        parts.into_iter().for_each(|part| self.absorb(part));
    }

    pub(super) fn note(&mut self, path: &Path, what: impl ToString, effect: Effect) {
        self.problems.push(Problem { path: path.to_path_buf(), what: what.to_string(), effect });
    }

    /// Notes a failed call; damage has the given effect, anything else stops collections.
    pub(super) fn failed(&mut self, path: &Path, error: &Error, effect: Effect) {
        let effect = if error.is_damage() { effect } else { Effect::StopsSweep };
        self.note(path, error, effect);
    }

    /// Lists a directory that must be one; `effect` is what follows from anything else in its place.
    fn list(&mut self, path: &Path, effect: Effect) -> Vec<Entry> {
        match self.store.list(path) {
            Ok(entries) => entries.unwrap_or_default(),
            Err(e) => {
                self.failed(path, &e, effect);
                Vec::new()
            }
        }
    }

    /// The directories among the entries of `path`; symlinks there have the given effect, files none.
    pub(super) fn directories(&mut self, path: &Path, effect: Effect) -> Vec<OsString> {
        self.directories_named(path, effect, &|_| false)
    }

    /// The same where something named so that `belongs` says yes must be a directory: a file has replaced it then,
    /// and what it held is as unknown as behind a symlink.
    fn directories_named(
        &mut self,
        path: &Path,
        effect: Effect,
        belongs: &dyn Fn(&OsStr) -> bool,
    ) -> Vec<OsString> {
        let mut names = Vec::new();
        for entry in self.list(path, effect.clone()) {
            let below = path.join(&entry.name);
            match entry.kind {
                Kind::Directory => names.push(entry.name),
                kind if belongs(&entry.name) => self.replaced(&below, kind, effect.clone()),
                kind => self.misplaced(&below, kind, effect.clone()),
            }
        }
        names
    }

    /// Notes that `path` is no directory. A plain file hides nothing; a symlink may hide what `effect` says.
    fn misplaced(&mut self, path: &Path, kind: Kind, effect: Effect) {
        self.replaced(path, kind, if kind == Kind::Symlink { effect } else { Effect::Ignored });
    }

    fn replaced(&mut self, path: &Path, kind: Kind, effect: Effect) {
        let full = self.store.full(path);
        self.note(path, format!("{} is {}", full.printable(), Found::from(kind)), effect);
    }

    fn unknown_name(&mut self, path: &Path, what: &str) {
        let full = self.store.full(path);
        self.note(path, format!("{} is {what}", full.printable()), Effect::Ignored);
    }

    fn blobs(&mut self) -> Vec<DigestId> {
        let mut shards: Vec<(Algorithm, OsString)> = Vec::new();
        let root = Path::new(layout::BLOBS);
        // A symlink in here hides blobs only from us: they are not listed, so they are never taken.
        for algorithm in self.directories(root, Effect::Ignored) {
            let path = root.join(&algorithm);
            match algorithm.to_str().and_then(Algorithm::from_name) {
                Some(algorithm) => {
                    let names = self.directories(&path, Effect::Ignored);
                    shards.extend(names.into_iter().map(|name| (algorithm, name)));
                }
                None => self.unknown_name(&path, "no known algorithm; what lies below it is never collected"),
            }
        }
        shards.sort_unstable();
        let numbered: Vec<(usize, (Algorithm, OsString))> = shards.into_iter().enumerate().collect();
        let whole = &*self;
        let start = || (whole.part(), Vec::new());
        let parts = spread(self.tables.threads, &numbered, start, |(part, found), (at, shard)| {
            found.push((*at, part.blobs_in(shard.0, &shard.1)));
        });
        let mut all: Vec<(usize, Vec<DigestId>)> = Vec::new();
        for (part, found) in parts {
            self.absorb(part);
            all.extend(found);
        }
        all.sort_unstable_by_key(|(at, _)| *at);
        let mut blobs = Vec::with_capacity(all.iter().map(|(_, ids)| ids.len()).sum());
        all.into_iter().for_each(|(_, ids)| blobs.extend(ids));
        blobs
    }

    /// The blobs of one directory like `blobs/sha256/ab`, in the order of their numbers.
    fn blobs_in(&mut self, algorithm: Algorithm, shard: &OsStr) -> Vec<DigestId> {
        let mut blobs = Vec::new();
        let path = Path::new(layout::BLOBS).join(algorithm.name()).join(shard);
        let mut strange: Vec<(OsString, Kind)> = Vec::new();
        let listed = self.store.list_each(&path, &mut |name, kind| {
            let digest = name.to_str().and_then(|hex| Digest::from_parts(algorithm.name(), hex));
            let is_in_place = name.as_encoded_bytes().starts_with(shard.as_encoded_bytes());
            match digest.filter(|_| is_in_place && kind == Kind::Directory) {
                Some(digest) => blobs.push(self.tables.digests.intern(&digest)),
                None => strange.push((name.to_os_string(), kind)),
            }
        });
        if let Err(e) = listed {
            self.failed(&path, &e, Effect::Ignored);
        }
        for (name, kind) in strange {
            match kind {
                Kind::Directory => {
                    self.unknown_name(&path.join(name), "no digest of a blob in the right place");
                }
                kind => self.misplaced(&path.join(name), kind, Effect::Ignored),
            }
        }
        blobs.sort_unstable();
        blobs
    }

    /// Finds the repositories below a directory of `repositories`, and whether their names are valid.
    pub(super) fn namespace(&mut self, name: &Path, is_valid: bool, found: &mut Vec<(PathBuf, bool)>) {
        let mut waiting = vec![(name.to_path_buf(), is_valid)];
        while let Some((name, is_valid)) = waiting.pop() {
            self.one_namespace(name, is_valid, found, &mut waiting);
        }
    }

    /// The same of one directory; those in it are `waiting` then.
    fn one_namespace(
        &mut self,
        name: PathBuf,
        is_valid: bool,
        found: &mut Vec<(PathBuf, bool)>,
        waiting: &mut Vec<(PathBuf, bool)>,
    ) {
        if is_valid && !name.as_os_str().is_empty() {
            self.namespaces.insert(name.clone());
        }
        let path = layout::repository(&name);
        let mut is_repository = false;
        for entry in self.list(&path, Effect::StopsSweep) {
            let own =
                [layout::MANIFESTS, layout::LAYERS, layout::UPLOADS].iter().any(|own| entry.name == *own);
            is_repository |= own && !name.as_os_str().is_empty();
            let below = name.join(&entry.name);
            match entry.kind {
                // What `_manifests` or `_layers` is, the repository finds out.
                _ if own => {}
                Kind::Directory if below.as_os_str().len() > layout::LONGEST_NAME => self.too_long(&below),
                Kind::Directory if layout::is_name_component(&entry.name) => waiting.push((below, is_valid)),
                Kind::Directory if entry.name.as_encoded_bytes().starts_with(b"_") => {
                    self.unknown_name(&path.join(&entry.name), "no part of a repository that regfs knows");
                }
                Kind::Directory => {
                    self.unknown_name(
                        &layout::repository(&below),
                        "no valid repository name; what it links is kept",
                    );
                    waiting.push((below, false));
                }
                kind => self.misplaced(&path.join(&entry.name), kind, Effect::StopsSweep),
            }
        }
        if is_repository {
            found.push((name, is_valid));
        }
    }

    /// Notes a directory whose name is longer than that of any repository. What it links can't be asked for; that it
    /// links nothing at all is certain only where there is no file.
    fn too_long(&mut self, name: &Path) {
        let path = layout::repository(name);
        let full = self.store.full(&path);
        let longest = layout::LONGEST_NAME;
        match self.store.holds_files(&path) {
            Ok(false) => self.note(
                &path,
                format!(
                    "{} is nested deeper than the name of a repository can be ({longest} characters); there are only \
                     directories in it",
                    full.printable()
                ),
                Effect::Ignored,
            ),
            Ok(true) => self.note(
                &path,
                format!(
                    "{} is nested deeper than the name of a repository can be ({longest} characters), but there are \
                     files in it; move them to somewhere else",
                    full.printable()
                ),
                Effect::StopsSweep,
            ),
            Err(e) => self.failed(&path, &e, Effect::StopsSweep),
        }
    }

    /// Notes when there is not even a directory of repositories: whatever named the blobs is out of sight, as when it
    /// lies on a filesystem that is not mounted.
    fn expect_repositories(&mut self) {
        let path = Path::new(layout::REPOSITORIES);
        if let Ok(None) = self.store.list(path) {
            let what = format!("{} is missing, but there are blobs", self.store.full(path).printable());
            self.note(path, what, Effect::StopsSweep);
        }
    }

    pub(super) fn repository(&mut self, name: &Path, is_valid: bool) {
        let keeps = if is_valid { Keeps::Named } else { Keeps::Everything };
        let mut repository =
            Repository { name: name.to_path_buf(), is_valid, keeps, ..Repository::default() };
        let everything = Effect::KeepsEverything(name.to_path_buf());
        let problems_before = self.problems.len();
        let manifests = layout::repository(name).join(layout::MANIFESTS);
        for entry in self.list(&manifests, Effect::StopsSweep) {
            let path = manifests.join(&entry.name);
            let (is_revisions, is_tags) = (entry.name == layout::REVISIONS, entry.name == layout::TAGS);
            match entry.kind {
                Kind::Directory if is_revisions || is_tags => {}
                // Whatever has taken their place, which manifests there were is unknown.
                kind if is_revisions => self.replaced(&path, kind, Effect::StopsSweep),
                kind if is_tags => self.replaced(&path, kind, Effect::KeepsRevisions(name.to_path_buf())),
                _ => self.unknown_name(&path, "neither tags nor revisions"),
            }
        }
        let before = self.previous.and_then(|p| p.repositories.get(name)).cloned();
        self.revisions(&mut repository, before.as_deref());
        if self.depth.tags {
            self.tags(&mut repository, before.as_deref());
        }
        self.layers(&mut repository);
        for upload in self.directories(&layout::uploads(name), Effect::Ignored) {
            repository.uploads.push(self.tables.names.intern(&upload));
        }
        // Damage found here raises what the repository keeps.
        let mut raised = repository.keeps;
        for problem in &self.problems[problems_before..] {
            raised = raised.max(match &problem.effect {
                Effect::KeepsRevisions(of) if of == name => Keeps::Revisions,
                // What a failing call hides may hold anything.
                Effect::StopsSweep => Keeps::Everything,
                effect if *effect == everything => Keeps::Everything,
                _ => Keeps::Named,
            });
        }
        repository.keeps = raised;
        self.repositories.insert(name.to_path_buf(), repository);
    }

    fn revisions(&mut self, repository: &mut Repository, before: Option<&Repository>) {
        let everything = Effect::KeepsEverything(repository.name.clone());
        let root = layout::revisions(&repository.name);
        let known: HashMap<DigestId, &Revision> =
            before.into_iter().flat_map(|r| &r.revisions).map(|r| (r.digest, r)).collect();
        for algorithm in self.directories_named(&root, Effect::StopsSweep, &is_algorithm) {
            let path = root.join(&algorithm);
            let entries = self.list(&path, everything.clone());
            let Some(mut links) = self.directory(&path, entries.is_empty(), everything.clone()) else {
                continue;
            };
            for Entry { name: hex, kind } in entries {
                let Some(digest) = parts(&algorithm, &hex) else {
                    self.note_unknown_digest(&path.join(&hex), everything.clone());
                    continue;
                };
                let id = self.tables.digests.intern(&digest);
                if kind != Kind::Directory {
                    // Its name still tells which manifest it was.
                    self.replaced(&path.join(&hex), kind, everything.clone());
                    repository.held.push(id);
                    repository.held_manifests.push(id);
                    continue;
                }
                let name = layout::link_in(&hex);
                // One that points elsewhere is noted anew each time.
                let is_plain = |r: &Revision| r.is_readable && r.target == r.digest;
                let unchanged =
                    known.get(&id).filter(|r| is_plain(r) && self.is_unchanged(&*links, &name, &r.version));
                if let Some(revision) = unchanged {
                    repository.revisions.push(**revision);
                    continue;
                }
                let read = self.read_link_in(&mut *links, &path, &name, &everything);
                let (target, version, is_readable) = match read {
                    Link::Absent => continue,
                    Link::To(target, version) if target == digest => (id, version, true),
                    Link::To(target, version) => (self.tables.digests.intern(&target), version, true),
                    Link::Bad(version) => (id, version, false),
                };
                if target != id {
                    let link = path.join(&name);
                    let what = format!("{} holds another digest", self.store.full(&link).printable());
                    self.note(&link, what, everything.clone());
                }
                repository.revisions.push(Revision { digest: id, target, version, is_readable });
            }
        }
        repository.revisions.sort_unstable_by_key(|r| r.digest);
        repository.revisions.shrink_to_fit();
    }

    fn tags(&mut self, repository: &mut Repository, before: Option<&Repository>) {
        let revisions = Effect::KeepsRevisions(repository.name.clone());
        let root = layout::tags(&repository.name);
        let known: HashMap<NameId, &Tag> =
            before.into_iter().flat_map(|r| &r.tags).map(|t| (t.name, t)).collect();
        let names = self.directories_named(&root, revisions.clone(), &layout::is_tag);
        let Some(mut links) = self.directory(&root, names.is_empty(), revisions.clone()) else { return };
        for name in names {
            let below = layout::tag_link_in(&name);
            let link = || root.join(&below);
            let id = self.tables.names.intern(&name);
            let unchanged = known
                .get(&id)
                .filter(|t| t.target.is_some() && self.is_unchanged(&*links, &below, &t.version));
            let tag = match unchanged {
                Some(tag) => **tag,
                None => match self.read_link_in(&mut *links, &root, &below, &revisions) {
                    Link::To(target, version) => {
                        Tag { name: id, target: Some(self.tables.digests.intern(&target)), version }
                    }
                    Link::Bad(version) => Tag { name: id, target: None, version },
                    Link::Absent => {
                        let link = link();
                        let what = format!(
                            "{} is missing: the tag points nowhere",
                            self.store.full(&link).printable()
                        );
                        self.note(&link, what, revisions.clone());
                        Tag { name: id, target: None, version: Version::UNKNOWN }
                    }
                },
            };
            if layout::is_tag(&name) {
                let is_dangling = tag.target.is_some_and(|t| repository.revision(t).is_none());
                if is_dangling {
                    repository.held_manifests.extend(tag.target);
                    let link = link();
                    let full = self.store.full(&link);
                    let what = format!(
                        "{} points at a manifest that this repository does not have",
                        full.printable()
                    );
                    self.note(&link, what, Effect::KeepsNamed);
                    repository.held.extend(tag.target);
                }
                if self.depth.times || is_dangling || tag.target.is_none() {
                    repository.tags.push(tag);
                }
            } else {
                self.unknown_name(&root.join(&name), "no valid tag; what it points at is kept");
                repository.held.extend(tag.target);
                repository.held_manifests.extend(tag.target);
            }
        }
        repository.tags.sort_unstable_by_key(|t| t.name);
    }

    fn layers(&mut self, repository: &mut Repository) {
        let everything = Effect::KeepsEverything(repository.name.clone());
        let root = layout::layers(&repository.name);
        for algorithm in self.directories_named(&root, Effect::StopsSweep, &is_algorithm) {
            let path = root.join(&algorithm);
            if algorithm == Algorithm::Sha256.name() {
                self.usual_layers(repository, &path, everything.clone());
                continue;
            }
            for hex in self.directories(&path, everything.clone()) {
                let digest = parts(&algorithm, &hex);
                if digest.is_none() && is_algorithm(&algorithm) {
                    self.note_unknown_digest(&path.join(&hex), Effect::Ignored);
                    continue;
                }
                let id = digest.map(|d| self.tables.digests.intern(&d));
                repository.layers.extend(id);
                // Blobs lie under sha256; only the link tells which one another algorithm's name means.
                let Link::To(target, _) = self.read_link(&path.join(&hex).join("link"), everything.clone())
                else {
                    continue;
                };
                let target = self.tables.digests.intern(&target);
                match id {
                    Some(id) if id == target => {}
                    Some(id) => {
                        let targets = self.aliases.entry(id).or_default();
                        if !targets.contains(&target) {
                            targets.push(target);
                        }
                    }
                    None => repository.held.push(target),
                }
            }
        }
        repository.layers.sort_unstable();
    }

    /// Layer links under sha256, nearly all there are: only their names are looked at.
    fn usual_layers(&mut self, repository: &mut Repository, path: &Path, effect: Effect) {
        let mut strange: Vec<(OsString, Kind)> = Vec::new();
        let mut digests: Vec<Digest> = Vec::new();
        let listed = self.store.list_each(path, &mut |name, kind| {
            let digest = name.to_str().and_then(|hex| Digest::from_parts(Algorithm::Sha256.name(), hex));
            match digest.filter(|_| kind == Kind::Directory) {
                Some(digest) => digests.push(digest),
                None => strange.push((name.to_os_string(), kind)),
            }
        });
        repository.layers.extend(self.tables.digests.intern_all(&digests));
        if let Err(e) = listed {
            self.failed(path, &e, effect.clone());
        }
        for (name, kind) in strange {
            match kind {
                Kind::Directory => self.note_unknown_digest(&path.join(name), Effect::Ignored),
                kind => self.misplaced(&path.join(name), kind, effect.clone()),
            }
        }
    }

    /// Opens a directory whose files are about to be read; `None` when it can't be, or `is_empty`.
    fn directory(&mut self, path: &Path, is_empty: bool, effect: Effect) -> Option<Box<dyn Directory + 'a>> {
        if is_empty {
            return None;
        }
        match self.store.directory(path) {
            Ok(directory) => Some(directory),
            Err(e) => {
                self.failed(path, &e, effect);
                None
            }
        }
    }

    fn note_unknown_digest(&mut self, path: &Path, effect: Effect) {
        let what = format!("{} is not named by a digest that regfs knows", self.store.full(path).printable());
        self.note(path, what, effect);
    }

    /// Whether the file `name` is the version that `known` describes.
    fn is_unchanged(&self, directory: &dyn Directory, name: &Path, known: &Version) -> bool {
        let read_at = self.previous.map_or(SystemTime::UNIX_EPOCH, |p| p.scanned_at);
        let rest = known.last_change().and_then(|changed| read_at.duration_since(changed).ok());
        let was_at_rest = rest.is_some_and(|rest| rest > AT_REST);
        // A failing stat is not hidden: the read that follows meets it again.
        was_at_rest
            && directory.stat(name).is_ok_and(|stat| stat.is_some_and(|s| Version::from(&s) == *known))
    }

    fn read_link(&mut self, path: &Path, effect: Effect) -> Link {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Link::Absent };
        match self.directory(parent, false, effect.clone()) {
            Some(mut directory) => self.read_link_in(&mut *directory, parent, Path::new(name), &effect),
            None => Link::Bad(Version::UNKNOWN),
        }
    }

    /// Reads the link `name` of the directory `prefix`.
    fn read_link_in(
        &mut self,
        directory: &mut dyn Directory,
        prefix: &Path,
        name: &Path,
        effect: &Effect,
    ) -> Link {
        let facts = self.depth.times;
        let mut reads = 0;
        let (content, stat) = loop {
            match directory.read(name, layout::LINK_LIMIT, facts) {
                Ok(Some((content, stat))) if !content.is_empty() => break (content, stat),
                Ok(Some((_, stat))) if reads < EMPTY_LINK_READS && stat.is_some_and(|s| is_recent(&s)) => {
                    reads += 1;
                    std::thread::sleep(EMPTY_LINK_PAUSE);
                }
                Ok(Some((_, stat))) => break (&[][..], stat),
                Ok(None) => return Link::Absent,
                Err(e) => {
                    self.failed(&prefix.join(name), &e, effect.clone());
                    return Link::Bad(Version::UNKNOWN);
                }
            }
        };
        let version = stat.as_ref().map_or(Version::UNKNOWN, Version::from);
        match layout::parse_link(content) {
            Ok(digest) => Link::To(digest, version),
            Err(e) => {
                let shown: String = String::from_utf8_lossy(content).chars().take(100).collect();
                let path = prefix.join(name);
                let what = format!("{} holds {shown:?}: {e}", self.store.full(&path).printable());
                self.note(&path, what, effect.clone());
                Link::Bad(version)
            }
        }
    }
}

/// Does `work` for each of `items`, on several threads; what each thread gathered in a value made by `start`.
pub(crate) fn spread<T: Sync, S: Send>(
    threads: NonZeroUsize,
    items: &[T],
    start: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, &T) + Sync,
) -> Vec<S> {
    let next = AtomicUsize::new(0);
    let run = || {
        let mut gathered = start();
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            work(&mut gathered, item);
        }
        gathered
    };
    let others = threads.get().min(items.len()).saturating_sub(1);
    std::thread::scope(|scope| {
        // Where there may be no more threads, or no memory for them, fewer do the same.
        let spawn = || std::thread::Builder::new().spawn_scoped(scope, run).ok();
        let others: Vec<_> = (0..others).map_while(|_| spawn()).collect();
        let mut all = vec![run()];
        for other in others {
            match other.join() {
                Ok(gathered) => all.push(gathered),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    })
}

fn is_algorithm(name: &OsStr) -> bool {
    name.to_str().and_then(Algorithm::from_name).is_some()
}

fn parts(algorithm: &OsStr, hex: &OsStr) -> Option<Digest> {
    Digest::from_parts(algorithm.to_str()?, hex.to_str()?)
}

/// Whether a file may be in the middle of being written.
fn is_recent(stat: &Stat) -> bool {
    SystemTime::now().duration_since(stat.modified).is_ok_and(|age| age < AT_REST)
}

/// A scan that must see everything: fails where a collection could not run.
pub fn scan_strictly(store: &dyn Store, tables: &Tables, previous: Option<&Catalog>) -> Result<Catalog> {
    strictly(scan(store, tables, previous))
}

/// The same for one look, of which nothing but `depth` is needed.
pub fn scan_once(
    store: &dyn Store,
    tables: &Tables,
    previous: Option<&Catalog>,
    depth: Depth,
) -> Result<Catalog> {
    strictly(scan_to(store, tables, previous, depth))
}

fn strictly(catalog: Catalog) -> Result<Catalog> {
    match catalog.obstacles() {
        problems if problems.is_empty() => Ok(catalog),
        problems => Err(Error::Unjudged { problems }),
    }
}
