//! `regfs gc`

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::output::OutputArgs;
use super::progress::Watcher;
use super::{Environment, Outcome, duration, open, typed};
use crate::catalog::Tables;
use crate::error::{Error, Result};
use crate::gc::{self, Options};
use crate::trash::Author;

/// Collect garbage into the trash, or say what there is.
///
/// Garbage is what no manifest of any repository leads to. It moves to a trash inside the store, from which
/// `regfs trash STORE undo` brings it back until it is purged.
#[derive(Args, Debug)]
pub(super) struct GcArgs {
    /// The registry's rootdirectory or its config.yml
    store: PathBuf,
    /// Say what would be taken; change nothing
    #[arg(long)]
    dry_run: bool,
    /// Take manifests that no tag leads to, too
    #[arg(long)]
    untagged: bool,
    /// Leave what was used more recently than this
    #[arg(long, value_name = "AGE", default_value = "24h", value_parser = duration)]
    grace: Duration,
    /// Purge what has been in the trash for longer than this
    #[arg(long, value_name = "AGE", default_value = "7d", value_parser = duration)]
    keep: Duration,
    /// Free the bytes at once; for a registry that is stopped or read-only
    #[arg(long)]
    now: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) fn run(args: &GcArgs, typed_args: &[OsString], environment: Environment<'_>) -> Result<Outcome> {
    let store = open(&args.store, environment)?;
    let options = Options {
        dry_run: args.dry_run,
        untagged: args.untagged,
        grace: args.grace,
        keep: args.keep,
        now: args.now,
    };
    let author = Author::current(&typed(typed_args));
    let watcher = Watcher::new(args.output.verbose)?;
    let report = gc::run(&store, &Tables::default(), &options, &author, &*watcher);
    watcher.finish();
    let report = report?;
    args.output.print(&report, &args.store)?;
    if report.is_stopped {
        return Err(Error::invalid(format!("stopped by a signal: {}", report.outcome())));
    }
    Ok(if report.is_complete() { Outcome::Done } else { Outcome::Unfinished })
}
