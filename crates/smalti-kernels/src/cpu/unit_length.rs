//! Rows scaled to unit length.

use super::buffer::written;
use super::simd::{LANES, simd, sum};
use crate::unit_length::LEAST;
use rayon::prelude::*;

/// Values that are worth a task.
const TASK: usize = 1 << 14;

/// The scaled rows, and what each was multiplied with before its factor. Row `i` has the factor `i` modulo their number.
pub(crate) fn forward(x: &[f32], width: usize, factors: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let rows = rows_of_task(width, factors);
    let mut inverses = vec![0.0; x.len() / width];
    let fill = |y: &mut [f32]| {
        let inputs = x.par_chunks(rows * width).zip(inverses.par_chunks_mut(rows));
        y.par_chunks_mut(rows * width).zip(inputs).for_each(|(y, (x, inverses))| {
            let rows = y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(inverses);
            for (((y, x), inverse), &factor) in rows.zip(factors.iter().cycle()) {
                *inverse = scale(x, factor, y);
            }
        });
    };
    // SAFETY: `x` is made of whole rows, and `scale` writes each value of a row.
    let y = unsafe { written(x.len(), fill) };
    (y, inverses)
}

/// Gradients of rows and factors for the gradient `dy` of the result.
pub(crate) fn backward(x: &[f32], width: usize, factors: &[f32], inverses: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let rows = rows_of_task(width, factors);
    // Each task adds up in the order of its rows, whatever the number of threads.
    let mut parts = vec![0.0; inverses.len().div_ceil(rows) * factors.len()];
    let fill = |dx: &mut [f32]| {
        let inputs = x.par_chunks(rows * width).zip(dy.par_chunks(rows * width)).zip(inverses.par_chunks(rows));
        let outputs = dx.par_chunks_mut(rows * width).zip(parts.par_chunks_mut(factors.len()));
        outputs.zip(inputs).for_each(|((dx, sums), ((x, dy), inverses))| {
            let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(dy.chunks_exact(width));
            for (i, (((dx, x), dy), &inverse)) in rows.zip(inverses).enumerate() {
                let head = i % factors.len();
                sums[head] += differentiate(x, factors[head], inverse, dy, dx);
            }
        });
    };
    // SAFETY: `x` is made of whole rows, and `differentiate` writes each value of a row.
    let dx = unsafe { written(x.len(), fill) };
    let mut dfactors = vec![0.0; factors.len()];
    for part in parts.chunks_exact(factors.len()) {
        dfactors.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
    }
    (dx, dfactors)
}

/// A multiple of the factors.
fn rows_of_task(width: usize, factors: &[f32]) -> usize {
    (TASK / width / factors.len()).max(1) * factors.len()
}

simd! {
    fn scale(x: &[f32], factor: f32, y: &mut [f32]) -> f32 {
        let square = sum(x, |x| x * x);
        let inverse = 1.0 / square.max(LEAST).sqrt();
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x * inverse * factor;
        }
        inverse
    }
}

simd! {
    /// Writes `dx`; returns the factor's gradient.
    fn differentiate(x: &[f32], factor: f32, inverse: f32, dy: &[f32], dx: &mut [f32]) -> f32 {
        let mut lanes = [0.0; LANES];
        for (x, dy) in x.chunks(LANES).zip(dy.chunks(LANES)) {
            for l in 0..x.len().min(LANES) {
                lanes[l] += x[l] * dy[l];
            }
        }
        let along = lanes.iter().sum::<f32>() * inverse;
        // The length of vectors that are all but zero is a constant.
        let pull = if inverse * inverse * LEAST < 1.0 { along * inverse } else { 0.0 };
        for ((dx, &x), &dy) in dx.iter_mut().zip(x).zip(dy) {
            *dx = factor * inverse * (dy - x * pull);
        }
        along
    }
}
