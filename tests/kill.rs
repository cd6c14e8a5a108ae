//! `kill -9` at any point: are all images served by a real registry then, and does whoever comes next finish?
//!
//! This binary runs itself as the process that dies: [`the_process_that_dies`] does one thing to a store on disk
//! and gets a SIGKILL right before, or right after, one of its calls that change the store; within a write or a move, too.
//! The parent gives every such run a fresh copy of the store, in the place that a stock registry without a cache
//! serves, and asks that registry for every byte of every tag: after the kill, after the undo of all that is in
//! the trash (or a purge), and after the next sweep.
//!
//! What a kill can't show is a loss of power: the kernel still has what was not synced. `tests/fault.rs` asks the
//! same of every single storage call in memory.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use common::check::{Live, Roots, blobs};
use common::image::{Image, layer};
use common::registry::Registry;
use common::run::{Bounded, clean};
use regfs::catalog::Tables;
use regfs::engine::Engine;
use regfs::error::{Error, Result};
use regfs::gc::guard::gate::Gate;
use regfs::gc::{self, DEFAULT_KEEP, Options, Unwatched};
use regfs::store::disk::Disk;
use regfs::store::{Entry, Reader, Space, Stat, Store};
use regfs::trash::{self, Author, Selection};
use regfs::view::Settings;
use regfs::view::node::Node;
use rustix::process::{Signal, getpid, kill_process};

/// Which storage root the process that dies works on.
const STORE: &str = "REGFS_KILL_STORE";
/// What it does there, an [`Act`].
const ACT: &str = "REGFS_KILL_ACT";
/// When it dies, a [`Point`]; without this it lives and says which changes it made.
const POINT: &str = "REGFS_KILL_POINT";
/// Begins each line that names a change.
const CHANGE: &str = "change: ";

/// Points tried for each operation at most; evenly chosen where there are more. `KILL_POINTS=1000` tries them all.
fn most_points() -> usize {
    std::env::var("KILL_POINTS").map_or(50, |most| most.parse().expect("KILL_POINTS is a number"))
}

/// An index with two children of its own, for `rm`.
const GOING: &str = "team/multi:going";

/// When the process dies, by the number of the change.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Point {
    Before(usize),
    /// With half of a file written, under the name it has until it is whole; with the directories made, and nothing
    /// moved to them.
    Within(usize),
    After(usize),
}

impl std::fmt::Display for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Point::Before(at) => write!(f, "before {at}"),
            Point::Within(at) => write!(f, "within {at}"),
            Point::After(at) => write!(f, "after {at}"),
        }
    }
}

impl FromStr for Point {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Point, String> {
        let (when, at) = text.split_once(' ').ok_or("two words")?;
        let at = at.parse().map_err(|e| format!("{at}: {e}"))?;
        match when {
            "before" => Ok(Point::Before(at)),
            "within" => Ok(Point::Within(at)),
            "after" => Ok(Point::After(at)),
            other => Err(other.to_string()),
        }
    }
}

/// A store on disk whose process dies at one point, or which says what it changes.
struct Deadly {
    inner: Disk,
    point: Option<Point>,
    changes: AtomicUsize,
}

impl Deadly {
    fn open(root: &Path, point: Option<Point>) -> Result<Deadly> {
        Ok(Deadly { inner: Disk::open(root)?, point, changes: AtomicUsize::new(0) })
    }

    /// Makes one change; dies where it is told to.
    fn change<T>(&self, name: &str, path: &Path, within: impl FnOnce(), act: impl FnOnce(&Disk) -> T) -> T {
        let at = self.changes.fetch_add(1, Ordering::SeqCst);
        match self.point {
            Some(Point::Before(n)) if n == at => die(),
            Some(Point::Within(n)) if n == at => {
                within();
                die()
            }
            _ => {}
        }
        let result = act(&self.inner);
        match self.point {
            Some(Point::After(n)) if n == at => die(),
            Some(_) => {}
            None => println!("{CHANGE}{name} {}", path.display()),
        }
        result
    }
}

