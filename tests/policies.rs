//! What a collection takes and leaves when it is told more than "garbage": ages, repositories, uploads, referrers of
//! what is gone, repairs, damage that shall keep nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;
mod memory;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::check::{blob_path, hex, sha256};
use common::image::{Image, layer};
use memory::faulty::{Fault, Faulty};
use memory::{
    Live, everything, layer_link, long_ago, put, put_blob, put_image, put_tag, registry, revision_link,
    tag_history_link, tag_link, trash,
};
use regfs::advice::Place;
use regfs::catalog::Tables;
use regfs::catalog::scan::scan_strictly;
use regfs::gc::guard::gate::Gate;
use regfs::gc::guard::gate::Said;
use regfs::gc::plan::{Plan, Policy};
use regfs::gc::report::{Details, Report, timestamp};
use regfs::gc::{self, Options, Unwatched};
use regfs::store::Store;
use regfs::store::memory::Memory;
use regfs::trash::{Author, Selection};
use regfs::view::control::{GcCommand, parse_gc};

const DAY: Duration = Duration::from_secs(24 * 3600);

fn author() -> Author {
    Author { uid: 0, pid: 1, command: "test".to_string() }
}

/// A store in which everything is written a month ago, until told otherwise.
fn store() -> Arc<Memory> {
    let store = Arc::new(Memory::default());
    store.set_clock(long_ago());
    store
}

fn days_ago(days: u32) -> SystemTime {
    SystemTime::now() - DAY * days
}

fn image(name: &str) -> Image {
    Image::oci(name, &[layer("own", name)])
}

/// Runs the words that people write to `control/gc`.
fn run(store: &dyn Store, words: &str) -> Report {
    let defaults = Options { gate: Gate::STOPPED, ..Options::default() };
    let Ok(GcCommand::Run(options, Said::Nothing, false)) = parse_gc(words, &defaults) else {
        panic!("{words} is no run")
    };
    run_with(store, &options)
}

fn run_with(store: &dyn Store, options: &Options) -> Report {
    let report = gc::run(store, &Tables::default(), options, &author(), &Unwatched).unwrap();
    assert_eq!(report.failures, [""; 0]);
    report
}

/// A dry run that does not look through a small store as a whole, nor reads tags.
fn quick() -> Options {
    Options { dry_run: true, quick: true, gate: Gate::STOPPED, ..Options::default() }
}

/// What a dry run of these words would take, as paths.
fn taken(store: &dyn Store, words: &str) -> BTreeSet<PathBuf> {
    run(store, &format!("dry-run thorough {words}")).taken_paths().collect()
}

#[test]
fn untagged_manifests_go_when_they_are_older_than_both_ages() {
    let store = store();
    put_image(&store, "app", Some("1"), &image("kept"));
    store.set_clock(days_ago(3));
    let digest = put_image(&store, "app", None, &image("untagged"));
    let link = revision_link("app", &digest);
    let cases = [
        ("", false),
        ("untagged", true),
        ("untagged=2d", true),
        ("untagged=7d", false),
        ("untagged=2d grace=7d", false),
        ("untagged=7d grace=0", false),
        ("untagged=0 grace=0", true),
    ];
    for (words, goes) in cases {
        assert_eq!(taken(&*store, words).contains(&link), goes, "{words}");
    }
}

