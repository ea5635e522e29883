//! MAR's diffusion loss: a small network that models the distribution of one vector, given what a transformer says of its
//! place (arXiv 2406.11838). It replaces the softmax over a codebook.

use super::diffusion::{Diffusion, NoiseSchedule, RowLosses};
use super::upload::upload_vectors;
use crate::Codes;
use crate::host;
use crate::sampling::{Respacing, Sampling, VectorDraws, guide};
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result, Rng, rng::Stream};
use smalti_kernels::{chunks, gated_residual, modulate, silu};
use smalti_nn::dense::{Dense, Pack, TokenNorm};
use smalti_nn::init::Init;
use smalti_nn::vit::xavier;
use std::ops::Range;

/// Epsilon of all norms.
const EPSILON: f64 = 1e-6;
/// Sines and cosines of a timestep.
const TIME: usize = 256;
/// So many rows make a matrix product worth reading the matrix.
const ROWS: usize = 512;

/// Settings of a [`Denoiser`] and its diffusion.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiffusionConfig {
    /// Channels of the network.
    pub width: usize,
    /// Its residual blocks.
    pub depth: usize,
    /// Steps of the diffusion in training.
    #[serde(default = "thousand")]
    pub steps: usize,
    /// How much noise they add.
    #[serde(default)]
    pub schedule: NoiseSchedule,
    /// Which of them generating takes, if it is not told others.
    #[serde(default = "hundred")]
    pub sampling_steps: Respacing,
    /// How generating takes a step.
    #[serde(default)]
    pub sampler: Sampler,
    /// Draws of timestep and noise for each token of a training step: the transformer's work counts so many times.
    #[serde(default = "four")]
    pub repeats: usize,
}

fn thousand() -> usize {
    1000
}

fn hundred() -> Respacing {
    Respacing::Sections(vec![100])
}

fn four() -> usize {
    4
}

/// How a reverse step is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Sampler {
    /// With the predicted variance (the official way).
    #[default]
    Ancestral,
    /// DDIM.
    Ddim {
        /// 0 takes steps without randomness, 1 with that of the diffusion.
        #[serde(default, serialize_with = "smalti_base::config::decimal")]
        eta: f32,
    },
}

impl DiffusionConfig {
    /// # Errors
    /// [`Error::Invalid`] for a number out of range.
    pub(super) fn check(&self, place: &str) -> Result<()> {
        let place = format!("{place}: diffusion");
        if [self.width, self.depth, self.repeats].contains(&0) || self.steps < 2 {
            let problem = "width, depth and repeats must be at least 1, steps at least 2";
            return Err(Error::invalid(place, problem));
        }
        if self.schedule.betas(self.steps).iter().any(|beta| *beta >= 1.0) {
            let problem = format!("{} steps are too few for this schedule: one of them leaves no signal", self.steps);
            return Err(Error::invalid(place, problem));
        }
        self.sampling_steps.timesteps(self.steps).map(drop)
    }

    /// The diffusion of training.
    pub fn diffusion(&self) -> Diffusion {
        Diffusion::new(self.schedule, self.steps)
    }

    /// A denoiser of vectors of `channels`, told of a place by `condition` numbers, with the official first values: in the
    /// beginning each block adds nothing and the output is 0.
    pub fn init(&self, channels: usize, condition: usize, device: &Device) -> Denoiser {
        let w = self.width;
        let dense = |inputs, outputs| Dense::new(inputs, outputs, xavier(inputs, outputs), device);
        let zero = |outputs| Dense::new(w, outputs, Init::Zeros, device);
        let time = |inputs| Dense::new(inputs, w, Init::Normal(0.02), device);
        let block = |_| DenoiserBlock {
            norm: TokenNorm::new(w, EPSILON, device),
            expand: dense(w, w),
            contract: dense(w, w),
            modulation: zero(3 * w),
        };
        Denoiser {
            time_expand: time(TIME),
            time_contract: time(w),
            condition: dense(condition, w),
            input: dense(channels, w),
            blocks: (0..self.depth).map(block).collect(),
            output_modulation: zero(2 * w),
            output: zero(2 * channels),
        }
    }
}

/// Predicts the noise in vectors, and the variance of a reverse step.
#[derive(Module, Debug)]
pub struct Denoiser {
    /// Sines and cosines of the timestep to the width.
    pub time_expand: Dense,
    /// After it, with `x * sigmoid(x)` between.
    pub time_contract: Dense,
    /// What is known of the place.
    pub condition: Dense,
    /// The noisy vector.
    pub input: Dense,
    /// Residual blocks.
    pub blocks: Vec<DenoiserBlock>,
    /// Shift and scale before the output.
    pub output_modulation: Dense,
    /// To the noise and the variance.
    pub output: Dense,
}

