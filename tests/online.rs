//! Collecting beside a registry that runs, step by step: which gate there is and why, and pushes that come at the worst
//! moments.

#[path = "online_harness/mod.rs"]
mod online_harness;

mod common;

use std::fs;
use std::io::Write;
use std::time::{Duration, Instant};

use common::beside::{A_STEP, TIMES, garbage_in, image, in_state, step};
use common::gc::{gc_beside, transactions};
use common::image::Image;
use common::mount::Mount;
use common::registry::Registry;
use common::run::{Bounded, regfs};
use common::{have, wait_for};
use online_harness::{Moments, pushed_at};

const NEEDS: &[&str] = &["docker-registry", "setpriv"];

/// A registry with one image that stays and one that was deleted.
fn garbage(cache: bool) -> (Registry, Image) {
    let registry = Registry::start_with(cache);
    let gone = garbage_in(&registry);
    (registry, gone)
}

fn blob_of(registry: &Registry, digest: &str) -> std::path::PathBuf {
    registry.store().join("docker/registry/v2").join(common::check::blob_path(digest))
}

/// The layer of an image.
fn layer_of(image: &Image) -> String {
    common::check::sha256(&image.blobs[1])
}

#[test]
fn garbage_goes_one_step_with_each_run() {
    if !have(NEEDS) {
        return;
    }
    for (cache, gate, goes) in [(false, "off", 3), (true, "probe", 2)] {
        let (registry, gone) = garbage(cache);
        let store = registry.config();
        let first = step(&store);
        assert_eq!(first.gate, gate, "{}", first.gate_reason);
        // A slow machine has waited for the manifest by then.
        let seen = in_state(&first, "candidate") + in_state(&first, "waiting-for-registry");
        assert_eq!(seen, 3, "{:?}", first.states);
        let second = step(&store);
        assert_eq!(in_state(&second, "fenced"), goes, "{:?}", second.states);
        // Who pulls misses nothing; who pushes is told to upload.
        assert!(blob_of(&registry, &layer_of(&gone)).exists());
        assert_eq!(registry.api("HEAD", &format!("app/blobs/{}", layer_of(&gone)), &[], &[]).status, 404);
        let third = step(&store);
        assert_eq!(third.taken_blobs().len(), goes, "{:?}", third.states);
        assert_eq!(in_state(&third, "quarantined"), goes);
        assert!(!blob_of(&registry, &layer_of(&gone)).exists());
        let fourth = step(&store);
        assert!(transactions(&registry.store()).is_empty(), "{:?}", fourth.states);
        assert_eq!(
            in_state(&fourth, "waiting-for-registry"),
            3 - goes,
            "manifests that a registry may remember"
        );
        registry.pull("app:stays");
    }
}

#[test]
fn wait_goes_all_the_way() {
    if !have(NEEDS) {
        return;
    }
    let (registry, gone) = garbage(true);
    let words = ["--grace", "50ms", "--drain", "50ms", "--keep", "1h", "--wait"];
    let report = gc_beside(&registry.config(), &words);
    assert_eq!(in_state(&report, "quarantined"), 2, "{:?}", report.states);
    assert!(!blob_of(&registry, &layer_of(&gone)).exists());
}

#[test]
fn what_is_not_known_takes_nothing_and_says_what_to_do() {
    if !have(NEEDS) {
        return;
    }
    // Nobody serves it, nothing is said.
    let (mut registry, gone) = garbage(true);
    registry.stop();
    for _ in 0..4 {
        let report = step(&registry.store());
        assert_eq!(report.gate, "stop");
        for word in ["config.yml", "--registry", "registry-stopped"] {
            assert!(report.gate_reason.contains(word), "{}", report.gate_reason);
        }
        assert!(report.taken.is_empty() && report.failures.is_empty());
    }
    assert_eq!(in_state(&step(&registry.store()), "waiting-for-registry"), 3);
    assert!(blob_of(&registry, &layer_of(&gone)).exists());
    // It does not answer where config.yml says.
    let report = step(&registry.config());
    assert!(report.gate == "stop" && report.gate_reason.contains("127.0.0.1"), "{}", report.gate_reason);
    // With the word, all of it at once.
    let stopped = [&TIMES[..], &["--registry-stopped"]].concat();
    let report = gc_beside(&registry.store(), &stopped);
    assert_eq!((report.gate.as_str(), report.taken_blobs().len()), ("stopped", 3));
}

