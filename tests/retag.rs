//! Tags that are made and moved: what is written, in which order, what is refused, and what a failing call leaves.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;
mod memory;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::check::{blob_path, hex, sha256};
use common::image::{Image, OCI_CONFIG, OCI_MANIFEST, bytes, descriptor, layer};
use memory::faulty::{Fault, Faulty};
use memory::{
    Contents, Live, blobs, everything, layer_link, old_store, put, put_blob, put_image, put_sha512_image,
    put_tag, registry, revision_link, tag_history_link, tag_link, trash,
};
use regfs::catalog::Tables;
use regfs::engine::Engine;
use regfs::error::Error;
use regfs::gc::guard::gate::Gate;
use regfs::gc::{self, DEFAULT_KEEP, Options, Unwatched};
use regfs::store::Store;
use regfs::store::memory::Memory;
use regfs::trash::Author;
use regfs::view::Settings;
use regfs::view::node::Node;
use serde_json::json;

const ERRORS: [i32; 4] = [libc::EIO, libc::ENOENT, libc::EACCES, libc::ENOSPC];

fn author() -> Author {
    Author { uid: 0, pid: 1, command: "test".to_string() }
}

fn mounted(store: Arc<dyn Store>) -> Result<Arc<Engine>, Error> {
    mounted_as(store, false)
}

fn mounted_as(store: Arc<dyn Store>, read_only: bool) -> Result<Arc<Engine>, Error> {
    let mounted_at = SystemTime::UNIX_EPOCH;
    let (grace, keep) = (Duration::ZERO, DEFAULT_KEEP);
    Engine::new(
        store,
        Settings { read_only, uid: 0, gid: 0, grace, drain: grace, keep, rate: None, mounted_at },
    )
    .map(Arc::new)
}

/// The node of a path in the mount.
fn node(engine: &Engine, path: &str) -> Result<Node, Error> {
    let snapshot = engine.snapshot();
    let view = engine.view(&snapshot);
    path.split('/').try_fold(Node::Root, |node, name| {
        view.lookup(node, OsStr::new(name))?.ok_or_else(|| Error::NotFound { what: path.to_string() })
    })
}

fn parent<'a>(engine: &Engine, path: &'a str) -> Result<(Node, &'a OsStr), Error> {
    let (above, name) = path.rsplit_once('/').unwrap();
    Ok((node(engine, above)?, OsStr::new(name)))
}

/// `ln -s <text> <path>`
fn ln(engine: &Engine, text: &str, path: &str) -> Result<(), Error> {
    let (above, name) = parent(engine, path)?;
    engine.symlink(above, name, Path::new(text), &author())
}

/// `mv -T <from> <to>`
fn mv(engine: &Engine, from: &str, to: &str) -> Result<(), Error> {
    engine.rename(parent(engine, from)?, parent(engine, to)?, true, &author())
}

/// A text that names a manifest.
fn naming(digest: &str) -> String {
    format!("../../manifests/{}", digest.replace(':', "/"))
}

fn sweep(store: &dyn Store, untagged: bool) {
    let options = Options { untagged, grace: Duration::ZERO, gate: Gate::STOPPED, ..Options::default() };
    let report = gc::run(store, &Tables::default(), &options, &author(), &Unwatched).unwrap();
    assert!(report.is_complete(), "{:?}", report.failures);
}

fn plain(name: &str) -> Image {
    Image::oci(name, &[layer("base", "shared by many"), layer("own", name)])
}

fn multi() -> Image {
    let [amd64, arm64] = ["amd64", "arm64"]
        .map(|name| Image::oci_for(name, "multi", &[layer("base", "shared by many"), layer("bin", name)]));
    Image::index(&[("amd64", &amd64), ("arm64", &arm64)])
}

/// A registry of long ago whose clock goes on: `app` has two images and an index, `other` one of them.
fn fixture() -> Arc<Memory> {
    let store = Memory::default();
    put_image(&store, "app", Some("1"), &plain("one"));
    put_image(&store, "app", Some("2"), &plain("two"));
    put_image(&store, "app", Some("multi"), &multi());
    put_image(&store, "app", None, &plain("two").referrer("application/vnd.example.signature", "of two"));
    put_image(&store, "other", Some("2"), &plain("two"));
    put_image(&store, "other", Some("old"), &plain("old"));
    put_sha512_image(&store, "strong", Some("1"), "named by its sha512");
    let store = old_store(&store.snapshot());
    store.set_clock(SystemTime::now());
    store
}

