//! What the command line says of the registries that serve a store.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use super::{Environment, duration};
use crate::error::{Error, Result};
use crate::printable::Printable;
use crate::registries::http::{Access, Credentials, Trust};
use crate::registries::{Known, redis};
use crate::registry_config::{RedisConfig, StoreArgument, open_plain, read_plain};

/// Who we are to a registry, where no file says it.
const AUTH: &str = "REGFS_REGISTRY_AUTH";
/// The password for the redis of `--redis`.
const REDIS_PASSWORD: &str = "REGFS_REDIS_PASSWORD";
/// Longest file of credentials.
const AUTH_LIMIT: u64 = 64 << 10;

/// How registries that may be running are dealt with.
#[derive(Args, Debug)]
pub(super) struct RegistryArgs {
    /// The URLs of all registries that serve this storage: each is asked before a blob goes; by default that of config.yml
    #[arg(long, value_name = "URL", value_delimiter = ',', value_parser = url)]
    pub(super) registry: Vec<String>,
    /// A file with user:password, or Bearer and a token, for those registries; or the variable REGFS_REGISTRY_AUTH. A line
    /// "realm URL" names a token service on another host that may get it, too
    #[arg(long, value_name = "FILE")]
    pub(super) registry_auth: Option<PathBuf>,
    /// Certificates (PEM) to trust besides the system's: those of registries, or of who signed them
    #[arg(long, value_name = "FILE")]
    pub(super) registry_ca: Option<PathBuf>,
    #[command(flatten)]
    pub(super) redis: RedisArgs,
    /// How long a request to a registry may be under way
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = duration)]
    pub(super) drain: Duration,
}

/// Where registries remember if not in their own memory.
#[derive(Args, Debug)]
pub(super) struct RedisArgs {
    /// The redis in which registries remember blobs: `redis://[USER@]HOST[:PORT][/DB]`, or `rediss://…` for TLS; by default that
    /// of config.yml. Its password belongs into the variable REGFS_REDIS_PASSWORD
    #[arg(long, value_name = "URL", value_parser = redis::parse_url)]
    pub(super) redis: Option<RedisConfig>,
}

impl RedisArgs {
    /// That redis, with the user and the password that were given for it or that config.yml has.
    pub(super) fn config(
        &self,
        argument: &StoreArgument,
        environment: Environment<'_>,
    ) -> Option<RedisConfig> {
        let given = environment.get(OsStr::new(REDIS_PASSWORD)).and_then(|value| value.to_str());
        let configured = argument.redis.clone().unwrap_or_default();
        self.redis.clone().map(|redis| RedisConfig {
            username: redis.username.or(configured.username),
            password: given.map(str::to_string).or(configured.password),
            tls: redis.tls.map(|tls| configured.tls.unwrap_or(tls)),
            ..redis
        })
    }
}

pub(super) fn url(text: &str) -> std::result::Result<String, String> {
    if text.strip_prefix("unix:").is_some_and(|path| path.starts_with('/') && !path.starts_with("//")) {
        return Ok(text.to_string());
    }
    let rest = ["http://", "https://"].iter().find_map(|scheme| text.strip_prefix(scheme));
    match rest.map(|rest| rest.split('/').next().unwrap_or_default()) {
        None | Some("") => {
            Err("write it as http://HOST:PORT, https://HOST:PORT or unix:/PATH/OF/SOCKET".to_string())
        }
        // It would stand in reports and in the list of processes.
        Some(host) if host.contains('@') => {
            Err("credentials belong into the file of --registry-auth".to_string())
        }
        Some(_) if text.contains(['?', '#']) => Err("a registry's URL has no ? and no #".to_string()),
        Some(_) => Ok(text.to_string()),
    }
}

impl RegistryArgs {
    /// What is known of the registries that serve the store of `argument`.
    pub(super) fn known(&self, argument: &StoreArgument, environment: Environment<'_>) -> Result<Known> {
        let known = Known::new(argument, &self.registry, self.access(environment)?);
        Ok(known.with_redis(self.redis.config(argument, environment)))
    }

    fn access(&self, environment: Environment<'_>) -> Result<Access> {
        let (credentials, realms) = self.credentials(environment)?;
        let trust = self.registry_ca.as_deref().map(Trust::with).transpose()?.unwrap_or_default();
        Ok(Access { credentials, realms, trust: Arc::new(trust) })
    }

    fn credentials(&self, environment: Environment<'_>) -> Result<(Credentials, Vec<String>)> {
        let (text, place) = match (&self.registry_auth, environment.get(OsStr::new(AUTH))) {
            (Some(path), _) => {
                let text = open_plain(path).and_then(|file| read_plain(file, AUTH_LIMIT));
                let text = text.map_err(|e| Error::io("read the credentials in", path, e))?;
                (text.unwrap_or_default(), path.printable().to_string())
            }
            (None, Some(value)) => (value.clone().into_encoded_bytes(), format!("the variable {AUTH}")),
            (None, None) => return Ok((Credentials::None, Vec::new())),
        };
        let text = String::from_utf8(text).unwrap_or_default();
        Credentials::parse(&text).map_err(|why| Error::invalid(format!("{place}: {why}")))
    }
}
