//! GPT: a decoder-only transformer that predicts an image's tokens in raster order, each from those before it.
//!
//! As in VQGAN's second stage (arXiv 2012.09841, the minGPT network) with its own table for the condition, as in LlamaGen
//! (arXiv 2406.06525): the condition's tokens come first, and the last of them predicts the first image token.

use super::{
    Condition, ConditionConfig, Generation, Generator, GeneratorLoss, Predictions, Request, Size, codes_of,
    request::upload,
};
use crate::Codes;
use crate::sampling::{Draws, Sampling, Seeded, filter, guide, to_host};
use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Device, Int, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Result, TokenSpec, rng::Stream};
use smalti_nn::attention::Visible;
use smalti_nn::cache::KeyValueCache;
use smalti_nn::dense::{Dense, Pack, TokenEmbedding, TokenNorm};
use smalti_nn::init::Init;
use smalti_nn::positions::LearnedPositions;
use smalti_nn::transformer::{Activation, Block, BlockConfig, NormPlacement};

/// Everything that changes the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GptConfig {
    /// The tokens it predicts: a grid or a sequence.
    pub tokens: TokenSpec,
    /// What it is conditioned on.
    #[serde(default)]
    pub condition: ConditionConfig,
    /// How often training hides the condition, 0..=1. Guidance needs it above 0.
    #[serde(default, serialize_with = "smalti_base::config::decimal")]
    pub condition_dropout: f32,
    /// Channels of a token.
    pub width: usize,
    /// Transformer blocks.
    pub depth: usize,
    /// Attention heads; must divide the width.
    pub heads: usize,
    /// Channels inside a block's MLP, in widths.
    #[serde(default = "four")]
    pub mlp_ratio: usize,
    /// Dropout of embeddings and of each branch, 0 <= dropout < 1.
    #[serde(default)]
    pub dropout: f64,
    /// Dropout of attention weights, 0 <= dropout < 1.
    #[serde(default)]
    pub attention_dropout: f64,
    /// Whether the condition's tokens see each other in both directions.
    #[serde(default)]
    pub visible_prefix: bool,
}

fn four() -> usize {
    4
}

impl GptConfig {
    /// A model with minGPT's first values: normal with deviation 0.02, biases and positions 0.
    ///
    /// # Errors
    /// [`smalti_base::Error::Invalid`] or [`smalti_base::Error::Unsupported`] for settings out of range.
    pub fn init(&self, device: &Device) -> Result<Gpt> {
        Size {
            place: "gpt",
            tokens: &self.tokens,
            pyramid: false,
            condition: &self.condition,
            condition_dropout: self.condition_dropout,
            width: self.width,
            depth: self.depth,
            heads: self.heads,
            mlp_ratio: self.mlp_ratio,
            dropout: [self.dropout, self.attention_dropout],
        }
        .validate()?;
        let init = Init::Normal(0.02);
        let block = BlockConfig {
            width: self.width,
            heads: self.heads,
            hidden: self.mlp_ratio * self.width,
            norm: NormPlacement::Before,
            epsilon: 1e-5,
            activation: Activation::Gelu,
            dropout: self.dropout,
            attention_dropout: self.attention_dropout,
            init,
        };
        Ok(Gpt {
            condition: TokenEmbedding::new(self.condition.null() + 1, self.width, init, device),
            tokens: TokenEmbedding::new(self.codes(), self.width, init, device),
            positions: LearnedPositions::new(self.places(), self.width, Init::Zeros, device),
            dropout: DropoutConfig::new(self.dropout).init(),
            blocks: (0..self.depth).map(|_| block.init(device)).collect(),
            norm: TokenNorm::new(self.width, 1e-5, device),
            head: Dense::without_bias(self.width, self.codes(), init, device),
            config: self.clone(),
        })
    }

    /// Number of codes; 0 for tokens that are refused.
    fn codes(&self) -> usize {
        self.tokens.vocabulary().unwrap_or_default()
    }

