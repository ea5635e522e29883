//! MAR: masked autoregression over vectors ("Autoregressive Image Generation without Vector Quantization", arXiv 2406.11838).
//!
//! An encoder sees the tokens that are there, as in a masked autoencoder, behind buffer tokens that carry the condition. A
//! decoder sees them among mask tokens, and says of each masked place what its token should be like; a [`Denoiser`] draws
//! the token from that. Generating fills an image in a random order, few tokens at first and more at each step.

use super::blueprint::{Blueprint, Predicts, StackConfig, Takes};
use super::condition_vectors::{id_rows, ids_of};
use super::denoiser::{Canvas, Denoiser, DiffusionConfig, Drawing, Place};
use super::upload::{gathered, index};
use super::{
    Abilities, Condition, ConditionVectors, Conditions, Draw, Generation, Generator, GeneratorLoss, GeneratorSettings,
    Request, vectors_of,
};
use crate::Codes;
use crate::role::Described;
use crate::sampling::{GuidanceSchedule, Sampling, Seeded, VectorDraws};
use crate::systems::Facts;
use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result, TokenSpec, rng::Stream};
use smalti_nn::attention::Visible;
use smalti_nn::dense::{Dense, Pack, TokenNorm};
use smalti_nn::init::Init;
use smalti_nn::positions::LearnedPositions;
use smalti_nn::transformer::Block;
use smalti_nn::vit::xavier;

/// Deviation of the share of masked tokens from 1 in training, before it is cut.
const DEVIATION: f64 = 0.25;

/// Decoding steps if none are asked for.
const STEPS: usize = 64;

/// Everything that changes the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MarConfig {
    /// The tokens it predicts: a grid or a sequence of vectors.
    pub tokens: TokenSpec,
    /// What it is conditioned on: a class or nothing.
    #[serde(default)]
    pub condition: Conditions,
    /// How often training hides the condition, 0..=1. Guidance needs it above 0.
    #[serde(default, serialize_with = "smalti_base::config::decimal")]
    pub condition_dropout: f32,
    /// Transformer over the tokens that are there.
    pub encoder: StackConfig,
    /// Transformer over all places.
    pub decoder: StackConfig,
    /// Channels inside a block's MLP, in widths.
    #[serde(default = "four")]
    pub mlp_ratio: usize,
    /// Tokens in front of the image's, all of which are the condition.
    #[serde(default = "buffer")]
    pub buffer: usize,
    /// Dropout of each branch and inside MLPs, 0 <= dropout < 1.
    #[serde(default)]
    pub dropout: f64,
    /// Dropout of attention weights, 0 <= dropout < 1.
    #[serde(default)]
    pub attention_dropout: f64,
    /// Training masks at least this share of the tokens, 0..=1.
    #[serde(default = "least_masked", serialize_with = "smalti_base::config::decimal")]
    pub mask_ratio_min: f32,
    /// What draws a token.
    pub diffusion: DiffusionConfig,
}

fn four() -> usize {
    4
}

fn buffer() -> usize {
    64
}

fn least_masked() -> f32 {
    0.7
}

/// Epsilon of all norms.
const EPSILON: f64 = 1e-6;
/// Deviation of the first tables.
const TABLE: Init = Init::Normal(0.02);
const PLACE: &str = "mar";

impl Described for MarConfig {
    const FACTS: Facts = Facts {
        arxiv: "2406.11838",
        tokens: "grid, sequence, of vectors",
        about: "masked autoencoder with a diffusion loss, tokens filled in in random order, first a few and then many per step (MAR)",
    };
}

