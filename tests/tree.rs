//! What people and their tools meet in the tree: copies and walks that end, names that can't harm a terminal, times and
//! sizes that are true; tags and repositories made with `cp -a`, `ln -s` and `mv`; an undo that meets something newer.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use common::check::{Live, Roots, hex};
use common::gc::transactions;
use common::have;
use common::image::{Image, OCI_INDEX, OCI_MANIFEST, bytes, descriptor, layer};
use common::mount::Mount;
use common::run::{Bounded, Outcome, regfs, sh};
use common::store::{Store, put};
use serde_json::{Value, json};

fn image(name: &str) -> Image {
    Image::oci(name, &[layer("base", "shared by many"), layer("own", name)])
}

/// An index of anything; `mark` makes it differ from others of the same.
fn index_of(mark: &str, children: &[&Image]) -> Image {
    let manifests: Vec<Value> = children.iter().map(|child| child.descriptor()).collect();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": OCI_INDEX, "annotations": {"mark": mark}, "manifests": manifests,
    });
    Image { media_type: OCI_INDEX, manifest: bytes(&manifest), blobs: Vec::new(), children: Vec::new() }
}

/// Runs a line of sh in the mount, which must end well and within a time that only a circle exceeds.
#[track_caller]
fn works(mount: &Mount, line: &str) -> Outcome {
    sh(mount.point(), &format!("timeout 60 sh -c '{line}'")).outcome().exits(0)
}

/// A store of what leads in circles or doubles at each step, where symlinks are followed: 48 levels of two indexes that each
/// name both of the next level, an image with a referrer that has a referrer, one child and one layer many times.
fn labyrinth() -> Store {
    let store = Store::new();
    let leaf = image("leaf");
    store.push("evil/diamond", None, &leaf);
    let mut level = [leaf.clone(), leaf.clone()];
    for depth in 0..48 {
        level = ["a", "b"].map(|side| index_of(&format!("{depth}{side}"), &[&level[0], &level[1]]));
        level.iter().for_each(|index| drop(store.push("evil/diamond", None, index)));
    }
    store.tag("evil/diamond", "top", &level[0].digest());

    let subject = image("subject");
    store.push("signed", Some("1"), &subject);
    let signature = subject.referrer("application/vnd.example.signature", "of the subject");
    store.push("signed", None, &signature);
    store.push("signed", Some("signature"), &signature.referrer("application/vnd.example.proof", "of that"));

    let again: Vec<&Image> = vec![&leaf; 200];
    store.push("evil/again", None, &leaf);
    store.push("evil/again", Some("index"), &index_of("again", &again));
    let blob = layer("big", "big").blob;
    let (config, layer) =
        (descriptor("application/vnd.oci.image.config.v1+json", b"{}"), descriptor("", &blob));
    let manifest = bytes(&json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": vec![layer; 300],
    }));
    store.push("evil/again", Some("layers"), &Image::odd(OCI_MANIFEST, manifest, &[b"{}", &blob]));
    store
}

#[test]
fn who_follows_symlinks_comes_to_an_end_and_meets_no_blob_often() {
    if !have(&["fuse", "timeout", "tar", "du"]) {
        return;
    }
    let store = labyrinth();
    let mount = Mount::of(store.root());
    let backup = common::scratch();
    let to = backup.path().to_str().unwrap();
    for line in [
        "find -L images manifests reachability/reachable > /dev/null",
        "du -sL images manifests > /dev/null",
        "tar -chf /dev/null images",
        &format!("cp -rL images {to}/images"),
    ] {
        works(&mount, line);
    }
    if have(&["rsync"]) {
        works(&mount, &format!("rsync -rL images/evil {to}/rsync"));
    }
    for tag in
        ["evil/diamond/_tags/top", "evil/again/_tags/index", "evil/again/_tags/layers", "signed/_tags/1"]
    {
        let found =
            works(&mount, &format!("find -L images/{tag}/ -type f -links +1 -printf \"%i\\n\"")).stdout;
        let mut often: BTreeMap<&str, usize> = BTreeMap::new();
        found.lines().for_each(|inode| *often.entry(inode).or_default() += 1);
        assert!(often.values().all(|times| *times <= 4), "{tag}: {often:?}");
    }
}

