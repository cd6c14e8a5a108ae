//! The protocol of `gc::guard`, checked in every interleaving: pushes of every kind, each cut into the steps in which a
//! registry touches its storage and its memory, with one sweep cut into its own, and a crash of that anywhere.
//!
//! A model, not the code: small enough that all of it can be looked at. What it says about each step that is left out
//! stands, with the shortest way to a loss, in `docs/protocol.md`, which this test writes and compares.
//!
//! One object, two repositories. At first both have a link to it, nothing names it, and a registry with a cache
//! remembers it, or has just been started and does not. A push names it in one of them. A push is lost when it was acknowledged and in the end the link or the
//! bytes are neither in their place nor in the trash (from which they come back, being in use). The object is
//!
//! - a layer: it goes with its links;
//! - a manifest that no repository has any more: it goes without a fence, but only where nobody remembers;
//! - a child: a manifest that is taken out of a repository (`rm`, untagged) and named by an index that is pushed. Its link
//!   is that of its revision; its bytes stay.
//!
//! A drain is over when every request has ended that was under way when it began; a client may take as long as it
//! likes between two requests.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::fmt::Write as _;

use hashbrown::HashSet;

const REPOSITORIES: [usize; 2] = [0, 1];

/// What a registry remembers, and what is asked of it before the bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Setting {
    /// No cache, no question.
    Off,
    /// A cache, and it is asked.
    Probe,
    /// A cache, and the sweep takes everything while it is stopped.
    Stop,
}

/// What happens.
#[derive(Clone, Copy, Debug)]
enum Event {
    Push(usize, Push),
    Sweep(Sweep),
    Killed(Sweep),
}

impl std::fmt::Display for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Event::Push(at, push) => {
                write!(f, "push {} ({:?} to r{}): {:?}", at + 1, push.kind, push.repository, push.step)
            }
            Event::Sweep(step) => write!(f, "sweep: {step:?}"),
            Event::Killed(step) => write!(f, "the sweep is killed before {step:?}"),
        }
    }
}

/// What goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Object {
    Layer,
    Manifest,
    Child,
}

