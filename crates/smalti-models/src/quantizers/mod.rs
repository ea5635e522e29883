//! Quantizers: latents to codes and back.
//!
//! All quantizers share one signature, and none changes itself in a forward pass: what a training step saw comes back as
//! [`Stats`] and is applied by an explicit [`Quantizer::update`] after the optimiser's step.

pub mod codebook;
pub mod fsq;
pub mod gumbel;
pub mod multi_scale;
pub mod remap;
pub mod residual;
pub mod usage;
pub mod vq;

pub use codebook::UpdateReport;
pub use fsq::{Fsq, FsqConfig};
pub use gumbel::{Gumbel, GumbelConfig};
pub use multi_scale::{MultiScale, MultiScaleConfig};
pub use remap::{Remap, RemapConfig};
pub use residual::{Residual, ResidualConfig};
pub use usage::Usage;
pub use vq::{Vq, VqConfig};

use crate::Codes;
use crate::losses::LossTerm;
use crate::role::role;
use burn::tensor::{Int, Tensor};
use smalti_base::{Error, Layout, Result, Vocabulary, rng::Stream};

role! {
    /// The quantizers by name.
    QuantizerConfig: QuantizerSettings;
    /// A quantizer of any kind.
    QuantizerModel: Quantizer;
    /// What there is.
    SYSTEMS: Quantizer;
    /// A table of code vectors.
    "vq" => Vq(VqConfig),
    /// Finite scalar quantization.
    "fsq" => Fsq(FsqConfig),
    /// A table whose codes are drawn.
    "gumbel" => Gumbel(GumbelConfig),
    /// Token maps of growing size.
    "multi_scale" => MultiScale(MultiScaleConfig),
    /// Several codes for each place.
    "residual" => Residual(ResidualConfig),
}

/// What is known of a quantizer before it has weights.
pub trait QuantizerSettings {
    /// Number of codes: one number, or one for each level or depth.
    fn vocabulary(&self) -> Vocabulary;

    /// Channels of the latents that go in and come out.
    fn channels(&self) -> usize;

    /// How the codes of latents of `h` rows and `w` columns are arranged.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the quantizer is for latents of another size.
    fn layout(&self, h: usize, w: usize) -> Result<Layout> {
        Ok(Layout::Grid { h, w })
    }

    /// The rules file that exports a convolutional autoencoder around it, if the official layout can hold it.
    fn official(&self) -> Option<&'static str> {
        None
    }
}

/// What a quantizer returns in training.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// Quantized latents `[b, c, h, w]`, with the gradient of the straight-through estimator or of the rotation trick.
    pub latents_bchw: Tensor<4>,
    /// Codes `[b, length]`, in the order of the layout.
    pub codes: Tensor<2, Int>,
    /// The quantizer's own loss terms, such as commitment.
    pub terms: Vec<LossTerm>,
    /// What [`Quantizer::update`] needs, detached.
    pub stats: Stats,
}

impl Quantized {
    /// The sum of the terms at their usual weights, one element; none if there are no terms.
    pub fn loss(&self) -> Option<Tensor<1>> {
        self.terms.iter().map(|term| term.value.clone() * term.weight).reduce(|a, b| a + b)
    }
}

/// What a training pass depends on beside its images.
#[derive(Clone, Debug, Default)]
pub struct Pass {
    /// The training step, counted from 0.
    pub step: u64,
    /// The noise of a bottleneck that draws; without it the device's generator draws it. A KL autoencoder's is standard normal,
    /// of the latents' shape; a Gumbel quantizer's is standard Gumbel, `[b, codes, h, w]`.
    pub noise_bchw: Option<Tensor<4>>,
    /// The stream that the update after this step will draw from, for quantizers whose table moves within the pass.
    pub stream: Option<Stream>,
}

impl Pass {
    /// A pass at a step, counted from 0, with noise from the device's generator.
    pub fn at(step: u64) -> Self {
        Self { step, ..Self::default() }
    }
}

/// What a training batch did to codebooks, kept off the gradient tape: a part for each update, in the order in which they happen.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// The parts.
    pub parts: Vec<CodebookStats>,
}

