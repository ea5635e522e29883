//! Softmax and cross-entropy of rows of logits.

use super::simd::{LANES, exp, simd, sum};
use rayon::prelude::*;

/// What each row counts and hits.
#[derive(Debug, Clone)]
pub(crate) struct Rows {
    pub classes: usize,
    pub targets: Vec<i64>,
    /// Of each row, divided by their sum.
    pub weights: Vec<f32>,
    pub smoothing: f32,
}

/// The weighted mean of the losses, and of each row the logarithm of the sum of exponentials.
///
/// A target out of range makes the loss NaN.
pub(crate) fn forward(rows: &Rows, logits: &[f32]) -> (f32, Vec<f32>) {
    let losses: Vec<(f32, f32)> = logits
        .par_chunks_exact(rows.classes)
        .zip(&rows.targets)
        .map(|(logits, &target)| {
            let [log_sum, mean] = reduce(logits);
            let hit = usize::try_from(target).ok().and_then(|target| logits.get(target)).copied();
            let hit = hit.unwrap_or(f32::NAN);
            // Without smoothing, classes may be hidden by minus infinity, which is their mean then.
            let expected = if rows.smoothing == 0.0 { hit } else { hit + rows.smoothing * (mean - hit) };
            (log_sum - expected, log_sum)
        })
        .collect();
    // Rows without weight do not count, whatever their loss is.
    let counted = losses.iter().zip(&rows.weights).filter(|&(_, &weight)| weight != 0.0);
    let loss: f64 = counted.map(|(&(loss, _), &weight)| f64::from(loss) * f64::from(weight)).sum();
    (loss as f32, losses.into_iter().map(|(_, log_sum)| log_sum).collect())
}

/// Turns logits into their gradient for the gradient `upstream` of the loss.
pub(crate) fn backward(rows: &Rows, logits: &mut [f32], log_sums: &[f32], upstream: f32) {
    let inputs = log_sums.par_iter().zip(&rows.targets).zip(&rows.weights);
    logits.par_chunks_exact_mut(rows.classes).zip(inputs).for_each(|(values, ((&log_sum, &target), &weight))| {
        let scale = weight * upstream;
        differentiate(values, log_sum, scale, scale * rows.smoothing / rows.classes as f32);
        if let Some(hit) = usize::try_from(target).ok().and_then(|target| values.get_mut(target)) {
            *hit -= scale * (1.0 - rows.smoothing);
        }
    });
}

simd! {
    /// The logarithm of the sum of exponentials, and the mean.
    fn reduce(logits: &[f32]) -> [f32; 2] {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for chunk in logits.chunks(LANES) {
            for (lane, &value) in lanes.iter_mut().zip(chunk) {
                *lane = if value > *lane { value } else { *lane };
            }
        }
        let largest = lanes.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        // Below -87 the own `exp` is a tiny number instead of zero, which vanishes beside the 1 of the largest.
        let total = sum(logits, |value| exp(value - largest));
        [largest + total.ln(), sum(logits, |value| value) / logits.len() as f32]
    }
}

simd! {
    /// Turns logits into `scale * softmax - even`.
    fn differentiate(values: &mut [f32], log_sum: f32, scale: f32, even: f32) {
        for value in values {
            *value = exp(*value - log_sum) * scale - even;
        }
    }
}
