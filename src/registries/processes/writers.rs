//! Who can write to a storage, and so is believed when a process of theirs looks like a registry of it.
//!
//! # Rules kept here
//! 1. Whoever can't write says nothing: neither that a registry runs nor that it remembers nothing. Nothing of such a process
//!    is read but who it belongs to: its command line may lie in memory that its owner serves, and never come.
//! 2. All four user ids count (real, effective, saved, of the filesystem): a program with a set-user-id bit that
//!    somebody else started is somebody else's.
//! 3. The kernel tells ids as our user namespace sees them, so root of a namespace that a user made is that user.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::layout::{self, REGISTRY_DIR};
use crate::printable::Printable;

/// The right to write, in modes and access lists.
const WRITE: u32 = 2;
/// `CAP_DAC_OVERRIDE`: modes don't matter (capabilities(7)).
const OVERRIDES_MODES: u32 = 1;

/// Whose a process is, of `/proc/<pid>/status`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Credentials {
    /// Real, effective, saved, of the filesystem.
    users: Vec<u32>,
    /// The same, and the supplementary ones.
    groups: Vec<u32>,
    /// It may write whatever the modes say, as far as its user namespace goes.
    overrides_modes: bool,
    /// The process that made it.
    pub(super) parent: u32,
    /// What its program is called; anybody can choose that.
    pub(super) name: String,
}

impl Credentials {
    /// The user that runs it.
    pub(super) fn user(&self) -> u32 {
        self.users.first().copied().unwrap_or(u32::MAX)
    }

    /// Reads `status`.
    pub(super) fn parse(status: &str) -> Option<Credentials> {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.strip_prefix(':')).map(str::trim)
        };
        let numbers = |name| -> Option<Vec<u32>> {
            field(name)?.split_whitespace().map(|number| number.parse().ok()).collect()
        };
        let users = numbers("Uid").filter(|users| !users.is_empty())?;
        Some(Credentials {
            users,
            groups: [numbers("Gid")?, numbers("Groups")?].concat(),
            overrides_modes: u64::from_str_radix(field("CapEff")?, 16).ok()? & 1 << OVERRIDES_MODES != 0,
            parent: field("PPid")?.parse().ok()?,
            name: field("Name")?.to_string(),
        })
    }
}

/// Who can write to a storage.
pub(super) struct Writers {
    directories: Vec<Directory>,
}

/// Who can make things in a directory.
#[derive(Debug)]
struct Directory {
    owner: u32,
    group: u32,
    mode: u32,
    /// Further users and groups that an access list lets write.
    users: Vec<u32>,
    groups: Vec<u32>,
}

impl Writers {
    /// Those of the storage below `root`: its directories that a registry writes to; where there is none yet, the storage
    /// root.
    pub(super) fn of(root: &Path) -> Result<Writers> {
        let registry = root.join(REGISTRY_DIR);
        let blobs = registry.join(layout::BLOBS);
        let places: [PathBuf; 4] =
            [registry.clone(), blobs.join("sha256"), blobs, registry.join(layout::REPOSITORIES)];
        let mut directories = Vec::new();
        for handle in places {
            match Directory::look(&handle) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                directory => directories.push(directory.map_err(|e| Error::io("look at", &handle, e))?),
            }
        }
        if directories.is_empty() {
            directories.push(Directory::look(root).map_err(|e| Error::io("look at", root, e))?);
        }
        Ok(Writers { directories })
    }

    /// Whether a process can write to it. `is_in_our_namespace` says whether its user namespace is ours, and is asked only
    /// where that matters.
    pub(super) fn hold(&self, who: &Credentials, is_in_our_namespace: impl Fn() -> bool) -> bool {
        who.users.iter().all(|user| self.let_write(*user, &who.groups))
            || who.overrides_modes && is_in_our_namespace()
    }

    fn let_write(&self, user: u32, groups: &[u32]) -> bool {
        user == 0 || self.directories.iter().any(|directory| directory.lets_write(user, groups))
    }
}

impl Directory {
    fn look(path: &Path) -> io::Result<Directory> {
        let facts = std::fs::metadata(path)?;
        let mut directory = Directory {
            owner: facts.uid(),
            group: facts.gid(),
            mode: facts.mode(),
            users: Vec::new(),
            groups: Vec::new(),
        };
        let mut list = [0; 4096];
        match rustix::fs::getxattr(path, "system.posix_acl_access", &mut list) {
            Ok(length) => directory.add(list.get(..length).unwrap_or_default()),
            // No list, none of that kind, or longer than any that a person writes: the modes remain.
            Err(e) => log::trace!("{}: {e}", path.printable()),
        }
        Ok(directory)
    }

