//! What can go wrong, in words for people and in an errno for the kernel.
//!
//! A message says what we were doing, to which path, why it failed, and the next step where there is one.

use crate::advice::Advice;
use crate::printable::Printable;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The result of everything that touches a store.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of regfs.
#[derive(Debug)]
pub enum Error {
    /// A system call failed. `doing` completes "could not …".
    Io {
        /// For example `read the tag link`.
        doing: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Something lies where something else belongs: a symlink, a file for a directory, a directory for a file.
    Misplaced {
        /// Where.
        path: PathBuf,
        /// What was found.
        found: Found,
    },
    /// A file is larger than anything valid in its place.
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// The limit in bytes.
        limit: usize,
    },
    /// Something stands where something else was to be put; nothing is ever replaced.
    Exists {
        /// Where.
        path: PathBuf,
    },
    /// No such name in the registry or in the trash.
    NotFound {
        /// What was asked for.
        what: String,
    },
    /// The thing changed between the decision and the act, or is in use.
    Busy {
        /// Why, with the next step.
        why: String,
    },
    /// What was asked for has changed meanwhile; asking again is right.
    Changed {
        /// What changed.
        what: String,
    },
    /// A directory is not empty of images.
    NotEmpty {
        /// Which.
        what: String,
    },
    /// A command or an argument was not understood, or is not valid for this store.
    Invalid {
        /// Why, and what is understood.
        why: String,
    },
    /// What could be done is done; some of it failed.
    Unfinished {
        /// Where it stands.
        see: &'static str,
    },
    /// Somebody else keeps what was to be changed.
    NotOurs {
        /// Who, what tells it, and where to change it instead.
        why: String,
    },
    /// Nothing was done, although there is something to do.
    HeldBack {
        /// Why, with the next step.
        why: String,
    },
    /// Removing this means nothing.
    NotPermitted {
        /// Why.
        why: &'static str,
    },
    /// The filesystem of a storage can't do what a change needs.
    Incapable {
        /// The registry directory.
        path: PathBuf,
        /// Why the last try failed.
        source: io::Error,
    },
    /// The store is mounted read-only, or is not ours to change.
    ReadOnly,
    /// The mark met what it can't judge; nothing was changed.
    Unjudged {
        /// A line per problem, each with its path.
        problems: Vec<String>,
    },
}

/// What lies where something else belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// A symlink, at the path or above it.
    Symlink,
    /// A file where a directory belongs, at the path or above it.
    File,
    /// A directory where a file belongs.
    Directory,
    /// A socket, a device, ….
    Other,
    /// A file of regfs that has another name as well.
    Linked,
    /// A file of regfs that somebody else wrote.
    Foreign,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Found::Symlink => "a symlink, or below one (never followed)",
            Found::File => "a plain file, or below one",
            Found::Directory => "a directory",
            Found::Other => "neither a file nor a directory",
            Found::Linked => "a file that has another name, too (a hard link): regfs did not make it",
            Found::Foreign => "a file of a user who neither owns the storage nor is this one",
        })
    }
}

impl Error {
    /// An [`Error::Invalid`] from anything that prints.
    pub fn invalid(why: impl fmt::Display) -> Error {
        Error::Invalid { why: why.to_string() }
    }

    /// Wraps an I/O error; `doing` completes "could not …".
    pub fn io(doing: &'static str, path: &Path, source: impl Into<io::Error>) -> Error {
        Error::Io { doing, path: path.to_path_buf(), source: source.into() }
    }

    /// Whether this is the state of a file (wrong kind, too large), not a failing call: trying again won't help.
    pub fn is_damage(&self) -> bool {
        matches!(self, Error::Misplaced { .. } | Error::TooLarge { .. })
    }

    /// Whether there is no space, or no inode, left.
    pub fn is_full(&self) -> bool {
        matches!(self.errno(), libc::ENOSPC | libc::EDQUOT)
    }

    /// What the kernel is told. No `_` arm: a new variant has to choose.
    pub fn errno(&self) -> i32 {
        match self {
            Error::Io { source, .. } => match source.raw_os_error() {
                // A name we listed whose file is gone is damage, not "no such name".
                Some(libc::ENOENT) | None => libc::EIO,
                Some(errno) => errno,
            },
            Error::Misplaced { .. } | Error::TooLarge { .. } => libc::EIO,
            Error::Exists { .. } => libc::EEXIST,
            Error::NotFound { .. } => libc::ENOENT,
            Error::Busy { .. } => libc::EBUSY,
            Error::Changed { .. } | Error::HeldBack { .. } => libc::EAGAIN,
            Error::NotEmpty { .. } => libc::ENOTEMPTY,
            Error::Invalid { .. } => libc::EINVAL,
            Error::NotPermitted { .. } | Error::NotOurs { .. } => libc::EPERM,
            Error::ReadOnly => libc::EROFS,
            Error::Incapable { .. } => libc::EOPNOTSUPP,
            Error::Unjudged { .. } | Error::Unfinished { .. } => libc::EIO,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Io { doing, path, source } => {
                write!(f, "could not {doing} {}: {source}", path.printable())?;
                match source.raw_os_error() {
                    Some(libc::EXDEV) => f.write_str(
                        " (blobs, repositories and .regfs must lie on one filesystem: things are taken out by rename)",
                    ),
                    Some(libc::EACCES) => f.write_str(" (run regfs as root or as the registry's user)"),
                    Some(libc::ENOSPC | libc::EDQUOT) => {
                        let purge = Advice::PurgeAll;
                        write!(
                            f,
                            " (the disk is full, of bytes or of inodes: {purge}  frees what is in the trash, else free \
                             some space; a sweep with {{+registry-stopped}} {{+now}} needs none)"
                        )
                    }
                    _ => Ok(()),
                }
            }
            Error::Misplaced { path, found } => write!(f, "{} is {found}", path.printable()),
            Error::TooLarge { path, limit } => write!(f, "{} is larger than {limit} bytes", path.printable()),
            Error::Exists { path } => write!(f, "{} exists already and is not replaced", path.printable()),
            Error::NotFound { what } => write!(f, "there is no {}", what.printable()),
            Error::Busy { why } | Error::Invalid { why } => f.write_str(why),
            Error::NotOurs { why } | Error::HeldBack { why } => f.write_str(why),
            Error::Changed { what } => {
                write!(f, "{} changed meanwhile; look again, then try again", what.printable())
            }
            Error::NotEmpty { what } => write!(f, "{} still holds images", what.printable()),
            Error::Unfinished { see } => write!(f, "not finished; {see} says what failed"),
            Error::NotPermitted { why } => f.write_str(why),
            Error::ReadOnly => f.write_str("this view is read-only"),
            Error::Incapable { path, source } => write!(
                f,
                "the filesystem of {} has neither a rename that replaces nothing (renameat2) nor hard links (link: \
                 {source}), so regfs can only look: run it on the machine that has the disk, or move the storage",
                path.printable()
            ),
            Error::Unjudged { problems } => {
                write!(
                    f,
                    "nothing was changed: {} in the store cannot be judged, so nothing can be called garbage",
                    count(problems.len(), "path")
                )?;
                problems.iter().try_for_each(|line| write!(f, "\n  {}", line.printable()))
            }
        }
    }
}

impl std::error::Error for Error {}

/// `1 blob`, `2 blobs`: a number with its noun.
pub fn count(number: usize, noun: &str) -> String {
    let plural = match noun.strip_suffix('y') {
        _ if number == 1 => noun.to_string(),
        Some(stem) => format!("{stem}ies"),
        None => format!("{noun}s"),
    };
    format!("{number} {plural}")
}
