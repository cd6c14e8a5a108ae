//! The model: a blob, two repositories and a sweep, a step at a time; and the steps that can be left out.

mod push;

use push::{Open, Push, Step, pushes};

/// What a registry remembers, and what is asked of it before the bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Setting {
    /// No cache, no question.
    Off,
    /// A cache, and it is asked.
    Probe,
    /// A cache in redis: told and asked directly, and it outlives its registry.
    Redis,
    /// The same, and the sweep takes everything while the registry is stopped.
    RedisStop,
    /// A cache, and the sweep takes everything while it is stopped.
    Stop,
}

/// What happens.
#[derive(Clone, Copy, Debug)]
pub(super) enum Event {
    Push(usize, Push),
    Sweep(Sweep),
    Killed(Sweep),
    Failed(Sweep),
    RegistryKilled,
}

impl std::fmt::Display for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Event::Push(at, push) => {
                write!(f, "push {} (to r{}): {:?}", at + 1, push.repository, push.step)
            }
            Event::Sweep(step) => write!(f, "sweep: {step:?}"),
            Event::Killed(step) => write!(f, "the sweep is killed before {step:?}"),
            Event::Failed(step) => write!(f, "sweep: {step:?} fails"),
            Event::RegistryKilled => write!(f, "the registry is killed, and its clients begin anew"),
        }
    }
}

/// What goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Object {
    Layer,
    Manifest,
    Child,
}

/// A step of the protocol that can be left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rule {
    Fence,
    /// Whether a link that was moved is a fresh one.
    FenceCheck,
    /// What a registry could not be told to forget goes on being swept: it is asked at the gate.
    StaysStaged,
    Drain,
    Gate,
    /// That the drain begins anew is written down before a registry is told to forget once more.
    DrainFirst,
    SecondLook,
    LookBack,
    LateWrites,
    StageLast,
    LastWait,
    LastLook,
    /// Redis is asked once more before the purge.
    LastQuestion,
    Dangling,
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

/// The next step of the sweep; numbers are repositories.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Sweep {
    /// Looks at a repository; what for.
    Look(u8, For),
    FenceMove(u8),
    FenceCheck(u8),
    EvictMemory(u8, Evict),
    EvictLink(u8, Evict),
    Fenced,
    Drain,
    Gate(u8),
    LinkBefore(u8),
    MoveBytes,
    LinkAfter(u8),
    BytesBack,
    /// Other blobs have their turn.
    Elsewhere,
    Quarantined,
    Keep,
    LastQuestion,
    PurgeLinks,
    PurgeBytes,
    /// A manifest or a link has come: everything back.
    BackBytes,
    BackLink(u8),
    BackStage,
    /// While the registry is stopped: links, then bytes.
    StopLinks,
    StopBytes,
    /// Links without bytes.
    Dangling,
    DanglingMove(u8),
    DanglingMoved,
    DanglingDrain,
    DanglingBack(u8),
    Over,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum For {
    Candidates,
    /// After the links moved, or the bytes.
    LookBack,
    /// After the drain.
    Quarantine,
    Purge,
    /// After a crash.
    Anew,
}

/// When a registry is told to forget.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Evict {
    /// After the links moved, or when it said that it remembers.
    Fence,
    /// Of a manifest, once more after the drain.
    Child,
    /// Of links without bytes, and once more after a drain.
    Dangling,
    DanglingAgain,
}

/// What is written down of how far the sweep has come.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Stage {
    Nothing,
    Fencing,
    Fenced,
    Quarantined,
    /// The trash holds something of a sweep that is about nothing any more.
    Leftover,
}

/// Whether links without bytes had their turn since the sleeper wrote its link.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Turn {
    None,
    Begun,
    Over,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct State {
    bytes: Bytes,
    links: [Link; 2],
    /// `Fresh`: written after it moved here.
    trash: [Link; 2],
    refs: [bool; 2],
    memory: [bool; 2],
    /// What is remembered of the bytes, in no repository: redis only.
    knows_bytes: bool,
    /// Where there is but one, the other has given up.
    pushes: [Push; 2],
    sweep: Sweep,
    stage: Stage,
    /// What the look that goes on has seen so far.
    has_seen_use: bool,
    /// The gate said no, so the drain begins anew.
    is_refused: bool,
    turn: Turn,
    /// Times that the sweep begins from the start, at most.
    rounds: u8,
    crashes: u8,
}