#[test]
fn a_registry_that_runs_is_found_and_its_word_counts_only_if_it_is_its_own() {
    if !have(NEEDS) {
        return;
    }
    for (cache, gate) in [(false, "off"), (true, "probe")] {
        let (mut registry, _) = garbage(cache);
        registry.alone();
        let found = step(&registry.store());
        assert_eq!(found.gate, gate, "by its process: {}", found.gate_reason);
        // To say that it is stopped is no way around it.
        let words = [&TIMES[..], &["--registry-stopped"]].concat();
        let refused = regfs(["gc"]).arg(registry.store()).args(&words).outcome().exits(1).says("force");
        let words = format!("{} serve", common::registry::binary());
        assert!(refused.stderr.contains(&words), "{refused}");
        // Nor to want it now.
        let now = regfs(["gc"]).arg(registry.config()).args([&TIMES[..], &["--now"]].concat()).outcome();
        now.exits(1).says("registry-stopped");
        // A file that was changed since says nothing about the process.
        std::thread::sleep(Duration::from_millis(200));
        let config = fs::read_to_string(registry.config()).unwrap();
        fs::write(registry.config(), config.replace("cache: {blobdescriptor: inmemory}", "cache: {}"))
            .unwrap();
        // It is asked where it answers, which shows that it is the one; what it remembers nobody knows.
        let report = step(&registry.store());
        assert_eq!(report.gate, "probe", "{}", report.gate_reason);
        let report = step(&registry.config());
        assert_ne!(report.gate, "off", "{}", report.gate_reason);
    }
}

#[test]
fn only_a_registry_that_serves_this_storage_is_believed() {
    if !have(NEEDS) {
        return;
    }
    let (registry, gone) = garbage(true);
    let other = Registry::start_with(true);
    other.push("app", Some("stays"), &image("stays"));
    let url = format!("http://127.0.0.1:{}", other.port());
    let words = [&TIMES[..], &["--registry", &url]].concat();
    for _ in 0..3 {
        std::thread::sleep(A_STEP);
        let report = gc_beside(&registry.store(), &words);
        assert!(report.gate_reason.contains("stores somewhere else"), "{}", report.gate_reason);
        assert!(report.gate == "stop" && report.taken.is_empty());
    }
    assert!(blob_of(&registry, &layer_of(&gone)).exists());
    // Two processes on one storage: both are asked.
    let second = registry.another();
    let urls = format!("http://127.0.0.1:{},http://127.0.0.1:{}", registry.port(), second.port());
    second.blob("app", &layer_of(&gone)).is(200);
    let words = [&TIMES[..], &["--registry", &urls]].concat();
    let quarantined = (0..8).any(|_| {
        std::thread::sleep(A_STEP);
        in_state(&gc_beside(&registry.store(), &words), "quarantined") > 0
    });
    assert!(quarantined);
    for one in [&registry, &second] {
        assert_eq!(one.api("HEAD", &format!("app/blobs/{}", layer_of(&gone)), &[], &[]).status, 404);
    }
    let uploads = registry.store().join("docker/registry/v2/repositories/app/_uploads");
    assert_eq!(
        common::entries(&uploads),
        Vec::<std::path::PathBuf>::new(),
        "what showed that it is ours is gone"
    );
}

#[test]
fn a_registry_that_does_not_delete_or_is_a_proxy_or_is_read_only_is_no_probe() {
    if !have(NEEDS) {
        return;
    }
    let with = |change: &dyn Fn(String) -> String| {
        let (mut registry, gone) = garbage(true);
        registry.change_config(change);
        (registry, gone)
    };
    let (registry, _) = with(&|config| config.replace("delete: {enabled: true}", "delete: {enabled: false}"));
    let report = step(&registry.config());
    assert!(
        report.gate == "stop" && report.gate_reason.contains("storage.delete.enabled"),
        "{}",
        report.gate_reason
    );
    let remote = Registry::start();
    let proxy = format!("proxy: {{remoteurl: 'http://127.0.0.1:{}'}}\n", remote.port());
    let (registry, _) = with(&|config| config + &proxy);
    let report = step(&registry.config());
    assert!(report.gate == "stop" && report.gate_reason.contains("pull-through"), "{}", report.gate_reason);
    let (registry, gone) =
        with(&|config| config.replace("maintenance: {", "maintenance: {readonly: {enabled: true}, "));
    std::thread::sleep(A_STEP);
    let report = gc_beside(&registry.config(), &["--grace", "0", "--now"]);
    assert_eq!((report.gate.as_str(), report.taken_blobs().len()), ("stopped", 3), "{}", report.gate_reason);
    assert!(!blob_of(&registry, &layer_of(&gone)).exists() && report.freed_bytes > 0);
}

