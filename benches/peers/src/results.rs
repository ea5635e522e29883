//! Measured rows, kept in `benchmarks.json` from run to run.

use crate::agreement::Agreement;
use crate::rows::Work;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use smalti::base::{Result, config, files};
use std::collections::BTreeMap;
use std::path::Path;

/// The most of PyTorch's memory that smalti may take.
pub const MEMORY_TARGET: f64 = 0.6;

/// Share of the cores that others may use while a row is measured.
pub const BUSY: f64 = 0.1;

/// Everything that was measured, one entry for each row.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Results {
    /// The rows by name.
    pub rows: BTreeMap<String, Measured>,
}

/// One measured row.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// Its name.
    pub name: String,
    /// What was measured.
    pub title: String,
    /// The least ratio that is wanted.
    pub target: Option<f64>,
    /// Work of one run, for rows that measure the machine.
    pub per_run: Option<Work>,
    /// How PyTorch computed it.
    pub ways: Ways,
    /// Milliseconds of PyTorch's runs.
    pub torch_ms: Vec<f64>,
    /// Milliseconds of smalti's runs; run i followed PyTorch's run i.
    pub smalti_ms: Vec<f64>,
    /// Largest resident memory of both processes.
    pub memory: Memory,
    /// Share of the cores that others used before or after the rounds, whichever was more. Above [`BUSY`] times say little.
    #[serde(default)]
    pub busy: f64,
    /// How far outputs differ.
    pub agreement: Vec<Agreement>,
    /// Day of the run.
    pub date: String,
    /// Machine, versions, threads and command.
    pub setup: Value,
}

/// Ways to compute a row in PyTorch.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ways {
    /// The one that was measured: the fastest.
    pub best: String,
    /// Milliseconds of each in its trial.
    pub tried: BTreeMap<String, f64>,
    /// Largest resident memory of each in its trial, in KiB.
    #[serde(default)]
    pub peak_kib: BTreeMap<String, u64>,
    /// Those that did not work or took too long to prepare, and why.
    pub dropped: BTreeMap<String, String>,
}

/// Largest resident memory in KiB.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Memory {
    /// PyTorch's process; the least of its ways, since compiling takes memory too.
    pub torch_kib: u64,
    /// smalti's process.
    pub smalti_kib: u64,
    /// PyTorch's process after importing torch.
    pub torch_base_kib: Option<u64>,
    /// smalti's process after its start.
    pub smalti_base_kib: Option<u64>,
}

impl Memory {
    /// smalti's part of PyTorch's.
    pub fn ratio(&self) -> f64 {
        self.smalti_kib as f64 / self.torch_kib.max(1) as f64
    }
}

impl Results {
    /// What is in the folder; nothing if there is no file yet.
    ///
    /// # Errors
    /// A file that is there and cannot be read.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("benchmarks.json");
        if path.exists() { config::read_json(&path) } else { Ok(Self::default()) }
    }

    /// Replaces one row.
    pub fn put(&mut self, row: Measured) {
        self.rows.insert(row.name.clone(), row);
    }

    /// Writes the file.
    ///
    /// # Errors
    /// [`smalti::Error::Io`].
    pub fn write(&self, folder: &Path) -> Result<()> {
        files::create_folder(folder)?;
        config::write_json(&folder.join("benchmarks.json"), self)
    }
}

impl Measured {
    /// Median of PyTorch's times.
    pub fn torch(&self) -> f64 {
        median(&self.torch_ms)
    }

    /// Median of smalti's times.
    pub fn smalti(&self) -> f64 {
        median(&self.smalti_ms)
    }

    /// Median, least and greatest of the ratios of pairs of runs.
    pub fn ratio(&self) -> (f64, f64, f64) {
        let pairs: Vec<f64> = self.torch_ms.iter().zip(&self.smalti_ms).map(|(torch, smalti)| torch / smalti).collect();
        let least = pairs.iter().copied().fold(f64::INFINITY, f64::min);
        (median(&pairs), least, pairs.iter().copied().fold(0.0, f64::max))
    }

    /// Whether the target of the ratio is met, if there is one.
    pub fn met(&self) -> Option<bool> {
        self.target.map(|target| self.ratio().0 >= target)
    }

    /// One line for the terminal.
    pub fn summary(&self) -> String {
        let (ratio, least, most) = self.ratio();
        let memory = &self.memory;
        format!(
            "PyTorch ({}) {:.1} ms, smalti {:.1} ms, ratio {ratio:.2} ({least:.2}..{most:.2}), memory {} / {} MiB = {:.2}",
            self.ways.best,
            self.torch(),
            self.smalti(),
            memory.smalti_kib / 1024,
            memory.torch_kib / 1024,
            memory.ratio()
        )
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
