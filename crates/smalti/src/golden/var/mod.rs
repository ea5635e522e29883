//! VAR: the official code of models, sampling and schedules.

mod tables;
mod tokenizer;
mod transformer;

pub(super) use tables::{knows_resampling, knows_sampling, resampling, sampling};
pub(super) use tokenizer::{knows_quantizer, knows_tokenizer, quantizer, tokenizer};
pub(super) use transformer::{knows_transformer, transformer};

use super::case::Case;
use serde::de::DeserializeOwned;
use smalti_base::{Error, Result};

fn read<T: DeserializeOwned>(case: &Case, value: &serde_json::Value) -> Result<T> {
    serde_json::from_value(value.clone()).map_err(|e| Error::invalid(case.title(), format!("config: {e}")))
}
