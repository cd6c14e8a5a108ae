//! Stores that are damaged, hostile or strange: all of it is shown, none of it makes us lose or leave the store.
//!
//! Every story starts with a healthy repository, a damaged one, and garbage. Whatever is damaged must be shown in
//! `reachability/broken`, the view must go on serving, and the harshest sweeps must keep all that any reading of
//! the damage could need; refusing to sweep is as good.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::check::{Live, blobs, hex, sha256};
use common::gc::{Report, gc_outcome};
use common::image::{
    DOCKER_SCHEMA_1, Image, OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, bytes, descriptor, layer,
};
use common::mount::Mount;
use common::run::{Bounded, clean, sh};
use common::store::{Store, put};
use common::{NOBODY, chown_all, have, is_root, names, scratch, snapshot};
use serde_json::json;

/// The repository that the stories damage.
const DAMAGED: &str = "team/damaged";

/// The image that the stories damage.
fn victim() -> Image {
    Image::oci("victim", &[layer("first", "victim"), layer("second", "more of the victim")])
}

/// An image beside it in the same repository.
fn neighbour() -> Image {
    Image::oci("neighbour", &[layer("first", "neighbour")])
}

/// An image in another repository.
fn bystander() -> Image {
    Image::oci("bystander", &[layer("first", "bystander")])
}

/// A store with the three, before it is damaged.
fn healthy() -> Store {
    let store = Store::new();
    store.push("bystander", Some("1"), &bystander());
    store.push(DAMAGED, Some("1"), &victim());
    store.push(DAMAGED, Some("neighbour"), &neighbour());
    store.put_blob(b"garbage");
    store
}

/// Damages a store; returns what a file in `broken` must name: parts of paths, hex digests.
fn story(damage: impl FnOnce(&Store) -> Vec<String>) {
    let store = healthy();
    let expected = damage(&store);
    reported(&store, &expected);
    shown(&store, &expected);
    kept(&store);
}

/// A dry run names every damage: in its report, or where it says why it can't run.
fn reported(store: &Store, expected: &[String]) {
    let outcome = gc_outcome(store.root(), &["--dry-run"]).exits_one_of(&[0, 1]);
    let told = match outcome.code {
        Some(0) => {
            let problems = Report::parse(&outcome).problems.into_iter();
            problems
                .map(|problem| format!("{}: {}; {}\n", problem.path, problem.what, problem.effect))
                .collect()
        }
        _ => outcome.stderr.clone(),
    };
    for part in expected {
        assert!(told.contains(part), "nobody is told of {part}: {outcome}");
    }
}

/// The view shows every damage and still serves what is healthy.
fn shown(store: &Store, expected: &[String]) {
    if !have(&["fuse"]) {
        return;
    }
    let mount = Mount::of(store.root());
    let pid = mount.pid();
    let broken: Vec<String> = mount
        .list("reachability/broken")
        .iter()
        .map(|name| mount.read(&format!("reachability/broken/{name}")))
        .collect();
    for part in expected {
        assert!(
            broken.iter().any(|text| text.contains(part)),
            "nothing in broken/ names {part}: {broken:#?}"
        );
    }
    // Looking at everything, and reading it, harms nobody. What is broken may answer EIO.
    sh(
        mount.point(),
        "find . -ls > /dev/null; find . -type f -not -path './control/*' -exec cat {} + > /dev/null",
    )
    .outcome();
    assert_eq!(mount.pid(), pid, "the daemon is the same");
    assert_eq!(mount.list("images/bystander/_tags"), ["1"]);
    let manifest = fs::read(mount.path("images/bystander/_tags/1/manifest.json")).unwrap();
    assert_eq!(manifest, bystander().manifest);
    mount.unmount();
}

