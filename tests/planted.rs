//! What whoever owns the storage can put in regfs's way: things in place of its own files, and trees deeper than a path.
//!
//! Every command answers, and not a byte changes elsewhere.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::check::{Live, sha256};
use common::gc::{gc, gc_outcome, transactions};
use common::image::{Image, layer};
use common::mount::Mount;
use common::run::{Bounded, clean, regfs};
use common::store::{Store, put};
use common::{have, snapshot};

const APP: &str = "team/app";
const OLD: &str = "20200101-000000-rm";

fn image() -> Image {
    Image::oci("plain", &[layer("first", "1"), layer("second", "2")])
}

/// What may stand in place of a file.
const PLANTED: [&str; 9] = [
    "pipe",
    "symlink to a file",
    "symlink to nothing",
    "hard link to a blob",
    "directory",
    "full directory",
    "2 GiB",
    "empty",
    "stranger's",
];

/// A file outside of the store, a blob in it, and the names that stand for either.
struct World {
    store: Store,
    outside: tempfile::TempDir,
    live: Live,
    blob: PathBuf,
}

impl World {
    fn new() -> World {
        let (store, outside) = (Store::new(), common::scratch());
        store.push(APP, Some("1"), &image());
        store.put_blob(b"garbage");
        put(&outside.path().join("file"), b"not yours");
        let (live, blob) = (Live::of_repository(store.root(), APP), store.blob(&sha256(&image().blobs[0])));
        World { store, outside, live, blob }
    }

    fn plant(&self, what: &str, place: &str) {
        let path = self.store.path(".regfs").join(place);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match what {
            "pipe" => drop(clean("mkfifo").arg(&path).outcome().exits(0)),
            "symlink to a file" => symlink(self.outside.path().join("file"), &path).unwrap(),
            "symlink to nothing" => symlink(self.outside.path().join("nothing"), &path).unwrap(),
            "hard link to a blob" => fs::hard_link(&self.blob, &path).unwrap(),
            "directory" => fs::create_dir(&path).unwrap(),
            "full directory" => put(&path.join("deeper/file"), b"?"),
            "2 GiB" => File::create(&path).unwrap().set_len(2 << 30).unwrap(),
            "empty" => put(&path, b""),
            "stranger's" => {
                put(&path, b"{}");
                if common::is_root() {
                    std::os::unix::fs::lchown(&path, Some(12345), Some(12345)).unwrap();
                }
            }
            other => panic!("{other}?"),
        }
    }

    #[track_caller]
    fn assert_untouched(&self) {
        self.live.assert_intact();
        assert_eq!(fs::read(self.outside.path().join("file")).unwrap(), b"not yours");
        assert_eq!(common::names(self.outside.path()), ["file"], "nothing is made there");
    }

    /// While nobody can say what registries remember nothing is taken; that nothing is known of them has to be said.
    #[track_caller]
    fn forget_registries(&self) {
        let refused = gc_outcome(self.store.root(), &["--grace", "0", "--repair"]).exits(1);
        assert!(refused.stderr.contains("--forget-registries"), "{refused}");
        let mut forget = regfs(["gc"]);
        forget.arg(self.store.root()).arg("--forget-registries").outcome().exits(0);
    }

    fn trash(&self, arguments: &[&str]) -> Command {
        let mut command = regfs(["trash"]);
        command.arg(self.store.root()).args(arguments);
        command
    }
}

#[test]
fn nothing_in_place_of_a_file_of_ours_is_waited_for_or_written_through() {
    let places = [
        "lock",
        "reserve",
        "dead",
        "dead.tmp",
        "new.tmp",
        "registries.json",
        "registries.json.tmp",
        "clock",
        "clock.tmp",
        "cache/manifests",
        "cache/manifests.tmp",
        "cache/links",
    ];
    for what in PLANTED {
        let world = World::new();
        for place in places {
            world.plant(what, place);
        }
        for place in ["txn.json", "stage.json", "txn.json.tmp"] {
            world.plant(what, &format!("trash/{OLD}/{place}"));
        }
        let root = world.store.root();
        // To hash so many zeros takes minutes.
        let look = || (what != "2 GiB").then(|| snapshot(&world.store.path("")));
        let before = look();
        gc(root, &["--dry-run", "--grace", "0"]);
        assert!(look() == before, "a dry run changes nothing: {what}");
        assert_eq!(transactions(root), [OLD]);
        fs::remove_file(world.store.layer_link(APP, &sha256(&image().blobs[0]))).unwrap();
        world.forget_registries();
        let swept = gc(root, &["--grace", "0", "--repair"]);
        assert_eq!(swept.taken_blobs().len(), 1, "{what}");
        world.assert_untouched();
        world.trash(&["undo", OLD]).outcome().exits_one_of(&[0, 1, 3]);
        world.trash(&["purge", "--all", "--registry-stopped", "--force"]).outcome().exits_one_of(&[0, 3]);
        world.assert_untouched();
        let lock = world.store.path(".regfs/lock").symlink_metadata().unwrap();
        assert!(lock.is_file() && lock.nlink() == 1 && lock.len() < 4096, "{what}: {lock:?}");
    }
}

