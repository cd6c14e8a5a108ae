//! Mounts and unmounts.
//!
//! As root regfs calls mount(2) by itself and hands the descriptor to fuser: fuser 0.18 unmounts whatever is on
//! top when its own mount is gone already, and can't unmount one that is busy. Other users mount through
//! fusermount3.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fuser::{Config, MountOption, Session, SessionACL};
use rustix::mount::{MountFlags, UnmountFlags};
use signal_hook::consts::TERM_SIGNALS;
use signal_hook::iterator::Signals;

use super::cache::Forgetting;
use super::filesystem::RegistryFilesystem;
use crate::engine::Engine;
use crate::error::{Error, Result};

/// The type of our mounts in `/proc/self/mountinfo`.
const FILESYSTEM_TYPE: &str = "fuse.regfs";
const THREADS: usize = 4;
/// How long `umount` waits for the daemon to end.
const DAEMON_ENDS: Duration = Duration::from_secs(10);

/// How to mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// What `mount` and `df` show as the source.
    pub source: PathBuf,
    /// Where; absolute.
    pub mountpoint: PathBuf,
    /// Nothing can be changed through it.
    pub read_only: bool,
    /// Other users than the one who mounts may look.
    pub allow_other: bool,
}

/// A mount that is being served.
pub struct Mounted {
    session: JoinHandle<std::io::Result<()>>,
    signals: Signals,
    mountpoint: PathBuf,
    /// What tells this mount from others on the same directory.
    device: Option<Vec<u8>>,
}

/// Mounts, and serves on threads of its own; returns when the mount answers.
pub fn mount(engine: Arc<Engine>, options: &MountOptions) -> Result<Mounted> {
    let mountpoint = &options.mountpoint;
    clear_mountpoint(mountpoint)?;
    let filesystem = RegistryFilesystem::new(engine.clone());
    // Before the mount: whoever is told to end from now on must not leave a dead one.
    let signals = Signals::new(TERM_SIGNALS).map_err(|e| Error::io("wait for signals for", mountpoint, e))?;
    let session = match rustix::process::geteuid().is_root() {
        true => mount_directly(filesystem, options)?,
        false => mount_through_helper(filesystem, options)?,
    };
    engine.set_listener(Arc::new(Forgetting::start(session.notifier())?));
    let serve = move || session.run();
    let session = std::thread::Builder::new().name("session".into()).spawn(serve);
    let session = session.map_err(|e| Error::io("serve", mountpoint, e))?;
    std::fs::metadata(mountpoint).map_err(|e| Error::io("look at the mount", mountpoint, e))?;
    let device = topmost(mountpoint)?.map(|mount| mount.device);
    Ok(Mounted { session, signals, mountpoint: mountpoint.clone(), device })
}

impl Mounted {
    /// Unmounts when the process is told to end, and returns when the last user is gone.
    pub fn serve(self, engine: &Engine) -> Result<()> {
        let (mountpoint, device) = (self.mountpoint.clone(), self.device.clone());
        let mut signals = self.signals;
        let handle = signals.handle();
        let watch = std::thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in signals.forever() {
                log::info!("signal {signal}: unmounting {}", mountpoint.display());
                let unmounted = match topmost(&mountpoint) {
                    // Ours is gone already, or somebody mounted over it: that one is not ours to take away.
                    Ok(mount) if mount.as_ref().map(|m| &m.device) != device.as_ref() => {
                        log::warn!("something else is mounted on {}: left alone", mountpoint.display());
                        Ok(())
                    }
                    Ok(_) => unmount_lazily(&mountpoint),
                    Err(e) => Err(e),
                };
                if let Err(e) = unmounted {
                    log::error!("{e}");
                }
            }
        });
        let watch = watch.map_err(|e| Error::io("start a thread for", &self.mountpoint, e))?;
        let ended = self.session.join();
        engine.end();
        handle.close();
        // Only prints; a panic in it is in the log already.
        let _ = watch.join();
        match ended {
            Ok(result) => result.map_err(|e| Error::io("serve", &self.mountpoint, e)),
            Err(_) => Err(Error::io("serve", &self.mountpoint, std::io::Error::other("a thread panicked"))),
        }
    }
}