/// What is checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Model {
    pub(super) object: Object,
    pub(super) setting: Setting,
    pub(super) without: Option<Rule>,
    /// The first push sleeps before it writes its link; the second begins when links without bytes had their turn.
    pub(super) has_sleeper: bool,
    /// How often the sweep may begin anew after giving back.
    pub(super) rounds: u8,
    /// How often it may be killed.
    pub(super) crashes: u8,
}

impl Model {
    /// Everything in its place, and a crash.
    ///
    /// Redis makes the most states; what a sweep that begins anew adds to these shows where a registry remembers by itself,
    /// and with a manifest.
    pub(super) fn new(object: Object, setting: Setting) -> Model {
        let begins_once = setting == Setting::Redis && object != Object::Manifest;
        Model {
            object,
            setting,
            without: None,
            has_sleeper: false,
            rounds: u8::from(!begins_once),
            crashes: 1,
        }
    }

    pub(super) fn is_redis(&self) -> bool {
        matches!(self.setting, Setting::Redis | Setting::RedisStop)
    }

    /// Whether a registry says from memory that a repository has it.
    fn recalls(&self, state: &State, at: usize) -> bool {
        self.setting != Setting::Off && state.memory[at] && (state.knows_bytes || !self.is_redis())
    }

    /// Whether a registry that found a link takes the bytes to be there.
    fn finds_bytes(&self, state: &State) -> bool {
        state.bytes == Bytes::There || state.knows_bytes
    }

    fn remember(&self, state: &mut State, at: usize) {
        state.memory[at] = true;
        state.knows_bytes = self.is_redis();
    }

    /// Whether there is somebody to ask and to tell.
    fn is_asked(&self) -> bool {
        matches!(self.setting, Setting::Probe | Setting::Redis)
    }

    fn keeps(&self, rule: Rule) -> bool {
        self.without != Some(rule)
    }

    /// Every state that it may begin in: with one push, and with one or two.
    pub(super) fn starts(&self) -> (Vec<State>, Vec<State>) {
        let linked: &[[bool; 2]] = match self.object {
            Object::Manifest => &[[false; 2]],
            _ => &[[true; 2], [true, false]],
        };
        // A registry that has just started remembers nothing yet.
        let memories = [true, false].into_iter().filter(|is| !is || self.setting != Setting::Off);
        let start = |pushes| {
            memories.clone().flat_map(move |remembers| {
                linked.iter().map(move |linked| self.start(pushes, *linked, remembers))
            })
        };
        let (one, two) = pushes(self);
        let one: Vec<State> = one.into_iter().flat_map(start).collect();
        let all = one.iter().copied().chain(two.into_iter().flat_map(start)).collect();
        (one, all)
    }

    fn start(&self, pushes: [Push; 2], linked: [bool; 2], remembers: bool) -> State {
        State {
            bytes: Bytes::There,
            links: linked.map(|is| if is { Link::Old } else { Link::Absent }),
            trash: [Link::Absent; 2],
            refs: [false; 2],
            memory: linked.map(|is| is && remembers),
            knows_bytes: remembers && self.is_redis(),
            pushes,
            sweep: Sweep::Look(0, For::Candidates),
            stage: Stage::Nothing,
            has_seen_use: false,
            is_refused: false,
            turn: Turn::None,
            rounds: self.rounds,
            crashes: self.crashes,
        }
    }

