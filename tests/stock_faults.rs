//! The live images that stock `garbage-collect` loses, one test per fault: here nothing live is ever lost.
//!
//! Each story is swept plainly and with `--untagged`, at once and without grace, the harshest there is. Where
//! Debian's registry is the one that fails, the same store is given to it first: that shows the story is the fault.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::check::{Live, Roots, blobs, sha256, sha512};
use common::gc::{gc, gc_outcome};
use common::image::{DOCKER_SCHEMA_1, Image, OCI_LAYER, OCI_MANIFEST, bytes, descriptor, layer};
use common::registry::Registry;
use common::run::{Bounded, clean};
use common::store::{Store, put};
use common::walk;
use serde_json::json;

/// A blob that nothing names; every sweep here must free it.
const GARBAGE: &[u8] = b"nothing names this";

/// An image whose layers only it uses.
fn image(name: &str) -> Image {
    Image::oci(name, &[layer("first", name), layer("second", &format!("more {name}"))])
}

fn multi_arch(name: &str) -> Image {
    let amd64 = Image::oci_for("amd64", name, &[layer("bin/tool", &format!("{name} amd64"))]);
    let arm64 = Image::oci_for("arm64", name, &[layer("bin/tool", &format!("{name} arm64"))]);
    Image::index(&[("amd64", &amd64), ("arm64", &arm64)])
}

/// Sweeps a fresh store of `story` plainly and with `--untagged`; what a tag reaches must stay, the rest must go.
fn nothing_live_is_lost(story: impl Fn(&Store)) {
    for (arguments, roots) in [(&[][..], Roots::Revisions), (&["--untagged"], Roots::Tags)] {
        let store = Store::new();
        store.push("bystander", Some("1"), &image("bystander"));
        let garbage = store.put_blob(GARBAGE);
        story(&store);
        let tagged = Live::of(store.root(), Roots::Tags);
        let live = Live::of(store.root(), roots);

        let planned = gc(store.root(), &[arguments, &["--dry-run", "--grace", "0"]].concat());
        live.assert_intact();
        let report = gc(store.root(), &[arguments, &["--grace", "0", "--now"]].concat());
        tagged.assert_intact();
        live.assert_intact();
        assert_eq!(report.taken_blobs(), planned.taken_blobs(), "a dry run says what a sweep does");
        assert!(report.failures.is_empty(), "{report:?}");
        assert!(!store.blob(&garbage).exists(), "garbage stays, with {arguments:?}");
        assert_eq!(blobs(store.root()), live.blobs, "exactly the live blobs stay, with {arguments:?}");
        // A second sweep finds nothing.
        let again = gc(store.root(), &[arguments, &["--grace", "0", "--now"]].concat());
        assert_eq!(again.taken_blobs(), BTreeSet::new());
    }
}

/// Whether Debian's `garbage-collect` (with `-m` when `untagged`) loses live data of `story`; `None` when it is
/// not here, or not the version that is known to.
fn stock_loses(untagged: bool, story: impl Fn(&Store)) -> Option<bool> {
    if !common::have(&["docker-registry"]) {
        return None;
    }
    let version = clean(common::registry::binary()).arg("--version").outcome();
    if !version.stdout.contains(" 2.8.2") {
        println!("not compared with {}", version.stdout);
        return None;
    }
    let store = Store::new();
    store.push("bystander", Some("1"), &image("bystander"));
    story(&store);
    let live = Live::of(store.root(), Roots::Tags);
    let config = common::scratch();
    let file = config.path().join("config.yml");
    let text = "version: 0.1\nlog: {level: error}\nstorage:\n  filesystem: {rootdirectory: ";
    put(&file, format!("{text}{}}}\nhttp: {{addr: 127.0.0.1:0}}\n", store.root().display()).as_bytes());
    let mut collect = clean(common::registry::binary());
    collect.arg("garbage-collect").args(untagged.then_some("-m")).arg(&file).outcome();
    Some(std::panic::catch_unwind(|| live.assert_intact()).is_err())
}

