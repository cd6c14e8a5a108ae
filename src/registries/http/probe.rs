//! What any push begins with shows where a registry stores, and which process it is; and ends here.
//!
//! An upload is begun; its file has to appear in this storage. Then it is cancelled, for which the registry opens that file,
//! and the kernel tells who did. Addresses don't tell that: two of them may lead to one process, and one to several;
//! containers have addresses of their own, and proxies stand in between. What is left of the upload is removed.
//!
//! # What can't be told
//! Users other than root are not told who opens a file. For them registries count by their addresses: two names that lead to
//! one address are one registry, a proxy and the registry behind it are two.

use std::collections::BTreeSet;
use std::path::Path;

use super::super::answering::{lineage, ways_to};
use super::traces::{self, Trace};
use super::{Client, Registry, Seen, header, scope};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layout;
use crate::printable::Printable;
use crate::store::Store;
use crate::watch::openers::Openers;

impl Client {
    /// Fails unless each registry writes into this storage, and each process that was seen is one of them.
    pub(super) fn verify_all(
        &self,
        store: &dyn Store,
        repository: &Path,
        witness: Option<&Digest>,
    ) -> Result<()> {
        if let Err(e) = traces::settle(store) {
            log::warn!("could not remove what an interrupted run left: {e}");
        }
        let mut asked = BTreeSet::new();
        let mut hidden = Vec::new();
        for registry in &self.registries {
            registry.check_delete(repository)?;
            match registry.check_storage(store, repository, witness)? {
                // Whoever launched it is nobody else.
                Some(pids) => asked.extend(pids.into_iter().flat_map(lineage)),
                None => hidden.push(registry),
            }
        }
        let missing: Vec<&Seen> = self.seen.iter().filter(|seen| !asked.contains(&seen.pid)).collect();
        if missing.len() <= distinct(&hidden) {
            return Ok(());
        }
        let missing: Vec<&str> = missing.iter().map(|seen| seen.what.as_str()).collect();
        let urls: Vec<String> = self.registries.iter().map(|registry| registry.url().to_string()).collect();
        Err(Error::invalid(format!(
            "more registries run here than answer at {}: name each that serves this storage with --registry, or end it ({})",
            urls.join(" and "),
            missing.join("; ")
        )))
    }
}

/// How many registries there are at most, as far as addresses tell.
fn distinct(registries: &[&Registry]) -> usize {
    let mut groups: Vec<BTreeSet<String>> = Vec::new();
    for registry in registries {
        let mut ways = ways_to(&registry.place.url);
        // One that has a way in common with several groups joins them.
        groups.retain(|group| {
            let is_other = group.is_disjoint(&ways);
            if !is_other {
                ways.extend(group.iter().cloned());
            }
            is_other
        });
        groups.push(ways);
    }
    groups.len()
}

impl Registry {
    /// Fails unless it writes into this storage; returns the processes that looked at the upload, if that can be told.
    ///
    /// One that lacks the blob `witness` is another one, and nothing need be written to it to know that.
    fn check_storage(
        &self,
        store: &dyn Store,
        repository: &Path,
        witness: Option<&Digest>,
    ) -> Result<Option<Vec<u32>>> {
        if let Some(witness) = witness
            && self.blob("HEAD", repository, witness)? == 404
        {
            return Err(self.elsewhere(store));
        }
        let mut trace = Trace::begin(store, repository)?;
        let shown = self.upload(store, repository, &mut trace);
        // Also where it failed; that counts more, then.
        let ended = trace.end(store);
        shown.and_then(|shown| ended.map(|()| shown))
    }

    fn elsewhere(&self, store: &dyn Store) -> Error {
        Error::invalid(format!(
            "the registry at {} stores somewhere else than {}; give the URL of the one that serves this storage",
            self.url(),
            store.full(Path::new("")).printable()
        ))
    }

