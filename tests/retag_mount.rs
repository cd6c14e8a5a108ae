//! `ln -s`, `mv`, `cp -P` and `mkdir` in a mount, beside a real registry that serves what they make.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use common::check::{Live, Roots, blobs, sha256};
use common::gc::{gc, transactions};
use common::image::{Image, layer};
use common::mount::Mount;
use common::registry::Registry;
use common::run::{Bounded, sh};
use common::{chown_all, errno, have, is_root, walk};

/// What every test here needs.
const NEEDS: &[&str] = &["docker-registry", "skopeo", "setpriv", "fuse"];

fn image(name: &str) -> Image {
    Image::oci(name, &[layer("etc/os-release", "ID=base\n"), layer("name", name)])
}

/// An index of two architectures that share a layer.
fn multi_arch() -> Image {
    let base = layer("etc/os-release", "ID=base\n");
    let [amd64, arm64] = ["amd64", "arm64"]
        .map(|name| Image::oci_for(name, "multi", &[base.clone(), layer("bin/tool", name)]));
    Image::index(&[("amd64", &amd64), ("arm64", &arm64)])
}

/// Runs a line in the mount, which must work without a word.
#[track_caller]
fn works(mount: &Mount, line: &str) {
    let outcome = sh(mount.point(), line).outcome().exits(0);
    assert_eq!((&*outcome.stdout, &*outcome.stderr), ("", ""), "{outcome}");
}

/// Runs a line in the mount, which must fail with an error that says `why`.
#[track_caller]
fn fails(mount: &Mount, line: &str, why: &str) {
    sh(mount.point(), line).outcome().exits(1).says(why);
}

/// Files of a repository in a store, but for pushes in progress.
fn files(registry: &Registry, name: &str) -> BTreeSet<PathBuf> {
    let root = registry.store().join("docker/registry/v2/repositories").join(name);
    let files = walk(&root).into_iter().filter(|path| path.is_file());
    files.map(|path| path.strip_prefix(&root).unwrap().to_path_buf()).collect()
}

fn references<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(String::from).into()
}

