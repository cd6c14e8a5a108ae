//! The command line: what goes to stdout, what to stderr, and the exit codes 0 done, 1 failed, 2 usage.
//!
//! (3, finished with failures: `damage.rs`, where things fail.)

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use common::check::{Live, Roots, blobs, sha256};
use common::gc::{Report, gc, transactions};
use common::image::{Image, layer};
use common::run::{Bounded, Outcome, regfs, sh};
use common::store::{Store, put};
use common::{difference, have, scratch, snapshot, walk};
use serde_json::Value;

const GARBAGE: &[u8] = b"garbage";

/// One live image and one blob of garbage.
fn store() -> Store {
    let store = Store::new();
    store.push("app", Some("1"), &image());
    store.put_blob(GARBAGE);
    store
}

fn image() -> Image {
    Image::oci("app", &[layer("app", "1")])
}

fn run(words: &[&str]) -> Outcome {
    regfs(words).outcome()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn help_goes_to_stdout() {
    for words in [
        &["--help"][..],
        &["help"],
        &["mount", "--help"],
        &["umount", "--help"],
        &["gc", "--help"],
        &["trash", "--help"],
        &["why", "--help"],
        &["sample", "--help"],
    ] {
        let outcome = run(words).exits(0);
        assert!(outcome.stdout.contains("Usage: regfs") && outcome.stderr.is_empty(), "{outcome}");
    }
    let all = run(&["--help"]).exits(0).stdout;
    for command in ["mount", "umount", "gc", "trash", "why", "sample"] {
        assert!(all.contains(command), "{command} is not in {all}");
    }
    let version = run(&["--version"]).exits(0);
    assert_eq!(version.stdout.trim_end(), format!("regfs {}", env!("CARGO_PKG_VERSION")));
}

#[test]
fn wrong_usage_exits_with_2() {
    let store = store();
    let before = snapshot(store.root());
    let root = text(store.root());
    for words in [
        &[][..],
        &["sweep"],
        &["gc"],
        &["gc", root, "--frobnicate"],
        &["gc", root, "--grace", "banana"],
        &["gc", root, "--grace", "-1h"],
        &["gc", root, "--keep", "soon"],
        &["mount", root],
        &["umount"],
        &["trash", root],
        &["trash", root, "undo"],
        &["trash", root, "burn"],
        &["why", root],
        &["why", root, "app:1", "--grace", "banana"],
        &["sample"],
    ] {
        let outcome = run(words).exits(2);
        assert!(outcome.stdout.is_empty() && !outcome.stderr.is_empty(), "{outcome}");
    }
    assert_eq!(snapshot(store.root()), before);
}

#[test]
fn what_is_no_registry_is_refused_and_left_alone() {
    let dir = scratch();
    put(&dir.path().join("important/file"), b"not ours");
    put(&dir.path().join("plain.txt"), b"neither a directory nor a config");
    let before = snapshot(dir.path());
    let point = scratch();
    for store in [dir.path().to_path_buf(), dir.path().join("nothing here")] {
        run(&["gc", text(&store)]).exits(1).says("docker/registry/v2").says(text(&store));
        run(&["gc", text(&store), "--dry-run", "--json"]).exits(1).says("docker/registry/v2");
        run(&["trash", text(&store), "list"]).exits(1).says("docker/registry/v2");
        run(&["mount", text(&store), text(point.path())]).exits(1).says("docker/registry/v2");
    }
    run(&["gc", text(&dir.path().join("plain.txt"))]).exits(1).says("plain.txt");
    assert_eq!(snapshot(dir.path()), before);
}

#[test]
fn why_says_what_keeps_a_blob_and_what_is_garbage() {
    let store = store();
    let before = snapshot(store.root());
    let root = text(store.root());
    let manifest = image().digest();
    let kept = run(&["why", root, "app:1"]).exits(0);
    assert!(kept.stdout.contains("app:1 (tag, pushed ") && kept.stdout.contains(&manifest), "{kept}");
    let json: Value =
        serde_json::from_str(&run(&["why", root, &manifest, "--json"]).exits(0).stdout).unwrap();
    assert_eq!((&json["kept"], &json["chains"][0]["tag"]), (&true.into(), &"1".into()), "{json}");
    let garbage = run(&["why", root, &sha256(GARBAGE)[..19], "--grace", "0"]).exits(0);
    assert!(
        garbage.stdout.contains("nothing leads to it") && garbage.stdout.contains("--dry-run"),
        "{garbage}"
    );
    run(&["why", root, &sha256(b"nobody's")]).exits(1).says("neither a blob nor anything that names it");
    run(&["why", root, "app"]).exits(1).says("<repository>:<tag>");
    run(&["why", root, "app:2"]).exits(1).says("app");
    assert_eq!(snapshot(store.root()), before);
}

/// A configuration that names `root`, in the words of `text`.
fn config(dir: &Path, text: &str, root: &Path) -> PathBuf {
    let path = dir.join("config.yml");
    put(&path, text.replace("ROOT", root.to_str().unwrap()).as_bytes());
    path
}

#[test]
fn the_registrys_configuration_is_a_store() {
    let (store, dir) = (store(), scratch());
    for text in [
        "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: ROOT\n",
        "version: 0.1\nlog: {level: error}\nstorage:\n  cache:\n    blobdescriptor: inmemory\n  filesystem:\n    \
         rootdirectory: 'ROOT'\n    maxthreads: 100\n  delete: {enabled: yes}\nhttp: {addr: ':5000'}\n",
        "version: 0.1\nstorage: {delete: {enabled: true}, filesystem: {rootdirectory: \"ROOT\"}, tag: {}, \
         maintenance: {readonly: {enabled: false}}}\n",
    ] {
        let file = config(dir.path(), text, store.root());
        let report = gc(&file, &["--dry-run", "--grace", "0"]);
        assert_eq!(report.taken_blobs(), BTreeSet::from([sha256(GARBAGE)]), "{text}");
    }
}

#[test]
fn the_environment_overrides_the_configuration() {
    let (store, empty, dir) = (store(), Store::new(), scratch());
    let file =
        config(dir.path(), "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: ROOT\n", empty.root());
    let outcome =
        regfs(["gc", text(&file), "--dry-run", "--grace", "0", "--json", "--registry-stopped", "--force"])
            .env("REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY", store.root())
            .outcome()
            .exits(0);
    assert_eq!(Report::parse(&outcome).taken_blobs(), BTreeSet::from([sha256(GARBAGE)]));
}

#[test]
fn another_storage_driver_is_refused_by_name() {
    let (store, dir) = (store(), scratch());
    for driver in ["s3", "azure", "gcs", "inmemory", "swift"] {
        let text =
            format!("version: 0.1\nstorage:\n  {driver}:\n    bucket: images\n  delete: {{enabled: true}}\n");
        let file = config(dir.path(), &text, store.root());
        run(&["gc", file.to_str().unwrap(), "--dry-run"]).exits(1).says(driver);
    }
    for broken in
        ["", "storage: [", "version: 0.1\n", "storage: {}\n", "storage:\n  filesystem: {rootdirectory: 7\n"]
    {
        let file = config(dir.path(), broken, store.root());
        run(&["gc", file.to_str().unwrap(), "--dry-run"]).exits(1).says("config.yml");
    }
}

#[test]
fn a_dry_run_changes_nothing_at_all() {
    let store = store();
    // Not even what a snapshot leaves out: the times of directories.
    let times = || -> Vec<_> {
        let paths = walk(store.root()).into_iter();
        paths
            .map(|path| {
                (fs::metadata(&path).unwrap().mtime_nsec(), fs::metadata(&path).unwrap().ctime_nsec())
            })
            .collect()
    };
    let before = (snapshot(store.root()), times());
    let report = gc(store.root(), &["--dry-run", "--grace", "0"]);
    assert_eq!(report.mode, "dry-run");
    assert_eq!(report.taken_blobs(), BTreeSet::from([sha256(GARBAGE)]));
    assert_eq!(
        (report.freed_bytes, report.quarantined_bytes),
        (0, GARBAGE.len() as u64),
        "it would take so much"
    );
    assert!(report.transaction.is_none());
    run(&["gc", text(store.root()), "--dry-run", "--untagged", "--now"]).exits(0);
    run(&["trash", text(store.root()), "list"]).exits(0);
    assert!((snapshot(store.root()), times()) == before);
}

#[test]
fn the_text_report_is_short_and_lists_all_on_request() {
    let store = store();
    let arguments = ["gc", text(store.root()), "--dry-run", "--grace", "0", "--registry-stopped", "--force"];
    let line = format!("blob {} {} B: ", sha256(GARBAGE), GARBAGE.len());
    let outcome = run(&arguments).exits(0);
    assert!(!outcome.stdout.contains(&line) && outcome.stderr.is_empty(), "{outcome}");
    let expected =
        "a sweep would take 1 blob (7 B)\nnext: run this without --dry-run to move it to the trash\n";
    assert!(outcome.stdout.ends_with(expected), "{outcome}");
    let outcome = regfs(arguments).arg("--verbose").outcome().exits(0);
    assert!(outcome.stdout.contains(&line), "{outcome}");
    let report = gc(store.root(), &["--dry-run", "--grace", "0"]);
    let [taken] = &report.taken[..] else { panic!("{report:?}") };
    assert_eq!((&*taken.kind, taken.bytes), ("blob", GARBAGE.len() as u64));
    assert!(!taken.reason.is_empty() && taken.path.contains("blobs/sha256/"), "{report:?}");
}

/// The JSON report of a dry run with these flags.
fn json(store: &Store, flags: &[&str]) -> Value {
    let stopped = ["--dry-run", "--format", "json", "--registry-stopped", "--force"];
    let outcome = regfs(["gc"]).arg(store.root()).args(stopped).args(flags).outcome();
    serde_json::from_str(&outcome.exits(0).stdout).unwrap()
}

/// The usage of a repository in a JSON report; `None` for what belongs to none.
fn usage<'a>(report: &'a Value, name: Option<&str>) -> &'a Value {
    let all = report["by_repository"].as_array().unwrap();
    all.iter().find(|r| r["repository"].as_str() == name).unwrap_or_else(|| panic!("{name:?}: {report}"))
}