    /// Everything that can happen next.
    pub(super) fn each_next(&self, state: &State, mut each: impl FnMut(Event, State)) {
        for (at, push) in state.pushes.iter().enumerate().filter(|(_, push)| !push.is_over()) {
            let is_early = self.has_sleeper && at == 1 && state.turn != Turn::Over;
            if is_early || state.sweep == Sweep::StopBytes {
                continue;
            }
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
            next.is_refused = false;
            if state.stage == Stage::Nothing
                && self.object != Object::Child
                && state.trash != [Link::Absent; 2]
            {
                self.begin(&mut next, Stage::Leftover);
            }
            each(Event::Killed(state.sweep), next);
        }
        let is_pushed = state.pushes.iter().any(Push::is_under_way) && state.sweep != Sweep::StopBytes;
        // Only of a manifest it remembers before the link is there.
        if self.is_redis() && self.object == Object::Manifest && state.crashes > 0 && is_pushed {
            let mut next = *state;
            next.crashes -= 1;
            next.pushes
                .iter_mut()
                .filter(|push| push.is_under_way())
                .for_each(|push| push.refused(self.object));
            each(Event::RegistryKilled, next);
        }
        if let Sweep::EvictMemory(at, Evict::Fence) = state.sweep
            && state.crashes > 0
            && self.object == Object::Layer
            && self.is_known(state, at)
        {
            let mut next = *state;
            next.crashes -= 1;
            next.sweep = match self.keeps(Rule::StaysStaged) {
                true => self.evicted(at, Evict::Fence),
                false => self.enters(&mut next, Stage::Leftover),
            };
            each(Event::Failed(state.sweep), next);
        }
    }

