//! Leftovers: what crashes, deletions and sweeps leave behind and no registry removes.
//!
//! - layer links that no manifest of their repository names, whether or not the blob is there or another repository
//!   has it; history links of manifests that are gone from the repository
//! - uploads that were never finished; `*.<uuid>.tmp` files of writers that crashed
//! - empty directories of blobs, links and uploads; shards; repositories without images, and namespaces without any
//!
//! # Rules kept here
//! 1. Only what is older than the grace period: a link by its times, an upload also by the newest file in it, a
//!    directory by the last change in it. A mount of a blob from another repository writes the link before there is a
//!    manifest, and a push makes its directories before it puts anything into them.
//! 2. A file moves to the trash, an upload as a whole. A directory is removed by a call that fails unless it is empty.
//! 3. Of a repository with a manifest, a tag or a young upload only leaves go: never `_manifests`, `revisions`, `tags`,
//!    `_layers`, `_uploads`. An eager remover of directories makes pushes fail: they make one, then open a file in it.
//! 4. What regfs does not know stays, and so does the directory it lies in.
//! 5. A failing call ends the run; what stands where something else belongs is left.
//!
//! # Cost
//! The quick search looks only at what the catalog shows as odd; nothing is asked for a blob or a link that is kept.
//! The thorough one lists every directory of a blob, a link, a tag; once, for a second look asks only about what the
//! first one found.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::mark::{Mark, Reach};
use super::plan::{Candidate, Going, Item, Policy, Reason, What};
use crate::catalog::intern::{DigestId, IdSet, NameId};
use crate::catalog::{Catalog, Keeps, Repository};
use crate::digest::{Algorithm, Digest};
use crate::edit;
use crate::error::Result;
use crate::layout;
use crate::store::{Entry, Kind, Stat, Store, is_too_deep};

/// What a search knows.
#[derive(Clone, Copy)]
pub(super) struct Facts<'a> {
    pub(super) store: &'a dyn Store,
    pub(super) catalog: &'a Catalog,
    pub(super) policy: &'a Policy,
    pub(super) going: &'a Going,
    pub(super) mark: &'a Mark,
    /// Whether every directory is looked into.
    pub(super) is_thorough: bool,
}

/// What the mark decides about, and no search needs to look at.
pub(super) struct Decided {
    /// Unreferenced blobs whose bytes are there.
    known: IdSet,
    /// The links to those, in order.
    linked: Vec<(NameId, DigestId)>,
}

impl Decided {
    pub(super) fn of(candidates: &[Candidate]) -> Decided {
        let known = candidates.iter().map(|c| c.digest).collect();
        let mut linked = Vec::with_capacity(candidates.iter().map(|c| c.links.len()).sum());
        linked.extend(candidates.iter().flat_map(|c| &c.links));
        linked.sort_unstable();
        Decided { known, linked }
    }
}

/// Finds the leftovers; `planned` is what the mark decided.
///
/// A second look gives what the `first` one found: it searches quickly, and looks at the rest of that one by one.
pub(super) fn search(
    facts: &Facts<'_>,
    decided: Decided,
    planned: &[Item],
    first: Option<&[Item]>,
) -> Result<Vec<Item>> {
    let Facts { store, catalog, policy, going, mark, is_thorough } = *facts;
    let Decided { known, linked } = decided;
    let is_thorough = is_thorough && first.is_none();
    let named = Reach::new(catalog);
    let mut search =
        Search { store, catalog, policy, going, known, linked, named, is_thorough, items: Vec::new() };
    for item in first.unwrap_or_default() {
        if search.is_still(item)? {
            search.items.push(item.clone());
        }
    }
    // Bare repositories ask what goes of theirs.
    let bare: HashSet<NameId> =
        catalog.repositories.values().filter(|r| is_bare(r)).map(|r| name_id(catalog, r)).collect();
    let is_of_bare = |item: &&Item| item.repository().is_some_and(|name| bare.contains(&name));
    let mut going_files: HashSet<PathBuf> = search.items.iter().map(|i| i.path(&catalog.tables)).collect();
    let links = planned.iter().filter(|item| matches!(item.what, What::LayerLink(..)));
    going_files.extend(links.filter(is_of_bare).map(|item| item.path(&catalog.tables)));
    for repository in catalog.repositories.values().filter(|r| policy.includes(&r.name)) {
        search.repository(repository, &going_files)?;
    }
    search.namespaces()?;
    if policy.options.repositories.is_none() {
        search.blobs(mark)?;
    }
    let mut items = search.items;
    if first.is_some() {
        let mut seen = HashSet::new();
        items.retain(|item| seen.insert(item.what.clone()));
    }
    Ok(items)
}

