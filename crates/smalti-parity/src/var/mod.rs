//! VAR: the official code of models, sampling and schedules.

mod tables;
mod tokenizer;
mod transformer;

pub(super) use tables::{knows_resampling, knows_sampling, resampling, sampling};
pub(super) use tokenizer::{knows_quantizer, knows_tokenizer, quantizer, tokenizer};
pub(super) use transformer::{knows_transformer, transformer};
