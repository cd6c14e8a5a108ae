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
use common::server::{Answer, Asked, Server, registry_on};
use common::{entries, have, wait_for};
use regfs::gc::guard::gate::Registries;
use regfs::registries::http::{Access, Client, Credentials, Place};
use tempfile::TempDir;

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

/// A store in which something is garbage, for servers that behave like a registry.
fn sample() -> TempDir {
    let dir = common::scratch();
    regfs(["sample"]).arg(dir.path().join("store")).outcome().exits(0);
    for upload in uploads(&dir.path().join("store")) {
        fs::remove_dir_all(upload).unwrap();
    }
    dir
}

/// Takes a step as if no registry had been seen before: here they come and go.
fn step(store: &Path, words: &[&str]) -> Report {
    let root = match store.is_dir() {
        true => store.to_path_buf(),
        false => store.with_file_name("store"),
    };
    // Where none was seen, there is none.
    let _ = fs::remove_file(root.join("docker/registry/v2/.regfs/registries.json"));
    step_with(store, words)
}

/// The uploads in all repositories.
fn uploads(store: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut directories = vec![store.join("docker/registry/v2/repositories")];
    while let Some(directory) = directories.pop() {
        let inside = entries(&directory).into_iter().filter(|path| path.is_dir());
        match directory.ends_with("_uploads") {
            true => found.extend(inside),
            false => directories.extend(inside),
        }
    }
    found.sort_unstable();
    found
}

fn probes(store: &Path) -> PathBuf {
    store.join("docker/registry/v2/.regfs/probes")
}

#[track_caller]
fn assert_nothing_left(store: &Path, when: &str) {
    assert_eq!(uploads(store), Vec::<PathBuf>::new(), "{when}");
    assert!(!probes(store).exists(), "{when}");
}

#[track_caller]
fn assert_held(report: &Report, says: &str) {
    assert_eq!(report.gate, "stop", "expected to be held back");
    assert!(report.gate_reason.contains(says), "{says}: {}", report.gate_reason);
}

/// A file for `--registry-auth`.
fn auth(directory: &Path, text: &str) -> String {
    let path = directory.join(format!("auth-{}", text.len()));
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
            let report = step(&registry.config(), &words);
            assert_eq!(report.gate, "probe", "{more}{address} {words:?}: {}", report.gate_reason);
            assert_nothing_left(&registry.store(), &format!("{more}{address} {words:?}"));
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
        let report = step(&registry.store(), &["--registry", &format!("{one},{other}")]);
        assert_eq!(report.gate, "probe", "{other}: {}", report.gate_reason);
    }
    let second = registry.another();
    for other in &others {
        let report = step(&registry.store(), &["--registry", &format!("{one},{other}")]);
        assert_held(&report, "name each");
        assert!(report.gate_reason.contains(&format!("process {} ", second.pid())), "{}", report.gate_reason);
        let both = format!("{other},{}", local(second.port()));
        let report = step(&registry.store(), &["--registry", &both]);
        assert_eq!(report.gate, "probe", "{both}: {}", report.gate_reason);
    }
    // As many names as processes, and all of them lead elsewhere.
    let before_second = Server::before(second.port());
    let all = [local(second.port()), before_second.url()].join(",");
    assert_held(&step(&registry.store(), &["--registry", &all]), "name each");
}

/// Kills a run that waits for the answer to what `is_it` says, which the registry did or did not do.
fn killed_when(store: &Path, is_it: fn(&Asked) -> bool, is_done: bool) {
    let root = store.to_path_buf();
    let server = Server::start(move |asked| {
        let answer = (is_done || !is_it(asked)).then(|| registry_on(&root, asked));
        answer.filter(|_| !is_it(asked))
    });
    let _ = fs::remove_file(store.join("docker/registry/v2/.regfs/registries.json"));
    let mut run = regfs(["gc", "--registry", &server.url()]).arg(store).args(TIMES).spawn().unwrap();
    wait_for("the run to get there", Duration::from_secs(60), || {
        (server.asked().iter().any(is_it) && uploads(store).len() == 1).then_some(())
    });
    run.kill().unwrap();
    run.wait().unwrap();
}

