//! "No registry runs", looked at again for as long as a sweep relies on it.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::Known;
use super::judge::{Verdict, judge};
use crate::error::{Error, Result};
use crate::gc::guard::gate::{Looks, Said};
use crate::printable::Printable;

/// What is known to the kernel as the first namespace of processes (`linux/proc_ns.h`, `PROC_PID_INIT_INO`).
const FIRST_NAMESPACE: &str = "pid:[4026531836]";

/// Judges again what was judged before.
pub(super) struct Stillness {
    known: Known,
    said: Said,
    relied_on: Mutex<String>,
}

impl Stillness {
    pub(super) fn new(known: Known, said: Said, relied_on: String) -> Stillness {
        Stillness { known, said, relied_on: Mutex::new(relied_on) }
    }
}

impl Looks for Stillness {
    fn look(&self) -> Result<()> {
        let seen = self.known.look(self.said)?;
        match judge(&seen, self.said)? {
            Verdict::Stopped => {
                *self.relied_on.lock().unwrap_or_else(PoisonError::into_inner) = seen.relied_on;
                Ok(())
            }
            Verdict::Off | Verdict::Ask(_) => Err(Error::invalid(
                "a registry that can be written to runs by now; run the sweep again, which then goes step by step",
            )),
            Verdict::Stop(why) => Err(Error::invalid(format!("a registry may be written to by now: {why}"))),
        }
    }

    fn relied_on(&self) -> String {
        self.relied_on.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Why to see no registry among the processes says nothing here, if so. `hidden` processes can't be looked into.
pub(super) fn blindness(hidden: usize) -> Option<String> {
    // The table may be that of another namespace than ours; its first process has the namespace that it shows.
    let shown = ["/proc/1/ns/pid", "/proc/self/ns/pid"].iter().find_map(|link| fs::read_link(link).ok());
    if shown.as_deref() != Some(Path::new(FIRST_NAMESPACE)) {
        return Some(match shown {
            Some(_) => "this is a container with a table of processes of its own".to_string(),
            None => "/proc shows no processes".to_string(),
        });
    }
    match hidden {
        0 => None,
        1 => Some("a process of another user can't be looked into".to_string()),
        many => Some(format!("{many} processes of other users can't be looked into")),
    }
}

/// What a stopped sweep relies on, in words.
pub(super) fn relied_on(count: usize, root: &Path) -> String {
    format!(
        "no registry among {count} processes, no file below {} open, no container has it mounted",
        root.printable()
    )
}
