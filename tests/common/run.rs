//! Commands that cannot hang the tests, and say all when they fail.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// No command of the tests takes nearly as long on any machine; one that does hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    line: String,
    pub(crate) code: Option<i32>,
    /// What it was killed by.
    pub(crate) signal: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a command to its end, or kills it and fails the test after [`LIMIT`].
pub(crate) trait Bounded {
    fn outcome(&mut self) -> Outcome;
}

impl Bounded for Command {
    #[track_caller]
    fn outcome(&mut self) -> Outcome {
        // Files, not pipes: a daemon that keeps its output open must not keep us waiting for its end.
        let (mut stdout, mut stderr) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        self.stdin(Stdio::null()).stdout(stdout.try_clone().unwrap()).stderr(stderr.try_clone().unwrap());
        let line = format!("{self:?}");
        let mut child =
            self.process_group(0).spawn().unwrap_or_else(|why| panic!("could not run {line}: {why}"));
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if start.elapsed() > LIMIT {
                let group = Pid::from_child(&child);
                let killed = kill_process_group(group, Signal::KILL);
                let (out, err) = (content(&mut stdout), content(&mut stderr));
                panic!("{line} did not end in {LIMIT:?} (kill: {killed:?})\nstdout: {out}\nstderr: {err}");
            }
            std::thread::sleep(Duration::from_millis(3));
        };
        let (code, signal) = (status.code(), status.signal());
        Outcome { line, code, signal, stdout: content(&mut stdout), stderr: content(&mut stderr) }
    }
}

fn content(file: &mut File) -> String {
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Outcome {
    /// Asserts the exit code, and that nothing panicked on the way.
    #[track_caller]
    pub(crate) fn exits(self, code: i32) -> Outcome {
        self.exits_one_of(&[code])
    }

    /// Asserts that the exit code is one of `codes`, and that nothing panicked on the way.
    #[track_caller]
    pub(crate) fn exits_one_of(self, codes: &[i32]) -> Outcome {
        assert!(
            self.code.is_some_and(|code| codes.contains(&code)) && !self.stderr.contains("panicked"),
            "expected exit code {codes:?}: {self}"
        );
        self
    }

    /// Asserts that standard error holds `text`.
    #[track_caller]
    pub(crate) fn says(self, text: &str) -> Outcome {
        assert!(self.stderr.contains(text), "expected {text:?} on stderr: {self}");
        self
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Outcome { line, code, signal, stdout, stderr } = self;
        write!(f, "{line}\nended with {code:?}, signal {signal:?}\nstdout: {stdout}\nstderr: {stderr}")
    }
}

/// The built regfs, with no setting of this machine's environment.
pub(crate) fn regfs<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = clean(env!("CARGO_BIN_EXE_regfs"));
    command.args(arguments);
    command
}

/// A command without the environment that would change what registries, regfs or tools do.
pub(crate) fn clean(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("REGISTRY_") || name.starts_with("REGFS_") || name == "RUST_LOG" {
            command.env_remove(&*name);
        }
    }
    command.env_remove("AWS_CA_BUNDLE").env("OTEL_TRACES_EXPORTER", "none").env("LC_ALL", "C");
    command
}

/// A line for `sh`, run in `dir`.
pub(crate) fn sh(dir: &Path, line: &str) -> Command {
    let mut command = clean("sh");
    command.arg("-c").arg(line).current_dir(dir);
    command
}
