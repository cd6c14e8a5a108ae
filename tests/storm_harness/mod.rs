//! A storm: threads that push, delete and pull like clients do, beside a collector; and what came of it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, RwLock};
use std::time::{Duration, Instant};

use crate::common::check::{blobs, sha256};
use crate::common::gc::transactions;
use crate::common::http::Response;
use crate::common::image::{Image, layer};
use crate::common::mount::Mount;
use crate::common::random::Random;
use crate::common::redis::RedisServer;
use crate::common::registry::{self, Cache, Registry, stock_garbage};
use crate::common::run::{Bounded, clean, regfs};
use crate::windows_harness::Bound;

/// Threads that push.
const CLIENTS: usize = 4;
/// Repositories; every client uses all of them.
const REPOSITORIES: [&str; 3] = ["app", "team/base", "team/web"];
/// Tags that a client has in each.
const TAGS: usize = 4;
/// Layers that all images are made of: few, so that they are dead and wanted again all the time.
const LAYERS: usize = 24;
/// How often a client tries a push before it gives up, as clients do.
const TRIES: usize = 5;
/// The waits of the collector.
const TIMES: [&str; 6] = ["--grace", "500ms", "--drain", "500ms", "--keep", "1500ms"];
/// What a registry before 3.1 answers while it writes a link.
const HALF_WRITTEN: &str = "the manifest: 500";
/// An image that does not pull for so long is broken for good.
const FOR_GOOD: Duration = Duration::from_secs(3);

/// Who collects.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Collector {
    /// A mount that sweeps by itself.
    Regfs,
    /// `regfs gc` that takes and frees at once, as if no registry ran.
    Optimistic,
    /// `docker-registry garbage-collect`.
    Stock,
    /// Nobody.
    None,
}

/// What goes wrong.
#[derive(Clone, Copy, Default)]
pub(crate) struct Trouble {
    /// The mount is killed so often, and mounted again.
    pub(crate) kill_every: Option<Duration>,
    /// The registry is started again in the middle.
    pub(crate) restart_registry: bool,
    /// The mount is killed after a quarter and comes back after three quarters.
    pub(crate) down_for_half: bool,
}

/// A storm that is to be.
#[derive(Clone, Copy)]
pub(crate) struct Storm {
    pub(crate) seed: u64,
    pub(crate) duration: Duration,
    pub(crate) cache: bool,
    /// Where it remembers with a cache: in redis.
    pub(crate) is_redis: bool,
    pub(crate) collector: Collector,
    pub(crate) trouble: Trouble,
    /// The registry works in a bind mount that regfs guards.
    pub(crate) is_guarded: bool,
    /// It is over when an image is broken for good.
    pub(crate) ends_when_broken: bool,
}

impl Storm {
    pub(crate) fn new(seed: u64, duration: Duration) -> Storm {
        let (collector, trouble) = (Collector::Regfs, Trouble::default());
        Storm {
            seed,
            duration,
            cache: false,
            is_redis: false,
            collector,
            trouble,
            is_guarded: false,
            ends_when_broken: false,
        }
    }
}

/// What came of it.
#[derive(Default)]
pub(crate) struct Figures {
    name: String,
    acknowledged: usize,
    told_to_retry: usize,
    given_up: usize,
    pulls: usize,
    /// Pulls that met a link which was just being written.
    half_written: usize,
    /// Pulls that failed for a moment, and the longest of them.
    pub(crate) broken_for_a_moment: usize,
    longest: Duration,
    /// What was wrong with the first of them.
    first_broken: Option<String>,
    /// Those that failed until something else was pushed in that place.
    broken_until_replaced: usize,
    pub(crate) broken_for_good: usize,
    /// What does not pull in the end, a line each.
    lost: Vec<String>,
    /// Blobs that were in the store and are gone for good.
    purged: usize,
    /// What was given back, as the log of the mount says.
    given_back: usize,
    /// Unreferenced in the end, after all waits.
    left: BTreeSet<String>,
    /// Milliseconds that a push took, in the middle.
    push_millis: f64,
    seconds: f64,
}

impl Figures {
    #[track_caller]
    pub(crate) fn assert_nothing_is_lost(&self) {
        assert!(self.lost.is_empty() && self.broken_for_good == 0, "{self}\n{}", self.lost.join("\n"));
        assert!(self.acknowledged > 0, "{self}");
    }

