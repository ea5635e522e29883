//! MaskGIT: a bidirectional transformer that fills in masked tokens, many at each step (arXiv 2202.04200).
//!
//! Decoding begins with all tokens masked. Each step draws them all, keeps those drawn with the most confidence and masks
//! the rest again, fewer each time. The network is the official one: BERT with the norms after the branches, and one table
//! for image tokens, classes and the mask, tied to the output. A dropped class is the mask in the class's place. Captions,
//! which the official model does not have, come first, with a table of their own.

use super::blueprint::{Blueprint, Predicts, StackConfig, Takes};
use super::upload::upload;
use super::{
    Abilities, Condition, Conditions, Draw, Generation, Generator, GeneratorLoss, GeneratorSettings, Predictions,
    Request, codes_of,
};
use crate::role::Described;
use crate::sampling::{Draws, Sampling, Schedule, Seeded, decide_rows, filter, guide, log_sum_exp};
use crate::systems::Facts;
use crate::{Codes, host};
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result, Rng, TokenSpec, rng::Stream};
use smalti_nn::attention::Visible;
use smalti_nn::dense::{Dense, Pack, TokenEmbedding, TokenNorm};
use smalti_nn::init::Init;
use smalti_nn::positions::LearnedPositions;
use smalti_nn::transformer::{Activation, Block, BlockConfig, NormPlacement};

/// Epsilon of all norms.
const EPSILON: f64 = 1e-12;

/// Decoding steps if none are asked for: the paper uses 8 at 256 pixels and 12 at 512.
const STEPS: usize = 12;

/// Everything that changes the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaskGitConfig {
    /// The tokens it predicts: a grid or a sequence.
    pub tokens: TokenSpec,
    /// What it is conditioned on.
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
    /// Dropout of embeddings and of each branch, 0 <= dropout < 1.
    #[serde(default)]
    pub dropout: f64,
    /// Dropout of attention weights, 0 <= dropout < 1.
    #[serde(default)]
    pub attention_dropout: f64,
    /// Share of masked tokens, in training over a uniform draw, in decoding over the steps.
    #[serde(default)]
    pub schedule: Schedule,
    /// Share of the target that training spreads over the whole table, 0 <= smoothing < 1.
    #[serde(default = "tenth", serialize_with = "smalti_base::config::decimal")]
    pub label_smoothing: f32,
    /// Training masks at least this share of the tokens, 0..=1.
    #[serde(default, serialize_with = "smalti_base::config::decimal")]
    pub min_masking_rate: f32,
}

fn four() -> usize {
    4
}

fn tenth() -> f32 {
    0.1
}

impl Described for MaskGitConfig {
    const FACTS: Facts = Facts {
        arxiv: "2202.04200",
        tokens: "grid, sequence",
        about: "bidirectional transformer, masked tokens decoded in parallel, the most certain first (MaskGIT)",
    };
}

impl MaskGitConfig {
    /// A model with BERT's first values: truncated normal with deviation 0.02, biases 0.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Unsupported`] for settings out of range.
    pub fn init(&self, device: &Device) -> Result<MaskGit> {
        self.validate()?;
        let init = Init::TruncatedNormal(0.02);
        let norm = || TokenNorm::new(self.width, EPSILON, device);
        let block = BlockConfig {
            width: self.width,
            heads: self.heads,
            hidden: self.hidden(),
            norm: NormPlacement::After,
            epsilon: EPSILON,
            activation: Activation::GeluTanh,
            dropout: self.dropout,
            attention_dropout: self.attention_dropout,
            init,
        };
        let text = self.condition.text().is_some();
        Ok(MaskGit {
            words: TokenEmbedding::new(self.vocabulary(), self.width, init, device),
            text: text.then(|| TokenEmbedding::new(self.condition.rows(), self.width, init, device)),
            positions: LearnedPositions::new(self.prefix() + self.tokens.length(), self.width, init, device),
            embedding_norm: norm(),
            dropout: DropoutConfig::new(self.dropout).init(),
            blocks: (0..self.depth).map(|_| block.init(device)).collect(),
            head: Dense::new(self.width, self.width, init, device),
            head_norm: norm(),
            head_bias: Init::Zeros.param([self.vocabulary()], device),
            config: self.clone(),
        })
    }

    fn validate(&self) -> Result<()> {
        if !(0.0..1.0).contains(&self.label_smoothing) {
            let problem = format!("label_smoothing = {} is not in 0 <= smoothing < 1", self.label_smoothing);
            return Err(Error::invalid("maskgit", problem));
        }
        if !(0.0..=1.0).contains(&self.min_masking_rate) {
            let problem = format!("min_masking_rate = {} is not in 0..=1", self.min_masking_rate);
            return Err(Error::invalid("maskgit", problem));
        }
        if self.hidden == Some(0) {
            return Err(Error::invalid("maskgit", "hidden must be at least 1"));
        }
        Blueprint {
            place: "maskgit",
            predicts: Predicts::FlatCodes,
            tokens: &self.tokens,
            takes: Takes::ClassOrText,
            condition: &self.condition,
            condition_dropout: self.condition_dropout,
            stacks: &[StackConfig::new(self.width, self.depth, self.heads)],
            mlp_ratio: self.mlp_ratio,
            dropout: [self.dropout, self.attention_dropout],
        }
        .validate()
    }

