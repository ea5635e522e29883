//! All metrics of a reconstruction.

use crate::{Pair, l1, mse, psnr, ssim};
use serde::Serialize;
use smalti_base::Result;

/// How near a reconstruction is to its image. L1 and MSE are for pixels in 0..1, whatever the range of the pair.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Scores {
    /// Peak signal-to-noise ratio in decibels. Infinite for equal images, which JSON shows as null.
    pub psnr: f64,
    /// Structural similarity, 1 for equal images.
    pub ssim: f64,
    /// Mean absolute difference.
    pub l1: f64,
    /// Mean squared difference.
    pub mse: f64,
}

impl Scores {
    /// The scores of one image.
    ///
    /// # Errors
    /// As [`ssim`].
    pub fn of(pair: Pair<'_>, range: f64) -> Result<Self> {
        Ok(Self {
            psnr: psnr(pair, range),
            ssim: ssim(pair, range)?,
            l1: l1(pair) / range,
            mse: mse(pair) / (range * range),
        })
    }

    /// The mean of each score over images, `None` if there is none.
    pub fn mean(all: &[Self]) -> Option<Self> {
        let n = all.len() as f64;
        let mean = |of: fn(&Self) -> f64| all.iter().map(of).sum::<f64>() / n;
        (!all.is_empty()).then(|| Self {
            psnr: mean(|s| s.psnr),
            ssim: mean(|s| s.ssim),
            l1: mean(|s| s.l1),
            mse: mean(|s| s.mse),
        })
    }
}
