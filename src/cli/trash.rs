//! `regfs trash`

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};

use super::output::{place, to_stdout};
use super::registry::RedisArgs;
use super::{Environment, Outcome, duration, print, say, store_argument, typed};
use crate::advice::Advice;
use crate::catalog::Tables;
use crate::error::{Error, Result};
use crate::gc::guard::gate::Said;
use crate::gc::{self, Options};
use crate::printable::Safely;
use crate::registries::Known;
use crate::registries::http::Access;
use crate::store::disk::Disk;
use crate::trash::undo::{LAST, which};
use crate::trash::{self, Author, Selection};
use crate::view::View;

/// List, undo or purge what was taken out of a store.
#[derive(Args, Debug)]
pub(super) struct TrashArgs {
    /// The registry's rootdirectory or its config.yml
    store: PathBuf,
    #[command(subcommand)]
    command: TrashCommand,
}

#[derive(Subcommand, Debug)]
enum TrashCommand {
    /// Show what is in the trash, oldest first
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Give back what a transaction took, and what that names
    Undo {
        /// As `list` shows it, or `last` for the newest; without, say which that is
        id: Option<String>,
    },
    /// Free the bytes for good: of one transaction, of old ones, or of all
    #[command(group = clap::ArgGroup::new("which").required(true))]
    Purge {
        /// As `list` shows it
        #[arg(group = "which", value_parser = clap::builder::NonEmptyStringValueParser::new())]
        id: Option<String>,
        /// Only transactions that began longer ago than this
        #[arg(long, group = "which", value_name = "AGE", value_parser = duration)]
        older: Option<Duration>,
        /// The whole trash: nothing of it can be undone afterwards
        #[arg(long, group = "which")]
        all: bool,
        /// No registry runs: purge what one may remember, too
        #[arg(long)]
        registry_stopped: bool,
        /// With --registry-stopped: don't look for a registry; nothing on this machine writes to this storage
        #[arg(long, requires = "registry_stopped")]
        force: bool,
        /// With --registry-stopped: the redis of the registry was emptied after the registry had stopped
        #[arg(long, requires = "registry_stopped")]
        cache_emptied: bool,
        #[command(flatten)]
        redis: Box<RedisArgs>,
    },
}

impl TrashArgs {
    /// What was typed for the store.
    pub(super) fn store(&self) -> &Path {
        &self.store
    }
}

pub(super) fn run(
    args: &TrashArgs,
    typed_args: &[OsString],
    environment: Environment<'_>,
) -> Result<Outcome> {
    let argument = store_argument(&args.store, environment)?;
    let store = Disk::open(&argument.storage_root)?;
    let author = Author::current(&typed(typed_args));
    match &args.command {
        TrashCommand::List { json } => {
            let summaries = trash::summaries(&store)?;
            match json {
                true => {
                    let json = serde_json::to_string_pretty(&summaries);
                    let json = json.map_err(|e| Error::io("write", Path::new("the list"), e))?;
                    to_stdout(|out| writeln!(Safely::json(out), "{json}"))?;
                }
                false => print(&View::trash_table(&summaries))?,
            }
            Ok(Outcome::Done)
        }
        TrashCommand::Undo { id } => {
            let Some(id) = id else {
                let command = Advice::Undo(LAST.to_string()).at(place());
                say(&format!("regfs: {}", which(&store, &command)?));
                return Ok(Outcome::Unusable);
            };
            let undone = gc::undo(&store, &author, id)?;
            print(&undone.text(&Advice::Undo(undone.id.clone()).at(place())))?;
            Ok(if undone.is_complete() { Outcome::Done } else { Outcome::Unfinished })
        }
        TrashCommand::Purge { id, older, all: _, registry_stopped, force, cache_emptied, redis } => {
            let selection = match (id, older) {
                (Some(id), _) => Selection::One(id.clone()),
                (None, Some(age)) => Selection::Older(*age),
                // Nothing else passes clap but --all.
                (None, None) => Selection::All,
            };
            let known = Known::new(&argument, &[], Access::default());
            let known = known.with_redis(redis.config(&argument, environment));
            let gate = known.gate(Said::of(*registry_stopped, *force, *cache_emptied))?;
            let options = Options { gate, keeper: known.keeper(), ..Options::default() };
            let purged = gc::purge_trash(&store, &Tables::default(), &author, &selection, &options)?;
            print(&purged.text())?;
            Ok(if purged.is_complete() { Outcome::Done } else { Outcome::Unfinished })
        }
    }
}
