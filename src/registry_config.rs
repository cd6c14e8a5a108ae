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
mod tests {
    use super::*;

    type Pairs<'a> = &'a [(&'a str, &'a str)];

    /// Resolves a file with `text`, in an environment of `variables`.
    fn resolved(text: &str, variables: Pairs) -> Result<StoreArgument> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.yml");
        fs::write(&path, text).unwrap();
        let result =
            resolve(&path, &variables.iter().map(|(name, value)| (name.into(), value.into())).collect());
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
    fn assert_refused(text: &str, variables: Pairs, expected: &str) {
        let error = resolved(text, variables).expect_err(text);
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{text:?} gave: {error}");
    }

    const FILE: &str = "storage: {filesystem: {rootdirectory: /file}}";
    const ROOT: &str = "REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY";

    #[test]
    fn a_directory_is_the_storage_root_whatever_the_environment_says() {
        let directory = tempfile::tempdir().unwrap();
        let argument =
            resolve(directory.path(), &Variables::from([(ROOT.into(), "/elsewhere".into())])).unwrap();
        assert_eq!(argument.storage_root, directory.path());
        assert_eq!((argument.from_config, argument.overridden_by.len()), (None, 0));
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
        let facts = |text: &str, variables: Pairs| {
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
        let cases: [(&str, Pairs, &str); 9] = [
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

    /// With the filesystem driver and these sections.
    fn sections(text: &str, variables: Pairs) -> StoreArgument {
        resolved(&format!("storage: filesystem\n{text}"), variables).unwrap()
    }

    #[test]
    fn empty_means_unset() {
        let is_proxy = |text: &str, variables: Pairs| sections(text, variables).proxy.unwrap();
        let remote = "proxy: {remoteurl: 'https://registry-1.docker.io'}";
        assert!(is_proxy(remote, &[]));
        for nothing in [
            "",
            "proxy:",
            "proxy: {}",
            "proxy: {remoteurl: }",
            "proxy: {remoteurl: ''}",
            "proxy: {username: x}",
        ] {
            assert!(!is_proxy(nothing, &[]), "{nothing}");
            assert!(is_proxy(nothing, &[("REGISTRY_PROXY_REMOTEURL", "https://hub")]), "{nothing}");
            assert!(is_proxy(nothing, &[("REGISTRY_PROXY", "{remoteurl: https://hub}")]), "{nothing}");
        }
        for variable in
            [("REGISTRY_PROXY_REMOTEURL", ""), ("REGISTRY_PROXY_REMOTEURL", "''"), ("REGISTRY_PROXY", "{}")]
        {
            assert!(!is_proxy(remote, &[variable]), "{variable:?}");
        }
        let caches = [("cache: {blobdescriptor: '', layerinfo: inmemory}"), ("cache:"), ("cache: {}")];
        for cache in caches {
            let argument = resolved(&format!("storage: {{filesystem: , {cache}}}"), &[]).unwrap();
            assert_eq!(argument.descriptor_cache, None, "{cache}");
        }
        let unset = [("REGISTRY_STORAGE_CACHE_BLOBDESCRIPTOR", "")];
        let argument =
            resolved("storage: {filesystem: , cache: {blobdescriptor: inmemory}}", &unset).unwrap();
        assert_eq!(argument.descriptor_cache, None);
    }

    #[test]
    fn it_is_told_where_a_registry_answers() {
        let local = |rest: &str| Some(format!("http://{rest}"));
        let tls = |rest: &str| Some(format!("https://{rest}"));
        let cases: [(&str, Pairs, Option<String>); 27] = [
            ("http: {addr: ':5000'}", &[], local("127.0.0.1:5000")),
            ("http: {addr: :5000}", &[], local("127.0.0.1:5000")),
            ("http: {addr: '0.0.0.0:5000'}", &[], local("127.0.0.1:5000")),
            ("http: {addr: '[::]:5000'}", &[], local("127.0.0.1:5000")),
            ("http: {addr: '[::1]:5000'}", &[], local("[::1]:5000")),
            ("http: {addr: 'localhost:5000'}", &[], local("localhost:5000")),
            ("http: {addr: 'hub.example:5000'}", &[], local("hub.example:5000")),
            ("http: {addr: '10.1.2.3:80'}", &[], local("10.1.2.3:80")),
            ("http: {addr: ':0'}", &[], None),
            ("http: {addr: '5000'}", &[], None),
            ("http: {addr: ''}", &[], None),
            ("http:", &[], None),
            ("http: {host: 'https://hub.example/reg/'}", &[], tls("hub.example/reg")),
            ("http: {addr: :5000, host: 'https://hub.example'}", &[], local("127.0.0.1:5000")),
            ("http: {addr: :5000, prefix: /reg/}", &[], local("127.0.0.1:5000/reg")),
            ("http: {addr: :5000, prefix: /a/b}", &[], local("127.0.0.1:5000/a/b")),
            ("http: {addr: :5000, prefix: /}", &[], local("127.0.0.1:5000")),
            ("http: {addr: :5000}", &[("REGISTRY_HTTP_PREFIX", "/reg/")], local("127.0.0.1:5000/reg")),
            ("http: {addr: :5000, tls: {certificate: /c, key: /k}}", &[], tls("127.0.0.1:5000")),
            ("http: {addr: :5000, tls: {certificate: '', key: ''}}", &[], local("127.0.0.1:5000")),
            (
                "http: {addr: :5000, tls: {certificate: /c}}",
                &[("REGISTRY_HTTP_TLS_CERTIFICATE", "")],
                local("127.0.0.1:5000"),
            ),
            ("http: {addr: :5000, tls: {letsencrypt: {cachefile: /c}}}", &[], tls("127.0.0.1:5000")),
            (
                "http: {addr: :5000, tls: {letsencrypt: {cachefile: '', hosts: [a]}}}",
                &[],
                local("127.0.0.1:5000"),
            ),
            (
                "http: {addr: :5000}",
                &[("REGISTRY_HTTP_TLS", "{certificate: /c, key: /k}")],
                tls("127.0.0.1:5000"),
            ),
            (
                "http: {addr: :5000}",
                &[("REGISTRY_HTTP", "{addr: ':6000'}"), ("REGISTRY_HTTP_ADDR", ":7000")],
                local("127.0.0.1:7000"),
            ),
            ("http: {addr: /run/registry.sock, net: unix}", &[], Some("unix:/run/registry.sock".into())),
            (
                "http: {addr: :5000}",
                &[("REGISTRY_HTTP_NET", "unix"), ("REGISTRY_HTTP_ADDR", "/r.sock")],
                Some("unix:/r.sock".into()),
            ),
        ];
        for (text, variables, expected) in cases {
            assert_eq!(sections(text, variables).url, expected, "{text} {variables:?}");
        }
    }

    #[test]
    fn a_redis_is_found_in_each_form_and_its_password_stays_a_secret() {
        let redis = |text: &str, variables: Pairs| sections(text, variables).redis;
        for nothing in ["", "redis:", "redis: {addr: ''}", "redis: {addrs: []}", "redis: {password: x}"] {
            assert_eq!(redis(nothing, &[]), None, "{nothing}");
        }
        let old = redis("redis: {addr: 'redis:6379', password: 1234, db: 2}", &[]).unwrap();
        assert_eq!((old.addresses.join(" "), old.database), ("redis:6379".into(), Some(2)));
        assert_eq!((old.password.as_deref(), &old.tls), (Some("1234"), &None));
        assert!(!format!("{old:?}").contains("1234"), "{old:?}");
        let tls = redis("redis: {addr: r:1, tls: {enabled: true}}", &[]).unwrap().tls;
        assert_eq!(tls, Some(RedisTls::default()));
        let new =
            redis("redis: {addrs: ['a:1', 'b:2'], username: u, tls: {rootcas: [/ca.pem]}}", &[]).unwrap();
        assert_eq!((new.addresses.len(), new.username.as_deref()), (2, Some("u")));
        assert_eq!(new.tls.unwrap().root_cas, ["/ca.pem"]);
        let variables =
            [("REGISTRY_REDIS_ADDR", "r:1"), ("REGISTRY_REDIS_DB", "3"), ("REGISTRY_REDIS_PASSWORD", "007")];
        let given = redis("redis: {addr: 'other:1', password: old}", &variables).unwrap();
        assert_eq!(
            (given.addresses.join(" "), given.database, given.password.unwrap()),
            ("r:1".into(), Some(3), "007".into())
        );
        assert_eq!(redis("", &[("REGISTRY_REDIS_ADDRS_0", "a:1")]).unwrap().addresses, ["a:1"]);
        assert_eq!(redis("", &[("REGISTRY_REDIS_ADDRS", "[a:1, b:2]")]).unwrap().addresses, ["a:1", "b:2"]);
        assert_eq!(redis("redis: {addr: r:1}", &[("REGISTRY_REDIS", "")]), None);
    }

    #[test]
    fn whose_storage_it_is_is_told() {
        let database = |text: &str, variables: Pairs| sections(text, variables).database;
        for off in [
            "",
            "database:",
            "database: {enabled: false}",
            "database: {host: db}",
            "database: {enabled: 'false'}",
        ] {
            assert_eq!(database(off, &[]), None, "{off}");
            assert_eq!(
                database(off, &[("REGISTRY_DATABASE_ENABLED", "true")]),
                Some(Database::Enabled),
                "{off}"
            );
        }
        assert_eq!(database("database: {enabled: true}", &[]), Some(Database::Enabled));
        assert_eq!(database("database: {enabled: 'true'}", &[]), Some(Database::Enabled));
        assert_eq!(database("database: {enabled: prefer}", &[]), Some(Database::Prefer));
        assert_eq!(database("database: {enabled: true}", &[("REGISTRY_DATABASE_ENABLED", "")]), None);
        for harbor in [
            "auth: {htpasswd: {realm: harbor-registry-basic-realm, path: /etc/registry/passwd}}",
            "auth: {token: {issuer: harbor-token-issuer, realm: 'https://hub/service/token'}}",
            "notifications: {endpoints: [{name: other, url: 'http://x'}, {name: harbor, url: 'http://core'}]}",
            "notifications: {endpoints: [{name: x, url: 'http://core:8080/service/notifications'}]}",
        ] {
            assert!(sections(harbor, &[]).is_harbor, "{harbor}");
        }
        assert!(sections("", &[("REGISTRY_AUTH_HTPASSWD_REALM", "harbor-registry-basic-realm")]).is_harbor);
        assert!(sections("", &[("REGISTRY_NOTIFICATIONS_ENDPOINTS_0_NAME", "harbor")]).is_harbor);
        assert!(
            !sections(
                "auth: {htpasswd: {realm: x}}\nnotifications: {endpoints: [{name: portus, url: 'http://p'}]}",
                &[]
            )
            .is_harbor
        );
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
        let nothing = Variables::new();
        let missing = directory.path().join("missing");
        let error = resolve(&missing, &nothing).unwrap_err().to_string();
        assert!(error.contains("missing does not exist; give"), "{error}");

        let binary = directory.path().join("binary");
        fs::write(&binary, [0xff, 0xfe, 0]).unwrap();
        assert!(resolve(&binary, &nothing).unwrap_err().to_string().contains("is not text"));

        let socket = directory.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(resolve(&socket, &nothing).unwrap_err().to_string().contains("neither a directory nor"));
        // What became a pipe between the look and the open.
        let pipe = directory.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
            .unwrap();
        let error = resolve_file(open_plain(&pipe).unwrap(), &pipe, &nothing).unwrap_err().to_string();
        assert!(error.contains("neither a directory nor"), "{error}");
    }
}
