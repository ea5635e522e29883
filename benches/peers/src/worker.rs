//! smalti's side of a row: checks, and runs when told to.

use crate::rows::Row;
use crate::systems;
use serde::Deserialize;
use smalti::base::{Error, Result, config, files};
use smalti::models::checkpoint::{Precision, write_tensors};
use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

#[derive(Deserialize)]
struct Request {
    #[serde(default)]
    run: bool,
}

fn row(folder: &Path) -> Result<Row> {
    config::read_json(&folder.join("row.json"))
}

/// Writes what smalti needs beside the files of both sides.
///
/// # Errors
/// What the row's system returns.
pub fn prepare(folder: &Path) -> Result<()> {
    systems::prepare(&row(folder)?, folder)?;
    say(&serde_json::json!({ "ready": true }))
}

/// Writes the outputs that are compared.
///
/// # Errors
/// What the row's system returns.
pub fn check(folder: &Path) -> Result<()> {
    let outputs = systems::open(&row(folder)?, folder)?.check()?;
    write_tensors(&folder.join("smalti.safetensors"), &outputs, Precision::F32, &BTreeMap::new())?;
    say(&serde_json::json!({ "ready": true }))
}

/// Loads everything, says so, and runs once for each request.
///
/// # Errors
/// What the row's system returns.
pub fn serve(folder: &Path) -> Result<()> {
    let base = peak_kib();
    let row = row(folder)?;
    let mut task = systems::open(&row, folder)?;
    say(&serde_json::json!({ "ready": true, "base_kib": base }))?;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|e| Error::invalid("worker", e.to_string()))?;
        let request: Request =
            serde_json::from_str(&line).map_err(|e| Error::invalid("worker", format!("`{line}`: {e}")))?;
        if !request.run {
            break;
        }
        let start = Instant::now();
        for _ in 0..row.repeats {
            task.run()?;
        }
        say(&serde_json::json!({ "ms": start.elapsed().as_secs_f64() * 1e3 / row.repeats as f64 }))?;
    }
    Ok(())
}

fn say(message: &serde_json::Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{message}").and_then(|()| out.flush()).map_err(|e| Error::invalid("worker", e.to_string()))
}

fn peak_kib() -> Option<u64> {
    let status = files::read_text(Path::new("/proc/self/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.split_whitespace().next()?.parse().ok()
}
