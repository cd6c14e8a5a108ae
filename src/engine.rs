//! A mounted registry: the current snapshot, and every change that is made through the mount.
//!
//! Knows neither the kernel nor a command line. Answers come from an immutable [`Snapshot`]; a refresh or a
//! change publishes the next one.
//!
//! # Freshness
//! See [`fresh`]. A change of our own publishes what it left. Whoever remembers parts of the tree (the kernel, for the
//! mount) hears with each snapshot what is not so any more.
//!
//! # Locks
//! `changing` is held by a refresh and by a change of our own (order: `changing`, then the lock of the store, then
//! `watch`, then `current`). A collection holds only the lock of the store, so that everything else goes on meanwhile.

pub mod forgetting;
pub mod fresh;
mod guarding;
mod journal;
mod keeping;
mod relocate;
mod remove;
mod retag;
mod retired;
pub mod schedule;
mod status;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use crate::advice::{Advice, Place};
use crate::catalog::cache::{self, News, Place as CachePlace};
use crate::catalog::intern::DigestId;
use crate::catalog::scan::scan;
use crate::catalog::{Catalog, Tables};
use crate::costly::Costly;
use crate::error::{Error, Result};
use crate::gc::guard::gate::{Gate, Said};
use crate::gc::guard::state;
use crate::gc::named::Named;
use crate::gc::report::timestamp;
use crate::gc::{self, Options, give_back};
use crate::keeper::Keeper;
use crate::printable;
use crate::progress::Watched;
use crate::registries::Known;
use crate::store::Store;
use crate::trash::undo::{LAST, which};
use crate::trash::{self, Author};
use crate::view::control::{self, GcCommand, TrashCommand};
use crate::view::node::Node;
use crate::view::{Settings, Snapshot, View};
use crate::watch::Watch;
use forgetting::Forget;
use fresh::Listener;
use guarding::Guarded;
use journal::Journal;
use remove::Open;

/// So many manifests take longer to read than to find in the cache.
const WORTH_KEEPING: usize = 5_000;
/// How long a change waits for another regfs.
const LOCK_WAIT: Duration = Duration::from_secs(2);

/// A poisoned lock is taken all the same: what it guards is replaced as a whole or only shown to people.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a control file says about the last command, so that nobody takes it for the answer to another one.
fn answer_to(command: &str, answer: &str) -> String {
    let lines: String = answer.lines().map(|line| format!("  {line}\n")).collect();
    format!("answer to {:?} at {}:\n{lines}", command.trim(), timestamp(SystemTime::now()))
}

/// Whether the control file says what came of a command although that failed.
fn has_answered(error: &Error) -> bool {
    matches!(error, Error::Unfinished { .. } | Error::HeldBack { .. })
}

/// A mounted registry.
pub struct Engine {
    store: Arc<dyn Store>,
    settings: Settings,
    tables: Tables,
    current: RwLock<Arc<Snapshot>>,
    looked: Mutex<Looked>,
    changing: Mutex<Option<Open>>,
    journal: Mutex<Journal>,
    reports: Mutex<Reports>,
    /// How much garbage is how far on its way out.
    garbage: Costly<Vec<state::Total>>,
    run: Run,
    /// The trash may hold something that a manifest names; the next refresh finds out.
    is_heal_due: AtomicBool,
    healed: Mutex<Looked>,
    watch: Mutex<Option<Watch>>,
    /// The first catalog and the links known before, until what is news is kept for the next mount.
    unkept: Mutex<Option<(Catalog, Catalog)>>,
    registries: Known,
    /// What of them says who keeps the tags, and since when that is known.
    keeper: Mutex<Option<(Instant, Keeper)>>,
    /// What pushes are about to name.
    named: Named,
    guarded: Mutex<Option<Guarded>>,
    /// The mount has lost its place.
    is_retired: AtomicBool,
    /// What registries are to forget, and who tells them, before that has begun.
    forgetting: Sender<Forget>,
    forgotten: Mutex<Option<Receiver<Forget>>>,
    listener: Mutex<Option<Arc<dyn Listener>>>,
}

struct Looked {
    at: Instant,
    cost: Duration,
}

/// What control files read like.
struct Reports {
    gc: String,
    trash: Option<String>,
    refresh: String,
    last_error: Option<String>,
    /// So many sweeps have ended.
    sweeps: usize,
    /// What a sweep relies on, as far as it is known.
    gate: Option<Gate>,
    /// When the next one begins by itself.
    next_sweep: Option<SystemTime>,
    /// Why the kernel does not tell what changes.
    unwatched: Option<String>,
}

