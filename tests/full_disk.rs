//! A disk without one free byte: a sweep and a purge are what people run then, and they must work, or say what to do.
//!
//! Each story runs on a small filesystem of its own, a tmpfs and an ext4 in a file; only root can mount those.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use common::check::{Live, Roots, blobs};
use common::gc::{gc_outcome, transactions};
use common::image::{Image, layer};
use common::run::{Bounded, Outcome, clean, regfs};
use common::store::Store;
use common::{difference, snapshot};
use tempfile::TempDir;

/// Blobs that nothing names, each of [`GARBAGE_BYTES`].
const GARBAGE: usize = 40;
const GARBAGE_BYTES: usize = 40 << 10;

/// A small filesystem, unmounted when dropped.
struct Filesystem {
    kind: &'static str,
    dir: TempDir,
}

impl Filesystem {
    /// Mounts one; `None`, and a line that says why, where that is not possible.
    fn mount(kind: &'static str) -> Option<Filesystem> {
        if !common::have(&["root", "mount", "umount"]) || kind == "ext4" && !common::have(&["mkfs.ext4"]) {
            return None;
        }
        let dir = common::scratch();
        let point = dir.path().join("mount");
        fs::create_dir(&point).unwrap();
        let mut mount = clean("mount");
        if kind == "ext4" {
            let image = dir.path().join("image");
            File::create(&image).unwrap().set_len(16 << 20).unwrap();
            let make = ["-q", "-F", "-b", "4096", "-m", "0"];
            clean("mkfs.ext4").args(make).arg(&image).outcome().exits(0);
            mount.args(["-o", "loop"]).arg(&image);
        } else {
            mount.args(["-t", "tmpfs", "-o", "size=12m", "regfs-test"]);
        }
        let outcome = mount.arg(&point).outcome();
        if outcome.code != Some(0) {
            // A container may let root mount neither.
            println!("skipped on {kind}: {outcome}");
            return None;
        }
        Some(Filesystem { kind, dir })
    }

    fn point(&self) -> PathBuf {
        self.dir.path().join("mount")
    }

    fn filler(&self) -> PathBuf {
        self.point().join("filler")
    }

    /// Fills it to the last byte.
    fn fill(&self) {
        let mut file = OpenOptions::new().create(true).append(true).open(self.filler()).unwrap();
        // What was freed a moment ago may come only after a sync.
        for _ in 0..2 {
            for size in [64 << 10, 4096, 1] {
                while file.write_all(&vec![b'x'; size]).is_ok() {}
            }
            rustix::fs::syncfs(&file).unwrap();
        }
        let why = fs::create_dir(self.point().join("directory"))
            .and_then(|()| fs::write(self.point().join("directory/file"), b"no space for this"));
        let why = why.expect_err("the disk is full");
        assert_eq!(why.kind(), std::io::ErrorKind::StorageFull);
        // On a tmpfs a directory needs no space.
        let _ = fs::remove_file(self.point().join("directory/file"));
        let _ = fs::remove_dir(self.point().join("directory"));
    }

    /// Gives back some of what [`Filesystem::fill`] took.
    fn free(&self, bytes: u64) {
        let file = OpenOptions::new().write(true).open(self.filler()).unwrap();
        file.set_len(file.metadata().unwrap().size() - bytes).unwrap();
        rustix::fs::syncfs(&file).unwrap();
    }

    /// Uses up the inodes; the files that do.
    fn use_up_inodes(&self) -> Vec<PathBuf> {
        let paths = (0..).map(|number| self.point().join(format!("inode-{number}")));
        let made: Vec<PathBuf> = paths.take_while(|path| File::create(path).is_ok()).collect();
        let stat = rustix::fs::statvfs(self.point()).unwrap();
        assert_eq!((stat.f_ffree, stat.f_bfree > 0), (0, true), "no inodes, but blocks");
        made
    }

    fn free_bytes(&self) -> u64 {
        let stat = rustix::fs::statvfs(self.point()).unwrap();
        stat.f_bfree * stat.f_frsize
    }
}