#[test]
fn a_glob_leaves_other_repositories_as_they_are() {
    let store = store();
    put_image(&store, "team/a", Some("1"), &image("kept"));
    for name in ["team/a", "team/b/c", "other"] {
        put_image(&store, name, None, &image(name));
        let own = put_blob(&store, format!("of {name}").as_bytes());
        put(&store, layer_link(name, &own), own.as_bytes());
        let missing = sha256(format!("missing in {name}").as_bytes());
        put(&store, layer_link(name, &missing), missing.as_bytes());
        put(&store, format!("repositories/{name}/_uploads/1/data"), b"old");
    }
    let shared = put_blob(&store, b"of two repositories");
    put(&store, layer_link("team/a", &shared), shared.as_bytes());
    put(&store, layer_link("other", &shared), shared.as_bytes());
    let nobodys = put_blob(&store, b"of nobody");

    let of = |name: &str| -> BTreeSet<PathBuf> {
        let own = [format!("of {name}"), format!("missing in {name}")].map(|text| sha256(text.as_bytes()));
        let blobs = image(name).digests().into_iter().chain([own[0].clone()]).map(|d| blob_path(&d));
        let layers = image(name).blobs.iter().map(|b| sha256(b)).chain(own.clone()).collect::<Vec<_>>();
        let links = layers.iter().map(|digest| layer_link(name, digest)).collect::<Vec<_>>();
        let others =
            [revision_link(name, &image(name).digest()), format!("repositories/{name}/_uploads/1").into()];
        blobs.chain(links).chain(others).collect()
    };
    let found = taken(&*store, "untagged repository=team/*");
    assert_eq!(found, of("team/a"), "team/* is one component");
    let both: BTreeSet<PathBuf> = of("team/a").into_iter().chain(of("team/b/c")).collect();
    let found: BTreeSet<PathBuf> = taken(&*store, "untagged repository=team/**")
        .into_iter()
        // All that was in it goes, so its directories do when nobody waits for them.
        .filter(|path| path.starts_with("blobs") || path.components().count() > 4)
        .collect();
    assert_eq!(found, both);
    let all = taken(&*store, "untagged repository=**");
    assert!(all.contains(&blob_path(&shared)), "all that link it match");
    assert!(!all.contains(&blob_path(&nobodys)), "nobody can say whose it was");
    assert!(taken(&*store, "untagged").contains(&blob_path(&nobodys)));
    assert_eq!(taken(&*store, "untagged repository=nobody").len(), 0);
}

#[test]
fn uploads_go_by_their_start_and_never_while_bytes_arrive() {
    let store = store();
    put_image(&store, "app", Some("1"), &image("kept"));
    let upload = |id: &str| PathBuf::from(format!("repositories/app/_uploads/{id}"));
    let text = |time: SystemTime| humantime::format_rfc3339(time).to_string();
    // (name, began, last byte); without the first there is no `startedat`.
    let uploads = [
        ("old", Some(9), 9),
        ("slow", Some(9), 0),
        ("recent", Some(3), 3),
        ("hash-states", None, 9),
        ("young-hash-states", None, 3),
    ];
    for (id, began, last) in uploads {
        store.set_clock(days_ago(last));
        if let Some(began) = began {
            put(&store, upload(id).join("startedat"), text(days_ago(began)).as_bytes());
            put(&store, upload(id).join("data"), b"bytes");
        }
        put(&store, upload(id).join("hashstates/sha256/0"), b"state");
    }
    let expect = |words: &str, ids: &[&str]| {
        let expected: BTreeSet<PathBuf> = ids.iter().map(|id| upload(id)).collect();
        assert_eq!(taken(&*store, words), expected, "{words}");
    };
    put(&store, upload("foreign").join("notes.txt"), b"not a registry's");
    expect("", &["old", "hash-states"]);
    expect("uploads=1d", &["old", "hash-states", "recent", "young-hash-states"]);
    expect("uploads=30d", &[]);
    expect("uploads=0 grace=5d", &["old", "hash-states"]);
    expect("uploads=0 grace=0", &["old", "hash-states", "recent", "young-hash-states", "slow"]);
    let before = everything(&store.snapshot());
    run(&*store, "sweep");
    assert!(everything(&store.snapshot()) == before);
    let id = trash(&store.snapshot()).into_keys().next().unwrap();
    gc::undo(&*store, &author(), &id).unwrap();
    assert!(everything(&store.snapshot()) == before);
    assert!(trash(&store.snapshot()).is_empty(), "all of the upload is back");
}