    /// The next step of the sweep; `None` while it waits, or when it is over.
    fn sweep(&self, before: &State) -> Option<State> {
        let mut state = *before;
        let is_draining = state.pushes.iter().any(|push| push.is_under_way() && push.is_old);
        state.sweep = match state.sweep {
            Sweep::Look(at, purpose) => self.look(&mut state, at, purpose),
            Sweep::FenceMove(at) => {
                state.take_link(at);
                match at {
                    // What people remove goes whatever its age.
                    0 if self.object == Object::Child => Sweep::FenceMove(1),
                    1 if self.object == Object::Child => self.fenced(),
                    at => Sweep::FenceCheck(at),
                }
            }
            Sweep::FenceCheck(at)
                if state.trash[usize::from(at)] == Link::Fresh && self.keeps(Rule::FenceCheck) =>
            {
                Sweep::BackLink(0)
            }
            Sweep::FenceCheck(0) => Sweep::FenceMove(1),
            Sweep::FenceCheck(_) => self.fenced(),
            Sweep::EvictMemory(at, purpose) => {
                if self.is_redis() {
                    // Members first, then what is known of the bytes; links are not touched.
                    state.memory[usize::from(at)] = false;
                    if at == 0 { self.evicted(0, purpose) } else { Sweep::EvictLink(1, purpose) }
                // Only where we hold the link: DELETE also takes one that is being written, and ours then comes back.
                } else if self.is_known(&state, at) {
                    state.memory[usize::from(at)] = false;
                    Sweep::EvictLink(at, purpose)
                } else {
                    self.evicted(at, purpose)
                }
            }
            Sweep::EvictLink(at, purpose) => {
                // The DELETE of a blob takes a layer link, never the revision of a manifest.
                if self.is_redis() {
                    state.knows_bytes = false;
                } else if self.object != Object::Child {
                    state.links[usize::from(at)] = Link::Absent;
                    state.moved(at, Open::There, Open::Nowhere);
                }
                self.evicted(at, purpose)
            }
            Sweep::Fenced => self.enters(&mut state, Stage::Fenced),
            Sweep::Drain if is_draining && self.keeps(Rule::Drain) => return None,
            Sweep::Drain => Sweep::Look(0, For::Quarantine),
            Sweep::Gate(at) => self.gate(&mut state, at),
            Sweep::LinkBefore(at) if self.is_linked(&state, at) && self.is_known(&state, at) => {
                Sweep::Elsewhere
            }
            Sweep::LinkBefore(0) => Sweep::LinkBefore(1),
            Sweep::LinkBefore(_) => Sweep::MoveBytes,
            Sweep::MoveBytes => {
                if state.bytes == Bytes::There {
                    state.bytes = Bytes::Trash;
                }
                if self.object == Object::Layer {
                    state.see_pushes();
                }
                if self.keeps(Rule::SecondLook) { Sweep::LinkAfter(0) } else { Sweep::Elsewhere }
            }
            Sweep::LinkAfter(at) if self.is_linked(&state, at) && self.is_known(&state, at) => {
                Sweep::BytesBack
            }
            Sweep::LinkAfter(0) => Sweep::LinkAfter(1),
            Sweep::LinkAfter(_) => Sweep::Elsewhere,
            Sweep::BytesBack => {
                state.back();
                Sweep::Elsewhere
            }
            Sweep::Elsewhere => Sweep::Quarantined,
            Sweep::Quarantined => self.enters(&mut state, Stage::Quarantined),
            Sweep::Keep if is_draining && self.keeps(Rule::LastWait) => return None,
            Sweep::Keep if !self.keeps(Rule::LastLook) => self.purge(),
            Sweep::Keep => Sweep::Look(0, For::Purge),
            Sweep::LastQuestion if state.memory != [false; 2] || state.knows_bytes => {
                // It forgets, and whoever has seen it goes first.
                state.memory = [false; 2];
                state.knows_bytes = false;
                self.begin(&mut state, Stage::Quarantined);
                Sweep::Keep
            }
            Sweep::LastQuestion => Sweep::PurgeLinks,
            Sweep::PurgeLinks => {
                for at in [0, 1] {
                    state.trash[usize::from(at)] = Link::Absent;
                    state.moved(at, Open::Trash, Open::Nowhere);
                }
                Sweep::PurgeBytes
            }
            Sweep::PurgeBytes => {
                if state.bytes == Bytes::Trash {
                    state.bytes = Bytes::Gone;
                }
                state.stage = Stage::Nothing;
                if self.has_sleeper { Sweep::Dangling } else { Sweep::Over }
            }
            Sweep::BackBytes => {
                state.back();
                if !self.keeps(Rule::StageLast) {
                    state.stage = Stage::Nothing;
                }
                Sweep::BackLink(0)
            }
            Sweep::BackLink(at) => {
                // A manifest comes back only where an index names it.
                if !self.is_about_links(&state) || state.refs[usize::from(at)] {
                    state.link_back(at);
                }
                if at == 0 { Sweep::BackLink(1) } else { Sweep::BackStage }
            }
            Sweep::BackStage if self.is_about_links(&state) => state.waits(),
            Sweep::BackStage => {
                state.stage = Stage::Nothing;
                state.again()
            }
            Sweep::StopLinks => self.stop_and_take_links(&mut state),
            Sweep::StopBytes => {
                if self.object != Object::Child {
                    state.bytes = Bytes::Trash;
                }
                Sweep::Quarantined
            }
            Sweep::Dangling => self.dangling(&mut state),
            Sweep::DanglingMove(at) => {
                state.take_link(at);
                match at {
                    0 => Sweep::DanglingMove(1),
                    _ if self.is_asked() => Sweep::EvictMemory(0, Evict::Dangling),
                    _ => Sweep::DanglingMoved,
                }
            }
            Sweep::DanglingMoved => {
                self.drain_begins(&mut state);
                Sweep::DanglingDrain
            }
            Sweep::DanglingDrain if is_draining => return None,
            Sweep::DanglingDrain if self.is_asked() => Sweep::EvictMemory(0, Evict::DanglingAgain),
            Sweep::DanglingDrain => Sweep::DanglingBack(0),
            Sweep::DanglingBack(at) => self.dangling_back(&mut state, at),
            Sweep::Over => return None,
        };
        Some(state)
    }

