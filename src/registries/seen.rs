//! What was last seen of each registry of a storage, `.regfs/registries.json`.
//!
//! A registry that is stopped, or that nobody names today, may still remember: in redis, or because it runs where we can't
//! see it. So what was learnt of it once counts in every later run, until the same registry is seen to be otherwise, or
//! `--forget-registries` starts anew.
//!
//! # Rules kept here
//! 1. A registry is the same one if its URL leads to the same place, by whatever name, or if the config.yml given as STORE has the same path.
//! 2. What is not known never replaces what is: a URL alone says nothing of the cache behind it.
//! 3. No password is written. What the file says is never a place to send one to: who owns the storage can write it.
//! 4. A file that can't be read counts as registries that remember.
//! 5. A dry run reads it and does not write it.

use std::path::Path;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::answering::{is_one_place, is_silent_here};
use super::http::Place;
use super::processes::{Facts, Outlives};
use super::redis::address;
use crate::advice::forget_registries;
use crate::error::{Error, Result};
use crate::keeper::Metadata;
use crate::layout;
use crate::printable::Printable;
use crate::registry_config::{RedisConfig, RedisTls};
use crate::store::Store;

/// Longest file: an entry has a few hundred bytes.
const LIMIT: usize = 1 << 20;
/// A registry that is as it was is written down again after that.
const FRESH: Duration = Duration::from_secs(3600);
/// How long another regfs that changes the store is waited for.
const LOCK_WAIT: Duration = Duration::from_secs(5);
/// The only version so far.
const VERSION: u32 = 1;

/// How a registry was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Found {
    /// By the config.yml given as STORE.
    Config,
    /// As a process of this machine.
    Process,
    /// By `--registry`, and it was shown to serve this storage.
    Url,
    /// By `--redis`: what registries remember in.
    Redis,
}

/// One registry as it was last seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Entry {
    found: Found,
    /// The path of its config.yml, or the URL that was named.
    place: String,
    /// The kind of its cache; `None` where it has none, `unknown` where nobody knows.
    cache: Option<String>,
    /// Where it answers.
    pub(super) url: Option<String>,
    /// Where it remembers, if that is redis.
    redis: Option<At>,
    /// Where it keeps tags and manifests.
    #[serde(default)]
    metadata: Metadata,
    /// It was among the processes of this machine when its config.yml was given.
    #[serde(default)]
    has_run_here: bool,
    first_seen: String,
    last_seen: String,
}

/// Where a redis is; no password.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct At {
    addresses: Vec<String>,
    username: Option<String>,
    database: Option<i64>,
    has_tls: bool,
    master: Option<String>,
}

impl At {
    fn of(redis: &RedisConfig) -> At {
        At {
            addresses: redis.addresses.clone(),
            username: redis.username.clone(),
            database: redis.database,
            has_tls: redis.tls.is_some(),
            master: redis.master.clone(),
        }
    }

    fn config(&self) -> RedisConfig {
        RedisConfig {
            addresses: self.addresses.clone(),
            username: self.username.clone(),
            password: None,
            database: self.database,
            tls: self.has_tls.then(RedisTls::default),
            master: self.master.clone(),
        }
    }
}

/// Of which nobody knows the cache.
const UNKNOWN: &str = "unknown";

impl Entry {
    fn new(found: Found, place: &str, cache: Option<&str>) -> Entry {
        let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let (place, cache) = (place.to_string(), cache.map(str::to_string));
        Entry {
            found,
            place,
            cache,
            url: None,
            redis: None,
            metadata: Metadata::Storage,
            has_run_here: false,
            first_seen: now.clone(),
            last_seen: now,
        }
    }

    /// What is known of a registry by its configuration; `None` where that is nothing.
    pub(super) fn of(found: Found, facts: &Facts) -> Option<Entry> {
        let config = facts.config.as_ref()?;
        let redis = match &facts.outlives {
            Some(Outlives::Redis(redis)) => redis.as_ref().map(At::of),
            _ => None,
        };
        let entry = Entry::new(found, &config.to_string_lossy(), facts.cache.as_deref());
        let url = facts.place.as_ref().map(|place| place.url.clone());
        Some(Entry { url, redis, metadata: facts.metadata, ..entry })
    }

    /// A registry that was named, and nothing more is known of.
    pub(super) fn of_url(url: &str) -> Entry {
        Entry { url: Some(url.to_string()), ..Entry::new(Found::Url, url, Some(UNKNOWN)) }
    }

    /// A redis that was named.
    pub(super) fn of_redis(redis: &RedisConfig) -> Entry {
        let entry = Entry::new(Found::Redis, &address(redis), Some("redis"));
        Entry { redis: Some(At::of(redis)), ..entry }
    }

    /// The same, with the redis that was named for it.
    pub(super) fn with_redis(self, redis: &RedisConfig) -> Entry {
        let is_redis = matches!(self.outlives(), Some(Outlives::Redis(_)));
        Entry { redis: is_redis.then(|| At::of(redis)).or(self.redis), ..self }
    }

