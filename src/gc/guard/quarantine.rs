//! Quarantine: moves the bytes of what was fenced and drained, if no registry remembers it.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use super::super::forget;
use super::gate::{Gate, Registries};
use super::{Course, Round, claim, is_of_registry, is_to_be_forgotten, links_in};
use crate::catalog::intern::{DigestId, IdSet};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::gc::Progress;
use crate::gc::plan::What;
use crate::gc::sweep::Taken;
use crate::layout::{self, Kind};
use crate::printable::Printable;
use crate::trash::stage::Stage;
use crate::trash::{Author, Contents, Transaction};

/// A blob whose links lie in the trash.
struct Fenced {
    digest: Digest,
    /// Those.
    links: Vec<PathBuf>,
    /// Where a link to it could be written: repositories, and by which digest they know it.
    places: HashSet<(PathBuf, Digest)>,
}

impl Fenced {
    /// The digests that it is known by.
    fn digests(&self) -> HashSet<Digest> {
        self.places.iter().map(|(_, digest)| *digest).chain([self.digest]).collect()
    }
}

impl Round<'_> {
    /// Moves the bytes of what is fenced, unless a registry remembers it: that is told to forget it, and waits once more.
    pub(super) fn quarantine(
        &self,
        transaction: &Contents,
        course: &Course,
        author: &Author,
        progress: &dyn Progress,
        taken: &mut Taken,
    ) -> Result<()> {
        let Some(Ok(stage)) = &transaction.stage else { return Ok(()) };
        let mut blobs = self.places(transaction, stage)?;
        let mut remembered = Vec::new();
        for blob in &blobs {
            if progress.is_stopped() {
                return Ok(());
            }
            if self.waits_again(stage, blob)? {
                remembered.push(blob.digest);
            }
        }
        let mut stage = stage.clone();
        if !remembered.is_empty() {
            let again: Vec<Fenced> = blobs.extract_if(.., |blob| remembered.contains(&blob.digest)).collect();
            stage = self.wait_again(transaction, stage, again, course, author, taken)?;
        }
        let items: HashMap<DigestId, usize> = course
            .plan
            .items
            .iter()
            .enumerate()
            .filter_map(|(at, item)| if let What::Blob(id) = item.what { Some((id, at)) } else { None })
            .collect();
        for blob in &blobs {
            if progress.is_stopped() {
                return Ok(());
            }
            if self.quarantine_one(transaction, blob)? {
                let id = self.catalog.tables.digests.find(&blob.digest);
                taken.items.extend(id.and_then(|id| items.get(&id)));
                taken.transaction = Some(transaction.id.clone());
            }
            progress.step(1);
        }
        self.forget_again(transaction, author)?;
        self.store.sync()?;
        Stage { quarantined_at: Some(self.clock.now(self.store).moment), ..stage }
            .write(self.store, &transaction.id)?;
        self.store.sync()?;
        // All of it may have had to wait again.
        transaction.discard_if_empty(self.store)
    }

    /// Whether a blob that is due has to wait once more, because somebody may count on it.
    fn waits_again(&self, stage: &Stage, blob: &Fenced) -> Result<bool> {
        Ok(stage.is_unanswered || self.is_remembered(blob)? || self.options.named.contains(&blob.digest))
    }

    /// The blobs that are due and would not move now. Asks registries, and tells them nothing; what can't be answered stays.
    pub(in crate::gc) fn remembered(&self, course: &Course) -> Result<IdSet> {
        let mut staying = IdSet::default();
        for transaction in &course.due {
            let Some(Ok(stage)) = &transaction.stage else { continue };
            for blob in self.places(transaction, stage)? {
                let stays = self.is_linked(&blob)? || self.waits_again(stage, &blob).unwrap_or(true);
                staying.extend(self.catalog.tables.digests.find(&blob.digest).filter(|_| stays).as_ref());
            }
        }
        Ok(staying)
    }

    /// Tells registries a second time what was removed at once, now that no request is under way that has seen it.
    fn forget_again(&self, transaction: &Contents, author: &Author) -> Result<()> {
        let Gate::Probe(probe) = &self.options.gate else { return Ok(()) };
        for path in transaction.files.iter().filter(|path| is_to_be_forgotten(transaction, path)) {
            let (Kind::Revision(repository, digest) | Kind::LayerLink(repository, digest)) =
                layout::classify(path)
            else {
                continue;
            };
            forget::removed(self.store, &*probe.0, author, &repository, &digest, path)?;
            let is_gone = !forget::is_there(self.store, path)?
                && !forget::is_there(self.store, &layout::layer_link(&repository, &digest))?;
            if is_gone && probe.0.remembers(&repository, &digest)? {
                return Err(Error::Busy {
                    why: format!("{}: a registry still remembers {digest}", repository.printable()),
                });
            }
        }
        Ok(())
    }

    /// Moves what a registry remembers to a sweep of its own, has it forgotten, and begins its drain. That this is so is on
    /// the disk before a registry is told: its DELETE may remove what an upload has just written, which then makes it
    /// remember once more.
    fn wait_again(
        &self,
        from: &Contents,
        stage: Stage,
        blobs: Vec<Fenced>,
        course: &Course,
        author: &Author,
        taken: &mut Taken,
    ) -> Result<Stage> {
        let digests: Vec<Digest> = blobs.iter().map(|blob| blob.digest).collect();
        let again = Stage::begin(self.options.drain, stage.links_until, digests.clone());
        let (transaction, mut again) = self.begin_fence(again, author)?;
        for link in blobs.iter().flat_map(|blob| &blob.links) {
            self.store.rename(&layout::transaction(&from.id).join(link), &transaction.path_of(link))?;
        }
        self.store.sync()?;
        let rest = stage.blobs.iter().filter(|digest| !digests.contains(digest)).copied().collect();
        let rest = Stage { blobs: rest, is_unanswered: false, ..stage };
        rest.write(self.store, &from.id)?;
        self.store.sync()?;
        if let Gate::Probe(probe) = &self.options.gate {
            for blob in &blobs {
                if let Err(e) = self.forget_places(&*probe.0, &transaction, blob, course) {
                    again.is_unanswered |= is_of_registry(&e);
                    taken.failures.push(e);
                    break;
                }
            }
            // Links that were made here are as new as that.
            again.links_until = self.store.clocks().kernel;
        }
        self.end_fence(&transaction, again)?;
        Ok(rest)
    }

    /// Tells registries to forget a blob wherever there is no link to it. A DELETE removes one that an upload writes in that
    /// moment, which then comes back from the trash; where that has none, one is made there.
    fn forget_places(
        &self,
        registries: &dyn Registries,
        transaction: &Transaction,
        blob: &Fenced,
        course: &Course,
    ) -> Result<()> {
        for place in &blob.places {
            let (repository, digest) = place;
            let link = layout::layer_link(repository, digest);
            if forget::is_there(self.store, &link)? {
                continue;
            }
            if registries.removes_links() && !course.held.contains(place) {
                self.store.create(&transaction.path_of(&link), blob.digest.to_string().as_bytes())?;
            }
            registries.forget(repository, digest)?;
        }
        blob.digests().iter().try_for_each(|digest| registries.forget_bytes(digest))
    }

    /// The blobs of a sweep, each with its links in the trash and every place that has ever had one.
    fn places(&self, transaction: &Contents, stage: &Stage) -> Result<Vec<Fenced>> {
        let mut links = links_in(self.store, transaction)?;
        let mut known = self.places_of_links(stage);
        let fenced = |digest: &Digest| {
            let links = links.remove(digest).unwrap_or_default();
            let mut places: HashSet<(PathBuf, Digest)> =
                links.iter().filter_map(|path| claim(path)).collect();
            places.extend(known.remove(digest).unwrap_or_default());
            Fenced { digest: *digest, links, places }
        };
        Ok(stage.blobs.iter().map(fenced).collect())
    }

    /// Where a link to the blobs of a sweep could be written to: every place that has ever had one.
    fn places_of_links(&self, stage: &Stage) -> HashMap<Digest, Vec<(PathBuf, Digest)>> {
        let staged: IdSet =
            stage.blobs.iter().filter_map(|digest| self.catalog.tables.digests.find(digest)).collect();
        let mut places: HashMap<Digest, Vec<(PathBuf, Digest)>> = HashMap::new();
        for repository in self.catalog.repositories.values() {
            for layer in repository.layers.iter().copied().filter(|layer| staged.contains(*layer)) {
                let digest = self.catalog.digest(layer);
                places.entry(digest).or_default().push((repository.name.clone(), digest));
            }
        }
        places
    }

    /// Whether a registry would say that it has the blob, although there is no link to it.
    fn is_remembered(&self, blob: &Fenced) -> Result<bool> {
        let Gate::Probe(probe) = &self.options.gate else { return Ok(false) };
        if self.is_linked(blob)? {
            // In use: the look back brings the rest.
            return Ok(false);
        }
        for (repository, digest) in &blob.places {
            if probe.0.remembers(repository, digest)? {
                return Ok(true);
            }
        }
        for digest in blob.digests() {
            if probe.0.remembers_bytes(&digest)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether there is a link to it.
    fn is_linked(&self, blob: &Fenced) -> Result<bool> {
        for (repository, digest) in &blob.places {
            if forget::is_there(self.store, &layout::layer_link(repository, digest))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Moves the bytes unless a link has come; brings them back if one comes meanwhile.
    fn quarantine_one(&self, transaction: &Contents, blob: &Fenced) -> Result<bool> {
        if self.is_linked(blob)? {
            return Ok(false);
        }
        let digest = &blob.digest;
        let path = layout::blob_data(digest);
        match self.store.rename(&path, &transaction.path_of(&path)) {
            Ok(true) => {}
            // An upload has brought the same bytes once more: those go when these are purged.
            Ok(false) | Err(Error::Exists { .. }) => return Ok(false),
            Err(e) => return Err(e),
        }
        // Whatever can't be told brings the bytes back.
        let linked = self.is_linked(blob).map(|is_linked| is_linked || self.options.named.contains(digest));
        if linked.as_ref().is_ok_and(|linked| !linked) {
            return Ok(true);
        }
        match self.store.rename(&transaction.path_of(&path), &path) {
            // An upload has brought them.
            Ok(_) | Err(Error::Exists { .. }) => linked.map(|_| false),
            Err(e) => Err(e),
        }
    }
}