    /// Images that were seen broken, or are in the end.
    pub(crate) fn broken(&self) -> usize {
        self.broken_for_a_moment + self.broken_until_replaced + self.broken_for_good + self.lost.len()
    }

    #[track_caller]
    pub(crate) fn assert_all_went_to_the_purge(&self) {
        assert!(self.purged > 0, "nothing was purged: {self}");
        assert!(self.left.is_empty(), "left over: {:?}\n{self}", self.left);
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {:.0} s, {} pushes acknowledged (median {:.1} ms), {} told to retry, {} given up; {} pulls, {} broken \
             for a moment, {} until replaced (longest {:?}), {} for more than {FOR_GOOD:?}; {} lost in the end; {} blobs purged ({:.0} a minute), {} given \
             back, {} left",
            self.name,
            self.seconds,
            self.acknowledged,
            self.push_millis,
            self.told_to_retry,
            self.given_up,
            self.pulls,
            self.broken_for_a_moment,
            self.broken_until_replaced,
            self.longest,
            self.broken_for_good,
            self.lost.len(),
            self.purged,
            self.purged as f64 * 60.0 / self.seconds,
            self.given_back,
            self.left.len(),
        )?;
        self.first_broken.iter().try_for_each(|why| write!(f, "; the first that was broken: {why}"))
    }
}

/// A tag as its client knows it.
#[derive(Clone)]
struct Known {
    image: Image,
    /// Changes with each push, so that a pull in between proves nothing.
    version: u64,
}

