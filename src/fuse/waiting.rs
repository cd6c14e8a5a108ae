//! Writers that wait for their command.
//!
//! fuser answers the kernel's interrupt with ENOSYS, so a writer would sit out its command unkillable. Instead its
//! pending signals are watched through `/proc`; one that wants to end it makes the write fail with EINTR at once,
//! and the command goes on. A writer whose signals can't be seen (another pid namespace) does not wait.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use fuser::{Errno, ReplyWrite};

use crate::engine::Engine;
use crate::trash::Author;
use crate::view::node::Node;

const LOOK_AT_SIGNALS: Duration = Duration::from_millis(20);
/// HUP, INT, QUIT, KILL and TERM as bits of the masks in `/proc/<pid>/status`.
const ENDING: u64 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 8 | 1 << 14;

/// Does a command on a thread of its own and answers the writer when it is done.
pub(super) fn command(
    engine: Arc<Engine>,
    node: Node,
    text: String,
    author: Author,
    written: u32,
    reply: ReplyWrite,
) {
    let run = move || {
        let (done, result) = channel();
        let pid = author.pid;
        let worker = std::thread::Builder::new().name("command".into()).spawn(move || {
            let result = engine.command(node, &text, &author).map_err(|e| {
                log::warn!("{}: {e}", text.trim());
                e.errno()
            });
            // The writer may be gone; the result stands in the control file.
            let _ = done.send(result);
        });
        if let Err(e) = worker {
            return reply.error(e.into());
        }
        loop {
            match result.recv_timeout(LOOK_AT_SIGNALS) {
                Ok(Ok(())) => return reply.written(written),
                Ok(Err(errno)) => return reply.error(Errno::from_i32(errno)),
                Err(RecvTimeoutError::Disconnected) => return reply.error(Errno::EIO),
                Err(RecvTimeoutError::Timeout) => match wants_to_end(pid) {
                    Some(true) => {
                        log::info!("pid {pid} no longer waits; its command goes on");
                        return reply.error(Errno::EINTR);
                    }
                    Some(false) => {}
                    None => return reply.written(written),
                },
            }
        }
    };
    // Without a thread the reply is dropped, which fuser answers with EIO.
    if let Err(e) = std::thread::Builder::new().name("waiting".into()).spawn(run) {
        log::error!("could not start a thread for a command: {e}");
    }
}

/// Whether a signal that ends the process is pending; `None` when the process can't be seen.
fn wants_to_end(pid: u32) -> Option<bool> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let mask = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        u64::from_str_radix(line.trim_start_matches(':').trim(), 16).ok()
    };
    let pending = mask("SigPnd")? | mask("ShdPnd")?;
    Some(pending & !mask("SigBlk")? & ENDING != 0)
}
