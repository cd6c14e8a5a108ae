//! Random undamaged registries: a sweep would take exactly the blobs that the stock collector calls garbage.
//!
//! The registries are written straight to disk. What the stock collector is known to do wrong
//! (`tests/stock_faults.rs`) is left out of them, and so is the one thing on which regfs is careful on purpose: an
//! index that names a child whose revision was deleted keeps that child whole.
//!
//! A failure names the seed; `SEED=<n> cargo test --test cross_check` runs that one alone.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::fs;

use common::check::{Live, Roots, blobs};
use common::gc::gc;
use common::image::{Image, Layer, layer};
use common::random::Random;
use common::registry::stock_garbage;
use common::store::{Store, put};
use serde_json::Value;

/// How many registries.
const SEEDS: u64 = 40;

const REPOSITORIES: [&str; 5] = ["app", "app/nested", "library/base", "other", "a-b/c_d/e.f"];
const TAGS: [&str; 4] = ["1", "2.0", "latest", "Edge_build-7"];
const LAYERS: usize = 8;

/// A random registry.
struct World {
    store: Store,
    random: Random,
    layers: Vec<Layer>,
    /// What was pushed where, in turn; some of it is deleted again.
    pushed: Vec<(&'static str, Image)>,
}

impl World {
    fn new(seed: u64) -> World {
        let layers = (0..LAYERS).map(|n| layer("content", &format!("layer {n}"))).collect();
        let mut world = World { store: Store::new(), random: Random(seed), layers, pushed: Vec::new() };
        for _ in 0..world.random.below(30) {
            world.step();
        }
        world.garbage();
        world
    }

    fn step(&mut self) {
        let name = *self.random.choose(&REPOSITORIES);
        match self.random.below(10) {
            0..=3 => {
                let image = self.image();
                self.push(name, image);
            }
            4 | 5 => {
                let index = self.index();
                self.push(name, index);
            }
            6 => self.push_referrer(name),
            7 => self.push_elsewhere(name),
            8 => self.mount(name),
            _ => self.delete(),
        }
    }

    fn image(&mut self) -> Image {
        let layers: Vec<Layer> =
            (0..self.random.below(4)).map(|_| self.random.choose(&self.layers).clone()).collect();
        let label = format!("image {}", self.random.below(6));
        match self.random.below(3) {
            0 => Image::docker(&label, &layers),
            1 => Image::oci(&label, &layers),
            // The media type is optional in OCI manifests.
            _ => without_media_type(Image::oci(&label, &layers)),
        }
    }

    fn index(&mut self) -> Image {
        let (amd64, arm64) = (self.image(), self.image());
        let (amd64, arm64) = (&amd64, &arm64);
        match self.random.below(4) {
            0 => Image::docker_list(&[("amd64", amd64), ("arm64", arm64)]),
            1 => Image::index(&[]),
            2 => Image::index(&[("amd64", &Image::index(&[("arm64", arm64)])), ("amd64", amd64)]),
            _ => Image::index(&[("amd64", amd64), ("arm64", arm64)]),
        }
    }

    /// With a tag, that may move, or without.
    fn push(&mut self, name: &'static str, image: Image) {
        let tag = (self.random.below(4) > 0).then(|| *self.random.choose(&TAGS));
        self.store.push(name, tag, &image);
        self.pushed.push((name, image));
    }

    fn push_referrer(&mut self, name: &'static str) {
        let here: Vec<Image> =
            self.pushed.iter().filter(|(n, _)| *n == name).map(|(_, image)| image.clone()).collect();
        if here.is_empty() {
            return;
        }
        let subject = self.random.choose(&here);
        let payload = format!("signature {}", self.random.below(4));
        let referrer = subject.referrer("application/vnd.example.signature", &payload);
        self.store.push(name, None, &referrer);
        self.pushed.push((name, referrer));
    }

    /// The same image in another repository.
    fn push_elsewhere(&mut self, name: &'static str) {
        if !self.pushed.is_empty() {
            let (_, image) = self.random.choose(&self.pushed).clone();
            self.push(name, image);
        }
    }

