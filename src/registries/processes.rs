//! Registry processes of this machine that serve a storage, containers included, as far as this user may look.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Seek};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, openat2, statat};
use rustix::time::{ClockId, clock_gettime};

use super::http::Place;
use crate::error::{Error, Result};
use crate::keeper::Metadata;
use crate::layout::REGISTRY_DIR;
use crate::printable::Printable;
use crate::registry_config::{self, RedisConfig, StoreArgument, Variables};

/// What matters of a registry.
pub(super) struct Facts {
    /// It remembers blobs, or that is not known.
    pub(super) remembers: bool,
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
}

impl Facts {
    /// The worst.
    pub(super) fn unknown() -> Facts {
        Facts {
            remembers: true,
            outlives: None,
            read_only: false,
            proxy: false,
            refuses_delete: false,
            place: None,
        }
    }

    /// What a configuration says, one that was named or that of a process.
    pub(super) fn of(config: &StoreArgument, is_named: bool) -> Facts {
        Facts {
            remembers: config.descriptor_cache.is_some(),
            outlives: Outlives::of(config),
            read_only: config.read_only == Some(true),
            proxy: config.proxy != Some(false),
            refuses_delete: config.delete_enabled == Some(false),
            place: config.url.as_deref().map(|url| Place::new(url, is_named)),
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
    config: std::result::Result<StoreArgument, String>,
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

    /// What matters of it; where it can't be known, the worst.
    pub(super) fn facts(&self) -> Facts {
        let facts = self.config.as_ref().map_or_else(|_| Facts::unknown(), |config| Facts::of(config, false));
        // Another root has another socket of that name.
        let is_ours = |place: &Place| !place.url.starts_with("unix:") || has_our_root(self.pid);
        Facts { place: facts.place.filter(is_ours), ..facts }
    }

    /// Where it keeps tags and manifests, as far as that is known.
    pub(super) fn metadata(&self) -> Metadata {
        self.config.as_ref().map_or(Metadata::Storage, StoreArgument::metadata)
    }

    /// What it has to do with the storage.
    pub(super) fn relation(&self) -> String {
        match &self.config {
            Ok(_) => "serves this storage".to_string(),
            Err(why) => format!("may serve this storage: {why}"),
        }
    }

    /// Why nobody knows what it serves, in words, if so.
    pub(super) fn doubt(&self) -> Option<String> {
        self.config.is_err().then(|| format!("{self} {}", self.relation()))
    }
}

/// The registries that serve the storage below `root`, or may.
///
/// # Errors
/// There is no telling: the storage or the table of processes can't be looked at.
pub(super) fn serving(root: &Path) -> Result<Vec<Process>> {
    let look = |path: &Path| identity(&fs::metadata(path)?);
    let own = Own {
        root: look(root).map_err(|e| Error::io("look at", root, e))?,
        registry: look(&root.join(REGISTRY_DIR)).ok(),
    };
    let processes = Path::new("/proc");
    let entries = fs::read_dir(processes).map_err(|e| Error::io("look for registries in", processes, e))?;
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    Ok(pids.filter_map(|pid| process(pid, &own)).collect())
}

/// What tells the storage from others: device and inode of the storage root and of the registry directory, for either may
/// be a mount of its own for a registry.
struct Own {
    root: (u64, u64),
    registry: Option<(u64, u64)>,
}

/// Whether a process has the same root directory as we do.
fn has_our_root(pid: u32) -> bool {
    let root = |path: &str| fs::metadata(path).and_then(|metadata| identity(&metadata)).ok();
    root("/").is_some() && root("/") == root(&format!("/proc/{pid}/root"))
}

fn identity(metadata: &fs::Metadata) -> io::Result<(u64, u64)> {
    Ok((metadata.dev(), metadata.ino()))
}

/// The registry with that number if it serves the storage, or may. One that ends meanwhile does not.
fn process(pid: u32, own: &Own) -> Option<Process> {
    let place = PathBuf::from(format!("/proc/{pid}"));
    let words = split(&fs::read(place.join("cmdline")).ok()?);
    let serve = words.iter().position(|word| word == "serve")?;
    // `registry serve /etc/…`, `docker-registry serve …`, `registry_DO_NOT_USE_GC serve …`, or run by a loader or an emulator.
    let is_registry =
        |name: &Path| name.file_name().is_some_and(|n| n.to_string_lossy().contains("registry"));
    let program = fs::read_link(place.join("exe")).ok();
    if !words[..serve].iter().map(Path::new).chain(program.as_deref()).any(is_registry) {
        return None;
    }
    let command = words.join(OsStr::new(" ")).printable().to_string();
    match serves(&place, words.get(serve + 1), own) {
        Ok(Serves::Other) => None,
        Ok(Serves::This(config)) => Some(Process { pid, command, config: Ok(*config) }),
        Ok(Serves::MayBe(why)) => Some(Process { pid, command, config: Err(why) }),
        Err(e) => {
            let why = format!("what it was started with can't be read from here ({e})");
            place.exists().then_some(Process { pid, command, config: Err(why) })
        }
    }
}

/// What a registry serves.
enum Serves {
    /// The storage, with that configuration.
    This(Box<StoreArgument>),
    /// Another one.
    Other,
    /// Nobody can tell, and why.
    MayBe(String),
}

/// What the registry below `place` serves, with the configuration that its command line names; an error counts as one
/// that may serve the storage.
fn serves(place: &Path, named: Option<&OsString>, own: &Own) -> io::Result<Serves> {
    let environment: Variables =
        split(&fs::read(place.join("environ"))?).into_iter().filter_map(|pair| variable(&pair)).collect();
    let variable = |name: &str| environment.get(OsStr::new(name)).cloned();
    let Some(path) = named.cloned().or_else(|| variable("REGISTRY_CONFIGURATION_PATH")) else {
        return Ok(Serves::MayBe("it names no config.yml".to_string()));
    };
    let (directory, inside) = base(place, Path::new(&path))?;
    let mut file = open_in(&directory, &inside)?;
    if !is_as_at_start(place, &directory, &inside, &file)? {
        let file = Path::new(&path).printable();
        return Ok(Serves::MayBe(format!(
            "{file} was changed after it began, so what it does is unknown; start it again"
        )));
    }
    let Ok(config) = registry_config::resolve_file(file.try_clone()?, Path::new(&path), &environment) else {
        file.rewind()?;
        let text = registry_config::read_plain(file, registry_config::CONFIG_LIMIT)?;
        let text = String::from_utf8_lossy(text.as_deref().unwrap_or(b"filesystem")).into_owned();
        // A driver that is named and is no filesystem stores elsewhere.
        let is_on_disk = text.contains("filesystem") || environment.keys().any(|name| is_of_storage(name));
        let why = || format!("{} can't be understood", Path::new(&path).printable());
        return Ok(if is_on_disk { Serves::MayBe(why()) } else { Serves::Other });
    };
    let (directory, inside) = base(place, &config.storage_root)?;
    let root = match open_in(&directory, &inside) {
        // It has not stored anything yet.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Serves::Other),
        root => root?,
    };
    let registry = match open_in(&directory, &inside.join(REGISTRY_DIR)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        registry => Some(identity(&registry?.metadata()?)?),
    };
    let is_this = identity(&root.metadata()?)? == own.root || registry.is_some() && registry == own.registry;
    Ok(if is_this { Serves::This(Box::new(config)) } else { Serves::Other })
}

fn is_of_storage(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b"REGISTRY_STORAGE")
}

/// `name=value`
fn variable(pair: &OsStr) -> Option<(OsString, OsString)> {
    let at = pair.as_bytes().iter().position(|byte| *byte == b'=')?;
    let (name, value) = pair.as_bytes().split_at(at);
    Some((OsStr::from_bytes(name).to_os_string(), OsStr::from_bytes(value.get(1..)?).to_os_string()))
}

/// The directory that `path` is relative to for a process, and the rest of it.
fn base(place: &Path, path: &Path) -> io::Result<(File, PathBuf)> {
    let (base, inside) = match path.strip_prefix("/") {
        Ok(inside) => ("root", inside),
        Err(_) => ("cwd", path),
    };
    let inside = if inside.as_os_str().is_empty() { Path::new(".") } else { inside };
    Ok((File::open(place.join(base))?, inside.to_path_buf()))
}

/// Opens what a process would open: a symlink in it leads to where it leads for the process, never out of its root.
fn open_in(directory: &File, path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    Ok(openat2(directory, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)?.into())
}

/// Whether a configuration is what it was when the process began: neither the file nor the name was changed since. Its
/// content may be older than that in another place, which the time of the last change of the inode tells.
fn is_as_at_start(place: &Path, directory: &File, path: &Path, file: &File) -> io::Result<bool> {
    let name = statat(directory, path, AtFlags::SYMLINK_NOFOLLOW)?;
    let metadata = file.metadata()?;
    let name_changed = (name.st_ctime, i64::try_from(name.st_ctime_nsec).unwrap_or(i64::MAX));
    let changes =
        [(metadata.mtime(), metadata.mtime_nsec()), (metadata.ctime(), metadata.ctime_nsec()), name_changed];
    let Some(started) = started(place) else { return Ok(false) };
    let started = started.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let is_before = |(seconds, nanos): (i64, i64)| match (u64::try_from(seconds), u32::try_from(nanos)) {
        (Ok(seconds), Ok(nanos)) => Duration::new(seconds, nanos) <= started,
        _ => false,
    };
    Ok(changes.into_iter().all(is_before))
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
