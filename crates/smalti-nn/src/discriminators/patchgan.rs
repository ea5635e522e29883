//! The patch discriminator of pix2pix (arXiv 1611.07004), as used by VQGAN: it judges overlapping patches, not whole images.

use crate::{BatchStatistics, Conv};
use burn::module::Module;
use burn::tensor::{Device, Tensor, activation::leaky_relu};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result};

/// Settings of a [`PatchGan`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PatchGanConfig {
    /// Channels of the images.
    pub in_channels: usize,
    /// Channels after the first convolution.
    pub ndf: usize,
    /// Convolutions with stride 2. With 3 a patch is 70 pixels wide, with 2 it is 34.
    pub layers: usize,
}

impl Default for PatchGanConfig {
    fn default() -> Self {
        Self { in_channels: 3, ndf: 64, layers: 3 }
    }
}

impl PatchGanConfig {
    /// The smallest side of an image that leaves a patch.
    pub fn smallest_image(&self) -> usize {
        // Two convolutions with stride 1 take one pixel each.
        3usize.checked_shl(self.layers as u32).unwrap_or(usize::MAX)
    }

    /// A discriminator with fresh weights: convolutions normal with deviation 0.02, normalisations 1 + normal.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a number is 0.
    pub fn init(&self, device: &Device) -> Result<PatchGan> {
        if self.in_channels == 0 || self.ndf == 0 || self.layers == 0 {
            return Err(Error::invalid(
                "discriminator",
                format!("in_channels, ndf and layers must be at least 1, but are {self:?}"),
            ));
        }
        let width = |n: usize| self.ndf * (1usize << n.min(3));
        let conv = |inputs, outputs, stride| {
            Conv::new(inputs, outputs, 4, device)
                .with_stride(stride)
                .with_padding([1; 4])
                .with_normal_weight(DEVIATION, device)
        };
        let stages = (1..=self.layers).map(|n| PatchStage {
            conv: conv(width(n - 1), width(n), if n < self.layers { 2 } else { 1 }).without_bias(),
            norm: BatchStatistics::new(width(n), DEVIATION, device),
        });
        Ok(PatchGan {
            conv_in: conv(self.in_channels, self.ndf, 2),
            stages: stages.collect(),
            conv_out: conv(width(self.layers), 1, 1),
        })
    }
}

const DEVIATION: f64 = 0.02;
const SLOPE: f64 = 0.2;

/// A patch discriminator. In official checkpoints its layers are numbered: `main.0` is `conv_in`, `main.{3n + 2}` and
/// `main.{3n + 3}` are the n-th stage's convolution and norm, the last is `conv_out`.
#[derive(Module, Debug)]
pub struct PatchGan {
    /// First convolution.
    pub conv_in: Conv,
    /// Convolutions with batch normalisation.
    pub stages: Vec<PatchStage>,
    /// To one channel.
    pub conv_out: Conv,
}

/// A convolution without bias and its batch normalisation.
#[derive(Module, Debug)]
pub struct PatchStage {
    /// 4x4 convolution.
    pub conv: Conv,
    /// Normalises over the batch.
    pub norm: BatchStatistics,
}

impl PatchGan {
    /// One logit per patch `[b, 1, h', w']` of images `[b, c, h, w]` in -1..1; higher means more real. On an autodiff
    /// device the batch is normalised by itself and the running statistics move.
    pub fn forward(&self, images_bchw: Tensor<4>) -> Tensor<4> {
        let mut x = leaky_relu(self.conv_in.forward(images_bchw), SLOPE);
        for stage in &self.stages {
            x = leaky_relu(stage.norm.forward(stage.conv.forward(x)), SLOPE);
        }
        self.conv_out.forward(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::Module;

    #[test]
    fn the_smallest_image_leaves_one_patch() {
        let device = Device::flex();
        for layers in 1..=3 {
            let config = PatchGanConfig { in_channels: 3, ndf: 2, layers };
            let side = config.smallest_image();
            let logits = config.init(&device).unwrap().forward(Tensor::zeros([1, 3, side, side], &device));
            assert_eq!(logits.dims(), [1, 1, 1, 1], "{layers} layers");
        }
        assert!(PatchGanConfig { ndf: 0, ..Default::default() }.init(&device).is_err());
    }

    /// After one batch the running statistics are a tenth of the batch's, and a saved copy has them.
    #[test]
    fn running_statistics_follow_the_batch_at_once() {
        let device = Device::flex().autodiff();
        let norm = BatchStatistics::new(1, 0.0, &device);
        let x = Tensor::<1>::from_floats([1.0, 2.0, 3.0, 6.0], &device).reshape([1, 1, 2, 2]);
        let _ = norm.forward(x);
        let copy = norm.valid();
        let value = |t: Tensor<1>| t.into_scalar::<f32>();
        assert!((value(copy.running_mean.value()) - 0.1 * 3.0).abs() < 1e-6);
        // Unbiased variance of the batch: 14 / 3.
        assert!((value(norm.running_var.value()) - (0.9 + 0.1 * 14.0 / 3.0)).abs() < 1e-6);
    }
}