#[test]
fn what_a_killed_run_left_is_removed_by_the_next() {
    let dir = sample();
    let store = dir.path().join("store");
    let root = store.clone();
    let server = Server::start(move |asked| Some(registry_on(&root, asked)));
    let next = || {
        let report = step(&store, &["--registry", &server.url()]);
        assert_eq!(report.gate, "probe", "{}", report.gate_reason);
    };
    next();
    assert_nothing_left(&store, "after a run that nobody killed");

    killed_when(&store, |asked| asked.method == "DELETE" && asked.target.contains("uploads"), false);
    assert_eq!(uploads(&store).len(), 1);
    next();
    assert_nothing_left(&store, "after a kill before the end of the upload");

    // Nobody knows the name of this one, so it has to be at rest for a while.
    killed_when(&store, |asked| asked.method == "POST", true);
    let ours = uploads(&store)[0].clone();
    next();
    assert_eq!(uploads(&store), std::slice::from_ref(&ours), "it may be anybody's");
    let past = SystemTime::now() - Duration::from_secs(100);
    let age = |upload: &Path| {
        let started = fs::File::options().write(true).open(upload.join("startedat")).unwrap();
        started.set_modified(past).unwrap();
    };
    age(&ours);
    let note = entries(&probes(&store)).pop().unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&note).unwrap()).unwrap();
    let began = json["began"]["secs_since_epoch"].as_u64().unwrap();
    json["began"]["secs_since_epoch"] = (began - 100).into();
    fs::write(&note, json.to_string()).unwrap();
    // Those of clients: of the same moment, with a byte in it; of today; of another day.
    let others = ["busy", "young", "older"].map(|name| ours.with_file_name(name));
    for other in &others {
        fs::create_dir(other).unwrap();
        fs::write(other.join("startedat"), "").unwrap();
        fs::write(other.join("data"), if other.ends_with("busy") { "x" } else { "" }).unwrap();
    }
    age(&others[0]);
    let older = fs::File::options().write(true).open(others[2].join("startedat")).unwrap();
    older.set_modified(past - Duration::from_secs(100)).unwrap();
    next();
    let mut left: Vec<_> = others.to_vec();
    left.sort_unstable();
    assert_eq!(uploads(&store), left);
    assert!(!probes(&store).exists());
}

const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
const BASIC: &str = "Basic am9lOnNlY3JldA==";

