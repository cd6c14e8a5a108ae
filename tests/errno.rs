//! What each operation answers on each kind of node: the table that docs/errno.md shows, tried on a real mount.
//!
//! `REGFS_WRITE_DOCS=1 cargo test --test errno` writes that file anew.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{self as sys, AtFlags, CWD, Mode, OFlags, RenameFlags, Timestamps, XattrFlags};
use rustix::io::Errno;

use common::mount::Mount;
use common::run::{Bounded, regfs};
use common::{NOBODY, have, scratch};

/// The kinds of nodes: what the table calls each, and one of it in the sample store. `*` is the first name there.
const KINDS: [(&str, &str); 10] = [
    ("`images`", "images"),
    ("repository", "images/alpine"),
    ("`_tags`", "images/alpine/_tags"),
    ("tag", "images/alpine/_tags/3.19"),
    ("manifest", "images/alpine/_manifests/sha256/*"),
    ("upload", "images/library/redis/_uploads/*"),
    ("image", "manifests/sha256/*"),
    ("blob", "blobs/sha256/*/*"),
    ("text", "reachability/summary"),
    ("`control/gc`", "control/gc"),
];

/// What is done to a node.
struct Operation {
    title: &'static str,
    /// Whether it changes something where it works.
    changes: bool,
    /// What it answers to the owner of the mount, for each kind in the order of [`KINDS`].
    answers: &'static str,
    run: fn(&Path, &Path) -> Result<(), Errno>,
}

const READS: bool = false;
const CHANGES: bool = true;
const ANY: Mode = Mode::RUSR.union(Mode::WUSR);

fn open(path: &Path, flags: OFlags) -> Result<(), Errno> {
    sys::open(path, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, ANY).map(drop)
}

fn operation(
    title: &'static str,
    changes: bool,
    answers: &'static str,
    run: fn(&Path, &Path) -> Result<(), Errno>,
) -> Operation {
    Operation { title, changes, answers, run }
}

