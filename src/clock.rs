//! How long ago something was, so that neither a clock that is set nor a reboot makes it seem longer.

use std::time::{Duration, SystemTime};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Tells one boot of the machine from another.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A point in time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Moment {
    /// As the wall clock had it: RFC 3339 with milliseconds, for people, and for what is counted in days.
    time: String,
    /// Which boot; empty where the kernel does not say.
    boot: String,
    /// Milliseconds since then, sleep included (`CLOCK_BOOTTIME`).
    up_ms: u64,
}

impl Moment {
    /// Now.
    pub fn now() -> Moment {
        let up = clock_gettime(ClockId::Boottime);
        let up_ms = up.tv_sec.unsigned_abs() * 1000 + up.tv_nsec.unsigned_abs() / 1_000_000;
        let boot = std::fs::read_to_string(BOOT_ID).unwrap_or_default().trim().to_string();
        Moment { time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(), boot, up_ms }
    }

    /// What the wall clock said.
    pub fn wall(&self) -> SystemTime {
        humantime::parse_rfc3339(&self.time).unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// At least so long before `now`: what a wait is measured by. Of another boot only the time since this one counts, and
    /// no more than the wall clock says: it may be that of another machine, or of a container with a boot of its own.
    pub fn elapsed(&self, now: &Moment) -> Duration {
        if self.boot == now.boot {
            return Duration::from_millis(now.up_ms.saturating_sub(self.up_ms));
        }
        let up = Duration::from_millis(now.up_ms);
        // A clock that was set back says nothing.
        now.wall().duration_since(self.wall()).map_or(up, |wall| wall.min(up))
    }

    /// So long before `now`: what ages of days are measured by, across boots by the wall clock.
    pub fn age(&self, now: &Moment) -> Duration {
        let elapsed = self.elapsed(now);
        match self.boot == now.boot {
            true => elapsed,
            false => now.wall().duration_since(self.wall()).unwrap_or(elapsed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(time: &str, boot: &str, seconds: u64) -> Moment {
        Moment { time: time.to_string(), boot: boot.to_string(), up_ms: seconds * 1000 }
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_clock_that_is_set_changes_nothing_within_a_boot() {
        let then = moment("2026-01-01T00:00:00.000Z", "a", 100);
        for time in ["1970-01-01T00:00:00.000Z", "2026-01-01T00:00:10.000Z", "2100-01-01T00:00:00.000Z", "?"]
        {
            let now = moment(time, "a", 110);
            assert_eq!((then.elapsed(&now), then.age(&now)), (SECOND * 10, SECOND * 10), "{time}");
        }
        assert_eq!(then.elapsed(&moment("", "a", 90)), Duration::ZERO);
    }

    #[test]
    fn across_boots_a_wait_counts_from_the_boot_and_an_age_by_the_wall_clock() {
        let then = moment("2026-01-01T00:00:00.000Z", "a", 100_000);
        let now = moment("2026-01-02T00:00:00.000Z", "b", 30);
        assert_eq!((then.elapsed(&now), then.age(&now)), (SECOND * 30, SECOND * 86_400));
        let soon = moment("2026-01-01T00:00:05.000Z", "b", 1_000_000);
        assert_eq!(
            (then.elapsed(&soon), then.age(&soon)),
            (SECOND * 5, SECOND * 5),
            "no reboot took that little"
        );
        let set_back = moment("2025-01-01T00:00:00.000Z", "b", 30);
        assert_eq!(then.age(&set_back), SECOND * 30);
    }

    #[test]
    fn the_real_clock_moves_on_and_is_read_back() {
        let then = Moment::now();
        std::thread::sleep(Duration::from_millis(5));
        let now = Moment::now();
        assert!(then.elapsed(&now) >= Duration::from_millis(4), "{then:?} {now:?}");
        assert!(then.wall() > SystemTime::UNIX_EPOCH);
        let text = serde_json::to_string(&then).unwrap();
        assert_eq!(serde_json::from_str::<Moment>(&text).unwrap(), then);
    }
}