    /// Begins an upload and cancels it; returns who opened it for that.
    fn upload(&self, store: &dyn Store, repository: &Path, trace: &mut Trace) -> Result<Option<Vec<u32>>> {
        let rights = scope(repository, "pull,push");
        let uploads = format!("/v2/{}/blobs/uploads/", repository.to_string_lossy());
        let (status, answer) = self.call("POST", &uploads, &rights)?;
        match status {
            202 => {}
            401 | 403 => return Err(self.denied(status, "begin an upload, which shows what it stores in")),
            _ => return Err(self.unexpected("POST", status)),
        }
        let name = header(&answer, "docker-upload-uuid").filter(|name| traces::is_upload(name));
        let Some(upload) = our_way(&uploads, &header(&answer, "location").unwrap_or_default()) else {
            return Err(self.elsewhere(store));
        };
        let is_here = match &name {
            Some(name) => store.stat(&layout::upload_started_at(repository, name.as_ref()))?.is_some(),
            None => false,
        };
        let mut openers = None;
        if let Some(name) = name.filter(|_| is_here) {
            trace.found(store, &name)?;
            openers = watched(store, &layout::upload_data(repository, name.as_ref()))?;
        }
        // What is left of it is removed in any case.
        let cancelled = self.call("DELETE", &upload, &rights);
        if !is_here {
            return Err(self.elsewhere(store));
        }
        cancelled?;
        openers
            .map(|openers| openers.so_far())
            .transpose()
            .map_err(|e| Error::io("find out who opens", &store.full(&layout::uploads(repository)), e))
    }
}

/// Who opens a file of the storage from now on; `None` where nobody tells us.
fn watched(store: &dyn Store, path: &Path) -> Result<Option<Openers>> {
    let opened = store.open(path)?;
    let Some(file) = opened.as_ref().and_then(|reader| reader.file()) else { return Ok(None) };
    match Openers::of(file) {
        Ok(openers) => Ok(Some(openers)),
        Err(e) => {
            log::debug!("registries are told apart by their addresses: {e}");
            Ok(None)
        }
    }
}

/// Our way to an upload, made of what the registry calls it, which may lead nowhere from here: `http.host`, a prefix, a
/// relative URL.
fn our_way(uploads: &str, location: &str) -> Option<String> {
    let (path, query) = location.split_once('?').unwrap_or((location, ""));
    let name = path.rsplit('/').next().filter(|name| traces::is_upload(name))?;
    Some(format!("{uploads}{name}?{query}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::registries::http::{Access, Place};

    #[test]
    fn a_location_is_followed_by_our_way_to_the_registry() {
        let ours = "/v2/a/b/blobs/uploads/";
        for location in [
            "https://hub.example:5000/v2/a/b/blobs/uploads/1-2?_state=x",
            "https://hub.example/v2/reg/v2/a/b/blobs/uploads/1-2?_state=x",
            "/reg/v2/a/b/blobs/uploads/1-2?_state=x",
            "1-2?_state=x",
        ] {
            assert_eq!(our_way(ours, location).unwrap(), format!("{ours}1-2?_state=x"), "{location}");
        }
        assert_eq!(our_way(ours, "http://x/1?b=c://d").unwrap(), format!("{ours}1?b=c://d"));
        for wrong in ["", "http://hub.example/", "/..?x", "/%2e%2e", "/a b"] {
            assert_eq!(our_way(ours, wrong), None, "{wrong}");
        }
    }

    #[test]
    fn names_that_lead_to_one_address_count_once() {
        let count = |urls: &[&str]| {
            let registry = |url: &&str| Registry::new(Place::new(url, true), Access::default());
            let registries: Vec<Registry> = urls.iter().map(registry).collect();
            distinct(&registries.iter().collect::<Vec<_>>())
        };
        assert_eq!(count(&["http://127.0.0.1:5000", "http://localhost:5000", "http://[::1]:5000/"]), 1);
        assert_eq!(count(&["http://127.0.0.1:5000/a", "https://127.0.0.1:5000/b/v2/"]), 1);
        assert_eq!(count(&["http://127.0.0.1", "http://localhost:80"]), 1);
        assert_eq!(count(&["http://127.0.0.1:5000", "http://127.0.0.1:5001"]), 2);
        assert_eq!(count(&["unix:/run/a", "unix:/run/b", "unix:/run/a"]), 2);
        assert_eq!(count(&["http://192.0.2.1:5000", "http://192.0.2.2:5000"]), 2);
    }
}
