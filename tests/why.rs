//! Why a blob is kept, or since when it is garbage: each sort of root, each sort of step, and what is said of garbage.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;
mod memory;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::check::{blob_path, hex, sha256, sha512};
use common::image::{Image, layer};
use memory::{layer_link, long_ago, put, put_blob, put_image, put_tag, revision_link, tag_link};
use regfs::catalog::intern::DigestId;
use regfs::catalog::scan::scan;
use regfs::catalog::{Catalog, Tables};
use regfs::clock::Clock;
use regfs::error::Result;
use regfs::gc::guard::gate::Gate;
use regfs::gc::mark::{self, Untagged};
use regfs::gc::report::Place;
use regfs::gc::why::{self, Facts, Link, Root, Why};
use regfs::gc::{self, Options, Unwatched};
use regfs::store::Store;
use regfs::store::memory::Memory;
use regfs::trash::Author;

const DAY: Duration = Duration::from_secs(24 * 3600);

fn store() -> Arc<Memory> {
    let store = Arc::new(Memory::default());
    store.set_clock(long_ago());
    store
}

fn image(name: &str) -> Image {
    Image::oci(name, &[layer("own", name)])
}

fn with_facts<T>(store: &dyn Store, act: impl FnOnce(&Facts<'_>) -> T) -> T {
    let catalog = scan(store, &Tables::default(), None);
    let mark = mark::mark(&catalog, &Untagged::new());
    act(&Facts { store, catalog: &catalog, mark: &mark, grace: DAY, now: Clock::default().now(store) })
}

fn ask(store: &dyn Store, argument: &str) -> Result<Why> {
    with_facts(store, |facts| why::why(facts, &why::find(facts, argument)?, why::FEW))
}

fn text(why: &Why) -> String {
    why.text(Place::CommandLine(Path::new("STORE")))
}

/// Repository, root and the digests of each chain.
fn chains(why: &Why) -> Vec<(String, String, Vec<String>)> {
    let root = |root: &Root| match root {
        Root::Tag { name, is_served: true, .. } => format!("tag {name}"),
        Root::Tag { name, is_served: false, .. } => format!("dangling {name}"),
        Root::Untagged { .. } => "untagged".to_string(),
        Root::Held => "held".to_string(),
        Root::Kept => "kept".to_string(),
    };
    let chain = |c: &why::Chain| {
        let steps = c.steps.iter().map(|s| s.digest.to_string()).collect();
        (c.repository.display().to_string(), root(&c.root), steps)
    };
    why.chains.iter().map(chain).collect()
}

fn chain(repository: &str, root: &str, steps: &[&str]) -> (String, String, Vec<String>) {
    (repository.to_string(), root.to_string(), steps.iter().map(|s| s.to_string()).collect())
}

#[test]
fn each_tag_has_a_chain() {
    let store = store();
    let (amd64, arm64) = (image("amd64"), image("arm64"));
    let index = Image::index(&[("amd64", &amd64), ("arm64", &arm64)]);
    put_image(&store, "team/app", Some("1"), &index);
    put_tag(&store, "team/app", "2", &index.digest());
    put_image(&store, "mirror", Some("arm"), &arm64);
    let wanted = sha256(&arm64.blobs[1]);
    let why = ask(&*store, &wanted).unwrap();
    let (index, arm64) = (index.digest(), arm64.digest());
    assert_eq!(
        chains(&why),
        [
            chain("mirror", "tag arm", &[&arm64, &wanted]),
            chain("team/app", "tag 1", &[&index, &arm64, &wanted]),
            chain("team/app", "tag 2", &[&index, &arm64, &wanted]),
        ]
    );
    let text = text(&why);
    assert!(text.starts_with(&format!("{wanted} is a layer (")), "{text}");
    assert!(text.contains("3 chains of references keep it"), "{text}");
    assert!(
        text.contains(&format!("  → index {index}\n  → manifest {arm64} (linux-arm64)\n  → layer ")),
        "{text}"
    );
    for argument in ["mirror:arm", &format!("mirror@{arm64}"), &arm64[..20], &hex(&arm64)[..8]] {
        assert_eq!(ask(&*store, argument).unwrap().digest.to_string(), arm64, "{argument}");
    }
}

#[test]
fn many_chains_are_cut() {
    let store = store();
    let image = image("app");
    put_image(&store, "app", None, &image);
    (0..25).for_each(|n| put_tag(&store, "app", &format!("t{n}"), &image.digest()));
    let why = ask(&*store, &image.digest()).unwrap();
    assert_eq!((why.chains.len(), why.chains_found), (why::FEW, 25));
    assert!(text(&why).contains("and 15 more; --all shows them"), "{}", text(&why));
}

#[test]
fn untagged_manifests_are_roots_unless_their_subject_is_kept() {
    let store = store();
    let (tagged, loose) = (image("tagged"), image("loose"));
    put_image(&store, "app", Some("1"), &tagged);
    put_image(&store, "app", None, &loose);
    let why = ask(&*store, &loose.digest()).unwrap();
    assert_eq!(chains(&why), [chain("app", "untagged", &[&loose.digest()])]);
    assert!(why.is_untagged && text(&why).contains("a sweep with --untagged takes it"), "{}", text(&why));

    let signature = tagged.referrer("application/vnd.example.signature", "signed");
    put_image(&store, "app", None, &signature);
    let payload = sha256(&signature.blobs[1]);
    let why = ask(&*store, &payload).unwrap();
    assert_eq!(chains(&why), [chain("app", "tag 1", &[&tagged.digest(), &signature.digest(), &payload])]);
    assert_eq!(why.chains[0].steps[1].link, Some(Link::Referrer));
    assert!(!why.is_untagged);

    // Only the topmost of what no tag leads to.
    let child = image("child");
    let index = Image::index(&[("amd64", &child)]);
    put_image(&store, "app", None, &index);
    let why = ask(&*store, &child.digest()).unwrap();
    assert_eq!(chains(&why), [chain("app", "untagged", &[&index.digest(), &child.digest()])]);
}

#[test]
fn dangling_tags_and_tags_with_invalid_names_hold() {
    let store = store();
    let (dangling, odd) = (image("dangling"), image("odd"));
    put_image(&store, "app", Some("1"), &dangling);
    store.remove(&[revision_link("app", &dangling.digest())]);
    put_image(&store, "app", None, &odd);
    put(&store, tag_link("app", "no tag"), odd.digest().as_bytes());
    let (wanted, held) = (sha256(&dangling.blobs[1]), sha256(&odd.blobs[1]));
    let why = ask(&*store, &wanted).unwrap();
    assert_eq!(chains(&why), [chain("app", "dangling 1", &[&dangling.digest(), &wanted])]);
    assert!(text(&why).contains("because "), "{}", text(&why));
    let why = ask(&*store, &held).unwrap();
    assert_eq!(chains(&why), [chain("app", "held", &[&odd.digest(), &held])]);
    assert!(text(&why).contains("no tag is no valid tag"), "{}", text(&why));
}

#[test]
fn what_a_problem_keeps_names_the_problem() {
    let store = store();
    let broken = image("broken");
    put_image(&store, "app", Some("1"), &broken);
    put(&store, blob_path(&broken.digest()), b"{ not what its digest says");
    let wanted = sha256(&broken.blobs[1]);
    let why = ask(&*store, &wanted).unwrap();
    assert_eq!(chains(&why), [chain("app", "kept", &[&wanted])]);
    assert!(why.chains[0].problems.iter().any(|p| p.contains(hex(&broken.digest()))), "{}", text(&why));
    assert!(text(&why).contains("can't be judged"), "{}", text(&why));
}

#[test]
fn other_names_of_a_blob_are_steps() {
    let store = store();
    let content = b"known by its sha512".to_vec();
    let (name, stored) = (sha512(&content), sha256(&content));
    let config = b"{}".to_vec();
    let mut layer = common::image::descriptor("application/vnd.oci.image.layer.v1.tar", &content);
    layer["digest"] = name.clone().into();
    let manifest = common::image::bytes(&serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": common::image::descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [layer],
    }));
    let image = Image::odd("application/vnd.oci.image.manifest.v1+json", manifest, &[&config, &content]);
    put_image(&store, "app", Some("1"), &image);
    put(&store, layer_link("app", &name), stored.as_bytes());
    let why = ask(&*store, &stored).unwrap();
    assert_eq!(chains(&why), [chain("app", "tag 1", &[&image.digest(), &name, &stored])]);
    assert_eq!(why.chains[0].steps[2].link, Some(Link::StoredAs));
    let why = ask(&*store, &name).unwrap();
    assert!(why.is_present && text(&why).contains(&format!("stored as {stored}")), "{}", text(&why));
}