    /// Where it kept tags and manifests.
    pub(super) fn metadata(&self) -> Metadata {
        self.metadata
    }

    /// What outlives it, if anything does.
    pub(super) fn outlives(&self) -> Option<Outlives> {
        match self.cache.as_deref() {
            None | Some("inmemory" | UNKNOWN) => None,
            Some("redis") => Some(Outlives::Redis(self.redis.as_ref().map(At::config))),
            Some(kind) => Some(Outlives::Other(kind.to_string())),
        }
    }

    /// Whether it may run where nobody sees it, and remember, and is not among those that are asked.
    pub(super) fn is_unasked(&self, asked: &[Place]) -> bool {
        let may_remember = self.cache.is_some() && self.outlives().is_none();
        let is_at = |place: &Place| self.url.as_ref().is_some_and(|url| is_one_place(url, &place.url));
        matches!(self.found, Found::Config | Found::Url) && may_remember && !asked.iter().any(is_at)
    }

    /// The same, of a config.yml, with the processes that run.
    pub(super) fn beside(self, running: &[Facts]) -> Entry {
        let is_it = |facts: &Facts| facts.place.as_ref().map(|place| &place.url) == self.url.as_ref();
        let has_run_here = self.url.is_some() && running.iter().any(is_it);
        Entry { has_run_here, ..self }
    }

    /// Whether it ran on this machine, and nothing listens there any more.
    pub(super) fn was_here_and_is_silent(&self) -> bool {
        self.has_run_here && self.url.as_deref().is_some_and(is_silent_here)
    }

    fn is_same(&self, other: &Entry) -> bool {
        let is_place = self.found == other.found && self.place == other.place;
        match (&self.url, &other.url) {
            (Some(one), Some(another)) if is_one_place(one, another) => true,
            // Containers may have the same path for several.
            _ => is_place && self.found != Found::Process,
        }
    }

    fn is_as(&self, other: &Entry) -> bool {
        let of = |entry: &Entry| {
            let kept = (entry.metadata, entry.has_run_here);
            (entry.place.clone(), entry.cache.clone(), entry.url.clone(), entry.redis.clone(), kept)
        };
        self.found == other.found && of(self) == of(other)
    }

    fn is_unknown(&self) -> bool {
        self.cache.as_deref() == Some(UNKNOWN)
    }

    /// The registry and when it was seen, for messages.
    pub(super) fn text(&self) -> String {
        let url = self.url.as_ref().filter(|url| **url != self.place);
        let url = url.map_or_else(String::new, |url| format!(" at {}", url.printable()));
        let redis = self.redis.as_ref().map_or_else(String::new, |at| {
            let at = address(&at.config());
            if at == self.place { String::new() } else { format!(", redis at {}", at.printable()) }
        });
        let (what, place) = match self.found {
            Found::Redis => ("redis at", &self.place),
            Found::Process => ("a process with", &self.place),
            Found::Config | Found::Url => ("", &self.place),
        };
        let cache = self.cache.as_deref().unwrap_or("none");
        let text = format!("{what} {}{url}, cache {}{redis}", place.printable(), cache.printable());
        format!("{}, last seen {}", text.trim_start(), self.last_seen.printable())
    }
}

/// All that were seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Seen {
    version: u32,
    registries: Vec<Entry>,
}

impl Seen {
    fn none() -> Seen {
        Seen { version: VERSION, registries: Vec::new() }
    }

    /// Reads it; none where there is no file.
    ///
    /// # Errors
    /// The file can't be read or understood; what to do.
    pub(super) fn read(store: &dyn Store) -> Result<Seen> {
        let path = Path::new(layout::REGISTRIES);
        let damaged = |why: &dyn std::fmt::Display| {
            let own = store.full(Path::new(""));
            Error::invalid(format!(
                "{} can't be read ({why}), so nobody knows what registries of this storage remember; run `{}`, and name the \
                 registries again in the run after that",
                store.full(path).printable(),
                forget_registries(layout::storage_root(&own))
            ))
        };
        match store.read(path, LIMIT) {
            Ok(None) => Ok(Seen::none()),
            Ok(Some((text, _))) => match serde_json::from_slice::<Seen>(&text) {
                Ok(seen) if seen.version == VERSION => Ok(seen),
                Ok(seen) => Err(damaged(&format!("version {}", seen.version))),
                Err(e) => Err(damaged(&e)),
            },
            Err(e) => Err(damaged(&e)),
        }
    }

    /// Those of which `now` says nothing.
    pub(super) fn without(self, now: &[Entry]) -> Vec<Entry> {
        let is_gone = |entry: &Entry| !now.iter().any(|n| !n.is_unknown() && n.is_same(entry));
        self.registries.into_iter().filter(is_gone).collect()
    }

