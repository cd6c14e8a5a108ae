//! How registries are asked: wherever they answer, with nothing left behind, by each that serves the storage, and with
//! credentials for nobody but those whom the administrator named.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use common::beside::{TIMES, garbage_in, step_with};
use common::gc::Report;
use common::registry::Registry;
use common::run::{Bounded, Outcome, clean, regfs};
use common::server::{Answer, Asked, Server};
use common::{entries, have, wait_for};

const NEEDS: &[&str] = &["docker-registry", "setpriv"];

/// A registry with garbage, and with a cache, so that it has to be asked.
fn registry() -> Registry {
    let registry = Registry::start_with(true);
    garbage_in(&registry);
    registry
}

fn local(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

/// Whether something listens, whatever it speaks.
fn listens(port: u16) -> bool {
    TcpStream::connect(("127.0.0.1", port)).is_ok()
}

fn uploads(registry: &Registry) -> Vec<PathBuf> {
    entries(&registry.store().join("docker/registry/v2/repositories/app/_uploads"))
}

fn probes(registry: &Registry) -> PathBuf {
    registry.store().join("docker/registry/v2/.regfs/probes")
}

#[track_caller]
fn assert_nothing_left(registry: &Registry, when: &str) {
    assert_eq!(uploads(registry), Vec::<PathBuf>::new(), "{when}");
    assert!(!probes(registry).exists(), "{when}");
}

#[track_caller]
fn assert_held(report: &Report, says: &str) {
    assert_eq!(report.gate, "stop", "expected to be held back");
    assert!(report.gate_reason.contains(says), "{says}: {}", report.gate_reason);
}

/// A file for `--registry-auth`.
fn auth(registry: &Registry, text: &str) -> String {
    let path = registry.fresh("auth");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_string()
}

#[test]
fn a_registry_is_asked_wherever_it_answers_and_nothing_is_left_there() {
    if !have(NEEDS) {
        return;
    }
    let mut registry = registry();
    let plain = fs::read_to_string(registry.config()).unwrap();
    let socket = registry.fresh("socket");
    let at_socket = format!("unix:{}", socket.to_str().unwrap());
    // What is added to the section, what addr is, and what is said with --registry, below the URL.
    let forms: [(&str, &str, &[&str]); 6] = [
        ("prefix: /reg/, ", "127.0.0.1:PORT", &["", "/reg", "/reg/", "/reg/v2", "/reg/v2/"]),
        ("host: 'https://hub.example.com/reg/', ", ":PORT", &["", "/", "/v2/"]),
        ("host: 'https://hub.example.com/v2/x', prefix: /a/b, ", "localhost:PORT", &["", "/a/b"]),
        ("relativeurls: true, tls: {certificate: ''}, ", "127.0.0.1:PORT", &["", "/v2"]),
        ("relativeurls: true, prefix: /reg, ", "0.0.0.0:PORT", &["", "/reg/v2//"]),
        ("net: unix, ", "SOCKET", &["", "SOCKET"]),
    ];
    for (more, address, below) in forms {
        let address = address.replace("SOCKET", socket.to_str().unwrap());
        let is_socket = address.starts_with('/');
        let change = |port: u16| {
            let old = format!("http: {{addr: '127.0.0.1:{port}'");
            let new = format!("http: {{{more}addr: '{}'", address.replace("PORT", &port.to_string()));
            plain.replace(&old, &new)
        };
        let port = registry.port();
        let is_ready = |port| if is_socket { socket.exists() } else { listens(port) };
        registry.change_config_until(&|_| change(port), &is_ready);
        for below in below {
            let named = match is_socket {
                true => at_socket.clone(),
                false => local(registry.port()) + below,
            };
            let words = if below.is_empty() { vec![] } else { vec!["--registry", &named] };
            let report = step_with(&registry.config(), &words);
            assert_eq!(report.gate, "probe", "{more}{address} {words:?}: {}", report.gate_reason);
            assert_nothing_left(&registry, &format!("{more}{address} {words:?}"));
        }
    }
}

#[test]
fn one_registry_by_two_names_does_not_stand_for_two() {
    if !have(&[NEEDS, &["root"]].concat()) {
        return;
    }
    let mut registry = registry();
    let port = registry.port();
    registry.change_config(&|text| text.replace("'127.0.0.1:", "':"));
    let one = local(port);
    let proxy = Server::before(port);
    let others = [
        one.clone(),
        format!("{one}/"),
        format!("{one}/v2/"),
        format!("http://localhost:{port}"),
        format!("http://127.0.0.2:{port}"),
        proxy.url(),
    ];
    // Alone it may be called what one likes.
    for other in &others {
        let report = step_with(&registry.store(), &["--registry", &format!("{one},{other}")]);
        assert_eq!(report.gate, "probe", "{other}: {}", report.gate_reason);
    }
    let second = registry.another();
    for other in &others {
        let report = step_with(&registry.store(), &["--registry", &format!("{one},{other}")]);
        assert_held(&report, "name each");
        assert!(report.gate_reason.contains(&format!("process {} ", second.pid())), "{}", report.gate_reason);
        let both = format!("{other},{}", local(second.port()));
        let report = step_with(&registry.store(), &["--registry", &both]);
        assert_eq!(report.gate, "probe", "{both}: {}", report.gate_reason);
    }
    // As many names as processes, and all of them lead elsewhere.
    let all = [local(second.port()), Server::before(second.port()).url()].join(",");
    assert_held(&step_with(&registry.store(), &["--registry", &all]), "name each");
}

/// Kills a run that waits for the answer to what `is_it` says, which the registry did or did not do.
fn killed_when(registry: &Registry, is_it: fn(&Asked) -> bool, is_done: bool) {
    let port = registry.port();
    let server = Server::start(move |asked| {
        let answer = (is_done || !is_it(asked)).then(|| asked.forwarded(port));
        answer.filter(|_| !is_it(asked))
    });
    let mut run =
        regfs(["gc", "--registry", &server.url()]).arg(registry.store()).args(TIMES).spawn().unwrap();
    let count = || uploads(registry).len();
    wait_for("the run to get there", Duration::from_secs(60), || {
        (server.asked().iter().any(is_it) && count() == 1).then_some(())
    });
    run.kill().unwrap();
    run.wait().unwrap();
}

#[test]
fn what_a_killed_run_left_is_removed_by_the_next() {
    if !have(NEEDS) {
        return;
    }
    let registry = registry();
    let url = local(registry.port());
    let is_cancel = |asked: &Asked| asked.method == "DELETE" && asked.target.contains("uploads");
    let is_begin = |asked: &Asked| asked.method == "POST";

    killed_when(&registry, is_cancel, false);
    assert_eq!(uploads(&registry).len(), 1);
    step_with(&registry.store(), &["--registry", &url]);
    assert_nothing_left(&registry, "after a kill before the end of the upload");

    // Nobody knows the name of this one, so it has to be at rest for a while.
    killed_when(&registry, is_begin, true);
    step_with(&registry.store(), &["--registry", &url]);
    assert_eq!(uploads(&registry).len(), 1, "it may be anybody's");
    let past = SystemTime::now() - Duration::from_secs(100);
    let started = uploads(&registry)[0].join("startedat");
    fs::File::options().write(true).open(started).unwrap().set_modified(past).unwrap();
    let note = entries(&probes(&registry)).pop().unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&note).unwrap()).unwrap();
    let began = json["began"]["secs_since_epoch"].as_u64().unwrap();
    json["began"]["secs_since_epoch"] = (began - 100).into();
    fs::write(&note, json.to_string()).unwrap();
    // A client's, of the same moment, with a byte in it; and one of today.
    let begin = || {
        let answer = registry.api("POST", "app/blobs/uploads/", &[], &[]).is(202);
        answer.header("docker-upload-uuid").unwrap().to_string()
    };
    let busy = registry.store().join("docker/registry/v2/repositories/app/_uploads").join(begin());
    fs::write(busy.join("data"), "x").unwrap();
    fs::File::options().write(true).open(busy.join("startedat")).unwrap().set_modified(past).unwrap();
    let young = busy.with_file_name(begin());
    step_with(&registry.store(), &["--registry", &url]);
    let mut left = uploads(&registry);
    left.sort_unstable();
    let mut wanted = vec![busy, young];
    wanted.sort_unstable();
    assert_eq!(left, wanted);
    assert!(!probes(&registry).exists());
}