impl MarConfig {
    /// A model with the official first values.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Unsupported`] for settings out of range.
    pub fn init(&self, device: &Device) -> Result<Mar> {
        if self.buffer == 0 || !(0.0..=1.0).contains(&self.mask_ratio_min) {
            let (buffer, least) = (self.buffer, self.mask_ratio_min);
            let problem = format!("buffer = {buffer} must be at least 1, and mask_ratio_min = {least} in 0..=1");
            return Err(Error::invalid(PLACE, problem));
        }
        Blueprint {
            place: PLACE,
            predicts: Predicts::Vectors,
            tokens: &self.tokens,
            takes: Takes::Class,
            condition: &self.condition,
            condition_dropout: self.condition_dropout,
            stacks: &[self.encoder, self.decoder],
            mlp_ratio: self.mlp_ratio,
            dropout: [self.dropout, self.attention_dropout],
        }
        .validate()?;
        self.diffusion.check(PLACE)?;
        let channels = self.channels();
        let (length, dropout) = (self.tokens.length(), [self.dropout, self.attention_dropout]);
        let (from, to) = (self.encoder.width, self.decoder.width);
        let dense = |inputs, outputs| Dense::new(inputs, outputs, xavier(inputs, outputs), device);
        let norm = |width| TokenNorm::new(width, EPSILON, device);
        Ok(Mar {
            condition: ConditionVectors::new(&self.condition, from, TABLE, device),
            input: dense(channels, from),
            encoder_positions: LearnedPositions::new(self.buffer + length, from, TABLE, device),
            input_norm: norm(from),
            encoder: self.encoder.init(EPSILON, self.mlp_ratio, dropout, device),
            encoder_norm: norm(from),
            to_decoder: dense(from, to),
            mask: TABLE.param([1, to], device),
            decoder_positions: LearnedPositions::new(self.buffer + length, to, TABLE, device),
            decoder: self.decoder.init(EPSILON, self.mlp_ratio, dropout, device),
            decoder_norm: norm(to),
            output_positions: LearnedPositions::new(length, to, TABLE, device),
            denoiser: self.diffusion.init(channels, to, device),
            config: self.clone(),
        })
    }

    fn channels(&self) -> usize {
        self.tokens.channels().unwrap_or_default()
    }
}

impl GeneratorSettings for MarConfig {
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

    fn official(&self) -> Option<&'static str> {
        Some("mar")
    }
}

/// The network.
#[derive(Module, Debug)]
pub struct Mar {
    /// Vectors of the condition.
    pub condition: ConditionVectors,
    /// Of the tokens.
    pub input: Dense,
    /// Places of the buffer, then of the image tokens, for the encoder.
    pub encoder_positions: LearnedPositions,
    /// Of the sum of both.
    pub input_norm: TokenNorm,
    /// Blocks over the tokens that are there.
    pub encoder: Vec<Block>,
    /// After them.
    pub encoder_norm: TokenNorm,
    /// To the decoder's width.
    pub to_decoder: Dense,
    /// What stands in a masked place, `[1, d]`.
    pub mask: Param<Tensor<2>>,
    /// Places of the buffer, then of the image tokens, for the decoder.
    pub decoder_positions: LearnedPositions,
    /// Blocks over all places.
    pub decoder: Vec<Block>,
    /// After them.
    pub decoder_norm: TokenNorm,
    /// Added to what the denoiser is told.
    pub output_positions: LearnedPositions,
    /// Draws a token.
    pub denoiser: Denoiser,
    /// What the network was made from.
    #[module(skip)]
    pub config: MarConfig,
}

impl Mar {
    /// The encoder's output for the places that are there, the same number of each image, ascending.
    ///
    /// # Shapes
    /// `condition_ids [b, 1]` or, with guidance, `[2 b, 1]`; `tokens [b, length, c]`, of which only the visible ones are
    /// looked at; to `[b or 2 b, buffer + visible, width]`.
    pub fn encode(&self, condition_ids: Tensor<2, Int>, tokens_blc: Tensor<3>, visible: &[Vec<usize>]) -> Tensor<3> {
        let [b, ..] = tokens_blc.dims();
        let (rows, seen) = (condition_ids.dims()[0], visible.first().map_or(0, Vec::len));
        let (device, buffer) = (tokens_blc.device(), self.config.buffer);
        let table = self.encoder_positions.table.val();
        let [_, width] = table.dims();
        let mut x = self.condition.forward(condition_ids) + table.clone().narrow(0, 0, buffer).unsqueeze();
        if seen > 0 {
            let places = visible.iter().flatten().map(|place| buffer + place).collect();
            let places = table.select(0, index(places, &device)).reshape([b, seen, width]);
            let there = self.input.forward(gathered(tokens_blc, visible)) + places;
            // Guidance sees the same tokens twice.
            x = Tensor::cat(vec![x, there.repeat_dim(0, rows / b)], 1);
        }
        let x = self.encoder.iter().fold(self.input_norm.forward(x), |x, block| block.forward(x, &Visible::All));
        self.encoder_norm.forward(x)
    }

