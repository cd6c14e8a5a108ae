//! A registry's storage on a local filesystem.
//!
//! Every path is opened below a descriptor of the registry directory with
//! `openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)`: neither `..` nor a symlink planted in the store leads out of it.
//! Renames are `renameat2(RENAME_NOREPLACE)`. Durability is one `syncfs` per step.
//!
//! # A full disk
//! Space is freed by a purge, which needs none; but what is purged was taken before, and taking needs a description
//! and on most filesystems a block for each new directory. So `.regfs/reserve` holds [`RESERVE_BYTES`]: whoever takes
//! the lock makes it, a change that meets a full disk gives it up and tries again, and whoever lets go of the lock
//! makes it anew when there is space again. A disk that was full before regfs first changed something has none.
//!
//! # Cost
//! `list`: open, getdents, close. `stat`: 3 calls. `read`: 4 calls for a file below 4 KiB.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{
    self, AtFlags, FileType, FlockOperation, Gid, Mode, OFlags, RawMode, RenameFlags, ResolveFlags, Uid,
};
use rustix::io::Errno;

use super::{Directory, Entry, Kind, Reader, Space, Stat, Store, expect_file};
use crate::error::{Error, Found, Result};
use crate::layout;
use crate::printable::Printable;

/// Space kept for a full disk: with 4 KiB for each directory enough to take more than a hundred blobs.
pub const RESERVE_BYTES: u64 = 1 << 20;

/// A registry directory on a local filesystem.
#[derive(Debug)]
pub struct Disk {
    /// `<rootdirectory>/docker/registry/v2`.
    root: OwnedFd,
    /// The same as a name, for messages.
    path: PathBuf,
    /// Kernels before 5.6 and some sandboxes lack `openat2`.
    has_openat2: bool,
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
        Ok(Disk { root, path, has_openat2 })
    }

    /// Opens `path` below the root without following any symlink.
    fn open_below(&self, path: &Path, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        if self.has_openat2 {
            loop {
                match fs::openat2(&self.root, path, flags, mode, resolve_flags()) {
                    // A rename elsewhere in the tree made the kernel unsure; it asks to try again.
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    result => return result,
                }
            }
        }
        let mut parent = fs::openat(&self.root, ".", DIRECTORY_PATH, Mode::empty())?;
        for component in path.parent().into_iter().flat_map(Path::components) {
            let next = fs::openat(&parent, component.as_os_str(), DIRECTORY_PATH, Mode::empty());
            parent = next.map_err(|e| {
                if e == Errno::NOTDIR && is_symlink(&parent, component.as_os_str()) { Errno::LOOP } else { e }
            })?;
        }
        match path.file_name() {
            Some(name) => fs::openat(&parent, name, flags, mode),
            None => fs::openat(&parent, ".", flags, mode),
        }
    }

    /// The directory that holds `path`, and the last name; `None` when there is no such directory.
    fn parent<'a>(&self, path: &'a Path, doing: &'static str) -> Result<Option<(OwnedFd, &'a OsStr)>> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Error::io(doing, &self.full(path), Errno::INVAL));
        };
        match self.open_below(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) {
            Ok(fd) => Ok(Some((fd, name))),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(self.error(doing, parent, e)),
        }
    }

    fn error(&self, doing: &'static str, path: &Path, errno: Errno) -> Error {
        let full = self.full(path);
        match errno {
            Errno::LOOP => Error::Misplaced { path: full, found: Found::Symlink },
            Errno::NOTDIR => Error::Misplaced { path: full, found: Found::File },
            Errno::ISDIR => Error::Misplaced { path: full, found: Found::Directory },
            errno => Error::io(doing, &full, errno),
        }
    }

    /// Makes the directory `path`, and those above it, like the ones above `like` that carry the same names.
    fn make_directories(&self, path: &Path, like: Option<&Path>) -> Result<()> {
        if path.as_os_str().is_empty() {
            return Ok(());
        }
        match self.open_below(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) {
            Ok(_) => return Ok(()),
            Err(Errno::NOENT) => {}
            Err(e) => return Err(self.error("open the directory", path, e)),
        }
        let like = like.filter(|model| model.file_name() == path.file_name());
        self.make_directories(path.parent().unwrap_or(Path::new("")), like.and_then(Path::parent))?;
        let doing = "make the directory";
        let Some((parent, name)) = self.parent(path, doing)? else {
            return Err(self.error(doing, path, Errno::NOENT));
        };
        let mode = if path.starts_with(layout::OWN) { 0o700 } else { 0o777 };
        match fs::mkdirat(&parent, name, Mode::from_raw_mode(mode)) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Ok(()),
            Err(e) => return Err(self.error(doing, path, e)),
        }
        match like.map(|model| self.open_below(model, OFlags::PATH, Mode::empty())) {
            Some(Ok(model)) => self.copy_ownership(&model, path),
            Some(Err(Errno::NOENT)) | None => Ok(()),
            Some(Err(e)) => Err(self.error(doing, path, e)),
        }
    }

    /// Gives the directory `path` the owner and the mode of `model`.
    fn copy_ownership(&self, model: &OwnedFd, path: &Path) -> Result<()> {
        let doing = "set owner and mode of the directory";
        let wrap = |e| self.error(doing, path, e);
        let wanted = fs::fstat(model).map_err(wrap)?;
        let target =
            self.open_below(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).map_err(wrap)?;
        let made = fs::fstat(&target).map_err(wrap)?;
        if (made.st_uid, made.st_gid) != (wanted.st_uid, wanted.st_gid) {
            let chown =
                fs::fchown(&target, Some(Uid::from_raw(wanted.st_uid)), Some(Gid::from_raw(wanted.st_gid)));
            match chown {
                // Only root may give files away; the files in it keep their owner, which is what a registry reads.
                Err(Errno::PERM) => log::warn!("could not {doing} {}: not root", self.full(path).printable()),
                result => result.map_err(wrap)?,
            }
        }
        let mode = Mode::from_raw_mode(wanted.st_mode as RawMode & 0o7777);
        fs::fchmod(&target, mode).map_err(wrap)
    }
}