/// A residual block of a [`Denoiser`].
#[derive(Module, Debug)]
pub struct DenoiserBlock {
    /// Of the block's input.
    pub norm: TokenNorm,
    /// First layer.
    pub expand: Dense,
    /// Second layer, with `x * sigmoid(x)` before.
    pub contract: Dense,
    /// Shift, scale and gate, from timestep and condition.
    pub modulation: Dense,
}

impl DenoiserBlock {
    /// `parts` is what `modulation` makes of timestep and condition.
    fn forward(&self, x_1nw: Tensor<3>, parts: Tensor<3>) -> Tensor<3> {
        let [shift, scale, gate] = chunks(parts);
        let h = modulate(self.norm.forward(x_1nw.clone()), scale, shift);
        gated_residual(x_1nw, self.contract.forward(silu(self.expand.forward(h))), gate)
    }
}

/// The sines and cosines that stand for timesteps, `[n, 256]`: cosines of all frequencies, then sines.
pub fn timestep_table(t: &[usize], device: &Device) -> Tensor<2> {
    let half = TIME / 2;
    // In single precision as in the official code: for late timesteps rounding shows.
    let frequency = |i: usize| f64::from(-(10_000f64.ln() as f32) * i as f32 / half as f32).exp() as f32;
    let frequencies: Vec<f32> = (0..half).map(frequency).collect();
    let mut values = Vec::with_capacity(t.len() * TIME);
    for &t in t {
        values.extend(frequencies.iter().map(|frequency| (t as f32 * frequency).cos()));
        values.extend(frequencies.iter().map(|frequency| (t as f32 * frequency).sin()));
    }
    Tensor::from_data(TensorData::new(values, [t.len(), TIME]), device)
}

impl Denoiser {
    /// The output for noisy rows.
    ///
    /// # Shapes
    /// `noisy [n, c]` at timesteps `t` (n of them) and conditions `z [n, d]` to `[n, 2 c]`: noise, then variance. With fewer
    /// conditions, whose number divides n, they are repeated as often as it takes.
    pub fn forward(&self, noisy: Tensor<2>, t: &[usize], z: Tensor<2>) -> Tensor<2> {
        let device = noisy.device();
        // Rows share timesteps, so each is embedded once.
        let mut distinct = t.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        let index: Vec<i32> = t.iter().map(|t| distinct.partition_point(|d| d < t) as i32).collect();
        let index = Tensor::<1, Int>::from_data(TensorData::new(index, [t.len()]), &device);
        let repeats = t.len() / z.dims()[0].max(1);
        let condition = self.condition.forward(z.unsqueeze::<3>()).repeat_dim(1, repeats);
        let y = self.time(&distinct, &device).select(1, index) + condition;
        let y = silu(y);
        let x = self.run(self.input.forward(noisy.unsqueeze()), |_, layer| layer.forward(y.clone()));
        x.squeeze_dim(0)
    }

    /// Embedded timesteps `[1, n, w]`.
    fn time(&self, t: &[usize], device: &Device) -> Tensor<3> {
        let table = timestep_table(t, device).unsqueeze();
        self.time_contract.forward(silu(self.time_expand.forward(table)))
    }

    /// The layers that tell all others of timestep and condition, those of the blocks first.
    fn modulations(&self) -> impl Iterator<Item = &Dense> {
        self.blocks.iter().map(|block| &block.modulation).chain([&self.output_modulation])
    }

    /// All after the input layer, `[1, n, w]` to `[1, n, 2 c]`. `told` gives the output of each of [`Self::modulations`].
    fn run(&self, x_1nw: Tensor<3>, told: impl Fn(usize, &Dense) -> Tensor<3>) -> Tensor<3> {
        let blocks = self.blocks.iter().enumerate();
        let x = blocks.fold(x_1nw, |x, (i, block)| block.forward(x, told(i, &block.modulation)));
        let [shift, scale] = chunks(told(self.blocks.len(), &self.output_modulation));
        self.output.forward(smalti_kernels::modulated_layer_norm(x, scale, shift, EPSILON))
    }

    /// Losses of rows `[n, c]` with conditions as [`Self::forward`] takes them, at given timesteps with given noise `[n, c]`.
    pub fn losses(
        &self,
        diffusion: &Diffusion,
        rows: Tensor<2>,
        z: Tensor<2>,
        t: &[usize],
        noise: Tensor<2>,
    ) -> RowLosses {
        let noisy = diffusion.add_noise(rows.clone(), t, noise.clone());
        let output = self.forward(noisy.clone(), t, z);
        diffusion.losses(rows, noisy, t, noise, output)
    }

