//! The protocol of `gc::guard`, checked in every interleaving: pushes of every kind, each cut into the steps in which a
//! registry touches its storage and its memory, with one sweep cut into its own, and a crash of that anywhere.
//!
//! A model, not the code: small enough that all of it can be looked at. What it says about each step that is left out
//! stands, with the shortest way to a loss, in `docs/protocol.md`, which this test writes and compares.
//!
//! One object, two repositories, both or one of which have a link to it; nothing names it. A registry with a cache
//! remembers it, or has just been started and does not. A push names it in one of them. It is lost when it was
//! acknowledged and the link or the bytes are neither in their place nor in the trash (from which they come back, being in
//! use); and broken when they lie in the trash while the sweep is busy elsewhere or waits. The object is
//!
//! - a layer: it goes with its links;
//! - a manifest that no repository has any more: no links lead to it, and only where nobody remembers does it go;
//! - a child: a manifest that is taken out of a repository (`rm`, untagged) and named by an index that is pushed. Its link
//!   is that of its revision; its bytes stay.
//!
//! A drain is over when every request has ended that was under way when it began; a client may take as long as it
//! likes between two requests. A sleeper is a request for which no drain waits: it saw the bytes, and writes its link when
//! they may be gone.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "protocol/model.rs"]
mod model;

use std::fmt::Write as _;
use std::hash::{BuildHasher, BuildHasherDefault, Hasher};
use std::sync::Mutex;

use hashbrown::HashTable;

use model::{Model, Object, Rule, Setting, State};

/// What leaving it out leads to at worst.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Worst {
    Lost,
    Broken,
    Nothing,
}

impl Rule {
    const ALL: [(Rule, Worst); 14] = [
        (Rule::Fence, Worst::Lost),
        (Rule::FenceCheck, Worst::Nothing),
        (Rule::StaysStaged, Worst::Lost),
        (Rule::Drain, Worst::Lost),
        (Rule::Gate, Worst::Lost),
        (Rule::DrainFirst, Worst::Lost),
        (Rule::SecondLook, Worst::Broken),
        (Rule::LookBack, Worst::Broken),
        (Rule::LateWrites, Worst::Nothing),
        (Rule::StageLast, Worst::Lost),
        (Rule::LastWait, Worst::Lost),
        (Rule::LastLook, Worst::Lost),
        (Rule::LastQuestion, Worst::Lost),
        (Rule::Dangling, Worst::Lost),
    ];

    fn text(self) -> &'static str {
        match self {
            Rule::Fence => "the fence (the links stay)",
            Rule::FenceCheck => "putting a fresh link back that was moved",
            Rule::StaysStaged => "going on with a blob that a registry could not be told to forget",
            Rule::Drain => "the drain after the fence",
            Rule::Gate => "the gate (nobody is asked, or told again)",
            Rule::DrainFirst => {
                "writing down that the drain begins anew before a registry is told to forget once more"
            }
            Rule::SecondLook => "the look for links right after the bytes moved",
            Rule::LookBack => "the look back at the end of a run",
            Rule::LateWrites => "minding links that were written late",
            Rule::StageLast => {
                "writing down that a sweep is no longer about a blob only after all of it is back"
            }
            Rule::LastWait => "the wait before the purge",
            Rule::LastLook => "the last look before the purge",
            Rule::LastQuestion => "asking redis once more before the purge",
            Rule::Dangling => "taking links without bytes",
        }
    }

    /// Whether there is such a step where `object` goes.
    fn applies(self, object: Object, setting: Setting) -> bool {
        let is_beside = !matches!(setting, Setting::Stop | Setting::RedisStop);
        let is_asked = matches!(setting, Setting::Probe | Setting::Redis);
        let is_redis = matches!(setting, Setting::Redis | Setting::RedisStop);
        // The others do not ask what remembers.
        let is_of_redis =
            matches!(self, Rule::Fence | Rule::Drain | Rule::Gate | Rule::LastLook | Rule::LastQuestion);
        if is_redis && !is_of_redis {
            return false;
        }
        let has_links = object == Object::Layer && is_beside;
        match self {
            Rule::Fence
            | Rule::FenceCheck
            | Rule::LateWrites
            | Rule::SecondLook
            | Rule::StageLast
            | Rule::Dangling => has_links,
            Rule::Drain => is_beside && (object != Object::Child || is_asked),
            Rule::Gate => is_asked || setting == Setting::RedisStop,
            Rule::LastQuestion => object == Object::Manifest && setting == Setting::Redis,
            Rule::DrainFirst | Rule::StaysStaged => has_links && is_asked,
            Rule::LookBack | Rule::LastWait | Rule::LastLook => true,
        }
    }

    /// What shows it.
    fn model(self, object: Object, setting: Setting) -> Model {
        let model = Model::new(object, setting);
        let needs_crash =
            matches!(self, Rule::DrainFirst | Rule::StageLast | Rule::StaysStaged | Rule::LastQuestion);
        Model {
            without: Some(self),
            has_sleeper: self == Rule::Dangling,
            rounds: 0,
            crashes: needs_crash.into(),
            ..model
        }
    }
}

