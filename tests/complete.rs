//! After a sweep and a purge a store is what a fresh registry with the same images would be, file for file and
//! directory for directory; and before the purge, an undo brings every single file back.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use common::check::{Live, Roots, blob_path, hex, registry_dir, sha256, sha512};
use common::gc::{gc, text, transactions};
use common::image::{Image, layer};
use common::registry::Registry;
use common::run::{Bounded, regfs};
use common::store::put;
use common::{have, names, snapshot, walk};

const NEEDS: &[&str] = &["docker-registry", "skopeo", "setpriv"];

/// What a writer that crashes leaves behind the name of what it wrote.
const TMP: &str = ".0b4e8a4e-5d1f-4b7a-9d39-0d5a3f1c2b6e.tmp";

/// The images that stay.
const KEPT: [&str; 4] = ["app:1", "app:multi", "app:moving", "team/tool:1"];

fn image(name: &str) -> Image {
    Image::oci(name, &[layer("etc/os-release", "ID=shared\n"), layer("own", name)])
}

fn multi() -> Image {
    let [amd64, arm64] =
        ["amd64", "arm64"].map(|name| Image::oci_for(name, "multi", &[layer("bin/tool", name)]));
    Image::index(&[("amd64", &amd64), ("arm64", &arm64)])
}

/// Every path below the registry directory, without those of regfs.
fn tree(registry: &Registry) -> BTreeSet<PathBuf> {
    let root = registry_dir(&registry.store());
    let all = walk(&root).into_iter().map(|path| path.strip_prefix(&root).unwrap().to_path_buf());
    all.filter(|path| !path.starts_with(".regfs")).collect()
}

/// Every file with its bytes, owner, mode and time.
fn files(registry: &Registry) -> BTreeMap<PathBuf, String> {
    let root = registry_dir(&registry.store());
    let mut all = snapshot(&root);
    all.retain(|path, _| !path.starts_with(".regfs") && root.join(path).is_file());
    all
}

/// Pushes the images that stay.
fn push_kept(registry: &Registry) {
    registry.skopeo_push("app:1", &image("one"));
    registry.skopeo_push("app:multi", &multi());
    registry.skopeo_push("team/tool:1", &image("tool"));
}

fn delete(registry: &Registry, name: &str, digest: &str) {
    registry.api("DELETE", &format!("{name}/manifests/{digest}"), &[], &[]).is(202);
}

fn start_upload(registry: &Registry, name: &str) -> PathBuf {
    let started = registry.api("POST", &format!("{name}/blobs/uploads/"), &[], &[]).is(202);
    let location = started.header("location").unwrap().to_string();
    let id = location.split_once("/uploads/").unwrap().1.split('?').next().unwrap().to_string();
    let (_, path) = location.split_once("/v2/").unwrap();
    registry.api("PATCH", path, &[("Content-Type", "application/octet-stream")], b"half of it").is(202);
    registry_dir(&registry.store()).join("repositories").join(name).join("_uploads").join(id)
}

