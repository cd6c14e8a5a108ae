//! Mounting as administrators do it: mount(8), fstab, systemd's protocol, a new version over the old one, a busy umount.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;
#[path = "mounting/freshness.rs"]
mod freshness;
#[path = "mounting/guard.rs"]
mod guard;
#[path = "mounting/umount.rs"]
mod umount;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::image::{Image, layer};
use common::mount::{Mount, is_mounted};
use common::run::{Bounded, Outcome, clean, regfs, sh};
use common::store::Store;
use common::{NOBODY, chown_all, have, scratch, wait_for};
use rustix::process::{Pid, Signal, kill_process};

const REGFS: &str = env!("CARGO_BIN_EXE_regfs");
const LIMIT: Duration = Duration::from_secs(30);

fn store() -> Store {
    let store = Store::new();
    store.push("app", Some("1"), &Image::oci("app", &[layer("app", "1")]));
    store
}

/// What a script says first that has a mount namespace of its own: others could not end the mounts that it has by that.
fn leave_others_alone(but: &str) -> String {
    format!(
        "awk '$3 == \"fuse.regfs\" && $2 != \"{but}\" {{ print $2 }}' /proc/self/mounts | xargs -r -n 1 umount -l"
    )
}

/// Runs a script in a mount namespace of its own, with regfs installed as mount(8) looks for it; all mounts end with
/// it. `$STORE` and `$POINT` are set.
fn with_mount_helper(store: &Store, script: &str) -> Outcome {
    let dir = scratch();
    for name in ["layer", "point"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    let prepared = format!(
        "{others}; set -e; layer={dir}/layer; POINT={dir}/point; STORE={store}
         mount -t tmpfs none $layer; mkdir $layer/upper $layer/work
         mount -t overlay -o lowerdir=/usr/sbin,upperdir=$layer/upper,workdir=$layer/work none /usr/sbin
         ln -s {REGFS} /usr/sbin/mount.regfs; ln -s {REGFS} /usr/sbin/regfs
         {script}",
        others = leave_others_alone("none"),
        dir = dir.path().display(),
        store = store.root().display(),
    );
    clean("unshare").args(["--mount", "sh", "-c", &prepared]).outcome()
}

#[test]
fn mount_8_mounts_by_type() {
    if !have(&["fuse", "root", "unshare", "mount"]) {
        return;
    }
    let script = "for type in regfs fuse.regfs; do
            mount -t $type $STORE $POINT -o ro,allow_other,nofail,_netdev,noauto,user,x-systemd.automount,grace=2h
            grep \" $POINT \" /proc/self/mounts
            ls $POINT/images
            if touch $POINT/new 2> /dev/null; then exit 9; fi
            umount $POINT
        done";
    let outcome = with_mount_helper(&store(), script).exits(0);
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    assert_eq!(lines.len(), 4, "{outcome}");
    for mounted in [lines[0], lines[2]] {
        assert!(mounted.contains(" fuse.regfs ro,") && mounted.contains(",allow_other"), "{outcome}");
    }
    assert_eq!((lines[1], lines[3]), ("app", "app"), "{outcome}");
}

#[test]
fn a_line_of_fstab_is_mounted_once() {
    if !have(&["fuse", "root", "unshare", "mount"]) {
        return;
    }
    let script = "echo \"$STORE $POINT fuse.regfs ro,nofail,_netdev 0 0\" > $layer/fstab
        mount -T $layer/fstab -a; mount -T $layer/fstab -a
        grep -c \" $POINT \" /proc/self/mounts; umount $POINT";
    let outcome = with_mount_helper(&store(), script).exits(0);
    assert_eq!(outcome.stdout, "1\n", "{outcome}");
}

#[test]
fn mount_8_is_told_what_is_wrong() {
    if !have(&["fuse", "root", "unshare", "mount"]) {
        return;
    }
    let store = store();
    for (command, said) in [
        ("mount -t regfs $STORE $POINT -o frobnicate", "there are ro, rw, allow_other"),
        ("mount -t regfs $STORE/nothing $POINT", "does not exist"),
        ("mount -t regfs $STORE $POINT; mount -o remount,ro $POINT", "can't be remounted"),
    ] {
        let outcome = with_mount_helper(&store, command);
        assert!(outcome.code != Some(0) && outcome.stderr.contains(said), "{command}: {outcome}");
    }
    let fake = "mount -f -t regfs $STORE $POINT; mount -s -t regfs $STORE $POINT -o frobnicate
        grep -c \" $POINT \" /proc/self/mounts; umount $POINT";
    assert_eq!(with_mount_helper(&store, fake).exits(0).stdout, "1\n");
}

#[test]
fn options_are_those_of_the_command_line() {
    if !have(&["fuse"]) {
        return;
    }
    let store = store();
    let dir = scratch();
    let log = dir.path().join("log");
    let mount = Mount::with(store.root(), &["-o", &format!("ro,log_file={}", log.display())]);
    common::errno(fs::create_dir(mount.path("images/new")));
    let logged = fs::read_to_string(&log).unwrap();
    assert!(logged.contains("mounted ") && logged.contains("looked at 1 repositor"), "{logged}");
    mount.unmount();
}

#[test]
fn a_new_mount_takes_over_without_a_gap() {
    if !have(&["fuse", "root"]) {
        return;
    }
    let store = store();
    let mount = Mount::of(store.root());
    let refused = mount.start(store.root(), &[]).exits(1);
    assert!(refused.stderr.contains("--replace"), "{refused}");

    let old = mount.pid();
    let mut open = File::open(mount.path("README")).unwrap();
    let (done, looks) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                fs::metadata(mount.path("README")).expect("the mount is always there");
                looks.fetch_add(1, Ordering::Relaxed);
            }
        });
        for _ in 0..3 {
            let before = looks.load(Ordering::Relaxed);
            mount.start(store.root(), &["--replace"]).exits(0);
            wait_for("a look", LIMIT, || {
                (looks.load(Ordering::Relaxed) > before || watching.is_finished()).then_some(())
            });
        }
        done.store(true, Ordering::Relaxed);
    });
    let new = mount.pid();
    assert_ne!(old, new);
    // Who is inside the old one stays there.
    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    assert!(text.contains("registry"), "{text}");
    // Told to end, the old one leaves the new one alone.
    kill_process(old, Signal::TERM).unwrap();
    drop(open);
    wait_for("the old daemon to end", LIMIT, || (!is_alive(old)).then_some(()));
    assert_eq!((mount.list("images"), mount.pid()), (vec!["app".to_string()], new));
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let ours = format!(" {} ", mount.point().display());
    assert_eq!(mounts.lines().filter(|line| line.contains(&ours)).count(), 1, "{mounts}");
    mount.unmount();
}