/// Paths of the registry in `after` that `before` lacks, and the other way round.
fn changes(before: &Contents, after: &Contents) -> (BTreeSet<PathBuf>, BTreeSet<PathBuf>) {
    let [before, after] = [before, after].map(registry);
    let minus = |a: &Contents, b: &Contents| a.keys().filter(|k| !b.contains_key(*k)).cloned().collect();
    (minus(&after, &before), minus(&before, &after))
}

fn set<const N: usize>(paths: [PathBuf; N]) -> BTreeSet<PathBuf> {
    paths.into_iter().collect()
}

#[test]
fn a_tag_of_what_the_repository_has_is_two_links() {
    let store = fixture();
    let (before, digest) = (store.snapshot(), plain("one").digest());
    let engine = mounted(store.clone()).unwrap();
    ln(&engine, &naming(&digest), "images/app/_tags/new").unwrap();
    let (link, history) = (tag_link("app", "new"), tag_history_link("app", "new", &digest));
    assert_eq!(*store.snapshot()[&link], *digest.as_bytes(), "no newline");
    assert_eq!(*store.snapshot()[&history], *digest.as_bytes());
    assert_eq!(changes(&before, &store.snapshot()), (set([link, history]), set([])));
    // At once, by its reference, too; any reference is a place for a tag.
    let snapshot = engine.snapshot();
    let tag = node(&engine, "images/app:new").unwrap();
    assert!(
        engine.view(&snapshot).target(tag).unwrap().ends_with(format!("manifests/sha256/{}", hex(&digest)))
    );
    ln(&engine, &format!("{}/", naming(&digest)), "images/app:newer").unwrap();
    node(&engine, "images/app/_tags/newer").unwrap();
    assert_eq!(Live::of(&store.snapshot()).lacks, BTreeSet::new());
}

#[test]
fn a_promotion_writes_what_a_push_writes_and_in_its_order() {
    let pushed = fixture();
    put_image(&pushed, "team/web", Some("1"), &multi());
    put_image(&pushed, "team/web", Some("2"), &plain("two"));
    put_sha512_image(&pushed, "team/web", Some("3"), "named by its sha512");
    let store = fixture();
    let faulty = Faulty::new(store.clone(), Fault::Never, 0);
    let engine = mounted(faulty.clone()).unwrap();
    put(&store, "repositories/team/web/_layers/sha256/x", b"so that there is such a directory");
    engine.refresh_now();
    let strong = String::from_utf8(store.snapshot()[&tag_link("strong", "1")].to_vec()).unwrap();
    for (digest, tag) in [(multi().digest(), "1"), (plain("two").digest(), "2"), (strong, "3")] {
        ln(&engine, &naming(&digest), &format!("images/team/web/_tags/{tag}")).unwrap();
    }
    assert!(store.remove(&["repositories/team/web/_layers/sha256/x".into()]).is_empty());
    assert_eq!(changes(&pushed.snapshot(), &store.snapshot()), (set([]), set([])));
    assert!(registry(&pushed.snapshot()) == registry(&store.snapshot()));

    let calls = faulty.calls();
    let at = |path: PathBuf| calls.iter().position(|c| c.name == "create" && c.path == path).unwrap();
    let index = multi();
    let layers = index.children.iter().flat_map(|c| &c.blobs);
    let layers = layers.map(|blob| at(layer_link("team/web", &sha256(blob)))).max().unwrap();
    let children: Vec<usize> =
        index.children.iter().map(|c| at(revision_link("team/web", &c.digest()))).collect();
    let revision = at(revision_link("team/web", &index.digest()));
    let history = at(tag_history_link("team/web", "1", &index.digest()));
    let tag = at(tag_link("team/web", "1"));
    assert!(children.iter().all(|child| layers < *child && *child < revision), "{calls:?}");
    assert!(revision < history && history < tag, "{calls:?}");
    // What a step relies on is durable before it.
    let synced = |from: usize, to: usize| calls[from..to].iter().any(|c| c.name == "sync");
    assert!(synced(layers, children[0]) && synced(revision, history), "{calls:?}");
    assert!(calls[tag..].iter().any(|c| c.name == "sync"));
}