/// Leaves behind whatever registries, their clients and crashes leave behind.
fn litter(registry: &Registry) {
    let root = registry_dir(&registry.store());
    let repository = |name: &str, path: &str| root.join("repositories").join(name).join(path);
    // Deleted by the API: a manifest, a blob's link, the manifest of a whole repository.
    registry.skopeo_push("app:old", &image("old"));
    delete(registry, "app", &image("old").digest());
    let loose = registry.push_blob("app", b"deleted by the API");
    registry.api("DELETE", &format!("app/blobs/{loose}"), &[], &[]).is(202);
    registry.push_blob("app", b"never named");
    registry.skopeo_push("gone/for/good:1", &image("gone"));
    delete(registry, "gone/for/good", &image("gone").digest());
    // A tag that has moved, and what it pointed at is gone.
    registry.skopeo_push("app:moving", &image("before"));
    registry.skopeo_push("app:moving", &image("after"));
    delete(registry, "app", &image("before").digest());
    registry.skopeo_push("app:moving", &image("after"));
    // A mount that no manifest followed: the blob is in use elsewhere.
    registry.push_blob("team/tool", &multi().children[0].blobs[1]);
    // A repository that never got a manifest.
    registry.push_blob("half/pushed", b"half pushed");
    // Uploads: whole, of a client that gave up; hash states only; nothing at all.
    start_upload(registry, "app");
    let upload = start_upload(registry, "app");
    fs::remove_file(upload.join("startedat")).unwrap();
    fs::remove_file(upload.join("data")).unwrap();
    let upload = start_upload(registry, "team/tool");
    put(&upload.join(format!("startedat{TMP}")), b"2020-01-0");
    fs::create_dir_all(repository("app", "_uploads/0a1b2c3d-0000-4000-8000-000000000000/hashstates/sha256"))
        .unwrap();
    start_upload(registry, "only/uploads");
    // Writers that crashed: beside what they wrote before, and where nothing came of it.
    let kept = image("one");
    put(&root.join(blob_path(&kept.digest())).with_file_name(format!("data{TMP}")), b"{\"schema");
    put(&root.join(blob_path(&sha256(b"never"))).with_file_name(format!("data{TMP}")), b"{");
    let slashed = |digest: &str| digest.replace(':', "/");
    let own = slashed(&sha256(&kept.blobs[1]));
    for place in [
        format!("_layers/{own}"),
        format!("_layers/{}", slashed(&sha256(b"no such layer"))),
        format!("_manifests/revisions/{}", slashed(&kept.digest())),
        format!("_manifests/revisions/{}", slashed(&sha256(b"no such manifest"))),
        "_manifests/tags/1/current".to_string(),
        format!("_manifests/tags/1/index/{}", slashed(&kept.digest())),
    ] {
        put(&repository("app", &place).join(format!("link{TMP}")), b"sha256:");
    }
    // Links to what is not there.
    for digest in [sha256(b"not there"), sha256(b"nor this")] {
        put(&repository("app", &format!("_layers/{}/link", slashed(&digest))), digest.as_bytes());
    }
    let strong = slashed(&sha512(b"not there"));
    put(&repository("app", &format!("_layers/{strong}/link")), sha256(b"not there").as_bytes());
    // Shells.
    let empty = blob_path(&sha256(b"swept by somebody else"));
    for place in [
        empty.parent().unwrap().to_path_buf(),
        unused_shard(&root),
        format!("repositories/app/_layers/sha256/{}", hex(&sha256(b"empty"))).into(),
        format!("repositories/app/_manifests/revisions/sha256/{}", hex(&sha256(b"empty"))).into(),
        "repositories/app/_manifests/revisions/sha512".into(),
        "repositories/names/without/anything".into(),
        "repositories/bare/_manifests/tags".into(),
        "repositories/bare/_manifests/revisions/sha256".into(),
        "repositories/bare/_layers/sha256".into(),
        "repositories/bare/_uploads".into(),
    ] {
        fs::create_dir_all(root.join(place)).unwrap();
    }
}

/// A shard in which no blob lies.
fn unused_shard(root: &Path) -> PathBuf {
    let blobs = root.join("blobs/sha256");
    let used = names(&blobs);
    let free = (0..256).map(|n| format!("{n:02x}")).find(|name| !used.contains(name)).unwrap();
    Path::new("blobs/sha256").join(free)
}

