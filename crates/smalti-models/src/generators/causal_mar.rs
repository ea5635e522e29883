//! The causal variant of MAR (arXiv 2406.11838, section on autoregression): a decoder-only transformer over vectors with the
//! diffusion loss, one token after the other in raster or random order.
//!
//! There is no official code; the layout is that of GPT with MAR's embeddings and blocks. The condition comes first, and
//! each token is told where the next one is.

use super::blueprint::{Blueprint, Predicts, StackConfig, Takes};
use super::condition_vectors::{id_rows, ids_of};
use super::denoiser::{Canvas, Denoiser, DiffusionConfig, Drawing, Place};
use super::upload::{gathered, index};
use super::{
    Condition, ConditionVectors, Conditions, Draw, Generation, Generator, GeneratorLoss, GeneratorSettings, Request,
    vectors_of,
};
use crate::Codes;
use crate::role::Described;
use crate::sampling::{GuidanceSchedule, Sampling, Seeded, VectorDraws};
use crate::systems::Facts;
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Result, TokenSpec, rng::Stream};
use smalti_nn::attention::Visible;
use smalti_nn::cache::{Cache, KeyValueCache};
use smalti_nn::dense::{Dense, Pack, TokenNorm};
use smalti_nn::init::Init;
use smalti_nn::positions::LearnedPositions;
use smalti_nn::transformer::Block;
use smalti_nn::vit::xavier;

/// In which order tokens are predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenOrder {
    /// Row by row.
    #[default]
    Raster,
    /// Another one for each image.
    Random,
}

/// Everything that changes the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CausalMarConfig {
    /// The tokens it predicts: a grid or a sequence of vectors.
    pub tokens: TokenSpec,
    /// What it is conditioned on: a class or nothing.
    #[serde(default)]
    pub condition: Conditions,
    /// How often training hides the condition, 0..=1. Guidance needs it above 0.
    #[serde(default, serialize_with = "smalti_base::config::decimal")]
    pub condition_dropout: f32,
    /// In which order it predicts them.
    #[serde(default)]
    pub order: TokenOrder,
    /// The transformer.
    pub decoder: StackConfig,
    /// Channels inside a block's MLP, in widths.
    #[serde(default = "four")]
    pub mlp_ratio: usize,
    /// Dropout of each branch and inside MLPs, 0 <= dropout < 1.
    #[serde(default)]
    pub dropout: f64,
    /// Dropout of attention weights, 0 <= dropout < 1.
    #[serde(default)]
    pub attention_dropout: f64,
    /// What draws a token.
    pub diffusion: DiffusionConfig,
}

fn four() -> usize {
    4
}

/// Epsilon of all norms.
const EPSILON: f64 = 1e-6;
/// Deviation of the first tables.
const TABLE: Init = Init::Normal(0.02);
const PLACE: &str = "causal_mar";

impl Described for CausalMarConfig {
    const FACTS: Facts = Facts {
        arxiv: "2406.11838",
        tokens: "grid, sequence, of vectors",
        about: "decoder-only transformer with MAR's diffusion loss, one token after another in raster or random order",
    };
}

impl CausalMarConfig {
    /// A model with the first values of MAR.
    ///
    /// # Errors
    /// [`smalti_base::Error::Invalid`] or [`smalti_base::Error::Unsupported`] for settings out of range.
    pub fn init(&self, device: &Device) -> Result<CausalMar> {
        let dropout = [self.dropout, self.attention_dropout];
        Blueprint {
            place: PLACE,
            predicts: Predicts::Vectors,
            tokens: &self.tokens,
            takes: Takes::Class,
            condition: &self.condition,
            condition_dropout: self.condition_dropout,
            stacks: &[self.decoder],
            mlp_ratio: self.mlp_ratio,
            dropout,
        }
        .validate()?;
        self.diffusion.check(PLACE)?;
        let channels = self.channels();
        let (length, width) = (self.tokens.length(), self.decoder.width);
        let places = || LearnedPositions::new(length, width, TABLE, device);
        Ok(CausalMar {
            condition: ConditionVectors::new(&self.condition, width, TABLE, device),
            input: Dense::new(channels, width, xavier(channels, width), device),
            positions: places(),
            sources: (self.order == TokenOrder::Random).then(places),
            input_norm: TokenNorm::new(width, EPSILON, device),
            blocks: self.decoder.init(EPSILON, self.mlp_ratio, dropout, device),
            norm: TokenNorm::new(width, EPSILON, device),
            output_positions: places(),
            denoiser: self.diffusion.init(channels, width, device),
            config: self.clone(),
        })
    }

