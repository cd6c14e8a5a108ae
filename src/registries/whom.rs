//! Whom to ask before a blob goes: registries that remember by themselves, and memories that outlive registries. Pure.

use super::http::Place;
use super::judge::Evidence;
use super::processes::{Facts, Outlives};
use super::redis::address;
use crate::gc::guard::gate::UNKNOWN;
use crate::registry_config::RedisConfig;

/// All who are to be asked.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Whom {
    /// Where registries answer that remember by themselves.
    pub(super) places: Vec<Place>,
    /// What remembers for the others.
    pub(super) memories: Vec<Memory>,
}

/// A redis in which registries remember.
#[derive(Debug, PartialEq)]
pub(super) struct Memory {
    pub(super) redis: RedisConfig,
    /// Registries that are to show that they remember there.
    pub(super) places: Vec<Place>,
}

/// Whom to ask; why not all of them can be asked, otherwise.
pub(super) fn whom(seen: &Evidence) -> Result<Whom, String> {
    let mut memories = memories(seen)?;
    let (theirs, own): (Vec<&Facts>, Vec<&Facts>) = seen.facts.iter().partition(|f| f.outlives.is_some());
    let mut places = seen.named.clone();
    match memories.as_mut_slice() {
        // Whoever is named remembers there, which is shown.
        [memory] if own.is_empty() && !places.is_empty() => memory.places.append(&mut places),
        memories => {
            for facts in theirs {
                let memory = redis_of(seen, facts).and_then(|redis| at(memories, &redis));
                let place = if seen.named.is_empty() { Some(place_of(facts)?) } else { facts.place.clone() };
                memory.into_iter().for_each(|memory| memory.places.extend(place.clone()));
            }
            if seen.named.is_empty() {
                places = own.into_iter().map(place_of).collect::<Result<_, _>>()?;
            }
        }
    }
    for places in memories.iter_mut().map(|memory| &mut memory.places).chain([&mut places]) {
        *places = Place::distinct(std::mem::take(places));
    }
    match places.is_empty() && memories.is_empty() {
        true => Err(UNKNOWN.to_string()),
        false => Ok(Whom { places, memories }),
    }
}

/// All that outlives the registries; why it can't be asked, otherwise.
pub(super) fn memories(seen: &Evidence) -> Result<Vec<Memory>, String> {
    let mut found: Vec<Memory> = Vec::new();
    let mut add = |redis: RedisConfig| {
        if at(&mut found, &redis).is_none() {
            found.push(Memory { redis, places: Vec::new() });
        }
    };
    for facts in &seen.facts {
        match (&facts.outlives, redis_of(seen, facts)) {
            (None, _) => {}
            (Some(_), Some(redis)) => add(redis),
            (Some(outlives), None) => return Err(outlives.why_not()),
        }
    }
    seen.redis.iter().for_each(|redis| add(redis.clone()));
    for entry in &seen.past {
        match entry.outlives() {
            None => {}
            // The one that was named is where they remember.
            Some(Outlives::Redis(_)) if seen.redis.is_some() => {}
            Some(Outlives::Redis(Some(redis))) => add(redis),
            Some(outlives) => return Err(format!("{}: {}", entry.text(), outlives.why_not())),
        }
    }
    Ok(found)
}

/// The redis in which a registry remembers, as far as that is known.
fn redis_of(seen: &Evidence, facts: &Facts) -> Option<RedisConfig> {
    match &facts.outlives {
        Some(Outlives::Redis(redis)) => seen.redis.clone().or_else(|| redis.clone()),
        _ => None,
    }
}

fn at<'a>(memories: &'a mut [Memory], redis: &RedisConfig) -> Option<&'a mut Memory> {
    memories.iter_mut().find(|memory| address(&memory.redis) == address(redis))
}

fn place_of(facts: &Facts) -> Result<Place, String> {
    facts.place.clone().ok_or_else(|| {
        "of a registry that runs nobody can tell where it answers; give its URL with --registry, or stop it and add \
         {+registry-stopped}"
            .to_string()
    })
}