impl Drop for Filesystem {
    fn drop(&mut self) {
        // Panicking here would hide why the test failed; the directory that stays tells of a mount that stays.
        let _ = std::panic::catch_unwind(|| clean("umount").arg("-l").arg(self.point()).outcome().exits(0));
    }
}

/// A registry on a filesystem of its own.
struct World {
    store: Store,
    live: Live,
    /// Dropped last: it holds the store.
    disk: Filesystem,
}

impl World {
    fn on(kind: &'static str) -> Option<World> {
        let disk = Filesystem::mount(kind)?;
        let store = Store::of(tempfile::tempdir_in(disk.point()).unwrap());
        let shared = layer("base", "shared by many");
        for name in ["one", "two"] {
            let image = Image::oci(name, &[shared.clone(), layer("private", name)]);
            store.push("app", Some(name), &image);
        }
        let multi = Image::index(&[("amd64", &Image::oci("multi", &[shared]))]);
        store.push("team/multi", Some("latest"), &multi);
        let live = Live::of(store.root(), Roots::Tags);
        live.assert_complete();
        Some(World { store, live, disk })
    }

    fn add_garbage(&self, count: usize) {
        for number in 0..count {
            self.store.put_blob(&vec![number as u8; GARBAGE_BYTES]);
        }
    }

    /// The registry without regfs's own files.
    fn contents(&self) -> std::collections::BTreeMap<PathBuf, String> {
        let mut all = snapshot(&self.store.path(""));
        all.retain(|path, _| !path.starts_with(".regfs"));
        all
    }

    /// Sweeps at once and without grace.
    #[track_caller]
    fn sweep_now(&self) -> Outcome {
        let outcome = gc_outcome(self.store.root(), &["--grace", "0", "--now"]);
        self.live.assert_intact();
        Live::of(self.store.root(), Roots::Tags).assert_complete();
        outcome
    }

    /// Sweeps until nothing is left to do: each time frees space that the next one needs.
    #[track_caller]
    fn sweep_to_the_end(&self) {
        for _ in 0..4 {
            if self.sweep_now().exits_one_of(&[0, 3]).code == Some(0) {
                assert_eq!(blobs(self.store.root()), self.live.blobs, "on {}", self.disk.kind);
                return;
            }
        }
        panic!("the sweep comes to no end on {}: {}", self.disk.kind, self.sweep_now());
    }

    #[track_caller]
    fn trash(&self, arguments: &[&str]) -> Outcome {
        let outcome = regfs(["trash"]).arg(self.store.root()).args(arguments).outcome();
        self.live.assert_intact();
        Live::of(self.store.root(), Roots::Tags).assert_complete();
        outcome
    }

    fn reserve(&self) -> PathBuf {
        self.store.path(".regfs/reserve/bytes")
    }
}

fn on_each(story: impl Fn(&World)) {
    for kind in ["tmpfs", "ext4"] {
        if let Some(world) = World::on(kind) {
            story(&world);
        }
    }
}

#[test]
fn a_sweep_works_on_a_full_disk() {
    on_each(|world| {
        // Whatever regfs changes first makes the reserve.
        world.sweep_now().exits(0);
        assert!(world.reserve().metadata().unwrap().blocks() * 512 >= regfs::store::disk::RESERVE_BYTES);
        world.add_garbage(GARBAGE);
        world.disk.fill();
        let free = world.disk.free_bytes();
        world.sweep_to_the_end();
        let freed = world.disk.free_bytes() - free;
        assert!(freed + 4096 * 4 >= (GARBAGE * GARBAGE_BYTES) as u64, "{freed} on {}", world.disk.kind);
    });
}

#[test]
fn a_sweep_into_the_trash_and_its_undo_work_on_a_full_disk() {
    on_each(|world| {
        world.sweep_now().exits(0);
        world.add_garbage(GARBAGE);
        let before = world.contents();
        world.disk.fill();
        // With some grace emptied directories stay, so the undo needs no space for them.
        gc_outcome(world.store.root(), &["--grace", "1ms"]).exits(0);
        world.live.assert_intact();
        assert_eq!(blobs(world.store.root()), world.live.blobs, "on {}", world.disk.kind);
        assert!(!world.reserve().exists(), "the reserve was not needed on {}", world.disk.kind);

        world.disk.fill();
        let [id] = transactions(world.store.root()).try_into().unwrap();
        world.trash(&["undo", &id]).exits(0);
        let lost = difference(&before, &world.contents());
        assert!(lost.is_empty(), "undone on {}: {lost:?}", world.disk.kind);
    });
}

