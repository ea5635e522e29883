//! RQ-VAE and RQ-Transformer: the official code of models, sampling and schedules.

mod official;
mod tables;
mod tokenizer;
mod transformer;

pub(super) use tables::{knows_tables, tables};
pub(super) use tokenizer::{knows_tokenizer, tokenizer};
pub(super) use transformer::{knows_transformer, transformer};
