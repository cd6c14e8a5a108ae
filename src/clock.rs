//! What time it is, as far as that can be believed, and how long ago something was.
//!
//! Deleting goes by age, and an age is as good as the clock. Somebody sets the clock, a battery is empty, a machine
//! sleeps, two machines share a storage. So a wait is over only when all that can be asked say so:
//!
//! | who | counts |
//! |---|---|
//! | the wall clock of this process, and that of the kernel | always |
//! | `CLOCK_BOOTTIME`, sleep included: what nobody sets | since anything that was noted in this boot |
//! | the largest time that regfs saw ([`seen`]) | in this boot plus what `CLOCK_BOOTTIME` says has passed; after a reboot plus a year |
//! | the clock of the storage, which file times are measured by | in this boot, from the time of the file that regfs wrote last |
//!
//! [`Clock::now`] puts them together: [`Now::trusted`] is the latest time that all of them allow. A clock that is ahead of
//! that, or behind what was seen, is a [`Jump`]; whoever reports says so.
//!
//! # Rules kept here
//! 1. Whatever is unknown makes things younger: nothing is over because something could not be read.
//! 2. What decides is what is shown: [`Moment::left`] is both the decision and the date.

pub mod seen;

use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::time::{ClockId, Timespec, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::advice::quoted;
use crate::layout;
use crate::store::Store;

pub use seen::Clock;

/// Tells one boot of the machine from another.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// By how much `CLOCK_BOOTTIME` is set off in this time namespace.
const OFFSETS: &str = "/proc/self/timens_offsets";
/// Clocks that differ by less say the same: they are not asked at once, and not all are that fine.
const SAME: Duration = Duration::from_secs(1);
/// A clock that is off by less is not worth a word.
const WORTH_TELLING: Duration = Duration::from_secs(60);

/// All clocks of the machine at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The wall clock as this process sees it.
    pub wall: SystemTime,
    /// The wall clock as the kernel has it, which it writes into files. The same, unless a library fakes the time.
    pub kernel: SystemTime,
    /// Which boot; empty where the kernel does not say.
    pub boot: String,
    /// Since then, sleep included.
    pub up: Duration,
}

impl Reading {
    /// Now. The kernel is asked by system calls of our own, which no library comes between.
    pub fn take() -> Reading {
        let time = |time: Timespec| {
            let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or(0);
            Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), nanoseconds)
        };
        let offsets = std::fs::read_to_string(OFFSETS).unwrap_or_default();
        let up = signed(time(clock_gettime(ClockId::Boottime))) - offset_of_boottime(&offsets);
        Reading {
            wall: SystemTime::now(),
            kernel: SystemTime::UNIX_EPOCH + time(clock_gettime(ClockId::Realtime)),
            boot: std::fs::read_to_string(BOOT_ID).unwrap_or_default().trim().to_string(),
            up: Duration::from_nanos(u64::try_from(up).unwrap_or(0)),
        }
    }

    /// The same, so much later.
    pub fn after(&self, passed: Duration) -> Reading {
        let Reading { wall, kernel, boot, up } = self;
        Reading { wall: *wall + passed, kernel: *kernel + passed, boot: boot.clone(), up: *up + passed }
    }
}

fn signed(duration: Duration) -> i128 {
    i128::try_from(duration.as_nanos()).unwrap_or(i128::MAX)
}

/// In nanoseconds, of lines like `boottime 31536000 0`.
fn offset_of_boottime(offsets: &str) -> i128 {
    let of_line = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        words.next().filter(|word| *word == "boottime")?;
        let seconds: i128 = words.next()?.parse().ok()?;
        let nanoseconds: i128 = words.next()?.parse().ok()?;
        Some(seconds * 1_000_000_000 + nanoseconds)
    };
    offsets.lines().find_map(of_line).unwrap_or(0)
}

/// A point in time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Moment {
    /// The latest that it was, as far as clocks could be believed: RFC 3339 with milliseconds.
    time: String,
    /// Which boot; empty where the kernel does not say.
    boot: String,
    /// Milliseconds since then, sleep included (`CLOCK_BOOTTIME`).
    up_ms: u64,
}

