//! Losses of training.

pub mod adversarial;
pub mod discriminator;
pub mod perceptual;
pub mod reconstruction;
pub mod terms;
pub mod tokenizer;

pub use adversarial::{AdversarialConfig, AdversarialKind};
pub use discriminator::{Discriminator, DiscriminatorConfig, StyleDiscriminatorConfig};
pub use perceptual::{Perceptual, PerceptualConfig};
pub use terms::{LossTerm, Weight};
pub use tokenizer::{TokenizerLoss, TokenizerLossConfig, TokenizerStep};