/// Bytes of these blobs.
fn sizes<'a>(blobs: impl IntoIterator<Item = &'a Vec<u8>>) -> u64 {
    blobs.into_iter().map(|b| b.len() as u64).sum()
}

#[test]
fn a_blob_counts_for_each_repository_and_once_in_all() {
    let store = store();
    let image = image();
    let whole = sizes(&image.blobs) + image.manifest.len() as u64;
    store.push("copy", Some("1"), &image);
    // Garbage that a repository has a link to is that repository's, too.
    let linked = store.put_blob(b"linked garbage");
    put(&store.layer_link("copy", &linked), linked.as_bytes());
    // A manifest without a tag is its repository's, with what only it names.
    let gone = Image::oci("gone", &[layer("gone", "1")]);
    store.push("copy", None, &gone);

    let report = json(&store, &["--grace", "0"]);
    let gone_bytes = sizes(&gone.blobs) + gone.manifest.len() as u64;
    assert_eq!(report["kept_bytes"], whole + gone_bytes);
    assert_eq!(usage(&report, Some("app"))["kept_bytes"], whole);
    assert_eq!(usage(&report, Some("copy"))["kept_bytes"], whole + gone_bytes);
    assert_eq!(usage(&report, Some("app"))["taken_bytes"], 0);
    assert_eq!(usage(&report, Some("copy"))["taken_bytes"], 14);
    assert_eq!(usage(&report, None)["taken_bytes"], GARBAGE.len());

    let report = json(&store, &["--grace", "0", "--untagged"]);
    assert_eq!(report["kept_bytes"], whole);
    assert_eq!(usage(&report, Some("copy"))["kept_bytes"], whole);
    assert_eq!(usage(&report, Some("copy"))["taken_bytes"], 14 + gone_bytes);
    assert_eq!(usage(&report, Some("copy"))["manifests_taken"], 1);

    let report = json(&store, &["--grace", "1h"]);
    assert_eq!(usage(&report, Some("copy"))["young_bytes"], 14);
    assert_eq!(report["young_bytes"], 14 + GARBAGE.len());
    assert_eq!(report["grace_seconds"], 3600);
}