impl Moment {
    /// The moment of a reading, of which `time` is believed.
    fn new(time: SystemTime, reading: &Reading) -> Moment {
        let up_ms = u64::try_from(reading.up.as_millis()).unwrap_or(u64::MAX);
        let time = time.clamp(SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH + LAST_SECOND);
        Moment { time: humantime::format_rfc3339_millis(time).to_string(), boot: reading.boot.clone(), up_ms }
    }

    /// A time of which nobody knows the boot.
    pub fn of_time(time: SystemTime) -> Moment {
        let nowhere = Reading { wall: time, kernel: time, boot: String::new(), up: Duration::ZERO };
        Moment::new(time, &nowhere)
    }

    /// What the wall clock said.
    pub fn wall(&self) -> SystemTime {
        humantime::parse_rfc3339(&self.time).unwrap_or(SystemTime::UNIX_EPOCH + LAST_SECOND)
    }

    fn up(&self) -> Duration {
        Duration::from_millis(self.up_ms)
    }

    /// How much of a wait is left at `now`; none when it is over. Requests that were under way at this moment have `drain`
    /// to end; ages are counted in `age`, which may go on across boots.
    ///
    /// `drain` is measured by what nobody sets. Of another boot only the time since this one counts, and no more than the
    /// wall clock says: it may be that of another machine. `age` needs the wall clock, too.
    pub fn left(&self, now: &Now, drain: Duration, age: Duration) -> Duration {
        let is_same_boot = !self.boot.is_empty() && self.boot == now.moment.boot;
        let up = now.moment.up();
        let by_wall = now.trusted.duration_since(self.wall());
        let passed = match is_same_boot {
            true => up.saturating_sub(self.up()),
            // A clock that was set back says nothing.
            false => by_wall.as_ref().map_or(up, |by_wall| up.min(*by_wall)),
        };
        let left_of_drain = drain.saturating_sub(passed);
        let left_of_age = match is_same_boot {
            true => age.saturating_sub(passed),
            false => Duration::ZERO,
        };
        let left_by_wall = match by_wall {
            _ if age.is_zero() => Duration::ZERO,
            Ok(by_wall) => age.saturating_sub(by_wall),
            Err(ahead) => age.saturating_add(ahead.duration()),
        };
        left_of_drain.max(left_of_age).max(left_by_wall)
    }

    /// When [`left`](Self::left) will be none.
    pub fn over(&self, now: &Now, drain: Duration, age: Duration) -> Next {
        let left = self.left(now, drain, age);
        if left.is_zero() {
            return Next::Due;
        }
        let by_wait = now.in_future(left);
        // What is written down gives the same date whenever it is asked, unless the clock was set.
        Next::At(match self.wall().checked_add(drain.max(age)) {
            Some(noted)
                if noted.max(by_wait).duration_since(noted.min(by_wait)).is_ok_and(|by| by <= SAME) =>
            {
                noted
            }
            _ => by_wait,
        })
    }
}

/// The last second that RFC 3339 can write, the end of the year 9999.
pub const LAST_SECOND: Duration = Duration::from_secs(253_402_300_799);

/// What time it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Now {
    /// By the wall clock, right or wrong: what people compare dates with.
    pub wall: SystemTime,
    /// The latest that it can be: what ages are counted from.
    pub trusted: SystemTime,
    /// To remember it by.
    pub moment: Moment,
    /// What is wrong with the clock.
    pub jump: Option<Jump>,
}

impl Now {
    /// When so much more has passed, by the clock as people see it.
    pub fn in_future(&self, wait: Duration) -> SystemTime {
        self.wall.checked_add(wait).unwrap_or(SystemTime::UNIX_EPOCH + LAST_SECOND)
    }

    /// Tells people what is wrong with the clock.
    pub fn warn(&self, store: &dyn Store) {
        if let Some(jump) = &self.jump {
            log::warn!("{}", jump.text(store));
        }
    }

    /// How much is left until the time `at`, by the time that is trusted.
    pub fn until(&self, at: SystemTime) -> Duration {
        at.duration_since(self.trusted).unwrap_or_default()
    }