#[test]
fn what_is_about_an_image_that_is_gone_goes_when_asked() {
    let store = store();
    let (there, gone) = (image("there"), image("gone"));
    put_image(&store, "app", Some("1"), &there);
    let tag = |about: &Image, suffix: &str| format!("sha256-{}{suffix}", about.hex());
    let mut expected = BTreeSet::new();
    for suffix in [".sig", ".att", ".sbom"] {
        put_image(&store, "app", Some(&tag(&there, suffix)), &image(&format!("there{suffix}")));
        let own = image(&format!("gone{suffix}"));
        put_image(&store, "app", Some(&tag(&gone, suffix)), &own);
        expected.extend([tag_link("app", &tag(&gone, suffix)), revision_link("app", &own.digest())]);
    }
    // The fallback: a tag, an index, and below it what refers to the image.
    let referrer = gone.referrer("application/vnd.example.sbom", "of what is gone");
    let fallback = Image::index(&[("unknown", &referrer)]);
    put_image(&store, "app", Some(&tag(&gone, "")), &fallback);
    expected.insert(tag_link("app", &tag(&gone, "")));
    expected.extend([&fallback, &referrer].map(|m| revision_link("app", &m.digest())));
    // Referrers without a tag; one that somebody tagged; one whose subject is there.
    let loose = gone.referrer("application/vnd.example.signature", "loose");
    put_image(&store, "app", None, &loose);
    expected.insert(revision_link("app", &loose.digest()));
    let tagged = gone.referrer("application/vnd.example.signature", "tagged");
    put_image(&store, "app", Some("keep-me"), &tagged);
    put_image(&store, "app", None, &there.referrer("application/vnd.example.signature", "of what is there"));
    // Two tags, one of them a name of its own: the tag goes, the manifest stays.
    let shared = image("shared");
    put_image(&store, "app", Some("own-name"), &shared);
    put_tag(&store, "app", &format!("sha256-{}.sig", hex(&sha256(b"another"))), &shared.digest());
    expected.insert(tag_link("app", &format!("sha256-{}.sig", hex(&sha256(b"another")))));
    // Signatures can lie in a repository of their own.
    let elsewhere = image("elsewhere");
    put_image(&store, "other", Some("1"), &elsewhere);
    put_image(&store, "other", Some(&tag(&elsewhere, ".sig")), &image("signed in other"));
    put_image(&store, "app", Some(&tag(&elsewhere, ".sig")), &image("signed elsewhere"));
    store.set_clock(days_ago(0));
    put_image(&store, "app", Some(&format!("sha256-{}.sig", hex(&sha256(b"young")))), &image("young"));
    store.set_clock(long_ago());

    assert_eq!(run(&*store, "dry-run").taken().count(), 0, "nothing of it is garbage by itself");
    let before = store.snapshot();
    let live = Live::of(&before);
    assert_eq!(live.lacks, BTreeSet::new());
    run(&*store, "sweep referrers=orphans");
    let after = store.snapshot();
    assert_eq!(Live::of(&after).lacks, BTreeSet::new());
    let is_claim = |path: &PathBuf| {
        path.ends_with("current/link") || path.components().any(|part| part.as_os_str() == "revisions")
    };
    let went: BTreeSet<PathBuf> =
        before.keys().filter(|path| !after.contains_key(*path) && is_claim(path)).cloned().collect();
    assert_eq!(went, expected);
    assert!(everything(&after) == everything(&before), "nothing is lost");
    assert!(!after.contains_key(&blob_path(&loose.digest())));
    let id = trash(&after).into_keys().next().unwrap();
    gc::undo(&*store, &author(), &id).unwrap();
    assert!(registry(&store.snapshot()) == registry(&before));
}

/// A repository with an image of which everything that a repair knows is broken.
fn broken() -> (Arc<Memory>, Image) {
    let store = store();
    let image = Image::oci("broken", &[layer("one", "1"), layer("two", "2"), layer("three", "3")]);
    let digest = put_image(&store, "app", Some("1"), &image);
    put_tag(&store, "app", "moved", &sha256(b"before"));
    put_tag(&store, "app", "moved", &digest);
    let [_, one, two, three] = &image.blobs[..] else { panic!("a config and three layers") };
    let (one, two, three) = (sha256(one), sha256(two), sha256(three));
    put(&store, revision_link("app", &digest), b"");
    put(&store, tag_link("app", "1"), b"");
    put(&store, layer_link("app", &one), b"sha256:0123");
    put(&store, layer_link("app", &two), &[0xff; 71]);
    assert!(store.remove(&[layer_link("app", &three)]).is_empty());
    (store, image)
}

