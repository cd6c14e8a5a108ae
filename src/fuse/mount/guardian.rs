//! A process that lets go of a mount whose daemon was killed and can't end.
//!
//! A thread that tells the kernel to forget a name waits for the lock of the directory, which a client may hold that waits
//! for the daemon's answer. Killed in that moment, the daemon never ends: its thread waits for the client, the client for
//! an answer, and the kernel, which would end the client's wait, for the daemon. Only somebody else can cut the
//! connection. The daemon starts ourselves once more for that; it does nothing until the daemon is killed.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::UnmountFlags;
use rustix::process::Signal;
use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;

use super::table::topmost;
use crate::error::{Error, Result};

/// How long a daemon that was killed may take to end.
const ENDS: Duration = Duration::from_secs(1);
/// How often it is looked for.
const TICK: Duration = Duration::from_millis(20);

/// Starts one for this process; call it from a thread that lives as long as that does.
pub(super) fn start(mountpoint: &Path, device: &str) -> Result<()> {
    let program = Path::new("/proc/self/exe");
    Command::new(program)
        .arg0("regfs")
        .args(["guardian", &std::process::id().to_string(), device])
        .arg(mountpoint)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map(drop)
        .map_err(|e| Error::io("start the guardian of", mountpoint, e))
}

/// Waits for the daemon to end, and cuts the connection of its mount if it is dead and does not.
pub fn run(daemon: u32, device: &str, mountpoint: &Path) -> Result<()> {
    let failed = |e: std::io::Error| Error::io("guard", mountpoint, e);
    let mut signals = Signals::new([SIGTERM]).map_err(failed)?;
    // A key that is pressed at the terminal is not for us.
    rustix::process::setsid().map_err(|e| failed(e.into()))?;
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM)).map_err(|e| failed(e.into()))?;
    if !is_running(daemon) {
        return Ok(());
    }
    signals.forever().next();
    let mut dead_since = None;
    while has_threads(daemon) {
        // Told to end together with a daemon that still unmounts.
        if !is_running(daemon) && dead_since.get_or_insert_with(Instant::now).elapsed() > ENDS {
            return cut(device, mountpoint);
        }
        std::thread::sleep(TICK);
    }
    Ok(())
}

/// Whether a process has not been ended: what is left of one that was is a zombie.
fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// Whether a process has a thread that has not ended; of one whose parent asks for nothing a zombie stays.
fn has_threads(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    threads > 1 || is_running(pid)
}

fn cut(device: &str, mountpoint: &Path) -> Result<()> {
    let minor = device.rsplit(':').next().unwrap_or_default();
    if std::fs::write(format!("/sys/fs/fuse/connections/{minor}/abort"), "1").is_ok() {
        return Ok(());
    }
    // Not mounted, that directory: an unmount by force cuts the connection, too, even where it then says "busy".
    if topmost(mountpoint)?.is_some_and(|mount| mount.device == device) {
        let unmounted = rustix::mount::unmount(mountpoint, UnmountFlags::FORCE | UnmountFlags::NOFOLLOW);
        return unmounted.map_err(|e| Error::io("cut the connection of", mountpoint, e));
    }
    Ok(())
}