    /// Length of the longest input: the last image token is never fed.
    fn places(&self) -> usize {
        self.condition.length() + self.tokens.length() - 1
    }
}

/// The network.
#[derive(Module, Debug)]
pub struct Gpt {
    /// Vectors of the condition's ids; the last one is the null id's.
    pub condition: TokenEmbedding,
    /// Vectors of the image tokens.
    pub tokens: TokenEmbedding,
    /// Places of the condition, then of the image tokens.
    pub positions: LearnedPositions,
    /// Of the embedded input, in training.
    pub dropout: Dropout,
    /// Pre-norm blocks.
    pub blocks: Vec<Block>,
    /// Before the head.
    pub norm: TokenNorm,
    /// To the logits, `[width, vocabulary]`.
    pub head: Dense,
    /// What the network was made from.
    #[module(skip)]
    pub config: GptConfig,
}

impl Gpt {
    /// Logits of every image token, each given the condition and the true tokens before it.
    ///
    /// # Shapes
    /// `condition_ids [b, condition length]`, `codes [b, length]` to `[b, length, vocabulary]`.
    pub fn logits(&self, condition_ids: Tensor<2, Int>, codes: Tensor<2, Int>) -> Tensor<3> {
        let [_, length] = codes.dims();
        let prefix = condition_ids.dims()[1];
        let mut x = self.condition.forward(condition_ids);
        if length > 1 {
            x = Tensor::cat(vec![x, self.tokens.forward(codes.narrow(1, 0, length - 1))], 1);
        }
        let visible = match self.config.visible_prefix {
            true => Visible::past_and_prefix(x.dims()[1], prefix, &x.device()),
            false => Visible::Past,
        };
        x = self.dropout.forward(self.positions.forward(x, 0));
        for block in &self.blocks {
            x = block.forward(x, &visible);
        }
        self.head.forward(self.norm.forward(x.narrow(1, prefix - 1, length)))
    }

    /// See [`super::GeneratorModel::loss`]: the mean cross-entropy of all image tokens.
    ///
    /// # Errors
    /// [`smalti_base::Error::Invalid`] if shapes or conditions do not fit.
    pub fn loss(&self, codes: Codes, conditions: &[Condition], stream: &mut Stream) -> Result<GeneratorLoss> {
        let dropout = (self.config.condition_dropout, stream);
        Ok(self.predict(codes, conditions, Some(dropout))?.loss())
    }

    /// See [`super::GeneratorModel::predictions`].
    ///
    /// # Errors
    /// As [`Self::loss`].
    pub fn predictions(&self, codes: Codes, conditions: &[Condition]) -> Result<Predictions> {
        self.predict(codes, conditions, None)
    }

    fn predict(
        &self,
        codes: Codes,
        conditions: &[Condition],
        dropout: Option<(f32, &mut Stream)>,
    ) -> Result<Predictions> {
        let codes = codes_of(codes, conditions, &self.config.tokens)?;
        let condition_ids = self.config.condition.batch(conditions, dropout, &codes.device())?;
        let logits = self.logits(condition_ids, codes.clone()).flatten(0, 1);
        Ok(Predictions { logits, targets: codes.flatten(0, 1), weights: None })
    }

    /// [`Generator::start`] with random draws from elsewhere.
    ///
    /// # Errors
    /// As [`Generator::start`].
    pub fn start_with(&self, request: &Request, draws: Box<dyn Draws>) -> Result<GptGeneration> {
        let GptConfig { tokens, condition, condition_dropout, .. } = &self.config;
        let known = request.check(tokens, condition, *condition_dropout)?;
        // A packed model is for inference already, and would be unpacked by `valid`.
        let model = if self.head.packed().is_some() { self.clone() } else { self.valid() };
        let device = model.norm.gamma.val().device();
        let prefix = if self.config.visible_prefix { condition.length() } else { 0 };
        Ok(GptGeneration {
            condition_rows: request.condition_rows(condition, &device)?,
            caches: (0..self.config.depth).map(|_| KeyValueCache::new(self.config.places(), prefix)).collect(),
            codes: vec![vec![0; tokens.length()]; known.len()],
            sampling: request.sampling.clone(),
            model,
            device,
            known,
            draws,
            fed: 0,
            done: 0,
        })
    }
}