#[test]
fn what_an_image_is_part_of_is_said_in_files() {
    if !have(&["fuse"]) {
        return;
    }
    let store = Store::new();
    let (amd64, arm64) = (image("amd64"), image("arm64"));
    let inner = Image::index(&[("amd64", &amd64), ("arm64", &arm64)]);
    let outer = index_of("outer", &[&inner, &amd64]);
    store.push("app", Some("inner"), &inner);
    store.push("app", Some("outer"), &outer);
    let signature = inner.referrer("application/vnd.example.signature", "of the index");
    store.push("app", None, &signature);
    let mount = Mount::of(store.root());
    let read = |path: &str| mount.read(&format!("images/app/_tags/{path}"));
    let says = |image: &Image| format!("{}\nmanifests/sha256/{}\n", image.digest(), image.hex());

    assert_eq!(mount.list("images/app/_tags/inner/platforms"), ["linux-amd64", "linux-arm64"]);
    // The image of a platform is an image layout as ever.
    assert_eq!(read("inner/platforms/linux-arm64/oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}");
    assert_eq!(
        fs::read(mount.path("images/app/_tags/inner/platforms/linux-arm64/manifest.json")).unwrap(),
        arm64.manifest
    );
    let platforms = mount.list("images/app/_tags/outer/platforms");
    let nested = platforms
        .iter()
        .find(|name| mount.path(format!("images/app/_tags/outer/platforms/{name}")).is_file());
    assert_eq!(read(&format!("outer/platforms/{}", nested.unwrap())), says(&inner));
    let [referrer] = &mount.list("images/app/_tags/inner/referrers")[..] else { panic!("one referrer") };
    assert_eq!(read(&format!("inner/referrers/{referrer}")), says(&signature));
    let subject = mount.read(&format!("manifests/sha256/{}/subject", signature.hex()));
    assert_eq!(subject, says(&inner));
}

/// What clears a screen, sets a title, forges a line, turns the direction of writing, is no UTF-8.
const HOSTILE: [&[u8]; 4] = [
    b"e\x1b]0;pwned\x07\x1b[2Jx",
    b"n\nsha256:forged",
    "c\u{9b}2J\u{85}\u{2028}\u{202e}x".as_bytes(),
    b"i\xff\x9b2J",
];

/// Whether a terminal would obey anything in it; newlines and tabs are what lines and columns are made of.
fn is_harmless(text: &[u8]) -> bool {
    let unsafe_in_text = |c: char| {
        (c.is_control() && c != '\n' && c != '\t')
            || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    str::from_utf8(text).is_ok_and(|text| !text.contains(unsafe_in_text))
        && !text.windows(14).any(|w| w == b"\nsha256:forged")
}

fn store_with_hostile_names() -> Store {
    let store = Store::new();
    store.push("app", Some("1"), &image("one"));
    for name in HOSTILE.map(OsStr::from_bytes) {
        let repositories = store.path("repositories");
        put(&repositories.join(name).join("_manifests/tags/x/current/link"), b"bad");
        put(&repositories.join("app/_manifests/tags").join(name).join("current/link"), b"bad");
        put(&repositories.join("app/_manifests/revisions/sha256").join(name).join("link"), b"bad");
        put(&repositories.join("app/_uploads").join(name).join("startedat"), name.as_bytes());
        put(&repositories.join("app/_layers").join(name).join("link"), name.as_bytes());
        put(&store.path("blobs").join(name), b"stray");
        put(&store.tag_link("app", "broken"), name.as_bytes());
        let transaction = store.path(".regfs/trash").join(name);
        let text = String::from_utf8_lossy(name.as_bytes());
        let record = json!({"id": text, "time": text, "uid": 0, "pid": 1, "command": text, "reason": text});
        put(&transaction.join("txn.json"), &bytes(&record));
        put(&transaction.join("repositories").join(name).join("file"), b"taken");
    }
    // What a manifest claims of itself is shown as well.
    let name = String::from_utf8_lossy(HOSTILE[0]);
    let mut odd = serde_json::from_slice::<Value>(&image("odd").manifest).unwrap();
    odd["mediaType"] = json!(format!("application/{name}"));
    odd["artifactType"] = json!(format!("application/{name}"));
    let blobs = image("odd").blobs;
    let blobs: Vec<&[u8]> = blobs.iter().map(Vec::as_slice).collect();
    store.push("app", Some("odd"), &Image::odd(OCI_MANIFEST, bytes(&odd), &blobs));
    store
}

#[test]
fn hostile_names_are_shown_escaped_wherever_text_goes() {
    if !have(&["fuse"]) {
        return;
    }
    let store = store_with_hostile_names();
    let root = store.root().to_str().unwrap();
    for words in [
        &["gc", root, "--dry-run"][..],
        &["gc", root, "--dry-run", "-v", "--thorough", "--grace", "0"],
        &["gc", root, "--dry-run", "--json"],
        &["gc", root, "--dry-run", "--format", "distribution"],
        &["gc", root, "--grace", "0", "--registry-stopped", "--force"],
        &["why", root, "app:1"],
        &["why", root, "app:odd"],
        &["why", root, "app:odd", "--json"],
        &["why", root, "app:t\u{1b}[2J"],
        &["trash", root, "list"],
        &["trash", root, "list", "--json"],
        &["trash", root, "undo"],
        &["trash", root, "undo", "n\u{1b}\nsha256:forged"],
        &["trash", root, "undo", "last"],
        &["trash", root, "purge", "--all", "--registry-stopped", "--force"],
        &["trash", "x\u{1b}\nsha256:forged", "list"],
    ] {
        let outcome = regfs(words).env("RUST_LOG", "debug").outcome();
        for text in [&outcome.stdout, &outcome.stderr] {
            assert!(is_harmless(text.as_bytes()), "{words:?}: {text:?}");
        }
        if words.contains(&"--json") {
            serde_json::from_str::<Value>(&outcome.stdout).unwrap_or_else(|e| panic!("{words:?}: {e}"));
        }
    }
    let store = store_with_hostile_names();
    let mount = Mount::of(store.root());
    for (file, command) in [
        ("gc", "dry-run"),
        ("gc", "dry-run \u{1b}[2J\u{9b}"),
        ("trash", "undo \u{1b}[2J\u{9b}"),
        ("trash", "undo last"),
    ] {
        // Whether it works is not the question here.
        let _ = mount.tell(file, command);
        for name in ["gc", "log", "status", "trash"] {
            let text = fs::read(mount.path("control").join(name)).unwrap();
            assert!(
                is_harmless(&text),
                "control/{name} after {command:?}: {}",
                String::from_utf8_lossy(&text)
            );
        }
    }
    let texts = sh(
        mount.point(),
        "find reachability manifests -type f -not -name manifest.json -not -path \"*/blobs/*\" \
                                   -not -path \"*/layers/*\" -not -name config.json -exec cat {} +",
    );
    let texts = { texts }.outcome().exits(0).stdout;
    let forged =
        texts.split('\n').find(|line| !is_harmless(line.as_bytes()) || line.starts_with("sha256:forged"));
    assert_eq!(forged, None);
}

#[test]
fn times_are_those_of_the_things_themselves() {
    if !have(&["fuse"]) {
        return;
    }
    let store = Store::new();
    store.push("app", Some("1"), &image("one"));
    let two = store.push("app", Some("2"), &image("two"));
    let mount = Mount::of(store.root());
    let before = SystemTime::now() - Duration::from_secs(1);
    mount.rm("images/app/_tags/2");
    mount.order("refresh", "now");
    let shown = |place: &str| fs::metadata(mount.path(format!("{place}/{}", hex(&two)))).unwrap();
    let shard = format!("blobs/sha256/{}", &hex(&two)[..2]);
    assert_eq!(shown(&shard).mtime(), fs::metadata(store.blob(&two)).unwrap().mtime());
    let later = common::wait_for("the garbage to show", Duration::from_secs(20), || {
        fs::metadata(mount.path(format!("reachability/unreachable/sha256/{}", hex(&two)))).ok()
    });
    assert!(
        later.modified().unwrap() > SystemTime::now() + Duration::from_secs(3600),
        "the next step is a day away"
    );
    assert_eq!((later.len(), later.nlink()), (fs::metadata(store.blob(&two)).unwrap().len(), 1));
    let content = fs::read(mount.path(format!("reachability/unreachable/sha256/{}", hex(&two)))).unwrap();
    assert_eq!(content, image("two").manifest);
    let [id] = &transactions(store.root())[..] else { panic!("one transaction") };
    let removed = fs::metadata(mount.path(format!("trash/{id}"))).unwrap().modified().unwrap();
    assert!(removed >= before && removed <= SystemTime::now(), "{removed:?}");
}

#[test]
fn usage_counts_what_is_stored() {
    if !have(&["fuse"]) {
        return;
    }
    let store = Store::new();
    let own = layer("own", "own").blob;
    let elsewhere = json!({
        "mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "size": 252_691_002,
        "digest": format!("sha256:{}", "d".repeat(64)), "urls": ["https://example.test/x"],
    });
    let mut boasting = descriptor("application/vnd.docker.image.rootfs.diff.tar.gzip", &own);
    boasting["size"] = json!(1_u64 << 40);
    let manifest = bytes(&json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": descriptor("application/vnd.docker.container.image.v1+json", b"{}"),
        "layers": [elsewhere, boasting],
    }));
    store.push("win", Some("ltsc"), &Image::odd(OCI_MANIFEST, manifest.clone(), &[b"{}", &own]));
    let lost = image("lost");
    store.push("app", Some("lost"), &lost);
    fs::remove_dir_all(store.blob(&common::check::sha256(&lost.blobs[2])).parent().unwrap()).unwrap();
    let mount = Mount::of(store.root());
    let usage = mount.read("reachability/usage.tsv");
    let total = |tag: &str| {
        let line = usage.lines().find(|line| line.split('\t').nth(1) == Some(tag)).expect("a line");
        line.split('\t').nth(5).unwrap().parse::<usize>().unwrap()
    };
    assert_eq!(total("ltsc"), manifest.len() + 2 + own.len());
    assert_eq!(total("lost"), lost.manifest.len() + lost.blobs[0].len() + lost.blobs[1].len());
}