    fn look(&self, state: &mut State, repository: u8, purpose: For) -> Sweep {
        let at = usize::from(repository);
        if at == 0 {
            state.see_pushes();
        }
        let is_late = state.trash[at] == Link::Fresh
            && state.stage != Stage::Quarantined
            && self.keeps(Rule::LateWrites);
        state.has_seen_use |= match purpose {
            For::Candidates if self.object == Object::Child => state.refs[at],
            // Old links are what is to be taken.
            For::Candidates => state.refs[at] || state.links[at] == Link::Fresh,
            _ if self.is_about_links(state) => {
                state.refs[at] && state.can_link_go_back(repository)
                    || state.bytes == Bytes::Trash && (state.refs[at] || self.is_linked(state, repository))
            }
            _ => state.refs[at] || self.is_linked(state, repository) || is_late,
        };
        match at {
            0 => Sweep::Look(1, purpose),
            _ => self.decide(state, purpose),
        }
    }

    /// Whether a link brings the bytes back; without a fence the old ones are where they were.
    fn is_linked(&self, state: &State, at: u8) -> bool {
        match state.links[usize::from(at)] {
            Link::Absent => false,
            Link::Old => self.keeps(Rule::Fence),
            Link::Fresh => true,
        }
    }

    /// Whether it is known that a repository may have a link: one that never had any is seen by the next look only.
    fn is_known(&self, state: &State, at: u8) -> bool {
        state.trash[usize::from(at)] != Link::Absent || !self.keeps(Rule::Fence)
    }