/// The collection that runs.
#[derive(Default)]
struct Run {
    is_running: AtomicBool,
    /// No registry is told to forget anything.
    tells_nobody: AtomicBool,
    watched: Watched,
}

impl Run {
    /// Whether a collection goes on that tells no registry to forget anything.
    fn tells_nobody(&self) -> bool {
        self.is_running.load(Ordering::SeqCst) && self.tells_nobody.load(Ordering::SeqCst)
    }
}

/// The collection is over when this goes, also by a panic.
struct Running<'a>(&'a Run);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.is_running.store(false, Ordering::SeqCst);
    }
}

impl Engine {
    /// Looks at the storage for the first time.
    pub fn new(store: Arc<dyn Store>, settings: Settings) -> Result<Engine> {
        let began = Instant::now();
        let (mut tables, links) = cache::load(&*store, &CachePlace::Store, &Tables::new(None));
        let mut catalog = scan(&*store, &tables, Some(&links));
        let is_worth_keeping = catalog.manifests.len() >= WORTH_KEEPING && !settings.read_only;
        let unkept = is_worth_keeping.then(|| (catalog.clone(), links));
        // All that is needed of it is in the catalog by now.
        catalog.tables.known = Arc::default();
        tables.known = Arc::default();
        let ids = match trash::ids(&*store) {
            // Only its owner may look into the trash; others see the rest.
            Err(e) if settings.read_only => {
                log::warn!("{e}");
                Vec::new()
            }
            ids => ids?,
        };
        let snapshot = Snapshot::new(catalog, ids);
        let (forgetting, forgotten) = channel();
        let cost = began.elapsed();
        log::info!(
            "looked at {} repositories, {} manifests, {} blobs in {cost:?}",
            snapshot.catalog.repositories.len(),
            snapshot.catalog.manifests.len(),
            snapshot.catalog.blobs.len(),
        );
        Ok(Engine {
            store,
            settings,
            tables,
            current: RwLock::new(Arc::new(snapshot)),
            looked: Mutex::new(Looked { at: Instant::now(), cost }),
            changing: Mutex::new(None),
            journal: Mutex::default(),
            reports: Mutex::new(Reports {
                gc: format!("no collection has run since the mount\nunderstood: {}\n", control::GC_GRAMMAR),
                trash: None,
                refresh: "write anything to look at the storage now\n".to_string(),
                last_error: None,
                sweeps: 0,
                gate: None,
                next_sweep: None,
                unwatched: None,
            }),
            garbage: Costly::default(),
            run: Run::default(),
            is_heal_due: AtomicBool::new(true),
            healed: Mutex::new(Looked { at: Instant::now(), cost: Duration::ZERO }),
            watch: Mutex::default(),
            unkept: Mutex::new(unkept),
            registries: Known::default(),
            keeper: Mutex::default(),
            named: Named::default(),
            guarded: Mutex::default(),
            is_retired: AtomicBool::new(false),
            forgetting,
            forgotten: Mutex::new(Some(forgotten)),
            listener: Mutex::default(),
        })
    }

    /// The same, with what is known of the registries that serve the store.
    pub fn with_registries(self, registries: Known) -> Engine {
        Engine { registries, ..self }
    }

    /// Keeps what manifests say for the next mount or collection, if there are many.
    pub fn keep_parsed(&self) {
        let Some((catalog, links)) = locked(&self.unkept).take() else { return };
        // A collection that has the lock keeps it by itself.
        let Ok(_lock) = self.store.lock("regfs mount", Duration::ZERO) else { return };
        if let Err(e) = cache::save(&*self.store, &CachePlace::Store, &catalog, News::of(&catalog, &links)) {
            log::warn!("{e}");
        }
    }

    /// Where bytes come from.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// What does not change.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    fn current(&self) -> Arc<Snapshot> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Answers from `snapshot`.
    pub fn view<'a>(&'a self, snapshot: &'a Snapshot) -> View<'a> {
        View { snapshot, store: &*self.store, settings: &self.settings }
    }

    /// Publishes a newer catalog if it says something new, after giving back what is in use again.
    fn heal_and_publish(&self, catalog: Catalog, ids: Vec<String>, is_same: bool, blobs: &[DigestId]) {
        if is_same && !self.is_heal_due.load(Ordering::SeqCst) {
            return;
        }
        let (catalog, restored) = match ids.is_empty() {
            true => (catalog, Some(0)),
            false if !self.may_heal() => (catalog, None),
            false => {
                let began = Instant::now();
                let healed = self.heal(catalog);
                *locked(&self.healed) = Looked { at: Instant::now(), cost: began.elapsed() };
                healed
            }
        };
        if !is_same || restored.is_some_and(|count| count > 0) {
            let ids = if restored == Some(0) { ids } else { self.transactions() };
            self.publish(catalog, ids, blobs);
        }
        self.is_heal_due.store(restored.is_none(), Ordering::SeqCst);
    }