    /// The same, with what is seen `now`; whether that changes anything worth writing.
    fn with(&mut self, now: Vec<Entry>) -> bool {
        let mut is_changed = false;
        for mut entry in now {
            let before = self.registries.iter().position(|old| old.is_same(&entry));
            if let Some(old) = before.map(|at| self.registries.remove(at)) {
                let is_fresh = humantime::parse_rfc3339(&old.last_seen)
                    .is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age < FRESH));
                if entry.is_unknown() && !old.is_unknown() {
                    entry = Entry { last_seen: entry.last_seen, ..old.clone() };
                }
                entry.first_seen.clone_from(&old.first_seen);
                // At the same place only.
                entry.has_run_here |= old.has_run_here && old.url == entry.url && old.found == entry.found;
                is_changed |= !is_fresh || !entry.is_as(&old);
                if is_fresh && entry.is_as(&old) {
                    entry = old;
                }
            } else {
                is_changed = true;
            }
            // One URL, one registry.
            let count = self.registries.len();
            self.registries.retain(|old| entry.is_unknown() || !old.is_same(&entry));
            is_changed |= self.registries.len() != count;
            self.registries.push(entry);
        }
        is_changed
    }

    fn write(&self, store: &dyn Store) -> Result<()> {
        let path = Path::new(layout::REGISTRIES);
        let text = serde_json::to_vec_pretty(self).map_err(|e| Error::io("write", path, e))?;
        store.write(path, &text)
    }
}

/// Writes down what is seen now, where that is new.
pub(super) fn remember(store: &dyn Store, who: &str, now: Vec<Entry>) -> Result<()> {
    if now.is_empty() || !Seen::read(store)?.with(now.clone()) {
        return Ok(());
    }
    let _lock = store.lock(who, LOCK_WAIT)?;
    // Another regfs may have been first.
    let mut seen = Seen::read(store)?;
    seen.with(now);
    seen.write(store)
}

/// Forgets all of it; what that was, a line each.
pub fn forget(store: &dyn Store, who: &str) -> Result<Vec<String>> {
    let path = Path::new(layout::REGISTRIES);
    let _lock = store.lock(who, LOCK_WAIT)?;
    let lines = match Seen::read(store) {
        Ok(seen) => seen.registries.iter().map(Entry::text).collect(),
        Err(_) => {
            // Whatever stands there is replaced, and nothing of it followed.
            Seen::none().write(store)?;
            vec![format!("what {} said, which can't be read", store.full(path).printable())]
        }
    };
    match store.remove(&[path.to_path_buf()]).into_iter().next() {
        Some(e) => Err(e),
        None => Ok(lines),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn entry(found: Found, place: &str, cache: Option<&str>, url: &str) -> Entry {
        let url = Some(url.to_string()).filter(|url| !url.is_empty());
        Entry { url, ..Entry::new(found, place, cache) }
    }

    #[test]
    fn a_registry_is_known_by_its_url_and_by_the_config_that_was_given() {
        use Found::{Config, Process, Url};
        let old = entry(Config, "/a.yml", Some("redis"), "u");
        let cases = [
            ("the same", entry(Config, "/a.yml", None, "u"), true),
            ("another port", entry(Config, "/a.yml", None, "v"), true),
            ("its process", entry(Process, "/a.yml", None, "u"), true),
            ("another file", entry(Config, "/b.yml", None, "v"), false),
            ("a container's", entry(Process, "/a.yml", None, "v"), false),
            ("only its URL", entry(Url, "u", Some(UNKNOWN), "u"), false),
        ];
        for (name, now, is_covered) in cases {
            let seen = Seen { version: VERSION, registries: vec![old.clone()] };
            assert_eq!(seen.clone().without(std::slice::from_ref(&now)).is_empty(), is_covered, "{name}");
            let mut seen = seen;
            seen.with(vec![now]);
            let redis = seen.registries.iter().any(|entry| entry.outlives().is_some());
            assert_eq!(redis, !is_covered, "{name}");
        }
        let container = entry(Process, "/a.yml", Some("redis"), "u");
        let seen = Seen { version: VERSION, registries: vec![container] };
        assert_eq!(seen.without(&[entry(Process, "/a.yml", None, "v")]).len(), 1);
    }

    #[test]
    fn what_is_as_it_was_is_not_written_again() {
        let mut seen = Seen { version: VERSION, registries: Vec::new() };
        let one = entry(Found::Config, "/a.yml", Some("inmemory"), "u");
        assert!(seen.with(vec![one.clone()]));
        assert!(!seen.with(vec![one.clone()]));
        assert!(seen.with(vec![Entry { cache: None, ..one }]));
        seen.registries[0].last_seen = "2020-01-01T00:00:00Z".to_string();
        let again = Entry { cache: None, ..seen.registries[0].clone() };
        assert!(seen.with(vec![again]));
    }
}