/// Where tags lead: name and digest.
fn tags(mount: &Mount, repository: &str) -> BTreeMap<String, String> {
    let place = format!("images/{repository}/_tags");
    let target = |tag: &String| {
        let target = fs::read_link(mount.path(Path::new(&place).join(tag))).unwrap();
        (tag.clone(), target.file_name().unwrap().to_str().unwrap().to_string())
    };
    mount.list(&place).iter().map(target).collect()
}

#[test]
fn copies_of_tags_and_repositories_keep_what_tools_give_them() {
    if !have(&["fuse"]) {
        return;
    }
    let store = Store::new();
    store.push("app", Some("1"), &image("one"));
    store.push("app", Some("2"), &image("two"));
    let mount = Mount::of(store.root());
    let app = tags(&mount, "app");
    let mut ways = vec![
        "mkdir images/new && cp -a images/app/_tags/. images/new/_tags/",
        "mkdir images/new && cp -rP images/app/_tags/. images/new/_tags/",
        "mkdir images/new && cp -a images/app/_tags/1 images/app/_tags/2 images/new/_tags",
        "mkdir images/new && tar -cf - -C images/app/_tags . | tar -xPpf - -C images/new/_tags",
    ];
    if have(&["rsync"]) {
        ways.push("mkdir images/new && rsync -a images/app/_tags/ images/new/_tags/");
    }
    for way in ways {
        let said = works(&mount, way);
        assert_eq!(&*said.stderr, "", "{way}");
        assert_eq!(tags(&mount, "new"), app, "{way}");
        works(&mount, "rm -r images/new");
    }
}

