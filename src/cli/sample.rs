//! `regfs sample`

use std::path::Path;

use super::{Outcome, print};
use crate::error::Result;
use crate::printable::Printable;
use crate::sample;

pub(super) fn run(directory: &Path) -> Result<Outcome> {
    let summary = sample::write(directory)?;
    print(&format!("made a sample registry in {}: {summary}\n", directory.printable()))?;
    Ok(Outcome::Done)
}