    /// What the denoiser is told of the wanted places.
    ///
    /// # Shapes
    /// `encoded [b or 2 b, buffer + visible, width]` to `[n, decoder's width]`, row by row of each image, and with guidance
    /// all images again.
    pub fn decode(&self, encoded: Tensor<3>, visible: &[Vec<usize>], wanted: &[Vec<usize>]) -> Tensor<2> {
        let [rows, seen, _] = encoded.dims();
        let (buffer, length) = (self.config.buffer, self.config.tokens.length());
        let (places, images) = (buffer + length, visible.len());
        let device = encoded.device();
        let table = self.decoder_positions.table.val();
        let [_, width] = table.dims();
        // Each place takes a row of the encoder's or, if it is masked, the last one.
        let mut source = vec![rows * seen; rows * places];
        for row in 0..rows {
            let there = (0..buffer).chain(visible[row % images].iter().map(|place| buffer + place));
            there.enumerate().for_each(|(i, place)| source[row * places + place] = row * seen + i);
        }
        let known = self.to_decoder.forward(encoded).reshape([rows * seen, width]);
        let x = Tensor::cat(vec![known, self.mask.val()], 0).select(0, index(source, &device));
        let x = x.reshape([rows, places, width]) + table.unsqueeze();
        let wanted: Vec<&Vec<usize>> = (0..rows).map(|row| &wanted[row % images]).collect();
        let from = wanted.iter().enumerate();
        let from =
            from.flat_map(|(row, wanted)| wanted.iter().map(move |place| row * places + buffer + place)).collect();
        let from = index(from, &device);
        let of_all = |x: Tensor<3>| x.reshape([rows * places, width]).select(0, from.clone());
        // Of the last block no more is used than the wanted places, if there are as many in each row.
        let count = wanted.first().map_or(0, |wanted| wanted.len());
        let (last, others) = match self.decoder.split_last() {
            Some((last, others)) if count > 0 && wanted.iter().all(|places| places.len() == count) => {
                (Some(last), others)
            }
            _ => (None, self.decoder.as_slice()),
        };
        let x = others.iter().fold(x, |x, block| block.forward(x, &Visible::All));
        let x = match last {
            Some(last) => {
                last.forward_for(x, |x| of_all(x).reshape([rows, count, width])).reshape([rows * count, width])
            }
            None => of_all(x),
        };
        let x: Tensor<2> = self.decoder_norm.forward(x.unsqueeze()).squeeze_dim(0);
        let to = wanted.iter().flat_map(|wanted| wanted.iter().copied()).collect();
        x + self.output_positions.table.val().select(0, index(to, &device))
    }

    /// The loss with given masks, timesteps and noise.
    ///
    /// # Shapes
    /// `tokens [b, length, c]`; `masks` has as many places, ascending, of each image; `t` and `noise [n, c]` have a row for
    /// each masked token, in the order of images and places, and as often again as the loss is to be repeated.
    pub fn masked_loss(
        &self,
        tokens_blc: Tensor<3>,
        condition_ids: Tensor<2, Int>,
        masks: &[Vec<usize>],
        t: &[usize],
        noise: Tensor<2>,
    ) -> Tensor<1> {
        let [_, length, _] = tokens_blc.dims();
        let visible: Vec<Vec<usize>> = masks.iter().map(|masked| others(masked, length)).collect();
        let encoded = self.encode(condition_ids, tokens_blc.clone(), &visible);
        let z = self.decode(encoded, &visible, masks);
        let targets = gathered(tokens_blc, masks).flatten(0, 1);
        self.denoiser.mean_loss(&self.config.diffusion.diffusion(), targets, z, t, noise)
    }

    /// The share of masked tokens of a training batch: normal around 1, cut to what the configuration allows.
    fn draw_ratio(&self, stream: &mut Stream) -> f64 {
        let least = f64::from(self.config.mask_ratio_min);
        let draws = std::iter::repeat_with(|| 1.0 - DEVIATION * f64::from(stream.normal()).abs());
        draws.take(1000).find(|ratio| *ratio >= least).unwrap_or(1.0)
    }

    fn masked_count(&self, ratio: f64) -> usize {
        let length = self.config.tokens.length();
        ((length as f64 * ratio).ceil() as usize).clamp(1, length)
    }

    /// So many masked places of an image, ascending.
    fn draw_mask(&self, masked: usize, stream: &mut Stream) -> Vec<usize> {
        let mut places = stream.permutation(self.config.tokens.length());
        places.truncate(masked);
        places.sort_unstable();
        places
    }

