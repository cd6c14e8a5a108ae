//! How soon things come back, and what a registry's clients notice of sweeps and of the guard. Only measured, never
//! asserted: `scripts/bench-online.sh` runs these and prints what they say.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "windows_harness/mod.rs"]
mod windows_harness;

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::check::{blob_path, sha256};
use common::gc::gc_beside;
use common::image::{Image, layer};
use common::mount::Mount;
use common::registry::Registry;
use windows_harness::Bound;

fn number(name: &str, otherwise: usize) -> usize {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

/// A config and two layers of 64 KiB, like nothing else.
fn image(name: &str) -> Image {
    let content = |part: &str| format!("{part} of {name} ").repeat(64 * 1024 / (10 + name.len()));
    Image::oci(name, &[layer("a", &content("a")), layer("b", &content("b"))])
}

/// The figures of one column, in milliseconds.
struct Times(Vec<f64>);

impl Times {
    fn add(&mut self, time: Duration) {
        self.0.push(time.as_secs_f64() * 1000.0);
    }

    fn at(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
            .get(((sorted.len() as f64 * share) as usize).min(sorted.len().saturating_sub(1)))
            .copied()
            .unwrap_or(f64::NAN)
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [median, ninth, worst] = [0.5, 0.9, 1.0].map(|share| self.at(share));
        write!(f, "{median:.1} | {ninth:.1} | {worst:.1} | {}", self.0.len())
    }
}

/// Milliseconds from the request that names what lies in the trash to the moment in which all of it is back.
#[test]
#[ignore = "scripts/bench-online.sh runs it"]
fn restores() {
    for guarded in [false, true] {
        let place = Bound::new();
        let bound = place.bound.to_str().unwrap().to_string();
        let words: &[&str] = if guarded { &["--guard", &bound] } else { &[] };
        let mount = Mount::with(&place.storage, &[&["--keep", "1h"], words].concat());
        common::wait_for("the mount to watch", Duration::from_secs(20), || {
            mount.read("control/status").contains("\"events\"").then_some(())
        });
        let served = if guarded { place.bound.clone() } else { place.storage.clone() };
        let registry = Registry::start_at(served, true);
        registry.push("app", Some("stays"), &image("stays"));
        let root = place.storage.join("docker/registry/v2");
        let mut times = Times(Vec::new());
        for round in 0..number("ROUNDS", 100) {
            let gone = image(&format!("image {round}"));
            registry.push("app", Some("gone"), &gone);
            registry.api("DELETE", &format!("app/manifests/{}", gone.digest()), &[], &[]).is(202);
            mount.order("gc", "sweep grace=0 keep=1h registry-stopped force");
            let blobs: Vec<PathBuf> =
                gone.blobs.iter().map(|blob| root.join(blob_path(&sha256(blob)))).collect();
            assert!(blobs.iter().all(|blob| !blob.exists()));
            let began = Instant::now();
            let headers = [("Content-Type", gone.media_type)];
            registry.api("PUT", "app/manifests/again", &headers, &gone.manifest).is(201);
            let accepted = Instant::now();
            while !blobs.iter().all(|blob| blob.exists()) {
                assert!(began.elapsed() < Duration::from_secs(60));
                std::thread::sleep(Duration::from_micros(200));
            }
            // From the answer on: before, nobody can rely on it.
            times.add(accepted.elapsed());
        }
        println!("| {} | {times} |", if guarded { "with --guard" } else { "events" });
    }
}

/// Pushes one image after the other while `act` goes on.
fn pushes(registry: &Registry, names: &mut usize, duration: Duration, times: &mut Times) {
    let began = Instant::now();
    while began.elapsed() < duration {
        *names += 1;
        let one = image(&format!("push {names}"));
        let start = Instant::now();
        for blob in &one.blobs {
            let path = format!("pace/blobs/{}", sha256(blob));
            if registry.api("HEAD", &path, &[], &[]).status != 200 {
                registry.push_blob("pace", blob);
            }
        }
        let headers = [("Content-Type", one.media_type)];
        registry.api("PUT", "pace/manifests/latest", &headers, &one.manifest).is(201);
        times.add(start.elapsed());
    }
}

/// Milliseconds that pushes take with nothing else going on, and while sweeps go on without a pause; by turns.
#[test]
#[ignore = "scripts/bench-online.sh runs it"]
fn pushes_beside_sweeps() {
    let Some(store) = std::env::var_os("STORE").map(PathBuf::from) else { panic!("STORE names none") };
    let registry = Registry::start_at(store.clone(), false);
    let turn = Duration::from_millis(number("TURN_MS", 3000) as u64);
    for (title, command) in SIDES {
        let (mut quiet, mut beside) = (Times(Vec::new()), Times(Vec::new()));
        let (mut names, mut sweeps) = (0, 0);
        let words: &[&str] = if *command == "nobody looks" { &[] } else { &["--keep", "1h"] };
        let mount = (*command != "unmounted").then(|| Mount::with(&store, words));
        pushes(&registry, &mut names, turn, &mut Times(Vec::new()));
        for _ in 0..number("ROUNDS", 5) {
            pushes(&registry, &mut names, turn, &mut quiet);
            let is_over = std::sync::atomic::AtomicBool::new(false);
            std::thread::scope(|scope| {
                let (mount, is_over) = (&mount, &is_over);
                let sweeping = scope.spawn(move || sweep(&store_of(), mount.as_ref(), command, is_over));
                pushes(&registry, &mut names, turn, &mut beside);
                is_over.store(true, std::sync::atomic::Ordering::Relaxed);
                sweeps += sweeping.join().unwrap();
            });
        }
        let slower = beside.at(0.5) / quiet.at(0.5);
        println!("| {title} | {quiet} | {beside} | {slower:.2} | {sweeps} |");
    }
}

fn store_of() -> PathBuf {
    std::env::var_os("STORE").map(PathBuf::from).expect("STORE")
}

/// What goes on beside the pushes.
const SIDES: &[(&str, &str)] = &[
    ("sweeps in a mount that take nothing", "sweep"),
    ("sweeps in a mount that fence, quarantine and purge", "sweep grace=1s drain=1s keep=2s"),
    ("`regfs gc`, again and again", "unmounted"),
];

/// Sweeps until it is over; how often.
fn sweep(
    store: &Path,
    mount: Option<&Mount>,
    command: &str,
    is_over: &std::sync::atomic::AtomicBool,
) -> usize {
    let mut sweeps = 0;
    while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
        match mount {
            Some(mount) => mount.tell("gc", command).unwrap(),
            None => drop(gc_beside(store, &[])),
        }
        sweeps += 1;
    }
    sweeps
}

