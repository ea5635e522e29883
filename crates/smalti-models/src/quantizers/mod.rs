//! Quantizers: latents to codes and back.
//!
//! All quantizers share one signature, and none changes itself in a forward pass: what a training step saw comes back as
//! [`Stats`] and is applied by an explicit [`QuantizerModel::update`] after the optimiser's step.

pub mod codebook;
pub mod fsq;
pub mod gumbel;
pub mod multi_scale;
pub mod remap;
pub mod usage;
pub mod vq;

pub use codebook::UpdateReport;
pub use fsq::{Fsq, FsqConfig};
pub use gumbel::{Gumbel, GumbelConfig};
pub use multi_scale::{MultiScale, MultiScaleConfig};
pub use remap::{Remap, RemapConfig};
pub use usage::Usage;
pub use vq::{Vq, VqConfig};

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Layout, Result, rng::Stream};

/// What a quantizer returns in training.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// Quantized latents `[b, c, h, w]`, with the gradient of the straight-through estimator or of the rotation trick.
    pub latents_bchw: Tensor<4>,
    /// Codes `[b, length]`, in the order of the layout.
    pub codes: Tensor<2, Int>,
    /// The quantizer's own loss, a tensor of one element: commitment and codebook terms, weighted. `None` if it has none.
    pub loss: Option<Tensor<1>>,
    /// What [`QuantizerModel::update`] needs, detached.
    pub stats: Stats,
}

/// What a training pass depends on beside its latents.
#[derive(Clone, Debug, Default)]
pub struct Pass {
    /// The training step, counted from 0.
    pub step: u64,
    /// The noise of a bottleneck that draws; without it the device's generator draws it. A KL autoencoder's is standard normal,
    /// of the latents' shape; a Gumbel quantizer's is standard Gumbel, `[b, codes, h, w]`.
    pub noise_bchw: Option<Tensor<4>>,
}

/// What a training batch did to the codebook, kept off the gradient tape.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// The latents as they met the codebook (after a projection or normalisation), `[n, c]`.
    pub latents_nc: Option<Tensor<2>>,
    /// The code of each, `[n]`.
    pub codes_n: Option<Tensor<1, Int>>,
}

/// Latents to codes and back.
pub trait Quantizer {
    /// Number of tokens.
    fn vocabulary(&self) -> usize;
    /// Channels of the latents that go in and come out.
    fn channels(&self) -> usize;
    /// Tokens `[b, length]` of latents `[b, c, h, w]`, in the order of the layout; see [`QuantizerConfig::layout`].
    fn encode(&self, latents_bchw: Tensor<4>) -> Tensor<2, Int>;
    /// Quantized latents `[b, c, h, w]` of tokens `[b, length]`, each in `0..vocabulary`.
    fn decode(&self, codes: Tensor<2, Int>, h: usize, w: usize) -> Tensor<4>;
    /// The training pass: differentiable quantized latents, codes, loss and statistics.
    fn train_forward(&self, latents_bchw: Tensor<4>) -> Quantized;
    /// [`Self::train_forward`] where the step or noise counts; most quantizers need neither.
    fn train_forward_with(&self, latents_bchw: Tensor<4>, _: Pass) -> Quantized {
        self.train_forward(latents_bchw)
    }
}

/// The quantizers by name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum QuantizerConfig {
    /// A table of code vectors.
    Vq(VqConfig),
    /// Finite scalar quantization.
    Fsq(FsqConfig),
    /// A table whose codes are drawn.
    Gumbel(GumbelConfig),
    /// Token maps of growing size.
    MultiScale(MultiScaleConfig),
}

impl QuantizerConfig {
    /// Makes the quantizer. Its first parameters are drawn here, from the device's generator.
    ///
    /// # Errors
    /// [`smalti_base::Error::Invalid`] if a setting is out of range.
    pub fn init(&self, device: &Device) -> Result<QuantizerModel> {
        Ok(match self {
            Self::Vq(config) => QuantizerModel::Vq(config.init(device)?),
            Self::Fsq(config) => QuantizerModel::Fsq(config.init(device)?),
            Self::Gumbel(config) => QuantizerModel::Gumbel(config.init(device)?),
            Self::MultiScale(config) => QuantizerModel::MultiScale(config.init(device)?),
        })
    }

