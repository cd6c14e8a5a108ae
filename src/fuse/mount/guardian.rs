//! A process beside the daemon, for what the daemon can't do when it is killed or does not go on.
//!
//! *Killed*: a thread that tells the kernel to forget a name waits for the lock of the directory, which a client may hold
//! that waits for the daemon's answer. Killed in that moment, the daemon never ends: its thread waits for the client, the
//! client for an answer, and the kernel, which would end the client's wait, for the daemon. Only somebody else can cut the
//! connection.
//!
//! *Stopped or hung*: opens of a registry (`--guard`) must not wait for it. So the guardian holds them ([`held`]).
//!
//! The daemon starts ourselves once more for that, and again if the guardian ends. Between them is a socket, the
//! guardian's stdin, which is closed when either ends.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use rustix::mm::MlockAllFlags;
use rustix::mount::UnmountFlags;
use rustix::process::Signal;
use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;

use super::table::topmost;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::printable::Printable;
use crate::watch::held::{self, Figures, Questions, Told};

/// How long a daemon that was killed may take to end.
const ENDS: Duration = Duration::from_secs(1);
/// How often it is looked for.
const TICK: Duration = Duration::from_millis(20);
/// A guardian that lived for less than this is not followed by another one at once.
const LIVES: Duration = Duration::from_secs(1);
/// How long one may take until it guards.
const BEGINS: Duration = Duration::from_secs(10);

/// What a guardian is for.
#[derive(Clone, Debug)]
pub(super) struct Charge {
    /// Where the mount is.
    pub(super) mountpoint: PathBuf,
    /// What tells it from others: `major:minor`.
    pub(super) device: String,
    /// The directory whose opens it holds.
    pub(super) guarded: Option<PathBuf>,
}

impl Charge {
    /// Starts a guardian, which ends with the thread that calls this.
    fn start(&self) -> Result<(Child, Questions)> {
        let failed = |e: std::io::Error| Error::io("start the guardian of", &self.mountpoint, e);
        let (questions, theirs) = Questions::new().map_err(failed)?;
        let child = Command::new("/proc/self/exe")
            .arg0("regfs")
            .args(["guardian", &std::process::id().to_string(), &self.device])
            .arg(&self.mountpoint)
            .args(&self.guarded)
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Ok((child.map_err(failed)?, questions))
    }
}

/// Keeps a guardian beside this process for as long as it lives; returns when the first one does what it is for.
pub(super) fn keep(engine: Arc<Engine>, charge: Charge) -> Result<()> {
    let failed = |e: std::io::Error| Error::io("start the guardian of", &charge.mountpoint, e);
    let (begun, has_begun) = channel();
    let kept = charge.clone();
    // The thread lives as long as the process: a guardian ends with the thread that started it.
    let keeping = move || keeping(&engine, &kept, &begun);
    std::thread::Builder::new().name("guardian".into()).spawn(keeping).map_err(failed)?;
    match charge.guarded.is_some() && has_begun.recv_timeout(BEGINS).is_err() {
        true => Err(failed(std::io::Error::from(std::io::ErrorKind::TimedOut))),
        false => Ok(()),
    }
}

fn keeping(engine: &Engine, charge: &Charge, begun: &Sender<()>) {
    loop {
        let began = Instant::now();
        match charge.start() {
            Ok((child, questions)) => {
                if let Err(e) = answer(engine, &questions, begun) {
                    log::warn!("could not hear the guardian of {}: {e}", charge.mountpoint.printable());
                }
                // It ends when it finds its socket closed.
                drop(questions);
                say_that_it_ended(engine, charge, ended(child));
            }
            // Without one, a daemon that is killed may leave clients that wait for ever; with luck it is never killed.
            Err(e) => log::warn!("{e}"),
        }
        std::thread::sleep(LIVES.saturating_sub(began.elapsed()));
    }
}

/// Answers what a guardian asks until it ends.
fn answer(engine: &Engine, questions: &Questions, begun: &Sender<()>) -> std::io::Result<()> {
    let (mut known, mut unsaid) = (Figures::default(), 0);
    while let Some(Told { figures, question }) = questions.next()? {
        let (opens, missed) = (figures.opens - known.opens, figures.missed - known.missed);
        (known, unsaid) = (figures, unsaid + missed);
        engine.count_opens(opens, missed);
        match question {
            Some(question) => {
                engine.let_through(&question.path, question.pid);
                questions.answer(question.id)?;
            }
            None => {
                engine.say_missed(std::mem::take(&mut unsaid));
                // Nobody waits any more after the first time.
                let _ = begun.send(());
            }
        }
    }
    Ok(())
}

fn ended(mut child: Child) -> std::io::Result<ExitStatus> {
    // It may have ended by itself.
    let _ = child.kill();
    child.wait()
}

fn say_that_it_ended(engine: &Engine, charge: &Charge, status: std::io::Result<ExitStatus>) {
    let how = match status {
        Ok(status) if status.signal().is_some() => "was killed, or stopped for too long".to_string(),
        Ok(status) => format!("ended ({status})"),
        Err(e) => e.to_string(),
    };
    match &charge.guarded {
        Some(directory) => engine.count_gap(&format!(
            "the guardian of {} {how}: for a moment nothing that was opened there was held; regfs starts another guardian",
            directory.printable()
        )),
        None => log::warn!("the guardian of {} {how}; regfs starts another one", charge.mountpoint.printable()),
    }
}

/// Waits for the daemon to end, and cuts the connection of its mount if it is dead and does not; meanwhile holds what is
/// opened in `guarded`.
pub fn run(daemon: u32, device: &str, mountpoint: &Path, guarded: Option<PathBuf>) -> Result<()> {
    let failed = |e: std::io::Error| Error::io("guard", mountpoint, e);
    let mut signals = Signals::new([SIGTERM]).map_err(failed)?;
    // A key that is pressed at the terminal is not for us.
    rustix::process::setsid().map_err(|e| failed(e.into()))?;
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM)).map_err(|e| failed(e.into()))?;
    if !is_running(daemon) {
        return Ok(());
    }
    if let Some(directory) = guarded {
        hold(directory).map_err(failed)?;
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

/// Holds opens on a thread of its own; one that fails ends the process, so that the daemon starts another.
fn hold(directory: PathBuf) -> std::io::Result<()> {
    // A registry would wait for what was swapped out. Where that is not allowed, it may.
    let _ = rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT);
    let guard = move || {
        if held::hold(&directory).is_err() {
            std::process::exit(1);
        }
    };
    std::thread::Builder::new().name("hold".into()).spawn(guard).map(drop)
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
