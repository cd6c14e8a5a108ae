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
//!
//! Source: distribution `configuration/{configuration,parser}.go`, tried on 2.8.2.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::printable::Printable;

/// Where the filesystem driver stores when its configuration doesn't say.
pub const DEFAULT_ROOT_DIRECTORY: &str = "/var/lib/registry";

/// Real configurations have a few KB.
const CONFIG_LIMIT: u64 = 1 << 20;

/// Keys of `storage` that configure something other than a driver (`tag` since 3.0).
const NOT_DRIVERS: [&str; 5] = ["maintenance", "cache", "delete", "redirect", "tag"];

/// Variables that we care for, in the order in which the registry applies them: by name, so the most
/// specific one comes last and wins.
const VARIABLES: [(&str, &[&str]); 10] = [
    ("REGISTRY_STORAGE", &[]),
    ("REGISTRY_STORAGE_CACHE", &["cache"]),
    ("REGISTRY_STORAGE_CACHE_BLOBDESCRIPTOR", &["cache", "blobdescriptor"]),
    ("REGISTRY_STORAGE_CACHE_LAYERINFO", &["cache", "layerinfo"]),
    ("REGISTRY_STORAGE_DELETE", &["delete"]),
    ("REGISTRY_STORAGE_DELETE_ENABLED", &["delete", "enabled"]),
    ("REGISTRY_STORAGE_FILESYSTEM", &["filesystem"]),
    ("REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY", &["filesystem", "rootdirectory"]),
    ("REGISTRY_STORAGE_MAINTENANCE", &["maintenance"]),
    ("REGISTRY_STORAGE_MAINTENANCE_READONLY", &["maintenance", "readonly"]),
];

/// What the `<STORE>` argument says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreArgument {
    /// The directory that holds `docker/registry/v2`; as it was typed, or absolute when a file named it.
    /// Nothing has looked inside yet.
    pub storage_root: PathBuf,
    /// The config.yml that named it; `None` if the argument is the directory, and then we know no more.
    pub from_config: Option<PathBuf>,
    /// The variables that changed what the file says.
    pub overridden_by: Vec<&'static str>,
    /// Whether the registry answers `DELETE`.
    pub delete_enabled: Option<bool>,
    /// Whether the registry refuses all writes (`maintenance.readonly.enabled`).
    pub read_only: Option<bool>,
    /// `cache.blobdescriptor`, usually `inmemory` or `redis`: the registry remembers blobs it has seen.
    pub descriptor_cache: Option<String>,
    /// Whether it is a pull-through cache (`proxy.remoteurl`).
    pub proxy: Option<bool>,
    /// Where it can be asked from this machine (`http.addr`, `http.tls`).
    pub url: Option<String>,
}

/// Finds out what `argument` means; `environment` looks up one variable.
///
/// Fails with a message that names the path and the next step.
pub fn resolve(argument: &Path, environment: &dyn Fn(&str) -> Option<OsString>) -> Result<StoreArgument> {
    let kind = fs::metadata(argument).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => Error::invalid(format_args!(
            "{} does not exist; give a registry's storage directory (it holds docker/registry/v2) \
             or its config.yml",
            argument.printable()
        )),
        _ => Error::io("look at", argument, source),
    })?;
    if kind.is_dir() {
        return Ok(StoreArgument {
            storage_root: argument.to_path_buf(),
            from_config: None,
            overridden_by: Vec::new(),
            delete_enabled: None,
            read_only: None,
            descriptor_cache: None,
            proxy: None,
            url: None,
        });
    }
    let source = Source { path: argument, overridden_by: Vec::new() };
    // Checked before the open, which would wait for the other end of a pipe.
    if !kind.is_file() {
        return Err(source.refuse(
            "is neither a directory nor a plain file",
            "give a registry's storage directory or its config.yml",
        ));
    }
    from_config(source, environment)
}

