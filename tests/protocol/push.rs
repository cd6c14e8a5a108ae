//! What a registry does for a push, a system call or a change of its memory at a time.

use super::{Bytes, Link, Model, Object, Setting, State};

/// Where the file is that a request has open to write a link.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Open {
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
pub(crate) enum Step {
    HeadLink,
    HeadBytes,
    HeadRemember,
    MountLink,
    MountBytes,
    MountRemember,
    UploadBytes,
    UploadMove,
    LinkOpen,
    LinkWrite,
    LinkRemember,
    PutLink,
    PutBytes,
    PutRemember,
    ManifestBytes,
    ManifestWrite,
    ManifestRemember,
    PutRef,
    Acknowledged,
    /// The same, and the sweep has begun to look since.
    Seen,
    GivenUp,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Push {
    pub(super) repository: u8,
    pub(super) step: Step,
    pub(super) has_retried: bool,
    pub(super) open: Open,
    /// Its request was under way when the drain began that is waited for.
    pub(super) is_old: bool,
}

impl Push {
    fn new(kind: Kind, repository: u8) -> Push {
        let step = match kind {
            Kind::Head => Step::HeadLink,
            Kind::Upload => Step::UploadBytes,
            Kind::Mount => Step::MountLink,
            Kind::Again => Step::PutLink,
            Kind::Manifest => Step::ManifestBytes,
        };
        Push { repository, step, has_retried: false, open: Open::Nowhere, is_old: false }
    }

    pub(super) fn is_under_way(&self) -> bool {
        use Step::*;
        let is_between = matches!(self.step, HeadLink | MountLink | UploadBytes | PutLink | ManifestBytes);
        !is_between && !self.is_over()
    }

    pub(super) fn is_acknowledged(&self) -> bool {
        matches!(self.step, Step::Acknowledged | Step::Seen)
    }

    pub(super) fn is_over(&self) -> bool {
        self.is_acknowledged() || self.step == Step::GivenUp
    }

    /// Whether the link of its first upload or mount is written.
    pub(super) fn has_written(&self) -> bool {
        use Step::*;
        let writes = matches!(self.step, LinkRemember | PutLink | PutBytes | PutRemember | PutRef);
        writes || self.has_retried || self.is_over()
    }

    /// A new request begins.
    fn go(&mut self, step: Step) {
        self.step = step;
        self.is_old = false;
    }

    /// The registry says that something is unknown, or goes: clients begin anew, once here.
    pub(super) fn refused(&mut self, object: Object) {
        self.open = Open::Nowhere;
        let first = if object == Object::Manifest { Step::ManifestBytes } else { Step::HeadLink };
        self.go(if self.has_retried { Step::GivenUp } else { first });
        self.has_retried = true;
    }
}

impl Model {
    /// The next step of a push.
    pub(super) fn push(&self, state: &mut State, at: usize) {
        let remembers = self.setting != Setting::Off;
        let mut push = state.pushes[at];
        let own = usize::from(push.repository);
        let other = 1 - own;
        let is_there = state.bytes == Bytes::There;
        let finds = self.finds_bytes(state);
        match push.step {
            Step::HeadLink if self.recalls(state, own) => push.go(Step::PutLink),
            Step::HeadLink if state.links[own] == Link::Absent => push.go(Step::UploadBytes),
            Step::HeadLink => push.step = Step::HeadBytes,
            Step::HeadBytes if finds && remembers => push.step = Step::HeadRemember,
            Step::HeadBytes if finds => push.go(Step::PutLink),
            Step::HeadBytes => push.go(Step::UploadBytes),
            Step::HeadRemember => {
                self.remember(state, own);
                push.go(Step::PutLink);
            }
            Step::MountLink if self.recalls(state, other) => push.step = Step::LinkOpen,
            Step::MountLink if state.links[other] == Link::Absent => push.go(Step::UploadBytes),
            Step::MountLink => push.step = Step::MountBytes,
            Step::MountBytes if finds && remembers => push.step = Step::MountRemember,
            Step::MountBytes if finds => push.step = Step::LinkOpen,
            Step::MountBytes => push.go(Step::UploadBytes),
            Step::MountRemember => {
                self.remember(state, other);
                push.step = Step::LinkOpen;
            }
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
                if remembers { push.step = Step::LinkRemember } else { push.go(Step::PutLink) }
            }
            Step::LinkRemember => {
                self.remember(state, own);
                push.go(Step::PutLink);
            }
            Step::PutLink if self.recalls(state, own) => push.step = Step::PutRef,
            Step::PutLink if state.links[own] == Link::Absent => push.refused(self.object),
            Step::PutLink => push.step = Step::PutBytes,
            Step::PutBytes if finds && remembers => push.step = Step::PutRemember,
            Step::PutBytes if finds => push.step = Step::PutRef,
            Step::PutBytes => push.refused(self.object),
            Step::PutRemember => {
                self.remember(state, own);
                push.step = Step::PutRef;
            }
            Step::ManifestBytes if finds => push.step = Step::ManifestRemember,
            Step::ManifestBytes => push.step = Step::ManifestWrite,
            Step::ManifestWrite => {
                state.bytes = Bytes::There;
                push.step = Step::ManifestRemember;
            }
            Step::ManifestRemember => {
                // Before its link.
                if self.is_redis() {
                    self.remember(state, own);
                }
                push.step = Step::PutRef;
            }
            Step::PutRef => {
                state.refs[own] = true;
                push.go(Step::Acknowledged);
            }
            Step::Acknowledged | Step::Seen | Step::GivenUp => {}
        }
        state.pushes[at] = push;
    }
}

/// One push of each kind, and two of all pairs of kinds, to the same and to different repositories.
pub(super) fn pushes(model: &Model) -> (Vec<[Push; 2]>, Vec<[Push; 2]>) {
    use Kind::*;
    let kinds: &[Kind] = match model.object {
        Object::Layer => &[Head, Upload, Mount, Again],
        Object::Manifest => &[Manifest],
        // HEAD of the child, its push if it is not there, the index.
        Object::Child => &[Head, Upload, Again],
    };
    let sleepers: &[Kind] = if model.has_sleeper { &[Upload, Mount] } else { kinds };
    let every = |kinds: &[Kind]| -> Vec<Push> {
        kinds.iter().flat_map(|kind| [0, 1].map(|to| Push::new(*kind, to))).collect()
    };
    let nobody = Push { step: Step::GivenUp, ..Push::new(Again, 1) };
    let one = every(sleepers).into_iter().map(|push| [push, nobody]).collect();
    let mut two = Vec::new();
    for (at, first) in every(sleepers).into_iter().enumerate() {
        // Who is the first of two matters only where one sleeps; and who asked before the link was there, asked too early.
        let from = if model.has_sleeper { 0 } else { at };
        let others = every(kinds).into_iter().enumerate().skip(from);
        let asks = |(at, _): &(usize, Push)| !model.has_sleeper || kinds[at / 2] != Again;
        two.extend(others.filter(asks).map(|(_, second)| [first, second]));
    }
    (one, two)
}