    /// Channels inside a block's MLP.
    fn hidden(&self) -> usize {
        self.hidden.unwrap_or(self.mlp_ratio * self.width)
    }

    /// Tokens in front of the image's.
    fn prefix(&self) -> usize {
        if self.condition.is_none() { 0 } else { self.condition.length() }
    }

    /// Rows of the tied table: image tokens, classes, the mask.
    fn vocabulary(&self) -> usize {
        self.codes() + self.condition.classes().unwrap_or_default() + 1
    }

    /// Number of codes; 0 for tokens that are refused.
    fn codes(&self) -> usize {
        self.tokens.vocabulary().unwrap_or_default()
    }

    /// The id of the mask, the last row of the table.
    pub fn mask_id(&self) -> usize {
        self.vocabulary() - 1
    }
}

impl GeneratorSettings for MaskGitConfig {
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
        Abilities { chooses_steps: true, ..Abilities::default() }
    }
}

/// The network.
#[derive(Module, Debug)]
pub struct MaskGit {
    /// Vectors of image tokens, classes and the mask, in this order; also the output's weights.
    pub words: TokenEmbedding,
    /// Vectors of the caption's ids; the last one is the null id's.
    pub text: Option<TokenEmbedding>,
    /// Places of the condition, then of the image tokens.
    pub positions: LearnedPositions,
    /// Of the sum of both.
    pub embedding_norm: TokenNorm,
    /// Of the embedded input, in training.
    pub dropout: Dropout,
    /// Post-norm blocks.
    pub blocks: Vec<Block>,
    /// First part of the output head.
    pub head: Dense,
    /// After the head's GELU.
    pub head_norm: TokenNorm,
    /// Added to the logits, one for each row of the table.
    pub head_bias: Param<Tensor<1>>,
    /// What the network was made from.
    #[module(skip)]
    pub config: MaskGitConfig,
}

impl MaskGit {
    /// Features of the whole sequence.
    ///
    /// # Shapes
    /// `condition_ids [b, condition length]` (not looked at without a condition), `ids [b, length]` of image tokens or the
    /// mask, to `[b, places, width]`, the condition's places first.
    pub fn features(&self, condition_ids: Tensor<2, Int>, ids: Tensor<2, Int>) -> Tensor<3> {
        let mut x = match (&self.text, self.config.condition.classes()) {
            (Some(text), _) => Tensor::cat(vec![text.forward(condition_ids), self.words.forward(ids)], 1),
            (None, Some(_)) => {
                // The null class is one past the last class: the mask's row.
                let class_ids = condition_ids + self.config.codes() as i32;
                self.words.forward(Tensor::cat(vec![class_ids, ids], 1))
            }
            (None, None) => self.words.forward(ids),
        };
        x = self.dropout.forward(self.embedding_norm.forward(self.positions.forward(x, 0)));
        for block in &self.blocks {
            x = block.forward(x, &Visible::All);
        }
        x
    }

    /// Logits of the first `words` rows of the table.
    ///
    /// # Shapes
    /// `[b, n, width]` to `[b, n, words]`.
    pub fn logits(&self, features_bnd: Tensor<3>, words: usize) -> Tensor<3> {
        self.against_table(self.before_table(features_bnd), words)
    }

    fn before_table(&self, features_bnd: Tensor<3>) -> Tensor<3> {
        self.head_norm.forward(Activation::GeluTanh.forward(self.head.forward(features_bnd)))
    }

    fn against_table(&self, x: Tensor<3>, words: usize) -> Tensor<3> {
        let table = self.words.table.val().narrow(0, 0, words);
        let bias = self.head_bias.val().narrow(0, 0, words);
        x.matmul(table.transpose().unsqueeze()) + bias.unsqueeze()
    }

    /// Which tokens of one image are masked at `progress` in 0..1.
    fn draw_mask(&self, progress: f32, stream: &mut Stream) -> Vec<bool> {
        let length = self.config.tokens.length();
        let share = self.config.schedule.ratio(progress, length).max(self.config.min_masking_rate);
        let count = ((share * length as f32).ceil() as usize).clamp(1, length);
        let mut mask = vec![false; length];
        stream.permutation(length).into_iter().take(count).for_each(|place| mask[place] = true);
        mask
    }

