//! Storms: clients push, delete, retag and pull as fast as they can while a collector takes what is garbage all the way
//! to the purge. In the end every tag that was acknowledged and not deleted pulls, and what nobody names is gone.
//!
//! The short ones run always. `scripts/storm.sh` runs long ones, and the stock collector in the same storm.

mod common;
#[path = "storm_harness/mod.rs"]
mod storm_harness;
#[path = "windows_harness/mod.rs"]
mod windows_harness;

use std::time::Duration;

use common::have;
use storm_harness::{Collector, Storm, Trouble, storm};

const NEEDS: &[&str] = &["docker-registry", "setpriv", "fuse", "root"];

/// How long a storm of the suite lasts.
const SHORT: Duration = Duration::from_secs(20);

#[test]
fn a_storm_without_a_cache_loses_nothing() {
    if !have(NEEDS) {
        return;
    }
    let figures = storm(&Storm { cache: false, ..Storm::new(1, SHORT) });
    figures.assert_nothing_is_lost();
    figures.assert_all_went_to_the_purge();
}

#[test]
fn a_storm_with_the_cache_a_regfs_that_is_killed_and_a_registry_that_is_restarted_loses_nothing() {
    if !have(NEEDS) {
        return;
    }
    let trouble =
        Trouble { kill_every: Some(Duration::from_secs(3)), restart_registry: true, down_for_half: false };
    let figures = storm(&Storm { cache: true, trouble, ..Storm::new(2, SHORT) });
    figures.assert_nothing_is_lost();
    figures.assert_all_went_to_the_purge();
}

#[test]
fn a_regfs_that_is_down_for_half_of_the_storm_loses_nothing() {
    if !have(NEEDS) {
        return;
    }
    let trouble = Trouble { down_for_half: true, ..Trouble::default() };
    let figures = storm(&Storm { cache: true, trouble, ..Storm::new(3, SHORT) });
    figures.assert_nothing_is_lost();
}

#[test]
fn a_guarded_registry_serves_nothing_broken_even_for_a_moment() {
    if !have(NEEDS) {
        return;
    }
    // A link that a sweep moved and found to be named is back within microseconds, which a pull may meet, if hardly twice.
    let figures: Vec<_> = (5..7)
        .map(|seed| storm(&Storm { is_guarded: true, ..Storm::new(seed, SHORT) }))
        .inspect(|figures| {
            figures.assert_nothing_is_lost();
            figures.assert_all_went_to_the_purge();
        })
        .take_while(|figures| figures.broken() > 0)
        .collect();
    assert!(figures.len() < 2, "{} and {}", figures[0], figures[1]);
}

/// Redis goes on remembering when its registry is started again.
#[test]
fn a_storm_with_redis_a_regfs_that_is_killed_and_a_registry_that_is_restarted_loses_nothing() {
    if !have(&[NEEDS, &["redis-server", "redis-cli"]].concat()) {
        return;
    }
    let trouble =
        Trouble { kill_every: Some(Duration::from_secs(3)), restart_registry: true, down_for_half: false };
    let figures = storm(&Storm { cache: true, is_redis: true, trouble, ..Storm::new(8, SHORT) });
    figures.assert_nothing_is_lost();
    figures.assert_all_went_to_the_purge();
}

/// The storm can tell: a collector that takes at once what nothing names, beside a registry that remembers, loses images.
#[test]
fn the_same_storm_breaks_images_under_a_collector_that_does_not_wait() {
    if !have(NEEDS) {
        return;
    }
    let optimistic =
        Storm { cache: true, collector: Collector::Optimistic, ..Storm::new(4, Duration::from_secs(60)) };
    let figures = storm(&Storm { ends_when_broken: true, ..optimistic });
    assert!(figures.broken() > 0, "{figures}");
}

/// A storm as long as wanted, with the collector that is asked for; prints a line of figures.
#[test]
#[ignore = "scripts/storm.sh runs it"]
fn a_long_storm() {
    let setting = |name: &str| std::env::var(format!("STORM_{name}")).unwrap_or_default();
    let number = |name: &str, otherwise: u64| setting(name).parse().unwrap_or(otherwise);
    let collector = match setting("COLLECTOR").as_str() {
        "" | "regfs" => Collector::Regfs,
        "optimistic" => Collector::Optimistic,
        "stock" => Collector::Stock,
        "none" => Collector::None,
        other => panic!("there is no collector {other:?}: regfs, optimistic, stock, none"),
    };
    let seconds = |name: &str| setting(name).parse().ok().map(Duration::from_secs);
    let trouble = Trouble {
        kill_every: seconds("KILL_EVERY"),
        restart_registry: setting("RESTART") == "yes",
        down_for_half: setting("DOWN") == "yes",
    };
    let duration = Duration::from_secs(number("SECONDS", 60));
    let plan = Storm {
        cache: setting("CACHE") != "off",
        is_redis: setting("CACHE") == "redis",
        collector,
        trouble,
        is_guarded: setting("GUARD") == "yes",
        ..Storm::new(number("SEED", 1), duration)
    };
    let figures = storm(&plan);
    println!("{figures}");
    if matches!(collector, Collector::Regfs) {
        figures.assert_nothing_is_lost();
    }
}
