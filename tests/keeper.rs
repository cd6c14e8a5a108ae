//! Storages whose tags are kept in a database, GitLab's or Harbor's: what is refused, by which word of which file, and what is
//! said. And the commands that messages propose: each works as it is printed.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use common::mount::Mount;
use common::run::{Bounded, Outcome, regfs, sh};
use common::store::Store;
use common::{have, scratch, snapshot};
use regfs::advice::{Advice, OPTIONS, Place};

fn lock(store: &Store, name: &str) {
    let directory = store.root().join("docker/registry/lockfiles");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join(name), b"").unwrap();
}

fn config(directory: &Path, store: &Store, rest: &str) -> PathBuf {
    let file = directory.join("config.yml");
    let root = store.root().display();
    fs::write(&file, format!("version: 0.1\nstorage: {{filesystem: {{rootdirectory: {root}}}}}\n{rest}\n"))
        .unwrap();
    file
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

const EPERM: i32 = 1;
const TAKE_ALL: [&str; 4] = ["--grace", "0", "--registry-stopped", "--force"];

#[test]
fn nothing_of_gitlabs_database_registry_is_taken_whatever_is_forced() {
    let database = "database: {enabled: true, host: localhost}";
    let prefer = "database: {enabled: prefer}";
    // Lock files, configuration, variable; whether it is refused.
    /// Lock files, what config.yml says, a variable, and whether the database keeps the tags.
    type Case<'a> = (&'a [&'a str], Option<&'a str>, Option<&'a str>, bool);
    let cases: [Case<'_>; 9] = [
        (&["database-in-use"], None, None, true),
        (&["database-in-use", "filesystem-in-use"], None, None, true),
        (&["database-in-use"], Some("database: {enabled: false}"), None, true),
        (&["filesystem-in-use"], None, None, false),
        (&[], Some(database), None, true),
        (&["filesystem-in-use"], Some(database), None, true),
        (&[], Some(prefer), None, true),
        (&["filesystem-in-use"], Some(prefer), None, false),
        (&[], Some("log: {level: error}"), Some("true"), true),
    ];
    for (locks, rest, variable, is_refused) in cases {
        let (store, dir) = (Store::with_garbage(), scratch());
        locks.iter().for_each(|name| lock(&store, name));
        let argument =
            rest.map_or_else(|| store.root().to_path_buf(), |rest| config(dir.path(), &store, rest));
        let run = |words: &[&str]| {
            let mut command = regfs([words[0], text(&argument)]);
            command.args(&words[1..]);
            variable.map(|value| command.env("REGISTRY_DATABASE_ENABLED", value));
            command.outcome()
        };
        // What was learnt of registries may be written down beside it.
        let images = || {
            ["blobs", "repositories"]
                .map(|part| snapshot(&store.root().join("docker/registry/v2").join(part)))
        };
        let before = images();
        let dry_run = run(&[&["gc", "--dry-run"], &TAKE_ALL[..]].concat()).exits(0);
        let sweep = run(&[&["gc"], &TAKE_ALL[..]].concat());
        if !is_refused {
            assert!(sweep.exits(0).stdout.contains("took "), "{locks:?} {rest:?}");
            continue;
        }
        assert!(
            dry_run.stdout.starts_with("note: ") && dry_run.stdout.contains("metadata database"),
            "{dry_run}"
        );
        assert!(!dry_run.stdout.contains("TO FREE") && !dry_run.stdout.contains("next:"), "{dry_run}");
        sweep.exits(1).says("Delete in GitLab");
        run(&["trash", "purge", "--all", "--registry-stopped", "--force"]).exits(1).says("metadata database");
        run(&[&["gc", "--repair", "--now"], &TAKE_ALL[..]].concat()).exits(1);
        assert!(before == images(), "{locks:?} {rest:?}: nothing was changed");
    }
}

#[test]
fn of_harbors_registry_what_nothing_leads_to_goes_and_nothing_else() {
    for rest in [
        "auth: {htpasswd: {realm: harbor-registry-basic-realm, path: /etc/registry/passwd}}",
        "notifications: {endpoints: [{name: harbor, url: http://core:8080/service/notifications}]}",
    ] {
        let (store, dir) = (Store::with_garbage(), scratch());
        let file = config(dir.path(), &store, rest);
        let gc = |words: &[&str]| regfs(["gc", text(&file)]).args(TAKE_ALL).args(words).outcome();
        gc(&["--untagged"]).exits(1).says("in Harbor");
        gc(&["--referrers", "orphans"]).exits(1).says("in Harbor");
        assert!(gc(&["--untagged", "--dry-run"]).exits(0).stdout.starts_with("note: "));
        assert!(gc(&[]).exits(0).stdout.contains("took 1 blob"), "the garbage");
    }
}

#[test]
fn a_mount_of_such_a_storage_shows_everything_and_changes_nothing() {
    if !have(&["fuse"]) {
        return;
    }
    let (store, dir) = (Store::with_garbage(), scratch());
    let file = config(dir.path(), &store, "auth: {htpasswd: {realm: harbor-registry-basic-realm}}");
    let mount = Mount::with(&file, &[]);
    let told = |what: &str| {
        for command in [
            "rm images/app/_tags/1",
            "cp -P images/app/_tags/1 images/app/_tags/2",
            "mv images/app/_tags/1 images/app/_tags/2",
            "mkdir images/new",
            "rmdir images/app",
        ] {
            let outcome = sh(mount.point(), command).outcome();
            assert_ne!(outcome.code, Some(0), "{command}: {outcome}");
            assert!(outcome.stderr.contains("not permitted"), "{command}: {outcome}");
        }
        let sweep = fs::write(mount.path("control/gc"), "sweep untagged grace=0 registry-stopped force");
        assert_eq!(sweep.unwrap_err().raw_os_error(), Some(EPERM));
        let log = mount.read("control/log");
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(what)).collect();
        for action in ["rm", "tag", "mv", "mkdir", "rmdir", "command"] {
            let is_there = lines.iter().any(|line| line.contains(&format!("\"action\":\"{action}\"")));
            assert!(is_there, "{action}: {log}");
        }
        assert!(mount.read("control/gc").contains(what), "{}", mount.read("control/gc"));
    };
    told("in Harbor");
    assert!(mount.read("control/status").contains("\"metadata\": \"harbor\""));
    // The registry is migrated while we look.
    lock(&store, "database-in-use");
    told("Delete in GitLab");
    let sweep = fs::write(mount.path("control/gc"), "sweep grace=0 registry-stopped force");
    assert_eq!(sweep.unwrap_err().raw_os_error(), Some(EPERM));
    assert!(mount.read("control/status").contains("\"metadata\": \"database\""));
    assert_eq!(mount.list("images/app/_tags"), ["1"]);
}

#[test]
fn every_command_that_a_message_proposes_works_as_it_is_printed() {
    let dir = scratch();
    // A name that a shell would take apart.
    let root = dir.path().join("it's my registry");
    regfs(["sample"]).arg(&root).outcome().exits(0);
    let digest = "sha256:437d09ab";
    let regfs_is_there = format!("regfs() {{ '{}' \"$@\"; }}; ", env!("CARGO_BIN_EXE_regfs"));
    let take = || {
        regfs(["gc"]).arg(&root).args(TAKE_ALL).outcome().exits(0);
        let listed = regfs(["trash"]).arg(&root).args(["list", "--json"]).outcome().exits(0);
        let listed: serde_json::Value = serde_json::from_str(&listed.stdout).unwrap();
        listed[0]["id"].as_str().unwrap().to_string()
    };
    let proposed = |id: &str| {
        [
            Advice::Trash,
            Advice::DryRun,
            Advice::Why(digest.to_string()),
            Advice::Undo(id.to_string()),
            Advice::Repair,
            Advice::PurgeAll,
        ]
    };
    let id = take();
    for advice in proposed(&id) {
        let printed = Place::CommandLine(&root).say(&advice.to_string());
        assert_eq!(printed, advice.at(Place::CommandLine(&root)));
        // 3: it was understood, and a registry of which nothing is known held it back.
        sh(dir.path(), &format!("{regfs_is_there}{printed}")).outcome().exits_one_of(&[0, 3]);
    }
    for option in OPTIONS {
        let flag = Place::CommandLine(&root).say(&format!("{{+{option}}}"));
        let needs = if flag == "--force" || flag == "--cache-emptied" { " --registry-stopped" } else { "" };
        let command =
            format!("{regfs_is_there}regfs gc '{}' --dry-run {flag}{needs}", dir.path().join("x").display());
        let outcome = sh(dir.path(), &command).outcome();
        assert_eq!(outcome.code, Some(1), "{flag} is understood, and the store is not there: {outcome}");
    }
    if !have(&["fuse"]) {
        return;
    }
    let id = take();
    let mount = Mount::of(&root);
    for advice in proposed(&id) {
        let printed = Place::ControlFile.say(&advice.to_string());
        let outcome = sh(mount.point(), &printed).outcome();
        let is_held_back = outcome.stderr.contains("temporarily unavailable");
        assert!(outcome.code == Some(0) || is_held_back || matches!(advice, Advice::Why(_)), "{outcome}");
    }
    for option in OPTIONS.iter().filter(|option| !["ignore-damaged", "verbose"].contains(option)) {
        let word = Place::ControlFile.say(&format!("{{+{option}}}"));
        let needs = if word == "force" || word == "cache-emptied" { "registry-stopped " } else { "" };
        sh(mount.point(), &format!("echo 'dry-run {needs}{word}' > control/gc")).outcome().exits(0);
    }
}

/// What stands between two marks in a text.
fn between<'a>(text: &'a str, before: &str, after: &str) -> &'a str {
    let (_, rest) = text.split_once(before).unwrap_or_else(|| panic!("{before:?} in {text:?}"));
    rest.split_once(after).map_or(rest, |(command, _)| command)
}

