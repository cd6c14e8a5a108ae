//! Unmounting, and what keeps a daemon alive afterwards.
//!
//! The name of a mount goes in one mount namespace. A container may have a mount of its own of the same filesystem, and
//! somebody may be inside one whose name was taken away: the daemon serves them until the last of them leaves.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::mount::UnmountFlags;

use super::table::{MountEntry, topmost};
use super::users;
use crate::error::{Error, Result};
use crate::printable::Printable;

/// How long a daemon may take to end that nobody is seen to use.
const ENDS: Duration = Duration::from_secs(10);
/// The same of one that is in use: services that begin have mounts of their own of everything for a moment.
const ENDS_IN_USE: Duration = Duration::from_secs(3);
/// The same where that is expected.
const ENDS_LAZILY: Duration = Duration::from_millis(500);

/// What an unmount has left, in words; empty when the daemon has ended.
pub struct Left(pub String);

/// Unmounts a regfs and waits for its daemon to end; `lazy`: also one that somebody is inside.
pub fn umount(mountpoint: &Path, lazy: bool) -> Result<Left> {
    let mount = topmost(mountpoint)?.filter(|mount| mount.is_regfs);
    let Some(mount) = mount else {
        return Err(Error::invalid(format!("no regfs is mounted on {}", mountpoint.printable())));
    };
    let daemon = daemon_of(&mount);
    let unmounted = match lazy {
        true => unmount_lazily(mountpoint),
        false => unmount(mountpoint),
    };
    unmounted.map_err(|e| match e.errno() {
        libc::EBUSY => Error::Busy { why: in_use(&mount) },
        _ => e,
    })?;
    let patience = if lazy { ENDS_LAZILY } else { ENDS_IN_USE };
    Ok(Left(daemon.map_or_else(String::new, |daemon| wait_for_end(daemon, &mount, patience))))
}

/// Takes the name of a mount away at once; who is inside may stay until they leave.
pub(super) fn unmount_lazily(mountpoint: &Path) -> Result<()> {
    match rustix::process::geteuid().is_root() {
        true => rustix::mount::unmount(mountpoint, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            .map_err(|e| Error::io("unmount", mountpoint, e)),
        false => fusermount(mountpoint, &["-u", "-z"]),
    }
}

fn unmount(mountpoint: &Path) -> Result<()> {
    match rustix::process::geteuid().is_root() {
        true => rustix::mount::unmount(mountpoint, UnmountFlags::NOFOLLOW)
            .map_err(|e| Error::io("unmount", mountpoint, e)),
        false => fusermount(mountpoint, &["-u"]),
    }
}

fn fusermount(mountpoint: &Path, flags: &[&str]) -> Result<()> {
    let output =
        Command::new("fusermount3").env("LC_ALL", "C").args(flags).arg("--").arg(mountpoint).output();
    let output =
        output.map_err(|e| Error::io("run fusermount3 (from the package fuse3) for", mountpoint, e))?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
            // It has one exit code for all that can go wrong.
            let is_busy = said.ends_with(": Device or resource busy");
            let error = match is_busy {
                true => std::io::Error::from_raw_os_error(libc::EBUSY),
                false => std::io::Error::other(said),
            };
            Err(Error::io("unmount", mountpoint, error))
        }
    }
}

/// Waits for a daemon whose mount has lost its name, with `patience` for its users; says what keeps it if it does not end.
fn wait_for_end(daemon: u32, mount: &MountEntry, patience: Duration) -> String {
    let began = Instant::now();
    loop {
        let Some(state) = state_of(daemon) else { return String::new() };
        let users = match began.elapsed() >= patience {
            true => users::users(mount),
            false => Vec::new(),
        };
        if !users.is_empty() || began.elapsed() >= ENDS {
            return left(daemon, state, mount, &users);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn left(daemon: u32, state: char, mount: &MountEntry, users: &[String]) -> String {
    let place = mount.place.printable();
    if matches!(state, 'T' | 't') {
        return format!(
            "{place} is unmounted, but the regfs that served it (process {daemon}) is stopped; it ends after kill -CONT {daemon}"
        );
    }
    let lines: String = users.iter().map(|user| format!("  {user}\n")).collect();
    match users.is_empty() {
        true => format!(
            "{place} is unmounted, but the regfs that served it (process {daemon}) has not ended yet. It may be ending a \
             collection, or serve somebody who can't be seen from here; it begins no sweep any more. Look again: ps -p {daemon}"
        ),
        false => format!(
            "{place} is unmounted, but the regfs that served it (process {daemon}) goes on for others:\n{lines}it sweeps no more, \
             and ends when the last of them is gone"
        ),
    }
}

/// Says who keeps a mount from being unmounted, and what to do.
fn in_use(mount: &MountEntry) -> String {
    let users: String = users::users(mount).iter().map(|user| format!("  {user}\n")).collect();
    let place = mount.place.printable();
    format!(
        "{place} is in use:\n{users}leave it (cd) and close its files, then try again; or take only its name away: \
         regfs umount --lazy {place}"
    )
}

/// The state of a process (proc(5)); `None` of one that has ended.
fn state_of(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let state = stat.rsplit(')').next()?.trim_start().chars().next()?;
    (!matches!(state, 'Z' | 'X')).then_some(state)
}

/// The process that serves a mount: the parent of its guardian, so that no question goes to a daemon that may be stopped;
/// where there is none, the mount itself says so. `None` when it does not answer, which is no obstacle to unmounting.
fn daemon_of(mount: &MountEntry) -> Option<u32> {
    // The number of a filesystem is given again when it is gone, and the guardian of the one before may still be ending. A
    // mount that was moved has a guardian that knows another place.
    let guardians = users::processes().into_iter().filter_map(|pid| Some((guarded_by(pid, mount)?, pid)));
    let (here, elsewhere): (Vec<_>, Vec<_>) = guardians.partition(|(place, _)| *place == mount.place);
    let guardian = here.first().or(elsewhere.first()).map(|(_, pid)| *pid);
    guardian.and_then(parent).or_else(|| {
        let status = std::fs::read(mount.place.join("control/status")).ok()?;
        let status: serde_json::Value = serde_json::from_slice(&status).ok()?;
        status.get("pid")?.as_u64()?.try_into().ok()
    })
}

/// Where the guardian `pid` of a mount of that number found it; `None` of any other process.
fn guarded_by(pid: u32, mount: &MountEntry) -> Option<PathBuf> {
    let dir = PathBuf::from(format!("/proc/{pid}"));
    let words = std::fs::read(dir.join("cmdline")).unwrap_or_default();
    let words: Vec<&[u8]> = words.split(|b| *b == 0).collect();
    let [b"regfs", b"guardian", _, device, place, ..] = words.as_slice() else { return None };
    // Anybody can start a process that looks like one.
    let is_owned = std::fs::metadata(&dir).is_ok_and(|dir| mount.user == Some(dir.uid()));
    (is_owned && *device == mount.device.as_bytes()).then(|| PathBuf::from(OsStr::from_bytes(place)))
}

/// As we number processes: a daemon in a container has another number there. `None` of one whose parent has ended.
fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let parent = stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()?;
    let program = |pid: u32| std::fs::read_link(format!("/proc/{pid}/exe")).ok();
    (program(parent)? == program(pid)?).then_some(parent)
}
