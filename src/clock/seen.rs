//! What regfs has seen of the time, `.regfs/clock`: for each of the last boots the largest time that could be believed.
//!
//! ```text
//! {"written": {"time": …, "boot": …, "up_ms": …}, "seen": [{"time": …, "boot": …, "up_ms": …}, …]}
//! ```
//! The time of the file itself is what the clock of the storage said then. Losing the file only loses a witness: what
//! was noted with a [`Moment`] in this boot goes by `CLOCK_BOOTTIME` all the same.
//!
//! Written under the lock of the store by whoever may change it; a dry run only reads.

use std::path::Path;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::{Jump, Moment, Now, Reading, SAME, WORTH_TELLING};
use crate::error::Result;
use crate::layout;
use crate::printable::Printable;
use crate::store::Store;

/// Longest file; it takes some 100 bytes for each boot.
const LIMIT: usize = 64 << 10;
/// So many boots are kept: of this machine, and of others that share the storage.
const BOOTS: usize = 16;
/// After a reboot a clock may be so far ahead of the last run.
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
/// A clock that is so far behind other boots shows nonsense, and what it shows is not noted.
const DAY: Duration = Duration::from_secs(24 * 3600);
/// What happens often is noted so often.
const HOUR: Duration = Duration::from_secs(3600);
/// There was no regfs before 2025, so a clock that says so was never set.
const NO_EARLIER: Duration = Duration::from_secs(1_735_689_600);

/// The clocks, and what earlier runs saw of them.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    /// The largest time seen in each boot.
    seen: Vec<Moment>,
    /// By the clock of the storage: when the file was written.
    stored: Option<Moment>,
}

/// The file.
#[derive(Serialize, Deserialize)]
struct Record {
    written: Moment,
    seen: Vec<Moment>,
}

impl Clock {
    /// Reads what earlier runs have seen. What can't be understood was never seen.
    pub fn open(store: &dyn Store) -> Result<Clock> {
        let path = Path::new(layout::CLOCK);
        let (text, stat) = match store.read(path, LIMIT) {
            Ok(None) => return Ok(Clock::default()),
            Ok(Some(read)) => read,
            Err(e) if e.is_damage() => {
                log::warn!("{e}: what earlier runs saw of the time does not count");
                return Ok(Clock::default());
            }
            Err(e) => return Err(e),
        };
        match serde_json::from_slice::<Record>(&text) {
            Ok(Record { written, seen }) => Ok(Clock { seen, stored: Some(at(stat.modified, written)) }),
            Err(e) => {
                let path = store.full(path);
                log::warn!("{}: {e}: what earlier runs saw of the time does not count", path.printable());
                Ok(Clock::default())
            }
        }
    }

    /// What time it is.
    pub fn now(&self, store: &dyn Store) -> Now {
        self.judge(&store.clocks())
    }

    /// What time it is by `reading`.
    pub fn judge(&self, reading: &Reading) -> Now {
        let latest = self.latest(reading);
        let limit = latest.map_or(reading.kernel, |latest| latest.min(reading.kernel));
        let is_over = reading.wall.duration_since(limit).is_ok_and(|ahead| ahead > SAME);
        let trusted = if is_over { limit } else { reading.wall };
        let by = |later: SystemTime, earlier: SystemTime| {
            later.duration_since(earlier).ok().filter(|by| *by > WORTH_TELLING)
        };
        let ahead = latest.and_then(|latest| by(reading.kernel, latest)).map(Jump::Ahead);
        let faked = by(reading.wall, reading.kernel).map(Jump::Faked);
        let behind = self.earliest(reading).and_then(|earliest| by(earliest, reading.wall)).map(Jump::Behind);
        Now {
            wall: reading.wall,
            trusted,
            moment: Moment::new(trusted, reading),
            jump: ahead.or(faked).or(behind),
        }
    }

    fn of_this_boot(&self, reading: &Reading) -> Option<&Moment> {
        self.seen.iter().find(|moment| is_of(moment, reading))
    }