    /// When `at` comes, which is a time of the clock that is trusted.
    pub fn next(&self, at: SystemTime) -> Next {
        match self.until(at) {
            Duration::ZERO => Next::Due,
            _ if self.wall == self.trusted => Next::At(at),
            left => Next::At(self.in_future(left)),
        }
    }
}

/// When a run takes the next step of something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Next {
    /// The next run does.
    Due,
    /// The first run from then on, by the clock as people see it.
    At(SystemTime),
    /// That is not a matter of time.
    Open,
}

impl Next {
    /// When both are over.
    pub fn and(self, other: Next) -> Next {
        self.max(other)
    }

    /// The time, where it is one.
    pub fn time(self) -> Option<SystemTime> {
        match self {
            Next::At(time) => Some(time),
            Next::Due | Next::Open => None,
        }
    }
}

impl fmt::Display for Next {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Next::Due => f.write_str("due"),
            Next::At(time) => f.write_str(&promised(*time)),
            Next::Open => f.write_str("-"),
        }
    }
}

/// A time in the future, RFC 3339 in whole seconds; never earlier than it is.
pub fn promised(time: SystemTime) -> String {
    let nearly = Duration::from_nanos(999_999_999);
    let last = SystemTime::UNIX_EPOCH + LAST_SECOND;
    let up = time.checked_add(nearly).unwrap_or(last).clamp(SystemTime::UNIX_EPOCH, last);
    humantime::format_rfc3339_seconds(up).to_string()
}

/// What is wrong with a clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Jump {
    /// It is so far ahead of all that regfs has seen pass.
    Ahead(Duration),
    /// The time of this process is so far ahead of that of the kernel.
    Faked(Duration),
    /// It is so far behind what regfs has seen.
    Behind(Duration),
}