/// What is left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Without {
    fence: bool,
    drain: bool,
    gate: bool,
    second_look: bool,
    last_mark: bool,
    late_writes: bool,
    keep: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Link {
    Absent,
    Old,
    Fresh,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Bytes {
    There,
    Trash,
    Gone,
}

/// Where the file is that a request has open to write a link.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Open {
    Nowhere,
    There,
    Trash,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Kind {
    /// HEAD, and the upload only if that says so.
    Head,
    /// The upload in any case.
    Upload,
    /// A mount from the other repository.
    Mount,
    /// The manifest only: the client has asked long ago.
    Again,
    /// The manifest itself, bytes and all.
    Manifest,
}

/// The next step of a push.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Step {
    HeadLink,
    HeadBytes,
    MountLink,
    MountBytes,
    UploadBytes,
    UploadMove,
    LinkOpen,
    LinkWrite,
    PutLink,
    PutBytes,
    ManifestBytes,
    ManifestWrite,
    PutRef,
    Acknowledged,
    GivenUp,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Push {
    kind: Kind,
    repository: usize,
    step: Step,
    has_retried: bool,
    open: Open,
    /// Its request was under way when the drain began that is waited for.
    is_old: bool,
}

impl Push {
    fn new(kind: Kind, repository: usize) -> Push {
        let step = match kind {
            Kind::Head => Step::HeadLink,
            Kind::Upload => Step::UploadBytes,
            Kind::Mount => Step::MountLink,
            Kind::Again => Step::PutLink,
            Kind::Manifest => Step::ManifestBytes,
        };
        Push { kind, repository, step, has_retried: false, open: Open::Nowhere, is_old: false }
    }

    fn is_under_way(&self) -> bool {
        use Step::*;
        !matches!(
            self.step,
            HeadLink | MountLink | UploadBytes | PutLink | ManifestBytes | Acknowledged | GivenUp
        )
    }

    fn is_over(&self) -> bool {
        matches!(self.step, Step::Acknowledged | Step::GivenUp)
    }

    /// A new request begins.
    fn go(&mut self, step: Step) {
        self.step = step;
        self.is_old = false;
    }

    /// The registry says that something is unknown, or goes: clients begin anew, once here.
    fn refused(&mut self) {
        self.open = Open::Nowhere;
        let first = if self.kind == Kind::Manifest { Step::ManifestBytes } else { Step::HeadLink };
        self.go(if self.has_retried { Step::GivenUp } else { first });
        self.has_retried = true;
    }
}

/// The next step of the sweep.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Sweep {
    /// Looks at a repository; what for.
    Look(usize, For),
    FenceMove(usize),
    FenceCheck(usize),
    EvictMemory(usize),
    EvictLink(usize),
    Fenced,
    Drain,
    Gate(usize),
    LinkBefore(usize),
    MoveBytes,
    LinkAfter(usize),
    BytesBack,
    Quarantined,
    Keep,
    Purge,
    /// A manifest or a link has come: everything back.
    BackBytes,
    BackLink(usize),
    StopAndTake,
    Over,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum For {
    Candidates,
    Quarantine,
    LookBack,
    Purge,
    /// After a crash.
    Anew,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    bytes: Bytes,
    links: [Link; 2],
    /// `Fresh`: written after it moved here.
    trash: [Link; 2],
    refs: [bool; 2],
    memory: [bool; 2],
    /// Where there is but one, the other has given up.
    pushes: [Push; 2],
    sweep: Sweep,
    /// What the look that goes on has seen so far.
    has_seen_use: bool,
    /// Times that the sweep begins from the start, at most.
    rounds: u8,
    crashes: u8,
    /// A DELETE of the gate, after which the drain begins anew.
    evicts_again: bool,
    /// Of a child: it is to be evicted once more after the drain.
    evicts_twice: bool,
}

struct Model {
    object: Object,
    setting: Setting,
    without: Without,
}

impl Model {
    fn start(&self, pushes: [Push; 2], crashes: u8, remembers: bool) -> State {
        State {
            bytes: Bytes::There,
            links: [if self.object == Object::Manifest { Link::Absent } else { Link::Old }; 2],
            trash: [Link::Absent; 2],
            refs: [false; 2],
            memory: [remembers; 2],
            pushes,
            sweep: Sweep::Look(0, For::Candidates),
            has_seen_use: false,
            rounds: 2,
            crashes,
            evicts_again: false,
            evicts_twice: self.evicts_twice(),
        }
    }

    /// Everything that can happen next.
    fn each_next(&self, state: &State, mut each: impl FnMut(Event, State)) {
        for (at, push) in state.pushes.iter().enumerate().filter(|(_, push)| !push.is_over()) {
            let mut next = *state;
            self.push(&mut next, at);
            each(Event::Push(at, *push), next);
        }
        if let Some(next) = self.sweep(state) {
            each(Event::Sweep(state.sweep), next);
        }
        if state.crashes > 0 && state.sweep != Sweep::Over {
            let mut next = *state;
            next.crashes -= 1;
            next.sweep = Sweep::Look(0, For::Anew);
            next.has_seen_use = false;
            // What was not written down as done is done again.
            next.evicts_twice = self.evicts_twice();
            each(Event::Killed(state.sweep), next);
        }
    }

    fn evicts_twice(&self) -> bool {
        !self.without.gate && self.setting == Setting::Probe
    }

    fn push(&self, state: &mut State, at: usize) {
        let remembers = self.setting != Setting::Off;
        let mut push = state.pushes[at];
        let own = push.repository;
        let other = 1 - own;
        let is_there = state.bytes == Bytes::There;
        match push.step {
            Step::HeadLink if remembers && state.memory[own] => push.go(Step::PutLink),
            Step::HeadLink if state.links[own] == Link::Absent => push.go(Step::UploadBytes),
            Step::HeadLink => push.step = Step::HeadBytes,
            Step::HeadBytes if is_there => {
                state.memory[own] = remembers;
                push.go(Step::PutLink);
            }
            Step::HeadBytes => push.go(Step::UploadBytes),
            Step::MountLink if remembers && state.memory[other] => push.step = Step::LinkOpen,
            Step::MountLink if state.links[other] == Link::Absent => push.go(Step::UploadBytes),
            Step::MountLink => push.step = Step::MountBytes,
            Step::MountBytes if is_there => {
                state.memory[other] = remembers;
                push.step = Step::LinkOpen;
            }
            Step::MountBytes => push.go(Step::UploadBytes),
            Step::UploadBytes if is_there => push.step = Step::LinkOpen,
            Step::UploadBytes => push.step = Step::UploadMove,
            Step::UploadMove => {
                state.bytes = Bytes::There;
                push.step = Step::LinkOpen;
            }
            Step::LinkOpen => {
                if state.links[own] == Link::Absent {
                    // A new file, still empty: it counts as a link from now on.
                    state.links[own] = Link::Fresh;
                }
                push.open = Open::There;
                push.step = Step::LinkWrite;
            }
            Step::LinkWrite => {
                match push.open {
                    Open::There => state.links[own] = Link::Fresh,
                    Open::Trash => state.trash[own] = Link::Fresh,
                    Open::Nowhere => {}
                }
                push.open = Open::Nowhere;
                state.memory[own] = remembers;
                push.go(Step::PutLink);
            }
            Step::PutLink if remembers && state.memory[own] => push.step = Step::PutRef,
            Step::PutLink if state.links[own] == Link::Absent => push.refused(),
            Step::PutLink => push.step = Step::PutBytes,
            Step::PutBytes if is_there => {
                state.memory[own] = remembers;
                push.step = Step::PutRef;
            }
            Step::PutBytes => push.refused(),
            Step::ManifestBytes if is_there => push.step = Step::PutRef,
            Step::ManifestBytes => push.step = Step::ManifestWrite,
            Step::ManifestWrite => {
                state.bytes = Bytes::There;
                push.step = Step::PutRef;
            }
            Step::PutRef => {
                state.refs[own] = true;
                push.go(Step::Acknowledged);
            }
            Step::Acknowledged | Step::GivenUp => {}
        }
        state.pushes[at] = push;
    }

    fn sweep(&self, before: &State) -> Option<State> {
        let mut state = *before;
        let is_draining = state.pushes.iter().any(|push| push.is_under_way() && push.is_old);
        state.sweep = match state.sweep {
            Sweep::Look(at, purpose) => {
                let late = state.trash[at] == Link::Fresh && !self.without.late_writes;
                let linked = match purpose {
                    // Old links are what is to be taken.
                    For::Candidates => state.links[at] == Link::Fresh,
                    _ => state.links[at] != Link::Absent,
                };
                // Without a fence the links are where they were.
                let linked = linked && !(self.without.fence && state.links[at] == Link::Old);
                state.has_seen_use |= state.refs[at] || linked || late;
                match at {
                    0 => Sweep::Look(1, purpose),
                    _ => self.decide(&mut state, purpose),
                }
            }
            Sweep::FenceMove(at) => {
                if state.links[at] != Link::Absent {
                    state.trash[at] = state.links[at];
                    state.links[at] = Link::Absent;
                    state.moved(at, Open::There, Open::Trash);
                }
                Sweep::FenceCheck(at)
            }
            Sweep::FenceCheck(at) if state.trash[at] == Link::Fresh => Sweep::BackLink(0),
            Sweep::FenceCheck(0) => Sweep::FenceMove(1),
            Sweep::FenceCheck(_) if self.setting == Setting::Probe => Sweep::EvictMemory(0),
            Sweep::FenceCheck(_) => Sweep::Fenced,
            Sweep::EvictMemory(at) => {
                state.memory[at] = false;
                Sweep::EvictLink(at)
            }
            Sweep::EvictLink(at) => {
                // The DELETE of a blob takes a layer link, never the revision of a manifest.
                if self.object != Object::Child {
                    state.links[at] = Link::Absent;
                    state.moved(at, Open::There, Open::Nowhere);
                }
                match at {
                    0 if !state.evicts_again => Sweep::EvictMemory(1),
                    _ => Sweep::Fenced,
                }
            }
            Sweep::Fenced => {
                state.evicts_again = false;
                state.drain_begins();
                Sweep::Drain
            }
            Sweep::Drain if is_draining && !self.without.drain => return None,
            // Told again to forget, now that nobody is under way who saw it.
            Sweep::Drain if self.object == Object::Child && state.evicts_twice => {
                state.evicts_twice = false;
                Sweep::EvictMemory(0)
            }
            Sweep::Drain if self.object == Object::Child => Sweep::Look(0, For::Purge),
            Sweep::Drain => Sweep::Look(0, For::Quarantine),
            Sweep::Gate(at) => {
                let says_yes =
                    state.memory[at] || (state.links[at] != Link::Absent && state.bytes == Bytes::There);
                match at {
                    _ if says_yes && self.setting == Setting::Probe && !self.without.gate => {
                        state.evicts_again = true;
                        Sweep::EvictMemory(at)
                    }
                    0 => Sweep::Gate(1),
                    _ => Sweep::LinkBefore(0),
                }
            }
            Sweep::LinkBefore(at) if state.links[at] != Link::Absent && !self.without.fence => {
                Sweep::Look(0, For::LookBack)
            }
            Sweep::LinkBefore(0) => Sweep::LinkBefore(1),
            Sweep::LinkBefore(_) => Sweep::MoveBytes,
            Sweep::MoveBytes => {
                if state.bytes == Bytes::There {
                    state.bytes = Bytes::Trash;
                }
                if self.without.second_look { Sweep::Quarantined } else { Sweep::LinkAfter(0) }
            }
            Sweep::LinkAfter(at) if state.links[at] == Link::Fresh => Sweep::BytesBack,
            Sweep::LinkAfter(0) => Sweep::LinkAfter(1),
            Sweep::LinkAfter(_) => Sweep::Look(0, For::LookBack),
            Sweep::BytesBack => {
                state.back();
                Sweep::Look(0, For::LookBack)
            }
            Sweep::Quarantined => {
                state.drain_begins();
                Sweep::Keep
            }
            Sweep::Keep if is_draining && !self.without.keep => return None,
            Sweep::Keep if self.without.last_mark => Sweep::Purge,
            Sweep::Keep => Sweep::Look(0, For::Purge),
            Sweep::Purge => {
                if state.bytes == Bytes::Trash {
                    state.bytes = Bytes::Gone;
                }
                state.trash = [Link::Absent; 2];
                for push in &mut state.pushes {
                    if push.open == Open::Trash {
                        push.open = Open::Nowhere;
                    }
                }
                Sweep::Over
            }
            Sweep::BackBytes => {
                state.back();
                Sweep::BackLink(0)
            }
            Sweep::BackLink(at) => {
                if state.trash[at] != Link::Absent && state.links[at] == Link::Absent {
                    state.links[at] = state.trash[at];
                    state.trash[at] = Link::Absent;
                    state.moved(at, Open::Trash, Open::There);
                }
                match at {
                    0 => Sweep::BackLink(1),
                    _ => state.again(),
                }
            }
            Sweep::StopAndTake => {
                // Nothing runs: whoever had a request under way begins anew, and nobody remembers.
                for push in &mut state.pushes {
                    if push.is_under_way() {
                        push.refused();
                    }
                }
                state.memory = [false; 2];
                if state.refs == [false; 2] && !state.links.contains(&Link::Fresh) {
                    state.trash = state.links;
                    state.links = [Link::Absent; 2];
                    state.bytes = Bytes::Trash;
                }
                Sweep::Quarantined
            }
            Sweep::Over => return None,
        };
        Some(state)
    }

    /// After a look.
    fn decide(&self, state: &mut State, purpose: For) -> Sweep {
        if std::mem::take(&mut state.has_seen_use) {
            return match purpose {
                For::Candidates => state.again(),
                _ => Sweep::BackBytes,
            };
        }
        match purpose {
            For::Candidates if self.setting == Setting::Stop => Sweep::StopAndTake,
            For::Candidates if self.without.fence => Sweep::Fenced,
            For::Candidates if self.object == Object::Manifest => Sweep::LinkBefore(0),
            For::Candidates => Sweep::FenceMove(0),
            For::Quarantine => Sweep::Gate(0),
            For::LookBack => Sweep::Quarantined,
            For::Purge => Sweep::Purge,
            For::Anew if state.bytes == Bytes::Trash => Sweep::Quarantined,
            For::Anew if state.trash != [Link::Absent; 2] => Sweep::Fenced,
            For::Anew => Sweep::Look(0, For::Candidates),
        }
    }
}

impl State {
    /// The file of a link was moved, or removed, under whoever has it open.
    fn moved(&mut self, repository: usize, from: Open, to: Open) {
        for push in self.pushes.iter_mut().filter(|p| p.repository == repository && p.open == from) {
            push.open = to;
        }
    }

    fn drain_begins(&mut self) {
        for push in &mut self.pushes {
            push.is_old = push.is_under_way();
        }
    }

    fn back(&mut self) {
        if self.bytes == Bytes::Trash {
            self.bytes = Bytes::There;
        }
    }

    /// The sweep of this blob is over; another may begin.
    fn again(&mut self) -> Sweep {
        match self.rounds.checked_sub(1) {
            Some(left) => {
                self.rounds = left;
                Sweep::Look(0, For::Candidates)
            }
            None => Sweep::Over,
        }
    }

    fn is_over(&self) -> bool {
        self.sweep == Sweep::Over && self.pushes.iter().all(Push::is_over)
    }

    /// What an acknowledged push lacks in the end, if anything.
    fn loss(&self, object: Object) -> Option<String> {
        let acknowledged = self.pushes.iter().filter(|push| push.step == Step::Acknowledged);
        for push in acknowledged {
            let own = push.repository;
            if self.bytes == Bytes::Gone {
                return Some("the bytes are gone".to_string());
            }
            if object != Object::Manifest
                && self.links[own] == Link::Absent
                && self.trash[own] == Link::Absent
            {
                return Some(format!("the link of r{own} is gone"));
            }
        }
        None
    }
}

/// Looks at everything that can happen from `start`; the number of states, and the shortest way to a loss.
fn explore(model: &Model, start: State) -> (usize, Option<(Vec<String>, String)>) {
    let mut seen: HashSet<State> = HashSet::from([start]);
    // Each state in the order in which it was reached, with the one before and what happened.
    let mut reached: Vec<(State, usize, Option<Event>)> = vec![(start, 0, None)];
    let mut at = 0;
    while let Some((state, ..)) = reached.get(at).copied() {
        if state.is_over()
            && let Some(loss) = state.loss(model.object)
        {
            let (mut trace, mut now) = (Vec::new(), at);
            while let (_, before, Some(event)) = reached[now] {
                trace.push(event.to_string());
                now = before;
            }
            trace.reverse();
            return (seen.len(), Some((trace, loss)));
        }
        model.each_next(&state, |event, next| {
            if seen.insert(next) {
                reached.push((next, at, Some(event)));
            }
        });
        at += 1;
    }
    (seen.len(), None)
}

/// One push of each kind, and two of all pairs of kinds, to the same and to different repositories.
fn pushes(object: Object) -> Vec<[Push; 2]> {
    let kinds: &[Kind] = match object {
        Object::Layer => &[Kind::Head, Kind::Upload, Kind::Mount, Kind::Again],
        Object::Manifest => &[Kind::Manifest],
        // HEAD of the child, its push if it is not there, the index.
        Object::Child => &[Kind::Head, Kind::Upload, Kind::Again],
    };
    let nobody = Push { step: Step::GivenUp, ..Push::new(Kind::Again, 1) };
    let mut all: Vec<[Push; 2]> = kinds.iter().map(|kind| [Push::new(*kind, 0), nobody]).collect();
    for (at, first) in kinds.iter().copied().enumerate() {
        for second in kinds.iter().copied().skip(at) {
            for repository in REPOSITORIES {
                all.push([Push::new(first, 0), Push::new(second, repository)]);
            }
        }
    }
    all
}

/// The first loss in any of the cases, those with fewer pushes first; and how many states there are.
fn check(object: Object, setting: Setting, without: Without) -> (usize, Option<(Vec<String>, String)>) {
    let model = Model { object, setting, without };
    let mut states = 0;
    for pushes in pushes(object) {
        let crashes = u8::from(without == Without::default());
        // A registry that has just started remembers nothing yet.
        for remembers in [true, false].into_iter().filter(|remembers| !remembers || setting != Setting::Off) {
            let (more, loss) = explore(&model, model.start(pushes, crashes, remembers));
            states += more;
            if loss.is_some() {
                return (states, loss);
            }
        }
    }
    (states, None)
}

/// What is said before the traces.
const INTRODUCTION: &str = "# Why nothing is lost beside a running registry

`src/gc/guard.rs` says what the steps of a sweep are. `tests/protocol.rs` cuts pushes into the steps in which a registry
touches its storage and its memory, and looks at every interleaving of one or two of them with a sweep that may be
killed anywhere, and writes this file (`REGFS_WRITE_DOCS=1 cargo test --test protocol`).

A push of an image needs, for each blob, a link that can be read or an entry in the registry's memory, and entries come
only from links. After the fence, the drain and the gate there is neither. So the first new use of the blob is an upload,
and its commit writes a link before any image can be accepted. If that commit saw the bytes, it began before they
moved, so it ended within the drain: the look before the purge finds its link, and the bytes come back.

What remains, and clients or administrators may see:

- A client that asked before the fence and sends its manifest after it is told `400` (`MANIFEST_BLOB_UNKNOWN`) and begins
  anew, as clients do.
- For moments something that was just named may be in the trash: until an event, or the next look.
- A request that takes longer than the drain, and whose answer a registry remembers: make the drain longer than the
  longest request (uploads count only from the last byte on, when the registry commits them).
- Registries that are not asked. With `--registry` all processes that serve the storage have to be named.

## Each step, left out
";

fn name(setting: Setting) -> &'static str {
    match setting {
        Setting::Off => "no cache",
        Setting::Probe => "a cache, and the registry is asked",
        Setting::Stop => "a cache, and the registry is stopped for a moment",
    }
}