/// The table. What is run gets the node and the mountpoint.
fn operations() -> Vec<Operation> {
    vec![
        operation("stat, statfs", READS, "ok ok ok ok ok ok ok ok ok ok", |path, _| {
            sys::lstat(path)?;
            sys::statfs(path).map(drop).or_else(|e| if path.is_symlink() { Ok(()) } else { Err(e) })
        }),
        operation("open and read", READS, "EISDIR EISDIR EISDIR ELOOP ok ok EISDIR ok ok ok", |path, _| {
            let file = sys::open(path, OFlags::RDONLY | OFlags::NOFOLLOW, ANY)?;
            rustix::io::read(&file, &mut [0; 16]).map(drop)
        }),
        operation(
            "list a directory",
            READS,
            "ok ok ok ENOTDIR ENOTDIR ENOTDIR ok ENOTDIR ENOTDIR ENOTDIR",
            |path, _| {
                let directory = sys::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW, ANY)?;
                sys::Dir::read_from(directory)?.try_for_each(|entry| entry.map(drop))
            },
        ),
        operation(
            "read a link",
            READS,
            "EINVAL EINVAL EINVAL ok EINVAL EINVAL EINVAL EINVAL EINVAL EINVAL",
            |path, _| sys::readlink(path, Vec::new()).map(drop),
        ),
        operation(
            "look for a name that is not there",
            READS,
            "ENOENT ENOENT ENOENT ENOENT ENOTDIR ENOTDIR ENOENT ENOTDIR ENOTDIR ENOTDIR",
            |path, _| sys::lstat(path.join("nothing")).map(drop),
        ),
        operation(
            "look for a name that is too long",
            READS,
            "ENAMETOOLONG ENAMETOOLONG ENAMETOOLONG ENAMETOOLONG ENOTDIR ENOTDIR ENAMETOOLONG ENOTDIR ENOTDIR ENOTDIR",
            |path, _| sys::lstat(path.join("x".repeat(256))).map(drop),
        ),
        operation(
            "list, get xattr",
            READS,
            "EOPNOTSUPP EOPNOTSUPP EOPNOTSUPP EOPNOTSUPP EOPNOTSUPP EOPNOTSUPP EOPNOTSUPP EOPNOTSUPP EOPNOTSUPP EOPNOTSUPP",
            |path, _| {
                sys::llistxattr(path, &mut [0_u8; 16])?;
                sys::lgetxattr(path, "user.x", &mut [0_u8; 16]).map(drop)
            },
        ),
        operation(
            "set, remove xattr",
            CHANGES,
            "EOPNOTSUPP EOPNOTSUPP EOPNOTSUPP EOPNOTSUPP EOPNOTSUPP EOPNOTSUPP EOPNOTSUPP EOPNOTSUPP EOPNOTSUPP EOPNOTSUPP",
            |path, _| {
                sys::lsetxattr(path, "trusted.x", b"x", XattrFlags::empty())
                    .and_then(|()| sys::lremovexattr(path, "trusted.x"))
            },
        ),
        operation(
            "open for writing",
            CHANGES,
            "EISDIR EISDIR EISDIR ELOOP EROFS EROFS EISDIR EROFS EROFS ok",
            |path, _| open(path, OFlags::WRONLY),
        ),
        operation(
            "`> file` (open with O_TRUNC)",
            CHANGES,
            "EISDIR EISDIR EISDIR ELOOP EROFS EROFS EISDIR EROFS EROFS ok",
            |path, _| open(path, OFlags::WRONLY | OFlags::TRUNC),
        ),
        operation(
            "`>> file` (open with O_APPEND)",
            CHANGES,
            "EISDIR EISDIR EISDIR ELOOP EROFS EROFS EISDIR EROFS EROFS ok",
            |path, _| open(path, OFlags::WRONLY | OFlags::APPEND),
        ),
        operation(
            "chmod",
            CHANGES,
            "EROFS EROFS EROFS EROFS EROFS EROFS EROFS EROFS EROFS EROFS",
            |path, _| sys::chmodat(CWD, path, Mode::from(0o640), AtFlags::empty()),
        ),
        operation(
            "chown to the owner it has",
            CHANGES,
            "ok ok ok ok EROFS EROFS EROFS EROFS EROFS ok",
            |path, _| {
                let stat = sys::lstat(path)?;
                let (uid, gid) = (sys::Uid::from_raw(stat.st_uid), sys::Gid::from_raw(stat.st_gid));
                sys::chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            },
        ),
        operation(
            "chown to another one",
            CHANGES,
            "EROFS EROFS EROFS EROFS EROFS EROFS EROFS EROFS EROFS EROFS",
            |path, _| {
                sys::chownat(CWD, path, Some(sys::Uid::from_raw(4242)), None, AtFlags::SYMLINK_NOFOLLOW)
            },
        ),
        operation("touch", CHANGES, "ok ok ok ok EROFS EROFS EROFS EROFS EROFS ok", |path, _| {
            let now = rustix::fs::Timespec { tv_sec: 1, tv_nsec: 0 };
            let times = Timestamps { last_access: now, last_modification: now };
            sys::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
        }),
        operation(
            "hard link to it",
            CHANGES,
            "EPERM EPERM EPERM EROFS EROFS EROFS EPERM EROFS EROFS EROFS",
            |path, _| sys::linkat(CWD, path, CWD, path.with_file_name("new"), AtFlags::empty()),
        ),
        operation(
            "rename in its directory",
            CHANGES,
            "EROFS ok EROFS ok EROFS EROFS EROFS EROFS EROFS EROFS",
            |path, _| sys::rename(path, path.with_file_name("new")),
        ),
        operation(
            "rename to another directory",
            CHANGES,
            "EINVAL EROFS EROFS ok EROFS EROFS EROFS EROFS EROFS EROFS",
            |path, mount| sys::rename(path, mount.join("images/library/nginx/_tags/new")),
        ),
        operation(
            "rename out of the mount",
            CHANGES,
            "EXDEV EXDEV EXDEV EXDEV EXDEV EXDEV EXDEV EXDEV EXDEV EXDEV",
            |path, _| sys::rename(path, std::env::temp_dir().join("regfs-new")),
        ),
        operation(
            "exchange with a tag",
            CHANGES,
            "EINVAL EINVAL EINVAL EINVAL EINVAL EINVAL EINVAL EINVAL EINVAL EINVAL",
            |path, mount| {
                let tag = mount.join("images/alpine/_tags/3.20");
                sys::renameat_with(CWD, path, CWD, tag, RenameFlags::EXCHANGE)
            },
        ),
        operation(
            "unlink",
            CHANGES,
            "EISDIR EISDIR EISDIR ok EBUSY ok EISDIR EPERM EROFS EPERM",
            |path, _| sys::unlink(path),
        ),
        operation(
            "rmdir",
            CHANGES,
            "EPERM ENOTEMPTY ENOTEMPTY ENOTDIR ENOTDIR ENOTDIR EROFS ENOTDIR ENOTDIR ENOTDIR",
            |path, _| sys::rmdir(path),
        ),
        operation(
            "make a file in it",
            CHANGES,
            "EROFS EROFS EROFS EROFS ENOTDIR ENOTDIR EROFS ENOTDIR ENOTDIR ENOTDIR",
            |path, _| open(&path.join("new"), OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL),
        ),
        operation(
            "make a directory in it",
            CHANGES,
            "ok ok EROFS EROFS ENOTDIR ENOTDIR EROFS ENOTDIR ENOTDIR ENOTDIR",
            |path, _| sys::mkdir(path.join("new"), Mode::RWXU),
        ),
        operation(
            "make a pipe in it",
            CHANGES,
            "EROFS EROFS EROFS EROFS ENOTDIR ENOTDIR EROFS ENOTDIR ENOTDIR ENOTDIR",
            |path, _| sys::mknodat(CWD, path.join("new"), sys::FileType::Fifo, ANY, 0),
        ),
        operation(
            "make a symlink to anything in it",
            CHANGES,
            "EROFS EROFS ENOENT EROFS ENOTDIR ENOTDIR EROFS ENOTDIR ENOTDIR ENOTDIR",
            |path, _| sys::symlink("anything", path.join("new")),
        ),
        operation(
            "make a symlink to a manifest in it",
            CHANGES,
            "EROFS EROFS ok EROFS ENOTDIR ENOTDIR EROFS ENOTDIR ENOTDIR ENOTDIR",
            |path, mount| {
                let manifest = first(&mount.join("images/alpine/_manifests/sha256/*"));
                sys::symlink(manifest, path.join("new"))
            },
        ),
    ]
}

