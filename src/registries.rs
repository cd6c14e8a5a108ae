//! What is known of the registries that serve a store: from a config.yml, from the processes of this machine, from their
//! answers. It decides which [`Gate`] a sweep has.
//!
//! # Rules kept here
//! 1. What is not known counts as a registry that runs and remembers.
//! 2. A configuration counts for a process only if it was written before the process started.
//! 3. A URL counts only if the registry there is shown to write into this very storage ([`http`]): one that serves another
//!    would say of everything that it does not have it.

pub mod http;
mod judge;
mod processes;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Result;
use crate::gc::guard::gate::{Gate, Probe, Said};
use crate::printable::Printable;
use crate::registry_config::{self, StoreArgument};
use http::{Client, Credentials};
use judge::{Evidence, Verdict, judge};
use processes::{Facts, Process};

/// What is known of the registries that serve a store.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// The directory that holds `docker/registry/v2`; `None` where processes are not to be looked at.
    root: Option<PathBuf>,
    /// The config.yml that names it; read again each time, for it may change while we run.
    config: Option<PathBuf>,
    urls: Vec<String>,
    credentials: Credentials,
}

impl Known {
    /// What `argument` says, with further `urls` of registries.
    pub fn new(argument: &StoreArgument, urls: &[String], credentials: Credentials) -> Known {
        Known {
            // A daemon leaves its working directory.
            root: Some(absolute(&argument.storage_root)),
            config: argument.from_config.as_deref().map(absolute),
            urls: urls.to_vec(),
            credentials,
        }
    }

    /// How a sweep may go on now.
    ///
    /// # Errors
    /// It was said that no registry runs, and one does.
    pub fn gate(&self, said: Said) -> Result<Gate> {
        if said == Said::StoppedForSure {
            return Ok(Gate::STOPPED);
        }
        Ok(match judge(&self.look()?, said)? {
            Verdict::Stopped => Gate::STOPPED,
            Verdict::Off => Gate::Off,
            Verdict::Stop(why) => Gate::Stop { why },
            Verdict::Ask(urls) => match self.client(&urls) {
                Ok(client) => Gate::Probe(Probe(Arc::new(client))),
                Err(why) => Gate::Stop { why },
            },
        })
    }

    /// All that can be known without asking a registry.
    fn look(&self) -> Result<Evidence> {
        let running = self.running()?;
        let facts = self.facts(&running);
        Ok(Evidence { running, facts, urls: self.urls.clone() })
    }

    fn running(&self) -> Result<Vec<Process>> {
        self.root.as_deref().map_or(Ok(Vec::new()), processes::serving)
    }

    /// Whether a config.yml names this storage; it may have been changed since the mount.
    fn is_ours(&self, config: &StoreArgument) -> bool {
        let identity = |path: &Path| std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
        let own = self.root.as_deref().and_then(identity);
        own.is_some() && own == identity(&config.storage_root)
    }

    /// What is known of each of them.
    fn facts(&self, running: &[Process]) -> Vec<Facts> {
        let of_config = |path: &PathBuf| match registry_config::resolve(path, &std::env::vars_os().collect())
        {
            Ok(config) if self.is_ours(&config) => Facts::of(&config),
            Ok(config) => {
                let (path, root) = (path.printable(), config.storage_root.printable());
                log::warn!("{path} names another storage by now ({root}), so it says nothing of this one");
                Facts::unknown()
            }
            Err(e) => {
                log::warn!("{e}");
                Facts::unknown()
            }
        };
        running.iter().map(Process::facts).chain(self.config.as_ref().map(of_config)).collect()
    }

    /// The registries that answer at `urls`, if they can be asked; why not, otherwise.
    fn client(&self, urls: &[String]) -> std::result::Result<Client, String> {
        let client = Client::new(urls, self.credentials.clone());
        let next = match self.urls.is_empty() {
            true => "give the registry's URL with --registry, or stop it and say registry-stopped",
            false => "mend that, or stop the registry and say registry-stopped",
        };
        client.check().map_err(|e| format!("{e}; {next}"))?;
        Ok(client)
    }

    /// The registries that are to forget what is removed; `None` where none remembers.
    ///
    /// # Errors
    /// Why one that may remember can't be told.
    pub fn rememberers(&self) -> std::result::Result<Option<Client>, String> {
        let seen = self.look().map_err(|e| e.to_string())?;
        let may_remember = !seen.urls.is_empty() || seen.facts.iter().any(|facts| facts.remembers);
        may_remember.then(|| self.client(&judge::urls(&seen)?)).transpose()
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}