#[test]
fn nothing_in_place_of_a_directory_of_ours_is_followed() {
    for place in ["", "trash", "cache", "reserve"] {
        for what in ["pipe", "symlink to a file", "hard link to a blob", "empty", "symlink to a directory"] {
            let world = World::new();
            match what {
                "symlink to a directory" => {
                    fs::create_dir_all(world.store.path(".regfs").join(place).parent().unwrap()).unwrap();
                    let _ = fs::remove_dir(world.store.path(".regfs").join(place));
                    symlink(
                        world.outside.path(),
                        world.store.path(PathBuf::from(".regfs").join(place)).components().as_path(),
                    )
                    .unwrap();
                }
                _ if place.is_empty() => {
                    world.plant(what, "x");
                    fs::rename(world.store.path(".regfs/x"), world.store.path("x")).unwrap();
                    fs::remove_dir(world.store.path(".regfs")).unwrap();
                    fs::rename(world.store.path("x"), world.store.path(".regfs")).unwrap();
                }
                _ => world.plant(what, place),
            }
            let root = world.store.root();
            gc_outcome(root, &["--dry-run", "--grace", "0"]).exits(0);
            world.trash(&["list"]).outcome().exits(0);
            if place.is_empty() {
                world.forget_registries();
            }
            assert_eq!(gc(root, &["--grace", "0"]).taken_blobs().len(), 1, "{what} for {place:?}");
            world.trash(&["purge", "--all", "--registry-stopped", "--force"]).outcome().exits(0);
            world.assert_untouched();
        }
    }
}

#[test]
fn a_mount_comes_up_whatever_stands_in_place_of_our_files() {
    if !have(&["fuse"]) {
        return;
    }
    for what in ["pipe", "symlink to a file", "hard link to a blob", "full directory", "2 GiB"] {
        let world = World::new();
        for place in ["lock", "cache/manifests", "dead", "trash/20200101-000000-rm/stage.json"] {
            world.plant(what, place);
        }
        let mount = Mount::of(world.store.root());
        assert_eq!(mount.list(&format!("images/{APP}/_tags")), ["1"], "{what}");
        mount.unmount();
        world.assert_untouched();
    }
}

#[test]
fn a_lock_of_a_stranger_that_is_held_is_waited_for_before_it_is_replaced() {
    let world = World::new();
    world.plant("hard link to a blob", "lock");
    let held = File::open(world.store.path(".regfs/lock")).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    gc_outcome(world.store.root(), &["--grace", "0"]).exits(1).says("the store is being changed by");
    drop(held);
    gc(world.store.root(), &["--grace", "0"]);
    world.assert_untouched();
}

#[test]
fn a_pipe_in_place_of_a_cache_elsewhere_hangs_nothing() {
    let (store, elsewhere) = (Store::new(), common::scratch());
    clean("mkfifo").arg(elsewhere.path().join("manifests")).outcome().exits(0);
    gc(store.root(), &["--dry-run", "--cache-dir", elsewhere.path().to_str().unwrap()]);
}

/// Directories in each other, more than a path can name; in the last one a file, if any.
fn nest(above: &Path, depth: usize, file: Option<&str>) {
    fs::create_dir_all(above).unwrap();
    let script = "import os,sys\nos.chdir(sys.argv[1])\nfor i in range(int(sys.argv[2])): os.mkdir('a'); os.chdir('a')\n\
                  for name in sys.argv[3:]: open(name,'w').close()";
    clean("python3").args(["-c", script]).arg(above).arg(depth.to_string()).args(file).outcome().exits(0);
}

#[test]
fn a_tree_deeper_than_a_path_in_the_trash_stops_nobody_and_is_purged() {
    if !have(&["python3"]) {
        return;
    }
    for (place, file) in [("", None), ("", Some("f")), ("blobs/sha256", Some("f")), ("txn.json", None)] {
        let world = World::new();
        nest(&world.store.path(".regfs/trash").join(OLD).join(place), 2500, file);
        let root = world.store.root();
        gc(root, &["--dry-run", "--grace", "0"]);
        assert_eq!(gc(root, &["--grace", "0"]).taken_blobs().len(), 1);
        assert_eq!(transactions(root).len(), 2);
        world.trash(&["purge", "--all", "--registry-stopped", "--force"]).outcome().exits(0);
        assert!(!world.store.path(".regfs/trash").exists(), "all of it is gone: {place:?} {file:?}");
        world.assert_untouched();
    }
}