/// A hash of a few small numbers.
#[derive(Default)]
struct Fast(u64);

impl Hasher for Fast {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 29)
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u8(*byte));
    }

    fn write_u8(&mut self, number: u8) {
        self.write_u64(number.into());
    }

    fn write_isize(&mut self, number: isize) {
        self.write_u64(number.cast_unsigned() as u64);
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0.rotate_left(5) ^ number).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

/// The way to a state, and what is wrong there.
type Trace = (Vec<String>, String);

/// What was found: how many states there are up to the first loss; that; and the first time that something was broken.
#[derive(Clone, Default, Debug)]
struct Found {
    states: usize,
    loss: Option<Trace>,
    lack: Option<(usize, Trace)>,
}

/// The states in the order in which they were reached, each with the one before, and where to find them.
#[derive(Default)]
struct Reached {
    states: Vec<(State, Option<u32>)>,
    places: HashTable<u32>,
}

impl Reached {
    fn add(&mut self, state: State, before: Option<u32>) {
        let Reached { states, places } = self;
        let hash = |state: &State| BuildHasherDefault::<Fast>::default().hash_one(state);
        let hashed = hash(&state);
        if places.find(hashed, |at| states[*at as usize].0 == state).is_none() {
            let at = u32::try_from(states.len()).unwrap();
            places.insert_unique(hashed, at, |at| hash(&states[*at as usize].0));
            states.push((state, before));
        }
    }

    /// What happened on the way to a state.
    fn trace(&self, model: &Model, mut at: usize) -> Vec<String> {
        let mut trace = Vec::new();
        while let (state, Some(before)) = self.states[at] {
            at = before as usize;
            let mut event = None;
            model.each_next(&self.states[at].0, |with, next| {
                event = event.or(Some(with).filter(|_| next == state));
            });
            trace.push(event.unwrap().to_string());
        }
        trace.reverse();
        trace
    }
}

/// Looks at everything that can happen, nearest first, until something is lost.
fn explore(model: &Model, starts: &[State]) -> Found {
    let (mut reached, mut found, mut at) = (Reached::default(), Found::default(), 0);
    starts.iter().for_each(|state| reached.add(*state, None));
    while let Some((state, _)) = reached.states.get(at).copied() {
        if let Some(lack) = state.lack(model).filter(|_| found.lack.is_none()) {
            found.lack = Some((reached.states.len(), (reached.trace(model, at), lack)));
        }
        if let Some(loss) = state.loss(model) {
            found.loss = Some((reached.trace(model, at), loss));
            break;
        }
        let before = u32::try_from(at).ok();
        model.each_next(&state, |_, next| reached.add(next, before));
        at += 1;
    }
    found.states = reached.states.len();
    found
}

/// All that can happen with one or two pushes; what one is enough to show, with that.
fn check(model: &Model) -> Found {
    let (one, all) = model.starts();
    if model.without.is_none() {
        return explore(model, &all);
    }
    let found = explore(model, &one);
    if found.loss.is_some() {
        return found;
    }
    let more = explore(model, &all);
    Found { lack: found.lack.or(more.lack), ..more }
}

