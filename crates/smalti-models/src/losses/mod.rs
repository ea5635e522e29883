//! Losses of training.

pub mod adversarial;
pub mod perceptual;
pub mod reconstruction;
pub mod tokenizer;

pub use adversarial::{AdversarialConfig, AdversarialKind};
pub use perceptual::{Perceptual, PerceptualConfig};
pub use tokenizer::{TokenizerLoss, TokenizerLossConfig, TokenizerStep};