/// What an update of a table needs.
#[derive(Clone, Debug)]
pub struct CodebookStats {
    /// The latents as they met the table (after a projection or normalisation), `[n, c]`.
    pub latents_nc: Tensor<2>,
    /// The code of each, `[n]`.
    pub codes_n: Tensor<1, Int>,
}

impl Stats {
    /// One update.
    pub fn one(latents_nc: Tensor<2>, codes_n: Tensor<1, Int>) -> Self {
        Self { parts: vec![CodebookStats { latents_nc, codes_n }] }
    }

    /// The statistics of two micro-batches, part by part.
    pub fn merge(self, other: Self) -> Self {
        if self.parts.is_empty() {
            return other;
        }
        let joined = self.parts.into_iter().zip(other.parts).map(|(a, b)| CodebookStats {
            latents_nc: Tensor::cat(vec![a.latents_nc, b.latents_nc], 0),
            codes_n: Tensor::cat(vec![a.codes_n, b.codes_n], 0),
        });
        Self { parts: joined.collect() }
    }
}

/// Latents to codes and back.
pub trait Quantizer: Send + Sync {
    /// Number of codes: one number, or one for each level or depth.
    fn vocabulary(&self) -> Vocabulary;

    /// Channels of the latents that go in and come out.
    fn channels(&self) -> usize;

    /// Codes `[b, length]` of latents `[b, c, h, w]`, in the order of the layout; see [`QuantizerSettings::layout`].
    fn encode(&self, latents_bchw: Tensor<4>) -> Tensor<2, Int>;

    /// Quantized latents `[b, c, h, w]` of codes `[b, length]`, each within the vocabulary; `h` and `w` are those of the layout's finest
    /// level.
    fn decode(&self, codes: Tensor<2, Int>, h: usize, w: usize) -> Tensor<4>;

    /// The training pass: differentiable quantized latents, codes, loss terms and statistics.
    fn train_forward(&self, latents_bchw: Tensor<4>, pass: &Pass) -> Quantized;

    /// [`Self::decode`] of the first `parts` levels or depths alone.
    ///
    /// # Errors
    /// [`Error::Unsupported`] by a quantizer whose codes have one part, [`Error::Invalid`] for another number of parts.
    fn decode_prefix(&self, _codes: Tensor<2, Int>, _h: usize, _w: usize, _parts: usize) -> Result<Tensor<4>> {
        Err(Error::unsupported("decoding a part of the codes", "only codes in levels or depths can be decoded in part"))
    }

    /// [`Codes::Soft`]: the distribution over the codes at each place, which falls with the distance at this temperature, and a code
    /// drawn from it, or the nearest code without a stream.
    ///
    /// # Errors
    /// [`Error::Unsupported`] by a quantizer that has none.
    fn soft_codes(&self, _latents_bchw: Tensor<4>, _temperature: f64, _draw: Option<&mut Stream>) -> Result<Codes> {
        Err(Error::unsupported("soft codes of this quantizer", "train the generator on codes as they are"))
    }

    /// Applies what a training step did to the codebook: k-means start, moving averages, revival of dead codes. Call it once
    /// after each optimiser step, with random numbers named by that step.
    fn update(&mut self, _stats: &Stats, _step: u64, _stream: &mut Stream) -> UpdateReport {
        UpdateReport::default()
    }
}

/// # Errors
/// [`Error::Invalid`] unless there are so many parts.
pub(crate) fn check_parts(parts: usize, most: usize) -> Result<()> {
    match (1..=most).contains(&parts) {
        true => Ok(()),
        false => Err(Error::invalid("parts of the codes", format!("{parts} is not in 1..={most}"))),
    }
}

/// Latents `[b, c, h, w]` as rows `[b * h * w, c]` in raster order.
pub(crate) fn to_rows(latents_bchw: Tensor<4>) -> Tensor<2> {
    let [b, c, h, w] = latents_bchw.dims();
    latents_bchw.permute([0, 2, 3, 1]).reshape([b * h * w, c])
}

/// Rows `[b * h * w, c]` as latents `[b, c, h, w]`.
pub(crate) fn from_rows(rows_nc: Tensor<2>, b: usize, h: usize, w: usize) -> Tensor<4> {
    let [_, c] = rows_nc.dims();
    rows_nc.reshape([b, h, w, c]).permute([0, 3, 1, 2])
}