/// The harshest sweeps keep every blob that is not the one piece of garbage, and every link of the healthy images.
fn kept(store: &Store) {
    let garbage = sha256(b"garbage");
    let everything: BTreeSet<String> =
        blobs(store.root()).into_iter().filter(|digest| *digest != garbage).collect();
    let healthy = Live::of_repository(store.root(), "bystander");
    healthy.assert_complete();
    for arguments in [&["--grace", "0", "--now"][..], &["--untagged", "--grace", "0", "--now"]] {
        let outcome = gc_outcome(store.root(), arguments).exits_one_of(&[0, 1, 3]);
        let lost: Vec<String> = everything.difference(&blobs(store.root())).cloned().collect();
        assert!(lost.is_empty(), "lost {lost:?} with {arguments:?}: {outcome}");
        healthy.assert_intact();
    }
}

/// What a link may hold that is no digest.
fn bad_links(digest: &str) -> [Vec<u8>; 7] {
    [
        Vec::new(),
        digest.as_bytes()[..40].to_vec(),
        format!("{digest}\n").into_bytes(),
        b"hello".to_vec(),
        b"sha256:../../../../../../etc/passwd".to_vec(),
        digest.to_uppercase().into_bytes(),
        vec![0xff; 71],
    ]
}

#[test]
fn tag_links_that_hold_no_digest() {
    for content in bad_links(&victim().digest()) {
        story(|store| {
            fs::write(store.tag_link(DAMAGED, "1"), content).unwrap();
            vec!["team/damaged/_manifests/tags/1/current/link".into()]
        });
    }
}

#[test]
fn revision_links_that_hold_no_digest() {
    for content in bad_links(&victim().digest()) {
        story(|store| {
            fs::write(store.revision_link(DAMAGED, &victim().digest()), content).unwrap();
            vec![format!("team/damaged/_manifests/revisions/sha256/{}/link", victim().hex())]
        });
    }
}

/// Nobody reads them: a layer link under sha256 says nothing that its path does not say. So they hold nothing back
/// and lose nothing; that they are broken is not told.
#[test]
fn layer_links_that_hold_no_digest() {
    let layer = sha256(&victim().blobs[1]);
    for content in bad_links(&layer) {
        story(|store| {
            fs::write(store.layer_link(DAMAGED, &layer), content).unwrap();
            Vec::new()
        });
    }
}

#[test]
fn a_tag_of_a_manifest_that_is_not_there() {
    story(|store| {
        store.tag(DAMAGED, "gone", &sha256(b"gone"));
        vec!["team/damaged/_manifests/tags/gone/current/link".into()]
    });
}

#[test]
fn a_revision_whose_bytes_are_not_there() {
    story(|store| {
        // Its layers stay what somebody may repair it with: nobody can say that they belong to nothing.
        fs::remove_file(store.blob(&victim().digest())).unwrap();
        vec![victim().hex()]
    });
}

#[test]
fn a_tag_without_its_revision() {
    story(|store| {
        fs::remove_file(store.revision_link(DAMAGED, &victim().digest())).unwrap();
        vec!["team/damaged/_manifests/tags/1".into()]
    });
}

#[test]
fn a_manifest_whose_bytes_are_others() {
    story(|store| {
        fs::write(store.blob(&victim().digest()), &neighbour().manifest).unwrap();
        vec![victim().hex()]
    });
}

#[test]
fn a_manifest_that_is_cut_short_or_empty() {
    for length in [0, 1, 100] {
        story(|store| {
            fs::write(store.blob(&victim().digest()), &victim().manifest[..length]).unwrap();
            vec![victim().hex()]
        });
    }
}

#[test]
fn a_link_that_leads_to_another_manifest() {
    story(|store| {
        fs::write(store.revision_link(DAMAGED, &victim().digest()), neighbour().digest()).unwrap();
        vec![victim().hex()]
    });
}

