//! Who keeps the tags and manifests of a storage: the storage itself, or a database beside it.
//!
//! Two products put a database beside the storage of a registry, and what the disk says is not the truth then:
//! - *GitLab's registry with its metadata database* keeps tags, manifests and links in PostgreSQL. Everything on the disk
//!   looks like garbage, so nothing may be changed here.
//! - *Harbor* keeps tags, retention rules and quotas in its own database, and hands the registry manifests by digest. All of
//!   them look untagged, so nothing that goes by tags may be changed; sweeping what Harbor deleted is fine.
//!
//! # How it is told
//! GitLab's registry puts a file into `docker/registry/lockfiles` when it starts: `database-in-use`, or `filesystem-in-use`.
//! Older ones, and those with the feature turned off, put none there, so their configuration counts as well:
//! `database.enabled` is `true`, `false`, or `prefer`, which means the database unless there is nothing but
//! `filesystem-in-use`. Harbor is told by its registry's configuration alone.
//!
//! # Rules kept here
//! 1. Of several configurations (the one that was given, those of processes) the strictest counts.
//! 2. The lock files are looked at each time, last with the lock of the store: a registry may be migrated meanwhile.
//! 3. A lock file that can't be looked at counts as one that is there, and a value that nobody knows as `true`.
//!
//! Source: GitLab, "Container registry metadata database", prefer mode and lock files; Harbor, `registry/config.yml.jinja`.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::printable::Printable;

/// Where GitLab's registry says what it uses, below the storage root.
const LOCKFILES: &str = "docker/registry/lockfiles";
const DATABASE_IN_USE: &str = "database-in-use";
const FILESYSTEM_IN_USE: &str = "filesystem-in-use";

/// Where tags and manifests are, as a configuration says; the strictest last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metadata {
    /// In the storage.
    #[default]
    Storage,
    /// Tags are in Harbor's database.
    Harbor,
    /// In GitLab's, unless the lock files say that it still uses the storage.
    DatabasePreferred,
    /// In GitLab's.
    Database,
}

/// What is about to be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Tags, manifests, uploads and repositories, by hand or by a rule that goes by tags.
    Tags,
    /// What nothing leads to, and what the trash holds.
    Garbage,
}

/// What is known of who keeps the tags of a storage; asked for the rest each time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keeper {
    /// The directory that holds `docker/registry`; `None` where there is none to look at.
    root: Option<PathBuf>,
    /// The strictest that a configuration says, and which does.
    said: Option<(Metadata, String)>,
}

/// Who keeps the tags, with what tells it, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kept {
    /// The storage.
    Storage,
    /// Harbor's database.
    Harbor(String),
    /// The metadata database of a GitLab registry.
    Database(String),
}

impl Keeper {
    /// Who keeps the tags of the storage below `root`.
    pub fn of(root: Option<PathBuf>) -> Keeper {
        Keeper { root, said: None }
    }

    /// The same, knowing what a configuration says; `who` completes "… says".
    pub fn hears(&mut self, metadata: Metadata, who: &dyn fmt::Display) {
        if metadata > self.said.as_ref().map_or(Metadata::Storage, |(said, _)| *said) {
            self.said = Some((metadata, who.to_string()));
        }
    }

    /// Who keeps them now.
    pub fn now(&self) -> Kept {
        if let Some(file) = self.root.as_deref().and_then(|root| lock_file(root, DATABASE_IN_USE)) {
            return Kept::Database(format!("{} is there", file.printable()));
        }
        let uses_storage = || {
            self.root.as_deref().is_some_and(|root| root.join(LOCKFILES).join(FILESYSTEM_IN_USE).is_file())
        };
        match &self.said {
            None | Some((Metadata::Storage, _)) => Kept::Storage,
            Some((Metadata::Harbor, who)) => Kept::Harbor(format!("{who} is that of a Harbor")),
            Some((Metadata::DatabasePreferred, who)) => match uses_storage() {
                true => Kept::Storage,
                false => Kept::Database(format!("{who} has database.enabled: prefer")),
            },
            Some((Metadata::Database, who)) => Kept::Database(format!("{who} has database.enabled: true")),
        }
    }