#[test]
fn repairs_are_shown_when_looked_for_and_made_when_asked() {
    let (store, image) = broken();
    let before = store.snapshot();
    assert_eq!(run_with(&*store, &quick()).repairs().count(), 0, "not looked for");
    let shown = run(&*store, "dry-run thorough grace=0");
    let layers: Vec<PathBuf> = image.blobs[1..].iter().map(|b| layer_link("app", &sha256(b))).collect();
    let mut expected = vec![revision_link("app", &image.digest()), tag_link("app", "1")];
    expected.extend(layers);
    let paths =
        |report: &Report| -> BTreeSet<PathBuf> { report.repairs().map(|(r, _)| r.path.clone()).collect() };
    // What can't be parsed leads nowhere, so a manifest whose link is broken names its layers all the same.
    assert_eq!(paths(&shown), expected.iter().cloned().collect());
    run(&*store, "sweep grace=0");
    assert!(registry(&store.snapshot()) == registry(&before), "not asked for");

    let report = run(&*store, "sweep repair");
    assert!(report.repairs().all(|(_, is_done)| is_done), "{:?}", report.repairs().collect::<Vec<_>>());
    let after = store.snapshot();
    assert_eq!(Live::of(&after).lacks, BTreeSet::new());
    assert_eq!(*after[&tag_link("app", "1")], *image.digest().as_bytes());
    // What was broken lies in the trash.
    let taken: BTreeSet<PathBuf> = trash(&after).into_values().flatten().collect();
    assert_eq!(taken, expected[..4].iter().cloned().collect());
    assert!(everything(&before).is_subset(&everything(&after)));
    assert_eq!(run(&*store, "dry-run thorough grace=0").repairs().count(), 0);
    // An undo does not break it again: what was broken stays in the trash, for whoever wants to see it.
    let id = trash(&after).into_keys().next().unwrap();
    let undone = gc::undo(&*store, &author(), &id).unwrap();
    assert_eq!(undone.present.into_iter().collect::<BTreeSet<_>>(), taken);
    assert!(store.snapshot() == after);
    gc::purge_trash(
        &*store,
        &Tables::default(),
        &author(),
        &Selection::All,
        &Options { gate: Gate::STOPPED, ..Options::default() },
    )
    .unwrap();
    assert_eq!(Live::of(&store.snapshot()).lacks, BTreeSet::new());
}

#[test]
fn a_sweep_looks_into_every_directory_where_they_are_few() {
    let store = store();
    let digest = put_image(&store, "app", Some("1"), &image("kept"));
    let unfinished =
        revision_link("app", &digest).with_file_name("link.0a1b2c3d-0000-4000-8000-000000000000.tmp");
    put(&store, unfinished.clone(), b"");
    let catalog = scan_strictly(&*store, &Tables::default(), None).unwrap();
    let found = |up_to: usize, options: Options| {
        let mut policy = Policy::new(&options, &regfs::clock::Clock::default().now(&*store));
        policy.thorough_up_to = up_to;
        let plan = Plan::new(&*store, &catalog, &policy).unwrap();
        let paths: Vec<PathBuf> = plan.items.iter().map(|item| item.path(&catalog.tables)).collect();
        assert_eq!(paths, if plan.is_thorough { vec![unfinished.clone()] } else { vec![] });
        plan.is_thorough
    };
    // Three blobs, a link to each of the two that are no manifest, a revision and a tag.
    let all = catalog.blobs.len() + 2 + 1 + 1;
    assert!(found(all, Options::default()));
    assert!(!found(all - 1, Options::default()));
    assert!(found(0, Options { thorough: true, gate: Gate::STOPPED, ..Options::default() }));
    assert!(found(all, Options { dry_run: true, gate: Gate::STOPPED, ..Options::default() }));
    assert!(!found(all, quick()));
}

#[test]
fn what_could_be_in_the_middle_of_a_push_is_not_repaired() {
    let (store, image) = broken();
    store.set_clock(SystemTime::now());
    put(&store, tag_link("app", "1"), b"");
    // More than one digest in its history, or one that is not there: nobody knows what it pointed at.
    put(&store, tag_link("app", "moved"), b"");
    put_tag(&store, "app", "gone", &sha256(b"gone"));
    put(&store, tag_link("app", "gone"), b"");
    let paths: BTreeSet<PathBuf> =
        run(&*store, "dry-run repair").repairs().map(|(r, _)| r.path.clone()).collect();
    for tag in ["1", "moved", "gone"] {
        assert!(!paths.contains(&tag_link("app", tag)), "{tag}");
    }
    assert!(paths.contains(&revision_link("app", &image.digest())));
    // Without grace the first can be told.
    let paths: BTreeSet<PathBuf> =
        run(&*store, "dry-run repair grace=0").repairs().map(|(r, _)| r.path.clone()).collect();
    assert!(paths.contains(&tag_link("app", "1")) && !paths.contains(&tag_link("app", "moved")));
    assert!(!paths.contains(&tag_link("app", "gone")));
}