fn token_service() -> Server {
    Server::start(|_| Some(Answer { body: br#"{"token": "t0"}"#.to_vec(), ..Answer::status(200) }))
}

/// One that answers whoever shows the token that is to be had at `realm`.
fn with_tokens(store: &Path, realm: String) -> Server {
    let store = store.to_path_buf();
    Server::start(move |asked| match asked.header("authorization") {
        Some("Bearer t0") => Some(registry_on(&store, asked)),
        _ => {
            let wanted = format!("Bearer realm=\"{realm}\",service=\"a service & more\"");
            Some(Answer::status(401).with("WWW-Authenticate", wanted))
        }
    })
}

#[test]
fn a_token_service_gets_credentials_if_it_is_on_the_host_or_was_named() {
    let dir = sample();
    let store = dir.path().join("store");
    let file = auth(dir.path(), "joe:secret\n");
    let service = token_service();
    let registry = with_tokens(&store, format!("{}/token?a=b", service.url()));
    let report = step(&store, &["--registry", &registry.url(), "--registry-auth", &file]);
    assert_eq!(report.gate, "probe", "{}", report.gate_reason);
    assert_eq!(service.authorizations(), [BASIC]);
    assert_eq!(registry.authorizations(), ["Bearer t0"], "the password is for the service");
    let asked = service.asked();
    let target = &asked.last().unwrap().target;
    assert!(
        target.starts_with("/token?a=b&service=a%20service%20%26%20more&scope=repository%3A"),
        "{target}"
    );

    // The same machine by another name is another host.
    let service = token_service();
    let realm = format!("http://localhost:{}", service.port);
    let registry = with_tokens(&store, format!("{realm}/token"));
    let url = registry.url();
    let report = step(&store, &["--registry", &url, "--registry-auth", &file]);
    assert_held(&report, &format!("realm {realm}"));
    assert!(service.asked().is_empty());
    // By the line that the message proposes, or by the config.yml given as STORE.
    let named = auth(dir.path(), &format!("joe:secret\nrealm {realm}\n"));
    let report = step(&store, &["--registry", &url, "--registry-auth", &named]);
    assert_eq!(report.gate, "probe", "{}", report.gate_reason);
    assert_eq!(service.authorizations(), [BASIC]);
    let config = dir.path().join("config.yml");
    let text = format!(
        "storage: {{filesystem: {{rootdirectory: {}}}, cache: {{blobdescriptor: inmemory}}, delete: {{enabled: true}}}}\n\
         http: {{addr: '127.0.0.1:{}'}}\nauth: {{token: {{realm: '{realm}/token'}}}}\n",
        store.to_str().unwrap(),
        registry.port
    );
    fs::write(&config, text).unwrap();
    let report = step(&config, &["--registry-auth", &file]);
    assert_eq!(report.gate, "probe", "{}", report.gate_reason);
}

#[test]
fn a_password_is_shown_to_who_asks_for_it_and_follows_no_redirect() {
    let dir = sample();
    let store = dir.path().join("store");
    let file = auth(dir.path(), "joe:secret\n");
    let root = store.clone();
    let asks = Server::start(move |asked| match asked.header("authorization") {
        Some(BASIC) => Some(registry_on(&root, asked)),
        _ => Some(Answer::status(401).with("WWW-Authenticate", "Basic realm=\"x\"")),
    });
    let report = step(&store, &["--registry", &asks.url(), "--registry-auth", &file]);
    assert_eq!(report.gate, "probe", "{}", report.gate_reason);
    assert_eq!(asks.asked()[0].header("authorization"), None);
    assert_held(&step(&store, &["--registry", &asks.url()]), "--registry-auth");

    let root = store.clone();
    let open = Server::start(move |asked| Some(registry_on(&root, asked)));
    let to = open.url();
    let sends_away = Server::start(move |asked| {
        Some(Answer::status(307).with("Location", format!("{to}{}", asked.target)))
    });
    let report = step(&store, &["--registry", &sends_away.url(), "--registry-auth", &file]);
    assert_held(&report, "sends us elsewhere");
    assert!(open.asked().is_empty());
    // One that does not ask sees nothing, either.
    let report = step(&store, &["--registry", &open.url(), "--registry-auth", &file]);
    assert_eq!(report.gate, "probe", "{}", report.gate_reason);
    assert_eq!(open.authorizations(), Vec::<String>::new());
}

/// Where a process says that it answers may be anybody.
#[test]
fn what_a_process_says_gets_no_credentials() {
    let credentials = Credentials::Basic { user: "joe".into(), password: "secret".into() };
    let access = Access { credentials, ..Access::default() };
    let ask = |url: &str, is_named: bool| {
        let client = Client::new(&[Place::new(url, is_named)], &access, Vec::new());
        client.check().and_then(|()| client.remembers(Path::new("app"), &DIGEST.parse().unwrap()))
    };
    let basic =
        Server::start(|_| Some(Answer::status(401).with("WWW-Authenticate", "Basic realm=\"harbor\"")));
    let service = token_service();
    let bearer = with_tokens(Path::new("/nowhere"), service.url());
    ask(&basic.url(), false).unwrap_err();
    assert_eq!(basic.authorizations(), Vec::<String>::new());
    ask(&bearer.url(), false).unwrap();
    assert_eq!(service.authorizations(), Vec::<String>::new());
    ask(&basic.url(), true).unwrap_err();
    ask(&bearer.url(), true).unwrap();
    assert_eq!([basic.authorizations(), service.authorizations()].concat(), [BASIC, BASIC]);
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
        let report = step(&registry.config(), &["--registry-ca", &believed.0]);
        match says {
            None => assert_eq!(report.gate, "probe", "{}: {}", served.0, report.gate_reason),
            Some(says) => assert_held(&report, says),
        }
    }
    let url = local(registry.port());
    assert_held(&step(&registry.store(), &["--registry", &url]), "write https://");
    registry.change_config_until(&|_| plain.clone(), &listens);
    let url = url.replace("http:", "https:");
    assert_held(&step(&registry.store(), &["--registry", &url]), "write http://");

    let run = |file: &str| -> Outcome {
        regfs(["gc", "--dry-run", "--registry-ca", file]).arg(registry.store()).outcome()
    };
    run("/dev/null").exits(1).says("no regular file");
    run(&as_leaf.1).exits(1).says("holds no certificate");
    run("/nowhere").exits(1).says("/nowhere");
}
