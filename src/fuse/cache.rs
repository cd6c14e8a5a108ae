//! What the kernel remembers of the tree, and how it forgets.
//!
//! As long as the engine is told of every change, the kernel may remember names and attributes for a day: whatever is
//! not so any more is named to it. Calls that do this can wait for a request that a client has under way, so they are
//! made by threads of their own, which hold nothing; a request never waits for them, or not for long.
//!
//! # Order
//! Attributes, listings and targets first: that needs no lock of a directory, so it is done before a removal is
//! answered. Names after that: the kernel waits until nothing is under way in their directory.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use fuser::{INodeNo, Notifier};

use crate::engine::fresh::Listener;
use crate::error::{Error, Result};
use crate::view::node::Node;
use crate::view::stale::Stale;

/// How long the kernel may believe what lasts.
pub(super) const LASTING: Duration = Duration::from_secs(24 * 3600);
/// How long anybody waits for the kernel to forget: it is quicker, unless clients wait for each other.
const SETTLES: Duration = Duration::from_millis(100);

enum Forget<T> {
    These(T),
    /// All before this are forgotten.
    Done(Sender<()>),
}

/// Tells the kernel what to forget.
pub(super) struct Forgetting {
    contents: Sender<Forget<Stale>>,
    names: Sender<Forget<Vec<(Node, OsString)>>>,
}

impl Forgetting {
    pub(super) fn start(notifier: Notifier) -> Result<Forgetting> {
        let (contents, stale) = channel();
        let (names, stale_names) = channel();
        let forgetting = Forgetting { contents, names: names.clone() };
        let notify = notifier.clone();
        spawn("forget", move || follow(&stale, |stale| forget_contents(&notify, stale, &names)))?;
        spawn("forget-names", move || follow(&stale_names, |names| forget_names(&notifier, names)))?;
        Ok(forgetting)
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<()> {
    let spawned = std::thread::Builder::new().name(name.into()).spawn(run);
    spawned
        .map(drop)
        .map_err(|e| Error::io("start a thread for", std::path::Path::new("the kernel's cache"), e))
}

impl Listener for Forgetting {
    fn forget(&self, stale: Stale) {
        // The threads end with the session only.
        let _ = self.contents.send(Forget::These(stale));
        wait(&self.contents);
    }

    fn settle(&self) {
        wait(&self.contents);
        wait(&self.names);
    }
}

fn wait<T>(queue: &Sender<Forget<T>>) {
    let (done, is_done) = channel();
    if queue.send(Forget::Done(done)).is_ok() && is_done.recv_timeout(SETTLES).is_err() {
        log::debug!("the kernel takes its time to forget");
    }
}

/// Does what the queue says until its other end is gone.
fn follow<T>(queue: &Receiver<Forget<T>>, mut forget: impl FnMut(T)) {
    for message in queue {
        match message {
            Forget::These(these) => forget(these),
            // Whoever waited may have given up.
            Forget::Done(done) => drop(done.send(())),
        }
    }
}

/// Makes the kernel forget attributes, listings and targets; hands the names on.
fn forget_contents(notifier: &Notifier, stale: Stale, names: &Sender<Forget<Vec<(Node, OsString)>>>) {
    let attributes = stale.attributes.into_iter().map(|node| (node, -1));
    let contents = stale.contents.into_iter().map(|node| (node, 0));
    for (node, offset) in attributes.chain(contents) {
        if let Err(e) = notifier.inval_inode(INodeNo(node.inode()), offset, 0) {
            log::debug!("could not make the kernel forget {node:?}: {e}");
        }
    }
    let stale_names = match stale.everything {
        true => ["images", "blobs"].map(|name| (Node::Root, name.into())).into(),
        false => stale.names.into_iter().collect(),
    };
    // The other thread ends with this one.
    let _ = names.send(Forget::These(stale_names));
}

fn forget_names(notifier: &Notifier, names: Vec<(Node, OsString)>) {
    for (directory, name) in names {
        if let Err(e) = notifier.inval_entry(INodeNo(directory.inode()), &name) {
            let name = name.as_bytes().escape_ascii();
            log::debug!("could not make the kernel forget {name} in {directory:?}: {e}");
        }
    }
}