    /// Whether it is not too soon to compare with the trash again, which takes time where much is in it.
    fn may_heal(&self) -> bool {
        let healed = locked(&self.healed);
        healed.at.elapsed() >= healed.cost * fresh::COST_FACTOR
    }

    /// Gives back what a push named again; the catalog afterwards, and how much came back; `None` when it is to be
    /// tried again.
    fn heal(&self, catalog: Catalog) -> (Catalog, Option<usize>) {
        if self.settings.read_only {
            return (catalog, Some(0));
        }
        // Whoever has the lock may have looked before the push; it is our turn when they are done.
        let Ok(_lock) = self.store.lock("regfs mount", Duration::ZERO) else { return (catalog, None) };
        let look = |previous: &Catalog| Ok(scan(&*self.store, &self.tables, Some(previous)));
        match give_back::give_back(&*self.store, catalog.clone(), &look) {
            Ok((catalog, restored)) => {
                let count = restored.len();
                let author = Author::current("regfs mount");
                for path in restored {
                    self.note(&author, "give back", &path.to_string_lossy(), "it is in use again");
                }
                (catalog, Some(count))
            }
            Err(e) => {
                self.failed(&format!("could not give back what is in use again: {e}"));
                (catalog, None)
            }
        }
    }

    fn transactions(&self) -> Vec<String> {
        trash::ids(&*self.store).unwrap_or_else(|e| {
            self.failed(&e.to_string());
            Vec::new()
        })
    }

    /// Answers from `catalog` from now on; `blobs` came or went on the disk, even where it says the same.
    fn publish(&self, catalog: Catalog, trash: Vec<String>, blobs: &[DigestId]) {
        // Nobody has compared this one with the trash yet.
        self.is_heal_due.store(true, Ordering::SeqCst);
        let (next, stale) = self.current().next(catalog, trash, blobs);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        if let Some(listener) = self.listener().filter(|_| !stale.is_empty()) {
            listener.forget(stale);
        }
    }

    /// A line in `control/log`.
    fn note(&self, author: &Author, action: &str, what: &str, result: &str) {
        log::info!("{action} {what}: {result} (uid {}, pid {})", author.uid, author.pid);
        locked(&self.journal).add(author, action, what, result);
    }

    /// The same of a change, with what it says or why it failed.
    fn note_result(&self, author: &Author, action: &str, what: &str, result: Result<String>) -> Result<()> {
        let said = result.as_ref().map_or_else(ToString::to_string, Clone::clone);
        self.note(author, action, what, &said);
        result.map(drop)
    }

    fn failed(&self, why: &str) {
        log::warn!("{why}");
        locked(&self.reports).last_error = Some(why.to_string());
    }

    /// Whether commands can be written to a control file.
    pub fn is_command(&self, node: Node) -> bool {
        matches!(node, Node::ControlGc | Node::ControlTrash | Node::ControlRefresh | Node::ControlStop)
    }

    /// What a control file reads like; `None` for other nodes.
    pub fn control_text(&self, node: Node) -> Option<Arc<[u8]>> {
        let text = match node {
            Node::ControlGc => {
                let report = locked(&self.reports).gc.clone();
                match self.run.is_running.load(Ordering::SeqCst) {
                    true => format!(
                        "a collection runs; control/status says how far it is, and echo > control/stop ends it\n\n{report}"
                    ),
                    false => report,
                }
            }
            Node::ControlTrash => self.trash_text(),
            Node::ControlRefresh => locked(&self.reports).refresh.clone(),
            Node::ControlStop => "write anything to end the collection that runs\n".to_string(),
            Node::ControlStatus => return Some(printable::json(&self.status()).into_bytes().into()),
            Node::ControlLog => return Some(locked(&self.journal).text().into_bytes().into()),
            _ => return None,
        };
        Some(printable::lines(&Place::ControlFile.say(&text)).into_bytes().into())
    }

    /// The content of any generated file.
    pub fn text(&self, snapshot: &Snapshot, node: Node) -> Option<Arc<[u8]>> {
        if node == Node::States {
            return Some(self.states(snapshot).into_bytes().into());
        }
        self.control_text(node).or_else(|| self.view(snapshot).text(node))
    }

