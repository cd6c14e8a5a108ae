//! What an administrator may meet when things happen in an odd order: nothing live is lost, every undo works.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::time::Duration;

use common::check::Live;
use common::gc::{gc, gc_outcome, transactions};
use common::image::{Image, layer};
use common::mount::Mount;
use common::run::{Bounded, regfs};
use common::store::{Store, put};
use common::{have, wait_for};

const APP: &str = "team/app";

fn image(name: &str) -> Image {
    Image::oci(name, &[layer("first", name), layer("second", name)])
}

/// What a registry with a warm cache does when an image is pushed again whose bytes a sweep has taken: it writes the
/// revision and the tag, and nothing else.
fn push_from_memory(store: &Store, tag: &str, digest: &str) {
    put(&store.revision_link(APP, digest), digest.as_bytes());
    store.tag(APP, tag, digest);
}

/// A store with an image that lies in the trash but for its tag, and what a pull of it needs.
fn swept(image: &Image) -> (Store, String, Live) {
    let store = Store::new();
    let digest = store.push(APP, Some("1"), image);
    let live = Live::of_repository(store.root(), APP);
    assert!(live.problems.is_empty(), "{:?}", live.problems);
    fs::remove_dir_all(store.repository(APP, "_manifests/tags/1")).unwrap();
    assert!(gc(store.root(), &["--untagged", "--grace", "0"]).transaction.is_some());
    (store, digest, live)
}

#[test]
fn a_purge_gives_back_all_that_a_returned_manifest_names() {
    let (store, digest, live) = swept(&image("plain"));
    push_from_memory(&store, "1", &digest);
    regfs(["trash"])
        .arg(store.root())
        .args(["purge", "--all", "--registry-stopped", "--force"])
        .outcome()
        .exits(0);
    live.assert_intact();
}

#[test]
fn a_purge_gives_back_all_that_a_returned_index_names() {
    let (store, digest, live) = swept(&Image::index(&[("amd64", &image("a")), ("arm64", &image("b"))]));
    push_from_memory(&store, "1", &digest);
    regfs(["trash"])
        .arg(store.root())
        .args(["purge", "--all", "--registry-stopped", "--force"])
        .outcome()
        .exits(0);
    live.assert_intact();
}

#[test]
fn a_sweep_that_frees_gives_back_all_that_a_returned_manifest_names() {
    for options in [&["--grace", "0", "--now"][..], &["--keep", "0", "--grace", "0"]] {
        let (store, digest, live) = swept(&image("plain"));
        std::thread::sleep(Duration::from_millis(1100));
        push_from_memory(&store, "1", &digest);
        gc(store.root(), options);
        live.assert_intact();
    }
}

#[test]
fn a_tag_that_a_push_wrote_last_gets_its_manifest_back() {
    let (store, digest, live) = swept(&image("plain"));
    store.tag(APP, "1", &digest);
    gc(store.root(), &["--grace", "0"]);
    live.assert_intact();
}

#[test]
fn the_mount_gives_back_all_that_a_returned_manifest_names() {
    if !have(&["fuse"]) {
        return;
    }
    let (store, digest, live) = swept(&Image::index(&[("amd64", &image("a"))]));
    let mount = Mount::of(store.root());
    push_from_memory(&store, "1", &digest);
    wait_for("the image to be whole", Duration::from_secs(10), || {
        mount.list("images");
        live.lost().is_empty().then_some(())
    });
}