fn from_config(mut source: Source, environment: &dyn Fn(&str) -> Option<OsString>) -> Result<StoreArgument> {
    let text = read(&source)?;
    let config = parse(&source, &text)?;
    let mut storage = normalize_storage(&source, config.storage)?;
    for (name, keys) in VARIABLES {
        if let Some(value) = environment(name) {
            let value = parse_variable(&source, name, value)?;
            source.overridden_by.push(name);
            match keys {
                [] => storage = normalize_storage(&source, value)?,
                keys => set(&mut storage, keys, value),
            }
        }
    }
    let storage_root = root_directory(&source, &storage)?;
    let fact = |section: &str, key: &str| storage.get(section).and_then(|s| s.get(key));
    Ok(StoreArgument {
        storage_root,
        from_config: Some(source.path.to_path_buf()),
        // The registry takes a value that is no boolean for false.
        delete_enabled: Some(fact("delete", "enabled") == Some(&Value::Bool(true))),
        read_only: Some(
            fact("maintenance", "readonly").and_then(|r| r.get("enabled")) == Some(&Value::Bool(true)),
        ),
        descriptor_cache: fact("cache", "blobdescriptor")
            .or_else(|| fact("cache", "layerinfo"))
            .and_then(Value::as_str)
            .filter(|kind| !kind.is_empty())
            .map(str::to_string),
        proxy: Some(
            config.proxy.get("remoteurl").is_some()
                || ["REGISTRY_PROXY", "REGISTRY_PROXY_REMOTEURL"]
                    .into_iter()
                    .any(|n| environment(n).is_some()),
        ),
        url: url(&config.http, environment),
        overridden_by: source.overridden_by,
    })
}

/// Where a registry answers that listens on this machine; a host that is left out, or means all of them, is this one.
fn url(http: &Value, environment: &dyn Fn(&str) -> Option<OsString>) -> Option<String> {
    let variable = environment("REGISTRY_HTTP_ADDR").and_then(|value| value.into_string().ok());
    let address = variable.or_else(|| http.get("addr").and_then(Value::as_str).map(str::to_string))?;
    let (host, port) = address.rsplit_once(':')?;
    let port: u16 = port.parse().ok()?;
    let host = match host {
        "" | "0.0.0.0" | "[::]" => "127.0.0.1",
        host => host,
    };
    let has_tls = http.get("tls").is_some_and(|tls| tls.as_object().is_some_and(|tls| !tls.is_empty()))
        || environment("REGISTRY_HTTP_TLS_CERTIFICATE").is_some();
    Some(format!("{}://{host}:{port}", if has_tls { "https" } else { "http" }))
}

/// Where the values come from, for messages.
struct Source<'a> {
    path: &'a Path,
    overridden_by: Vec<&'static str>,
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

fn read(source: &Source) -> Result<String> {
    let mut content = Vec::new();
    File::open(source.path)
        .and_then(|file| file.take(CONFIG_LIMIT + 1).read_to_end(&mut content))
        .map_err(|why| Error::io("read the registry's configuration", source.path, why))?;
    if content.len() as u64 > CONFIG_LIMIT {
        return Err(source.refuse(
            "is larger than 1 MiB, so it is no registry's config.yml",
            "give a registry's storage directory or its config.yml",
        ));
    }
    let text = String::from_utf8(content)
        .map_err(|_| source.refuse("is not text", "give a registry's storage directory or its config.yml"))?;
    match text.trim() {
        "" => Err(source.refuse("is empty", "give a registry's storage directory or its config.yml")),
        _ => Ok(text),
    }
}

/// The part of a configuration that matters here; the rest is skipped unread.
#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    storage: Value,
    #[serde(default)]
    http: Value,
    #[serde(default)]
    proxy: Value,
}