#[test]
fn a_problem_says_how_much_it_holds_back() {
    let store = store();
    let lost = Image::oci("lost", &[layer("lost", "1")]);
    store.push("broken", Some("1"), &lost);
    fs::write(store.blob(&lost.digest()), b"{").unwrap();
    // Nothing but the damage keeps the config and the layer; the damaged bytes themselves have a revision.
    let report = json(&store, &["--grace", "0"]);
    let [problem] = &report["problems"].as_array().unwrap()[..] else { panic!("{report}") };
    assert_eq!(problem["held_back_bytes"], sizes(&lost.blobs), "{report}");
    let told = run(&["gc", text(store.root()), "--dry-run"]).exits(0).stdout;
    assert!(told.starts_with("1 problem:") && told.contains("; that holds back "), "{told}");
    // What something else needs as well is not held back.
    store.push("whole", Some("1"), &Image::oci("lost", &[layer("lost", "1"), layer("more", "1")]));
    let report = json(&store, &["--grace", "0"]);
    assert!(report["problems"][0]["held_back_bytes"].as_u64().unwrap() < sizes(&lost.blobs), "{report}");
}

#[test]
fn the_document_has_the_fields_of_the_json_report() {
    let store = store();
    store.push("app", None, &Image::oci("gone", &[layer("gone", "1")]));
    store.push("other", None, &Image::oci("other", &[layer("other", "1")]));
    put(&store.repository("app", "_manifests/tags/odd/current/link"), b"no digest");
    let mut report = json(&store, &["--grace", "0", "--untagged"]);
    for young in ["kept_young", "kept_young_manifests"] {
        report[young] = json(&store, &["--grace", "1h", "--untagged"])[young].clone();
    }
    fs::remove_dir_all(store.repository("app", "_layers")).unwrap();
    report["repairs"] = json(&store, &["--thorough", "--grace", "0"])["repairs"].clone();
    let mut printed = BTreeSet::new();
    for (name, value) in report.as_object().unwrap() {
        printed.insert(name.clone());
        let entry = value.as_array().and_then(|list| list.first()).and_then(Value::as_object);
        printed.extend(entry.into_iter().flatten().map(|(field, _)| format!("{name}[].{field}")));
    }
    let document = include_str!("../docs/report.md");
    let rows = document.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    let documented: BTreeSet<String> = rows.map(|(name, _)| name.to_string()).collect();
    assert_eq!(printed, documented);
    assert_eq!(report["schema"], 1);
}

