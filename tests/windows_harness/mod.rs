//! A real registry that can be held between two of its system calls: it works in a bind mount of its storage, and where
//! it opens a file there, it waits for us.

#![allow(dead_code, reason = "each test binary uses its own part of this")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use regfs::watch::opens::Opens;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;

use crate::common::mount::Mount;
use crate::common::registry::Registry;
use crate::common::run::clean;
use crate::common::{entries, scratch, wait_for};

/// A bind mount; gone when dropped.
pub(crate) struct Bound {
    /// The storage itself.
    pub(crate) storage: PathBuf,
    /// Where the registry finds it.
    pub(crate) bound: PathBuf,
    dir: TempDir,
}

impl Bound {
    pub(crate) fn new() -> Bound {
        let dir = scratch();
        let [storage, bound] = ["storage", "bound"].map(|name| dir.path().join(name));
        for part in ["blobs", "repositories"] {
            std::fs::create_dir_all(storage.join("docker/registry/v2").join(part)).unwrap();
        }
        std::fs::create_dir(&bound).unwrap();
        Bound { storage, bound, dir }
    }

    /// Mounts the storage.
    pub(crate) fn mount(&self, arguments: &[&str]) -> Mount {
        Mount::with(&self.storage, arguments)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        // Not mounted if the test failed early; a mount left behind would keep the directory from being removed.
        let _ = rustix::mount::unmount(&self.bound, rustix::mount::UnmountFlags::DETACH);
    }
}

/// A registry that can be held.
pub(crate) struct Held {
    registry: Registry,
    wanted: Arc<Mutex<Option<Wanted>>>,
    over: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
    place: Bound,
}

/// Where to hold it, whom to tell, and when to let it go on.
struct Wanted {
    end_of_path: String,
    /// So many opens are let through before.
    skip: usize,
    reached: Sender<()>,
    go_on: Receiver<()>,
}

/// Holds whoever opens a file, until it is dropped.
pub(crate) struct Hold {
    reached: Receiver<()>,
    _go_on: Sender<()>,
}

impl Hold {
    /// Waits until somebody is held.
    #[track_caller]
    pub(crate) fn reached(&self) {
        self.reached.recv_timeout(Duration::from_secs(60)).expect("nobody opened the file");
    }
}

impl Held {
    /// Starts one; `cache`: with the descriptor cache.
    pub(crate) fn start(cache: bool) -> Held {
        let place = Bound::new();
        let opens = Opens::through(&place.bound, &place.storage).unwrap();
        let wanted: Arc<Mutex<Option<Wanted>>> = Arc::default();
        let (over, is_over) = channel();
        let shared = wanted.clone();
        let thread = std::thread::spawn(move || holds(&opens, &shared, &is_over));
        let registry = Registry::start_at(place.bound.clone(), cache);
        Held { registry, wanted, over: Some(over), thread: Some(thread), place }
    }

    /// The storage, not by the way of the registry.
    pub(crate) fn storage(&self) -> PathBuf {
        self.place.storage.clone()
    }

    /// The registry directory in it.
    pub(crate) fn root(&self) -> PathBuf {
        self.storage().join("docker/registry/v2")
    }

    /// Holds who opens a file whose path ends like this, after letting `skip` of them through.
    pub(crate) fn hold(&self, end_of_path: &str, skip: usize) -> Hold {
        let (reached, is_reached) = channel();
        let (go_on, may_go_on) = channel();
        let end_of_path = end_of_path.to_string();
        *self.wanted.lock().unwrap() = Some(Wanted { end_of_path, skip, reached, go_on: may_go_on });
        Hold { reached: is_reached, _go_on: go_on }
    }
}

/// Slows a registry down before it makes one directory, until it is dropped.
pub(crate) struct Slow(std::process::Child);

impl Slow {
    /// `seconds` before each mkdir of `path`, as the registry names it.
    pub(crate) fn before_mkdir(registry: &Registry, path: &Path, seconds: u64) -> Slow {
        let pid = registry.pid();
        let child = clean("setpriv")
            .args(["--pdeathsig", "TERM", "strace", "--quiet=all", "-f", "-o", "/dev/null"])
            .args(["-p", &pid.to_string(), "-P"])
            .arg(path)
            .args(["-e", "trace=mkdirat", "-e", &format!("inject=mkdirat:delay_enter={seconds}s")])
            .spawn()
            .expect("run strace");
        let slow = Slow(child);
        let is_traced =
            |status: &str| status.lines().any(|l| l.starts_with("TracerPid:") && !l.ends_with("\t0"));
        wait_for("strace to see every thread", Duration::from_secs(30), || {
            let tasks = entries(Path::new(&format!("/proc/{pid}/task")));
            let statuses = tasks.iter().map(|task| std::fs::read_to_string(task.join("status")));
            statuses.flatten().all(|status| is_traced(&status)).then_some(())
        });
        slow
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        // It lets go of the registry when it is told to end, not when it is killed.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.0.wait();
    }
}

impl Deref for Held {
    type Target = Registry;

    fn deref(&self) -> &Registry {
        &self.registry
    }
}

impl DerefMut for Held {
    fn deref_mut(&mut self) -> &mut Registry {
        &mut self.registry
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.registry.stop();
        drop(self.over.take());
        // A panic in it has let everybody go on.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Lets everybody go on but who is wanted.
fn holds(opens: &Opens, wanted: &Mutex<Option<Wanted>>, is_over: &Receiver<()>) {
    let mut held = Vec::new();
    let timeout = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
    while is_over.try_recv() != Err(std::sync::mpsc::TryRecvError::Disconnected) {
        let events = opens.events();
        poll(&mut [PollFd::new(&events, PollFlags::IN)], Some(&timeout)).unwrap();
        held.retain(|(_, wanted): &(_, Wanted)| {
            wanted.go_on.try_recv() != Err(std::sync::mpsc::TryRecvError::Disconnected)
        });
        for open in opens.waiting().unwrap() {
            let mut slot = wanted.lock().unwrap();
            let is_meant = |end: &str| open.path().is_some_and(|path| is_end(&path, end));
            match slot.take_if(|wanted| is_meant(&wanted.end_of_path)) {
                Some(wanted) if wanted.skip > 0 => {
                    *slot = Some(Wanted { skip: wanted.skip - 1, ..wanted });
                }
                Some(wanted) => {
                    // Whoever asked may have given up.
                    let _ = wanted.reached.send(());
                    held.push((open, wanted));
                }
                None => {}
            }
        }
    }
}

fn is_end(path: &Path, end: &str) -> bool {
    path.to_string_lossy().ends_with(end)
}
