//! Registry processes of this machine that serve a storage, containers included, as far as this user may look.
//!
//! # What a registry is
//! A process that could write to the storage ([`writers`]; others are not even looked at), whose program is a registry
//! ([`program`]), whatever it is called, and that was started with a configuration of this storage ([`served`]), or with
//! one that can't be known. Words alone make none: launchers (`timeout`, `sh -c`, `sudo`, `tini`, `docker run`) have the same
//! ones. Where another program was started with a configuration of this storage and listens ([`sockets`]), it may be a
//! registry of another make, of which nothing more is known; unless a registry runs below it, then it launched that.
//!
//! A process is looked at through one descriptor of its directory in `/proc` ([`handle`]), and asked whose it is before and
//! after: what a process says counts only if it was its writer's own all the while.

mod handle;
mod holders;
mod program;
mod served;
mod sockets;
mod writers;

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::http::Place;
use crate::error::{Error, Result};
use crate::keeper::Metadata;
use crate::printable::Printable;
use crate::registry_config::{RedisConfig, StoreArgument, Variables};
use handle::Handle;
use served::{Doubt, Own, Serves};
use writers::{Credentials, Writers};

/// What matters of a registry.
pub(super) struct Facts {
    /// Where it keeps tags and manifests.
    pub(super) metadata: Metadata,
    /// It remembers blobs, or that is not known.
    pub(super) remembers: bool,
    /// The kind of its cache; `None`: it has none.
    pub(super) cache: Option<String>,
    /// What it remembers is not in its own memory, so it still does after it was stopped.
    pub(super) outlives: Option<Outlives>,
    /// It refuses all writes.
    pub(super) read_only: bool,
    /// It is a pull-through cache.
    pub(super) proxy: bool,
    /// It is known not to delete.
    pub(super) refuses_delete: bool,
    /// Where it answers.
    pub(super) place: Option<Place>,
    /// Its config.yml, if all of this is from there.
    pub(super) config: Option<PathBuf>,
}

impl Facts {
    /// The worst.
    pub(super) fn unknown() -> Facts {
        Facts {
            metadata: Metadata::Storage,
            remembers: true,
            cache: None,
            outlives: None,
            read_only: false,
            proxy: false,
            refuses_delete: false,
            place: None,
            config: None,
        }
    }

    /// What a configuration says, one that was named or that of a process.
    pub(super) fn of(config: &StoreArgument, is_named: bool) -> Facts {
        Facts {
            metadata: config.metadata(),
            remembers: config.descriptor_cache.is_some(),
            cache: config.descriptor_cache.clone(),
            outlives: Outlives::of(config),
            read_only: config.read_only == Some(true),
            proxy: config.proxy != Some(false),
            refuses_delete: config.delete_enabled == Some(false),
            place: config.url.as_deref().map(|url| Place::new(url, is_named)),
            config: config.from_config.clone(),
        }
    }
}

/// A memory of a registry that it keeps while it is stopped.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Outlives {
    /// In redis; there, if that is known.
    Redis(Option<RedisConfig>),
    /// A cache of that kind, which can't be asked.
    Other(String),
}

impl Outlives {
    fn of(config: &StoreArgument) -> Option<Outlives> {
        match config.descriptor_cache.as_deref() {
            None | Some("inmemory") => None,
            Some("redis") => Some(Outlives::Redis(config.redis.clone())),
            Some(kind) => Some(Outlives::Other(kind.to_string())),
        }
    }
}

/// A registry that runs.
pub(super) struct Process {
    pid: u32,
    command: String,
    /// What it was started with; why that can't be known, otherwise.
    config: std::result::Result<Box<StoreArgument>, Doubt>,
    /// Its program is a registry.
    is_registry: bool,
    /// It sees the root directory that we see.
    has_our_root: bool,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.command)
    }
}

