//! What mount(8) says to a helper: `mount.regfs STORE MOUNTPOINT -o OPTIONS`, and the words of `-o`
//!
//! mount(8) calls us in two ways, each with next to nothing in the environment: by the symlink `/sbin/mount.regfs`
//! (`mount -t regfs`), or through mount.fuse3 as `regfs STORE MOUNTPOINT -o OPTIONS` (`mount -t fuse.regfs`).

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;

use super::duration;
use super::mount::interval;
use super::registry::url;
use crate::engine::schedule::Window;
use crate::registries::redis::parse_url;
use crate::registry_config::RedisConfig;
use crate::view::control::parse_rate;

/// A word of `-o`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum MountWord {
    /// `ro`, `rw`
    ReadOnly(bool),
    /// `allow_other`
    AllowOther,
    /// `replace`
    Replace,
    /// `grace=AGE`
    Grace(Duration),
    /// `keep=AGE`
    Keep(Duration),
    /// `rate=N`
    Rate(u32),
    /// `drain=TIME`
    Drain(Duration),
    /// `registry=URL`
    Registry(String),
    /// `redis=URL`
    Redis(RedisConfig),
    /// `registry_auth=FILE`
    RegistryAuth(PathBuf),
    /// `registry_ca=FILE`
    RegistryCa(PathBuf),
    /// `sweep_every=TIME`
    SweepEvery(Duration),
    /// `sweep_window=HH:MM-HH:MM`
    SweepWindow(Window),
    /// `guard=DIRECTORY`
    Guard(PathBuf),
    /// `log_file=FILE`
    LogFile(PathBuf),
    /// Meant for mount(8), systemd or the kernel; or what every mount of ours is anyway.
    Generic,
}

/// For mount(8) itself and systemd (mount(8), systemd.mount(5)), or without a meaning for this filesystem.
const GENERIC: &[&str] = &[
    "_netdev",
    "async",
    "atime",
    "auto",
    "default_permissions",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "group",
    "lazytime",
    "loud",
    "noatime",
    "noauto",
    "nodev",
    "nodiratime",
    "noexec",
    "nofail",
    "nolazytime",
    "nonempty",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nouser",
    "owner",
    "relatime",
    "silent",
    "strictatime",
    "suid",
    "sync",
    "user",
    "users",
];

/// Reads a word of `-o`.
pub(super) fn word(text: &str) -> Result<MountWord, String> {
    let (key, value) = text.split_once('=').map_or((text, None), |(key, value)| (key, Some(value)));
    match (key, value) {
        ("ro", None) => Ok(MountWord::ReadOnly(true)),
        ("rw", None) => Ok(MountWord::ReadOnly(false)),
        ("allow_other", None) => Ok(MountWord::AllowOther),
        ("replace", None) => Ok(MountWord::Replace),
        ("grace", Some(age)) => duration(age).map(MountWord::Grace),
        ("keep", Some(age)) => duration(age).map(MountWord::Keep),
        ("rate", Some(rate)) => parse_rate(rate).map(MountWord::Rate),
        ("drain", Some(time)) => duration(time).map(MountWord::Drain),
        ("registry", Some(at)) => url(at).map(MountWord::Registry),
        ("redis", Some(at)) => parse_url(at).map(MountWord::Redis),
        ("registry_auth", Some(file)) if !file.is_empty() => Ok(MountWord::RegistryAuth(file.into())),
        ("registry_ca", Some(file)) if !file.is_empty() => Ok(MountWord::RegistryCa(file.into())),
        ("sweep_every", Some(time)) => interval(time).map(MountWord::SweepEvery),
        ("sweep_window", Some(window)) => Window::parse(window).map(MountWord::SweepWindow),
        ("guard", Some(directory)) if !directory.is_empty() => Ok(MountWord::Guard(directory.into())),
        ("log_file", Some(file)) if !file.is_empty() => Ok(MountWord::LogFile(file.into())),
        ("remount", None) => Err("a regfs can't be remounted; mount it anew with -o replace".to_string()),
        ("user" | "comment" | "fsname" | "subtype", Some(_)) | ("", None) => Ok(MountWord::Generic),
        (key, _) if key.starts_with("x-") || key.starts_with("X-") => Ok(MountWord::Generic),
        (key, None) if GENERIC.contains(&key) => Ok(MountWord::Generic),
        _ => Err(
            "there are ro, rw, allow_other, replace, grace=AGE, drain=TIME, keep=AGE, rate=N, registry=URL, \
             registry_auth=FILE, registry_ca=FILE, redis=URL, sweep_every=TIME, sweep_window=HH:MM-HH:MM, guard=DIRECTORY, log_file=FILE, and what mount(8) takes for any \
             filesystem"
                .to_string(),
        ),
    }
}