#[test]
fn a_manifest_of_fifty_mebibytes() {
    story(|store| {
        let own = layer("huge", "only the huge one's").blob;
        let manifest = bytes(&json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor(OCI_CONFIG, b"{}"),
            "layers": [descriptor(OCI_LAYER, &own)], "annotations": {"padding": "x".repeat(50 << 20)},
        }));
        let image = Image::odd(OCI_MANIFEST, manifest, &[b"{}", &own]);
        store.push(DAMAGED, Some("huge"), &image);
        vec![image.hex()]
    });
}

#[test]
fn a_manifest_that_is_nested_ten_thousand_deep() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        story(|store| {
            let own = layer("deep", "only the deep one's").blob;
            let inner = if open == "[" { "" } else { "0" };
            let deep = format!("{}{inner}{}", open.repeat(10_000), close.repeat(10_000));
            let manifest = format!(r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","config":{deep}}}"#);
            let image = Image::odd(OCI_MANIFEST, manifest, &[&own]);
            store.push(DAMAGED, Some("deep"), &image);
            vec![image.hex()]
        });
    }
}

#[test]
fn an_index_that_names_itself() {
    story(|store| {
        // No bytes hash to a digest they hold, so this one is damaged, too; two that name each other likewise.
        let (one, two) = (sha256(b"one"), sha256(b"two"));
        for (digest, named) in [(&one, [&one, &two]), (&two, [&one, &one])] {
            let entries = named.map(|digest| json!({"mediaType": OCI_INDEX, "digest": digest, "size": 400}));
            let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries});
            put(&store.blob(digest), &bytes(&index));
            put(&store.revision_link(DAMAGED, digest), digest.as_bytes());
            store.tag(DAMAGED, &format!("loop-{}", &hex(digest)[..4]), digest);
        }
        vec![hex(&one).into(), hex(&two).into()]
    });
}

#[test]
fn a_manifest_of_an_unknown_kind() {
    story(|store| {
        let own = layer("unknown", "of a kind unknown").blob;
        let manifest = json!({"mediaType": "application/x-new", "parts": [{"deep": {"is": sha256(&own)}}]});
        let image = Image::odd("application/x-new", bytes(&manifest), &[&own]);
        store.push(DAMAGED, Some("unknown"), &image);
        vec![image.hex()]
    });
}

#[test]
fn a_manifest_of_schema_1() {
    story(|store| {
        let own = layer("old", "schema 1").blob;
        let manifest = json!({
            "schemaVersion": 1, "name": DAMAGED, "tag": "old", "architecture": "amd64",
            "fsLayers": [{"blobSum": sha256(&own)}], "history": [{"v1Compatibility": "{}"}],
        });
        let image = Image::odd(DOCKER_SCHEMA_1, bytes(&manifest), &[&own]);
        store.push(DAMAGED, Some("old"), &image);
        vec![image.hex()]
    });
}

#[test]
fn manifests_that_are_json_and_nonsense() {
    let nonsense = [
        json!([]),
        json!(3),
        json!(null),
        json!({}),
        json!({"schemaVersion": 2, "layers": 7, "config": [], "manifests": "none"}),
        json!({"layers": [{"digest": "sha256:../../../../../../../etc/passwd", "size": -1}]}),
        json!({"manifests": [{"digest": "sha256:", "size": 1e300}, {"digest": ""}, {}, 5, null]}),
        json!({"config": {"digest": "md5:d41d8cd98f00b204e9800998ecf8427e"}, "layers": [{"digest": "sha256:éé"}]}),
        json!({"config": {"digest": format!("sha256:{}", "A".repeat(64))}, "subject": {"digest": 5}}),
        json!({"subject": {"digest": "sha512:00"}, "mediaType": 5, "artifactType": ["x\u{0}/../.."]}),
    ];
    story(|store| {
        for (number, value) in nonsense.iter().enumerate() {
            store.push(DAMAGED, Some(&format!("nonsense-{number}")), &Image::odd("", bytes(value), &[]));
        }
        Vec::new()
    });
}

