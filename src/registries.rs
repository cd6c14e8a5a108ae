//! What is known of the registries that serve a store: from a config.yml, from the processes of this machine, from their
//! answers. It decides which [`Gate`] a sweep has.
//!
//! # Rules kept here
//! 1. What is not known counts as a registry that runs and remembers.
//! 2. A configuration counts for a process only if it was written before the process started.
//! 3. A URL counts only if the registry there is shown to write into this very storage ([`http`]): one that serves another
//!    would say of everything that it does not have it.

mod answering;
pub mod http;
mod judge;
mod processes;
pub mod redis;
pub mod seen;
mod stillness;
mod whom;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::gc::guard::gate::{All, Gate, Looks, Probe, Registries, Said, Witness};
use crate::keeper::{Keeper, Metadata};
use crate::printable::Printable;
use crate::registry_config::{self, RedisConfig, StoreArgument};
use crate::store::Store;
use crate::store::disk::Disk;
use http::{Access, Client, Place};
use judge::{Evidence, Verdict, judge};
use processes::{Facts, Process};
use redis::Redis;
use seen::{Entry, Found, Seen};
use stillness::Stillness;
use whom::{Memory, Whom};

/// What is known of the registries that serve a store.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// The directory that holds `docker/registry/v2`; `None` where processes are not to be looked at.
    root: Option<PathBuf>,
    /// The config.yml that names it; read again each time, for it may change while we run.
    config: Option<PathBuf>,
    /// Where that said that tags and manifests are kept.
    metadata: Metadata,
    named: Vec<Place>,
    access: Access,
    /// The redis that was named, with its password.
    redis: Option<RedisConfig>,
}

impl Known {
    /// What `argument` says, with further `urls` of registries, and who we are to those.
    pub fn new(argument: &StoreArgument, urls: &[String], access: Access) -> Known {
        Known {
            // A daemon leaves its working directory.
            root: Some(absolute(&argument.storage_root)),
            config: argument.from_config.as_deref().map(absolute),
            metadata: argument.metadata(),
            named: Place::distinct(urls.iter().map(|url| Place::new(url, true)).collect()),
            access,
            redis: None,
        }
    }

    /// The same, with the redis in which registries remember.
    pub fn with_redis(self, redis: Option<RedisConfig>) -> Known {
        Known { redis, ..self }
    }

    /// How a sweep may go on now.
    ///
    /// # Errors
    /// It was said that no registry runs, and one does.
    pub fn gate(&self, said: Said) -> Result<Gate> {
        let seen = match self.with_past(self.look(said)?) {
            Err(e) if said == Said::Nothing => return Ok(Gate::Stop { why: e.to_string() }),
            seen => seen?,
        };
        Ok(match judge(&seen, said)? {
            Verdict::Stopped => self.stopped(&seen, said)?,
            Verdict::Off => Gate::Off,
            Verdict::Stop(why) => Gate::Stop { why },
            Verdict::Ask(whom) => match self.ask(whom, &seen) {
                Ok(all) => Gate::Probe(Probe(Arc::new(all))),
                Err(why) => Gate::Stop { why },
            },
        })
    }

    /// No registry can write; what outlives them is told of all that goes.
    fn stopped(&self, seen: &Evidence, said: Said) -> Result<Gate> {
        let witness = match said.is_sure() {
            true => Witness::default(),
            false => Witness(Some(Arc::new(Stillness::new(self.clone(), said, seen.relied_on.clone())))),
        };
        let refused = |why: String| Error::invalid(format!("{{+registry-stopped}} was said, but {why}"));
        let memories = match whom::memories(seen) {
            Err(why) if !said.is_emptied() => return Err(refused(why)),
            memories => memories.unwrap_or_default(),
        };
        let mut told: Vec<Arc<dyn Registries>> = Vec::new();
        for Memory { redis, .. } in &memories {
            match Redis::open(redis, Vec::new(), said.is_emptied()) {
                Ok(redis) => told.push(Arc::new(redis)),
                Err(why) if said.is_emptied() => {
                    log::info!("{why}; its cache was said to be emptied, so the run goes on")
                }
                Err(why) => return Err(refused(format!("{why}; {NEXT_FOR_REDIS}"))),
            }
        }
        Ok(Gate::Stopped(match told.is_empty() {
            true => witness,
            false => Witness(Some(Arc::new(Outlived { witness, told: All(told) }))),
        }))
    }

