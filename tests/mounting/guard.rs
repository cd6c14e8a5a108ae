//! Nobody who opens a file in a guarded directory waits for a regfs that does not go on.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use regfs::watch::held::Questions;
use regfs::watch::opens::Opens;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::common::mount::Mount;
use super::common::{have, scratch, wait_for};
use super::{LIMIT, is_alive, store};

/// What nobody may wait for longer than; a machine that is busy with other things needs some time by itself.
const HELD: Duration = Duration::from_secs(6);

struct Guarded {
    mount: Mount,
    bound: PathBuf,
    _store: super::common::store::Store,
    _dir: tempfile::TempDir,
}

impl Guarded {
    fn new() -> Guarded {
        let (store, dir) = (store(), scratch());
        let bound = dir.path().join("bound");
        fs::create_dir(&bound).unwrap();
        let mount = Mount::with(store.root(), &["--guard", bound.to_str().unwrap()]);
        Guarded { mount, bound, _store: store, _dir: dir }
    }

    /// The link of a manifest, as a registry opens it.
    fn manifest(&self) -> PathBuf {
        let revisions = self.bound.join("docker/registry/v2/repositories/app/_manifests/revisions/sha256");
        let revision = fs::read_dir(revisions).unwrap().next().unwrap().unwrap();
        revision.path().join("link")
    }

    fn figures(&self) -> Value {
        let status: Value = serde_json::from_str(&self.mount.read("control/status")).unwrap();
        status["guard"].clone()
    }

    #[track_caller]
    fn counts(&self, what: &str, least: u64) {
        wait_for(what, LIMIT, || (self.figures()[what].as_u64() >= Some(least)).then_some(()));
    }

    fn guardian(&self) -> Pid {
        guardian_of(self.mount.pid()).unwrap()
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // It may not be mounted when the test failed early.
        let _ = rustix::mount::unmount(&self.bound, rustix::mount::UnmountFlags::DETACH);
    }
}

fn guardian_of(daemon: Pid) -> Option<Pid> {
    let children = format!("/proc/{0}/task/{0}/children", daemon.as_raw_nonzero());
    // Started by another thread than the first one.
    let tasks = fs::read_dir(Path::new(&children).ancestors().nth(2)?).ok()?;
    let children = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let pids: Vec<i32> = children
        .flat_map(|c| c.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
        .collect();
    pids.into_iter().filter_map(Pid::from_raw).find(|pid| is_alive(*pid))
}

/// Opens a file on a thread of its own, so that a test that fails ends.
#[track_caller]
fn opens(file: &Path) {
    let (file, began) = (file.to_path_buf(), Instant::now());
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(fs::read(file).is_ok()));
    assert_eq!(is_done.recv_timeout(HELD * 3), Ok(true), "held for good");
    assert!(began.elapsed() < HELD, "held for {:?}", began.elapsed());
}

#[test]
fn a_daemon_that_is_stopped_holds_nobody() {
    if !have(&["fuse", "root"]) {
        return;
    }
    let guarded = Guarded::new();
    let (manifest, daemon) = (guarded.manifest(), guarded.mount.pid());
    let tag = guarded.bound.join("docker/registry/v2/repositories/app/_manifests/tags/1/current/link");
    opens(&manifest);
    kill_process(daemon, Signal::STOP).unwrap();
    for file in [&tag, &manifest, &manifest, &manifest] {
        opens(file);
    }
    kill_process(daemon, Signal::CONT).unwrap();
    guarded.counts("missed", 3);
    // All of them were looked at in the end.
    guarded.counts("manifests", 4);
    guarded.counts("opens", 5);
    let missed = guarded.figures()["missed"].as_u64();
    opens(&manifest);
    guarded.counts("manifests", 5);
    assert_eq!((guarded.figures()["missed"].as_u64(), guarded.figures()["gaps"].as_u64()), (missed, Some(0)));
    wait_for("a word about it", LIMIT, || {
        guarded.mount.read("control/status").contains("did not answer in time").then_some(())
    });
}

#[test]
fn a_guardian_that_is_stopped_or_killed_holds_nobody_and_another_one_follows() {
    if !have(&["fuse", "root"]) {
        return;
    }
    let guarded = Guarded::new();
    let manifest = guarded.manifest();
    for (round, signal) in [Signal::STOP, Signal::KILL, Signal::STOP].into_iter().enumerate() {
        let first = guarded.guardian();
        kill_process(first, signal).unwrap();
        opens(&manifest);
        guarded.counts("gaps", round as u64 + 1);
        wait_for("another guardian", LIMIT, || {
            guardian_of(guarded.mount.pid()).filter(|guardian| *guardian != first)
        });
        let looked_at = guarded.figures()["manifests"].as_u64().unwrap();
        wait_for("an open that is looked at", LIMIT, || {
            opens(&manifest);
            (guarded.figures()["manifests"].as_u64() > Some(looked_at)).then_some(())
        });
    }
}

#[test]
fn both_stopped_hold_nobody() {
    if !have(&["fuse", "root"]) {
        return;
    }
    let guarded = Guarded::new();
    let (manifest, daemon, guardian) = (guarded.manifest(), guarded.mount.pid(), guarded.guardian());
    kill_process(daemon, Signal::STOP).unwrap();
    kill_process(guardian, Signal::STOP).unwrap();
    opens(&manifest);
    opens(&manifest);
    kill_process(daemon, Signal::CONT).unwrap();
    guarded.counts("gaps", 1);
}

#[test]
fn a_daemon_that_is_killed_holds_nobody_and_its_guardian_ends() {
    if !have(&["fuse", "root"]) {
        return;
    }
    let guarded = Guarded::new();
    let (manifest, guardian) = (guarded.manifest(), guarded.guardian());
    guarded.mount.crash();
    opens(&manifest);
    wait_for("the guardian to end", LIMIT, || (!is_alive(guardian)).then_some(()));
}

#[test]
fn a_daemon_that_hears_but_does_not_answer_holds_nobody() {
    if !have(&["fuse", "root"]) {
        return;
    }
    let (store, dir) = (store(), scratch());
    let bound = dir.path().join("bound");
    fs::create_dir(&bound).unwrap();
    // Makes the bind mount.
    drop(Opens::through(&bound, store.root()).unwrap());
    let (questions, theirs) = Questions::new().unwrap();
    let mut guardian = std::process::Command::new(super::REGFS);
    guardian
        .arg0("regfs")
        .args(["guardian", &std::process::id().to_string(), "0:0", "/nonexistent"])
        .arg(&bound);
    let mut guardian = guardian.stdin(theirs).spawn().unwrap();
    let began = questions.next();
    let revisions = bound.join("docker/registry/v2/repositories/app/_manifests/revisions/sha256");
    let revision = fs::read_dir(revisions).unwrap().next().unwrap().unwrap().path().join("link");
    let opened = std::panic::catch_unwind(|| (0..3).for_each(|_| opens(&revision)));
    let mut asked = Vec::new();
    let mut figures = began.unwrap().unwrap().figures;
    while opened.is_ok() && figures.missed < 3 {
        let told = questions.next().unwrap().unwrap();
        asked.extend(told.question.map(|question| question.id));
        figures = told.figures;
    }
    guardian.kill().unwrap();
    guardian.wait().unwrap();
    rustix::mount::unmount(&bound, rustix::mount::UnmountFlags::DETACH).unwrap();
    opened.unwrap();
    assert_eq!((asked, figures.opens, figures.missed), (vec![1, 2, 3], 3, 3));
}
