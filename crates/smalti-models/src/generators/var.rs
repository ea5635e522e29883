//! VAR: a transformer that predicts a whole token map at each step, from coarse to fine ("Visual Autoregressive Modeling",
//! arXiv 2404.02905).
//!
//! Tokens never enter through a table of their own: what the network sees of a map is what all coarser maps together say of the
//! latents, at that map's size. So the model carries a frozen copy of the quantizer of the tokenizer that it was trained with.
//! The condition scales and shifts every layer (adaptive layer norm, arXiv 2212.09748).

use super::blueprint::{Blueprint, Predicts, StackConfig, Takes};
use super::upload::upload;
use super::{
    Abilities, Condition, Conditions, Draw, Generation, Generator, GeneratorLoss, GeneratorSettings, Predictions,
    Request, codes_of,
};
use crate::quantizers::multi_scale::{Refinement, tokens};
use crate::quantizers::{MultiScale, MultiScaleConfig, Quantizer, QuantizerModel, VqConfig};
use crate::role::Described;
use crate::sampling::{Draws, Sampling, Seeded, decide_rows, filter, guide, softmax};
use crate::systems::Facts;
use crate::tokenizers::Tokenizer;
use crate::{Codes, host};
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Layout, Result, TokenSpec, rng::Stream};
use smalti_kernels::{chunks, gated_residual, modulated_layer_norm, silu};
use smalti_nn::attention::{SelfAttention, Visible};
use smalti_nn::cache::GroupCache;
use smalti_nn::dense::{Dense, TokenEmbedding};
use smalti_nn::init::Init;
use smalti_nn::positions::LearnedPositions;
use smalti_nn::transformer::{Activation, Mlp};

/// Everything that changes the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VarConfig {
    /// The tokens it predicts: a pyramid.
    pub tokens: TokenSpec,
    /// Channels of the tokenizer's latents.
    pub channels: usize,
    /// What the tokenizer's quantizer does to enlarged token maps.
    #[serde(default)]
    pub refinement: Refinement,
    /// What it is conditioned on: nothing or a class.
    #[serde(default)]
    pub condition: Conditions,
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
    /// Channels inside a block's MLP where they are no multiple of the width; then `mlp_ratio` counts for nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden: Option<usize>,
    /// Whether queries and keys are scaled to unit length.
    #[serde(default = "yes")]
    pub unit_attention: bool,
    /// Whether one layer makes the scales and shifts of all blocks.
    #[serde(default)]
    pub shared_modulation: bool,
    /// Chance that training leaves the last block's branches out of an image, 0 <= chance < 1; earlier blocks have less, the
    /// first none (stochastic depth, arXiv 1603.09382).
    #[serde(default)]
    pub drop_path: f64,
    /// Share of the target that training spreads over all codes, 0 <= smoothing < 1.
    #[serde(default, serialize_with = "smalti_base::config::decimal")]
    pub label_smoothing: f32,
    /// Added to variances.
    #[serde(default = "epsilon")]
    pub norm_epsilon: f64,
    /// Factor of the first weights of the gains, by which branches count at the beginning.
    #[serde(default = "gain")]
    pub first_gain: f64,
}

fn four() -> usize {
    4
}

fn yes() -> bool {
    true
}

fn epsilon() -> f64 {
    1e-6
}

fn gain() -> f64 {
    1e-5
}

const PLACE: &str = "var";

/// Gains of both branches, scales of both norms, their shifts: the order of the official code.
const PARTS: usize = 6;

impl Described for VarConfig {
    const FACTS: Facts = Facts {
        arxiv: "2404.02905",
        tokens: "pyramid",
        about: "transformer that predicts a whole token map at each step, coarse to fine (VAR)",
    };
}

