//! `regfs why`

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::output::to_stdout;
use super::{Environment, Outcome, duration, open};
use crate::catalog::Tables;
use crate::catalog::cache::{self, Place};
use crate::catalog::scan::scan;
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::gc::mark::{self, Untagged};
use crate::gc::why;
use crate::printable::Safely;

/// Say what keeps a blob or a manifest, or since when it is garbage.
///
/// One chain of references for each tag, untagged manifest or problem that leads to it, in whatever repository. Changes
/// nothing.
///
/// WHAT is a digest (sha256:HEX, or its first 6 or more digits), REPOSITORY:TAG or REPOSITORY@DIGEST.
#[derive(Args, Debug)]
#[command(after_help = JSON_HELP)]
pub(super) struct WhyArgs {
    /// The registry's rootdirectory or its config.yml
    store: PathBuf,
    /// A digest, the start of one, or an image reference
    what: String,
    /// Show every chain, not just the first ten
    #[arg(long)]
    all: bool,
    /// What was used more recently than this is no garbage yet
    #[arg(long, value_name = "AGE", default_value = "24h", value_parser = duration)]
    grace: Duration,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

const JSON_HELP: &str = "\
JSON: digest, kind, media_type, bytes, present, stored_as, kept, untagged (a sweep with --untagged takes it),
chains_found, chains: [{repository, root: tag|dangling-tag|untagged|held|problem, tag, pushed, problems,
  steps: [{link: names|referrer|stored-as|served-as, digest, kind, platform}]}],
garbage: {reason, last_used, eligible_at, eligible, layer_links} or null,
trash: [{id, bytes, manifest_of, layer_links}], obstacles (why no collection runs)";

impl WhyArgs {
    /// What was typed for the store.
    pub(super) fn store(&self) -> &Path {
        &self.store
    }
}

pub(super) fn run(args: &WhyArgs, environment: Environment<'_>) -> Result<Outcome> {
    let store = open(&args.store, environment)?;
    let (tables, links) = cache::load(&store, &Place::Store, &Tables::new(None));
    let catalog = scan(&store, &tables, Some(&links));
    let mark = mark::mark(&catalog, &Untagged::new());
    let (grace, now) = (args.grace, Clock::open(&store)?.now(&store));
    let facts = why::Facts { store: &store, catalog: &catalog, mark: &mark, grace, now };
    let digest = why::find(&facts, &args.what)?;
    let why = why::why(&facts, &digest, if args.all { usize::MAX } else { why::FEW })?;
    if args.json {
        let json = serde_json::to_string_pretty(&why.json());
        let json = json.map_err(|e| Error::io("write", Path::new("the answer"), e))?;
        to_stdout(|out| writeln!(Safely::json(out), "{json}"))?;
    } else {
        to_stdout(|out| why.write_text(&mut Safely::lines(out), super::output::place()))?;
    }
    Ok(Outcome::Done)
}
