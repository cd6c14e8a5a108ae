//! A real registry and its real clients beside regfs: what one writes the other shows, and what regfs deletes is gone.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::check::{Live, Roots, blobs, hex, sha256};
use common::gc::{gc, transactions};
use common::image::{Image, layer};
use common::mount::{Mount, is_mounted};
use common::registry::Registry;
use common::run::{Bounded, regfs, sh};
use common::{chown_all, difference, errno, have, is_root, walk};

/// What every test here needs.
const NEEDS: &[&str] = &["docker-registry", "skopeo", "setpriv", "fuse"];

/// Long enough for any machine; the promise is "by the next look".
const SOON: Duration = Duration::from_secs(20);

fn alpine() -> Image {
    Image::oci("alpine", &[layer("etc/alpine-release", "3.8.0\n")])
}

fn busybox() -> Image {
    Image::docker("busybox", &[layer("bin/busybox", "#!\n"), layer("etc/passwd", "root:x:0:0::/:/bin/sh\n")])
}

/// Two images that share their first layer.
fn pair() -> (Image, Image) {
    let base = layer("etc/os-release", "ID=base\n");
    let one = Image::oci("one", &[base.clone(), layer("one", "1\n")]);
    let two = Image::oci("two", &[base, layer("two", "2\n")]);
    (one, two)
}

/// An index of two architectures that share a layer.
fn multi_arch() -> Image {
    let base = layer("etc/os-release", "ID=multi\n");
    let amd64 = Image::oci_for("amd64", "multi", &[base.clone(), layer("bin/tool", "amd64\n")]);
    let arm64 = Image::oci_for("arm64", "multi", &[base, layer("bin/tool", "arm64\n")]);
    Image::index(&[("amd64", &amd64), ("arm64", &arm64)])
}

fn minus(a: &BTreeSet<String>, b: &BTreeSet<String>) -> BTreeSet<String> {
    a.difference(b).cloned().collect()
}

/// A sweep without grace removes directories in which nothing is left, and an undo makes only those it needs.
fn without_empty_directories(mut snapshot: BTreeMap<PathBuf, String>) -> BTreeMap<PathBuf, String> {
    let is_file = |(_, text): &(&PathBuf, &String)| !text.starts_with("mode 4");
    let files: Vec<PathBuf> = snapshot.iter().filter(is_file).map(|(path, _)| path.clone()).collect();
    let used: BTreeSet<&Path> = files.iter().flat_map(|path| path.ancestors()).collect();
    snapshot.retain(|path, _| used.contains(path.as_path()));
    snapshot
}

#[test]
fn the_seed_story() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let (alpine, busybox) = (alpine(), busybox());
    registry.skopeo_push("alpine:3.8", &alpine);
    registry.skopeo_push("library/busybox:1.36", &busybox);
    let pulled = registry.pull("library/busybox:1.36");
    let mount = Mount::of(&registry.store());
    let shell = |line: &str| sh(mount.point(), line).outcome().exits(0).stdout;

    // The mount shows it.
    let tree = shell("ls -R images");
    for name in ["alpine", "library", "busybox", "3.8", "1.36", "_tags", "_manifests", &alpine.hex()] {
        assert!(tree.contains(name), "{name} is not in ls -R: {tree}");
    }
    let target = shell("readlink images/alpine/_tags/3.8");
    assert!(target.trim_end().ends_with(&format!("manifests/sha256/{}", alpine.hex())), "{target}");
    assert_eq!(shell("cat images/alpine/_tags/3.8/manifest.json").as_bytes(), alpine.manifest);
    assert_eq!(shell("cat images/alpine/_tags/3.8/config.json").as_bytes(), alpine.blobs[0]);
    let sum = shell(&format!("sha256sum images/alpine/_manifests/sha256/{}", alpine.hex()));
    assert_eq!(sum.split(' ').next(), Some(&*alpine.hex()));

    // Nothing to free; rm; then exactly its three blobs.
    shell("echo dry-run > control/gc");
    assert_eq!(mount.reported_blobs(), BTreeSet::new(), "{}", mount.read("control/gc"));
    shell("rm images/alpine/_tags/3.8");
    registry.manifest("alpine", "3.8").is(404);
    registry.manifest("alpine", &alpine.digest()).is(404);
    shell("echo dry-run grace=0 registry-stopped force > control/gc");
    assert_eq!(alpine.digests().len(), 3);
    assert_eq!(mount.reported_blobs(), alpine.digests(), "{}", mount.read("control/gc"));
    assert_eq!(registry.stock_garbage(), alpine.digests());

    // The sweep frees them, and the registry's own collector finds nothing more.
    // The registry goes on and nobody pushes.
    shell("echo 'sweep now grace=0 registry-stopped force' > control/gc");
    assert_eq!(blobs(&registry.store()), busybox.digests());
    assert_eq!(registry.stock_garbage(), BTreeSet::new());
    assert_eq!(registry.pull("library/busybox:1.36"), pulled);
    mount.unmount();
    assert_eq!(registry.pull("library/busybox:1.36"), pulled);
}

