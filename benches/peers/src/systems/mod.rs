//! smalti's side of each system, as its users would run it.

mod bundle;
mod folder;
mod gpt;
mod inputs;
mod kernels;
mod mar;
mod maskgit;
mod rq;
mod training;
mod var;
mod vqgan;
mod vqgan_training;

use crate::rows::Row;
use smalti::base::{Error, Result};
use smalti::models::checkpoint::Stored;
use std::collections::BTreeMap;
use std::path::Path;

/// Named tensors, in PyTorch's layout.
pub type Outputs = BTreeMap<String, Stored>;

/// What a row does.
pub trait Task {
    /// The outputs that are compared with PyTorch's.
    ///
    /// # Errors
    /// What the computation returns.
    fn check(&mut self) -> Result<Outputs>;

    /// The work that is timed.
    ///
    /// # Errors
    /// What the computation returns.
    fn run(&mut self) -> Result<()>;
}

/// Opens a row's model and inputs.
///
/// # Errors
/// [`Error::Unknown`] for a task that is not there; files that cannot be read or do not fit.
pub fn open(row: &Row, folder: &Path) -> Result<Box<dyn Task>> {
    Ok(match (row.system.as_str(), row.task.as_str()) {
        ("kernels", "gemm") => Box::new(kernels::Gemm::open(folder)?),
        ("kernels", "copy") => Box::new(kernels::Copy::open()),
        ("kernels", "nearest_code") => Box::new(kernels::NearestCode::open(folder)?),
        ("vqgan", "encode") => Box::new(vqgan::Encode::open(row, folder)?),
        ("vqgan", "decode") => Box::new(vqgan::Decode::open(row, folder)?),
        ("vqgan_training", "step") => Box::new(vqgan_training::Step::open(row, folder)?),
        ("folder", "tokenize") => Box::new(folder::Tokenize::open(folder)),
        ("gpt", "decode") => Box::new(gpt::Decode::open(row, folder)?),
        ("gpt", "forward") => Box::new(gpt::Forward::open(row, folder)?),
        ("gpt", "train") => Box::new(gpt::Train::open(row, folder)?),
        ("maskgit", "decode") => Box::new(maskgit::Decode::open(row, folder)?),
        ("maskgit", "train") => Box::new(maskgit::Train::open(row, folder)?),
        ("rq", "image") => Box::new(rq::Image::open(row, folder)?),
        ("rq", "train") => Box::new(rq::Train::open(row, folder)?),
        ("var", "image") => Box::new(var::Image::open(row, folder)?),
        ("var", "forward") => Box::new(var::Forward::open(row, folder)?),
        ("var", "train") => Box::new(var::Train::open(row, folder)?),
        ("mar", "decode") => Box::new(mar::Decode::open(row, folder)?),
        ("mar", "forward") => Box::new(mar::Forward::open(row, folder)?),
        ("mar", "train") => Box::new(mar::Train::open(row, folder)?),
        (system, task) => {
            let problem = format!("{system} has no task `{task}` in smalti's worker");
            return Err(Error::invalid_hint(&row.name, problem, "add it to benches/peers/src/systems/mod.rs"));
        }
    })
}

/// Writes what smalti needs beside the shared files.
///
/// # Errors
/// As [`open`].
pub fn prepare(row: &Row, folder: &Path) -> Result<()> {
    match (row.system.as_str(), row.task.as_str()) {
        ("folder", _) => folder::prepare(row, folder),
        ("gpt", "decode" | "forward") => gpt::prepare(row, folder),
        ("maskgit", "decode") => maskgit::prepare(row, folder),
        ("rq", "image") => rq::prepare(row, folder),
        ("var", "image" | "forward") => var::prepare(row, folder),
        ("mar", "decode" | "forward") => mar::prepare(row, folder),
        _ => Ok(()),
    }
}