#[test]
fn a_untagged_children_of_a_tagged_index() {
    let story = |store: &Store| {
        store.push("multi", Some("1"), &multi_arch("multi"));
        // An index in an index, too.
        let inner = multi_arch("inner");
        store.push("nested", Some("1"), &Image::index(&[("amd64", &inner)]));
    };
    assert_ne!(stock_loses(true, story), Some(false), "the story does not show the fault");
    nothing_live_is_lost(story);
}

#[test]
fn b_a_child_that_was_deleted_in_another_repository() {
    let index = multi_arch("multi");
    let child = &index.children[0];
    let story = |store: &Store| {
        store.push("a", Some("1"), &index);
        store.push("b", Some("1"), &index);
        store.delete("a", &child.digest());
    };
    for arguments in [&["--grace", "0", "--now"][..], &["--untagged", "--grace", "0", "--now"]] {
        let store = Store::new();
        story(&store);
        let garbage = store.put_blob(GARBAGE);
        let in_b = Live::of_repository(store.root(), "b");
        in_b.assert_complete();
        gc(store.root(), arguments);
        in_b.assert_intact();
        assert!(!store.blob(&garbage).exists());
    }
}

#[test]
fn c_one_digest_untagged_here_and_tagged_there() {
    let image = image("shared");
    nothing_live_is_lost(|store| {
        store.push("a", None, &image);
        store.push("b", Some("1"), &image);
    });
    // What is kept of a manifest in a repository is the whole of it: its link and its layers' links.
    let store = Store::new();
    store.push("a", None, &image);
    store.push("b", Some("1"), &image);
    gc(store.root(), &["--untagged", "--grace", "0", "--now"]);
    Live::of(store.root(), Roots::Revisions).assert_complete();
}

#[test]
fn d_a_repository_without_layers() {
    let image = image("bare");
    let story = |store: &Store| {
        store.push("bare", Some("1"), &image);
        fs::remove_dir_all(store.repository("bare", "_layers")).unwrap();
    };
    assert_ne!(stock_loses(false, story), Some(false), "the story does not show the fault");
    nothing_live_is_lost(story);
}

#[test]
fn e_untagged_referrers_of_a_tagged_image() {
    let image = image("signed");
    let sbom = image.referrer("application/vnd.example.sbom", "sbom");
    let signature = sbom.referrer("application/vnd.example.signature", "signature of the sbom");
    let story = |store: &Store| {
        store.push("signed", Some("1"), &image);
        store.push("signed", None, &sbom);
        store.push("signed", None, &signature);
    };
    assert_ne!(stock_loses(true, story), Some(false), "the story does not show the fault");
    nothing_live_is_lost(story);
}

#[test]
fn e_referrers_go_when_their_subject_is_untagged() {
    let image = image("signed");
    let store = Store::new();
    store.push("signed", None, &image);
    store.push("signed", None, &image.referrer("application/vnd.example.sbom", "sbom"));
    gc(store.root(), &["--grace", "0", "--now"]);
    assert_eq!(blobs(store.root()).len(), 7, "without --untagged every manifest stays");
    gc(store.root(), &["--untagged", "--grace", "0", "--now"]);
    assert_eq!(blobs(store.root()), BTreeSet::new());
}

#[test]
fn f_layers_named_by_sha512() {
    let content = layer("sha512", "named by another hash").blob;
    let config = b"{}".to_vec();
    let mut entry = descriptor(OCI_LAYER, &content);
    entry["digest"] = json!(sha512(&content));
    let manifest = bytes(&json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor("application/vnd.oci.empty.v1+json", &config),
        "layers": [entry],
    }));
    let image = Image::odd(OCI_MANIFEST, manifest, &[&config, &content]);
    let story = |store: &Store| {
        store.push("sha512", Some("1"), &image);
        // The registry stores the layer under sha256 and links it from both names.
        put(&store.layer_link("sha512", &sha512(&content)), sha256(&content).as_bytes());
    };
    assert_ne!(stock_loses(false, story), Some(false), "the story does not show the fault");
    nothing_live_is_lost(story);
}

