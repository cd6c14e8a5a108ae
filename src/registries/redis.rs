//! A registry's descriptor cache in redis, asked and told directly.
//!
//! ```text
//! repository::<R>::blobs              set     digests that repository R has
//! repository::<R>::blobs::<digest>    hash    mediatype, as R was told
//! blobs::<digest>                     hash    digest, size, mediatype
//! ```
//! A registry says "R has the blob" when all three are there, without a look at the storage. Of a manifest that it is to
//! store it believes the last one alone, and then writes no bytes. It keeps all of it when it is stopped.
//!
//! # Why the HTTP API does not do
//! A DELETE of a blob removes the descriptor and, up to 3.0, never the member of the set; 3.1 does so only as long as the
//! descriptor is there, which a DELETE in another repository has removed. The answer is 404 then, until the next push of
//! that blob to any repository writes the descriptor anew.
//!
//! # Rules kept here
//! 1. To forget is harmless at any time: the registry then looks at the storage. So it needs no link in the trash.
//! 2. Members go before descriptors: once a member is gone, no push to another repository brings its answer back.
//! 3. Redis is asked which repositories there are, for the storage need not know all that ever had a link.
//! 4. A redis that remembers nothing may be the wrong one. So it is shown first that the registries of this storage
//!    remember there.
//!
//! Source: distribution `registry/storage/cache/redis/redis.go` of 2.8.2, 3.0.0 and 3.1.1, `blobstore.go`.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use redis::{
    ClientTlsConfig, Connection, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, Pipeline,
    RedisConnectionInfo, RedisResult, TlsCertificates,
};

use super::http::Client;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::gc::guard::gate::Registries;
use crate::layout;
use crate::printable::Printable;
use crate::registry_config::{RedisConfig, RedisTls};
use crate::store::Store;

/// A redis that does not answer for so long does not answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// A walk over all keys that takes longer does not end.
const SCAN_TIMEOUT: Duration = Duration::from_secs(10 * 60);
/// Keys that one step of that walk looks at.
const SCAN_COUNT: usize = 10_000;
/// Commands in one message.
const BATCH: usize = 1_000;
/// Repositories, and members of each, that are looked at to see whether redis knows this storage.
const SAMPLE: (usize, usize) = (200, 20);
/// Longest certificate or key.
const PEM_LIMIT: u64 = 1 << 20;

/// Where a redis is, without what is secret.
pub(super) fn address(config: &RedisConfig) -> String {
    let number = config.database.map_or_else(String::new, |number| format!("/{number}"));
    format!("{}{number}", config.addresses.join(","))
}

/// The memory of one or more registries.
pub(super) struct Redis {
    address: String,
    client: redis::Client,
    connection: Mutex<Option<Connection>>,
    /// The repositories that it knows, looked for once.
    repositories: Mutex<Option<Vec<String>>>,
    /// The registries that remember there, each by itself.
    asked: Vec<Client>,
    /// The administrator says that it was emptied.
    is_emptied: bool,
}

impl Redis {
    /// The redis of `config`, in which the registries remember that `asked` asks; connects, so that it is known to answer.
    ///
    /// # Errors
    /// Why it can't be asked, and what to do.
    pub(super) fn open(
        config: &RedisConfig,
        asked: Vec<Client>,
        is_emptied: bool,
    ) -> std::result::Result<Redis, String> {
        let client = client(config).map_err(|why| format!("the redis at {} {why}", address(config)))?;
        let redis = Redis {
            address: address(config),
            client,
            connection: Mutex::default(),
            repositories: Mutex::default(),
            asked,
            is_emptied,
        };
        redis.run(|connection| redis::cmd("PING").exec(connection)).map_err(|e| e.to_string())?;
        Ok(redis)
    }