#[test]
fn directories_nested_deeper_than_a_name_of_a_repository_are_a_problem_and_no_more() {
    if !have(&["python3"]) {
        return;
    }
    let world = World::new();
    nest(&world.store.path("repositories/deep"), 5000, None);
    nest(&world.store.repository(APP, "_uploads/u"), 3000, Some("f"));
    nest(&world.store.repository(APP, "_manifests/tags/1/x"), 3000, None);
    let report = gc(world.store.root(), &["--grace", "0", "--uploads", "0"]);
    let problem = report.problems.iter().find(|p| p.path.contains("deep")).expect("it is told");
    assert!(problem.what.contains("deeper than the name of a repository"), "{problem:?}");
    assert_eq!(report.taken_blobs().len(), 1);
    if have(&["fuse"]) {
        let mount = Mount::of(world.store.root());
        assert!(mount.list("images").contains(&"deep".to_string()));
        mount.unmount();
    }
    world.assert_untouched();
}

#[test]
fn files_nested_deeper_than_a_name_of_a_repository_stop_a_collection() {
    if !have(&["python3"]) {
        return;
    }
    for depth in [600, 3000] {
        let world = World::new();
        nest(&world.store.path("repositories/deep"), depth, Some("link"));
        let outcome = gc_outcome(world.store.root(), &["--grace", "0"]).exits(1);
        assert!(outcome.stderr.contains("move them"), "{outcome}");
        assert!(!world.store.path(".regfs/trash").exists());
        world.assert_untouched();
    }
}

/// A regfs that an ordinary user may run.
struct Ordinary {
    dir: tempfile::TempDir,
}

impl Ordinary {
    fn new() -> Ordinary {
        let dir = common::scratch();
        fs::copy(env!("CARGO_BIN_EXE_regfs"), dir.path().join("regfs")).unwrap();
        Ordinary { dir }
    }

    fn run(&self, arguments: &[&str], store: &Store) -> common::run::Outcome {
        let mut command = clean(self.dir.path().join("regfs"));
        command.arg(arguments[0]).arg(store.root()).args(&arguments[1..]);
        command.uid(common::NOBODY).gid(common::NOBODY).outcome()
    }
}

#[test]
fn who_may_read_the_storage_may_look_after_root_has_run() {
    if !have(&["root"]) {
        return;
    }
    let (world, ordinary) = (World::new(), Ordinary::new());
    let root = world.store.root();
    for is_old in [false, true] {
        gc(root, &["--grace", "0"]);
        if is_old {
            // As an earlier regfs has left it.
            let id = transactions(root).remove(0);
            let of_transaction = ["", "/txn.json"].map(|file| format!(".regfs/trash/{id}{file}"));
            let own = [".regfs/trash", ".regfs/cache", ".regfs/cache/manifests", ".regfs/lock", ".regfs"];
            for path in of_transaction.iter().map(String::as_str).chain(own) {
                let path = world.store.path(path);
                let mode = if path.is_dir() { 0o700 } else { 0o600 };
                fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            }
            world.store.put_blob(b"more garbage");
            gc(root, &["--grace", "0"]);
        }
        let dry = ordinary.run(&["gc", "--dry-run", "--grace", "0"], &world.store).exits(0);
        assert!(!dry.stderr.contains("denied"), "{dry}");
        let list = ordinary.run(&["trash", "list"], &world.store).exits(0);
        assert!(list.stdout.contains("-sweep"), "{list}");
        ordinary.run(&["why", &sha256(&image().manifest)], &world.store).exits(0);
        ordinary.run(&["gc", "--grace", "0", "--registry-stopped", "--force"], &world.store).exits(1);
    }
    let mode = |path: &str| world.store.path(path).metadata().unwrap().mode() & 0o7777;
    assert_eq!(mode(".regfs"), mode(""));
    assert_eq!(mode(".regfs/lock"), 0o600, "whoever can open it can lock it for ever");
    world.assert_untouched();
}

#[test]
fn who_owns_the_storage_goes_on_where_root_has_run_and_nobody_else_may_write() {
    if !have(&["root"]) {
        return;
    }
    let (world, ordinary) = (World::new(), Ordinary::new());
    common::chown_all(world.store.root(), common::NOBODY, common::NOBODY);
    for mode in [0o777, 0o775, 0o700] {
        fs::set_permissions(world.store.path(""), fs::Permissions::from_mode(mode)).unwrap();
        let _ = fs::remove_dir_all(world.store.path(".regfs"));
        world.store.put_blob(b"garbage");
        common::chown_all(&world.store.path("blobs"), common::NOBODY, common::NOBODY);
        gc(world.store.root(), &["--grace", "0"]);
        for path in common::walk(&world.store.path(".regfs")) {
            let (meta, shown) = (path.metadata().unwrap(), path.display());
            assert_eq!(meta.mode() & 0o002, 0, "{shown} can be written by everybody");
            assert!(
                meta.gid() == common::NOBODY
                    || meta.len() == 0
                    || shown.to_string().ends_with("reserve/bytes"),
                "{shown} has the group of {}",
                meta.gid()
            );
        }
        ordinary.run(&["trash", "purge", "--all", "--registry-stopped", "--force"], &world.store).exits(0);
    }
    world.assert_untouched();
}