const DIRECTORY_PATH: OFlags =
    OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

fn resolve_flags() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

fn is_symlink(parent: &OwnedFd, name: &OsStr) -> bool {
    fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode as RawMode) == FileType::Symlink)
}

fn kind_of(file_type: FileType) -> Kind {
    match file_type {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        _ => Kind::Other,
    }
}

fn stat_of(stat: &fs::Stat) -> Stat {
    Stat {
        size: stat.st_size.max(0).unsigned_abs(),
        blocks: stat.st_blocks.max(0).unsigned_abs(),
        modified: time(stat.st_mtime, stat.st_mtime_nsec),
        changed: time(stat.st_ctime, stat.st_ctime_nsec),
        inode: stat.st_ino,
    }
}

/// A time of `stat(2)`; those before 1970 or past what a clock can hold count as 1970.
fn time(seconds: i64, nanoseconds: impl TryInto<u32>) -> SystemTime {
    let since_epoch = Duration::new(seconds.max(0).unsigned_abs(), nanoseconds.try_into().unwrap_or(0));
    SystemTime::UNIX_EPOCH.checked_add(since_epoch).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Bytes for one `getdents64`; about 350 digests fit.
const LIST_BUFFER: usize = 32 << 10;
/// Bytes for a file that is read as a whole; most manifests and all links fit.
const READ_BUFFER: usize = 16 << 10;

/// A directory of [`Disk`], opened once.
struct DiskDirectory<'a> {
    disk: &'a Disk,
    prefix: PathBuf,
    /// `None`: it is not there.
    fd: Option<OwnedFd>,
    buffer: Vec<u8>,
}

