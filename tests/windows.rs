//! The moments in which a sweep beside a registry could lose an image, each forced step by step: a real registry over
//! HTTP, held between two of its system calls while regfs takes its steps.
//!
//! What makes each of them dangerous: `docs/protocol.md`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "windows_harness/mod.rs"]
mod windows_harness;

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::beside::{TIMES, garbage_in, image, in_state, push, step};
use common::check::{blob_path, sha256};
use common::gc::{Report, gc_beside};
use common::have;
use common::image::Image;
use common::mount::Mount;
use common::registry::Registry;
use common::run::{Bounded, regfs};
use windows_harness::{Bound, Held, Slow};

const NEEDS: &[&str] = &["docker-registry", "setpriv", "root"];

/// The layer of an image.
fn layer_of(image: &Image) -> (&[u8], String) {
    (&image.blobs[1], sha256(&image.blobs[1]))
}

/// A registry with an image that stays and one that was deleted.
fn garbage(cache: bool) -> (Held, Image) {
    let held = Held::start(cache);
    let gone = garbage_in(&held);
    (held, gone)
}

fn steps(held: &Held, count: usize) -> Report {
    (1..count).for_each(|_| drop(step(&held.storage())));
    step(&held.storage())
}

fn data_of(held: &Held, digest: &str) -> PathBuf {
    held.root().join(blob_path(digest))
}

fn link_in(root: &Path, repository: &str, digest: &str) -> PathBuf {
    root.join(format!("repositories/{repository}/_layers/{}/link", digest.replace(':', "/")))
}

fn link_of(held: &Held, repository: &str, digest: &str) -> PathBuf {
    link_in(&held.root(), repository, digest)
}

fn head(registry: &Registry, repository: &str, digest: &str) -> u16 {
    registry.api("HEAD", &format!("{repository}/blobs/{digest}"), &[], &[]).status
}

fn put(registry: &Registry, target: &str, image: &Image) -> u16 {
    let headers = [("Content-Type", image.media_type)];
    registry.api("PUT", &format!("app/manifests/{target}"), &headers, &image.manifest).status
}

/// Further steps change nothing about an image, and it pulls from a registry that remembers nothing.
#[track_caller]
fn lasts(held: &mut Held, reference: &str) {
    steps(held, 4);
    held.restart();
    held.pulls(reference).unwrap_or_else(|why| panic!("{reference}: {why}"));
    held.pulls("app:stays").unwrap();
}

#[test]
fn who_asks_before_the_fence_and_sends_the_manifest_after_it_is_told_to_begin_anew() {
    if !have(NEEDS) {
        return;
    }
    for cache in [false, true] {
        let (mut held, gone) = garbage(cache);
        steps(&held, 1);
        for blob in &gone.blobs {
            assert_eq!(head(&held, "app", &sha256(blob)), 200, "nothing is fenced yet");
        }
        assert!(in_state(&steps(&held, 1), "fenced") >= 2);
        // Even one that remembered was told to forget.
        assert_eq!(put(&held, "again", &gone), 400);
        push(&held, "app", "again", &gone);
        lasts(&mut held, "app:again");
    }
}

/// What a registry that remembers would do to whoever only waits: it says "exists" of what is long gone, and takes an
/// image that nobody can pull. This is what the gate is for.
#[test]
fn a_registry_that_remembers_takes_an_image_whose_layers_are_gone_unless_it_is_told_to_forget() {
    if !have(NEEDS) {
        return;
    }
    let (mut held, gone) = garbage(true);
    let (_, digest) = layer_of(&gone);
    assert_eq!(head(&held, "app", &digest), 200);
    let (data, link) = (data_of(&held, &digest), link_of(&held, "app", &digest));
    let bytes = fs::read(&data).unwrap();
    fs::remove_file(&link).unwrap();
    fs::remove_file(&data).unwrap();
    assert_eq!(head(&held, "app", &digest), 200, "from memory");
    let from = format!("team/blobs/uploads/?mount={digest}&from=app");
    held.api("POST", &from, &[], &[]).is(201);
    assert_eq!(put(&held, "broken", &gone), 201);
    assert!(held.pulls("app:broken").is_err());
    // A DELETE makes it forget, whatever it answers when there is no link.
    held.api("DELETE", &format!("app/blobs/{digest}"), &[], &[]);
    assert_eq!(head(&held, "app", &digest), 404);
    assert_eq!(put(&held, "broken", &gone), 400);
    held.push_blob("app", &bytes);
    held.restart();
    held.pulls("app:broken").unwrap();
}