    /// Does something with a connection; once more with another where the first had gone meanwhile.
    fn run<T>(&self, mut act: impl FnMut(&mut Connection) -> RedisResult<T>) -> Result<T> {
        let mut kept = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut connection) = kept.take() {
            match act(&mut connection) {
                Err(e) if e.is_unrecoverable_error() => {
                    log::debug!("redis at {}: {e}; once more", self.address)
                }
                answer => {
                    *kept = Some(connection);
                    return answer.map_err(|e| self.failed(&e));
                }
            }
        }
        let connect = || {
            let connection = self.client.get_connection_with_timeout(TIMEOUT)?;
            connection.set_read_timeout(Some(TIMEOUT))?;
            connection.set_write_timeout(Some(TIMEOUT))?;
            Ok(connection)
        };
        let mut connection = connect().map_err(|e| self.failed(&e))?;
        let answer = act(&mut connection).map_err(|e| self.failed(&e))?;
        *kept = Some(connection);
        Ok(answer)
    }

    fn failed(&self, e: &redis::RedisError) -> Error {
        let is_denied = e.kind() == redis::ErrorKind::AuthenticationFailed
            || matches!(e.code(), Some("NOAUTH" | "WRONGPASS" | "NOPERM"));
        let next = match is_denied {
            true => {
                "; give the user and the password of the registry: its config.yml as STORE, or REGFS_REDIS_PASSWORD"
            }
            false => "",
        };
        Error::Busy { why: format!("the redis at {} refuses a command: {e}{next}", self.address) }
    }

    /// The repositories that it remembers anything of.
    fn repositories(&self) -> Result<Vec<String>> {
        let mut known = self.repositories.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = &*known {
            return Ok(known.clone());
        }
        let (mut names, mut cursor, began) = (Vec::new(), 0u64, Instant::now());
        loop {
            let (next, keys): (u64, Vec<Vec<u8>>) = self.run(|connection| {
                let mut scan = redis::cmd("SCAN");
                scan.arg(cursor).arg("MATCH").arg("repository::*::blobs").arg("COUNT").arg(SCAN_COUNT);
                scan.query(connection)
            })?;
            names.extend(keys.iter().filter_map(|key| {
                let name = std::str::from_utf8(key).ok()?.strip_prefix("repository::")?;
                Some(name.strip_suffix("::blobs")?.to_string())
            }));
            cursor = next;
            if cursor == 0 {
                break;
            }
            if began.elapsed() > SCAN_TIMEOUT {
                return Err(Error::Busy {
                    why: format!("the redis at {} does not come to an end", self.address),
                });
            }
        }
        names.sort_unstable();
        names.dedup();
        *known = Some(names.clone());
        Ok(names)
    }

    /// The repositories that are said to have a blob.
    fn holders(&self, digest: &Digest) -> Result<Vec<String>> {
        let mut holders = Vec::new();
        for names in self.repositories()?.chunks(BATCH) {
            let mut pipe = Pipeline::with_capacity(names.len());
            for name in names {
                pipe.cmd("SISMEMBER").arg(members(name)).arg(digest.to_string());
            }
            let are: Vec<bool> = self.run(|connection| pipe.query(connection))?;
            holders.extend(names.iter().zip(are).filter(|(_, is)| *is).map(|(name, _)| name.clone()));
        }
        Ok(holders)
    }

    fn has_descriptor(&self, digest: &Digest) -> Result<bool> {
        self.run(|connection| redis::cmd("EXISTS").arg(descriptor(digest)).query(connection))
    }

    fn forget_in(&self, names: &[String], digest: &Digest) -> Result<()> {
        for names in names.chunks(BATCH) {
            let mut pipe = Pipeline::new();
            pipe.atomic();
            for name in names {
                pipe.cmd("SREM").arg(members(name)).arg(digest.to_string()).ignore();
                pipe.cmd("DEL").arg(format!("{}::{digest}", members(name))).ignore();
            }
            self.run(|connection| pipe.exec(connection))?;
        }
        self.run(|connection| redis::cmd("DEL").arg(descriptor(digest)).exec(connection))
    }

    /// Whether it remembers anything that is in this storage.
    fn knows(&self, store: &dyn Store) -> Result<bool> {
        let (repositories, count) = SAMPLE;
        for name in self.repositories()?.iter().take(repositories) {
            let some: Vec<String> = self.run(|connection| {
                redis::cmd("SRANDMEMBER").arg(members(name)).arg(count).query(connection)
            })?;
            let repository = Path::new(name);
            if !layout::is_name(repository) {
                continue;
            }
            for digest in some.iter().filter_map(|text| text.parse::<Digest>().ok()) {
                let places =
                    [layout::layer_link(repository, &digest), layout::revision_link(repository, &digest)];
                for place in places {
                    if store.stat(&place)?.is_some() {
                        return Ok(true);
                    }
                }
            }
        }
        Ok(false)
    }

    /// Shows that a registry remembers here: it is asked for a blob that redis has just forgotten, and then redis knows it.
    fn is_memory_of(&self, registry: &Client, repository: &Path, witness: &Digest) -> Result<()> {
        self.forget(repository, witness)?;
        let name = registry.name();
        if !registry.remembers(repository, witness)? {
            return Err(Error::invalid(format!(
                "the registry at {name} does not have {}@{witness}, which this storage has; give the URL of the one that serves \
                 this storage",
                repository.printable()
            )));
        }
        match self.remembers(repository, witness)? {
            true => Ok(()),
            false => Err(Error::invalid(format!(
                "the registry at {name} does not remember in the redis at {}; give the address that its config.yml has, as it \
                 is seen from here, with --redis",
                self.address
            ))),
        }
    }
}