impl Directory for DiskDirectory<'_> {
    /// Three calls: open, read, close; with facts four. Anything unusual is left to [`Disk::read`].
    fn read(&mut self, name: &Path, limit: usize, facts: bool) -> Result<Option<(&[u8], Option<Stat>)>> {
        let Some(directory) = &self.fd else { return Ok(None) };
        if !self.disk.has_openat2 {
            return self.read_slowly(name, limit);
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = match fs::openat2(directory, name, flags, Mode::empty(), resolve_flags()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(None),
            Err(_) => return self.read_slowly(name, limit),
        };
        if self.buffer.len() < READ_BUFFER {
            self.buffer.resize(READ_BUFFER, 0);
        }
        let stat = if facts { fs::fstat(&file).ok() } else { None };
        let is_file = stat.as_ref().is_none_or(|s| kind_of(FileType::from_raw_mode(s.st_mode)) == Kind::File);
        match rustix::io::read(&file, &mut self.buffer[..READ_BUFFER]) {
            // A regular file gives all it has, so there is no more where it didn't fill the buffer.
            Ok(read)
                if (1..READ_BUFFER).contains(&read)
                    && read <= limit
                    && is_file
                    && facts == stat.is_some() =>
            {
                Ok(Some((&self.buffer[..read], stat.as_ref().map(stat_of))))
            }
            // Empty, large, a directory, a failure: as rare as they are.
            _ => self.read_slowly(name, limit),
        }
    }

    fn stat(&self, name: &Path) -> Result<Option<Stat>> {
        let Some(directory) = &self.fd else { return Ok(None) };
        // A symlink planted on the way could only make this tell the times of another file; nothing moves by that.
        match fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if kind_of(FileType::from_raw_mode(stat.st_mode)) == Kind::File => {
                Ok(Some(stat_of(&stat)))
            }
            Err(Errno::NOENT) => Ok(None),
            _ => self.disk.stat(&self.prefix.join(name)),
        }
    }
}

