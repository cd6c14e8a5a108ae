//! Opens of manifests, held by a process of its own (the guardian) until the daemon has answered, but not for long.
//!
//! The guardian reads the opens that wait ([`super::opens`]). It lets go at once of all but those of manifests, and asks
//! the daemon about each of these over a socket. A daemon that is hung, stopped, swapped out or in a debugger does not
//! answer: then the guardian lets go by itself. A guardian that is stopped is killed by a timer of the kernel's, which lets
//! go of all as well; the daemon starts another one.
//!
//! # Rules kept here
//! 1. Nobody is held for longer than [`HELD`] by a daemon that does not answer, nor than [`KILLED`] by a guardian that
//!    does not go on.
//! 2. After one open that the daemon did not answer about in time, nobody is held until it answers again.
//! 3. Opens that were let go without an answer are counted, and the daemon is asked about them all the same: it makes them
//!    whole as soon as it can.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use super::opens::{Open, Opens};
use crate::error::{Error, Result};
use crate::layout;
use crate::sys::DeathTimer;

/// How long the daemon has for an answer.
const HELD: Duration = Duration::from_secs(1);
/// How long the guardian may take for one round.
const KILLED: Duration = Duration::from_millis(1500);
/// How long it waits in a round, and how often it tells how many opens there were.
const ROUND: Duration = Duration::from_millis(500);
/// So many are held at once: each takes a descriptor, and an open that finds none left would fail.
const MOST: usize = 256;
/// Longest message: a path, with numbers in front.
const LONGEST: usize = 8192;
const NUMBER: usize = size_of::<u64>();

/// What the guardian tells.
#[derive(Debug, PartialEq, Eq)]
pub struct Told {
    /// How many opens there were since it began.
    pub figures: Figures,
    /// Somebody opens the link of a manifest; `None` when it only tells figures.
    pub question: Option<Question>,
}

/// An open of the link of a manifest.
#[derive(Debug, PartialEq, Eq)]
pub struct Question {
    /// Counts from 1.
    pub id: u64,
    /// Who.
    pub pid: u32,
    /// Below the registry directory.
    pub path: PathBuf,
}

/// What a guardian has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Files that were opened.
    pub opens: u64,
    /// Manifests whose opens were let go before the daemon answered.
    pub missed: u64,
}

impl Told {
    fn encode(&self) -> Vec<u8> {
        let (id, pid, path) = match &self.question {
            Some(question) => (question.id, question.pid, question.path.as_os_str().as_bytes()),
            None => (0, 0, &[][..]),
        };
        let numbers = [self.figures.opens, self.figures.missed, id, u64::from(pid)].map(u64::to_ne_bytes);
        [numbers.as_flattened(), path].concat()
    }

    fn decode(message: &[u8]) -> Option<Told> {
        let (opens, rest) = number(message)?;
        let (missed, rest) = number(rest)?;
        let (id, rest) = number(rest)?;
        let (pid, rest) = number(rest)?;
        let path = PathBuf::from(OsStr::from_bytes(rest));
        let question = Question { id, pid: u32::try_from(pid).ok()?, path };
        Some(Told { figures: Figures { opens, missed }, question: (id > 0).then_some(question) })
    }
}

fn number(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (number, rest) = bytes.split_first_chunk::<NUMBER>()?;
    Some((u64::from_ne_bytes(*number), rest))
}

/// The daemon's end: hears of opens, and answers.
pub struct Questions(OwnedFd);