fn die() -> ! {
    kill_process(getpid(), Signal::KILL).expect("a process may kill itself");
    unreachable!("nothing comes after SIGKILL")
}

impl Store for Deadly {
    fn list(&self, prefix: &Path) -> Result<Option<Vec<Entry>>> {
        self.inner.list(prefix)
    }

    fn stat(&self, path: &Path) -> Result<Option<Stat>> {
        self.inner.stat(path)
    }

    fn read(&self, path: &Path, limit: usize) -> Result<Option<(Vec<u8>, Stat)>> {
        self.inner.read(path, limit)
    }

    fn open(&self, path: &Path) -> Result<Option<Box<dyn Reader>>> {
        self.inner.open(path)
    }

    fn write(&self, path: &Path, content: &[u8]) -> Result<()> {
        let half = || {
            let name = format!("{}.tmp", path.file_name().unwrap().display());
            let full = self.inner.full(&path.with_file_name(name));
            std::fs::create_dir_all(full.parent().unwrap()).unwrap();
            std::fs::write(full, &content[..content.len() / 2]).unwrap();
        };
        self.change("write", path, half, |store| store.write(path, content))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<bool> {
        let directories = || std::fs::create_dir_all(self.inner.full(to.parent().unwrap())).unwrap();
        self.change("rename", from, directories, |store| store.rename(from, to))
    }

    /// Each path is a change of its own, so that a removal of many can end in the middle.
    fn remove(&self, paths: &[PathBuf]) -> Vec<Error> {
        let remove =
            |path: &PathBuf| self.change("remove", path, || (), |s| s.remove(std::slice::from_ref(path)));
        paths.iter().flat_map(remove).collect()
    }

    fn prune(&self, prefix: &Path) -> Result<()> {
        self.change("prune", prefix, || (), |store| store.prune(prefix))
    }

    fn directory_changed(&self, path: &Path) -> Result<Option<SystemTime>> {
        self.inner.directory_changed(path)
    }

    fn remove_directory(&self, path: &Path) -> Result<bool> {
        self.change("remove directory", path, || (), |store| store.remove_directory(path))
    }

    fn make_directory(&self, path: &Path) -> Result<()> {
        self.change("make directory", path, || (), |store| store.make_directory(path))
    }

    fn create(&self, path: &Path, content: &[u8]) -> Result<()> {
        self.change("create", path, || (), |store| store.create(path, content))
    }

    fn replace(&self, path: &Path, content: &[u8], saved: &Path) -> Result<()> {
        self.change("replace", path, || (), |store| store.replace(path, content, saved))
    }

    fn sync(&self) -> Result<()> {
        self.change("sync", Path::new(""), || (), Store::sync)
    }

    fn lock(&self, who: &str, wait: Duration) -> Result<Box<dyn Send>> {
        self.inner.lock(who, wait)
    }

    fn is_writable(&self) -> bool {
        self.inner.is_writable()
    }

    fn space(&self) -> Result<Space> {
        self.inner.space()
    }

    fn full(&self, path: &Path) -> PathBuf {
        self.inner.full(path)
    }
}

/// Something regfs does to a store.
#[derive(Clone, Debug)]
enum Act {
    Sweep,
    SweepNow,
    /// `rm images/<reference>` in a mount.
    Rm(String),
    Undo(String),
    Purge,
}

impl std::fmt::Display for Act {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Act::Sweep => write!(f, "sweep"),
            Act::SweepNow => write!(f, "sweep now"),
            Act::Rm(reference) => write!(f, "rm {reference}"),
            Act::Undo(id) => write!(f, "undo {id}"),
            Act::Purge => write!(f, "purge"),
        }
    }
}

impl FromStr for Act {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Act, String> {
        match text.split_once(' ') {
            None if text == "sweep" => Ok(Act::Sweep),
            None if text == "purge" => Ok(Act::Purge),
            Some(("sweep", "now")) => Ok(Act::SweepNow),
            Some(("rm", reference)) => Ok(Act::Rm(reference.to_string())),
            Some(("undo", id)) => Ok(Act::Undo(id.to_string())),
            _ => Err(text.to_string()),
        }
    }
}

