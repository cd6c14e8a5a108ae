//! A registry's HTTP API, as far as a collector needs it: does it have a blob, make it forget one, is it ours.
//!
//! Sources: OCI distribution-spec 1.1 (`end-3`, `end-4a`, `end-10`), distribution `docs/spec/auth/token`.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use ureq::http::{Request, Response};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result};
use crate::gc::guard::gate::Registries;
use crate::layout;
use crate::printable::Printable;
use crate::store::Store;

/// A registry that does not answer for so long does not answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest answer of a token service.
const TOKEN_LIMIT: u64 = 1 << 20;

/// Who we are to a registry.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum Credentials {
    /// Nobody in particular.
    #[default]
    None,
    /// A user with a password, for basic authentication and for token services.
    Basic {
        /// The name.
        user: String,
        /// The password.
        password: String,
    },
    /// A token that is sent as it is.
    Bearer(String),
}

impl fmt::Debug for Credentials {
    /// Says nothing that must not stand in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Credentials::None => "none",
            Credentials::Basic { .. } => "basic",
            Credentials::Bearer(_) => "bearer",
        })
    }
}

impl Credentials {
    /// Reads `user:password` or `Bearer <token>`, as a file or a variable has it.
    pub fn parse(text: &str) -> std::result::Result<Credentials, String> {
        let text = text.trim_end_matches(['\r', '\n']);
        if let Some(token) = text.strip_prefix("Bearer ") {
            return Ok(Credentials::Bearer(token.trim().to_string()));
        }
        match text.split_once(':') {
            Some((user, password)) if !user.is_empty() && !text.contains('\n') => {
                Ok(Credentials::Basic { user: user.to_string(), password: password.to_string() })
            }
            _ => Err("expected one line, user:password or Bearer <token>".to_string()),
        }
    }

    fn header(&self) -> Option<String> {
        match self {
            Credentials::None => None,
            Credentials::Basic { user, password } => {
                Some(format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
            }
            Credentials::Bearer(token) => Some(format!("Bearer {token}")),
        }
    }
}

/// Asks all registries of a store.
pub struct Client {
    urls: Vec<String>,
    credentials: Credentials,
    agent: Agent,
    /// Tokens by registry and scope.
    tokens: Mutex<HashMap<(String, String), String>>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.urls.join(", "))
    }
}