    /// The loss with given masks, true where a token is masked; one for each image, each with at least one token.
    ///
    /// # Shapes
    /// `codes [b, length]`, `condition_ids [b, condition length]`, masks of `length`.
    pub fn masked_loss(
        &self,
        codes: Tensor<2, Int>,
        condition_ids: Tensor<2, Int>,
        masks: &[Vec<bool>],
        label_smoothing: f32,
    ) -> GeneratorLoss {
        self.masked_predictions(codes, condition_ids, masks).smoothed_loss(label_smoothing)
    }

    /// Logits over the whole table. Only masked tokens have a weight.
    fn masked_predictions(
        &self,
        codes: Tensor<2, Int>,
        condition_ids: Tensor<2, Int>,
        masks: &[Vec<bool>],
    ) -> Predictions {
        let [b, length] = codes.dims();
        let device = codes.device();
        // Weights that sum to 1: each image counts the same, whatever the number of its masked tokens.
        let weights: Vec<f32> = masks
            .iter()
            .flat_map(|mask| {
                let each = 1.0 / (b * mask.iter().filter(|masked| **masked).count().max(1)) as f32;
                mask.iter().map(move |masked| if *masked { each } else { 0.0 })
            })
            .collect();
        let weights = Tensor::<1>::from_data(TensorData::new(weights, [b * length]), &device);
        let mask = TensorData::new(masks.concat(), [b, length]);
        let ids = codes.clone().mask_fill(Tensor::<2, Bool>::from_data(mask, &device), self.config.mask_id() as i32);
        let features = self.features(condition_ids, ids).narrow(1, self.config.prefix(), length);
        let logits = self.logits(features, self.config.vocabulary()).flatten(0, 1);
        Predictions { logits, targets: codes.flatten(0, 1), weights: Some(weights) }
    }

    /// [`Generator::start`] with random draws from elsewhere.
    ///
    /// # Errors
    /// As [`Generator::start`].
    pub fn start_with(&self, request: &Request, draws: Box<dyn Draws>) -> Result<MaskGitGeneration> {
        let known = request.check(&self.config)?;
        let steps = request.sampling.steps.unwrap_or(STEPS);
        if request.sampling.first_step >= steps {
            let problem = format!("{} leaves none of {steps} steps", request.sampling.first_step);
            return Err(Error::invalid("sampling: first_step", problem));
        }
        // A packed model is for inference already, and would be unpacked by `valid`.
        let model = if self.head.packed().is_some() { self.clone() } else { self.valid() };
        let device = model.head_bias.val().device();
        Ok(MaskGitGeneration {
            condition_rows: request.condition_rows(&self.config.condition, &device)?,
            guesses: known.iter().map(|row| row.iter().map(|code| code.unwrap_or(0)).collect()).collect(),
            unknown: known.iter().map(|row| row.iter().filter(|code| code.is_none()).count()).collect(),
            kept: known,
            sampling: request.sampling.clone(),
            model,
            device,
            draws,
            steps,
            done: 0,
        })
    }
}

impl Generator for MaskGit {
    fn settings(&self) -> &dyn GeneratorSettings {
        &self.config
    }

    /// Cross-entropy of the masked tokens over the whole table, a mean over each image's masked tokens and then over images.
    fn loss(&self, codes: Codes, given: &[Condition], draw: &mut Draw<'_>) -> Result<GeneratorLoss> {
        let (codes, stream) = (codes_of(codes, given, &self.config.tokens)?, &mut *draw.stream);
        let masks = given.iter().map(|_| self.draw_mask(stream.uniform(), stream)).collect::<Vec<_>>();
        let dropout = Some((self.config.condition_dropout, stream));
        let condition_ids = self.config.condition.batch(given, dropout, &codes.device())?;
        Ok(self.masked_loss(codes, condition_ids, &masks, self.config.label_smoothing))
    }

    fn predictions(&self, codes: Codes, given: &[Condition], first_image: u64) -> Result<Predictions> {
        // Multiples of the golden ratio cover 0..1 evenly, however many images there are.
        const GOLDEN: f64 = 0.618_033_988_749_894_9;
        let codes = codes_of(codes, given, &self.config.tokens)?;
        let masks = (first_image..).zip(given).map(|(image, _)| {
            let progress = ((image + 1) as f64 * GOLDEN).fract() as f32;
            self.draw_mask(progress, &mut Rng::new(0).stream(image, 0))
        });
        let masks = masks.collect::<Vec<_>>();
        let condition_ids = self.config.condition.batch(given, None, &codes.device())?;
        Ok(self.masked_predictions(codes, condition_ids, &masks))
    }

    fn dense_layers(&mut self) -> Vec<&mut Dense> {
        self.blocks.iter_mut().flat_map(Pack::dense_layers).chain([&mut self.head]).collect()
    }

