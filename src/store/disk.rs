//! A registry's storage on a local filesystem.
//!
//! Every path is opened below a descriptor of the registry directory with
//! `openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)`: neither `..` nor a symlink planted in the store leads out of it.
//! Renames are `renameat2(RENAME_NOREPLACE)`, or what does the same (`moves`). Durability is one `syncfs` per step.
//!
//! `open` opens, `directory` lists and makes directories, `write` writes and moves; `own`, `lock` and `reserve` are about
//! regfs's own directory, `tree` about trees deeper than a path can be.
//!
//! # Cost
//! `list`: open, getdents, close. `stat`: 3 calls. `read`: 4 calls for a file below 4 KiB.

mod directory;
mod lock;
mod moves;
mod open;
mod own;
mod reserve;
mod tree;
mod write;

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, RawMode};
use rustix::io::Errno;

use self::directory::DiskDirectory;
use self::open::{DiskFile, kind_of, resolve_flags, stat_of};
pub use self::reserve::{RESERVE_BYTES, RESERVE_INODES};
use super::{Directory, Entry, Kind, Reader, Space, Stat, Store, expect_file};
use crate::error::{Error, Found, Result};
use crate::layout;
use crate::printable::Printable;

/// A registry directory on a local filesystem.
#[derive(Debug)]
pub struct Disk {
    /// `<rootdirectory>/docker/registry/v2`.
    root: OwnedFd,
    /// The same as a name, for messages.
    path: PathBuf,
    /// Kernels before 5.6 and some sandboxes lack `openat2`.
    has_openat2: bool,
    /// Set once things were seen to move as they have to.
    is_able: OnceLock<bool>,
}

impl Disk {
    /// Opens the registry directory below a storage root (`rootdirectory`).
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is no `docker/registry/v2` in it.
    pub fn open(storage_root: &Path) -> Result<Disk> {
        let path = storage_root.join(layout::REGISTRY_DIR);
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let root = match fs::open(&path, flags, Mode::empty()) {
            Ok(root) => root,
            Err(Errno::NOENT | Errno::NOTDIR) => {
                return Err(Error::invalid(format!(
                    "{} is not the storage of a registry: expected a directory {} in it (give the registry's \
                     rootdirectory, for example /var/lib/registry, or its config.yml)",
                    storage_root.printable(),
                    layout::REGISTRY_DIR,
                )));
            }
            Err(e) => return Err(Error::io("open", &path, e)),
        };
        let has_openat2 =
            fs::openat2(&root, ".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve_flags()).is_ok();
        Ok(Disk { root, path, has_openat2, is_able: OnceLock::new() })
    }

    /// Opens `path` below the root without following any symlink.
    fn error(&self, doing: &'static str, path: &Path, errno: Errno) -> Error {
        let full = self.full(path);
        match errno {
            Errno::LOOP => Error::Misplaced { path: full, found: Found::Symlink },
            Errno::NOTDIR => Error::Misplaced { path: full, found: Found::File },
            Errno::ISDIR => Error::Misplaced { path: full, found: Found::Directory },
            errno => Error::io(doing, &full, errno),
        }
    }
}

impl Store for Disk {
    fn list(&self, prefix: &Path) -> Result<Option<Vec<Entry>>> {
        let mut entries = Vec::new();
        let is_there = self.list_each(prefix, &mut |name, kind| {
            entries.push(Entry { name: name.to_os_string(), kind });
        })?;
        Ok(is_there.then_some(entries))
    }

    fn list_each(&self, prefix: &Path, each: &mut dyn FnMut(&OsStr, Kind)) -> Result<bool> {
        loop {
            if let Some(is_there) = self.list_once(prefix, each)? {
                return Ok(is_there);
            }
        }
    }

