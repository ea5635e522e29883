//! The sum of squares.

use super::simd::simd;
use rayon::prelude::*;

/// Values of a partial sum, whatever the number of threads.
const TASK: usize = 1 << 15;

/// Sums of up to 32768 squares in `f32`, added up in `f64`.
pub(crate) fn sum_of_squares(values: &[f32]) -> f32 {
    let parts: Vec<f32> = values.par_chunks(TASK).map(part).collect();
    parts.into_iter().map(f64::from).sum::<f64>() as f32
}

simd! {
    fn part(values: &[f32]) -> f32 {
        super::simd::sum(values, |value| value * value)
    }
}
