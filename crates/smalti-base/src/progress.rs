//! How long work tells its caller where it is. The library never prints: a front end implements [`Progress`].

/// Receives what long work has to say. Calls are cheap and may come from the working thread only.
pub trait Progress {
    /// A new piece of work begins; `total` counts in `unit`, 0 if not known.
    fn begin(&self, what: &str, total: u64, unit: &'static str);
    /// So much of the piece was done before, by an earlier call of the program: it does not count for the speed.
    fn resume(&self, done: u64) {
        self.advance(done, "");
    }
    /// So much of the piece is done; `note` is a short state such as the loss.
    fn advance(&self, done: u64, note: &str);
    /// The piece is finished.
    fn end(&self);
    /// A line that the user should see, such as a skipped file.
    fn say(&self, line: &str);
    /// Whether the user asked to stop. Long loops look at this once a step.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Says nothing, never cancels.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: &str, _: u64, _: &'static str) {}
    fn advance(&self, _: u64, _: &str) {}
    fn end(&self) {}
    fn say(&self, _: &str) {}
}
