//! Generators: condition to [`Codes`], one decoding step at a time.

use crate::{Codes, sampling::Sampling};
use serde::{Deserialize, Serialize};
use smalti_base::{Result, TokenSpec};

/// What a picture should show.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Condition {
    /// Nothing is asked for.
    None,
    /// A class, counted from 0.
    Class(u32),
    /// Token ids of a caption, without padding.
    Text(Vec<u32>),
}

/// Tokens that must be kept. Inpainting, outpainting and prefixes are all "some tokens are known".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// A token for each place of the layout; those that are not kept are not looked at.
    pub codes: Vec<u32>,
    /// True where the token is kept.
    pub keep: Vec<bool>,
}

/// One picture to make.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageRequest {
    /// What it shows.
    pub condition: Condition,
    /// Seed of its random draws. A picture depends on its own request only, not on its batch.
    pub seed: u64,
    /// Tokens that are given.
    pub known: Option<Known>,
}

/// A batch of pictures to make.
#[derive(Clone, Debug)]
pub struct Request {
    /// The pictures.
    pub images: Vec<ImageRequest>,
    /// How tokens are drawn, the same for all.
    pub sampling: Sampling,
}

/// Predicts the codes of its spec. It never knows which tokenizer is beside it.
pub trait Generator: Send + Sync {
    /// The tokens that this generator predicts.
    fn spec(&self) -> &TokenSpec;

    /// Begins a generation, which the caller pulls step by step.
    ///
    /// # Errors
    /// A condition of another kind, a class or token out of range, known tokens of another length, or sampling
    /// settings out of range.
    fn start(&self, request: &Request) -> Result<Box<dyn Generation + '_>>;
}

/// A generation under way.
pub trait Generation {
    /// Number of decoding steps in all.
    fn steps(&self) -> usize;
    /// Steps done so far.
    fn done(&self) -> usize;
    /// Does one step. Does nothing when all steps are done.
    fn next(&mut self);
    /// The codes so far. Places that are not decided hold the best guess or 0.
    fn codes(&self) -> Codes;
}