/// Where a walk over what a repository names begins when `going` are gone.
pub(super) fn roots(repository: &Repository, going: &[DigestId]) -> Vec<DigestId> {
    let staying = repository.revisions.iter().filter(|r| !going.contains(&r.digest));
    let roots = staying.flat_map(|r| [r.digest, r.target]);
    roots.chain(repository.held.iter().copied()).collect()
}

fn is_bare(repository: &Repository) -> bool {
    repository.revisions.is_empty()
        && repository.tags.is_empty()
        && repository.held.is_empty()
        && repository.keeps == Keeps::Named
}

fn name_id(catalog: &Catalog, repository: &Repository) -> NameId {
    catalog.tables.names.intern(repository.name.as_os_str())
}

/// What a call says, `None` also where something else stands in that place: that is left.
pub(super) fn unless_misplaced<T>(result: Result<Option<T>>) -> Result<Option<T>> {
    match result {
        Err(e) if e.is_damage() => Ok(None),
        result => result,
    }
}

fn last_use(stat: &Stat) -> SystemTime {
    stat.modified.max(stat.changed)
}

struct Search<'a> {
    store: &'a dyn Store,
    catalog: &'a Catalog,
    policy: &'a Policy,
    going: &'a Going,
    /// Unreferenced blobs whose bytes are there; their links are decided with them.
    known: IdSet,
    /// The links to those, in order.
    linked: Vec<(NameId, DigestId)>,
    /// What the repository that is looked at leads to.
    named: Reach,
    is_thorough: bool,
    items: Vec<Item>,
}

