//! A store on which calls fail when they are told to, and which keeps count of them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use regfs::error::{Error, Result};
use regfs::store::memory::Memory;
use regfs::store::{Entry, Reader, Space, Stat, Store};

/// Which calls fail. Calls are counted from 0.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Fault {
    /// None.
    Never,
    /// Only this call; it does nothing.
    GlitchAt(usize),
    /// This call and all after it; they do nothing.
    CutFrom(usize),
    /// Of the calls that change something, this one does its work and says that it failed.
    LateAt(usize),
    /// The process dies when this one of the calls that change something has done its work.
    DieAfter(usize),
    /// Every call on this path, as with a bad sector or a file of another user.
    Stuck(PathBuf),
}

/// A call that was made.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Call {
    pub(crate) name: &'static str,
    pub(crate) path: PathBuf,
    pub(crate) failed: bool,
}

#[derive(Default)]
struct Log {
    calls: Vec<Call>,
    changes: usize,
    is_dead: bool,
}

/// A store on which calls fail.
pub(crate) struct Faulty {
    inner: Arc<Memory>,
    fault: Fault,
    errno: i32,
    log: Mutex<Log>,
}

impl Faulty {
    pub(crate) fn new(inner: Arc<Memory>, fault: Fault, errno: i32) -> Arc<Faulty> {
        Arc::new(Faulty { inner, fault, errno, log: Mutex::default() })
    }

    /// Every call so far.
    pub(crate) fn calls(&self) -> Vec<Call> {
        self.log.lock().unwrap().calls.clone()
    }

    /// How many of them were made to change something.
    pub(crate) fn changes(&self) -> usize {
        self.log.lock().unwrap().changes
    }

    fn call<T>(&self, name: &'static str, path: &Path, act: impl FnOnce(&Memory) -> Result<T>) -> Result<T> {
        let is_change = matches!(
            name,
            "write"
                | "rename"
                | "remove"
                | "prune"
                | "remove directory"
                | "make directory"
                | "create"
                | "replace"
        );
        let mut log = self.log.lock().unwrap();
        let (call, change) = (log.calls.len(), log.changes);
        log.changes += usize::from(is_change);
        let fails = log.is_dead
            || match &self.fault {
                Fault::GlitchAt(at) => call == *at,
                Fault::CutFrom(at) => call >= *at,
                Fault::Stuck(stuck) => path == stuck,
                Fault::Never | Fault::LateAt(_) | Fault::DieAfter(_) => false,
            };
        let is_last = is_change && self.fault == Fault::DieAfter(change);
        let is_late = is_last || is_change && self.fault == Fault::LateAt(change);
        log.is_dead |= is_last;
        log.calls.push(Call { name, path: path.to_path_buf(), failed: fails || is_late });
        drop(log);
        let result = if fails { None } else { Some(act(&self.inner)) };
        match result {
            Some(result) if !is_late => result,
            _ => Err(Error::io(name, path, io::Error::from_raw_os_error(self.errno))),
        }
    }
}

impl Store for Faulty {
    fn list(&self, prefix: &Path) -> Result<Option<Vec<Entry>>> {
        self.call("list", prefix, |store| store.list(prefix))
    }

    fn stat(&self, path: &Path) -> Result<Option<Stat>> {
        self.call("stat", path, |store| store.stat(path))
    }

    fn read(&self, path: &Path, limit: usize) -> Result<Option<(Vec<u8>, Stat)>> {
        self.call("read", path, |store| store.read(path, limit))
    }

    fn open(&self, path: &Path) -> Result<Option<Box<dyn Reader>>> {
        self.call("open", path, |store| store.open(path))
    }

    fn write(&self, path: &Path, content: &[u8]) -> Result<()> {
        self.call("write", path, |store| store.write(path, content))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<bool> {
        self.call("rename", from, |store| store.rename(from, to))
    }

    /// Each path is a call of its own, so that a removal of many can fail or end in the middle.
    fn remove(&self, paths: &[PathBuf]) -> Vec<Error> {
        let remove = |path: &PathBuf| {
            self.call("remove", path, |store| {
                store.remove(std::slice::from_ref(path)).pop().map_or(Ok(()), Err)
            })
        };
        paths.iter().filter_map(|path| remove(path).err()).collect()
    }

    fn prune(&self, prefix: &Path) -> Result<()> {
        self.call("prune", prefix, |store| store.prune(prefix))
    }

    fn directory_changed(&self, path: &Path) -> Result<Option<SystemTime>> {
        self.call("look at directory", path, |store| store.directory_changed(path))
    }

    fn remove_directory(&self, path: &Path) -> Result<bool> {
        self.call("remove directory", path, |store| store.remove_directory(path))
    }

    fn make_directory(&self, path: &Path) -> Result<()> {
        self.call("make directory", path, |store| store.make_directory(path))
    }

    fn create(&self, path: &Path, content: &[u8]) -> Result<()> {
        self.call("create", path, |store| store.create(path, content))
    }

    fn replace(&self, path: &Path, content: &[u8], saved: &Path) -> Result<()> {
        self.call("replace", path, |store| store.replace(path, content, saved))
    }

    fn sync(&self) -> Result<()> {
        self.call("sync", Path::new(""), Store::sync)
    }

    fn lock(&self, who: &str, wait: Duration) -> Result<Box<dyn Send>> {
        self.call("lock", Path::new(""), |store| store.lock(who, wait))
    }

    fn is_writable(&self) -> bool {
        self.inner.is_writable()
    }

    fn space(&self) -> Result<Space> {
        self.call("space", Path::new(""), Store::space)
    }

    fn full(&self, path: &Path) -> PathBuf {
        self.inner.full(path)
    }
}
