//! What a mount does by itself: sweeps now and then, looks where nobody tells of changes, and tells registries what was
//! removed.

use std::sync::Weak;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime};

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use jiff::ZonedDateTime;
use jiff::civil::Time;

use super::fresh::{COST_FACTOR, FRESH};
use super::{Engine, LOCK_WAIT, locked};
use crate::digest::{Algorithm, Digest};
use crate::error::Error;
use crate::gc::dangling;
use crate::gc::guard::gate::Registries;
use crate::gc::guard::state::State;
use crate::layout;
use crate::trash::Author;
use crate::view::node::Node;
use crate::watch::Changes;

/// How often it is asked whether something is due.
const TICK: Duration = Duration::from_millis(500);
/// The first sweep comes so long after the mount at the latest, so that a machine that is often started is swept, too.
const FIRST: Duration = Duration::from_secs(60);

/// A part of the day by the local clock, which may hold midnight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    from: Time,
    to: Time,
}

impl Window {
    /// Reads `01:00-05:00`.
    pub fn parse(text: &str) -> Result<Window, String> {
        let wrong = || format!("{text:?} is no part of the day; write for example 01:00-05:00");
        let time = |text: &str| {
            let (hour, minute) = text.trim().split_once(':')?;
            let (hour, minute): (i8, i8) = (hour.parse().ok()?, minute.parse().ok()?);
            Time::new(hour, minute, 0, 0).ok()
        };
        let (from, to) = text.split_once('-').ok_or_else(wrong)?;
        match (time(from), time(to)) {
            (Some(from), Some(to)) if from != to => Ok(Window { from, to }),
            _ => Err(wrong()),
        }
    }

    fn holds(&self, now: Time) -> bool {
        match self.from < self.to {
            true => self.from <= now && now < self.to,
            false => self.from <= now || now < self.to,
        }
    }

    fn is_open(&self) -> bool {
        self.holds(ZonedDateTime::now().time())
    }
}

/// When sweeps begin by themselves.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// So long after the one before.
    pub every: Duration,
    /// Only then; one that still runs at its end is stopped.
    pub window: Option<Window>,
}

/// Does by itself what is due, as long as there is an engine.
pub fn run(engine: &Weak<Engine>, schedule: Option<Schedule>) {
    let began = Instant::now();
    let mut due = schedule.map(|schedule| began + schedule.every.min(FIRST));
    let mut is_ours = false;
    let mut sweeps = 0;
    loop {
        let Some(engine) = engine.upgrade() else { return };
        engine.look_by_itself();
        if let Some(Schedule { every, window }) = schedule {
            let is_open = window.is_none_or(|window| window.is_open());
            let is_running = engine.run.is_running.load(Ordering::SeqCst);
            if is_ours && is_running && !is_open {
                engine.run.watched.stop();
            }
            is_ours &= is_running;
            let now = Instant::now();
            let ended = locked(&engine.reports).sweeps;
            if ended != sweeps {
                // What is fenced goes on when its drain is over; the rest has time.
                sweeps = ended;
                due = due.min(engine.fenced_until().map(|wait| now + wait)).or(due);
            }
            if is_open && !is_running && due.is_some_and(|due| due <= now) {
                due = Some(now + every);
                is_ours = true;
                let author = Author::current("regfs mount --sweep-every");
                if let Err(e) = engine.command(Node::ControlGc, "sweep &", &author) {
                    log::warn!("{e}");
                }
            }
            let left = due.map(|due| due.saturating_duration_since(now));
            locked(&engine.reports).next_sweep = left.map(|left| SystemTime::now() + left);
        }
        drop(engine);
        std::thread::sleep(TICK);
    }
}

impl Engine {
    /// Makes registries forget links that came without bytes: whoever is told "exists" would push an image without them.
    pub(super) fn forget_dangling(&self, changes: &Changes) {
        if self.settings.read_only {
            return;
        }
        for (repository, digest) in &changes.links {
            // Where that can't be told, a sweep finds out.
            let is_missing = |path: &Path| matches!(self.store.stat(path), Ok(None));
            if digest.algorithm() == Algorithm::Sha256
                && is_missing(&layout::blob_data(digest))
                && !is_missing(&layout::layer_link(repository, digest))
            {
                self.forget(Forget::Dangling(repository.clone(), *digest));
            }
        }
    }

