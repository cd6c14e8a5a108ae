//! `regfs umount`, and what becomes of a daemon whose mount has lost its name.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::common::mount::{Mount, is_mounted};
use super::common::run::{Bounded, Outcome, clean, regfs, sh};
use super::common::store::Store;
use super::common::{have, wait_for};
use super::{LIMIT, is_alive, leave_others_alone, store};

/// A process that is ended with the test.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process in a mount namespace of its own, which has a mount of its own of `mount`; not of those of other tests.
fn container(mount: &Mount) -> Ends {
    let script =
        format!("{}; echo; exec sleep 1000", leave_others_alone(&mount.point().display().to_string()));
    let mut command = clean("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    // It says so when it has them.
    let mut said = [0];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut said).unwrap();
    Ends(child)
}

fn umount(mount: &Mount, arguments: &[&str]) -> Outcome {
    regfs(["umount"]).args(arguments).arg(mount.point()).outcome()
}

fn ends(daemon: Pid) {
    wait_for("the daemon to end", LIMIT, || (!is_alive(daemon)).then_some(()));
}

/// How many sweeps the daemon has ended, by its log.
fn sweeps(store: &Store) -> usize {
    let log = fs::read_to_string(store.root().join("log")).unwrap();
    log.lines().filter(|line| line.contains("] sweep ")).count()
}

/// Mounts with sweeps that begin at once and take all, and waits for the first one.
fn sweeping(store: &Store) -> Mount {
    let [config, log] = ["config.yml", "log"].map(|name| store.root().join(name));
    let text =
        format!("version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n", store.root().display());
    fs::write(&config, text).unwrap();
    store.put_blob(b"garbage from the start");
    let words = ["--grace", "0", "--drain", "1s", "--sweep-every", "1s", "--log-file"];
    let mount = Mount::with(&config, &[&words[..], &[log.to_str().unwrap()]].concat());
    wait_for("a sweep", LIMIT, || (sweeps(store) > 0).then_some(()));
    mount
}

/// Waits for as long as two sweeps would take to begin, after the one that was under way.
fn nothing_is_swept(store: &Store) {
    std::thread::sleep(Duration::from_secs(1));
    let before = sweeps(store);
    let garbage = store.put_blob(b"nobody names this");
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(sweeps(store), before, "{:?}", fs::read_to_string(store.root().join("log")));
    assert!(store.blob(&garbage).exists());
}

fn retired(store: &Store) {
    let log = store.root().join("log");
    wait_for("the daemon to notice", LIMIT, || {
        fs::read_to_string(&log).unwrap().contains("sweeps no more").then_some(())
    });
}

#[test]
fn a_mount_that_a_container_holds_is_not_said_to_be_gone() {
    if !have(&["fuse", "root", "unshare", "nsenter"]) {
        return;
    }
    let store = store();
    let mount = sweeping(&store);
    let (daemon, holder) = (mount.pid(), container(&mount));
    let said = umount(&mount, &[]).exits(3);
    assert!(!is_mounted(mount.point()) && is_alive(daemon), "{said}");
    let point = mount.point().display();
    assert!(
        said.stderr.contains(&format!("(process {}) has it mounted on {point}", holder.0.id())),
        "{said}"
    );
    nothing_is_swept(&store);
    // What it says to do.
    let advice = said.stderr.split("unmount it there: ").nth(1).unwrap().lines().next().unwrap();
    sh(mount.point(), advice).outcome().exits(0);
    ends(daemon);
}

#[test]
fn another_place_of_the_same_mount_is_named() {
    if !have(&["fuse", "root"]) {
        return;
    }
    let store = store();
    let mount = Mount::of(store.root());
    let (daemon, copy) = (mount.pid(), super::common::scratch());
    sh(mount.point(), &format!("mount --bind . {0}; mount --make-private {0}", copy.path().display()))
        .outcome()
        .exits(0);
    let said = umount(&mount, &[]);
    let advice = format!("umount {}", copy.path().display());
    let ended = sh(copy.path().parent().unwrap(), &advice).outcome();
    assert!(said.code == Some(3) && said.stderr.contains(&advice), "{said}");
    ended.exits(0);
    ends(daemon);
}

