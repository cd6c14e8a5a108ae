//! Registries whose cache is redis: it outlives them, and a 404 of theirs does not say that it has forgotten.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::beside::{A_STEP, TIMES, garbage_in, image, in_state, push, step_with};
use common::check::sha256;
use common::gc::gc_beside;
use common::have;
use common::image::Image;
use common::mount::Mount;
use common::redis::RedisServer;
use common::registry::{Cache, Registry};
use common::run::{Bounded, Outcome, regfs};

const NEEDS: &[&str] = &["docker-registry", "redis-server", "redis-cli", "setpriv", "skopeo"];

/// A registry that remembers in redis, with an image that is garbage; its layer and config were asked for in another
/// repository, too.
fn garbage(redis: &RedisServer) -> (Registry, Image) {
    let registry = Registry::start_with(redis);
    let gone = garbage_in(&registry);
    (registry, gone)
}

fn layer_of(image: &Image) -> String {
    sha256(image.blobs.last().unwrap())
}

fn data_of(registry: &Registry, digest: &str) -> PathBuf {
    let hex = digest.trim_start_matches("sha256:");
    registry.store().join("docker/registry/v2/blobs/sha256").join(&hex[..2]).join(hex).join("data")
}

/// Sweeps until nothing of an image is left in the store or in the trash.
#[track_caller]
fn sweep_to_the_end(store: &Path, registry: &Registry, gone: &Image, words: &[&str]) {
    for _ in 0..8 {
        step_with(store, words);
    }
    let left: Vec<String> =
        gone.digests().into_iter().filter(|digest| data_of(registry, digest).exists()).collect();
    assert!(left.is_empty(), "{left:?} is still there: {:?}", step_with(store, words));
}

/// Only what is on the disk counts.
#[track_caller]
fn assert_pulls_without_memory(registry: &mut Registry, redis: &RedisServer, reference: &str) {
    redis.ask(&["FLUSHALL"]);
    registry.restart();
    registry.pulls(reference).unwrap_or_else(|why| panic!("{reference}: {why}"));
}

fn stopped(store: &Path, words: &[&str]) -> Outcome {
    regfs(["gc", "--grace", "0", "--registry-stopped"]).arg(store).args(words).outcome()
}

fn is_gone(registry: &Registry, image: &Image) -> bool {
    !data_of(registry, &layer_of(image)).exists()
}

#[test]
fn what_a_sweep_took_is_forgotten_in_every_repository() {
    if !have(NEEDS) {
        return;
    }
    let redis = RedisServer::start();
    for order in ["pushed elsewhere", "mounted elsewhere", "asked for", "only redis knows"] {
        redis.ask(&["FLUSHALL"]);
        let (mut registry, gone) = garbage(&redis);
        // A second repository that had it, and of which nothing is left on the disk.
        registry.push("former", Some("1"), &gone);
        registry.api("DELETE", &format!("former/manifests/{}", gone.digest()), &[], &[]).is(202);
        if order == "only redis knows" {
            fs::remove_dir_all(registry.store().join("docker/registry/v2/repositories/former")).unwrap();
        }
        sweep_to_the_end(&registry.config(), &registry, &gone, &[]);
        assert_eq!(redis.ask(&["EXISTS", &format!("blobs::{}", layer_of(&gone))]), "0", "{order}");
        match order {
            "mounted elsewhere" => {
                registry.push("source", Some("1"), &gone);
                let mount = format!("other/blobs/uploads/?mount={}&from=source", layer_of(&gone));
                registry.api("POST", &mount, &[], &[]).is(201);
            }
            "asked for" => {
                push(&registry, "other", "1", &gone);
                registry.blob("other", &layer_of(&gone)).is(200);
            }
            _ => push(&registry, "other", "1", &gone),
        }
        for repository in ["app", "former"] {
            registry.blob(repository, &layer_of(&gone)).is(404);
            push(&registry, repository, "again", &gone);
        }
        step_with(&registry.config(), &[]);
        assert_pulls_without_memory(&mut registry, &redis, "app:again");
        registry.pulls("former:again").unwrap();
    }
}

/// 2.8 and 3.1 write no bytes of a manifest that they remember.
#[test]
fn manifests_go_and_are_written_again() {
    if !have(NEEDS) {
        return;
    }
    let redis = RedisServer::start();
    let (mut registry, gone) = garbage(&redis);
    sweep_to_the_end(&registry.config(), &registry, &gone, &[]);
    // The registry was killed between its memory and its link.
    let digest = gone.digest();
    push(&registry, "app", "again", &gone);
    step_with(&registry.config(), &[]);
    assert!(data_of(&registry, &digest).exists());
    assert_pulls_without_memory(&mut registry, &redis, "app:again");
}

