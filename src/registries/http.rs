//! A registry's HTTP API, as far as a collector needs it: does it have a blob, make it forget one, is it ours.
//!
//! # Rules kept here
//! 1. Who we are is said only to a place that the administrator named ([`auth`]), and no redirect is followed.
//! 2. A registry counts only if it is shown to write into this very storage ([`probe`]), and a process only if it is shown
//!    to be the one that answers: two names may lead to one registry.
//!
//! Sources: OCI distribution-spec 1.1 (`end-3`, `end-4a`, `end-10`), distribution `docs/spec/auth/token`.

mod auth;
mod probe;
mod traces;
mod trust;
mod wire;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use ureq::http::{Request, Response};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{Connector, TcpConnector};
use ureq::{Agent, Body};

use self::auth::Challenge;
pub use self::auth::Credentials;
pub use self::trust::Trust;
use self::wire::{TlsConnector, UnixConnector};
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result};
use crate::gc::guard::gate::Registries;
use crate::printable::Printable;
use crate::store::Store;

/// A registry that does not answer for so long does not answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest answer of a token service.
const TOKEN_LIMIT: u64 = 1 << 20;
/// As much of an answer as says what is wrong.
const WORDS_LIMIT: u64 = 4 << 10;

/// Where a registry answers, and who says so.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// `http://host:port/prefix`, `https://…`, or `unix:/path` of a socket.
    pub url: String,
    /// Whether the administrator said so: `--registry`, or the config.yml given as STORE. What a process says is nobody's word.
    pub is_named: bool,
}

impl Place {
    /// A place with its URL as others write it: the API is below `/v2/`, and many write that, too.
    pub fn new(url: &str, is_named: bool) -> Place {
        let whole = url.trim_end_matches('/');
        let below = whole.strip_suffix("/v2").filter(|_| !whole.starts_with("unix:"));
        Place { url: below.unwrap_or(whole).trim_end_matches('/').to_string(), is_named }
    }

    /// Each place once; one that was named stays so.
    pub(super) fn distinct(mut places: Vec<Place>) -> Vec<Place> {
        places.sort_unstable_by(|a, b| (&a.url, b.is_named).cmp(&(&b.url, a.is_named)));
        places.dedup_by(|a, b| a.url == b.url);
        places
    }
}

/// Who we are to registries, and whom we believe.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Who we are.
    pub credentials: Credentials,
    /// Token services that may know, besides those on the host of a registry.
    pub realms: Vec<String>,
    /// Whose certificates are believed.
    pub trust: Arc<Trust>,
}

/// A process that serves the storage, or may.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its number.
    pub pid: u32,
    /// What it is, in words.
    pub what: String,
}

/// Asks all registries of a store.
pub struct Client {
    registries: Vec<Registry>,
    seen: Vec<Seen>,
}

/// One that can be asked.
struct Registry {
    place: Place,
    /// What every URL begins with.
    base: String,
    access: Access,
    agent: Agent,
    /// What it wanted to see, for each scope.
    authorizations: Mutex<HashMap<String, String>>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

/// What a token service answers.
#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Client {
    /// A client of the registries at `places`, which all of those `seen` have to be among; asks nothing yet.
    pub fn new(places: &[Place], access: &Access, seen: Vec<Seen>) -> Client {
        let registries = places.iter().map(|place| Registry::new(place.clone(), access.clone())).collect();
        Client { registries, seen }
    }

    /// Whether each of them answers at all.
    pub fn check(&self) -> Result<()> {
        self.registries.iter().try_for_each(Registry::check)
    }
}

impl Registry {
    fn new(place: Place, access: Access) -> Registry {
        let config = Agent::config_builder()
            .timeout_global(Some(TIMEOUT))
            .http_status_as_error(false)
            .max_redirects(0)
            // One in between would see what is meant for a registry of this machine.
            .proxy(None)
            .user_agent(concat!("regfs/", env!("CARGO_PKG_VERSION")))
            .build();
        let tls = TlsConnector(access.trust.clone());
        let resolver = DefaultResolver::default();
        let (base, agent) = match place.url.strip_prefix("unix:") {
            Some(path) => {
                let connector = ().chain(UnixConnector(PathBuf::from(path))).chain(tls);
                ("http://127.0.0.1".to_string(), Agent::with_parts(config, connector, resolver))
            }
            None => {
                let connector = ().chain(TcpConnector::default()).chain(tls);
                (place.url.clone(), Agent::with_parts(config, connector, resolver))
            }
        };
        Registry { place, base, access, agent, authorizations: Mutex::default() }
    }