    /// A line for each blob on its way out: where it stands, since when, and from when on a run takes the next step.
    fn states(&self, snapshot: &Snapshot) -> String {
        match self.standings(snapshot) {
            Ok(standings) => state::table(&standings),
            Err(e) => format!("{e}\n"),
        }
    }

    /// The same as values.
    fn standings(&self, snapshot: &Snapshot) -> Result<Vec<state::Standing>> {
        // Who reads this must not wait for a registry: what the last sweep was told counts.
        let gate = locked(&self.reports).gate.clone().unwrap_or(Gate::Off);
        self.view(snapshot).standings(gate)
    }

    fn trash_text(&self) -> String {
        let answer = match &locked(&self.reports).trash {
            Some(answer) => answer.clone() + "\nthe trash now:\n",
            None => String::new(),
        };
        match trash::summaries(&*self.store) {
            Ok(summaries) => answer + &View::trash_table(&summaries),
            Err(e) => format!("{answer}{e}\n"),
        }
    }

    /// Does what was written to a control file; returns when it is done, or at once where that was asked for.
    pub fn command(self: &Arc<Engine>, node: Node, text: &str, author: &Author) -> Result<()> {
        let result = match node {
            Node::ControlRefresh => {
                self.refresh_now();
                locked(&self.reports).refresh =
                    format!("looked at the storage at {}\n", timestamp(SystemTime::now()));
                Ok(())
            }
            Node::ControlGc => self.gc_command(text, author),
            // Who waits for a collection keeps others from writing to control/gc, stop included: the kernel lets one write
            // to a file at a time.
            Node::ControlStop => self.stop(author),
            Node::ControlTrash => self.trash_command(text, author),
            _ => Err(Error::ReadOnly),
        };
        if let Err(e) = &result {
            self.note(author, "command", text.trim(), &e.to_string());
            self.failed(&e.to_string());
            let answer = format!("{e}\n");
            let mut reports = locked(&self.reports);
            match node {
                // A command that is not taken while one runs must not hide the report of that one.
                Node::ControlGc if !has_answered(e) && !matches!(e, Error::Busy { .. }) => {
                    reports.gc = answer
                }
                Node::ControlTrash if !has_answered(e) => reports.trash = Some(answer_to(text, &answer)),
                _ => {}
            }
        }
        result
    }

    /// What a command leaves out.
    pub(crate) fn defaults(&self) -> Options {
        let Settings { grace, drain, keep, rate, .. } = self.settings;
        Options { grace, drain, keep, rate, ..Options::default() }
    }

    /// Ends the collection that runs, after its current step.
    fn stop(&self, author: &Author) -> Result<()> {
        if !self.run.is_running.load(Ordering::SeqCst) {
            return Err(Error::invalid("no collection is running, so there is none to stop"));
        }
        self.run.watched.stop();
        self.note(author, "command", "stop", "the collection ends after its current step");
        Ok(())
    }

    fn gc_command(self: &Arc<Engine>, text: &str, author: &Author) -> Result<()> {
        let defaults = self.defaults();
        match control::parse_gc(text, &defaults)? {
            GcCommand::Stop => self.stop(author),
            GcCommand::Run(options, said, background) => {
                if self.run.is_running.swap(true, Ordering::SeqCst) {
                    let why = "a collection is running; see control/status, or write stop".to_string();
                    return Err(Error::Busy { why });
                }
                self.run.watched.begin();
                // After the beginning: who retires later stops what has begun.
                if self.is_retired() && !options.dry_run {
                    self.run.is_running.store(false, Ordering::SeqCst);
                    return Err(self.sweeps_no_more());
                }
                let (engine, author, what) = (self.clone(), author.clone(), text.trim().to_string());
                // On a thread of its own, whose priority nothing else has.
                let run = move || {
                    let result = engine.collect(options, said, &author);
                    if let Err(e) = &result {
                        if background {
                            engine.failed(&e.to_string());
                            // Nobody waits who notes it.
                            if !has_answered(e) {
                                engine.note(&author, "command", &what, &e.to_string());
                            }
                        }
                        if !has_answered(e) {
                            locked(&engine.reports).gc = format!("{e}\n");
                        }
                    }
                    result
                };
                let collection =
                    std::thread::Builder::new().name("collection".into()).spawn(run).map_err(|e| {
                        self.run.is_running.store(false, Ordering::SeqCst);
                        Error::io("start a thread for", std::path::Path::new("control/gc"), e)
                    })?;
                let wait = || collection.join().unwrap_or(Err(Error::Unfinished { see: "control/log" }));
                if background { Ok(()) } else { wait() }
            }
        }
    }

