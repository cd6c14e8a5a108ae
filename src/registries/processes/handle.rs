//! One process as `/proc/<pid>` shows it (proc(5)).

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, Statx, StatxFlags, openat, readlinkat, statx};

use super::writers::Credentials;
use crate::registry_config::Variables;

/// What a process is started with may be a few MiB; nothing else that is read here comes near it.
const LIMIT: u64 = 16 << 20;

/// The directory of a process, opened once: when the process has ended, every further question fails. None is ever
/// answered by another process that got the same number.
pub(super) struct Handle {
    pub(super) pid: u32,
    directory: OwnedFd,
}

impl Handle {
    /// The process with a number.
    pub(super) fn open(pid: u32) -> io::Result<Handle> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(format!("/proc/{pid}"), flags, Mode::empty())?;
        Ok(Handle { pid, directory })
    }

    /// This process, by its number in the table, which may be that of another namespace than ours.
    pub(super) fn ours() -> io::Result<Handle> {
        let pid = std::fs::read_link("/proc/self")?.to_str().and_then(|pid| pid.parse().ok());
        Handle::open(pid.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?)
    }

    /// Opens one of the files in it, or what one of its magic links leads to.
    pub(super) fn open_file(&self, name: &str, flags: OFlags) -> io::Result<File> {
        Ok(openat(&self.directory, name, flags | OFlags::CLOEXEC, Mode::empty())?.into())
    }

    /// The content of one of the files that the kernel makes.
    pub(super) fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        self.open_file(name, OFlags::RDONLY)?.take(LIMIT).read_to_end(&mut content)?;
        Ok(content)
    }

    /// Where a magic link leads.
    pub(super) fn link(&self, name: &str) -> io::Result<PathBuf> {
        let target = readlinkat(&self.directory, name, Vec::new())?;
        Ok(OsString::from_vec(target.into_bytes()).into())
    }

    /// Facts of what a magic link leads to, as far as the kernel knows them: no server of a filesystem is asked.
    pub(super) fn facts(&self, name: &str) -> io::Result<Statx> {
        let wanted = StatxFlags::INO | StatxFlags::TYPE;
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        Ok(statx(&self.directory, name, flags, wanted)?)
    }

    /// The names in one of its directories.
    pub(super) fn names(&self, name: &str) -> io::Result<Vec<String>> {
        let directory = self.open_file(name, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut names = Vec::new();
        for entry in Dir::read_from(directory)? {
            let entry = entry?;
            names.extend(entry.file_name().to_str().ok().filter(|n| !n.starts_with('.')).map(String::from));
        }
        Ok(names)
    }

    /// Whose it is, and whose child.
    pub(super) fn credentials(&self) -> io::Result<Credentials> {
        Credentials::parse(&String::from_utf8_lossy(&self.read("status")?))
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    }

    /// The words that it was started with.
    pub(super) fn words(&self) -> io::Result<Vec<OsString>> {
        Ok(split(&self.read("cmdline")?))
    }

    /// The variables that it was started with.
    pub(super) fn variables(&self) -> io::Result<Variables> {
        Ok(split(&self.read("environ")?).iter().filter_map(|pair| variable(pair)).collect())
    }

    /// Whether it sees the root directory that we see; not, if that can't be told.
    pub(super) fn has_our_root(&self) -> bool {
        let ours = Handle::ours().and_then(|us| us.identity("root"));
        ours.is_ok_and(|ours| self.identity("root").is_ok_and(|root| root == ours))
    }

    /// Device and inode of what a magic link leads to.
    pub(super) fn identity(&self, name: &str) -> io::Result<(u32, u32, u64)> {
        let facts = self.facts(name)?;
        Ok((facts.stx_dev_major, facts.stx_dev_minor, facts.stx_ino))
    }

    /// A moment, as time since boot, at which the program that runs now had begun, and had read nothing yet.
    ///
    /// The kernel tells when a process or thread was made, and nothing of exec(2), after which a process is as old as
    /// before. But exec ends all threads except one, so every other thread that there is was made by the program that
    /// runs now; and the runtime of Go makes one, which never ends, before any code of the program runs. The oldest of
    /// the others is therefore as old as that one or older. Without others the process itself is what is known: it was made
    /// before whatever it runs.
    ///
    /// Threads are told in ticks of 10 ms, rounded down, so this may be a tick too early. Registries read their
    /// configuration 7 to 11 ms after that thread was made (2.8.2, idle machine), so one tick later is not later than that
    /// by more than a tick either; the caller adds it.
    pub(super) fn began(&self) -> io::Result<Began> {
        let main = start_of(&self.read("stat")?)?;
        let others = self.names("task")?.into_iter().filter(|id| *id != self.pid.to_string());
        // A thread that ends meanwhile was not the one that never does.
        let others = others.filter_map(|id| start_of(&self.read(&format!("task/{id}/stat")).ok()?).ok());
        Ok(others
            .min()
            .map_or(Began { at: main, is_of_program: false }, |at| Began { at, is_of_program: true }))
    }
}

/// When something began.
pub(super) struct Began {
    /// Time since boot, in whole ticks.
    pub(super) at: Duration,
    /// It is the program that runs now, and not just the process.
    pub(super) is_of_program: bool,
}

/// When a process or thread was made.
fn start_of(stat: &[u8]) -> io::Result<Duration> {
    let stat = String::from_utf8_lossy(stat);
    // The name of the program may hold anything; it ends with the last parenthesis.
    let ticks = || stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse::<u64>().ok();
    let ticks = ticks().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(Duration::from_millis(ticks.saturating_mul(1000) / rustix::param::clock_ticks_per_second().max(1)))
}

fn split(text: &[u8]) -> Vec<OsString> {
    let words = text.split(|byte| *byte == 0).filter(|word| !word.is_empty());
    words.map(|word| OsString::from_vec(word.to_vec())).collect()
}

/// `name=value`
fn variable(pair: &OsStr) -> Option<(OsString, OsString)> {
    let at = pair.as_bytes().iter().position(|byte| *byte == b'=')?;
    let (name, value) = pair.as_bytes().split_at(at);
    Some((OsStr::from_bytes(name).to_os_string(), OsStr::from_bytes(value.get(1..)?).to_os_string()))
}

/// The file name of a path, as text.
pub(super) fn base_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