#[test]
fn no_interleaving_loses_a_push_and_each_step_that_is_left_out_does() {
    let nothing = Without::default();
    let mut text = String::from(INTRODUCTION);
    let cases = [
        (
            "the fence (the links stay)",
            Object::Layer,
            Setting::Probe,
            Without { fence: true, ..nothing },
            true,
        ),
        (
            "the drain after the fence",
            Object::Layer,
            Setting::Probe,
            Without { drain: true, ..nothing },
            true,
        ),
        (
            "the gate (nobody is asked before the bytes go)",
            Object::Layer,
            Setting::Probe,
            Without { gate: true, ..nothing },
            true,
        ),
        ("the wait before the purge", Object::Layer, Setting::Probe, Without { keep: true, ..nothing }, true),
        (
            "the last look before the purge",
            Object::Layer,
            Setting::Probe,
            Without { last_mark: true, ..nothing },
            true,
        ),
        (
            "the last look before the purge",
            Object::Manifest,
            Setting::Off,
            Without { last_mark: true, ..nothing },
            true,
        ),
        (
            "telling the registry again after the drain",
            Object::Child,
            Setting::Probe,
            Without { gate: true, ..nothing },
            true,
        ),
        // These two only make what is in use come back sooner: the looks that follow find it as well.
        (
            "the look right after the bytes moved",
            Object::Layer,
            Setting::Probe,
            Without { second_look: true, ..nothing },
            false,
        ),
        (
            "minding links that were written late",
            Object::Layer,
            Setting::Probe,
            Without { late_writes: true, ..nothing },
            false,
        ),
    ];
    let all = [
        (Object::Layer, Setting::Off),
        (Object::Layer, Setting::Probe),
        (Object::Layer, Setting::Stop),
        (Object::Manifest, Setting::Off),
        (Object::Child, Setting::Off),
        (Object::Child, Setting::Probe),
    ];
    let (lacking, whole) = std::thread::scope(|scope| {
        let lacking = cases
            .map(|(_, object, setting, without, _)| scope.spawn(move || check(object, setting, without)));
        let whole = all.map(|(object, setting)| scope.spawn(move || check(object, setting, nothing)));
        (lacking.map(|thread| thread.join().unwrap()), whole.map(|thread| thread.join().unwrap()))
    });
    for ((what, object, setting, _, is_needed), (states, loss)) in cases.into_iter().zip(lacking) {
        writeln!(text, "\n### {object:?}, {}, without {what}\n", name(setting)).unwrap();
        assert_eq!(loss.is_some(), is_needed, "{object:?} without {what}: {loss:#?}");
        match loss {
            Some((trace, loss)) => {
                for (at, step) in trace.iter().enumerate() {
                    writeln!(text, "{}. {step}", at + 1).unwrap();
                }
                writeln!(text, "\nThe push was acknowledged, and {loss}.").unwrap();
            }
            None => {
                writeln!(text, "No loss in {states} states: what it finds, a later look finds, too.").unwrap()
            }
        }
    }
    text += "\n## All of them\n\n| what goes | registry | states | losses |\n|---|---|--:|--:|\n";
    for ((object, setting), (states, loss)) in all.into_iter().zip(whole) {
        assert!(loss.is_none(), "{object:?}, {setting:?}: {loss:#?}");
        writeln!(text, "| {object:?} | {} | {states} | 0 |", name(setting)).unwrap();
    }
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/protocol.md");
    if std::env::var_os("REGFS_WRITE_DOCS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    assert!(
        std::fs::read_to_string(&path).unwrap_or_default() == text,
        "docs/protocol.md is not what tests/protocol.rs says; write it anew with REGFS_WRITE_DOCS=1"
    );
}
