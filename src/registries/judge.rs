//! Which gate a sweep has, decided from what is known of the registries that serve a store. Pure: [`super`] collects what is
//! known, and asks whom it says to ask.
//!
//! The rules are functions of their own, in the order in which they count; the first that says something is the answer.

use std::path::PathBuf;

use super::http::Place;
use super::processes::{Facts, Process};
use super::seen::Entry;
use super::whom::{Whom, whom};
use crate::advice::forget_registries;
use crate::error::{Error, Result};
use crate::gc::guard::gate::Said;
use crate::registry_config::RedisConfig;

/// All that is known.
#[derive(Default)]
pub(super) struct Evidence {
    /// The storage root.
    pub(super) root: PathBuf,
    /// Registries that run here and serve the storage, or may.
    pub(super) running: Vec<Process>,
    /// What matters of each of those, and of the config.yml that names the storage.
    pub(super) facts: Vec<Facts>,
    /// The places that were named.
    pub(super) named: Vec<Place>,
    /// The redis that was named.
    pub(super) redis: Option<RedisConfig>,
    /// Why to see no registry says nothing here, if so.
    pub(super) blindness: Option<String>,
    /// Who else has to do with the storage; looked for only where it was said that no registry runs.
    pub(super) holders: Vec<String>,
    /// What is relied on if none of this says otherwise, in words.
    pub(super) relied_on: String,
    /// Registries that were seen before, and of which nothing is known today.
    pub(super) past: Vec<Entry>,
    /// Every process of this machine was looked at.
    pub(super) sees_all: bool,
    /// Those of them that may run where nobody sees them and are not asked, in words.
    pub(super) unasked: Vec<String>,
}

impl Evidence {
    /// Whether something may remember that outlives registries, besides what the facts say.
    pub(super) fn has_more_memory(&self) -> bool {
        self.redis.is_some() || self.past.iter().any(|entry| entry.outlives().is_some())
    }
}

/// How a sweep may go on.
#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    /// No registry can write.
    Stopped,
    /// None remembers anything.
    Off,
    /// These are to be asked.
    Ask(Whom),
    /// Nothing may be taken, and why.
    Stop(String),
}

/// How a sweep may go on.
///
/// # Errors
/// It was said that no registry runs, and that is not so or does not help.
pub(super) fn judge(seen: &Evidence, said: Said) -> Result<Verdict> {
    match said {
        Said::StoppedForSure | Said::EmptiedForSure => return Ok(Verdict::Stopped),
        Said::Stopped | Said::Emptied => return stopped(seen).map(|()| Verdict::Stopped),
        Said::Nothing => {}
    }
    let rules = [strangers, read_only, proxy, no_memory, doubts, unnamed, no_deletes];
    let verdict = rules.iter().find_map(|rule| rule(seen));
    Ok(verdict.unwrap_or_else(|| match whom(seen) {
        Ok(whom) => Verdict::Ask(whom),
        Err(why) => Verdict::Stop(why),
    }))
}

/// Fails unless nothing contradicts that no registry runs.
fn stopped(seen: &Evidence) -> Result<()> {
    if let Some(process) = seen.running.first() {
        return Err(Error::invalid(format!(
            "{{+registry-stopped}} was said, but {process} {}; stop it first, or add {{+force}} if it has nothing to do with \
             this storage",
            process.relation()
        )));
    }
    if let Some(why) = &seen.blindness {
        return Err(Error::invalid(format!(
            "{{+registry-stopped}} was said, but nobody can tell from here whether a registry runs: {why}; run regfs where all \
             processes of the machine are seen, as root, or add {{+force}} if you are sure"
        )));
    }
    if let [first, ..] = seen.holders.as_slice() {
        let more = match seen.holders.len() - 1 {
            0 => String::new(),
            more => format!(" (and {more} more)"),
        };
        return Err(Error::invalid(format!(
            "{{+registry-stopped}} was said, but {first}{more}; end it first, or add {{+force}} if it has nothing to do with a registry"
        )));
    }
    Ok(())
}

/// A registry that was seen before, may run where nobody sees it, and is not among those that are asked.
fn strangers(seen: &Evidence) -> Option<Verdict> {
    let stranger = seen.unasked.first()?;
    Some(Verdict::Stop(format!(
        "a registry of this storage that was seen before is not among those that are asked ({stranger}); name it, too, with \
         --registry or its config.yml as STORE; or, if it does not serve this storage any more, run `{}`",
        forget_registries(&seen.root)
    )))
}

fn read_only(seen: &Evidence) -> Option<Verdict> {
    let are_all = seen.facts.iter().all(|facts| facts.read_only && facts.outlives.is_none());
    (!seen.facts.is_empty() && are_all && !seen.has_more_memory()).then_some(Verdict::Stopped)
}