impl Search<'_> {
    fn add_directory(&mut self, path: &Path) {
        self.add(What::Directory(Box::new(path.to_path_buf())), 0, Reason::Empty);
    }

    fn add(&mut self, what: What, bytes: u64, reason: Reason) {
        self.items.push(Item { what, bytes, reason });
    }

    /// Whether a leftover that only a thorough search finds is one now; others are found again.
    fn is_still(&self, item: &Item) -> Result<bool> {
        let is_old = |stat: Stat| !self.policy.is_young(last_use(&stat));
        let file = || unless_misplaced(self.store.stat(&item.path(&self.catalog.tables)));
        Ok(match &item.what {
            What::Unfinished(_) => file()?.is_some_and(is_old),
            What::TagHistory(name, tag, id) => {
                let name = self.catalog.name(*name);
                let name = Path::new(&*name);
                let repository = self.catalog.repository(name).filter(|r| r.keeps != Keeps::Everything);
                let is_past = repository.is_some_and(|repository| {
                    let going = self.going.revisions_of(name);
                    let target = repository.tag(*tag).and_then(|tag| tag.target);
                    let is_gone = repository.revision(*id).is_none() || going.contains(id);
                    is_gone && target.is_some_and(|target| target != *id)
                });
                is_past && file()?.is_some_and(is_old)
            }
            What::Directory(path) => {
                let is_empty = self.list(path)?.is_some_and(|entries| entries.is_empty());
                let changed = unless_misplaced(self.store.directory_changed(path))?;
                is_empty && changed.is_some_and(|changed| !self.policy.is_young(changed))
            }
            _ => false,
        })
    }

    fn repository(&mut self, repository: &Repository, going_files: &HashSet<PathBuf>) -> Result<()> {
        let name = name_id(self.catalog, repository);
        let first = self.items.len();
        self.named.walk(self.catalog, roots(repository, self.going.revisions_of(&repository.name)));
        if repository.keeps != Keeps::Everything {
            self.layer_links(repository, name)?;
        }
        if self.is_thorough && repository.keeps != Keeps::Everything {
            self.revisions(repository)?;
            self.tags(repository, name)?;
        }
        let uploads_before = self.items.len();
        for upload in &repository.uploads {
            self.upload(repository, name, *upload)?;
        }
        let has_young_upload = self.items.len() - uploads_before < repository.uploads.len();
        if is_bare(repository) && !has_young_upload {
            self.bare_repository(repository, name, first, going_files)?;
        }
        Ok(())
    }

    fn layer_links(&mut self, repository: &Repository, name: NameId) -> Result<()> {
        let catalog = self.catalog;
        for layer in repository.layers.iter().copied() {
            let path = || layout::layer_link(&repository.name, &catalog.digest(layer));
            if self.named.contains(layer) {
                if self.is_thorough {
                    self.leaf(&path(), IfEmpty::Stays)?;
                }
                continue;
            }
            if self.linked.binary_search(&(name, layer)).is_ok() {
                continue;
            }
            let path = path();
            let targets = catalog.aliases.get(&layer).map_or(std::slice::from_ref(&layer), Vec::as_slice);
            // The link to an unreferenced blob is no file there: what remains is its directory.
            let is_decided = targets.iter().any(|id| self.known.contains(*id));
            if !is_decided && let Some(stat) = unless_misplaced(self.store.stat(&path))? {
                if !self.policy.is_young(last_use(&stat)) {
                    let reason = match self.has_bytes(targets)? {
                        true => Reason::UnnamedHere,
                        false => Reason::Dangling,
                    };
                    self.add(What::LayerLink(name, layer), 0, reason);
                }
                continue;
            }
            self.leaf(&path, IfEmpty::Goes)?;
        }
        if self.is_thorough {
            self.algorithms(&layout::layers(&repository.name))?;
        }
        Ok(())
    }

    /// Whether one of the blobs is there: what a sweep took leaves its directory.
    fn has_bytes(&self, blobs: &[DigestId]) -> Result<bool> {
        for blob in blobs.iter().copied().filter(|blob| self.catalog.has_blob(*blob)) {
            let stat = self.store.stat(&layout::blob_data(&self.catalog.digest(blob)));
            if unless_misplaced(stat)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Directories of algorithms that nobody uses any more; the one of SHA-256 always comes back.
    fn algorithms(&mut self, root: &Path) -> Result<()> {
        for algorithm in Algorithm::ALL.into_iter().filter(|a| *a != Algorithm::Sha256) {
            let path = root.join(algorithm.name());
            if self.list(&path)?.is_some_and(|entries| entries.is_empty()) {
                self.empty_directory(&path)?;
            }
        }
        Ok(())
    }

    fn revisions(&mut self, repository: &Repository) -> Result<()> {
        let root = layout::revisions(&repository.name);
        for (digest, _) in self.digests_below(&root)? {
            let id = self.catalog.tables.digests.find(&digest);
            let is_there = id.is_some_and(|id| repository.revision(id).is_some());
            let if_empty = if is_there { IfEmpty::Stays } else { IfEmpty::Goes };
            self.leaf(&layout::revision_link(&repository.name, &digest), if_empty)?;
        }
        self.algorithms(&root)
    }

    fn tags(&mut self, repository: &Repository, name: NameId) -> Result<()> {
        let going: HashSet<NameId> = self.going.tags_of(name).collect();
        for tag in repository.tags.iter().filter(|t| !going.contains(&t.name)) {
            let tag_name = self.catalog.name(tag.name);
            self.leaf(&layout::tag_link(&repository.name, &tag_name), IfEmpty::Stays)?;
            for (digest, _) in self.digests_below(&layout::tag_history(&repository.name, &tag_name))? {
                let path = layout::tag_history_link(&repository.name, &tag_name, &digest);
                let id = self.catalog.tables.digests.intern(&digest);
                let going = self.going.revisions_of(&repository.name);
                let is_past = repository.revision(id).is_none() || going.contains(&id);
                // Of a tag that can't be read, nobody knows which of them is its target.
                if !is_past || tag.target.is_none_or(|target| target == id) {
                    self.leaf(&path, IfEmpty::Stays)?;
                    continue;
                }
                match unless_misplaced(self.store.stat(&path))? {
                    Some(stat) if self.policy.is_young(last_use(&stat)) => {}
                    Some(_) => self.add(What::TagHistory(name, tag.name, id), 0, Reason::Past),
                    None => self.leaf(&path, IfEmpty::Goes)?,
                }
            }
        }
        Ok(())
    }

    fn upload(&mut self, repository: &Repository, name: NameId, upload: NameId) -> Result<()> {
        let upload_name = self.catalog.name(upload);
        let path = layout::upload_dir(&repository.name, &upload_name);
        let Some(tree) = self.tree(&path)? else { return Ok(()) };
        let is_own = |file: &PathBuf| file.strip_prefix(&path).is_ok_and(layout::is_of_upload);
        if tree.has_strangers || !tree.files.iter().all(is_own) {
            return Ok(());
        }
        if tree.files.is_empty() {
            if !self.policy.is_young(tree.directories_changed) {
                self.add_directory(&path);
            }
            return Ok(());
        }
        let started = edit::upload_started(self.store, &repository.name, &upload_name);
        let Some(started) = unless_misplaced(started)? else { return Ok(()) };
        let (mut newest, mut bytes) = (started, 0);
        for file in &tree.files {
            let Some(stat) = unless_misplaced(self.store.stat(file))? else { return Ok(()) };
            newest = newest.max(last_use(&stat));
            bytes += stat.size;
        }
        // A slow push goes on although it began long ago.
        if !self.policy.is_younger(started, self.policy.options.uploads) && !self.policy.is_young(newest) {
            self.add(What::Upload(name, upload), bytes, Reason::Stale);
        }
        Ok(())
    }

    /// A repository without images goes when nothing is in it but what goes as well.
    fn bare_repository(
        &mut self,
        repository: &Repository,
        name: NameId,
        first: usize,
        going_files: &HashSet<PathBuf>,
    ) -> Result<()> {
        let own = self.items[first..].iter().map(|item| item.path(&self.catalog.tables));
        let own: HashSet<PathBuf> = own.collect();
        let place = layout::repository(&repository.name);
        for part in [layout::MANIFESTS, layout::LAYERS, layout::UPLOADS] {
            let Some(tree) = self.tree(&place.join(part))? else { continue };
            let goes = |file: &PathBuf| {
                file.ancestors().any(|above| own.contains(above) || going_files.contains(above))
            };
            let is_left = tree.has_strangers || !tree.files.iter().all(goes);
            // The removal of the last file makes its directory young.
            let is_young = !self.policy.is_eager()
                && (!tree.files.is_empty() || self.policy.is_young(tree.directories_changed));
            if is_left || is_young {
                return Ok(());
            }
        }
        self.add(What::Repository(name), 0, Reason::Empty);
        Ok(())
    }

    /// Namespaces without a repository at or below them.
    fn namespaces(&mut self) -> Result<()> {
        let used: HashSet<&Path> =
            self.catalog.repositories.keys().flat_map(|name| name.ancestors()).collect();
        let unused: Vec<&PathBuf> = self
            .catalog
            .namespaces
            .iter()
            .filter(|name| !used.contains(name.as_path()) && self.policy.includes(name))
            .collect();
        for name in unused {
            // The one above takes it along.
            if name.parent().is_some_and(|above| !above.as_os_str().is_empty() && !used.contains(above)) {
                continue;
            }
            let path = layout::repository(name);
            let Some(tree) = self.tree(&path)? else { continue };
            let is_empty = tree.files.is_empty() && !tree.has_strangers;
            if is_empty && !self.policy.is_young(tree.directories_changed) {
                self.add_directory(&path);
            }
        }
        Ok(())
    }

    fn blobs(&mut self, mark: &Mark) -> Result<()> {
        let catalog = self.catalog;
        for id in catalog.blobs.iter().copied() {
            let may_be_bare = !mark.is_reachable(id) && !self.known.contains(id);
            if may_be_bare || self.is_thorough {
                self.leaf(&layout::blob_data(&catalog.digest(id)), IfEmpty::Goes)?;
            }
        }
        if !self.is_thorough {
            return Ok(());
        }
        let root = Path::new(layout::BLOBS);
        for algorithm in Algorithm::ALL {
            let path = root.join(algorithm.name());
            for shard in self.list(&path)?.unwrap_or_default() {
                let path = path.join(&shard.name);
                let is_shard = shard.kind == Kind::Directory && is_shard(&shard.name);
                if is_shard && self.list(&path)?.is_some_and(|entries| entries.is_empty()) {
                    self.empty_directory(&path)?;
                }
            }
        }
        Ok(())
    }

    /// Looks into the directory of a link or a blob.
    fn leaf(&mut self, file: &Path, if_empty: IfEmpty) -> Result<()> {
        let Some(directory) = file.parent() else { return Ok(()) };
        let Some(entries) = self.list(directory)? else { return Ok(()) };
        if entries.is_empty() && if_empty == IfEmpty::Goes {
            return self.empty_directory(directory);
        }
        for entry in entries.iter().filter(|e| e.kind == Kind::File && layout::is_unfinished(&e.name)) {
            let path = directory.join(&entry.name);
            if let Some(stat) = unless_misplaced(self.store.stat(&path))?
                && !self.policy.is_young(last_use(&stat))
            {
                self.add(What::Unfinished(path.into()), stat.size, Reason::Crashed);
            }
        }
        Ok(())
    }

    fn empty_directory(&mut self, path: &Path) -> Result<()> {
        if let Some(changed) = unless_misplaced(self.store.directory_changed(path))?
            && !self.policy.is_young(changed)
        {
            self.add_directory(path);
        }
        Ok(())
    }

    fn list(&self, path: &Path) -> Result<Option<Vec<Entry>>> {
        unless_misplaced(self.store.list(path))
    }

    fn digests_below(&self, root: &Path) -> Result<Vec<(Digest, PathBuf)>> {
        digests_below(self.store, root)
    }

    fn tree(&self, path: &Path) -> Result<Option<Tree>> {
        let mut tree = Tree::default();
        let was_there = tree.add(self.store, path)?;
        Ok(was_there.then_some(tree))
    }
}

/// Removes a directory if it is empty and its last change is older than the grace period.
pub(super) fn remove_old_directory(store: &dyn Store, path: &Path, policy: &Policy) -> Result<bool> {
    match unless_misplaced(store.directory_changed(path))? {
        Some(changed) if !policy.is_young(changed) => remove_directory(store, path),
        _ => Ok(false),
    }
}

/// The directories `<algorithm>/<hex>` below `root`.
pub(super) fn digests_below(store: &dyn Store, root: &Path) -> Result<Vec<(Digest, PathBuf)>> {
    let mut found = Vec::new();
    for algorithm in Algorithm::ALL {
        let path = root.join(algorithm.name());
        for entry in unless_misplaced(store.list(&path))?.unwrap_or_default() {
            let digest = Digest::from_parts(algorithm.name(), entry.name.to_str().unwrap_or(""));
            if let Some(digest) = digest.filter(|_| entry.kind == Kind::Directory) {
                found.push((digest, path.join(entry.name)));
            }
        }
    }
    Ok(found)
}

/// What becomes of a directory with nothing in it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum IfEmpty {
    /// It is nobody's.
    Goes,
    /// Something that lives has its link there, or had.
    Stays,
}

