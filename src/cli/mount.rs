//! `regfs mount` and `regfs umount`
//!
//! Without `--foreground` the command starts itself again as a daemon in a session of its own and waits until that
//! says over a pipe that the mount answers. Until then the daemon shares our stderr, so that its errors reach the
//! terminal, and its exit code becomes ours. (No fork: a process with threads can't go on after one.)

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use clap::Args;

use super::mount_options::{MountWord, word};
use super::registry::RegistryArgs;
use super::{Environment, Outcome, duration, store_argument};
use crate::engine::schedule::{self, Schedule, Window};
use crate::engine::{Engine, forgetting};
use crate::error::{Error, Result};
use crate::fuse::mount::{self, Left, MountOptions};
use crate::printable::Printable;
use crate::store::Store;
use crate::store::disk::Disk;
use crate::view::Settings;
use crate::view::control::parse_rate;
use crate::watch::Watch;
use crate::watch::opens::Opens;

/// What the daemon says when the mount answers.
const READY: &[u8] = b"ready\n";

/// Mount a store; returns when the mount answers.
#[derive(Args, Debug)]
pub(super) struct MountArgs {
    /// The registry's rootdirectory or its config.yml
    store: PathBuf,
    /// A directory
    mountpoint: PathBuf,
    /// Stay in the foreground and log to stderr
    #[arg(long, short)]
    foreground: bool,
    /// Show only; refuse rm and commands
    #[arg(long)]
    read_only: bool,
    /// Let other users look, too (only the one who mounts can change anything)
    #[arg(long)]
    allow_other: bool,
    /// Leave what was used more recently than this, unless a sweep says otherwise
    #[arg(long, value_name = "AGE", default_value = "24h", value_parser = duration)]
    grace: Duration,
    /// Purge what has been in the trash for longer than this, unless a sweep says otherwise
    #[arg(long, value_name = "AGE", default_value = "7d", value_parser = duration)]
    keep: Duration,
    /// In a sweep, make at most N calls to the storage in a second (looks, moves, removals), unless it says otherwise
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    rate: Option<u32>,
    #[command(flatten)]
    registry: RegistryArgs,
    /// Sweep by itself, at this interval
    #[arg(long, value_name = "TIME", value_parser = interval)]
    sweep_every: Option<Duration>,
    /// Sweep by itself only in this part of the day, by the local clock
    #[arg(long, value_name = "HH:MM-HH:MM", value_parser = Window::parse, requires = "sweep_every")]
    sweep_window: Option<Window>,
    /// Hold a registry that works in that directory (a bind mount of the storage, made if it is not there yet) where it
    /// opens a manifest, until all that this names is there; for root
    #[arg(long, value_name = "DIRECTORY", conflicts_with = "read_only")]
    guard: Option<PathBuf>,
    /// Where to log to; otherwise a daemon logs nowhere, and one in the foreground to stderr
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Take the place of a regfs that is mounted there; who is inside stays with the old one until they leave
    #[arg(long)]
    replace: bool,
    /// The same as mount(8) and fstab say it: ro, allow_other, replace, grace=AGE, keep=AGE, sweep_every=TIME, …; log_file=FILE
    #[arg(short = 'o', value_name = "OPTIONS", value_delimiter = ',', value_parser = word)]
    options: Vec<MountWord>,
    /// Do everything but mount
    #[arg(long, hide = true)]
    fake: bool,
    /// Run as the daemon of another regfs, which waits for a word on stdout
    #[arg(long, hide = true)]
    daemon: bool,
}

impl MountArgs {
    /// What was typed for the store.
    pub(super) fn store(&self) -> &Path {
        &self.store
    }

    /// With what `-o` says, which comes last.
    pub(super) fn settled(mut self) -> MountArgs {
        for word in std::mem::take(&mut self.options) {
            match word {
                MountWord::ReadOnly(read_only) => self.read_only = read_only,
                MountWord::AllowOther => self.allow_other = true,
                MountWord::Replace => self.replace = true,
                MountWord::Grace(grace) => self.grace = grace,
                MountWord::Keep(keep) => self.keep = keep,
                MountWord::Rate(rate) => self.rate = Some(rate),
                MountWord::Drain(drain) => self.registry.drain = drain,
                MountWord::Registry(url) => self.registry.registry.push(url),
                MountWord::Redis(redis) => self.registry.redis.redis = Some(redis),
                MountWord::RegistryAuth(file) => self.registry.registry_auth = Some(file),
                MountWord::RegistryCa(file) => self.registry.registry_ca = Some(file),
                MountWord::SweepEvery(every) => self.sweep_every = Some(every),
                MountWord::SweepWindow(window) => self.sweep_window = Some(window),
                MountWord::Guard(directory) => self.guard = Some(directory),
                MountWord::LogFile(file) => self.log_file = Some(file),
                MountWord::Generic => {}
            }
        }
        self
    }

