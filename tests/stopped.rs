//! "No registry runs": who may contradict that, and what a sweep does when it is not so any more.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;
mod memory;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use common::image::{Image, layer};
use common::run::{Bounded, Outcome, clean, regfs};
use common::{NOBODY, have, scratch};
use memory::{Contents, TRASH, old_store, put, put_blob, put_image, registry};
use regfs::catalog::Tables;
use regfs::error::Error;
use regfs::gc::guard::gate::{Gate, Looks, Witness};
use regfs::gc::report::Report;
use regfs::gc::{self, Options, Progress, Unwatched};
use regfs::store::memory::Memory;
use regfs::trash::Author;

/// Sees a registry from its `from`th look on.
struct Begins {
    looks: AtomicUsize,
    from: usize,
}

impl Looks for Begins {
    fn look(&self) -> Result<(), Error> {
        match self.looks.fetch_add(1, SeqCst) < self.from {
            true => Ok(()),
            false => Err(Error::invalid("a registry has begun")),
        }
    }

    fn relied_on(&self) -> String {
        "nobody was seen".to_string()
    }
}

fn witnessed(from: usize) -> Gate {
    Gate::Stopped(Witness(Some(Arc::new(Begins { looks: AtomicUsize::new(0), from }))))
}

fn sweep(store: &Memory, gate: Gate, progress: &dyn Progress) -> Result<Report, Error> {
    let author = Author { uid: 0, pid: 1, command: "test".to_string() };
    let options = Options { now: true, grace: Duration::ZERO, gate, ..Options::default() };
    gc::run(store, &Tables::default(), &options, &author, progress)
}

/// A store with an image and a blob that is garbage.
fn store() -> Arc<Memory> {
    let store = old_store(&Contents::new());
    store.set_clock(memory::long_ago());
    put_image(&store, "app", Some("1"), &Image::oci("one", &[layer("file", "content")]));
    put_blob(&store, b"garbage");
    store
}

fn is_in_trash(contents: &Contents) -> bool {
    contents.keys().any(|path| path.starts_with(TRASH) && path.ends_with("data"))
}

#[test]
fn a_registry_that_begins_at_any_moment_of_a_stopped_sweep_ends_it() {
    let before = registry(&store().snapshot());
    for from in 0..=4 {
        let store = store();
        let result = sweep(&store, witnessed(from), &Unwatched);
        let after = store.snapshot();
        let failures = || result.as_ref().unwrap().failures.join("; ");
        match from {
            0 => {
                assert!(result.is_err(), "nothing was changed yet");
                assert_eq!(registry(&after), before);
            }
            1 => {
                assert!(failures().contains("back where it was"), "{}", failures());
                assert_eq!(registry(&after), before);
                assert!(!is_in_trash(&after));
            }
            2 => {
                assert!(failures().contains("stays in the trash"), "{}", failures());
                assert!(is_in_trash(&after), "nothing was freed");
            }
            3 => {
                assert!(failures().contains("right after that"), "{}", failures());
                assert!(!is_in_trash(&after));
            }
            _ => {
                assert_eq!(failures(), "");
                assert!(!is_in_trash(&after) && registry(&after) != before);
            }
        }
    }
}

/// Writes when a phase begins.
struct Writes<'a>(&'a Memory, &'static str, &'static str);

impl Progress for Writes<'_> {
    fn phase(&self, name: &'static str, _total: usize) {
        if name == self.1 {
            put(self.0, self.2, b"written by somebody");
        }
    }
    fn step(&self, _count: usize) {}
    fn is_stopped(&self) -> bool {
        false
    }
}

#[test]
fn whoever_writes_while_no_registry_is_said_to_run_ends_a_stopped_sweep() {
    for path in [
        "repositories/app/_uploads/6d3c1fc0-1111-4222-8333-444444444444/data",
        "repositories/new/_uploads/6d3c1fc0-1111-4222-8333-444444444444/startedat",
        "blobs/sha256/aa/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa/data",
    ] {
        for phase in ["re-check", "look back"] {
            let store = store();
            let result = sweep(&store, witnessed(9), &Writes(&store, phase, path));
            let why = match result {
                Ok(report) => report.failures.join("; "),
                Err(e) => e.to_string(),
            };
            assert!(why.contains("was written meanwhile"), "{phase} {path}: {why}");
            assert!(store.snapshot().values().any(|content| &content[..] == b"garbage"), "{phase} {path}");
            assert!(!is_in_trash(&store.snapshot()), "{phase} {path}");
        }
    }
}

/// A sample of a store on disk.
fn sample() -> (tempfile::TempDir, PathBuf) {
    let dir = scratch();
    let store = dir.path().join("store");
    regfs(["sample"]).arg(&store).outcome().exits(0);
    (dir, store)
}

fn stopped(store: &Path) -> Outcome {
    regfs(["gc"]).arg(store).args(["--registry-stopped", "--grace", "0"]).outcome()
}

/// Some blob.
fn blob(store: &Path) -> PathBuf {
    let blobs = common::walk(&store.join("docker/registry/v2/blobs"));
    blobs.into_iter().find(|path| path.ends_with("data")).expect("a sample has blobs")
}

/// A shell that holds a file open.
struct Holder(Child);

impl Holder {
    fn of(file: &Path, user: u32) -> Holder {
        let user = user.to_string();
        let mut child = clean("setpriv")
            .args(["--pdeathsig", "KILL", "--reuid", &user, "--regid", &user, "--clear-groups"])
            .args(["sh", "-c", "exec 3<\"$1\"; echo; read end", "sh"])
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
        Holder(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn whoever_holds_files_of_the_storage_open_and_could_write_contradicts_that_no_registry_runs() {
    if !have(&["root", "setpriv"]) {
        return;
    }
    let (_dir, store) = sample();
    let blob = blob(&store);
    let holder = Holder::of(&blob, 0);
    stopped(&store).exits(1).says(&format!("has {} open", blob.display()));
    drop(holder);
    let elsewhere = store.with_file_name("blobs");
    fs::write(&elsewhere, "no file of the storage").unwrap();
    let _other = Holder::of(&elsewhere, 0);
    let _nobody = Holder::of(&blob, NOBODY);
    let outcome = stopped(&store).exits(0);
    assert!(outcome.stdout.contains("no registry among"), "{outcome}");
    assert!(outcome.stdout.contains("nothing written since"), "{outcome}");
    let forced = regfs(["gc", "--registry-stopped", "--force"]).arg(&store).outcome().exits(0);
    assert!(forced.stdout.contains("with --force, so regfs did not look\n"), "{forced}");
}

#[test]
fn in_a_container_nobody_can_tell_whether_a_registry_runs() {
    if !have(&["root", "unshare"]) {
        return;
    }
    let (_dir, store) = sample();
    for proc in [&["--mount-proc"][..], &[]] {
        let mut command = clean("unshare");
        command.args(["--pid", "--fork"]).args(proc).arg(env!("CARGO_BIN_EXE_regfs")).arg("gc").arg(&store);
        command.args(["--grace", "0", "--registry-stopped"]).outcome().exits(1).says("container");
        command.arg("--force").outcome().exits(0);
    }
}
