//! The tests' own tools: is the checker able to see a loss, and are the stores we write what a registry writes?

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use common::check::{Live, Roots, blobs, hex, registry_dir, sha256};
use common::image::{Image, bytes, layer};
use common::registry::Registry;
use common::run::{Bounded, clean};
use common::store::{Store, put};
use common::{have, walk};
use serde_json::json;

const NEEDS: &[&str] = &["docker-registry", "skopeo", "setpriv"];

fn images() -> (Image, Image, Image) {
    let base = layer("etc/os-release", "ID=base\n");
    let oci = Image::oci("oci", &[base.clone(), layer("oci", "1\n")]);
    let docker = Image::docker("docker", &[base.clone(), layer("docker", "2\n")]);
    let amd64 = Image::oci_for("amd64", "multi", &[base.clone(), layer("bin/tool", "amd64\n")]);
    let arm64 = Image::oci_for("arm64", "multi", &[base]);
    let multi = Image::index(&[("amd64", &amd64), ("arm64", &arm64)]);
    (oci, docker, multi)
}

/// Paths of files, without what only a registry's history leaves (uploads).
fn files(store: &Path) -> BTreeSet<PathBuf> {
    let files = walk(&registry_dir(store)).into_iter().filter(|path| path.is_file());
    files.map(|path| path.strip_prefix(registry_dir(store)).unwrap().to_path_buf()).collect()
}

#[test]
fn a_store_written_here_is_what_a_registry_writes() {
    if !have(NEEDS) {
        return;
    }
    let (oci, docker, multi) = images();
    let (registry, clients, store) = (Registry::start(), Registry::start(), Store::new());
    for (name, tag, image) in [("oci", "1", &oci), ("team/docker", "1", &docker), ("multi", "1", &multi)] {
        registry.push(name, Some(tag), image);
        clients.skopeo_push(&format!("{name}:{tag}"), image);
        store.push(name, Some(tag), image);
    }
    let signature = oci.referrer("application/vnd.example.signature", "signed");
    registry.push("oci", None, &signature);
    store.push("oci", None, &signature);
    assert_eq!(files(&registry.store()), files(store.root()));
    assert!(files(&clients.store()).is_subset(&files(store.root())));
    assert_eq!(blobs(&registry.store()), Live::of(store.root(), Roots::Tags).blobs);
    Live::of(store.root(), Roots::Revisions).assert_complete();
    assert_eq!(registry.stock_garbage(), BTreeSet::new());
}

#[test]
fn images_go_through_the_real_clients_unchanged() {
    if !have(NEEDS) || !have(&["umoci"]) {
        return;
    }
    let (oci, docker, multi) = images();
    let registry = Registry::start_with(true);
    for (reference, image) in [("oci:1", &oci), ("docker:1", &docker), ("multi:1", &multi)] {
        registry.skopeo_push(reference, image);
        let pulled = registry.pull(reference);
        assert_eq!(pulled[Path::new("manifest.json")], image.manifest, "{reference}");
        // The same from an OCI layout.
        let layout = registry.fresh("layout");
        write_layout(&layout, image);
        assert!(registry.copy_layout(&layout) == pulled, "{reference}");
    }
    let layout = registry.fresh("layout");
    write_layout(&layout, &oci);
    let bundle = registry.fresh("bundle");
    let image = format!("{}:latest", layout.display());
    clean("umoci").args(["unpack", "--rootless", "--image", &image]).arg(&bundle).outcome().exits(0);
    assert_eq!(fs::read_to_string(bundle.join("rootfs/oci")).unwrap(), "1\n");
}

fn write_layout(dir: &Path, image: &Image) {
    put(&dir.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#);
    let mut top = image.descriptor();
    top["annotations"] = json!({"org.opencontainers.image.ref.name": "latest"});
    put(&dir.join("index.json"), &bytes(&json!({"schemaVersion": 2, "manifests": [top]})));
    for part in std::iter::once(image).chain(&image.children) {
        for content in part.blobs.iter().chain([&part.manifest]) {
            put(&dir.join("blobs/sha256").join(hex(&sha256(content))), content);
        }
    }
}

#[test]
fn the_checker_sees_every_loss() {
    let (oci, _, multi) = images();
    let store = Store::new();
    store.push("app", Some("1"), &oci);
    store.push("app", Some("multi"), &multi);
    store.push("app", None, &oci.referrer("application/vnd.example.signature", "signed"));
    let live = Live::of(store.root(), Roots::Tags);
    live.assert_complete();
    live.assert_intact();
    assert_eq!(live.blobs, blobs(store.root()));
    let history = |path: &Path| path.to_string_lossy().contains("/index/");
    for path in walk(&registry_dir(store.root())).iter().filter(|path| path.is_file() && !history(path)) {
        let content = fs::read(path).unwrap();
        let seen = |what: &str| {
            let lost = std::panic::catch_unwind(|| live.assert_intact()).is_err();
            assert!(lost, "{what} {} went unseen", path.display());
        };
        fs::remove_file(path).unwrap();
        seen("the loss of");
        fs::write(path, "other").unwrap();
        seen("a change of");
        fs::write(path, content).unwrap();
    }
    live.assert_intact();
}

#[test]
fn the_checker_sees_an_incomplete_image() {
    let (oci, _, _) = images();
    let store = Store::new();
    store.push("app", Some("1"), &oci);
    fs::remove_file(store.layer_link("app", &sha256(&oci.blobs[1]))).unwrap();
    assert_eq!(Live::of(store.root(), Roots::Tags).problems.len(), 1);
}
