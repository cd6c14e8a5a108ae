//! A mounted regfs that is gone when the test is, whatever the test did.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::run::{Bounded, Outcome, clean, regfs, sh};
use super::{names, wait_for};

/// A test that still has its mount after this long hangs in it; the watchdog then kills the daemon, which ends every call.
const WATCHDOG: Duration = Duration::from_secs(240);

/// A mount of a store; unmounts and ends its daemon when dropped.
pub(crate) struct Mount {
    point: PathBuf,
    /// Dropped with the mount, which ends the watchdog.
    _watchdog: Sender<()>,
}

impl Mount {
    /// Mounts `store` on a directory of its own.
    #[track_caller]
    pub(crate) fn of(store: &Path) -> Mount {
        Mount::with(store, &[])
    }

    /// Mounts with further arguments.
    #[track_caller]
    pub(crate) fn with(store: &Path, arguments: &[&str]) -> Mount {
        // Not a TempDir: that would empty the mount when something keeps it from being unmounted.
        let dir = tempfile::Builder::new().prefix("regfs-mount-").tempdir().expect("make a mountpoint");
        let point = dir.keep().canonicalize().expect("resolve the mountpoint");
        let mount = Mount { _watchdog: watchdog(point.clone()), point };
        mount.start(store, arguments).exits(0);
        assert!(
            is_mounted(&mount.point),
            "mount returned 0 but nothing is mounted on {}",
            mount.point.display()
        );
        mount
    }

    /// Runs `regfs mount` on this mountpoint (again).
    pub(crate) fn start(&self, store: &Path, arguments: &[&str]) -> Outcome {
        regfs(["mount"]).args(arguments).arg(store).arg(&self.point).outcome()
    }

    /// The mountpoint.
    pub(crate) fn point(&self) -> &Path {
        &self.point
    }