    /// Number of tokens.
    pub fn vocabulary(&self) -> usize {
        match self {
            Self::Vq(config) => config.vocabulary(),
            Self::Fsq(config) => config.levels.iter().product(),
            Self::Gumbel(config) => config.codes,
            Self::MultiScale(config) => config.table.codes,
        }
    }

    /// Channels of the latents that go in and come out.
    pub fn channels(&self) -> usize {
        match self {
            Self::Vq(config) => config.channels,
            Self::Fsq(config) => config.channels,
            Self::Gumbel(config) => config.channels,
            Self::MultiScale(config) => config.table.channels,
        }
    }

    /// How the codes of latents of `h` rows and `w` columns are arranged.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the quantizer is for latents of another size.
    pub fn layout(&self, h: usize, w: usize) -> Result<Layout> {
        match self {
            Self::Vq(_) | Self::Fsq(_) | Self::Gumbel(_) => Ok(Layout::Grid { h, w }),
            Self::MultiScale(config) if config.levels.last() == Some(&(h, w)) => {
                Ok(Layout::Pyramid { levels: config.levels.clone() })
            }
            Self::MultiScale(config) => {
                let problem = format!("latents are {h}x{w}, but the last of the levels {:?} is not", config.levels);
                Err(Error::invalid("quantizer (multi_scale)", problem))
            }
        }
    }
}

/// A quantizer of any kind.
#[allow(clippy::large_enum_variant, reason = "a model has one or a few of them")]
#[derive(Module, Debug)]
pub enum QuantizerModel {
    /// A table of code vectors.
    Vq(Vq),
    /// Finite scalar quantization.
    Fsq(Fsq),
    /// A table whose codes are drawn.
    Gumbel(Gumbel),
    /// Token maps of growing size.
    MultiScale(MultiScale),
}

impl QuantizerModel {
    /// Applies what a training step did to the codebook: k-means start, moving averages, revival of dead codes. Call it once
    /// after each optimiser step, with random numbers named by that step.
    pub fn update(self, stats: &Stats, step: u64, rng: &mut Stream) -> (Self, UpdateReport) {
        match self {
            Self::Vq(vq) => {
                let (vq, report) = vq.update(stats, step, rng);
                (Self::Vq(vq), report)
            }
            Self::Fsq(_) | Self::Gumbel(_) => (self, UpdateReport::default()),
            Self::MultiScale(quantizer) => {
                let (quantizer, report) = quantizer.update(stats, step, rng);
                (Self::MultiScale(quantizer), report)
            }
        }
    }

    fn arm(&self) -> &dyn Quantizer {
        match self {
            Self::Vq(vq) => vq,
            Self::Fsq(fsq) => fsq,
            Self::Gumbel(gumbel) => gumbel,
            Self::MultiScale(quantizer) => quantizer,
        }
    }
}

impl Quantizer for QuantizerModel {
    fn vocabulary(&self) -> usize {
        self.arm().vocabulary()
    }

    fn channels(&self) -> usize {
        self.arm().channels()
    }

    fn encode(&self, latents_bchw: Tensor<4>) -> Tensor<2, Int> {
        self.arm().encode(latents_bchw)
    }

    fn decode(&self, codes: Tensor<2, Int>, h: usize, w: usize) -> Tensor<4> {
        self.arm().decode(codes, h, w)
    }

    fn train_forward(&self, latents_bchw: Tensor<4>) -> Quantized {
        self.arm().train_forward(latents_bchw)
    }

    fn train_forward_with(&self, latents_bchw: Tensor<4>, pass: Pass) -> Quantized {
        self.arm().train_forward_with(latents_bchw, pass)
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