#[test]
fn garbage_has_an_age_links_and_a_place_in_the_trash() {
    let store = store();
    put_image(&store, "app", Some("1"), &image("app"));
    let old = put_blob(&store, b"old");
    let young = put_blob(&store, b"young");
    put(&store, layer_link("app", &old), old.as_bytes());
    store.set_clock(SystemTime::now());
    put(&store, layer_link("app", &young), young.as_bytes());

    let why = ask(&*store, &young).unwrap();
    let garbage = why.garbage.as_ref().unwrap();
    assert!(!garbage.is_eligible && !why.is_kept, "the link is as young as its last push");
    assert!(text(&why).contains("a sweep may take it from "), "{}", text(&why));
    let why = ask(&*store, &old).unwrap();
    let garbage = why.garbage.as_ref().unwrap();
    assert!(garbage.is_eligible);
    assert_eq!(garbage.links, [PathBuf::from("app")]);
    let said = text(&why);
    for part in ["nothing leads to it: no manifest names it", "layer link in app", "regfs gc STORE --dry-run"]
    {
        assert!(said.contains(part), "{said}");
    }

    let author = Author { uid: 0, pid: 1, command: "test".to_string() };
    let options = Options { gate: Gate::STOPPED, ..Options::default() };
    let report = gc::run(&*store, &Tables::default(), &options, &author, &Unwatched).unwrap();
    let why = ask(&*store, &old).unwrap();
    let id = report.transaction.unwrap();
    assert!(!why.is_present && why.trash.len() == 1 && why.trash[0].has_bytes, "{why:?}");
    assert!(text(&why).contains(&format!("regfs trash STORE undo {id}")), "{}", text(&why));
}