    fn url(&self) -> impl fmt::Display {
        self.place.url.printable()
    }

    fn check(&self) -> Result<()> {
        let (status, mut answer) = self.call("GET", "/v2/", "")?;
        let url = self.url();
        match status {
            // One that wants credentials for more than that says so when it is asked for more.
            200 | 401 => Ok(()),
            301..=399 => {
                let to = header(&answer, "location").unwrap_or_default();
                Err(Error::invalid(format!(
                    "{url} sends us elsewhere ({status}, {}), and regfs does not follow; give the URL of the registry itself",
                    to.printable()
                )))
            }
            400 if words(&mut answer).contains("HTTPS") => {
                Err(Error::invalid(format!("{url} speaks TLS; write https:// instead of http://")))
            }
            404 => Err(Error::invalid(format!(
                "{url} answers, and has no registry API at {url}/v2/ (404); give the URL with the registry's http.prefix"
            ))),
            status => Err(self.unexpected("GET", status)),
        }
    }

    /// Whether it lets us delete.
    fn check_delete(&self, repository: &Path) -> Result<()> {
        // Of a blob that can't be: where deleting is not allowed, the answer is another one than "unknown".
        let nothing = Digest::from_bytes(Algorithm::Sha256, &[0; 32]);
        match self.blob("DELETE", repository, &nothing)? {
            404 | 202 => Ok(()),
            405 => Err(Error::invalid(format!(
                "the registry at {} does not delete; storage.delete.enabled: true in its config.yml makes it",
                self.url()
            ))),
            status @ (401 | 403) => Err(self.denied(status, "delete")),
            status => Err(self.unexpected("DELETE", status)),
        }
    }

    fn denied(&self, status: u16, what: &str) -> Error {
        let url = self.url();
        let next = match self.access.credentials {
            Credentials::None => "give --registry-auth FILE with user:password".to_string(),
            _ if !self.place.is_named => {
                format!("a process says that it answers there, so it gets no credentials; name it with --registry {url}")
            }
            _ => {
                "the credentials that were given must be of a user who may pull, push and delete in all repositories"
                    .to_string()
            }
        };
        Error::invalid(format!("the registry at {url} does not let us {what} ({status}); {next}"))
    }

    fn unexpected(&self, method: &str, status: u16) -> Error {
        let url = self.url();
        Error::Busy {
            why: format!(
                "the registry at {url} answers {method} with {status}, so what it remembers is unknown"
            ),
        }
    }

    /// Asks about a blob; returns the status.
    fn blob(&self, method: &str, repository: &Path, digest: &Digest) -> Result<u16> {
        let path = format!("/v2/{}/blobs/{digest}", repository.to_string_lossy());
        let actions = if method == "DELETE" { "delete" } else { "pull" };
        Ok(self.call(method, &path, &scope(repository, actions))?.0)
    }

    /// Sends a request; a second time with what is wanted, if it wants something to see.
    fn call(&self, method: &str, path: &str, scope: &str) -> Result<(u16, Response<Body>)> {
        let target = format!("{}{path}", self.base);
        let known = self.authorizations.lock().unwrap_or_else(PoisonError::into_inner).get(scope).cloned();
        let answer = self.send(method, &target, known)?;
        if answer.status() != 401 {
            return Ok((answer.status().as_u16(), answer));
        }
        let challenge = header(&answer, "www-authenticate").as_deref().and_then(Challenge::parse);
        let Some(wanted) = self.answer(challenge, scope)? else { return Ok((401, answer)) };
        let mut authorizations = self.authorizations.lock().unwrap_or_else(PoisonError::into_inner);
        authorizations.insert(scope.to_string(), wanted.clone());
        drop(authorizations);
        let answer = self.send(method, &target, Some(wanted))?;
        Ok((answer.status().as_u16(), answer))
    }

    /// What a registry wants to see that was not content; `None` where we have nothing to show.
    fn answer(&self, challenge: Option<Challenge>, scope: &str) -> Result<Option<String>> {
        let credentials = match self.place.is_named {
            true => &self.access.credentials,
            false => &Credentials::None,
        };
        match (challenge, credentials) {
            (Some(Challenge::Basic), Credentials::Basic { .. })
            | (Some(Challenge::Bearer { .. }), Credentials::Bearer(_)) => Ok(credentials.header()),
            (Some(Challenge::Bearer { realm, service }), _) => {
                let of_host = auth::may_see(&realm, &self.place.url, &self.access.realms);
                of_host.map_err(Error::invalid)?;
                self.token(&auth::token_url(&realm, service.as_deref(), scope), credentials.header())
            }
            _ => Ok(None),
        }
    }