#[test]
fn the_mount_gives_back_what_it_could_not_while_another_regfs_had_the_lock() {
    if !have(&["fuse"]) {
        return;
    }
    let (store, digest, live) = swept(&image("plain"));
    let mount = Mount::of(store.root());
    let lock = fs::File::open(store.path(".regfs/lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    push_from_memory(&store, "1", &digest);
    for _ in 0..30 {
        mount.list("images");
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(lock);
    wait_for("the image to be whole", Duration::from_secs(10), || {
        mount.list("images");
        live.lost().is_empty().then_some(())
    });
}

#[test]
fn an_undo_of_a_tag_brings_its_manifest_too() {
    if !have(&["fuse"]) {
        return;
    }
    let store = Store::new();
    let digest = store.push(APP, Some("1"), &image("plain"));
    store.tag(APP, "2", &digest);
    let live = Live::of_repository(store.root(), APP);
    let mount = Mount::of(store.root());
    // By different processes, as two `rm` are, so that these are two transactions.
    for tag in ["1", "2"] {
        common::run::sh(mount.point(), &format!("rm images/{APP}/_tags/{tag}")).outcome().exits(0);
    }
    mount.unmount();
    gc(store.root(), &["--grace", "0"]);
    let ids = transactions(store.root());
    let oldest = ids.last().unwrap();
    regfs(["trash"]).arg(store.root()).args(["undo", oldest]).outcome().exits(0);
    assert!(store.revision_link(APP, &digest).exists(), "the tag leads nowhere");
    let now = Live::of_repository(store.root(), APP);
    assert!(now.problems.is_empty(), "{:?}", now.problems);
    assert_eq!(now.blobs, live.blobs);
}

#[test]
fn a_purge_keeps_what_the_undo_of_a_tag_needs() {
    if !have(&["fuse"]) {
        return;
    }
    let store = Store::new();
    let digest = store.push(APP, Some("1"), &image("plain"));
    store.tag(APP, "2", &digest);
    let mount = Mount::of(store.root());
    for tag in ["1", "2"] {
        common::run::sh(mount.point(), &format!("rm images/{APP}/_tags/{tag}")).outcome().exits(0);
    }
    mount.unmount();
    gc(store.root(), &["--grace", "0"]);
    let ids = transactions(store.root());
    let (oldest, newer) = ids.split_last().unwrap();
    for id in newer {
        let words = ["purge", id, "--registry-stopped", "--force"];
        let purge = regfs(["trash"]).arg(store.root()).args(words).outcome().exits(3);
        assert!(purge.stdout.contains("the undo of another transaction needs them"), "{purge}");
    }
    regfs(["trash"]).arg(store.root()).args(["undo", oldest]).outcome().exits(0);
    let now = Live::of_repository(store.root(), APP);
    assert!(now.problems.is_empty(), "{:?}", now.problems);
}

#[test]
fn a_sweep_that_cannot_purge_still_says_what_it_took() {
    if !have(&["fuse"]) {
        return;
    }
    let store = Store::new();
    let digest = store.push(APP, Some("1"), &image("damaged"));
    fs::write(store.blob(&digest), "no manifest").unwrap();
    let old = store.put_blob(b"old garbage");
    let place = store.path(".regfs/trash/20200101-000000-sweep");
    put(&place.join(common::check::blob_path(&old)), b"old garbage");
    let record = r#"{"id":"20200101-000000-sweep","time":"2020-01-01T00:00:00Z","uid":0,"pid":1,"command":"","reason":""}"#;
    put(&place.join("txn.json"), record.as_bytes());
    let mount = Mount::of(store.root());
    mount.rm(&format!("images/{APP}/_tags/1"));
    mount.rm(&format!("images/{APP}/_manifests/{}", digest.replace(':', "/")));
    mount.unmount();
    let outcome = gc_outcome(store.root(), &["--grace", "0"]).exits(3);
    let report = common::gc::Report::parse(&outcome);
    assert!(!report.taken.is_empty() && !report.failures.is_empty(), "{outcome}");
}

#[test]
fn blobs_without_any_repositories_are_not_called_garbage() {
    let store = Store::new();
    store.push(APP, Some("1"), &image("plain"));
    fs::rename(store.path("repositories"), store.root().join("elsewhere")).unwrap();
    gc_outcome(store.root(), &["--grace", "0"]).exits(1).says("repositories");
}

#[test]
fn a_grace_beyond_all_calendars_is_no_panic() {
    let store = Store::new();
    store.put_blob(b"garbage");
    gc(store.root(), &["--dry-run", "--grace", "9000y"]);
}

#[test]
fn a_transaction_that_broke_off_at_its_description_can_be_purged() {
    let store = Store::new();
    put(&store.path(".regfs/trash/20200101-000000-rm/txn.json.tmp"), b"");
    regfs(["trash"])
        .arg(store.root())
        .args(["purge", "--all", "--registry-stopped", "--force"])
        .outcome()
        .exits(0);
    assert!(transactions(store.root()).is_empty());
}

#[test]
fn a_mount_answers_while_removals_wait() {
    if !have(&["fuse"]) {
        return;
    }
    let store = Store::new();
    for tag in ["1", "2", "3", "4", "5", "6"] {
        store.push(&format!("app{tag}"), Some(tag), &image(tag));
    }
    let mount = Mount::of(store.root());
    put(&store.path(".regfs/lock"), b"");
    let lock = fs::File::open(store.path(".regfs/lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    std::thread::scope(|scope| {
        for tag in 1..=6 {
            let path = mount.path(format!("images/app{tag}/_tags/{tag}"));
            scope.spawn(move || fs::remove_file(path).unwrap_err());
        }
        std::thread::sleep(Duration::from_millis(300));
        let began = std::time::Instant::now();
        mount.read("README");
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    });
}

#[test]
fn a_daemon_takes_no_mount_away_but_its_own() {
    if !have(&["fuse", "root"]) {
        return;
    }
    let store = Store::new();
    store.push(APP, Some("1"), &image("plain"));
    let mount = Mount::of(store.root());
    let old = mount.pid();
    let terminate = || rustix::process::kill_process(old, rustix::process::Signal::TERM).unwrap();
    // Whoever has a file open keeps the old daemon alive.
    let open = fs::File::open(mount.path("README")).unwrap();
    terminate();
    wait_for("the old mount to go", Duration::from_secs(10), || {
        (!common::mount::is_mounted(mount.point())).then_some(())
    });
    mount.start(store.root(), &[]).exits(0);
    terminate();
    std::thread::sleep(Duration::from_millis(500));
    assert!(common::mount::is_mounted(mount.point()), "the old daemon unmounted the new one");
    drop(open);
}

#[test]
fn mount_takes_a_double_dash() {
    if !have(&["fuse"]) {
        return;
    }
    let store = Store::new();
    let point = common::scratch();
    regfs(["mount", "--"]).arg(store.root()).arg(point.path()).outcome().exits(0);
    regfs(["umount"]).arg(point.path()).outcome().exits(0);
}

#[test]
fn a_sweep_keeps_the_blobs_of_a_manifest_that_cannot_be_moved() {
    let bin = common::scratch();
    let store = Store::new();
    let digest = store.push(APP, None, &image("stuck"));
    store.put_blob(b"garbage");
    if common::is_root() {
        common::chown_all(store.root(), common::NOBODY, common::NOBODY);
    }
    let live = Live::of(store.root(), common::check::Roots::Revisions);
    let link = store.revision_link(APP, &digest);
    let dir = link.parent().unwrap();
    fs::set_permissions(dir, fs::Permissions::from_mode(0o555)).unwrap();
    let copy = bin.path().join("regfs");
    fs::copy(env!("CARGO_BIN_EXE_regfs"), &copy).unwrap();
    let mut command = common::run::clean(copy);
    if common::is_root() {
        command.uid(common::NOBODY).gid(common::NOBODY);
    }
    let outcome = command
        .arg("gc")
        .arg(store.root())
        .args(["--untagged", "--grace", "0", "--now", "--registry-stopped", "--force"])
        .outcome();
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    outcome.exits(3);
    live.assert_intact();
    assert!(!store.blob(&common::check::sha256(b"garbage")).exists(), "the rest goes");
}

/// A cache that says of each image that it needs other layers.
fn forge(cache: &std::path::Path, layers: &[String]) {
    let file = fs::read(cache).unwrap();
    let start = file.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    let length = u32::from_le_bytes(file[start..start + 4].try_into().unwrap()) as usize;
    let mut payload = file[start + 4..start + 4 + length].to_vec();
    let unhex = |hex: &str| -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    };
    for layer in layers {
        let digest = unhex(common::check::hex(layer));
        let at = payload.windows(digest.len()).position(|window| window == digest).unwrap();
        payload[at] ^= 0xff;
    }
    let sum = unhex(common::check::hex(&common::check::sha256(&payload)));
    fs::write(cache, [&file[..start + 4], &payload, &sum].concat()).unwrap();
}

#[test]
fn a_cache_that_somebody_else_could_write_makes_no_garbage() {
    let store = Store::new();
    store.push(APP, Some("1"), &image("plain"));
    let live = Live::of_repository(store.root(), APP);
    gc(store.root(), &["--grace", "0"]);
    let cache = store.path(".regfs/cache/manifests");
    let layers: Vec<String> = image("plain").blobs.iter().map(|blob| common::check::sha256(blob)).collect();
    forge(&cache, &layers);
    let dry_run = || gc(store.root(), &["--dry-run", "--grace", "0"]).taken_blobs();
    assert!(!dry_run().is_empty(), "the forged cache is believed where only its owner can write it");
    fs::set_permissions(&cache, fs::Permissions::from_mode(0o666)).unwrap();
    assert_eq!(dry_run(), [].into());
    fs::set_permissions(&cache, fs::Permissions::from_mode(0o600)).unwrap();
    if common::is_root() {
        std::os::unix::fs::chown(&cache, Some(common::NOBODY), None).unwrap();
        assert_eq!(dry_run(), [].into());
    } else {
        fs::remove_file(&cache).unwrap();
    }
    gc(store.root(), &["--grace", "0"]);
    live.assert_intact();
}

#[test]
fn a_dry_run_with_repairs_shows_the_missing_links_that_a_sweep_makes() {
    let store = Store::new();
    store.push(APP, Some("1"), &image("plain"));
    fs::remove_file(store.layer_link(APP, &common::check::sha256(&image("plain").blobs[0]))).unwrap();
    let repairs = |arguments: &[&str]| {
        let outcome = gc_outcome(store.root(), arguments).exits(0);
        let report: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
        report["repairs"].as_array().unwrap().len()
    };
    assert_eq!(repairs(&["--dry-run", "--grace", "0", "--repair"]), 1);
    gc_outcome(store.root(), &["--dry-run", "--quick", "--repair"]).exits(2);
}

#[test]
fn a_machine_without_room_for_more_threads_is_no_panic() {
    let store = Store::new();
    for number in 0..64 {
        store.push(&format!("app{number}"), Some("1"), &image("plain"));
    }
    // A thread takes 2 MiB of addresses.
    let line = format!(
        "ulimit -v 90000; exec {} gc {} --dry-run --threads 64",
        env!("CARGO_BIN_EXE_regfs"),
        store.root().display()
    );
    common::run::sh(store.root(), &line).outcome().exits(0);
}

#[test]
fn directories_that_a_registry_removes_meanwhile_end_no_run() {
    let store = Store::new();
    store.push(APP, Some("1"), &image("plain"));
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0.. {
                if done.load(std::sync::atomic::Ordering::Relaxed) {
                    break;
                }
                let upload = store.repository(APP, &format!("_uploads/{number}"));
                put(&upload.join("hashstates/sha256/0"), b"");
                fs::remove_dir_all(&upload).unwrap();
            }
        });
        let codes: Vec<Option<i32>> = (0..100)
            .map(|_| gc_outcome(store.root(), &["--dry-run", "--thorough", "--grace", "0"]).code)
            .collect();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(codes.iter().all(|code| *code == Some(0)), "{codes:?}");
    });
}

