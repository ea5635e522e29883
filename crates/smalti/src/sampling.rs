//! How tokens are drawn, as typed.

use serde::{Deserialize, Serialize};
use smalti_base::{OneOrEach, Result};
use smalti_models::sampling::{Respacing, Sampling};

/// Sampling settings that replace those of the bundle.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
#[command(next_help_heading = "Sampling (defaults: the model's own)")]
pub struct SamplingArgs {
    /// Strength of the condition (classifier-free guidance); 1 is off
    #[arg(long, value_name = "X")]
    pub guidance: Option<f32>,
    /// Divisor of the logits; 0 always takes the most likely token (for vectors: strength of the noise in diffusion steps)
    #[arg(long, value_name = "X")]
    pub temperature: Option<f32>,
    /// Draw only from the N most likely tokens; 0 is off. A list such as 500,200,100,50 has one for each depth of a stack
    #[arg(long, value_name = "N")]
    pub top_k: Option<OneOrEach<usize>>,
    /// Draw only from the most likely tokens that together have this probability, or a list as for --top-k
    #[arg(long, value_name = "X")]
    pub top_p: Option<OneOrEach<f32>>,
    /// Number of decoding steps, for generators that have a choice
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Diffusion steps per token, for generators of vectors: N, or N1,N2,.. for equal sections, or ddimN
    #[arg(long, value_name = "N")]
    pub diffusion_steps: Option<Respacing>,
    /// Mix codes by their probabilities instead of drawing one, for generators that can (var): fewer artefacts, less variety
    #[arg(long)]
    pub smooth: bool,
}

impl SamplingArgs {
    /// The model's settings with what was typed in their place.
    ///
    /// # Errors
    /// As [`Sampling::validate`].
    pub fn over(&self, defaults: &Sampling) -> Result<Sampling> {
        let mut sampling = defaults.clone();
        sampling.guidance = self.guidance.unwrap_or(sampling.guidance);
        sampling.temperature = self.temperature.unwrap_or(sampling.temperature);
        sampling.top_k = self.top_k.clone().map_or(sampling.top_k, |k| (k != OneOrEach::One(0)).then_some(k));
        sampling.top_p = self.top_p.clone().or(sampling.top_p);
        sampling.steps = self.steps.or(sampling.steps);
        sampling.diffusion_steps = self.diffusion_steps.clone().or(sampling.diffusion_steps);
        sampling.smooth |= self.smooth;
        sampling.validate()?;
        Ok(sampling)
    }
}
