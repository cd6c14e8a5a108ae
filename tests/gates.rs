//! What a sweep may believe of registries, and what comes of it when one fails: each of these once lost an image, or let
//! garbage lie for ever.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use common::beside::{A_STEP, TIMES, garbage_in, image, in_state, push, step_with};
use common::check::{blob_path, sha256};
use common::gc::{Report, transactions};
use common::have;
use common::http::request;
use common::image::Image;
use common::mount::Mount;
use common::registry::Registry;
use common::run::{Bounded, Outcome, clean, regfs};

const NEEDS: &[&str] = &["docker-registry", "setpriv"];
/// The digest of the layer of an image.
fn layer_of(image: &Image) -> String {
    sha256(&image.blobs[1])
}

/// A registry with an image that stays and one that was deleted.
fn garbage(cache: bool) -> (Registry, Image) {
    let registry = Registry::start_with(cache);
    let gone = garbage_in(&registry);
    (registry, gone)
}

fn data_of(registry: &Registry, digest: &str) -> PathBuf {
    registry.store().join("docker/registry/v2").join(blob_path(digest))
}

/// `regfs gc` that was told that no registry runs, without being told to believe it.
fn stopped(store: &Path) -> Outcome {
    regfs(["gc"]).arg(store).args(TIMES).arg("--registry-stopped").outcome()
}

/// Passes requests on to a registry, and answers some of them itself.
struct Proxy {
    port: u16,
    is_over: Arc<AtomicBool>,
}

impl Proxy {
    /// `answer` says with which status instead of the registry, for a method and a path.
    fn of(registry: &Registry, answer: impl Fn(&str, &str) -> Option<u16> + Send + 'static) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (port, to) = (listener.local_addr().unwrap().port(), registry.port());
        let is_over = Arc::new(AtomicBool::new(false));
        let over = is_over.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if over.load(SeqCst) {
                    return;
                }
                // A client that went away is nobody's business.
                let _ = serve(stream, to, &answer);
            }
        });
        Proxy { port, is_over }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.is_over.store(true, SeqCst);
        // So that it looks.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

/// One request of one connection.
fn serve(mut stream: TcpStream, to: u16, answer: &dyn Fn(&str, &str) -> Option<u16>) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut lines = BufReader::new(stream.try_clone()?);
    let (mut first, mut length) = (String::new(), 0);
    lines.read_line(&mut first)?;
    loop {
        let mut line = String::new();
        lines.read_line(&mut line)?;
        match line.trim_end().split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse().unwrap_or(0);
            }
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    lines.read_exact(&mut body)?;
    let mut words = first.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (status, headers) = match answer(method, path) {
        Some(status) => (status, String::new()),
        None => {
            let answer = request(to, method, path, &[], &body)?;
            let header = |name: &str| answer.header(name).map(|value| format!("{name}: {value}\r\n"));
            let headers = ["location", "docker-upload-uuid"].into_iter().filter_map(header).collect();
            (answer.status, headers)
        }
    };
    write!(stream, "HTTP/1.1 {status} -\r\n{headers}Content-Length: 0\r\nConnection: close\r\n\r\n")
}

/// The program of a registry under another name, with that configuration.
struct Lookalike(Child);

