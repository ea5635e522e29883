//! What goes to standard output and standard error.

use serde::Serialize;
use std::io::Write;

/// Where results are shown: one JSON document, or text for people.
#[derive(Clone, Copy, Debug)]
pub struct Screen {
    json: bool,
}

impl Screen {
    /// A screen for machines or for people.
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// Shows a result: as JSON, or as the text that `text` makes of it.
    pub fn show<T: Serialize>(&self, result: &T, text: impl FnOnce(&T) -> String) {
        match self.json {
            true => self.document(result),
            false => print(&text(result)),
        }
    }

    /// Shows a plan that is not carried out.
    pub fn plan<T: Serialize>(&self, plan: &T) {
        self.show(plan, |plan| {
            toml::to_string_pretty(plan).unwrap_or_else(|error| format!("the plan cannot be shown: {error}\n"))
        });
    }

    /// Shows an error: a line on standard error, and a JSON document if results are JSON.
    pub fn error(&self, message: &str) {
        if self.json {
            self.document(&serde_json::json!({ "error": message }));
        }
        let _ = writeln!(std::io::stderr(), "error: {message}");
    }

    fn document<T: Serialize>(&self, value: &T) {
        match serde_json::to_string_pretty(value) {
            Ok(text) => print(&(text + "\n")),
            Err(error) => drop(writeln!(std::io::stderr(), "error: the result cannot be written as JSON: {error}")),
        }
    }
}

/// Prints without failing when the reader of a pipe has gone.
pub fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