    /// A cross-repository mount of which the manifest never came: a layer link and no more.
    fn mount(&mut self, name: &'static str) {
        let all: Vec<String> = blobs(self.store.root()).into_iter().collect();
        if !all.is_empty() {
            let digest = self.random.choose(&all).clone();
            // A registry makes a repository as a whole.
            fs::create_dir_all(self.store.repository(name, "_manifests/revisions/sha256")).unwrap();
            fs::create_dir_all(self.store.repository(name, "_manifests/tags")).unwrap();
            put(&self.store.layer_link(name, &digest), digest.as_bytes());
        }
    }

    /// The API's DELETE of a manifest that no index of its repository names.
    fn delete(&mut self) {
        if self.pushed.is_empty() {
            return;
        }
        let at = self.random.below(self.pushed.len());
        let (name, image) = self.pushed.swap_remove(at);
        let digest = image.digest();
        let is_here = |other: &&(&str, Image)| other.0 == name;
        let is_named = self.pushed.iter().filter(is_here).any(|(_, other)| names(other, &digest));
        if is_named || !self.store.revision_link(name, &digest).exists() {
            self.pushed.push((name, image));
            return;
        }
        self.store.delete(name, &digest);
        self.pushed.retain(|(n, other)| *n != name || other.digest() != digest);
    }

    /// Blobs that nothing names, with and without layer links, and pushes in progress.
    fn garbage(&mut self) {
        for number in 0..self.random.below(5) {
            let digest = self.store.put_blob(format!("garbage {number}").as_bytes());
            if self.random.below(2) == 0 && !self.pushed.is_empty() {
                let name = self.random.choose(&self.pushed).0;
                put(&self.store.layer_link(name, &digest), digest.as_bytes());
            }
        }
        if let Some((name, _)) = self.pushed.first() {
            let upload = self.store.repository(name, "_uploads/0d4f5c3e-0000-4000-8000-000000000000");
            put(&upload.join("startedat"), b"2026-01-02T03:04:05Z");
            put(&upload.join("data"), b"half a layer");
        }
    }
}

/// Whether `image` is an index with `digest` in it, or about it.
fn names(image: &Image, digest: &str) -> bool {
    String::from_utf8_lossy(&image.manifest).contains(digest)
        || image.children.iter().any(|child| names(child, digest))
}

fn without_media_type(image: Image) -> Image {
    let mut manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
    manifest.as_object_mut().unwrap().remove("mediaType");
    Image { manifest: common::image::bytes(&manifest), ..image }
}

#[test]
fn a_sweep_takes_what_the_stock_collector_calls_garbage() {
    if !common::have(&["docker-registry"]) {
        return;
    }
    let only: Option<u64> = std::env::var("SEED").ok().map(|seed| seed.parse().expect("SEED is a number"));
    let (mut registries_with_garbage, mut garbage_blobs, mut live_blobs) = (0, 0, 0);
    for seed in only.map_or(0..SEEDS, |seed| seed..seed + 1) {
        let world = World::new(seed);
        let root = world.store.root();
        let live = Live::of(root, Roots::Revisions);
        assert_eq!(live.problems, [""; 0], "SEED={seed}: the generator made a damaged registry");
        let config = root.join("config.yml");
        let text = "version: 0.1\nlog: {level: error}\nstorage:\n  filesystem: {rootdirectory: ";
        put(&config, format!("{text}{}}}\nhttp: {{addr: 127.0.0.1:0}}\n", root.display()).as_bytes());

        let theirs = stock_garbage(&config);
        let ours = gc(root, &["--dry-run", "--grace", "0"]).taken_blobs();
        let only_ours: BTreeSet<_> = ours.difference(&theirs).collect();
        let only_theirs: BTreeSet<_> = theirs.difference(&ours).collect();
        assert!(
            only_ours.is_empty() && only_theirs.is_empty(),
            "SEED={seed}: only regfs takes {only_ours:?}, only the stock collector takes {only_theirs:?}"
        );
        let all = blobs(root);
        assert_eq!(all.difference(&live.blobs).cloned().collect::<BTreeSet<_>>(), ours, "SEED={seed}");
        registries_with_garbage += u64::from(!ours.is_empty());
        garbage_blobs += ours.len();
        live_blobs += live.blobs.len();
    }
    println!(
        "{garbage_blobs} blobs are garbage and {live_blobs} live, in {registries_with_garbage} registries"
    );
    assert!(only.is_some() || registries_with_garbage >= SEEDS / 2, "too little garbage to compare anything");
}