#[test]
fn a_run_that_waits_ends_with_its_first_signal() {
    let store = store();
    let lock = store.path(".regfs/lock");
    put(&lock, b"");
    let held = fs::File::open(&lock).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let before = snapshot(store.root());
    let line = format!(
        "'{}' gc '{}' --grace 0 & pid=$!; \
         until grep -q 'SigCgt:.*[2367abef]$' /proc/$pid/status; do sleep 0.01; done; kill -INT $pid; wait $pid",
        env!("CARGO_BIN_EXE_regfs"),
        text(store.root())
    );
    let outcome = sh(Path::new("/"), &line).outcome().exits(1);
    assert_eq!((&*outcome.stdout, &*outcome.stderr), ("", "regfs: stopped before anything was taken\n"));
    assert_eq!(snapshot(store.root()), before);
}

#[test]
fn a_sweep_moves_to_the_trash_and_now_frees() {
    let store = store();
    let live = Live::of(store.root(), Roots::Revisions);
    let report = gc(store.root(), &["--grace", "0"]);
    assert_eq!(report.mode, "sweep");
    assert_eq!((report.freed_bytes, report.quarantined_bytes), (0, GARBAGE.len() as u64));
    assert!(!store.blob(&sha256(GARBAGE)).exists());
    assert_eq!(transactions(store.root()).len(), 1);

    store.put_blob(b"more garbage");
    let report = gc(store.root(), &["--grace", "0", "--now"]);
    assert!(report.freed_bytes >= b"more garbage".len() as u64, "{report:?}");
    assert_eq!(blobs(store.root()), live.blobs);
    live.assert_intact();
}