impl Lookalike {
    fn start(name: &Path, config: &Path) -> Lookalike {
        // By another process: what this one has open for writing, a child of another thread could keep from being run.
        clean("cp").arg(common::registry::program()).arg(name).outcome().exits(0);
        let mut command = clean("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(name).arg("serve").arg(config);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let program = format!("/proc/{}/exe", child.id());
        common::wait_for("the process to begin", Duration::from_secs(20), || {
            fs::read_link(&program).is_ok_and(|program| program == name).then_some(())
        });
        Lookalike(child)
    }
}

impl Drop for Lookalike {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A DELETE that fails leaves a registry that remembers: the blob waits until it was told.
#[test]
fn a_registry_that_fails_once_in_the_fence_is_told_later() {
    if !have(NEEDS) {
        return;
    }
    let (mut registry, gone) = garbage(true);
    let deletes = AtomicUsize::new(0);
    // The first two ask whether it deletes, in each of the first two runs.
    let proxy = Proxy::of(&registry, move |method, path| {
        let is_of_blob =
            method == "DELETE" && path.contains("/blobs/sha256:") && !path.contains("sha256:000");
        (is_of_blob && deletes.fetch_add(1, SeqCst) == 0).then_some(503)
    });
    let url = proxy.url();
    let words = ["--registry", &url];
    step_with(&registry.store(), &words);
    std::thread::sleep(A_STEP);
    let fence = regfs(["gc"]).arg(registry.store()).args(TIMES).args(words).arg("--json").outcome().exits(3);
    assert!(Report::parse(&fence).failures[0].to_string().contains("503"), "{fence}");
    for _ in 0..8 {
        step_with(&registry.store(), &words);
    }
    assert!(!data_of(&registry, &layer_of(&gone)).exists());
    push(&registry, "app", "again", &gone);
    step_with(&registry.store(), &words);
    registry.restart();
    registry.pull("app:again");
}

/// Two processes with a memory each: one forgets by itself, and the directory that tells of it stays until the other has
/// been asked.
#[test]
fn a_blob_that_was_deleted_through_one_registry_is_asked_for_at_the_other() {
    if !have(NEEDS) {
        return;
    }
    let (mut registry, gone) = garbage(true);
    let mut other = registry.another();
    for blob in &gone.blobs {
        other.blob("app", &sha256(blob)).is(200);
    }
    registry.api("DELETE", &format!("app/blobs/{}", layer_of(&gone)), &[], &[]).is(202);
    let urls = format!("http://127.0.0.1:{},http://127.0.0.1:{}", registry.port(), other.port());
    // Both of them, or nothing goes.
    let one = format!("http://127.0.0.1:{}", registry.port());
    let report = step_with(&registry.store(), &["--registry", &one]);
    assert!(report.gate == "stop" && report.gate_reason.contains("name each"), "{}", report.gate_reason);
    for _ in 0..8 {
        step_with(&registry.store(), &["--registry", &urls]);
    }
    assert!(!data_of(&registry, &layer_of(&gone)).exists());
    push(&other, "app", "again", &gone);
    step_with(&registry.store(), &["--registry", &urls]);
    for one in [&mut registry, &mut other] {
        one.restart();
        one.pull("app:again");
    }
}

#[test]
fn what_rm_took_is_not_purged_by_hand_while_a_registry_may_remember_it() {
    if !have(&[NEEDS, &["fuse", "root"]].concat()) {
        return;
    }
    let mut registry = Registry::start_with(true);
    registry.push("app", Some("stays"), &image("stays"));
    let gone = image("gone");
    registry.push("gone", Some("1"), &gone);
    let mount = Mount::with(&registry.config(), &TIMES);
    fs::remove_dir_all(mount.path("images/gone")).unwrap();
    let refused = mount.tell("trash", "purge").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EAGAIN), "{refused}");
    assert!(mount.read("control/trash").contains("kept"), "{}", mount.read("control/trash"));
    mount.unmount();
    let purge = || regfs(["trash"]).arg(registry.config()).args(["purge", "--all"]).outcome();
    assert!(purge().exits(3).stdout.contains("a registry may remember"));
    assert_eq!(transactions(&registry.store()).len(), 1);
    for _ in 0..6 {
        step_with(&registry.config(), &[]);
    }
    push(&registry, "gone", "again", &gone);
    step_with(&registry.config(), &[]);
    registry.restart();
    registry.pull("gone:again");
    // Stopped, it remembers nothing.
    registry.stop();
    let words = ["purge", "--all", "--registry-stopped"];
    regfs(["trash"]).arg(registry.config()).args(words).outcome().exits(0);
    assert_eq!(transactions(&registry.store()), Vec::<String>::new());
}

/// The second time a registry is told to forget what `rm` took, that may have been pushed again.
#[test]
fn nobody_is_told_to_forget_what_is_there_again() {
    if !have(&[NEEDS, &["fuse", "root"]].concat()) {
        return;
    }
    let (mut registry, _) = garbage(true);
    let one = image("one");
    registry.push("gone", Some("1"), &one);
    let mount = Mount::with(&registry.config(), &TIMES);
    fs::remove_dir_all(mount.path("images/gone")).unwrap();
    mount.unmount();
    // With uploads of all of it, so that links are there again.
    registry.push("gone", Some("1"), &one);
    for _ in 0..6 {
        let report = step_with(&registry.config(), &[]);
        assert!(report.restored.is_empty(), "a link was removed and came back: {:?}", report.restored);
        registry.pulls("gone:1").unwrap();
    }
    registry.restart();
    registry.pull("gone:1");
}

