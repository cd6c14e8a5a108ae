//! Which process of this machine answers: the one that has a file open which only a request can have opened.
//!
//! Addresses don't tell. Two of them may lead to one process, and one to several; containers have addresses of their own,
//! and a proxy stands in between.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Device and inode of a file.
pub(super) type FileId = (u64, u64);

/// What a file is, whatever it is called.
pub(super) fn file_id(path: &Path) -> Option<FileId> {
    fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Whether a process has a file open, as far as we may know.
pub(super) fn has_open(pid: u32, file: FileId) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    // Not what the link says: another mount namespace may have another name for it.
    descriptors
        .filter_map(|descriptor| fs::metadata(descriptor.path()).ok())
        .any(|metadata| (metadata.dev(), metadata.ino()) == file)
}

/// A process other than this one that has a file open.
pub(super) fn anyone_with(file: FileId) -> Option<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != std::process::id()).find(|pid| has_open(*pid, file))
}

/// A process and those that started it: a launcher stands for what it launched.
pub(super) fn lineage(pid: u32) -> Vec<u32> {
    let parent = |pid: &u32| {
        let stat = fs::read_to_string(PathBuf::from(format!("/proc/{pid}/stat"))).ok()?;
        // The name of the program may hold anything; it ends with the last parenthesis.
        let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
        (parent > 1).then_some(parent)
    };
    // No process has more ancestors than that, and a table that changes meanwhile leads into no circle.
    std::iter::successors(Some(pid), parent).take(100).collect()
}

/// Where a name leads; all addresses of this machine are one.
pub(super) fn addresses(host: &str, port: u16) -> Vec<SocketAddr> {
    let own = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let found = (host, port).to_socket_addrs().into_iter().flatten();
    let mut found: Vec<SocketAddr> = found
        .map(|address| {
            let ip = address.ip().to_canonical();
            // Nobody else may bind to it. No packet is sent.
            let is_own = ip.is_loopback() || ip.is_unspecified() || UdpSocket::bind((ip, 0)).is_ok();
            SocketAddr::new(if is_own { own } else { ip }, port)
        })
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_process_is_known_by_what_it_has_open() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let id = file_id(file.path()).unwrap();
        assert!(has_open(std::process::id(), id));
        assert!(lineage(std::process::id()).len() > 1);
        assert_eq!(file_id(Path::new("/nowhere")), None);
        let other = file_id(Path::new("/proc/self/stat")).unwrap();
        assert!(!has_open(std::process::id(), other));
    }

    #[test]
    fn each_way_to_this_machine_is_one() {
        let one = addresses("127.0.0.1", 5000);
        assert_eq!(one.len(), 1);
        for other in ["127.0.0.2", "::1", "::ffff:127.0.0.1", "0.0.0.0", "localhost"] {
            assert_eq!(addresses(other, 5000), one, "{other}");
        }
        assert_ne!(addresses("127.0.0.1", 5001), one);
        assert_ne!(addresses("192.0.2.1", 5000), one);
    }
}