#[test]
fn the_distribution_format_has_the_lines_of_the_stock_collector() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    registry.push("library/busybox", Some("1.36"), &busybox());
    registry.push("library/busybox", Some("latest"), &busybox());
    registry.push("multi", Some("1"), &multi_arch());
    let (one, two) = pair();
    registry.push("app", Some("1"), &one);
    registry.push("app", Some("2"), &two);
    registry.push_blob("app", b"garbage with a link");
    let compare = |theirs: &[&str], ours: &[&str]| {
        let stock = registry.stock_report(theirs);
        let mut command = regfs(["gc"]);
        // As that collector says it of a registry that was stopped: beside one that runs, nothing goes at once.
        let stopped = ["--registry-stopped", "--force"];
        command.arg(registry.config()).args(["--dry-run", "--grace", "0", "--format", "distribution"]);
        command.args(stopped);
        let outcome = command.args(ours).outcome().exits(0);
        // 2.x knows nothing of layer links; the order of repositories and of blobs is nobody's promise.
        let is_known = |line: &&str| !line.contains(": layer link eligible for deletion: ");
        let sorted = |text: &str| {
            let mut lines: Vec<String> = text.lines().filter(is_known).map(String::from).collect();
            lines.sort();
            lines
        };
        assert_eq!(sorted(&outcome.stdout), sorted(&stock), "{stock}\n{outcome}");
        assert_eq!(outcome.stderr, "", "{outcome}");
        outcome.stdout
    };
    let stdout = compare(&[], &[]);
    let link = format!("app: layer link eligible for deletion: {}", sha256(b"garbage with a link"));
    assert!(stdout.lines().any(|line| line == link), "{stdout}");
    // Untagged manifests, where stock judges as we do: not below an index.
    registry.api("DELETE", &format!("multi/manifests/{}", multi_arch().digest()), &[], &[]).is(202);
    registry.push("app", Some("1"), &two);
    compare(&["-m"], &["--untagged"]);
}

#[test]
fn a_manifest_lives_as_long_as_one_of_its_tags() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let image = alpine();
    registry.push("alpine", Some("3.8"), &image);
    registry.push("alpine", Some("latest"), &image);
    let mount = Mount::of(&registry.store());

    mount.rm("images/alpine/_tags/latest");
    registry.manifest("alpine", "latest").is(404);
    assert_eq!(mount.list("images/alpine/_tags"), ["3.8"]);
    registry.pull("alpine:3.8");
    assert_eq!(gc(&registry.store(), &["--dry-run", "--grace", "0"]).unreferenced(), BTreeSet::new());

    mount.rm("images/alpine/_tags/3.8");
    registry.manifest("alpine", "3.8").is(404);
    registry.manifest("alpine", &image.digest()).is(404);
    assert_eq!(gc(&registry.store(), &["--dry-run", "--grace", "0"]).taken_blobs(), image.digests());
}

#[test]
fn an_index_takes_its_children_along_unless_a_tag_holds_them() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let index = multi_arch();
    let [amd64, arm64] = &index.children[..] else { panic!("two children") };
    registry.skopeo_push("multi:1", &index);
    registry.push("multi", Some("arm"), arm64);
    let mount = Mount::of(&registry.store());
    let platforms = mount.list("images/multi/_tags/1/platforms");
    assert_eq!(platforms, ["linux-amd64", "linux-arm64"]);

    mount.rm("images/multi/_tags/1");
    registry.manifest("multi", &index.digest()).is(404);
    registry.manifest("multi", &amd64.digest()).is(404);
    registry.pull("multi:arm");
    let garbage = gc(&registry.store(), &["--dry-run", "--grace", "0"]).taken_blobs();
    assert_eq!(garbage, minus(&index.digests(), &arm64.digests()));

    mount.rm("images/multi/_tags/arm");
    registry.manifest("multi", &arm64.digest()).is(404);
    mount.order("gc", "sweep now grace=0");
    assert_eq!(blobs(&registry.store()), BTreeSet::new());
    assert_eq!(registry.stock_garbage(), BTreeSet::new());
}

#[test]
fn an_index_takes_its_children_along_unless_another_index_holds_them() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let both = multi_arch();
    let amd64 = &both.children[0];
    let only_amd64 = Image::index(&[("amd64", amd64)]);
    registry.push("multi", Some("both"), &both);
    registry.push("multi", Some("amd64"), &only_amd64);
    let mount = Mount::of(&registry.store());

    // What an index holds is not to be removed alone.
    let held = format!("images/multi/_manifests/sha256/{}", amd64.hex());
    assert_eq!(errno(fs::remove_file(mount.path(&held))), libc::EBUSY);

    mount.rm("images/multi/_tags/both");
    registry.pull("multi:amd64");
    let garbage = gc(&registry.store(), &["--dry-run", "--grace", "0"]).taken_blobs();
    assert_eq!(garbage, minus(&both.digests(), &only_amd64.digests()));

    mount.rm("images/multi/_tags/amd64");
    mount.order("gc", "sweep now grace=0");
    assert_eq!(blobs(&registry.store()), BTreeSet::new());
}