#[test]
fn g_entries_that_vanish_while_they_are_listed() {
    let store = Store::new();
    for number in 0..20 {
        store.push(&format!("live/{number}"), Some("1"), &image(&format!("live {number}")));
    }
    let live = Live::of(store.root(), Roots::Tags);
    // An image that comes and goes, file by file as a push writes it, in repositories of its own and among the live.
    let template = Store::new();
    template.push("passing", Some("passing"), &image("passing"));
    let from = template.path(".");
    let files: Vec<_> = walk(&from).into_iter().filter(|path| path.is_file()).collect();
    let push = |name: &str| -> std::io::Result<()> {
        for file in &files {
            let path = file.strip_prefix(&from).unwrap().to_str().unwrap();
            let to = store.path(path.replace("repositories/passing", &format!("repositories/{name}")));
            fs::create_dir_all(to.parent().unwrap())?;
            fs::copy(file, to)?;
        }
        Ok(())
    };
    let remove = |name: &str| -> std::io::Result<()> {
        fs::remove_file(store.revision_link(name, &image("passing").digest()))?;
        fs::remove_dir_all(store.repository(name, "_manifests/tags/passing"))
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let name = format!("live/{}", number % 20);
                // The collector takes what we write while we write it: any of this may fail.
                let _ = [push(&name), push("live/passing"), push("passing"), remove(&name)];
                let _ = fs::remove_dir_all(store.repository("live/passing", ""));
                let _ = fs::remove_dir_all(store.repository("passing", ""));
            }
        });
        let stopped = Stop(&stop);
        for _ in 0..15 {
            gc_outcome(store.root(), &["--untagged", "--grace", "0", "--now"]).exits_one_of(&[0, 1, 3]);
            live.assert_intact();
        }
        drop(stopped);
    });
    gc(store.root(), &["--untagged", "--grace", "0", "--now"]);
    live.assert_intact();
}

/// Pushes as a client does, which uploads nothing that the registry says it has; `false`: the registry refused.
fn client_push(registry: &Registry, name: &str, tag: &str, image: &Image) -> bool {
    for blob in &image.blobs {
        let digest = sha256(blob);
        if registry.api("HEAD", &format!("{name}/blobs/{digest}"), &[], &[]).status == 200 {
            continue;
        }
        let started = registry.api("POST", &format!("{name}/blobs/uploads/"), &[], &[]);
        let Some((_, path)) = started.header("location").and_then(|place| place.split_once("/v2/")) else {
            return false;
        };
        if registry.api("PUT", &format!("{path}&digest={digest}"), &[], blob).status != 201 {
            return false;
        }
    }
    let target = format!("{name}/manifests/{tag}");
    registry.api("PUT", &target, &[("Content-Type", image.media_type)], &image.manifest).status == 201
}

