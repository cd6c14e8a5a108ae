//! Who keeps a mount busy, or a daemon alive whose mount has lost its name.
//!
//! Processes are recognised by the device of what they are in or have open, which says the same in every mount namespace
//! and after the name is gone. The daemon is asked nothing: it may be stopped.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::table::{self, MountEntry};
use crate::advice::quoted;
use crate::printable::Printable;

/// How many are named; a tree of a hundred workers needs no hundred lines.
const NAMED: usize = 10;

/// A line for each process that is inside, and for each mount; what other users do is seen by root only.
pub(super) fn users(mount: &MountEntry) -> Vec<String> {
    let mut lines = mounts_inside(mount);
    let mut namespaces = BTreeSet::from([namespace(Path::new("/proc/self"))]);
    let mut elsewhere = Vec::new();
    for pid in processes() {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let does = inside(&dir, &mount.device);
        lines.extend(does.map(|does| format!("{} (process {pid}) {does}", name(&dir))));
        if namespaces.insert(namespace(&dir))
            && let Some(place) = place_in(&dir, &mount.device)
        {
            elsewhere.push(format!(
                "{} (process {pid}) has it mounted on {}, in a mount namespace of its own; to unmount it there: nsenter -t {pid} -m \
                 umount {}",
                name(&dir),
                place.printable(),
                quoted(&place)
            ));
        }
    }
    lines.extend(elsewhere);
    if lines.len() > NAMED {
        let more = lines.len() - NAMED;
        lines.truncate(NAMED);
        lines.push(format!("and {more} more"));
    }
    lines
}

/// Other mounts in our namespace: those inside it, and more of the same.
fn mounts_inside(mount: &MountEntry) -> Vec<String> {
    let mounts = table::mounts().unwrap_or_default();
    let is_there = mounts.iter().any(|other| other.id == mount.id && other.device == mount.device);
    let others = mounts.into_iter().filter(|other| other.id != mount.id);
    let lines = others.filter_map(|other| match other.device == mount.device {
        true => Some(format!(
            "it is mounted on {}, too; to unmount it there: umount {}",
            other.place.printable(),
            quoted(&other.place)
        )),
        false if is_there && other.place != mount.place && other.place.starts_with(&mount.place) => {
            Some(format!("something is mounted on {}", other.place.printable()))
        }
        false => None,
    });
    lines.collect()
}

/// All processes but ourselves.
pub(super) fn processes() -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut pids: Vec<u32> = pids.filter(|pid| *pid != std::process::id()).collect();
    pids.sort_unstable();
    pids
}

/// What a process does in the mount. It may end while we look.
fn inside(dir: &Path, device: &str) -> Option<String> {
    let leads_in = |link: &Path| (device_of(link)? == device).then(|| std::fs::read_link(link).ok())?;
    [("cwd", "is in"), ("root", "has its root in"), ("exe", "runs")]
        .into_iter()
        .find_map(|(link, does)| Some(format!("{does} {}", leads_in(&dir.join(link))?.printable())))
        .or_else(|| {
            let files = std::fs::read_dir(dir.join("fd")).ok()?;
            let open = files.flatten().find_map(|file| leads_in(&file.path()))?;
            Some(format!("has {} open", open.printable()))
        })
}

/// `major:minor` of what a link of the kernel's leads to; asks for nothing else, so no filesystem is asked.
fn device_of(link: &Path) -> Option<String> {
    let there = statx(CWD, link, AtFlags::STATX_DONT_SYNC, StatxFlags::empty()).ok()?;
    Some(format!("{}:{}", there.stx_dev_major, there.stx_dev_minor))
}

/// Where a process sees the filesystem mounted.
fn place_in(dir: &Path, device: &str) -> Option<PathBuf> {
    let mounts = table::mounts_in(&dir.join("mountinfo")).ok()?;
    mounts.into_iter().find(|mount| mount.device == device).map(|mount| mount.place)
}

/// Its mount namespace; of a process that we may not look at, none, which then counts as one.
fn namespace(dir: &Path) -> Option<PathBuf> {
    std::fs::read_link(dir.join("ns/mnt")).ok()
}

fn name(dir: &Path) -> String {
    let name = std::fs::read_to_string(dir.join("comm")).unwrap_or_default();
    OsStr::new(name.trim_end()).printable().to_string()
}