    /// The file that was named to log to.
    pub(super) fn open_log(&self) -> Result<Option<File>> {
        let open = |path| OpenOptions::new().append(true).create(true).open(path);
        self.log_file.as_deref().map(|p| open(p).map_err(|e| Error::io("open the log", p, e))).transpose()
    }
}

pub(super) fn interval(text: &str) -> std::result::Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("write a time that is not 0, for example 6h".to_string()),
        interval => Ok(interval),
    }
}

pub(super) fn run(
    args: &MountArgs,
    typed_args: &[OsString],
    environment: Environment<'_>,
) -> Result<Outcome> {
    match args.foreground || args.daemon || args.fake {
        true => serve(args, environment),
        false => start_daemon(typed_args),
    }
}

pub(super) fn umount(mountpoint: &Path, lazy: bool) -> Result<Outcome> {
    let mountpoint = mount::absolute(mountpoint)?;
    // So that we are not the one who is inside.
    std::env::set_current_dir("/").map_err(|e| Error::io("go to", Path::new("/"), e))?;
    let Left(left) = mount::umount(&mountpoint, lazy)?;
    if left.is_empty() {
        return Ok(Outcome::Done);
    }
    eprintln!("regfs: {left}");
    Ok(if lazy { Outcome::Done } else { Outcome::Unfinished })
}

/// Starts ourselves again as a daemon and waits until the mount answers.
fn start_daemon(typed_args: &[OsString]) -> Result<Outcome> {
    // By its own name, so that `pgrep regfs` finds it; that name is gone when the program was replaced meanwhile.
    let program = std::env::current_exe().ok().filter(|p| p.exists());
    let program = program.as_deref().unwrap_or(Path::new("/proc/self/exe"));
    let child = Command::new(program)
        // A copy of ourselves may be called mount.regfs.
        .arg0("regfs")
        // Right after `mount`: behind a `--` it would be no option.
        .args(typed_args.iter().skip(1).take(1))
        .arg("--daemon")
        .args(typed_args.iter().skip(2))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = child.map_err(|e| Error::io("start the daemon", program, e))?;
    let mut said = Vec::new();
    if let Some(mut stdout) = child.stdout.take() {
        // A daemon that died said nothing; its exit code tells the rest.
        let _ = stdout.read_to_end(&mut said);
    }
    if said == READY {
        return Ok(Outcome::Done);
    }
    let status = child.wait().map_err(|e| Error::io("wait for the daemon", program, e))?;
    match status.code() {
        // It said why on our stderr.
        Some(code) => std::process::exit(code.max(1)),
        None => Err(Error::invalid(format!("the daemon ended before the mount answered: {status}"))),
    }
}

/// Whether the store can be changed, by this user and on its filesystem; says why not.
fn can_be_changed(store: &Disk) -> bool {
    let root = store.full(Path::new(""));
    if !store.is_writable() {
        log::warn!("{} can't be changed by this user: mounting read-only", root.printable());
        return false;
    }
    match store.expect_able() {
        Err(e @ (Error::Incapable { .. } | Error::Misplaced { .. })) => {
            log::warn!("{e}: mounting read-only");
            false
        }
        Err(e) if e.errno() == libc::EROFS => {
            log::warn!("{} is on a read-only filesystem: mounting read-only", root.printable());
            false
        }
        // Whatever else it is, the first change meets it, too, and says so.
        Err(e) => {
            log::warn!("{e}");
            true
        }
        Ok(()) => true,
    }
}