#[test]
fn a_symlink_to_another_tag_is_a_tag() {
    if !have(&["fuse"]) {
        return;
    }
    let store = Store::new();
    let one = store.push("team/app", Some("1.6"), &image("one"));
    store.push("other", Some("x"), &image("two"));
    let mount = Mount::of(store.root());
    let point = mount.point().to_str().unwrap().to_string();
    for (at, text) in [
        "1.6",
        "./1.6",
        "../_tags/1.6",
        "team/app:1.6",
        "../../app:1.6",
        &format!("team/app@{one}"),
        &format!("{point}/images/team/app/_tags/1.6"),
        &format!("{point}/images/team/app:1.6"),
    ]
    .iter()
    .enumerate()
    {
        works(
            &mount,
            &format!("ln -s {text} images/team/app/_tags/stable{at} && readlink images/team/app:stable{at}"),
        );
        assert_eq!(tags(&mount, "team/app")[&format!("stable{at}")], hex(&one), "{text}");
    }
    works(
        &mount,
        "cd images/team/app/_tags && ln -sfn ../../../other/_tags/x stable0 && ln -s stable1 stable9",
    );
    let all = tags(&mount, "team/app");
    assert_eq!((&*all["stable0"], &*all["stable9"]), (image("two").hex().as_str(), hex(&one)));
    for (text, why) in
        [("nothing", "No such file"), ("team/app:none", "No such file"), ("/etc/passwd", "Invalid argument")]
    {
        sh(mount.point(), &format!("ln -s {text} images/other/_tags/new")).outcome().exits(1).says(why);
    }
    assert!(mount.read("control/log").contains("there is no image other:nothing"));
    Live::of(store.root(), Roots::Tags).assert_complete();
}

