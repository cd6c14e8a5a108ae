//! What the `<STORE>` argument means: a storage root, or a registry's `config.yml` that names one.
//!
//! A directory is the storage root as it stands. A file is read as the configuration of a distribution
//! registry, 2.x or 3.x, and understood as the registry understands it, environment included:
//! ```text
//! storage:                                  # or a plain string: the driver's name
//!   filesystem:                             # exactly one driver …
//!     rootdirectory: /var/lib/registry      # … this is its default
//!   cache: {blobdescriptor: inmemory}       # and up to five keys that are no drivers
//!   delete: {enabled: true}
//! ```
//!
//! # Rules kept here
//! 1. Variables count only beside a config.yml: a directory on the command line means that directory.
//! 2. Where the registry would run but store somewhere surprising (a relative, empty or null
//!    `rootdirectory`), this refuses: a garbage collector must not guess which directory is meant.
//! 3. Variables of drivers other than `filesystem` are not looked at; beside a filesystem driver the
//!    registry itself stops on them.
//! 4. Empty means unset, as for the registry: `proxy: {remoteurl: ''}` is no pull-through cache.
//! 5. A configuration is a regular file of at most 1 MiB, and is read from the descriptor that showed so.
//!
//! Source: distribution `configuration/{configuration,parser}.go`, tried on 2.8.2.

mod facts;
mod yaml;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::keeper::Metadata;
use crate::printable::Printable;
pub use facts::{Database, RedisConfig, RedisTls};
use facts::{at, flag, text};

/// Where the filesystem driver stores when its configuration doesn't say.
pub const DEFAULT_ROOT_DIRECTORY: &str = "/var/lib/registry";

/// Real configurations have a few KB.
pub const CONFIG_LIMIT: u64 = 1 << 20;

/// Keys of `storage` that configure something other than a driver (`tag` since 3.0).
const NOT_DRIVERS: [&str; 5] = ["maintenance", "cache", "delete", "redirect", "tag"];

/// The variables of an environment, in the order in which a registry applies them.
pub type Variables = BTreeMap<OsString, OsString>;

/// What the `<STORE>` argument says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreArgument {
    /// The directory that holds `docker/registry/v2`; as it was typed, or absolute when a file named it.
    /// Nothing has looked inside yet.
    pub storage_root: PathBuf,
    /// The config.yml that named it; `None` if the argument is the directory, and then we know no more.
    pub from_config: Option<PathBuf>,
    /// The variables that changed what the file says.
    pub overridden_by: Vec<String>,
    /// Whether the registry answers `DELETE`.
    pub delete_enabled: Option<bool>,
    /// Whether the registry refuses all writes (`maintenance.readonly.enabled`).
    pub read_only: Option<bool>,
    /// `cache.blobdescriptor`, usually `inmemory` or `redis`: the registry remembers blobs it has seen.
    pub descriptor_cache: Option<String>,
    /// Whether it is a pull-through cache (`proxy.remoteurl`).
    pub proxy: Option<bool>,
    /// Where it can be asked from this machine (`http.addr`, `http.tls`, `http.prefix`; `http.host` where it names no
    /// port to listen on); `unix:` and the path of the socket for `http.net: unix`.
    pub url: Option<String>,
    /// Where clients are sent for a token (`auth.token.realm`).
    pub token_realm: Option<String>,
    /// The `redis` section, if it names an address.
    pub redis: Option<RedisConfig>,
    /// Whether GitLab's registry keeps tags and manifests in a database (`database.enabled`).
    pub database: Option<Database>,
    /// Whether it is the registry of a Harbor, which keeps tags and retention in a database of its own.
    pub is_harbor: bool,
}

impl StoreArgument {
    /// Where this registry keeps tags and manifests.
    pub fn metadata(&self) -> Metadata {
        match (self.database, self.is_harbor) {
            (Some(Database::Enabled), _) => Metadata::Database,
            (Some(Database::Prefer), _) => Metadata::DatabasePreferred,
            (None, true) => Metadata::Harbor,
            (None, false) => Metadata::Storage,
        }
    }
}