#[test]
fn a_delete_of_a_blob_by_the_digest_of_a_manifest_makes_a_registry_forget_that_and_touches_no_tag() {
    if !have(NEEDS) {
        return;
    }
    let held = Held::start(true);
    let one = image("one");
    held.push("app", Some("1"), &one);
    held.manifest("app", &one.digest()).is(200);
    let revision =
        held.root().join(format!("repositories/app/_manifests/revisions/sha256/{}/link", one.hex()));
    held.api("DELETE", &format!("app/blobs/{}", one.digest()), &[], &[]);
    assert!(revision.exists());
    held.pulls("app:1").unwrap();
}

/// A HEAD that has found the link before the fence makes the registry remember it after it was told to forget.
#[test]
fn what_a_registry_remembers_again_during_the_fence_is_asked_for_before_the_bytes_go() {
    if !have(NEEDS) {
        return;
    }
    let (mut held, gone) = garbage(true);
    let (_, digest) = layer_of(&gone);
    held.restart();
    let is_remembered = |held: &Held| {
        let hold = held.hold(&format!("_layers/{}/link", digest.replace(':', "/")), 0);
        std::thread::scope(|scope| {
            let asking = scope.spawn(|| head(held, "app", &digest));
            hold.reached();
            assert!(in_state(&step(&held.storage()), "fenced") > 0);
            drop(hold);
            assert_eq!(asking.join().unwrap(), 200);
        });
        assert_eq!(head(held, "app", &digest), 200, "from memory");
        assert!(!link_of(held, "app", &digest).exists());
    };
    steps(&held, 1);
    is_remembered(&held);
    // The gate finds it, and has it forgotten; the wait begins anew.
    let report = steps(&held, 1);
    assert!(data_of(&held, &digest).exists(), "{:?}", report.states);
    assert_eq!(head(&held, "app", &digest), 404);
    steps(&held, 1);
    assert!(!data_of(&held, &digest).exists());
    push(&held, "app", "again", &gone);
    lasts(&mut held, "app:again");

    // The same, and the image is pushed on that answer: then everything comes back.
    let (mut held, gone) = garbage(true);
    held.restart();
    steps(&held, 1);
    is_remembered(&held);
    held.push_blob("app", &gone.blobs[0]);
    assert_eq!(put(&held, "again", &gone), 201, "from memory");
    steps(&held, 1);
    assert!(link_of(&held, "app", &digest).exists());
    lasts(&mut held, "app:again");

    // Or another repository gets it by a mount, from memory.
    let (mut held, gone) = garbage(true);
    held.restart();
    steps(&held, 1);
    is_remembered(&held);
    held.api("POST", &format!("team/blobs/uploads/?mount={digest}&from=app"), &[], &[]).is(201);
    steps(&held, 1);
    assert!(link_of(&held, "app", &digest).exists(), "a link to it is new");
    held.push_blob("team", &gone.blobs[0]);
    let headers = [("Content-Type", gone.media_type)];
    held.api("PUT", "team/manifests/mounted", &headers, &gone.manifest).is(201);
    lasts(&mut held, "team:mounted");
}

/// Runs a request that sees the bytes of a layer and then sleeps before it writes the link, while `meanwhile` happens.
fn commit_that_sleeps(held: &Held, gone: &Image, meanwhile: &dyn Fn()) {
    let (bytes, digest) = layer_of(gone);
    let link = link_in(&held.store().join("docker/registry/v2"), "app", &digest);
    // Where it has to be made, nobody but whoever writes the link makes it.
    let directory = link.parent().unwrap();
    let _ = fs::remove_dir(directory);
    let began = Instant::now();
    let slow = Slow::before_mkdir(held, directory, SLEEPS.as_secs());
    std::thread::scope(|scope| {
        let uploading = scope.spawn(|| held.push_blob("app", bytes));
        // It has seen the bytes when its upload has all that it will get, and goes on sleeping for seconds.
        common::wait_for("the upload to be committed", SLEEPS, || {
            let uploads = common::snapshot(&held.root().join("repositories/app/_uploads"));
            let is_whole = |path: &PathBuf| path.ends_with(format!("hashstates/sha256/{}", bytes.len()));
            uploads.keys().any(is_whole).then_some(())
        });
        std::thread::sleep(Duration::from_millis(300));
        meanwhile();
        assert!(!uploading.is_finished(), "after {:?} it has not slept long enough", began.elapsed());
        uploading.join().unwrap();
    });
    drop(slow);
}

