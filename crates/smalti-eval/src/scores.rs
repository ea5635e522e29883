//! All metrics of a reconstruction.

use crate::{Pair, l1, mse, psnr, ssim};
use serde::Serialize;

/// How near a reconstruction is to its image. L1 and MSE are for pixels in 0..1, whatever the range of the pair.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Scores {
    /// Peak signal-to-noise ratio in decibels. Infinite for equal images, which JSON shows as null.
    pub psnr: f64,
    /// Structural similarity, 1 for equal images; none if it was not asked for or the image is smaller than its window.
    pub ssim: Option<f64>,
    /// Mean absolute difference.
    pub l1: f64,
    /// Mean squared difference.
    pub mse: f64,
}

impl Scores {
    /// The scores of one image; `range` is the distance between black and white.
    pub fn of(pair: Pair<'_>, range: f64) -> Self {
        Self { ssim: ssim(pair, range).ok(), ..Self::without_ssim(pair, range) }
    }

    /// The same without the SSIM.
    pub fn without_ssim(pair: Pair<'_>, range: f64) -> Self {
        Self { psnr: psnr(pair, range), ssim: None, l1: l1(pair) / range, mse: mse(pair) / (range * range) }
    }

    /// The mean of each score over the images that have it; not a number without images.
    pub fn mean(all: &[Self]) -> Self {
        let mean = |of: fn(&Self) -> f64| all.iter().map(of).sum::<f64>() / all.len() as f64;
        let ssims: Vec<f64> = all.iter().filter_map(|scores| scores.ssim).collect();
        let ssim = (!ssims.is_empty()).then(|| ssims.iter().sum::<f64>() / ssims.len() as f64);
        Self { psnr: mean(|s| s.psnr), ssim, l1: mean(|s| s.l1), mse: mean(|s| s.mse) }
    }
}