/// Finds out what `argument` means in an environment of `variables`.
///
/// Fails with a message that names the path and the next step.
pub fn resolve(argument: &Path, variables: &Variables) -> Result<StoreArgument> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => Error::invalid(format_args!(
            "{} does not exist; give a registry's storage directory (it holds docker/registry/v2) \
             or its config.yml",
            argument.printable()
        )),
        _ => Error::io("look at", argument, source),
    };
    let kind = fs::metadata(argument).map_err(failed)?;
    if kind.is_dir() {
        return Ok(StoreArgument { storage_root: argument.to_path_buf(), ..StoreArgument::default() });
    }
    // Not opened: that has effects on some devices. What is opened is looked at again.
    if !kind.is_file() {
        return Err(not_plain(argument));
    }
    resolve_file(open_plain(argument).map_err(failed)?, argument, variables)
}

/// The same for a configuration that is open already; `name` is for messages only.
pub fn resolve_file(file: File, name: &Path, variables: &Variables) -> Result<StoreArgument> {
    let source = Source { path: name, overridden_by: Vec::new() };
    from_config(source, file, variables)
}

/// Opens what should be a regular file without waiting for anybody: a pipe has another end that may never come.
pub fn open_plain(path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    fs::OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path)
}

/// The content of a regular file of at most `limit` bytes; `None` where it is larger.
pub fn read_plain(file: File, limit: u64) -> io::Result<Option<Vec<u8>>> {
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    let mut content = Vec::new();
    file.take(limit + 1).read_to_end(&mut content)?;
    Ok((content.len() as u64 <= limit).then_some(content))
}

fn not_plain(path: &Path) -> Error {
    Error::invalid(format_args!(
        "{} is neither a directory nor a plain file; give a registry's storage directory or its config.yml",
        path.printable()
    ))
}

fn from_config(mut source: Source, file: File, variables: &Variables) -> Result<StoreArgument> {
    let mut config = yaml::parse(&source, &read(&source, file)?)?;
    let storage = config.remove("storage").unwrap_or_default();
    config.insert("storage".to_string(), Value::Object(normalize_storage(&source, storage)?));
    yaml::overlay(&mut source, &mut config, variables)?;
    let storage = normalize_storage(&source, config.remove("storage").unwrap_or_default())?;
    let storage_root = root_directory(&source, &storage)?;
    let storage = Value::Object(storage);
    let config = Value::Object(config);
    let cache = at(&storage, &["cache", "blobdescriptor"]).or_else(|| at(&storage, &["cache", "layerinfo"]));
    Ok(StoreArgument {
        storage_root,
        from_config: Some(source.path.to_path_buf()),
        // The registry takes a value that is no boolean for false.
        delete_enabled: Some(flag(&storage, &["delete", "enabled"])),
        read_only: Some(flag(&storage, &["maintenance", "readonly", "enabled"])),
        descriptor_cache: cache.and_then(Value::as_str).filter(|kind| !kind.is_empty()).map(str::to_string),
        proxy: Some(text(&config, &["proxy", "remoteurl"]).is_some()),
        url: facts::url(&config),
        token_realm: text(&config, &["auth", "token", "realm"]),
        redis: facts::redis(&config),
        database: facts::database(&config),
        is_harbor: facts::is_harbor(&config),
        overridden_by: source.overridden_by,
    })
}

/// Where the values come from, for messages.
struct Source<'a> {
    path: &'a Path,
    overridden_by: Vec<String>,
}

impl Source<'_> {
    /// An error about this file: `<path> <what>; <next step>`.
    fn refuse(&self, what: &str, next_step: &str) -> Error {
        let with = match self.overridden_by.as_slice() {
            [] => String::new(),
            names => format!(" (with {} from the environment)", names.join(" and ")),
        };
        Error::invalid(format_args!("{}{with} {what}; {next_step}", self.path.printable()))
    }
}