#[test]
fn a_new_mount_takes_over_where_mounts_spread() {
    if !have(&["fuse", "root", "unshare"]) {
        return;
    }
    let store = store();
    let dir = scratch();
    let script = format!(
        "set -e; {REGFS} mount {store} {point}; {REGFS} mount --replace {store} {point}; ls {point}/images
         grep -c ' {point} ' /proc/self/mounts; {REGFS} umount {point}",
        store = store.root().display(),
        point = dir.path().display(),
    );
    let unshared = ["--mount", "--propagation", "shared", "sh", "-c", &script];
    assert_eq!(clean("unshare").args(unshared).outcome().exits(0).stdout, "app\n1\n");
}

#[test]
fn a_busy_umount_names_who_is_inside() {
    if !have(&["fuse"]) {
        return;
    }
    let store = store();
    let mount = Mount::of(store.root());
    let mut inside = Command::new("sleep")
        .arg("1000")
        .current_dir(mount.path("images"))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let open = File::open(mount.path("README")).unwrap();
    let refused = regfs(["umount"]).arg(mount.point()).outcome().exits(1);
    inside.kill().unwrap();
    inside.wait().unwrap();
    let point = mount.point().display();
    let sleeper = format!("sleep (process {}) is in {point}/images\n", inside.id());
    let ourselves = format!("(process {}) has {point}/README open\n", std::process::id());
    assert!(refused.stderr.contains(&sleeper) && refused.stderr.contains(&ourselves), "{refused}");
    let advice = format!("regfs umount --lazy {point}");
    assert!(refused.stderr.contains(&advice), "{refused}");
    assert!(is_mounted(mount.point()));
    drop(open);
    mount.unmount();
}

#[test]
fn systemd_is_told_when_the_mount_stands_and_when_it_goes() {
    if !have(&["fuse"]) {
        return;
    }
    let store = store();
    let dir = scratch();
    let (socket, point) = (dir.path().join("notify"), dir.path().join("point"));
    fs::create_dir(&point).unwrap();
    let manager = UnixDatagram::bind(&socket).unwrap();
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    let mut command = clean(REGFS);
    command.args(["mount", "--foreground"]).arg(store.root()).arg(&point);
    let mut daemon = command.env("NOTIFY_SOCKET", &socket).stdin(Stdio::null()).spawn().unwrap();
    let mut next = || {
        let mut said = [0; 200];
        let length = manager.recv(&mut said).expect("a notification");
        String::from_utf8_lossy(&said[..length]).trim().to_string()
    };
    let ready = std::panic::catch_unwind(std::panic::AssertUnwindSafe(&mut next));
    let stood = is_mounted(&point);
    kill_process(Pid::from_child(&daemon), Signal::TERM).unwrap();
    let stopping = std::panic::catch_unwind(std::panic::AssertUnwindSafe(next));
    let ended = wait_for("the daemon to end", LIMIT, || daemon.try_wait().unwrap());
    assert_eq!((ready.unwrap().as_str(), stood, stopping.unwrap().as_str()), ("READY=1", true, "STOPPING=1"));
    assert!(ended.success() && !is_mounted(&point));
}

#[test]
fn what_a_mount_hides_is_said() {
    if !have(&["fuse"]) {
        return;
    }
    let store = store();
    let mount = Mount::of(store.root());
    regfs(["umount"]).arg(mount.point()).outcome().exits(0);
    fs::write(mount.path("precious"), "").unwrap();
    let said = mount.start(store.root(), &[]).exits(0);
    assert!(said.stderr.contains("is not empty"), "{said}");
    regfs(["umount"]).arg(mount.point()).outcome().exits(0);
    fs::remove_file(mount.path("precious")).unwrap();
}

#[test]
fn others_are_let_in_only_where_fuse_conf_allows_it() {
    let conf = fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    if !have(&["fuse", "root", "fusermount3"]) || conf.lines().any(|line| line.trim() == "user_allow_other") {
        return;
    }
    let store = store();
    chown_all(store.root(), NOBODY, NOBODY);
    let dir = scratch();
    std::os::unix::fs::chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let script = format!(
        "exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups {REGFS} mount --allow-other {} {}",
        store.root().display(),
        dir.path().display()
    );
    let refused = sh(Path::new("/"), &script).outcome().exits(1);
    assert!(refused.stderr.contains("user_allow_other") && !is_mounted(dir.path()), "{refused}");
}

/// Whether a process exists and is no zombie.
fn is_alive(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    stat.is_ok_and(|stat| !stat.rsplit(')').next().unwrap().trim_start().starts_with('Z'))
}
