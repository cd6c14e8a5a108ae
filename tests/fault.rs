//! One storage call fails, or the process dies there: is every live image safe, and does the next run finish?
//!
//! Each operation runs once without a fault to count its calls, then once for each call and each way to fail.
//! What is checked after every single one stands in [`Story::check`].

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;
mod memory;

use std::collections::{BTreeSet, HashSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use common::check::{blob_path, sha256, sha512};
use common::image::{Image, OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, bytes, descriptor, layer};
use memory::faulty::{Call, Fault, Faulty};
use memory::{
    Contents, Live, TRASH, blobs, everything, layer_link, long_ago, old_store, put, put_blob, put_image,
    put_sha512_image, put_tag, registry, tag_history_link, tag_link, trash,
};
use regfs::catalog::Tables;
use regfs::digest::Digest;
use regfs::engine::Engine;
use regfs::gc::guard::gate::{Gate, Probe, Registries};
use regfs::gc::{self, DEFAULT_KEEP, Options, Unwatched};
use regfs::layout;
use regfs::store::Store;
use regfs::store::memory::Memory;
use regfs::trash::{Author, Selection};
use regfs::view::Settings;
use regfs::view::node::Node;
use serde_json::json;

const ERRORS: [i32; 4] = [libc::EIO, libc::ENOENT, libc::EACCES, libc::ENOSPC];

fn author() -> Author {
    Author { uid: 0, pid: 1, command: "test".to_string() }
}

fn options(untagged: bool, now: bool) -> Options {
    Options { untagged, now, grace: Duration::ZERO, gate: Gate::STOPPED, ..Options::default() }
}

fn sweep(store: &dyn Store, options: &Options) -> Result<(), String> {
    let report = gc::run(store, &Tables::default(), options, &author(), &Unwatched);
    match report {
        Ok(report) if report.is_complete() => Ok(()),
        Ok(report) => Err(report.failures.join("\n")),
        Err(e) => Err(e.to_string()),
    }
}

fn undo(store: &dyn Store, id: &str) -> Result<(), String> {
    let undone = gc::undo(store, &author(), id).map_err(|e| e.to_string())?;
    assert_eq!(undone.missing, [], "the undo of {id} lacks something");
    Ok(())
}

fn purge(store: &dyn Store, selection: &Selection) -> Result<(), String> {
    let purged = gc::purge_trash(
        store,
        &Tables::default(),
        &author(),
        selection,
        &Options { gate: Gate::STOPPED, ..Options::default() },
    );
    match purged.map_err(|e| e.to_string())?.failures.as_slice() {
        [] => Ok(()),
        failures => Err(format!("{failures:?}")),
    }
}

/// A registry as it is after a mount; looking at the storage is part of what can fail.
fn mounted(store: Arc<dyn Store>) -> Result<Arc<Engine>, String> {
    let settings = Settings {
        read_only: false,
        uid: 0,
        gid: 0,
        grace: Duration::ZERO,
        drain: Duration::ZERO,
        keep: DEFAULT_KEEP,
        rate: None,
        mounted_at: SystemTime::UNIX_EPOCH,
    };
    Engine::new(store, settings).map(Arc::new).map_err(|e| e.to_string())
}

/// `rm images/<reference>` in a mount.
fn rm(store: Arc<dyn Store>, reference: &str) -> Result<(), String> {
    let engine = mounted(store)?;
    engine.unlink(Node::Images, OsStr::new(reference), &author()).map_err(|e| e.to_string())
}

fn command(store: Arc<dyn Store>, node: Node, text: &str) -> Result<(), String> {
    mounted(store)?.command(node, text, &author()).map_err(|e| e.to_string())
}

/// What registries and their clients leave behind.
fn put_leftovers(store: &Memory) {
    let tmp = "0b4e8a4e-5d1f-4b7a-9d39-0d5a3f1c2b6e.tmp";
    let missing = sha256(b"not there");
    for name in ["app", "bare/repository"] {
        put(store, layer_link(name, &missing), missing.as_bytes());
    }
    // In use in another repository.
    let elsewhere = sha256(&layer("private", "of v2 alone").blob);
    put(store, layer_link("team/multi", &elsewhere), elsewhere.as_bytes());
    put(store, tag_history_link("app", "v1", &missing), missing.as_bytes());
    put(store, tag_link("app", "v1").with_extension(tmp), b"sha256:");
    put(store, "repositories/app/_uploads/1/startedat", b"2020-01-01T00:00:00Z");
    put(store, "repositories/app/_uploads/1/data", b"half of it");
}

/// The registry of all stories, with everything in it long ago.
struct Fixture {
    before: Contents,
    v2: String,
}

impl Fixture {
    /// Transactions in the trash: what rm of two tags took, and what a sweep took between the two.
    const RM_SWEPT: &str = "1-rm";
    const SWEEP: &str = "2-sweep";
    const RM: &str = "3-rm";

    fn new() -> Fixture {
        let store = Arc::new(Memory::default());
        store.set_clock(long_ago());
        let shared = layer("base", "shared by many");
        let v1 = Image::oci("v1", std::slice::from_ref(&shared));
        let v2 = Image::oci("v2", &[shared.clone(), layer("private", "of v2 alone")]);
        put_image(&store, "app", Some("v1"), &v1);
        let v2_digest = put_image(&store, "app", Some("v2"), &v2);
        put_tag(&store, "app", "stable", &v2_digest);
        put_image(&store, "app", None, &v2.referrer("application/vnd.example.signature", "of v2"));
        put_image(&store, "app", None, &Image::oci("untagged", &[layer("untagged", "never tagged")]));
        let [amd64, arm64] = ["amd64", "arm64"]
            .map(|name| Image::oci_for(name, "multi", &[shared.clone(), layer("bin", name)]));
        let multi = Image::index(&[("amd64", &amd64), ("arm64", &arm64)]);
        put_image(&store, "team/multi", Some("latest"), &multi);
        put_image(&store, "team/multi", None, &multi.referrer("application/vnd.example.sbom", "of multi"));
        put_sha512_image(&store, "strong", Some("1"), "named by its sha512");

        let leaving = Image::oci("leaving", &[shared.clone(), layer("leaving", "swept")]);
        put_image(&store, "app", Some("leaving"), &leaving);
        put_tag(&store, "app", "leaving-too", &leaving.digest());
        let reused = put_blob(&store, b"swept, then named again");
        put(&store, layer_link("app", &reused), reused.as_bytes());
        put_sha512_image(&store, "strong", Some("swept"), "swept, and named by its sha512");
        for (reference, id) in
            [("app:leaving-too", "0-rm"), ("app:leaving", Fixture::RM_SWEPT), ("strong:swept", "1-rm-strong")]
        {
            renamed(&store, id, |store| rm(store, reference));
        }
        renamed(&store, Fixture::SWEEP, |store| sweep(&*store, &options(false, false)));
        put_image(&store, "app", Some("going"), &Image::oci("going", &[layer("going", "still there")]));
        renamed(&store, Fixture::RM, |store| rm(store, "app:going"));

        // A registry with a warm cache takes a manifest without asking for its layers, which a sweep took.
        for (name, layer, digest) in [
            ("app", "swept, then named again", sha256(b"swept, then named again")),
            ("strong", "swept, and named by its sha512", sha512(b"swept, and named by its sha512")),
        ] {
            let mut adopted = descriptor(OCI_LAYER, layer.as_bytes());
            adopted["digest"] = json!(digest);
            let manifest = bytes(&json!({
                "schemaVersion": 2, "mediaType": OCI_MANIFEST,
                "config": descriptor(OCI_CONFIG, b"{}"), "layers": [adopted],
            }));
            put_image(&store, name, Some("adopts"), &Image::odd(OCI_MANIFEST, manifest, &[b"{}"]));
        }
        put_blob(&store, b"garbage");
        let linked = put_blob(&store, b"garbage with a link");
        put(&store, layer_link("team/multi", &linked), linked.as_bytes());
        put_leftovers(&store);
        let before = store.snapshot();
        assert_eq!(Live::of(&before).lacks.len(), 2, "what was adopted: {:?}", Live::of(&before).lacks);
        Fixture { before, v2: v2_digest }
    }
}

fn transaction(id: &str) -> PathBuf {
    Path::new(TRASH).join(id)
}

/// Lets `act` make a transaction and names it `id`, so that it is called the same in every run.
fn renamed(store: &Arc<Memory>, id: &str, act: impl FnOnce(Arc<dyn Store>) -> Result<(), String>) {
    let known = trash(&store.snapshot());
    act(store.clone()).unwrap();
    let fresh = trash(&store.snapshot()).into_keys().find(|id| !known.contains_key(id)).unwrap();
    assert!(store.rename(&transaction(&fresh), &transaction(id)).unwrap());
}

/// What must hold of an operation besides the safety of live images.
#[derive(Clone, Copy, PartialEq)]
enum Sort {
    /// Changes not one byte.
    Looks,
    /// Moves things; nothing at all is lost.
    Moves,
    /// Removes things from the trash.
    Purges,
}

/// An operation and what is known of it.
struct Story<'a> {
    name: &'a str,
    sort: Sort,
    act: &'a dyn Fn(Arc<dyn Store>) -> Result<(), String>,
}

