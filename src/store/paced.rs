//! A storage that is asked no more than others can bear: only so often in a second, or with long breaks.
//!
//! The priority of a process does not help everywhere (sched(7): with autogroups it counts only within a session), and
//! those who wait for a registry wait for its processor, its disk and the locks of its filesystem alike. So a sweep that
//! looks at a storage beside a registry takes breaks, several times as long as it has worked.
//!
//! Every call that reaches the storage comes through here, those to a [`Directory`] too.

use std::cell::Cell;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::{Directory, Entry, Kind, Reader, Space, Stat, Store};
use crate::clock::Reading;
use crate::error::{Error, Result};
use crate::progress::Progress;

/// So long is worked without a break.
const WORKS: Duration = Duration::from_millis(1);
/// So many times as long is each break.
const RESTS: u32 = 9;
/// The longest break: where a single call took seconds, the disk is slow, and resting does not help it.
const LONGEST: Duration = Duration::from_millis(50);
/// How soon a run that was told to stop does.
const STOPS_WITHIN: Duration = Duration::from_millis(100);

thread_local! {
    /// Since when this thread has worked, as if it had worked without waiting.
    static BEGAN: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Passes calls on at a pace.
pub struct Paced<'a> {
    inner: &'a dyn Store,
    pace: Pace,
    /// A run that was told to stop waits no more.
    progress: &'a dyn Progress,
    clock: &'a dyn Clock,
}

enum Pace {
    /// So long between two calls, and when the next one may be made.
    Rate(Duration, Mutex<Instant>),
    /// With breaks.
    Breaks,
}

/// Tells the time and lets it pass.
trait Clock: Sync {
    fn now(&self) -> Instant;
    fn sleep(&self, time: Duration);
}

struct Monotonic;

impl Clock for Monotonic {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

impl<'a> Paced<'a> {
    /// At most `rate` calls in a second; whoever comes too early waits.
    pub fn at_rate(inner: &'a dyn Store, rate: u32, progress: &'a dyn Progress) -> Paced<'a> {
        let pace = Pace::Rate(Duration::from_secs(1) / rate.max(1), Mutex::new(Instant::now()));
        Paced { inner, pace, progress, clock: &Monotonic }
    }

    /// With breaks, as long as `progress` goes on.
    pub fn with_breaks(inner: &'a dyn Store, progress: &'a dyn Progress) -> Paced<'a> {
        Paced { inner, pace: Pace::Breaks, progress, clock: &Monotonic }
    }

    /// Waits until so many calls may be made.
    fn wait(&self, calls: usize) {
        match &self.pace {
            Pace::Rate(pause, next) => {
                self.wait_for_turn(*pause * u32::try_from(calls).unwrap_or(u32::MAX), next)
            }
            Pace::Breaks => self.rest(),
        }
    }

    fn wait_for_turn(&self, takes: Duration, next: &Mutex<Instant>) {
        let now = self.clock.now();
        let until = {
            let mut next = next.lock().unwrap_or_else(PoisonError::into_inner);
            let until = (*next).max(now);
            *next = until + takes;
            until
        };
        while !self.progress.is_stopped() {
            let left = until.saturating_duration_since(self.clock.now());
            if left.is_zero() {
                break;
            }
            self.clock.sleep(left.min(STOPS_WITHIN));
        }
        // Waiting is no work, after which a break would be due.
        let waited = self.clock.now().saturating_duration_since(now);
        BEGAN.set(BEGAN.get().map(|began| began + waited));
    }

    fn rest(&self) {
        let now = self.clock.now();
        let worked = BEGAN.get().map(|began| now.saturating_duration_since(began));
        if worked.is_none_or(|worked| worked >= WORKS) {
            if let Some(worked) = worked.filter(|_| !self.progress.is_stopped()) {
                self.clock.sleep((worked * RESTS).min(LONGEST));
            }
            BEGAN.set(Some(self.clock.now()));
        }
    }

    fn turns(&self, calls: usize) -> &'a dyn Store {
        self.wait(calls);
        self.inner
    }

    fn turn(&self) -> &'a dyn Store {
        self.turns(1)
    }
}

