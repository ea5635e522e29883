//! What goes to standard output and standard error.

use serde::Serialize;
use smalti::{Error, Result};
use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{ErrorKind, Write};

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
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written, for example because the disk is full.
    pub fn show<T: Serialize>(&self, result: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
        match self.json {
            true => document(result),
            false => print(&printable(&text(result))),
        }
    }

    /// Shows a plan that is not carried out.
    ///
    /// # Errors
    /// As [`Screen::show`].
    pub fn plan<T: Serialize>(&self, plan: &T) -> Result<()> {
        self.show(plan, |plan| {
            toml::to_string_pretty(plan).unwrap_or_else(|error| format!("the plan cannot be shown: {error}\n"))
        })
    }

    /// Shows an error: a line on standard error, and a JSON document if results are JSON.
    pub fn error(&self, message: &str) {
        if self.json {
            // The line on standard error says it, too.
            let _ = document(&serde_json::json!({ "error": message }));
        }
        let _ = writeln!(std::io::stderr(), "error: {}", printable(message));
    }
}

fn document<T: Serialize>(value: &T) -> Result<()> {
    let text = serde_json::to_string_pretty(value);
    let text = text.map_err(|error| Error::invalid("--json", format!("the result is no JSON: {error}")))?;
    print(&json(&(text + "\n")))
}

/// Prints. That the reader of a pipe has gone is no error.
///
/// # Errors
/// [`Error::Io`] if it cannot be written.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Error::io("write", "standard output", error)),
        _ => Ok(()),
    }
}

/// Text as a terminal may get it: names of files and texts in pictures can hold what moves the cursor, recolours or reorders a line.
pub fn printable(text: &str) -> Cow<'_, str> {
    let acts = |c: char| {
        matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
            || (c.is_control() && !matches!(c, '\n' | '\t'))
    };
    if !text.contains(acts) {
        return Cow::Borrowed(text);
    }
    let shown = text.chars().fold(String::with_capacity(text.len()), |mut shown, c| {
        match acts(c) {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
        shown
    });
    Cow::Owned(shown)
}

/// JSON without the control characters that its grammar allows; they stand inside of strings only.
fn json(text: &str) -> Cow<'_, str> {
    let acts = |c: char| c.is_control() && c != '\n';
    if !text.contains(acts) {
        return Cow::Borrowed(text);
    }
    let shown = text.chars().fold(String::with_capacity(text.len()), |mut shown, c| {
        match acts(c) {
            true => drop(write!(shown, "\\u{:04x}", u32::from(c))),
            false => shown.push(c),
        }
        shown
    });
    Cow::Owned(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_is_printed() {
        assert_eq!(printable("a\tb\u{e4}\n"), "a\tb\u{e4}\n");
        assert_eq!(printable("a\u{1b}[2Jb\r\u{9b}1m\u{202e}"), "a\\u{1b}[2Jb\\r\\u{9b}1m\\u{202e}");
        let value = serde_json::json!({ "key": "\u{1b}[2J\u{7f}\u{9b}" });
        let text = serde_json::to_string_pretty(&value).unwrap();
        let shown = json(&text);
        assert!(!shown.chars().any(|c| c.is_control() && c != '\n'), "{shown}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
    }
}