/// What a run left, comparable across runs: names of transactions hold the time.
fn outcome(contents: &Contents) -> (Contents, Vec<BTreeSet<PathBuf>>) {
    let mut taken: Vec<BTreeSet<PathBuf>> = trash(contents).into_values().collect();
    taken.sort();
    (registry(contents), taken)
}

impl Story<'_> {
    /// Runs it with every fault.
    fn check(&self) {
        let fixture = Fixture::new();
        let store = old_store(&fixture.before);
        let clean = Faulty::new(store.clone(), Fault::Never, 0);
        (self.act)(clean.clone()).unwrap();
        let expected = store.snapshot();
        let mut known = HashSet::new();
        self.aftermath(&fixture, &expected, &mut known, &Fault::Never);

        let calls = clean.calls();
        let mut faults: Vec<Fault> = Vec::new();
        faults.extend((0..calls.len()).flat_map(|n| [Fault::GlitchAt(n), Fault::CutFrom(n)]));
        faults.extend((0..clean.changes()).flat_map(|n| [Fault::LateAt(n), Fault::DieAfter(n)]));
        let paths: BTreeSet<PathBuf> = calls.into_iter().map(|call| call.path).collect();
        faults.extend(paths.into_iter().filter(|path| !path.as_os_str().is_empty()).map(Fault::Stuck));
        for (at, fault) in faults.iter().enumerate() {
            let store = old_store(&fixture.before);
            let faulty = Faulty::new(store.clone(), fault.clone(), ERRORS[(at / 2 + at) % ERRORS.len()]);
            let result = (self.act)(faulty.clone());
            let after = store.snapshot();
            self.assert_reported(fault, &faulty.calls(), &result, &after, &expected);
            self.aftermath(&fixture, &after, &mut known, fault);
        }
        println!("{}: {} faults, {} different states", self.name, faults.len(), known.len());
    }

    /// A failing call is reported, or it made no difference and is one that may be passed over.
    fn assert_reported(
        &self,
        fault: &Fault,
        calls: &[Call],
        result: &Result<(), String>,
        after: &Contents,
        expected: &Contents,
    ) {
        if result.is_err() {
            return;
        }
        let is_same = outcome(after) == outcome(expected);
        let failed: Vec<usize> = (0..calls.len()).filter(|at| calls[*at].failed).collect();
        let may_be_passed_over = |at: usize| {
            let Call { name, path, .. } = &calls[at];
            // Facts of a link that failed to come make the scan read the link again; that call tells.
            let is_read_again =
                calls.get(at + 1).is_some_and(|next| next.name == "read" && next.path == *path);
            // Only how many bytes a purge freed depends on it; the removal that follows meets what is wrong.
            let is_counted = self.sort == Sort::Purges && path.starts_with(TRASH);
            // Without it, what comes has a witness less of the time, and says so.
            let is_clock = path == Path::new(layout::CLOCK) && *name != "read";
            // On a full disk some garbage is freed at once to make room for the rest.
            let makes_room = path == &Path::new(layout::OWN).join("room");
            *name == "stat" && (is_read_again || is_counted) || is_clock || makes_room
        };
        // Once things have moved, a look that fails can't tell whether a push came in between. Only what the mount
        // shows and no image depends on can wait: the trash, and the pushes in progress.
        let moved = calls.iter().position(|call| call.name == "rename").unwrap_or(calls.len());
        // What failed before as well, was decided with that in mind.
        let is_known = |call: &Call| calls[..moved].iter().any(|c| c.failed && c.path == call.path);
        let can_wait =
            |call: &Call| call.path == Path::new(TRASH) || call.path.ends_with("_uploads") || is_known(call);
        let looked_back = failed.iter().filter(|at| **at > moved && !can_wait(&calls[**at]));
        let is_certain = looked_back.into_iter().all(|at| may_be_passed_over(*at));
        let is_fine = match self.name.split_once(' ').unwrap_or((self.name, "")) {
            // A mount shows what it can read, and lists the rest in `broken`.
            ("control", _) => is_same,
            // And `rm` of a tag leaves what it can't judge: the tag goes, as was asked.
            ("rm", reference) if !reference.contains('@') => {
                let (name, tag) = reference.split_once(':').unwrap();
                let (kept, expected) = (registry(after), registry(expected));
                let keeps_all = expected.iter().all(|(path, content)| kept.get(path) == Some(content));
                is_certain && keeps_all && !kept.contains_key(&tag_link(name, tag))
            }
            ("rm", _) => is_certain && is_same,
            _ => is_same && failed.iter().all(|at| may_be_passed_over(*at)),
        };
        let failed: Vec<&Call> = failed.into_iter().map(|at| &calls[at]).collect();
        assert!(
            is_fine,
            "{}, {fault:?}: passed over {failed:?}; the outcome is the same: {is_same}",
            self.name
        );
    }

    /// What must hold after a fault, now and for whoever comes next.
    fn aftermath(&self, fixture: &Fixture, after: &Contents, known: &mut HashSet<String>, fault: &Fault) {
        let state = outcome(after);
        if !known.insert(format!("{:?} {:?}", state.0.keys(), state.1)) {
            return;
        }
        let at = format!("{}, {fault:?}", self.name);
        let lost = |contents: &Contents| -> Vec<String> {
            let lacked = Live::of(&fixture.before).lacks;
            Live::of(contents).lacks.difference(&lacked).cloned().collect()
        };
        assert_eq!(lost(after), [""; 0], "{at}: live images lack");
        let had = everything(&fixture.before);
        match self.sort {
            Sort::Looks => assert!(*after == fixture.before, "{at}: a look changed something"),
            Sort::Moves => assert!(everything(after) == had, "{at}: something is lost"),
            Sort::Purges => assert!(everything(after).is_subset(&had), "{at}: something is new"),
        }
        self.next_sweep(after, &at);
        for newest_first in [true, false] {
            self.next_undo(after, newest_first, &at);
        }
        let store = old_store(after);
        purge(&*store, &Selection::All).unwrap_or_else(|e| panic!("{at}: the next purge: {e}"));
        assert!(trash(&store.snapshot()).is_empty(), "{at}: a purge leaves something");
        assert_eq!(Live::of(&store.snapshot()).lacks, BTreeSet::new(), "{at}: after the next purge");
    }

    /// The next sweep finishes what was begun, and what it took comes back.
    fn next_sweep(&self, after: &Contents, at: &str) {
        let store = old_store(after);
        sweep(&*store, &options(true, false)).unwrap_or_else(|e| panic!("{at}: the next sweep: {e}"));
        let swept = store.snapshot();
        let live = Live::of(&swept);
        assert_eq!(live.lacks, BTreeSet::new(), "{at}: after the next sweep");
        assert_eq!(blobs(&swept), live.blobs, "{at}: garbage after the next sweep");
        assert!(everything(&swept) == everything(after), "{at}: the next sweep lost something");
        self.next_undo(&swept, true, at);
    }

    /// Everything in the trash comes back, whole.
    fn next_undo(&self, after: &Contents, newest_first: bool, at: &str) {
        let store = old_store(after);
        // What was pushed meanwhile comes back first; it would look like an image that lacks something.
        sweep(&*store, &Options { grace: Duration::from_secs(1 << 40), ..options(false, false) }).unwrap();
        let mut ids: Vec<String> = trash(&store.snapshot()).into_keys().collect();
        if newest_first {
            ids.reverse();
        }
        for id in ids {
            // The undo of another one may have emptied it.
            if !trash(&store.snapshot()).contains_key(&id) {
                continue;
            }
            undo(&*store, &id).unwrap_or_else(|e| panic!("{at}: the undo of {id}: {e}"));
            let lacks = Live::of(&store.snapshot()).lacks;
            assert_eq!(lacks, BTreeSet::new(), "{at}: after the undo of {id}, newest first {newest_first}");
        }
        assert!(everything(&store.snapshot()) == everything(after), "{at}: the undo lost something");
    }
}

