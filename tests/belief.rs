//! Which processes are believed when they look like a registry of the storage: whatever they name as their configuration,
//! whoever runs them, whatever launched them. And what a sweep told of the storage is told everywhere alike.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::beside::{garbage_in, step_with};
use common::gc::Report;
use common::image::{Image, layer};
use common::mount::Mount;
use common::registry::Registry;
use common::run::{Bounded, Outcome, clean, regfs};
use common::server::{Answer, Server};
use common::store::Store;
use common::{NOBODY, have, scratch};
use serde_json::Value;
use tempfile::TempDir;

/// Tests with processes that look like registries of any storage are alone.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a process is called, its words and its variables.
type Shape<'a> = (&'a str, &'a [&'a str], &'a [(&'a str, &'a str)]);

/// A directory with a shell in it whose program regfs takes for a registry.
struct Stage {
    dir: TempDir,
    _alone: MutexGuard<'static, ()>,
}

/// A process of that program, which waits for its end.
struct Fake(Child);

impl Stage {
    fn new() -> Stage {
        let (alone, dir) = (alone(), scratch());
        let mut program = fs::read("/bin/sh").unwrap();
        // The package by which registries are known; a program runs with anything behind its end.
        program.extend_from_slice(b"registry/storage/driver/filesystem");
        let stage = Stage { dir, _alone: alone };
        fs::write(stage.path("program"), program).unwrap();
        fs::set_permissions(stage.path("program"), fs::Permissions::from_mode(0o755)).unwrap();
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A configuration with that in it, older than whoever is started next.
    fn config(&self, text: &str) -> PathBuf {
        let path = self.path("config.yml");
        fs::write(&path, format!("version: 0.1\n{text}\n")).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        path
    }

    /// Starts a process as `user`, called `name`, with these words and variables.
    fn start(&self, user: u32, name: &str, words: &[&str], variables: &[(&str, &str)]) -> Fake {
        let mut command = clean(self.path("program"));
        command.arg0(name).args(["-c", "read end"]).args(words).envs(variables.iter().copied());
        command.uid(user).gid(user).current_dir("/").stdin(Stdio::piped());
        Fake(command.spawn().unwrap())
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Without what earlier runs saw of registries, and with no memory of so much as 600 MB.
fn gc(store: &Store, words: &[&str]) -> Outcome {
    let _ = fs::remove_file(store.path(".regfs/registries.json"));
    let mut command = clean("sh");
    command.args(["-c", "ulimit -v 600000; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_regfs"), "gc"]);
    command.arg(store.root()).args(["--threads", "2"]).args(words).outcome()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn filesystem(store: &Store) -> String {
    format!("storage: {{filesystem: {{rootdirectory: {}}}}}", store.root().display())
}

#[test]
fn whatever_a_registry_names_as_its_configuration_is_not_waited_for() {
    if !have(&["root", "mkfifo"]) {
        return;
    }
    let (stage, store) = (Stage::new(), Store::with_garbage());
    clean("mkfifo").arg(stage.path("pipe.yml")).outcome().exits(0);
    fs::File::create(stage.path("huge.yml")).unwrap().set_len(2 << 30).unwrap();
    fs::create_dir(stage.path("directory.yml")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", stage.path("zero.yml")).unwrap();
    std::os::unix::fs::symlink("loop.yml", stage.path("loop.yml")).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    for name in ["pipe.yml", "huge.yml", "directory.yml", "zero.yml", "loop.yml", "none.yml"] {
        let path = stage.path(name);
        let variable = [("REGISTRY_CONFIGURATION_PATH", text(&path))];
        let (words, variables): (&[&str], &[_]) = match name {
            "pipe.yml" => (&[], &variable),
            _ => (&["serve", text(&path)], &[]),
        };
        let fake = stage.start(0, "registry", words, variables);
        let report = Report::parse(&gc(&store, &["--dry-run", "--json"]).exits(0));
        assert_eq!(report.gate, "stop", "{name}: {}", report.gate_reason);
        drop(fake);
        let _nobody = stage.start(NOBODY, "registry", words, variables);
        gc(&store, &["--dry-run", "--registry-stopped"]).exits(0);
    }
}

#[test]
fn who_cannot_write_to_the_storage_neither_opens_nor_closes_the_gate() {
    if !have(&["root"]) {
        return;
    }
    let (stage, store) = (Stage::new(), Store::with_garbage());
    let (root, plain) = (store.root().to_path_buf(), filesystem(&store));
    let config = stage.config(&plain);
    let elsewhere = stage.path("elsewhere.yml");
    fs::write(&elsewhere, plain.replace(text(&root), "/nowhere")).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let of_storage = [("REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY", text(&root))];
    let of_config = [("REGISTRY_CONFIGURATION_PATH", text(&config))];
    let shapes: [Shape<'_>; 5] = [
        ("registry", &["serve", text(&config)], &[]),
        ("/usr/bin/docker-registry", &["serve", text(&config)], &[]),
        ("regfs", &["serve", text(&config)], &[]),
        ("registry", &["serve", text(&elsewhere)], &of_storage),
        ("registry", &[], &of_config),
    ];
    for (name, words, variables) in shapes {
        let fake = stage.start(NOBODY, name, words, variables);
        let report = Report::parse(&gc(&store, &["--dry-run", "--json"]).exits(0));
        assert_eq!(report.gate, "stop", "{name} {words:?} {variables:?}");
        assert!(!report.gate_reason.contains(&format!("process {}", fake.0.id())), "{}", report.gate_reason);
        let outcome = gc(&store, &["--dry-run", "--registry-stopped", "--verbose"]).exits(0);
        outcome.says("can't write to this storage").says(&format!("process {} (", fake.0.id()));
        drop(fake);
        let _root = stage.start(0, name, words, variables);
        let report = Report::parse(&gc(&store, &["--dry-run", "--json"]).exits(0));
        assert_eq!(report.gate, "off", "{name} {words:?} {variables:?}: {}", report.gate_reason);
        gc(&store, &["--registry-stopped"]).exits(1).says("serves this storage");
    }
}

#[test]
fn where_a_process_says_it_answers_is_asked_only_if_it_could_write_and_never_gets_credentials() {
    if !have(&["root"]) {
        return;
    }
    let (stage, store) = (Stage::new(), Store::with_garbage());
    let thief =
        Server::start(|_| Some(Answer::status(401).with("WWW-Authenticate", "Basic realm=\"registry\"")));
    let storage = format!(
        "storage: {{cache: {{blobdescriptor: inmemory}}, delete: {{enabled: true}}, filesystem: {{rootdirectory: {}}}}}",
        store.root().display()
    );
    let config = stage.config(&format!("{storage}\nhttp: {{addr: '127.0.0.1:{}'}}", thief.port));
    let auth = stage.path("auth");
    fs::write(&auth, "joe:secret").unwrap();
    for (user, is_asked) in [(NOBODY, false), (0, true)] {
        let _fake = stage.start(user, "registry", &["serve", text(&config)], &[]);
        gc(&store, &["--grace", "0", "--drain", "0", "--registry-auth", text(&auth)]).exits_one_of(&[0, 3]);
        assert_eq!(!thief.asked().is_empty(), is_asked, "user {user}");
        assert_eq!(thief.authorizations(), Vec::<String>::new(), "user {user}");
    }
}

#[test]
fn what_a_process_says_of_the_keeper_of_tags_refuses() {
    if !have(&["root"]) {
        return;
    }
    let (stage, store) = (Stage::new(), Store::with_garbage());
    let harbor = "auth: {htpasswd: {realm: harbor-registry-basic-realm, path: /etc/registry/passwd}}";
    let database = "database: {enabled: true, host: localhost}";
    let sure = ["--grace", "0", "--allow-large"];
    for (section, says, words, else_takes) in [
        (harbor, "in Harbor", &["--untagged"][..], true),
        (harbor, "in Harbor", &["--referrers", "orphans"], true),
        (database, "metadata database", &[], false),
    ] {
        let config = stage.config(&format!("{}\n{section}", filesystem(&store)));
        let fake = stage.start(0, "registry", &["serve", text(&config)], &[]);
        gc(&store, &[&sure[..], words].concat()).exits(1).says(says);
        let dry_run = gc(&store, &[&sure[..], words, &["--dry-run"]].concat()).exits(0);
        assert!(dry_run.stdout.contains(says), "{dry_run}");
        let plain = gc(&store, &sure);
        assert_eq!(plain.code != Some(1), else_takes, "{plain}");
        drop(fake);
        // Somebody who can't write to the storage makes nobody refuse.
        let _nobody = stage.start(NOBODY, "registry", &["serve", text(&config)], &[]);
        gc(&store, &[&sure[..], words, &["--dry-run", "--registry-stopped"]].concat()).exits(0);
        assert!(!gc(&store, &[&sure[..], words, &["--dry-run"]].concat()).stdout.contains(says));
    }
}

#[test]
fn a_launcher_that_stays_is_no_registry() {
    if !have(&["docker-registry", "setpriv", "root"]) {
        return;
    }
    let _alone = alone();
    let mut registry = Registry::start_with(true);
    garbage_in(&registry);
    let wrapper = registry.fresh("registry-wrapper");
    fs::write(&wrapper, "#!/bin/sh\n\"$@\"\nexit 1\n").unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    let launchers: [&[&str]; 8] = [
        &["timeout", "1000"],
        &["sh", "-c", "\"$@\"; true", "sh"],
        &["env", "REGISTRY_LOG_LEVEL=error"],
        &["nice", "-n", "1"],
        &["setsid", "--fork", "--wait"],
        &["strace", "-f", "-qq", "-e", "trace=none", "-o", "/dev/null"],
        &[text(&wrapper)],
        &["timeout", "1000", "setpriv", "--pdeathsig", "KILL", "sh", "-c", "\"$@\"; true", "registry"],
    ];
    for launcher in launchers.into_iter().filter(|launcher| have(&launcher[..1])) {
        registry.launch_with(launcher);
        let url = format!("http://127.0.0.1:{}", registry.port());
        let report = step_with(&registry.store(), &["--registry", &url]);
        assert_eq!(report.gate, "probe", "{launcher:?}: {}", report.gate_reason);
        let report = step_with(&registry.store(), &[]);
        assert_eq!(report.gate, "probe", "{launcher:?}: {}", report.gate_reason);
        let outcome = regfs(["gc", "--registry-stopped"]).arg(registry.store()).outcome().exits(1);
        outcome.says("serves this storage");
    }
}

#[test]
fn a_configuration_that_was_rendered_before_the_registry_took_over_is_believed() {
    if !have(&["docker-registry", "setpriv", "root"]) {
        return;
    }
    let _alone = alone();
    let mut registry = Registry::start();
    garbage_in(&registry);
    let config = registry.config();
    let render = "sleep 0.2; cp \"$0\" \"$0.template\"; cp \"$0.template\" \"$0\"; exec \"$@\"";
    for _ in 0..2 {
        registry.launch_with(&["sh", "-c", render, text(&config)]);
        let report = step_with(&registry.store(), &[]);
        assert_eq!(report.gate, "off", "{}", report.gate_reason);
    }
    // One that was rendered afterwards is not.
    fs::copy(registry.fresh("x").with_file_name("config.yml.template"), &config).unwrap();
    let report = step_with(&registry.store(), &[]);
    assert_ne!(report.gate, "off", "{}", report.gate_reason);
}

/// The date of the next step of garbage in a state, wherever it is told.
fn dates(mount: &Mount, store: &Store, state: &str, words: &[&str]) -> Vec<(&'static str, String)> {
    let next = |totals: &Value| {
        let total = totals.as_array().unwrap().iter().find(|total| total["state"] == state);
        total.map(|total| total["next"].to_string()).unwrap_or_default().replace('"', "")
    };
    let json = |text: &str| -> Value { serde_json::from_str(text).unwrap() };
    let dry_run = json(&gc(store, &[words, &["--dry-run", "--json"]].concat()).exits(0).stdout);
    let date = next(&dry_run["states"]);
    let table = mount.read("reachability/unreachable/state");
    let rows =
        table.lines().map(|line| line.split('\t').collect::<Vec<_>>()).filter(|row| row.contains(&state));
    let in_table = rows.filter_map(|row| row.get(4).map(ToString::to_string)).min().unwrap_or_default();
    mount.tell("gc", "dry-run").unwrap();
    let report = mount.read("control/gc");
    vec![
        ("status", next(&json(&mount.read("control/status"))["garbage"])),
        ("state", in_table),
        ("control/gc", if report.contains(&date) { date.clone() } else { report }),
        ("command line", date),
    ]
}

#[test]
fn dates_are_the_same_everywhere_after_a_command_line_swept_beside_a_mount() {
    if !have(&["root", "fuse"]) {
        return;
    }
    let (stage, store) = (Stage::new(), Store::with_garbage());
    let config = stage.config(&filesystem(&store));
    let _registry = stage.start(0, "registry", &["serve", text(&config)], &[]);
    let words = ["--grace", "4h", "--drain", "3h"];
    // The mount, and what goes by its words, waits longer than the sweeps on the command line.
    for (state, sweep) in [("candidate", words), ("fenced", ["--grace", "0", "--drain", "0"])] {
        let mount = Mount::with(store.root(), &words);
        common::wait_for("the sweep to get there", Duration::from_secs(60), || {
            let report = Report::parse(&gc(&store, &[&sweep[..], &["--json"]].concat()).exits(0));
            report.states.iter().any(|total| total.state == state).then_some(())
        });
        mount.tell("refresh", "").unwrap();
        let dates = dates(&mount, &store, state, &words);
        assert!(dates[0].1.ends_with('Z'), "{state}: {dates:?}");
        assert!(dates.iter().all(|(_, date)| *date == dates[0].1), "{state}: {dates:?}");
        mount.unmount();
    }
}

#[test]
fn what_a_mount_holds_back_stands_in_its_status_and_its_log() {
    if !have(&["root", "fuse"]) {
        return;
    }
    let (_stage, store) = (Stage::new(), Store::with_garbage());
    for number in 0..30 {
        let name = format!("untagged {number}");
        store.push("app", None, &Image::oci(&name, &[layer("c", &name)]));
    }
    let mount = Mount::with(store.root(), &["--grace", "0"]);
    let sweep = mount.tell("gc", "sweep untagged registry-stopped");
    assert_eq!(sweep.unwrap_err().raw_os_error(), Some(libc::EAGAIN));
    for file in ["control/status", "control/log", "control/gc"] {
        let told = mount.read(file);
        assert!(told.contains("of 32 manifests") && told.contains("add allow-large"), "{file}: {told}");
    }
    mount.unmount();
    // No registry is known, so a schedule takes nothing.
    let mount = Mount::with(store.root(), &["--grace", "0", "--drain", "0", "--sweep-every", "1s"]);
    common::wait_for("a sweep that is held back", Duration::from_secs(60), || {
        let [status, log] = ["control/status", "control/log"].map(|file| mount.read(file));
        (status.contains("nothing was taken") && log.contains("nothing was taken")).then_some(())
    });
    mount.unmount();
    // A registry that has a database.
    let locks = store.root().join("docker/registry/lockfiles");
    fs::create_dir_all(&locks).unwrap();
    fs::write(locks.join("database-in-use"), "").unwrap();
    let mount = Mount::with(store.root(), &["--grace", "0", "--drain", "0", "--sweep-every", "1s"]);
    common::wait_for("a sweep that is refused", Duration::from_secs(60), || {
        let told = ["control/status", "control/log"].map(|file| mount.read(file));
        let is_told = |line: &str| line.contains("metadata database");
        let error = told[0].lines().find(|line| line.contains("\"last_error\""))?;
        let log = told[1].lines().find(|line| line.contains("--sweep-every"))?;
        (is_told(error) && is_told(log)).then_some(())
    });
    mount.unmount();
}