/// Milliseconds of pushes and pulls through a bind mount with and without the guard.
#[test]
#[ignore = "scripts/bench-online.sh runs it"]
fn a_guarded_registry() {
    for guarded in [false, true, false, true] {
        let place = Bound::new();
        let bound = place.bound.to_str().unwrap().to_string();
        let words: &[&str] = if guarded { &["--guard", &bound] } else { &[] };
        let _mount = Mount::with(&place.storage, words);
        let served = if guarded { place.bound.clone() } else { place.storage.clone() };
        let registry = Registry::start_at(served, false);
        let (mut pushed, mut pulled) = (Times(Vec::new()), Times(Vec::new()));
        pushes(&registry, &mut 0, Duration::from_secs(1), &mut Times(Vec::new()));
        let cpu = cpu_of(registry.pid());
        pushes(&registry, &mut 1_000_000, Duration::from_millis(number("TURN_MS", 3000) as u64), &mut pushed);
        for _ in 0..number("PULLS", 500) {
            let start = Instant::now();
            registry.pulls("pace:latest").unwrap();
            pulled.add(start.elapsed());
        }
        let cpu = (cpu_of(registry.pid()) - cpu) / (pushed.0.len() + pulled.0.len()) as f64;
        let title = if guarded { "with --guard" } else { "without" };
        println!("| {title} | {:.2} | {:.2} | {cpu:.2} |", pushed.at(0.5), pulled.at(0.5));
    }
}

/// Milliseconds of processor time that a process has used.
fn cpu_of(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: f64 = [11, 12].iter().map(|at| fields[*at].parse::<f64>().unwrap()).sum();
    ticks * 10.0
}