fn check(name: &str, sort: Sort, act: &dyn Fn(Arc<dyn Store>) -> Result<(), String>) {
    Story { name, sort, act }.check();
}

#[test]
fn a_dry_run_changes_nothing_and_reports_what_fails() {
    for untagged in [false, true] {
        let options = Options { dry_run: true, ..options(untagged, false) };
        let faulty = Faulty::new(old_store(&Fixture::new().before), Fault::Never, 0);
        sweep(&*faulty, &options).unwrap();
        let looks = |call: &Call| matches!(call.name, "list" | "stat" | "read" | "look at directory");
        assert!(faulty.calls().iter().all(looks), "no lock, no sync, no change");
        check("dry run", Sort::Looks, &|store| sweep(&*store, &options));
    }
}

#[test]
fn a_failing_sweep_costs_no_live_image() {
    check("sweep", Sort::Moves, &|store| sweep(&*store, &options(false, false)));
}

#[test]
fn a_failing_sweep_of_untagged_manifests_costs_no_live_image() {
    check("sweep untagged", Sort::Moves, &|store| sweep(&*store, &options(true, false)));
}

#[test]
fn a_failing_sweep_now_costs_no_live_image() {
    check("sweep untagged now", Sort::Purges, &|store| sweep(&*store, &options(true, true)));
}

