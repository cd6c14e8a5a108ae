//! Filesystems that can do less than a local disk: what regfs does on one is done on all, or refused at the start.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use common::check::{Live, Roots, blobs, sha256};
use common::gc::{gc, gc_outcome, transactions};
use common::image::{Image, layer};
use common::mount::Mount;
use common::run::{Bounded, clean, regfs};
use common::store::Store;
use common::{difference, have, snapshot};
use tempfile::TempDir;

const APP: &str = "team/app";

fn image(name: &str) -> Image {
    Image::oci(name, &[layer("first", name), layer("second", name)])
}

/// A store seen through a filesystem without the flags of renameat2.
struct Through {
    store: Store,
    dir: TempDir,
}

impl Through {
    fn bindfs(options: &[&str]) -> Option<Through> {
        if !have(&["root", "bindfs", "fuse"]) {
            return None;
        }
        let (store, dir) = (Store::new(), common::scratch());
        clean("bindfs").args(options).arg(store.root()).arg(dir.path()).outcome().exits(0);
        Some(Through { store, dir })
    }

    fn root(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Through {
    fn drop(&mut self) {
        // Panicking here would hide why the test failed.
        let _ =
            std::panic::catch_unwind(|| clean("umount").arg("-l").arg(self.dir.path()).outcome().exits(0));
    }
}

fn contents(store: &Store) -> std::collections::BTreeMap<PathBuf, String> {
    let mut all = snapshot(&store.path(""));
    all.retain(|path, _| !path.starts_with(".regfs"));
    all
}

#[test]
fn a_sweep_its_undo_and_a_repair_work_without_renameat2() {
    let Some(through) = Through::bindfs(&[]) else { return };
    let store = &through.store;
    store.push(APP, Some("1"), &image("one"));
    let untagged = store.push(APP, None, &image("two"));
    store.put_blob(b"garbage");
    let live = Live::of(store.root(), Roots::Tags);
    let before = contents(store);

    gc(through.root(), &["--grace", "1ms", "--untagged"]);
    live.assert_intact();
    assert_eq!(blobs(store.root()), live.blobs);
    let [id] = transactions(through.root()).try_into().unwrap();
    regfs(["trash"]).arg(through.root()).args(["undo", &id]).outcome().exits(0);
    let lost = difference(&before, &contents(store));
    assert!(lost.is_empty(), "{lost:?}");
    assert!(store.revision_link(APP, &untagged).exists());

    // A broken link is replaced, and the broken one kept.
    let broken = store.layer_link(APP, &sha256(&image("one").blobs[0]));
    let revision = store.revision_link(APP, &image("one").digest());
    fs::write(&revision, "nonsense").unwrap();
    fs::remove_file(&broken).unwrap();
    gc(through.root(), &["--grace", "0", "--repair"]);
    assert_eq!(fs::read(&revision).unwrap(), image("one").digest().as_bytes());
    assert_eq!(revision.metadata().unwrap().nlink(), 1);
    assert!(broken.exists());
    gc(through.root(), &["--grace", "0", "--untagged", "--now"]);
    assert_eq!(blobs(store.root()), live.blobs);
    live.assert_intact();
}

#[test]
fn a_mount_can_remove_and_tag_without_renameat2() {
    let Some(through) = Through::bindfs(&[]) else { return };
    for tag in ["1", "2"] {
        through.store.push(APP, Some(tag), &image(tag));
    }
    let mount = Mount::of(through.root());
    assert!(
        mount.read("control/status").contains("\"read_only\": false"),
        "{}",
        mount.read("control/status")
    );
    mount.rm(&format!("images/{APP}/_tags/2"));
    let tags = mount.path(format!("images/{APP}/_tags"));
    common::run::sh(&tags, "cp -P 1 new && mv -T new 1x").outcome().exits(0);
    common::run::sh(&tags, "cp -P 1 other && mv -T other 1x").outcome().exits(0);
    assert_eq!(mount.list(&format!("images/{APP}/_tags")), ["1", "1x"]);
    mount.unmount();
    Live::of(through.store.root(), Roots::Tags).assert_complete();
}

#[test]
fn a_read_only_filesystem_is_only_looked_at() {
    let Some(through) = Through::bindfs(&["-o", "ro"]) else { return };
    through.store.push(APP, Some("1"), &image("one"));
    through.store.put_blob(b"garbage");
    gc_outcome(through.root(), &["--dry-run", "--grace", "0"]).exits(0);
    gc_outcome(through.root(), &["--grace", "0"]).exits(1);
    let mount = Mount::of(through.root());
    assert!(mount.read("control/status").contains("\"read_only\": true"));
    assert_eq!(mount.list(&format!("images/{APP}/_tags")), ["1"]);
    mount.unmount();
}
