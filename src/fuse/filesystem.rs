//! Answers the kernel from the engine.
//!
//! # Caching
//! The kernel keeps the pages of blobs, which never change. It keeps names, attributes and listings of what lasts until
//! it is told to forget (`cache.rs`), if the engine is told of changes; otherwise, and of everything else,
//! nothing, so that it never shows what is gone.
//!
//! # Consistency
//! A directory is listed once, when it is read from the start: offsets stay valid while `rm -r` empties it. What comes
//! from a listing that is not the newest any more is not to be kept. A generated file reads as it was when it was
//! opened.

mod changes;

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BackingId, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::cache::LASTING;
use super::passthrough::Passthrough;
use super::waiting;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::layout;
use crate::printable::Printable;
use crate::store::Reader;
use crate::trash::Author;
use crate::view::Snapshot;
use crate::view::attributes::Attributes;
use crate::view::node::{Node, Type};
use crate::view::stale::is_lasting;
use crate::view::tree::parse_reference;

/// How long the kernel may believe what it has to ask for anew.
const TTL: Duration = Duration::ZERO;
/// Longest name in bytes, as `statfs` says; the kernel passes longer ones on.
const NAME_MAX: usize = 255;
/// Longest command in bytes.
const COMMAND_LIMIT: usize = 4096;

/// The filesystem as fuser drives it.
pub struct RegistryFilesystem {
    engine: Arc<Engine>,
    handles: Mutex<HashMap<u64, Handle>>,
    next_handle: AtomicU64,
    passthrough: Passthrough,
}

/// What an open file or directory reads from.
#[derive(Clone)]
enum Handle {
    Directory(Option<Listing>),
    Text(Arc<[u8]>),
    /// Grows while it is open, so that `tail -f` sees what is added.
    Log,
    Bytes(Arc<dyn Reader>),
    /// The kernel reads by itself as long as this is there.
    Passthrough(#[expect(dead_code, reason = "it only has to live")] Arc<BackingId>),
}

/// A directory as it was read from the start.
#[derive(Clone)]
struct Listing {
    of: Arc<Snapshot>,
    entries: Arc<[(OsString, Node)]>,
}

impl RegistryFilesystem {
    /// A filesystem that shows what `engine` knows.
    pub fn new(engine: Arc<Engine>) -> RegistryFilesystem {
        RegistryFilesystem {
            engine,
            handles: Mutex::default(),
            next_handle: AtomicU64::new(1),
            passthrough: Passthrough::default(),
        }
    }

    fn handles(&self) -> MutexGuard<'_, HashMap<u64, Handle>> {
        // Inserts and removals leave the map whole.
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_handle(&self, handle: Handle) -> FileHandle {
        let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.handles().insert(number, handle);
        FileHandle(number)
    }

    fn handle(&self, handle: FileHandle) -> Option<Handle> {
        self.handles().get(&handle.0).cloned()
    }

    fn attributes(&self, snapshot: &Snapshot, node: Node) -> Result<Option<FileAttr>> {
        let size_of = |node| self.engine.text(snapshot, node).map_or(0, |text| text.len() as u64);
        let attributes = self.engine.view(snapshot).attributes(node, &size_of)?;
        Ok(attributes.map(|a| self.file_attr(node, &a)))
    }

