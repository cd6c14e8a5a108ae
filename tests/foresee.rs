//! A dry run says exactly what a sweep with the same words takes and purges at that moment, whatever is in the store and in
//! the trash, and whatever is known of registries.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(dead_code, unused_imports, reason = "shared helpers")]

mod common;
mod memory;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use common::image::{Image, layer};
use common::random::Random;
use memory::{layer_link, put, put_blob, put_image, put_tag, revision_link, tag_link};
use regfs::advice::Place;
use regfs::catalog::Tables;
use regfs::digest::Digest;
use regfs::error::Result;
use regfs::gc::guard::gate::{Gate, Probe, Registries, Said};
use regfs::gc::plan::What;
use regfs::gc::report::{Details, Report};
use regfs::gc::{self, Options, Unwatched};
use regfs::store::Store;
use regfs::store::memory::Memory;
use regfs::trash::{Author, Transaction};
use regfs::view::control::{GcCommand, parse_gc};

/// A wait that is over at the next step, and not within one.
const DRAIN: Duration = Duration::from_millis(5);
const DAY: Duration = Duration::from_secs(24 * 3600);

fn author() -> Author {
    Author { uid: 0, pid: 1, command: "test".to_string() }
}

/// A registry with a cache that remembers some blobs until it is told to forget them.
struct Cache(Mutex<BTreeSet<Digest>>);

impl Registries for Cache {
    fn name(&self) -> String {
        "a registry".to_string()
    }

    fn remembers(&self, _repository: &Path, digest: &Digest) -> Result<bool> {
        Ok(self.0.lock().unwrap().contains(digest))
    }

    fn forget(&self, _repository: &Path, digest: &Digest) -> Result<()> {
        self.0.lock().unwrap().remove(digest);
        Ok(())
    }

    fn verify(&self, _store: &dyn Store, _repository: &Path, _witness: Option<&Digest>) -> Result<()> {
        Ok(())
    }
}

/// Something of everything that registries, crashes, clients and earlier removals leave.
fn random_store(random: &mut Random) -> Arc<Memory> {
    let store = Arc::new(Memory::default());
    let ages = [DAY * 30, DAY * 3, Duration::from_secs(7200)];
    let names = ["app", "team/a", "team/b", "other"];
    for number in 0..12 {
        store.set_clock(SystemTime::now() - *random.choose(&ages));
        let name = *random.choose(&names);
        let image = Image::oci(
            &format!("image {number}"),
            &[layer("own", &number.to_string()), layer("shared", "1")],
        );
        let tag = format!("t{number}");
        match random.below(9) {
            0 | 1 => drop(put_image(&store, name, Some(&tag), &image)),
            2 => drop(put_image(&store, name, None, &image)),
            3 => {
                put_image(&store, name, None, &image);
                let index = Image::index(&[("amd64", &image)]);
                put_image(&store, name, random.choose(&[None, Some(&*tag)]).as_deref(), &index);
            }
            4 => {
                let blob = put_blob(&store, format!("garbage {number}").as_bytes());
                if random.below(2) == 0 {
                    put(&store, layer_link(name, &blob), blob.as_bytes());
                }
            }
            5 => put(&store, format!("repositories/{name}/_uploads/{number}/data"), b"upload"),
            6 => {
                let referrer = image.referrer("application/vnd.example.signature", &number.to_string());
                put_image(&store, name, None, &referrer);
            }
            7 => {
                // What was pushed and lost its tag and its revision by the API.
                let digest = put_image(&store, name, Some(&tag), &image);
                store.remove(&[revision_link(name, &digest), tag_link(name, &tag)]);
            }
            _ => {
                // Removed by hand, and perhaps pushed again in part.
                let digest = put_image(&store, name, Some(&tag), &image);
                let transaction = Transaction::begin(&*store, "rm", &author(), "test").unwrap();
                transaction.take(&*store, &tag_link(name, &tag)).unwrap();
                transaction.take(&*store, &revision_link(name, &digest)).unwrap();
                if random.below(2) == 0 {
                    put_tag(&store, name, &tag, &digest);
                }
            }
        }
    }
    store
}