#[test]
fn a_referrer_goes_with_its_subject() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let image = alpine();
    let signature = image.referrer("application/vnd.example.signature", "signed");
    registry.push("alpine", Some("3.8"), &image);
    registry.push("alpine", Some("latest"), &image);
    registry.push("alpine", None, &signature);
    let mount = Mount::of(&registry.store());
    assert_eq!(mount.list("images/alpine/_tags/3.8/referrers").len(), 1);

    // Untagged, but its subject is tagged: it stays, also in a sweep of the untagged.
    mount.rm("images/alpine/_tags/latest");
    mount.order("gc", "sweep untagged now grace=0");
    registry.manifest("alpine", &signature.digest()).is(200);
    let all: BTreeSet<String> = image.digests().union(&signature.digests()).cloned().collect();
    assert_eq!(blobs(&registry.store()), all);

    mount.rm("images/alpine/_tags/3.8");
    registry.manifest("alpine", &signature.digest()).is(404);
    assert_eq!(gc(&registry.store(), &["--dry-run", "--grace", "0"]).taken_blobs(), all);
}

#[test]
fn images_are_read_from_the_mount_without_a_registry() {
    if !have(NEEDS) || !have(&["umoci"]) {
        return;
    }
    let mut registry = Registry::start();
    let (index, oci, docker) = (multi_arch(), alpine(), busybox());
    registry.skopeo_push("team/multi:1", &index);
    registry.skopeo_push("alpine:3.8", &oci);
    registry.skopeo_push("busybox:1.36", &docker);
    let references = [("team/multi", "1"), ("alpine", "3.8"), ("busybox", "1.36")];
    let pulled = references.map(|(name, tag)| registry.pull(&format!("{name}:{tag}")));
    registry.stop();

    let mount = Mount::of(&registry.store());
    for ((name, tag), pulled) in references.into_iter().zip(pulled) {
        let layout = mount.path(format!("images/{name}/_tags/{tag}"));
        assert!(registry.copy_layout(&layout) == pulled, "{name}:{tag} differs from what was pulled");
    }
    // The name of an image in its layout is in the layout's index, as everywhere.
    let layout = mount.path("images/alpine/_tags/3.8");
    let listed: serde_json::Value =
        serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    let tag = listed["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"]
        .as_str()
        .unwrap_or("latest");
    let bundle = registry.fresh("bundle");
    let mut umoci = common::run::clean("umoci");
    umoci.args(["unpack", "--rootless", "--image"]).arg(format!("{}:{tag}", layout.display())).arg(&bundle);
    umoci.outcome().exits(0);
    assert_eq!(fs::read_to_string(bundle.join("rootfs/etc/alpine-release")).unwrap(), "3.8.0\n");

    // A backup is a copy.
    let backup = registry.fresh("backup");
    sh(mount.point(), &format!("cp -rL images/alpine/_tags/3.8 {}", backup.display())).outcome().exits(0);
    assert_eq!(registry.copy_layout(&backup), registry.copy_layout(&layout));
}

#[test]
fn undo_brings_everything_back_as_it_was() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let image = alpine();
    registry.skopeo_push("team/alpine:3.8", &image);
    registry.push("team/alpine", Some("latest"), &image);
    registry.push("team/alpine", None, &image.referrer("application/vnd.example.signature", "signed"));
    if is_root() {
        // Owners and modes that nothing of ours would make by itself.
        chown_all(&registry.store(), 1234, 4321);
        for path in walk(&registry.store()).iter().filter(|path| path.is_file()) {
            fs::set_permissions(path, fs::Permissions::from_mode(0o640)).unwrap();
        }
    }
    let pulled = registry.pull("team/alpine:3.8");
    let before = without_empty_directories(registry.snapshot());
    let mount = Mount::of(&registry.store());
    let remove = || {
        mount.rm("images/team/alpine/_tags/latest");
        mount.rm("images/team/alpine/_tags/3.8");
        registry.manifest("team/alpine", &image.digest()).is(404);
    };
    let restored = |how: &str| {
        let after = without_empty_directories(registry.snapshot());
        assert!(after == before, "{how}:\n  {}", difference(&before, &after).join("\n  "));
        assert_eq!(registry.pull("team/alpine:3.8"), pulled, "{how}");
        registry.manifest("team/alpine", "latest").is(200);
        assert_eq!(mount.list("images/team/alpine/_tags"), ["3.8", "latest"], "{how}");
    };

    remove();
    let taken = transactions(&registry.store());
    assert_eq!(mount.list("trash").len(), taken.len());
    for id in &taken {
        mount.order("trash", &format!("undo {id}"));
    }
    restored("undo after rm");

    remove();
    mount.order("gc", "sweep grace=0");
    assert_eq!(blobs(&registry.store()), BTreeSet::new(), "a sweep takes them out of the registry's sight");
    for id in transactions(&registry.store()) {
        mount.order("trash", &format!("undo {id}"));
    }
    restored("undo of the sweep, then of rm");

    remove();
    let removals = transactions(&registry.store());
    mount.order("gc", "sweep grace=0");
    for id in &removals {
        mount.order("trash", &format!("undo {id}"));
    }
    restored("undo of rm alone, after a sweep");
}