/// The path in which each `*` is the first name there.
fn first(path: &Path) -> PathBuf {
    path.components().fold(PathBuf::new(), |at, part| match part.as_os_str() == "*" {
        true => at.join(common::names(&at).first().expect("a name")),
        false => at.join(part),
    })
}

type Mounted = (tempfile::TempDir, Mount);

/// The sample, mounted.
fn sample(arguments: &[&str]) -> Mounted {
    let dir = scratch();
    let store = dir.path().join("store");
    regfs(["sample"]).arg(&store).outcome().exits(0);
    let mount = Mount::with(&store, arguments);
    (dir, mount)
}

/// Runs an operation on each kind of node, each time on the sample as it was made.
fn tried(mounted: &mut Option<Mounted>, arguments: &[&str], operation: &Operation) -> Vec<String> {
    let mut answers = Vec::new();
    for (_, path) in KINDS {
        let (_, mount) = mounted.get_or_insert_with(|| sample(arguments));
        let answer = (operation.run)(&first(&mount.path(path)), mount.point());
        answers.push(answer.map_or_else(name_of, |()| "ok".to_string()));
        if operation.changes && answer.is_ok() {
            *mounted = None;
        }
    }
    answers
}

fn name_of(errno: Errno) -> String {
    let names = [
        (Errno::PERM, "EPERM"),
        (Errno::NOENT, "ENOENT"),
        (Errno::ACCESS, "EACCES"),
        (Errno::BUSY, "EBUSY"),
        (Errno::EXIST, "EEXIST"),
        (Errno::XDEV, "EXDEV"),
        (Errno::NOTDIR, "ENOTDIR"),
        (Errno::ISDIR, "EISDIR"),
        (Errno::INVAL, "EINVAL"),
        (Errno::ROFS, "EROFS"),
        (Errno::NAMETOOLONG, "ENAMETOOLONG"),
        (Errno::NOTEMPTY, "ENOTEMPTY"),
        (Errno::LOOP, "ELOOP"),
        (Errno::OPNOTSUPP, "EOPNOTSUPP"),
        (Errno::NODATA, "ENODATA"),
        (Errno::NOSYS, "ENOSYS"),
        (Errno::IO, "EIO"),
        (Errno::AGAIN, "EAGAIN"),
    ];
    let name = names.iter().find(|(number, _)| *number == errno);
    name.map_or_else(|| errno.to_string(), |(_, name)| name.to_string())
}