#[test]
fn a_repository_is_renamed_with_all_that_is_in_it() {
    if !have(&["fuse"]) {
        return;
    }
    let store = Store::new();
    let base = image("base");
    store.push("team/app", Some("1"), &base);
    store.push("team/app", Some("multi"), &Image::index(&[("amd64", &image("a")), ("arm64", &image("b"))]));
    store.push("team/app", None, &base.referrer("application/vnd.example.signature", "of base"));
    store.push("team/app/web", Some("1"), &image("web"));
    let mount = Mount::of(store.root());
    let revisions = mount.list("images/team/app/_manifests/sha256");
    let (app, web) = (tags(&mount, "team/app"), tags(&mount, "team/app/web"));

    works(
        &mount,
        "mkdir images/team/empty && mv images/team/empty images/team/moved && rmdir images/team/moved",
    );
    works(&mount, "mv images/team/app images/prod");
    assert_eq!((tags(&mount, "prod"), tags(&mount, "prod/web")), (app.clone(), web.clone()));
    assert_eq!(mount.list("images/prod/_manifests/sha256"), revisions);
    assert!(!store.repository("team/app", "").exists() && !mount.path("images/team/app").exists());
    let log = mount.read("control/log");
    assert!(log.contains("moved 2 repositories; what went is in the trash"), "{log}");
    Live::of(store.root(), Roots::Revisions).assert_complete();
    // Onto something: mv moves into a directory, mv -T does not.
    store.push("busy", Some("1"), &image("busy"));
    mount.order("refresh", "now");
    sh(mount.point(), "mv -T images/prod images/busy").outcome().exits(1).says("not empty");
    sh(mount.point(), "mv images/prod images/Prod").outcome().exits(1);
    assert!(mount.read("control/log").contains("Prod is no name of a repository"));
    works(&mount, "mv images/prod images/busy");
    assert_eq!(tags(&mount, "busy/prod/web"), web);

    // One undo brings the old name back; the new one stays.
    mount.order("trash", "undo last");
    assert_eq!((tags(&mount, "prod"), tags(&mount, "busy/prod")), (app.clone(), app));
    Live::of(store.root(), Roots::Revisions).assert_complete();
}

