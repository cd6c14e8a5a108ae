//! Which storage a process serves, going by the configuration that it was started with.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Seek};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, openat2, statat};
use rustix::time::{ClockId, clock_gettime};

use super::handle::{Began, Handle};
use crate::error::{Error, Result};
use crate::layout::REGISTRY_DIR;
use crate::printable::Printable;
use crate::registry_config::{self, StoreArgument, Variables};

/// What tells the storage from others: device and inode of the storage root and of the registry directory, for either may
/// be a mount of its own for a registry.
pub(super) struct Own {
    root: (u64, u64),
    registry: Option<(u64, u64)>,
}

impl Own {
    /// The storage below `root`.
    pub(super) fn of(root: &Path) -> Result<Own> {
        let look = |path: &Path| fs::metadata(path).map(|metadata| identity(&metadata));
        let registry = root.join(REGISTRY_DIR);
        Ok(Own {
            root: look(root).map_err(|e| Error::io("look at", root, e))?,
            registry: match look(&registry) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => None,
                found => Some(found.map_err(|e| Error::io("look at", &registry, e))?),
            },
        })
    }
}

fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// What a registry serves.
pub(super) enum Serves {
    /// The storage, with that configuration.
    This(Box<StoreArgument>),
    /// Another one.
    Other,
    /// Nobody can tell.
    MayBe(Doubt),
}

/// Why nobody can tell what a registry serves or remembers.
pub(super) struct Doubt {
    pub(super) why: String,
    /// What its configuration says by now, if that names this storage: where it can be asked.
    pub(super) now: Option<Box<StoreArgument>>,
}

impl Doubt {
    pub(super) fn of(why: impl Into<String>) -> Doubt {
        Doubt { why: why.into(), now: None }
    }
}

/// The variable that names a configuration where the command line does not.
pub(super) const CONFIGURATION: &str = "REGISTRY_CONFIGURATION_PATH";

/// Whether a word may name a configuration.
pub(super) fn is_yaml(word: &OsStr) -> bool {
    [".yml", ".yaml"].iter().any(|end| word.as_bytes().ends_with(end.as_bytes()))
}

/// The configuration that a process was started with, if anything names one.
pub(super) fn named(words: &[OsString], variables: &Variables) -> Option<PathBuf> {
    let serve = words.iter().position(|word| word == "serve");
    let argument = serve.and_then(|at| words.get(at + 1));
    let variable = || variables.get(OsStr::new(CONFIGURATION));
    argument.or_else(variable).or_else(|| words.iter().skip(1).find(|word| is_yaml(word))).map(PathBuf::from)
}

/// What the process `handle` serves, with the configuration `path`; an error counts as one that may serve the storage.
pub(super) fn serves(handle: &Handle, path: &Path, variables: &Variables, own: &Own) -> io::Result<Serves> {
    let (directory, inside) = base(handle, path)?;
    let mut file = open_plain(&directory, &inside)?;
    let is_as_it_was = is_as_it_was(handle, &directory, &inside, &file)?;
    let shown = path.printable();
    let changed = format!("{shown} was changed after it began");
    let config = match registry_config::resolve_file(file.try_clone()?, path, variables) {
        Ok(config) => config,
        Err(_) if !is_as_it_was => return Ok(Serves::MayBe(Doubt::of(changed + "; start it again"))),
        Err(why) => {
            file.rewind()?;
            let text = registry_config::read_plain(file, registry_config::CONFIG_LIMIT)?;
            let text = String::from_utf8_lossy(text.as_deref().unwrap_or(b"filesystem")).into_owned();
            // A driver that is named and is no filesystem stores elsewhere.
            let is_on_disk = text.contains("filesystem") || variables.keys().any(|name| is_of_storage(name));
            return Ok(if is_on_disk { Serves::MayBe(Doubt::of(why.to_string())) } else { Serves::Other });
        }
    };
    let is_this = is_own(handle, &config.storage_root, own)?;
    Ok(match (is_as_it_was, is_this) {
        (true, true) => Serves::This(Box::new(config)),
        (true, false) => Serves::Other,
        (false, true) => {
            let why = changed + ", so what it remembers is unknown";
            Serves::MayBe(Doubt { why, now: Some(Box::new(config)) })
        }
        (false, false) => {
            Serves::MayBe(Doubt::of(changed + ", so which storage it serves is unknown; start it again"))
        }
    })
}