impl Registries for Redis {
    fn name(&self) -> String {
        format!("redis at {}", self.address)
    }

    fn remembers(&self, repository: &Path, digest: &Digest) -> Result<bool> {
        let key = members(&repository.to_string_lossy());
        self.run(|connection| redis::cmd("SISMEMBER").arg(&key).arg(digest.to_string()).query(connection))
    }

    fn forget(&self, repository: &Path, digest: &Digest) -> Result<()> {
        self.forget_in(&[repository.to_string_lossy().into_owned()], digest)
    }

    fn verify(&self, store: &dyn Store, repository: &Path, witness: Option<&Digest>) -> Result<()> {
        // Where nothing is linked, nothing can be shown; whatever was fenced had a witness then.
        let Some(witness) = witness.filter(|_| !self.is_emptied) else { return Ok(()) };
        if !self.asked.is_empty() {
            return self
                .asked
                .iter()
                .try_for_each(|registry| self.is_memory_of(registry, repository, witness));
        }
        match self.knows(store)? {
            true => Ok(()),
            false => Err(Error::invalid(format!(
                "the redis at {} remembers nothing of this storage, so it may be another one than the registry's; give the \
                 right address with --redis, or, if it was emptied since the registry stopped, add {{+cache-emptied}}",
                self.address
            ))),
        }
    }

    fn forgets_bytes(&self) -> bool {
        true
    }

    fn removes_links(&self) -> bool {
        false
    }

    fn remembers_bytes(&self, digest: &Digest) -> Result<bool> {
        Ok(self.has_descriptor(digest)? || !self.holders(digest)?.is_empty())
    }

    fn forget_bytes(&self, digest: &Digest) -> Result<()> {
        self.forget_in(&self.holders(digest)?, digest)
    }
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

fn members(repository: &str) -> String {
    format!("repository::{repository}::blobs")
}

fn descriptor(digest: &Digest) -> String {
    format!("blobs::{digest}")
}

/// A client for what a configuration says; connects to nothing yet. Why there is none completes "the redis at …".
fn client(config: &RedisConfig) -> std::result::Result<redis::Client, String> {
    let next = "give the address of the server that holds the data with --redis; or stop the registry, empty the cache, and add \
                {+registry-stopped} {+cache-emptied}";
    let [address] = config.addresses.as_slice() else {
        return Err(format!("is a cluster or a group of sentinels, which regfs does not ask; {next}"));
    };
    if config.master.is_some() {
        return Err(format!("is a sentinel, which regfs does not ask; {next}"));
    }
    let database = config.database.ok_or("has a db that is no number; correct it in config.yml")?;
    let (host, port) =
        split(address).ok_or_else(|| format!("has an address that regfs does not understand; {next}"))?;
    let mut settings = RedisConnectionInfo::default().set_db(database).set_skip_set_lib_name();
    if let Some(username) = &config.username {
        settings = settings.set_username(username);
    }
    if let Some(password) = &config.password {
        settings = settings.set_password(password);
    }
    let unusable = |e: redis::RedisError| format!("can't be asked: {e}");
    let info = |addr: ConnectionAddr| -> std::result::Result<ConnectionInfo, String> {
        Ok(addr.into_connection_info().map_err(unusable)?.set_redis_settings(settings.clone()))
    };
    match &config.tls {
        None => redis::Client::open(info(ConnectionAddr::Tcp(host, port))?).map_err(unusable),
        Some(tls) => {
            let addr = ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None };
            redis::Client::build_with_tls(info(addr)?, certificates(tls)?).map_err(unusable)
        }
    }
}

/// `host:port`, `[address]:port`; 6379 where there is no port.
fn split(address: &str) -> Option<(String, u16)> {
    let (host, port) = match address.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, port.parse().ok()?),
        None => (address, 6379),
        Some(_) => return None,
    };
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let host = if host.is_empty() { "127.0.0.1" } else { host };
    Some((host.to_string(), port))
}

