//! How `regfs gc` prints its report, and how stdout is written to.

use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use clap::{Args, ValueEnum};

use crate::error::{Error, Result};
use crate::gc::report::{Details, Place, Report};
use crate::printable::Safely;

/// How the report is printed.
#[derive(Args, Debug)]
pub(super) struct OutputArgs {
    /// The form of the report
    #[arg(long, value_enum, default_value_t = Format::Text, conflicts_with = "json")]
    format: Format,
    /// Print the report as JSON; the same as --format json
    #[arg(long)]
    json: bool,
    /// Show every repository, every single thing, and which processes were ignored
    #[arg(short, long)]
    pub(super) verbose: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Format {
    /// For people
    Text,
    /// For programs; docs/report.md describes the fields
    Json,
    /// The lines that `registry garbage-collect` prints
    Distribution,
}

impl OutputArgs {
    /// Prints the report.
    pub(super) fn print(&self, report: &Report) -> Result<()> {
        let format = if self.json { Format::Json } else { self.format };
        let details = if self.verbose { Details::Everything } else { Details::Totals };
        to_stdout(|out| match format {
            Format::Text => report.write_text(&mut Safely::lines(out), place(), details),
            Format::Json => report.write_json(&mut Safely::json(out), place()),
            Format::Distribution => report.write_distribution(&mut Safely::lines(out)),
        })?;
        if format == Format::Distribution {
            // Nobody is left to tell when stderr can't be written to.
            let _ = report.write_remarks(&mut Safely::lines(io::stderr().lock()), place());
        }
        Ok(())
    }
}

/// What was typed for the store of the one command that this process runs.
static STORE: OnceLock<PathBuf> = OnceLock::new();

/// Notes which store the command is about; what is printed from then on may propose commands about it.
pub(super) fn set_store(store: Option<&Path>) {
    // Set once, in `main`; a second time would change nothing.
    let _ = STORE.set(store.unwrap_or(Path::new("STORE")).to_path_buf());
}

/// Where what we print is read.
pub(super) fn place() -> Place<'static> {
    Place::CommandLine(STORE.get().map_or(Path::new("STORE"), PathBuf::as_path))
}

/// Writes to stdout, through a [`Safely`] of the caller; a reader that goes away is no failure.
pub(super) fn to_stdout(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let mut out = BufWriter::with_capacity(1 << 16, io::stdout().lock());
    match write(&mut out).and_then(|()| out.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => {
            // What is still in the buffer has no reader.
            drop(out.into_parts());
            Ok(())
        }
        Err(e) => Err(Error::io("write to", Path::new("stdout"), e)),
        Ok(()) => Ok(()),
    }
}