    fn file_attr(&self, node: Node, attributes: &Attributes) -> FileAttr {
        let settings = self.engine.settings();
        FileAttr {
            ino: INodeNo(node.inode()),
            size: attributes.size,
            blocks: attributes.blocks,
            atime: attributes.modified,
            mtime: attributes.modified,
            ctime: attributes.modified,
            crtime: SystemTime::UNIX_EPOCH,
            kind: file_type(attributes.node_type),
            perm: attributes.mode,
            nlink: attributes.links,
            uid: settings.uid,
            gid: settings.gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// How long the kernel may believe what it is told of a node.
    fn ttl(&self, snapshot: &Snapshot, node: Node) -> Duration {
        if self.engine.is_watching() && is_lasting(snapshot, node) { LASTING } else { TTL }
    }

    /// What `name` in a directory is; without attributes, when there is no such name and the kernel may believe that.
    fn find(&self, parent: INodeNo, name: &OsStr) -> Result<(Option<FileAttr>, Duration)> {
        let missing = || Error::NotFound { what: name.printable().to_string() };
        let parent = Node::of_inode(parent.0).ok_or_else(missing)?;
        let mut snapshot = self.engine.snapshot();
        let mut node = self.engine.view(&snapshot).lookup(parent, name)?;
        if node.is_none() {
            self.engine.catch_up();
            snapshot = self.engine.snapshot();
            node = self.engine.view(&snapshot).lookup(parent, name)?;
        }
        let attributes = match node {
            Some(node) => self.attributes(&snapshot, node)?.map(|attr| (attr, self.ttl(&snapshot, node))),
            None => None,
        };
        match attributes {
            Some((attr, ttl)) => Ok((Some(attr), ttl)),
            // An image reference is not listed, so nobody is told when it comes to mean something.
            None if parse_reference(name).is_none() && self.ttl(&snapshot, parent) > TTL => {
                Ok((None, LASTING))
            }
            None => Err(missing()),
        }
    }

    fn stat(&self, inode: INodeNo) -> Result<(FileAttr, Duration)> {
        let missing = || Error::NotFound { what: format!("inode {inode}") };
        let node = Node::of_inode(inode.0).ok_or_else(missing)?;
        let snapshot = self.engine.snapshot();
        let attr = self.attributes(&snapshot, node)?.ok_or_else(missing)?;
        Ok((attr, self.ttl(&snapshot, node)))
    }

    fn list(&self, inode: INodeNo) -> Result<Listing> {
        let missing = || Error::NotFound { what: format!("inode {inode}") };
        let node = Node::of_inode(inode.0).ok_or_else(missing)?;
        let snapshot = self.engine.snapshot();
        let listed = self.engine.view(&snapshot).list(node)?.ok_or_else(missing)?;
        let mut entries = Vec::with_capacity(listed.len() + 2);
        entries.push((".".into(), node));
        // The kernel knows the way up by itself; the number only has to be there.
        entries.push(("..".into(), Node::Root));
        entries.extend(listed);
        Ok(Listing { of: snapshot, entries: entries.into() })
    }

    /// The listing that a read at `offset` goes on with; a new one at the start.
    fn listing(&self, inode: INodeNo, handle: FileHandle, offset: u64) -> Result<Listing> {
        if offset > 0
            && let Some(Handle::Directory(Some(listing))) = self.handle(handle)
        {
            return Ok(listing);
        }
        let listing = self.list(inode)?;
        if let Some(open) = self.handles().get_mut(&handle.0) {
            *open = Handle::Directory(Some(listing.clone()));
        }
        Ok(listing)
    }

    fn target(&self, inode: INodeNo) -> Result<std::path::PathBuf> {
        let snapshot = self.engine.snapshot();
        let target = Node::of_inode(inode.0).and_then(|node| self.engine.view(&snapshot).target(node));
        target.ok_or_else(|| Error::NotFound { what: format!("inode {inode}") })
    }

    fn open_file(&self, inode: INodeNo, mode: OpenAccMode) -> Result<(Handle, FopenFlags)> {
        let missing = || Error::NotFound { what: format!("inode {inode}") };
        let node = Node::of_inode(inode.0).ok_or_else(missing)?;
        let is_writable = self.engine.is_command(node) && !self.engine.settings().read_only;
        if mode != OpenAccMode::O_RDONLY && !is_writable {
            return Err(Error::ReadOnly);
        }
        let snapshot = self.engine.snapshot();
        if let Some(path) = self.bytes_of(&snapshot, node) {
            let reader = self.engine.store().open(&path)?;
            let reader: Arc<dyn Reader> = match reader {
                Some(reader) => reader.into(),
                // A manifest without bytes is shown as an empty file; anything else is gone.
                None if matches!(node, Node::Blob(_) | Node::Upload(..)) => {
                    return Ok((Handle::Text(Arc::default()), FopenFlags::FOPEN_DIRECT_IO));
                }
                None => return Err(missing()),
            };
            let flags = match node {
                // Content under a digest never changes.
                Node::Blob(_) | Node::Garbage(_) => FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
                _ => FopenFlags::FOPEN_NOFLUSH,
            };
            return Ok((Handle::Bytes(reader), flags));
        }
        let text = self.engine.text(&snapshot, node).ok_or_else(missing)?;
        let handle = if node == Node::ControlLog { Handle::Log } else { Handle::Text(text) };
        // Its size may differ from what stat said a moment ago.
        Ok((handle, FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH))
    }

    /// Makes a change on a thread of its own: it may wait for another regfs, and there are few threads that answer.
    fn change(
        &self,
        parent: INodeNo,
        name: &OsStr,
        reply: ReplyEmpty,
        act: impl FnOnce(&Arc<Engine>, Node, &OsStr) -> Result<()> + Send + 'static,
    ) {
        let Some(parent) = Node::of_inode(parent.0) else { return reply.error(Errno::ENOENT) };
        let (engine, name) = (self.engine.clone(), name.to_os_string());
        changes::in_background(move || match guarded(|| act(&engine, parent, &name)) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(&e)),
        });
    }

