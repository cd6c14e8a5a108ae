//! The report in the lines of `registry garbage-collect`, for scripts that read those.
//!
//! Source: distribution `registry/storage/garbagecollect.go`, 2.8; the lines about layer links are those of 3.0.
//! What that one does not know (problems, the trash) is not in it: [`Report::write_remarks`] writes it elsewhere.
//!
//! Where both judge the same, the lines are the same, in another order of blobs. What regfs keeps beyond that is listed
//! as marked, too.

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::Path;

use super::Report;
use crate::advice::Place;
use crate::catalog::intern::{DigestId, IdSet, NameId};
use crate::catalog::{Keeps, Parsed, Repository};
use crate::gc::plan::What;
use crate::printable::Printable;

impl Report {
    /// Writes the lines of the stock collector.
    pub fn write_distribution(&self, out: &mut dyn Write) -> io::Result<()> {
        let catalog = &self.catalog;
        let gone = self.gone();
        let mut marked = IdSet::default();
        let mut blobs_marked = 0;
        for (name, repository) in &catalog.repositories {
            if repository.revisions.is_empty() && repository.layers.is_empty() && repository.held.is_empty() {
                // A directory on the way to repositories.
                continue;
            }
            writeln!(out, "{}", name.printable())?;
            let mut mark = |id: DigestId| {
                if marked.insert(id) {
                    blobs_marked += 1;
                }
            };
            let gone = gone.get(&catalog.tables.names.intern(name.as_os_str()));
            self.write_marking(out, name, repository, gone, &mut mark)?;
        }
        let taken = || self.listed();
        let manifests = taken().filter(|i| matches!(i.what, What::Revision(..))).count();
        let blobs = taken().filter(|i| matches!(i.what, What::Blob(_))).count();
        writeln!(
            out,
            "\n{blobs_marked} blobs marked, {blobs} blobs and {manifests} manifests eligible for deletion"
        )?;
        for item in taken() {
            if let What::Blob(id) = item.what {
                writeln!(out, "blob eligible for deletion: {}", catalog.digest(id))?;
            }
        }
        for item in taken() {
            if let What::LayerLink(name, id) = item.what {
                let name = catalog.name(name);
                let digest = catalog.digest(id);
                writeln!(out, "{}: layer link eligible for deletion: {digest}", name.printable())?;
            }
        }
        Ok(())
    }

    /// The manifests of a repository in order of their digests, with what they name; then what else is kept.
    fn write_marking(
        &self,
        out: &mut dyn Write,
        name: &Path,
        repository: &Repository,
        gone: Option<&IdSet>,
        mark: &mut dyn FnMut(DigestId),
    ) -> io::Result<()> {
        let catalog = &self.catalog;
        let mut revisions: Vec<_> = repository.revisions.iter().collect();
        revisions.sort_by_cached_key(|r| catalog.digest(r.digest));
        let mut said = IdSet::default();
        let mut waiting = Vec::new();
        for revision in revisions {
            let digest = catalog.digest(revision.digest);
            if gone.is_some_and(|gone| gone.contains(revision.digest)) {
                writeln!(out, "manifest eligible for deletion: {digest}")?;
                continue;
            }
            writeln!(out, "{}: marking manifest {digest} ", name.printable())?;
            mark(revision.digest);
            said.insert(revision.digest);
            let Some(parsed) = catalog.parsed(revision.target) else { continue };
            for descriptor in parsed.descriptors() {
                let digest = catalog.digest(descriptor.digest);
                writeln!(out, "{}: marking blob {digest}", name.printable())?;
                mark(descriptor.digest);
                said.insert(descriptor.digest);
            }
            waiting.extend(parsed.references());
        }
        waiting.extend(&repository.held);
        if repository.keeps == Keeps::Everything {
            waiting.extend(&repository.layers);
        }
        // What that collector does not follow: children without a revision, digests in odd places.
        let mut walked = IdSet::default();
        while let Some(id) = waiting.pop() {
            if !walked.insert(id) {
                continue;
            }
            if said.insert(id) {
                writeln!(out, "{}: marking blob {}", name.printable(), catalog.digest(id))?;
                mark(id);
            }
            waiting.extend(catalog.aliases.get(&id).into_iter().flatten());
            waiting.extend(catalog.parsed(id).map(Parsed::references).unwrap_or_default());
        }
        Ok(())
    }

    /// The manifests that were taken, or may be, by repository.
    fn gone(&self) -> HashMap<NameId, IdSet> {
        let mut gone: HashMap<NameId, IdSet> = HashMap::new();
        for item in self.listed() {
            if let What::Revision(name, id) = item.what {
                gone.entry(name).or_default().insert(id);
            }
        }
        gone
    }

    /// Writes what the stock collector has no line for; goes to stderr beside [`Report::write_distribution`].
    pub fn write_remarks(&self, out: &mut dyn Write, place: Place<'_>) -> io::Result<()> {
        if let Some(why) = &self.refusal {
            writeln!(out, "regfs: held back: {}", place.say(why))?;
        }
        for (problem, _) in self.problems() {
            writeln!(
                out,
                "regfs: problem: {}: {}; {}",
                problem.path.printable(),
                problem.what,
                problem.effect
            )?;
        }
        for path in &self.restored {
            writeln!(out, "regfs: given back: {} is in use again", path.printable())?;
        }
        for failure in &self.failures {
            writeln!(out, "regfs: failed: {}", failure.printable())?;
        }
        Ok(())
    }
}