impl Act {
    /// Does it; anything that is not done to the end fails the test.
    #[track_caller]
    fn run(&self, store: Arc<dyn Store>, when: &str) {
        let author = Author { uid: 0, pid: 1, command: format!("test {self}") };
        match self {
            Act::Sweep | Act::SweepNow => {
                let now = matches!(self, Act::SweepNow);
                let options = Options {
                    untagged: true,
                    grace: Duration::ZERO,
                    now,
                    gate: Gate::STOPPED,
                    ..Options::default()
                };
                let report = gc::run(&*store, &Tables::default(), &options, &author, &Unwatched);
                let report = report.unwrap_or_else(|e| panic!("{when}: the sweep: {e}"));
                assert!(report.is_complete(), "{when}: the sweep: {:?}", report.failures);
            }
            Act::Rm(reference) => {
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
                let engine = Arc::new(Engine::new(store, settings).unwrap());
                engine
                    .unlink(Node::Images, OsStr::new(reference), &author)
                    .unwrap_or_else(|e| panic!("{when}: rm {reference}: {e}"));
            }
            Act::Undo(id) => {
                let undone = gc::undo(&*store, &author, id);
                let undone = undone.unwrap_or_else(|e| panic!("{when}: the undo of {id}: {e}"));
                assert_eq!(undone.missing, [], "{when}: the undo of {id} lacks something");
            }
            Act::Purge => {
                let purged = gc::purge_trash(
                    &*store,
                    &Tables::default(),
                    &author,
                    &Selection::All,
                    &Options { gate: Gate::STOPPED, ..Options::default() },
                );
                let purged = purged.unwrap_or_else(|e| panic!("{when}: the purge: {e}"));
                assert!(purged.failures.is_empty(), "{when}: the purge: {:?}", purged.failures);
            }
        }
    }
}

/// Not a test: what the other tests run in a process of its own, and kill.
#[test]
#[ignore = "run by the other tests, in a process of its own"]
fn the_process_that_dies() {
    let Some(root) = std::env::var_os(STORE) else { return };
    let act: Act = std::env::var(ACT).unwrap().parse().unwrap();
    let point = std::env::var(POINT).ok().map(|point| point.parse().unwrap());
    act.run(Arc::new(Deadly::open(Path::new(&root), point).unwrap()), "the process that dies");
}

/// A process that does `act` to the store at `root` and dies at `point`.
fn process(root: &Path, act: &Act, point: Option<Point>) -> Command {
    let mut command = clean(std::env::current_exe().unwrap());
    command.args(["--exact", "the_process_that_dies", "--ignored", "--nocapture", "--test-threads=1"]);
    command.env(STORE, root).env(ACT, act.to_string());
    if let Some(point) = point {
        command.env(POINT, point.to_string());
    }
    command
}

/// A registry whose storage is replaced for every point, and what it must serve.
struct Fixture {
    registry: Registry,
    /// What is never the target of anything: `<repository>:<tag>`, and one untagged referrer by its digest.
    live: BTreeSet<String>,
}