    /// [`Generator::start`] with random draws from elsewhere.
    ///
    /// # Errors
    /// As [`Generator::start`].
    pub fn start_with(&self, request: &Request, mut draws: Box<dyn VectorDraws>) -> Result<MarGeneration> {
        let known = request.check_vectors(&self.config)?;
        let length = self.config.tokens.length();
        let steps = request.sampling.steps.unwrap_or(STEPS.min(length));
        if steps > length || request.sampling.first_step > 0 {
            let problem = format!("{steps} steps, the first {} left out", request.sampling.first_step);
            let hint = format!("a step decides at least one of {length} tokens, and none is left out");
            return Err(Error::invalid_hint("sampling: steps", problem, hint));
        }
        // A packed model is for inference already, and would be unpacked by `valid`.
        let model = if self.to_decoder.packed().is_some() { self.clone() } else { self.valid() };
        let device = model.mask.val().device();
        let drawing = Drawing::new(&model.denoiser, &self.config.diffusion, &request.sampling, &device)?;
        let mut images = Vec::new();
        for (image, known) in known.iter().enumerate() {
            let order = draws.order(image, length);
            let masked: Vec<usize> = order.into_iter().filter(|place| known[*place].is_none()).collect();
            images.push(Image { unknown: masked.len(), masked });
        }
        Ok(MarGeneration {
            ids: ids_of(&self.config.condition, request)?,
            sampling: request.sampling.clone(),
            canvas: Canvas::new(&known, self.config.channels(), &device),
            model,
            device,
            drawing,
            images,
            draws,
            steps,
            done: 0,
        })
    }
}

/// The places of `0..length` that are not in an ascending list.
fn others(places: &[usize], length: usize) -> Vec<usize> {
    (0..length).filter(|place| places.binary_search(place).is_err()).collect()
}

impl Generator for Mar {
    fn settings(&self) -> &dyn GeneratorSettings {
        &self.config
    }

    /// The mean diffusion loss of the masked tokens.
    fn loss(&self, codes: Codes, conditions: &[Condition], draw: &mut Draw<'_>) -> Result<GeneratorLoss> {
        let tokens = vectors_of(codes, conditions, &self.config.tokens)?;
        let stream = &mut *draw.stream;
        let masked = self.masked_count(self.draw_ratio(stream));
        let masks: Vec<Vec<usize>> = conditions.iter().map(|_| self.draw_mask(masked, stream)).collect();
        let diffusion = &self.config.diffusion;
        let n = diffusion.repeats * masks.len() * masked;
        let (t, noise) = diffusion.trials(n, self.config.channels(), stream, &tokens.device());
        let dropout = Some((self.config.condition_dropout, stream));
        let ids = self.config.condition.batch(conditions, dropout, &tokens.device())?;
        Ok(GeneratorLoss { loss: self.masked_loss(tokens, ids, &masks, &t, noise), nats_per_token: None })
    }

    /// Half way between the least share of masked tokens and all.
    fn validation_loss(&self, codes: Codes, conditions: &[Condition], first_image: u64) -> Result<GeneratorLoss> {
        let tokens = vectors_of(codes, conditions, &self.config.tokens)?;
        let masked = self.masked_count((1.0 + f64::from(self.config.mask_ratio_min)) / 2.0);
        let (b, device) = (tokens.dims()[0], tokens.device());
        let begin = |stream: &mut Stream| (self.draw_mask(masked, stream), masked);
        let images = first_image..first_image + b as u64;
        let (masks, (t, noise)) = self.config.diffusion.fixed_trials(images, self.config.channels(), &device, begin);
        let ids = self.config.condition.batch(conditions, None, &device)?;
        Ok(GeneratorLoss { loss: self.masked_loss(tokens, ids, &masks, &t, noise), nats_per_token: None })
    }

    fn dense_layers(&mut self) -> Vec<&mut Dense> {
        let blocks = self.encoder.iter_mut().chain(&mut self.decoder).flat_map(Pack::dense_layers);
        blocks.chain([&mut self.input, &mut self.to_decoder]).chain(self.denoiser.dense_layers()).collect()
    }

    fn start(&self, request: &Request) -> Result<Box<dyn Generation + '_>> {
        let draws = Seeded::new(request.images.iter().map(|image| image.seed));
        Ok(Box::new(self.start_with(request, Box::new(draws))?))
    }
}

/// An image under way.
struct Image {
    /// Places that were masked at the start.
    unknown: usize,
    /// Places that still are; the last ones are filled first.
    masked: Vec<usize>,
}