#[test]
fn undo_works_from_the_command_line_too() {
    if !have(NEEDS) {
        return;
    }
    let mut registry = Registry::start();
    registry.push("alpine", Some("3.8"), &alpine());
    let pulled = registry.pull("alpine:3.8");
    registry.manifest("alpine", "3.8").is(200);
    registry.api("DELETE", &format!("alpine/manifests/{}", alpine().digest()), &[], &[]).is(202);
    registry.stop();
    let before = without_empty_directories(registry.snapshot());

    let report = gc(&registry.store(), &["--grace", "0"]);
    assert_eq!(report.mode, "sweep");
    assert_eq!(report.taken_blobs(), alpine().digests());
    assert!(report.freed_bytes == 0 && report.quarantined_bytes > 0, "{report:?}");
    assert_eq!(blobs(&registry.store()), BTreeSet::new());
    let id = common::gc::text(report.transaction.as_ref().expect("a sweep is a transaction"));
    assert_eq!(transactions(&registry.store()), std::slice::from_ref(&id));

    regfs(["trash"]).arg(registry.store()).args(["undo", &id]).outcome().exits(0);
    let after = without_empty_directories(registry.snapshot());
    assert!(after == before, "{}", difference(&before, &after).join("\n"));
    registry.restart();
    registry.push("alpine", Some("3.8"), &alpine());
    assert_eq!(registry.pull("alpine:3.8"), pulled);
}

#[test]
fn a_push_after_a_sweep_is_whole() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    registry.push("alpine", Some("3.8"), &alpine());
    let pulled = registry.pull("alpine:3.8");
    let mount = Mount::of(&registry.store());
    mount.rm("images/alpine/_tags/3.8");
    mount.order("gc", "sweep grace=0");
    registry.push("alpine", Some("3.8"), &alpine());
    assert_eq!(registry.pull("alpine:3.8"), pulled);
    Live::of(&registry.store(), Roots::Revisions).assert_complete();
}

#[test]
fn undo_does_not_replace_a_newer_tag() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let (one, two) = pair();
    registry.push("app", Some("latest"), &one);
    let mount = Mount::of(&registry.store());
    mount.rm("images/app/_tags/latest");
    registry.push("app", Some("latest"), &two);
    let [id] = &transactions(&registry.store())[..] else { panic!("one transaction") };
    let code = errno(mount.control("trash", &format!("undo {id}")));
    assert!([libc::EEXIST, libc::EIO, libc::EBUSY].contains(&code), "{code}");
    assert!(mount.read("control/trash").contains("latest"), "it says what stands there");
    assert_eq!(registry.manifest("app", "latest").is(200).body, two.manifest);
    assert_eq!(transactions(&registry.store()), std::slice::from_ref(id), "and can be undone later");
}

#[test]
fn du_counts_each_blob_once() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let (one, two) = pair();
    registry.push("team/app", Some("one"), &one);
    registry.push("team/app", Some("two"), &two);
    registry.push("team/app", Some("multi"), &multi_arch());
    let sbom = one.referrer("application/vnd.example.sbom", "sbom");
    registry.push("team/app", None, &sbom);
    registry.push("other", Some("two"), &two);
    registry.push("other", Some("busybox"), &busybox());
    let other = Live::of_repository(&registry.store(), "other").blobs;
    // No way leads from an image to what refers to it, or there would be one back.
    let mut app = Live::of_repository(&registry.store(), "team/app").blobs;
    sbom.blobs.iter().for_each(|blob| assert!(app.remove(&sha256(blob))));
    let everything = Live::of(&registry.store(), Roots::Tags).blobs;
    // Nothing may still be waiting for its blocks.
    rustix::fs::sync();
    let mount = Mount::of(&registry.store());
    let du = |what: &str| -> u64 {
        let out = sh(mount.point(), &format!("du {what}")).outcome().exits(0).stdout;
        out.split('\t').next().unwrap().parse().unwrap()
    };
    let allocated = |digests: &BTreeSet<String>| -> u64 {
        let store = registry.store();
        let data =
            |digest: &String| common::check::registry_dir(&store).join(common::check::blob_path(digest));
        digests.iter().map(|digest| fs::metadata(data(digest)).unwrap().blocks() * 512).sum()
    };
    assert_eq!(du("-sL -B1 images/team/app"), allocated(&app));
    assert_eq!(du("-sL -B1 images/other"), allocated(&other));
    assert_eq!(du("-s -B1 manifests"), allocated(&everything));
    assert_eq!(du("-s -B1 blobs"), allocated(&everything));
}

#[test]
fn blobs_with_one_link_are_the_unreferenced_ones() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let (one, two) = pair();
    registry.push("app", Some("one"), &one);
    registry.push("app", Some("two"), &two);
    registry.push("other", Some("busybox"), &busybox());
    registry.push_blob("app", b"a layer whose manifest never came");
    let mount = Mount::of(&registry.store());
    let unreferenced = || gc(&registry.store(), &["--dry-run"]).unreferenced();

    let forgotten = BTreeSet::from([sha256(b"a layer whose manifest never came")]);
    assert_eq!(unreferenced(), forgotten);
    assert_eq!(mount.single_links(), forgotten);

    mount.rm("images/app/_tags/one");
    let expected = minus(&one.digests(), &two.digests()).union(&forgotten).cloned().collect::<BTreeSet<_>>();
    assert_eq!(unreferenced(), expected);
    assert_eq!(mount.single_links(), expected);
    let young = gc(&registry.store(), &["--dry-run"]);
    assert!(young.taken_blobs().is_empty(), "they are younger than the grace period: {young:?}");
    let listed = mount.list("reachability/unreachable/sha256");
    assert_eq!(listed, expected.iter().map(|digest| hex(digest).to_string()).collect::<Vec<_>>());
    // The shared layer has one name per manifest that holds it, and its own.
    let shared = sha256(&two.blobs[1]);
    let path = format!("blobs/sha256/{}/{}", &hex(&shared)[..2], hex(&shared));
    assert_eq!(fs::metadata(mount.path(path)).unwrap().nlink(), 2);
}