impl Outlives {
    /// Why it can't be asked, and what to do.
    fn why_not(&self) -> String {
        let emptied = "stop the registry, empty that cache, and add {+registry-stopped} {+cache-emptied}";
        match self {
            Outlives::Redis(_) => format!(
                "the registry remembers in redis, also when it is stopped, and nobody knows where that is; give the registry's \
                 config.yml as STORE, or --redis redis://HOST:PORT/DB; or {emptied}"
            ),
            Outlives::Other(kind) => format!(
                "the registry remembers in a cache of the kind {kind}, which may outlive it and which regfs can't ask; {emptied}",
                kind = kind.escape_debug()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn urls_of(places: &[Place]) -> Vec<String> {
        places.iter().map(|place| place.url.clone()).collect()
    }

    fn redis(address: &str) -> RedisConfig {
        RedisConfig { addresses: vec![address.to_string()], database: Some(0), ..RedisConfig::default() }
    }

    fn seen(facts: Vec<Facts>, urls: &[&str], named: Option<&str>) -> Evidence {
        let places = urls.iter().map(|url| Place::new(url, true)).collect();
        Evidence { facts, named: places, redis: named.map(redis), ..Evidence::default() }
    }

    fn facts(url: &str, outlives: Option<Outlives>) -> Facts {
        let place = Some(url).filter(|url| !url.is_empty()).map(|url| Place::new(url, false));
        Facts { place, outlives, ..Facts::unknown() }
    }

    #[test]
    fn each_registry_is_asked_where_it_remembers() {
        let in_redis = |url: &str, address: &str| facts(url, Some(Outlives::Redis(Some(redis(address)))));
        let lost = |url: &str| facts(url, Some(Outlives::Redis(None)));
        let own = |url: &str| facts(url, None);
        type Memories = [(&'static str, &'static [&'static str])];
        let cases: &[(&str, Evidence, &[&str], &Memories)] = &[
            ("its own", seen(vec![own("u")], &[], None), &["u"], &[]),
            ("one in redis", seen(vec![in_redis("u", "r:1")], &[], None), &[], &[("r:1/0", &["u"])]),
            (
                "two in one redis",
                seen(vec![in_redis("v", "r:1"), in_redis("u", "r:1")], &[], None),
                &[],
                &[("r:1/0", &["u", "v"])],
            ),
            (
                "two in two",
                seen(vec![in_redis("u", "r:1"), in_redis("v", "r:2")], &[], None),
                &[],
                &[("r:1/0", &["u"]), ("r:2/0", &["v"])],
            ),
            (
                "one of each kind",
                seen(vec![in_redis("u", "r:1"), own("v")], &[], None),
                &["v"],
                &[("r:1/0", &["u"])],
            ),
            ("named", seen(vec![in_redis("", "r:1")], &["w"], None), &[], &[("r:1/0", &["w"])]),
            ("only named", seen(vec![], &["w"], Some("r:9")), &[], &[("r:9/0", &["w"])]),
            ("one that says no address", seen(vec![lost("u")], &[], Some("r:9")), &[], &[("r:9/0", &["u"])]),
            (
                "both named and of each kind",
                seen(vec![in_redis("u", "r:1"), own("v")], &["w", "x"], None),
                &["w", "x"],
                &[("r:1/0", &["u"])],
            ),
        ];
        for (name, seen, urls, memories) in cases {
            let found = whom(seen).unwrap();
            assert_eq!(urls_of(&found.places), *urls, "{name}");
            let of_redis = |memory: &Memory| (address(&memory.redis), urls_of(&memory.places));
            let wanted = |(at, urls): &(&str, &[&str])| {
                ((*at).to_string(), urls.iter().map(|url| (*url).to_string()).collect())
            };
            let found: Vec<_> = found.memories.iter().map(of_redis).collect();
            assert_eq!(found, memories.iter().map(wanted).collect::<Vec<_>>(), "{name}");
        }
        let other = facts("u", Some(Outlives::Other("memcached".into())));
        for (seen, says) in [
            (seen(vec![], &[], None), "nothing tells"),
            (seen(vec![lost("u")], &[], None), "--redis"),
            (seen(vec![other], &["u"], Some("r:1")), "memcached"),
            (seen(vec![in_redis("", "r:1")], &[], None), "--registry"),
        ] {
            let why = whom(&seen).unwrap_err();
            assert!(why.contains(says), "{why}");
        }
    }
}
