//! Losses of training.

pub mod adversarial;
pub mod critic;
pub mod perceptual;
pub mod reconstruction;
pub mod terms;
pub mod tokenizer;

pub use adversarial::{AdversarialConfig, AdversarialKind};
pub use critic::{Critic, CriticConfig, StyleCriticConfig};
pub use perceptual::{Perceptual, PerceptualConfig};
pub use terms::{LossTerm, Weight};
pub use tokenizer::{TokenizerLoss, TokenizerLossConfig, TokenizerStep};
