//! `regfs gc`

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;

use super::output::OutputArgs;
use super::progress::Watcher;
use super::registry::RegistryArgs;
use super::{Environment, Outcome, duration, say, store_argument, typed};
use crate::catalog::Tables;
use crate::catalog::cache::Place;
use crate::error::{Error, Result};
use crate::gc::guard::gate::{Gate, Said};
use crate::gc::named::Named;
use crate::gc::{self, Options, Progress};
use crate::keeper::Keeper;
use crate::registries::seen;
use crate::store::disk::Disk;
use crate::trash::Author;
use crate::view::control::{parse_glob, parse_rate, parse_referrers};

/// Collect garbage into the trash, or say what there is.
///
/// Garbage is what no manifest of any repository leads to. It moves to a trash inside the store, from which
/// `regfs trash STORE undo` brings it back until it is purged.
#[derive(Args, Debug)]
pub(super) struct GcArgs {
    /// The registry's rootdirectory or its config.yml
    store: PathBuf,
    /// Say what a sweep with the same options would do now; change nothing
    #[arg(long)]
    dry_run: bool,
    /// In a dry run, don't read tags: counts also what only a tag names whose manifest was deleted, which a sweep leaves
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
    /// Take also what a manifest or a tag that can't be read might lead to
    #[arg(long)]
    ignore_damaged: bool,
    /// Leave what was used more recently than this
    #[arg(long, value_name = "AGE", default_value = "24h", value_parser = duration)]
    grace: Duration,
    /// Purge what has been in the trash for longer than this
    #[arg(long, value_name = "AGE", default_value = "7d", value_parser = duration)]
    keep: Duration,
    /// Go on where more than half of all manifests (and at least 20) would be removed
    #[arg(long)]
    allow_large: bool,
    /// No registry runs: take everything at once instead of step by step
    #[arg(long)]
    registry_stopped: bool,
    /// With --registry-stopped: don't look for a registry; nothing on this machine writes to this storage
    #[arg(long, requires = "registry_stopped")]
    force: bool,
    /// With --registry-stopped: the redis of the registry was emptied after the registry had stopped
    #[arg(long, requires = "registry_stopped")]
    cache_emptied: bool,
    /// Forget what earlier runs learnt of the registries of this storage; with no other option, do nothing else
    #[arg(long, conflicts_with = "dry_run")]
    forget_registries: bool,
    #[command(flatten)]
    registry: RegistryArgs,
    /// Go on, step by step, until nothing is left that could be taken
    #[arg(long, conflicts_with = "dry_run")]
    wait: bool,
    /// Free the bytes at once; for a registry that is stopped or read-only
    #[arg(long)]
    now: bool,
    /// Make at most N calls to the storage in a second (looks, moves, removals)
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    rate: Option<u32>,
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

impl GcArgs {
    /// What was typed for the store.
    pub(super) fn store(&self) -> &Path {
        &self.store
    }

    fn options(&self) -> Options {
        Options {
            dry_run: self.dry_run,
            untagged: self.untagged.is_some(),
            untagged_for: self.untagged.unwrap_or_default(),
            repositories: self.repository.clone(),
            uploads: self.uploads,
            orphans: self.referrers == Some(true),
            repair: self.repair,
            thorough: self.thorough,
            ignore_damaged: self.ignore_damaged,
            grace: self.grace,
            keep: self.keep,
            now: self.now,
            allow_large: self.allow_large,
            keeper: Keeper::default(),
            refusal: None,
            gate: Gate::unknown(),
            drain: self.registry.drain,
            named: Named::default(),
            rate: self.rate,
            quick: self.quick,
            cache: match &self.cache_dir {
                _ if self.no_cache => None,
                Some(directory) => Some(Place::Directory(directory.clone())),
                None => Some(Place::Store),
            },
        }
    }

    fn said(&self) -> Said {
        Said::of(self.registry_stopped, self.force, self.cache_emptied)
    }
}

pub(super) fn run(args: &GcArgs, typed_args: &[OsString], environment: Environment<'_>) -> Result<Outcome> {
    let argument = store_argument(&args.store, environment)?;
    let store = Disk::open(&argument.storage_root)?;
    let registries = args.registry.known(&argument, environment)?;
    let author = Author::current(&typed(typed_args));
    if let Some(ignored) = registries.ignored().filter(|_| args.output.verbose) {
        say(&ignored);
    }
    if args.forget_registries {
        let forgotten = seen::forget(&store, &author.command)?;
        let all = if forgotten.is_empty() {
            "nothing was known of registries".to_string()
        } else {
            forgotten.join("\n")
        };
        say(&format!("forgot what was known of registries:\n{all}"));
        // The command, its name, the store, and this.
        if typed_args.len() <= 4 {
            return Ok(Outcome::Done);
        }
    }
    let tables = Tables::new(args.threads);
    let mut is_complete = true;
    let report = loop {
        let (gate, refusal) = Gate::of_run(registries.gate(args.said()), args.dry_run)?;
        if !args.dry_run {
            registries.remember(&store, &author.command, &Gate::unknown());
        }
        let watcher = Watcher::new(args.output.verbose)?;
        let options = Options { gate, refusal, keeper: registries.keeper(), ..args.options() };
        gc::yield_to_clients(&options);
        let report = gc::run(&store, &tables, &options, &author, &*watcher);
        watcher.finish();
        let report = report?;
        if !args.dry_run {
            registries.remember(&store, &author.command, report.gate());
        }
        is_complete &= report.is_complete();
        let next = report.next_step().filter(|_| args.wait && !report.is_stopped && report.is_complete());
        let Some(next) = next else { break report };
        say(&format!(
            "{}; going on in {}",
            report.outcome(),
            humantime::format_duration(Duration::from_secs(next.as_secs() + 1))
        ));
        let watcher = Watcher::new(false)?;
        let until = Instant::now() + next.max(Duration::from_millis(100));
        while Instant::now() < until && !watcher.is_stopped() {
            std::thread::sleep(
                Duration::from_millis(50).min(until.saturating_duration_since(Instant::now())),
            );
        }
        if watcher.is_stopped() {
            return Err(Error::invalid(format!("stopped by a signal: {}", report.outcome())));
        }
        watcher.finish();
    };
    args.output.print(&report)?;
    if report.is_stopped {
        return Err(Error::invalid(format!("stopped by a signal: {}", report.outcome())));
    }
    let held_back = report.held_back().filter(|_| !args.dry_run);
    if let Some(why) = &held_back {
        say(&format!("regfs: {why}"));
    }
    let outcome = if is_complete && held_back.is_none() { Outcome::Done } else { Outcome::Unfinished };
    // The process ends here; taking a catalog of millions apart first would only take time.
    std::mem::forget((report, tables));
    Ok(outcome)
}
