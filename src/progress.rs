//! Progress: where a run is, for whoever watches, and how it is told to stop.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// Told by a run what it does. Several threads of a run may do so; steps are to be cheap.
pub trait Progress: Sync {
    /// A phase begins; `total` things are to be done in it, 0 where that is not known.
    fn phase(&self, name: &'static str, total: usize);
    /// `count` more things are done. Whoever does many small ones adds them up first.
    fn step(&self, count: usize);
    /// So many more bytes were dealt with.
    fn bytes(&self, _count: u64) {}
    /// Asked between two steps; a run that is told to stop ends cleanly.
    fn is_stopped(&self) -> bool;
}

/// Nobody watches.
pub struct Unwatched;

impl Progress for Unwatched {
    fn phase(&self, _name: &'static str, _total: usize) {}
    fn step(&self, _count: usize) {}
    fn is_stopped(&self) -> bool {
        false
    }
}

/// The figures of a run, for somebody who looks now and then.
pub struct Watched {
    phase: Mutex<Phase>,
    done: AtomicUsize,
    bytes: AtomicU64,
    is_stopped: AtomicBool,
}

#[derive(Clone, Copy)]
struct Phase {
    name: &'static str,
    total: usize,
    began: Instant,
    run_began: Instant,
    started_at: SystemTime,
}

/// What a look at [`Watched`] finds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Position {
    /// What is being done.
    pub phase: &'static str,
    /// How many things of this phase are done.
    pub done: usize,
    /// Of how many; 0 where that is not known.
    pub total: usize,
    /// Bytes dealt with in this phase.
    pub bytes: u64,
    /// When the run began.
    pub started_at: SystemTime,
    /// How long ago that was.
    pub elapsed: Duration,
    /// How long the phase may yet take; `None` where that is not known.
    pub eta: Option<Duration>,
}

impl Default for Watched {
    fn default() -> Watched {
        let now = Instant::now();
        let phase = Phase { name: "", total: 0, began: now, run_began: now, started_at: SystemTime::now() };
        Watched {
            phase: Mutex::new(phase),
            done: AtomicUsize::new(0),
            bytes: AtomicU64::new(0),
            is_stopped: AtomicBool::new(false),
        }
    }
}

impl Watched {
    /// A new run begins; nobody has told it to stop.
    pub fn begin(&self) {
        let fresh = Watched::default();
        self.is_stopped.store(false, Ordering::SeqCst);
        self.enter(fresh.phase.into_inner().unwrap_or_else(PoisonError::into_inner));
    }

    /// Tells the run to end after its current step.
    pub fn stop(&self) {
        self.is_stopped.store(true, Ordering::SeqCst);
    }

    /// Where the run is.
    pub fn look(&self) -> Position {
        let phase = *self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        let done = self.done.load(Ordering::Relaxed);
        Position {
            phase: phase.name,
            done,
            total: phase.total,
            bytes: self.bytes.load(Ordering::Relaxed),
            started_at: phase.started_at,
            elapsed: phase.run_began.elapsed(),
            eta: eta(phase.began.elapsed(), done, phase.total),
        }
    }

    fn enter(&self, next: Phase) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = next;
        self.done.store(0, Ordering::Relaxed);
        self.bytes.store(0, Ordering::Relaxed);
    }
}

impl Progress for Watched {
    fn phase(&self, name: &'static str, total: usize) {
        log::debug!("collection: {name}");
        let current = *self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        self.enter(Phase { name, total, began: Instant::now(), ..current });
    }

    fn step(&self, count: usize) {
        self.done.fetch_add(count, Ordering::Relaxed);
    }

    fn bytes(&self, count: u64) {
        self.bytes.fetch_add(count, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::Relaxed)
    }
}

/// How long the rest takes if it goes on like this; `None` before the first step and where the total is unknown.
fn eta(elapsed: Duration, done: usize, total: usize) -> Option<Duration> {
    if done == 0 || total == 0 {
        return None;
    }
    let seconds = elapsed.as_secs_f64() / done as f64 * total.saturating_sub(done) as f64;
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_takes_as_long_as_what_was_done() {
        let second = Duration::from_secs(1);
        for (elapsed, done, total, left) in [
            (10 * second, 0, 100, None),
            (10 * second, 5, 0, None),
            (10 * second, 25, 100, Some(30 * second)),
            (10 * second, 100, 100, Some(Duration::ZERO)),
            (10 * second, 120, 100, Some(Duration::ZERO)),
        ] {
            assert_eq!(eta(elapsed, done, total), left, "{done} of {total}");
        }
    }

    #[test]
    fn each_phase_counts_anew_and_a_run_forgets_the_stop_of_the_one_before() {
        let watched = Watched::default();
        watched.phase("take", 4);
        watched.step(3);
        watched.bytes(7);
        let position = watched.look();
        assert_eq!((position.phase, position.done, position.total, position.bytes), ("take", 3, 4, 7));
        assert!(position.eta.is_some());
        watched.phase("purge", 0);
        let position = watched.look();
        assert_eq!((position.phase, position.done, position.bytes, position.eta), ("purge", 0, 0, None));
        watched.stop();
        assert!(watched.is_stopped());
        watched.begin();
        assert!(!watched.is_stopped());
        assert_eq!(watched.look().phase, "");
    }
}