/// Runs the whole table; `is_right` judges each answer beside the one that the owner gets.
#[track_caller]
fn assert_table(arguments: &[&str], uid: Option<u32>, is_right: fn(&Operation, usize, &str, &str) -> bool) {
    let (mut mounted, mut wrong) = (None, Vec::new());
    for operation in operations() {
        let answers = match uid {
            None => tried(&mut mounted, arguments, &operation),
            Some(uid) => {
                // Mounted by us; the thread below becomes another user for good.
                mounted.get_or_insert_with(|| sample(arguments));
                let become_and_try = || {
                    let id = rustix::process::Uid::from_raw(uid);
                    rustix::thread::set_thread_res_uid(id, id, id).expect("become another user");
                    tried(&mut mounted, arguments, &operation)
                };
                std::thread::scope(|scope| scope.spawn(become_and_try).join().expect("try as another user"))
            }
        };
        for (at, (answer, expected)) in answers.iter().zip(operation.answers.split(' ')).enumerate() {
            if !is_right(&operation, at, answer, expected) {
                wrong.push(format!(
                    "{} of {}: {answer}; the owner gets {expected}",
                    operation.title, KINDS[at].0
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_owner_gets_what_the_table_says() {
    if have(&["fuse"]) {
        assert_table(&[], None, |_, _, answer, expected| answer == expected);
    }
}

#[test]
fn a_read_only_mount_says_so_wherever_the_operation_makes_sense() {
    if have(&["fuse"]) {
        assert_table(&["--read-only"], None, |operation, _, answer, expected| match operation.changes {
            true => answer == "EROFS" || answer == expected && answer != "ok",
            false => answer == expected,
        });
    }
}

#[test]
fn another_user_may_look_but_neither_change_nor_command() {
    if have(&["fuse", "root"]) {
        assert_table(&["--allow-other"], Some(NOBODY), |operation, at, answer, expected| {
            let is_control = KINDS[at].1.starts_with("control/");
            match (operation.changes, is_control) {
                (true, _) => ["EACCES", "EPERM"].contains(&answer) || answer == expected && answer != "ok",
                (false, true) => answer == "EACCES" || answer == expected,
                (false, false) => answer == expected,
            }
        });
    }
}

/// What docs/errno.md says besides the table.
const INTRODUCTION: &str = "# What each operation answers

Each cell is what the owner of the mount gets; `tests/errno.rs` tries them all on a real mount, and writes this file
(`REGFS_WRITE_DOCS=1 cargo test --test errno`). A *text* is any generated file, an *image* a directory below
`manifests/sha256/`.

- A read-only mount answers `EROFS` to each change that the table allows. Another user (`--allow-other`) gets `EACCES` or
  `EPERM` there. Such a user may read `control/status` and `control/log`, and gets `EACCES` for the other files of `control/`.
- `EROFS` stands for what can never be changed here. Inside the mount there is no `EXDEV`, after which `mv` would copy
  and then delete. Out of the mount there is: `mv` copies what it was given (the symlink of a tag, or the one file of a
  manifest, not the image), and removes it here as `rm` does, into the trash.
- `EPERM`, where removing means nothing: a sweep takes blobs, not `rm`; control files stay.
- `EBUSY`: an index that stays holds the manifest (remove the index's tag first), another regfs is changing the store,
  an upload is younger than the grace period, or a sweep is wanted of a mount that was unmounted while somebody is inside.
- `EAGAIN`: a push moved the tag at the same moment. Nothing was changed; look again.
- `EAGAIN` of a write to `control/gc` or `control/trash`: the sweep was held back (by a registry, or because a rule would remove
  most manifests), or a purge left something of what was asked for. `EIO`: the run, or an undo with conflicts, did part of
  what was asked for. The file says why.
- `EPERM` of `rm`, `ln -s`, `mv`, `mkdir`, or a sweep `untagged` or `referrers=orphans`: a GitLab registry or a Harbor keeps the
  tags in its database. GitLab's makes it that of every sweep and purge, too. `control/log` says what to do instead.
- `ENOENT` for a symlink that names a tag or an image that is not there, `EINVAL` for one that can name none. `EINVAL` of `mv` and
  `mkdir`: no name for a repository (`mv` then speaks of a subdirectory of itself); `control/log` has the reason. `ENOTEMPTY` and
  `EBUSY` of `mv`: there is a repository of that name, or a push in progress. `EINVAL` of a write to a
  control file: not understood; the file then reads as the grammar.
- `EOPNOTSUPP` for extended attributes: there are none, and `ls`, `cp -a` and `rsync -X` stay silent about it.
- `ok` of `chown` and `touch` means that nothing happened. `cp -a` and `rsync` set owner, mode and times of what they made: owner
  and mode are those it has already, and tags and their directories keep the times of pushes.
- `ok` of `mkdir` is a repository to be: an empty directory in the store, which stays until `rmdir` or a sweep takes it.
";

#[test]
fn the_documentation_shows_the_table() {
    let heads: String = KINDS.iter().map(|(title, _)| format!(" {title} |")).collect();
    let mut text = format!("{INTRODUCTION}\n| |{heads}\n|---|{}\n", "---|".repeat(KINDS.len()));
    for operation in operations() {
        let answers = operation.answers.replace(' ', " | ");
        text += &format!("| {} | {answers} |\n", operation.title);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/errno.md");
    if std::env::var_os("REGFS_WRITE_DOCS").is_some() {
        fs::write(&path, &text).unwrap();
    }
    assert!(
        fs::read_to_string(&path).unwrap_or_default() == text,
        "docs/errno.md is not what tests/errno.rs says; write it anew with REGFS_WRITE_DOCS=1"
    );
}