#[test]
fn tags_are_made_and_moved_with_the_usual_tools() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    registry.skopeo_push("library/app:1", &image("one"));
    registry.skopeo_push("library/app:2", &image("two"));
    let (one, two) = (registry.pull("library/app:1"), registry.pull("library/app:2"));
    let mount = Mount::of(&registry.store());
    let in_tags = |line: &str| works(&mount, &format!("cd images/library/app/_tags && {line}"));

    in_tags("ln -s $(readlink 1) stable");
    assert_eq!(registry.pull("library/app:stable"), one);
    in_tags("cp -P 1 copied && cp -a 2 archived");
    assert_eq!(registry.pull("library/app:copied"), one);
    assert_eq!(registry.pull("library/app:archived"), two);
    // -n, -T: the tag itself, not the directory that it leads to.
    in_tags("ln -sfn $(readlink 2) stable");
    assert_eq!(registry.pull("library/app:stable"), two);
    in_tags("mv copied renamed");
    registry.manifest("library/app", "copied").is(404);
    assert_eq!(registry.pull("library/app:renamed"), one);
    in_tags("mv -T archived renamed");
    assert_eq!(registry.pull("library/app:renamed"), two);
    in_tags("mv -nT 1 renamed; test -L 1");
    // References are places, too.
    works(
        &mount,
        "ln -s manifests/sha256/$(basename $(readlink images/library/app:1)) images/library/app:first",
    );
    works(&mount, "mv -T images/library/app:first images/library/app:uno");
    assert_eq!(registry.pull("library/app:uno"), one);
    assert_eq!(mount.list("images/library/app/_tags"), ["1", "2", "renamed", "stable", "uno"]);
    assert_eq!(registry.api("GET", "library/app/tags/list", &[], &[]).status, 200);

    // Its time is now, as after a push.
    let [old, new] =
        ["1", "uno"].map(|tag| fs::symlink_metadata(mount.path("images/library/app/_tags").join(tag)));
    assert!(old.unwrap().mtime() <= new.unwrap().mtime());
    // Every change is in the log, and what went can come back.
    let log = mount.read("control/log");
    assert!(log.contains(r#""action":"tag""#) && log.contains(r#""action":"mv""#), "{log}");
    assert!(log.contains("images/library/app/_tags/copied → images/library/app/_tags/renamed"), "{log}");
    Live::of(&registry.store(), Roots::Tags).assert_complete();
    gc(&registry.store(), &["--grace", "0"]);
    registry.assert_serves(
        &references(["library/app:1", "library/app:2", "library/app:stable"]),
        "after a sweep",
    );
}

#[test]
fn a_promotion_is_what_a_push_would_have_been() {
    if !have(NEEDS) {
        return;
    }
    let (registry, pushed) = (Registry::start_with(true), Registry::start());
    registry.skopeo_push("staging/web:1", &multi_arch());
    registry.push("staging/web", Some("2"), &image("two"));
    for (tag, image) in [("1", multi_arch()), ("2", image("two"))] {
        pushed.push("prod/eu/web", Some(tag), &image);
    }
    if is_root() {
        chown_all(&registry.store(), 1234, 4321);
    }
    let bytes = blobs(&registry.store());
    let mount = Mount::of(&registry.store());
    works(&mount, "mkdir -p images/prod/eu/web");
    assert_eq!(mount.list("images/prod/eu/web"), [""; 0]);
    works(&mount, "cp -P images/staging/web/_tags/1 images/prod/eu/web/_tags/1");
    works(&mount, "cp -P images/staging/web/_tags/2 images/prod/eu/web/_tags/");
    assert_eq!(mount.list("images/prod/eu/web/_tags"), ["1", "2"]);

    assert_eq!(files(&registry, "prod/eu/web"), files(&pushed, "prod/eu/web"));
    assert_eq!(blobs(&registry.store()), bytes, "no bytes are copied");
    assert!(registry.pull("prod/eu/web:1") == registry.pull("staging/web:1"));
    assert!(registry.pull("prod/eu/web:2") == registry.pull("staging/web:2"));
    let digest = multi_arch().children[1].digest();
    assert!(
        registry.pull(&format!("prod/eu/web@{digest}")) == registry.pull(&format!("staging/web@{digest}"))
    );
    let root = registry.store().join("docker/registry/v2/repositories");
    for path in walk(&root.join("prod")) {
        let meta = fs::symlink_metadata(&path).unwrap();
        assert_eq!(meta.uid(), fs::metadata(&root).unwrap().uid(), "{}", path.display());
        assert!(!meta.is_file() || meta.len() == 71, "{}", path.display());
    }

    // What staging deletes, prod keeps.
    works(&mount, "rm -r images/staging");
    mount.order("gc", "sweep untagged now grace=0");
    assert_eq!(blobs(&registry.store()), bytes);
    let all = references(["prod/eu/web:1", "prod/eu/web:2"]);
    registry.assert_serves(&all, "after the sweep");
    assert_eq!(registry.stock_garbage(), BTreeSet::new());
    mount.unmount();
    registry.assert_serves(&all, "after the mount");
}

#[test]
fn a_move_to_another_repository_can_be_undone() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    registry.push("staging", Some("1"), &multi_arch());
    registry.push("prod", Some("0"), &image("zero"));
    let pulled = registry.pull("staging:1");
    let mount = Mount::of(&registry.store());
    works(&mount, "mv images/staging/_tags/1 images/prod/_tags/");
    assert!(registry.pull("prod:1") == pulled);
    registry.manifest("staging", "1").is(404);
    registry.manifest("staging", &multi_arch().digest()).is(404);
    let taken = transactions(&registry.store());
    assert_eq!(taken.len(), 1, "one move, one transaction");
    mount.order("gc", "sweep untagged grace=0");
    registry.assert_serves(&references(["prod:0", "prod:1"]), "after the sweep");
    mount.order("trash", &format!("undo {}", taken[0]));
    registry.assert_serves(&references(["prod:1", "staging:1"]), "after the undo");
    assert!(registry.pull("staging:1") == pulled);
}

#[test]
fn a_text_may_lead_to_another_mount_of_the_same_store() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    registry.push("app", Some("1"), &image("one"));
    let (mount, other) = (Mount::of(&registry.store()), Mount::with(&registry.store(), &["--read-only"]));
    let target = other.path("images/app/_tags/1").canonicalize().unwrap();
    works(&mount, &format!("ln -s {}/ images/app/_tags/2", target.display()));
    assert!(registry.pull("app:2") == registry.pull("app:1"));
    assert_eq!(errno(symlink(&target, other.path("images/app/_tags/3"))), libc::EROFS);
}