impl Jump {
    /// For people: what it is, what follows, and what to do.
    pub fn text(&self, store: &dyn Store) -> String {
        let by = |by: &Duration| humantime::format_duration(Duration::from_secs(by.as_secs())).to_string();
        let place = store.full(Path::new(layout::CLOCK));
        let place = quoted(&place);
        match self {
            Jump::Ahead(ahead) => format!(
                "the clock is {} ahead of the time that regfs has seen pass. Ages are counted without this jump. Set the clock; if it is \
                 right, run: rm {place}",
                by(ahead)
            ),
            Jump::Faked(ahead) => format!(
                "the clock of this process is {} ahead of the clock of the kernel. Ages are counted by the kernel's. Run regfs \
                 without a library that fakes the time",
                by(ahead)
            ),
            Jump::Behind(behind) => format!(
                "the clock is {} behind the time that regfs has seen. All waits (grace, keep, drain) take longer. Set the clock; if it is right, \
                 run: rm {place}",
                by(behind)
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const HOUR: Duration = Duration::from_secs(3600);
    const DAY: Duration = Duration::from_secs(24 * 3600);

    /// Noon of some day, and so many seconds since then.
    fn noon(seconds: i64) -> SystemTime {
        let noon = SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_800);
        let by = Duration::from_secs(seconds.unsigned_abs());
        if seconds < 0 { noon - by } else { noon + by }
    }

    fn now(wall: i64, boot: &str, up: u64) -> Now {
        let reading = Reading {
            wall: noon(wall),
            kernel: noon(wall),
            boot: boot.to_string(),
            up: Duration::from_secs(up),
        };
        Clock::default().judge(&reading)
    }

    #[test]
    fn a_wait_is_over_when_all_clocks_say_so() {
        // Noted at noon, a thousand seconds after boot a.
        let noted = now(0, "a", 1000).moment;
        let hour = 3600;
        // The wall clock since then, the boot, up since that; what is left of a drain of an hour, and of an age of a day.
        let cases = [
            ("nothing passed", 0, "a", 1000, HOUR, DAY),
            ("half an hour", hour / 2, "a", 2800, HOUR / 2, DAY - HOUR / 2),
            ("a day", 24 * hour, "a", 87_400, Duration::ZERO, Duration::ZERO),
            ("a clock a year ahead", 365 * 24 * hour, "a", 1010, HOUR - 10 * SECOND, DAY - 10 * SECOND),
            ("a clock a day behind, after a day", 0, "a", 87_400, Duration::ZERO, DAY),
            ("a clock an hour behind, at once", -hour, "a", 1000, HOUR, DAY + HOUR),
            ("memory of a machine put back", 24 * hour, "a", 900, HOUR, DAY),
            ("a reboot", 24 * hour, "b", 30, HOUR - 30 * SECOND, Duration::ZERO),
            (
                "a reboot with an empty clock",
                -30 * 365 * 24 * hour,
                "b",
                30,
                HOUR - 30 * SECOND,
                DAY * (30 * 365 + 1),
            ),
            ("another machine", 5, "b", 1_000_000, HOUR - 5 * SECOND, DAY - 5 * SECOND),
            ("no word of the boot", 5, "", 1_000_000, HOUR - 5 * SECOND, DAY - 5 * SECOND),
        ];
        for (what, wall, boot, up, drain, age) in cases {
            let now = now(wall, boot, up);
            assert_eq!(noted.left(&now, HOUR, Duration::ZERO), drain, "drain: {what}");
            assert_eq!(noted.left(&now, Duration::ZERO, DAY), age, "age: {what}");
            assert_eq!(noted.left(&now, HOUR, DAY), drain.max(age), "both: {what}");
            assert_eq!(noted.left(&now, Duration::ZERO, Duration::ZERO), Duration::ZERO, "none: {what}");
        }
    }

    #[test]
    fn a_date_that_is_shown_is_that_of_the_decision() {
        let noted = now(0, "a", 1000).moment;
        for (wall, up) in [(0, 1000), (100, 1100), (7200, 1060), (-7200, 1060), (86_300, 87_300)] {
            let (shown, before) = (now(wall, "a", up), Duration::from_millis(999));
            let Next::At(date) = noted.over(&shown, HOUR, DAY) else { panic!("{wall} {up}") };
            assert!(date > shown.wall, "{wall} {up}");
            let passes = date.duration_since(shown.wall).unwrap_or_default();
            let reading = |after: Duration| {
                let reading = Reading {
                    wall: shown.wall,
                    kernel: shown.wall,
                    boot: "a".to_string(),
                    up: Duration::from_secs(up),
                };
                Clock::default().judge(&reading.after(after))
            };
            assert_ne!(noted.over(&reading(passes - before), HOUR, DAY), Next::Due, "{wall} {up}");
            assert_eq!(noted.over(&reading(passes), HOUR, DAY), Next::Due, "{wall} {up}");
        }
        // Whenever it is asked.
        let dates: Vec<Next> = [(0, 1000), (1, 1001), (60_000, 61_000)]
            .map(|(wall, up)| noted.over(&now(wall, "a", up), HOUR, DAY))
            .to_vec();
        assert!(dates.iter().all(|date| *date == Next::At(noon(86_400))), "{dates:?}");
    }

    #[test]
    fn a_promise_is_never_early() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1500);
        assert_eq!(promised(time), "1970-01-01T00:00:02Z");
        assert_eq!(promised(SystemTime::UNIX_EPOCH + SECOND), "1970-01-01T00:00:01Z");
        assert_eq!(promised(SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 50)), "9999-12-31T23:59:59Z");
    }

    #[test]
    fn a_time_namespace_changes_nothing() {
        assert_eq!(
            offset_of_boottime("monotonic           0         0\nboottime     31536000         5\n"),
            31_536_000_000_000_005
        );
        assert_eq!(offset_of_boottime("boottime -10 0"), -10_000_000_000);
        for nothing in ["", "boottime", "boottime x 0", "monotonic 3 4"] {
            assert_eq!(offset_of_boottime(nothing), 0, "{nothing:?}");
        }
    }

    #[test]
    fn the_real_clock_moves_on_and_is_read_back() {
        let then = Clock::default().judge(&Reading::take());
        std::thread::sleep(Duration::from_millis(5));
        let now = Clock::default().judge(&Reading::take());
        assert!(now.moment.up() >= then.moment.up() + Duration::from_millis(4), "{then:?} {now:?}");
        assert!(now.wall > then.wall && !now.moment.boot.is_empty());
        let text = serde_json::to_string(&then.moment).unwrap_or_default();
        assert_eq!(serde_json::from_str::<Moment>(&text).ok(), Some(then.moment));
    }
}
