//! Who we are to a registry, and to whom we say so.
//!
//! # Rules kept here
//! 1. Credentials go to places that the administrator named, and only after these asked for them.
//! 2. A service of tokens gets them if it is on the host of the registry, or was named itself; never in the clear where the
//!    registry speaks TLS.

use std::collections::HashMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ureq::http::Uri;

use crate::printable::Printable;

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
    /// Reads `user:password` or `Bearer <token>`, and lines `realm URL` with the token services that may have them.
    pub fn parse(text: &str) -> Result<(Credentials, Vec<String>), String> {
        let wanted =
            "expected a line with user:password or Bearer <token>, and perhaps lines with realm https://…";
        let mut lines = text.lines().map(|line| line.trim_end_matches('\r'));
        let first = lines.next().unwrap_or_default();
        let realm = |line: &str| {
            let realm = line.strip_prefix("realm ").map(str::trim).filter(|realm| origin(realm).is_some());
            realm.map(str::to_string).ok_or_else(|| wanted.to_string())
        };
        let realms = lines.filter(|line| !line.trim().is_empty()).map(realm).collect::<Result<_, _>>()?;
        if let Some(token) = first.strip_prefix("Bearer ") {
            return Ok((Credentials::Bearer(token.trim().to_string()), realms));
        }
        match first.split_once(':') {
            Some((user, password)) if !user.is_empty() => {
                Ok((Credentials::Basic { user: user.to_string(), password: password.to_string() }, realms))
            }
            _ => Err(wanted.to_string()),
        }
    }

    pub(super) fn header(&self) -> Option<String> {
        match self {
            Credentials::None => None,
            Credentials::Basic { user, password } => {
                Some(format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
            }
            Credentials::Bearer(token) => Some(format!("Bearer {token}")),
        }
    }
}

/// What a registry wants to see.
#[derive(Debug, PartialEq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String> },
}

impl Challenge {
    /// Reads the value of `WWW-Authenticate`; the name of a scheme is in any case.
    pub(super) fn parse(text: &str) -> Option<Challenge> {
        let (scheme, rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        match scheme.to_lowercase().as_str() {
            "basic" => Some(Challenge::Basic),
            "bearer" => {
                let mut fields = fields(rest);
                Some(Challenge::Bearer { realm: fields.remove("realm")?, service: fields.remove("service") })
            }
            _ => None,
        }
    }
}

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

/// Where a token is to be had.
pub(super) fn token_url(realm: &str, service: Option<&str>, scope: &str) -> String {
    let pairs = [("service", service.unwrap_or_default()), ("scope", scope)];
    let pairs = pairs.iter().filter(|(_, value)| !value.is_empty());
    let query: Vec<String> = pairs.map(|(key, value)| format!("{key}={}", encoded(value))).collect();
    match query.as_slice() {
        [] => realm.to_string(),
        query => format!("{realm}{}{}", if realm.contains('?') { '&' } else { '?' }, query.join("&")),
    }
}

/// A value in a query: everything but what RFC 3986 calls unreserved is escaped.
fn encoded(value: &str) -> String {
    let escape = |byte: u8| match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        byte => format!("%{byte:02X}"),
    };
    value.bytes().map(escape).collect()
}

/// Scheme, host and port of a URL.
fn origin(url: &str) -> Option<(String, String, u16)> {
    let uri: Uri = url.parse().ok()?;
    // What stands before an @ is no host, and looks like one.
    let authority = uri.authority().filter(|authority| !authority.as_str().contains('@'))?;
    let scheme = uri.scheme_str()?.to_lowercase();
    let port = match scheme.as_str() {
        "http" => 80,
        "https" => 443,
        _ => return None,
    };
    let host = authority.host().to_lowercase();
    (!host.is_empty()).then_some((scheme, host, authority.port_u16().unwrap_or(port)))
}

