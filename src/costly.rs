//! A value that takes time to find out, and is found out again only so often that it takes a small part of it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// It is found out again after so many times of what that took.
const FACTOR: u32 = 20;

/// Such a value.
#[derive(Debug)]
pub(crate) struct Costly<T>(Mutex<Option<Found<T>>>);

#[derive(Debug)]
struct Found<T> {
    value: T,
    at: Instant,
    cost: Duration,
}

impl<T> Default for Costly<T> {
    fn default() -> Costly<T> {
        Costly(Mutex::new(None))
    }
}

impl<T: Clone> Costly<T> {
    /// The value as it was found out last, or by `find` where that was too long ago. Others wait meanwhile.
    pub(crate) fn get(&self, find: impl FnOnce() -> T) -> T {
        // Whatever is in there was put in as a whole.
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = last.as_ref().filter(|found| found.at.elapsed() < found.cost * FACTOR) {
            return found.value.clone();
        }
        let began = Instant::now();
        let value = find();
        *last = Some(Found { value: value.clone(), at: Instant::now(), cost: began.elapsed() });
        value
    }

    /// It is another one by now.
    pub(crate) fn forget(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
