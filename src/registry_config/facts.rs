//! What a configuration says besides where it stores: where the registry answers, what it remembers by, whose it is.

use std::fmt;
use std::net::IpAddr;

use serde_json::Value;

/// How a registry reaches its redis, as its configuration has it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct RedisConfig {
    /// `host:port` of each server (2.8: `addr`, 3.x: `addrs`); of each sentinel, with `master`.
    pub addresses: Vec<String>,
    /// `username`; 2.8 knows none.
    pub username: Option<String>,
    /// `password`
    pub password: Option<String>,
    /// `db`; `None` where it says something that is no number.
    pub database: Option<i64>,
    /// Whether and how it speaks TLS.
    pub tls: Option<RedisTls>,
    /// `mastername` (3.x) or `sentinelMasterSet` (Harbor): the addresses are those of sentinels, which name the server.
    pub master: Option<String>,
}

/// The `redis.tls` section.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RedisTls {
    /// Path of a certificate of ours (PEM).
    pub certificate: Option<String>,
    /// Path of its key.
    pub key: Option<String>,
    /// Paths of the certificates that are trusted; those of the system where there are none.
    pub root_cas: Vec<String>,
}

impl fmt::Debug for RedisConfig {
    /// Says nothing that must not stand in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisConfig")
            .field("addresses", &self.addresses)
            .field("database", &self.database)
            .field("tls", &self.tls)
            .field("master", &self.master)
            .finish_non_exhaustive()
    }
}

/// What GitLab's registry does about its database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Database {
    /// `true`: tags and manifests are there.
    Enabled,
    /// `prefer`: there, if the registry was new.
    Prefer,
}

/// What lies at a path of keys; `None` where nothing does.
pub(super) fn at<'a>(value: &'a Value, keys: &[&str]) -> Option<&'a Value> {
    keys.iter().try_fold(value, |value, key| value.get(key))
}

/// A string; empty means unset. The registry takes numbers for strings, too.
pub(super) fn text(value: &Value, keys: &[&str]) -> Option<String> {
    match at(value, keys)? {
        Value::String(text) => Some(text.clone()).filter(|text| !text.is_empty()),
        scalar @ (Value::Number(_) | Value::Bool(_)) => Some(scalar.to_string()),
        _ => None,
    }
}

/// A boolean; whatever is none counts as false.
pub(super) fn flag(value: &Value, keys: &[&str]) -> bool {
    at(value, keys) == Some(&Value::Bool(true))
}

fn texts(value: &Value, keys: &[&str]) -> Vec<String> {
    let items = at(value, keys).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    items.iter().filter_map(|item| text(item, &[])).collect()
}

/// Where a registry answers that listens on this machine; a host that is left out, or means all of them, is this one.
pub(super) fn url(config: &Value) -> Option<String> {
    let http = config.get("http")?;
    let of_http = |keys: &[&str]| text(http, keys);
    let prefix = of_http(&["prefix"]).map(|prefix| format!("/{}", prefix.trim_matches('/')));
    let prefix = prefix.filter(|prefix| prefix != "/").unwrap_or_default();
    let has_tls = of_http(&["tls", "certificate"]).or_else(|| of_http(&["tls", "letsencrypt", "cachefile"]));
    let Some(address) = of_http(&["addr"]) else {
        return of_http(&["host"]).map(|host| format!("{}{prefix}", host.trim_end_matches('/')));
    };
    if of_http(&["net"]).as_deref() == Some("unix") {
        return (has_tls.is_none() && prefix.is_empty() && address.starts_with('/'))
            .then(|| format!("unix:{address}"));
    }
    let (host, port) = address.rsplit_once(':')?;
    let port: u16 = port.parse().ok().filter(|port| *port != 0)?;
    let host = match host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        Ok(address) if address.is_unspecified() => "127.0.0.1",
        Err(_) if host.is_empty() => "127.0.0.1",
        _ => host,
    };
    let scheme = if has_tls.is_some() { "https" } else { "http" };
    Some(format!("{scheme}://{host}:{port}{prefix}"))
}

pub(super) fn redis(config: &Value) -> Option<RedisConfig> {
    let redis = config.get("redis")?;
    let mut addresses = texts(redis, &["addrs"]);
    if addresses.is_empty() {
        addresses = text(redis, &["addr"])?.split(',').map(|address| address.trim().to_string()).collect();
    }
    let tls = RedisTls {
        certificate: text(redis, &["tls", "certificate"]),
        key: text(redis, &["tls", "key"]),
        root_cas: texts(redis, &["tls", "rootcas"]),
    };
    let has_tls = flag(redis, &["tls", "enabled"]) || tls != RedisTls::default();
    Some(RedisConfig {
        addresses,
        username: text(redis, &["username"]),
        password: text(redis, &["password"]),
        database: text(redis, &["db"]).map_or(Some(0), |number| number.parse().ok()),
        tls: has_tls.then_some(tls),
        master: text(redis, &["mastername"]).or_else(|| text(redis, &["sentinelMasterSet"])),
    })
}

pub(super) fn database(config: &Value) -> Option<Database> {
    match text(config, &["database", "enabled"])?.to_lowercase().as_str() {
        "true" => Some(Database::Enabled),
        "prefer" => Some(Database::Prefer),
        _ => None,
    }
}

/// Harbor's registry asks for the password of Harbor, or has tokens of its, or tells it of every push.
///
/// Source: goharbor/harbor `make/photon/prepare/templates/registry/config.yml.jinja`, now and before 2.0.
pub(super) fn is_harbor(config: &Value) -> bool {
    let is = |keys: &[&str], word: &str| text(config, keys).as_deref() == Some(word);
    let endpoints = at(config, &["notifications", "endpoints"]).and_then(Value::as_array);
    let tells_harbor = |endpoint: &Value| {
        text(endpoint, &["name"]).as_deref() == Some("harbor")
            || text(endpoint, &["url"]).is_some_and(|url| url.ends_with("/service/notifications"))
    };
    is(&["auth", "htpasswd", "realm"], "harbor-registry-basic-realm")
        || is(&["auth", "token", "issuer"], "harbor-token-issuer")
        || is(&["auth", "token", "service"], "harbor-registry")
        || endpoints.is_some_and(|endpoints| endpoints.iter().any(tells_harbor))
}