    fn directory<'a>(&'a self, prefix: &Path) -> Result<Box<dyn Directory + 'a>> {
        let fd = match self.open_below(prefix, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) {
            Ok(fd) => Some(fd),
            Err(Errno::NOENT) => None,
            Err(e) => return Err(self.error("open the directory", prefix, e)),
        };
        Ok(Box::new(DiskDirectory { disk: self, prefix: prefix.to_path_buf(), fd, buffer: Vec::new() }))
    }

    fn stat(&self, path: &Path) -> Result<Option<Stat>> {
        let doing = "look at";
        // Where a filesystem remembers names (NFS, FUSE), only the second call tells that a file is gone.
        let stat = match self.open_below(path, OFlags::PATH, Mode::empty()).and_then(fs::fstat) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(self.error(doing, path, e)),
        };
        expect_file(kind_of(FileType::from_raw_mode(stat.st_mode as RawMode)), self.full(path))?;
        Ok(Some(stat_of(&stat)))
    }

    fn read(&self, path: &Path, limit: usize) -> Result<Option<(Vec<u8>, Stat)>> {
        let doing = "read";
        let Some((file, stat)) = self.open_file(path)? else { return Ok(None) };
        if stat.size > limit as u64 {
            return Err(Error::TooLarge { path: self.full(path), limit });
        }
        // What a writer adds behind this size belongs to a later version; whoever reads a digest's content checks it.
        let mut content = Vec::with_capacity(stat.size as usize);
        let read = file.take(stat.size).read_to_end(&mut content);
        read.map_err(|e| Error::io(doing, &self.full(path), e))?;
        Ok(Some((content, stat)))
    }

    fn open(&self, path: &Path) -> Result<Option<Box<dyn Reader>>> {
        Ok(self.open_file(path)?.map(|(file, _)| Box::new(DiskFile(file)) as Box<dyn Reader>))
    }

    fn write(&self, path: &Path, content: &[u8]) -> Result<()> {
        self.with_reserve(|| self.write_once(path, &|file| file.write_all(content)))
    }

    /// Without the reserve: that is for changes of the store, not for what only saves time.
    fn write_with(&self, path: &Path, write: &dyn Fn(&mut dyn Write) -> io::Result<()>) -> Result<()> {
        self.write_once(path, write)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<bool> {
        self.with_reserve(|| self.rename_once(from, to))
    }

    fn remove(&self, paths: &[PathBuf]) -> Vec<Error> {
        let doing = "remove";
        let remove_one = |path: &PathBuf| match self.parent(path, doing) {
            Ok(Some((parent, name))) => match fs::unlinkat(&parent, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => None,
                Err(e) => Some(self.error(doing, path, e)),
            },
            Ok(None) => None,
            Err(e) => Some(e),
        };
        paths.iter().filter_map(remove_one).collect()
    }

    fn prune(&self, prefix: &Path) -> Result<()> {
        self.prune_below(prefix)
    }

    fn remove_tree(&self, path: &Path) -> Result<()> {
        self.remove_tree_at(path)
    }

    fn holds_files(&self, prefix: &Path) -> Result<bool> {
        self.holds_files_below(prefix)
    }

    fn directory_changed(&self, path: &Path) -> Result<Option<SystemTime>> {
        let doing = "look at the directory";
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let stat = match self.open_below(path, flags, Mode::empty()).and_then(fs::fstat) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(self.error(doing, path, e)),
        };
        Ok(Some(stat_of(&stat).modified))
    }

    fn remove_directory(&self, path: &Path) -> Result<bool> {
        let doing = "remove the empty directory";
        let Some((parent, name)) = self.parent(path, doing)? else { return Ok(false) };
        match fs::unlinkat(&parent, name, AtFlags::REMOVEDIR) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
            Err(e) => Err(self.error(doing, path, e)),
        }
    }

    fn make_directory(&self, path: &Path) -> Result<()> {
        self.make_directory_like_its_parent(path)
    }

    fn create(&self, path: &Path, content: &[u8]) -> Result<()> {
        self.create_once(path, content)
    }

    fn replace(&self, path: &Path, content: &[u8], saved: &Path) -> Result<()> {
        self.replace_once(path, content, saved)
    }

    fn sync(&self) -> Result<()> {
        fs::syncfs(self.root.as_fd()).map_err(|e| Error::io("sync the filesystem of", &self.path, e))
    }

    fn lock(&self, who: &str, wait: Duration) -> Result<Box<dyn Send>> {
        Ok(Box::new(self.take_lock(who, wait)?))
    }

    fn is_writable(&self) -> bool {
        fs::accessat(&self.root, ".", fs::Access::WRITE_OK, AtFlags::EACCESS).is_ok()
    }

    fn space(&self) -> Result<Space> {
        let stat =
            fs::fstatvfs(&self.root).map_err(|e| Error::io("look at the filesystem of", &self.path, e))?;
        Ok(Space {
            blocks: stat.f_blocks,
            free: stat.f_bfree,
            available: stat.f_bavail,
            files: stat.f_files,
            files_free: stat.f_ffree,
            block_size: stat.f_frsize.try_into().unwrap_or(4096),
        })
    }

    fn full(&self, path: &Path) -> PathBuf {
        self.path.join(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture() -> (tempfile::TempDir, Disk) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join(layout::REGISTRY_DIR)).unwrap();
        let disk = Disk::open(directory.path()).unwrap();
        (directory, disk)
    }

    #[test]
    fn a_directory_without_a_registry_is_refused_with_what_was_expected() {
        let directory = tempfile::tempdir().unwrap();
        let error = Disk::open(directory.path()).unwrap_err().to_string();
        assert!(error.contains("docker/registry/v2"), "{error}");
    }

    #[test]
    fn symlinks_are_never_followed_with_or_without_openat2() {
        let (directory, mut disk) = fixture();
        let outside = directory.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("file"), "secret").unwrap();
        std::os::unix::fs::symlink(&outside, disk.full(Path::new("link"))).unwrap();
        std::os::unix::fs::symlink(outside.join("file"), disk.full(Path::new("filelink"))).unwrap();
        for has_openat2 in [disk.has_openat2, false] {
            disk.has_openat2 = has_openat2;
            for path in ["link/file", "filelink"] {
                let path = Path::new(path);
                assert!(disk.read(path, 100).unwrap_err().is_damage(), "{path:?}");
                assert!(disk.stat(path).unwrap_err().is_damage(), "{path:?}");
            }
            assert!(disk.list(Path::new("link")).unwrap_err().is_damage());
            disk.rename(Path::new("link/file"), Path::new("x")).unwrap_err();
            assert_eq!(disk.remove(&["link/file".into()]).len(), 1);
        }
        assert!(outside.join("file").exists());
    }

    #[test]
    fn rename_replaces_nothing_and_keeps_the_modes_of_directories() {
        use std::os::unix::fs::PermissionsExt;
        let (_directory, disk) = fixture();
        let a = disk.full(Path::new("a/b"));
        std::fs::create_dir_all(&a).unwrap();
        std::fs::write(a.join("f"), "1").unwrap();
        std::fs::set_permissions(&a, PermissionsExt::from_mode(0o2750)).unwrap();
        assert!(disk.rename(Path::new("a/b/f"), Path::new(".regfs/trash/1/a/b/f")).unwrap());
        disk.prune(Path::new("a")).unwrap();
        assert!(!a.exists());
        assert!(disk.rename(Path::new(".regfs/trash/1/a/b/f"), Path::new("a/b/f")).unwrap());
        assert_eq!(a.metadata().unwrap().permissions().mode() & 0o7777, 0o2750);
        assert!(!disk.rename(Path::new("nothing"), Path::new("x")).unwrap());
        std::fs::write(disk.full(Path::new("g")), "2").unwrap();
        let error = disk.rename(Path::new("g"), Path::new("a/b/f")).unwrap_err();
        assert!(matches!(error, Error::Exists { .. }));
        assert_eq!(std::fs::read(a.join("f")).unwrap(), b"1");
    }

    #[test]
    fn a_created_file_has_the_owner_and_the_mode_of_its_directory_and_replaces_nothing() {
        use std::os::unix::fs::PermissionsExt;
        let (_directory, disk) = fixture();
        let a = disk.full(Path::new("a"));
        std::fs::create_dir(&a).unwrap();
        std::fs::set_permissions(&a, PermissionsExt::from_mode(0o2750)).unwrap();
        let link = Path::new("a/b/link");
        disk.create(link, b"1").unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode(&a.join("b")), mode(&a.join("b/link"))), (0o2750, 0o640));
        assert!(matches!(disk.create(link, b"2").unwrap_err(), Error::Exists { .. }));
        assert_eq!(std::fs::read(disk.full(link)).unwrap(), b"1");
        disk.replace(link, b"3", Path::new(".regfs/trash/1/a/b/link")).unwrap();
        let contents =
            [link, Path::new(".regfs/trash/1/a/b/link")].map(|p| std::fs::read(disk.full(p)).unwrap());
        assert_eq!(contents, [b"3", b"1"]);
        assert_eq!(mode(&a.join("b/link")), 0o640);
        assert!(!disk.remove_directory(Path::new("a/b")).unwrap());
        std::fs::remove_file(disk.full(link)).unwrap();
        assert!(disk.remove_directory(Path::new("a/b")).unwrap());
        assert_eq!(disk.directory_changed(Path::new("a/b")).unwrap(), None);
        assert!(disk.directory_changed(Path::new("a")).unwrap().is_some());
    }

    #[test]
    fn the_second_locker_is_told_who_holds_the_store() {
        let (_directory, disk) = fixture();
        let guard = disk.lock("regfs gc", Duration::ZERO).unwrap();
        let error = disk.lock("regfs mount", Duration::ZERO).err().unwrap().to_string();
        assert!(error.contains(&format!("regfs gc (pid {})", std::process::id())), "{error}");
        drop(guard);
        disk.lock("regfs mount", Duration::ZERO).unwrap();
    }

    #[test]
    fn the_reserve_is_there_whenever_the_lock_is_free() {
        let (_directory, disk) = fixture();
        let reserve = disk.full(Path::new(".regfs/reserve/bytes"));
        let size = || reserve.metadata().ok().map(|m| m.len());
        let guard = disk.lock("regfs gc", Duration::ZERO).unwrap();
        assert_eq!(size(), Some(RESERVE_BYTES));
        // A change that meets a full disk gives it up, and is tried again; once.
        let tries = std::cell::Cell::new(0);
        let full = || -> Result<()> {
            tries.set(tries.get() + 1);
            Err(Error::io("write", &reserve, Errno::NOSPC))
        };
        disk.with_reserve(full).unwrap_err();
        assert_eq!((size(), tries.take()), (None, 2));
        disk.with_reserve(full).unwrap_err();
        assert_eq!(tries.take(), 1, "there is none left");
        drop(guard);
        assert_eq!(size(), Some(RESERVE_BYTES));
        // Other failures have nothing to do with it.
        disk.with_reserve(|| -> Result<()> { Err(Error::io("write", &reserve, Errno::ACCESS)) }).unwrap_err();
        assert_eq!(size(), Some(RESERVE_BYTES));
    }

    #[test]
    fn a_named_pipe_does_not_hang_a_read() {
        let (_directory, disk) = fixture();
        let path = disk.full(Path::new("pipe"));
        assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
        assert!(disk.read(Path::new("pipe"), 10).unwrap_err().is_damage());
    }
}
