//! Progress of `regfs gc` on stderr, and Ctrl-C.
//!
//! A bar where stderr is a terminal; with `--verbose` a line for each phase elsewhere; else nothing.
//!
//! # Signals
//! SIGINT, SIGTERM and their like end the run: at once before anything is taken, since there is nothing to leave in
//! between then; after that between two steps. A second one kills the process, and the trash can cope with that.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use signal_hook::consts::TERM_SIGNALS;
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use crate::error::{Error, Result};
use crate::progress::Progress;

/// The phase in which things begin to move.
const TAKE: &str = "take";
/// How often a phase without known length shows that it lives.
const TICK: Duration = Duration::from_millis(120);

/// Shows how far a run is, and tells it to stop.
pub(super) struct Watcher {
    shown: Mutex<Shown>,
    bar: ProgressBar,
    has_lines: bool,
    is_stopped: AtomicBool,
}

struct Shown {
    phase: &'static str,
    began: Instant,
    has_taken: bool,
}

impl Watcher {
    /// Starts to listen to signals.
    pub(super) fn new(is_verbose: bool) -> Result<Arc<Watcher>> {
        let is_terminal = std::io::stderr().is_terminal();
        let target = if is_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let watcher = Arc::new(Watcher {
            shown: Mutex::new(Shown { phase: "", began: Instant::now(), has_taken: false }),
            bar: ProgressBar::with_draw_target(None, target).with_style(ProgressStyle::default_spinner()),
            has_lines: is_verbose && !is_terminal,
            is_stopped: AtomicBool::new(false),
        });
        let failed = |e| Error::io("wait for signals in", std::path::Path::new("regfs gc"), e);
        let mut signals = Signals::new(TERM_SIGNALS).map_err(failed)?;
        let listener = watcher.clone();
        let listen = move || signals.forever().for_each(|signal| listener.told(signal));
        std::thread::Builder::new().name("signals".into()).spawn(listen).map_err(failed)?;
        Ok(watcher)
    }

    /// A signal came.
    fn told(&self, signal: i32) {
        if self.is_stopped.swap(true, Ordering::SeqCst) {
            self.bar.finish_and_clear();
            // It ends the process; if it can't, the run still ends after its step.
            let _ = emulate_default_handler(signal);
            return;
        }
        // Held to the end: the run can't begin to take while the message says that it did not.
        let shown = self.shown();
        self.bar.finish_and_clear();
        if !shown.has_taken {
            eprintln!("regfs: stopped before anything was taken");
            std::process::exit(1);
        }
        eprintln!("regfs: stopping after this step; once more to end at once");
    }

    /// The run is over: nothing more is shown.
    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
        self.end_phase(&mut self.shown());
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says how long the phase took.
    fn end_phase(&self, shown: &mut Shown) {
        if self.has_lines && !shown.phase.is_empty() {
            let done = match self.bar.position() {
                0 => String::new(),
                done => format!("{done} done, "),
            };
            eprintln!("regfs: {}: {done}{:.1} s", shown.phase, shown.began.elapsed().as_secs_f64());
        }
        shown.phase = "";
    }
}

impl Progress for Watcher {
    fn phase(&self, name: &'static str, total: usize) {
        let mut shown = self.shown();
        self.end_phase(&mut shown);
        *shown = Shown { phase: name, began: Instant::now(), has_taken: shown.has_taken || name == TAKE };
        let template = match total {
            0 => "{spinner} {msg} {elapsed}",
            _ => "{msg} {wide_bar} {human_pos}/{human_len}, {eta} left",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
        self.bar.set_message(name);
        if total > 0 {
            self.bar.set_length(total as u64);
        }
        self.bar.reset();
        if !self.bar.is_hidden() {
            self.bar.enable_steady_tick(TICK);
        }
    }

    fn step(&self, count: usize) {
        self.bar.inc(count as u64);
    }

    fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::Relaxed)
    }
}
