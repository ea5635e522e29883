//! 3×3 convolution of stride 1 by Winograd's algorithm: tiles are transformed in blocks that fit the cache, and at each
//! of the 36 points the channels are mixed by a matrix product. A quarter of the multiplications of a direct one.
//!
//! The error is about ten times that of a direct sum in `f32`: some 1e-6 of the largest result.

use super::tiles::{Grid, POINTS, Source, Target, gradients, inputs, kernel, kernel_gradient, outputs};
use super::{Geometry, add_up, shares};
use crate::cpu::buffer::{Shared, with_scratch, written};
use crate::cpu::gemm::{Matrix, multiply};
use crate::cpu::simd::simd;
use rayon::prelude::*;
use std::ops::Range;

pub(super) fn forward(g: Geometry, x: &[f32], weight: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let kernels = transformed(weight, [g.outputs, g.inputs], false);
    let padding = g.padding.map(|n| n as isize);
    let source = Source { values: x, channels: g.inputs, size: g.size, double: g.upsample, padding };
    let fill = |y: &mut [f32]| {
        let target = Target { values: Shared::new(y), channels: g.outputs, size: g.result, halve: false };
        convolve(g.batch, source, &kernels, bias, target);
    };
    // SAFETY: the tiles cover the whole result, and `convolve` writes all of them.
    unsafe { written(g.batch * g.outputs * g.result[0] * g.result[1], fill) }
}

/// The convolution of `dy` with the kernels turned by half a turn.
pub(super) fn backward_data(g: Geometry, weight: &[f32], dy: &[f32]) -> Vec<f32> {
    let kernels = transformed(weight, [g.outputs, g.inputs], true);
    let padding = g.padding.map(|n| 2 - n as isize);
    let source = Source { values: dy, channels: g.outputs, size: g.result, double: false, padding };
    let fill = |dx: &mut [f32]| {
        let target = Target { values: Shared::new(dx), channels: g.inputs, size: g.seen(), halve: g.upsample };
        convolve(g.batch, source, &kernels, None, target);
    };
    // SAFETY: the tiles cover all of the input, and `convolve` writes all of them.
    unsafe { written(g.batch * g.inputs * g.size[0] * g.size[1], fill) }
}

pub(super) fn backward_weight(g: Geometry, x: &[f32], dy: &[f32]) -> Vec<f32> {
    let grid = Grid::of(g.batch, g.result);
    let padding = g.padding.map(|n| n as isize);
    let seen = Source { values: x, channels: g.inputs, size: g.size, double: g.upsample, padding };
    let given = Source { values: dy, channels: g.outputs, size: g.result, double: false, padding: [0; 2] };
    let block = block(grid.len(), g.inputs + g.outputs, 64);
    let of_share = |blocks: Range<usize>| {
        let mut sums = vec![0.0; POINTS * g.outputs * g.inputs];
        with_scratch([POINTS * g.inputs * block, POINTS * g.outputs * block], |[seen_tiles, given_tiles]| {
            for first in blocks.map(|i| i * block) {
                let count = block.min(grid.len() - first);
                inputs(seen, grid, first, count, seen_tiles, block);
                gradients(given, grid, first, count, given_tiles, block);
                for point in 0..POINTS {
                    let lhs = Matrix { values: &seen_tiles[point * g.inputs * block..], strides: [block, 1] };
                    let rhs = Matrix { values: &given_tiles[point * g.outputs * block..], strides: [1, block] };
                    let size = g.outputs * g.inputs;
                    let sums = &mut sums[point * size..(point + 1) * size];
                    multiply([g.inputs, g.outputs, count.next_multiple_of(16)], sums, [1, g.inputs], true, lhs, rhs);
                }
            }
        });
        sums
    };
    let parts = shares(grid.len().div_ceil(block)).into_par_iter().map(of_share).collect();
    let mut dw = vec![0.0; g.outputs * g.inputs * 9];
    kernel_gradients(&add_up(parts), &mut dw);
    dw
}

/// Tiles of a block: few enough for the second level cache, and blocks for all threads.
fn block(tiles: usize, channels: usize, least: usize) -> usize {
    let cached = 300_000 / (POINTS * channels);
    let even = tiles.div_ceil(rayon::current_num_threads());
    (cached / 16 * 16).clamp(least, 256).min(even.next_multiple_of(16))
}

/// Convolves with kernels `[36, target channels, source channels]`.
fn convolve(batch: usize, source: Source<'_>, kernels: &[f32], bias: Option<&[f32]>, target: Target<'_>) {
    let grid = Grid::of(batch, target.size);
    let (from, to) = (source.channels, target.channels);
    let block = block(grid.len(), from + to, 32);
    (0..grid.len().div_ceil(block)).into_par_iter().for_each(|i| {
        let first = i * block;
        let count = block.min(grid.len() - first);
        with_scratch([POINTS * from * block, POINTS * to * block], |[seen, mixed]| {
            inputs(source, grid, first, count, seen, block);
            for point in 0..POINTS {
                let lhs = Matrix { values: &seen[point * from * block..], strides: [1, block] };
                let rhs = Matrix { values: &kernels[point * from * to..], strides: [1, from] };
                let mixed = &mut mixed[point * to * block..(point + 1) * to * block];
                multiply([count.next_multiple_of(16), to, from], mixed, [1, block], false, lhs, rhs);
            }
            outputs(target, bias, grid, first, count, mixed, block);
        });
    });
}

/// The transforms of kernels `[outputs, inputs, 9]` as `[36, outputs, inputs]`; turned, as `[36, inputs, outputs]` of
/// the kernels turned by half a turn.
fn transformed(weight: &[f32], [outputs, inputs]: [usize; 2], turned: bool) -> Vec<f32> {
    let [rows, columns] = if turned { [inputs, outputs] } else { [outputs, inputs] };
    let fill = |kernels: &mut [f32]| {
        let kernels = Shared::new(kernels);
        (0..rows).into_par_iter().for_each(|row| transform_row(weight, inputs, row, columns, rows, turned, kernels));
    };
    // SAFETY: each row writes its part of each of the 36 matrices in full.
    unsafe { written(POINTS * outputs * inputs, fill) }
}

simd! {
    /// One row of each of the 36 matrices of [`transformed`].
    fn transform_row(
        weight: &[f32],
        inputs: usize,
        row: usize,
        columns: usize,
        rows: usize,
        turned: bool,
        kernels: Shared<'_>,
    ) {
        let (weights, _) = weight.as_chunks::<9>();
        let mut matrix_rows: [&mut [f32]; POINTS] = std::array::from_fn(|point| {
            // SAFETY: rows of different tasks do not overlap, nor do those of different points.
            unsafe { kernels.range((point * rows + row) * columns, columns) }
        });
        for column in 0..columns {
            let w = if turned {
                let mut w = weights[column * inputs + row];
                w.reverse();
                w
            } else {
                weights[row * inputs + column]
            };
            for (matrix_row, value) in matrix_rows.iter_mut().zip(kernel(w)) {
                matrix_row[column] = value;
            }
        }
    }
}

simd! {
    fn kernel_gradients(sums: &[f32], dw: &mut [f32]) {
        let (kernels, _) = dw.as_chunks_mut::<9>();
        let n = kernels.len();
        for (i, kernel) in kernels.iter_mut().enumerate() {
            *kernel = kernel_gradient(std::array::from_fn(|point| sums[point * n + i]));
        }
    }
}