#[test]
fn a_repository_that_would_lose_something_is_not_renamed() {
    if !have(&["fuse"]) {
        return;
    }
    let store = Store::new();
    store.push("app", Some("1"), &image("one"));
    put(&store.repository("app", "_uploads/4b3c/data"), b"coming");
    let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    put(&store.repository("app", "_uploads/4b3c/startedat"), now.as_bytes());
    store.push("hurt", Some("1"), &image("hurt"));
    fs::remove_dir_all(store.blob(&common::check::sha256(&image("hurt").blobs[2])).parent().unwrap())
        .unwrap();
    let mount = Mount::of(store.root());
    let before = common::snapshot(&store.path("repositories"));
    sh(mount.point(), "mv images/app images/new").outcome().exits(1).says("busy");
    sh(mount.point(), "mv images/hurt images/new").outcome().exits(1).says("No such file");
    assert_eq!(common::snapshot(&store.path("repositories")), before);
}

#[test]
fn an_undo_gives_back_all_but_what_a_newer_tag_replaced() {
    if !have(&["fuse"]) {
        return;
    }
    let store = Store::new();
    for name in ["a", "b", "c"] {
        store.push(name, Some("latest"), &image(name));
        store.push(name, Some("old"), &image(&format!("old {name}")));
    }
    let mount = Mount::of(store.root());
    works(&mount, "rm -r images/*");
    store.push("a", Some("latest"), &image("newer"));
    store.push("b", Some("old"), &image("old b"));
    mount.order("refresh", "now");
    let [id] = &transactions(store.root())[..] else { panic!("one transaction") };
    let root = store.root().to_str().unwrap();
    regfs(["trash", root, "undo"]).outcome().exits(2).says(id).says(&format!("regfs trash {root} undo last"));
    assert_eq!(mount.control("trash", "undo").unwrap_err().raw_os_error(), Some(libc::EINVAL));
    let which = mount.read("control/trash");
    assert!(which.contains(&**id) && which.contains("echo 'undo last' > control/trash"), "{which}");

    let outcome = regfs(["trash", root, "undo", "last"]).outcome().exits(3);
    let again = format!("regfs trash {root} undo {id}");
    assert!(outcome.stdout.contains("conflict a:latest: ") && outcome.stdout.contains(&again), "{outcome}");
    assert!(outcome.stdout.contains("but for 1 conflict"), "{outcome}");
    mount.order("refresh", "now");
    for (name, latest) in [("a", "newer"), ("b", "b"), ("c", "c")] {
        let expected = [("latest", image(latest)), ("old", image(&format!("old {name}")))];
        let expected: BTreeMap<String, String> = expected.map(|(tag, i)| (tag.to_string(), i.hex())).into();
        assert_eq!(tags(&mount, name), expected);
    }
    Live::of(store.root(), Roots::Tags).assert_complete();

    // As the answer says: without the newer one, the old one comes back.
    works(&mount, "rm images/a:latest");
    regfs(["trash", root, "undo", id]).outcome().exits(0);
    mount.order("refresh", "now");
    assert_eq!(tags(&mount, "a")["latest"], image("a").hex());
    Live::of(store.root(), Roots::Tags).assert_complete();
}