/// Longer than any `meanwhile` takes.
const SLEEPS: Duration = Duration::from_secs(8);

#[test]
fn a_commit_that_saw_the_bytes_right_before_they_moved_brings_them_back() {
    if !have(&[NEEDS, &["strace"]].concat()) {
        return;
    }
    for cache in [false, true] {
        let (mut held, gone) = garbage(cache);
        let (_, digest) = layer_of(&gone);
        steps(&held, 2);
        commit_that_sleeps(&held, &gone, &|| {
            steps(&held, 1);
            assert!(!data_of(&held, &digest).exists(), "quarantined");
        });
        assert!(link_of(&held, "app", &digest).exists() && !data_of(&held, &digest).exists());
        held.push_blob("app", &gone.blobs[0]);
        let answer = put(&held, "again", &gone);
        assert_eq!(answer, if cache { 201 } else { 400 });
        steps(&held, 1);
        assert!(data_of(&held, &digest).exists());
        push(&held, "app", "again", &gone);
        lasts(&mut held, "app:again");
    }
}

/// Longer than all waits, which no request may be: its own image is lost, but nobody else's.
#[test]
fn a_link_that_comes_after_the_purge_is_forgotten_before_others_rely_on_it() {
    if !have(&[NEEDS, &["strace", "fuse"]].concat()) {
        return;
    }
    for mounted in [false, true] {
        let (mut held, gone) = garbage(true);
        let (_, digest) = layer_of(&gone);
        steps(&held, 2);
        let mount = mounted.then(|| mount_that_watches(&held.storage(), &TIMES));
        commit_that_sleeps(&held, &gone, &|| {
            steps(&held, 2);
            assert!(!data_of(&held, &digest).exists());
            assert!(common::gc::transactions(&held.storage()).is_empty(), "purged");
        });
        match mounted {
            true => common::wait_for("the registry to forget", Duration::from_secs(20), || {
                (head(&held, "app", &digest) == 404).then_some(())
            }),
            false => {
                assert_eq!(head(&held, "app", &digest), 200, "from memory");
                steps(&held, 1);
                assert_eq!(head(&held, "app", &digest), 404);
            }
        }
        push(&held, "app", "again", &gone);
        drop(mount);
        lasts(&mut held, "app:again");
    }
}

/// A mount that the kernel tells of changes.
fn mount_that_watches(store: &Path, words: &[&str]) -> Mount {
    let mount = Mount::with(store, words);
    common::wait_for("the mount to watch", Duration::from_secs(20), || {
        mount.read("control/status").contains("\"events\"").then_some(())
    });
    mount
}

/// Registries before 3.1 write a link in place: into the file that has just moved to the trash.
#[test]
fn a_link_that_is_written_into_the_file_that_just_moved_comes_back() {
    if !have(NEEDS) {
        return;
    }
    for cache in [false, true] {
        let (mut held, gone) = garbage(cache);
        let (bytes, digest) = layer_of(&gone);
        steps(&held, 1);
        let hold = held.hold(&format!("_layers/{}/link", digest.replace(':', "/")), 0);
        std::thread::scope(|scope| {
            let uploading = scope.spawn(|| held.push_blob("app", bytes));
            hold.reached();
            // A registry that remembers is told to forget, which opens the same link: it is gone.
            assert!(in_state(&step(&held.storage()), "fenced") > 0);
            assert!(!link_of(&held, "app", &digest).exists());
            drop(hold);
            uploading.join().unwrap();
        });
        assert!(!link_of(&held, "app", &digest).exists(), "written into the trash");
        held.push_blob("app", &gone.blobs[0]);
        assert_eq!(put(&held, "again", &gone), if cache { 201 } else { 400 });
        steps(&held, 1);
        assert!(link_of(&held, "app", &digest).exists());
        push(&held, "app", "again", &gone);
        lasts(&mut held, "app:again");
    }
}