#[test]
fn an_image_that_a_mirror_tagged_by_a_digest_of_elsewhere_is_no_orphan() {
    let store = Store::new();
    let elsewhere = image("before it was converted");
    let mirrored = image("mirrored");
    store.push(APP, Some(&format!("sha256-{}", elsewhere.hex())), &mirrored);
    let live = Live::of_repository(store.root(), APP);
    let report = gc(store.root(), &["--referrers=orphans", "--grace", "0"]);
    assert_eq!(report.taken.len(), 0, "{:?}", report.taken);
    live.assert_intact();
}

#[test]
fn an_undo_of_a_repair_does_not_bring_back_a_broken_tag_that_was_removed() {
    let store = Store::new();
    store.push(APP, Some("1"), &image("plain"));
    fs::write(store.tag_link(APP, "1"), "").unwrap();
    gc(store.root(), &["--grace", "0", "--repair"]);
    fs::remove_dir_all(store.repository(APP, "_manifests/tags/1")).unwrap();
    let [id] = &transactions(store.root())[..] else { panic!("one transaction") };
    let outcome = regfs(["trash"]).arg(store.root()).args(["undo", id]).outcome().exits(0);
    assert!(outcome.stdout.contains("left "), "{outcome}");
    assert!(!store.repository(APP, "_manifests/tags/1").exists());
}