#[test]
fn repositories_with_names_that_no_registry_gives() {
    let bad: [&[u8]; 5] = [b"Upper", b"with space", b"bad-\xff\xfe-bytes", b"-dash", b"two\nlines"];
    for name in bad {
        story(|store| {
            let image = Image::oci("strange", &[layer("strange", "name")]);
            store.push("proper", Some("1"), &image);
            let strange = store.path("repositories").join(OsStr::from_bytes(name));
            fs::rename(store.repository("proper", ""), strange).unwrap();
            let shown: Vec<&str> = ["Upper", "with space", "bad-", "-dash", "two"].to_vec();
            let part = shown.into_iter().find(|part| name.starts_with(part.as_bytes())).unwrap();
            vec![part.to_string()]
        });
    }
}

#[test]
fn tags_with_names_that_no_registry_gives() {
    for name in [&b".hidden"[..], b"with space", b"bad-\xff\xfe-bytes", b"two\nlines", &[b'x'; 129]] {
        story(|store| {
            let image = Image::oci("strange", &[layer("strange", "name")]);
            store.push(DAMAGED, Some("proper"), &image);
            let tags = store.repository(DAMAGED, "_manifests/tags");
            fs::rename(tags.join("proper"), tags.join(OsStr::from_bytes(name))).unwrap();
            vec!["team/damaged/_manifests/tags".into()]
        });
    }
}

#[test]
fn a_tag_with_a_name_that_no_registry_gives_keeps_what_a_manifest_without_revision_leads_to() {
    story(|store| {
        let tags = store.repository(DAMAGED, "_manifests/tags");
        fs::rename(tags.join("1"), tags.join("with space")).unwrap();
        fs::remove_file(store.revision_link(DAMAGED, &victim().digest())).unwrap();
        vec!["team/damaged/_manifests/tags".into()]
    });
}

#[test]
fn revisions_and_blobs_with_names_that_are_no_digests() {
    story(|store| {
        let revisions = store.repository(DAMAGED, "_manifests/revisions");
        put(&revisions.join("sha256/nonsense/link"), victim().digest().as_bytes());
        put(&revisions.join(OsStr::from_bytes(b"md\xff")).join("00/link"), b"x");
        put(&store.repository(DAMAGED, "_layers/sha256").join("nonsense/link"), b"x");
        put(&store.path("blobs/sha256/zz/zzzz/data"), b"x");
        put(&store.path("blobs/sha256/00").join("f".repeat(64)).join("data"), b"in the wrong place");
        put(&store.path("blobs/data"), b"stray");
        put(&store.path("repositories/stray"), b"stray");
        vec!["revisions/sha256/nonsense".into()]
    });
}

/// What lies outside of the store and must neither be read nor changed through it.
struct Outside {
    dir: tempfile::TempDir,
    before: Vec<(PathBuf, String)>,
}

const SECRET: &str = "the secret outside";

