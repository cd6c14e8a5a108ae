//! A registry as a child process, with skopeo as its client: Debian's `docker-registry`, or the one whose path is in
//! `REGFS_TEST_REGISTRY`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::check::sha256;
use super::http::{Response, request};
use super::image::Image;
use super::redis::RedisServer;
use super::run::{Bounded, clean};
use super::{entries, scratch, snapshot, wait_for};

/// All the manifest types a client of today accepts.
const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// The program of the registry.
pub(crate) fn binary() -> &'static str {
    static BINARY: OnceLock<String> = OnceLock::new();
    BINARY.get_or_init(|| {
        std::env::var("REGFS_TEST_REGISTRY").unwrap_or_else(|_| "docker-registry".to_string())
    })
}

/// Whether it is of version 3, whose configuration names redis in another way.
fn is_of_version_3() -> bool {
    static IS_3: OnceLock<bool> = OnceLock::new();
    *IS_3.get_or_init(|| {
        let version = clean(binary()).arg("--version").outcome().stdout;
        version.split_whitespace().any(|word| word.trim_start_matches('v').starts_with("3."))
    })
}

/// What it remembers blobs by.
#[derive(Clone)]
pub(crate) enum Cache {
    Off,
    Inmemory,
    /// `redis` section; its address and its password.
    Redis(String, Option<&'static str>),
}

impl From<bool> for Cache {
    fn from(is_on: bool) -> Cache {
        if is_on { Cache::Inmemory } else { Cache::Off }
    }
}

impl From<&RedisServer> for Cache {
    fn from(redis: &RedisServer) -> Cache {
        Cache::Redis(redis.address(), redis.password())
    }
}

impl Cache {
    /// Below `storage`, and at the top.
    fn config(&self) -> (String, String) {
        match self {
            Cache::Off => (String::new(), String::new()),
            Cache::Inmemory => ("  cache: {blobdescriptor: inmemory}\n".into(), String::new()),
            Cache::Redis(address, password) => {
                let at = if is_of_version_3() {
                    format!("addrs: ['{address}']")
                } else {
                    // Without a pool it makes a connection for each command, and a storm runs out of ports.
                    format!("addr: '{address}', pool: {{maxidle: 16, idletimeout: 60s}}")
                };
                let password =
                    password.map_or_else(String::new, |password| format!(", password: '{password}'"));
                ("  cache: {blobdescriptor: redis}\n".into(), format!("redis: {{{at}{password}}}\n"))
            }
        }
    }
}

/// A running registry with a storage of its own; ends when dropped.
pub(crate) struct Registry {
    process: Option<Child>,
    port: u16,
    cache: Cache,
    /// Somebody else's storage, if it is not its own.
    storage: Option<PathBuf>,
    /// Variables of its environment.
    environment: Vec<(&'static str, &'static str)>,
    /// Words before its own: a program that starts it.
    launcher: Vec<String>,
    /// Goes after the process has ended.
    present: Box<dyn Send + Sync>,
    dir: TempDir,
}

/// Registries of this process, and whether one is to be the only one.
static PRESENT: (Mutex<(usize, bool)>, Condvar) = (Mutex::new((0, false)), Condvar::new());

/// Whoever lets a registry run whose configuration can't be known keeps every sweep on this machine waiting; so tests that
/// do are alone.
struct Present;

impl Present {
    fn new() -> Present {
        let (count, changed) = &PRESENT;
        changed.wait_while(count.lock().unwrap(), |(_, is_alone)| *is_alone).unwrap().0 += 1;
        Present
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        PRESENT.0.lock().unwrap().0 -= 1;
        PRESENT.1.notify_all();
    }
}

/// No other registry of this process runs until this is dropped.
struct Alone;

impl Drop for Alone {
    fn drop(&mut self) {
        PRESENT.0.lock().unwrap().1 = false;
        PRESENT.1.notify_all();
    }
}

/// Whether a registry answers at a port.
fn answers(port: u16) -> bool {
    request(port, "GET", "/v2/", &[], &[]).is_ok_and(|answer| answer.status == 200)
}

impl Registry {
    /// Starts one without the descriptor cache, so that it sees the storage as it is.
    pub(crate) fn start() -> Registry {
        Registry::start_with(false)
    }

    /// Starts one; `cache`: `true` is `cache.blobdescriptor: inmemory`.
    pub(crate) fn start_with(cache: impl Into<Cache>) -> Registry {
        Registry::start_in(scratch(), cache)
    }