    fn channels(&self) -> usize {
        self.tokens.channels().unwrap_or_default()
    }
}

impl GeneratorSettings for CausalMarConfig {
    fn tokens(&self) -> &TokenSpec {
        &self.tokens
    }

    fn conditions(&self) -> &Conditions {
        &self.condition
    }

    fn condition_dropout(&self) -> f32 {
        self.condition_dropout
    }
}

/// The network.
#[derive(Module, Debug)]
pub struct CausalMar {
    /// Vectors of the condition.
    pub condition: ConditionVectors,
    /// Of the tokens.
    pub input: Dense,
    /// Where the next token is.
    pub positions: LearnedPositions,
    /// Where this token is, if that does not follow from where the next one is.
    pub sources: Option<LearnedPositions>,
    /// Of their sum.
    pub input_norm: TokenNorm,
    /// Causal blocks.
    pub blocks: Vec<Block>,
    /// After them.
    pub norm: TokenNorm,
    /// Added to what the denoiser is told.
    pub output_positions: LearnedPositions,
    /// Draws a token.
    pub denoiser: Denoiser,
    /// What the network was made from.
    #[module(skip)]
    pub config: CausalMarConfig,
}

impl CausalMar {
    /// What the denoiser is told of every token, given the condition and the true tokens before it.
    ///
    /// # Shapes
    /// `condition_ids [b, 1]`, `tokens [b, length, c]` and the order of each image's places to `[b, length, width]`, in that
    /// order.
    pub fn conditions(&self, condition_ids: Tensor<2, Int>, tokens_blc: Tensor<3>, orders: &[Vec<usize>]) -> Tensor<3> {
        let [_, length, _] = tokens_blc.dims();
        let before: Vec<Vec<usize>> = orders.iter().map(|order| order[..length - 1].to_vec()).collect();
        let mut x = self.condition.forward(condition_ids);
        if length > 1 {
            x = Tensor::cat(vec![x, self.embed(gathered(tokens_blc, &before), &before)], 1);
        }
        let x = self.input_norm.forward(x + at_places(&self.positions, orders));
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x, &Visible::Past));
        self.norm.forward(x) + at_places(&self.output_positions, orders)
    }

    /// Tokens `[b, n, c]` that are in these places of each image.
    fn embed(&self, tokens_bnc: Tensor<3>, places: &[Vec<usize>]) -> Tensor<3> {
        let x = self.input.forward(tokens_bnc);
        match &self.sources {
            Some(sources) => x + at_places(sources, places),
            None => x,
        }
    }

    /// The loss with given orders, timesteps and noise.
    ///
    /// # Shapes
    /// `tokens [b, length, c]`; `t` and `noise [n, c]` have a row for each token, in the order of images and of prediction,
    /// and as often again as the loss is to be repeated.
    pub fn ordered_loss(
        &self,
        tokens_blc: Tensor<3>,
        condition_ids: Tensor<2, Int>,
        orders: &[Vec<usize>],
        t: &[usize],
        noise: Tensor<2>,
    ) -> Tensor<1> {
        let z = self.conditions(condition_ids, tokens_blc.clone(), orders).flatten(0, 1);
        let targets = gathered(tokens_blc, orders).flatten(0, 1);
        self.denoiser.mean_loss(&self.config.diffusion.diffusion(), targets, z, t, noise)
    }

    /// The order of an image's places; `draw` makes a random one.
    fn order(&self, draw: impl FnOnce(usize) -> Vec<usize>) -> Vec<usize> {
        let length = self.config.tokens.length();
        match self.config.order {
            TokenOrder::Raster => (0..length).collect(),
            TokenOrder::Random => draw(length),
        }
    }

    /// [`Generator::start`] with random draws from elsewhere.
    ///
    /// # Errors
    /// As [`Generator::start`].
    pub fn start_with(&self, request: &Request, mut draws: Box<dyn VectorDraws>) -> Result<CausalMarGeneration> {
        let known = request.check_vectors(&self.config)?;
        let length = self.config.tokens.length();
        // A packed model is for inference already, and would be unpacked by `valid`.
        let model = if self.input.packed().is_some() { self.clone() } else { self.valid() };
        let device = model.condition.none.val().device();
        let drawing = Drawing::new(&model.denoiser, &self.config.diffusion, &request.sampling, &device)?;
        let mut images = Vec::new();
        for (image, known) in known.iter().enumerate() {
            let mut order = self.order(|n| draws.order(image, n));
            if self.config.order == TokenOrder::Random {
                // What is known comes first, so that all else sees it.
                order.sort_by_key(|place| known[*place].is_none());
            }
            images.push(Image { order, known: known.iter().map(Option::is_some).collect() });
        }
        Ok(CausalMarGeneration {
            ids: ids_of(&self.config.condition, request)?,
            caches: (0..self.config.decoder.depth).map(|_| KeyValueCache::new(length, 0)).collect(),
            sampling: request.sampling.clone(),
            canvas: Canvas::new(&known, self.config.channels(), &device),
            model,
            device,
            drawing,
            images,
            draws,
            fed: 0,
            done: 0,
        })
    }
}