impl VarConfig {
    /// A model with the official first values. Its quantizer waits for the tokenizer's weights; see [`Var::adopt`].
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Unsupported`] for settings out of range.
    pub fn init(&self, device: &Device) -> Result<Var> {
        self.validate()?;
        let d = self.width;
        let std = (1.0 / (3 * d) as f64).sqrt();
        let init = Init::Normal(std);
        let dense = |outputs, factor: f64| Dense::new(d, outputs, Init::Normal(std * factor), device);
        let levels = self.levels()?;
        let (first, length) = (levels[0].0 * levels[0].1, self.tokens.length());
        let quantizer = self.quantizer()?.init(&device.clone().without_autodiff())?;
        Ok(Var {
            classes: TokenEmbedding::new(self.condition.rows(), d, init, device),
            start: LearnedPositions::new(first, d, init, device),
            positions: LearnedPositions::new(length, d, init, device),
            levels: TokenEmbedding::new(levels.len(), d, init, device),
            words: Dense::new(self.channels, d, init, device),
            shared: self.shared_modulation.then(|| dense(PARTS * d, 1.0)),
            blocks: (0..self.depth).map(|i| self.block(i, device)).collect(),
            head_modulation: dense(2 * d, 0.5),
            head: dense(self.codes(), 0.02),
            quantize: quantizer.no_grad(),
            config: self.clone(),
        })
    }

    fn block(&self, index: usize, device: &Device) -> VarBlock {
        let (d, hidden) = (self.width, self.hidden.unwrap_or(self.mlp_ratio * self.width));
        let std = (1.0 / (3 * d) as f64).sqrt();
        let last = Init::Normal(std / ((2 * self.depth) as f64).sqrt());
        let (gains, others) = (self.first_gain, 0.5);
        let columns = |std: f64| [(2 * d, Init::Normal(std * gains)), (4 * d, Init::Normal(std * others))];
        let modulation = match self.shared_modulation {
            true => Modulation::Shared(Init::columns(1, &columns((d as f64).powf(-0.5)), device)),
            false => Modulation::Own(Dense {
                weight: Init::columns(d, &columns(std), device),
                ..Dense::new(d, PARTS * d, Init::Zeros, device)
            }),
        };
        let log_scale = || Param::from_tensor(Tensor::full([self.heads], 4f64.ln(), device));
        let drop_path = self.drop_path * index as f64 / self.depth.saturating_sub(1).max(1) as f64;
        VarBlock {
            modulation,
            attention: SelfAttention {
                key: Dense::without_bias(d, d, Init::Normal(std), device),
                output: Dense::new(d, d, last, device),
                // The official code divides by four times the root of the head's width.
                factor: if self.unit_attention { 1.0 } else { 0.25 },
                log_scale: self.unit_attention.then(log_scale),
                ..SelfAttention::new(d, self.heads, 0.0, Init::Normal(std), device)
            },
            mlp: Mlp {
                expand: Dense::new(d, hidden, Init::Normal(std), device),
                contract: Dense::new(hidden, d, last, device),
                activation: Activation::GeluTanh,
                dropout: DropoutConfig::new(0.0).init(),
            },
            drop_path: DropoutConfig::new(drop_path).init(),
            epsilon: self.norm_epsilon,
        }
    }

    fn validate(&self) -> Result<()> {
        let refuse = |problem: String| Err(Error::invalid(PLACE, problem));
        if !(0.0..1.0).contains(&self.label_smoothing) {
            return refuse(format!("label_smoothing = {} is not in 0 <= smoothing < 1", self.label_smoothing));
        }
        if !(self.norm_epsilon > 0.0 && self.norm_epsilon < 1.0 && self.first_gain.is_finite()) {
            return refuse(format!("norm_epsilon = {} or first_gain = {}", self.norm_epsilon, self.first_gain));
        }
        if self.hidden == Some(0) {
            return refuse("hidden must be at least 1".into());
        }
        Blueprint {
            place: PLACE,
            predicts: Predicts::Pyramid,
            tokens: &self.tokens,
            takes: Takes::Class,
            condition: &self.condition,
            condition_dropout: self.condition_dropout,
            stacks: &[StackConfig::new(self.width, self.depth, self.heads)],
            mlp_ratio: self.mlp_ratio,
            dropout: [self.drop_path, 0.0],
        }
        .validate()
    }

    /// Number of codes; 0 for tokens that are refused.
    fn codes(&self) -> usize {
        self.tokens.vocabulary().unwrap_or_default()
    }

    fn levels(&self) -> Result<&[(usize, usize)]> {
        match &self.tokens.layout {
            Layout::Pyramid { levels } if !levels.is_empty() => Ok(levels),
            other => Err(Error::invalid(PLACE, format!("its tokens are a {other}, expected a pyramid"))),
        }
    }

    /// The settings of the tokenizer's quantizer that matter here.
    fn quantizer(&self) -> Result<MultiScaleConfig> {
        Ok(MultiScaleConfig {
            levels: self.levels()?.to_vec(),
            table: VqConfig::new(self.codes(), self.channels),
            refinement: self.refinement,
        })
    }
}

impl GeneratorSettings for VarConfig {
    fn tokens(&self) -> &TokenSpec {
        &self.tokens
    }

    fn conditions(&self) -> &Conditions {
        &self.condition
    }

    fn condition_dropout(&self) -> f32 {
        self.condition_dropout
    }

    fn abilities(&self) -> Abilities {
        Abilities { mixes_codes: true, reads_code_vectors: true, ..Abilities::default() }
    }

    fn official(&self) -> Option<&'static str> {
        Some("var")
    }
}

/// The network.
#[derive(Module, Debug)]
pub struct Var {
    /// Vectors of the classes; the last one stands for none.
    pub classes: TokenEmbedding,
    /// Added to the class's vector in the places of the first level.
    pub start: LearnedPositions,
    /// Vectors of all places.
    pub positions: LearnedPositions,
    /// Vectors of the levels.
    pub levels: TokenEmbedding,
    /// Latents to tokens, `[channels, width]`.
    pub words: Dense,
    /// The condition's vector to the parts of all blocks, `[width, 6 width]`, if they share one layer.
    pub shared: Option<Dense>,
    /// Transformer blocks.
    pub blocks: Vec<VarBlock>,
    /// The condition's vector to the scale and the shift of the last norm, `[width, 2 width]`.
    pub head_modulation: Dense,
    /// To the logits, `[width, vocabulary]`.
    pub head: Dense,
    /// A frozen copy of the tokenizer's quantizer.
    pub quantize: MultiScale,
    /// What the network was made from.
    #[module(skip)]
    pub config: VarConfig,
}

/// Self-attention and an MLP, each behind a norm without parameters of its own.
#[derive(Module, Debug)]
pub struct VarBlock {
    /// What makes the gains, scales and shifts.
    pub modulation: Modulation,
    /// Mixes tokens.
    pub attention: SelfAttention,
    /// Works on each token.
    pub mlp: Mlp,
    /// Leaves branches out of whole images, in training.
    pub drop_path: Dropout,
    epsilon: f64,
}

/// What makes a block's gains, scales and shifts.
#[derive(Module, Debug)]
pub enum Modulation {
    /// A layer of its own for the condition's vector, `[width, 6 width]`.
    Own(Dense),
    /// What is added to those that all blocks share, `[1, 6 width]`.
    Shared(Param<Tensor<2>>),
}

/// What a condition does to all layers. It is the same for all tokens, so it is computed once.
#[derive(Clone, Debug)]
pub struct Modulations {
    /// The condition's vector, `[b, 1, d]`.
    pub vector: Tensor<3>,
    /// For each block two gains, two scales and two shifts, `[b, 1, d]` each.
    pub blocks: Vec<[Tensor<3>; PARTS]>,
    /// Scale and shift of the last norm, `[b, 1, d]` each.
    pub head: [Tensor<3>; 2],
}

impl VarBlock {
    /// Mixes the tokens, then changes each by itself.
    ///
    /// # Shapes
    /// `[b, n, d]` to the same.
    pub fn forward(&self, x_bnd: Tensor<3>, parts: &[Tensor<3>; PARTS], visible: &Visible) -> Tensor<3> {
        self.around(x_bnd, parts, |x_bnd| self.attention.forward(x_bnd, visible))
    }

    /// The same for the tokens of a level that comes after those of a cache.
    ///
    /// # Shapes
    /// `[b, n, d]` to the same.
    pub fn decode(&self, x_bnd: Tensor<3>, parts: &[Tensor<3>; PARTS], cache: &mut GroupCache) -> Tensor<3> {
        self.around(x_bnd, parts, |x_bnd| self.attention.decode(x_bnd, cache))
    }

    fn around(
        &self,
        x_bnd: Tensor<3>,
        parts: &[Tensor<3>; PARTS],
        mix: impl FnOnce(Tensor<3>) -> Tensor<3>,
    ) -> Tensor<3> {
        let [gain_1, gain_2, scale_1, scale_2, shift_1, shift_2] = parts.clone();
        let mixed = mix(modulated_layer_norm(x_bnd.clone(), scale_1, shift_1, self.epsilon));
        let x = gated_residual(x_bnd, mixed, self.kept(gain_1));
        let changed = self.mlp.forward(modulated_layer_norm(x.clone(), scale_2, shift_2, self.epsilon));
        gated_residual(x, changed, self.kept(gain_2))
    }

    /// The gain of a branch, 0 for images that leave it out.
    fn kept(&self, gain_b1d: Tensor<3>) -> Tensor<3> {
        if self.drop_path.prob == 0.0 {
            return gain_b1d;
        }
        let [b, ..] = gain_b1d.dims();
        let kept_b11 = self.drop_path.forward(Tensor::ones([b, 1, 1], &gain_b1d.device()));
        gain_b1d * kept_b11
    }

    fn parts(&self, active_b1d: Tensor<3>, shared: Option<&Tensor<3>>) -> [Tensor<3>; PARTS] {
        chunks(match (&self.modulation, shared) {
            (Modulation::Own(layer), _) => layer.forward(active_b1d),
            (Modulation::Shared(offsets), Some(shared)) => shared.clone() + offsets.val().unsqueeze(),
            (Modulation::Shared(offsets), None) => offsets.val().unsqueeze(),
        })
    }
}

impl Var {
    /// Takes over the code vectors and convolutions of the tokenizer's quantizer.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if its codes mean something else.
    pub fn adopt_quantizer(&mut self, quantizer: &MultiScale) -> Result<()> {
        self.quantize = self.quantize.clone().with_weights_of(quantizer)?.no_grad();
        Ok(())
    }

    /// What conditions do to the layers.
    ///
    /// # Shapes
    /// `condition_ids [b, 1]`.
    pub fn modulations(&self, condition_ids: Tensor<2, Int>) -> Modulations {
        let vector = self.classes.forward(condition_ids);
        let active = silu(vector.clone());
        let shared = self.shared.as_ref().map(|shared| shared.forward(active.clone()));
        Modulations {
            blocks: self.blocks.iter().map(|block| block.parts(active.clone(), shared.as_ref())).collect(),
            head: chunks(self.head_modulation.forward(active)),
            vector,
        }
    }

    /// Vectors of all places, with those of their levels, `[1, length, d]`.
    pub fn places(&self) -> Tensor<3> {
        let ids = TensorData::new(self.level_ids(), [1, self.config.tokens.length()]);
        let ids = Tensor::from_data(ids, &self.quantize.vectors().device());
        self.positions.forward(self.levels.forward(ids), 0)
    }

    /// The level of each place.
    pub fn level_ids(&self) -> Vec<i32> {
        (0..).zip(self.sizes()).flat_map(|(level, size)| vec![level; size]).collect()
    }

    /// What the first block sees in training.
    ///
    /// # Shapes
    /// `codes [b, length]` to `[b, length, d]`.
    pub fn inputs(&self, modulations: &Modulations, codes: Tensor<2, Int>) -> Tensor<3> {
        let mut x = vec![self.first_tokens(modulations)];
        x.extend(self.quantize.known_before(codes.inner()).map(|known| self.words.forward(known)));
        Tensor::cat(x, 1) + self.places()
    }

    /// The first level's tokens without their places, `[b, n_0, d]`.
    fn first_tokens(&self, modulations: &Modulations) -> Tensor<3> {
        let [b, _, d] = modulations.vector.dims();
        self.start.forward(modulations.vector.clone().expand([b, self.sizes()[0], d]), 0)
    }

    /// Which tokens see which in training: all of a level those of the same and of coarser levels.
    pub fn visible(&self, device: &Device) -> Visible {
        Visible::past_groups(&self.sizes(), device)
    }

    /// Logits of all codes for each token of the last block's output, `[b, n, d]` to `[b, n, vocabulary]`.
    pub fn predict(&self, x_bnd: Tensor<3>, modulations: &Modulations) -> Tensor<3> {
        self.head.forward(self.before_head(x_bnd, modulations))
    }

    fn before_head(&self, x_bnd: Tensor<3>, modulations: &Modulations) -> Tensor<3> {
        let [scale, shift] = modulations.head.clone();
        modulated_layer_norm(x_bnd, scale, shift, self.config.norm_epsilon)
    }

    /// Logits of every token, each given the condition and the true tokens of the coarser levels.
    ///
    /// # Shapes
    /// `condition_ids [b, 1]`, `codes [b, length]` to `[b, length, vocabulary]`.
    pub fn logits(&self, condition_ids: Tensor<2, Int>, codes: Tensor<2, Int>) -> Tensor<3> {
        let modulations = self.modulations(condition_ids);
        let mut x = self.inputs(&modulations, codes);
        let visible = self.visible(&self.quantize.vectors().device());
        for (block, parts) in self.blocks.iter().zip(&modulations.blocks) {
            x = block.forward(x, parts, &visible);
        }
        self.predict(x, &modulations)
    }

    fn conditioned(
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

    /// Tokens of each level.
    fn sizes(&self) -> Vec<usize> {
        self.quantize.config.levels.iter().map(|(h, w)| h * w).collect()
    }

    /// [`Generator::start`] with random draws from elsewhere.
    ///
    /// # Errors
    /// As [`Generator::start`].
    pub fn start_with(&self, request: &Request, draws: Box<dyn Draws>) -> Result<VarGeneration> {
        let known = request.check(&self.config)?;
        // A packed model is for inference already, and would be unpacked by `valid`.
        let model = if self.head.packed().is_some() { self.clone() } else { self.valid() };
        let device = model.quantize.vectors().device();
        let condition_rows = request.condition_rows(&self.config.condition, &device)?;
        let nothing = model.quantize.nearest_to_nothing()?;
        let row = |known: &Vec<Option<u32>>| known.iter().map(|code| code.unwrap_or(nothing)).collect();
        let sizes = model.sizes();
        let last = sizes.last().copied().unwrap_or_default();
        Ok(VarGeneration {
            modulations: model.modulations(condition_rows),
            places: model.places(),
            // Nothing comes after the last level.
            caches: model.blocks.iter().map(|_| GroupCache::new(self.config.tokens.length() - last)).collect(),
            codes: known.iter().map(row).collect(),
            sizes,
            sampling: request.sampling.clone(),
            sum: None,
            logits: None,
            model,
            device,
            known,
            draws,
            first: 0,
            done: 0,
        })
    }
}

impl Generator for Var {
    fn settings(&self) -> &dyn GeneratorSettings {
        &self.config
    }

    /// The mean cross-entropy of all tokens.
    fn loss(&self, codes: Codes, given: &[Condition], draw: &mut Draw<'_>) -> Result<GeneratorLoss> {
        let predictions = self.conditioned(codes, given, Some((self.config.condition_dropout, draw.stream)))?;
        Ok(predictions.smoothed_loss(self.config.label_smoothing))
    }

    fn predictions(&self, codes: Codes, given: &[Condition], _: u64) -> Result<Predictions> {
        self.conditioned(codes, given, None)
    }

    /// The code vectors and convolutions of the tokenizer's quantizer.
    fn adopt(&mut self, tokenizer: &dyn Tokenizer) -> Result<()> {
        let Some(QuantizerModel::MultiScale(quantizer)) = tokenizer.quantizer() else {
            return Err(Error::unsupported(
                "var over the tokens of another quantizer than multi_scale",
                "train a tokenizer with `kind = \"multi_scale\"`",
            ));
        };
        self.adopt_quantizer(quantizer)
    }

    fn dense_layers(&mut self) -> Vec<&mut Dense> {
        let blocks = self.blocks.iter_mut().flat_map(|block| {
            let SelfAttention { query, key, value, output, .. } = &mut block.attention;
            let layers = [query, key, value, output, &mut block.mlp.expand, &mut block.mlp.contract];
            let own = match &mut block.modulation {
                Modulation::Own(layer) => Some(layer),
                Modulation::Shared(_) => None,
            };
            layers.into_iter().chain(own)
        });
        blocks.chain(&mut self.shared).chain([&mut self.words, &mut self.head_modulation, &mut self.head]).collect()
    }

    fn start(&self, request: &Request) -> Result<Box<dyn Generation + '_>> {
        let draws = Seeded::new(request.images.iter().map(|image| image.seed));
        Ok(Box::new(self.start_with(request, Box::new(draws))?))
    }
}