impl DiskDirectory<'_> {
    fn read_slowly(&mut self, name: &Path, limit: usize) -> Result<Option<(&[u8], Option<Stat>)>> {
        let Some((content, stat)) = self.disk.read(&self.prefix.join(name), limit)? else { return Ok(None) };
        self.buffer = content;
        Ok(Some((&self.buffer, Some(stat))))
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
        let fd = match self.open_below(path, OFlags::PATH, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(self.error(doing, path, e)),
        };
        let stat = fs::fstat(&fd).map_err(|e| self.error(doing, path, e))?;
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
        for entry in self.list(prefix)?.unwrap_or_default() {
            if entry.kind == Kind::Directory {
                self.prune(&prefix.join(entry.name))?;
            }
        }
        let doing = "remove the empty directory";
        let Some((parent, name)) = self.parent(prefix, doing)? else { return Ok(()) };
        match fs::unlinkat(&parent, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
            Err(e) => Err(self.error(doing, prefix, e)),
        }
    }

    fn directory_changed(&self, path: &Path) -> Result<Option<SystemTime>> {
        let doing = "look at the directory";
        let fd = match self.open_below(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(self.error(doing, path, e)),
        };
        let stat = fs::fstat(&fd).map_err(|e| self.error(doing, path, e))?;
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
        let doing = "make the directory";
        match self.open_below(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) {
            Ok(_) => return Ok(()),
            Err(Errno::NOENT) => {}
            Err(e) => return Err(self.error(doing, path, e)),
        }
        let above = path.parent().unwrap_or(Path::new(""));
        self.make_directory(above)?;
        let Some((parent, name)) = self.parent(path, doing)? else {
            return Err(self.error(doing, path, Errno::NOENT));
        };
        match fs::mkdirat(&parent, name, Mode::from_raw_mode(0o777)) {
            Ok(()) => self.copy_ownership(&parent, path),
            Err(Errno::EXIST) => Ok(()),
            Err(e) => Err(self.error(doing, path, e)),
        }
    }

    fn create(&self, path: &Path, content: &[u8]) -> Result<()> {
        let doing = "write";
        self.make_directory(path.parent().unwrap_or(Path::new("")))?;
        let Some((parent, name)) = self.parent(path, doing)? else {
            return Err(self.error(doing, path, Errno::NOENT));
        };
        let (new_parent, new_name) = self.write_new(&parent, path, content)?;
        match fs::renameat_with(&new_parent, new_name, &parent, name, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => Err(Error::Exists { path: self.full(path) }),
            Err(e) => Err(self.error(doing, path, e)),
        }
    }

    fn replace(&self, path: &Path, content: &[u8], saved: &Path) -> Result<()> {
        let doing = "replace";
        let Some((parent, name)) = self.parent(path, doing)? else {
            return Err(self.error(doing, path, Errno::NOENT));
        };
        let (new_parent, new_name) = self.write_new(&parent, path, content)?;
        fs::renameat_with(&new_parent, new_name, &parent, name, RenameFlags::EXCHANGE)
            .map_err(|e| self.error(doing, path, e))?;
        // Owner and mode of directories in the trash are those of the store, so that an undo finds them.
        self.make_directories(saved.parent().unwrap_or(Path::new("")), path.parent())?;
        let Some((to_parent, to_name)) = self.parent(saved, doing)? else {
            return Err(self.error(doing, saved, Errno::NOENT));
        };
        match fs::renameat_with(&new_parent, new_name, &to_parent, to_name, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => Err(Error::Exists { path: self.full(saved) }),
            Err(e) => Err(self.error(doing, saved, e)),
        }
    }

    fn sync(&self) -> Result<()> {
        fs::syncfs(self.root.as_fd()).map_err(|e| Error::io("sync the filesystem of", &self.path, e))
    }

    fn lock(&self, who: &str, wait: Duration) -> Result<Box<dyn Send>> {
        let (path, doing) = (Path::new(layout::LOCK), "lock");
        self.make_directories(Path::new(layout::OWN), None)?;
        let flags = OFlags::RDWR | OFlags::CREATE;
        let fd = self
            .open_below(path, flags, Mode::from_raw_mode(0o600))
            .map_err(|e| self.error(doing, path, e))?;
        let file = File::from(fd);
        let deadline = Instant::now() + wait;
        loop {
            match fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::INTR) => {}
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20))
                }
                Err(Errno::WOULDBLOCK) => return Err(held_by(&file)),
                Err(e) => return Err(self.error(doing, path, e)),
            }
        }
        // The text is only for people who wait; the lock itself is the kernel's and dies with the process.
        let text = format!("{} (pid {})\n", who, std::process::id());
        let described = file.set_len(0).and_then(|()| file.write_all_at(text.as_bytes(), 0));
        if let Err(e) = described {
            log::debug!("could not say in {} who holds the lock: {e}", self.full(path).printable());
        }
        let own = self
            .open_below(Path::new(layout::OWN), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
            .map_err(|e| self.error(doing, Path::new(layout::OWN), e))?;
        Ok(Box::new(Locked::new(file, own)))
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

impl Disk {
    /// Does what may need space; on a full disk the reserve is given up for it.
    fn with_reserve<T>(&self, act: impl Fn() -> Result<T>) -> Result<T> {
        match act() {
            Err(e) if is_full(&e) && self.release_reserve() => act(),
            result => result,
        }
    }

    /// Gives up the reserve; `false`: there is none.
    fn release_reserve(&self) -> bool {
        let own = self.open_below(Path::new(layout::OWN), OFlags::PATH | OFlags::DIRECTORY, Mode::empty());
        if own.and_then(|own| fs::unlinkat(&own, RESERVE, AtFlags::empty())).is_err() {
            return false;
        }
        log::warn!("the disk of {} is full; the reserve is used up", self.path.printable());
        // ext4 hands out freed blocks only after a commit. When that fails, the next try tells why.
        let _ = fs::syncfs(self.root.as_fd());
        true
    }

    fn write_once(&self, path: &Path, write: &dyn Fn(&mut dyn Write) -> io::Result<()>) -> Result<()> {
        let doing = "write";
        self.make_directories(path.parent().unwrap_or(Path::new("")), None)?;
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(".tmp");
        let temporary = path.with_file_name(name);
        let mut file = BufWriter::new(self.create_own(&temporary, doing)?);
        let written = write(&mut file).and_then(|()| file.flush()).and_then(|()| file.get_ref().sync_all());
        if let Err(e) = written {
            // Half a file helps nobody, and may take the last space there was.
            self.remove(&[temporary]).iter().for_each(|e| log::debug!("{e}"));
            return Err(Error::io(doing, &self.full(path), e));
        }
        let Some((parent, name)) = self.parent(path, doing)? else {
            return Err(self.error(doing, path, Errno::NOENT));
        };
        let temporary_name = temporary.file_name().unwrap_or_default();
        fs::renameat(&parent, temporary_name, &parent, name).map_err(|e| self.error(doing, path, e))
    }

    fn rename_once(&self, from: &Path, to: &Path) -> Result<bool> {
        let doing = "move";
        let Some((from_parent, from_name)) = self.parent(from, doing)? else { return Ok(false) };
        if fs::statat(&from_parent, from_name, AtFlags::SYMLINK_NOFOLLOW).is_err_and(|e| e == Errno::NOENT) {
            return Ok(false);
        }
        self.make_directories(to.parent().unwrap_or(Path::new("")), from.parent())?;
        let Some((to_parent, to_name)) = self.parent(to, doing)? else {
            return Err(self.error(doing, to, Errno::NOENT));
        };
        match fs::renameat_with(&from_parent, from_name, &to_parent, to_name, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(Errno::EXIST) => Err(Error::Exists { path: self.full(to) }),
            Err(e) => Err(self.error(doing, from, e)),
        }
    }

    fn is_there(&self, directory: &Path) -> Result<bool> {
        match self.open_below(directory, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(e) => Err(self.error("look at the directory", directory, e)),
        }
    }

    /// `None`: it was removed after it was opened and before it gave an entry; there may be a new one.
    fn list_once(&self, prefix: &Path, each: &mut dyn FnMut(&OsStr, Kind)) -> Result<Option<bool>> {
        let doing = "list the directory";
        let fd = match self.open_below(prefix, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(Some(false)),
            Err(e) => return Err(self.error(doing, prefix, e)),
        };
        let mut buffer = [MaybeUninit::uninit(); LIST_BUFFER];
        let mut entries = fs::RawDir::new(&fd, &mut buffer);
        let mut is_first = true;
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Err(Errno::NOENT) if is_first => return Ok(None),
                // It was removed meanwhile, so whatever was in it had left. In a new one there may be more.
                Err(Errno::NOENT) if !self.is_there(prefix)? => return Ok(Some(true)),
                entry => entry.map_err(|e| self.error(doing, prefix, e))?,
            };
            is_first = false;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let kind = match entry.file_type() {
                FileType::Unknown => match self.kind(&prefix.join(name))? {
                    Some(kind) => kind,
                    None => continue,
                },
                known => kind_of(known),
            };
            each(name, kind);
        }
        Ok(Some(true))
    }

    /// Makes a file of our own. What stands there goes: what a crash left, or something planted, as a named pipe that
    /// would keep us waiting for a reader, or another name of a blob.
    fn create_own(&self, path: &Path, doing: &'static str) -> Result<File> {
        if let Some(e) = self.remove(&[path.to_path_buf()]).into_iter().next() {
            return Err(e);
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let fd = self.open_below(path, flags, Mode::from_raw_mode(0o600));
        fd.map(File::from).map_err(|e| self.error(doing, path, e))
    }

    /// Writes what shall become `path` in `parent`, with owner and mode that fit there; returns where it lies.
    ///
    /// Not beside `path`: a crash must leave nothing where a registry looks.
    fn write_new(&self, parent: &OwnedFd, path: &Path, content: &[u8]) -> Result<(OwnedFd, &'static OsStr)> {
        let (doing, new) = ("write", Path::new(layout::NEW_FILE));
        let wrap = |e| self.error(doing, new, e);
        let wanted = fs::fstat(parent).map_err(|e| self.error(doing, path, e))?;
        self.make_directories(Path::new(layout::OWN), None)?;
        let mut file = self.create_own(new, doing)?;
        match fs::fchown(&file, Some(Uid::from_raw(wanted.st_uid)), Some(Gid::from_raw(wanted.st_gid))) {
            // Only root may give files away.
            Err(Errno::PERM) => log::warn!("{} is not its registry's: not root", self.full(path).printable()),
            result => result.map_err(wrap)?,
        }
        fs::fchmod(&file, Mode::from_raw_mode(wanted.st_mode as RawMode & 0o666)).map_err(wrap)?;
        let written = file.write_all(content).and_then(|()| file.sync_all());
        written.map_err(|e| Error::io(doing, &self.full(path), e))?;
        match self.parent(new, doing)? {
            Some(place) => Ok(place),
            None => Err(wrap(Errno::NOENT)),
        }
    }

    fn kind(&self, path: &Path) -> Result<Option<Kind>> {
        let doing = "look at";
        let Some((parent, name)) = self.parent(path, doing)? else { return Ok(None) };
        match fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(kind_of(FileType::from_raw_mode(stat.st_mode as RawMode)))),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(self.error(doing, path, e)),
        }
    }

    fn open_file(&self, path: &Path) -> Result<Option<(File, Stat)>> {
        let doing = "open";
        // Non-blocking, so that a named pipe planted in the store can't hang us; no effect on regular files.
        let fd = match self.open_below(path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(self.error(doing, path, e)),
        };
        let stat = fs::fstat(&fd).map_err(|e| self.error(doing, path, e))?;
        expect_file(kind_of(FileType::from_raw_mode(stat.st_mode as RawMode)), self.full(path))?;
        Ok(Some((File::from(fd), stat_of(&stat))))
    }
}

