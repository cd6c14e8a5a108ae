//! The command line: one module for each subcommand.
//!
//! Results go to stdout, everything else to stderr. Exit codes: 0 done; 1 failed; 2 usage (clap's own); 3 finished,
//! but some of it failed. A reader that goes away (`regfs … | head`) is no failure.

mod gc;
mod mount;
mod mount_options;
mod output;
mod progress;
mod registry;
mod sample;
mod trash;
mod why;

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::advice::Place;
use crate::error::{Error, Result};
use crate::printable::{self, Printable};
use crate::registry_config::{self, StoreArgument, Variables};
use crate::store::disk::Disk;
use crate::view::control::parse_duration;

/// Looks up an environment variable.
pub type Environment<'a> = &'a Variables;

/// Shows a Docker/OCI registry's storage as a file tree, deletes with rm, and collects garbage.
///
/// STORE is the registry's rootdirectory (it holds docker/registry/v2), or the registry's config.yml.
#[derive(Parser, Debug)]
#[command(name = "regfs", version, arg_required_else_help = true, after_help = AFTER_HELP)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Nothing is deleted for good but by a purge: rm and gc move things to a trash inside the store.

Exit codes: 0 done; 1 failed; 2 wrong usage; 3 finished, but some of it failed, or was held back.
RUST_LOG=regfs=info (or debug) shows what is going on.";

#[derive(Subcommand, Debug)]
enum Command {
    /// Mount a store; returns when the mount answers
    Mount(mount::MountArgs),
    /// Unmount, and wait for the daemon to end
    Umount {
        /// Where it is mounted
        mountpoint: PathBuf,
        /// Take its name away although somebody is inside; the daemon then serves them until the last one leaves
        #[arg(long, short)]
        lazy: bool,
    },
    /// Collect garbage into the trash, or say what there is
    Gc(gc::GcArgs),
    /// List, undo or purge what was taken out of a store
    Trash(trash::TrashArgs),
    /// Say what keeps a blob or a manifest, or since when it is garbage
    Why(why::WhyArgs),
    /// Let go of a mount whose daemon was killed and can't end, and of opens that it does not answer
    #[command(hide = true)]
    Guardian {
        /// The daemon
        daemon: u32,
        /// What tells its mount from others
        device: String,
        /// Where it is mounted
        mountpoint: PathBuf,
        /// Whose opens are held
        guarded: Option<PathBuf>,
    },
    /// Make a small registry to try regfs on
    Sample {
        /// A directory that does not exist yet, or is empty
        directory: PathBuf,
    },
}

impl Command {
    /// The store that the command is about, as it was typed.
    fn store(&self) -> Option<&Path> {
        match self {
            Command::Mount(args) => Some(args.store()),
            Command::Gc(args) => Some(args.store()),
            Command::Trash(args) => Some(args.store()),
            Command::Why(args) => Some(args.store()),
            Command::Umount { .. } | Command::Guardian { .. } | Command::Sample { .. } => None,
        }
    }

    fn settled(self) -> Command {
        match self {
            Command::Mount(mount) => Command::Mount(mount.settled()),
            other => other,
        }
    }
}

/// To stderr, warnings only, unless the environment or a log file says otherwise.
fn start_logging(command: &Command) -> Result<()> {
    let log_file = match command {
        Command::Mount(mount) => mount.open_log()?,
        _ => None,
    };
    // Whoever names a file wants something in it.
    let filter = if log_file.is_some() { "warn,regfs=info" } else { "warn" };
    let mut logger = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(filter));
    if let Some(file) = log_file {
        logger.target(env_logger::Target::Pipe(Box::new(file)));
    }
    // A mount is commanded by its control files.
    let place = if matches!(command, Command::Mount(_)) { Place::ControlFile } else { output::place() };
    logger.format(move |out, record| {
        let (time, level, style) =
            (out.timestamp_seconds(), record.level(), out.default_level_style(record.level()));
        // What goes on in a second line is set off, so that no line looks like another message.
        let text = printable::lines(&place.say(&record.args().to_string())).replace('\n', "\n  ");
        writeln!(out, "[{time} {style}{level:<5}{style:#} {}] {text}", record.target())
    });
    logger.init();
    Ok(())
}

/// Does what the command line says; returns the exit code.
pub fn main(args: impl IntoIterator<Item = OsString>, environment: Environment<'_>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let parsed = mount_options::canonical(args).and_then(|args| Ok((Args::try_parse_from(&args)?, args)));
    let (command, args) = match parsed {
        Ok((parsed, args)) => (parsed.command.settled(), args),
        Err(e) => {
            // Help and version come here, too, with exit code 0. A reader that is gone needs neither.
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() || is_help_for_nothing(&e) { 2 } else { 0 });
        }
    };
    output::set_store(command.store());
    let result = start_logging(&command).and_then(|()| match command {
        Command::Mount(mount) => mount::run(&mount, &args, environment),
        Command::Umount { mountpoint, lazy } => mount::umount(&mountpoint, lazy),
        Command::Gc(gc) => gc::run(&gc, &args, environment),
        Command::Trash(trash) => trash::run(&trash, &args, environment),
        Command::Why(why) => why::run(&why, environment),
        Command::Guardian { daemon, device, mountpoint, guarded } => {
            crate::fuse::mount::guardian::run(daemon, &device, &mountpoint, guarded).map(|()| Outcome::Done)
        }
        Command::Sample { directory } => sample::run(&directory),
    });
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Unusable) => ExitCode::from(2),
        Ok(Outcome::Unfinished) => ExitCode::from(3),
        Err(e) => {
            say(&format!("regfs: {e}"));
            match e {
                // Nothing failed, and nothing was done.
                Error::HeldBack { .. } => ExitCode::from(3),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// `regfs` without arguments shows its help, and that is a usage error.
fn is_help_for_nothing(e: &clap::Error) -> bool {
    e.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
}

/// How a command ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    /// All of it.
    Done,
    /// Some of it failed.
    Unfinished,
    /// What was asked for was not said; nothing was done.
    Unusable,
}

/// What a `<STORE>` argument means.
fn store_argument(argument: &Path, environment: Environment<'_>) -> Result<StoreArgument> {
    let resolved = registry_config::resolve(argument, environment)?;
    if let Some(config) = &resolved.from_config {
        let by = match resolved.overridden_by.as_slice() {
            [] => String::new(),
            variables => format!(", overridden by {}", variables.join(", ")),
        };
        log::info!("{}: the storage is {}{by}", config.printable(), resolved.storage_root.printable());
    }
    Ok(resolved)
}

/// Opens the store that a `<STORE>` argument means.
fn open(argument: &Path, environment: Environment<'_>) -> Result<Disk> {
    Disk::open(&store_argument(argument, environment)?.storage_root)
}

/// Writes a result for people to stdout.
fn print(text: &str) -> Result<()> {
    output::to_stdout(|out| out.write_all(printable::lines(&output::place().say(text)).as_bytes()))
}

/// Tells people on stderr what their result does not say.
fn say(text: &str) {
    // Nobody is left to tell when stderr can't be written to.
    let _ = writeln!(std::io::stderr(), "{}", printable::lines(&output::place().say(text)));
}

/// What was typed, for the log and for `txn.json`.
fn typed(args: &[OsString]) -> String {
    let words: Vec<String> = args.iter().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    format!("regfs {}", words.join(" "))
}

fn duration(text: &str) -> std::result::Result<Duration, String> {
    parse_duration(text)
}