    /// A path in the mount.
    pub(crate) fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.point.join(relative)
    }

    /// Names in a directory of the mount.
    #[track_caller]
    pub(crate) fn list(&self, relative: &str) -> Vec<String> {
        names(&self.path(relative))
    }

    /// Content of a file of the mount, as text.
    #[track_caller]
    pub(crate) fn read(&self, relative: &str) -> String {
        let path = self.path(relative);
        let content =
            fs::read(&path).unwrap_or_else(|why| panic!("could not read {}: {why}", path.display()));
        String::from_utf8_lossy(&content).into_owned()
    }

    /// Writes a command to a control file; a sweep or a purge as if no registry ran, unless it says otherwise.
    pub(crate) fn control(&self, file: &str, command: &str) -> io::Result<()> {
        if command.starts_with("purge") {
            return self.tell(file, &format!("{command} registry-stopped force"));
        }
        match command.strip_prefix("sweep").filter(|rest| !rest.contains("registry-stopped")) {
            Some(rest) => self.tell(file, &format!("sweep registry-stopped force{rest}")),
            None => self.tell(file, command),
        }
    }

    /// Writes a command to a control file as it is.
    pub(crate) fn tell(&self, file: &str, command: &str) -> io::Result<()> {
        use std::io::Write;
        // One write(2), as `echo` does; the file is not created.
        let path = self.path("control").join(file);
        let mut file = fs::OpenOptions::new().write(true).truncate(true).open(path)?;
        file.write_all(format!("{command}\n").as_bytes())
    }

    /// Writes a command that must succeed.
    #[track_caller]
    pub(crate) fn order(&self, file: &str, command: &str) {
        self.control(file, command).unwrap_or_else(|why| {
            let report = fs::read_to_string(self.path("control").join(file));
            panic!("echo {command:?} > control/{file}: {why}; it reads: {report:?}")
        });
    }

    /// Removes a file (or symlink) of the mount.
    #[track_caller]
    pub(crate) fn rm(&self, relative: &str) {
        let path = self.path(relative);
        fs::remove_file(&path).unwrap_or_else(|why| panic!("could not remove {}: {why}", path.display()));
    }

    /// The digests that the last report in `control/gc` lists as `blob <digest> …`.
    #[track_caller]
    pub(crate) fn reported_blobs(&self) -> BTreeSet<String> {
        let report = self.read("control/gc");
        let blobs = report.lines().filter_map(|line| line.trim().strip_prefix("blob sha256:"));
        blobs.map(|rest| format!("sha256:{}", rest.split_whitespace().next().unwrap_or_default())).collect()
    }

    /// What `find blobs -type f -links 1` lists, as digests: blobs that no manifest names.
    #[track_caller]
    pub(crate) fn single_links(&self) -> BTreeSet<String> {
        let found = sh(&self.point, "find blobs -type f -links 1").outcome().exits(0);
        found
            .stdout
            .lines()
            .map(|path| format!("sha256:{}", path.rsplit('/').next().unwrap_or_default()))
            .collect()
    }

    /// The daemon's process id, from `control/status`.
    #[track_caller]
    pub(crate) fn pid(&self) -> Pid {
        let status: Value =
            serde_json::from_str(&self.read("control/status")).expect("control/status is JSON");
        let pid = status["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        pid.unwrap_or_else(|| panic!("control/status has no pid: {status}"))
    }

    /// Ends the daemon as a crash would.
    #[track_caller]
    pub(crate) fn crash(&self) {
        kill_process(self.pid(), Signal::KILL).expect("kill the daemon");
        wait_for("the daemon to end", Duration::from_secs(30), || {
            daemons(&self.point).is_empty().then_some(())
        });
        // Its first thread may be gone while another one still answers.
        wait_for("the mount to be dead", Duration::from_secs(30), || {
            // The guardian of one that takes long to end cuts its connection, which may unmount it.
            if !is_mounted(&self.point) {
                return Some(());
            }
            let errno = fs::read_dir(&self.point).err().and_then(|e| e.raw_os_error());
            [libc::ENOTCONN, libc::ECONNABORTED].contains(&errno?).then_some(())
        });
    }

    /// Unmounts with `regfs umount`, which must work and end the daemon.
    #[track_caller]
    pub(crate) fn unmount(self) {
        regfs(["umount"]).arg(&self.point).outcome().exits(0);
        assert!(!is_mounted(&self.point), "regfs umount returned 0 and the mount is still there");
        wait_for("the daemon to end", Duration::from_secs(30), || {
            daemons(&self.point).is_empty().then_some(())
        });
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // No assertion here: a test that panicked already must still get to the end of this.
        if is_mounted(&self.point) {
            regfs(["umount"]).arg(&self.point).outcome();
        }
        if is_mounted(&self.point) {
            eprintln!("regfs umount left {} mounted; unmounting it lazily", self.point.display());
            let program = if super::is_root() { &["umount", "-l"][..] } else { &["fusermount3", "-uz"] };
            clean(program[0]).args(&program[1..]).arg(&self.point).outcome();
        }
        for _ in 0..100 {
            if daemons(&self.point).is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        for pid in daemons(&self.point) {
            eprintln!("the daemon {pid:?} of {} outlived its mount; killing it", self.point.display());
            // It may end between the two calls.
            let _ = kill_process(pid, Signal::KILL);
        }
        // Fails, and leaves an empty directory, when the mount is still there after all.
        let _ = fs::remove_dir(&self.point);
    }
}

/// Kills what still serves `point` when the test hangs in it: every waiting call then fails, and the test with it.
fn watchdog(point: PathBuf) -> Sender<()> {
    let (alive, ended) = channel::<()>();
    std::thread::spawn(move || {
        if ended.recv_timeout(WATCHDOG) == Err(RecvTimeoutError::Timeout) {
            eprintln!("the test hangs in {} for {WATCHDOG:?}; killing the daemon", point.display());
            for pid in daemons(&point) {
                // It may end between the two calls.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    });
    alive
}

/// Whether something is mounted on `point`.
pub(crate) fn is_mounted(point: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("read /proc/self/mounts");
    mounts.lines().any(|line| line.split(' ').nth(1).is_some_and(|path| Path::new(path) == point))
}

/// Processes of regfs that serve `point`, which is a name nobody else has.
fn daemons(point: &Path) -> Vec<Pid> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let serves = |pid: &i32| {
        // A process may end while we look.
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = words.split(|byte| *byte == 0).collect();
        let is_regfs = words.first().is_some_and(|name| name.ends_with(b"regfs"));
        is_regfs && words.contains(&point.as_os_str().as_encoded_bytes())
    };
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(serves)
        .filter_map(Pid::from_raw)
        .collect()
}