#[test]
fn what_is_not_whole_in_the_store_is_not_tagged() {
    let one = plain("one");
    let odd =
        Image::odd("application/vnd.example", br#"{"mediaType":"application/vnd.example"}"#.as_slice(), &[]);
    let cases: [(&str, String, Option<String>, i32); 8] = [
        ("nobody's", sha256(b"nobody's"), None, libc::ENOENT),
        ("its own bytes", one.digest(), Some(one.digest()), libc::ENOENT),
        ("its config", one.digest(), Some(sha256(&one.blobs[0])), libc::ENOENT),
        ("a layer", one.digest(), Some(sha256(&one.blobs[2])), libc::ENOENT),
        ("a layer of a child", multi().digest(), Some(sha256(&multi().children[1].blobs[2])), libc::ENOENT),
        ("a layer is no manifest", sha256(&one.blobs[1]), None, libc::EINVAL),
        ("a config is no manifest", sha256(&one.blobs[0]), None, libc::EINVAL),
        ("nobody knows what it names", odd.digest(), None, libc::EINVAL),
    ];
    for (what, digest, missing, expected) in cases {
        for place in ["app", "other"] {
            let store = fixture();
            put_image(&store, "app", None, &odd);
            let gone: Vec<PathBuf> = missing.iter().map(|digest| blob_path(digest)).collect();
            assert!(store.remove(&gone).is_empty());
            let (before, engine) = (store.snapshot(), mounted(store.clone()).unwrap());
            let refused = ln(&engine, &naming(&digest), &format!("images/{place}/_tags/new")).unwrap_err();
            assert_eq!(refused.errno(), expected, "{what} to {place}: {refused}");
            assert!(before == store.snapshot(), "{what} to {place}");
            // The log says which.
            let log = String::from_utf8(engine.control_text(Node::ControlLog).unwrap().to_vec()).unwrap();
            let named = missing.as_ref().unwrap_or(&digest);
            assert!(log.contains(hex(named)), "{what}: {log}");
        }
    }
}

#[test]
fn damaged_bytes_and_links_are_not_built_upon() {
    let digest = plain("one").digest();
    let base = sha256(&plain("one").blobs[1]);
    for (path, content) in [
        (blob_path(&digest), "other bytes"),
        (layer_link("other", &base), ""),
        (layer_link("other", &base), "sha256:no digest"),
        (revision_link("other", &digest), &*base),
    ] {
        let store = fixture();
        put(&store, &path, content.as_bytes());
        let (before, engine) = (store.snapshot(), mounted(store.clone()).unwrap());
        let refused = ln(&engine, &naming(&digest), "images/other/_tags/new").unwrap_err();
        assert_eq!(refused.errno(), libc::EIO, "{}: {refused}", path.display());
        assert!(before == store.snapshot(), "{}", path.display());
    }
}

#[test]
fn an_index_is_promoted_without_the_children_that_are_not_there() {
    let index = multi();
    let [amd64, arm64] = &index.children[..] else { panic!("two children") };
    let store = fixture();
    assert!(store.remove(&[blob_path(&arm64.digest())]).is_empty());
    let engine = mounted(store.clone()).unwrap();
    ln(&engine, &naming(&index.digest()), "images/other/_tags/multi").unwrap();
    let after = store.snapshot();
    assert!(after.contains_key(&revision_link("other", &amd64.digest())));
    assert!(!after.contains_key(&revision_link("other", &arm64.digest())));
    assert!(!after.contains_key(&layer_link("other", &sha256(&arm64.blobs[2]))));

    // Nothing of it can be pulled.
    let store = fixture();
    assert!(store.remove(&[amd64, arm64].map(|child| blob_path(&child.digest()))).is_empty());
    let engine = mounted(store.clone()).unwrap();
    let refused = ln(&engine, &naming(&index.digest()), "images/other/_tags/multi").unwrap_err();
    assert_eq!(refused.errno(), libc::ENOENT);

    // What was deleted from a repository doesn't come back with another tag there.
    let store = fixture();
    assert!(store.remove(&[revision_link("app", &arm64.digest())]).is_empty());
    let (before, engine) = (store.snapshot(), mounted(store.clone()).unwrap());
    ln(&engine, &naming(&index.digest()), "images/app/_tags/new").unwrap();
    let links = set([tag_link("app", "new"), tag_history_link("app", "new", &index.digest())]);
    assert_eq!(changes(&before, &store.snapshot()), (links, set([])));
}

#[test]
fn a_foreign_layer_need_not_be_there() {
    let store = fixture();
    let mut foreign = descriptor("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", b"elsewhere");
    foreign["urls"] = json!(["https://example.com/layer"]);
    let manifest = bytes(&json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": descriptor(OCI_CONFIG, b"{}"), "layers": [foreign],
    }));
    let digest = put_image(&store, "app", Some("windows"), &Image::odd(OCI_MANIFEST, manifest, &[b"{}"]));
    let engine = mounted(store.clone()).unwrap();
    ln(&engine, &naming(&digest), "images/other/_tags/windows").unwrap();
    assert!(store.snapshot().contains_key(&layer_link("other", &sha256(b"{}"))));
    assert!(!store.snapshot().contains_key(&layer_link("other", &sha256(b"elsewhere"))));
}