#[test]
fn i_a_push_while_the_collector_runs() {
    if !common::have(&["docker-registry", "setpriv"]) {
        return;
    }
    // With a warm cache it accepts images without looking whether their layers are there, which is the worst case.
    for (cache, arguments) in
        [(false, &["--grace", "0"][..]), (true, &["--grace", "0"]), (true, &["--untagged", "--grace", "0"])]
    {
        let registry = Registry::start_with(cache);
        registry.push("bystander", Some("1"), &image("bystander"));
        let shared = layer("base", "shared");
        let images: Vec<Image> = (0..5)
            .map(|n| Image::oci(&n.to_string(), &[shared.clone(), layer("private", &n.to_string())]))
            .collect();
        let (stop, accepted) = (AtomicBool::new(false), AtomicUsize::new(0));
        let tags = std::thread::scope(|scope| {
            let pusher = scope.spawn(|| {
                let mut tags: BTreeMap<String, String> = BTreeMap::new();
                for round in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let (image, tag) = (&images[round % 5], format!("tag-{}", round % 3));
                    // What a refused push left is unknown.
                    tags.remove(&tag);
                    if client_push(&registry, "app", &tag, image) {
                        accepted.fetch_add(1, Ordering::Relaxed);
                        tags.insert(tag, image.digest());
                    }
                    // Garbage for the next sweep, which a later push names again.
                    let old = images[(round + 3) % 5].digest();
                    registry.api("DELETE", &format!("app/manifests/{old}"), &[], &[]);
                    tags.retain(|_, digest| *digest != old);
                }
                tags
            });
            let stopped = Stop(&stop);
            let (start, mut sweeps) = (Instant::now(), 0);
            while sweeps < 15 || accepted.load(Ordering::Relaxed) < 15 {
                assert!(start.elapsed() < Duration::from_secs(60), "{sweeps} sweeps, {accepted:?} pushes");
                gc_outcome(&registry.store(), arguments).exits_one_of(&[0, 1, 3]);
                sweeps += 1;
            }
            drop(stopped);
            pusher.join().expect("the pushes")
        });
        // Whatever the last push relied on comes back with the next look, as a mount does at once.
        gc(&registry.store(), arguments);
        let wanted = tags.iter().map(|(tag, digest)| (format!("app:{tag}"), digest));
        for (reference, digest) in wanted.clone() {
            let tag = reference.split_once(':').unwrap().1;
            assert_eq!(sha256(&registry.manifest("app", tag).is(200).body), *digest, "{reference}");
        }
        let wanted = wanted.map(|(reference, _)| reference).chain(["bystander:1".to_string()]).collect();
        registry.assert_serves(&wanted, &format!("cache: {cache}, {arguments:?}"));
        println!("cache: {cache}, {arguments:?}: {accepted:?} pushes accepted");
    }
}