/// Makes sure that we can mount there: takes away the dead mount of a regfs that was killed.
fn clear_mountpoint(mountpoint: &Path) -> Result<()> {
    let is_ours = is_mounted(mountpoint)?;
    // The kernel may remember what a dead one looked like, but not how much space it had.
    let answers = rustix::fs::statfs(mountpoint).map_err(std::io::Error::from);
    match answers.and_then(|_| std::fs::metadata(mountpoint)) {
        Err(e) if is_dead(&e) && is_ours => {
            log::info!("{} is the dead mount of a regfs that was killed; replacing it", mountpoint.display());
            unmount_lazily(mountpoint)
        }
        Err(e) => Err(Error::io("mount on", mountpoint, e)),
        Ok(_) if is_ours => Err(Error::Busy {
            why: format!(
                "a regfs is mounted on {} already; unmount it first: regfs umount {}",
                mountpoint.display(),
                mountpoint.display()
            ),
        }),
        Ok(metadata) if !metadata.is_dir() => {
            Err(Error::io("mount on", mountpoint, std::io::Error::from_raw_os_error(libc::ENOTDIR)))
        }
        Ok(_) => Ok(()),
    }
}

/// What a mount answers whose daemon is gone, or is just going.
fn is_dead(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED))
}

fn config(options: &MountOptions) -> Config {
    let mut config = Config::default();
    config.acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    config
}

fn mount_directly(
    filesystem: RegistryFilesystem,
    options: &MountOptions,
) -> Result<Session<RegistryFilesystem>> {
    let device = Path::new("/dev/fuse");
    let file = OpenOptions::new().read(true).write(true).open(device);
    let file = file.map_err(|e| Error::io("open (is the fuse module loaded?)", device, e))?;
    let mut data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions",
        file.as_raw_fd(),
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    if options.allow_other {
        data += ",allow_other";
    }
    let data = CString::new(data).map_err(|e| Error::io("mount on", &options.mountpoint, e))?;
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOATIME;
    if options.read_only {
        flags |= MountFlags::RDONLY;
    }
    rustix::mount::mount(&options.source, &options.mountpoint, FILESYSTEM_TYPE, flags, data.as_c_str())
        .map_err(|e| Error::io("mount on", &options.mountpoint, e))?;
    let acl = config(options).acl;
    Session::from_fd(filesystem, file.into(), acl, config(options)).map_err(|e| {
        if let Err(undo) = unmount_lazily(&options.mountpoint) {
            log::error!("{undo}");
        }
        Error::io("serve", &options.mountpoint, e)
    })
}

fn mount_through_helper(
    filesystem: RegistryFilesystem,
    options: &MountOptions,
) -> Result<Session<RegistryFilesystem>> {
    let mut config = config(options);
    config.mount_options = vec![
        MountOption::FSName(options.source.display().to_string()),
        MountOption::Subtype("regfs".to_string()),
        MountOption::DefaultPermissions,
        MountOption::NoSuid,
        MountOption::NoDev,
        MountOption::NoExec,
        MountOption::NoAtime,
    ];
    if options.read_only {
        config.mount_options.push(MountOption::RO);
    }
    Session::new(filesystem, &options.mountpoint, &config).map_err(|e| {
        Error::io("mount (through fusermount3, from the package fuse3) on", &options.mountpoint, e)
    })
}

/// Takes the name of a mount away at once; who is inside may stay until they leave.
fn unmount_lazily(mountpoint: &Path) -> Result<()> {
    match rustix::process::geteuid().is_root() {
        true => rustix::mount::unmount(mountpoint, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            .map_err(|e| Error::io("unmount", mountpoint, e)),
        false => fusermount(mountpoint, &["-u", "-z"]),
    }
}

fn fusermount(mountpoint: &Path, flags: &[&str]) -> Result<()> {
    let output = Command::new("fusermount3").args(flags).arg("--").arg(mountpoint).output();
    let output =
        output.map_err(|e| Error::io("run fusermount3 (from the package fuse3) for", mountpoint, e))?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
            Err(Error::io("unmount", mountpoint, std::io::Error::other(said)))
        }
    }
}

