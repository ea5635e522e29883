//! Generators: condition to [`Codes`], one decoding step at a time.

pub mod causal_mar;
pub mod condition;
pub mod denoiser;
pub mod diffusion;
pub mod gpt;
pub mod mar;
pub mod maskgit;
pub mod order;
pub mod request;
pub mod var;
mod vectors;

pub use causal_mar::{CausalMar, CausalMarConfig};
pub use condition::ConditionConfig;
pub use gpt::{Gpt, GptConfig};
pub use mar::{Mar, MarConfig};
pub use maskgit::{MaskGit, MaskGitConfig};
pub use order::TokenOrder;
pub use request::{ImageRequest, Known, Request};
pub use var::{Var, VarConfig};
pub use vectors::{ConditionVectors, StackConfig};

use crate::Codes;
use crate::quantizers::QuantizerModel;
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Layout, Result, TokenSpec, rng::Stream};
use smalti_nn::dense::{Dense, Pack};

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
    /// A code for each place of the image's grid, row by row.
    Codes(Vec<u32>),
}

/// Predicts the codes of its spec. It never knows which tokenizer is beside it.
pub trait Generator: Send + Sync {
    /// The tokens that this generator predicts.
    fn spec(&self) -> &TokenSpec;

    /// Begins a generation, which the caller pulls step by step. It runs without gradients and without dropout.
    ///
    /// # Errors
    /// No images, a condition of another kind, a class or token out of range, known tokens of another length, sampling
    /// settings out of range, or guidance of a generator that was trained without condition dropout.
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

/// Which generator, with everything that changes the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum GeneratorConfig {
    /// Raster-order transformer.
    Gpt(GptConfig),
    /// Masked parallel decoding.
    #[serde(rename = "maskgit")]
    MaskGit(MaskGitConfig),
    /// Masked prediction of vectors with a diffusion loss.
    Mar(MarConfig),
    /// The same, one token after the other.
    CausalMar(CausalMarConfig),
    /// A token map at each step, coarse to fine.
    Var(VarConfig),
}

impl GeneratorConfig {
    /// A model with fresh parameters.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the setting that is out of range; [`Error::Unsupported`] for a layout that the generator
    /// cannot predict.
    pub fn init(&self, device: &Device) -> Result<GeneratorModel> {
        match self {
            Self::Gpt(config) => Ok(GeneratorModel::Gpt(config.init(device)?)),
            Self::MaskGit(config) => Ok(GeneratorModel::MaskGit(config.init(device)?)),
            Self::Mar(config) => Ok(GeneratorModel::Mar(config.init(device)?)),
            Self::CausalMar(config) => Ok(GeneratorModel::CausalMar(config.init(device)?)),
            Self::Var(config) => Ok(GeneratorModel::Var(config.init(device)?)),
        }
    }

    /// The tokens that the generator predicts.
    pub fn tokens(&self) -> &TokenSpec {
        match self {
            Self::Gpt(config) => &config.tokens,
            Self::MaskGit(config) => &config.tokens,
            Self::Mar(config) => &config.tokens,
            Self::CausalMar(config) => &config.tokens,
            Self::Var(config) => &config.tokens,
        }
    }

    /// What the generator can be conditioned on.
    pub fn condition(&self) -> &ConditionConfig {
        match self {
            Self::Gpt(config) => &config.condition,
            Self::MaskGit(config) => &config.condition,
            Self::Mar(config) => &config.condition,
            Self::CausalMar(config) => &config.condition,
            Self::Var(config) => &config.condition,
        }
    }
}

/// A generator of any kind.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)]
pub enum GeneratorModel {
    /// Raster-order transformer.
    Gpt(Gpt),
    /// Masked parallel decoding.
    MaskGit(MaskGit),
    /// Masked prediction of vectors with a diffusion loss.
    Mar(Mar),
    /// The same, one token after the other.
    CausalMar(CausalMar),
    /// A token map at each step, coarse to fine.
    Var(Var),
}