/// Mounts a registry's storage as a file tree; called by mount(8).
#[derive(Parser, Debug)]
#[command(name = "mount.regfs", version)]
struct HelperArgs {
    /// The registry's rootdirectory or its config.yml
    store: OsString,
    /// A directory
    mountpoint: OsString,
    /// Options, separated by commas: ro, allow_other, replace, grace=AGE, keep=AGE, log_file=FILE
    #[arg(short, value_delimiter = ',')]
    options: Vec<String>,
    /// Do everything but mount
    #[arg(short)]
    fake: bool,
    /// Ignore unknown options
    #[arg(short)]
    sloppy: bool,
    /// Accepted, without a meaning
    #[arg(short)]
    no_mtab: bool,
    /// Accepted, without a meaning
    #[arg(short)]
    verbose: bool,
    /// Accepted, without a meaning
    #[arg(short = 't', value_name = "TYPE")]
    filesystem_type: Option<String>,
}

/// Turns what mount(8) says into a `regfs mount`; returns anything else as it is.
pub(super) fn canonical(args: Vec<OsString>) -> Result<Vec<OsString>, clap::Error> {
    if !is_helper_call(&args) {
        return Ok(args);
    }
    let helper = HelperArgs::try_parse_from(args)?;
    let mut canonical: Vec<OsString> = vec!["regfs".into(), "mount".into()];
    if helper.fake {
        canonical.push("--fake".into());
    }
    for option in helper.options {
        if !helper.sloppy || word(&option).is_ok() {
            canonical.extend(["-o".into(), option.into()]);
        }
    }
    canonical.extend(["--".into(), helper.store, helper.mountpoint]);
    Ok(canonical)
}

/// Called by the name of a mount helper, or with a path where a subcommand would stand.
fn is_helper_call(args: &[OsString]) -> bool {
    let name = args.first().and_then(|name| Path::new(name).file_name());
    let called_as_helper = name.is_some_and(|name| name.as_encoded_bytes().starts_with(b"mount."));
    let path_first = args.get(1).is_some_and(|first| first.as_encoded_bytes().contains(&b'/'));
    called_as_helper || (path_first && args.len() > 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canonical_of(line: &str) -> String {
        let args = line.split(' ').map(OsString::from).collect();
        let words = canonical(args).map_err(|e| e.to_string()).expect("a mount");
        words.join(std::ffi::OsStr::new(" ")).into_string().expect("text")
    }

    #[test]
    fn both_forms_become_a_mount() {
        let wanted = "regfs mount -o ro -o allow_other -- /srv/r /mnt";
        assert_eq!(canonical_of("/sbin/mount.regfs /srv/r /mnt -o ro,allow_other"), wanted);
        assert_eq!(canonical_of("/sbin/mount.regfs -n -v /srv/r /mnt -o ro -o allow_other"), wanted);
        assert_eq!(canonical_of("regfs /srv/r /mnt -o ro,allow_other"), wanted);
        assert_eq!(canonical_of("mount.regfs /srv/r /mnt -f"), "regfs mount --fake -- /srv/r /mnt");
        assert_eq!(canonical_of("mount.regfs r /mnt -s -o ro,what"), "regfs mount -o ro -- r /mnt");
    }

    #[test]
    fn other_calls_stay_as_they_are() {
        for line in
            ["regfs", "regfs gc /srv/r", "regfs mount /srv/r /mnt", "/usr/bin/regfs --help", "regfs ./x"]
        {
            assert_eq!(canonical_of(line), line);
        }
    }

    #[test]
    fn words_are_read() {
        assert_eq!(word("rw"), Ok(MountWord::ReadOnly(false)));
        assert_eq!(word("grace=1h"), Ok(MountWord::Grace(Duration::from_secs(3600))));
        for generic in ["nofail", "user=joe", "x-systemd.automount", "X-mount.mkdir=755", "comment=a", ""] {
            assert_eq!(word(generic), Ok(MountWord::Generic), "{generic}");
        }
        for wrong in ["frobnicate", "ro=1", "grace=soon", "grace", "log_file=", "remount", "uid=3"] {
            assert!(word(wrong).is_err(), "{wrong}");
        }
    }
}