    /// The mean loss of rows `[n, c]` with conditions `[n, d]`, each as often as `t` and `noise` have draws for all.
    pub fn mean_loss(
        &self,
        diffusion: &Diffusion,
        rows: Tensor<2>,
        z: Tensor<2>,
        t: &[usize],
        noise: Tensor<2>,
    ) -> Tensor<1> {
        let repeats = t.len() / rows.dims()[0].max(1);
        let losses = self.losses(diffusion, rows.repeat_dim(0, repeats), z, t, noise);
        (losses.noise + losses.bound).mean()
    }
}

impl Pack for Denoiser {
    fn dense_layers(&mut self) -> Vec<&mut Dense> {
        let blocks = self.blocks.iter_mut();
        let inside = blocks.flat_map(|block| [&mut block.expand, &mut block.contract, &mut block.modulation]);
        let around = [
            &mut self.time_expand,
            &mut self.time_contract,
            &mut self.condition,
            &mut self.input,
            &mut self.output_modulation,
            &mut self.output,
        ];
        inside.chain(around).collect()
    }
}

/// Timesteps, and noise `[n, c]`, for `n` rows of `c` channels.
pub(super) type Trials = (Vec<usize>, Tensor<2>);

impl DiffusionConfig {
    /// Trials for `n` rows of `c` channels, from a stream.
    pub(super) fn trials(&self, n: usize, c: usize, stream: &mut Stream, device: &Device) -> Trials {
        let t = (0..n).map(|_| stream.below(self.steps)).collect();
        let noise: Vec<f32> = (0..n * c).map(|_| stream.normal()).collect();
        (t, Tensor::from_data(TensorData::new(noise, [n, c]), device))
    }

    /// The same trials for an image each time, from a stream of its own. `begin` draws what goes before them, and says how many
    /// rows the image has.
    pub(super) fn fixed_trials<T>(
        &self,
        images: Range<u64>,
        c: usize,
        device: &Device,
        begin: impl Fn(&mut Stream) -> (T, usize),
    ) -> (Vec<T>, Trials) {
        let (mut begun, mut times, mut noise) = (Vec::new(), Vec::new(), Vec::new());
        for image in images {
            let mut stream = Rng::new(0).stream(image, 0);
            let (first, n) = begin(&mut stream);
            let (t, values) = self.trials(n, c, &mut stream, device);
            begun.push(first);
            times.extend(t);
            noise.push(values);
        }
        let noise = if noise.is_empty() { Tensor::zeros([0, c], device) } else { Tensor::cat(noise, 0) };
        (begun, (times, noise))
    }
}

/// A place of an image in the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub image: usize,
    pub place: usize,
}

/// What drawing vectors takes, prepared once for a generation.
pub(super) struct Drawing {
    denoiser: Denoiser,
    diffusion: Diffusion,
    sampler: Sampler,
    /// Embedded timesteps, `[1, steps, w]`.
    time: Tensor<3>,
    temperature: f32,
}

impl Drawing {
    /// # Errors
    /// [`Error::Invalid`] if the sampling settings ask for more steps than there are.
    pub(super) fn new(
        denoiser: &Denoiser,
        config: &DiffusionConfig,
        sampling: &Sampling,
        device: &Device,
    ) -> Result<Self> {
        let respacing = sampling.diffusion_steps.as_ref().unwrap_or(&config.sampling_steps);
        let diffusion = config.diffusion().respaced(&respacing.timesteps(config.steps)?);
        let time = smalti_kernels::on_pool(device, || denoiser.time(&diffusion.timesteps, device));
        let (sampler, temperature) = (config.sampler, sampling.temperature);
        Ok(Self { denoiser: denoiser.clone(), diffusion, sampler, time, temperature })
    }