impl Pack for Gpt {
    fn dense_layers(&mut self) -> Vec<&mut Dense> {
        self.blocks.iter_mut().flat_map(Pack::dense_layers).chain([&mut self.head]).collect()
    }
}

impl Generator for Gpt {
    fn spec(&self) -> &TokenSpec {
        &self.config.tokens
    }

    fn start(&self, request: &Request) -> Result<Box<dyn Generation + '_>> {
        let draws = Seeded::new(request.images.iter().map(|image| image.seed));
        Ok(Box::new(self.start_with(request, Box::new(draws))?))
    }
}

/// Decoding under way: one image token at each step. Tokens that are known for every image are fed together with the next
/// one that must be drawn.
pub struct GptGeneration {
    model: Gpt,
    device: Device,
    sampling: Sampling,
    condition_rows: Tensor<2, Int>,
    caches: Vec<KeyValueCache>,
    known: Vec<Vec<Option<u32>>>,
    codes: Vec<Vec<u32>>,
    draws: Box<dyn Draws>,
    /// Image tokens that the caches have seen.
    fed: usize,
    done: usize,
}

impl GptGeneration {
    /// Feeds what the caches have not seen; returns the logits of the next token, `[rows, 1, vocabulary]`.
    fn predict(&mut self) -> Tensor<3> {
        let first = self.caches.first().map_or(0, KeyValueCache::length);
        let mut parts = Vec::new();
        if first == 0 {
            parts.push(self.model.condition.forward(self.condition_rows.clone()));
        }
        if self.fed < self.done {
            let mut rows: Vec<Vec<u32>> = self.codes.iter().map(|codes| codes[self.fed..self.done].to_vec()).collect();
            if self.sampling.is_guided() {
                rows.extend_from_within(..);
            }
            parts.push(self.model.tokens.forward(upload(&rows, &self.device)));
            self.fed = self.done;
        }
        let mut x = self.model.positions.forward(Tensor::cat(parts, 1), first);
        for (block, cache) in self.model.blocks.iter().zip(&mut self.caches) {
            x = block.decode(x, cache);
        }
        let n = x.dims()[1];
        let logits = self.model.head.forward(self.model.norm.forward(x.narrow(1, n - 1, 1)));
        match self.sampling.is_guided() {
            true => guide(logits, self.sampling.guidance_at(self.done, self.steps())),
            false => logits,
        }
    }

    fn sample(&mut self) {
        let device = self.device.clone();
        let logits = smalti_kernels::on_pool(&device, || self.predict());
        let mut logits = to_host(logits);
        let rows = logits.chunks_exact_mut(self.model.config.codes());
        for (image, row) in rows.enumerate() {
            self.codes[image][self.done] = match self.known[image][self.done] {
                Some(code) => code,
                None => {
                    filter(row, &self.sampling);
                    self.draws.token(image, self.done, 0, row) as u32
                }
            };
        }
    }
}

impl Generation for GptGeneration {
    fn steps(&self) -> usize {
        self.model.config.tokens.length()
    }

    fn done(&self) -> usize {
        self.done
    }

    fn next(&mut self) {
        if self.done == self.steps() {
            return;
        }
        if self.known.iter().all(|known| known[self.done].is_some()) {
            for (codes, known) in self.codes.iter_mut().zip(&self.known) {
                codes[self.done] = known[self.done].unwrap_or_default();
            }
        } else {
            self.sample();
        }
        self.done += 1;
    }

    fn codes(&self) -> Codes {
        Codes::Discrete(upload(&self.codes, &self.device))
    }
}