#[test]
fn indexes_in_indexes_are_followed_but_not_without_end() {
    for (depth, expected) in [(30, None), (40, Some(libc::EINVAL)), (4000, Some(libc::EINVAL))] {
        let store = fixture();
        let mut descriptor = plain("one").descriptor();
        let mut digest = String::new();
        for _ in 0..depth {
            let index = bytes(&json!({
                "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
                "manifests": [descriptor],
            }));
            digest = put_blob(&store, &index);
            descriptor = common::image::descriptor("application/vnd.oci.image.index.v1+json", &index);
        }
        let engine = mounted(store.clone()).unwrap();
        let result = ln(&engine, &naming(&digest), "images/other/_tags/deep");
        assert_eq!(result.err().map(|e| e.errno()), expected, "{depth}");
    }
}

#[test]
fn names_and_places_that_are_none_are_refused() {
    let store = fixture();
    let (before, engine) = (store.snapshot(), mounted(store.clone()).unwrap());
    let (good, other) = (naming(&plain("one").digest()), naming(&plain("two").digest()));
    let long = format!("images/app/_tags/{}", "a".repeat(129));
    let cases = [
        (&*good, "images/app/_tags/.hidden", libc::EINVAL),
        (&good, "images/app/_tags/-x", libc::EINVAL),
        (&good, "images/app/_tags/with space", libc::EINVAL),
        (&good, &long, libc::EINVAL),
        ("nothing", "images/app/_tags/new", libc::ENOENT),
        ("../../other/_tags/1", "images/app/_tags/new", libc::ENOENT),
        ("/etc/passwd", "images/app/_tags/new", libc::EINVAL),
        ("../../../../etc/passwd", "images/app/_tags/new", libc::EINVAL),
        (&good, "images/app/_tags/1", libc::EEXIST),
        (&other, "images/app/_tags/1", libc::EEXIST),
        (&good, "images/app:1", libc::EEXIST),
        (&good, "images/nobody:1", libc::ENOENT),
        (&good, "images/app/new", libc::EROFS),
        (&good, "images/new", libc::EROFS),
        (&good, "images/app@sha256:x", libc::EROFS),
        (&good, "images/app/_manifests/sha256/new", libc::EROFS),
        (&good, "manifests/sha256/new", libc::EROFS),
        (&good, "control/new", libc::EROFS),
    ];
    for (text, path, expected) in cases {
        assert_eq!(ln(&engine, text, path).unwrap_err().errno(), expected, "ln -s {text} {path}");
    }
    let moves = [
        ("images/app/_tags/1", "images/app/_tags/.hidden", libc::EINVAL),
        ("images/app/_tags/none", "images/app/_tags/new", libc::ENOENT),
        ("images/app/_tags/1", "images/nobody:1", libc::ENOENT),
        ("images/app", "images/New", libc::EINVAL),
        ("images/app", "images/other", libc::ENOTEMPTY),
        ("images/app", "images/app:new", libc::EINVAL),
        ("images/app", "manifests/new", libc::EROFS),
        ("images/app/_tags", "images/app/new", libc::EROFS),
        ("images/app/_tags/1", "images/1", libc::EROFS),
        ("images/app/_tags/1", "images/app/_manifests/sha256/1", libc::EROFS),
        ("control/log", "images/app/_tags/new", libc::EROFS),
    ];
    for (from, to, expected) in moves {
        assert_eq!(mv(&engine, from, to).unwrap_err().errno(), expected, "mv {from} {to}");
    }
    let [one, two] = ["images/app/_tags/1", "images/app/_tags/2"].map(|path| parent(&engine, path).unwrap());
    assert_eq!(engine.rename(one, two, false, &author()).unwrap_err().errno(), libc::EEXIST);
    mv(&engine, "images/app/_tags/1", "images/app/_tags/1").unwrap();
    mv(&engine, "images/app:1", "images/app/_tags/1").unwrap();
    assert!(before == store.snapshot());

    let engine = mounted_as(store.clone(), true).unwrap();
    assert_eq!(ln(&engine, &good, "images/app/_tags/new").unwrap_err().errno(), libc::EROFS);
    assert_eq!(mv(&engine, "images/app/_tags/1", "images/app/_tags/new").unwrap_err().errno(), libc::EROFS);
    assert_eq!(engine.mkdir(Node::Images, OsStr::new("new"), &author()).unwrap_err().errno(), libc::EROFS);
    assert!(before == store.snapshot());
}