#[test]
fn a_sweep_and_a_purge_leave_what_a_fresh_registry_would_have() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    push_kept(&registry);
    litter(&registry);
    let store = registry.store();
    let live = Live::of(&store, Roots::Revisions);
    live.assert_complete();
    let before = files(&registry);
    let arguments = ["--grace", "0", "--uploads", "0"];

    // A dry run that looks as closely says the same, and changes nothing.
    let paths = |report: &common::gc::Report| -> BTreeSet<(String, String)> {
        report.taken.iter().map(|t| (t.kind.clone(), t.path.clone())).collect()
    };
    let tree_before = tree(&registry);
    let planned = gc(&store, &[&["--dry-run", "--thorough"], &arguments[..]].concat());
    assert_eq!(tree(&registry), tree_before, "a dry run removes no directory");
    let report = gc(&store, &arguments);
    assert_eq!(paths(&report), paths(&planned));
    let kinds: BTreeSet<&str> = report.taken.iter().map(|t| t.kind.as_str()).collect();
    let expected = ["blob", "directory", "layer-link", "repository", "tag-history", "unfinished", "upload"];
    assert_eq!(kinds, BTreeSet::from(expected), "{report:#?}");

    // Nothing is lost before the purge.
    let id = text(report.transaction.as_ref().unwrap());
    regfs(["trash"]).arg(&store).args(["undo", &id]).outcome().exits(0);
    let after = files(&registry);
    assert_eq!(common::difference(&before, &after), [""; 0], "after the undo");
    live.assert_intact();

    // Once more, and for good.
    gc(&store, &arguments);
    live.assert_intact();
    regfs(["trash"]).arg(&store).args(["purge", "--all", "--registry-stopped", "--force"]).outcome().exits(0);
    assert_eq!(transactions(&store), [""; 0]);
    live.assert_intact();
    let fresh = Registry::start();
    for reference in KEPT {
        fresh.copy_from(&registry, reference);
    }
    let (ours, theirs) = (tree(&registry), tree(&fresh));
    let more: Vec<_> = ours.difference(&theirs).collect();
    let less: Vec<_> = theirs.difference(&ours).collect();
    assert!(more.is_empty() && less.is_empty(), "more than a fresh registry: {more:#?}\nless: {less:#?}");
    let own = names(&registry_dir(&store).join(".regfs"));
    assert_eq!(own, ["cache", "clock", "lock", "registries.json", "reserve"], "what regfs keeps for itself");
    for reference in KEPT {
        assert_eq!(registry.pull(reference), fresh.pull(reference), "{reference}");
    }
    // It goes on as if nothing had been: what went can be pushed again.
    push_kept(&registry);
    registry.skopeo_push("gone/for/good:1", &image("gone"));
    registry.skopeo_push("app:old", &image("old"));
    assert_eq!(gc(&store, &["--grace", "0", "--dry-run", "--thorough"]).taken.len(), 0);
}

#[test]
fn a_sweep_that_frees_at_once_leaves_the_same() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    push_kept(&registry);
    litter(&registry);
    gc(&registry.store(), &["--grace", "0", "--uploads", "0", "--now"]);
    let fresh = Registry::start();
    KEPT.iter().for_each(|reference| fresh.copy_from(&registry, reference));
    assert_eq!(tree(&registry), tree(&fresh));
}

#[test]
fn what_is_young_stays_and_so_do_the_directories_of_what_lives() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    push_kept(&registry);
    litter(&registry);
    let before = tree(&registry);
    let report = gc(&registry.store(), &[]);
    assert_eq!(report.taken.len(), 0, "{report:#?}");
    assert_eq!(tree(&registry), before);
}

#[test]
fn foreign_files_stay_and_keep_their_directories() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    push_kept(&registry);
    let root = registry_dir(&registry.store());
    let bare = root.join("repositories/bare/_layers/sha256");
    let foreign = [
        root.join(blob_path(&sha256(b"x"))).with_file_name("notes.txt"),
        bare.join(hex(&sha256(b"x"))).join("link.tmp"),
        bare.join(hex(&sha256(b"y"))).join(".nfs0000000000000001"),
        root.join("repositories/app/_uploads/.keep"),
    ];
    foreign.iter().for_each(|path| put(path, b"not a registry's"));
    gc(&registry.store(), &["--grace", "0", "--uploads", "0"]);
    for path in foreign {
        assert!(path.exists(), "{} is gone", path.display());
    }
}