fn read(source: &Source, file: File) -> Result<String> {
    let content = match read_plain(file, CONFIG_LIMIT) {
        Ok(Some(content)) => content,
        Ok(None) => {
            return Err(source.refuse(
                "is larger than 1 MiB, so it is no registry's config.yml",
                "give a registry's storage directory or its config.yml",
            ));
        }
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => return Err(not_plain(source.path)),
        Err(e) => return Err(Error::io("read the registry's configuration", source.path, e)),
    };
    let text = String::from_utf8(content)
        .map_err(|_| source.refuse("is not text", "give a registry's storage directory or its config.yml"))?;
    match text.trim() {
        "" => Err(source.refuse("is empty", "give a registry's storage directory or its config.yml")),
        _ => Ok(text),
    }
}

/// `storage: filesystem` is short for `storage: {filesystem: {}}`; absent and null are an empty mapping.
fn normalize_storage(source: &Source, storage: Value) -> Result<Map<String, Value>> {
    match storage {
        Value::Null => Ok(Map::new()),
        Value::Object(storage) => Ok(storage),
        Value::String(driver) => Ok(Map::from_iter([(driver, Value::Null)])),
        _ => Err(source.refuse(
            "has a storage section that is neither a mapping nor a driver's name",
            "write it as storage: {filesystem: {rootdirectory: /path}}",
        )),
    }
}

fn root_directory(source: &Source, storage: &Map<String, Value>) -> Result<PathBuf> {
    let drivers: Vec<&str> =
        storage.keys().map(String::as_str).filter(|key| !NOT_DRIVERS.contains(key)).collect();
    match drivers.as_slice() {
        ["filesystem"] => {}
        [] => {
            return Err(source.refuse(
                "names no storage driver (no storage section, or an empty one)",
                "give a registry's storage directory, or a config.yml with storage: {filesystem: …}",
            ));
        }
        [other] => {
            return Err(source.refuse(
                &format!("stores with the driver {other}, and regfs reads the filesystem driver"),
                "give the config.yml or the storage directory of a registry that stores on a filesystem, \
                 or a copy of this registry's storage on one",
            ));
        }
        several => {
            return Err(source.refuse(
                &format!("names {} storage drivers ({})", several.len(), several.join(", ")),
                "leave one, as the registry demands",
            ));
        }
    }
    let directory = match storage.get("filesystem") {
        None | Some(Value::Null) => return Ok(DEFAULT_ROOT_DIRECTORY.into()),
        Some(Value::Object(parameters)) => match parameters.get("rootdirectory") {
            None => return Ok(DEFAULT_ROOT_DIRECTORY.into()),
            Some(directory) => directory,
        },
        Some(_) => {
            return Err(source.refuse(
                "has a storage.filesystem that is no mapping",
                "write it as filesystem: {rootdirectory: /path}",
            ));
        }
    };
    // The registry prints any value into a path, and a path that does not begin with a slash lies below the
    // directory it was started in: null means "<nil>" there, 123 means "123", yes means "true".
    match directory.as_str() {
        Some(path) if Path::new(path).is_absolute() => Ok(path.into()),
        Some("") => Err(source.refuse(
            "has an empty storage.filesystem.rootdirectory",
            "write the absolute path there, or give the storage directory itself",
        )),
        Some(path) => Err(source.refuse(
            &format!(
                "has the relative storage.filesystem.rootdirectory {path}, which depends on the directory \
                 the registry was started in"
            ),
            "give the storage directory itself, or make it absolute there",
        )),
        None => Err(source.refuse(
            &format!("has a storage.filesystem.rootdirectory that is no string ({directory})"),
            "write it as an absolute path, in quotes if need be",
        )),
    }
}

#[cfg(test)]
mod tests;