#[test]
fn mkdir_takes_names_of_repositories() {
    let (engine, images) = (mounted(fixture()).unwrap(), Node::Images);
    let mkdir =
        |above: Node, name: &str| engine.mkdir(above, OsStr::new(name), &author()).unwrap_err().errno();
    for bad in ["Upper", "_x", ".x", "a..b", "a b", "x-", &"a".repeat(256)] {
        assert_eq!(mkdir(images, bad), libc::EINVAL, "{bad}");
    }
    assert_eq!(mkdir(images, "app"), libc::EEXIST);
    assert_eq!(mkdir(Node::Root, "new"), libc::EROFS);
    assert_eq!(mkdir(node(&engine, "images/app/_tags").unwrap(), "new"), libc::EROFS);
    // A storage without directories has none to offer, and says so.
    assert_eq!(mkdir(images, "new"), libc::EPERM);
}

#[test]
fn a_move_within_a_repository_keeps_its_manifest() {
    let store = fixture();
    let (before, digest) = (store.snapshot(), plain("one").digest());
    let engine = mounted(store.clone()).unwrap();
    mv(&engine, "images/app/_tags/1", "images/app/_tags/new").unwrap();
    let after = store.snapshot();
    let new = set([tag_link("app", "new"), tag_history_link("app", "new", &digest)]);
    let old = set([tag_link("app", "1"), tag_history_link("app", "1", &digest)]);
    assert_eq!(changes(&before, &after), (new, old.clone()));
    let taken: Vec<BTreeSet<PathBuf>> = trash(&after).into_values().collect();
    assert_eq!(taken, [old], "one transaction");
    node(&engine, "images/app:new").unwrap();
    assert_eq!(node(&engine, "images/app:1").unwrap_err().errno(), libc::ENOENT);
    let id = trash(&after).into_keys().next().unwrap();
    assert!(id.ends_with("-mv"), "{id}");
    gc::undo(&*store, &author(), &id).unwrap();
    assert!(everything(&before).is_subset(&everything(&store.snapshot())));
    assert_eq!(Live::of(&store.snapshot()).lacks, BTreeSet::new());
}

#[test]
fn a_move_onto_a_tag_takes_its_name_and_leaves_its_manifest() {
    let store = fixture();
    let (before, one, two) = (store.snapshot(), plain("one").digest(), plain("two").digest());
    let engine = mounted(store.clone()).unwrap();
    mv(&engine, "images/app/_tags/1", "images/app/_tags/2").unwrap();
    let after = store.snapshot();
    assert_eq!(*after[&tag_link("app", "2")], *one.as_bytes());
    assert!(!after.contains_key(&tag_link("app", "1")));
    assert!(after.contains_key(&revision_link("app", &two)), "as after a push");
    assert!(everything(&before).is_subset(&everything(&after)), "the link of the old one is in the trash");
    assert_eq!(trash(&after).len(), 1);
    // The mount knows the new target.
    let (snapshot, tag) = (engine.snapshot(), node(&engine, "images/app:2").unwrap());
    assert!(engine.view(&snapshot).target(tag).unwrap().ends_with(hex(&one)));
    // One that has no link gets it.
    put_tag(&store, "app", "broken", &two);
    assert!(store.remove(&[tag_link("app", "broken")]).is_empty());
    engine.refresh_now();
    mv(&engine, "images/app/_tags/2", "images/app/_tags/broken").unwrap();
    assert_eq!(*store.snapshot()[&tag_link("app", "broken")], *one.as_bytes());
}