/// What a registry keeps in redis it remembers after it was stopped.
#[test]
fn stopping_a_registry_is_not_enough_where_its_cache_outlives_it() {
    let store = common::store::Store::new();
    store.push("app", Some("1"), &image("stays"));
    let garbage = store.put_blob(b"garbage");
    let config = store.root().join("config.yml");
    let of_cache = |cache: &str| {
        let root = store.root().display();
        let text = format!(
            "storage: {{filesystem: {{rootdirectory: {root}}}, cache: {{blobdescriptor: {cache}}}}}\n"
        );
        fs::write(&config, text).unwrap();
        std::thread::sleep(A_STEP);
        regfs(["gc"]).arg(&config).args(TIMES).arg("--registry-stopped").outcome()
    };
    of_cache("redis").exits(1).says("redis");
    assert!(store.blob(&garbage).exists());
    of_cache("inmemory").exits(0);
    assert!(!store.blob(&garbage).exists());
}

/// A registry before 3.1 writes a link in place: into the file that has just moved to the trash.
#[test]
fn a_link_that_is_written_late_brings_everything_back() {
    if !have(NEEDS) {
        return;
    }
    let (registry, gone) = garbage(false);
    let digest = layer_of(&gone);
    let link = format!("docker/registry/v2/repositories/app/_layers/{}/link", digest.replace(':', "/"));
    let link = registry.store().join(link);
    step(&registry.config());
    let mut open = fs::OpenOptions::new().write(true).open(&link).unwrap();
    let fenced = step(&registry.config());
    assert_eq!(in_state(&fenced, "fenced"), 3);
    assert!(!link.exists());
    open.write_all(digest.as_bytes()).unwrap();
    let report = step(&registry.config());
    assert!(link.exists(), "{:?}", report.restored);
    assert!(blob_of(&registry, &digest).exists());
    assert_eq!(report.taken_blobs().len(), 2, "what nobody wrote to goes on");
}

/// The image is wanted again after its blobs were fenced, quarantined: each time it is whole in the end.
#[test]
fn a_push_after_each_step_gets_an_image_that_lasts() {
    if !have(NEEDS) {
        return;
    }
    for cache in [false, true] {
        for steps in 1..=4 {
            let (mut registry, gone) = garbage(cache);
            for _ in 0..steps {
                step(&registry.config());
            }
            // As docker does: asks, uploads what is not there.
            for blob in &gone.blobs {
                let path = format!("app/blobs/{}", common::check::sha256(blob));
                if registry.api("HEAD", &path, &[], &[]).status != 200 {
                    registry.push_blob("app", blob);
                }
            }
            let headers = [("Content-Type", gone.media_type)];
            registry.api("PUT", "app/manifests/again", &headers, &gone.manifest).is(201);
            for _ in 0..3 {
                step(&registry.config());
            }
            registry.restart();
            registry.pull("app:again");
        }
    }
}

/// With a cache, a manifest that comes without its layers being asked for: what happens when the registry was not told.
#[test]
fn a_manifest_that_names_what_lies_in_quarantine_brings_it_back_at_once() {
    if !have(&[NEEDS, &["fuse", "root"]].concat()) {
        return;
    }
    let (registry, gone) = garbage(false);
    let words = ["--grace", "50ms", "--drain", "50ms", "--keep", "1h"];
    for _ in 0..3 {
        std::thread::sleep(A_STEP);
        gc_beside(&registry.config(), &words);
    }
    let data = blob_of(&registry, &layer_of(&gone));
    assert!(!data.exists());
    let _mount = Mount::with(&registry.config(), &words);
    wait_for("the mount to watch", Duration::from_secs(20), || {
        _mount.read("control/status").contains("\"events\"").then_some(())
    });
    // What a registry leaves that believes its memory: the manifest and its revision, no link, no upload.
    let root = registry.store().join("docker/registry/v2");
    let manifest = root.join(common::check::blob_path(&gone.digest()));
    common::store::put(&manifest, &gone.manifest);
    let revision = format!("repositories/app/_manifests/revisions/sha256/{}/link", gone.hex());
    let began = Instant::now();
    common::store::put(&root.join(revision), gone.digest().as_bytes());
    wait_for("the layer to come back", Duration::from_secs(20), || data.exists().then_some(()));
    println!("the layer was back after {:?}", began.elapsed());
    for blob in &gone.blobs {
        registry.blob("app", &common::check::sha256(blob)).is(200);
    }
}

/// `rm` tells a registry that remembers: a push that asks for the manifest or its layers is not sent away happy.
#[test]
fn rm_tells_the_registry() {
    if !have(&[NEEDS, &["fuse", "root"]].concat()) {
        return;
    }
    let registry = Registry::start_with(true);
    let one = image("one");
    registry.push("app", Some("1"), &one);
    registry.manifest("app", &one.digest()).is(200);
    let mount = Mount::of(&registry.config());
    mount.rm("images/app:1");
    wait_for("the registry to forget", Duration::from_secs(20), || {
        (registry.manifest("app", &one.digest()).status == 404).then_some(())
    });
}