impl GeneratorModel {
    /// Takes over what a generator needs of its tokenizer's quantizer: [`Var`] computes with its code vectors, the others
    /// with tokens only.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the codes of a fitting quantizer mean something else.
    pub fn adopt(self, quantizer: Option<&QuantizerModel>) -> Result<Self> {
        match (self, quantizer) {
            (Self::Var(model), Some(QuantizerModel::MultiScale(quantizer))) => Ok(Self::Var(model.adopt(quantizer)?)),
            (Self::Var(_), _) => Err(Error::unsupported(
                "var over the tokens of another quantizer than multi_scale",
                "train a tokenizer with `kind = \"multi_scale\"`",
            )),
            (model, _) => Ok(model),
        }
    }

    /// The training loss of a batch. Dropped conditions and masks are drawn from `stream`, on the host; dropout inside the
    /// network uses the device's generator, and acts only on an autodiff device.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the codes are not the spec's, or there is not one fitting condition for each image.
    pub fn loss(&self, codes: Codes, conditions: &[Condition], stream: &mut Stream) -> Result<GeneratorLoss> {
        match self {
            Self::Gpt(model) => model.loss(codes, conditions, stream),
            Self::MaskGit(model) => model.loss(codes, conditions, stream),
            Self::Mar(model) => model.loss(codes, conditions, stream),
            Self::CausalMar(model) => model.loss(codes, conditions, stream),
            Self::Var(model) => model.loss(codes, conditions, stream),
        }
    }

    /// The deterministic loss of validation images: no condition is dropped, no label is smoothed. `first_image` is the
    /// batch's place in the data set, so that the result does not depend on the batch size. Call it on `model.valid()`.
    ///
    /// For [`Gpt`] and [`Var`] it is the exact negative log-likelihood. For [`MaskGit`] it is the cross-entropy of the masked
    /// tokens, image `i` masked at progress `frac(i / golden ratio)` of the schedule in places drawn from seed 0 and `i`. For
    /// [`Mar`] and [`CausalMar`] it is the diffusion loss with noise drawn from seed 0 and `i`.
    ///
    /// # Errors
    /// As [`Self::loss`].
    pub fn validation_loss(&self, codes: Codes, conditions: &[Condition], first_image: u64) -> Result<GeneratorLoss> {
        match self {
            Self::Gpt(_) | Self::MaskGit(_) | Self::Var(_) => {
                Ok(self.predictions(codes, conditions, first_image)?.loss())
            }
            Self::Mar(model) => model.validation_loss(codes, conditions, first_image),
            Self::CausalMar(model) => model.validation_loss(codes, conditions, first_image),
        }
    }

    /// What the deterministic loss is made from; see [`Self::validation_loss`].
    ///
    /// # Errors
    /// As [`Self::loss`], and [`Error::Unsupported`] by a generator that gives no probabilities.
    pub fn predictions(&self, codes: Codes, conditions: &[Condition], first_image: u64) -> Result<Predictions> {
        match self {
            Self::Gpt(model) => model.predictions(codes, conditions),
            Self::MaskGit(model) => model.predictions(codes, conditions, first_image),
            Self::Mar(_) | Self::CausalMar(_) => {
                Err(Error::unsupported("probabilities of tokens that are vectors", "compare validation losses instead"))
            }
            Self::Var(model) => model.predictions(codes, conditions),
        }
    }

    /// The configuration that the model was made with.
    pub fn config(&self) -> GeneratorConfig {
        match self {
            Self::Gpt(model) => GeneratorConfig::Gpt(model.config.clone()),
            Self::MaskGit(model) => GeneratorConfig::MaskGit(model.config.clone()),
            Self::Mar(model) => GeneratorConfig::Mar(model.config.clone()),
            Self::CausalMar(model) => GeneratorConfig::CausalMar(model.config.clone()),
            Self::Var(model) => GeneratorConfig::Var(model.config.clone()),
        }
    }
}