#[test]
fn who_is_inside_keeps_a_daemon_that_sweeps_no_more() {
    if !have(&["fuse", "root"]) {
        return;
    }
    let ways: [fn(&Mount) -> Outcome; 3] = [
        |mount| umount(mount, &["--lazy"]),
        |mount| clean("umount").arg("-l").arg(mount.point()).outcome(),
        |mount| clean("fusermount3").args(["-u", "-z"]).arg(mount.point()).outcome(),
    ];
    for (at, way) in ways.iter().enumerate() {
        let store = store();
        let mount = sweeping(&store);
        let daemon = mount.pid();
        let mut open = File::open(mount.path("README")).unwrap();
        let shell = Command::new("sleep").arg("1000").current_dir(mount.path("control")).spawn();
        let shell = Ends(shell.unwrap());
        let said = way(&mount).exits(0);
        assert!(!is_mounted(mount.point()), "{said}");
        if at == 0 {
            for user in [shell.0.id(), std::process::id()] {
                assert!(said.stderr.contains(&format!("(process {user})")), "{said}");
            }
            assert!(said.stderr.contains("sweeps no more"), "{said}");
        }
        retired(&store);
        nothing_is_swept(&store);
        // Nor when somebody inside says so; looking is another thing.
        let inside = PathBuf::from(format!("/proc/{}/cwd", shell.0.id()));
        let refused = fs::write(inside.join("gc"), "sweep grace=0 registry-stopped force").unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EBUSY));
        fs::write(inside.join("gc"), "dry-run").unwrap();
        assert!(std::io::read_to_string(&mut open).unwrap().contains("registry"));
        drop((open, shell));
        ends(daemon);
    }
}

#[test]
fn the_one_that_was_replaced_sweeps_no_more() {
    if !have(&["fuse", "root"]) {
        return;
    }
    let store = store();
    let mount = sweeping(&store);
    let (old, open) = (mount.pid(), File::open(mount.path("README")).unwrap());
    mount.start(store.root(), &["--replace"]).exits(0);
    retired(&store);
    nothing_is_swept(&store);
    assert!(is_alive(old) && mount.pid() != old);
    drop(open);
    ends(old);
    mount.unmount();
}

#[test]
fn a_daemon_that_is_stopped_is_not_said_to_have_ended() {
    if !have(&["fuse", "root"]) {
        return;
    }
    let store = store();
    let mount = Mount::of(store.root());
    let daemon = mount.pid();
    kill_process(daemon, Signal::STOP).unwrap();
    let said = umount(&mount, &[]);
    kill_process(daemon, Signal::CONT).unwrap();
    let advice = format!("kill -CONT {}", daemon.as_raw_nonzero());
    assert!(said.code == Some(3) && said.stderr.contains(&advice), "{said}");
    ends(daemon);
}

#[test]
fn a_mount_that_was_moved_keeps_its_place() {
    if !have(&["fuse", "root", "unshare"]) {
        return;
    }
    let store = store();
    let dir = super::common::scratch();
    let script = format!(
        "{others}; set -e; cd {dir}; mkdir a b; {REGFS} mount --grace 0 --sweep-every 1h --log-file {dir}/log {store} {dir}/a
         mount --make-private {dir}/a; mount --move {dir}/a {dir}/b; sleep 0.5
         grep next_sweep {dir}/b/control/status; cat {dir}/log; {REGFS} umount {dir}/b",
        REGFS = super::REGFS,
        others = leave_others_alone("none"),
        store = store.root().display(),
        dir = dir.path().display(),
    );
    let said = clean("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .outcome()
        .exits(0);
    assert!(!said.stdout.contains("sweeps no more") && !said.stdout.contains("null"), "{said}");
}