/// Checks all of them, on as many threads as there are processors.
fn check_all(models: &[Model]) -> Vec<Found> {
    let next = Mutex::new(models.iter().enumerate());
    let found = Mutex::new(vec![Found::default(); models.len()]);
    let work = || {
        loop {
            let Some((at, model)) = next.lock().unwrap().next() else { return };
            let one = check(model);
            found.lock().unwrap()[at] = one;
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    found.into_inner().unwrap()
}

/// What is said before the traces.
const INTRODUCTION: &str = "# Why nothing is lost beside a running registry

`src/gc/guard.rs` says what the steps of a sweep are. `tests/protocol.rs` cuts pushes into the steps in which a registry
touches its storage and its memory, and looks at every interleaving of one or two of them with a sweep that may be
killed anywhere, and writes this file (`REGFS_WRITE_DOCS=1 cargo test --test protocol`).

Redis is a memory of all registries that no DELETE and no restart clears: who has the blob, in each repository, and what is
known of its bytes. It is told and asked directly, members first, and touches no link. A registry remembers a manifest
before it writes the link, so one that is killed between the two leaves an entry in redis and no link.

A push of an image needs, for each blob, a link that can be read or an entry in the registry's memory, and entries come
only from links. After the fence, the drain and the gate there is neither. So the first new use of the blob is an upload,
and its commit writes a link before any image can be accepted. If that commit saw the bytes, it began before they
moved, so it ended within the drain: the look before the purge finds its link, and the bytes come back.

What remains, and clients or administrators may see:

- A client that asked before the fence and sends its manifest after it is told `400` (`MANIFEST_BLOB_UNKNOWN`) and has
  to begin anew.
- Something that was just named may be in the trash until an event, or until the look back at the end of a run. That is
  so in a repository that had no link to the blob before: the look right after the bytes moved knows of no link there.
- A request that takes longer than the drain and the time in the trash together between two of its steps: its own client
  may be told that all is well, once. Links without bytes that it leaves are taken and forgotten, so nobody else is. What
  no look can find is one that sleeps after its link is written, or was seen, and before the registry remembers it;
  nothing but computing lies between the two, or the removal of the upload. So make the drain longer than the longest
  request (uploads count only from the last byte on, when the registry commits them).
- Registries that are not asked. With `--registry` all processes that serve the storage have to be named.
";

/// What is said before the table of what is left out.
const LEFT_OUT: &str = "
## What each step is for

What happens at worst when one is left out, and in how many states until then. *Lost*: a push that was acknowledged
lacks its link or its bytes for good. *Broken*: it lacks them, acknowledged before the sweep last looked, while the sweep
goes on with other blobs or waits. *-*: neither, in all the states there are. No word: there is no such step.

With redis the table has those steps only in which it differs.

Two looks are not there against losses: what they find, the last look before the purge finds as well, but that is days
later. The look right after the bytes moved is for what was acknowledged before, while the sweep may go on for hours with
other blobs; the look back at the end of a run is for what was acknowledged meanwhile, before the wait that follows.
Neither needs fresh links to be put back at once, nor those to be minded that were written late: both spare clients a
`400`, after which they would begin anew.

Without a cache no single step is needed against losing a layer, since such a registry looks for the link and the bytes
again when the manifest comes. While a registry is stopped no request is under way and nothing is remembered, so what is
taken then needs no step at all.

";

fn name(setting: Setting) -> &'static str {
    match setting {
        Setting::Off => "no cache",
        Setting::Probe => "asked",
        Setting::Stop => "stopped",
        Setting::Redis => "redis",
        Setting::RedisStop => "redis, stopped",
    }
}

const ALL: [(Object, Setting); 13] = [
    (Object::Layer, Setting::Redis),
    (Object::Layer, Setting::RedisStop),
    (Object::Manifest, Setting::Redis),
    (Object::Manifest, Setting::RedisStop),
    (Object::Child, Setting::Redis),
    (Object::Layer, Setting::Probe),
    (Object::Layer, Setting::Off),
    (Object::Layer, Setting::Stop),
    (Object::Manifest, Setting::Off),
    (Object::Manifest, Setting::Stop),
    (Object::Child, Setting::Probe),
    (Object::Child, Setting::Off),
    (Object::Child, Setting::Stop),
];

impl Found {
    fn worst(&self) -> Worst {
        match self {
            Found { loss: Some(_), .. } => Worst::Lost,
            Found { lack: Some(_), .. } => Worst::Broken,
            _ => Worst::Nothing,
        }
    }

    /// A cell of the table.
    fn text(&self) -> String {
        match &self.lack {
            _ if self.loss.is_some() => format!("lost ({})", self.states),
            Some((states, _)) => format!("broken ({states})"),
            None => format!("- ({})", self.states),
        }
    }

    fn trace(&self) -> Option<&Trace> {
        self.loss.as_ref().or(self.lack.as_ref().map(|(_, trace)| trace))
    }
}

/// The line of the table for a step that is left out, and the shortest way to the worst that follows.
fn row(rule: Rule, found: &[(Model, Found)]) -> (String, String) {
    let (mut line, mut worst) = (format!("| {} |", rule.text()), None);
    for (object, setting) in ALL {
        let of = |(model, _): &&(Model, Found)| {
            (model.without, model.object, model.setting) == (Some(rule), object, setting)
        };
        let cell = found.iter().find(of);
        line += &cell.map_or(" |".to_string(), |(_, found)| format!(" {} |", found.text()));
        if let Some((_, one)) = cell
            && worst.is_none_or(|(_, before): (Object, &Found)| one.loss.is_some() && before.loss.is_none())
            && one.trace().is_some()
        {
            worst = Some((object, one));
        }
    }
    let mut text = String::new();
    if let Some((object, found)) = worst
        && let Some((trace, what)) = found.trace()
    {
        writeln!(text, "\n### Without {} ({object:?})\n", rule.text()).unwrap();
        for (at, step) in trace.iter().enumerate() {
            writeln!(text, "{}. {step}", at + 1).unwrap();
        }
        writeln!(text, "\nThe push was acknowledged, and {what}.").unwrap();
    }
    (line, text)
}

/// The table of all that holds when nothing is left out.
fn whole(found: &[(Model, Found)]) -> String {
    let mut text = "\n## Nothing left out\n\n| what goes | registry | | states | lost | broken |\n|---|---|---|--:|--:|--:|\n".to_string();
    for (model, found) in found.iter().filter(|(model, _)| model.without.is_none()) {
        assert_eq!(found.worst(), Worst::Nothing, "{model:?}: {found:#?}");
        let how = match model {
            Model { has_sleeper: true, .. } => "a request sleeps",
            Model { rounds: 0, .. } => "a crash, or a DELETE that fails, anywhere; one sweep",
            _ => "a crash, or a DELETE that fails, anywhere; the sweep may begin anew",
        };
        let (object, setting, states) = (model.object, name(model.setting), found.states);
        writeln!(text, "| {object:?} | {setting} | {how} | {states} | 0 | 0 |").unwrap();
    }
    text + "| Manifest | asked | it stays: 2.8 and 3.1 do not write again what they remember | | | |\n"
}

#[test]
fn no_interleaving_loses_a_push_and_each_step_that_is_left_out_does() {
    let mut models: Vec<Model> = ALL.map(|(object, setting)| Model::new(object, setting)).into();
    for setting in [Setting::Redis, Setting::Probe, Setting::Off] {
        models.push(Model { without: None, ..Rule::Dangling.model(Object::Layer, setting) });
    }
    for (rule, _) in Rule::ALL {
        let all = ALL.into_iter().filter(|(object, setting)| rule.applies(*object, *setting));
        models.extend(all.map(|(object, setting)| rule.model(object, setting)));
    }
    let found: Vec<(Model, Found)> = models.iter().copied().zip(check_all(&models)).collect();
    let mut text = [INTRODUCTION, LEFT_OUT].concat();
    text += "| without |";
    ALL.iter().for_each(|(object, setting)| text += &format!(" {object:?}, {} |", name(*setting)));
    text += &format!("\n|---|{}\n", "--:|".repeat(ALL.len()));
    let mut traces = String::new();
    for (rule, worst) in Rule::ALL {
        let of_rule =
            || found.iter().filter(|(model, _)| model.without == Some(rule)).map(|(_, f)| f.worst());
        let is = |what| of_rule().any(|worst| worst == what);
        let really = [Worst::Lost, Worst::Broken].into_iter().find(|what| is(*what));
        assert_eq!(really.unwrap_or(Worst::Nothing), worst, "without {}", rule.text());
        let (line, trace) = row(rule, &found);
        text += &(line + "\n");
        traces += &trace;
    }
    text += &whole(&found);
    text += "\n## Each step, left out\n";
    text += &traces;
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/protocol.md");
    if std::env::var_os("REGFS_WRITE_DOCS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    assert!(
        std::fs::read_to_string(&path).unwrap_or_default() == text,
        "docs/protocol.md is not what tests/protocol.rs says; write it anew with REGFS_WRITE_DOCS=1"
    );
}