    /// Draws the vectors of places, `[n, c]` on the host.
    ///
    /// `z` has a row for each place, and with guidance below them as many without the condition. The unconditional half sees
    /// the same noisy vectors, so only its noise is predicted and its own way is never taken.
    pub(super) fn draw(
        &self,
        z: Tensor<2>,
        guidance: Option<f32>,
        places: &[Place],
        step: usize,
        draws: &mut dyn VectorDraws,
    ) -> Result<Vec<f32>> {
        let (n, c) = (places.len(), self.denoiser.input.weight.lazy_shape()[0]);
        let device = z.device();
        let mut noise = |moment: usize| {
            let mut values = vec![0.0; n * c];
            for (values, at) in values.chunks_exact_mut(c).zip(places) {
                draws.noise(at.image, step, at.place, moment, values);
            }
            Tensor::<2>::from_data(TensorData::new(values, [n, c]), &device)
        };
        let condition = self.denoiser.condition.forward(z.unsqueeze::<3>());
        let [_, rows, _] = condition.dims();
        let mut x = noise(0);
        let steps = self.diffusion.steps();
        // The timesteps whose modulations are computed at once: a few rows alone would wait for the matrices' memory.
        let together = (ROWS / rows.max(1)).max(1);
        let mut told = Vec::new();
        for t in (0..steps).rev() {
            let first = t - t % together;
            if told.is_empty() || t % together + 1 == together {
                told = self.told(condition.clone(), first..t + 1);
            }
            let told = |i: usize, _: &Dense| told[i].clone().narrow(1, (t - first) * rows, rows);
            let input = self.denoiser.input.forward(x.clone().unsqueeze::<3>());
            let output = match guidance {
                None => self.denoiser.run(input, told).squeeze_dim::<2>(0),
                Some(scale) => {
                    let both = self.denoiser.run(Tensor::cat(vec![input.clone(), input], 1), told).squeeze_dim::<2>(0);
                    let variance = both.clone().narrow(0, 0, n).narrow(1, c, c);
                    Tensor::cat(vec![guide(both.narrow(1, 0, c), scale), variance], 1)
                }
            };
            let found = self.diffusion.reverse(x.clone(), &[t], output);
            // The last step adds none.
            let step_noise = if t > 0 { noise(steps - t) } else { x.zeros_like() };
            x = match self.sampler {
                Sampler::Ancestral => self.diffusion.ancestral(found, t, step_noise, self.temperature),
                Sampler::Ddim { eta } => self.diffusion.ddim(x, found, t, step_noise, eta * self.temperature),
            };
        }
        host::floats(x)
    }

    /// What the layers are told at some timesteps, one after the other, for the embedded conditions `[1, n, w]`.
    fn told(&self, condition: Tensor<3>, steps: Range<usize>) -> Vec<Tensor<3>> {
        let ([_, n, w], count) = (condition.dims(), steps.len());
        let time = self.time.clone().narrow(1, steps.start, count).reshape([count, 1, w]);
        let y = silu((condition + time).reshape([1, count * n, w]));
        self.denoiser.modulations().map(|layer| layer.forward(y.clone())).collect()
    }
}

/// The vectors of images under way.
pub(super) struct Canvas {
    /// `length * channels` of each image, 0 where a token is not decided.
    values: Vec<Vec<f32>>,
    channels: usize,
    device: Device,
}

impl Canvas {
    /// What is known of each image, by places.
    pub(super) fn new(known: &[Vec<Option<Vec<f32>>>], channels: usize, device: &Device) -> Self {
        let token = |token: &Option<Vec<f32>>| token.clone().unwrap_or_else(|| vec![0.0; channels]);
        let values = known.iter().map(|places| places.iter().flat_map(token).collect()).collect();
        Self { values, channels, device: device.clone() }
    }

    /// Writes what was drawn for places.
    pub(super) fn put(&mut self, found: &[f32], places: &[Place]) {
        for (token, at) in found.chunks_exact(self.channels).zip(places) {
            self.values[at.image][at.place * self.channels..][..self.channels].copy_from_slice(token);
        }
    }

    /// All tokens of some images, `[b, length, c]`.
    pub(super) fn of(&self, images: &[usize]) -> Tensor<3> {
        let values: Vec<&[f32]> = images.iter().map(|image| self.values[*image].as_slice()).collect();
        upload_vectors(&values, self.channels, &self.device)
    }

    /// The tokens in these places of each image, `[b, n, c]`; as many of each.
    pub(super) fn at(&self, places: &[Vec<usize>]) -> Tensor<3> {
        let token = |image: usize, place: usize| &self.values[image][place * self.channels..][..self.channels];
        let values = places.iter().enumerate();
        let values =
            values.map(|(image, places)| places.iter().flat_map(|place| token(image, *place)).copied().collect());
        let values: Vec<Vec<f32>> = values.collect();
        upload_vectors(&values.iter().map(Vec::as_slice).collect::<Vec<_>>(), self.channels, &self.device)
    }

    pub(super) fn codes(&self) -> Codes {
        Codes::Continuous(self.of(&(0..self.values.len()).collect::<Vec<_>>()))
    }
}