#[test]
fn our_garbage_is_the_garbage_of_the_registrys_own_collector() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let (one, two) = pair();
    registry.push("team/app", Some("one"), &one);
    registry.push("team/app", Some("two"), &two);
    registry.push("mirror", Some("one"), &one);
    registry.push("multi", Some("1"), &multi_arch());
    registry.push("busybox", Some("1"), &busybox());
    registry.push("busybox", Some("2"), &alpine());
    registry.push_blob("team/app", b"left over");
    for (name, image) in
        [("team/app", &one), ("team/app", &two), ("busybox", &busybox()), ("multi", &multi_arch())]
    {
        registry.api("DELETE", &format!("{name}/manifests/{}", image.digest()), &[], &[]).is(202);
        let ours = gc(&registry.store(), &["--dry-run", "--grace", "0"]);
        assert_eq!(ours.taken_blobs(), registry.stock_garbage(), "after the deletion in {name}");
    }
    let live = Live::of(&registry.store(), Roots::Revisions);
    live.assert_complete();
    gc(&registry.store(), &["--grace", "0", "--now"]);
    live.assert_intact();
    assert_eq!(registry.stock_garbage(), BTreeSet::new());
    assert_eq!(blobs(&registry.store()), live.blobs);
}

#[test]
fn pushes_and_deletions_beside_the_mount_appear() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let (one, two) = pair();
    registry.push("app", Some("one"), &one);
    let mount = Mount::of(&registry.store());
    assert_eq!(mount.list("images"), ["app"]);
    let target = |tag: &str| fs::read_link(mount.path(format!("images/app/_tags/{tag}"))).ok();
    let points_at = |tag: &str, image: &Image| target(tag).is_some_and(|to| to.ends_with(image.hex()));

    registry.push("app", Some("two"), &two);
    common::wait_for("a new tag", SOON, || points_at("two", &two).then_some(()));
    assert_eq!(fs::read(mount.path("images/app/_tags/two/manifest.json")).unwrap(), two.manifest);

    registry.push("app", Some("one"), &two);
    common::wait_for("a tag that moved", SOON, || points_at("one", &two).then_some(()));

    registry.push("fresh/name", Some("1"), &alpine());
    common::wait_for("a new repository", SOON, || {
        mount.path("images/fresh/name/_tags/1").exists().then_some(())
    });

    registry.api("DELETE", &format!("app/manifests/{}", two.digest()), &[], &[]).is(202);
    let gone = || common::names(&mount.path("images/app/_tags")).is_empty().then_some(());
    common::wait_for("tags deleted by the registry to go", SOON, gone);
    // `refresh` looks at once.
    registry.push("app", Some("three"), &two);
    mount.order("refresh", "now");
    assert!(mount.list("images/app/_tags").contains(&"three".to_string()));
}

#[test]
fn a_killed_daemon_leaves_a_mountpoint_that_mounts_again() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    registry.push("alpine", Some("3.8"), &alpine());
    let mount = Mount::of(&registry.store());
    mount.crash();
    assert_eq!(errno(fs::read_dir(mount.point())), libc::ENOTCONN);
    mount.start(&registry.store(), &[]).exits(0);
    assert_eq!(mount.list("images/alpine/_tags"), ["3.8"]);
    // Whatever lock the killed one held is gone with it.
    mount.rm("images/alpine/_tags/3.8");
    registry.manifest("alpine", "3.8").is(404);
}

#[test]
fn a_second_mount_of_a_mountpoint_is_refused() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    registry.push("alpine", Some("3.8"), &alpine());
    let mount = Mount::of(&registry.store());
    mount.start(&registry.store(), &[]).exits(1);
    assert_eq!(mount.list("images/alpine/_tags"), ["3.8"], "the first one still works");
}

#[test]
fn two_at_once_wait_or_say_who_holds_the_store() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    registry.push("alpine", Some("3.8"), &alpine());
    registry.push("busybox", Some("1"), &busybox());
    let mount = Mount::of(&registry.store());
    mount.rm("images/alpine/_tags/3.8");
    let holder = mount.pid().as_raw_nonzero().to_string();
    let words = ["--grace", "0", "--registry-stopped", "--force"];
    let second = regfs(["gc"]).arg(registry.store()).args(words).outcome().exits_one_of(&[0, 1]);
    if second.code == Some(1) {
        second.says(&holder);
        mount.unmount();
        gc(&registry.store(), &["--grace", "0"]);
    } else {
        mount.unmount();
    }
    assert_eq!(blobs(&registry.store()), busybox().digests());
}