#[test]
fn a_failing_rm_of_a_tag_costs_no_other_image() {
    for reference in ["app:v1", "app:v2", "team/multi:latest"] {
        let name = format!("rm {reference}");
        check(&name, Sort::Moves, &|store| rm(store, reference));
    }
}

#[test]
fn a_failing_rm_of_a_manifest_costs_no_other_image() {
    let reference = format!("app@{}", Fixture::new().v2);
    check(&format!("rm {reference}"), Sort::Moves, &|store| rm(store, &reference));
}

#[test]
fn a_failing_undo_can_be_repeated() {
    for id in [Fixture::RM_SWEPT, Fixture::SWEEP, Fixture::RM] {
        check("undo", Sort::Moves, &|store| undo(&*store, id));
    }
}

#[test]
fn a_failing_purge_costs_no_undo_of_what_is_left() {
    check("purge", Sort::Purges, &|store| purge(&*store, &Selection::All));
    for id in [Fixture::SWEEP, Fixture::RM] {
        check("purge one", Sort::Purges, &|store| purge(&*store, &Selection::One(id.to_string())));
    }
}

#[test]
fn a_failing_command_in_the_mount_is_reported_to_its_writer() {
    check("control purge", Sort::Purges, &|store| {
        command(store, Node::ControlTrash, "purge registry-stopped force")
    });
}

