//! What can be trained: one file for each kind of task.

mod captions;
pub mod generator;
pub mod tokenizer;

use burn::tensor::{Int, Tensor};
use smalti_base::{Error, Result};

/// Codes brought to the host in one read.
///
/// # Errors
/// [`Error::Invalid`] if the device cannot be read.
pub fn indices<const D: usize>(codes: Tensor<D, Int>) -> Result<Vec<i64>> {
    codes.into_data().convert::<i64>().try_into_vec::<i64>().map_err(|e| Error::invalid("codes", format!("{e:?}")))
}