    /// Starts one that keeps everything in `dir`.
    pub(crate) fn start_in(dir: TempDir, cache: impl Into<Cache>) -> Registry {
        let mut registry = Registry {
            process: None,
            port: 0,
            cache: cache.into(),
            storage: None,
            environment: Vec::new(),
            launcher: Vec::new(),
            present: Box::new(Present::new()),
            dir,
        };
        // The whole tree is there from the start, as after a first push.
        fs::create_dir_all(registry.store().join("docker/registry/v2/repositories")).unwrap();
        fs::create_dir_all(registry.store().join("docker/registry/v2/blobs")).unwrap();
        registry.restart();
        registry
    }

    /// The `rootdirectory`.
    pub(crate) fn store(&self) -> PathBuf {
        self.storage.clone().unwrap_or_else(|| self.dir.path().join("store"))
    }

    /// Where it listens, on 127.0.0.1.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Waits until no other registry of this process runs, and lets none begin before this one has ended.
    pub(crate) fn alone(&mut self) {
        self.present = Box::new(());
        let (count, changed) = &PRESENT;
        let is_taken = |state: &mut (usize, bool)| *state != (0, false);
        changed.wait_while(count.lock().unwrap(), is_taken).unwrap().1 = true;
        self.present = Box::new(Alone);
    }

    /// The process.
    pub(crate) fn pid(&self) -> u32 {
        self.process.as_ref().expect("it runs").id()
    }

    /// Starts it again with another configuration.
    pub(crate) fn change_config(&mut self, change: &dyn Fn(String) -> String) {
        self.change_config_until(change, &answers);
    }

    /// The same for one that `is_ready` has to find, by its port.
    pub(crate) fn change_config_until(
        &mut self,
        change: &dyn Fn(String) -> String,
        is_ready: &dyn Fn(u16) -> bool,
    ) {
        self.stop();
        let config = change(fs::read_to_string(self.config()).unwrap());
        fs::write(self.config(), config).unwrap();
        for _ in 0..5 {
            // The port was ours a moment ago.
            if self.spawn(is_ready) {
                return;
            }
        }
        panic!("the registry did not start: {}", fs::read_to_string(self.log()).unwrap());
    }

    /// Starts it again with a variable in its environment.
    pub(crate) fn set_variable(&mut self, name: &'static str, value: &'static str) {
        self.environment.push((name, value));
        self.restart();
    }

    /// Starts one on a storage that is there.
    pub(crate) fn start_at(storage: PathBuf, cache: impl Into<Cache>) -> Registry {
        let mut registry = Registry {
            process: None,
            port: 0,
            cache: cache.into(),
            storage: Some(storage),
            environment: Vec::new(),
            launcher: Vec::new(),
            present: Box::new(Present::new()),
            dir: scratch(),
        };
        registry.restart();
        registry
    }

    /// Another process on the same storage.
    pub(crate) fn another(&self) -> Registry {
        Registry::start_at(self.store(), self.cache.clone())
    }

    /// Its config.yml.
    pub(crate) fn config(&self) -> PathBuf {
        self.dir.path().join("config.yml")
    }

    /// A name below its directory that nothing has yet.
    pub(crate) fn fresh(&self, name: &str) -> PathBuf {
        (0..)
            .map(|number| self.dir.path().join(format!("{name}-{number}")))
            .find(|path| !path.exists())
            .expect("numbers do not end")
    }

