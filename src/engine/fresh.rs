//! How the engine learns what changed in the storage.
//!
//! With a [`Watch`] the kernel tells, and an update looks only where something changed; answers are then always
//! from memory. Without, whoever looks at the tree gets a snapshot that is at most a second old, or twenty times as
//! old as a look at the storage takes, so that looking never costs more than a twentieth of the time.
//!
//! What a watch can't see a whole look finds: now and then, and when somebody asks for one.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Engine, Looked, Open, locked};
use crate::catalog::scan::scan;
use crate::catalog::update::update;
use crate::error::{Error, Result};
use crate::view::Snapshot;
use crate::view::stale::Stale;
use crate::watch::{Changes, Watch};

/// How old a look at the storage may be where nothing tells of changes.
pub(super) const FRESH: Duration = Duration::from_secs(1);
/// How much older it may be than it takes.
pub(super) const COST_FACTOR: u32 = 20;
/// How often everything is looked at although the kernel tells of changes.
const WHOLE_LOOK: Duration = Duration::from_secs(600);
/// How long more events are waited for after one: a push makes dozens within a moment.
const SETTLES: Duration = Duration::from_millis(10);
/// The same where taking them in takes long: so many times as long, and no longer than this.
const SHARE: u32 = 3;
const SETTLES_AT_MOST: Duration = Duration::from_millis(40);
/// How long a name that is not there is waited for while somebody takes in what is new.
const CATCHES_UP: Duration = Duration::from_millis(200);
/// How often a thread asks whether it is still needed.
pub(super) const STILL_NEEDED: Duration = Duration::from_millis(500);

/// Who remembers parts of the tree, and must hear what is not so any more.
pub trait Listener: Send + Sync {
    /// Called after the snapshot that says otherwise was published. Returns when all but names is forgotten, or after a
    /// moment.
    fn forget(&self, stale: Stale);

    /// Waits until everything that was passed to [`Listener::forget`] is forgotten, but not for long.
    fn settle(&self);
}

impl Engine {
    /// Lets the kernel tell what changes; `watch` was made before the first look at the storage, or what changed in
    /// between would be missed. What it has told since, and what in the trash is in use again, is dealt with behind the
    /// caller: with a large trash that takes a while.
    pub fn watch(self: &Arc<Engine>, watch: Watch) -> Result<()> {
        let events = self.begin_watch(watch)?;
        self.follow(events)
    }

    /// The same with a watch that was made later, after which everything is looked at.
    pub fn watch_from_now(self: &Arc<Engine>, watch: Watch) -> Result<()> {
        let events = self.begin_watch(watch)?;
        self.refresh_whole(&mut locked(&self.changing));
        self.follow(events)
    }

    fn begin_watch(&self, watch: Watch) -> Result<OwnedFd> {
        let events = watch.events().try_clone_to_owned().map_err(|e| self.watch_error(e))?;
        *locked(&self.watch) = Some(watch);
        locked(&self.reports).unwatched = None;
        Ok(events)
    }

    fn follow(self: &Arc<Engine>, events: OwnedFd) -> Result<()> {
        let engine = Arc::downgrade(self);
        let watching = move || watching(&engine, &events);
        let spawned = std::thread::Builder::new().name("watch".into()).spawn(watching);
        spawned.map(drop).map_err(|e| self.watch_error(e))
    }

    fn watch_error(&self, e: std::io::Error) -> Error {
        Error::io("watch", &self.store.full(std::path::Path::new("")), e)
    }

    /// The kernel does not tell what changes, and why.
    pub fn does_not_watch(&self, why: &str) {
        log::info!("the kernel does not tell what changes ({why}); looking at the storage instead");
        locked(&self.reports).unwatched = Some(why.to_string());
    }

