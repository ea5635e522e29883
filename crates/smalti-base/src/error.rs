//! The one error type of the workspace. Each variant carries data: what went wrong, where, and what was expected.

use std::path::{Path, PathBuf};

/// A result with smalti's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused to read or write a file.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// A verb, for example `read` or `create folder`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A file or value is there but cannot be used as it is.
    #[error("{place}: {problem}{}", hint_suffix(hint))]
    Invalid {
        /// Where: a path, or a path and a key, an offset or a tensor's name.
        place: String,
        /// What is wrong, with what was found and what was expected.
        problem: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// A name that is not among the known ones.
    #[error("{place}: unknown {kind} `{name}`{}", known_suffix(name, known))]
    Unknown {
        /// Where the name was given.
        place: String,
        /// What kind of thing it names: `key`, `class`, `device`, ...
        kind: String,
        /// The name as given.
        name: String,
        /// The names that would have been right.
        known: Vec<String>,
    },
    /// Two parts that do not fit each other.
    #[error("{what} do not fit:\n  {left_name}: {left}\n  {right_name}: {right}{}", hint_suffix(hint))]
    Mismatch {
        /// What was compared.
        what: String,
        /// Name of the first part.
        left_name: String,
        /// The first part's value.
        left: String,
        /// Name of the second part.
        right_name: String,
        /// The second part's value.
        right: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// Something that this build, device or model cannot do.
    #[error("{what} is not supported{}", hint_suffix(hint))]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What to do instead.
        hint: Option<String>,
    },
    /// Training met too many losses or gradients that are not finite.
    #[error(
        "training stopped at step {step}: {skipped} steps in a row had a loss or gradient that is not finite; \
         the last good checkpoint is {}", checkpoint.display()
    )]
    NonFinite {
        /// The step at which training stopped.
        step: u64,
        /// How many steps in a row were skipped.
        skipped: u64,
        /// Folder of the last good checkpoint.
        checkpoint: PathBuf,
    },
    /// The user asked to stop, by Ctrl-C or SIGTERM.
    #[error("interrupted{}", hint_suffix(hint))]
    Interrupted {
        /// What was kept and how to continue.
        hint: Option<String>,
    },
}

impl Error {
    /// An [`Error::Io`] about `path`.
    pub fn io(action: &'static str, path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { action, path: path.as_ref().to_path_buf(), source }
    }

    /// An [`Error::Invalid`] without a hint.
    pub fn invalid(place: impl std::fmt::Display, problem: impl Into<String>) -> Self {
        Self::Invalid { place: short(place.to_string()), problem: short(problem.into()), hint: None }
    }

    /// An [`Error::Invalid`] that says what to do.
    pub fn invalid_hint(place: impl std::fmt::Display, problem: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Invalid { place: short(place.to_string()), problem: short(problem.into()), hint: Some(hint.into()) }
    }

    /// An [`Error::Invalid`] about a file.
    pub fn file(path: impl AsRef<Path>, problem: impl Into<String>) -> Self {
        Self::invalid(path.as_ref().display(), problem)
    }

    /// An [`Error::Unknown`] that shows the nearest known name.
    pub fn unknown<S: Into<String>>(
        place: impl std::fmt::Display,
        kind: impl Into<String>,
        name: impl Into<String>,
        known: impl IntoIterator<Item = S>,
    ) -> Self {
        let known = known.into_iter().map(Into::into).collect();
        Self::Unknown { place: short(place.to_string()), kind: kind.into(), name: short(name.into()), known }
    }

    /// An [`Error::Unsupported`] that says what to do instead.
    pub fn unsupported(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Unsupported { what: short(what.into()), hint: Some(hint.into()) }
    }
}

/// Most bytes of a text in an error.
const LONGEST: usize = 8 << 10;

/// A text that repeats something huge, such as a value of a broken file, with its middle left out.
fn short(text: String) -> String {
    if text.len() <= LONGEST {
        return text;
    }
    let head = &text[..text.floor_char_boundary(LONGEST / 2)];
    let tail = &text[text.ceil_char_boundary(text.len() - LONGEST / 4)..];
    format!("{head} ... [{} bytes left out] ... {tail}", text.len() - head.len() - tail.len())
}

fn hint_suffix(hint: &Option<String>) -> String {
    hint.as_ref().map(|hint| format!("; {hint}")).unwrap_or_default()
}

fn known_suffix(name: &str, known: &[String]) -> String {
    const LISTED: usize = 12;
    let nearest = nearest(name, known).map(|near| format!(", did you mean `{near}`?")).unwrap_or_default();
    let list = known.iter().take(LISTED).map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", ");
    let more = known.len().checked_sub(LISTED).filter(|n| *n > 0).map(|n| format!(" and {n} more")).unwrap_or_default();
    match known.is_empty() {
        true => String::new(),
        false => format!("{nearest} (known: {list}{more})"),
    }
}

/// The known name most like `name`, if any is like it at all.
pub fn nearest<'a>(name: &str, known: &'a [String]) -> Option<&'a String> {
    known
        .iter()
        .map(|candidate| {
            let (a, b) = (name.to_lowercase(), candidate.to_lowercase());
            (strsim::normalized_damerau_levenshtein(&a, &b).max(strsim::jaro_winkler(&a, &b) - 0.1), candidate)
        })
        .filter(|(likeness, _)| *likeness > 0.6)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_values_are_not_repeated() {
        let error = Error::invalid(
            "config.json",
            format!("invalid type: string \"{}\", expected u64", "\u{e4}".repeat(1 << 20)),
        );
        let text = error.to_string();
        assert!(
            text.len() < 10_000 && text.contains("bytes left out") && text.ends_with("expected u64"),
            "{}",
            text.len()
        );
    }

    #[test]
    fn unknown_names_show_the_nearest() {
        let error = Error::unknown("recipe.toml", "key", "learning_rat", ["learning_rate", "betas"]);
        assert!(error.to_string().contains("did you mean `learning_rate`?"), "{error}");
        let error = Error::unknown("recipe.toml", "key", "zzz", ["learning_rate", "betas"]);
        assert!(!error.to_string().contains("did you mean"), "{error}");
    }
}