    /// Stops it; the storage stays.
    pub(crate) fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
            wait_for("what it launched to end", Duration::from_secs(20), || {
                (!answers(self.port)).then_some(())
            });
        }
    }

    /// Starts it again by another program, which may stay.
    pub(crate) fn launch_with(&mut self, launcher: &[&str]) {
        self.stop();
        self.launcher = launcher.iter().map(ToString::to_string).collect();
        self.restart();
    }

    /// Starts it (again).
    pub(crate) fn restart(&mut self) {
        self.stop();
        // Between finding a free port and listening on it somebody else may take it.
        for _ in 0..5 {
            if self.try_start() {
                return;
            }
        }
        panic!("the registry did not start: {}", fs::read_to_string(self.log()).unwrap());
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("registry.log")
    }

    fn try_start(&mut self) -> bool {
        self.port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (cache, redis) = self.cache.config();
        let config = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage:\n  \
             filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\n{cache}  \
             maintenance: {{uploadpurging: {{enabled: false}}}}\nhttp: {{addr: '127.0.0.1:{}'}}\n{redis}",
            self.store().display(),
            self.port
        );
        fs::write(self.config(), config).unwrap();
        self.spawn(&answers)
    }

    fn spawn(&mut self, is_ready: &dyn Fn(u16) -> bool) -> bool {
        let log = fs::File::create(self.log()).unwrap();
        // setpriv: it must not outlive us however we end.
        let mut process = clean("setpriv")
            .args(["--pdeathsig", "KILL"])
            .args(&self.launcher)
            .args(if self.launcher.is_empty() { &[][..] } else { &["setpriv", "--pdeathsig", "KILL"] })
            .args([binary(), "serve"])
            .arg(self.config())
            .envs(self.environment.iter().copied())
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("run setpriv");
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(60) && process.try_wait().unwrap().is_none() {
            if is_ready(self.port) {
                self.process = Some(process);
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // It ended by itself (the port was taken) or never answered; both calls may find it gone already.
        let _ = process.kill();
        let _ = process.wait();
        false
    }

    /// One request to `/v2/<path>`.
    #[track_caller]
    pub(crate) fn api(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        let target = format!("/v2/{path}");
        request(self.port, method, &target, headers, body)
            .unwrap_or_else(|why| panic!("{method} {target}: {why}"))
    }

    /// GET of a manifest by tag or digest.
    #[track_caller]
    pub(crate) fn manifest(&self, name: &str, reference: &str) -> Response {
        self.api("GET", &format!("{name}/manifests/{reference}"), &[("Accept", ACCEPT)], &[])
    }

    /// GET of a blob.
    #[track_caller]
    pub(crate) fn blob(&self, name: &str, digest: &str) -> Response {
        self.api("GET", &format!("{name}/blobs/{digest}"), &[], &[])
    }

    /// Asserts that everything it lists pulls completely, blob by blob, and that `wanted` is among that.
    ///
    /// What is listed: each tag of each repository. `wanted` holds `<repository>:<tag>` and `<repository>@<digest>`.
    #[track_caller]
    pub(crate) fn assert_serves(&self, wanted: &BTreeSet<String>, when: &str) {
        let mut listed: BTreeSet<String> = wanted.clone();
        for name in self.names("_catalog", "repositories") {
            let tags = self.names(&format!("{name}/tags/list"), "tags");
            listed.extend(tags.iter().map(|tag| format!("{name}:{tag}")));
        }
        let mut pulled = BTreeSet::new();
        for reference in &listed {
            if let Err(why) = self.pull_everything(reference, &mut pulled) {
                panic!("{when}: {reference} does not pull: {why}");
            }
        }
    }

    /// The names in a list of the API; none where there is no such repository.
    #[track_caller]
    fn names(&self, path: &str, field: &str) -> Vec<String> {
        let answer = self.api("GET", path, &[], &[]);
        if answer.status == 404 {
            return Vec::new();
        }
        let answer: Value = serde_json::from_slice(&answer.is(200).body).unwrap();
        let names = answer[field].as_array().into_iter().flatten();
        names.map(|name| name.as_str().unwrap().to_string()).collect()
    }

    /// Pulls an image whole; why it does not pull, otherwise.
    pub(crate) fn pulls(&self, reference: &str) -> Result<(), String> {
        self.pull_everything(reference, &mut BTreeSet::new())
    }

    /// Pulls `<repository>:<tag>` or `<repository>@<digest>` with its children, config and layers; every byte is
    /// hashed. What is in `pulled` was pulled a moment ago.
    fn pull_everything(&self, reference: &str, pulled: &mut BTreeSet<String>) -> Result<(), String> {
        let (name, tag) = reference.split_once(['@', ':']).expect("a reference");
        let wanted = reference.contains('@').then_some(tag);
        let answer = self.manifest(name, tag);
        if answer.status != 200 {
            return Err(format!("the manifest: {} {}", answer.status, String::from_utf8_lossy(&answer.body)));
        }
        let digest = sha256(&answer.body);
        if digest != wanted.or(answer.header("docker-content-digest")).unwrap_or_default() {
            return Err(format!("the manifest hashes to {digest}"));
        }
        let manifest: Value = serde_json::from_slice(&answer.body).map_err(|e| e.to_string())?;
        let named = |field: &str| -> Vec<String> {
            let list = manifest[field].as_array().cloned().unwrap_or_else(|| vec![manifest[field].clone()]);
            list.iter().filter_map(|entry| entry["digest"].as_str()).map(String::from).collect()
        };
        for child in named("manifests") {
            self.pull_everything(&format!("{name}@{child}"), pulled)?;
        }
        for blob in [named("config"), named("layers")].concat() {
            if !pulled.insert(format!("{name}@{blob}")) {
                continue;
            }
            let answer = self.blob(name, &blob);
            if answer.status != 200 || sha256(&answer.body) != blob {
                return Err(format!("{blob}: {} with {} bytes", answer.status, answer.body.len()));
            }
        }
        Ok(())
    }

    /// Uploads one blob.
    #[track_caller]
    pub(crate) fn push_blob(&self, name: &str, content: &[u8]) -> String {
        let digest = sha256(content);
        let started = self.api("POST", &format!("{name}/blobs/uploads/"), &[], &[]).is(202);
        let location = started.header("location").expect("a place to upload to");
        let (_, path) = location.split_once("/v2/").expect("a location of the registry");
        let octets = [("Content-Type", "application/octet-stream")];
        self.api("PUT", &format!("{path}&digest={digest}"), &octets, content).is(201);
        digest
    }

    /// Pushes an image and all below it over HTTP, under a tag or by digest.
    #[track_caller]
    pub(crate) fn push(&self, name: &str, tag: Option<&str>, image: &Image) -> String {
        for blob in &image.blobs {
            self.push_blob(name, blob);
        }
        for child in &image.children {
            self.push(name, None, child);
        }
        let digest = image.digest();
        let target = format!("{name}/manifests/{}", tag.unwrap_or(&digest));
        self.api("PUT", &target, &[("Content-Type", image.media_type)], &image.manifest).is(201);
        digest
    }

    /// Pushes an image as people do: `skopeo copy … docker://…/<reference>`.
    #[track_caller]
    pub(crate) fn skopeo_push(&self, reference: &str, image: &Image) -> String {
        let dir = self.fresh("push");
        image.write_dir(&dir);
        skopeo_copy()
            .arg("--dest-tls-verify=false")
            .arg(format!("dir:{}", dir.display()))
            .arg(self.url(reference))
            .outcome()
            .exits(0);
        image.digest()
    }

    /// Pulls with skopeo, which verifies every digest: name → bytes of the files it wrote.
    #[track_caller]
    pub(crate) fn pull(&self, reference: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let dir = self.fresh("pull");
        skopeo_copy()
            .arg("--src-tls-verify=false")
            .arg(self.url(reference))
            .arg(format!("dir:{}", dir.display()))
            .outcome()
            .exits(0);
        files(&dir)
    }

    /// Copies an OCI layout with skopeo, which verifies every digest: name → bytes of the files it wrote.
    #[track_caller]
    pub(crate) fn copy_layout(&self, layout: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
        let dir = self.fresh("copy");
        skopeo_copy()
            .arg(format!("oci:{}", layout.display()))
            .arg(format!("dir:{}", dir.display()))
            .outcome()
            .exits(0);
        files(&dir)
    }

    /// Copies an image from another registry, as people do.
    #[track_caller]
    pub(crate) fn copy_from(&self, other: &Registry, reference: &str) {
        skopeo_copy()
            .args(["--src-tls-verify=false", "--dest-tls-verify=false"])
            .arg(other.url(reference))
            .arg(self.url(reference))
            .outcome()
            .exits(0);
    }

    fn url(&self, reference: &str) -> String {
        format!("docker://127.0.0.1:{}/{reference}", self.port)
    }

    /// What its own garbage collector would delete: digests of blobs. Changes nothing.
    #[track_caller]
    pub(crate) fn stock_garbage(&self) -> BTreeSet<String> {
        stock_garbage(&self.config())
    }

    /// What its own garbage collector prints in a dry run; `flags`: `-m` for untagged manifests.
    #[track_caller]
    pub(crate) fn stock_report(&self, flags: &[&str]) -> String {
        let mut collect = clean(binary());
        collect.args(["garbage-collect", "--dry-run"]).args(flags).arg(self.config());
        collect.outcome().exits(0).stdout
    }

    /// The storage below `docker/registry/v2`, but for our own `.regfs`.
    pub(crate) fn snapshot(&self) -> BTreeMap<PathBuf, String> {
        let mut all = snapshot(&self.store().join("docker/registry/v2"));
        all.retain(|path, _| !path.starts_with(".regfs"));
        all
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may have died by itself; there is nobody to tell while dropping.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// What the garbage collector of the registry with this config.yml would delete: digests of blobs. Changes nothing.
#[track_caller]
pub(crate) fn stock_garbage(config: &Path) -> BTreeSet<String> {
    let outcome = clean(binary()).args(["garbage-collect", "--dry-run"]).arg(config).outcome().exits(0);
    let eligible =
        outcome.stdout.lines().filter_map(|line| line.strip_prefix("blob eligible for deletion: "));
    let blobs: BTreeSet<String> = eligible.map(|digest| digest.trim().to_string()).collect();
    let summary = format!("{} blobs and 0 manifests eligible for deletion", blobs.len());
    assert!(outcome.stdout.contains(&summary), "no {summary:?} in {outcome}");
    blobs
}

/// The program of the registry.
pub(crate) fn program() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // A path of its own stays what it is.
    let mut places = std::env::split_paths(&path).map(|dir| dir.join(binary()));
    places.find(|place| place.is_file()).expect("it is installed")
}

/// `skopeo copy` of everything, byte for byte.
fn skopeo_copy() -> Command {
    let mut command = clean("skopeo");
    command.args(["--insecure-policy", "copy", "--quiet", "--all", "--preserve-digests"]);
    command
}

fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    entries(dir)
        .into_iter()
        .map(|path| (path.file_name().unwrap().into(), fs::read(&path).unwrap()))
        .collect()
}