impl Questions {
    /// With the end that is the guardian's.
    pub fn new() -> io::Result<(Questions, OwnedFd)> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Questions(ours), theirs))
    }

    /// Waits for what the guardian tells next; `None` when it is gone.
    pub fn next(&self) -> io::Result<Option<Told>> {
        let mut buffer = [0; LONGEST];
        loop {
            match recv(&self.0, &mut buffer, RecvFlags::empty()) {
                Ok((0, _)) | Err(Errno::CONNRESET) => return Ok(None),
                Ok((length, _)) => {
                    let told = buffer.get(..length).and_then(Told::decode);
                    return told
                        .map(Some)
                        .ok_or_else(|| io::Error::other("a message is not as it should be"));
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Says that the question is answered: who opened that may go on.
    pub fn answer(&self, id: u64) -> io::Result<()> {
        send(&self.0, &id.to_ne_bytes(), SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

/// Those who wait for an answer, the oldest first.
struct Held<T> {
    waiting: VecDeque<(u64, Instant, T)>,
    asked: u64,
    /// The daemon did not answer in time, and has not answered since.
    is_late: bool,
    figures: Figures,
}

impl<T> Held<T> {
    fn new() -> Held<T> {
        Held { waiting: VecDeque::new(), asked: 0, is_late: false, figures: Figures::default() }
    }

    /// Holds one more, unless the daemon is late; the number of the question.
    fn ask(&mut self, open: T, now: Instant) -> u64 {
        self.asked += 1;
        match self.is_late || self.waiting.len() >= MOST {
            true => self.figures.missed += 1,
            false => self.waiting.push_back((self.asked, now, open)),
        }
        self.asked
    }

    /// The daemon has answered: lets go.
    fn answered(&mut self, id: u64) {
        self.is_late = false;
        self.waiting.retain(|(asked, ..)| *asked != id);
    }

    /// Lets go of all, since nobody will answer soon.
    fn give_up(&mut self) {
        self.is_late = true;
        self.figures.missed += self.waiting.len() as u64;
        self.waiting.clear();
    }

    /// How long the oldest may yet be held; `None` when nobody is.
    fn left(&self, now: Instant) -> Option<Duration> {
        let (_, since, _) = self.waiting.front()?;
        Some(HELD.saturating_sub(now.saturating_duration_since(*since)))
    }
}

/// Holds opens of manifests through the mount on `directory` until the daemon at the other end of stdin has answered; returns
/// when that is gone. What is held then goes on.
pub fn hold(directory: &Path) -> Result<()> {
    let failed = |e: io::Error| Error::io("guard", directory, e);
    // Before anybody is held.
    let timer = DeathTimer::new().map_err(failed)?;
    timer.set(KILLED).map_err(failed)?;
    let opens = Opens::through_mount(directory)?;
    holding(&opens, &timer, rustix::stdio::stdin().as_fd()).map_err(failed)
}

fn holding(opens: &Opens, timer: &DeathTimer, daemon: BorrowedFd<'_>) -> io::Result<()> {
    let mut held: Held<Open<'_>> = Held::new();
    let (mut told, mut told_at) = (held.figures, Instant::now());
    tell(daemon, told, None);
    loop {
        timer.set(KILLED)?;
        let wait = held.left(Instant::now()).map_or(ROUND, |left| left.min(ROUND));
        let timeout = Timespec { tv_sec: 0, tv_nsec: wait.subsec_nanos().into() };
        let events = opens.events();
        let mut fds = [PollFd::new(&daemon, PollFlags::IN), PollFd::new(&events, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let [has_answered, is_opened] = [&fds[0], &fds[1]].map(|fd| !fd.revents().is_empty());
        if has_answered {
            let mut id = [0; NUMBER];
            match recv(daemon, &mut id, RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(Errno::CONNRESET) => return Ok(()),
                Ok(_) => held.answered(u64::from_ne_bytes(id)),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        for open in if is_opened { opens.waiting()? } else { Vec::new() } {
            held.figures.opens += 1;
            if let Some(path) = open.path().filter(|path| layout::opened_revision(path).is_some()) {
                ask(daemon, &mut held, open, path);
            }
        }
        if held.left(Instant::now()).is_some_and(|left| left.is_zero()) {
            held.give_up();
        }
        if held.figures != told && told_at.elapsed() >= ROUND {
            (told, told_at) = (held.figures, Instant::now());
            tell(daemon, told, None);
        }
    }
}

fn ask<'o>(daemon: BorrowedFd<'_>, held: &mut Held<Open<'o>>, open: Open<'o>, path: PathBuf) {
    let pid = open.pid;
    let id = held.ask(open, Instant::now());
    if !tell(daemon, held.figures, Some(Question { id, pid, path })) {
        // It has not read hundreds of questions.
        held.give_up();
    }
}

/// Whether there was room for it.
fn tell(daemon: BorrowedFd<'_>, figures: Figures, question: Option<Question>) -> bool {
    send(daemon, &Told { figures, question }.encode(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL).is_ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn messages_are_read_as_they_were_written() {
        let path = PathBuf::from("repositories/app/_manifests/revisions/sha256/ab/link");
        let figures = Figures { opens: 3, missed: 2 };
        for question in [Some(Question { id: 7, pid: 42, path }), None] {
            let told = Told { figures, question };
            assert_eq!(Told::decode(&told.encode()), Some(told));
        }
        assert_eq!(Told::decode(&[0; 31]), None);
    }

    #[test]
    fn nobody_waits_for_a_daemon_that_is_late() {
        let began = Instant::now();
        let at = |millis| began + Duration::from_millis(millis);
        let mut held = Held::new();
        assert_eq!((held.left(began), held.ask("a", began), held.ask("b", at(400))), (None, 1, 2));
        held.answered(1);
        assert_eq!(held.left(at(400)), Some(HELD));
        assert_eq!(held.left(at(2000)), Some(Duration::ZERO));
        held.give_up();
        assert_eq!((held.left(at(2000)), held.figures.missed), (None, 1));
        // Late: the next one is asked about, but not held.
        held.ask("c", at(2001));
        assert_eq!((held.waiting.len(), held.figures.missed), (0, 2));
        // An answer, even to an old question, says that it goes on.
        held.answered(2);
        held.ask("d", at(2002));
        assert_eq!((held.waiting.len(), held.figures.missed), (1, 2));
    }

    #[test]
    fn no_more_are_held_than_there_are_descriptors_for() {
        let mut held = Held::new();
        for _ in 0..MOST + 5 {
            held.ask((), Instant::now());
        }
        assert_eq!((held.waiting.len(), held.figures.missed), (MOST, 5));
    }
}