#[test]
fn what_is_unknown_or_not_understood_is_said() {
    let store = store();
    put_image(&store, "app", Some("1"), &image("app"));
    let nobodys = sha256(b"nobody's");
    for (argument, says) in [
        (&*nobodys, "neither a blob nor anything that names it"),
        ("abcdef012345", "begins with abcdef012345"),
        ("abc", "<repository>:<tag>"),
        ("sha256:abc", "at least the first 6 digits"),
        ("app:2", "no tag \"2\" in repository app"),
        ("nothing:1", "no repository \"nothing\""),
        (&format!("app@{nobodys}"), "in repository app"),
    ] {
        let error = ask(&*store, argument).unwrap_err().to_string();
        assert!(error.contains(says), "{argument}: {error}");
    }
}

#[test]
fn chains_are_found_for_exactly_what_the_mark_keeps() {
    let store = store();
    let (one, two) = (image("one"), image("two"));
    let index = Image::index(&[("amd64", &one), ("arm64", &two)]);
    put_image(&store, "a", Some("1"), &index);
    put_image(&store, "b", None, &two);
    put_image(&store, "b", None, &one.referrer("application/vnd.example.sbom", "loose"));
    put_blob(&store, b"garbage");
    let broken = image("broken");
    put_image(&store, "c/d", Some("1"), &broken);
    put(&store, revision_link("c/d", &broken.digest()), b"no digest");
    let served = image("served");
    put_image(&store, "t", None, &served);
    put(&store, revision_link("t", &one.digest()), served.digest().as_bytes());
    store.remove(&[revision_link("t", &served.digest())]);
    put_tag(&store, "t", "1", &one.digest());
    with_facts(&*store, |facts| {
        let catalog: &Catalog = facts.catalog;
        for id in (0..catalog.tables.digests.bound() as u32).map(DigestId) {
            let Some(digest) = catalog.tables.digests.checked(id) else { continue };
            let Ok(why) = why::why(facts, &digest, usize::MAX) else { continue };
            assert_eq!(why.chains_found > 0, facts.mark.is_reachable(id), "{why:?}");
        }
    });
}
