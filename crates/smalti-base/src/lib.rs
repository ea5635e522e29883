//! What every other crate of smalti stands on: errors, devices, random numbers, strict configuration,
//! files that appear whole or not at all, progress, and the contract between a tokenizer and a generator.

pub mod config;
pub mod device;
pub mod each;
pub mod error;
pub mod files;
pub mod planes;
pub mod progress;
pub mod rng;
pub mod spec;
pub mod threads;

pub use each::OneOrEach;
pub use error::{Error, Result};
pub use planes::Planes;
pub use progress::Progress;
pub use rng::Rng;
pub use spec::{Layout, TokenKind, TokenSpec, Tokens, Vocabulary};