impl Process {
    /// Its number.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    fn new(
        handle: &Handle,
        words: &[OsString],
        config: std::result::Result<Box<StoreArgument>, Doubt>,
        is_registry: bool,
    ) -> Process {
        let command = words.join(OsStr::new(" ")).printable().to_string();
        Process { pid: handle.pid, command, config, is_registry, has_our_root: handle.has_our_root() }
    }

    /// What matters of it; where it can't be known, the worst.
    pub(super) fn facts(&self) -> Facts {
        let facts = match &self.config {
            Ok(config) => Facts::of(config, false),
            Err(doubt) => match &doubt.now {
                // Where to ask is verified by asking; the rest may have been otherwise when it began.
                Some(now) => {
                    let Facts { place, outlives, .. } = Facts::of(now, false);
                    Facts { place, outlives, ..Facts::unknown() }
                }
                None => Facts::unknown(),
            },
        };
        // Another root has another socket of that name.
        let is_ours = |place: &Place| !place.url.starts_with("unix:") || self.has_our_root;
        Facts { place: facts.place.filter(is_ours), ..facts }
    }

    /// Where it keeps tags and manifests, as far as that is known.
    pub(super) fn metadata(&self) -> Metadata {
        let config = self.config.as_ref().ok().or_else(|| self.config.as_ref().err()?.now.as_ref());
        config.map_or(Metadata::Storage, |config| config.metadata())
    }

    /// What it has to do with the storage.
    pub(super) fn relation(&self) -> String {
        match &self.config {
            Ok(_) => "serves this storage".to_string(),
            Err(doubt) if doubt.now.is_some() => format!("serves this storage ({})", doubt.why),
            Err(doubt) => format!("may serve this storage: {}", doubt.why),
        }
    }

    /// Why nobody knows what it serves, nor whom to ask, in words, if so.
    pub(super) fn doubt(&self) -> Option<String> {
        let is_clear = self.config.is_ok() || self.facts().place.is_some();
        (!is_clear).then(|| format!("{self} {}", self.relation()))
    }
}

/// What a look at all processes found.
#[derive(Default)]
pub(super) struct Table {
    /// The registries that serve the storage, or may.
    pub(super) registries: Vec<Process>,
    /// The processes that could write to the storage, and were looked at.
    writers: Vec<Handle>,
    /// So many processes can't be looked into from here, the first one apart.
    pub(super) hidden: usize,
    /// Those that can't write to the storage, and so were not asked.
    pub(super) strangers: Vec<Stranger>,
    /// Which process made which.
    parents: HashMap<u32, u32>,
}

/// A process that can't write to the storage.
pub(super) struct Stranger {
    pid: u32,
    user: u32,
    name: String,
}

impl fmt::Display for Stranger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stranger { pid, user, name } = self;
        write!(f, "process {pid} ({}) of user {user}", Path::new(name).printable())
    }
}

/// Looks at all processes for what serves the storage below `root`.
///
/// # Errors
/// There is no telling: the storage or the table of processes can't be looked at.
pub(super) fn look(root: &Path) -> Result<Table> {
    let looker = Looker {
        own: Own::of(root)?,
        writers: Writers::of(root)?,
        users: Handle::ours().and_then(|handle| handle.link("ns/user")).ok(),
    };
    let processes = Path::new("/proc");
    let failed = |e| Error::io("look for registries in", processes, e);
    let mut table = Table::default();
    for entry in std::fs::read_dir(processes).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        match looker.look(pid, &mut table) {
            Err(e) if is_refused(&e) => table.hidden += usize::from(pid != FIRST),
            // It has ended.
            Err(_) | Ok(()) => {}
        }
    }
    table.drop_launchers();
    Ok(table)
}

/// The first process of a machine starts others and serves nothing; its kernel may forbid to look into it.
const FIRST: u32 = 1;

fn is_refused(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}

/// What processes are compared with.
struct Looker {
    own: Own,
    writers: Writers,
    /// Our user namespace.
    users: Option<PathBuf>,
}

impl Looker {
    /// Puts what is found of a process into `table`. An error that is no refusal says that it has ended.
    fn look(&self, pid: u32, table: &mut Table) -> io::Result<()> {
        let handle = Handle::open(pid)?;
        let who = handle.credentials()?;
        table.parents.insert(pid, who.parent);
        if !self.is_writer(&who, &handle) {
            table.strangers.push(Stranger { pid, user: who.user(), name: who.name });
            return Ok(());
        }
        let words = handle.words()?;
        if words.is_empty() {
            // A thread of the kernel, or one that is ending.
            return Ok(());
        }
        let found = self.examine(&handle, &words);
        // Meanwhile it may have become somebody else's, who chose what it looks like.
        if !self.is_writer(&handle.credentials()?, &handle) {
            return Ok(());
        }
        table.registries.extend(found?);
        table.writers.push(handle);
        Ok(())
    }

    fn is_writer(&self, who: &Credentials, handle: &Handle) -> bool {
        self.writers.hold(who, || self.users.is_some() && handle.link("ns/user").ok() == self.users)
    }

