//! The discriminators of adversarial training.

use burn::module::Module;
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result};
use smalti_nn::{PatchGan, StyleGan, StyleGanConfig};

/// Which network tells images from reconstructions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum DiscriminatorConfig {
    /// The patch discriminator of VQGAN, of `ndf` channels and `layers` halvings.
    #[default]
    Patch,
    /// StyleGAN2's discriminator, of ViT-VQGAN's public code.
    Stylegan(StyleDiscriminatorConfig),
}

/// Settings of StyleGAN2's discriminator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StyleDiscriminatorConfig {
    /// A map with a side of `n` pixels has `capacity / n` channels.
    #[serde(default = "capacity")]
    pub capacity: usize,
    /// Most channels of a map.
    #[serde(default = "max_channels")]
    pub max_channels: usize,
    /// Weight of the R1 penalty: half of it times the squared length of the logits' gradient with respect to an image in
    /// 0..1. With 0 there is none.
    #[serde(default = "r1")]
    pub r1: f64,
    /// The penalty counts every so many steps, and then as many times as much.
    #[serde(default = "r1_every")]
    pub r1_every: u64,
}

fn capacity() -> usize {
    StyleGanConfig::new(256).capacity
}

fn max_channels() -> usize {
    StyleGanConfig::new(256).max_channels
}

fn r1() -> f64 {
    10.0
}

fn r1_every() -> u64 {
    16
}

impl Default for StyleDiscriminatorConfig {
    /// The numbers of ViT-VQGAN's public code.
    fn default() -> Self {
        Self { capacity: capacity(), max_channels: max_channels(), r1: r1(), r1_every: r1_every() }
    }
}

impl StyleDiscriminatorConfig {
    /// The network for square images of this side and number of channels.
    pub fn network(&self, image_size: usize, channels: usize) -> StyleGanConfig {
        StyleGanConfig { in_channels: channels, image_size, capacity: self.capacity, max_channels: self.max_channels }
    }

    /// # Errors
    /// [`Error::Invalid`] if images of this size or the numbers make no network.
    pub fn check(&self, (height, width): (usize, usize)) -> Result<()> {
        if height != width {
            let problem = format!("images must be square, not of {height}x{width} pixels");
            return Err(Error::invalid("discriminator (stylegan)", problem));
        }
        if !(self.r1.is_finite() && self.r1 >= 0.0 && self.r1_every > 0) {
            let problem = format!("r1 is {}, r1_every {}: expected at least 0 and 1", self.r1, self.r1_every);
            return Err(Error::invalid("discriminator (stylegan)", problem));
        }
        self.network(height, 1).check()
    }

    /// What the penalty is multiplied with at a step, if it counts there.
    pub fn penalty_weight(&self, step: u64) -> Option<f64> {
        let counts = self.r1 > 0.0 && step.is_multiple_of(self.r1_every);
        counts.then_some(self.r1 * self.r1_every as f64 / 2.0)
    }
}

/// A network that tells images from reconstructions.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "a training run holds one of them")]
pub enum Discriminator {
    /// Judges overlapping patches.
    Patch(PatchGan),
    /// Judges whole images.
    Style(StyleGan),
}

impl Discriminator {
    /// Logits of images `[b, 3, h, w]` in -1..1, higher for more real: `[b, 1, h', w']` of patches, `[b, 1, 1, 1]` of
    /// whole images.
    pub fn forward(&self, images_bchw: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Patch(network) => network.forward(images_bchw),
            Self::Style(network) => network.forward(unit(images_bchw)),
        }
    }

    /// R1 of images `[b, 3, h, w]` in -1..1: the squared length of the logits' gradient with respect to an image in 0..1,
    /// mean over images. The patch discriminator has none.
    pub fn gradient_penalty(&self, images_bchw: Tensor<4>) -> Option<Tensor<1>> {
        match self {
            Self::Patch(_) => None,
            Self::Style(network) => Some(network.gradient_penalty(unit(images_bchw))),
        }
    }
}

impl From<PatchGan> for Discriminator {
    fn from(network: PatchGan) -> Self {
        Self::Patch(network)
    }
}

impl From<StyleGan> for Discriminator {
    fn from(network: StyleGan) -> Self {
        Self::Style(network)
    }
}

/// Values in -1..1 as values in 0..1.
fn unit(images_bchw: Tensor<4>) -> Tensor<4> {
    (images_bchw + 1.0) * 0.5
}