#[test]
fn a_purge_works_on_a_full_disk_and_makes_the_reserve_anew() {
    on_each(|world| {
        world.add_garbage(GARBAGE);
        gc_outcome(world.store.root(), &["--grace", "0"]).exits(0);
        fs::remove_file(world.reserve()).unwrap();
        world.disk.fill();
        let free = world.disk.free_bytes();
        world.trash(&["purge", "--all", "--registry-stopped", "--force"]).exits(0);
        let freed = world.disk.free_bytes() - free;
        assert!(freed > 0, "nothing freed on {}", world.disk.kind);
        assert_eq!(transactions(world.store.root()), [""; 0]);
        assert_eq!(blobs(world.store.root()), world.live.blobs);

        // There is space again, so the next one who finds a full disk finds a reserve.
        assert!(world.reserve().exists(), "no reserve on {}", world.disk.kind);
        world.add_garbage(10);
        world.disk.fill();
        world.sweep_to_the_end();
    });
}

#[test]
fn the_first_sweep_on_a_full_disk_works_when_it_frees_at_once() {
    on_each(|world| {
        world.add_garbage(GARBAGE);
        world.disk.fill();
        world.sweep_to_the_end();
        assert_eq!(transactions(world.store.root()), [""; 0]);
    });
}

#[test]
fn a_sweep_into_the_trash_says_what_helps_on_a_disk_that_was_full_before_regfs_came() {
    on_each(|world| {
        world.add_garbage(GARBAGE);
        world.disk.fill();
        let before = world.contents();
        let refused = gc_outcome(world.store.root(), &["--grace", "0"]).exits(1);
        for helps in ["No space left on device", "free some space", "--registry-stopped --now"] {
            assert!(refused.stderr.contains(helps), "{helps:?} is missing: {refused}");
        }
        let changed = difference(&before, &world.contents());
        assert!(changed.is_empty(), "changed on {}: {changed:?}", world.disk.kind);
        assert_eq!(transactions(world.store.root()), [""; 0], "an empty transaction would puzzle people");

        world.disk.free(64 << 10);
        world.sweep_to_the_end();
    });
}

#[test]
fn empty_directories_of_uploads_make_room_for_a_first_command_on_a_full_disk() {
    let Some(world) = World::on("ext4") else { return };
    for number in 0..40 {
        fs::create_dir_all(world.store.repository(&format!("pushed/{number}"), "_uploads")).unwrap();
        fs::create_dir_all(world.store.repository(&format!("pushed/{number}"), "_layers")).unwrap();
    }
    let upload = world.store.repository("pushed/1", "_uploads/in-progress");
    common::store::put(&upload.join("data"), b"half of a layer");
    world.add_garbage(3);
    world.disk.fill();
    gc_outcome(world.store.root(), &["--grace", "1ms", "--uploads", "1h"]).exits(0);
    assert!(upload.exists());
    world.live.assert_intact();
    assert_eq!(blobs(world.store.root()), world.live.blobs);
}

#[test]
fn a_sweep_works_without_an_inode_left() {
    let Some(world) = World::on("ext4") else { return };
    for is_first in [false, true] {
        if is_first {
            fs::remove_dir_all(world.store.path(".regfs")).unwrap();
        } else {
            world.sweep_now().exits(0);
        }
        world.add_garbage(GARBAGE);
        let fillers = world.disk.use_up_inodes();
        world.sweep_to_the_end();
        fillers.into_iter().for_each(|path| fs::remove_file(path).unwrap());
    }
}

#[test]
fn a_full_disk_does_not_keep_a_dry_run_from_looking() {
    on_each(|world| {
        world.add_garbage(GARBAGE);
        world.disk.fill();
        gc_outcome(world.store.root(), &["--dry-run", "--grace", "0"]).exits(0);
        assert!(!Path::new(&world.store.path(".regfs")).exists(), "a dry run changes nothing");
    });
}