    /// The largest time seen in other boots.
    fn of_others(&self, reading: &Reading) -> Option<SystemTime> {
        self.seen.iter().filter(|moment| !is_of(moment, reading)).map(Moment::wall).max()
    }

    /// The latest that it can be; `None` where nothing was seen.
    fn latest(&self, reading: &Reading) -> Option<SystemTime> {
        let others = self.of_others(reading);
        let seen = match self.of_this_boot(reading) {
            Some(own) => Some(passed(own, reading).max(others.unwrap_or(SystemTime::UNIX_EPOCH))),
            // Absurd otherwise: then no time has passed.
            None => others.and_then(|others| {
                let is_absurd = reading.kernel.duration_since(others).is_ok_and(|ahead| ahead > YEAR);
                if is_absurd { Some(others) } else { others.checked_add(YEAR) }
            }),
        };
        let stored = self.stored.as_ref().filter(|moment| is_of(moment, reading));
        let stored = stored.map(|moment| passed(moment, reading));
        match (seen, stored) {
            (Some(seen), Some(stored)) => Some(seen.min(stored)),
            (seen, stored) => seen.or(stored),
        }
    }

    /// The earliest that it can be, going by what was seen; `None` where nothing was.
    fn earliest(&self, reading: &Reading) -> Option<SystemTime> {
        let own = self.of_this_boot(reading).map(|own| own.wall() + since(own, reading));
        own.max(self.of_others(reading))
    }

    /// The same as [`note`](Self::note), for what happens often.
    pub fn note_now_and_then(&mut self, store: &dyn Store) {
        let reading = store.clocks();
        if self.of_this_boot(&reading).is_none_or(|own| since(own, &reading) > HOUR) {
            self.note(store);
        }
    }

    /// Notes what time it is, and asks the storage. The caller holds the lock. What can't be written is not noted.
    pub fn note(&mut self, store: &dyn Store) {
        let reading = store.clocks();
        let latest = self.latest(&reading);
        let time = latest.map_or(reading.kernel, |latest| latest.min(reading.kernel));
        let is_unset = time < SystemTime::UNIX_EPOCH + NO_EARLIER;
        let is_behind = self.of_others(&reading).is_some_and(|others| time + DAY < others)
            || self.of_this_boot(&reading).is_some_and(|own| time < own.wall());
        if is_unset || is_behind {
            return;
        }
        let mut seen = self.seen.clone();
        seen.retain(|moment| !is_of(moment, &reading));
        seen.sort_unstable_by_key(|moment| std::cmp::Reverse(moment.wall()));
        seen.truncate(BOOTS - 1);
        seen.insert(0, Moment::new(time, &reading));
        match write(store, &reading, &seen) {
            Ok(stored) => *self = Clock { seen, stored },
            Err(e) => log::warn!("{e}: this run's time is not noted"),
        }
    }
}

fn write(store: &dyn Store, reading: &Reading, seen: &[Moment]) -> Result<Option<Moment>> {
    let path = Path::new(layout::CLOCK);
    let written = Moment::new(reading.kernel, reading);
    let record = Record { written: written.clone(), seen: seen.to_vec() };
    store.write_with(path, &|out| Ok(serde_json::to_writer(out, &record)?))?;
    Ok(store.stat(path)?.map(|stat| at(stat.modified, written)))
}

/// The same moment by another clock.
fn at(time: SystemTime, moment: Moment) -> Moment {
    let time = time.clamp(SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH + super::LAST_SECOND);
    Moment { time: humantime::format_rfc3339_nanos(time).to_string(), ..moment }
}

fn is_of(moment: &Moment, reading: &Reading) -> bool {
    !moment.boot.is_empty() && moment.boot == reading.boot
}

/// How long ago it was, in the same boot.
fn since(moment: &Moment, reading: &Reading) -> Duration {
    reading.up.saturating_sub(moment.up())
}