/// A registry that is killed in the push of a manifest leaves it in its memory, and no link.
#[test]
fn what_is_remembered_while_it_lies_in_the_trash_is_forgotten_before_the_purge() {
    if !have(NEEDS) {
        return;
    }
    let redis = RedisServer::start();
    let (mut registry, gone) = garbage(&redis);
    let digest = gone.digest();
    for _ in 0..8 {
        std::thread::sleep(A_STEP);
        gc_beside(&registry.config(), &["--grace", "50ms", "--drain", "50ms", "--keep", "1h"]);
    }
    assert!(!data_of(&registry, &digest).exists());
    redis.ask(&["HSET", &format!("blobs::{digest}"), "digest", &digest, "size", "1", "mediatype", "x/y"]);
    let first = step_with(&registry.config(), &[]);
    assert_eq!((first.freed_bytes, in_state(&first, "quarantined")), (0, 3), "{first:?}");
    assert_eq!(redis.ask(&["EXISTS", &format!("blobs::{digest}")]), "0");
    assert!(step_with(&registry.config(), &[]).freed_bytes > 0);
    push(&registry, "app", "again", &gone);
    assert_pulls_without_memory(&mut registry, &redis, "app:again");
}

#[test]
fn a_manifest_that_rm_took_is_not_served_again() {
    if !have(&[NEEDS, &["fuse", "root"]].concat()) {
        return;
    }
    let redis = RedisServer::start();
    let mut registry = Registry::start_with(&redis);
    registry.push("app", Some("stays"), &image("stays"));
    let one = image("one");
    registry.push("app", Some("1"), &one);
    registry.manifest("app", &one.digest()).is(200);
    let mount = Mount::with(&registry.config(), &TIMES);
    mount.rm(&format!("images/app/_manifests/sha256/{}", one.hex()));
    let member = ["SISMEMBER", "repository::app::blobs", &one.digest()];
    common::wait_for("redis to forget it", Duration::from_secs(20), || {
        (redis.ask(&member) == "0").then_some(())
    });
    registry.manifest("app", &one.digest()).is(404);
    // The same bytes somewhere else bring nothing back.
    registry.push("other", Some("1"), &one);
    registry.manifest("app", &one.digest()).is(404);
    push(&registry, "app", "again", &one);
    mount.unmount();
    assert_pulls_without_memory(&mut registry, &redis, "app:again");
}

#[test]
fn a_stopped_sweep_tells_redis_whoever_is_named() {
    if !have(NEEDS) {
        return;
    }
    let redis = RedisServer::start();
    for by in ["config", "directory", "directory, seen as a process", "--redis", "trash purge"] {
        // It knows of manifests that another storage has, and then none is written.
        redis.ask(&["FLUSHALL"]);
        let (mut registry, gone) = garbage(&redis);
        let url = redis.url();
        match by {
            "directory" => drop(gc_beside(&registry.config(), &[])),
            "directory, seen as a process" => drop(gc_beside(&registry.store(), &[])),
            _ => {}
        }
        registry.stop();
        let outcome = match by {
            "config" | "trash purge" => stopped(&registry.config(), &[]),
            "--redis" => stopped(&registry.store(), &["--redis", &url]),
            _ => stopped(&registry.store(), &[]),
        };
        outcome.exits(0);
        assert!(is_gone(&registry, &gone), "{by}");
        let purge = ["purge", "--all", "--registry-stopped"];
        regfs(["trash"]).arg(registry.config()).args(purge).outcome().exits(0);
        registry.restart();
        push(&registry, "other", "1", &gone);
        push(&registry, "app", "again", &gone);
        assert_pulls_without_memory(&mut registry, &redis, "app:again");
    }
}