#[test]
fn the_second_is_told_who_holds_the_lock() {
    // Whoever changes the store locks this file; here it is a stranger.
    let store = common::store::Store::new();
    store.push("app", Some("1"), &alpine());
    let garbage = store.put_blob(b"garbage");
    let lock = store.path(".regfs/lock");
    common::store::put(&lock, b"4242\n");
    let file = fs::OpenOptions::new().read(true).write(true).open(&lock).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let refused = common::gc::gc_outcome(store.root(), &["--grace", "0", "--now"]).exits_one_of(&[1]);
    assert!(!refused.stderr.is_empty(), "{refused}");
    assert!(store.blob(&garbage).exists());
    // Looking needs no lock.
    assert_eq!(
        gc(store.root(), &["--dry-run", "--grace", "0"]).taken_blobs(),
        BTreeSet::from([garbage.clone()])
    );
    drop(file);
    gc(store.root(), &["--grace", "0", "--now"]);
    assert!(!store.blob(&garbage).exists());
}

#[test]
fn rm_r_removes_a_repository_and_nothing_else() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let (one, two) = pair();
    registry.push("team/app", Some("1"), &one);
    registry.push("team/app", Some("2"), &multi_arch());
    registry.push("team/tool", Some("1"), &two);
    let mount = Mount::of(&registry.store());
    sh(mount.point(), "rm -r images/team/app").outcome().exits(0);
    assert_eq!(mount.list("images/team"), ["tool"]);
    assert_eq!(registry.api("GET", "team/app/tags/list", &[], &[]).status, 404);
    let catalog = registry.api("GET", "_catalog", &[], &[]).is(200).body;
    assert_eq!(String::from_utf8_lossy(&catalog).trim_end(), r#"{"repositories":["team/tool"]}"#);
    registry.pull("team/tool:1");
    let garbage = gc(&registry.store(), &["--dry-run", "--grace", "0"]).taken_blobs();
    let all: BTreeSet<String> = one.digests().union(&multi_arch().digests()).cloned().collect();
    assert_eq!(garbage, minus(&all, &two.digests()));

    for id in transactions(&registry.store()) {
        mount.order("trash", &format!("undo {id}"));
    }
    registry.pull("team/app:1");
    registry.pull("team/app:2");
    assert_eq!(mount.list("images/team"), ["app", "tool"]);
}

#[test]
fn rm_r_works_on_untagged_manifests_and_on_whole_namespaces() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let (one, two) = pair();
    // The second push leaves the first manifest without a tag.
    registry.push("team/app", Some("1"), &one);
    registry.push("team/app", Some("1"), &two);
    registry.push("team/tools/lint", Some("1"), &one);
    registry.push("other", Some("1"), &two);
    let mount = Mount::of(&registry.store());
    sh(mount.point(), "rm -r images/team/app").outcome().exits(0);
    sh(mount.point(), "rm -r images/team").outcome().exits(0);
    assert_eq!(mount.list("images"), ["other"]);
    assert!(!registry.store().join("docker/registry/v2/repositories/team").exists());
}

#[test]
fn tail_follows_the_log() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    registry.push("app", Some("1"), &alpine());
    let mount = Mount::of(&registry.store());
    let line = "timeout 20 tail -n +1 -f control/log | grep -q --line-buffered dry-run";
    let story = format!("({line}) & sleep 1; echo dry-run > control/gc; wait $!");
    sh(mount.point(), &story).outcome().exits(0);
}

#[test]
fn a_repository_in_another_ones_path_survives_it() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    registry.push("app", Some("1"), &alpine());
    registry.push("app/plugin", Some("1"), &busybox());
    let mount = Mount::of(&registry.store());
    sh(mount.point(), "rm -r images/app/_tags images/app/_manifests; rm images/app/_tags/*; true").outcome();
    registry.manifest("app", "1").is(404);
    registry.pull("app/plugin:1");
    assert_eq!(errno(fs::remove_dir(mount.path("images/app"))), libc::ENOTEMPTY);
}

#[test]
fn image_references_are_paths() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let (one, two) = pair();
    registry.push("library/alpine", Some("3.8"), &one);
    registry.push("library/alpine", Some("3.9"), &two);
    registry.push("library/alpine", Some("latest"), &two);
    let mount = Mount::of(&registry.store());
    let shell = |line: &str| sh(mount.point(), line).outcome().exits(0).stdout;
    assert_eq!(shell("cat images/library/alpine:3.8/manifest.json").as_bytes(), one.manifest);
    assert_eq!(mount.list("images/library"), ["alpine"], "they are not listed");

    shell("rm images/library/alpine:3.8");
    registry.manifest("library/alpine", "3.8").is(404);
    assert_eq!(mount.list("images/library/alpine/_tags"), ["3.9", "latest"]);

    // By digest: the manifest and all its tags, as the registry's own DELETE.
    shell(&format!("rm images/library/alpine@{}", two.digest()));
    registry.manifest("library/alpine", "3.9").is(404);
    registry.manifest("library/alpine", "latest").is(404);
    registry.manifest("library/alpine", &two.digest()).is(404);
    for missing in ["images/library/alpine:3.8", "images/library/none:1", "images/library/alpine@sha256:00"] {
        assert_eq!(errno(fs::symlink_metadata(mount.path(missing))), libc::ENOENT, "{missing}");
    }
}

