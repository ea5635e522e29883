//! What is compared: the declarations in `rows.toml`.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use smalti::base::{Error, Result, config};
use std::collections::BTreeMap;

/// One comparison.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Its name on the command line and in the results.
    pub name: String,
    /// What is measured, for the page.
    pub title: String,
    /// The file on both sides that computes it.
    pub system: String,
    /// What that file should do.
    pub task: String,
    /// The network; in `rows.toml` the name of one of its models.
    #[serde(default)]
    pub model: Value,
    /// The tokenizer that a generator's tokens belong to, named in the same way, where a task needs it.
    #[serde(default)]
    pub tokenizer: Value,
    /// The least ratio of times (PyTorch / smalti) that is wanted.
    #[serde(default)]
    pub target: Option<f64>,
    /// Alternating runs of both sides.
    #[serde(default = "seven")]
    pub rounds: usize,
    /// How often the work is done in one timed run; short work is repeated.
    #[serde(default = "one")]
    pub repeats: usize,
    /// Images at the same time.
    #[serde(default = "one")]
    pub batch: usize,
    /// Ways to compute it in PyTorch; the fastest competes.
    #[serde(default = "eager")]
    pub variants: Vec<String>,
    /// What only this task understands.
    #[serde(default)]
    pub options: Value,
    /// How far each output may differ.
    pub tolerance: BTreeMap<String, Tolerance>,
    /// Work of one run, for rows that measure the machine.
    #[serde(default)]
    pub per_run: Option<Work>,
    /// Why the row is not run.
    #[serde(default)]
    pub off: Option<String>,
    /// Threads of each side.
    #[serde(default)]
    pub threads: usize,
    /// Programs that are started for each run, by side; set for tasks that measure whole processes.
    #[serde(default)]
    pub commands: Value,
}

fn seven() -> usize {
    7
}

fn one() -> usize {
    1
}

fn eager() -> Vec<String> {
    vec!["eager".into()]
}

/// How far an output may differ.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Tolerance {
    /// Largest difference, in parts of the largest expected value.
    Largest(f64),
    /// Share of integers that may differ.
    Share {
        /// In 0..=1.
        share: f64,
    },
    /// Length of the difference, in parts of the expected length.
    Length {
        /// At least 0.
        l2: f64,
    },
}

/// What one run does.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// Floating-point operations.
    Flop(f64),
    /// Bytes read and written.
    Bytes(f64),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Declarations {
    models: BTreeMap<String, Value>,
    rows: Vec<Row>,
}

/// All rows in the order of the page, their models filled in.
///
/// # Errors
/// [`Error::Invalid`] or [`Error::Unknown`] if `rows.toml` cannot be used.
pub fn all() -> Result<Vec<Row>> {
    const PLACE: &str = "benches/peers/rows.toml";
    let Declarations { models, mut rows } = config::parse_toml(include_str!("../rows.toml"), PLACE, &[])?;
    for row in &mut rows {
        for model in [&mut row.model, &mut row.tokenizer] {
            if let Value::String(name) = model {
                let found = models.get(name).cloned();
                *model = found.ok_or_else(|| Error::unknown(PLACE, "model", name.clone(), models.keys().cloned()))?;
            }
        }
    }
    Ok(rows)
}

/// Whether a row's name contains one of the parts of a filter; an empty filter takes all.
pub fn matches(filter: &str, name: &str) -> bool {
    filter.split(',').any(|part| name.contains(part.trim()))
}

#[cfg(test)]
mod tests {
    #[test]
    fn declarations_are_read_and_names_differ() {
        let rows = super::all().unwrap();
        let mut names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), rows.len());
        assert!(rows.iter().all(|row| !row.variants.is_empty() && (row.target.is_some() != row.per_run.is_some())));
    }

    #[test]
    fn a_filter_has_parts() {
        assert!(super::matches("", "gemm") && super::matches("gpt, gemm", "gemm") && !super::matches("gpt", "gemm"));
    }
}