#[test]
fn a_redis_that_can_t_be_asked_holds_everything_back() {
    if !have(NEEDS) {
        return;
    }
    let mut redis = RedisServer::start_with(Some("secret"));
    let other = RedisServer::start_with(Some("secret"));
    let (mut registry, gone) = garbage(&redis);
    let (config, store) = (registry.config(), registry.store());
    let held = |words: &[&str], says: &str| {
        let report = step_with(&config, words);
        assert!(report.gate == "stop" && report.gate_reason.contains(says), "{says}: {}", report.gate_reason);
        assert!(!report.gate_reason.contains("secret"), "{}", report.gate_reason);
    };
    // The wrong one, the wrong database, an address where nobody is, and one that is no address.
    held(&["--redis", &other.url()], "does not remember in the redis at");
    held(&["--redis", &format!("{}/3", redis.url())], "does not remember in the redis at");
    held(&["--redis", "redis://127.0.0.1:1"], "127.0.0.1:1");
    regfs(["gc", "--redis", "redis://:secret@127.0.0.1:1"])
        .arg(&store)
        .outcome()
        .exits(2)
        .says("REGFS_REDIS_PASSWORD");
    registry.stop();
    // Named by --redis without its password, or not at all, after config.yml was seen.
    let refused = stopped(&store, &["--redis", &redis.url()]).exits(1);
    refused.says("REGFS_REDIS_PASSWORD");
    stopped(&store, &[]).exits(1).says("REGFS_REDIS_PASSWORD");
    stopped(&store, &["--force"]).exits(1);
    let with_password = |words: &[&str]| {
        let mut gc = regfs(["gc", "--dry-run", "--registry-stopped"]);
        gc.arg(&store).args(words).env("REGFS_REDIS_PASSWORD", "secret").outcome()
    };
    with_password(&["--redis", &redis.url()]).exits(0);
    // The wrong one.
    stopped(&config, &["--redis", &other.url()]).exits(1).says("--cache-emptied");
    // It was stopped, too.
    redis.stop();
    stopped(&config, &[]).exits(1).says("--cache-emptied");
    assert!(!is_gone(&registry, &gone));
    stopped(&config, &["--cache-emptied"]).exits(0);
    assert!(is_gone(&registry, &gone));
    redis.restart();
    registry.restart();
    push(&registry, "app", "again", &gone);
    assert_pulls_without_memory(&mut registry, &redis, "app:again");
}

#[test]
fn a_redis_that_was_emptied_is_shown_to_be_the_right_one_by_the_registry() {
    if !have(NEEDS) {
        return;
    }
    let mut redis = RedisServer::start();
    let (mut registry, gone) = garbage(&redis);
    redis.restart();
    sweep_to_the_end(&registry.config(), &registry, &gone, &[]);
    // Where no registry runs that could show it, it is to be said.
    let next = image("next");
    registry.push("app", Some("next"), &next);
    registry.api("DELETE", &format!("app/manifests/{}", next.digest()), &[], &[]).is(202);
    registry.stop();
    redis.ask(&["FLUSHALL"]);
    stopped(&registry.config(), &[]).exits(1).says("--cache-emptied");
    assert!(!is_gone(&registry, &next));
    stopped(&registry.config(), &["--cache-emptied"]).exits(0);
    assert!(is_gone(&registry, &next));
    registry.restart();
    push(&registry, "app", "again", &next);
    assert_pulls_without_memory(&mut registry, &redis, "app:again");
}

#[test]
fn a_registry_whose_address_of_redis_is_not_ours_is_asked_with_the_one_that_is_named() {
    if !have(NEEDS) {
        return;
    }
    let redis = RedisServer::start();
    let (mut registry, gone) = garbage(&redis);
    // As a container has it, whose name for it means nothing here.
    let text = fs::read_to_string(registry.config()).unwrap();
    let config = registry.fresh("config.yml");
    fs::write(&config, text.replace(&redis.address(), "redis.invalid:6379")).unwrap();
    let report = step_with(&config, &[]);
    assert!(report.gate == "stop" && report.gate_reason.contains("--redis"), "{}", report.gate_reason);
    let url = format!("http://127.0.0.1:{}", registry.port());
    sweep_to_the_end(&config, &registry, &gone, &["--redis", &redis.url(), "--registry", &url]);
    push(&registry, "other", "1", &gone);
    push(&registry, "app", "again", &gone);
    step_with(&config, &["--redis", &redis.url(), "--registry", &url]);
    assert_pulls_without_memory(&mut registry, &redis, "app:again");
}