impl Outside {
    fn new() -> Outside {
        let dir = scratch();
        put(&dir.path().join("secret"), SECRET.as_bytes());
        put(&dir.path().join("tree/data"), SECRET.as_bytes());
        put(&dir.path().join("tree/link"), victim().digest().as_bytes());
        let before = snapshot(dir.path()).into_iter().collect();
        Outside { dir, before }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    #[track_caller]
    fn assert_untouched(&self) {
        let after: Vec<(PathBuf, String)> = snapshot(self.dir.path()).into_iter().collect();
        assert!(after == self.before, "changed outside: {after:#?}");
    }
}

/// Nothing in the mount holds what is outside of the store.
#[track_caller]
fn assert_no_leak(mount: &Mount) {
    let found =
        sh(mount.point(), &format!("grep -r '{SECRET}' images manifests blobs reachability trash")).outcome();
    assert_eq!(found.stdout, "", "the outside is readable through the mount");
}

/// Replaces a path of the store by a symlink to the outside; what was there is moved there when `move_it`.
fn symlinked(path_of: impl Fn(&Store) -> PathBuf, target: &str, move_it: bool) {
    let mut outside = Outside::new();
    let store = healthy();
    let path = path_of(&store);
    let target = outside.path(target);
    if move_it {
        fs::rename(&path, &target).unwrap();
    } else if path.is_dir() {
        fs::remove_dir_all(&path).unwrap();
    } else if path.exists() {
        fs::remove_file(&path).unwrap();
    }
    outside.before = snapshot(outside.dir.path()).into_iter().collect();
    symlink(&target, &path).unwrap();
    let part = path.strip_prefix(store.path(".")).unwrap().to_str().unwrap().to_string();
    reported(&store, std::slice::from_ref(&part));
    shown(&store, &[part]);
    if have(&["fuse"]) {
        let mount = Mount::of(store.root());
        let found =
            sh(mount.point(), &format!("grep -r '{SECRET}' images manifests blobs reachability trash"));
        let leak = { found }.outcome().stdout;
        assert_eq!(leak, "", "the outside is readable through the mount");
    }
    kept(&store);
    outside.assert_untouched();
    assert!(fs::symlink_metadata(&path).unwrap().is_symlink(), "the symlink stays what it is");
}

#[test]
fn a_symlink_for_a_link_file() {
    symlinked(|store| store.tag_link(DAMAGED, "1"), "tree/link", false);
    symlinked(|store| store.revision_link(DAMAGED, &victim().digest()), "tree/link", false);
}

/// See `layer_links_that_hold_no_digest`: nobody is told, and nobody follows it.
#[test]
fn a_symlink_for_a_layer_link() {
    story(|store| {
        let link = store.layer_link(DAMAGED, &sha256(&victim().blobs[1]));
        fs::remove_file(&link).unwrap();
        symlink("/etc/hostname", &link).unwrap();
        Vec::new()
    });
}

/// Where it would tell the age of garbage, that garbage stays, and the run goes on.
#[test]
fn a_symlink_for_a_layer_link_to_garbage() {
    let store = healthy();
    let garbage = sha256(b"garbage");
    let link = store.layer_link(DAMAGED, &garbage);
    fs::create_dir_all(link.parent().unwrap()).unwrap();
    symlink("/etc/hostname", &link).unwrap();
    reported(&store, &[hex(&garbage).to_string()]);
    let before = blobs(store.root());
    assert!(before.contains(&garbage));
    gc_outcome(store.root(), &["--grace", "0", "--now"]).exits_one_of(&[0]);
    assert_eq!(blobs(store.root()), before);
}

#[test]
fn a_symlink_for_a_directory_of_a_repository() {
    for part in ["_manifests", "_layers", "_manifests/tags", "_manifests/tags/1", "_manifests/revisions"] {
        // The registry itself would follow it: what is behind it may be live.
        symlinked(|store| store.repository(DAMAGED, part), "moved", true);
    }
}

#[test]
fn a_symlink_for_a_repository() {
    symlinked(|store| store.repository(DAMAGED, ""), "moved", true);
    symlinked(|store| store.path("repositories/team"), "moved", true);
}

#[test]
fn a_symlink_for_a_manifest_blob() {
    symlinked(|store| store.blob(&victim().digest()), "secret", false);
}

#[test]
fn a_symlink_for_a_blob_or_its_directory() {
    let layer = sha256(&victim().blobs[1]);
    for (levels, target) in [(0, "secret"), (1, "tree")] {
        let store = healthy();
        let outside = Outside::new();
        let path = store.blob(&layer).ancestors().nth(levels).unwrap().to_path_buf();
        if levels == 0 {
            fs::remove_file(&path).unwrap();
        } else {
            fs::remove_dir_all(&path).unwrap();
        }
        symlink(outside.path(target), &path).unwrap();
        shown(&store, &[]);
        if have(&["fuse"]) {
            let mount = Mount::of(store.root());
            assert_no_leak(&mount);
        }
        gc_outcome(store.root(), &["--untagged", "--grace", "0", "--now"]).exits_one_of(&[0, 1, 3]);
        outside.assert_untouched();
        assert!(store.blob(&victim().digest()).exists() && store.blob(&bystander().digest()).exists());
    }
}

#[test]
fn a_symlink_for_our_own_directory() {
    let (store, outside) = (healthy(), Outside::new());
    symlink(outside.path("tree"), store.path(".regfs")).unwrap();
    // What was learnt of registries lay there.
    gc_outcome(store.root(), &["--grace", "0"]).exits(1).says("--forget-registries");
    outside.assert_untouched();
    gc_outcome(store.root(), &["--forget-registries", "--grace", "0"]).exits(0);
    outside.assert_untouched();
    assert!(store.path(".regfs").symlink_metadata().unwrap().is_dir(), "regfs makes its own");
}

#[test]
fn a_plain_file_where_a_directory_should_be() {
    let parts =
        ["_manifests", "_layers", "_manifests/tags", "_manifests/tags/1", "_manifests/tags/1/current"];
    for part in parts.into_iter().chain(["_manifests/revisions", "_manifests/revisions/sha256", "_uploads"]) {
        story(|store| {
            let path = store.repository(DAMAGED, part);
            if path.exists() {
                fs::remove_dir_all(&path).unwrap();
            }
            put(&path, b"no directory");
            vec![format!("repositories/{DAMAGED}/{part}")]
        });
    }
}

#[test]
fn a_plain_file_among_the_blobs() {
    story(|store| {
        let manifest = store.blob(&victim().digest());
        let dir = manifest.parent().unwrap();
        fs::remove_dir_all(dir).unwrap();
        put(dir, b"no directory");
        vec![victim().hex()]
    });
}

#[test]
fn a_directory_where_a_file_should_be() {
    let files: [fn(&Store) -> PathBuf; 3] = [
        |store| store.tag_link(DAMAGED, "1"),
        |store| store.revision_link(DAMAGED, &victim().digest()),
        |store| store.blob(&victim().digest()),
    ];
    for file in files {
        story(|store| {
            let path = file(store);
            fs::remove_file(&path).unwrap();
            fs::create_dir(&path).unwrap();
            vec![path.parent().unwrap().strip_prefix(store.path(".")).unwrap().to_str().unwrap().to_string()]
        });
    }
}

#[test]
fn special_files_are_not_opened() {
    // Opening a FIFO waits for a writer: for ever.
    for path_of in [(|store| store.tag_link(DAMAGED, "1")) as fn(&Store) -> PathBuf, |store| {
        store.blob(&victim().digest())
    }] {
        story(|store| {
            let path = path_of(store);
            fs::remove_file(&path).unwrap();
            clean("mkfifo").arg(&path).outcome().exits(0);
            vec![path.strip_prefix(store.path(".")).unwrap().to_str().unwrap().to_string()]
        });
    }
}

/// regfs as somebody who is not root, from a place that everybody can reach.
fn as_nobody(bin: &Path, arguments: &[&OsStr]) -> Command {
    let copy = bin.join("regfs");
    if !copy.exists() {
        fs::copy(env!("CARGO_BIN_EXE_regfs"), &copy).unwrap();
    }
    let mut command = clean(copy);
    command.args(arguments);
    if is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

#[test]
fn what_cannot_be_read_ends_the_run_before_the_first_change() {
    let bin = scratch();
    let victims: [fn(&Store) -> PathBuf; 7] = [
        |store| store.path("repositories"),
        |store| store.repository(DAMAGED, ""),
        |store| store.repository(DAMAGED, "_manifests/revisions/sha256"),
        |store| store.repository(DAMAGED, "_manifests/tags/1"),
        |store| store.tag_link(DAMAGED, "1"),
        |store| store.revision_link(DAMAGED, &victim().digest()),
        |store| store.blob(&victim().digest()),
    ];
    for path_of in victims {
        let store = healthy();
        if is_root() {
            chown_all(store.root(), NOBODY, NOBODY);
        }
        let path = path_of(&store);
        let mode = fs::metadata(&path).unwrap().permissions();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
        let name = path.strip_prefix(store.path(".")).unwrap().to_str().unwrap().to_string();
        let run = |arguments: &[&str]| {
            let words = [&["gc"][..], arguments].concat();
            let mut words: Vec<&OsStr> = words.into_iter().map(OsStr::new).collect();
            words.push(store.root().as_os_str());
            as_nobody(bin.path(), &words).outcome().exits(1).says(name.trim_end_matches('/'))
        };
        run(&["--dry-run"]);
        run(&["--untagged", "--grace", "0", "--now", "--registry-stopped", "--force"]);
        fs::set_permissions(&path, mode).unwrap();
        assert!(store.blob(&sha256(b"garbage")).exists(), "{name}: nothing may be swept");
        Live::of_repository(store.root(), DAMAGED).assert_complete();
    }
}

#[test]
fn what_cannot_be_moved_is_reported_and_the_rest_goes() {
    let bin = scratch();
    let store = healthy();
    let stuck = store.put_blob(b"stuck garbage");
    if is_root() {
        chown_all(store.root(), NOBODY, NOBODY);
    }
    let dirs: Vec<PathBuf> = store.blob(&stuck).ancestors().skip(1).take(2).map(Path::to_path_buf).collect();
    dirs.iter().for_each(|dir| fs::set_permissions(dir, fs::Permissions::from_mode(0o555)).unwrap());
    let words = [OsStr::new("gc"), store.root().as_os_str()].into_iter();
    let words: Vec<&OsStr> =
        words.chain(["--grace", "0", "--registry-stopped", "--force"].map(OsStr::new)).collect();
    let outcome = as_nobody(bin.path(), &words).outcome();
    dirs.iter().for_each(|dir| fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap());
    let outcome = outcome.exits(3);
    let told = format!("{}{}", outcome.stdout, outcome.stderr);
    assert!(told.contains(hex(&stuck)), "the failure is named: {outcome}");
    assert!(store.blob(&stuck).exists());
    assert!(!store.blob(&sha256(b"garbage")).exists(), "the rest goes: {outcome}");
}

#[test]
fn a_damaged_trash_does_not_stop_anything() {
    let store = healthy();
    put(&store.path(".regfs/trash/nonsense/txn.json"), b"{ no json");
    put(&store.path(".regfs/trash/plain"), b"no directory");
    fs::create_dir_all(store.path(".regfs/trash/empty")).unwrap();
    let listed = common::run::regfs(["trash"]).arg(store.root()).args(["list"]).outcome();
    listed.exits_one_of(&[0, 3]);
    shown(&store, &[]);
    gc_outcome(store.root(), &["--grace", "0"]).exits_one_of(&[0, 3]);
    assert!(!store.blob(&sha256(b"garbage")).exists());
    assert!(
        names(&store.path(".regfs/trash")).contains(&"nonsense".to_string()),
        "nobody's things are not removed"
    );
}

#[test]
fn an_empty_registry_is_no_damage() {
    let store = Store::new();
    let report = common::gc::gc(store.root(), &["--untagged", "--grace", "0", "--now"]);
    assert!(report.taken.is_empty() && report.problems.is_empty(), "{report:?}");
    if have(&["fuse"]) {
        let mount = Mount::of(store.root());
        for empty in ["images", "manifests/sha256", "reachability/broken", "trash"] {
            assert_eq!(mount.list(empty), [""; 0], "{empty}");
        }
        mount.order("gc", "dry-run");
    }
}

#[test]
fn a_registry_that_only_has_its_directory_is_empty() {
    let dir = scratch();
    fs::create_dir_all(dir.path().join("docker/registry/v2")).unwrap();
    let report = common::gc::gc(dir.path(), &["--dry-run"]);
    assert!(report.taken.is_empty(), "{report:?}");
}
