//! How tokens are drawn from logits.

use serde::{Deserialize, Serialize};

/// Settings of sampling, the same for every generator. What a generator does not have is `None`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sampling {
    /// Logits are divided by it; 0 always takes the most likely token.
    pub temperature: f32,
    /// Only the k most likely tokens are drawn (ties with the k-th are kept).
    pub top_k: Option<usize>,
    /// Only the most likely tokens that together reach this probability are drawn, 0 < p <= 1.
    pub top_p: Option<f32>,
    /// Classifier-free guidance scale: `logits = uncond + guidance * (cond - uncond)`; 1 is off.
    pub guidance: f32,
    /// Decoding steps, for generators that can choose (masked decoding).
    pub steps: Option<usize>,
    /// Weight of the Gumbel noise in the confidence of masked decoding (MaskGIT's choice temperature).
    pub choice_temperature: f32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None, top_p: None, guidance: 1.0, steps: None, choice_temperature: 4.5 }
    }
}