#[test]
fn a_failing_repair_never_leaves_a_manifest_without_its_link() {
    let options = Options { repair: true, grace: Duration::ZERO, gate: Gate::STOPPED, ..Options::default() };
    let act = |store: &dyn Store| gc::run(store, &Tables::default(), &options, &author(), &Unwatched);
    let (store, image) = broken();
    let had = everything(&store.snapshot());
    let link = revision_link("app", &image.digest());
    let clean = Faulty::new(store, Fault::Never, 0);
    assert!(act(&*clean).unwrap().is_complete());
    let faults = (0..clean.calls().len()).flat_map(|n| [Fault::GlitchAt(n), Fault::CutFrom(n)]);
    let late = (0..clean.changes()).flat_map(|n| [Fault::LateAt(n), Fault::DieAfter(n)]);
    for fault in faults.chain(late) {
        let (store, _) = broken();
        // Whether it is reported, the stories of `tests/fault.rs` ask.
        let _ = act(&*Faulty::new(store.clone(), fault.clone(), libc::EIO));
        let after = store.snapshot();
        assert!(after.contains_key(&link), "{fault:?}: the manifest looks deleted");
        assert!(had.is_subset(&everything(&after)), "{fault:?}: something is lost");
        assert!(act(&*store).unwrap().is_complete(), "{fault:?}: the next run");
        let after = store.snapshot();
        assert_eq!(Live::of(&after).lacks, BTreeSet::new(), "{fault:?}: after the next run");
        assert!(had.is_subset(&everything(&after)), "{fault:?}: the next run lost something");
    }
}

#[test]
fn damage_keeps_everything_unless_told_to_keep_nothing() {
    let store = store();
    let damaged = image("damaged");
    put_image(&store, "app", Some("1"), &image("kept"));
    put_image(&store, "app", Some("2"), &damaged);
    put(&store, blob_path(&damaged.digest()), b"not what it was");
    assert_eq!(taken(&*store, "untagged grace=0").len(), 0);
    let options =
        Options { ignore_damaged: true, grace: Duration::ZERO, gate: Gate::STOPPED, ..Options::default() };
    run_with(&*store, &options);
    let after = store.snapshot();
    for blob in &damaged.blobs {
        assert!(!after.contains_key(&blob_path(&sha256(blob))), "nothing that can be read names it");
    }
    assert!(after.contains_key(&blob_path(&damaged.digest())), "its own bytes stay while its revision does");
    for digest in image("kept").digests() {
        assert!(after.contains_key(&blob_path(&digest)));
    }
    // What fails to be read is not damage.
    let stuck = Faulty::new(store, Fault::Stuck(blob_path(&image("kept").digest())), libc::EIO);
    assert!(gc::run(&*stuck, &Tables::default(), &options, &author(), &Unwatched).is_err());
}

#[test]
fn what_a_tag_pointed_at_is_forgotten_with_its_manifest_and_comes_back_with_its_tag_alone() {
    let store = store();
    let digest = put_image(&store, "app", Some("1"), &image("now"));
    put_image(&store, "app", None, &image("before"));
    put_tag(&store, "app", "1", &image("before").digest());
    put_tag(&store, "app", "1", &sha256(b"gone"));
    put_tag(&store, "app", "1", &digest);
    let past = tag_history_link("app", "1", &sha256(b"gone"));
    assert_eq!(taken(&*store, ""), [past.clone()].into(), "what is there stays in the history");
    run(&*store, "sweep");
    let id = trash(&store.snapshot()).into_keys().next().unwrap();
    let tag = tag_link("app", "1");
    assert!(store.rename(tag.parent().unwrap().parent().unwrap(), "elsewhere".as_ref()).unwrap());
    let undone = gc::undo(&*store, &author(), &id).unwrap();
    assert_eq!((undone.left, undone.restored), (vec![past.clone()], Vec::new()));
    assert!(store.list(tag.parent().unwrap()).unwrap().is_none(), "no tag that points nowhere");
    assert!(store.rename("elsewhere".as_ref(), tag.parent().unwrap().parent().unwrap()).unwrap());
    assert_eq!(gc::undo(&*store, &author(), &id).unwrap().restored, [past]);
}