impl Fixture {
    /// A small registry with all sorts of garbage.
    fn new() -> Fixture {
        // The kernel keeps what a killed process wrote, so memory is as good as a disk, and syncs at once.
        let memory = tempfile::Builder::new().prefix("regfs-test-").tempdir_in("/dev/shm");
        let registry = Registry::start_in(memory.unwrap_or_else(|_| common::scratch()), false);
        let shared = layer("base", "shared by many");
        let private = |name: &str| Image::oci(name, &[shared.clone(), layer("private", name)]);
        let multi = |name: &str| {
            let [amd64, arm64] = ["amd64", "arm64"].map(|architecture| {
                let binary = layer("bin", &format!("{name} {architecture}"));
                Image::oci_for(architecture, name, &[shared.clone(), binary])
            });
            Image::index(&[("amd64", &amd64), ("arm64", &arm64)])
        };
        let delete = |name: &str, digest: &str| {
            registry.api("DELETE", &format!("{name}/manifests/{digest}"), &[], &[]).is(202);
        };
        registry.push("app", Some("1"), &Image::docker("1", std::slice::from_ref(&shared)));
        let two = private("two");
        registry.push("app", Some("2"), &two);
        registry.push("app", Some("stable"), &two);
        let signature = registry.push("app", None, &two.referrer("application/vnd.example.signature", "two"));
        registry.push("app", Some("latest"), &private("retagged"));
        registry.push("app", Some("latest"), &private("latest"));
        registry.push("app", None, &private("never tagged"));
        let deleted = registry.push("app", Some("deleted"), &private("deleted"));
        delete("app", &deleted);
        registry.push("team/multi", Some("latest"), &multi("latest"));
        registry.push("team/multi", Some("going"), &multi("going"));
        let deleted = registry.push("team/multi", Some("deleted"), &multi("deleted"));
        delete("team/multi", &deleted);
        registry.push_blob("team/multi", b"pushed, and named by nothing");

        let live = ["app:1", "app:2", "app:stable", "app:latest", "team/multi:latest"];
        let live = live.map(String::from).into_iter().chain([format!("app@{signature}")]).collect();
        let fixture = Fixture { registry, live };
        fixture.registry.assert_serves(&fixture.with_target(), "as pushed");
        fixture
    }

    /// The same after `rm` of one tag and a sweep: two transactions in the trash, the older one needs the other.
    fn with_trash() -> Fixture {
        let fixture = Fixture::new();
        for act in [Act::Rm(GOING.to_string()), Act::Sweep] {
            act.run(fixture.store(), "before");
        }
        fixture.registry.assert_serves(&fixture.live, "with a full trash");
        fixture
    }

    /// The same after `rm` of one tag: a sweep at once frees what its undo needs, and drops it.
    fn with_removed_tag() -> Fixture {
        let fixture = Fixture::new();
        Act::Rm(GOING.to_string()).run(fixture.store(), "before");
        fixture
    }

    fn with_target(&self) -> BTreeSet<String> {
        self.live.iter().cloned().chain([GOING.to_string()]).collect()
    }

    fn store(&self) -> Arc<dyn Store> {
        Arc::new(Disk::open(&self.registry.store()).unwrap())
    }

    fn transactions(&self) -> Vec<String> {
        trash::ids(&*self.store()).unwrap()
    }

    /// Replaces the storage by a copy of `pristine`, below the running registry.
    fn restore(&self, pristine: &Path) {
        let place = self.registry.store().join("docker");
        std::fs::remove_dir_all(&place).unwrap();
        clean("cp").arg("-a").arg(pristine.join("docker")).arg(&place).outcome().exits(0);
    }

    /// Kills `act` at every point, in turn; `keeps`: whether it takes away nothing for good; fewer than
    /// `least` points mean that the store has lost what made it worth it.
    fn kill_everywhere(&self, act: &Act, keeps: bool, least: usize) {
        let pristine = self.registry.fresh("pristine");
        clean("cp").arg("-a").arg(self.registry.store()).arg(&pristine).outcome().exits(0);
        let whole = process(&self.registry.store(), act, None).outcome().exits(0);
        let changes: Vec<&str> =
            whole.stdout.lines().filter_map(|l| l.split_once(CHANGE)).map(|l| l.1).collect();
        self.registry.assert_serves(&self.live, "after a run to the end");

        let mut points: Vec<Point> = Vec::new();
        for (at, change) in changes.iter().enumerate() {
            let has_steps = change.starts_with("write") || change.starts_with("rename");
            points.push(Point::Before(at));
            points.extend(has_steps.then_some(Point::Within(at)));
            points.push(Point::After(at));
        }
        let (all, most) = (points.len(), most_points());
        if all > most {
            points = (0..most).map(|n| points[n * all / most]).collect();
        }
        for (number, point) in points.iter().enumerate() {
            let when = format!(
                "{act}, killed {point} ({})",
                changes[match *point {
                    Point::Before(at) | Point::Within(at) | Point::After(at) => at,
                }]
            );
            self.restore(&pristine);
            let outcome = process(&self.registry.store(), act, Some(*point)).outcome();
            assert_eq!(outcome.signal, Some(Signal::KILL.as_raw()), "{when}: it did not die: {outcome}");
            self.aftermath(&when, keeps, number % 2 == 0);
        }
        println!("{act}: killed at {} of {all} points, {} changes", points.len(), changes.len());
        assert!(points.len() >= least, "too few points to say anything: {changes:?}");
    }