#[test]
fn a_move_to_another_repository_takes_the_image_along() {
    let store = fixture();
    let (before, two) = (store.snapshot(), plain("two"));
    let engine = mounted(store.clone()).unwrap();
    put_tag(&store, "app", "two", &two.digest());
    engine.refresh_now();
    // Another tag holds it still.
    mv(&engine, "images/app/_tags/two", "images/strong/_tags/2").unwrap();
    assert!(store.snapshot().contains_key(&revision_link("app", &two.digest())));
    mv(&engine, "images/app/_tags/2", "images/strong/_tags/2").unwrap();
    let after = store.snapshot();
    assert!(!after.contains_key(&revision_link("app", &two.digest())));
    assert!(after.contains_key(&revision_link("strong", &two.digest())));
    assert_eq!(Live::of(&after).lacks, BTreeSet::new());
    for id in trash(&after).into_keys().rev() {
        gc::undo(&*store, &author(), &id).unwrap();
    }
    assert!(everything(&before).is_subset(&everything(&store.snapshot())));
    assert!(changes(&before, &store.snapshot()).1.is_empty(), "all is back");
}

#[test]
fn a_damaged_image_can_be_renamed_but_not_promoted() {
    let store = fixture();
    assert!(store.remove(&[blob_path(&sha256(&plain("one").blobs[2]))]).is_empty());
    let engine = mounted(store.clone()).unwrap();
    assert_eq!(mv(&engine, "images/app:1", "images/other:1").unwrap_err().errno(), libc::ENOENT);
    mv(&engine, "images/app:1", "images/app:broken").unwrap();
    // What leads nowhere has nothing to lead to under another name.
    assert!(store.remove(&[revision_link("app", &plain("one").digest())]).is_empty());
    engine.refresh_now();
    assert_eq!(mv(&engine, "images/app:broken", "images/app:1").unwrap_err().errno(), libc::ENOENT);
}

#[test]
fn what_was_promoted_is_no_garbage_and_what_a_sweep_took_is_not_promoted() {
    let store = fixture();
    let (digest, all) = (plain("orphan").digest(), plain("orphan").digests());
    put_image(&store, "app", None, &plain("orphan"));
    // The API deleted it: nothing names it any more, and it was used long ago.
    assert!(store.remove(&[revision_link("app", &digest)]).is_empty());
    let store = old_store(&store.snapshot());
    store.set_clock(SystemTime::now());
    let engine = mounted(store.clone()).unwrap();
    ln(&engine, &naming(&digest), "images/other/_tags/saved").unwrap();
    sweep(&*store, true);
    assert!(all.is_subset(&blobs(&store.snapshot())));
    assert_eq!(Live::of(&store.snapshot()).lacks, BTreeSet::new());

    engine.unlink(node(&engine, "images/other/_tags").unwrap(), OsStr::new("saved"), &author()).unwrap();
    sweep(&*store, true);
    let refused = ln(&engine, &naming(&digest), "images/other/_tags/saved").unwrap_err();
    assert_eq!(refused.errno(), libc::ENOENT);
    assert!(refused.to_string().contains("-sweep"), "{refused}");
    node(&engine, "images/other/_tags/saved").unwrap_err();
}

/// A change with what it is to make: the tag that stands afterwards, and the one that is gone.
struct Story {
    name: &'static str,
    digest: String,
    to: (&'static str, &'static str),
    from: Option<(&'static str, &'static str)>,
    /// The name to make has another target before.
    replaces: bool,
}

impl Story {
    fn act(&self, engine: &Engine) -> Result<(), Error> {
        let path = |(name, tag): (&str, &str)| format!("images/{name}/_tags/{tag}");
        match self.from {
            Some(from) => mv(engine, &path(from), &path(self.to)),
            None => ln(engine, &naming(&self.digest), &path(self.to)),
        }
    }