/// Name of the reserve in our own directory.
const RESERVE: &str = "reserve";

fn is_full(error: &Error) -> bool {
    matches!(error.errno(), libc::ENOSPC | libc::EDQUOT)
}

/// The lock of a store; with it comes the reserve.
struct Locked {
    /// The lock ends when this is closed, after the reserve was made.
    _file: File,
    /// Our own directory.
    own: OwnedFd,
}

impl Locked {
    fn new(file: File, own: OwnedFd) -> Locked {
        let locked = Locked { _file: file, own };
        locked.make_reserve();
        locked
    }

    /// Makes the reserve, if it is not there. That there is no space for it, or no way to keep space on this
    /// filesystem, stops nobody.
    fn make_reserve(&self) {
        let is_whole = |stat: fs::Stat| {
            kind_of(FileType::from_raw_mode(stat.st_mode as RawMode)) == Kind::File
                && stat.st_nlink == 1
                && stat.st_size.max(0).unsigned_abs() >= RESERVE_BYTES
        };
        if fs::statat(&self.own, RESERVE, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(is_whole) {
            return;
        }
        // A part of one goes, and so does something planted: a named pipe would keep us waiting for a reader, another
        // name of a blob would grow. What can't go fails the next call.
        let _ = fs::unlinkat(&self.own, RESERVE, AtFlags::empty());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let reserve = match fs::openat(&self.own, RESERVE, flags, Mode::from_raw_mode(0o600)) {
            Ok(reserve) => reserve,
            Err(e) => return log::debug!("could not make the reserve for a full disk: {e}"),
        };
        if let Err(e) = fs::fallocate(&reserve, fs::FallocateFlags::empty(), 0, RESERVE_BYTES) {
            log::debug!("could not make the reserve for a full disk: {e}");
            // A part of it would hold the space that is missing; whether it goes, the next one sees.
            let _ = fs::unlinkat(&self.own, RESERVE, AtFlags::empty());
        }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        self.make_reserve();
    }
}

fn held_by(mut file: &File) -> Error {
    let mut holder = String::new();
    let holder = match file.read_to_string(&mut holder) {
        Ok(_) if !holder.trim().is_empty() => holder.trim(),
        // The name is a courtesy; who can't read it still learns that the store is locked.
        Ok(_) | Err(_) => "another regfs",
    };
    Error::Busy {
        why: format!("the store is being changed by {}; try again when it is done", holder.printable()),
    }
}

struct DiskFile(File);

impl Reader for DiskFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buffer, offset)
    }

    fn file(&self) -> Option<&File> {
        Some(&self.0)
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
        let reserve = disk.full(Path::new(".regfs/reserve"));
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