#[test]
fn rm_of_a_manifest_removes_its_tags() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let (one, two) = pair();
    registry.push("app", Some("1"), &one);
    registry.push("app", Some("2"), &two);
    registry.push("app", Some("latest"), &two);
    let mount = Mount::of(&registry.store());
    mount.rm(&format!("images/app/_manifests/sha256/{}", two.hex()));
    assert_eq!(mount.list("images/app/_tags"), ["1"]);
    registry.manifest("app", "latest").is(404);
    registry.manifest("app", &two.digest()).is(404);
    registry.pull("app:1");
}

#[test]
fn control_files_refuse_what_they_do_not_understand() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    registry.push("alpine", Some("3.8"), &alpine());
    let mount = Mount::of(&registry.store());
    let before = registry.snapshot();
    for nonsense in
        ["sweeep", "sweep grace=banana", "sweep now now2", "dry-run=1", "\u{1f9f9}", "sweep grace=-1h"]
    {
        assert_eq!(errno(mount.control("gc", nonsense)), libc::EINVAL, "{nonsense:?}");
        let help = mount.read("control/gc");
        assert!(help.contains("sweep") && help.contains("dry-run"), "{nonsense:?}: {help}");
    }
    for nonsense in ["undo", "undo no-such-transaction", "burn everything", "purge older=soon"] {
        let code = errno(mount.control("trash", nonsense));
        assert!([libc::EINVAL, libc::ENOENT, libc::EIO].contains(&code), "{nonsense:?}: {code}");
        assert!(!mount.read("control/trash").is_empty());
    }
    let status: serde_json::Value = serde_json::from_str(&mount.read("control/status")).unwrap();
    assert_eq!(status["state"], "idle");
    assert_eq!(registry.snapshot(), before);
    let mode = fs::metadata(mount.path("control/gc")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600, "control files are the owner's");
}

#[test]
fn what_cannot_be_changed_is_refused() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let image = alpine();
    registry.push("alpine", Some("3.8"), &image);
    let mount = Mount::of(&registry.store());
    let before = registry.snapshot();
    let layer = sha256(&image.blobs[1]);
    let blob = format!("blobs/sha256/{}/{}", &hex(&layer)[..2], hex(&layer));
    let manifest = format!("manifests/sha256/{}", image.hex());
    for file in [
        blob.clone(),
        format!("{manifest}/manifest.json"),
        format!("{manifest}/blobs/sha256/{}", hex(&layer)),
        "README".to_string(),
        "control/gc".to_string(),
        "reachability/summary".to_string(),
    ] {
        let code = errno(fs::remove_file(mount.path(&file)));
        assert!([libc::EROFS, libc::EPERM].contains(&code), "rm {file}: errno {code}");
    }
    assert_eq!(errno(fs::write(mount.path("images/new"), "x")), libc::EROFS);
    assert_eq!(errno(fs::create_dir(mount.path("blobs/new"))), libc::EROFS);
    assert_eq!(errno(fs::OpenOptions::new().append(true).open(mount.path(&blob))), libc::EROFS);
    assert_eq!(errno(fs::rename(mount.path(&blob), mount.path("images/blob"))), libc::EROFS);
    // rm -r of everything that is not to be removed does not remove it.
    sh(mount.point(), "rm -rf blobs manifests reachability README").outcome();
    assert_eq!(registry.snapshot(), before);
    registry.pull("alpine:3.8");
}

#[test]
fn a_read_only_mount_changes_nothing() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    registry.push("alpine", Some("3.8"), &alpine());
    registry.push_blob("alpine", b"garbage");
    let before = common::snapshot(&registry.store());
    let mount = Mount::with(&registry.store(), &["--read-only"]);
    assert_eq!(errno(fs::remove_file(mount.path("images/alpine/_tags/3.8"))), libc::EROFS);
    assert_eq!(errno(fs::remove_file(mount.path("images/alpine:3.8"))), libc::EROFS);
    let tags = mount.path("images/alpine/_tags");
    let target = fs::read_link(tags.join("3.8")).unwrap();
    assert_eq!(errno(std::os::unix::fs::symlink(target, tags.join("new"))), libc::EROFS);
    assert_eq!(errno(fs::rename(tags.join("3.8"), tags.join("new"))), libc::EROFS);
    assert_eq!(errno(fs::create_dir(mount.path("images/new"))), libc::EROFS);
    assert_eq!(errno(mount.control("gc", "sweep now grace=0")), libc::EROFS);
    assert_eq!(mount.single_links(), BTreeSet::from([sha256(b"garbage")]));
    mount.unmount();
    assert_eq!(common::snapshot(&registry.store()), before);
}