/// A directory in such a storage.
struct PacedDirectory<'p, 'a> {
    paced: &'p Paced<'a>,
    inner: Box<dyn Directory + 'p>,
}

impl Directory for PacedDirectory<'_, '_> {
    fn read(&mut self, name: &Path, limit: usize, facts: bool) -> Result<Option<(&[u8], Option<Stat>)>> {
        self.paced.wait(1);
        self.inner.read(name, limit, facts)
    }

    fn stat(&self, name: &Path) -> Result<Option<Stat>> {
        self.paced.wait(1);
        self.inner.stat(name)
    }
}

impl Store for Paced<'_> {
    fn clocks(&self) -> Reading {
        self.inner.clocks()
    }

    fn list(&self, prefix: &Path) -> Result<Option<Vec<Entry>>> {
        self.turn().list(prefix)
    }

    fn list_each(&self, prefix: &Path, each: &mut dyn FnMut(&OsStr, Kind)) -> Result<bool> {
        self.turn().list_each(prefix, each)
    }

    fn directory<'s>(&'s self, prefix: &Path) -> Result<Box<dyn Directory + 's>> {
        Ok(Box::new(PacedDirectory { paced: self, inner: self.turn().directory(prefix)? }))
    }

    fn stat(&self, path: &Path) -> Result<Option<Stat>> {
        self.turn().stat(path)
    }

    fn read(&self, path: &Path, limit: usize) -> Result<Option<(Vec<u8>, Stat)>> {
        self.turn().read(path, limit)
    }

    fn open(&self, path: &Path) -> Result<Option<Box<dyn Reader>>> {
        self.turn().open(path)
    }

    fn write(&self, path: &Path, content: &[u8]) -> Result<()> {
        self.turn().write(path, content)
    }

    fn write_with(&self, path: &Path, write: &dyn Fn(&mut dyn io::Write) -> io::Result<()>) -> Result<()> {
        self.turn().write_with(path, write)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<bool> {
        self.turn().rename(from, to)
    }

    fn remove(&self, paths: &[PathBuf]) -> Vec<Error> {
        self.turns(paths.len()).remove(paths)
    }

    fn prune(&self, prefix: &Path) -> Result<()> {
        self.turn().prune(prefix)
    }

    fn remove_tree(&self, prefix: &Path) -> Result<()> {
        self.turn().remove_tree(prefix)
    }

    fn holds_files(&self, prefix: &Path) -> Result<bool> {
        self.turn().holds_files(prefix)
    }

    fn directory_changed(&self, path: &Path) -> Result<Option<SystemTime>> {
        self.turn().directory_changed(path)
    }

    fn remove_directory(&self, path: &Path) -> Result<bool> {
        self.turn().remove_directory(path)
    }

    fn make_directory(&self, path: &Path) -> Result<()> {
        self.turn().make_directory(path)
    }

    fn create(&self, path: &Path, content: &[u8]) -> Result<()> {
        self.turn().create(path, content)
    }

    fn replace(&self, path: &Path, content: &[u8], saved: &Path) -> Result<()> {
        self.turn().replace(path, content, saved)
    }

    fn sync(&self) -> Result<()> {
        self.turn().sync()
    }

    fn lock(&self, who: &str, wait: Duration) -> Result<Box<dyn Send>> {
        self.inner.lock(who, wait)
    }

    fn is_writable(&self) -> bool {
        self.inner.is_writable()
    }

    fn space(&self) -> Result<Space> {
        self.turn().space()
    }

    fn full(&self, path: &Path) -> PathBuf {
        self.inner.full(path)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::progress::Unwatched;
    use crate::store::memory::Memory;

    /// What a call takes on this clock.
    const CALL: Duration = Duration::from_micros(100);

    /// Time passes with each question for it, and while somebody sleeps.
    struct Fake {
        now: Mutex<Instant>,
        slept: Mutex<Duration>,
        tick: Duration,
    }

    impl Fake {
        fn new(tick: Duration) -> Fake {
            BEGAN.set(None);
            Fake { now: Mutex::new(Instant::now()), slept: Mutex::default(), tick }
        }

        fn slept(&self) -> Duration {
            *self.slept.lock().unwrap()
        }
    }

    impl Clock for Fake {
        fn now(&self) -> Instant {
            let mut now = self.now.lock().unwrap();
            *now += self.tick;
            *now
        }

        fn sleep(&self, time: Duration) {
            *self.now.lock().unwrap() += time;
            *self.slept.lock().unwrap() += time;
        }
    }

    /// A way to make some calls.
    type Calls = (&'static str, fn(&Paced<'_>, usize));

    /// Every way to the files of a store.
    const WAYS: [Calls; 4] = [
        ("stat", |store, calls| {
            (0..calls).for_each(|_| assert!(store.stat(Path::new("a/x")).unwrap().is_some()))
        }),
        ("remove", |store, calls| assert!(store.remove(&vec![PathBuf::from("nothing"); calls]).is_empty())),
        ("read in a directory", |store, calls| {
            let mut directory = store.directory(Path::new("a")).unwrap();
            (1..calls).for_each(|_| assert!(directory.read(Path::new("x"), 9, false).unwrap().is_some()));
        }),
        ("stat in a directory", |store, calls| {
            let directory = store.directory(Path::new("a")).unwrap();
            (1..calls).for_each(|_| assert!(directory.stat(Path::new("x")).unwrap().is_some()));
        }),
    ];

    fn store() -> Memory {
        let memory = Memory::default();
        memory.write(Path::new("a/x"), b"x").unwrap();
        memory
    }

    #[test]
    fn so_many_calls_are_made_in_a_second_by_every_way() {
        let memory = store();
        for (name, way) in WAYS {
            let clock = Fake::new(Duration::ZERO);
            let paced = Paced { clock: &clock, ..Paced::at_rate(&memory, 10, &Unwatched) };
            let paced =
                Paced { pace: Pace::Rate(Duration::from_millis(100), Mutex::new(clock.now())), ..paced };
            way(&paced, 20);
            assert!(paced.stat(Path::new("a/x")).unwrap().is_some());
            // The first call is made at once.
            assert_eq!(clock.slept(), Duration::from_secs(2), "{name}");
        }
    }

    #[test]
    fn who_works_rests_for_nine_tenths_of_the_time_by_every_way() {
        let memory = store();
        for (name, way) in WAYS.into_iter().filter(|(name, _)| *name != "remove") {
            let clock = Fake::new(CALL);
            let began = clock.now();
            way(&Paced { clock: &clock, ..Paced::with_breaks(&memory, &Unwatched) }, 1000);
            let (slept, all) = (clock.slept(), clock.now() - began);
            assert!(slept > all * 8 / 10 && slept <= all * 9 / 10, "{name}: {slept:?} of {all:?}");
        }
    }

    #[test]
    fn who_waits_for_a_turn_needs_no_further_break() {
        let memory = store();
        let clock = Fake::new(Duration::ZERO);
        let rate = Paced { clock: &clock, ..Paced::at_rate(&memory, 10, &Unwatched) };
        let rate = Paced { pace: Pace::Rate(Duration::from_millis(100), Mutex::new(clock.now())), ..rate };
        let both = Paced { clock: &clock, ..Paced::with_breaks(&rate, &Unwatched) };
        (0..=20).for_each(|_| assert!(both.stat(Path::new("a/x")).unwrap().is_some()));
        assert_eq!(clock.slept(), Duration::from_secs(2));
    }
}