/// A table's vectors of these places of each image, `[b, n, d]`.
fn at_places(table: &LearnedPositions, places: &[Vec<usize>]) -> Tensor<3> {
    let table = table.table.val();
    let (width, device) = (table.dims()[1], table.device());
    let n = places.first().map_or(0, Vec::len);
    table.select(0, index(places.concat(), &device)).reshape([places.len(), n, width])
}

impl Generator for CausalMar {
    fn settings(&self) -> &dyn GeneratorSettings {
        &self.config
    }

    /// The mean diffusion loss of all tokens.
    fn loss(&self, codes: Codes, conditions: &[Condition], draw: &mut Draw<'_>) -> Result<GeneratorLoss> {
        let tokens = vectors_of(codes, conditions, &self.config.tokens)?;
        let stream = &mut *draw.stream;
        let orders: Vec<Vec<usize>> = conditions.iter().map(|_| self.order(|n| stream.permutation(n))).collect();
        let [b, length, c] = tokens.dims();
        let diffusion = &self.config.diffusion;
        let (t, noise) = diffusion.trials(diffusion.repeats * b * length, c, stream, &tokens.device());
        let dropout = Some((self.config.condition_dropout, stream));
        let ids = self.config.condition.batch(conditions, dropout, &tokens.device())?;
        Ok(GeneratorLoss { loss: self.ordered_loss(tokens, ids, &orders, &t, noise), nats_per_token: None })
    }

    fn validation_loss(&self, codes: Codes, conditions: &[Condition], first_image: u64) -> Result<GeneratorLoss> {
        let tokens = vectors_of(codes, conditions, &self.config.tokens)?;
        let ([b, length, c], device) = (tokens.dims(), tokens.device());
        let begin = |stream: &mut Stream| (self.order(|n| stream.permutation(n)), length);
        let images = first_image..first_image + b as u64;
        let (orders, (t, noise)) = self.config.diffusion.fixed_trials(images, c, &device, begin);
        let ids = self.config.condition.batch(conditions, None, &device)?;
        Ok(GeneratorLoss { loss: self.ordered_loss(tokens, ids, &orders, &t, noise), nats_per_token: None })
    }

    fn dense_layers(&mut self) -> Vec<&mut Dense> {
        let blocks = self.blocks.iter_mut().flat_map(Pack::dense_layers);
        blocks.chain([&mut self.input]).chain(self.denoiser.dense_layers()).collect()
    }

    fn start(&self, request: &Request) -> Result<Box<dyn Generation + '_>> {
        let draws = Seeded::new(request.images.iter().map(|image| image.seed));
        Ok(Box::new(self.start_with(request, Box::new(draws))?))
    }
}