#[test]
fn an_index_whose_bytes_are_back_holds_its_children_at_once() {
    let store = old_store(&Fixture::new().before);
    let child = Image::oci_for("amd64", "multi", &[layer("base", "shared by many"), layer("bin", "amd64")]);
    let multi = tag_link("team/multi", "latest");
    let index = String::from_utf8(store.snapshot()[&multi].to_vec()).unwrap();
    let bytes = store.snapshot()[&blob_path(&index)].clone();
    assert!(store.remove(&[blob_path(&index)]).is_empty());
    let engine = mounted(store.clone()).unwrap();
    // Its push comes after the mount has looked, and before it looks again.
    put(&store, blob_path(&index), &bytes);
    let reference = format!("multi@{}", child.digest());
    let (name, parent) = (OsStr::new(&reference), OsStr::new("team"));
    let team = engine.view(&engine.snapshot()).lookup(Node::Images, parent).unwrap().unwrap();
    let refused = engine.unlink(team, name, &author()).unwrap_err();
    assert_eq!(refused.errno(), libc::EBUSY, "{refused}");
}

/// Beside a registry a sweep takes several runs; whatever fails in any of them, the runs after it end what was begun.
#[test]
fn a_failing_sweep_beside_a_registry_goes_on_with_the_next_run() {
    let fixture = Fixture::new();
    let beside =
        Options { drain: Duration::ZERO, keep: Duration::ZERO, gate: Gate::Off, ..options(false, false) };
    let runs = |store: &dyn Store| (0..4).map(|_| sweep(store, &beside)).collect::<Vec<_>>();
    let store = old_store(&fixture.before);
    let clean = Faulty::new(store.clone(), Fault::Never, 0);
    assert_eq!(runs(&*clean), [const { Ok(()) }; 4]);
    let expected = store.snapshot();
    assert_eq!(trash(&expected), Default::default(), "four runs are enough");
    let mut faults: Vec<Fault> =
        (0..clean.changes()).flat_map(|n| [Fault::LateAt(n), Fault::DieAfter(n)]).collect();
    // Each call of each run would take minutes.
    faults.extend((0..clean.calls().len()).step_by(19).flat_map(|n| [Fault::GlitchAt(n), Fault::CutFrom(n)]));
    for (at, fault) in faults.iter().enumerate() {
        let store = old_store(&fixture.before);
        let faulty = Faulty::new(store.clone(), fault.clone(), ERRORS[at % ERRORS.len()]);
        runs(&*faulty).into_iter().for_each(drop);
        let lacks = Live::of(&store.snapshot()).lacks;
        let known = Live::of(&fixture.before).lacks;
        assert_eq!(lacks.difference(&known).next(), None, "{fault:?}: live images lack");
        for run in runs(&*store).into_iter().chain(runs(&*store)) {
            run.unwrap_or_else(|e| panic!("{fault:?}: a run after it: {e}"));
        }
        let after = store.snapshot();
        assert_eq!(Live::of(&after).lacks, BTreeSet::new(), "{fault:?}: after the runs that follow");
        assert_eq!(blobs(&after), blobs(&expected), "{fault:?}: garbage after the runs that follow");
        assert_eq!(trash(&after), Default::default(), "{fault:?}: trash after the runs that follow");
    }
    println!("{} faults", faults.len());
}