    fn start(&self, request: &Request) -> Result<Box<dyn Generation + '_>> {
        let draws = Seeded::new(request.images.iter().map(|image| image.seed));
        Ok(Box::new(self.start_with(request, Box::new(draws))?))
    }
}

/// Decoding under way: each step fills in every masked token, and masks the least certain again.
pub struct MaskGitGeneration {
    model: MaskGit,
    device: Device,
    sampling: Sampling,
    condition_rows: Tensor<2, Int>,
    /// Tokens masked at the start, by image.
    unknown: Vec<usize>,
    /// Decided tokens; `None` is masked.
    kept: Vec<Vec<Option<u32>>>,
    /// What the last step filled in, before masking again.
    guesses: Vec<Vec<u32>>,
    draws: Box<dyn Draws>,
    /// Of the whole schedule, with those that the request leaves out.
    steps: usize,
    done: usize,
}

impl MaskGitGeneration {
    /// The decided tokens of each image, `None` where masked.
    pub fn kept(&self) -> &[Vec<Option<u32>>] {
        &self.kept
    }

    /// Logits of the image tokens on the host, `[n, length, vocabulary]`, with guidance applied.
    fn predict(&self, step: usize) -> Result<Vec<f32>> {
        let config = &self.model.config;
        let mask = config.mask_id() as u32;
        let mut rows: Vec<Vec<u32>> =
            self.kept.iter().map(|row| row.iter().map(|code| code.unwrap_or(mask)).collect()).collect();
        if self.sampling.is_guided() {
            rows.extend_from_within(..);
        }
        let features = self.model.features(self.condition_rows.clone(), upload(&rows, &self.device));
        let features = features.narrow(1, config.prefix(), config.tokens.length());
        let x = self.model.before_table(features);
        let x = match self.sampling.is_guided() {
            true => guide(x, self.sampling.guidance_at(step, self.steps)),
            false => x,
        };
        host::floats(self.model.against_table(x, config.codes()))
    }

    /// A code for a place, and the confidence in it; none where one is decided.
    fn guess(&self, image: usize, place: usize, step: usize, row: &[f32]) -> Option<(u32, f32)> {
        if self.kept[image][place].is_some() {
            return None;
        }
        let mut filtered = row.to_vec();
        filter(&mut filtered, &self.sampling);
        let code = self.draws.token(image, step, place, &filtered);
        // The model's own probability, before temperature and filters.
        let log_probability = (f64::from(row[code]) - log_sum_exp(row)) as f32;
        let noise = self.sampling.choice_temperature * (1.0 - self.progress(step));
        Some((code as u32, log_probability + noise * self.draws.confidence_noise(image, step, place)))
    }

    /// The share of the schedule that is done after a step.
    fn progress(&self, step: usize) -> f32 {
        (step + 1) as f32 / self.steps as f32
    }

    /// Fills in the masked tokens of one image and masks again those that were drawn with the least confidence.
    fn decide(&mut self, image: usize, step: usize, guesses: &[Option<(u32, f32)>]) {
        let progress = self.progress(step);
        let mut confidence = vec![f32::INFINITY; guesses.len()];
        for (place, guess) in guesses.iter().enumerate() {
            if let Some((code, trust)) = *guess {
                (self.guesses[image][place], confidence[place]) = (code, trust);
            }
        }
        let masked = confidence.iter().filter(|c| c.is_finite()).count();
        let ratio = self.model.config.schedule.ratio(progress, self.unknown[image]);
        let again = ((self.unknown[image] as f32 * ratio).floor() as usize).min(masked.saturating_sub(1)).max(1);
        let mut sorted = confidence.clone();
        sorted.sort_by(f32::total_cmp);
        let cut = sorted.get(again).copied().unwrap_or(f32::INFINITY);
        for (place, confidence) in confidence.into_iter().enumerate() {
            self.kept[image][place] = (confidence >= cut).then_some(self.guesses[image][place]);
        }
    }
}

impl Generation for MaskGitGeneration {
    fn steps(&self) -> usize {
        self.steps - self.sampling.first_step
    }

    fn done(&self) -> usize {
        self.done
    }

    fn step(&mut self) -> Result<()> {
        if self.done == self.steps() {
            return Ok(());
        }
        let step = self.sampling.first_step + self.done;
        let (places, codes) = (self.model.config.tokens.length(), self.model.config.codes());
        let guesses = smalti_kernels::on_pool(&self.device, || {
            let mut logits = self.predict(step)?;
            Ok(decide_rows(&mut logits, codes, |i, row| self.guess(i / places, i % places, step, row)))
        })?;
        for (image, guesses) in guesses.chunks_exact(places).enumerate() {
            self.decide(image, step, guesses);
        }
        self.done += 1;
        Ok(())
    }

    fn codes(&self) -> Codes {
        Codes::Discrete(upload(&self.guesses, &self.device))
    }
}