#[test]
fn a_quick_dry_run_asks_nothing_about_what_is_kept() {
    let store = store();
    let image = image("kept");
    put_image(&store, "app", Some("1"), &image);
    let garbage = put_blob(&store, b"garbage");
    let faulty = Faulty::new(store, Fault::Never, 0);
    run_with(&*faulty, &quick());
    let calls = faulty.calls();
    for blob in &image.blobs {
        let digest = sha256(blob);
        let places = [blob_path(&digest), layer_link("app", &digest)];
        let asked = calls.iter().find(|call| {
            places.iter().any(|place| call.path == *place || Some(&*call.path) == place.parent())
        });
        assert!(asked.is_none(), "{asked:?}");
    }
    assert!(calls.iter().any(|call| call.path == blob_path(&garbage)));
}

/// On a disk a read is three system calls (open, read, close) and a look at a file one.
#[test]
fn a_quick_dry_run_reads_each_revision_and_manifest_once_and_nothing_else() {
    let calls = |images: usize| {
        let store = store();
        for number in 0..images {
            put_image(&store, "app", Some(&number.to_string()), &image(&format!("image {number}")));
        }
        let faulty = Faulty::new(store, Fault::Never, 0);
        run_with(&*faulty, &quick());
        let calls = faulty.calls();
        ["list", "read", "stat"].map(|name| calls.iter().filter(|call| call.name == name).count())
    };
    // Ten images more: for each its revision and its manifest; nothing for its config and its layers.
    let (few, many) = (calls(10), calls(20));
    let [lists, reads, stats] = [0, 1, 2].map(|at| many[at] - few[at]);
    // A memory store has no shards: each blob may bring a directory of its own to list.
    assert!(lists <= 30, "{lists}");
    assert_eq!((reads, stats), (20, 0));
}

#[test]
fn on_a_disk_a_repair_writes_what_a_registry_would_have_written() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let store = common::store::Store::new();
    let image = image("broken");
    let digest = store.push("app", Some("1"), &image);
    let index = Image::index(&[("amd64", &image)]);
    store.push("list", Some("1"), &index);
    // Of an index and its child, the child's links are enough; here not even these are left.
    let bare = Image::index(&[]);
    store.push("bare", Some("1"), &bare);
    std::fs::remove_dir(store.repository("bare", "_layers")).unwrap();
    std::fs::remove_dir_all(store.repository("list", "_layers")).unwrap();
    let revision = store.revision_link("app", &digest);
    std::fs::write(&revision, "").unwrap();
    std::fs::set_permissions(revision.parent().unwrap(), PermissionsExt::from_mode(0o2750)).unwrap();
    let owner = if common::is_root() { 1234 } else { std::fs::metadata(&revision).unwrap().uid() };
    if common::is_root() {
        common::chown_all(store.root(), owner, owner);
        // A change of the owner takes these bits away.
        std::fs::set_permissions(revision.parent().unwrap(), PermissionsExt::from_mode(0o2750)).unwrap();
    }
    let report = common::gc::gc(store.root(), &["--repair", "--grace", "0"]);
    assert_eq!(report.failures.len(), 0, "{report:?}");
    let meta = std::fs::metadata(&revision).unwrap();
    assert_eq!((meta.len(), meta.mode() & 0o7777, meta.uid()), (71, 0o640, owner));
    assert_eq!(std::fs::read(&revision).unwrap(), digest.as_bytes());
    for blob in &image.blobs {
        let link = store.layer_link("list", &sha256(blob));
        assert_eq!(std::fs::read(&link).unwrap(), sha256(blob).as_bytes());
        let (file, directory) = (link.metadata().unwrap(), link.parent().unwrap().metadata().unwrap());
        assert_eq!((file.uid(), directory.uid()), (owner, owner));
        assert_eq!(file.mode() & 0o777, directory.mode() & 0o666);
    }
    assert_eq!(store.repository("bare", "_layers").metadata().unwrap().uid(), owner);
    let mut own = common::names(&store.path(".regfs"));
    own.sort();
    assert_eq!(own, ["cache", "clock", "lock", "reserve", "trash"], "nothing half-written");
    assert_eq!(common::gc::gc(store.root(), &["--repair", "--grace", "0"]).taken.len(), 0);
}

