//! Files that the kernel reads by itself (FUSE passthrough).
//!
//! Needs root and a kernel with `CONFIG_FUSE_PASSTHROUGH`; without, regfs reads and passes on.
//!
//! All who have a file open share its number: the kernel accepts one for each inode.

use std::collections::HashMap;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use fuser::{BackingId, INodeNo, ReplyOpen};

/// The numbers of open files.
#[derive(Default)]
pub(super) struct Passthrough {
    is_possible: AtomicBool,
    numbers: Mutex<HashMap<INodeNo, Weak<BackingId>>>,
}

impl Passthrough {
    /// The kernel offers it.
    pub(super) fn is_offered(&self) {
        self.is_possible.store(true, Ordering::Relaxed);
    }

    /// The number of a file; `None` where regfs has to read.
    pub(super) fn number(&self, inode: INodeNo, file: &File, reply: &ReplyOpen) -> Option<Arc<BackingId>> {
        if !self.is_possible.load(Ordering::Relaxed) {
            return None;
        }
        // An insert that was cut short has done nothing.
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = numbers.get(&inode).and_then(Weak::upgrade) {
            return Some(number);
        }
        match reply.open_backing(file) {
            Ok(number) => {
                let number = Arc::new(number);
                numbers.retain(|_, known| known.strong_count() > 0);
                numbers.insert(inode, Arc::downgrade(&number));
                Some(number)
            }
            Err(e) => {
                log::info!("the kernel can't read blobs by itself ({e}): regfs reads and passes on");
                self.is_possible.store(false, Ordering::Relaxed);
                None
            }
        }
    }
}