/// What a token service answers.
#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Client {
    /// A client of the registries at `urls`; asks nothing yet.
    pub fn new(urls: &[String], credentials: Credentials) -> Client {
        let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
        let config = Agent::config_builder()
            .timeout_global(Some(TIMEOUT))
            .http_status_as_error(false)
            .max_redirects(0)
            .tls_config(tls)
            .user_agent(concat!("regfs/", env!("CARGO_PKG_VERSION")));
        Client {
            urls: urls
                .iter()
                .map(|url| url.trim_end_matches('/').trim_end_matches("/v2").to_string())
                .collect(),
            credentials,
            agent: config.build().into(),
            tokens: Mutex::default(),
        }
    }

    /// Whether each of them answers at all.
    pub fn check(&self) -> Result<()> {
        for url in &self.urls {
            match self.call(url, "GET", "/v2/", "")?.0 {
                // One that wants credentials for more than that says so when it is asked for more.
                200 | 401 => {}
                status => return Err(unexpected(url, "GET", status)),
            }
        }
        Ok(())
    }

    /// Whether the registry at `url` lets us delete.
    fn check_delete(&self, url: &str, repository: &Path) -> Result<()> {
        // Of a blob that can't be: where deleting is not allowed, the answer is another one than "unknown".
        let nothing = Digest::from_bytes(Algorithm::Sha256, &[0; 32]);
        let (status, _) =
            self.call(url, "DELETE", &blob(repository, &nothing), &scope(repository, "delete"))?;
        match status {
            404 | 202 => Ok(()),
            405 => Err(Error::invalid(format!(
                "the registry at {url} does not delete; storage.delete.enabled: true in its config.yml makes it"
            ))),
            401 | 403 => Err(self.denied(url, status, "delete")),
            _ => Err(unexpected(url, "DELETE", status)),
        }
    }

    fn denied(&self, url: &str, status: u16, what: &str) -> Error {
        let next = match self.credentials {
            Credentials::None => "give --registry-auth FILE with user:password",
            _ => {
                "the credentials that were given must be of a user who may pull, push and delete in all repositories"
            }
        };
        Error::invalid(format!("the registry at {url} does not let us {what} ({status}); {next}"))
    }

    /// Whether the registry at `url` writes into this storage: what any push begins with shows it, and ends here.
    ///
    /// One that lacks the blob `witness` is another one, and nothing need be written to it to know that.
    fn check_storage(
        &self,
        url: &str,
        store: &dyn Store,
        repository: &Path,
        witness: Option<&Digest>,
    ) -> Result<()> {
        let elsewhere = || {
            Err(Error::invalid(format!(
                "the registry at {url} stores somewhere else than {}; give the URL of the one that serves this storage",
                store.full(Path::new("")).printable()
            )))
        };
        if let Some(witness) = witness
            && self.call(url, "HEAD", &blob(repository, witness), &scope(repository, "pull"))?.0 == 404
        {
            return elsewhere();
        }
        let path = format!("/v2/{}/blobs/uploads/", repository.to_string_lossy());
        let rights = scope(repository, "pull,push");
        let (status, answer) = self.call(url, "POST", &path, &rights)?;
        match status {
            202 => {}
            401 | 403 => {
                return Err(self.denied(url, status, "begin an upload, which shows what it stores in"));
            }
            _ => return Err(unexpected(url, "POST", status)),
        }
        let header = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok());
        let upload = header("docker-upload-uuid").unwrap_or_default().to_string();
        let is_plain = !upload.is_empty() && !upload.contains('/') && !upload.starts_with('.');
        let found = is_plain
            .then(|| store.stat(&layout::upload_started_at(repository, upload.as_ref())))
            .transpose()?
            .flatten();
        // By our way to it: what it calls itself may lead nowhere from here.
        let cancelled = header("location").map(|location| self.call(url, "DELETE", local(location), &rights));
        if found.is_none() {
            return elsewhere();
        }
        // 2.8 leaves the state of the hash, and the directories.
        let state = layout::upload_hash_state(repository, upload.as_ref(), Algorithm::Sha256, 0);
        store.remove(&[state]).into_iter().next().map_or(Ok(()), Err)?;
        store.prune(&layout::upload_dir(repository, upload.as_ref()))?;
        cancelled.transpose().map(drop)
    }

    fn call(&self, url: &str, method: &str, path: &str, scope: &str) -> Result<(u16, Response<Body>)> {
        let target = format!("{url}{path}");
        let key = (url.to_string(), scope.to_string());
        let known = self.tokens.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        let answer = self.send(method, &target, known.or_else(|| self.credentials.header()))?;
        if answer.status() != 401 {
            return Ok((answer.status().as_u16(), answer));
        }
        let Some(challenge) = answer.headers().get("www-authenticate").and_then(|value| value.to_str().ok())
        else {
            return Ok((401, answer));
        };
        let Some(token) = self.token(challenge, scope)? else { return Ok((401, answer)) };
        let header = format!("Bearer {token}");
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).insert(key, header.clone());
        let answer = self.send(method, &target, Some(header))?;
        Ok((answer.status().as_u16(), answer))
    }

    fn send(&self, method: &str, target: &str, authorization: Option<String>) -> Result<Response<Body>> {
        let mut request = Request::builder().method(method).uri(target);
        if let Some(authorization) = authorization {
            request = request.header("Authorization", authorization);
        }
        let failed = |e: &dyn fmt::Display| Error::Busy { why: format!("{method} {target}: {e}") };
        let request = request.body(()).map_err(|e| failed(&e))?;
        self.agent.run(request).map_err(|e| failed(&e))
    }

    /// Asks the service that a registry names for a token.
    fn token(&self, challenge: &str, scope: &str) -> Result<Option<String>> {
        let Some(fields) = challenge.strip_prefix("Bearer ").map(fields) else { return Ok(None) };
        let Some(realm) = fields.get("realm") else { return Ok(None) };
        let mut target = format!("{realm}{}", if realm.contains('?') { '&' } else { '?' });
        if let Some(service) = fields.get("service") {
            target += &format!("service={}&", service.replace(' ', "%20"));
        }
        if !scope.is_empty() {
            target += &format!("scope={scope}");
        }
        let mut answer = self.send("GET", &target, self.credentials.header())?;
        if !answer.status().is_success() {
            return Ok(None);
        }
        let token: Token = answer
            .body_mut()
            .with_config()
            .limit(TOKEN_LIMIT)
            .reader()
            .pipe(serde_json::from_reader)
            .map_err(|e| Error::Busy { why: format!("GET {target}: {e}") })?;
        Ok(token.token.or(token.access_token))
    }
}