#[test]
fn a_mount_sweeps_by_itself_and_shows_how_far_it_is() {
    if !have(&[NEEDS, &["fuse", "root"]].concat()) {
        return;
    }
    let (registry, gone) = garbage(true);
    let words = ["--grace", "50ms", "--drain", "50ms", "--keep", "1h", "--sweep-every", "100ms"];
    let mount = Mount::with(&registry.config(), &words);
    let hex = common::check::hex(&layer_of(&gone)).to_string();
    let state = |word: &str| {
        let table = mount.read("reachability/unreachable/state");
        table.lines().any(|line| line.contains(&hex) && line.split('\t').nth(2) == Some(word))
    };
    wait_for("the quarantine", Duration::from_secs(60), || state("quarantined").then_some(()));
    let table = mount.read("reachability/unreachable/state");
    assert!(table.lines().any(|line| line.contains("waiting-for-registry")), "{table}");
    wait_for("the status of the sweep after", Duration::from_secs(20), || {
        let status = mount.read("control/status");
        let parts = ["\"gate\": \"probe\"", "\"quarantined\"", "\"next_sweep\": \"2"];
        parts.iter().all(|part| status.contains(part)).then_some(())
    });
    // A sweep at once is refused, and says what would make it one.
    let now = || mount.tell("gc", "sweep now").map_err(|e| e.raw_os_error());
    wait_for("a moment without a sweep", Duration::from_secs(20), || {
        (now() == Err(Some(libc::EINVAL))).then_some(())
    });
    mount.unmount();
}

/// A push at moments of a sweep in which it touches anything of the image: some of them, or each with
/// `REGFS_EVERY_MOMENT=1`, which takes ten minutes.
fn at_any_moment(cache: bool) {
    let mut registry = Registry::start_with(cache);
    registry.push("app", Some("stays"), &image("stays"));
    let stride = if std::env::var_os("REGFS_EVERY_MOMENT").is_some() { 1 } else { 11 };
    let mut moments = Vec::new();
    let mut next = 0;
    while let Moments::Pushed = pushed_at(&registry, &image(&format!("image {next}")), next) {
        moments.push(next);
        next += stride;
    }
    println!("cache {cache}: moments up to {next}");
    assert!(next > 100, "only {next} moments");
    registry.restart();
    for moment in moments {
        registry.pulls(&format!("app:image-{moment}")).unwrap_or_else(|why| panic!("moment {moment}: {why}"));
    }
}

#[test]
fn a_push_at_any_moment_of_a_sweep_lasts_without_a_cache() {
    if have(NEEDS) {
        at_any_moment(false);
    }
}

#[test]
fn a_push_at_any_moment_of_a_sweep_lasts_with_a_cache() {
    if have(NEEDS) {
        at_any_moment(true);
    }
}

/// What `rm` took of a repository is needed again by a push that a registry takes from memory: as long as that may be,
/// nothing purges it.
#[test]
fn what_rm_took_is_not_purged_while_a_registry_may_remember_it() {
    if !have(&[NEEDS, &["fuse", "root"]].concat()) {
        return;
    }
    let registry = Registry::start_with(true);
    registry.push("app", Some("stays"), &image("stays"));
    registry.push("gone", Some("1"), &image("gone"));
    let mount = Mount::with(&registry.store(), &TIMES);
    fs::remove_dir_all(mount.path("images/gone")).unwrap();
    mount.unmount();
    assert_eq!(transactions(&registry.store()).len(), 1);
    // It answers nowhere that is known: kept, however long.
    let unknown = [&TIMES[..], &["--registry", "http://127.0.0.1:1"]].concat();
    for _ in 0..3 {
        std::thread::sleep(A_STEP);
        assert_eq!(gc_beside(&registry.store(), &unknown).gate, "stop");
    }
    assert_eq!(transactions(&registry.store()).len(), 1);
    // Asked, and told twice to forget: it goes.
    let is_purged = (0..10).any(|_| {
        step(&registry.config());
        transactions(&registry.store()).iter().all(|id| !id.contains("rm"))
    });
    assert!(is_purged);
    for blob in image("gone").blobs.iter() {
        let path = format!("gone/blobs/{}", common::check::sha256(blob));
        assert_eq!(registry.api("HEAD", &path, &[], &[]).status, 404);
    }
    registry.pull("app:stays");
}
