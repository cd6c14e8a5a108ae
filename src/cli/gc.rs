//! `regfs gc`

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::output::OutputArgs;
use super::progress::Watcher;
use super::{Environment, Outcome, duration, open, typed};
use crate::catalog::Tables;
use crate::catalog::cache::Place;
use crate::error::{Error, Result};
use crate::gc::{self, Options};
use crate::trash::Author;
use crate::view::control::{parse_glob, parse_referrers};

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
    /// In a dry run, don't read tags: counts what only a tag names whose manifest was deleted, which a sweep leaves
    #[arg(long, requires = "dry_run", conflicts_with_all = ["untagged", "referrers", "thorough", "repair"])]
    quick: bool,
    /// Take manifests that no tag leads to, too; with an age, those pushed longer ago than that
    #[arg(long, value_name = "AGE", num_args = 0..=1, require_equals = true, default_missing_value = "0", value_parser = duration)]
    untagged: Option<Duration>,
    /// Collect only in repositories whose names match; * stands for anything but a slash, ** for anything
    #[arg(long, value_name = "GLOB", value_parser = parse_glob)]
    repository: Option<glob::Pattern>,
    /// Take uploads that began longer ago than this and were never finished
    #[arg(long, value_name = "AGE", default_value = "7d", value_parser = duration)]
    uploads: Duration,
    /// Take signatures, attestations and SBOMs of images that are gone
    #[arg(long, value_name = "orphans", value_parser = parse_referrers)]
    referrers: Option<bool>,
    /// Make links whole that are broken or missing, where their place tells what belongs there
    #[arg(long)]
    repair: bool,
    /// Look into every directory for leftovers; a sweep of a small store (100,000 directories) always does
    #[arg(long)]
    thorough: bool,
    /// Let damage keep nothing: what a manifest or a tag that can't be read might lead to is taken
    #[arg(long)]
    ignore_damaged: bool,
    /// Leave what was used more recently than this
    #[arg(long, value_name = "AGE", default_value = "24h", value_parser = duration)]
    grace: Duration,
    /// Purge what has been in the trash for longer than this
    #[arg(long, value_name = "AGE", default_value = "7d", value_parser = duration)]
    keep: Duration,
    /// Free the bytes at once; for a registry that is stopped or read-only
    #[arg(long)]
    now: bool,
    /// How many threads look at the store; if not given 32, which pays on a cold disk, or one for each processor
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Keep parsed manifests there, in a dry run as well; by default inside the store, unless it is a dry run
    #[arg(long, value_name = "DIRECTORY")]
    cache_dir: Option<PathBuf>,
    /// Neither use nor write the cache of parsed manifests
    #[arg(long, conflicts_with = "cache_dir")]
    no_cache: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) fn run(args: &GcArgs, typed_args: &[OsString], environment: Environment<'_>) -> Result<Outcome> {
    let store = open(&args.store, environment)?;
    let options = Options {
        dry_run: args.dry_run,
        untagged: args.untagged.is_some(),
        untagged_for: args.untagged.unwrap_or_default(),
        repositories: args.repository.clone(),
        uploads: args.uploads,
        orphans: args.referrers == Some(true),
        repair: args.repair,
        thorough: args.thorough,
        ignore_damaged: args.ignore_damaged,
        grace: args.grace,
        keep: args.keep,
        now: args.now,
        quick: args.quick,
        cache: match &args.cache_dir {
            _ if args.no_cache => None,
            Some(directory) => Some(Place::Directory(directory.clone())),
            None => Some(Place::Store),
        },
    };
    let author = Author::current(&typed(typed_args));
    let tables = Tables::new(args.threads);
    let watcher = Watcher::new(args.output.verbose)?;
    let report = gc::run(&store, &tables, &options, &author, &*watcher);
    watcher.finish();
    let report = report?;
    args.output.print(&report, &args.store)?;
    if report.is_stopped {
        return Err(Error::invalid(format!("stopped by a signal: {}", report.outcome())));
    }
    let outcome = if report.is_complete() { Outcome::Done } else { Outcome::Unfinished };
    // The process ends here; taking a catalog of millions apart first would only take time.
    std::mem::forget((report, tables));
    Ok(outcome)
}