/// Unmounts a regfs and waits for its daemon to end.
pub fn umount(mountpoint: &Path) -> Result<()> {
    if !is_mounted(mountpoint)? {
        return Err(Error::invalid(format!("no regfs is mounted on {}", mountpoint.display())));
    }
    let daemon = daemon_of(mountpoint);
    let unmounted = match rustix::process::geteuid().is_root() {
        true => rustix::mount::unmount(mountpoint, UnmountFlags::NOFOLLOW)
            .map_err(|e| Error::io("unmount", mountpoint, e)),
        false => fusermount(mountpoint, &["-u"]),
    };
    unmounted.map_err(|e| match e.errno() {
        libc::EBUSY => Error::Busy {
            why: format!(
                "{} is in use: leave it (cd) and close its files, then try again; `umount -l` takes only its name away",
                mountpoint.display()
            ),
        },
        _ => e,
    })?;
    let deadline = Instant::now() + DAEMON_ENDS;
    while daemon.is_some_and(is_alive) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Whether a process exists and is no zombie.
fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or("").trim_start().starts_with('Z'))
}

/// The process that serves a mount; `None` when it doesn't answer, which is no obstacle to unmounting.
fn daemon_of(mountpoint: &Path) -> Option<u32> {
    let status = std::fs::read(mountpoint.join("control/status")).ok()?;
    let status: serde_json::Value = serde_json::from_slice(&status).ok()?;
    status.get("pid")?.as_u64()?.try_into().ok()
}

/// Whether the topmost mount on `mountpoint` is a regfs, alive or dead.
fn is_mounted(mountpoint: &Path) -> Result<bool> {
    Ok(topmost(mountpoint)?.is_some_and(|mount| mount.is_regfs))
}

/// A line of mountinfo.
struct MountEntry {
    /// `major:minor`.
    device: Vec<u8>,
    is_regfs: bool,
}

/// The topmost mount on `mountpoint`; `None` when nothing is mounted there.
fn topmost(mountpoint: &Path) -> Result<Option<MountEntry>> {
    let table = Path::new("/proc/self/mountinfo");
    let text = std::fs::read(table).map_err(|e| Error::io("read", table, e))?;
    let mut topmost = None;
    for line in text.split(|b| *b == b'\n') {
        let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
        let place = fields.get(4).map(|field| unescape(field));
        if place.as_deref() == Some(mountpoint) {
            let after_dash = fields.iter().position(|f| *f == b"-").and_then(|at| fields.get(at + 1));
            let is_regfs = after_dash.is_some_and(|kind| *kind == FILESYSTEM_TYPE.as_bytes());
            let device = fields.get(2).map_or_else(Vec::new, |device| device.to_vec());
            topmost = Some(MountEntry { device, is_regfs });
        }
    }
    Ok(topmost)
}

/// Reads the octal escapes of mountinfo (proc(5)): `\040` is a blank.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| *first == b'\\').and_then(|o| std::str::from_utf8(o).ok());
        match octal.and_then(|o| u8::from_str_radix(o, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

/// The name under which the kernel knows a mountpoint: absolute, without symlinks on the way; the last component is
/// not looked at, since the mount on it may be dead.
pub fn absolute(mountpoint: &Path) -> Result<PathBuf> {
    let error = |e| Error::io("find the mountpoint", mountpoint, e);
    match mountpoint.canonicalize() {
        Ok(path) => Ok(path),
        Err(e) if is_dead(&e) => {
            let path = std::path::absolute(mountpoint).map_err(error)?;
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
                return Ok(path);
            };
            Ok(parent.canonicalize().map_err(error)?.join(name))
        }
        Err(e) => Err(error(e)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn mountinfo_escapes_are_read() {
        assert_eq!(unescape(b"/a\\040b\\134c\\011"), Path::new("/a b\\c\t"));
        assert_eq!(unescape(b"/a\\04"), Path::new("/a\\04"));
        assert_eq!(unescape("/ä".as_bytes()).as_os_str().as_bytes(), "/ä".as_bytes());
    }
}