/// Whether a storage root, as a process sees it, is ours.
fn is_own(handle: &Handle, root: &Path, own: &Own) -> io::Result<bool> {
    let (directory, inside) = base(handle, root)?;
    let look = |path: &Path| match open_in(&directory, path, OFlags::PATH) {
        // It has not stored anything yet.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        found => found?.metadata().map(|metadata| Some(identity(&metadata))),
    };
    let Some(found) = look(&inside)? else { return Ok(false) };
    Ok(found == own.root || own.registry.is_some() && look(&inside.join(REGISTRY_DIR))? == own.registry)
}

/// Whether a variable is about the storage.
pub(super) fn is_of_storage(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b"REGISTRY_STORAGE")
}

/// The directory that `path` is relative to for a process, and the rest of it.
fn base(handle: &Handle, path: &Path) -> io::Result<(File, PathBuf)> {
    let (base, inside) = match path.strip_prefix("/") {
        Ok(inside) => ("root", inside),
        Err(_) => ("cwd", path),
    };
    let inside = if inside.as_os_str().is_empty() { Path::new(".") } else { inside };
    Ok((handle.open_file(base, OFlags::PATH | OFlags::DIRECTORY)?, inside.to_path_buf()))
}

/// Opens what a process would open: a symlink in it leads to where it leads for the process, never out of its root.
fn open_in(directory: &File, path: &Path, flags: OFlags) -> io::Result<File> {
    Ok(openat2(directory, path, flags | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT)?.into())
}

/// Opens a regular file, and nothing else: a pipe or a device may wait, or do something when it is opened.
fn open_plain(directory: &File, path: &Path) -> io::Result<File> {
    let found = open_in(directory, path, OFlags::PATH)?.metadata()?;
    let refused =
        |what| Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} {what}", path.printable())));
    if !found.is_file() {
        return refused("is no regular file");
    }
    let file = open_in(directory, path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?;
    match identity(&file.metadata()?) == identity(&found) {
        true => Ok(file),
        false => refused("is being replaced"),
    }
}

/// Whether a configuration is what it was when the program that runs now read it: neither the file nor the name was
/// changed since. Its content may be older than that in another handle, which the time of the last change of the inode
/// tells.
fn is_as_it_was(handle: &Handle, directory: &File, path: &Path, file: &File) -> io::Result<bool> {
    let name = statat(directory, path, AtFlags::SYMLINK_NOFOLLOW)?;
    let metadata = file.metadata()?;
    let name_changed = (name.st_ctime, i64::try_from(name.st_ctime_nsec).unwrap_or(i64::MAX));
    let changes =
        [(metadata.mtime(), metadata.mtime_nsec()), (metadata.ctime(), metadata.ctime_nsec()), name_changed];
    let Some(began) = by_wall_clock(&handle.began()?) else { return Ok(false) };
    let is_before = |(seconds, nanos): (i64, i64)| match (u64::try_from(seconds), u32::try_from(nanos)) {
        (Ok(seconds), Ok(nanos)) => Duration::new(seconds, nanos) <= began,
        _ => false,
    };
    Ok(changes.into_iter().all(is_before))
}

/// The kernel tells beginnings in ticks, rounded down; see [`Handle::began`].
const TICK: Duration = Duration::from_millis(10);

/// The same by the wall clock of today, since 1970.
fn by_wall_clock(began: &Began) -> Option<Duration> {
    let up = clock_gettime(ClockId::Boottime);
    let up = Duration::new(up.tv_sec.unsigned_abs(), u32::try_from(up.tv_nsec).ok()?);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
    let at = if began.is_of_program { began.at + TICK } else { began.at };
    now.checked_sub(up.saturating_sub(at))
}