/// A child of an index that is to come is removed by `rm`. Registries before 3.0 look for it and refuse the index; later
/// ones take it from memory, which here is what that leaves on the disk.
#[test]
fn a_child_that_rm_took_comes_back_with_an_index_that_names_it() {
    if !have(&[NEEDS, &["fuse"]].concat()) {
        return;
    }
    let mut held = Held::start(true);
    held.push("app", Some("stays"), &image("stays"));
    let (first, second) = (image("first"), image("second"));
    held.push("app", Some("first"), &first);
    held.push("app", Some("second"), &second);
    held.manifest("app", &first.digest()).is(200);
    // It can't be told to forget: it answers nowhere that is known.
    let mount =
        mount_that_watches(&held.storage(), &[&TIMES[..], &["--registry", "http://127.0.0.1:1"]].concat());
    mount.rm("images/app:first");
    let revision = |digest: &str| {
        held.root().join(format!("repositories/app/_manifests/revisions/{}/link", digest.replace(':', "/")))
    };
    assert!(!revision(&first.digest()).exists());
    let index = Image::index(&[("amd64", &first), ("arm64", &second)]);
    if put(&held, "both", &index) != 201 {
        common::store::put(&held.root().join(blob_path(&index.digest())), &index.manifest);
        common::store::put(&revision(&index.digest()), index.digest().as_bytes());
        let tag = held.root().join("repositories/app/_manifests/tags/both/current/link");
        common::store::put(&tag, index.digest().as_bytes());
    }
    common::wait_for("the child to come back", Duration::from_secs(20), || {
        revision(&first.digest()).exists().then_some(())
    });
    mount.unmount();
    lasts(&mut held, "app:both");
    held.pulls(&format!("app@{}", first.digest())).unwrap();
}

/// Everything that a manifest names lies in the trash, by a sweep that was told that no registry runs; one runs, and
/// remembers all of it. With the guard the image is whole the moment it is accepted.
#[test]
fn a_guarded_registry_never_serves_an_image_that_is_not_whole() {
    if !have(&[NEEDS, &["fuse"]].concat()) {
        return;
    }
    let place = Bound::new();
    let bound = place.bound.to_str().unwrap().to_string();
    let words = ["--guard", &bound, "--keep", "1h"];
    let mount = Mount::with(&place.storage, &words);
    let mut registry = Registry::start_at(place.bound.clone(), true);
    registry.push("app", Some("stays"), &image("stays"));
    let (first, second) = (image("first"), image("second"));
    let index = Image::index(&[("amd64", &first), ("arm64", &second)]);
    for round in 0..5 {
        registry.push("app", Some("gone"), &index);
        for one in [&index, &first, &second] {
            registry.api("DELETE", &format!("app/manifests/{}", one.digest()), &[], &[]).is(202);
        }
        let sweep = ["--registry-stopped", "--force", "--grace", "0", "--keep", "1h", "--no-cache"];
        let taken = gc_beside(&place.storage, &sweep).taken_blobs();
        assert!(index.digests().is_subset(&taken), "{taken:?}");
        // What a client sends that asked for the layers before.
        for one in [&first, &second] {
            assert_eq!(put(&registry, &one.digest(), one), 201);
            registry.pulls(&format!("app@{}", one.digest())).unwrap();
        }
        assert_eq!(put(&registry, "again", &index), 201);
        registry.pulls("app:again").unwrap_or_else(|why| panic!("round {round}: {why}"));
    }
    let status: serde_json::Value = serde_json::from_str(&mount.read("control/status")).unwrap();
    assert_eq!(status["guard"]["directory"], bound.as_str());
    assert!(status["guard"]["restored"].as_u64() >= Some(20), "{status}");

    // Killed, it holds nobody; the next one finds the directory mounted.
    mount.crash();
    registry.push("app", Some("unguarded"), &image("unguarded"));
    mount.start(&place.storage, &words).exits(0);
    registry.push("app", Some("guarded"), &image("guarded"));
    mount.unmount();
    registry.restart();
    for tag in ["stays", "again", "unguarded", "guarded"] {
        registry.pulls(&format!("app:{tag}")).unwrap();
    }
}

#[test]
fn a_guard_takes_an_empty_directory_or_a_bind_mount_of_the_storage() {
    if !have(&[NEEDS, &["fuse"]].concat()) {
        return;
    }
    let place = Bound::new();
    let point = common::scratch();
    let guarded = |directory: &Path| {
        let mut mount = regfs(["mount", "--guard"]);
        mount.arg(directory).arg(&place.storage).arg(point.path()).outcome().exits(1)
    };
    guarded(&place.storage).says("is the storage itself");
    guarded(&place.storage.join("docker")).says("neither empty nor a bind mount");
    guarded(Path::new("/nonexistent")).says("/nonexistent");
}
