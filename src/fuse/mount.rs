//! Mounts and unmounts.
//!
//! As root regfs mounts by itself (`attach`) and hands the descriptor to fuser: fuser 0.18 unmounts whatever is on
//! top when its own mount is gone already, and can't unmount one that is busy. Other users mount through
//! fusermount3.

mod attach;
pub mod guardian;
mod place;
mod table;
mod umount;
mod users;

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use fuser::{Config, MountOption, Session, SessionACL};
use rustix::fs::{Access, access};
use rustix::io::Errno;
use sd_notify::NotifyState;
use signal_hook::consts::TERM_SIGNALS;
use signal_hook::iterator::Signals;

use self::guardian::Charge;
use self::place::Identity;
pub use self::table::absolute;
use self::table::{is_mounted, topmost};
use self::umount::unmount_lazily;
pub use self::umount::{Left, umount};
use super::cache::Forgetting;
use super::filesystem::RegistryFilesystem;
use crate::advice::quoted;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::printable::Printable;

const THREADS: usize = 4;
/// Where fusermount3 is told what users may do.
const FUSE_CONF: &str = "/etc/fuse.conf";

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
    /// Takes the place of a regfs that is mounted there.
    pub replace: bool,
}

/// A mount that is being served.
pub struct Mounted {
    session: JoinHandle<std::io::Result<()>>,
    signals: Signals,
    mountpoint: PathBuf,
    identity: Identity,
}

/// Mounts, and serves on threads of its own; returns when the mount answers.
pub fn mount(engine: Arc<Engine>, options: &MountOptions) -> Result<Mounted> {
    let mountpoint = &options.mountpoint;
    let replaces = clear_mountpoint(options)?;
    let filesystem = RegistryFilesystem::new(engine.clone());
    // Before the mount: whoever is told to end from now on must not leave a dead one.
    let signals = Signals::new(TERM_SIGNALS).map_err(|e| Error::io("wait for signals for", mountpoint, e))?;
    let (session, root) = match rustix::process::geteuid().is_root() {
        true => mount_directly(filesystem, options)?,
        false => (mount_through_helper(filesystem, options)?, None),
    };
    engine.set_listener(Arc::new(Forgetting::start(session.notifier())?));
    let serve = move || session.run();
    let session = std::thread::Builder::new().name("session".into()).spawn(serve);
    let session = session.map_err(|e| Error::io("serve", mountpoint, e))?;
    let identity = match &root {
        Some(root) => Identity::of(root.as_fd(), Path::new("")),
        None => Identity::of(rustix::fs::CWD, mountpoint),
    };
    let identity = identity.map_err(|e| Error::io("look at the mount", mountpoint, e))?;
    match &root {
        Some(root) if replaces => attach::replace(root, mountpoint)?,
        Some(root) => attach::attach(root, mountpoint)?,
        None => {}
    }
    place::watch(engine, identity.clone(), mountpoint)?;
    Ok(Mounted { session, signals, mountpoint: mountpoint.clone(), identity })
}

impl Mounted {
    /// Keeps a guardian beside this process, which holds what is opened in `guarded`, too; returns when it does.
    pub fn keep_guardian(&self, engine: &Arc<Engine>, guarded: Option<&Path>) -> Result<()> {
        let charge = Charge {
            mountpoint: self.mountpoint.clone(),
            device: self.identity.device.clone(),
            guarded: guarded.map(Path::to_path_buf),
        };
        if let Some(directory) = guarded {
            engine.guards(directory);
        }
        let kept = guardian::keep(engine.clone(), charge);
        if kept.is_err()
            && let Err(e) = unmount_lazily(&self.mountpoint)
        {
            log::error!("{e}");
        }
        kept
    }