    /// Fails where somebody else keeps what is about to be changed.
    ///
    /// # Errors
    /// [`Error::NotOurs`], which says who tells it and where to delete instead.
    pub fn allows(&self, change: Change) -> Result<()> {
        match self.now().refusal(change) {
            Some(why) => Err(Error::NotOurs { why }),
            None => Ok(()),
        }
    }
}

impl Kept {
    /// The word for it in `control/status` and reports.
    pub fn word(&self) -> &'static str {
        match self {
            Kept::Storage => "storage",
            Kept::Harbor(_) => "harbor",
            Kept::Database(_) => "database",
        }
    }

    /// Why a change is refused; `None` where it is not.
    pub fn refusal(&self, change: Change) -> Option<String> {
        match (self, change) {
            (Kept::Storage, _) | (Kept::Harbor(_), Change::Garbage) => None,
            (Kept::Harbor(_), Change::Tags) => Some(format!(
                "{self}, so what looks untagged here may have a tag there. Delete tags and images in Harbor, and let a sweep \
                 take what nothing leads to afterwards"
            )),
            (Kept::Database(_), _) => Some(format!(
                "{self}, so everything on the disk looks like garbage and regfs changes nothing. Delete in GitLab; its \
                 registry collects its garbage by itself"
            )),
        }
    }
}

/// One sentence that tells who keeps the tags, and why that is believed.
impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kept::Storage => f.write_str("the storage itself keeps tags and manifests"),
            Kept::Harbor(why) => {
                write!(f, "Harbor keeps the tags of this storage in its own database ({why})")
            }
            Kept::Database(why) => write!(
                f,
                "a GitLab registry keeps the tags and manifests of this storage in its metadata database ({why})"
            ),
        }
    }
}

/// A lock file that is there, or may be.
fn lock_file(root: &Path, name: &str) -> Option<PathBuf> {
    let path = root.join(LOCKFILES).join(name);
    match path.symlink_metadata() {
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => None,
        Ok(_) | Err(_) => Some(path),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn kept(locks: &[&str], said: &[Metadata]) -> &'static str {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join(LOCKFILES);
        if !locks.is_empty() {
            std::fs::create_dir_all(&directory).unwrap();
        }
        for name in locks {
            std::fs::write(directory.join(name), b"").unwrap();
        }
        let mut keeper = Keeper::of(Some(dir.path().to_path_buf()));
        said.iter().for_each(|metadata| keeper.hears(*metadata, &"a config.yml"));
        keeper.now().word()
    }

    #[test]
    fn lock_files_and_the_strictest_configuration_tell_who_keeps_the_tags() {
        use Metadata::{Database, DatabasePreferred, Harbor, Storage};
        let (database, filesystem) = (DATABASE_IN_USE, FILESYSTEM_IN_USE);
        let cases: [(&[&str], &[Metadata], &str); 14] = [
            (&[], &[], "storage"),
            (&[], &[Storage], "storage"),
            (&[filesystem], &[], "storage"),
            (&[database], &[], "database"),
            (&[database], &[Storage], "database"),
            (&[database, filesystem], &[DatabasePreferred], "database"),
            (&[filesystem], &[DatabasePreferred], "storage"),
            (&[], &[DatabasePreferred], "database"),
            (&[], &[Database], "database"),
            (&[filesystem], &[Database], "database"),
            (&[], &[Storage, Harbor], "harbor"),
            (&[database], &[Harbor], "database"),
            (&[], &[Harbor, Database, Storage], "database"),
            (&["something-else"], &[], "storage"),
        ];
        for (locks, said, expected) in cases {
            assert_eq!(kept(locks, said), expected, "{locks:?} {said:?}");
        }
    }

    #[test]
    fn refusals_name_what_tells_it_and_where_to_delete() {
        let database = Kept::Database("x is there".to_string());
        for change in [Change::Tags, Change::Garbage] {
            let why = database.refusal(change).unwrap();
            assert!(why.contains("x is there") && why.contains("Delete in GitLab"), "{why}");
        }
        let harbor = Kept::Harbor("c.yml is that of a Harbor".to_string());
        assert!(harbor.refusal(Change::Tags).unwrap().contains("in Harbor"));
        assert_eq!(harbor.refusal(Change::Garbage), None);
        assert_eq!(Kept::Storage.refusal(Change::Tags), None);
    }
}
