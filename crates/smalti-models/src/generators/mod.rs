//! Generators: condition to [`Codes`], one decoding step at a time.

mod blueprint;
pub mod causal_mar;
pub mod condition;
mod condition_vectors;
pub mod denoiser;
pub mod diffusion;
pub mod gpt;
pub mod mar;
pub mod maskgit;
pub mod order;
pub mod request;
pub mod rq_transformer;
mod upload;
pub mod var;

pub use blueprint::StackConfig;
pub use causal_mar::{CausalMar, CausalMarConfig};
pub use condition::{Condition, ConditionConfig, Conditions, Given, Padding};
pub use condition_vectors::ConditionVectors;
pub use gpt::{Gpt, GptConfig};
pub use mar::{Mar, MarConfig};
pub use maskgit::{MaskGit, MaskGitConfig};
pub use order::TokenOrder;
pub use request::{ImageRequest, Known, Request, check_sampling};
pub use rq_transformer::{RqTransformer, RqTransformerConfig};
pub use var::{Var, VarConfig};

use crate::Codes;
use crate::role::role;
use crate::tokenizers::Tokenizer;
use burn::tensor::{Int, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result, TokenSpec, rng::Stream};
use smalti_nn::dense::{Dense, Pack};

role! {
    /// Which generator, with everything that changes the model.
    GeneratorConfig: GeneratorSettings;
    /// A generator of any kind.
    GeneratorModel: Generator;
    /// What there is.
    SYSTEMS: Generator;
    /// Raster-order transformer.
    "gpt" => Gpt(GptConfig),
    /// Masked parallel decoding.
    "maskgit" => MaskGit(MaskGitConfig),
    /// A token map at each step, coarse to fine.
    "var" => Var(VarConfig),
    /// Places one after the other, and the codes of each.
    "rq_transformer" => RqTransformer(RqTransformerConfig),
    /// Masked prediction of vectors with a diffusion loss.
    "mar" => Mar(MarConfig),
    /// The same, one token after the other.
    "causal_mar" => CausalMar(CausalMarConfig),
}

/// What is known of a generator before it has weights.
pub trait GeneratorSettings {
    /// The tokens that the generator predicts.
    fn tokens(&self) -> &TokenSpec;

    /// What it can be conditioned on.
    fn conditions(&self) -> &Conditions;

    /// How often training hid the condition; above 0 it can be guided.
    fn condition_dropout(&self) -> f32;

    /// What else it can do.
    fn abilities(&self) -> Abilities {
        Abilities::default()
    }

    /// How its training targets are drawn, if they are distributions over the codes.
    fn soft_targets(&self) -> Option<SoftTargets> {
        None
    }

    /// The rules file that exports its weights, if the official layout can hold them.
    fn official(&self) -> Option<&'static str> {
        None
    }
}

/// What a generator can do beside drawing tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Abilities {
    /// It mixes codes by their probabilities ([`Sampling::smooth`](crate::sampling::Sampling::smooth)).
    pub mixes_codes: bool,
    /// The number of decoding steps can be chosen ([`Sampling::steps`](crate::sampling::Sampling::steps)).
    pub chooses_steps: bool,
    /// It makes pictures larger than its own grid, through a window.
    pub slides_a_window: bool,
    /// It makes no picture without a condition.
    pub needs_a_condition: bool,
    /// It computes with the tokenizer's code vectors; see [`Generator::adopt`].
    pub reads_code_vectors: bool,
}

/// Training targets that are distributions over the codes (RQ-VAE, arXiv 2203.01941, section 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SoftTargets {
    /// Of the distribution: squared distances are divided by it.
    pub temperature: f64,
    /// Whether the codes that are fed are drawn from it; otherwise they are the nearest ones.
    #[serde(default = "yes")]
    pub stochastic: bool,
}

fn yes() -> bool {
    true
}