/// A registry forgets a manifest by a DELETE of the blob, and that means the layer, too, where one has the same bytes.
#[test]
fn an_image_whose_layer_is_a_manifest_that_rm_took_stays_whole() {
    if !have(&[NEEDS, &["fuse", "root"]].concat()) {
        return;
    }
    let mut registry = Registry::start_with(true);
    let one = image("one");
    registry.push("app", Some("1"), &one);
    let mut holder = image("holder");
    let digest = layer_of(&holder);
    let text = String::from_utf8(holder.manifest.clone()).unwrap();
    let text = text.replace(&digest, &one.digest());
    let text = text
        .replace(&format!("\"size\":{}", holder.blobs[1].len()), &format!("\"size\":{}", one.manifest.len()));
    (holder.blobs[1], holder.manifest) = (one.manifest.clone(), text.into_bytes());
    registry.push("app", Some("holder"), &holder);
    let mount = Mount::with(&registry.config(), &TIMES);
    mount.rm(&format!("images/app/_manifests/sha256/{}", one.hex()));
    std::thread::sleep(Duration::from_millis(1500));
    mount.unmount();
    for _ in 0..3 {
        step_with(&registry.config(), &[]);
    }
    registry.restart();
    registry.pulls("app:holder").unwrap();
}

/// What a registry reads as JSON and we do not may still be a manifest, which it does not write again while it remembers.
#[test]
fn a_manifest_that_only_a_registry_can_read_stays_beside_it() {
    if !have(NEEDS) {
        return;
    }
    for odd in
        [&b"\"annotations\":{\"x\":\"\xff\"}"[..], b"\"n\":1e999", b"\"annotations\":{\"x\":\"\\ud800\"}"]
    {
        let mut registry = Registry::start_with(true);
        registry.push("app", Some("stays"), &image("stays"));
        let mut one = image("one");
        one.manifest.pop();
        one.manifest.extend([b",", odd, b"}"].concat());
        push(&registry, "app", "1", &one);
        registry.api("DELETE", &format!("app/manifests/{}", one.digest()), &[], &[]).is(202);
        for _ in 0..5 {
            step_with(&registry.config(), &[]);
        }
        push(&registry, "app", "1", &one);
        step_with(&registry.config(), &[]);
        registry.restart();
        let bytes = registry.manifest("app", "1").is(200).body;
        assert!(bytes == one.manifest, "{odd:?}");
        for blob in &one.blobs {
            registry.blob("app", &sha256(blob)).is(200);
        }
    }
}

#[test]
fn a_config_that_was_put_in_place_after_the_start_is_not_believed() {
    if !have(NEEDS) {
        return;
    }
    let (mut registry, gone) = garbage(true);
    registry.alone();
    let older = registry.fresh("older");
    let text = fs::read_to_string(registry.config()).unwrap();
    fs::write(&older, text.replace("  cache: {blobdescriptor: inmemory}\n", "")).unwrap();
    let long_ago = fs::File::options().write(true).open(&older).unwrap();
    long_ago.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    fs::rename(&older, registry.config()).unwrap();
    for _ in 0..4 {
        // It is asked: what it remembers is not known any more.
        assert_eq!(step_with(&registry.store(), &[]).gate, "probe");
    }
    push(&registry, "app", "again", &gone);
    step_with(&registry.store(), &[]);
    registry.pulls("app:again").unwrap();
    // One that names another storage by now may be that of this one.
    let text = fs::read_to_string(registry.config()).unwrap();
    let other = registry.fresh("other");
    fs::write(registry.config(), text.replace(registry.store().to_str().unwrap(), other.to_str().unwrap()))
        .unwrap();
    stopped(&registry.store()).exits(1).says("was changed after it began");
}

#[test]
fn variables_turn_a_cache_on() {
    if !have(NEEDS) {
        return;
    }
    let (mut registry, _) = garbage(false);
    assert_eq!(step_with(&registry.store(), &[]).gate, "off");
    registry.set_variable("REGISTRY_STORAGE_CACHE_LAYERINFO", "inmemory");
    assert_eq!(step_with(&registry.store(), &[]).gate, "probe");
    registry.set_variable("REGISTRY_STORAGE_CACHE", "{}");
    assert_eq!(step_with(&registry.store(), &[]).gate, "probe", "the longer name wins");
}