    /// Runs a collection; `is_running` was set by the caller.
    fn collect(&self, options: Options, said: Said, author: &Author) -> Result<()> {
        let running = Running(&self.run);
        let (gate, refusal) = Gate::of_run(self.registries.gate(said), options.dry_run)?;
        if !options.dry_run {
            self.registries.remember(&*self.store, &author.command, &Gate::unknown());
        }
        let options = &Options { gate, refusal, keeper: self.keeper(), named: self.named.clone(), ..options };
        gc::yield_to_clients(options);
        self.run.tells_nobody.store(!matches!(options.gate, Gate::Probe(_)), Ordering::SeqCst);
        let result = gc::run(&*self.store, &self.tables, options, author, &self.run.watched);
        if !options.dry_run {
            self.publish_anew();
            self.garbage.forget();
        }
        let report = result?;
        if !options.dry_run {
            self.registries.remember(&*self.store, &author.command, report.gate());
            let mut reports = locked(&self.reports);
            reports.sweeps += 1;
            reports.gate = Some(report.gate().clone());
        }
        let what = report.outcome();
        let action = if options.dry_run { "dry-run" } else { "sweep" };
        let held_back = report.held_back().filter(|_| !options.dry_run);
        let result = match &held_back {
            Some(why) => format!("held back: {why}"),
            None if report.is_complete() => "done".to_string(),
            None => "finished with failures".to_string(),
        };
        self.note(author, action, &what, &result);
        for id in report.purged_transactions.iter().filter(|_| !options.dry_run) {
            self.note(author, "purge", id, "the trash kept it long enough");
        }
        for id in report.dropped_transactions.iter().filter(|_| !options.dry_run) {
            self.note(author, "drop", id, "its undo needed bytes that are gone now");
        }
        let text = report.text(Place::ControlFile, report.details_for_control_file());
        let is_complete = report.is_complete();
        drop(report);
        locked(&self.reports).gc = text;
        drop(running);
        match held_back {
            _ if !is_complete => Err(Error::Unfinished { see: "control/gc" }),
            Some(why) => Err(Error::HeldBack { why }),
            None => Ok(()),
        }
    }

    fn trash_command(&self, text: &str, author: &Author) -> Result<()> {
        let mut is_held_back = false;
        let (action, what, answer, is_complete) = match control::parse_trash(text)? {
            TrashCommand::Undo(id) => {
                let undone = gc::undo(&*self.store, author, &id)?;
                let answer = undone.text(&Advice::Undo(undone.id.clone()).at(Place::ControlFile));
                ("undo", undone.id.clone(), answer, undone.is_complete())
            }
            TrashCommand::UndoWhich => {
                let command = Advice::Undo(LAST.to_string()).at(Place::ControlFile);
                return Err(Error::invalid(which(&*self.store, &command)?));
            }
            TrashCommand::Purge(selection, said) => {
                let gate = self.registries.gate(said)?;
                let options = Options { gate, keeper: self.keeper(), ..Options::default() };
                let purged = gc::purge_trash(&*self.store, &self.tables, author, &selection, &options)?;
                is_held_back = purged.failures.is_empty() && !purged.kept.is_empty();
                ("purge", purged.transactions.join(" "), purged.text(), purged.is_complete())
            }
        };
        self.publish_anew();
        self.note(author, action, &what, answer.lines().last().unwrap_or("done"));
        locked(&self.reports).trash = Some(answer_to(text, &answer));
        match is_complete {
            true => Ok(()),
            false if is_held_back => Err(Error::HeldBack {
                why: "some of what was to be purged stays; control/trash says why".to_string(),
            }),
            false => Err(Error::Unfinished { see: "control/trash" }),
        }
    }

    /// Ends a collection that still runs, cleanly, and waits for it.
    pub fn end(&self) {
        self.run.watched.stop();
        while self.run.is_running.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Looks at the storage after a change of our own: even where the catalog says the same, bytes have moved.
    fn publish_anew(&self) {
        let mut changing = locked(&self.changing);
        // What was being filled may be gone.
        *changing = None;
        if self.is_watching() {
            // What has moved was told by now.
            return self.refresh(&mut changing);
        }
        let before = self.current();
        let catalog = scan(&*self.store, &self.tables, Some(&before.catalog));
        self.publish(catalog, self.transactions(), &[]);
    }
}