impl Pack for GeneratorModel {
    fn dense_layers(&mut self) -> Vec<&mut Dense> {
        match self {
            Self::Gpt(model) => model.dense_layers(),
            Self::MaskGit(model) => model.dense_layers(),
            Self::Mar(model) => model.dense_layers(),
            Self::CausalMar(model) => model.dense_layers(),
            Self::Var(model) => model.dense_layers(),
        }
    }
}

impl Generator for GeneratorModel {
    fn spec(&self) -> &TokenSpec {
        match self {
            Self::Gpt(model) => model.spec(),
            Self::MaskGit(model) => model.spec(),
            Self::Mar(model) => model.spec(),
            Self::CausalMar(model) => model.spec(),
            Self::Var(model) => model.spec(),
        }
    }

    fn start(&self, request: &Request) -> Result<Box<dyn Generation + '_>> {
        if request.sampling.smooth && !matches!(self, Self::Var(_)) {
            return Err(Error::unsupported("smooth sampling with this generator", "only var can mix codes"));
        }
        if request.grid.is_some() && !matches!(self, Self::Gpt(_)) {
            return Err(Error::unsupported(
                "pictures of another size by this generator",
                "only gpt can slide a window",
            ));
        }
        match self {
            Self::Gpt(model) => Generator::start(model, request),
            Self::MaskGit(model) => Generator::start(model, request),
            Self::Mar(model) => Generator::start(model, request),
            Self::CausalMar(model) => Generator::start(model, request),
            Self::Var(model) => Generator::start(model, request),
        }
    }
}

/// The numbers that every transformer generator has.
struct Size<'a> {
    place: &'a str,
    tokens: &'a TokenSpec,
    /// Whether tokens come in levels; otherwise they are one grid or one sequence.
    pyramid: bool,
    condition: &'a ConditionConfig,
    condition_dropout: f32,
    width: usize,
    depth: usize,
    heads: usize,
    mlp_ratio: usize,
    dropout: [f64; 2],
}

impl Size<'_> {
    fn validate(&self) -> Result<()> {
        let refuse = |problem: String| Err(Error::invalid(self.place, problem));
        let (fits, expected) = match self.pyramid {
            true => (matches!(self.tokens.layout, Layout::Pyramid { .. }), "a pyramid"),
            false => {
                let flat = matches!(self.tokens.layout, Layout::Grid { .. } | Layout::Sequence { .. });
                (flat, "one grid or one sequence")
            }
        };
        if !fits {
            let hint = format!("its tokens must be {expected}");
            return Err(Error::unsupported(format!("a {} by {}", self.tokens.layout, self.place), hint));
        }
        let Some(vocabulary) = self.tokens.vocabulary() else {
            return Err(Error::unsupported(
                format!("{} by {}", self.tokens.kind, self.place),
                "its tokens must be codes: use `mar` for vectors",
            ));
        };
        if self.tokens.length() == 0 || vocabulary == 0 {
            return refuse(format!("no tokens to predict in {}", self.tokens));
        }
        if [self.width, self.depth, self.heads, self.mlp_ratio].contains(&0) {
            return refuse("width, depth, heads and mlp_ratio must be at least 1".into());
        }
        if !self.width.is_multiple_of(self.heads) {
            return refuse(format!("width = {} is not a multiple of heads = {}", self.width, self.heads));
        }
        if !(0.0..=1.0).contains(&self.condition_dropout) {
            return refuse(format!("condition_dropout = {} is not in 0..=1", self.condition_dropout));
        }
        if let Some(dropout) = self.dropout.iter().find(|dropout| !(0.0..1.0).contains(*dropout)) {
            return refuse(format!("a dropout of {dropout} is not in 0 <= dropout < 1"));
        }
        self.condition.validate(self.place)
    }
}

/// The codes of a batch.
///
/// # Errors
/// [`Error::Invalid`] unless there is one condition and one full row of codes for each image.
fn codes_of(codes: Codes, conditions: &[Condition], tokens: &TokenSpec) -> Result<Tensor<2, Int>> {
    let Codes::Discrete(codes) = codes else {
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
