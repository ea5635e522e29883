//! How tokens are drawn from logits. Everything here runs on the host, on one row of logits at a time, but for guidance.

mod draws;
mod filter;
mod respacing;
mod schedule;

pub use draws::{Draws, Seeded, VectorDraws};
pub use filter::{argmax, draw, filter, log_sum_exp, softmax};
pub use respacing::Respacing;
pub use schedule::Schedule;

use burn::tensor::Tensor;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use smalti_base::{Error, OneOrEach, Result};

/// Settings of sampling, the same for every generator. What a generator does not have is `None`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sampling {
    /// Logits are divided by it; 0 always takes the most likely token. For tokens that are vectors the noise of each
    /// diffusion step counts so many times.
    #[serde(serialize_with = "smalti_base::config::decimal")]
    pub temperature: f32,
    /// Only the k most likely tokens are drawn (ties with the k-th are kept). One number, or one for each depth of a stack.
    pub top_k: Option<OneOrEach<usize>>,
    /// Only the most likely tokens that together reach this probability are drawn, 0 < p <= 1. One number, or one for each depth of
    /// a stack.
    #[serde(serialize_with = "smalti_base::config::decimals_option")]
    pub top_p: Option<OneOrEach<f32>>,
    /// Classifier-free guidance scale: `logits = uncond + guidance * (cond - uncond)`; 1 is off.
    #[serde(serialize_with = "smalti_base::config::decimal")]
    pub guidance: f32,
    /// How the guidance scale changes from step to step.
    pub guidance_schedule: GuidanceSchedule,
    /// Decoding steps, for generators that can choose (masked decoding, at most as many as tokens for vectors).
    pub steps: Option<usize>,
    /// Steps left out at the beginning (masked decoding): the first step then decides as many tokens at once as those
    /// before it would have. MaskGIT edits images with 2 of 12.
    pub first_step: usize,
    /// Weight of the Gumbel noise in the confidence of masked decoding (MaskGIT's choice temperature).
    #[serde(serialize_with = "smalti_base::config::decimal")]
    pub choice_temperature: f32,
    /// Diffusion steps of each token, for generators of vectors; the model's own if there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diffusion_steps: Option<Respacing>,
    /// Mixes the codes of a place by their probabilities instead of drawing one, for pictures with fewer artefacts but another
    /// distribution (VAR's `more_smooth`).
    pub smooth: bool,
}

/// How guidance changes from the first step to the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuidanceSchedule {
    /// The same scale at each step.
    Constant,
    /// From 1 (off) at the first step to the full scale at the last; for tokens that are vectors with the share of tokens that
    /// are there after the step (MAR).
    Linear,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: None,
            guidance: 1.0,
            guidance_schedule: GuidanceSchedule::Constant,
            steps: None,
            first_step: 0,
            choice_temperature: 4.5,
            diffusion_steps: None,
            smooth: false,
        }
    }
}

impl Sampling {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the setting's name and its range.
    pub fn validate(&self) -> Result<()> {
        let refuse = |name: &str, problem: String| Err(Error::invalid(format!("sampling: {name}"), problem));
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return refuse("temperature", format!("{} is not a number of at least 0", self.temperature));
        }
        if self.top_k.iter().flat_map(OneOrEach::values).any(|k| *k == 0) {
            return refuse("top_k", "0 would leave no token; expected at least 1".into());
        }
        if let Some(p) = self.top_p.iter().flat_map(OneOrEach::values).find(|p| !(**p > 0.0 && **p <= 1.0)) {
            return refuse("top_p", format!("{p} is not in 0 < p <= 1"));
        }
        if !self.guidance.is_finite() {
            return refuse("guidance", format!("{} is not a finite number", self.guidance));
        }
        if !(self.choice_temperature.is_finite() && self.choice_temperature >= 0.0) {
            return refuse("choice_temperature", format!("{} is not a number of at least 0", self.choice_temperature));
        }
        match self.steps {
            Some(0) => refuse("steps", "0 would decode nothing; expected at least 1".into()),
            Some(steps) if self.first_step >= steps => {
                refuse("first_step", format!("{} leaves none of {steps} steps", self.first_step))
            }
            _ => Ok(()),
        }
    }

    /// The settings for the codes at one depth of a stack.
    pub fn at(&self, depth: usize) -> Self {
        Self {
            top_k: self.top_k.as_ref().and_then(|k| k.at(depth)).copied().map(OneOrEach::One),
            top_p: self.top_p.as_ref().and_then(|p| p.at(depth)).copied().map(OneOrEach::One),
            ..self.clone()
        }
    }

    /// Checks that lists have one value for each of so many depths; other tokens than stacks have one.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the setting's name.
    pub fn must_fit_depth(&self, depth: usize) -> Result<()> {
        let counts = [
            ("top_k", self.top_k.as_ref().and_then(OneOrEach::count)),
            ("top_p", self.top_p.as_ref().and_then(OneOrEach::count)),
        ];
        match counts.into_iter().find_map(|(name, count)| Some((name, count.filter(|count| *count != depth)?))) {
            Some((name, count)) => {
                let problem = format!("{count} values, but each place of this generator's tokens has {depth} codes");
                Err(Error::invalid_hint(format!("sampling: {name}"), problem, "give one number, or one for each code"))
            }
            None => Ok(()),
        }
    }

    /// Whether guidance is on, so that unconditional logits are needed.
    pub fn is_guided(&self) -> bool {
        self.guidance != 1.0
    }

    /// The guidance scale of one step of so many.
    pub fn guidance_at(&self, step: usize, steps: usize) -> f32 {
        match self.guidance_schedule {
            GuidanceSchedule::Constant => self.guidance,
            GuidanceSchedule::Linear if steps < 2 => self.guidance,
            GuidanceSchedule::Linear => 1.0 + (self.guidance - 1.0) * step as f32 / (steps - 1) as f32,
        }
    }
}

/// Classifier-free guidance (arXiv 2207.12598): the first half of the rows is conditional, the second half unconditional.
/// Its weights add up to one, so what a linear layer (with a bias or without) makes of guided inputs are its guided outputs, at half the
/// cost where it makes many.
///
/// # Shapes
/// `[2 n, ..]` to `[n, ..]`.
pub fn guide<const D: usize>(values: Tensor<D>, guidance: f32) -> Tensor<D> {
    let n = values.dims()[0] / 2;
    let conditional = values.clone().narrow(0, 0, n);
    let unconditional = values.narrow(0, n, n);
    (conditional - unconditional.clone()) * guidance + unconditional
}

/// Decides something for each row of logits; rows are shared among the threads.
pub(crate) fn decide_rows<T: Send>(
    logits: &mut [f32],
    vocabulary: usize,
    decide: impl Fn(usize, &mut [f32]) -> T + Sync,
) -> Vec<T> {
    logits.par_chunks_exact_mut(vocabulary).enumerate().map(|(i, row)| decide(i, row)).collect()
}