fn proxy(seen: &Evidence) -> Option<Verdict> {
    let why = "a pull-through cache fetches what it lacks, which nobody can tell from a push; to sweep it, stop it and \
               add {+registry-stopped}";
    seen.facts.iter().any(|facts| facts.proxy).then(|| Verdict::Stop(why.to_string()))
}

fn no_memory(seen: &Evidence) -> Option<Verdict> {
    let is_known = !seen.facts.is_empty() && seen.facts.iter().all(|facts| !facts.remembers);
    (is_known && !seen.has_more_memory()).then_some(Verdict::Off)
}

/// A registry of which nobody knows what it serves, while none is named to be asked.
fn doubts(seen: &Evidence) -> Option<Verdict> {
    let doubts: Vec<String> = seen.running.iter().filter_map(Process::doubt).collect();
    (seen.named.is_empty() && !doubts.is_empty()).then(|| Verdict::Stop(doubts.join("; ")))
}

/// More registries run than are named.
fn unnamed(seen: &Evidence) -> Option<Verdict> {
    if seen.named.is_empty() || seen.running.len() <= seen.named.len() {
        return None;
    }
    let all: Vec<String> =
        seen.running.iter().map(|process| format!("{process} {}", process.relation())).collect();
    Some(Verdict::Stop(format!(
        "more registries run here than are named with --registry; name each that serves this storage, or end it ({})",
        all.join("; ")
    )))
}

fn no_deletes(seen: &Evidence) -> Option<Verdict> {
    let why = "the registry remembers and does not delete; storage.delete.enabled: true in its config.yml makes it, or stop \
               it and add {+registry-stopped}";
    // Redis is told directly.
    let refuses = |facts: &Facts| facts.refuses_delete && facts.outlives.is_none();
    seen.facts.iter().any(refuses).then(|| Verdict::Stop(why.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(facts: Vec<Facts>, urls: &[&str]) -> Evidence {
        Evidence { facts, named: places_of(urls, true), ..Evidence::default() }
    }

    #[test]
    fn stopped_is_believed_only_where_nothing_contradicts_it() {
        let stopped = |seen: Evidence| judge(&seen, Said::Stopped).map_err(|e| e.to_string());
        assert_eq!(stopped(Evidence::default()), Ok(Verdict::Stopped));
        let holders = vec!["process 1 (a) has x open".to_string(), "process 2".to_string()];
        let blindness = Some("this is a container".to_string());
        for (seen, says) in [
            (Evidence { holders, ..Evidence::default() }, "process 1 (a) has x open (and 1 more)"),
            (Evidence { blindness, ..Evidence::default() }, "this is a container"),
        ] {
            let why = stopped(seen).expect_err(says);
            assert!(why.contains(says), "{why}");
        }
    }

    fn places_of(urls: &[&str], is_named: bool) -> Vec<Place> {
        urls.iter().map(|url| Place::new(url, is_named)).collect()
    }

    #[test]
    fn the_first_rule_that_knows_something_decides() {
        let unknown = Facts::unknown;
        let at = |url: &str| Facts { place: Some(Place::new(url, false)), ..unknown() };
        let ask = |urls: &[&str], is_named| {
            Some(Verdict::Ask(Whom { places: places_of(urls, is_named), memories: Vec::new() }))
        };
        let cases: [(&str, Evidence, Option<Verdict>); 9] = [
            ("nothing is known", seen(vec![], &[]), None),
            ("named", seen(vec![], &["u"]), ask(&["u"], true)),
            ("no cache", seen(vec![Facts { remembers: false, ..unknown() }], &[]), Some(Verdict::Off)),
            (
                "one of two has a cache",
                seen(vec![Facts { remembers: false, ..unknown() }, unknown()], &[]),
                None,
            ),
            ("read-only", seen(vec![Facts { read_only: true, ..unknown() }], &[]), Some(Verdict::Stopped)),
            (
                "one of two is read-only",
                seen(vec![Facts { read_only: true, ..unknown() }, unknown()], &[]),
                None,
            ),
            ("configured", seen(vec![at("b"), at("a"), at("b")], &[]), ask(&["a", "b"], false)),
            ("named and configured", seen(vec![at("a")], &["u"]), ask(&["u"], true)),
            ("no deletes", seen(vec![Facts { refuses_delete: true, ..at("a") }], &["u"]), None),
        ];
        for (name, seen, wanted) in cases {
            let verdict = judge(&seen, Said::Nothing).ok();
            match wanted {
                Some(wanted) => assert_eq!(verdict, Some(wanted), "{name}"),
                None => assert!(matches!(verdict, Some(Verdict::Stop(_))), "{name}: {verdict:?}"),
            }
        }
    }
}