    /// What must hold after a kill, now and for whoever comes next.
    fn aftermath(&self, when: &str, keeps: bool, undoes: bool) {
        self.registry.assert_serves(&self.live, when);
        let summaries = trash::summaries(&*self.store()).unwrap_or_else(|e| panic!("{when}: the trash: {e}"));
        for summary in summaries.iter().filter(|summary| summary.files > 0) {
            assert!(!summary.command.is_empty(), "{when}: no description: {summary:?}");
        }
        if undoes {
            let mut next = self.transactions();
            while let Some(id) = next.pop() {
                Act::Undo(id.clone()).run(self.store(), when);
                self.registry.assert_serves(&self.live, &format!("{when}, after the undo of {id}"));
                // It may have emptied others, which are gone then.
                next.retain(|id| self.transactions().contains(id));
            }
            if keeps {
                let when = format!("{when}, all undone");
                self.registry.assert_serves(&self.with_target(), &when);
            }
        } else {
            Act::Purge.run(self.store(), when);
            self.registry.assert_serves(&self.live, &format!("{when}, after a purge"));
        }
        assert_eq!(self.transactions(), [""; 0], "{when}: the trash is not empty");
        let when = format!("{when}, {}, after the next sweep", if undoes { "undone" } else { "purged" });
        Act::Sweep.run(self.store(), &when);
        self.registry.assert_serves(&self.live, &when);
        let live = Live::of(&self.registry.store(), Roots::Tags);
        assert_eq!(live.problems, [""; 0], "{when}");
        assert_eq!(blobs(&self.registry.store()), live.blobs, "{when}: garbage is left");
    }
}

/// Whether what these tests need is there.
fn can_run() -> bool {
    common::have(&["docker-registry", "setpriv", "cp"])
}

/// The name of the one transaction that `what` (`rm`, `sweep`) made.
fn transaction(fixture: &Fixture, what: &str) -> String {
    let of = |id: &String| id.ends_with(&format!("-{what}"));
    fixture.transactions().into_iter().find(of).expect("it made one")
}

#[test]
fn a_killed_sweep_costs_no_image() {
    if can_run() {
        Fixture::new().kill_everywhere(&Act::Sweep, true, 50);
    }
}

#[test]
fn a_killed_sweep_now_costs_no_image() {
    if can_run() {
        Fixture::with_removed_tag().kill_everywhere(&Act::SweepNow, false, 50);
    }
}

#[test]
fn a_killed_rm_of_a_tag_costs_no_other_image() {
    if can_run() {
        Fixture::new().kill_everywhere(&Act::Rm(GOING.to_string()), true, 15);
    }
}

#[test]
fn a_killed_undo_of_an_rm_can_be_repeated() {
    if can_run() {
        // It fetches what the sweep took from another transaction.
        let fixture = Fixture::with_trash();
        fixture.kill_everywhere(&Act::Undo(transaction(&fixture, "rm")), true, 40);
    }
}

#[test]
fn a_killed_undo_of_a_sweep_can_be_repeated() {
    if can_run() {
        let fixture = Fixture::with_trash();
        fixture.kill_everywhere(&Act::Undo(transaction(&fixture, "sweep")), true, 50);
    }
}

#[test]
fn a_killed_purge_costs_no_image() {
    if can_run() {
        Fixture::with_trash().kill_everywhere(&Act::Purge, false, 50);
    }
}