fn is_shard(name: &OsStr) -> bool {
    let bytes = name.as_encoded_bytes();
    bytes.len() == 2 && bytes.iter().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b))
}

/// Everything below a directory.
struct Tree {
    files: Vec<PathBuf>,
    /// Symlinks and the like, which no registry makes.
    has_strangers: bool,
    /// The last change of any directory in it.
    directories_changed: SystemTime,
}

impl Default for Tree {
    fn default() -> Tree {
        Tree { files: Vec::new(), has_strangers: false, directories_changed: SystemTime::UNIX_EPOCH }
    }
}

impl Tree {
    fn add(&mut self, store: &dyn Store, path: &Path) -> Result<bool> {
        let entries = match store.list(path) {
            Ok(Some(entries)) => entries,
            Ok(None) => return Ok(false),
            Err(e) if e.is_damage() => {
                self.has_strangers = true;
                return Ok(true);
            }
            Err(e) => return Err(e),
        };
        self.directories_changed = self
            .directories_changed
            .max(unless_misplaced(store.directory_changed(path))?.unwrap_or(SystemTime::UNIX_EPOCH));
        for entry in entries {
            let path = path.join(&entry.name);
            match entry.kind {
                // Deeper than anything that a registry makes.
                Kind::Directory if is_too_deep(Path::new(""), &path) => self.has_strangers = true,
                Kind::Directory => drop(self.add(store, &path)?),
                Kind::File => self.files.push(path),
                Kind::Symlink | Kind::Other => self.has_strangers = true,
            }
        }
        Ok(true)
    }
}