#[test]
fn a_registry_by_another_name_or_with_another_way_to_the_storage_is_seen() {
    if !have(NEEDS) {
        return;
    }
    let (mut registry, _) = garbage(true);
    registry.stop();
    stopped(&registry.store()).exits(0);
    // At a port of its own: one that finds its port taken ends at once.
    let any_port = |of: &Registry| {
        let text = fs::read_to_string(of.config()).unwrap();
        text.replace(&format!("127.0.0.1:{}", of.port()), "127.0.0.1:0")
    };
    let text = any_port(&registry);
    let configured = |name: &str, root: &Path| {
        let path = registry.fresh(name);
        fs::write(&path, text.replace(registry.store().to_str().unwrap(), root.to_str().unwrap())).unwrap();
        path
    };
    let seen = |name: &str, config: &Path| {
        let lookalike = Lookalike::start(&registry.fresh(name), config);
        stopped(&registry.store()).exits(1).says("serves this storage");
        drop(lookalike);
        stopped(&registry.store()).exits(0);
    };
    let config = configured("any-port", &registry.store());
    seen("registry_DO_NOT_USE_GC", &config);
    seen("distd", &config);
    // By a symlink.
    let link = registry.fresh("link");
    std::os::unix::fs::symlink(registry.store(), &link).unwrap();
    seen("registry", &configured("by-link", &link));
    // With the same `docker/registry/v2` in another directory.
    let elsewhere = registry.fresh("elsewhere");
    fs::create_dir_all(elsewhere.join("docker/registry")).unwrap();
    std::os::unix::fs::symlink(
        registry.store().join("docker/registry/v2"),
        elsewhere.join("docker/registry/v2"),
    )
    .unwrap();
    seen("registry", &configured("elsewhere", &elsewhere));
    // Another storage is none of our business.
    let other = Registry::start();
    let config = registry.fresh("other");
    fs::write(&config, any_port(&other)).unwrap();
    let lookalike = Lookalike::start(&registry.fresh("registry"), &config);
    stopped(&registry.store()).exits(0);
    drop(lookalike);
}

#[test]
fn a_registry_that_calls_itself_by_a_name_that_leads_nowhere_is_asked_all_the_same() {
    if !have(NEEDS) {
        return;
    }
    let (mut registry, _) = garbage(true);
    registry.change_config(&|text| text.replace("http: {", "http: {host: 'http://nowhere.invalid:5000', "));
    let report = step_with(&registry.config(), &[]);
    assert_eq!(report.gate, "probe", "{}", report.gate_reason);
    let uploads = registry.store().join("docker/registry/v2/repositories/app/_uploads");
    assert_eq!(common::entries(&uploads), Vec::<PathBuf>::new());
}

#[test]
fn a_registry_that_answers_nonsense_takes_nothing_and_the_report_says_what() {
    if !have(NEEDS) {
        return;
    }
    let (registry, gone) = garbage(true);
    for (status, says) in
        [(500, "500"), (401, "--registry-auth"), (403, "--registry-auth"), (302, "302"), (200, "200")]
    {
        let proxy = Proxy::of(&registry, move |method, _| (method != "GET").then_some(status));
        let report = step_with(&registry.store(), &["--registry", &proxy.url()]);
        assert!(
            report.gate == "stop" && report.gate_reason.contains(says),
            "{status}: {}",
            report.gate_reason
        );
    }
    regfs(["gc", "--registry", "http://joe:secret@127.0.0.1:5000"]).arg(registry.store()).outcome().exits(2);
    for _ in 0..3 {
        step_with(&registry.store(), &["--registry", "http://127.0.0.1:1"]);
    }
    assert!(data_of(&registry, &layer_of(&gone)).exists());
}

#[test]
fn a_stage_that_is_damaged_ends_no_run_and_is_reported() {
    if !have(NEEDS) {
        return;
    }
    let (registry, _) = garbage(false);
    step_with(&registry.store(), &[]);
    let fenced = step_with(&registry.store(), &[]);
    assert_eq!(in_state(&fenced, "fenced"), 3);
    let id = common::gc::text(&fenced.transaction.expect("what is fenced is in a transaction"));
    let stage = registry.store().join("docker/registry/v2/.regfs/trash").join(&id).join("stage.json");
    let good = fs::read_to_string(&stage).unwrap();
    for bad in [good.replace("\"secs\":0", &format!("\"secs\":{}", u64::MAX)), "{".to_string(), String::new()]
    {
        fs::write(&stage, &bad).unwrap();
        let outcome = regfs(["gc"]).arg(registry.store()).args(TIMES).outcome().exits_one_of(&[0, 3]);
        assert!(!outcome.stderr.contains("panicked"), "{outcome}");
    }
    let outcome = regfs(["gc"]).arg(registry.store()).args(TIMES).outcome().exits(3);
    assert!(outcome.stdout.contains(&id), "{outcome}");
    regfs(["trash"]).arg(registry.store()).args(["undo", &id]).outcome().exits(0);
    regfs(["gc"]).arg(registry.store()).args(TIMES).outcome().exits(0);
}