#[test]
fn uploads_are_shown_and_only_stale_ones_can_be_cancelled() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    registry.push("app", Some("1"), &alpine());
    let started = registry.api("POST", "app/blobs/uploads/", &[], &[]).is(202);
    let location = started.header("location").unwrap().split_once("/v2/").unwrap().1.to_string();
    let id = started.header("docker-upload-uuid").unwrap().to_string();
    let octets = [("Content-Type", "application/octet-stream")];
    let patched = registry.api("PATCH", &location, &octets, b"half a layer").is(202);
    let location = patched.header("location").unwrap().split_once("/v2/").unwrap().1.to_string();

    let mount = Mount::of(&registry.store());
    assert_eq!(mount.list("images/app/_uploads"), std::slice::from_ref(&id));
    let path = mount.path("images/app/_uploads").join(&id);
    assert_eq!(fs::metadata(&path).unwrap().len(), 12);
    assert_eq!(errno(fs::remove_file(&path)), libc::EBUSY);
    registry.api("GET", &location, &[], &[]).is(204);
    mount.unmount();

    let mount = Mount::with(&registry.store(), &["--grace", "0"]);
    mount.rm(&format!("images/app/_uploads/{id}"));
    assert_eq!(registry.api("GET", &location, &[], &[]).status, 404);
    assert_eq!(mount.list("images/app/_uploads"), [""; 0]);
}

#[test]
fn the_view_says_who_holds_what() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    let (one, two) = pair();
    registry.push("team/app", Some("one"), &one);
    registry.push("mirror", Some("one"), &one);
    registry.push("team/app", None, &two);
    let mount = Mount::of(&registry.store());

    let references = mount.read(&format!("manifests/sha256/{}/references", one.hex()));
    assert!(references.contains("team/app") && references.contains("mirror"), "{references}");
    let layers = mount.list(&format!("manifests/sha256/{}/layers", one.hex()));
    assert_eq!(layers.len(), 2);
    let first = mount.path(format!("manifests/sha256/{}/layers/{}", one.hex(), layers[0]));
    assert_eq!(fs::read(first).unwrap(), one.blobs[1]);

    let shared = sha256(&one.blobs[1]);
    let keepers =
        mount.list(&format!("reachability/reachable/sha256/{}/{}", &hex(&shared)[..2], hex(&shared)));
    assert_eq!(keepers.len(), 3, "{keepers:?}");
    assert_eq!(keepers.iter().filter(|name| *name == "why").count(), 1, "{keepers:?}");
    assert_eq!(mount.list("reachability/untagged"), ["team"]);
    let untagged = mount.list("reachability/untagged/team");
    assert_eq!(untagged.len(), 1, "{untagged:?}");
    assert!(untagged[0].contains(&two.hex()), "{untagged:?}");

    let usage = mount.read("reachability/usage.tsv");
    let row = usage.lines().map(|line| line.split('\t').collect::<Vec<_>>()).find(|row| row[0] == "team/app");
    let row = row.unwrap_or_else(|| panic!("no row for team/app: {usage}"));
    assert_eq!((row[1], row[2]), ("one", &*one.digest()));
    let total: usize = one.manifest.len() + one.blobs.iter().map(Vec::len).sum::<usize>();
    assert_eq!(row[5], total.to_string(), "{usage}");
    for digest in blobs(&registry.store()) {
        let path = format!("blobs/sha256/{}/{}", &hex(&digest)[..2], hex(&digest));
        assert_eq!(sha256(&fs::read(mount.path(path)).unwrap()), digest);
    }
}

#[test]
fn the_view_says_why() {
    if !have(NEEDS) {
        return;
    }
    let registry = Registry::start();
    registry.push("team/app", Some("one"), &alpine());
    registry.push_blob("team/app", b"a layer whose manifest never came");
    let mount = Mount::of(&registry.store());

    let kept = sha256(&alpine().blobs[1]);
    let place = format!("reachability/reachable/sha256/{}/{}/why", &hex(&kept)[..2], hex(&kept));
    let why = mount.read(&place);
    assert!(why.contains("team/app:one (tag, pushed "), "{why}");
    assert!(why.contains(&format!("  → layer {kept}")), "{why}");
    let garbage = sha256(b"a layer whose manifest never came");
    assert_eq!(mount.list("reachability/why/sha256"), [hex(&garbage)]);
    let why = mount.read(&format!("reachability/why/sha256/{}", hex(&garbage)));
    assert!(why.contains("nothing leads to it") && why.contains("layer link in team/app"), "{why}");
    // Not listed, and there all the same.
    let why = mount.read(&format!("reachability/why/sha256/{}", hex(&kept)));
    assert!(why.contains("team/app:one"), "{why}");
    let nobodys = mount.path(format!("reachability/why/sha256/{}", hex(&sha256(b"nobody's"))));
    assert_eq!(fs::read(nobodys).unwrap_err().kind(), std::io::ErrorKind::NotFound);
}

#[test]
fn mount_returns_to_the_terminal_when_it_answers() {
    if !have(&["fuse"]) {
        return;
    }
    let store = common::store::Store::new();
    store.push("app", Some("1"), &alpine());
    let mount = Mount::of(store.root());
    regfs(["umount"]).arg(mount.point()).outcome().exits(0);
    // A shell waits for everybody who holds the pipe: a daemon that keeps it would hang this.
    let line = format!(
        "out=$('{}' mount '{}' '{}' 2>&1) && ls '{}/images'",
        env!("CARGO_BIN_EXE_regfs"),
        store.root().display(),
        mount.point().display(),
        mount.point().display()
    );
    let outcome = sh(Path::new("/"), &line).outcome().exits(0);
    assert_eq!(outcome.stdout, "app\n");
    assert!(is_mounted(mount.point()));
    mount.unmount();
}
