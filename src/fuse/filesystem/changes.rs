//! Changes that make a name: their answer is what the kernel would ask next.

use std::ffi::OsStr;

use fuser::{Errno, Generation, INodeNo, ReplyEntry};

use super::{RegistryFilesystem, TTL, errno, guarded};
use crate::engine::Engine;
use crate::error::Result;
use crate::view::node::Node;

impl RegistryFilesystem {
    /// Makes `name` in `parent`, on a thread of its own as every change.
    pub(super) fn make(
        &self,
        parent: INodeNo,
        name: &OsStr,
        reply: ReplyEntry,
        act: impl FnOnce(&Engine, Node, &OsStr) -> Result<()> + Send + 'static,
    ) {
        let Some(node) = Node::of_inode(parent.0) else { return reply.error(Errno::ENOENT) };
        let (engine, name) = (self.engine.clone(), name.to_os_string());
        in_background(move || {
            let made = guarded(|| {
                act(&engine, node, &name)?;
                RegistryFilesystem::new(engine).find(parent, &name)
            });
            match made {
                Ok((Some(attr), _)) => reply.entry(&TTL, &attr, Generation(0)),
                // Somebody has removed it already.
                Ok((None, _)) => reply.error(Errno::ENOENT),
                Err(e) => reply.error(errno(&e)),
            }
        });
    }
}

/// Runs what answers a call, on a thread of its own.
pub(super) fn in_background(run: impl FnOnce() + Send + 'static) {
    // Without a thread the reply is dropped, which fuser answers with EIO.
    if let Err(e) = std::thread::Builder::new().name("change".into()).spawn(run) {
        log::error!("could not start a thread for a change: {e}");
    }
}