/// What a run takes and purges, with the reason if it takes nothing.
#[derive(Debug, PartialEq)]
struct Outcome {
    taken: Vec<(What, u64)>,
    purged: BTreeSet<String>,
    dropped: BTreeSet<String>,
    restored: BTreeSet<PathBuf>,
    is_held_back: bool,
}

fn outcome(report: &Report) -> Outcome {
    let mut taken: Vec<(What, u64)> = report.taken().map(|item| (item.what.clone(), item.bytes)).collect();
    taken.sort();
    Outcome {
        taken,
        purged: report.purged_transactions.iter().cloned().collect(),
        dropped: report.dropped_transactions.iter().cloned().collect(),
        restored: report.restored.iter().cloned().collect(),
        is_held_back: report.held_back().is_some(),
    }
}

fn run(store: &dyn Store, words: &str, gate: &Gate) -> Result<Report> {
    let defaults = Options { gate: gate.clone(), drain: DRAIN, ..Options::default() };
    let Ok(GcCommand::Run(options, Said::Nothing, false)) = parse_gc(words, &defaults) else {
        panic!("{words} is no run")
    };
    gc::run(store, &Tables::default(), &options, &author(), &Unwatched)
}

const WORDS: [&str; 9] = [
    "",
    "untagged",
    "untagged=5d",
    "grace=0 untagged allow-large",
    "repository=team/* untagged",
    "referrers=orphans grace=1h",
    "thorough repair",
    "keep=0 grace=0",
    "now keep=0",
];

#[test]
fn a_dry_run_foresees_what_the_sweep_does() {
    let (mut seen, mut held_back) = ([0; 4], 0);
    for seed in 0..60 {
        let mut random = Random(seed);
        let store = random_store(&mut random);
        let cache = Arc::new(Cache(Mutex::default()));
        let probe: Arc<dyn Registries> = cache.clone();
        let gates =
            [Gate::STOPPED, Gate::Off, Gate::Probe(Probe(probe)), Gate::Stop { why: "nobody knows".into() }];
        let gate = gates[seed as usize % gates.len()].clone();
        // The same store again and again: what one sweep begins, the next goes on with.
        for step in 0..5 {
            // What was due by now is for both; nothing becomes so between the two.
            std::thread::sleep(DRAIN * 2);
            let words = *random.choose(&WORDS);
            let before = store.snapshot();
            if random.below(2) == 0 {
                let all = before.keys().filter_map(|path| path.parent()?.file_name()?.to_str());
                let blobs = all.filter_map(|hex| format!("sha256:{hex}").parse::<Digest>().ok());
                *cache.0.lock().unwrap() = blobs.filter(|_| random.below(3) == 0).collect();
            }
            let foreseen = run(&*store, &format!("dry-run {words}"), &gate).unwrap();
            assert!(store.snapshot() == before, "a dry run changes nothing");
            let case = format!("seed {seed}, step {step}: {words:?} with {gate}");
            match run(&*store, &format!("sweep {words}"), &gate) {
                Err(e) => {
                    let why = foreseen.held_back().unwrap_or_default();
                    assert!(why.contains(&e.to_string()), "{case}: {e}, not {why}");
                    assert!(store.snapshot() == before, "{case}: a refused run changes nothing");
                    assert_eq!(foreseen.taken().count(), 0, "{case}");
                }
                Ok(report) => {
                    assert_eq!(report.failures, [""; 0], "{case}");
                    assert_eq!(outcome(&foreseen), outcome(&report), "{case}");
                    seen[seed as usize % gates.len()] += report.taken().count();
                    held_back += usize::from(report.held_back().is_some());
                }
            }
            let text = foreseen.text(Place::ControlFile, Details::Totals);
            let advises = text.contains("next: write sweep instead");
            let acts = foreseen.taken().count() > 0 || text.contains("a sweep would fence");
            assert_eq!(advises, acts, "{case}: {text}");
        }
    }
    assert!(held_back > 5, "only {held_back} runs were held back");
    assert!(seen[..3].iter().all(|taken| *taken > 20) && seen[3] == 0, "{seen:?}");
}