#[test]
fn an_untagged_manifest_that_is_pushed_again_while_a_sweep_takes_stays_whole() {
    use regfs::gc::guard::gate::Gate;
    use regfs::gc::{Options, Unwatched, plan, sweep};
    let store = Store::new();
    let digest = store.push(APP, None, &image("plain"));
    store.put_blob(b"garbage");
    let live = Live::of(store.root(), common::check::Roots::Revisions);
    let disk = regfs::store::disk::Disk::open(store.root()).unwrap();
    let catalog = regfs::catalog::scan::scan(&disk, &Default::default(), None);
    let options =
        Options { untagged: true, grace: Duration::ZERO, gate: Gate::STOPPED, ..Options::default() };
    let policy = plan::Policy::new(&options, &regfs::clock::Clock::default().now(&disk));
    let plan = plan::Plan::new(&disk, &catalog, &policy).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    put(&store.revision_link(APP, &digest), digest.as_bytes());
    let author = regfs::trash::Author::current("test");
    let taken = sweep::take(&disk, &catalog, &plan, &options, &author, &Unwatched).unwrap();
    assert_eq!(taken.failures.len(), 1, "{:?}", taken.failures);
    live.assert_intact();
    assert!(!store.blob(&common::check::sha256(b"garbage")).exists(), "the rest goes");
}