/// The latest that it can be after a moment of the same boot. A clock that is being adjusted goes faster by a thousandth at
/// most; the rest is what milliseconds round off.
fn passed(moment: &Moment, reading: &Reading) -> SystemTime {
    let since = since(moment, reading);
    moment.wall() + since + since / 1000 + Duration::from_millis(20)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::store::memory::Memory;

    /// The day that it is when tests begin.
    fn begin() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_800)
    }

    fn time(hours: i64) -> SystemTime {
        let by = Duration::from_secs((hours * 3600).unsigned_abs());
        if hours < 0 { begin() - by } else { begin() + by }
    }

    fn reading(hours: i64, boot: &str, up_hours: u64) -> Reading {
        let up = Duration::from_secs(up_hours * 3600);
        Reading { wall: time(hours), kernel: time(hours), boot: boot.to_string(), up }
    }

    /// A run at `reading` that notes the time; what the next one finds.
    fn run(store: &Memory, reading: &Reading) -> Clock {
        store.set_clocks(reading.clone());
        Clock::open(store).unwrap().note(store);
        Clock::open(store).unwrap()
    }

    /// By how many hours the time that is trusted is behind the wall clock, and what is said of it.
    fn judged(clock: &Clock, reading: &Reading) -> (u64, Option<&'static str>) {
        let now = clock.judge(reading);
        let lag = now.wall.duration_since(now.trusted).unwrap().as_secs_f64() / 3600.0;
        let word = now.jump.map(|jump| match jump {
            Jump::Ahead(_) => "ahead",
            Jump::Faked(_) => "faked",
            Jump::Behind(_) => "behind",
        });
        (lag.round() as u64, word)
    }

    #[test]
    fn time_counts_only_as_far_as_it_was_seen_to_pass() {
        let year = 365 * 24;
        // A run at noon, three hours after boot a. Then: the wall clock since, the boot, up.
        let cases = [
            ("goes on", 5, "a", 8, (0, None)),
            ("slept", 100, "a", 103, (0, None)),
            ("a year ahead", year + 1, "a", 4, (year as u64, Some("ahead"))),
            ("20 hours ahead", 20, "a", 3, (20, Some("ahead"))),
            ("set back", -10 * year, "a", 4, (0, Some("behind"))),
            ("a reboot", 24, "b", 0, (0, None)),
            ("a reboot after half a year", year / 2, "b", 0, (0, None)),
            ("a reboot, two years ahead", 2 * year, "b", 0, (2 * year as u64, Some("ahead"))),
            ("a reboot with an empty clock", -50 * year, "b", 0, (0, Some("behind"))),
            ("another machine", 1, "b", 5000, (0, None)),
        ];
        for (what, hours, boot, up, expected) in cases {
            let store = Memory::default();
            let clock = run(&store, &reading(0, "a", 3));
            assert_eq!(judged(&clock, &reading(hours, boot, up)), expected, "{what}");
        }
        assert_eq!(judged(&Clock::default(), &reading(year, "a", 1)), (0, None), "nothing was seen");
    }

    #[test]
    fn small_jumps_do_not_add_up_and_sleep_is_no_jump() {
        let store = Memory::default();
        let mut clock = run(&store, &reading(0, "a", 3));
        for number in 1..=10 {
            let jumped = reading(number * 20, "a", 3);
            assert_eq!(judged(&clock, &jumped), (20 * number as u64, Some("ahead")));
            clock = run(&store, &jumped);
        }
        for number in 1..=10 {
            let slept = reading(number * 20, "a", 3 + 20 * number as u64);
            assert_eq!(judged(&clock, &slept), (0, None), "{number}");
            clock = run(&store, &slept);
        }
    }

    #[test]
    #[allow(clippy::type_complexity, reason = "a table")]
    fn a_clock_that_was_wrong_for_a_while_is_forgotten_when_it_is_right() {
        let year = 365 * 24;
        // What runs said before; then it is hour 10 of a clock that is right.
        let stories: [(&str, &[Reading], Reading, (u64, Option<&str>)); 5] = [
            (
                "ahead, then right",
                &[reading(0, "a", 3), reading(year, "a", 4)],
                reading(10, "a", 13),
                (0, None),
            ),
            (
                "behind, then right",
                &[reading(0, "a", 3), reading(-10 * year, "a", 4)],
                reading(10, "a", 13),
                (0, None),
            ),
            (
                "empty at boot, then right",
                &[reading(0, "a", 3), reading(-60 * year, "b", 0)],
                reading(10, "b", 1),
                (0, None),
            ),
            ("never set before, then right", &[reading(-60 * year, "a", 0)], reading(10, "a", 1), (0, None)),
            (
                "absurd after a reboot, then right",
                &[reading(0, "a", 3), reading(2 * year, "b", 1)],
                reading(10, "b", 11),
                (0, None),
            ),
        ];
        for (what, before, then, expected) in stories {
            let store = Memory::default();
            before.iter().for_each(|reading| drop(run(&store, reading)));
            assert_eq!(judged(&Clock::open(&store).unwrap(), &then), expected, "{what}");
        }
    }

    #[test]
    fn absurd_time_after_a_reboot_goes_on_from_the_last_run() {
        let (store, year) = (Memory::default(), 365 * 24);
        run(&store, &reading(0, "a", 3));
        let clock = run(&store, &reading(2 * year, "b", 1));
        let now = clock.judge(&reading(2 * year + 8, "b", 9));
        let passed = now.trusted.duration_since(time(8)).unwrap();
        assert!(passed < Duration::from_secs(60), "{passed:?}");
    }

    #[test]
    fn machines_that_share_a_storage_are_judged_each_by_what_it_showed() {
        let (store, year) = (Memory::default(), 365 * 24);
        for hour in 0..3 {
            run(&store, &reading(hour, "a", 10 + hour as u64));
            run(&store, &reading(hour, "b", 500 + hour as u64));
        }
        let clock = Clock::open(&store).unwrap();
        assert_eq!(judged(&clock, &reading(3, "a", 13)), (0, None));
        assert_eq!(judged(&clock, &reading(3 + 20, "a", 13)), (20, Some("ahead")));
        assert_eq!(judged(&clock, &reading(3 + year, "b", 503)), (year as u64, Some("ahead")));
    }

    #[test]
    fn the_clock_of_the_storage_and_of_the_kernel_count() {
        // A machine that is a year ahead mounts a storage whose server is not.
        let (store, year) = (Memory::default(), 365 * 24);
        store.set_clocks(Reading { kernel: time(0), ..reading(year, "a", 3) });
        let mut clock = Clock::default();
        assert_eq!(judged(&clock, &store.clocks()), (year as u64, Some("faked")));
        clock.note(&store);
        let real = reading(year, "a", 3);
        assert_eq!(judged(&clock, &real), (year as u64, Some("ahead")));
    }

    #[test]
    fn damage_is_as_if_nothing_was_seen() {
        let store = Memory::default();
        run(&store, &reading(0, "a", 3));
        for text in [&b""[..], b"{", b"{\"written\":1,\"seen\":[]}", b"\xff\xff", b"null", b"[]"] {
            store.write(Path::new(layout::CLOCK), text).unwrap();
            assert_eq!(judged(&Clock::open(&store).unwrap(), &reading(1, "a", 4)), (0, None), "{text:?}");
            run(&store, &reading(1, "a", 4));
            assert_eq!(
                judged(&Clock::open(&store).unwrap(), &reading(30, "a", 4)).1,
                Some("ahead"),
                "{text:?}"
            );
        }
    }

    #[test]
    fn so_many_boots_are_kept() {
        let store = Memory::default();
        for boot in 0..50 {
            run(&store, &reading(boot, &format!("boot {boot}"), 1));
        }
        let clock = Clock::open(&store).unwrap();
        assert_eq!(clock.seen.len(), BOOTS);
        assert!(clock.seen.iter().any(|moment| moment.boot == "boot 49"));
    }
}