#[test]
fn the_trash_is_listed_undone_and_purged() {
    let store = store();
    let root = text(store.root());
    let before = snapshot(&store.path("blobs"));
    assert_eq!(transactions(store.root()), [""; 0]);
    run(&["trash", root, "list"]).exits(0);

    gc(store.root(), &["--grace", "0"]);
    let outcome = run(&["trash", root, "list", "--json"]).exits(0);
    let list: Value = serde_json::from_str(&outcome.stdout).unwrap();
    let entry = &list[0];
    for field in ["id", "time", "command", "reason", "uid", "pid", "files", "bytes"] {
        assert!(!entry[field].is_null(), "no {field} in {entry}");
    }
    assert_eq!(entry["bytes"], GARBAGE.len());
    let id = common::gc::text(&entry["id"]);
    assert!(run(&["trash", root, "list"]).exits(0).stdout.contains(&id));

    run(&["trash", root, "undo", &id]).exits(0);
    let after = snapshot(&store.path("blobs"));
    assert!(after == before, "{:?}", difference(&before, &after));
    run(&["trash", root, "undo", &id]).exits(1).says(&id);

    gc(store.root(), &["--grace", "0"]);
    let [id] = &transactions(store.root())[..] else { panic!("one transaction") };
    // Too young for this.
    run(&["trash", root, "purge", "--older", "7d"]).exits(0);
    assert_eq!(transactions(store.root()), std::slice::from_ref(id));
    run(&["trash", root, "purge", id, "--registry-stopped", "--force"]).exits(0);
    assert_eq!(transactions(store.root()), [""; 0]);
    run(&["trash", root, "undo", id]).exits(1);
    run(&["trash", root, "purge", "no-such-transaction"]).exits(1).says("no-such-transaction");
    run(&["trash", root, "undo", "../../../../etc"]).exits_one_of(&[1, 2]);
    assert_eq!(blobs(store.root()), image().digests());
}