/// Decoding under way: one level at each step.
pub struct VarGeneration {
    model: Var,
    device: Device,
    sampling: Sampling,
    modulations: Modulations,
    places: Tensor<3>,
    sizes: Vec<usize>,
    caches: Vec<GroupCache>,
    known: Vec<Vec<Option<u32>>>,
    /// Finer levels hold the code that adds least, so that the codes so far are a blurred picture.
    codes: Vec<Vec<u32>>,
    draws: Box<dyn Draws>,
    /// What the levels so far add up to, `[n, c, h, w]`.
    sum: Option<Tensor<4>>,
    /// Logits of the next level, if they were already asked for.
    logits: Option<Tensor<3>>,
    /// First place of the next level.
    first: usize,
    done: usize,
}

impl VarGeneration {
    /// What the levels so far say of the latents, `[n, c, h, w]`; none before the first step.
    pub fn latents(&self) -> Option<&Tensor<4>> {
        self.sum.as_ref()
    }

    /// Logits of the next level with guidance, `[n, n_k, vocabulary]`. Call it before the last step is done.
    pub fn logits(&mut self) -> Tensor<3> {
        let logits = self.logits.take().unwrap_or_else(|| self.predict());
        self.logits = Some(logits.clone());
        logits
    }

    fn predict(&mut self) -> Tensor<3> {
        let x = self.feed();
        let x = self.model.before_head(x, &self.modulations);
        self.model.head.forward(match self.sampling.is_guided() {
            true => guide(x, self.sampling.guidance_at(self.done, self.steps())),
            false => x,
        })
    }