    /// The file in the store that a node shows.
    fn bytes_of(&self, snapshot: &Snapshot, node: Node) -> Option<std::path::PathBuf> {
        match node {
            Node::Blob(id) | Node::Garbage(id) => {
                snapshot.catalog.tables.digests.checked(id).map(|d| layout::blob_data(&d))
            }
            Node::Upload(upload, repository) => {
                Some(layout::upload_data(&snapshot.path(repository)?, &snapshot.name(upload)?))
            }
            Node::Trashed(path) => Some(Path::new(layout::TRASH).join(snapshot.plain_path(path)?)),
            _ => None,
        }
    }
}

/// Answers a call; a panic is a bug of ours, which must not take the mount down with it.
fn guarded<T>(answer: impl FnOnce() -> Result<T>) -> Result<T> {
    // What a panic may leave half-done stands behind locks whose holders expect that.
    catch_unwind(AssertUnwindSafe(answer)).unwrap_or_else(|_| {
        let broken = std::io::Error::from_raw_os_error(libc::EIO);
        Err(Error::io("answer, because of a bug in regfs,", Path::new("a call of the kernel"), broken))
    })
}

/// Who sent a request, for the log and for `txn.json`.
fn author(request: &Request, fallback: &str) -> Author {
    let pid = request.pid();
    // For people only: a process that is gone, or one in another pid namespace, has no command line to show.
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<String> = command
        .split(|b| *b == 0)
        .filter(|word| !word.is_empty())
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    let command = match words.join(" ") {
        words if words.is_empty() => fallback.to_string(),
        words => words.chars().take(300).collect(),
    };
    Author { uid: request.uid(), pid, command }
}

fn file_type(node_type: Type) -> FileType {
    match node_type {
        Type::Directory => FileType::Directory,
        Type::File => FileType::RegularFile,
        Type::Symlink => FileType::Symlink,
    }
}

/// The errno of an error, which goes to the log where it is not an everyday answer.
fn errno(error: &Error) -> Errno {
    match error {
        Error::NotFound { .. } | Error::ReadOnly | Error::NotPermitted { .. } | Error::NotEmpty { .. } => {
            log::debug!("{error}");
        }
        _ => log::warn!("{error}"),
    }
    Errno::from_i32(error.errno())
}

impl Filesystem for RegistryFilesystem {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Refused means not offered by this kernel; everything works without, only slower.
        let mut add = |flag: InitFlags| match config.add_capabilities(flag) {
            Ok(()) => true,
            Err(refused) => {
                log::info!("the kernel does not offer {refused:?}");
                false
            }
        };
        add(InitFlags::FUSE_PARALLEL_DIROPS);
        add(InitFlags::FUSE_DO_READDIRPLUS);
        add(InitFlags::FUSE_CACHE_SYMLINKS);
        // Blobs may lie on a filesystem that is itself made of others.
        if add(InitFlags::FUSE_PASSTHROUGH) && config.set_max_stack_depth(2).is_ok() {
            self.passthrough.is_offered();
        }
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name.len() > NAME_MAX {
            return reply.error(Errno::ENAMETOOLONG);
        }
        match guarded(|| self.find(parent, name)) {
            Ok((Some(attr), ttl)) => reply.entry(&ttl, &attr, Generation(0)),
            // Number 0 is "no such name", and may be kept as long.
            Ok((None, ttl)) => reply.entry(&ttl, &NOTHING, Generation(0)),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match guarded(|| self.stat(inode)) {
            Ok((attr, ttl)) => reply.attr(&ttl, &attr),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn setattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        // `echo x > file` truncates before it writes; a command file has nothing to truncate.
        let is_command = Node::of_inode(inode.0).is_some_and(|node| self.engine.is_command(node));
        let only_truncates = size.is_some() && mode.is_none() && uid.is_none() && gid.is_none();
        // `cp -a` and `rsync -a` give their copy the owner and the mode, which it has, and the times, in the place of which
        // tags and what they stand in have those of pushes, and a command file, which `cp` and editors write to, the present.
        let is_copied = Node::of_inode(inode.0).is_some_and(is_copied);
        let changes_nothing = |attr: &FileAttr| {
            let has_owner = uid.is_none_or(|uid| uid == attr.uid) && gid.is_none_or(|gid| gid == attr.gid);
            let has_mode = mode.is_none_or(|mode| mode & 0o7777 == u32::from(attr.perm));
            (is_copied || is_command) && has_owner && has_mode && size.is_none()
        };
        match guarded(|| self.stat(inode)) {
            Ok((attr, _))
                if (is_command && only_truncates || changes_nothing(&attr))
                    && !self.engine.settings().read_only =>
            {
                reply.attr(&TTL, &attr);
            }
            Ok(_) => reply.error(Errno::EROFS),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn readlink(&self, _request: &Request, inode: INodeNo, reply: ReplyData) {
        match guarded(|| self.target(inode)) {
            Ok(target) => reply.data(target.as_os_str().as_encoded_bytes()),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn open(&self, _request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match guarded(|| self.open_file(inode, flags.acc_mode())) {
            Ok((handle, flags)) => {
                let file = match &handle {
                    Handle::Bytes(reader) if Node::of_inode(inode.0).is_some_and(is_blob) => reader.file(),
                    _ => None,
                };
                match file.and_then(|file| self.passthrough.number(inode, file, &reply)) {
                    Some(number) => {
                        let handle = self.open_handle(Handle::Passthrough(number.clone()));
                        reply.opened_passthrough(handle, FopenFlags::FOPEN_NOFLUSH, &number);
                    }
                    None => reply.opened(self.open_handle(handle), flags),
                }
            }
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.handle(handle) {
            Some(handle @ (Handle::Text(_) | Handle::Log)) => {
                let text = match handle {
                    Handle::Text(text) => text,
                    _ => self.engine.control_text(Node::ControlLog).unwrap_or_default(),
                };
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
                let end = start.saturating_add(size as usize).min(text.len());
                reply.data(&text[start..end]);
            }
            Some(Handle::Bytes(reader)) => match read_full(&*reader, offset, size as usize) {
                Ok(bytes) => reply.data(&bytes),
                Err(e) => {
                    log::warn!("could not read {_inode}: {e}");
                    reply.error(e.into());
                }
            },
            Some(Handle::Directory(_) | Handle::Passthrough(_)) | None => reply.error(Errno::EBADF),
        }
    }

    fn write(
        &self,
        request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        _offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let (Some(node), true) = (Node::of_inode(inode.0), data.len() <= COMMAND_LIMIT) else {
            return reply.error(Errno::EINVAL);
        };
        let text = String::from_utf8_lossy(data).into_owned();
        // The command line of a shell says nothing; what it wrote does.
        let author = Author { uid: request.uid(), pid: request.pid(), command: text.trim().to_string() };
        waiting::command(self.engine.clone(), node, text, author, data.len() as u32, reply);
    }

    /// Shells and editors ask whether it is a terminal.
    fn ioctl(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _input: &[u8],
        _output: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn flush(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn fsync(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn release(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.handles().remove(&handle.0);
        reply.ok();
    }

    fn opendir(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let ttl = match Node::of_inode(inode.0) {
            Some(node) => self.ttl(&self.engine.snapshot(), node),
            None => return reply.error(Errno::ENOENT),
        };
        let flags = match ttl {
            TTL => FopenFlags::empty(),
            _ => FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE,
        };
        reply.opened(self.open_handle(Handle::Directory(None)), flags);
    }

    fn readdir(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let read = || {
            let listing = self.listing(inode, handle, offset)?;
            let view = self.engine.view(&listing.of);
            for (at, (name, node)) in from(&listing, offset) {
                let Some(node_type) = view.type_of(*node)? else { continue };
                if reply.add(INodeNo(node.inode()), at, file_type(node_type), name) {
                    break;
                }
            }
            Ok(())
        };
        match guarded(read) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn readdirplus(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let read = || {
            let listing = self.listing(inode, handle, offset)?;
            let snapshot = self.engine.snapshot();
            // Names of an older listing may be gone, and nobody will say so again.
            let is_newest = Arc::ptr_eq(&snapshot, &listing.of);
            for (at, (name, node)) in from(&listing, offset) {
                let Some(attr) = self.attributes(&snapshot, *node)? else { continue };
                let ttl = if is_newest { self.ttl(&snapshot, *node) } else { TTL };
                if reply.add(INodeNo(node.inode()), at, name, &ttl, &attr, Generation(0)) {
                    break;
                }
            }
            Ok(())
        };
        match guarded(read) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn releasedir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.handles().remove(&handle.0);
        reply.ok();
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let author = author(request, "rm");
        self.change(parent, name, reply, move |engine, parent, name| engine.unlink(parent, name, &author));
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let author = author(request, "rmdir");
        self.change(parent, name, reply, move |engine, parent, name| engine.rmdir(parent, name, &author));
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let (author, text) = (author(request, "ln"), target.to_path_buf());
        self.make(parent, name, reply, move |engine, parent, name| {
            engine.symlink(parent, name, &text, &author)
        });
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let author = author(request, "mkdir");
        self.make(parent, name, reply, move |engine, parent, name| engine.mkdir(parent, name, &author));
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let Some(new_parent) = Node::of_inode(new_parent.0) else { return reply.error(Errno::ENOENT) };
        if !RenameFlags::RENAME_NOREPLACE.contains(flags) {
            return reply.error(Errno::EINVAL);
        }
        let (author, new_name) = (author(request, "mv"), new_name.to_os_string());
        self.change(parent, name, reply, move |engine, parent, name| {
            engine.rename((parent, name), (new_parent, &new_name), flags.is_empty(), &author)
        });
    }

    // Everything below is read-only, said in the errno that each tool explains best: never EXDEV, after which
    // `mv` would copy and delete.

    fn mknod(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn link(&self, _request: &Request, _inode: INodeNo, _parent: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn create(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: fuser::ReplyCreate,
    ) {
        reply.error(Errno::EROFS);
    }

    // The kernel asks once and never again, instead of twice for each file of an `ls -l`.

    fn getxattr(&self, _request: &Request, _inode: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _request: &Request, _inode: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _request: &Request, _inode: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        match self.engine.store().space() {
            Ok(s) => reply.statfs(
                s.blocks,
                s.free,
                s.available,
                s.files,
                s.files_free,
                s.block_size,
                NAME_MAX as u32,
                s.block_size,
            ),
            Err(e) => reply.error(errno(&e)),
        }
    }
}

/// The entries from `offset` on, each with the offset behind it.
fn from(listing: &Listing, offset: u64) -> impl Iterator<Item = (u64, &(OsString, Node))> {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    listing.entries.iter().enumerate().skip(start).map(|(at, entry)| (at as u64 + 1, entry))
}

/// What `cp -a` of tags and repositories makes or meets.
fn is_copied(node: Node) -> bool {
    matches!(
        node,
        Node::Images
            | Node::Namespace(_)
            | Node::Tags(_)
            | Node::Revisions(_)
            | Node::RevisionsOf(..)
            | Node::Uploads(_)
            | Node::Tag(..)
            | Node::TagReference(..)
    )
}

fn is_blob(node: Node) -> bool {
    matches!(node, Node::Blob(_) | Node::Garbage(_))
}

/// What a name that is not there is: the kernel looks at nothing but the number.
const NOTHING: FileAttr = FileAttr {
    ino: INodeNo(0),
    size: 0,
    blocks: 0,
    atime: SystemTime::UNIX_EPOCH,
    mtime: SystemTime::UNIX_EPOCH,
    ctime: SystemTime::UNIX_EPOCH,
    crtime: SystemTime::UNIX_EPOCH,
    kind: FileType::RegularFile,
    perm: 0,
    nlink: 0,
    uid: 0,
    gid: 0,
    rdev: 0,
    blksize: 0,
    flags: 0,
};

/// Reads `size` bytes at `offset`, fewer only at the end of the file.
fn read_full(reader: &dyn Reader, offset: u64, size: usize) -> std::io::Result<Vec<u8>> {
    let mut buffer = vec![0; size];
    let mut filled = 0;
    while filled < size {
        match reader.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    buffer.truncate(filled);
    Ok(buffer)
}
