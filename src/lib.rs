//! regfs: a registry's storage as a file tree, with deletion that comes back and garbage collection.
//!
//! Data runs one way and each module knows only those above it in this list; see `docs/architecture.md`.

#![warn(clippy::disallowed_methods)]

pub mod advice;
pub mod catalog;
pub mod cli;
pub mod clock;
mod costly;
pub mod digest;
pub mod edit;
pub mod engine;
pub mod error;
pub mod fuse;
pub mod gc;
pub mod keeper;
pub mod layout;
pub mod manifest;
pub mod printable;
pub mod progress;
pub mod registries;
pub mod registry_config;
pub mod sample;
pub mod store;
mod sys;
pub mod trash;
pub mod view;
pub mod watch;