    /// Feeds the next level to the blocks; returns the last one's output.
    fn feed(&mut self) -> Tensor<3> {
        let mut x = match &self.sum {
            None => self.model.first_tokens(&self.modulations),
            Some(sum) => {
                let x = self.model.words.forward(tokens(self.model.quantize.shrunk(sum.clone(), self.done)));
                // Conditional and unconditional rows have seen the same tokens.
                if self.sampling.is_guided() { Tensor::cat(vec![x.clone(), x], 0) } else { x }
            }
        };
        x = x + self.places.clone().narrow(1, self.first, self.sizes[self.done]);
        for ((block, parts), cache) in self.model.blocks.iter().zip(&self.modulations.blocks).zip(&mut self.caches) {
            x = block.decode(x, parts, cache);
        }
        x
    }

    /// Whether all tokens from a place on are known.
    fn all_known(&self, places: std::ops::Range<usize>) -> bool {
        self.known.iter().all(|known| known[places.clone()].iter().all(Option::is_some))
    }

    /// Decides the next level's tokens; returns its vectors as a map `[n, c, h_k, w_k]`.
    fn decide(&mut self) -> Result<Tensor<4>> {
        let (level, images) = (self.done, self.known.len());
        let places = self.first..self.first + self.sizes[level];
        if self.all_known(places.clone()) {
            // Only finer levels have a use for the network's output.
            if !self.all_known(places.end..self.model.config.tokens.length()) && self.logits.is_none() {
                self.feed();
            }
            for (codes, known) in self.codes.iter_mut().zip(&self.known) {
                places.clone().for_each(|place| codes[place] = known[place].unwrap_or_default());
            }
        } else {
            let logits = self.logits.take().unwrap_or_else(|| self.predict());
            let (mut logits, vocabulary) = (host::floats(logits)?, self.model.config.codes());
            let decided = decide_rows(&mut logits, vocabulary, |i, row| {
                self.decide_one(i / places.len(), places.start + i % places.len(), row)
            });
            for (codes, decided) in self.codes.iter_mut().zip(decided.chunks_exact(places.len())) {
                codes[places.clone()].copy_from_slice(decided);
            }
            if self.sampling.smooth {
                let weights = TensorData::new(logits, [images * places.len(), vocabulary]);
                let weights = Tensor::<2>::from_data(weights, &self.device);
                let rows = weights.matmul(self.model.quantize.vectors());
                return Ok(self.model.quantize.map_of_rows(rows, images, level));
            }
        }
        let rows: Vec<Vec<u32>> = self.codes.iter().map(|codes| codes[places.clone()].to_vec()).collect();
        Ok(self.model.quantize.map_of(upload(&rows, &self.device), level))
    }

