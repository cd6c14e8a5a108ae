//! Debian's `redis-server` as a child process, for registries that remember there.

use std::fs;
use std::net::TcpListener;
use std::process::{Child, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use super::run::{Bounded, clean};
use super::{scratch, wait_for};

/// A running redis; ends when dropped.
pub(crate) struct RedisServer {
    process: Option<Child>,
    port: u16,
    password: Option<&'static str>,
    dir: TempDir,
}

impl RedisServer {
    pub(crate) fn start() -> RedisServer {
        RedisServer::start_with(None)
    }

    /// Starts one that wants a password.
    pub(crate) fn start_with(password: Option<&'static str>) -> RedisServer {
        let mut server = RedisServer { process: None, port: 0, password, dir: scratch() };
        // Between finding a free port and listening on it somebody else may take it.
        for _ in 0..5 {
            server.port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            if server.spawn() {
                return server;
            }
        }
        panic!("redis-server did not start: {}", fs::read_to_string(server.dir.path().join("log")).unwrap());
    }

    fn spawn(&mut self) -> bool {
        let log = fs::File::create(self.dir.path().join("log")).unwrap();
        let port = self.port.to_string();
        let mut command = clean("setpriv");
        command.args(["--pdeathsig", "KILL", "redis-server", "--bind", "127.0.0.1", "--port", &port]);
        command.args(["--save", "", "--appendonly", "no", "--dir"]).arg(self.dir.path());
        if let Some(password) = self.password {
            command.args(["--requirepass", password]);
        }
        let child = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn();
        self.process = Some(child.expect("run setpriv"));
        wait_for("redis to answer or to end", Duration::from_secs(60), || {
            let has_ended = self.process.as_mut()?.try_wait().unwrap().is_some();
            let answers = self.cli(&["PING"]).is_some_and(|answer| answer.trim() == "PONG");
            (has_ended || answers).then_some(answers)
        })
    }

    /// `host:port`
    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    pub(crate) fn password(&self) -> Option<&'static str> {
        self.password
    }

    /// What it answers; `None` where it does not.
    fn cli(&self, words: &[&str]) -> Option<String> {
        let port = self.port.to_string();
        let mut command = clean("redis-cli");
        command.args(["-p", &port]);
        if let Some(password) = self.password {
            command.args(["--no-auth-warning", "-a", password]);
        }
        let outcome = command.args(words).outcome();
        (outcome.code == Some(0)).then_some(outcome.stdout)
    }

    /// What it answers.
    #[track_caller]
    pub(crate) fn ask(&self, words: &[&str]) -> String {
        self.cli(words).expect("redis answers").trim().to_string()
    }

    /// Stops it: it forgets everything.
    pub(crate) fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Starts it again, where it was.
    pub(crate) fn restart(&mut self) {
        self.stop();
        assert!(self.spawn(), "the port was ours a moment ago");
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may have ended by itself; there is nobody to tell while dropping.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