#[test]
fn what_makes_no_tag_is_refused_in_words() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    registry.push("app", Some("1"), &image("one"));
    registry.push("app", Some("2"), &image("two"));
    let mount = Mount::of(&registry.store());
    let before = registry.snapshot();
    let target = format!("manifests/sha256/{}", image("one").hex());
    let nobody = format!("manifests/sha256/{}", &sha256(b"nobody's")["sha256:".len()..]);
    let (read_only, invalid) = ("Read-only file system", "Invalid argument");
    // Without -T, -n: into the directory that the tag leads to.
    fails(&mount, &format!("ln -s {target} images/app/_tags/1"), read_only);
    fails(&mount, "mv images/app/_tags/2 images/app/_tags/1", read_only);
    fails(&mount, &format!("ln -sT {target} images/app/_tags/1"), "File exists");
    fails(&mount, &format!("ln -s {target} images/app/_tags/.hidden"), invalid);
    fails(&mount, "ln -s 'no tag' images/app/_tags/new", invalid);
    fails(&mount, "ln -s 3 images/app/_tags/new", "No such file or directory");
    fails(&mount, &format!("ln -s {nobody} images/app/_tags/new"), "No such file or directory");
    fails(&mount, &format!("ln -s {target} images/none/_tags/new"), "No such file or directory");
    fails(&mount, &format!("ln -s {target} images/none:new"), "No such file or directory");
    fails(&mount, &format!("ln -s {target} images/app/new"), read_only);
    fails(&mount, &format!("ln {target}/manifest.json images/app/_tags/new"), read_only);
    fails(&mount, "mv -T images/app images/Other", "subdirectory of itself");
    fails(&mount, "mv images/app/_tags/1 images/app/", read_only);
    // Of a rename, GNU mv has only one idea what EINVAL means.
    fails(&mount, "mv images/app/_tags/1 images/app/_tags/-x", "subdirectory of itself");
    fails(&mount, &format!("mv {target} images/app/_tags/new"), read_only);
    fails(&mount, "mv README images/app/_tags/new", read_only);
    fails(&mount, "mkdir images/Upper", invalid);
    fails(&mount, "mkdir images/app", "File exists");
    fails(&mount, "mkdir manifests/new", read_only);
    fails(&mount, "touch images/app/_tags/new", read_only);
    if is_root() {
        fails(&mount, "chown -h 4321 images/app/_tags/1", read_only);
    }
    // Exchanging two names is not what a registry can do at once.
    let [one, two] = ["1", "2"].map(|tag| mount.path("images/app/_tags").join(tag));
    let exchange = rustix::fs::RenameFlags::EXCHANGE;
    let swapped = rustix::fs::renameat_with(rustix::fs::CWD, &one, rustix::fs::CWD, &two, exchange);
    assert_eq!(swapped.unwrap_err(), rustix::io::Errno::INVAL);
    assert_eq!(registry.snapshot(), before);
    let log = mount.read("control/log");
    assert!(log.contains("names no image") && log.contains("in the store"), "{log}");
}

#[test]
fn a_directory_for_a_new_repository_is_none_before_there_is_a_tag() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    registry.push("app", Some("1"), &image("one"));
    let before = registry.snapshot();
    let mount = Mount::of(&registry.store());
    works(&mount, "mkdir -p images/team/new images/team/new/_tags");
    assert_eq!(mount.list("images/team"), ["new"]);
    assert_eq!(mount.list("images/team/new/_tags"), [""; 0]);
    let catalog = String::from_utf8(registry.api("GET", "_catalog", &[], &[]).is(200).body).unwrap();
    assert!(!catalog.contains("team"), "{catalog}");
    assert_eq!(registry.stock_garbage(), BTreeSet::new());
    // It outlives the mount; rmdir removes it, and so does a sweep.
    mount.unmount();
    let mount = Mount::of(&registry.store());
    works(&mount, "rmdir images/team/new images/team");
    assert_eq!(registry.snapshot(), before);
    works(&mount, "mkdir images/team");
    mount.order("gc", "sweep now grace=0");
    assert_eq!(mount.list("images"), ["app"]);
    works(&mount, "mkdir images/team && cp -P images/app/_tags/1 images/team/_tags/1 && rm -r images/app");
    mount.order("gc", "sweep now grace=0");
    registry.assert_serves(&references(["team:1"]), "after the sweep");
}

#[test]
fn a_sweep_and_a_promotion_of_what_it_takes_do_not_miss_each_other() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    registry.push("prod", Some("first"), &image("first"));
    let mount = Mount::of(&registry.store());
    let mut promoted = references(["prod:first"]);
    for round in 0..12_u64 {
        let image = image(&format!("round {round}"));
        let digest = registry.push("staging", Some("doomed"), &image);
        registry.api("DELETE", &format!("staging/manifests/{digest}"), &[], &[]).is(202);
        mount.order("refresh", "");
        let (target, link) = (format!("sha256/{}", image.hex()), format!("images/prod/_tags/{round}"));
        let made = std::thread::scope(|scope| {
            let sweep = scope.spawn(|| mount.control("gc", "sweep now grace=0"));
            std::thread::sleep(std::time::Duration::from_millis(round % 6));
            let made = symlink(Path::new(&target), mount.path(&link));
            // It may have found the lock taken for longer than it waits.
            drop(sweep.join().unwrap());
            made
        });
        match made {
            Ok(()) => drop(promoted.insert(format!("prod:{round}"))),
            Err(why) => {
                assert!([Some(libc::ENOENT), Some(libc::EBUSY)].contains(&why.raw_os_error()), "{why}");
            }
        }
        registry.assert_serves(&promoted, &format!("round {round}"));
    }
    println!("{} of 12 were promoted", promoted.len() - 1);
}