    /// Adds what an access list says: a version, then tag, rights and id of each entry (acl(5), `linux/posix_acl_xattr.h`).
    fn add(&mut self, list: &[u8]) {
        const USER: u16 = 0x02;
        const GROUP: u16 = 0x08;
        for entry in list.get(4..).unwrap_or_default().chunks_exact(8) {
            let &[tag_low, tag_high, rights, _, a, b, c, d] = entry else { continue };
            if u32::from(rights) & WRITE == 0 {
                continue;
            }
            match u16::from_le_bytes([tag_low, tag_high]) {
                USER => self.users.push(u32::from_le_bytes([a, b, c, d])),
                GROUP => self.groups.push(u32::from_le_bytes([a, b, c, d])),
                _ => {}
            }
        }
    }

    fn lets_write(&self, user: u32, groups: &[u32]) -> bool {
        // An owner may give himself the right.
        user == self.owner
            || self.mode & WRITE != 0
            || self.users.contains(&user)
            || groups.iter().any(|group| {
                *group == self.group && self.mode & WRITE << 3 != 0 || self.groups.contains(group)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(users: &str, groups: &str, capabilities: &str) -> Credentials {
        let text = format!(
            "Name:\tevil\nUmask:\t0022\nPPid:\t1\nUid:\t{users}\nGid:\t{groups}\nFDSize:\t64\nGroups:\t27 100 \n\
             CapEff:\t{capabilities}\n"
        );
        Credentials::parse(&text).expect("a status")
    }

    fn writers(owner: u32, group: u32, mode: u32) -> Writers {
        Writers { directories: vec![Directory { owner, group, mode, users: vec![7], groups: vec![8] }] }
    }

    #[test]
    fn only_those_whom_the_modes_let_write_are_believed() {
        let none = "0000000000000000";
        let root = status("0\t0\t0\t0", "0\t0\t0\t0", none);
        let one = status("1000\t1000\t1000\t1000", "1000\t1000\t1000\t1000", none);
        let setuid = status("1000\t0\t0\t0", "1000\t1000\t1000\t1000", none);
        let listed = status("7\t7\t7\t7", "9\t9\t9\t9", none);
        let in_listed_group = status("9\t9\t9\t9", "8\t8\t8\t8", none);
        let capable = status("1000\t1000\t1000\t1000", "1000\t1000\t1000\t1000", "0000000000000002");
        let cases = [
            ("root", &root, writers(5, 5, 0o755), true),
            ("a user", &one, writers(0, 0, 0o755), false),
            ("the owner", &one, writers(1000, 0, 0o555), true),
            ("a member of the group", &one, writers(0, 100, 0o775), true),
            ("a member of a group that only reads", &one, writers(0, 100, 0o755), false),
            ("everybody", &one, writers(0, 0, 0o757), true),
            ("a user with a set-user-id program", &setuid, writers(0, 0, 0o755), false),
            ("a user in the access list", &listed, writers(0, 0, 0o755), true),
            ("a group in the access list", &in_listed_group, writers(0, 0, 0o755), true),
            ("a capability", &capable, writers(0, 0, 0o755), true),
        ];
        for (name, who, writers, wanted) in cases {
            assert_eq!(writers.hold(who, || true), wanted, "{name}");
        }
        assert!(!writers(0, 0, 0o755).hold(&capable, || false), "root of a namespace of its own");
    }

    #[test]
    fn an_access_list_is_read() {
        let mut directory = Directory { owner: 0, group: 0, mode: 0o755, users: vec![], groups: vec![] };
        let entry = |tag: u16, rights: u16, id: u32| {
            [&tag.to_le_bytes()[..], &rights.to_le_bytes(), &id.to_le_bytes()].concat()
        };
        let entries = [entry(1, 7, u32::MAX), entry(2, 7, 1000), entry(2, 5, 1001), entry(8, 6, 50)];
        directory.add(&[&2u32.to_le_bytes()[..], &entries.concat()].concat());
        assert_eq!((directory.users, directory.groups), (vec![1000], vec![50]));
    }
}