fn certificates(tls: &RedisTls) -> std::result::Result<TlsCertificates, String> {
    let read = |path: &String| {
        let path = PathBuf::from(path);
        read_pem(&path).map_err(|e| format!("can't be asked: could not read {}: {e}", path.printable()))
    };
    let client_tls = match (&tls.certificate, &tls.key) {
        (Some(certificate), Some(key)) => {
            Some(ClientTlsConfig { client_cert: read(certificate)?, client_key: read(key)? })
        }
        _ => None,
    };
    let roots: Vec<Vec<u8>> = tls.root_cas.iter().map(read).collect::<std::result::Result<_, _>>()?;
    Ok(TlsCertificates { client_tls, root_cert: (!roots.is_empty()).then(|| roots.join(&b'\n')) })
}

fn read_pem(path: &Path) -> io::Result<Vec<u8>> {
    let metadata = fs::metadata(path)?;
    match metadata.is_file() && metadata.len() <= PEM_LIMIT {
        true => fs::read(path),
        false => Err(io::Error::other("no plain file, or larger than 1 MiB")),
    }
}

/// Reads `redis://[user@]host[:port][/db]`, or `rediss://…` for TLS, as `--redis` has it.
pub fn parse_url(text: &str) -> std::result::Result<RedisConfig, String> {
    let wrong = || "write it as redis://HOST:PORT/DB, or rediss://HOST:PORT/DB for TLS".to_string();
    let (scheme, rest) = text.split_once("://").ok_or_else(wrong)?;
    let tls = match scheme {
        "redis" => None,
        "rediss" => Some(RedisTls::default()),
        _ => return Err(wrong()),
    };
    let (rest, database) = match rest.trim_end_matches('/').split_once('/') {
        Some((rest, number)) => (rest, number.parse().ok().filter(|number| *number >= 0).ok_or_else(wrong)?),
        None => (rest.trim_end_matches('/'), 0),
    };
    let (user, host) = rest.rsplit_once('@').map_or((None, rest), |(user, host)| (Some(user), host));
    // It would stand in reports and in the list of processes.
    if user.is_some_and(|user| user.contains(':')) {
        return Err("the password belongs into the variable REGFS_REDIS_PASSWORD".to_string());
    }
    if host.is_empty() || split(host).is_none() {
        return Err(wrong());
    }
    Ok(RedisConfig {
        addresses: vec![host.to_string()],
        username: user.filter(|user| !user.is_empty()).map(str::to_string),
        password: None,
        database: Some(database),
        tls,
        master: None,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn urls_of_redis_are_read_and_passwords_in_them_refused() {
        let cases = [
            ("redis://127.0.0.1:6379", "127.0.0.1:6379/0", None),
            ("redis://cache/3", "cache/3", None),
            ("redis://cache:1/", "cache:1/0", None),
            ("redis://joe@[::1]:7/12", "[::1]:7/12", Some("joe")),
            ("rediss://cache:1", "cache:1/0", None),
        ];
        for (text, at, user) in cases {
            let config = parse_url(text).unwrap();
            assert_eq!((address(&config).as_str(), config.username.as_deref()), (at, user), "{text}");
            assert_eq!(config.tls.is_some(), text.starts_with("rediss"), "{text}");
            client(&config).unwrap();
        }
        for wrong in
            ["", "redis://", "http://a:1", "redis://a:b", "redis://a/x", "redis://a/-1", "redis://::1:3"]
        {
            assert!(parse_url(wrong).is_err(), "{wrong}");
        }
        for secret in ["redis://:secret@a:1", "redis://joe:secret@a:1/0"] {
            assert!(parse_url(secret).unwrap_err().contains("REGFS_REDIS_PASSWORD"), "{secret}");
        }
    }

    #[test]
    fn addresses_are_split_and_what_is_no_single_server_is_refused() {
        let cases = [
            ("a:1", Some(("a", 1))),
            (":6380", Some(("127.0.0.1", 6380))),
            ("a", Some(("a", 6379))),
            ("[::1]:2", Some(("::1", 2))),
            ("::1", None),
            ("a:b", None),
        ];
        for (text, wanted) in cases {
            let found = split(text);
            assert_eq!(found.as_ref().map(|(host, port)| (host.as_str(), *port)), wanted, "{text}");
        }
        let one = RedisConfig { addresses: vec!["a:1".into()], database: Some(0), ..RedisConfig::default() };
        let several = RedisConfig { addresses: vec!["a:1".into(), "b:1".into()], ..one.clone() };
        let sentinel = RedisConfig { master: Some("m".into()), ..one.clone() };
        let odd = RedisConfig { database: None, ..one };
        for (config, says) in [(several, "cluster"), (sentinel, "sentinel"), (odd, "no number")] {
            assert!(client(&config).unwrap_err().contains(says), "{config:?}");
        }
    }
}