/// So many manifests with a tag and so many without, each in a repository of its own.
fn tagged_and_not(tagged: usize, untagged: usize) -> Arc<Memory> {
    let store = store();
    for number in 0..tagged {
        put_image(&store, &format!("kept{number}"), Some("1"), &image(&format!("kept {number}")));
    }
    for number in 0..untagged {
        put_image(&store, &format!("gone{number}"), None, &image(&format!("gone {number}")));
    }
    store
}

#[test]
fn a_rule_that_would_remove_most_manifests_stops_before_the_first_change() {
    for (tagged, untagged, stops) in
        [(0, 19, false), (0, 20, true), (20, 20, false), (19, 20, true), (20, 21, true), (21, 21, false)]
    {
        let store = tagged_and_not(tagged, untagged);
        let before = store.snapshot();
        let foreseen = run(&*store, "dry-run untagged");
        let report = run(&*store, "sweep untagged");
        let what = format!("{untagged} of {}", tagged + untagged);
        assert_eq!(report.held_back().is_some(), stops, "{what}");
        assert_eq!(foreseen.held_back().is_some(), stops, "{what}");
        assert_eq!(foreseen.taken().collect::<Vec<_>>(), report.taken().collect::<Vec<_>>(), "{what}");
        assert_eq!(report.taken().count() == 0, stops, "{what}");
        if !stops {
            continue;
        }
        assert!(store.snapshot() == before, "nothing was changed");
        for report in [&foreseen, &report] {
            let text = report.text(Place::ControlFile, Details::Totals);
            assert!(text.contains(&format!("{untagged} of {} manifests", tagged + untagged)), "{text}");
            assert!(
                text.contains("add allow-large") && text.contains(&format!("{untagged} revisions")),
                "{text}"
            );
        }
        let foreseen = run(&*store, "dry-run untagged allow-large");
        let report = run(&*store, "sweep untagged allow-large");
        assert_eq!(report.held_back(), None);
        assert_eq!(foreseen.taken().collect::<Vec<_>>(), report.taken().collect::<Vec<_>>());
        assert!(report.taken().count() > untagged);
    }
}

#[test]
fn what_nothing_leads_to_is_not_braked_however_much_it_is() {
    let store = tagged_and_not(1, 0);
    for number in 0..50 {
        put_blob(&store, format!("garbage {number}").as_bytes());
    }
    assert_eq!(run(&*store, "sweep").taken().count(), 50);
}

#[test]
fn an_untagged_manifest_that_is_young_is_said_to_be() {
    let store = store();
    put_image(&store, "app", Some("1"), &image("kept"));
    put_image(&store, "app", None, &image("old"));
    store.set_clock(days_ago(3));
    let (young, child) = (image("young"), image("child"));
    put_image(&store, "app", None, &young);
    store.set_clock(days_ago(10));
    put_image(&store, "app", None, &child);
    store.set_clock(SystemTime::now() + DAY * 30);
    put_image(&store, "app", None, &Image::index(&[("amd64", &child)]));

    let text = |words: &str| run(&*store, words).text(Place::ControlFile, Details::Totals);
    let told = text("dry-run untagged=7d");
    assert!(told.contains("left 3 untagged manifests younger than 7d"), "{told}");
    let from = timestamp(days_ago(3) + DAY * 7);
    assert!(told.contains(&from[..from.len() - 4]), "{from}: {told}");
    assert!(told.contains("in the future"), "{told}");
    assert!(!text("dry-run").contains("untagged"), "nobody asked for those");
    assert!(!text("dry-run untagged=0 grace=1h repository=other").contains("untagged manifest"));
    let mut json = Vec::new();
    run(&*store, "dry-run untagged=7d").write_json(&mut json, Place::ControlFile).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let young = json["kept_young_manifests"].as_array().unwrap();
    assert_eq!(young.len(), 3, "{json}");
    assert!(young.iter().all(|manifest| manifest["repository"] == "app"));
}
