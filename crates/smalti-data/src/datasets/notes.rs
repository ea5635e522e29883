//! What was left out while a data set was opened: counted by reason, the first few by name.

use std::collections::BTreeMap;
use std::path::Path;

/// Names that a line lists.
const NAMED: usize = 10;

/// Endings of files that stand beside images and are no images.
const COMPANIONS: [&str; 16] = [
    "", "txt", "json", "jsonl", "csv", "md", "xml", "html", "log", "yaml", "yml", "toml", "py", "sh", "cls", "caption",
];

/// Reasons with the names that they concern.
#[derive(Debug, Default)]
pub(super) struct Notes {
    found: BTreeMap<&'static str, (usize, Vec<String>)>,
    endings: BTreeMap<String, usize>,
}

impl Notes {
    /// Notes that `name` is one of `what`, such as `images beside the class folders`.
    pub(super) fn add(&mut self, what: &'static str, name: impl Into<String>) {
        let (count, names) = self.found.entry(what).or_default();
        *count += 1;
        if names.len() < NAMED {
            names.push(name.into());
        }
    }

    /// Counts a file that is no image by its ending.
    pub(super) fn other(&mut self, ending: &str) {
        *self.endings.entry(ending.to_string()).or_default() += 1;
    }

    /// A line for each reason. `all` counts also files that usually stand beside images.
    pub(super) fn lines(&self, place: &Path, all: bool) -> Vec<String> {
        let place = place.display();
        let line = |(what, (count, names)): (&&str, &(usize, Vec<String>))| {
            format!("{place}: left out {what} ({count}): {}", listed(names, *count))
        };
        let mut lines: Vec<String> = self.found.iter().map(line).collect();
        let others = self.endings.iter().filter(|(ending, _)| all || !COMPANIONS.contains(&ending.as_str()));
        let others: Vec<(usize, &String)> = others.map(|(ending, count)| (*count, ending)).collect();
        if !others.is_empty() {
            let named: Vec<String> = others
                .iter()
                .map(|(count, ending)| match ending.is_empty() {
                    true => format!("{count} without an ending"),
                    false => format!("{count} .{ending}"),
                })
                .collect();
            let sum: usize = others.iter().map(|(count, _)| count).sum();
            lines.push(format!("{place}: left out files of other kinds ({sum}): {}", listed(&named, named.len())));
        }
        lines
    }
}

/// The first names of `count`.
pub(super) fn listed(names: &[String], count: usize) -> String {
    let shown = &names[..names.len().min(NAMED)];
    match count - shown.len() {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