/// Repository and tag → what was acknowledged last; `None` while that is uncertain.
type Tags = BTreeMap<(&'static str, String), Option<Known>>;

struct World {
    plan: Storm,
    /// Where a guarded registry works.
    place: Option<Bound>,
    redis: Option<RedisServer>,
    /// Requests hold it for reading, a restart for writing.
    registry: RwLock<Registry>,
    mount: RwLock<Option<Mount>>,
    is_over: AtomicBool,
    tags: Mutex<Tags>,
    /// Digests of everything ever acknowledged.
    ever: Mutex<BTreeSet<String>>,
    figures: Mutex<Figures>,
    push_millis: Mutex<Vec<f64>>,
    version: AtomicUsize,
}

/// A mount that sweeps by itself.
const SWEEPS: &[&str] = &["--sweep-every", "250ms"];

/// The arguments of a mount that guards.
fn arguments(place: &Bound) -> Vec<&str> {
    [&TIMES[..], SWEEPS, &["--guard", place.bound.to_str().unwrap()]].concat()
}

/// Lets it happen.
pub(crate) fn storm(plan: &Storm) -> Figures {
    let place = plan.is_guarded.then(Bound::new);
    let guarded = place.as_ref().map(|place| place.mount(&arguments(place)));
    let redis = plan.is_redis.then(RedisServer::start);
    let cache = redis.as_ref().map_or_else(|| plan.cache.into(), Cache::from);
    let registry = match &place {
        Some(place) => Registry::start_at(place.bound.clone(), cache),
        None => Registry::start_with(cache),
    };
    let mut world = World {
        plan: *plan,
        place,
        redis,
        registry: RwLock::new(registry),
        mount: RwLock::default(),
        is_over: AtomicBool::new(false),
        tags: Mutex::default(),
        ever: Mutex::default(),
        figures: Mutex::default(),
        push_millis: Mutex::default(),
        version: AtomicUsize::new(0),
    };
    if plan.collector == Collector::Regfs {
        *world.mount.get_mut().unwrap() = guarded.or_else(|| Some(world.mount()));
    }
    let began = Instant::now();
    std::thread::scope(|scope| {
        let world = &world;
        for client in 0..CLIENTS {
            scope.spawn(move || world.watched(|| client_of(world, client)));
        }
        scope.spawn(move || world.watched(|| pulls(world)));
        scope.spawn(move || world.watched(|| collects(world)));
        world.watched(|| troubles(world, began));
        world.is_over.store(true, Relaxed);
    });
    world.figures.get_mut().unwrap().seconds = began.elapsed().as_secs_f64();
    world.finish()
}

impl World {
    fn is_over(&self) -> bool {
        self.is_over.load(Relaxed)
    }

    /// Ends the storm when one of its threads fails, so that the test fails at once.
    fn watched(&self, act: impl FnOnce()) {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        if let Err(panic) = result {
            self.is_over.store(true, Relaxed);
            std::panic::resume_unwind(panic);
        }
    }

    fn mount(&self) -> Mount {
        if let Some(place) = &self.place {
            return place.mount(&arguments(place));
        }
        let config = self.registry.read().unwrap().config();
        Mount::with(&config, &[&TIMES[..], SWEEPS].concat())
    }

    /// One request; `None` when the registry was not there.
    fn api(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        self.registry.read().unwrap().api(method, path, headers, body)
    }

    fn count(&self, count: impl FnOnce(&mut Figures)) {
        count(&mut self.figures.lock().unwrap());
    }

    /// Pushes a blob as clients do: only if it is not there; sometimes by a mount from another repository.
    fn push_blob(&self, repository: &str, blob: &[u8], random: &mut Random) {
        let digest = sha256(blob);
        if self.api("HEAD", &format!("{repository}/blobs/{digest}"), &[], &[]).status == 200 {
            return;
        }
        let from = *random.choose(&REPOSITORIES);
        let mut start = format!("{repository}/blobs/uploads/");
        if from != repository && random.below(2) == 0 {
            start += &format!("?mount={digest}&from={from}");
        }
        let started = self.api("POST", &start, &[], &[]);
        if started.status == 201 {
            return;
        }
        let started = started.is(202);
        let location = started.header("location").expect("a place to upload to");
        let (_, path) = location.split_once("/v2/").expect("a location of the registry");
        let octets = [("Content-Type", "application/octet-stream")];
        // A registry that was started again knows nothing of the upload.
        self.api("PUT", &format!("{path}&digest={digest}"), &octets, blob);
    }

    /// Pushes an image; whether the registry took it.
    fn push(&self, repository: &str, reference: &str, image: &Image, random: &mut Random) -> bool {
        for _ in 0..TRIES {
            for child in &image.children {
                if !self.push(repository, &child.digest(), child, random) {
                    return false;
                }
            }
            for blob in &image.blobs {
                self.push_blob(repository, blob, random);
            }
            let target = format!("{repository}/manifests/{reference}");
            let answer = self.api("PUT", &target, &[("Content-Type", image.media_type)], &image.manifest);
            match answer.status {
                201 => return true,
                400 | 404 => self.count(|f| f.told_to_retry += 1),
                // What a directory that goes at the wrong moment looks like; none may.
                status => panic!("PUT {target}: {status} {}", String::from_utf8_lossy(&answer.body)),
            }
        }
        self.count(|f| f.given_up += 1);
        false
    }

    fn set(&self, key: (&'static str, String), known: Option<Known>) {
        self.tags.lock().unwrap().insert(key, known);
    }

    fn next_version(&self) -> u64 {
        self.version.fetch_add(1, Relaxed) as u64
    }
}

/// A client: pushes, pushes again, retags, deletes; its manifests and tags are nobody else's, its layers everybody's.
fn client_of(world: &World, client: usize) {
    let mut random = Random(world.plan.seed << 8 | client as u64);
    let mut names = 0;
    while !world.is_over() {
        let repository = *random.choose(&REPOSITORIES);
        let key = (repository, format!("c{client}-{}", random.below(TAGS)));
        let known = world.tags.lock().unwrap().get(&key).cloned().flatten();
        match (random.below(10), known) {
            // The same again, or under another tag.
            (0..2, Some(known)) => push_tag(world, key, known.image, &mut random),
            (2, Some(known)) => {
                let other = (repository, format!("c{client}-{}", random.below(TAGS)));
                push_tag(world, other, known.image, &mut random);
            }
            (3..6, Some(_)) => remove_tag(world, &key),
            (6, Some(known)) => delete_manifest(world, client, repository, &known.image),
            _ => {
                names += 1;
                let image = some_image(&format!("{client}-{}", names % 7), &mut random);
                push_tag(world, key, image, &mut random);
            }
        }
    }
}

fn some_image(name: &str, random: &mut Random) -> Image {
    let mut one = |name: &str| {
        let layers: Vec<_> = (0..1 + random.below(3))
            .map(|_| {
                let number = random.below(LAYERS);
                layer("file", &format!("layer {number} {}", "x".repeat(200 * number)))
            })
            .collect();
        Image::oci(name, &layers)
    };
    let (first, second) = (one(name), one(&format!("{name}-arm")));
    match name.ends_with('3') {
        true => Image::index(&[("amd64", &first), ("arm64", &second)]),
        false => first,
    }
}

fn push_tag(world: &World, key: (&'static str, String), image: Image, random: &mut Random) {
    // Until it is acknowledged it may be either.
    world.set(key.clone(), None);
    let began = Instant::now();
    if world.push(key.0, &key.1, &image, random) {
        world.push_millis.lock().unwrap().push(began.elapsed().as_secs_f64() * 1000.0);
        world.ever.lock().unwrap().extend(image.digests());
        world.count(|f| f.acknowledged += 1);
        world.set(key, Some(Known { image, version: world.next_version() }));
    }
}

/// `rm` on the mount; what it takes along is the client's own.
fn remove_tag(world: &World, key: &(&'static str, String)) {
    let mount = world.mount.read().unwrap();
    let Some(mount) = mount.as_ref() else { return };
    let before = world.tags.lock().unwrap().insert(key.clone(), None);
    let path = mount.path(format!("images/{}/_tags/{}", key.0, key.1));
    match fs::remove_file(&path) {
        Ok(()) => {
            world.tags.lock().unwrap().remove(key);
        }
        // Another change goes on, or the mount was killed: whether it is gone, the next push tells.
        Err(_) if before.is_some() => {}
        Err(_) => {}
    }
}

/// The API's DELETE: the manifest and every tag of the repository that points at it.
fn delete_manifest(world: &World, client: usize, repository: &'static str, image: &Image) {
    let mine = format!("c{client}-");
    let points_there = |tags: &Tags| -> Vec<_> {
        let same =
            |known: &Option<Known>| known.as_ref().is_none_or(|known| known.image.digest() == image.digest());
        tags.iter()
            .filter(|(k, v)| k.0 == repository && k.1.starts_with(&mine) && same(v))
            .map(|(k, _)| k.clone())
            .collect()
    };
    let keys = points_there(&world.tags.lock().unwrap());
    for key in &keys {
        world.set(key.clone(), None);
    }
    world.api("DELETE", &format!("{repository}/manifests/{}", image.digest()), &[], &[]);
}

/// Pulls what was acknowledged, again and again.
fn pulls(world: &World) {
    let mut random = Random(world.plan.seed << 8 | 0xff);
    while !world.is_over() {
        let known: Vec<_> =
            world.tags.lock().unwrap().iter().filter_map(|(k, v)| Some((k.clone(), v.clone()?))).collect();
        if known.is_empty() {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        }
        let (key, known) = random.choose(&known).clone();
        let is_still = || {
            world
                .tags
                .lock()
                .unwrap()
                .get(&key)
                .cloned()
                .flatten()
                .is_some_and(|k| k.version == known.version)
        };
        let began = Instant::now();
        let mut failed = None;
        loop {
            let reference = format!("{}:{}", key.0, key.1);
            let pulled = world.registry.read().unwrap().pulls(&reference);
            // A push or a removal in between proves nothing.
            if !is_still() {
                if failed.is_some() {
                    world.count(|f| {
                        f.broken_until_replaced += 1;
                        f.longest = f.longest.max(began.elapsed());
                    });
                    world.is_over.fetch_or(world.plan.ends_when_broken, Relaxed);
                }
                break;
            }
            // 2.8 writes links in place, and answers 500 of one that it is just writing, whoever collects.
            if pulled.as_ref().is_err_and(|why| why.starts_with(HALF_WRITTEN)) && began.elapsed() < FOR_GOOD {
                world.count(|f| f.half_written += 1);
                continue;
            }
            let Err(why) = pulled else {
                world.count(|f| {
                    f.pulls += 1;
                    if failed.is_some() {
                        f.broken_for_a_moment += 1;
                        f.longest = f.longest.max(began.elapsed());
                    }
                });
                break;
            };
            world.count(|f| {
                f.first_broken.get_or_insert_with(|| format!("{reference}: {why}"));
            });
            failed = Some(why);
            if began.elapsed() > FOR_GOOD {
                world.count(|f| f.broken_for_good += 1);
                world.is_over.fetch_or(world.plan.ends_when_broken, Relaxed);
                // Not again and again.
                world.tags.lock().unwrap().insert(key.clone(), None);
                break;
            }
        }
    }
}

/// Collects, unless a mount does.
fn collects(world: &World) {
    while !world.is_over() {
        let config = world.registry.read().unwrap().config();
        match world.plan.collector {
            Collector::Regfs | Collector::None => return,
            Collector::Optimistic => {
                let words = ["--grace", "0", "--now", "--registry-stopped", "--force"];
                regfs(["gc"]).arg(&config).args(words).outcome();
            }
            Collector::Stock => {
                clean(registry::binary()).arg("garbage-collect").arg(&config).outcome();
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Kills, starts again, and waits for the end.
fn troubles(world: &World, began: Instant) {
    let Storm { duration, trouble, .. } = world.plan;
    let (mut killed, mut is_restarted) = (began, false);
    while began.elapsed() < duration && !world.is_over() {
        std::thread::sleep(Duration::from_millis(50));
        if trouble.restart_registry && !is_restarted && began.elapsed() > duration / 2 {
            world.registry.write().unwrap().restart();
            is_restarted = true;
        }
        let is_down =
            trouble.down_for_half && began.elapsed() > duration / 4 && began.elapsed() < duration * 3 / 4;
        if trouble.kill_every.is_some_and(|every| killed.elapsed() > every) {
            // Whoever holds the lock is in a call that ends with the daemon.
            world.crash();
            killed = Instant::now();
        }
        if is_down && world.mount.read().unwrap().is_some() {
            world.crash();
            *world.mount.write().unwrap() = None;
        }
        let is_missing = world.plan.collector == Collector::Regfs && world.mount.read().unwrap().is_none();
        if is_missing && !is_down {
            *world.mount.write().unwrap() = Some(world.mount());
        }
    }
}

impl World {
    fn crash(&self) {
        if let Some(mount) = self.mount.read().unwrap().as_ref() {
            self.note_log(mount);
            mount.crash();
        }
        *self.mount.write().unwrap() = None;
    }

    /// Counts what the log of the mount says; it goes with the mount.
    fn note_log(&self, mount: &Mount) {
        let log = fs::read_to_string(mount.path("control/log")).unwrap_or_default();
        let given_back = log.lines().filter(|line| line.contains("\"action\":\"give back\"")).count();
        self.count(|f| f.given_back += given_back);
    }

    /// Waits for the collector to get to its end, starts the registry again, and looks at everything.
    fn finish(self) -> Figures {
        let World { plan, redis, registry, mount, tags, ever, figures, push_millis, .. } = self;
        let (mut registry, mut figures) = (registry.into_inner().unwrap(), figures.into_inner().unwrap());
        let cache = match plan.cache {
            _ if plan.is_redis => "redis",
            true => "on",
            false => "off",
        };
        figures.name = format!("{:?}, cache {cache}", plan.collector);
        let mut millis = push_millis.into_inner().unwrap();
        millis.sort_by(f64::total_cmp);
        figures.push_millis = millis.get(millis.len() / 2).copied().unwrap_or_default();
        if let Some(mount) = mount.into_inner().unwrap() {
            let log = mount.read("control/log");
            figures.given_back +=
                log.lines().filter(|line| line.contains("\"action\":\"give back\"")).count();
            mount.unmount();
        }
        if plan.collector == Collector::Regfs {
            for _ in 0..2 {
                let waits = regfs(["gc"]).arg(registry.config()).args(TIMES).arg("--wait").outcome();
                waits.exits(0);
                std::thread::sleep(Duration::from_millis(1600));
            }
            regfs(["gc"]).arg(registry.config()).args(TIMES).outcome().exits(0);
        }
        // It forgets what it knew: only what is on the disk counts.
        redis.iter().for_each(|redis| drop(redis.ask(&["FLUSHALL"])));
        registry.restart();
        for ((repository, tag), known) in tags.into_inner().unwrap() {
            if known.is_some()
                && let Err(why) = registry.pulls(&format!("{repository}:{tag}"))
            {
                figures.lost.push(format!("{repository}:{tag}: {why}"));
            }
        }
        registry.stop();
        if plan.collector == Collector::Regfs {
            // Manifests that a registry remembered go only without it.
            let stopped = ["--registry-stopped", "--grace", "0", "--drain", "0", "--keep", "0", "--now"];
            regfs(["gc"]).arg(registry.store()).args(stopped).outcome().exits(0);
            assert_eq!(transactions(&registry.store()).iter().filter(|id| id.contains("sweep")).count(), 0);
            figures.left = stock_garbage(&registry.config());
        }
        let there = blobs(&registry.store());
        figures.purged = ever.into_inner().unwrap().iter().filter(|digest| !there.contains(*digest)).count();
        figures
    }
}