/// Whether what is meant for the registry at `registry` may be shown to the token service at `realm`; `named`: others that
/// the administrator named. Why not, otherwise.
pub(super) fn may_see(realm: &str, registry: &str, named: &[String]) -> Result<(), String> {
    let sent = format!("the registry at {registry} sends us to {} for a token", realm.printable());
    let Some(service) = origin(realm) else { return Err(format!("{sent}, which is no URL of a service")) };
    let registry = origin(registry);
    if service.0 == "http" && registry.as_ref().is_none_or(|(scheme, ..)| scheme == "https") {
        return Err(format!("{sent}, where everybody on the way can read credentials; make it https://"));
    }
    let is_same_host = registry.is_some_and(|(_, host, _)| host == service.1);
    if is_same_host || named.iter().filter_map(|url| origin(url)).any(|named| named == service) {
        return Ok(());
    }
    let (scheme, host, port) = service;
    Err(format!(
        "{sent}, which is another host; if that may have the credentials, add a line to the file of --registry-auth: \
         realm {scheme}://{host}:{port}"
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn credentials_are_a_line() {
        let basic =
            |user: &str, password: &str| Credentials::Basic { user: user.into(), password: password.into() };
        let parsed = |text: &str| Credentials::parse(text).map(|(credentials, _)| credentials);
        assert_eq!(parsed("joe:a:b\n"), Ok(basic("joe", "a:b")));
        assert_eq!(parsed("Bearer x.y.z\r\n"), Ok(Credentials::Bearer("x.y.z".into())));
        assert_eq!(basic("Aladdin", "open sesame").header().unwrap(), "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        for wrong in ["", "joe", ":x", "joe:x\nann:y", "joe:x\nrealm nowhere", "joe:x\nrealm https://a@b/"] {
            assert!(Credentials::parse(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(format!("{:?}", basic("joe", "secret")), "basic");
        let (_, realms) = Credentials::parse("joe:x\nrealm https://auth.example/token\n\n").unwrap();
        assert_eq!(realms, ["https://auth.example/token"]);
    }

    #[test]
    fn challenges_are_read() {
        let bearer = |realm: &str, service: Option<&str>| {
            Some(Challenge::Bearer { realm: realm.into(), service: service.map(str::to_string) })
        };
        let text = r#"Bearer realm="https://auth.example/token?a=b,c",service="reg x",error=invalid"#;
        assert_eq!(Challenge::parse(text), bearer("https://auth.example/token?a=b,c", Some("reg x")));
        assert_eq!(Challenge::parse("bearer realm=https://a/t"), bearer("https://a/t", None));
        assert_eq!(Challenge::parse(r#"Basic realm="x""#), Some(Challenge::Basic));
        assert_eq!(Challenge::parse("basic"), Some(Challenge::Basic));
        for unknown in ["", "Digest realm=x", "Bearer service=x"] {
            assert_eq!(Challenge::parse(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn what_is_asked_for_is_escaped() {
        let url = token_url("https://a/t?x=1", Some("reg & x=y#"), "repository:a/b:pull,push");
        assert_eq!(
            url,
            "https://a/t?x=1&service=reg%20%26%20x%3Dy%23&scope=repository%3Aa%2Fb%3Apull%2Cpush"
        );
        assert_eq!(token_url("https://a/t", None, ""), "https://a/t");
    }

    #[test]
    fn credentials_go_to_the_same_host_or_one_that_was_named_and_never_in_the_clear() {
        let named = ["https://auth.example/token".to_string()];
        for (realm, registry, may) in [
            ("http://hub.example:5001/token", "http://hub.example:5000", true),
            ("https://HUB.example/token", "http://hub.example:5000", true),
            ("https://hub.example:8443/token", "https://hub.example", true),
            ("https://auth.example:443/x", "https://hub.example", true),
            ("https://auth.example:444/x", "https://hub.example", false),
            ("http://auth.example/x", "http://hub.example", false),
            ("http://hub.example/token", "https://hub.example", false),
            ("https://hub.example.evil/token", "https://hub.example", false),
            ("https://hub.example@evil/token", "https://hub.example", false),
            ("https://evil/?hub.example", "https://hub.example", false),
            ("https://evil#@hub.example", "https://hub.example", false),
            ("ftp://hub.example/", "http://hub.example", false),
            ("/token", "http://hub.example", false),
            ("http://127.0.0.1:1/", "unix:/run/registry.sock", false),
        ] {
            assert_eq!(may_see(realm, registry, &named).is_ok(), may, "{realm} {registry}");
        }
    }
}