    /// Asks a service for a token.
    fn token(&self, target: &str, authorization: Option<String>) -> Result<Option<String>> {
        let mut answer = self.send("GET", target, authorization)?;
        if !answer.status().is_success() {
            return Ok(None);
        }
        let reader = answer.body_mut().with_config().limit(TOKEN_LIMIT).reader();
        let token: Token = serde_json::from_reader(reader)
            .map_err(|e| Error::Busy { why: format!("GET {}: {e}", target.printable()) })?;
        Ok(token.token.or(token.access_token).map(|token| format!("Bearer {token}")))
    }

    fn send(&self, method: &str, target: &str, authorization: Option<String>) -> Result<Response<Body>> {
        let mut request = Request::builder().method(method).uri(target);
        if let Some(authorization) = authorization {
            request = request.header("Authorization", authorization);
        }
        let shown = match self.place.url.strip_prefix("unix:") {
            Some(_) => format!("{} {}", self.place.url, target.strip_prefix(&self.base).unwrap_or(target)),
            None => target.to_string(),
        };
        let failed = |why: String| Error::Busy { why: format!("{method} {}: {why}", shown.printable()) };
        let request = request.body(()).map_err(|e| failed(e.to_string()))?;
        self.agent.run(request).map_err(|e| failed(explain(&e)))
    }
}

/// What went wrong, in words.
fn explain(e: &ureq::Error) -> String {
    let inner = match e {
        ureq::Error::Io(e) => e.get_ref(),
        _ => None,
    };
    match inner.and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(tls) => trust::explain(tls),
        None => e.to_string(),
    }
}

fn header(answer: &Response<Body>, name: &str) -> Option<String> {
    answer.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_string)
}

/// The beginning of an answer.
fn words(answer: &mut Response<Body>) -> String {
    let mut words = Vec::new();
    // One that can't be read says nothing, which is what it means here.
    let _ =
        io::Read::read_to_end(&mut answer.body_mut().with_config().limit(WORDS_LIMIT).reader(), &mut words);
    String::from_utf8_lossy(&words).into_owned()
}

fn scope(repository: &Path, actions: &str) -> String {
    format!("repository:{}:{actions}", repository.to_string_lossy())
}

impl Registries for Client {
    fn name(&self) -> String {
        self.registries.iter().map(|registry| registry.place.url.as_str()).collect::<Vec<_>>().join(", ")
    }

    fn remembers(&self, repository: &Path, digest: &Digest) -> Result<bool> {
        for registry in &self.registries {
            match registry.blob("HEAD", repository, digest)? {
                404 => {}
                200..=399 => return Ok(true),
                status => return Err(registry.unexpected("HEAD", status)),
            }
        }
        Ok(false)
    }

    fn forget(&self, repository: &Path, digest: &Digest) -> Result<()> {
        // Each is told, also after one that fails.
        let tell = |registry: &Registry| match registry.blob("DELETE", repository, digest)? {
            // 3.x forgets and then fails for want of the link; 2.8 says that it has none.
            202 | 404 | 500 => Ok(()),
            status => Err(registry.unexpected("DELETE", status)),
        };
        self.registries.iter().map(tell).fold(Ok(()), Result::and)
    }

    fn verify(&self, store: &dyn Store, repository: &Path, witness: Option<&Digest>) -> Result<()> {
        self.verify_all(store, repository, witness)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_counts_once_however_it_is_written_and_stays_named() {
        let urls = ["http://a:1/v2/", "http://a:1", "http://a:1/reg/v2", "http://a:1/reg/", "unix:/run/v2"];
        let mut places: Vec<Place> = urls.iter().map(|url| Place::new(url, false)).collect();
        places.push(Place::new("http://a:1/", true));
        let distinct = Place::distinct(places);
        let found: Vec<(&str, bool)> = distinct.iter().map(|p| (p.url.as_str(), p.is_named)).collect();
        assert_eq!(found, [("http://a:1", true), ("http://a:1/reg", false), ("unix:/run/v2", false)]);
    }
}
