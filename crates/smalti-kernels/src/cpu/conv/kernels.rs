//! The transforms of 3×3 kernels and of their gradients, on 16 kernels at a time.

use super::tiles::POINTS;
use crate::cpu::buffer::{Shared, written};
use crate::cpu::simd::{LANES, simd};
use rayon::prelude::*;

/// The matrix `G`.
const G: [[f32; 3]; 6] = [
    [0.25, 0.0, 0.0],
    [-1.0 / 6.0, -1.0 / 6.0, -1.0 / 6.0],
    [-1.0 / 6.0, 1.0 / 6.0, -1.0 / 6.0],
    [1.0 / 24.0, 1.0 / 12.0, 1.0 / 6.0],
    [1.0 / 24.0, -1.0 / 12.0, 1.0 / 6.0],
    [0.0, 0.0, 1.0],
];

/// `G w Gᵀ` of kernels `[outputs, inputs, 9]` as `[36, outputs, inputs]`; turned, as `[36, inputs, outputs]` of the
/// kernels turned by half a turn.
pub(super) fn transformed(weight: &[f32], [outputs, inputs]: [usize; 2], turned: bool) -> Vec<f32> {
    let rows = if turned { inputs } else { outputs };
    let fill = |kernels: &mut [f32]| {
        let kernels = Shared::new(kernels);
        (0..rows).into_par_iter().for_each(|row| transform_row(weight, outputs, inputs, row, turned, kernels));
    };
    // SAFETY: each row writes its part of each of the 36 matrices in full.
    unsafe { written(POINTS * outputs * inputs, fill) }
}

simd! {
    /// One row of each of the 36 matrices of [`transformed`].
    fn transform_row(
        weight: &[f32],
        outputs: usize,
        inputs: usize,
        row: usize,
        turned: bool,
        kernels: Shared<'_>,
    ) {
        let (weights, _) = weight.as_chunks::<9>();
        let (rows, columns) = if turned { (inputs, outputs) } else { (outputs, inputs) };
        let mut w = [[0.0; LANES]; 9];
        let mut half = [[0.0; LANES]; 18];
        for column in (0..columns).step_by(LANES) {
            let count = LANES.min(columns - column);
            for l in 0..count {
                if turned {
                    let kernel = &weights[(column + l) * inputs + row];
                    (0..9).for_each(|tap| w[tap][l] = kernel[8 - tap]);
                } else {
                    let kernel = &weights[row * inputs + column + l];
                    (0..9).for_each(|tap| w[tap][l] = kernel[tap]);
                }
            }
            for i in 0..6 {
                for j in 0..3 {
                    for l in 0..LANES {
                        half[3 * i + j][l] = G[i][0] * w[j][l] + G[i][1] * w[3 + j][l] + G[i][2] * w[6 + j][l];
                    }
                }
            }
            for i in 0..6 {
                for j in 0..6 {
                    let mut whole = [0.0; LANES];
                    for l in 0..LANES {
                        let h = |k: usize| half[3 * i + k][l];
                        whole[l] = h(0) * G[j][0] + h(1) * G[j][1] + h(2) * G[j][2];
                    }
                    // SAFETY: rows of different tasks do not overlap, and one of them is borrowed at a time.
                    let target = unsafe { kernels.range(((6 * i + j) * rows + row) * columns + column, count) };
                    match target.as_mut_array() {
                        Some(target) => *target = whole,
                        None => target.copy_from_slice(&whole[..count]),
                    }
                }
            }
        }
    }
}

simd! {
    /// `Gᵀ s G`: gradients of kernels `[n, 9]` from those of their transforms, `[36, n]`.
    pub(super) fn gradients(sums: &[f32], dw: &mut [f32]) {
        let (kernels, _) = dw.as_chunks_mut::<9>();
        let n = kernels.len();
        for (i, kernels) in kernels.chunks_mut(LANES).enumerate() {
            let mut half = [[0.0; LANES]; 18];
            for point in 0..POINTS {
                let mut s = [0.0; LANES];
                let sums = &sums[point * n + i * LANES..][..kernels.len()];
                match sums.as_array() {
                    Some(sums) => s = *sums,
                    None => s[..sums.len()].copy_from_slice(sums),
                }
                for row in 0..3 {
                    for l in 0..LANES {
                        half[6 * row + point % 6][l] += G[point / 6][row] * s[l];
                    }
                }
            }
            for tap in 0..9 {
                let mut whole = [0.0; LANES];
                for k in 0..6 {
                    for l in 0..LANES {
                        whole[l] += half[6 * (tap / 3) + k][l] * G[k][tap % 3];
                    }
                }
                kernels.iter_mut().zip(whole).for_each(|(kernel, value)| kernel[tap] = value);
            }
        }
    }
}