fn parse(source: &Source, text: &str) -> Result<Config> {
    // An untyped first look, only when the typed one fails, tells bad YAML from YAML of another shape.
    parse_yaml(text).map_err(|why| match parse_yaml::<serde::de::IgnoredAny>(text) {
        Err(why) => source.refuse(&format!("is not valid YAML: {why}"), "correct it there"),
        Ok(_) => source.refuse(
            &format!("is no registry configuration: {why}"),
            "give a registry's storage directory or its config.yml",
        ),
    })
}

/// YAML 1.1, which is what registries read: `yes` is true, the last of two equal keys wins, `0100` is 64.
fn parse_yaml<'de, T: Deserialize<'de>>(text: &'de str) -> std::result::Result<T, String> {
    let options = serde_saphyr::options! {
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::LastWins,
        legacy_octal_numbers: true,
        with_snippet: false,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|why| match why {
        // The registry reads the first and skips the rest, which is hardly what was meant.
        serde_saphyr::Error::MultipleDocuments { .. } => "more than one document".to_string(),
        why => why.to_string().split_whitespace().collect::<Vec<_>>().join(" "),
    })
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

fn parse_variable(source: &Source, name: &'static str, value: OsString) -> Result<Value> {
    let text = value.to_str().filter(|text| text.len() as u64 <= CONFIG_LIMIT);
    match text.map(str::trim) {
        Some("") => Ok(Value::Null),
        Some(text) => parse_yaml(text),
        None => Err("not text, or more than 1 MiB of it".to_string()),
    }
    .map_err(|why| {
        Error::invalid(format_args!(
            "the variable {name} that overrides {} is not valid YAML: {why}; correct or unset it",
            source.path.printable()
        ))
    })
}

/// Puts `value` below `keys`, making mappings on the way; does nothing below a scalar, like the registry.
fn set(mapping: &mut Map<String, Value>, keys: &[&str], value: Value) {
    let [first, rest @ ..] = keys else { return };
    if rest.is_empty() {
        mapping.insert(first.to_string(), value);
        return;
    }
    let slot = mapping.entry(*first).or_insert(Value::Null);
    if slot.is_null() {
        *slot = Value::Object(Map::new());
    }
    if let Value::Object(inner) = slot {
        set(inner, rest, value);
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
mod tests {
    use super::*;

    type Variables<'a> = &'a [(&'a str, &'a str)];

    /// Resolves a file with `text`, in an environment of `variables`.
    fn resolved(text: &str, variables: Variables) -> Result<StoreArgument> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.yml");
        fs::write(&path, text).unwrap();
        let result =
            resolve(&path, &|name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| v.into()));
        if let Ok(argument) = &result {
            assert_eq!(argument.from_config.as_deref(), Some(path.as_path()));
        }
        if let Err(error) = &result {
            assert!(error.to_string().contains("config.yml"), "{error}");
            assert!(error.to_string().contains("; "), "a next step: {error}");
            assert!(!error.to_string().contains('\n'), "one line: {error}");
        }
        result
    }

    #[track_caller]
    fn assert_refused(text: &str, variables: Variables, expected: &str) {
        let error = resolved(text, variables).expect_err(text);
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{text:?} gave: {error}");
    }

    const FILE: &str = "storage: {filesystem: {rootdirectory: /file}}";
    const ROOT: &str = "REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY";

    #[test]
    fn a_directory_is_the_storage_root_whatever_the_environment_says() {
        let directory = tempfile::tempdir().unwrap();
        let argument = resolve(directory.path(), &|_| Some("/elsewhere".into())).unwrap();
        assert_eq!(argument.storage_root, directory.path());
        assert_eq!((argument.from_config, argument.overridden_by), (None, vec![]));
        assert_eq!((argument.delete_enabled, argument.read_only), (None, None));
    }

    #[test]
    fn a_config_names_its_root_directory() {
        let cases = [
            (FILE, "/file"),
            ("version: 0.1\nstorage: filesystem", DEFAULT_ROOT_DIRECTORY),
            ("storage:\n  filesystem:\n", DEFAULT_ROOT_DIRECTORY),
            ("storage: {filesystem: {}}", DEFAULT_ROOT_DIRECTORY),
            ("storage: {filesystem: {maxthreads: 100}, tag: {concurrencylimit: 5}}", DEFAULT_ROOT_DIRECTORY),
            ("---\nstorage: {filesystem: {rootdirectory: '/a b'}, redirect: {disable: yes}}", "/a b"),
            ("storage: {filesystem: {rootdirectory: /1}}\nstorage: {filesystem: {rootdirectory: /2}}", "/2"),
            ("storage: {filesystem: {rootdirectory: /1, rootdirectory: /2}}", "/2"),
            ("x: &d {rootdirectory: /merged}\nstorage: {filesystem: {<<: *d}}", "/merged"),
            ("log: {level: 0100}\nhttp: {addr: :5000}\nstorage: {filesystem: {rootdirectory: /x}}", "/x"),
        ];
        for (text, expected) in cases {
            assert_eq!(resolved(text, &[]).unwrap().storage_root, Path::new(expected), "{text}");
        }
    }

    #[test]
    fn the_debian_package_s_config_is_understood() {
        let text = "\
version: 0.1
log:
  fields:
    service: registry
storage:
  cache:
    blobdescriptor: inmemory
  filesystem:
    rootdirectory: /var/lib/docker-registry
  delete:
    enabled: true
http:
  addr: :5000
  headers:
    X-Content-Type-Options: [nosniff]
";
        let argument = resolved(text, &[]).unwrap();
        assert_eq!(argument.storage_root, Path::new("/var/lib/docker-registry"));
        assert_eq!((argument.delete_enabled, argument.read_only), (Some(true), Some(false)));
        assert_eq!(argument.descriptor_cache.as_deref(), Some("inmemory"));
        assert!(argument.overridden_by.is_empty());
    }

    #[test]
    fn facts_are_read_as_the_registry_reads_them() {
        let facts = |text: &str, variables: Variables| {
            let argument = resolved(&format!("storage: {{filesystem: , {text}}}"), variables).unwrap();
            (argument.delete_enabled, argument.read_only, argument.descriptor_cache)
        };
        assert_eq!(facts("", &[]), (Some(false), Some(false), None));
        assert_eq!(facts("delete: {enabled: on}", &[]).0, Some(true));
        assert_eq!(facts("delete: {enabled: 'true'}", &[]).0, Some(false));
        assert_eq!(facts("maintenance: {readonly: {enabled: yes}}", &[]).1, Some(true));
        assert_eq!(facts("cache: {layerinfo: redis}", &[]).2.as_deref(), Some("redis"));
        assert_eq!(facts("cache: {blobdescriptor: ''}", &[]).2, None);
        assert_eq!(facts("delete: ", &[("REGISTRY_STORAGE_DELETE_ENABLED", "true")]).0, Some(true));
        let readonly = [("REGISTRY_STORAGE_MAINTENANCE_READONLY", "{enabled: true}")];
        assert_eq!(facts("", &readonly).1, Some(true));
        let cache = [("REGISTRY_STORAGE_CACHE_BLOBDESCRIPTOR", "redis")];
        assert_eq!(facts("cache: {blobdescriptor: inmemory}", &cache).2.as_deref(), Some("redis"));
    }

    #[test]
    fn the_most_specific_variable_wins() {
        let cases: [(&str, Variables, &str); 9] = [
            (FILE, &[(ROOT, "/env")], "/env"),
            (FILE, &[(ROOT, "'/env'  # comment")], "/env"),
            (FILE, &[("REGISTRY_STORAGE", "filesystem")], DEFAULT_ROOT_DIRECTORY),
            (FILE, &[("REGISTRY_STORAGE", "{filesystem: {rootdirectory: /env}}")], "/env"),
            (FILE, &[("REGISTRY_STORAGE", "filesystem"), (ROOT, "/env")], "/env"),
            (FILE, &[("REGISTRY_STORAGE_FILESYSTEM", "{rootdirectory: /section}")], "/section"),
            (FILE, &[("REGISTRY_STORAGE_FILESYSTEM", "{rootdirectory: /section}"), (ROOT, "/env")], "/env"),
            ("log: {}", &[(ROOT, "/env")], "/env"),
            ("storage: s3", &[("REGISTRY_STORAGE", "filesystem"), (ROOT, "/env")], "/env"),
        ];
        for (text, variables, expected) in cases {
            let argument = resolved(text, variables).unwrap();
            assert_eq!(argument.storage_root, Path::new(expected), "{text} {variables:?}");
            assert_eq!(argument.overridden_by.len(), variables.len());
        }
    }

    #[test]
    fn what_cannot_be_understood_is_refused_with_the_reason() {
        let large = format!("{FILE}\n#{}", "x".repeat(2 << 20));
        let cases = [
            ("", "is empty"),
            (" \n", "is empty"),
            ("# only a comment\n", "no storage driver"),
            ("storage: [", "not valid YAML"),
            ("\u{1}\u{2}", "not valid YAML"),
            ("storage: filesystem\n---\nstorage: s3", "not valid YAML: more than one document"),
            ("just text", "no registry configuration"),
            ("- a\n- b", "no registry configuration"),
            ("version: 0.1\nhttp: {addr: :5000}", "no storage driver"),
            ("storage: ", "no storage driver"),
            ("storage: {delete: {enabled: true}}", "no storage driver"),
            ("storage: [filesystem]", "neither a mapping nor"),
            ("storage: 7", "neither a mapping nor"),
            ("storage: {filesystem: {}, s3: {}}", "2 storage drivers (filesystem, s3)"),
            ("storage: {s3: {bucket: b}, cache: {}}", "the driver s3, and regfs reads the filesystem driver"),
            ("storage: inmemory", "the driver inmemory"),
            ("storage: {filesystem: /data}", "no mapping"),
            ("storage: {filesystem: {rootdirectory: data}}", "relative"),
            ("storage: {filesystem: {rootdirectory: ''}}", "empty"),
            ("storage: {filesystem: {rootdirectory: 123}}", "no string (123)"),
            ("storage: {filesystem: {rootdirectory: yes}}", "no string (true)"),
            ("storage: {filesystem: {rootdirectory: }}", "no string (null)"),
            ("storage: {filesystem: {rootdirectory: [/a]}}", "no string ([\"/a\"])"),
            (&large, "larger than 1 MiB"),
        ];
        for (text, expected) in cases {
            assert_refused(text, &[], expected);
        }
    }

    #[test]
    fn a_refusal_names_the_variable_at_fault() {
        assert_refused(FILE, &[(ROOT, "")], ROOT);
        assert_refused(FILE, &[(ROOT, "data")], ROOT);
        assert_refused(FILE, &[(ROOT, ": :[")], ROOT);
        assert_refused(FILE, &[("REGISTRY_STORAGE", "")], "REGISTRY_STORAGE from the environment");
        assert_refused(FILE, &[("REGISTRY_STORAGE", "s3")], "the driver s3");
        assert_refused("storage: inmemory", &[(ROOT, "/env")], "2 storage drivers");
    }

    #[test]
    fn bytes_missing_files_and_sockets_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let nothing = |_: &str| None;
        let missing = directory.path().join("missing");
        let error = resolve(&missing, &nothing).unwrap_err().to_string();
        assert!(error.contains("missing does not exist; give"), "{error}");

        let binary = directory.path().join("binary");
        fs::write(&binary, [0xff, 0xfe, 0]).unwrap();
        assert!(resolve(&binary, &nothing).unwrap_err().to_string().contains("is not text"));

        let socket = directory.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(resolve(&socket, &nothing).unwrap_err().to_string().contains("neither a directory nor"));
    }
}
