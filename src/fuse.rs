//! fuser ⇄ engine: one short handler per call.
//!
//! The only module that knows fuser. [`filesystem`] answers the kernel, [`mount`] mounts and unmounts.

mod cache;
pub mod filesystem;
pub mod mount;
mod passthrough;
mod waiting;