/// A registry with a memory, which was asked for everything that it has, and may fail to answer once.
struct Remembering {
    store: Arc<Memory>,
    known: Mutex<HashSet<(PathBuf, Digest)>>,
    calls: AtomicUsize,
    /// Which call fails, and whether it has done what it was told.
    fails: Option<(usize, bool)>,
}

impl Remembering {
    fn new(store: &Arc<Memory>, fails: Option<(usize, bool)>) -> Arc<Remembering> {
        let claims = store.snapshot().into_keys().filter_map(|path| match layout::classify(&path) {
            layout::Kind::LayerLink(repository, digest) => Some((repository, digest)),
            _ => None,
        });
        let known = Mutex::new(claims.collect());
        Arc::new(Remembering { store: store.clone(), known, calls: AtomicUsize::new(0), fails })
    }

    /// Does what it was told, unless it is the call that fails before that.
    fn call<T>(&self, act: impl FnOnce() -> T) -> regfs::error::Result<T> {
        let number = self.calls.fetch_add(1, SeqCst);
        let fails = self.fails.filter(|(at, _)| *at == number);
        let done = (fails.is_none_or(|(_, is_done)| is_done)).then(act);
        let why = || regfs::error::Error::Busy { why: "no answer".to_string() };
        done.filter(|_| fails.is_none()).ok_or_else(why)
    }

    fn has(&self, path: &Path) -> bool {
        self.store.stat(path).unwrap().is_some()
    }

    /// What it would say "exists" of, and serve broken.
    fn believes_wrongly(&self) -> Vec<(PathBuf, Digest)> {
        let known = self.known.lock().unwrap();
        let is_wrong = |(repository, digest): &&(PathBuf, Digest)| {
            let link = layout::layer_link(repository, digest);
            // A layer may be known by another digest than that of its bytes.
            let content = self.store.read(&link, 4096).unwrap();
            let target = content.and_then(|(text, _)| layout::parse_link(&text).ok());
            !target.is_some_and(|target| self.has(&layout::blob_data(&target)))
        };
        known.iter().filter(is_wrong).cloned().collect()
    }
}

