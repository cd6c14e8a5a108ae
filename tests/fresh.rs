//! What a registry writes shows in a mount although the kernel remembers names, attributes and listings.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "the common module serves other tests, too")]

mod common;

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use std::sync::Arc;

use regfs::engine::Engine;
use regfs::store::Store;
use regfs::store::disk::Disk;
use regfs::view::Settings;
use regfs::watch::Watch;

use common::have;
use common::image::{Image, layer};
use common::mount::Mount;
use common::registry::Registry;

const NEEDS: &[&str] = &["docker-registry", "fuse"];
/// Long enough for any machine; an idle one takes hundredths of this.
const SOON: Duration = Duration::from_secs(20);

fn image(name: &str) -> Image {
    Image::oci(name, &[layer("etc/name", name), layer("etc/base", "base")])
}

/// Looks at everything below the images, so that the kernel knows it.
fn warm(mount: &Mount) {
    for _ in 0..2 {
        common::walk(&mount.path("images"));
    }
}

fn sees(mount: &Mount, what: &str, is_so: impl Fn() -> bool) {
    common::wait_for(what, SOON, || is_so().then_some(()));
    warm(mount);
}

#[test]
fn a_warm_mount_shows_what_a_registry_changes() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let (one, two) = (image("one"), image("two"));
    registry.push("app", Some("stable"), &one);
    registry.push("team/tool", Some("1"), &one);
    let mount = Mount::of(&registry.store());
    assert!(mount.read("control/status").contains("\"freshness\": \"events\""));
    warm(&mount);
    let target = |tag: &str| fs::read_link(mount.path(format!("images/app/_tags/{tag}"))).ok();
    let points_at = |tag: &str, image: &Image| target(tag).is_some_and(|to| to.ends_with(image.hex()));
    assert!(points_at("stable", &one) && target("new").is_none());
    let blob = mount.path(format!("images/app/_manifests/sha256/{}", one.hex()));
    let before = fs::metadata(&blob).unwrap();

    // A name that was asked for in vain, and a listing that is open.
    let mut held = fs::read_dir(mount.path("images/app/_tags")).unwrap();
    registry.push("app", Some("new"), &two);
    sees(&mount, "a new tag", || points_at("new", &two) && mount.list("images/app/_tags").len() == 2);
    assert!(held.all(|entry| entry.is_ok()));

    let mut open = fs::File::open(mount.path("images/app/_tags/stable/manifest.json")).unwrap();
    registry.push("app", Some("stable"), &two);
    sees(&mount, "a tag that moved", || points_at("stable", &two));
    // Whoever has the old one open goes on reading it.
    let mut bytes = Vec::new();
    open.seek(SeekFrom::Start(0)).unwrap();
    open.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, one.manifest);

    registry.push("other", Some("1"), &one);
    sees(&mount, "another reference to a blob", || fs::metadata(&blob).unwrap().nlink() > before.nlink());
    sees(&mount, "a new repository", || mount.list("images").contains(&"other".to_string()));

    registry.api("DELETE", &format!("app/manifests/{}", two.digest()), &[], &[]).is(202);
    sees(&mount, "deleted tags to go", || {
        mount.list("images/app/_tags").is_empty() && target("new").is_none()
    });

    fs::remove_dir_all(registry.store().join("docker/registry/v2/repositories/team")).unwrap();
    sees(&mount, "a repository to go", || !mount.list("images").contains(&"team".to_string()));
    assert!(!mount.path("images/team/tool/_tags/1").exists());
    fs::create_dir_all(registry.store().join("docker/registry/v2/repositories/team/later/_layers")).unwrap();
    sees(&mount, "a repository made by hand", || mount.path("images/team/later/_tags").exists());
}

#[test]
fn what_is_removed_through_a_warm_mount_is_gone_everywhere_at_once() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let (one, two) = (image("one"), image("two"));
    registry.push("app", Some("a"), &one);
    registry.push("app", Some("b"), &two);
    let mount = Mount::of(&registry.store());
    warm(&mount);
    mount.rm("images/app/_tags/a");
    assert_eq!(mount.list("images/app/_tags"), ["b"]);
    assert_eq!(mount.list("images/app/_manifests/sha256"), [two.hex()]);
    let id = mount.list("trash").pop().unwrap();
    mount.order("trash", &format!("undo {id}"));
    sees(&mount, "what came back", || mount.list("images/app/_tags") == ["a", "b"]);
    assert!(fs::read_link(mount.path("images/app/_tags/a")).unwrap().ends_with(one.hex()));
}

#[test]
fn without_root_the_directories_tell_what_changes() {
    if !have(&["docker-registry"]) {
        return;
    }
    let registry = Registry::start();
    let (one, two) = (image("one"), image("two"));
    registry.push("app", Some("stable"), &one);
    let store = Disk::open(&registry.store()).unwrap();
    let root = store.full("".as_ref());
    let settings = Settings {
        read_only: true,
        uid: 0,
        gid: 0,
        grace: Duration::ZERO,
        drain: Duration::ZERO,
        keep: Duration::ZERO,
        rate: None,
        mounted_at: std::time::SystemTime::now(),
    };
    let engine = Arc::new(Engine::new(Arc::new(store), settings).unwrap());
    registry.push("early", Some("1"), &one);
    engine.watch_from_now(Watch::of_directories(&root).unwrap()).unwrap();
    // Tags and what they point at, as the last snapshot has it: nobody looks by himself.
    let tags = || -> Vec<(String, String, String)> {
        let catalog = &engine.snapshot().catalog;
        let tags = catalog.repositories.values().flat_map(|r| r.tags.iter().map(move |tag| (r, tag)));
        tags.map(|(repository, tag)| {
            let target = tag.target.map(|id| catalog.digest(id).to_string()).unwrap_or_default();
            let name = catalog.name(tag.name).display().to_string();
            (repository.name.display().to_string(), name, target)
        })
        .collect()
    };
    let shows = |what: &str, expected: &[(&str, &str, &Image)]| {
        let expected: Vec<_> =
            expected.iter().map(|(r, t, i)| (r.to_string(), t.to_string(), i.digest())).collect();
        common::wait_for(what, SOON, || (tags() == expected).then_some(()));
    };
    shows("what came before the watch", &[("app", "stable", &one), ("early", "1", &one)]);
    registry.push("app", Some("stable"), &two);
    shows("a tag that moved", &[("app", "stable", &two), ("early", "1", &one)]);
    registry.push("team/new", Some("1"), &one);
    shows("a new repository", &[("app", "stable", &two), ("early", "1", &one), ("team/new", "1", &one)]);
    registry.push("team/new", Some("1"), &two);
    shows(
        "a tag that moved in it",
        &[("app", "stable", &two), ("early", "1", &one), ("team/new", "1", &two)],
    );
    registry.api("DELETE", &format!("app/manifests/{}", two.digest()), &[], &[]).is(202);
    shows("a deleted tag to go", &[("early", "1", &one), ("team/new", "1", &two)]);
}