    /// Runs it with every fault.
    fn check(&self) {
        let before = fixture().snapshot();
        let store = fixture();
        let clean = Faulty::new(store.clone(), Fault::Never, 0);
        self.act(&mounted(clean.clone()).unwrap()).unwrap();
        let expected = registry(&store.snapshot());
        self.assert_safe(&before, &store.snapshot(), "without a fault");

        let calls = clean.calls();
        let mut faults: Vec<Fault> = Vec::new();
        faults.extend((0..calls.len()).flat_map(|n| [Fault::GlitchAt(n), Fault::CutFrom(n)]));
        faults.extend((0..clean.changes()).flat_map(|n| [Fault::LateAt(n), Fault::DieAfter(n)]));
        let paths: BTreeSet<PathBuf> = calls.into_iter().map(|call| call.path).collect();
        faults.extend(paths.into_iter().filter(|path| !path.as_os_str().is_empty()).map(Fault::Stuck));
        for (at, fault) in faults.iter().enumerate() {
            let when = format!("{}, {fault:?}", self.name);
            let store = fixture();
            let faulty = Faulty::new(store.clone(), fault.clone(), ERRORS[(at / 2 + at) % ERRORS.len()]);
            let result = mounted(faulty).and_then(|engine| self.act(&engine));
            let after = store.snapshot();
            self.assert_safe(&before, &after, &when);
            if result.is_ok() {
                // What can't be judged stays, as with `rm`; what was asked for is done.
                let after = registry(&after);
                assert!(expected.iter().all(|(path, content)| after.get(path) == Some(content)), "{when}");
                assert!(self.is_done(&after), "{when}: it said it was");
            }
            self.next(&store, &when);
        }
        println!("{}: {} faults", self.name, faults.len());
    }

    fn is_done(&self, contents: &Contents) -> bool {
        let link = contents.get(&tag_link(self.to.0, self.to.1));
        link.is_some_and(|link| **link == *self.digest.as_bytes())
            && self.from.is_none_or(|(name, tag)| !contents.contains_key(&tag_link(name, tag)))
    }

    /// What must hold at every instant.
    fn assert_safe(&self, before: &Contents, after: &Contents, when: &str) {
        let (name, tag) = self.to;
        let mut lacks = Live::of(after).lacks;
        // As after a push that broke off there.
        lacks.remove(&format!("tag {name} {tag}"));
        assert_eq!(lacks, BTreeSet::new(), "{when}: tags lead to what is not served");
        assert!(everything(before).is_subset(&everything(after)), "{when}: something is lost");
        let leads = |(name, tag): (&str, &str)| {
            after.get(&tag_link(name, tag)).is_some_and(|link| **link == *self.digest.as_bytes())
        };
        assert!(self.from.is_none_or(|from| leads(from) || leads(self.to)), "{when}: neither name is there");
        assert!(!self.replaces || after.contains_key(&tag_link(name, tag)), "{when}: the name leads nowhere");
    }

    /// The next try does it, and a sweep finds nothing live to take.
    fn next(&self, store: &Arc<Memory>, when: &str) {
        let engine = mounted(store.clone()).unwrap();
        if !self.is_done(&store.snapshot()) {
            let (name, tag) = self.to;
            let broken = node(&engine, &format!("images/{name}/_tags/{tag}")).is_ok() && self.from.is_none();
            if broken {
                let tags = node(&engine, &format!("images/{name}/_tags")).unwrap();
                engine.unlink(tags, OsStr::new(tag), &author()).unwrap_or_else(|e| panic!("{when}: {e}"));
            }
            self.act(&engine).unwrap_or_else(|e| panic!("{when}: the next try: {e}"));
        }
        assert!(self.is_done(&store.snapshot()), "{when}: after the next try");
        sweep(&**store, true);
        let live = Live::of(&store.snapshot());
        assert_eq!(live.lacks, BTreeSet::new(), "{when}: after the next sweep");
        assert_eq!(blobs(&store.snapshot()), live.blobs, "{when}: garbage after the next sweep");
    }
}

#[test]
fn a_failing_call_leaves_no_tag_that_leads_nowhere() {
    let (one, two, multi) = (plain("one").digest(), plain("two").digest(), multi().digest());
    let ln = |name, digest: &str, to| Story { name, digest: digest.into(), to, from: None, replaces: false };
    let mv = |name, digest: &str, from, to, replaces| Story {
        name,
        digest: digest.into(),
        to,
        from: Some(from),
        replaces,
    };
    let stories = [
        ln("ln within", &one, ("app", "new")),
        ln("ln across", &multi, ("other", "new")),
        mv("mv within", &one, ("app", "1"), ("app", "new"), false),
        mv("mv within, onto", &one, ("app", "1"), ("app", "2"), true),
        mv("mv across", &multi, ("app", "multi"), ("other", "new"), false),
        mv("mv across, onto", &two, ("app", "2"), ("other", "old"), true),
    ];
    stories.iter().for_each(Story::check);
}
