//! Who keeps a mount busy

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::printable::Printable;

use super::table::mounts;

/// How many are named; a tree of a hundred workers needs no hundred lines.
const NAMED: usize = 10;

/// A line for each process that is inside, and for each mount; what other users do is seen by root only.
pub(super) fn users(mountpoint: &Path) -> Vec<String> {
    let mounts = mounts().unwrap_or_default().into_iter().map(|mount| mount.place);
    let inside = mounts.filter(|place| place != mountpoint && place.starts_with(mountpoint));
    let inside = inside.map(|place| format!("something is mounted on {}", place.printable()));
    let mut lines: Vec<String> = inside.chain(processes(mountpoint)).collect();
    if lines.len() > NAMED {
        let more = lines.len() - NAMED;
        lines.truncate(NAMED);
        lines.push(format!("and {more} more"));
    }
    lines
}

fn processes(mountpoint: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let mut pids: Vec<u32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    pids.into_iter().filter_map(|pid| process(pid, mountpoint)).collect()
}

/// What a process does in the mount. It may end while we look.
fn process(pid: u32, mountpoint: &Path) -> Option<String> {
    let dir = PathBuf::from(format!("/proc/{pid}"));
    let leads_in = |link: &Path| std::fs::read_link(link).ok().filter(|path| path.starts_with(mountpoint));
    let what = [("cwd", "is in"), ("root", "has its root in"), ("exe", "runs")]
        .into_iter()
        .find_map(|(link, does)| Some(format!("{does} {}", leads_in(&dir.join(link))?.printable())))
        .or_else(|| {
            let files = std::fs::read_dir(dir.join("fd")).ok()?;
            let open = files.flatten().find_map(|file| leads_in(&file.path()))?;
            Some(format!("has {} open", open.printable()))
        })?;
    let name = std::fs::read_to_string(dir.join("comm")).unwrap_or_default();
    let name = OsStr::new(name.trim_end()).printable().to_string();
    Some(format!("{name} (process {pid}) {what}"))
}
