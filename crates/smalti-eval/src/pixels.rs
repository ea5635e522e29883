//! Differences pixel by pixel.

use crate::Pair;

/// Mean squared difference, in squared units of the pixels.
pub fn mse(pair: Pair<'_>) -> f64 {
    mean(pair, |difference| difference * difference)
}

/// Mean absolute difference, in units of the pixels.
pub fn l1(pair: Pair<'_>) -> f64 {
    mean(pair, f64::abs)
}

/// Peak signal-to-noise ratio in decibels; `range` is the distance between black and white (255 or 1). Infinite for equal
/// images.
pub fn psnr(pair: Pair<'_>, range: f64) -> f64 {
    10.0 * (range * range / mse(pair)).log10()
}

fn mean(pair: Pair<'_>, of: impl Fn(f64) -> f64) -> f64 {
    let sum: f64 = pair.left.iter().zip(pair.right).map(|(l, r)| of(f64::from(*l) - f64::from(*r))).sum();
    sum / pair.left.len() as f64
}