#[test]
fn what_to_type_about_files_of_regfs_works_as_it_is_printed() {
    let dir = scratch();
    let root = dir.path().join("it's my registry");
    regfs(["sample"]).arg(&root).outcome().exits(0);
    let own = |name: &str| root.join("docker/registry/v2/.regfs").join(name);
    let run = |command: &str| {
        let line = format!("regfs() {{ '{}' \"$@\"; }}; {command}", env!("CARGO_BIN_EXE_regfs"));
        sh(dir.path(), &line).outcome().exits(0);
    };
    let gc = || regfs(["gc"]).arg(&root).args(["--registry-stopped", "--force", "--json"]).outcome();
    let clock = |outcome: &Outcome| -> serde_json::Value {
        serde_json::from_str::<serde_json::Value>(&outcome.stdout).unwrap()["clock"].clone()
    };
    // All that was seen of the time is three hours ago, as after a pause of the machine.
    assert!(clock(&gc().exits(0)).is_null());
    let ago = SystemTime::now() - Duration::from_secs(3 * 3600);
    let mut seen: serde_json::Value = serde_json::from_slice(&fs::read(own("clock")).unwrap()).unwrap();
    let time = humantime::format_rfc3339_millis(ago).to_string();
    seen["written"]["time"] = time.clone().into();
    seen["seen"][0]["time"] = time.into();
    fs::write(own("clock"), seen.to_string()).unwrap();
    fs::File::options().write(true).open(own("clock")).unwrap().set_modified(ago).unwrap();
    let outcome = gc().exits(0);
    let told = clock(&outcome).as_str().unwrap_or_default().to_string();
    assert!(told.contains("the clock is 2h 59m") || told.contains("the clock is 3h"), "{outcome}");
    run(between(&told, "run: ", "\n"));
    assert!(clock(&gc().exits(0)).is_null());
    fs::write(own("registries.json"), "{").unwrap();
    let outcome = gc();
    run(between(&outcome.stderr, "run `", "`"));
    assert!(!own("registries.json").exists(), "{outcome}");
}

#[test]
fn what_a_config_said_once_counts_when_the_directory_is_given() {
    let (store, dir) = (Store::with_garbage(), scratch());
    let file = config(dir.path(), &store, "auth: {htpasswd: {realm: harbor-registry-basic-realm}}");
    regfs(["gc", text(&file)]).outcome().exits_one_of(&[0, 3]);
    regfs(["gc"]).arg(store.root()).args(TAKE_ALL).arg("--untagged").outcome().exits(1).says("in Harbor");
}