fn serve(args: &MountArgs, environment: Environment<'_>) -> Result<Outcome> {
    let argument = store_argument(&args.store, environment)?;
    let registries = args.registry.known(&argument, environment)?;
    let storage_root = argument.storage_root;
    // Its name is shown long after the working directory has changed.
    let storage_root =
        storage_root.canonicalize().map_err(|e| Error::io("find the storage", &storage_root, e))?;
    let mountpoint = mount::absolute(&args.mountpoint)?;
    refuse_inside(&storage_root, &mountpoint)?;
    let store = Disk::open(&storage_root)?;
    if args.fake {
        return Ok(Outcome::Done);
    }
    let read_only = args.read_only || !can_be_changed(&store);
    let settings = Settings {
        read_only,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        grace: args.grace,
        drain: args.registry.drain,
        keep: args.keep,
        rate: args.rate,
        mounted_at: SystemTime::now(),
    };
    // For what does not go through the logger; the name is relative to a directory that we leave.
    let log_file = args.open_log()?;
    let root = store.full(Path::new(""));
    // Before the first look, which sees what has changed until then.
    let watch = watch(Watch::of_filesystem, &root, &store, read_only);
    let engine = Arc::new(Engine::new(Arc::new(store), settings)?.with_registries(registries));
    match watch {
        Ok(watch) => engine.watch(watch)?,
        Err(e) => log::debug!("could not watch the filesystem: {e}"),
    }
    // As it was given: `mount -a` looks for the line of fstab among the mounts.
    if let Some(directory) = &args.guard {
        refuse_within(directory, &mountpoint)?;
    }
    let guard = args.guard.as_deref().map(|directory| guard(directory, &storage_root)).transpose()?;
    let source =
        std::path::absolute(&args.store).map_err(|e| Error::io("find the storage", &args.store, e))?;
    let (allow_other, replace) = (args.allow_other, args.replace);
    let options = MountOptions { source, mountpoint, read_only, allow_other, replace };
    let mounted = mount::mount(engine.clone(), &options)?;
    mounted.keep_guardian(&engine, guard.as_deref())?;
    log::info!("mounted {} on {}", storage_root.printable(), options.mountpoint.printable());
    if args.daemon {
        detach(log_file)?;
    }
    if !engine.is_watching() {
        let watching = engine.clone();
        in_background("watch", move || watch_directories(&watching, &root));
    }
    let schedule =
        args.sweep_every.filter(|_| !read_only).map(|every| Schedule { every, window: args.sweep_window });
    let weak = Arc::downgrade(&engine);
    in_background("schedule", move || schedule::run(&weak, schedule));
    let weak = Arc::downgrade(&engine);
    in_background("forget", move || forgetting::run(&weak));
    let keeping = engine.clone();
    in_background("cache", move || keeping.keep_parsed());
    mounted.serve(&engine)?;
    Ok(Outcome::Done)
}

/// What makes a mount quicker, and can be done without.
fn in_background(name: &str, run: impl FnOnce() + Send + 'static) {
    if let Err(e) = std::thread::Builder::new().name(name.into()).spawn(run) {
        log::warn!("could not start the thread {name}: {e}");
    }
}

/// A watch of the registry directory `root` that has shown that it tells; a mount that changes nothing goes by what kind
/// of filesystem it is.
fn watch(
    of: fn(&Path) -> std::io::Result<Watch>,
    root: &Path,
    store: &dyn Store,
    read_only: bool,
) -> Result<Watch> {
    let watch = of(root).map_err(|e| Error::io("watch", root, e))?;
    if read_only { Ok(watch) } else { watch.prove(store) }
}

/// Lets the kernel tell what changes, directory by directory; until then, and where it can't, the storage is looked at.
fn watch_directories(engine: &Arc<Engine>, root: &Path) {
    let watch = watch(Watch::of_directories, root, engine.store(), engine.settings().read_only);
    if let Err(e) = watch.and_then(|watch| engine.watch_from_now(watch)) {
        engine.does_not_watch(&e.to_string());
    }
}

/// A guarded directory and the mountpoint have nothing to do with each other.
fn refuse_within(directory: &Path, mountpoint: &Path) -> Result<()> {
    let whole = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let (guarded, mounted) = (whole(directory), whole(mountpoint));
    match guarded.starts_with(&mounted) || mounted.starts_with(&guarded) {
        true => Err(Error::invalid(format!(
            "the guard takes a directory that has nothing to do with the mountpoint {}, not {}",
            mountpoint.printable(),
            directory.printable()
        ))),
        false => Ok(()),
    }
}

/// Makes sure that what is opened through `directory` can be held; its full name.
fn guard(directory: &Path, storage_root: &Path) -> Result<PathBuf> {
    let directory = std::path::absolute(directory).map_err(|e| Error::io("find", directory, e))?;
    Opens::through(&directory, storage_root)?;
    Ok(directory)
}

/// A mount inside its own storage would wait for itself.
fn refuse_inside(storage_root: &Path, mountpoint: &Path) -> Result<()> {
    match mountpoint.starts_with(storage_root) {
        true => Err(Error::invalid(format!(
            "{} lies inside the storage {}; mount it elsewhere",
            mountpoint.printable(),
            storage_root.printable()
        ))),
        false => Ok(()),
    }
}

/// Says that the mount answers, and lets go of the terminal.
fn detach(log_file: Option<File>) -> Result<()> {
    let error = |e: std::io::Error| Error::io("go to the background from", Path::new("the terminal"), e);
    std::env::set_current_dir("/").map_err(error)?;
    rustix::process::setsid().map_err(|e| error(e.into()))?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").map_err(error)?;
    rustix::stdio::dup2_stderr(log_file.as_ref().unwrap_or(&null)).map_err(|e| error(e.into()))?;
    // Whoever waited may be gone; the mount stands all the same.
    let _ = std::io::stdout().write_all(READY).and_then(|()| std::io::stdout().flush());
    rustix::stdio::dup2_stdout(&null).map_err(|e| error(e.into()))
}
