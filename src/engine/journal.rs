//! What `control/log` reads like: a JSON line for each thing done, the newest ten thousand.

use std::collections::VecDeque;
use std::time::SystemTime;

use crate::advice::Place;
use crate::gc::report::timestamp;
use crate::printable;
use crate::trash::Author;

const LINES: usize = 10_000;

/// Lines of the log.
#[derive(Default)]
pub(super) struct Journal(VecDeque<String>);

impl Journal {
    pub(super) fn add(&mut self, author: &Author, action: &str, what: &str, result: &str) {
        let line = serde_json::json!({
            "time": timestamp(SystemTime::now()),
            "uid": author.uid,
            "pid": author.pid,
            "command": author.command,
            "action": action,
            "what": what,
            "result": Place::ControlFile.say(result),
        });
        if self.0.len() == LINES {
            self.0.pop_front();
        }
        self.0.push_back(printable::json(&format!("{line}\n")));
    }

    pub(super) fn text(&self) -> String {
        self.0.iter().map(String::as_str).collect()
    }
}