impl Registries for Remembering {
    fn name(&self) -> String {
        "a test".to_string()
    }

    fn remembers(&self, repository: &Path, digest: &Digest) -> regfs::error::Result<bool> {
        let place = (repository.to_path_buf(), *digest);
        let is_served =
            self.has(&layout::layer_link(repository, digest)) && self.has(&layout::blob_data(digest));
        self.call(|| {
            let mut known = self.known.lock().unwrap();
            if is_served {
                known.insert(place.clone());
            }
            known.contains(&place)
        })
    }

    fn forget(&self, repository: &Path, digest: &Digest) -> regfs::error::Result<()> {
        self.call(|| {
            self.known.lock().unwrap().remove(&(repository.to_path_buf(), *digest));
            assert!(self.store.remove(&[layout::layer_link(repository, digest)]).is_empty());
        })
    }

    fn verify(&self, _: &dyn Store, _: &Path, _: Option<&Digest>) -> regfs::error::Result<()> {
        Ok(())
    }
}

/// Beside a registry that remembers: whatever fails, in the storage or of the registry, no image lacks anything, what was
/// begun ends, and the registry believes in nothing that is gone.
#[test]
fn a_failing_sweep_beside_a_registry_that_remembers_leaves_it_nothing_wrong_to_believe() {
    let fixture = Fixture::new();
    let runs = |store: &dyn Store, registry: &Arc<Remembering>| {
        let gate = Gate::Probe(Probe(registry.clone()));
        let beside = Options { drain: Duration::ZERO, keep: Duration::ZERO, gate, ..options(false, false) };
        (0..6).map(|_| sweep(store, &beside)).collect::<Vec<_>>()
    };
    let store = old_store(&fixture.before);
    let clean = Faulty::new(store.clone(), Fault::Never, 0);
    let registry = Remembering::new(&store, None);
    assert_eq!(runs(&*clean, &registry), [const { Ok(()) }; 6]);
    let expected = store.snapshot();
    assert_eq!(trash(&expected), Default::default(), "six runs are enough");
    let calls = registry.calls.load(SeqCst);
    assert!(calls > 10, "only {calls} questions were asked");
    let mut faults: Vec<(Fault, Option<(usize, bool)>)> =
        (0..clean.changes()).map(|n| (Fault::DieAfter(n), None)).collect();
    faults.extend((0..clean.calls().len()).step_by(29).map(|n| (Fault::GlitchAt(n), None)));
    faults
        .extend((0..calls).flat_map(|n| [(Fault::Never, Some((n, false))), (Fault::Never, Some((n, true)))]));
    for (at, (fault, fails)) in faults.iter().enumerate() {
        let what = format!("{fault:?}, call {fails:?} of the registry");
        let store = old_store(&fixture.before);
        let registry = Remembering::new(&store, *fails);
        let faulty = Faulty::new(store.clone(), fault.clone(), ERRORS[at % ERRORS.len()]);
        runs(&*faulty, &registry).into_iter().for_each(drop);
        let lacks = Live::of(&store.snapshot()).lacks;
        let known = Live::of(&fixture.before).lacks;
        assert_eq!(lacks.difference(&known).next(), None, "{what}: live images lack");
        for run in runs(&*store, &registry).into_iter().chain(runs(&*store, &registry)) {
            run.unwrap_or_else(|e| panic!("{what}: a run after it: {e}"));
        }
        let after = store.snapshot();
        assert_eq!(Live::of(&after).lacks, BTreeSet::new(), "{what}: after the runs that follow");
        assert_eq!(blobs(&after), blobs(&expected), "{what}: garbage after the runs that follow");
        assert_eq!(trash(&after), Default::default(), "{what}: trash after the runs that follow");
        let wrong: Vec<_> = registry.believes_wrongly();
        let before = Remembering::new(&old_store(&fixture.before), None).believes_wrongly();
        assert!(
            wrong.iter().all(|claim| before.contains(claim)),
            "{what}: the registry believes in {wrong:?}"
        );
    }
    println!("{} faults, {calls} calls of the registry", faults.len());
}
