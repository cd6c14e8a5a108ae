//! What generated files read like.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::sync::Arc;

use super::node::Node;
use super::{View, reachability};
use crate::catalog::intern::DigestId;
use crate::error::{Error, count};
use crate::gc::Options;
use crate::gc::plan::Policy;
use crate::gc::report::{Place, human, timestamp};
use crate::gc::why;
use crate::manifest;
use crate::printable::{self, Printable};
use crate::store::Version;

/// The file `README` in the mount.
pub const README: &str = include_str!("readme.txt");
/// The file `oci-layout` of every image layout (OCI image-spec 1.1, `image-layout.md`).
const OCI_LAYOUT: &str = "{\"imageLayoutVersion\":\"1.0.0\"}";

impl View<'_> {
    /// The content of a generated file; `None` for nodes that are none, or are gone.
    pub fn text(&self, node: Node) -> Option<Arc<[u8]>> {
        let text = match node {
            Node::Readme => README.to_string(),
            Node::OciLayout => OCI_LAYOUT.to_string(),
            Node::LayoutIndex(id) => return Some(self.layout_index(id)?.into_bytes().into()),
            Node::References(id) => self.references(id),
            Node::Pointer(id) => self.pointer(id)?,
            Node::Summary => self.summary(),
            Node::Usage => return Some(self.usage()),
            Node::MissingBlob(id) => self.missing(id)?,
            Node::BrokenFile(name) => self.broken(&self.snapshot.name(name)?)?,
            Node::WhyText(id) => self.why(id)?,
            _ => return None,
        };
        Some(printable::lines(&text).into_bytes().into())
    }

    /// `index.json` of the image layout of one manifest.
    ///
    /// The name `latest` is what umoci asks for when no other is given; the single entry is what skopeo takes.
    fn layout_index(&self, id: DigestId) -> Option<String> {
        let catalog = &self.snapshot.catalog;
        let parsed = catalog.parsed(id)?;
        let media_type = catalog.name(parsed.media_type);
        let entry = serde_json::json!({
            "mediaType": media_type.to_string_lossy(),
            "digest": catalog.digest(id),
            "size": parsed.size,
            "annotations": { "org.opencontainers.image.ref.name": "latest" },
        });
        let index =
            serde_json::json!({ "schemaVersion": 2, "mediaType": manifest::OCI_INDEX, "manifests": [entry] });
        Some(index.to_string())
    }

    /// Who holds a manifest: tags, repositories, indexes, referrers' subjects; a line each.
    fn references(&self, id: DigestId) -> String {
        let (catalog, uses) = (&self.snapshot.catalog, self.snapshot.uses());
        let mut lines: Vec<String> = Vec::new();
        for (repository, tag) in uses.tags.get(&id).into_iter().flatten() {
            lines.push(format!("tag {}:{}", repository.printable(), catalog.name(*tag).printable()));
        }
        for repository in uses.revisions.get(&id).into_iter().flatten() {
            lines.push(format!("repository {}@{}", repository.printable(), catalog.digest(id)));
        }
        for manifest in uses.manifests.get(&id).into_iter().flatten() {
            lines.push(format!("manifest {}", catalog.digest(*manifest)));
        }
        if let Some(subject) = catalog.parsed(id).and_then(|m| m.subject()) {
            lines.push(format!("subject {}", catalog.digest(subject)));
        }
        lines.sort();
        lines.into_iter().map(|line| line + "\n").collect()
    }

    /// Which manifest, and where it stands in the mount.
    fn pointer(&self, id: DigestId) -> Option<String> {
        let digest = self.snapshot.catalog.tables.digests.checked(id)?;
        let place = match self.snapshot.is_listed(id) {
            true => format!("manifests/{}/{}", digest.algorithm().name(), digest.hex()),
            false => "not in the store".to_string(),
        };
        Some(format!("{digest}\n{place}\n"))
    }

    fn summary(&self) -> String {
        let snapshot = self.snapshot;
        let catalog = &snapshot.catalog;
        let options = Options { grace: self.settings.grace, ..Options::default() };
        let policy = Policy::new(&options, &self.now());
        let candidates = snapshot.candidates(self.store);
        let (young, eligible): (Vec<_>, Vec<_>) =
            candidates.iter().partition(|c| policy.is_young(c.last_used));
        let bytes = |list: &[&crate::gc::plan::Candidate]| human(list.iter().map(|c| c.bytes).sum());
        let kept: Vec<DigestId> =
            catalog.blobs.iter().copied().filter(|id| snapshot.mark().is_reachable(*id)).collect();
        let kept_bytes = kept.iter().map(|id| snapshot.stored_size(self.store, *id)).sum();
        let tags: usize = catalog.repositories.values().map(|r| r.tags.len()).sum();
        let revisions: usize = catalog.repositories.values().map(|r| r.revisions.len()).sum();
        let untagged: usize = snapshot.untagged().values().map(Vec::len).sum();
        let grace = humantime::format_duration(self.settings.grace);
        let mut text = String::new();
        let lines = [
            ("repositories", catalog.repositories.len().to_string(), String::new()),
            ("tags", tags.to_string(), String::new()),
            ("manifests", revisions.to_string(), format!("untagged: {untagged}")),
            ("blobs kept", kept.len().to_string(), human(kept_bytes)),
            ("garbage, a sweep takes it now", eligible.len().to_string(), bytes(&eligible)),
            (
                "garbage, used within the grace period",
                young.len().to_string(),
                format!("{} ({grace})", bytes(&young)),
            ),
            ("missing", snapshot.missing(self.store).len().to_string(), "see missing/".to_string()),
            ("could not be judged", catalog.problems.len().to_string(), "see broken/".to_string()),
        ];
        for (what, number, more) in lines {
            let line = format!("{what:<40} {number:>9}  {more}");
            // Writing to a string can't fail.
            let _ = writeln!(text, "{}", line.trim_end());
        }
        if !snapshot.is_judged() {
            let _ = writeln!(
                text,
                "nothing can be called garbage before what stops collections is mended: see broken/"
            );
        }
        let _ = writeln!(text, "looked at the storage at {}", timestamp(catalog.scanned_at));
        text
    }

    /// A line per tag: repository, tag, digest, bytes unique to it, shared, total, pushed.
    ///
    /// Unique is what removing this tag and a sweep would free. Bytes are those on the disk, so what is not stored here
    /// counts nothing.
    fn usage(&self) -> Arc<[u8]> {
        let build = || {
            let snapshot = self.snapshot;
            let catalog = &snapshot.catalog;
            let mut closures: HashMap<DigestId, Vec<DigestId>> = HashMap::new();
            let mut holders: HashMap<DigestId, u32> = HashMap::new();
            let mut hold = |id: DigestId| {
                let closure = closures.entry(id).or_insert_with(|| {
                    // One blob may be named by several digests.
                    let stored: BTreeSet<DigestId> =
                        catalog.closure(id).into_iter().map(|id| catalog.stored_as(id)).collect();
                    stored.into_iter().collect()
                });
                for below in closure.iter() {
                    *holders.entry(*below).or_default() += 1;
                }
            };
            for repository in catalog.repositories.values() {
                repository.tags.iter().filter_map(|t| t.target).for_each(&mut hold);
            }
            snapshot.untagged().values().flatten().copied().for_each(&mut hold);
            let mut text = String::from("repository\ttag\tdigest\tunique\tshared\ttotal\tpushed\n");
            for repository in catalog.repositories.values().filter(|r| r.is_valid) {
                let mut lines: Vec<String> = Vec::new();
                for tag in &repository.tags {
                    let Some(target) = tag.target else { continue };
                    let (mut unique, mut total) = (0, 0);
                    for below in closures.get(&target).into_iter().flatten() {
                        let size = snapshot.stored_size(self.store, *below);
                        total += size;
                        if holders.get(below) == Some(&1) {
                            unique += size;
                        }
                    }
                    lines.push(format!(
                        "{}\t{}\t{}\t{unique}\t{}\t{total}\t{}\n",
                        repository.name.printable(),
                        catalog.name(tag.name).printable(),
                        catalog.digest(target),
                        total - unique,
                        match tag.version {
                            Version::UNKNOWN => String::new(),
                            version => timestamp(version.modified()),
                        },
                    ));
                }
                lines.sort();
                text.extend(lines);
            }
            Arc::from(text.into_bytes())
        };
        self.snapshot.usage.get_or_init(build).clone()
    }

    /// What [`why`] can be told here.
    pub(super) fn facts(&self) -> why::Facts<'_> {
        why::Facts {
            store: self.store,
            catalog: &self.snapshot.catalog,
            mark: self.snapshot.mark(),
            grace: self.settings.grace,
            now: self.now(),
        }
    }

    /// The text of `regfs why`.
    fn why(&self, id: DigestId) -> Option<String> {
        let digest = self.snapshot.catalog.tables.digests.checked(id)?;
        match why::why(&self.facts(), &digest, why::FEW) {
            Ok(why) => Some(why.text(Place::ControlFile)),
            Err(Error::NotFound { .. }) => None,
            Err(e) => Some(format!("{e}\n")),
        }
    }

    fn missing(&self, id: DigestId) -> Option<String> {
        let (catalog, uses) = (&self.snapshot.catalog, self.snapshot.uses());
        let digest = catalog.tables.digests.checked(id)?;
        let mut text = format!("{digest} is not in the store. It is named by:\n");
        for manifest in uses.manifests.get(&id).into_iter().flatten() {
            text += &format!("manifest {}\n", catalog.digest(*manifest));
            for (repository, tag) in uses.tags.get(manifest).into_iter().flatten() {
                text += &format!("  tag {}:{}\n", repository.printable(), catalog.name(*tag).printable());
            }
        }
        for repository in uses.revisions.get(&id).into_iter().flatten() {
            text += &format!("repository {} as a manifest\n", repository.printable());
        }
        for (repository, tag) in uses.tags.get(&id).into_iter().flatten() {
            text += &format!("tag {}:{}\n", repository.printable(), catalog.name(*tag).printable());
        }
        Some(text)
    }

    fn broken(&self, name: &OsStr) -> Option<String> {
        let at = reachability::problem_number(name)
            .filter(|at| reachability::broken_name(self.snapshot, *at).is_some_and(|n| *n == *name))?;
        let problem = self.snapshot.catalog.problems.get(at)?;
        Some(format!(
            "{}\nwhere: {}\nso: {}\n",
            problem.what,
            self.store.full(&problem.path).printable(),
            problem.effect,
        ))
    }

    /// `trash list` for people.
    pub fn trash_table(summaries: &[crate::trash::Summary]) -> String {
        if summaries.is_empty() {
            return "the trash is empty\n".to_string();
        }
        let mut text = String::new();
        let mut total = 0;
        for s in summaries {
            total += s.bytes;
            let who = s.uid.map_or(String::new(), |uid| format!("uid {uid}"));
            let (files, bytes) = (count(s.files, "file"), human(s.bytes));
            text += &format!(
                "{:<28} {:<20} {files:>12} {bytes:>10}  {who}  {}  ({})\n",
                s.id.printable(),
                s.time.printable(),
                s.command.printable(),
                s.reason.printable()
            );
        }
        text + &format!("{}, {} in all\n", count(summaries.len(), "transaction"), human(total))
    }
}