/// What a training step draws from.
#[derive(Debug)]
pub struct Draw<'a> {
    /// Random numbers of this step.
    pub stream: &'a mut Stream,
    /// The training step, counted from 0.
    pub step: u64,
}

impl<'a> Draw<'a> {
    /// Draws of a step.
    pub fn new(stream: &'a mut Stream, step: u64) -> Self {
        Self { stream, step }
    }
}

/// Predicts the codes of its spec. It never knows which tokenizer is beside it.
pub trait Generator: Send + Sync {
    /// What the model was made from.
    fn settings(&self) -> &dyn GeneratorSettings;

    /// The tokens that this generator predicts.
    fn spec(&self) -> &TokenSpec {
        self.settings().tokens()
    }

    /// Begins a generation, which the caller pulls step by step. It runs without gradients and without dropout.
    ///
    /// # Errors
    /// No images, a condition of another kind, a class or token out of range, known tokens of another length, sampling
    /// settings out of range or of another generator, or guidance of a generator that was trained without condition dropout.
    fn start(&self, request: &Request) -> Result<Box<dyn Generation + '_>>;

    /// The training loss of a batch. Dropped conditions and masks are drawn on the host; dropout inside the network uses the device's
    /// generator, and acts only on an autodiff device.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the codes are not the spec's, or there is not one fitting condition for each image.
    fn loss(&self, codes: Codes, given: &[Condition], draw: &mut Draw<'_>) -> Result<GeneratorLoss>;

    /// What the deterministic loss is made from; see [`Self::validation_loss`].
    ///
    /// # Errors
    /// As [`Self::loss`], and [`Error::Unsupported`] by a generator that gives no probabilities.
    fn predictions(&self, _codes: Codes, _given: &[Condition], _first_image: u64) -> Result<Predictions> {
        Err(Error::unsupported("probabilities of tokens that are vectors", "compare validation losses instead"))
    }

    /// The deterministic loss of validation images: no condition is dropped, no label is smoothed. `first_image` is the
    /// batch's place in the data set, so that the result does not depend on the batch size. Call it on `model.valid()`.
    ///
    /// For generators that draw one token after the other or one level after the other it is the exact negative log-likelihood. For
    /// [`MaskGit`] it is the cross-entropy of the masked tokens, image `i` masked at progress `frac(i / golden ratio)` of the schedule
    /// in places drawn from seed 0 and `i`. For [`Mar`] and [`CausalMar`] it is the diffusion loss with noise drawn from seed 0 and `i`.
    ///
    /// # Errors
    /// As [`Self::loss`].
    fn validation_loss(&self, codes: Codes, given: &[Condition], first_image: u64) -> Result<GeneratorLoss> {
        Ok(self.predictions(codes, given, first_image)?.loss())
    }

    /// Takes over what it needs of its tokenizer, such as code vectors; most generators compute with tokens only.
    ///
    /// # Errors
    /// [`Error::Mismatch`] or [`Error::Unsupported`] if the tokenizer's codes mean something else.
    fn adopt(&mut self, _tokenizer: &dyn Tokenizer) -> Result<()> {
        Ok(())
    }

    /// All of its dense layers, to be packed; see [`Pack`].
    fn dense_layers(&mut self) -> Vec<&mut Dense>;
}

impl Pack for GeneratorModel {
    fn dense_layers(&mut self) -> Vec<&mut Dense> {
        Generator::dense_layers(&mut **self)
    }
}

/// A generation under way. `Box<dyn Generation>` is an iterator over its steps, each with the number of steps that are done.
pub trait Generation {
    /// Number of decoding steps in all.
    fn steps(&self) -> usize;

    /// Steps done so far.
    fn done(&self) -> usize;

    /// Does one step. Does nothing when all steps are done.
    ///
    /// # Errors
    /// What the device returns; the generation then stays where it was.
    fn step(&mut self) -> Result<()>;

    /// The codes so far. Places that are not decided hold the best guess or 0.
    fn codes(&self) -> Codes;

