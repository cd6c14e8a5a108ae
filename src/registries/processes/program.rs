//! Whether the program that a process runs is a registry, whatever its file is called.
//!
//! A registry of the CNCF `distribution`, and every other that is built on it (GitLab's, Harbor's, OpenShift's), has the
//! package that stores on a filesystem in it, and Go keeps the names of packages in a program, also in one that was
//! stripped. Clients that share code with it (docker, podman, skopeo) don't have that package.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};

use memchr::memmem::Finder;
use rustix::fs::OFlags;

use super::handle::{Handle, base_name};

/// Whether the program of a process is a registry. Fails where it can't be looked at from here, or has ended.
pub(super) fn is_registry(handle: &Handle) -> io::Result<bool> {
    if holds_marker(handle.open_file("exe", OFlags::RDONLY)?)? {
        return Ok(true);
    }
    // A loader or an emulator has the program that it runs among its files.
    let runs_others =
        |name: String| ["ld-", "ld.so", "qemu-", "rosetta", "box64"].iter().any(|n| name.starts_with(n));
    if !runs_others(base_name(&handle.link("exe")?)) {
        return Ok(false);
    }
    let maps = String::from_utf8_lossy(&handle.read("maps")?).into_owned();
    let mut seen = Vec::new();
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (Some(range), Some(inode)) = (fields.next(), fields.nth(3)) else { continue };
        if inode == "0" || seen.contains(&inode) {
            continue;
        }
        seen.push(inode);
        if holds_marker(handle.open_file(&format!("map_files/{range}"), OFlags::RDONLY | OFlags::NONBLOCK)?)?
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A file as it is: the same as long as none of this changes.
type Identity = (u64, u64, u64, i64, i64);

/// What was found out already: programs are large, and are looked at again and again.
static KNOWN: Mutex<Option<HashMap<Identity, bool>>> = Mutex::new(None);

/// So much is read at a time.
const AT_ONCE: usize = 1 << 20;

/// Whether a program has the package in it.
fn holds_marker(file: File) -> io::Result<bool> {
    let facts = file.metadata()?;
    if !facts.is_file() {
        return Ok(false);
    }
    let identity = (facts.dev(), facts.ino(), facts.size(), facts.ctime(), facts.ctime_nsec());
    let lock = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = lock().as_ref().and_then(|known| known.get(&identity).copied()) {
        return Ok(known);
    }
    let found = find(file, &marker())?;
    lock().get_or_insert_default().insert(identity, found);
    Ok(found)
}

/// The name of the package; put together here, or it would be found in this program, too.
fn marker() -> Vec<u8> {
    let parts = ["registry", "storage", "driver", "filesystem"];
    std::hint::black_box(parts).join("/").into_bytes()
}

fn find(mut file: impl Read, marker: &[u8]) -> io::Result<bool> {
    let finder = Finder::new(marker);
    let mut buffer = vec![0; AT_ONCE + marker.len()];
    let mut kept = 0;
    loop {
        let read = match file.read(&mut buffer[kept..]) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        let end = kept + read;
        if finder.find(&buffer[..end]).is_some() {
            return Ok(true);
        }
        if read == 0 {
            return Ok(false);
        }
        // It may begin at the end of what was read.
        kept = end.min(marker.len() - 1);
        buffer.copy_within(end - kept..end, 0);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_marker_is_found_wherever_it_is() {
        let marker = b"needle";
        for at in [0, 1, AT_ONCE - 3, AT_ONCE, AT_ONCE + 5, AT_ONCE + 6, 2 * AT_ONCE] {
            let mut content = vec![b'n'; 2 * AT_ONCE + 100];
            content[at..at + marker.len()].copy_from_slice(marker);
            assert!(find(&content[..], marker).unwrap(), "at {at}");
            content[at] = b'x';
            assert!(!find(&content[..], marker).unwrap(), "at {at}");
        }
        assert!(!find(&b""[..], marker).unwrap());
    }

    #[test]
    fn this_program_is_none() {
        assert!(!holds_marker(File::open(std::env::current_exe().unwrap()).unwrap()).unwrap());
    }
}
