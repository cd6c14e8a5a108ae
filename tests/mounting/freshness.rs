//! What `control/status` says of freshness is so, and `control/refresh` looks.

use std::fs;
use std::path::Path;

use super::common::image::{Image, layer};
use super::common::mount::Mount;
use super::common::run::{Bounded, clean, regfs, sh};
use super::common::store::Store;
use super::common::{NOBODY, have, scratch, wait_for};
use super::{LIMIT, leave_others_alone, store};

fn freshness(mount: &Mount) -> (String, String) {
    let status: serde_json::Value = serde_json::from_str(&mount.read("control/status")).unwrap();
    let text = |key: &str| status[key].as_str().unwrap_or_default().to_string();
    (text("freshness"), text("freshness_reason"))
}

fn push(store: &Store, repository: &str) {
    store.push(repository, Some("1"), &Image::oci(repository, &[layer(repository, "1")]));
}

/// A filesystem that is unmounted with the test.
struct Below(tempfile::TempDir);

impl Drop for Below {
    fn drop(&mut self) {
        clean("umount").arg("-l").arg(self.0.path()).outcome();
    }
}

#[test]
fn changes_below_a_filesystem_of_others_show() {
    if !have(&["fuse", "root", "bindfs"]) {
        return;
    }
    let store = store();
    for options in [&[][..], &["--read-only"]] {
        let below = Below(scratch());
        clean("bindfs").arg(store.root()).arg(below.0.path()).outcome().exits(0);
        let mount = Mount::with(below.0.path(), options);
        wait_for("a word about it", LIMIT, || (!freshness(&mount).1.is_empty()).then_some(()));
        let (freshness, reason) = freshness(&mount);
        assert_eq!(freshness, "looks");
        assert!(reason.contains("FUSE"), "{reason}");
        let name = format!("later{}", options.len());
        push(&store, &name);
        wait_for("a repository that came below", LIMIT, || {
            mount.list("images").contains(&name).then_some(())
        });
        mount.unmount();
    }
}

#[test]
fn a_part_on_a_mount_of_its_own_is_looked_at() {
    if !have(&["fuse", "root", "unshare"]) {
        return;
    }
    let (store, dir) = (store(), scratch());
    let script = format!(
        "{others}; set -e; mkdir {dir}/blobs {dir}/point; cp -a {root}/blobs/. {dir}/blobs; mount --bind {dir}/blobs {root}/blobs
         {REGFS} mount --read-only {store} {dir}/point; sleep 1; grep freshness {dir}/point/control/status; {REGFS} umount {dir}/point",
        REGFS = super::REGFS,
        others = leave_others_alone("none"),
        dir = dir.path().display(),
        store = store.root().display(),
        root = store.root().join("docker/registry/v2").display(),
    );
    let said = clean("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .outcome()
        .exits(0);
    assert!(said.stdout.contains("\"looks\"") && said.stdout.contains("a mount of its own"), "{said}");
}

#[test]
fn a_local_storage_tells_and_a_mount_leaves_no_trace_in_it() {
    if !have(&["fuse", "root"]) {
        return;
    }
    let store = store();
    let before = super::common::names(&store.root().join("docker/registry/v2"));
    let mount = Mount::of(store.root());
    assert_eq!(freshness(&mount), ("events".to_string(), String::new()));
    assert_eq!(super::common::names(&store.root().join("docker/registry/v2")), before);
    mount.unmount();
}

#[test]
fn a_refresh_looks_at_what_nobody_told() {
    use std::sync::Arc;
    use std::time::Duration;

    use regfs::engine::Engine;
    use regfs::store::disk::Disk;
    use regfs::trash::Author;
    use regfs::view::node::Node;
    use regfs::watch::Watch;

    // A watch of another storage tells nothing of this one.
    let (store, other) = (store(), store());
    let settings = regfs::view::Settings {
        read_only: true,
        uid: 0,
        gid: 0,
        grace: Duration::ZERO,
        drain: Duration::ZERO,
        keep: Duration::ZERO,
        rate: None,
        mounted_at: std::time::SystemTime::now(),
    };
    let disk = Arc::new(Disk::open(store.root()).unwrap());
    let engine = Arc::new(Engine::new(disk, settings).unwrap());
    engine.watch(Watch::of_directories(&other.root().join("docker/registry/v2")).unwrap()).unwrap();
    push(&store, "later");
    let is_there = || engine.snapshot().catalog.repositories.values().any(|r| r.name == Path::new("later"));
    assert!(!is_there());
    engine.command(Node::ControlRefresh, "\n", &Author::current("a test")).unwrap();
    assert!(is_there());
}

#[test]
fn others_may_look_where_they_are_let_in() {
    if !have(&["fuse", "root", "setpriv"]) {
        return;
    }
    let store = store();
    let mount = Mount::with(store.root(), &["--allow-other"]);
    mount.order("gc", "dry-run");
    let as_nobody = |script: &str| {
        let nobody = format!("setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups sh -c '{script}'");
        sh(mount.point(), &nobody).outcome()
    };
    as_nobody(
        "set -e; cat README summary.txt usage.tsv control/status control/log reachability/summary 2> /dev/null || true
         cat README control/status control/log > /dev/null; ls control trash images > /dev/null; find . -name usage.tsv | xargs cat",
    )
    .exits(0);
    for (command, why) in [
        ("cat control/gc", "Permission denied"),
        ("echo sweep > control/gc", "Permission denied"),
        ("echo > control/refresh", "Permission denied"),
        ("rm images/app/_tags/1", "Permission denied"),
    ] {
        let refused = as_nobody(command);
        assert!(refused.code != Some(0) && refused.stderr.contains(why), "{command}: {refused}");
    }
    assert_eq!(fs::read_dir(mount.path("images/app/_tags")).unwrap().count(), 1);
    mount.unmount();
}

#[test]
fn other_users_mount_what_they_may_read() {
    if !have(&["fuse", "root", "setpriv", "fusermount3", "unshare", "mknod"]) {
        return;
    }
    // After root was there.
    let store = store();
    let mount = Mount::of(store.root());
    mount.rm("images/app/_tags/1");
    mount.unmount();
    // Sees a cache, too, that is not its own to believe.
    regfs(["gc", "--dry-run"]).arg(store.root()).outcome().exits(0);
    let dir = scratch();
    std::os::unix::fs::chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    // In a mount namespace in which everybody may open the device, as on most machines.
    let script = format!(
        "{others}; set -e; mount -t tmpfs none /mnt; mknod /mnt/fuse c 10 229; chmod 666 /mnt/fuse; mount --bind /mnt/fuse /dev/fuse
         exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups sh -e -c '
             {REGFS} mount {store} {point}; ls {point}/images {point}/trash; grep read_only {point}/control/status
             {REGFS} umount {point}; {REGFS} gc --dry-run {store} > /dev/null; {REGFS} trash {store} list'",
        REGFS = super::REGFS,
        others = leave_others_alone("none"),
        store = store.root().display(),
        point = dir.path().display(),
    );
    let said = clean("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .outcome()
        .exits(0);
    assert!(said.stdout.contains("\"read_only\": true"), "{said}");
}