    /// Does all steps that are left; returns the codes.
    ///
    /// # Errors
    /// As [`Self::step`].
    fn finish(&mut self) -> Result<Codes> {
        while self.done() < self.steps() {
            self.step()?;
        }
        Ok(self.codes())
    }
}

impl Iterator for dyn Generation + '_ {
    type Item = Result<usize>;

    fn next(&mut self) -> Option<Result<usize>> {
        (self.done() < self.steps()).then(|| self.step().map(|()| self.done()))
    }
}

/// What a generator loses on a batch. Nothing waits for the device.
#[derive(Clone, Debug)]
pub struct GeneratorLoss {
    /// What training makes small, one element.
    pub loss: Tensor<1>,
    /// Mean cross-entropy of the predicted tokens without label smoothing, one element without gradient; none if the
    /// generator gives no probabilities. Divided by ln 2 it is bits per token. This and a validation loss are means over
    /// images: weight batches by their size.
    pub nats_per_token: Option<Tensor<1>>,
}

/// What a generator says of the tokens of a batch.
#[derive(Clone, Debug)]
pub struct Predictions {
    /// Logits `[n, m]` of n tokens; the first of the m are the image tokens.
    pub logits: Tensor<2>,
    /// The true tokens, `[n]`.
    pub targets: Tensor<1, Int>,
    /// How much a token counts, `[n]`, with sum 1; 0 if it was not to be predicted. All the same if there are none.
    pub weights: Option<Tensor<1>>,
}

impl Predictions {
    fn cross_entropy(&self, label_smoothing: f32) -> Tensor<1> {
        let Self { logits, targets, weights } = self.clone();
        smalti_kernels::softmax_cross_entropy(logits, targets, weights, label_smoothing)
    }

    /// The loss without label smoothing.
    pub fn loss(&self) -> GeneratorLoss {
        self.smoothed_loss(0.0)
    }

    /// The loss with label smoothing, which spreads that share of the target over all logits.
    pub fn smoothed_loss(&self, label_smoothing: f32) -> GeneratorLoss {
        let loss = self.cross_entropy(label_smoothing);
        let plain = match label_smoothing == 0.0 {
            true => loss.clone(),
            false => Self { logits: self.logits.clone().detach(), ..self.clone() }.cross_entropy(0.0),
        };
        GeneratorLoss { loss, nats_per_token: Some(plain.detach()) }
    }
}

/// The codes of a batch.
///
/// # Errors
/// [`Error::Invalid`] unless there is one condition and one full row of codes for each image.
fn codes_of(codes: Codes, conditions: &[Condition], tokens: &TokenSpec) -> Result<Tensor<2, Int>> {
    let Some(codes) = codes.discrete() else {
        return Err(Error::invalid("generator batch", format!("vectors where the tokens are {}", tokens.kind)));
    };
    let [b, length] = codes.dims();
    if b == 0 || b != conditions.len() || length != tokens.length() {
        let problem = format!(
            "codes [{b}, {length}] and {} conditions; expected [n, {}] and n of them, n at least 1",
            conditions.len(),
            tokens.length()
        );
        return Err(Error::invalid("generator batch", problem));
    }
    Ok(codes)
}

/// The vectors of a batch.
///
/// # Errors
/// [`Error::Invalid`] unless there is one condition and one full row of vectors for each image.
fn vectors_of(codes: Codes, conditions: &[Condition], tokens: &TokenSpec) -> Result<Tensor<3>> {
    let Codes::Continuous(vectors) = codes else {
        return Err(Error::invalid("generator batch", format!("codes where the tokens are {}", tokens.kind)));
    };
    let found = vectors.dims();
    let expected = [conditions.len(), tokens.length(), tokens.channels().unwrap_or_default()];
    match found == expected && found[0] > 0 {
        true => Ok(vectors),
        false => {
            let problem = format!("vectors {found:?} and {} conditions; expected {expected:?}", conditions.len());
            Err(Error::invalid("generator batch", problem))
        }
    }
}