    /// The registry that a process is, if it is one that serves the storage, or may.
    fn examine(&self, handle: &Handle, words: &[OsString]) -> io::Result<Option<Process>> {
        let variables = match handle.variables() {
            Err(e) if is_refused(&e) && has_words_of_registry(words) => {
                let why = format!("what it was started with can't be read from here ({e}); start it again");
                return Ok(Some(Process::new(handle, words, Err(Doubt::of(why)), true)));
            }
            variables => variables?,
        };
        if !is_worth_a_look(words, &variables) {
            return Ok(None);
        }
        match program::is_registry(handle)? {
            true => Ok(self.registry(handle, words, &variables)),
            false => self.other(handle, words, &variables),
        }
    }

    /// A process whose program is a registry.
    fn registry(&self, handle: &Handle, words: &[OsString], variables: &Variables) -> Option<Process> {
        // The collector and the like serve nothing.
        let serves = words.iter().any(|word| word == "serve")
            || variables.keys().any(|name| name == served::CONFIGURATION || served::is_of_storage(name));
        if !serves && words.iter().any(|word| word == "garbage-collect") {
            return None;
        }
        let config = match served::named(words, variables) {
            None => Err(Doubt::of("it names no config.yml")),
            Some(path) => match served::serves(handle, &path, variables, &self.own) {
                Ok(Serves::Other) => return None,
                Ok(Serves::This(config)) => Ok(config),
                Ok(Serves::MayBe(doubt)) => Err(doubt),
                // It has ended.
                Err(_) if handle.credentials().is_err() => return None,
                Err(e) => Err(Doubt::of(format!(
                    "what it was started with can't be read from here ({e}); start it again"
                ))),
            },
        };
        let is_certain = config.as_ref().map_or_else(|doubt| doubt.now.is_some(), |_| true);
        (serves || is_certain).then(|| Process::new(handle, words, config, true))
    }

    /// A process of which nothing is known but that it was started with a configuration of this storage, and listens.
    fn other(
        &self,
        handle: &Handle,
        words: &[OsString],
        variables: &Variables,
    ) -> io::Result<Option<Process>> {
        let Some(path) = served::named(words, variables) else { return Ok(None) };
        if !sockets::listens(handle)? {
            return Ok(None);
        }
        let now = match served::serves(handle, &path, variables, &self.own) {
            Ok(Serves::This(config)) => config,
            Ok(Serves::MayBe(Doubt { now: Some(config), .. })) => config,
            _ => return Ok(None),
        };
        let why = "it listens and was started with its config.yml, but its program is none of the registries that regfs knows";
        let doubt = Doubt { why: why.to_string(), now: Some(now) };
        Ok(Some(Process::new(handle, words, Err(doubt), false)))
    }
}

/// Whether the words call for a look at the program: nearly all processes are told apart by this alone.
fn is_worth_a_look(words: &[OsString], variables: &Variables) -> bool {
    let is_of_registry = |name: &OsString| name.as_bytes().starts_with(b"REGISTRY_");
    words.iter().skip(1).any(|word| word == "serve" || served::is_yaml(word))
        || is_called_registry(words)
        || variables.keys().any(is_of_registry)
}

/// `registry serve …`, `anything serve config.yml`: what little is known where the rest can't be read.
fn has_words_of_registry(words: &[OsString]) -> bool {
    let serve = words.iter().position(|word| word == "serve");
    let names_config = |at: usize| words.get(at + 1).is_some_and(|word| served::is_yaml(word));
    serve.is_some_and(|at| is_called_registry(words) || names_config(at))
}

/// `registry`, `/usr/bin/docker-registry`, `registry_DO_NOT_USE_GC`
fn is_called_registry(words: &[OsString]) -> bool {
    let serve = words.iter().position(|word| word == "serve").unwrap_or(1);
    words.iter().take(serve).any(|word| {
        Path::new(word).file_name().is_some_and(|name| name.to_string_lossy().contains("registry"))
    })
}

impl Table {
    /// How many processes were looked at.
    pub(super) fn count(&self) -> usize {
        self.writers.len()
    }

    /// Leaves out what a registry runs below: it launched that, and has the same words.
    fn drop_launchers(&mut self) {
        let mut launchers = HashSet::new();
        for registry in self.registries.iter().filter(|process| process.is_registry) {
            let mut pid = registry.pid;
            while let Some(parent) = self.parents.get(&pid).copied().filter(|_| launchers.insert(pid)) {
                pid = parent;
            }
        }
        self.registries.retain(|process| process.is_registry || !launchers.contains(&process.pid));
    }
}
