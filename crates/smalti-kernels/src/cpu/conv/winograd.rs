//! 3×3 convolution of stride 1 by Winograd's algorithm: tiles are transformed in blocks that fit the cache, and at each
//! of the 36 points the channels are mixed by a matrix product. A quarter of the multiplications of a direct one.
//!
//! The error is about ten times that of a direct sum in `f32`: some 1e-6 of the largest result.

use super::kernels::{self, transformed};
use super::tiles::{Grid, POINTS, Source, Target, gradients, inputs, outputs};
use super::{Geometry, add_up};
use crate::cpu::buffer::{Shared, with_scratch, written};
use crate::cpu::gemm::{Matrix, multiply};
use crate::cpu::shares;
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
    let (from, to) = (pitch(g.inputs, block), pitch(g.outputs, block));
    let of_share = |blocks: Range<usize>| {
        let mut sums = vec![0.0; POINTS * g.outputs * g.inputs];
        let start = blocks.start;
        with_scratch([POINTS * from, POINTS * to], |[seen_tiles, given_tiles]| {
            for i in blocks {
                let (first, add) = (i * block, i > start);
                let count = block.min(grid.len() - first);
                inputs(seen, grid, first, count, seen_tiles, block);
                gradients(given, grid, first, count, given_tiles, block);
                for point in 0..POINTS {
                    let lhs = Matrix { values: &seen_tiles[point * from..], strides: [block, 1] };
                    let rhs = Matrix { values: &given_tiles[point * to..], strides: [1, block] };
                    let size = g.outputs * g.inputs;
                    let sums = &mut sums[point * size..(point + 1) * size];
                    multiply([g.inputs, g.outputs, count.next_multiple_of(16)], sums, [1, g.inputs], add, lhs, rhs);
                }
            }
        });
        sums
    };
    let parts = shares(grid.len().div_ceil(block)).into_par_iter().map(of_share).collect();
    let mut dw = vec![0.0; g.outputs * g.inputs * 9];
    kernels::gradients(&add_up(parts), &mut dw);
    dw
}

/// Distance of the matrices of two points: not a power of two, which would put all 36 in the same cache sets.
pub(super) fn pitch(channels: usize, width: usize) -> usize {
    channels * width + 16
}

/// Tiles of a block: few enough for the second level cache, and blocks for all threads.
fn block(tiles: usize, channels: usize, least: usize) -> usize {
    let cached = 400_000 / (POINTS * channels);
    let even = tiles.div_ceil(rayon::current_num_threads());
    (cached / 64 * 64).clamp(least, 256).min(even.next_multiple_of(16))
}

/// Convolves with kernels `[36, target channels, source channels]`.
fn convolve(batch: usize, source: Source<'_>, kernels: &[f32], bias: Option<&[f32]>, target: Target<'_>) {
    let grid = Grid::of(batch, target.size);
    let (from, to) = (source.channels, target.channels);
    let block = block(grid.len(), from + to, 64);
    (0..grid.len().div_ceil(block)).into_par_iter().for_each(|i| {
        let first = i * block;
        let count = block.min(grid.len() - first);
        with_scratch([POINTS * pitch(from, block), POINTS * pitch(to, block)], |[seen, mixed]| {
            inputs(source, grid, first, count, seen, block);
            for point in 0..POINTS {
                let lhs = Matrix { values: &seen[point * pitch(from, block)..], strides: [1, block] };
                let rhs = Matrix { values: &kernels[point * from * to..], strides: [1, from] };
                let mixed = &mut mixed[point * pitch(to, block)..][..to * block];
                multiply([count.next_multiple_of(16), to, from], mixed, [1, block], false, lhs, rhs);
            }
            outputs(target, bias, grid, first, count, mixed, block);
        });
    });
}