    /// Whether each link comes back by itself, where a manifest of its repository needs it.
    fn is_about_links(&self, state: &State) -> bool {
        self.object == Object::Child || state.stage == Stage::Leftover
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
            For::Candidates if matches!(self.setting, Setting::Stop | Setting::RedisStop) => Sweep::StopLinks,
            For::Candidates if self.object == Object::Manifest && self.setting == Setting::Redis => {
                state.stage = Stage::Fencing;
                Sweep::EvictMemory(0, Evict::Fence)
            }
            For::Candidates if !self.keeps(Rule::Fence) || self.object == Object::Manifest => Sweep::Fenced,
            For::Candidates => {
                // Of what people remove nothing is written down before the next sweep.
                state.stage = if self.object == Object::Child { Stage::Nothing } else { Stage::Fencing };
                Sweep::FenceMove(0)
            }
            For::Quarantine if self.object == Object::Child => match self.keeps(Rule::Gate) {
                // Told again to forget, now that nobody is under way who saw it.
                true if self.is_asked() => Sweep::EvictMemory(0, Evict::Child),
                _ => Sweep::Quarantined,
            },
            For::Quarantine if self.is_asked() && self.keeps(Rule::Gate) => Sweep::Gate(0),
            For::Quarantine => Sweep::LinkBefore(0),
            For::Purge => self.purge(),
            For::Anew if state.stage == Stage::Nothing && state.trash == [Link::Absent; 2] => {
                Sweep::Look(0, For::Candidates)
            }
            For::Anew if state.stage == Stage::Nothing => self.removed(),
            For::Anew | For::LookBack => state.waits(),
        }
    }

    /// After the last look.
    fn purge(&self) -> Sweep {
        let is_asked = self.setting == Setting::Redis && self.object != Object::Child;
        if is_asked && self.keeps(Rule::LastQuestion) { Sweep::LastQuestion } else { Sweep::PurgeLinks }
    }

    /// After the links moved.
    fn fenced(&self) -> Sweep {
        match self.setting {
            Setting::Probe | Setting::Redis => Sweep::EvictMemory(0, Evict::Fence),
            _ if self.object == Object::Child => self.removed(),
            _ => Sweep::Fenced,
        }
    }

    /// Of a manifest that was removed: it waits like what is fenced where a registry remembers.
    fn removed(&self) -> Sweep {
        if self.is_asked() { Sweep::Fenced } else { Sweep::Quarantined }
    }

    /// After a DELETE.
    fn evicted(&self, at: u8, purpose: Evict) -> Sweep {
        match (purpose, at) {
            (_, 0) => Sweep::EvictMemory(1, purpose),
            (Evict::Fence, _) => Sweep::Fenced,
            (Evict::Child, _) => Sweep::Quarantined,
            (Evict::Dangling, _) => Sweep::DanglingMoved,
            (Evict::DanglingAgain, _) => Sweep::DanglingBack(0),
        }
    }

    /// Asks whether a repository is remembered to have it; if one is, they are told to forget, and all waits once more.
    fn gate(&self, state: &mut State, repository: u8) -> Sweep {
        let at = usize::from(repository);
        let is_served = state.links[at] != Link::Absent && state.bytes == Bytes::There;
        if self.is_redis() {
            state.is_refused |= state.memory[at] || state.knows_bytes;
        } else if self.is_known(state, repository) {
            // To be asked makes it remember.
            state.memory[at] |= is_served;
            state.is_refused |= state.memory[at];
        }
        match at {
            0 => Sweep::Gate(1),
            _ if std::mem::take(&mut state.is_refused) => {
                if self.keeps(Rule::DrainFirst) {
                    state.stage = Stage::Fencing;
                }
                Sweep::EvictMemory(0, Evict::Fence)
            }
            _ => Sweep::LinkBefore(0),
        }
    }

    /// A step is written down; then the run ends with a look back, and the wait begins.
    fn enters(&self, state: &mut State, stage: Stage) -> Sweep {
        self.begin(state, stage);
        state.see_pushes();
        if self.keeps(Rule::LookBack) { Sweep::Look(0, For::LookBack) } else { state.waits() }
    }

    fn begin(&self, state: &mut State, stage: Stage) {
        state.stage = stage;
        self.drain_begins(state);
    }

    fn drain_begins(&self, state: &mut State) {
        for (at, push) in state.pushes.iter_mut().enumerate() {
            let is_asleep = self.has_sleeper && at == 0 && push.step == Step::LinkOpen && !push.has_retried;
            push.is_old = push.is_under_way() && !is_asleep;
        }
    }

    fn stop_and_take_links(&self, state: &mut State) -> Sweep {
        // Nothing runs: whoever had a request under way begins anew, and nobody remembers.
        for push in state.pushes.iter_mut().filter(|push| push.is_under_way()) {
            push.refused(self.object);
        }
        if !self.is_redis() || self.keeps(Rule::Gate) {
            // Redis is told.
            state.memory = [false; 2];
            state.knows_bytes = false;
        }
        if state.refs != [false; 2] || state.links.contains(&Link::Fresh) {
            return state.again();
        }
        state.trash = std::mem::replace(&mut state.links, [Link::Absent; 2]);
        Sweep::StopBytes
    }

    /// Looks for links without bytes, again and again; once more when the second push may be under way.
    fn dangling(&self, state: &mut State) -> Sweep {
        if state.turn == Turn::None && state.pushes[0].has_written() {
            state.turn = Turn::Begun;
        }
        let is_gone = state.bytes == Bytes::Gone && self.keeps(Rule::Dangling);
        if is_gone { Sweep::DanglingMove(0) } else { Sweep::DanglingBack(0) }
    }

    fn dangling_back(&self, state: &mut State, at: u8) -> Sweep {
        if state.refs[usize::from(at)] && state.bytes == Bytes::There {
            state.link_back(at);
        }
        match (at, state.turn) {
            (0, _) => Sweep::DanglingBack(1),
            (_, Turn::Over) => Sweep::Over,
            (_, Turn::Begun) => {
                state.turn = Turn::Over;
                Sweep::Dangling
            }
            (_, Turn::None) => Sweep::Dangling,
        }
    }
}

impl std::hash::Hash for State {
    /// As one number and the step: to hash each field takes most of the time here.
    fn hash<H: std::hash::Hasher>(&self, hasher: &mut H) {
        let push = |push: &Push| {
            let flags = u64::from(push.is_old) | u64::from(push.has_retried) << 1 | (push.open as u64) << 2;
            push.step as u64 | flags << 5 | u64::from(push.repository) << 9
        };
        let link = |at: usize| {
            let flags = u64::from(self.refs[at]) | u64::from(self.memory[at]) << 1;
            self.links[at] as u64 | (self.trash[at] as u64) << 2 | flags << 4
        };
        let flags = u64::from(self.has_seen_use) | u64::from(self.is_refused) << 1;
        let flags = flags | u64::from(self.knows_bytes) << 2;
        let own = self.bytes as u64 | (self.stage as u64) << 2 | (self.turn as u64) << 5 | flags << 7;
        let left = u64::from(self.rounds) | u64::from(self.crashes) << 1;
        let pushes = push(&self.pushes[0]) | push(&self.pushes[1]) << 10;
        hasher.write_u64(pushes | link(0) << 20 | link(1) << 26 | own << 32 | left << 43);
        self.sweep.hash(hasher);
    }
}