    /// Who keeps the tags of the storage, as configurations tell: the one that was given, as it was and as it is now, and
    /// those of the registries that run here, and what was seen of others before.
    pub fn keeper(&self) -> Keeper {
        let mut keeper = Keeper::of(self.root.clone());
        if let Some(path) = &self.config {
            let now = registry_config::resolve(path, &std::env::vars_os().collect());
            let now = now.ok().filter(|config| self.is_ours(config)).map(|config| config.metadata());
            keeper.hears(self.metadata.max(now.unwrap_or_default()), &path.printable());
        }
        let seen = match self.look(Said::Nothing) {
            Ok(now) => {
                now.running.iter().for_each(|process| keeper.hears(process.metadata(), process));
                self.with_past(now)
            }
            Err(e) => Err(e),
        };
        match seen {
            Ok(seen) => seen.past.iter().for_each(|entry| keeper.hears(entry.metadata(), &entry.text())),
            Err(e) => log::warn!("{e}"),
        }
        keeper
    }

    /// The processes that were not looked at, because they can't write to the storage, in a line; `None` where there are none.
    pub fn ignored(&self) -> Option<String> {
        let strangers = match processes::look(self.root.as_ref()?) {
            Ok(table) => table.strangers,
            Err(e) => return Some(e.to_string()),
        };
        let all: Vec<String> = strangers.iter().map(ToString::to_string).collect();
        (!all.is_empty()).then(|| {
            format!(
                "ignored, whatever they look like, because they can't write to this storage: {}",
                all.join(", ")
            )
        })
    }

    /// All that can be known without asking a registry. Where it was said that none runs, other traces of one are looked
    /// for as well; where that is sure, for none.
    fn look(&self, said: Said) -> Result<Evidence> {
        let mut seen = Evidence {
            root: self.root.clone().unwrap_or_default(),
            named: self.named.clone(),
            redis: self.redis.clone(),
            ..Evidence::default()
        };
        if let Some(root) = self.root.as_ref().filter(|_| !said.is_sure()) {
            let table = processes::look(root)?;
            for stranger in &table.strangers {
                log::debug!("ignored {stranger}: it can't write to this storage");
            }
            if said != Said::Nothing {
                let holders = table.holders(root)?;
                seen.blindness = stillness::blindness(holders.hidden);
                seen.holders = holders.found;
                seen.relied_on = stillness::relied_on(table.count(), root);
            } else {
                seen.relied_on = "each registry is read-only".to_string();
                seen.sees_all = stillness::blindness(table.hidden).is_none();
            }
            seen.running = table.registries;
        }
        seen.facts = self.facts(&seen.running);
        Ok(seen)
    }

    /// The same, with what was seen before.
    fn with_past(&self, now: Evidence) -> Result<Evidence> {
        let Some(root) = &self.root else { return Ok(now) };
        let past = Seen::read(&Disk::open(root)?)?.without(&self.entries(&now));
        let asked: Vec<Place> = match now.named.is_empty() {
            true => now.facts.iter().filter_map(|facts| facts.place.clone()).collect(),
            false => now.named.clone(),
        };
        let unasked = past.iter().filter(|entry| entry.is_unasked(&asked));
        // A registry of this machine would be among the processes; one that ended has forgotten.
        let has_ended = |entry: &Entry| now.sees_all && entry.was_here_and_is_silent();
        let unasked = unasked.filter(|entry| !has_ended(entry)).map(Entry::text).collect();
        Ok(Evidence { past, unasked, ..now })
    }

    /// What is to be remembered of registries that are seen now.
    fn entries(&self, now: &Evidence) -> Vec<Entry> {
        let of = |(at, facts): (usize, &Facts)| {
            // The last is that of the config.yml.
            let running = now.facts.get(..now.running.len()).unwrap_or_default();
            match at < running.len() {
                true => Entry::of(Found::Process, facts),
                false => Entry::of(Found::Config, facts).map(|entry| entry.beside(running)),
            }
        };
        now.facts.iter().enumerate().filter_map(of).collect()
    }