/// Each forgets in its own way; a manifest that the one remembers by itself stays.
#[test]
fn two_registries_of_different_kinds_are_asked_each_in_its_way() {
    if !have(NEEDS) {
        return;
    }
    let redis = RedisServer::start();
    let (mut registry, gone) = garbage(&redis);
    let mut other = Registry::start_at(registry.store(), Cache::Inmemory);
    for blob in &gone.blobs {
        other.blob("app", &sha256(blob)).is(200);
    }
    for _ in 0..8 {
        let report = step_with(&registry.store(), &[]);
        assert_eq!(report.gate, "probe", "{}", report.gate_reason);
    }
    assert!(is_gone(&registry, &gone));
    assert!(data_of(&registry, &gone.digest()).exists(), "its manifest stays");
    for one in [&registry, &other] {
        one.blob("app", &layer_of(&gone)).is(404);
    }
    push(&other, "other", "1", &gone);
    push(&registry, "app", "again", &gone);
    step_with(&registry.store(), &[]);
    other.restart();
    assert_pulls_without_memory(&mut registry, &redis, "app:again");
    other.pulls("app:again").unwrap();
}

#[test]
fn what_was_seen_of_registries_counts_until_it_is_forgotten() {
    if !have(NEEDS) {
        return;
    }
    let mut redis = RedisServer::start();
    let (mut registry, gone) = garbage(&redis);
    let (config, store) = (registry.config(), registry.store());
    let seen = store.join("docker/registry/v2/.regfs/registries.json");
    regfs(["gc", "--dry-run"]).arg(&config).outcome().exits(0);
    assert!(!seen.exists(), "a dry run writes nothing");
    gc_beside(&config, &[]);
    let text = fs::read_to_string(&seen).unwrap();
    assert!(text.contains("\"redis\"") && text.contains(&redis.address()), "{text}");
    registry.stop();
    redis.stop();
    stopped(&store, &[]).exits(1).says("--cache-emptied");
    // The same config.yml says something else by now.
    let with_redis = fs::read_to_string(&config).unwrap();
    fs::write(&config, with_redis.replace("blobdescriptor: redis", "blobdescriptor: inmemory")).unwrap();
    regfs(["gc", "--registry-stopped"]).arg(&config).outcome().exits(0);
    fs::write(&config, with_redis).unwrap();
    stopped(&config, &[]).exits(1);
    // What can't be read says nothing.
    fs::write(&seen, "{").unwrap();
    stopped(&store, &[]).exits(1).says("--forget-registries");
    assert_eq!(step_with(&store, &["--registry", "http://127.0.0.1:1"]).gate, "stop");
    regfs(["gc"]).arg(&store).arg("--forget-registries").outcome().exits(0);
    assert!(!seen.exists());
    assert!(!is_gone(&registry, &gone));
    let forgotten = regfs(["gc"]).arg(&store).arg("--forget-registries").outcome().exits(0);
    assert!(forgotten.stderr.contains("nothing was known"), "{forgotten}");
    redis.restart();
    stopped(&store, &["--redis", &redis.url(), "--cache-emptied"]).exits(0);
    assert!(is_gone(&registry, &gone));
}

/// Another port that leads to the same server, as long as this process lives.
fn another_way_to(port: u16) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for from in listener.incoming().map_while(Result::ok) {
            let Ok(to) = TcpStream::connect(("127.0.0.1", port)) else { continue };
            for (from, to) in [(&from, &to), (&to, &from)] {
                let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                std::thread::spawn(move || {
                    // Whoever ends first ends both.
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(std::net::Shutdown::Both);
                });
            }
        }
    });
    url
}

/// One that was asked once may run where nobody sees it.
#[test]
fn a_registry_that_was_asked_once_is_asked_again_or_forgotten() {
    if !have(NEEDS) {
        return;
    }
    let mut registry = Registry::start_with(true);
    garbage_in(&registry);
    // As one that answers in another place, and is a process of another machine.
    let (store, url) = (registry.store(), another_way_to(registry.port()));
    assert_eq!(step_with(&store, &["--registry", &url]).gate, "probe");
    let text = fs::read_to_string(registry.config()).unwrap();
    registry.stop();
    let config = registry.fresh("other.yml");
    let other =
        text.replace("  cache: {blobdescriptor: inmemory}\n", "").replace(&registry.port().to_string(), "1");
    fs::write(&config, other).unwrap();
    let report = step_with(&config, &[]);
    assert!(report.gate == "stop" && report.gate_reason.contains(&url), "{}", report.gate_reason);
    // Stopped, it remembers nothing.
    stopped(&store, &["--dry-run"]).exits(0);
    let forgotten = regfs(["gc"]).arg(&store).arg("--forget-registries").outcome().exits(0);
    assert!(forgotten.stderr.contains(&url), "{forgotten}");
    assert_eq!(step_with(&config, &[]).gate, "off");
}
