//! What can be trained: one file for each kind of task.

mod captions;
pub mod encoder;
mod examples;
pub mod generator;
mod images;
mod skipped;
pub mod tokenizer;
