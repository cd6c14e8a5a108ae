//! Registry processes of this machine that serve a storage, containers included, as far as this user may look.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::time::{ClockId, clock_gettime};

use crate::error::{Error, Result};
use crate::registry_config::{self, StoreArgument};

/// What matters of a registry.
pub(super) struct Facts {
    /// It remembers blobs, or that is not known.
    pub(super) remembers: bool,
    /// What it remembers is not in its own memory, so it still does after it was stopped.
    pub(super) remembers_for_ever: bool,
    /// It refuses all writes.
    pub(super) read_only: bool,
    /// It is a pull-through cache.
    pub(super) proxy: bool,
    /// Where it answers.
    pub(super) url: Option<String>,
}

impl Facts {
    /// The worst.
    pub(super) fn unknown() -> Facts {
        Facts { remembers: true, remembers_for_ever: false, read_only: false, proxy: false, url: None }
    }

    /// What a configuration says.
    pub(super) fn of(config: &StoreArgument) -> Facts {
        Facts {
            remembers: config.descriptor_cache.is_some(),
            remembers_for_ever: config.descriptor_cache.as_deref().is_some_and(|cache| cache != "inmemory"),
            read_only: config.read_only == Some(true),
            proxy: config.proxy != Some(false),
            url: config.url.clone(),
        }
    }
}

/// A registry that runs.
pub(super) struct Process {
    pid: u32,
    command: String,
    /// What it was started with; `None` where that can't be known.
    config: Option<StoreArgument>,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.command)
    }
}

impl Process {
    /// What matters of it; where it can't be known, the worst.
    pub(super) fn facts(&self) -> Facts {
        match &self.config {
            Some(config) => Facts::of(config),
            None => Facts::unknown(),
        }
    }

    /// What it has to do with the storage.
    pub(super) fn relation(&self) -> &'static str {
        match self.config {
            Some(_) => "serves this storage",
            None => "is a registry whose configuration can't be known from here",
        }
    }
}

/// The registries that serve the storage below `root`, or may.
///
/// # Errors
/// There is no telling: the storage or the table of processes can't be looked at.
pub(super) fn serving(root: &Path) -> Result<Vec<Process>> {
    let own = fs::metadata(root).map_err(|e| Error::io("look at", root, e))?;
    let processes = Path::new("/proc");
    let entries = fs::read_dir(processes).map_err(|e| Error::io("look for registries in", processes, e))?;
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    Ok(pids.filter_map(|pid| process(pid, (own.dev(), own.ino()))).collect())
}

/// The registry with that number if it serves the storage, or may. One that ends meanwhile does not.
fn process(pid: u32, own: (u64, u64)) -> Option<Process> {
    let place = PathBuf::from(format!("/proc/{pid}"));
    let words = split(&fs::read(place.join("cmdline")).ok()?);
    let name = Path::new(words.first()?).file_name()?;
    let serve = words.iter().position(|word| word == "serve")?;
    // `registry serve /etc/…`, `docker-registry serve …`, `registry_DO_NOT_USE_GC serve …`; not a wrapper that starts one.
    if !name.to_string_lossy().contains("registry") {
        return None;
    }
    let command = words.join(OsStr::new(" ")).to_string_lossy().into_owned();
    let unknown = Process { pid, command, config: None };
    let Ok(environ) = fs::read(place.join("environ")) else {
        return place.exists().then_some(unknown);
    };
    let environment: HashMap<OsString, OsString> = split(&environ)
        .into_iter()
        .filter_map(|pair| {
            let at = pair.as_bytes().iter().position(|byte| *byte == b'=')?;
            let (key, value) = pair.as_bytes().split_at(at);
            Some((OsStr::from_bytes(key).to_os_string(), OsStr::from_bytes(value.get(1..)?).to_os_string()))
        })
        .collect();
    let variable = |name: &str| environment.get(OsStr::new(name)).cloned();
    let path = words.get(serve + 1).cloned().or_else(|| variable("REGISTRY_CONFIGURATION_PATH"));
    let inside = |path: &Path| match path.strip_prefix("/") {
        Ok(path) => place.join("root").join(path),
        Err(_) => place.join("cwd").join(path),
    };
    let Some(path) = path.map(|path| inside(Path::new(&path))) else { return Some(unknown) };
    let Ok(config) = registry_config::resolve(&path, &variable) else {
        // It may store elsewhere than on a filesystem, or with another configuration by now.
        return place.exists().then_some(unknown).filter(|_| may_store_here(&path));
    };
    let Ok(root) = fs::metadata(inside(&config.storage_root)) else {
        return None;
    };
    if (root.dev(), root.ino()) != own {
        return None;
    }
    let written = fs::metadata(&path).and_then(|meta| meta.modified()).ok();
    let is_its_own = written.zip(started(&place)).is_some_and(|(written, started)| written <= started);
    Some(Process { config: is_its_own.then_some(config), ..unknown })
}

/// Whether a configuration that could not be understood may mean a storage on a filesystem.
fn may_store_here(path: &Path) -> bool {
    // A driver that is named and is no filesystem stores elsewhere.
    let Ok(text) = fs::read_to_string(path) else { return true };
    text.contains("filesystem")
}

fn split(text: &[u8]) -> Vec<OsString> {
    let words = text.split(|byte| *byte == 0).filter(|word| !word.is_empty());
    words.map(|word| OsString::from_vec(word.to_vec())).collect()
}

/// The kernel counts in ticks of 10 ms.
const TICKS: Duration = Duration::from_millis(50);

/// When a process started, by the wall clock of today, or a moment later.
fn started(place: &Path) -> Option<SystemTime> {
    let stat = fs::read_to_string(place.join("stat")).ok()?;
    // The name of the program may hold anything; it ends with the last parenthesis.
    let ticks: u64 = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    let since_boot = Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second().max(1));
    let up = clock_gettime(ClockId::Boottime);
    let up = Duration::new(up.tv_sec.unsigned_abs(), u32::try_from(up.tv_nsec).ok()?);
    SystemTime::now().checked_sub(up.saturating_sub(since_boot))?.checked_add(TICKS)
}