/// Decoding under way: each step fills some of the masked places of each image.
pub struct MarGeneration {
    model: Mar,
    device: Device,
    sampling: Sampling,
    drawing: Drawing,
    canvas: Canvas,
    /// Condition of each image, and what guidance leads away from.
    ids: Vec<[usize; 2]>,
    images: Vec<Image>,
    draws: Box<dyn VectorDraws>,
    steps: usize,
    done: usize,
}

impl MarGeneration {
    /// Number of masked places of each image.
    pub fn masked(&self) -> Vec<usize> {
        self.images.iter().map(|image| image.masked.len()).collect()
    }

    /// Masked places after this step by the schedule, which never empties an image before the last step.
    pub fn planned(&self, image: usize) -> usize {
        let image = &self.images[image];
        // In double precision as in the official code: rounding decides how many tokens some steps leave.
        let share = (std::f64::consts::FRAC_PI_2 * (self.done + 1) as f64 / self.steps as f64).cos();
        let left = (image.unknown as f64 * share).floor() as usize;
        left.min(image.masked.len().saturating_sub(1)).max(1)
    }

    /// The guidance scale of this step for an image.
    pub fn guidance(&self, image: usize) -> f32 {
        let length = self.model.config.tokens.length();
        match self.sampling.guidance_schedule {
            GuidanceSchedule::Constant => self.sampling.guidance,
            GuidanceSchedule::Linear => {
                let there = (length - self.planned(image).min(length)) as f32 / length as f32;
                1.0 + (self.sampling.guidance - 1.0) * there
            }
        }
    }

    /// One step of images that have as many masked places and fill as many.
    fn fill(&mut self, group: &[usize], filled: usize) -> Result<()> {
        let Self { model, images, canvas, device, .. } = self;
        let length = model.config.tokens.length();
        let (mut visible, mut wanted) = (Vec::new(), Vec::new());
        for &image in group {
            let masked = &images[image].masked;
            let ascending = |places: &[usize]| {
                let mut places = places.to_vec();
                places.sort_unstable();
                places
            };
            visible.push(others(&ascending(masked), length));
            wanted.push(ascending(&masked[masked.len() - filled..]));
        }
        let guided = self.sampling.is_guided();
        let ids: Vec<[usize; 2]> = group.iter().map(|image| self.ids[*image]).collect();
        let ids = id_rows(&ids, guided, device);
        let encoded = model.encode(ids, canvas.of(group), &visible);
        let z = model.decode(encoded, &visible, &wanted);
        let guidance = guided.then(|| self.guidance(group[0]));
        let places = group.iter().zip(&wanted);
        let places: Vec<Place> = places
            .flat_map(|(image, wanted)| wanted.iter().map(|place| Place { image: *image, place: *place }))
            .collect();
        let found = self.drawing.draw(z, guidance, &places, self.done, &mut *self.draws)?;
        self.canvas.put(&found, &places);
        for &image in group {
            let masked = &mut self.images[image].masked;
            masked.truncate(masked.len() - filled);
        }
        Ok(())
    }

    fn fill_all(&mut self) -> Result<()> {
        let last = self.done + 1 == self.steps;
        let kind = |image: usize| {
            let (masked, planned) = (self.images[image].masked.len(), self.planned(image));
            (masked, planned, masked.saturating_sub(if last { 0 } else { planned }))
        };
        let all: Vec<(usize, usize, usize)> = (0..self.images.len()).map(kind).collect();
        // Mostly one group; images of which different numbers are known are in different ones.
        let mut kinds = all.clone();
        kinds.sort_unstable();
        kinds.dedup();
        for kind in kinds.into_iter().filter(|(.., filled)| *filled > 0) {
            let group: Vec<usize> = (0..all.len()).filter(|image| all[*image] == kind).collect();
            self.fill(&group, kind.2)?;
        }
        Ok(())
    }
}

impl Generation for MarGeneration {
    fn steps(&self) -> usize {
        self.steps
    }

    fn done(&self) -> usize {
        self.done
    }

    fn step(&mut self) -> Result<()> {
        if self.done == self.steps {
            return Ok(());
        }
        let device = self.device.clone();
        smalti_kernels::on_pool(&device, || self.fill_all())?;
        self.done += 1;
        Ok(())
    }

    fn codes(&self) -> Codes {
        self.canvas.codes()
    }
}
