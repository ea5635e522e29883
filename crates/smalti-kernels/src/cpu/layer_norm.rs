//! Layer normalisation of rows.

use super::buffer::written;
use super::group_norm::measure;
use super::simd::{LANES, simd};
use rayon::prelude::*;

/// Values that are worth a task.
const TASK: usize = 1 << 14;

/// Gradients of the three inputs.
pub(crate) struct Gradients {
    pub x: Vec<f32>,
    pub gamma: Vec<f32>,
    pub beta: Vec<f32>,
}

/// The result, and for each row the mean and the inverse deviation. A row has `width` values; `gamma` and `beta` have as many for
/// each of some groups, and a group is the same number of rows.
pub(crate) fn forward(x: &[f32], width: usize, gamma: &[f32], beta: &[f32], epsilon: f32) -> (Vec<f32>, Vec<[f32; 2]>) {
    let rows = (TASK / width).max(1);
    let per_group = rows_of_group(x.len(), width, gamma.len());
    let mut moments = vec![[0.0; 2]; x.len() / width];
    let fill = |y: &mut [f32]| {
        let inputs = x.par_chunks(rows * width).zip(moments.par_chunks_mut(rows));
        y.par_chunks_mut(rows * width).zip(inputs).enumerate().for_each(|(task, (y, (x, moments)))| {
            for (i, ((y, x), moments)) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(moments).enumerate()
            {
                let group = (task * rows + i) / per_group * width;
                *moments = measure(x, epsilon);
                normalize(*moments, &gamma[group..][..width], &beta[group..][..width], x, y);
            }
        });
    };
    // SAFETY: `x` is made of whole rows, and `normalize` writes each value of a row.
    let y = unsafe { written(x.len(), fill) };
    (y, moments)
}

/// Gradients for the gradient `dy` of the result.
pub(crate) fn backward(x: &[f32], width: usize, gamma: &[f32], moments: &[[f32; 2]], dy: &[f32]) -> Gradients {
    let per_group = rows_of_group(x.len(), width, gamma.len());
    // Sums of so many rows are added up in their order, whatever the number of threads.
    let rows = (4 * TASK / width).max(1).min(per_group);
    let tasks = per_group.div_ceil(rows);
    let mut parts = vec![0.0; gamma.len() / width * tasks * 2 * width];
    let fill = |dx: &mut [f32]| {
        let inputs = x.par_chunks(per_group * width).zip(dy.par_chunks(per_group * width));
        let inputs = inputs.zip(moments.par_chunks(per_group)).zip(gamma.par_chunks(width));
        let outputs = dx.par_chunks_mut(per_group * width).zip(parts.par_chunks_mut(tasks * 2 * width));
        outputs.zip(inputs).for_each(|((dx, parts), (((x, dy), moments), gamma))| {
            let inputs = x.par_chunks(rows * width).zip(dy.par_chunks(rows * width)).zip(moments.par_chunks(rows));
            let outputs = dx.par_chunks_mut(rows * width).zip(parts.par_chunks_exact_mut(2 * width));
            outputs.zip(inputs).for_each(|((dx, parts), ((x, dy), moments))| {
                let (dgamma, dbeta) = parts.split_at_mut(width);
                let rows = x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
                for (((x, dy), dx), &moments) in rows.zip(moments) {
                    differentiate(moments, gamma, x, dy, dx, dgamma, dbeta);
                }
            });
        });
    };
    // SAFETY: `x` is made of whole groups of whole rows, and `differentiate` writes each value of a row.
    let dx = unsafe { written(x.len(), fill) };
    let mut gradients = Gradients { x: dx, gamma: vec![0.0; gamma.len()], beta: vec![0.0; gamma.len()] };
    let sums = gradients.gamma.chunks_exact_mut(width).zip(gradients.beta.chunks_exact_mut(width));
    for ((gamma, beta), parts) in sums.zip(parts.chunks_exact(tasks * 2 * width)) {
        for part in parts.chunks_exact(2 * width) {
            gamma.iter_mut().zip(&part[..width]).for_each(|(sum, value)| *sum += value);
            beta.iter_mut().zip(&part[width..]).for_each(|(sum, value)| *sum += value);
        }
    }
    gradients
}

/// Rows of each of the groups that have `scales` values together; at least 1.
fn rows_of_group(values: usize, width: usize, scales: usize) -> usize {
    let (rows, groups) = (values / width, scales / width);
    assert!(groups > 0 && groups * width == scales && rows % groups == 0, "{rows} rows in {groups} groups");
    (rows / groups).max(1)
}

simd! {
    fn normalize(moments: [f32; 2], gamma: &[f32], beta: &[f32], x: &[f32], y: &mut [f32]) {
        let [mean, inverse] = moments;
        for (((y, &x), &gamma), &beta) in y.iter_mut().zip(x).zip(gamma).zip(beta) {
            *y = (x - mean) * inverse * gamma + beta;
        }
    }
}

simd! {
    /// One row: writes `dx`, adds to `dgamma` and `dbeta`.
    fn differentiate(
        moments: [f32; 2],
        gamma: &[f32],
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        dgamma: &mut [f32],
        dbeta: &mut [f32],
    ) {
        let [mean, inverse] = moments;
        let mut lanes = [[0.0; LANES]; 2];
        let chunks = x.chunks(LANES).zip(dy.chunks(LANES)).zip(gamma.chunks(LANES));
        let sums = dgamma.chunks_mut(LANES).zip(dbeta.chunks_mut(LANES));
        for (((x, dy), gamma), (dgamma, dbeta)) in chunks.zip(sums) {
            for l in 0..x.len().min(LANES) {
                let normal = (x[l] - mean) * inverse;
                dgamma[l] += dy[l] * normal;
                dbeta[l] += dy[l];
                lanes[0][l] += dy[l] * gamma[l];
                lanes[1][l] += dy[l] * gamma[l] * normal;
            }
        }
        let n = x.len() as f32;
        let [mean_dz, mean_dz_normal] = lanes.map(|lanes| lanes.iter().sum::<f32>() / n);
        for (((dx, &x), &dy), &gamma) in dx.iter_mut().zip(x).zip(dy).zip(gamma) {
            *dx = inverse * (dy * gamma - mean_dz - (x - mean) * inverse * mean_dz_normal);
        }
    }
}
