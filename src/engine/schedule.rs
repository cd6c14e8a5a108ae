//! What a mount does by itself: sweeps now and then, and looks where nobody tells of changes.

use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use jiff::ZonedDateTime;
use jiff::civil::Time;

use super::fresh::{COST_FACTOR, FRESH};
use super::{Engine, locked};
use crate::gc::guard::gate::{Gate, Said};
use crate::gc::guard::state::State;
use crate::trash::Author;
use crate::view::node::Node;

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

    /// When it begins next.
    fn opens_after(&self, now: &ZonedDateTime) -> Option<SystemTime> {
        let day = if now.time() < self.from { now.date() } else { now.date().tomorrow().ok()? };
        let opens = day.to_datetime(self.from).to_zoned_datetime(now.time_zone().clone()).ok()?;
        let since_epoch = u64::try_from(opens.timestamp().as_second()).ok()?;
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(since_epoch))
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
    if let Some(engine) = engine.upgrade() {
        engine.find_gate();
    }
    loop {
        let Some(engine) = engine.upgrade() else { return };
        engine.look_by_itself();
        if let Some(Schedule { every, window }) = schedule.filter(|_| !engine.is_retired()) {
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
            let next = due.map(|due| SystemTime::now() + due.saturating_duration_since(now));
            let opens =
                window.filter(|_| !is_open).and_then(|window| window.opens_after(&ZonedDateTime::now()));
            locked(&engine.reports).next_sweep = next.max(opens);
        }
        drop(engine);
        std::thread::sleep(TICK);
    }
}

impl Engine {
    /// Finds out what a sweep could rely on, so that whoever looks need not wait for one.
    fn find_gate(&self) {
        match self.registries.gate(Said::Nothing) {
            Ok(gate) => {
                log::info!("{gate}");
                if !self.settings.read_only {
                    self.registries.remember(&*self.store, "regfs mount", &Gate::unknown());
                }
                locked(&self.reports).gate.get_or_insert(gate);
            }
            Err(e) => log::warn!("{e}"),
        }
    }

    /// How long what the last sweep fenced has to wait; `None` where there is no such.
    fn fenced_until(&self) -> Option<Duration> {
        let garbage = self.garbage(&self.current());
        let fenced = garbage.iter().find(|total| total.state == State::Fenced)?;
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
        let opens = |hour: i8| {
            let noon = jiff::civil::date(2026, 3, 1)
                .at(hour, 0, 0, 0)
                .to_zoned_datetime(jiff::tz::TimeZone::UTC)
                .unwrap();
            humantime::format_rfc3339_seconds(night.opens_after(&noon).unwrap()).to_string()
        };
        assert_eq!((opens(0).as_str(), opens(12).as_str()), ("2026-03-01T01:00:00Z", "2026-03-02T01:00:00Z"));
        for wrong in ["", "1-5", "01:00", "01:00-01:00", "25:00-05:00", "01:60-05:00", "a:b-c:d"] {
            assert!(Window::parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