    /// Writes down what is seen of registries, for later runs; also what was named, where `gate` tells that it was shown to
    /// belong to this storage. What can't be written is said, and the run goes on.
    pub fn remember(&self, store: &dyn Store, who: &str, gate: &Gate) {
        let remembered = self.look(Said::Nothing).and_then(|now| {
            let mut entries = self.entries(&now);
            if let Some(redis) = now.redis.as_ref().filter(|_| gate.has_asked()) {
                entries = entries.into_iter().map(|entry| entry.with_redis(redis)).collect();
                entries.push(Entry::of_redis(redis));
            }
            if matches!(gate, Gate::Probe(_)) {
                entries.extend(self.named.iter().map(|place| Entry::of_url(&place.url)));
            }
            seen::remember(store, who, entries)
        });
        if let Err(e) = remembered {
            log::warn!("could not write down what regfs knows of registries: {e}");
        }
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
            Ok(config) if self.is_ours(&config) => Facts::of(&config, true),
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

    /// The registries that answer at `places`, if they can be asked; why not, otherwise.
    fn client(
        &self,
        places: &[Place],
        access: &Access,
        seen: &Evidence,
    ) -> std::result::Result<Client, String> {
        let process = |process: &Process| http::Seen {
            pid: process.pid(),
            what: format!("{process} {}", process.relation()),
        };
        let by_themselves = seen.running.iter().filter(|process| process.facts().outlives.is_none());
        let client = Client::new(places, access, by_themselves.map(process).collect());
        let next = match self.named.is_empty() {
            true => "give the registry's URL with --registry, or stop it and add {+registry-stopped}",
            false => "mend that, or stop the registry and add {+registry-stopped}",
        };
        client.check().map_err(|e| format!("{e}; {next}"))?;
        Ok(client)
    }

    /// All of them, if they can be asked; why not, otherwise.
    fn ask(&self, whom: Whom, seen: &Evidence) -> std::result::Result<All, String> {
        let access = self.access();
        let mut all: Vec<Arc<dyn Registries>> = Vec::new();
        if !whom.places.is_empty() {
            all.push(Arc::new(self.client(&whom.places, &access, seen)?));
        }
        for Memory { redis, places } in whom.memories {
            // Whoever remembers there need not be told, for the redis is.
            let asked = places.into_iter().map(|place| Client::new(&[place], &access, Vec::new())).collect();
            let redis =
                Redis::open(&redis, asked, false).map_err(|why| format!("{why}; {NEXT_FOR_REDIS}"))?;
            all.push(Arc::new(redis));
        }
        Ok(All(all))
    }

    /// Who we are, to token services as well that the config.yml names.
    fn access(&self) -> Access {
        let mut access = self.access.clone();
        let resolve = |path: &PathBuf| registry_config::resolve(path, &std::env::vars_os().collect());
        // One that can't be read names no service; that it can't be was said where its facts were wanted.
        access.realms.extend(self.config.as_ref().and_then(|path| resolve(path).ok()?.token_realm));
        access
    }

    /// The registries that are to forget what is removed; `None` where none remembers.
    ///
    /// # Errors
    /// Why one that may remember can't be told.
    pub fn rememberers(&self) -> std::result::Result<Option<All>, String> {
        let seen = self.look(Said::Nothing).and_then(|now| self.with_past(now)).map_err(|e| e.to_string())?;
        let is_named = !seen.named.is_empty() || seen.has_more_memory();
        let may_remember = is_named || seen.facts.iter().any(|facts| facts.remembers);
        may_remember.then(|| self.ask(whom::whom(&seen)?, &seen)).transpose()
    }
}

/// What to do about a redis that can't be asked.
const NEXT_FOR_REDIS: &str = "mend that, or give the address as it is seen from here with --redis redis://HOST:PORT/DB; or stop \
                              the registry, empty its cache, and add {+registry-stopped} {+cache-emptied}";

/// No registry runs, and what they remember outlives them.
struct Outlived {
    witness: Witness,
    told: All,
}

impl Looks for Outlived {
    fn look(&self) -> Result<()> {
        self.witness.0.as_ref().map_or(Ok(()), |looks| looks.look())
    }

    fn sees(&self) -> bool {
        self.witness.0.is_some()
    }

    fn relied_on(&self) -> String {
        format!("{}; told to forget what goes: {}", self.witness, self.told.name())
    }

    fn outliving(&self) -> Option<&dyn Registries> {
        Some(&self.told)
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}
