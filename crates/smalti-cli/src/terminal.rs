//! Progress on a terminal, as lines elsewhere, or not at all.

use crate::screen::printable;
use indicatif::{BinaryBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use smalti::Progress;
use std::cell::RefCell;
use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Without a terminal a line is written at most this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The unit that is shown in larger ones.
const BYTES: &str = "bytes";

/// How much is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Hidden,
    Lines,
    Bar,
}

/// Shows progress on standard error, and knows whether the user asked to stop.
pub struct Terminal {
    style: Style,
    every: Duration,
    work: RefCell<Option<Work>>,
    stop: Arc<AtomicBool>,
}

struct Work {
    what: String,
    total: u64,
    unit: &'static str,
    before: u64,
    note: String,
    begun: Instant,
    shown: Option<Instant>,
    bar: Option<ProgressBar>,
}

impl Terminal {
    /// Progress as a bar if standard error is a terminal, else as lines (all of them if `verbose`); nothing if `quiet`.
    pub fn new(quiet: bool, verbose: bool, stop: Arc<AtomicBool>) -> Self {
        let style = match (quiet, std::io::stderr().is_terminal()) {
            (true, _) => Style::Hidden,
            (false, true) => Style::Bar,
            (false, false) => Style::Lines,
        };
        let every = if verbose { Duration::ZERO } else { LINE_EVERY };
        Self { style, every, work: RefCell::new(None), stop }
    }

    fn line(&self, text: &str) {
        let text = &*printable(text);
        let bar = self.work.borrow().as_ref().and_then(|work| work.bar.clone());
        match (self.style, bar) {
            (Style::Hidden, _) => {}
            (_, Some(bar)) => bar.println(text),
            // Nothing can be done if standard error is gone.
            (_, None) => drop(writeln!(std::io::stderr(), "{text}")),
        }
    }
}

impl Work {
    /// `training: 120/500 steps (24%), 3.1 steps/s, 2m left, loss 0.12`.
    fn describe(&self, done: u64) -> String {
        let seconds = self.begun.elapsed().as_secs_f64();
        let rate = if seconds > 0.0 { done.saturating_sub(self.before) as f64 / seconds } else { 0.0 };
        let mut text = match (self.unit, self.total) {
            (BYTES, 0) => format!("{}: {}", self.what, BinaryBytes(done)),
            (BYTES, total) => {
                format!("{}: {} of {} ({}%)", self.what, BinaryBytes(done), BinaryBytes(total), done * 100 / total)
            }
            (unit, 0) => format!("{}: {done} {unit}", self.what),
            (unit, total) => format!("{}: {done}/{total} {unit} ({}%)", self.what, done * 100 / total),
        };
        if rate > 0.0 {
            text += &match self.unit {
                BYTES => format!(", {}/s", BinaryBytes(rate as u64)),
                unit => format!(", {rate:.1} {unit}/s"),
            };
        }
        if rate > 0.0 && self.total > done {
            text += &format!(", {} left", duration((self.total - done) as f64 / rate));
        }
        if !self.note.is_empty() {
            text += &format!(", {}", self.note);
        }
        text
    }
}

fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
    }
}

fn bar(what: &str, total: u64, unit: &str) -> ProgressBar {
    let (done, all, rate) = match unit {
        BYTES => ("{binary_bytes}", "{binary_total_bytes}", "{binary_bytes_per_sec}".to_string()),
        unit => ("{pos}", "{len}", format!("{unit} {{per_sec}}")),
    };
    let (length, template) = match total {
        0 => (None, format!("{{msg}} {{spinner}} {done} {rate} {{prefix}}")),
        n => (Some(n), format!("{{msg}} {{bar:30}} {done}/{all} {rate} eta {{eta}} {{prefix}}")),
    };
    let bar = ProgressBar::with_draw_target(length, ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar.set_message(what.to_string());
    bar
}

impl Progress for Terminal {
    fn begin(&self, what: &str, total: u64, unit: &'static str) {
        self.end();
        let what = &*printable(what);
        let bar = (self.style == Style::Bar).then(|| bar(what, total, unit));
        let work = Work {
            what: what.to_string(),
            total,
            unit,
            before: 0,
            note: String::new(),
            begun: Instant::now(),
            shown: None,
            bar,
        };
        *self.work.borrow_mut() = Some(work);
    }

    fn resume(&self, done: u64) {
        if let Some(work) = self.work.borrow_mut().as_mut() {
            work.before = done;
            if let Some(bar) = &work.bar {
                bar.set_position(done);
                bar.reset_eta();
            }
        }
    }

    fn advance(&self, done: u64, note: &str) {
        let mut slot = self.work.borrow_mut();
        let Some(work) = slot.as_mut() else { return };
        // A step that has nothing to say leaves the last note in place.
        if !note.is_empty() {
            work.note = printable(note).into_owned();
        }
        if let Some(bar) = &work.bar {
            bar.set_prefix(work.note.clone());
            bar.set_position(done);
            return;
        }
        let last = work.total > 0 && done >= work.total;
        let due = last || work.shown.unwrap_or(work.begun).elapsed() >= self.every;
        if self.style == Style::Lines && due {
            work.shown = Some(Instant::now());
            let _ = writeln!(std::io::stderr(), "{}", work.describe(done));
        }
    }

    fn end(&self) {
        if let Some(Work { bar: Some(bar), .. }) = self.work.borrow_mut().take() {
            bar.finish();
        }
    }

    fn say(&self, line: &str) {
        self.line(line);
    }

    fn cancelled(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// A flag that Ctrl-C or SIGTERM sets; the second one ends the process at once.
pub fn stop_flag() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // The order matters: the shutdown looks at the flag before this signal sets it.
        let registered = signal_hook::flag::register_conditional_shutdown(signal, 130, flag.clone())
            .and_then(|_| signal_hook::flag::register(signal, flag.clone()));
        if let Err(error) = registered {
            let _ = writeln!(std::io::stderr(), "warning: Ctrl-C will not be handled: {error}");
        }
    }
    flag
}
