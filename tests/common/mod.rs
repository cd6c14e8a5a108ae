//! What the integration tests share: bounded commands, a real registry, images, a store on disk, a mount, a checker.
//!
//! Nothing here uses regfs's own code: the tests read the storage with their own eyes ([`check`]), so that a
//! mistake in regfs is not repeated in what it is measured by.
#![allow(dead_code, reason = "each test binary uses its own part of this")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

pub(crate) mod beside;
pub(crate) mod check;
pub(crate) mod gc;
pub(crate) mod http;
pub(crate) mod image;
pub(crate) mod mount;
pub(crate) mod random;
pub(crate) mod redis;
pub(crate) mod registry;
pub(crate) mod run;
pub(crate) mod server;
pub(crate) mod store;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// The user that owns nothing: tests that need an ordinary user become this one when they run as root.
pub(crate) const NOBODY: u32 = 65534;

/// Whether everything in `needs` is there: names of programs, `fuse`, or `root`.
///
/// Says why a test is skipped. With `CI=true` everything is promised to be there, so what is missing fails the test.
pub(crate) fn have(needs: &[&str]) -> bool {
    let missing: Vec<&str> = needs.iter().copied().filter(|need| !has(need)).collect();
    if missing.is_empty() {
        return true;
    }
    let why = format!("this machine lacks {}", missing.join(", "));
    assert!(
        std::env::var_os("CI").is_none_or(|ci| ci != "true"),
        "{why}; scripts/test.sh installs what can be"
    );
    println!("skipped: {why}");
    false
}

fn has(need: &str) -> bool {
    match need {
        "fuse" => fuse_available(),
        "root" => is_root(),
        "docker-registry" => in_path(registry::binary()) || Path::new(registry::binary()).is_file(),
        program => in_path(program),
    }
}

/// Whether a FUSE filesystem can be mounted here at all.
fn fuse_available() -> bool {
    let device = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
    device.is_ok() && (is_root() || in_path("fusermount3"))
}

fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A directory of our own that removes itself, open to other users, with all symlinks resolved.
pub(crate) fn scratch() -> TempDir {
    let dir = tempfile::Builder::new().prefix("regfs-test-").tempdir().expect("make a temporary directory");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("open it to other users");
    dir
}

/// Asks `question` until it answers, for at most `limit`; says what it waited for when it gives up.
pub(crate) fn wait_for<T>(what: &str, limit: Duration, mut question: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = question() {
            return answer;
        }
        assert!(start.elapsed() < limit, "waited {limit:?} for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Everything below `root`: relative path → what it is, whose, and for a file its bytes' digest.
///
/// The times of directories are left out: they change when an entry comes back.
pub(crate) fn snapshot(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    for path in walk(root) {
        let meta = fs::symlink_metadata(&path).unwrap();
        let mut text = format!("mode {:o} owner {}:{}", meta.mode(), meta.uid(), meta.gid());
        if meta.is_file() {
            let content = fs::read(&path).unwrap();
            text += &format!(" mtime {}.{} {}", meta.mtime(), meta.mtime_nsec(), check::sha256(&content));
        } else if meta.is_symlink() {
            text += &format!(" -> {}", fs::read_link(&path).unwrap().display());
        }
        found.insert(path.strip_prefix(root).unwrap().to_path_buf(), text);
    }
    found
}

/// What differs between two snapshots, a line each, for a message.
pub(crate) fn difference(
    before: &BTreeMap<PathBuf, String>,
    after: &BTreeMap<PathBuf, String>,
) -> Vec<String> {
    let gone = before.iter().filter(|(path, _)| !after.contains_key(*path));
    let new = after.iter().filter(|(path, _)| !before.contains_key(*path));
    let changed = before.iter().filter_map(|(path, old)| {
        after.get(path).filter(|text| *text != old).map(|text| format!("{}: {old} => {text}", path.display()))
    });
    gone.map(|(path, text)| format!("gone: {} {text}", path.display()))
        .chain(new.map(|(path, text)| format!("new: {} {text}", path.display())))
        .chain(changed)
        .collect()
}

/// Every path below `root`, directories before what is in them; symlinks are not followed.
pub(crate) fn walk(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for path in entries(&dir) {
            if fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir()) {
                todo.push(path.clone());
            }
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Paths in one directory, sorted; nothing for one that is not there.
pub(crate) fn entries(dir: &Path) -> Vec<PathBuf> {
    let Ok(listing) = fs::read_dir(dir) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = listing.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// The names in one directory, sorted.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let listing = fs::read_dir(dir).unwrap_or_else(|why| panic!("could not list {}: {why}", dir.display()));
    let mut names: Vec<String> =
        listing.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The errno of a failed call; a success is a failure of the test.
#[track_caller]
pub(crate) fn errno<T>(result: std::io::Result<T>) -> i32 {
    match result {
        Ok(_) => panic!("the call succeeded, an error was expected"),
        Err(why) => why.raw_os_error().unwrap_or_else(|| panic!("no errno in {why:?}")),
    }
}

/// Makes everything below `root` (and `root`) belong to `uid`:`gid`.
pub(crate) fn chown_all(root: &Path, uid: u32, gid: u32) {
    std::os::unix::fs::lchown(root, Some(uid), Some(gid)).unwrap();
    for path in walk(root) {
        std::os::unix::fs::lchown(&path, Some(uid), Some(gid)).unwrap();
    }
}