/// A registry that is content with any token, and says where to get one.
fn with_tokens(registry: &mut Registry, realm: &str) {
    let auth = format!("auth: {{silly: {{realm: '{realm}', service: 'a service & more'}}}}\n");
    registry.change_config_until(&|text| text.split("auth:").next().unwrap().to_string() + &auth, &listens);
}

fn token_service() -> Server {
    Server::start(|_| {
        let mut answer = Answer::status(200);
        answer.body = br#"{"token": "t0"}"#.to_vec();
        Some(answer)
    })
}

#[test]
fn a_token_service_gets_credentials_if_it_is_on_the_host_or_was_named() {
    if !have(NEEDS) {
        return;
    }
    const BASIC: &str = "Basic am9lOnNlY3JldA==";
    let mut registry = registry();
    let file = auth(&registry, "joe:secret\n");
    let service = token_service();
    with_tokens(&mut registry, &format!("{}/token?a=b", service.url()));

    // The process says where it answers: it is asked, and nobody says who we are.
    step_with(&registry.store(), &["--registry-auth", &file]);
    assert!(!service.asked().is_empty());
    assert_eq!(service.authorizations(), Vec::<String>::new());
    // What the administrator says.
    let report = step_with(&registry.config(), &["--registry-auth", &file]);
    assert_eq!(report.gate, "probe", "{}", report.gate_reason);
    assert_eq!(service.authorizations(), [BASIC]);
    let url = local(registry.port());
    let asked = service.asked();
    let target = &asked.last().unwrap().target;
    assert!(
        target.starts_with("/token?a=b&service=a%20service%20%26%20more&scope=repository%3A"),
        "{target}"
    );

    // The same machine by another name is another host.
    let service = token_service();
    let realm = format!("http://localhost:{}", service.port);
    with_tokens(&mut registry, &format!("{realm}/token"));
    let report = step_with(&registry.store(), &["--registry", &url, "--registry-auth", &file]);
    assert_held(&report, &format!("realm {realm}"));
    assert!(service.asked().is_empty());
    let named = auth(&registry, &format!("joe:secret\nrealm {realm}\n"));
    let report = step_with(&registry.store(), &["--registry", &url, "--registry-auth", &named]);
    assert_eq!(report.gate, "probe", "{}", report.gate_reason);
    assert_eq!(service.authorizations(), [BASIC]);
}