#[test]
fn the_whole_trash_is_purged_only_on_request() {
    let store = store();
    gc(store.root(), &["--grace", "0"]);
    let kept = transactions(store.root());
    // What `purge $ID` and `purge "$ID"` are when the variable is empty.
    for words in
        [&["purge"][..], &["purge", ""], &["purge", &kept[0], "--all"], &["purge", "--all", "--older", "0"]]
    {
        regfs(["trash", text(store.root())]).args(words).outcome().exits(2);
        assert_eq!(transactions(store.root()), kept);
    }
    run(&["trash", text(store.root()), "purge"]).exits(2).says("--all");
    run(&["trash", text(store.root()), "purge", "--all", "--registry-stopped", "--force"]).exits(0);
    assert_eq!(transactions(store.root()), [""; 0]);
    let left: Vec<PathBuf> =
        walk(&store.path(".regfs")).into_iter().filter(|path| path.ends_with("data")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn an_undo_never_replaces_what_is_there() {
    // Somebody else's bytes at its place, also as many of them: neither they nor ours may be lost.
    for newer in [&b"something newer"[..], b"garbled"] {
        let store = store();
        gc(store.root(), &["--grace", "0"]);
        let [id] = &transactions(store.root())[..] else { panic!("one transaction") };
        put(&store.blob(&sha256(GARBAGE)), newer);
        run(&["trash", text(store.root()), "undo", id]).exits_one_of(&[0, 1, 3]);
        assert_eq!(fs::read(store.blob(&sha256(GARBAGE))).unwrap(), newer);
        let is_ours = |path: PathBuf| path.is_file() && fs::read(path).unwrap() == GARBAGE;
        assert!(walk(&store.path(".regfs")).into_iter().any(is_ours), "the bytes in the trash are gone");
    }
}

#[test]
fn a_closed_pipe_is_a_quiet_end() {
    let store = store();
    for number in 0..2000 {
        store.put_blob(format!("garbage {number}").as_bytes());
    }
    let line = format!(
        "'{}' gc '{}' --dry-run --grace 0 | head -n 1",
        env!("CARGO_BIN_EXE_regfs"),
        text(store.root())
    );
    let outcome = sh(Path::new("/"), &line).outcome().exits(0);
    assert_eq!(outcome.stderr, "", "{outcome}");
}

#[test]
fn the_sample_is_a_registry_and_always_the_same() {
    let (one, two) = (scratch(), scratch());
    let (one, two) = (one.path().join("sample"), two.path().join("sample"));
    run(&["sample", text(&one)]).exits(0);
    run(&["sample", text(&two)]).exits(0);
    let content = |root: &Path| -> Vec<(PathBuf, Vec<u8>)> {
        let files = walk(root).into_iter().filter(|path| path.is_file());
        files.map(|path| (path.strip_prefix(root).unwrap().into(), fs::read(&path).unwrap())).collect()
    };
    assert!(content(&one) == content(&two), "two samples differ");

    // What it is to hold: a store with live images, garbage and a broken tag.
    let live = Live::of(&one, Roots::Revisions);
    assert!(live.blobs.len() > 5 && live.blobs.len() < blobs(&one).len());
    assert!(!live.problems.is_empty(), "a broken tag");
    let report = gc(&one, &["--grace", "0", "--now"]);
    assert!(!report.taken_blobs().is_empty(), "{report:?}");
    live.assert_intact();

    // Not over somebody's files.
    let before = snapshot(&two);
    run(&["sample", text(&two)]).exits(1).says(text(&two));
    assert_eq!(snapshot(&two), before);
}

#[test]
fn mount_says_what_is_wrong_before_it_leaves_the_terminal() {
    if !have(&["fuse"]) {
        return;
    }
    let (store, dir) = (store(), scratch());
    let missing = dir.path().join("missing");
    run(&["mount", text(store.root()), text(&missing)]).exits(1).says(text(&missing));
    put(&dir.path().join("file"), b"");
    let file = dir.path().join("file");
    run(&["mount", text(store.root()), text(&file)]).exits(1).says(text(&file));
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    run(&["umount", text(&empty)]).exits(1).says(text(&empty));
    run(&["umount", text(&missing)]).exits(1).says(text(&missing));
    assert!(!common::mount::is_mounted(&empty));
}

#[test]
fn mount_works_with_a_configuration_and_relative_paths() {
    if !have(&["fuse"]) {
        return;
    }
    let (store, dir) = (store(), scratch());
    config(dir.path(), "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: ROOT\n", store.root());
    let mount = common::mount::Mount::with(&dir.path().join("config.yml"), &["--grace", "1h"]);
    assert_eq!(mount.list("images"), ["app"]);
    // The grace period of the mount is that of its sweeps.
    mount.order("gc", "sweep now");
    assert!(store.blob(&sha256(GARBAGE)).exists());
    regfs(["umount"]).arg(mount.point()).outcome().exits(0);

    let (parent, name) = (mount.point().parent().unwrap(), mount.point().file_name().unwrap());
    regfs(["mount"]).arg(store.root()).arg(name).current_dir(parent).outcome().exits(0);
    assert_eq!(mount.list("images"), ["app"]);
    regfs(["umount"]).arg(name).current_dir(parent).outcome().exits(0);
    assert!(!common::mount::is_mounted(mount.point()));
}

#[test]
fn a_mount_in_the_foreground_ends_with_its_signal() {
    if !have(&["fuse", "timeout"]) {
        return;
    }
    let store = store();
    let mount = common::mount::Mount::of(store.root());
    regfs(["umount"]).arg(mount.point()).outcome().exits(0);
    // It serves until it is told to end, and ending is unmounting.
    let line = format!(
        "'{0}' mount --foreground '{1}' '{2}' & pid=$!; \
         until ls '{2}/images' 2> /dev/null | grep -q app; do kill -0 $pid || exit 9; sleep 0.1; done; \
         kill -TERM $pid; wait $pid",
        env!("CARGO_BIN_EXE_regfs"),
        text(store.root()),
        text(mount.point())
    );
    let outcome = sh(Path::new("/"), &line).outcome();
    assert_eq!(outcome.code, Some(0), "{outcome}");
    assert!(!common::mount::is_mounted(mount.point()));
}

#[test]
fn a_process_whose_time_is_faked_takes_nothing_early() {
    if !have(&["faketime"]) {
        return;
    }
    let store = store();
    let root = text(store.root());
    for jump in ["+20h", "+365d", "+20y", "-10y"] {
        let words = format!(
            "faketime -f {jump} {} gc {root} --registry-stopped --force 2>&1",
            env!("CARGO_BIN_EXE_regfs")
        );
        let outcome = sh(store.root(), &words).outcome();
        assert_eq!(outcome.code, Some(0), "{jump}: {}", outcome.stdout);
        assert!(outcome.stdout.contains("nothing to take"), "{jump}: {}", outcome.stdout);
        assert!(outcome.stdout.contains("note: the clock"), "{jump}: {}", outcome.stdout);
    }
    assert!(store.blob(&sha256(GARBAGE)).exists());
}