/// Calls a function on what it is given.
trait Pipe: Sized {
    fn pipe<T>(self, f: impl FnOnce(Self) -> T) -> T {
        f(self)
    }
}

impl<R: std::io::Read> Pipe for R {}

/// `a="b",c=d` of a challenge.
fn fields(text: &str) -> HashMap<String, String> {
    let mut fields = HashMap::new();
    let mut rest = text;
    while let Some((key, after)) = rest.split_once('=') {
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(',').unwrap_or((after, "")),
        };
        fields.insert(key.trim_matches([' ', ',']).to_lowercase(), value.to_string());
        rest = after;
    }
    fields
}

fn scope(repository: &Path, actions: &str) -> String {
    format!("repository:{}:{actions}", repository.to_string_lossy())
}

fn blob(repository: &Path, digest: &Digest) -> String {
    format!("/v2/{}/blobs/{digest}", repository.to_string_lossy())
}

fn unexpected(url: &str, method: &str, status: u16) -> Error {
    Error::Busy {
        why: format!("the registry at {url} answers {method} with {status}, so what it remembers is unknown"),
    }
}

impl Registries for Client {
    fn name(&self) -> String {
        self.urls.join(", ")
    }

    fn remembers(&self, repository: &Path, digest: &Digest) -> Result<bool> {
        for url in &self.urls {
            let (status, _) =
                self.call(url, "HEAD", &blob(repository, digest), &scope(repository, "pull"))?;
            match status {
                404 => {}
                200..=399 => return Ok(true),
                _ => return Err(unexpected(url, "HEAD", status)),
            }
        }
        Ok(false)
    }

    fn forget(&self, repository: &Path, digest: &Digest) -> Result<()> {
        // Each is told, also after one that fails.
        let tell = |url: &String| {
            let (status, _) =
                self.call(url, "DELETE", &blob(repository, digest), &scope(repository, "delete"))?;
            match status {
                // 3.x forgets and then fails for want of the link; 2.8 says that it has none.
                202 | 404 | 500 => Ok(()),
                _ => Err(unexpected(url, "DELETE", status)),
            }
        };
        self.urls.iter().map(tell).fold(Ok(()), Result::and)
    }

    fn verify(&self, store: &dyn Store, repository: &Path, witness: Option<&Digest>) -> Result<()> {
        self.urls.iter().try_for_each(|url| {
            self.check_delete(url, repository)?;
            self.check_storage(url, store, repository, witness)
        })
    }
}

/// Path and query of a URL, or of a reference that has nothing else.
fn local(url: &str) -> &str {
    let is_whole = url.starts_with("http://") || url.starts_with("https://");
    match url.split_once("://") {
        Some((_, rest)) if is_whole => rest.find('/').map_or("/", |at| &rest[at..]),
        _ => url,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn credentials_are_a_line() {
        let basic =
            |user: &str, password: &str| Credentials::Basic { user: user.into(), password: password.into() };
        assert_eq!(Credentials::parse("joe:a:b\n"), Ok(basic("joe", "a:b")));
        assert_eq!(Credentials::parse("Bearer x.y.z\n"), Ok(Credentials::Bearer("x.y.z".into())));
        assert_eq!(basic("Aladdin", "open sesame").header().unwrap(), "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        for wrong in ["", "joe", ":x", "joe:x\nann:y"] {
            assert!(Credentials::parse(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(format!("{:?}", basic("joe", "secret")), "basic");
    }

    #[test]
    fn a_location_is_followed_by_our_way_to_the_registry() {
        assert_eq!(
            local("https://hub.example:5000/v2/a/blobs/uploads/1?_state=x"),
            "/v2/a/blobs/uploads/1?_state=x"
        );
        assert_eq!(local("/v2/a?b=c://d"), "/v2/a?b=c://d");
        assert_eq!(local("http://hub.example"), "/");
    }

    #[test]
    fn challenges_are_read() {
        let found = fields(r#"realm="https://auth.example/token?a=b,c",service="reg x",error=invalid"#);
        assert_eq!(found["realm"], "https://auth.example/token?a=b,c");
        assert_eq!((found["service"].as_str(), found["error"].as_str()), ("reg x", "invalid"));
    }
}