    /// From now on the kernel does not tell what changes: whoever looks makes us look.
    fn lose_watch(&self, why: &str) {
        self.failed(&format!(
            "the kernel no longer tells what changes ({why}); looking at the storage instead"
        ));
        *locked(&self.watch) = None;
        locked(&self.reports).unwatched = Some(why.to_string());
        if let Some(listener) = self.listener() {
            listener.forget(Stale { everything: true, ..Stale::default() });
        }
    }

    /// Whether changes are told by the kernel.
    pub fn is_watching(&self) -> bool {
        locked(&self.watch).is_some()
    }

    /// Tells `listener` from now on what changed.
    pub fn set_listener(&self, listener: Arc<dyn Listener>) {
        *locked(&self.listener) = Some(listener);
    }

    pub(super) fn listener(&self) -> Option<Arc<dyn Listener>> {
        locked(&self.listener).clone()
    }

    /// The registry as it is, by a look that is fresh enough.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        let (age, cost) = {
            let looked = locked(&self.looked);
            (looked.at.elapsed(), looked.cost)
        };
        if age > FRESH.max(cost * COST_FACTOR)
            && !self.is_watching()
            && let Ok(mut changing) = self.changing.try_lock()
        {
            self.refresh_whole(&mut changing);
        }
        self.current()
    }

    /// Takes in what the kernel has told and nobody has looked at yet, before a name is said not to be there: it may have
    /// been pushed a moment ago. Waits a moment for whoever is doing so.
    pub fn catch_up(&self) {
        let is_told = locked(&self.watch).as_ref().is_some_and(|watch| {
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            poll(&mut [PollFd::new(&watch.events(), PollFlags::IN)], Some(&now)) == Ok(1)
        });
        let began = Instant::now();
        while self.is_watching() && began.elapsed() < CATCHES_UP {
            match self.changing.try_lock() {
                Ok(mut changing) if is_told => return self.refresh(&mut changing),
                Ok(_) => return,
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Looks at the storage now, whatever the kernel has told, and waits until nobody remembers otherwise.
    pub fn refresh_now(&self) {
        let mut changing = locked(&self.changing);
        if self.is_watching() {
            // Which blobs came or went only the kernel tells.
            self.refresh(&mut changing);
        }
        self.refresh_whole(&mut changing);
        drop(changing);
        if let Some(listener) = self.listener() {
            listener.settle();
        }
    }

    /// Looks where something changed, or everywhere where nobody tells.
    pub(super) fn refresh(&self, changing: &mut MutexGuard<'_, Option<Open>>) {
        let changes = locked(&self.watch).as_mut().map(Watch::changes);
        match changes {
            Some(Ok(changes)) => self.take_in(&changes, changing),
            Some(Err(e)) => {
                self.lose_watch(&e.to_string());
                self.refresh_whole(changing);
            }
            None => self.refresh_whole(changing),
        }
    }

    fn take_in(&self, changes: &Changes, changing: &mut MutexGuard<'_, Option<Open>>) {
        let is_due = self.is_heal_due.load(Ordering::SeqCst);
        if changes.is_empty() && !is_due {
            return;
        }
        let before = self.current();
        let Some(catalog) = update(&*self.store, &before.catalog, changes) else {
            return self.refresh_whole(changing);
        };
        let ids = if changes.trash { self.transactions() } else { before.trash.clone() };
        if !ids.is_empty() {
            self.make_new_ones_whole(&catalog, changes);
        }
        // Where nothing else is different, bytes may still have come or gone in a directory that stays.
        let is_same = ids == before.trash && changes.blobs.is_empty() && {
            Arc::ptr_eq(&catalog.manifests, &before.catalog.manifests)
                && catalog.says_the_same_as(&before.catalog)
        };
        let blobs: Vec<_> =
            changes.blobs.iter().filter_map(|digest| catalog.tables.digests.find(digest)).collect();
        self.heal_and_publish(catalog, ids, is_same, &blobs);
        self.forget_dangling(changes);
    }

    /// Looks at everything that may have changed.
    pub(super) fn refresh_whole(&self, _changing: &mut MutexGuard<'_, Option<Open>>) {
        let began = Instant::now();
        // What is told of until now, this look sees.
        let told = locked(&self.watch).as_mut().map(Watch::changes);
        if let Some(Err(e)) = told {
            self.lose_watch(&e.to_string());
        }
        let before = self.current();
        let catalog = scan(&*self.store, &self.tables, Some(&before.catalog));
        let ids = self.transactions();
        let is_same = ids == before.trash && catalog.says_the_same_as(&before.catalog);
        self.heal_and_publish(catalog, ids, is_same, &[]);
        *locked(&self.looked) = Looked { at: Instant::now(), cost: began.elapsed() };
    }
}

/// Follows the events of the kernel as long as there is an engine.
fn watching(engine: &Weak<Engine>, events: &OwnedFd) {
    let timeout = Timespec { tv_sec: 0, tv_nsec: STILL_NEEDED.subsec_nanos().into() };
    if let Some(engine) = engine.upgrade() {
        engine.refresh(&mut locked(&engine.changing));
    }
    let mut settles = SETTLES;
    loop {
        let mut fds = [PollFd::new(events, PollFlags::IN)];
        let ready = poll(&mut fds, Some(&timeout));
        let Some(engine) = engine.upgrade() else { return };
        if !engine.is_watching() {
            return;
        }
        let is_old = locked(&engine.looked).at.elapsed() > WHOLE_LOOK;
        match ready {
            _ if is_old => engine.refresh_whole(&mut locked(&engine.changing)),
            Ok(0) if !engine.is_heal_due.load(Ordering::SeqCst) => {}
            Ok(0) => engine.refresh(&mut locked(&engine.changing)),
            Err(rustix::io::Errno::INTR) => {}
            Ok(_) => {
                std::thread::sleep(settles);
                let began = Instant::now();
                engine.refresh(&mut locked(&engine.changing));
                // On a large store taking in takes longer: not for each of many pushes.
                settles = (began.elapsed() * SHARE).clamp(SETTLES, SETTLES_AT_MOST);
            }
            Err(e) => return engine.lose_watch(&e.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::path::Path;
    use std::time::SystemTime;

    use super::*;
    use crate::store::Store;
    use crate::store::memory::Memory;
    use crate::view::Settings;

    #[derive(Default)]
    struct Remembers(std::sync::atomic::AtomicBool);

    impl Listener for Remembers {
        fn forget(&self, stale: Stale) {
            self.0.fetch_or(stale.everything, Ordering::SeqCst);
        }

        fn settle(&self) {}
    }

    /// An engine whose kernel tells, until somebody asks.
    fn watching() -> (Arc<Engine>, Arc<Remembers>) {
        let settings = Settings {
            read_only: true,
            uid: 0,
            gid: 0,
            grace: Duration::ZERO,
            drain: Duration::ZERO,
            keep: Duration::ZERO,
            rate: None,
            mounted_at: SystemTime::now(),
        };
        let memory = Memory::default();
        memory.write(Path::new("repositories/app/_manifests/x"), b"").unwrap();
        let engine = Arc::new(Engine::new(Arc::new(memory), settings).unwrap());
        let remembers = Arc::<Remembers>::default();
        engine.set_listener(remembers.clone());
        engine.begin_watch(Watch::failing().unwrap()).unwrap();
        assert!(engine.status().contains("\"events\""));
        (engine, remembers)
    }

    #[test]
    fn a_watch_that_is_lost_is_no_longer_relied_on() {
        let ways: [fn(&Engine); 3] = [
            |engine| engine.refresh(&mut locked(&engine.changing)),
            |engine| engine.refresh_whole(&mut locked(&engine.changing)),
            |engine| engine.refresh_now(),
        ];
        for way in ways {
            let (engine, remembers) = watching();
            way(&engine);
            assert!(!engine.is_watching() && remembers.0.load(Ordering::SeqCst));
            let status = engine.status();
            assert!(status.contains("\"looks\"") && status.contains("directory"), "{status}");
        }
    }
}