    /// Unmounts when the process is told to end, and returns when the last user is gone.
    pub fn serve(self, engine: &Engine) -> Result<()> {
        let (mountpoint, device) = (self.mountpoint.clone(), self.identity.device);
        let mut signals = self.signals;
        let handle = signals.handle();
        let watch = std::thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in signals.forever() {
                log::info!("signal {signal}: unmounting {}", mountpoint.printable());
                service_manager(NotifyState::Stopping);
                let unmounted = match topmost(&mountpoint) {
                    // Ours is gone already, or somebody mounted over it: that one is not ours to take away.
                    Ok(mount) if mount.as_ref().is_none_or(|mount| mount.device != device) => {
                        log::info!("{} is no longer ours: left alone", mountpoint.printable());
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
        service_manager(NotifyState::Ready);
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

/// Makes sure that we can mount there, takes away the dead mount of a regfs that was killed, and says whether there is
/// a living one to replace.
fn clear_mountpoint(options: &MountOptions) -> Result<bool> {
    let mountpoint = &options.mountpoint;
    let is_ours = is_mounted(mountpoint)?;
    // The kernel may remember what a dead one looked like, but not how much space it had.
    let answers = rustix::fs::statfs(mountpoint).map_err(std::io::Error::from);
    match answers.and_then(|_| std::fs::metadata(mountpoint)) {
        Err(e) if is_dead(&e) && is_ours => {
            log::info!(
                "{} is the dead mount of a regfs that was killed; replacing it",
                mountpoint.printable()
            );
            unmount_lazily(mountpoint)?;
            Ok(false)
        }
        Err(e) => Err(Error::io("mount on", mountpoint, e)),
        Ok(_) if is_ours && options.replace && !rustix::process::geteuid().is_root() => Err(Error::invalid(
            format!("only root can replace a mount; unmount it first: regfs umount {}", quoted(mountpoint)),
        )),
        Ok(_) if is_ours && options.replace => Ok(true),
        Ok(_) if is_ours => Err(Error::Busy {
            why: format!(
                "a regfs is mounted on {} already; unmount it first (regfs umount {}), or take its place with --replace",
                mountpoint.printable(),
                quoted(mountpoint)
            ),
        }),
        Ok(metadata) if !metadata.is_dir() => {
            Err(Error::io("mount on", mountpoint, std::io::Error::from_raw_os_error(libc::ENOTDIR)))
        }
        Ok(_) => {
            if std::fs::read_dir(mountpoint).is_ok_and(|mut entries| entries.next().is_some()) {
                log::warn!("{} is not empty: the mount hides what is in it", mountpoint.printable());
            }
            Ok(false)
        }
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

/// Serves a mount that has no place yet, which its descriptor keeps alive.
fn mount_directly(
    filesystem: RegistryFilesystem,
    options: &MountOptions,
) -> Result<(Session<RegistryFilesystem>, Option<OwnedFd>)> {
    let detached = attach::detached(options)?;
    let config = config(options);
    let session = Session::from_fd(filesystem, detached.fuse, config.acl, config);
    Ok((session.map_err(|e| Error::io("serve", &options.mountpoint, e))?, Some(detached.root)))
}

fn mount_through_helper(
    filesystem: RegistryFilesystem,
    options: &MountOptions,
) -> Result<Session<RegistryFilesystem>> {
    if options.allow_other && !others_may_be_allowed(Path::new(FUSE_CONF)) {
        return Err(Error::invalid(format!(
            "{FUSE_CONF} lets only root allow others to look: have it say user_allow_other, or leave out allow_other"
        )));
    }
    if access("/dev/fuse", Access::READ_OK | Access::WRITE_OK) == Err(Errno::ACCESS) {
        return Err(Error::invalid(
            "this user may not open /dev/fuse, which most systems let everybody do: mount as root, or let root run: chmod 666 /dev/fuse",
        ));
    }
    let mut config = config(options);
    config.mount_options = vec![
        MountOption::FSName(options.source.to_string_lossy().into_owned()),
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

/// Whether the configuration of fusermount3 has the line `user_allow_other` (mount.fuse3(8)).
fn others_may_be_allowed(fuse_conf: &Path) -> bool {
    let text = std::fs::read_to_string(fuse_conf).unwrap_or_default();
    text.lines().any(|line| line.trim() == "user_allow_other")
}

/// Tells systemd where we are (sd_notify(3)), if that started us.
fn service_manager(state: NotifyState<'_>) {
    if let Err(e) = sd_notify::notify(&[state]) {
        log::warn!("could not tell the service manager: {e}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_in_fuse_conf_allow_nothing() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        for (text, allowed) in
            [("", false), ("#user_allow_other\n", false), ("mount_max = 9\n user_allow_other \n", true)]
        {
            std::fs::write(file.path(), text).expect("write it");
            assert_eq!(others_may_be_allowed(file.path()), allowed, "{text:?}");
        }
        assert!(!others_may_be_allowed(Path::new("/nonexistent")));
    }
}