/// What is around the directory of a link or a blob, and goes when it is empty: a shard, or an algorithm other than the
/// usual one.
pub(super) fn shell_of(directory: &Path) -> Option<&Path> {
    let shell = directory.parent()?;
    let name = shell.file_name()?;
    let algorithm = name.to_str().and_then(Algorithm::from_name);
    let is_shell = algorithm.is_some_and(|a| a != Algorithm::Sha256) || is_shard(name);
    // `blobs/<alg>/<shard>` and `…/<alg>`; a repository may well be called `ab`.
    let is_place = shell.starts_with(layout::BLOBS) || layout::is_leaf(directory);
    (is_shell && is_place).then_some(shell)
}

/// Removes a directory with nothing, or only such directories, in it. `false`: something is in it by now.
pub(super) fn remove_directory(store: &dyn Store, path: &Path) -> Result<bool> {
    store.prune(path)?;
    Ok(store.directory_changed(path)?.is_none())
}

/// Removes the directories of a repository without images, and the namespaces above it, as far as they are empty.
///
/// First what makes it a repository for registries, then what they miss least.
pub(super) fn remove_repository(store: &dyn Store, place: &Path) -> Result<bool> {
    for part in [layout::MANIFESTS, layout::UPLOADS, layout::LAYERS] {
        if !remove_directory(store, &place.join(part))? {
            return Ok(false);
        }
    }
    for above in place.ancestors().take_while(|path| *path != Path::new(layout::REPOSITORIES)) {
        if !store.remove_directory(above)? {
            break;
        }
    }
    Ok(true)
}