#[test]
fn a_password_is_shown_to_who_asks_for_it_and_follows_no_redirect() {
    if !have(NEEDS) {
        return;
    }
    let registry = registry();
    let port = registry.port();
    let file = auth(&registry, "joe:secret\n");
    let asks = Server::start(move |asked| match asked.header("authorization") {
        Some("Basic am9lOnNlY3JldA==") => Some(asked.forwarded(port)),
        _ => Some(Answer::status(401).with("WWW-Authenticate", "Basic realm=\"x\"")),
    });
    let words = ["--registry", &asks.url(), "--registry-auth", &file];
    let report = step_with(&registry.store(), &words);
    assert_eq!(report.gate, "probe", "{}", report.gate_reason);
    assert_eq!(asks.asked()[0].header("authorization"), None);

    let elsewhere = Server::before(port);
    let to = elsewhere.url();
    let sends_away = Server::start(move |asked| {
        Some(Answer::status(307).with("Location", format!("{to}{}", asked.target)))
    });
    let report = step_with(&registry.store(), &["--registry", &sends_away.url(), "--registry-auth", &file]);
    assert_held(&report, "sends us elsewhere");
    assert!(elsewhere.asked().is_empty());
    // One that does not ask sees nothing, either.
    let open = Server::before(port);
    step_with(&registry.store(), &["--registry", &open.url(), "--registry-auth", &file]);
    assert_eq!(open.authorizations(), Vec::<String>::new());
}