    /// Decides one token. In smooth generation its logits become the weights of all codes.
    fn decide_one(&self, image: usize, place: usize, logits: &mut [f32]) -> u32 {
        let known = self.known[image][place];
        let code = match known {
            Some(code) => code,
            None => {
                filter(logits, &self.sampling);
                self.draws.token(image, self.done, place, logits) as u32
            }
        };
        if !self.sampling.smooth {
            return code;
        }
        if known.is_some() {
            logits.fill(f32::NEG_INFINITY);
            logits[code as usize] = 0.0;
        } else {
            let progress = self.done as f32 / (self.steps() - 1).max(1) as f32;
            let temperature = (0.27 * (1.0 - 0.95 * progress)).max(0.005);
            let noise = self.draws.noise(image, self.done, place, logits.len());
            logits.iter_mut().zip(noise).for_each(|(x, noise)| *x = (*x * (1.0 + progress) + noise) / temperature);
        }
        softmax(logits);
        code
    }
}

impl Generation for VarGeneration {
    fn steps(&self) -> usize {
        self.sizes.len()
    }

    fn done(&self) -> usize {
        self.done
    }

    fn step(&mut self) -> Result<()> {
        if self.done == self.steps() {
            return Ok(());
        }
        let device = self.device.clone();
        smalti_kernels::on_pool(&device, || {
            let map = self.decide()?;
            let added = self.model.quantize.contribution(map, self.done);
            self.sum = Some(self.sum.take().map_or(added.clone(), |sum| sum + added));
            Ok(())
        })?;
        self.logits = None;
        self.first += self.sizes[self.done];
        self.done += 1;
        Ok(())
    }

    /// Smooth generation mixes codes, so that only latents come out.
    fn codes(&self) -> Codes {
        match (&self.sum, self.sampling.smooth) {
            (Some(sum), true) => Codes::Continuous(tokens(sum.clone())),
            (None, true) => {
                let ((h, w), c) = (self.model.config.tokens.layout.finest(), self.model.quantize.channels());
                Codes::Continuous(Tensor::zeros([self.known.len(), h * w, c], &self.device))
            }
            (_, false) => Codes::Discrete(upload(&self.codes, &self.device)),
        }
    }
}