/// An image under way.
struct Image {
    order: Vec<usize>,
    /// Places whose tokens were given.
    known: Vec<bool>,
}

/// Decoding under way: one token of each image at each step. Tokens that are known in every image are fed together with the
/// next one that must be drawn.
pub struct CausalMarGeneration {
    model: CausalMar,
    device: Device,
    sampling: Sampling,
    drawing: Drawing,
    canvas: Canvas,
    /// Condition of each image, and what guidance leads away from.
    ids: Vec<[usize; 2]>,
    caches: Vec<KeyValueCache>,
    images: Vec<Image>,
    draws: Box<dyn VectorDraws>,
    /// Tokens that the caches have seen.
    fed: usize,
    done: usize,
}

impl CausalMarGeneration {
    /// Feeds what the caches have not seen; returns what the denoiser is told of the next token, `[b or 2 b, width]`.
    fn condition(&mut self) -> Tensor<2> {
        let first = self.caches.first().map_or(0, KeyValueCache::length);
        let guided = self.sampling.is_guided();
        let places = |from: usize, to: usize| -> Vec<Vec<usize>> {
            let halves = if guided { 2 } else { 1 };
            let rows = self.images.iter().cycle().take(halves * self.images.len());
            rows.map(|image| image.order[from..to].to_vec()).collect()
        };
        let mut parts = Vec::new();
        if first == 0 {
            parts.push(self.model.condition.forward(id_rows(&self.ids, guided, &self.device)));
        }
        if self.fed < self.done {
            let new = places(self.fed, self.done);
            let tokens = self.canvas.at(&new[..self.images.len()]).repeat_dim(0, new.len() / self.images.len());
            parts.push(self.model.embed(tokens, &new));
        }
        let next = places(first, self.done + 1);
        let mut x = self.model.input_norm.forward(Tensor::cat(parts, 1) + at_places(&self.model.positions, &next));
        for (block, cache) in self.model.blocks.iter().zip(&mut self.caches) {
            x = block.decode(x, cache);
        }
        let n = x.dims()[1];
        let here = at_places(&self.model.output_positions, &places(self.done, self.done + 1));
        self.fed = self.done;
        (self.model.norm.forward(x.narrow(1, n - 1, 1)) + here).squeeze_dim(1)
    }

    fn sample(&mut self) -> Result<()> {
        let z = self.condition();
        let (n, length) = (self.images.len(), self.model.config.tokens.length());
        let unknown: Vec<usize> =
            (0..n).filter(|image| !self.images[*image].known[self.images[*image].order[self.done]]).collect();
        let guidance = self.sampling.is_guided().then(|| match self.sampling.guidance_schedule {
            GuidanceSchedule::Constant => self.sampling.guidance,
            GuidanceSchedule::Linear => 1.0 + (self.sampling.guidance - 1.0) * (self.done + 1) as f32 / length as f32,
        });
        let halves = if guidance.is_some() { 2 } else { 1 };
        let rows = (0..halves).flat_map(|half| unknown.iter().map(move |image| half * n + image)).collect();
        let z = z.select(0, index(rows, &self.device));
        let place = |image: usize| Place { image, place: self.images[image].order[self.done] };
        let places: Vec<Place> = unknown.iter().map(|image| place(*image)).collect();
        let found = self.drawing.draw(z, guidance, &places, self.done, &mut *self.draws)?;
        self.canvas.put(&found, &places);
        Ok(())
    }
}

impl Generation for CausalMarGeneration {
    fn steps(&self) -> usize {
        self.model.config.tokens.length()
    }

    fn done(&self) -> usize {
        self.done
    }

    fn step(&mut self) -> Result<()> {
        if self.done == self.steps() {
            return Ok(());
        }
        if self.images.iter().any(|image| !image.known[image.order[self.done]]) {
            let device = self.device.clone();
            smalti_kernels::on_pool(&device, || self.sample())?;
        }
        self.done += 1;
        Ok(())
    }

    fn codes(&self) -> Codes {
        self.canvas.codes()
    }
}