/// Makes files with a certificate and its key; `words` go to `openssl req -x509`.
fn certificate(directory: &Path, name: &str, when: Option<&str>, words: &[&str]) -> (String, String) {
    let path = |kind: &str| directory.join(format!("{name}.{kind}")).to_str().unwrap().to_string();
    let mut command = match when {
        Some(_) => clean("faketime"),
        None => clean("openssl"),
    };
    if let Some(when) = when {
        command.args([when, "openssl"]);
    }
    let (certificate, key) = (path("pem"), path("key"));
    let outcome = command
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"])
        .args(["-days", "2", "-subj", "/CN=registry", "-keyout", &key, "-out", &certificate])
        .args(words)
        .outcome();
    outcome.exits(0);
    (certificate, key)
}

/// Has the registry speak TLS.
fn with_tls(registry: &mut Registry, (certificate, key): &(String, String)) {
    let tls = format!("http: {{tls: {{certificate: {certificate}, key: {key}}}, ");
    registry.change_config_until(&|text| text.replace("http: {", &tls), &listens);
}

#[test]
fn certificates_are_believed_that_were_named_and_what_is_wrong_with_others_is_said() {
    if !have(&[NEEDS, &["openssl", "faketime"]].concat()) {
        return;
    }
    let mut registry = registry();
    let plain = fs::read_to_string(registry.config()).unwrap();
    let dir = common::scratch();
    let local_names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"];
    let leaf = ["-addext", "basicConstraints=critical,CA:FALSE"];
    let as_authority = certificate(dir.path(), "authority", None, &local_names);
    let as_leaf = certificate(dir.path(), "leaf", None, &[&local_names[..], &leaf].concat());
    let other_name = certificate(dir.path(), "name", None, &["-addext", "subjectAltName=DNS:hub.example"]);
    let expired = certificate(dir.path(), "expired", Some("10 days ago"), &local_names);
    let later = certificate(dir.path(), "later", Some("10 days"), &local_names);
    let other = certificate(dir.path(), "other", None, &local_names);
    let authority = certificate(dir.path(), "ca", None, &[]);
    let signing = ["-CA", &authority.0, "-CAkey", &authority.1];
    let signed = certificate(dir.path(), "signed", None, &[&local_names[..], &leaf, &signing].concat());
    let cases = [
        (&as_authority, &as_authority, None),
        (&as_leaf, &as_leaf, None),
        (&signed, &authority, None),
        (&signed, &signed, None),
        (&as_authority, &other, Some("--registry-ca")),
        (&as_leaf, &other, Some("--registry-ca")),
        (&signed, &other, Some("--registry-ca")),
        (&other_name, &other_name, Some("another name")),
        (&expired, &expired, Some("expired")),
        (&later, &later, Some("not valid yet")),
    ];
    for (served, believed, says) in cases {
        registry.change_config_until(&|_| plain.clone(), &listens);
        with_tls(&mut registry, served);
        let report = step_with(&registry.config(), &["--registry-ca", &believed.0]);
        match says {
            None => assert_eq!(report.gate, "probe", "{}: {}", served.0, report.gate_reason),
            Some(says) => assert_held(&report, says),
        }
    }
    let url = local(registry.port());
    assert_held(&step_with(&registry.store(), &["--registry", &url]), "write https://");
    registry.change_config_until(&|_| plain.clone(), &listens);
    let url = url.replace("http:", "https:");
    assert_held(&step_with(&registry.store(), &["--registry", &url]), "write http://");

    let run = |file: &str| -> Outcome {
        regfs(["gc", "--dry-run", "--registry-ca", file]).arg(registry.store()).outcome()
    };
    run("/dev/null").exits(1).says("no regular file");
    run(&as_leaf.1).exits(1).says("holds no certificate");
    run("/nowhere").exits(1).says("/nowhere");
}