    /// Tells registries behind the caller what they are to forget.
    pub(super) fn forget(&self, what: Forget) {
        // Without a mount nobody is there to do it.
        let _ = self.forgetting.send(what);
    }

    fn forget_link(
        &self,
        registries: &dyn Registries,
        repository: &Path,
        digest: &Digest,
    ) -> Result<(), Error> {
        let author = Author::current("regfs mount");
        let _lock = self.store.lock(&author.command, LOCK_WAIT)?;
        if dangling::forget(&*self.store, registries, &author, repository, digest)? {
            let what = layout::layer_link(repository, digest);
            let why = "a registry remembered it, and its bytes are nowhere";
            self.note(&author, "forget", &what.display().to_string(), why);
        }
        Ok(())
    }

    /// How long what the last sweep fenced has to wait; `None` where there is no such.
    fn fenced_until(&self) -> Option<Duration> {
        let reports = locked(&self.reports);
        let (_, totals) = reports.sweep.as_ref()?;
        let fenced = totals.iter().find(|total| total.state == State::Fenced)?;
        // What was due already could not go on, and will not sooner because it is hurried.
        fenced.next?.duration_since(SystemTime::now()).ok()
    }

    /// Looks at the storage where nobody tells of changes and something lies in the trash that may be in use again.
    fn look_by_itself(&self) {
        let (age, cost) = {
            let looked = locked(&self.looked);
            (looked.at.elapsed(), looked.cost)
        };
        if !self.is_watching()
            && !self.settings.read_only
            && !self.current().trash.is_empty()
            && age > FRESH.max(cost * COST_FACTOR)
            && let Ok(mut changing) = self.changing.try_lock()
        {
            self.refresh_whole(&mut changing);
        }
    }
}

/// What registries are to forget.
pub(super) enum Forget {
    /// A manifest of a repository, which was removed.
    Manifest(PathBuf, Digest),
    /// A layer link of a repository, if its bytes are nowhere.
    Dangling(PathBuf, Digest),
}

/// Tells registries what they are to forget, as long as there is an engine.
pub fn forget(engine: &Weak<Engine>) {
    let receiver = engine.upgrade().and_then(|engine| locked(&engine.forgotten).take());
    if let Some(receiver) = receiver {
        forgetting(engine, &receiver);
    }
}

fn forgetting(engine: &Weak<Engine>, receiver: &Receiver<Forget>) {
    loop {
        let first = match receiver.recv_timeout(TICK) {
            Ok(first) => first,
            Err(RecvTimeoutError::Timeout) if engine.strong_count() > 0 => continue,
            Err(_) => return,
        };
        let Some(engine) = engine.upgrade() else { return };
        let Some(registries) = engine.registries.rememberers() else { continue };
        for what in std::iter::once(first).chain(receiver.try_iter()) {
            let told = match &what {
                Forget::Manifest(repository, digest) => registries.forget(repository, digest),
                Forget::Dangling(repository, digest) => engine.forget_link(&registries, repository, digest),
            };
            if let Err(e) = told {
                let (Forget::Manifest(repository, digest) | Forget::Dangling(repository, digest)) = what;
                engine.failed(&format!(
                    "{}@{digest} is gone, and a registry may still remember it: {e}",
                    repository.display()
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn windows_are_parts_of_the_day() {
        let time = |hour, minute| Time::new(hour, minute, 0, 0).unwrap();
        let night = Window::parse("01:00-05:30").unwrap();
        for (hour, minute, is_in) in [(0, 59, false), (1, 0, true), (5, 29, true), (5, 30, false)] {
            assert_eq!(night.holds(time(hour, minute)), is_in, "{hour}:{minute}");
        }
        let midnight = Window::parse("22:00-02:00").unwrap();
        for (hour, is_in) in [(21, false), (22, true), (0, true), (1, true), (2, false), (12, false)] {
            assert_eq!(midnight.holds(time(hour, 0)), is_in, "{hour}");
        }
        for wrong in ["", "1-5", "01:00", "01:00-01:00", "25:00-05:00", "01:60-05:00", "a:b-c:d"] {
            assert!(Window::parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