impl State {
    /// The file of a link was moved, or removed, under whoever has it open.
    fn moved(&mut self, repository: u8, from: Open, to: Open) {
        for push in self.pushes.iter_mut().filter(|p| p.repository == repository && p.open == from) {
            push.open = to;
        }
    }

    fn take_link(&mut self, repository: u8) {
        let at = usize::from(repository);
        if self.links[at] != Link::Absent {
            self.trash[at] = std::mem::replace(&mut self.links[at], Link::Absent);
            self.moved(repository, Open::There, Open::Trash);
        }
    }

    fn can_link_go_back(&self, repository: u8) -> bool {
        let at = usize::from(repository);
        self.trash[at] != Link::Absent && self.links[at] == Link::Absent
    }

    fn link_back(&mut self, repository: u8) {
        if self.can_link_go_back(repository) {
            let at = usize::from(repository);
            self.links[at] = std::mem::replace(&mut self.trash[at], Link::Absent);
            self.moved(repository, Open::Trash, Open::There);
        }
    }

    fn back(&mut self) {
        if self.bytes == Bytes::Trash {
            self.bytes = Bytes::There;
        }
    }

    /// From now on the sweep has had the chance to see what was acknowledged.
    fn see_pushes(&mut self) {
        for push in self.pushes.iter_mut().filter(|push| push.step == Step::Acknowledged) {
            push.step = Step::Seen;
        }
    }

    /// What a run that has nothing to do waits for.
    fn waits(&self) -> Sweep {
        match self.stage {
            Stage::Nothing | Stage::Fencing => Sweep::Fenced,
            Stage::Fenced => Sweep::Drain,
            Stage::Quarantined | Stage::Leftover => Sweep::Keep,
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

    /// What a push that was acknowledged lacks for ever.
    pub(super) fn loss(&self, model: &Model) -> Option<String> {
        let own = self.pushes.iter().skip(usize::from(model.has_sleeper));
        own.filter(|push| push.is_acknowledged()).find_map(|push| {
            let at = usize::from(push.repository);
            let is_gone = self.links[at] == Link::Absent && self.trash[at] == Link::Absent;
            match model.object {
                _ if self.bytes == Bytes::Gone => Some("the bytes are gone".to_string()),
                Object::Layer | Object::Child if is_gone => Some(format!("the link of r{at} is gone")),
                _ => None,
            }
        })
    }

    /// What a push lacks while the sweep is busy elsewhere or waits, although it was acknowledged before the sweep last
    /// looked.
    pub(super) fn lack(&self, model: &Model) -> Option<String> {
        // A sleeper may be broken for good.
        if model.has_sleeper {
            return None;
        }
        let waits = match self.sweep {
            Sweep::Elsewhere => "the sweep goes on with other blobs",
            Sweep::Drain => "the sweep waits for the drain",
            Sweep::Keep => "the sweep waits for days",
            _ => return None,
        };
        self.pushes.iter().filter(|push| push.step == Step::Seen).find_map(|push| {
            let at = usize::from(push.repository);
            match model.object {
                _ if self.sweep == Sweep::Elsewhere && !model.is_known(self, push.repository) => None,
                _ if self.bytes != Bytes::There => Some(format!("{waits}, and the bytes lie in the trash")),
                Object::Layer | Object::Child if self.links[at] == Link::Absent => {
                    Some(format!("{waits}, and the link of r{at} lies in the trash"))
                }
                _ => None,
            }
        })
    }
}