/// Ends the other thread however this one ends.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One way to damage a store that makes the stock collector stop for ever.
type Damage = (&'static str, fn(&Store, &Image));

#[test]
fn h_one_damaged_thing_does_not_stop_the_rest() {
    let damages: [Damage; 7] = [
        ("an empty revision link", |store, image| {
            fs::write(store.revision_link("damaged", &image.digest()), "").unwrap();
        }),
        ("an empty layer link", |store, image| {
            fs::write(store.layer_link("damaged", &sha256(&image.blobs[0])), "").unwrap();
        }),
        ("an empty tag link", |store, _| fs::write(store.tag_link("damaged", "1"), "").unwrap()),
        ("a truncated manifest", |store, image| {
            fs::write(store.blob(&image.digest()), &image.manifest[..20]).unwrap();
        }),
        ("an unknown media type", |store, image| {
            let manifest =
                json!({"mediaType": "application/x-new", "parts": [{"is": sha256(&image.blobs[1])}]});
            store.push("damaged", Some("odd"), &Image::odd("", bytes(&manifest), &[]));
        }),
        ("a schema 1 manifest", |store, image| {
            let manifest = json!({"schemaVersion": 1, "fsLayers": [{"blobSum": sha256(&image.blobs[1])}]});
            store.push("damaged", Some("old"), &Image::odd(DOCKER_SCHEMA_1, bytes(&manifest), &[]));
        }),
        ("a stray file among the tags", |store, _| {
            put(&store.repository("damaged", "_manifests/tags/stray"), b"what is this");
        }),
    ];
    for (what, damage) in damages {
        for arguments in [&["--grace", "0", "--now"][..], &["--untagged", "--grace", "0", "--now"]] {
            let store = Store::new();
            let (bystander, damaged) = (image("bystander"), image("damaged"));
            store.push("bystander", Some("1"), &bystander);
            store.push("damaged", Some("1"), &damaged);
            store.push("damaged", Some("other"), &image("other"));
            let garbage = store.put_blob(GARBAGE);
            damage(&store, &damaged);
            let before = blobs(store.root());
            let bystander = Live::of_repository(store.root(), "bystander");

            let outcome = gc_outcome(store.root(), arguments).exits_one_of(&[0, 3]);
            bystander.assert_intact();
            assert!(!store.blob(&garbage).exists(), "{what} keeps garbage of nobody's: {outcome}");
            let kept: BTreeSet<String> = before.into_iter().filter(|digest| *digest != garbage).collect();
            assert_eq!(blobs(store.root()), kept, "{what}: whatever it may hold stays ({outcome})");
        }
    }
}

#[test]
fn layers_of_schema_1_and_of_unknown_manifests_stay() {
    nothing_live_is_lost(|store| {
        let (old, new) = (layer("old", "schema 1").blob, layer("new", "of tomorrow").blob);
        let schema_1 = json!({"schemaVersion": 1, "name": "old", "fsLayers": [{"blobSum": sha256(&old)}]});
        store.push("old", Some("1"), &Image::odd(DOCKER_SCHEMA_1, bytes(&schema_1), &[&old]));
        // Without a media type the fields decide.
        let plain =
            json!({"schemaVersion": 2, "config": descriptor("", b"{}"), "layers": [descriptor("", &new)]});
        store.push("new", Some("1"), &Image::odd("", bytes(&plain), &[b"{}", &new]));
        // Of a kind that nobody knows yet: every digest in it counts, wherever it stands.
        let part = layer("part", "of a kind unknown").blob;
        let unknown = json!({"mediaType": "application/x-new", "parts": [{"deep": {"is": sha256(&part)}}]});
        store.push("unknown", Some("1"), &Image::odd("", bytes(&unknown), &[&part]));
    });
}

#[test]
fn fallback_and_cosign_tags_hold_what_they_name() {
    let image = image("signed");
    let signature = Image::oci("signature", &[layer("signature", "signed")]);
    let referrers = Image::index(&[("unknown", &image.referrer("application/vnd.example.sbom", "sbom"))]);
    nothing_live_is_lost(|store| {
        store.push("signed", Some("1"), &image);
        store.push("signed", Some(&format!("sha256-{}", image.hex())), &referrers);
        store.push("signed", Some(&format!("sha256-{}.sig", image.hex())), &signature);
    });
}

#[test]
fn the_history_of_a_tag_holds_nothing() {
    let (old, new) = (image("old"), image("new"));
    let store = Store::new();
    store.push("app", Some("1"), &old);
    store.push("app", Some("1"), &new);
    gc(store.root(), &["--grace", "0", "--now"]);
    assert_eq!(blobs(store.root()).len(), 8, "without --untagged every manifest stays");
    gc(store.root(), &["--untagged", "--grace", "0", "--now"]);
    assert_eq!(blobs(store.root()), new.digests());
}

#[test]
fn a_layer_link_alone_keeps_nothing() {
    let store = Store::new();
    store.push("app", Some("1"), &image("app"));
    let layer = store.put_blob(b"linked, and named by nothing");
    put(&store.layer_link("app", &layer), layer.as_bytes());
    let live = Live::of(store.root(), Roots::Tags);
    gc(store.root(), &["--grace", "0", "--now"]);
    live.assert_intact();
    assert_eq!(blobs(store.root()), live.blobs);
}

#[test]
fn young_garbage_is_left_alone() {
    let store = Store::new();
    let garbage = store.put_blob(GARBAGE);
    let report = gc(store.root(), &["--now"]);
    assert_eq!(report.taken_blobs(), BTreeSet::new());
    assert_eq!(report.unreferenced(), BTreeSet::from([garbage.clone()]));
    assert_eq!(report.kept_young[0].bytes, GARBAGE.len() as u64);
    assert!(!report.kept_young[0].eligible_at.is_null(), "{report:?}");
    assert!(store.blob(&garbage).exists());
}

#[test]
fn names_of_repositories_nest() {
    nothing_live_is_lost(|store| {
        store.push("a", Some("1"), &image("a"));
        store.push("a/b", Some("1"), &image("a/b"));
        store.push("a/b/c", Some("1"), &image("a/b/c"));
    });
}
