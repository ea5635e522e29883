//! 3×3 convolution of stride 1 by Winograd's algorithm: at each of the 36 points of transformed tiles the channels are mixed
//! by a matrix product, a quarter of the multiplications of a direct sum. What is multiplied is transformed into packed
//! panels right away, in blocks that stay in the cache.
//!
//! Sums run over the channels, or over the tiles, in their order, and then over blocks of 128 of them: whatever the batch or
//! the number of threads.

use super::Geometry;
use super::kernels::Kernels;
use super::tiles::{Grid, POINTS, Panels, Source, Target};
use super::transforms::{inputs, outputs};
use crate::cpu::buffer::{Shared, with_scratch, with_shared, written};
use crate::cpu::panels::{Place, ROWS, Start, WIDTH, multiply};
use crate::cpu::share::share;
use std::ops::Range;

/// Channels that are multiplied at once: a panel of them fits into the first level cache.
const DEPTH: usize = 128;

/// Panels of rows that a task mixes at once: their results stay in the second level cache.
const AT_ONCE: usize = 4;

/// Most tiles whose transforms are shared by all threads at a time.
const TOGETHER: usize = 128;

/// Values of transformed kernels that are held at a time: 16 MiB.
const HELD: usize = 4 << 20;

pub(super) fn forward(g: Geometry, x: &[f32], weight: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let kernels = Kernels::new(weight, [g.outputs, g.inputs], false);
    let padding = g.padding.map(|n| n as isize);
    let source = Source { values: x, channels: g.inputs, size: g.size, double: g.upsample, padding };
    let fill = |y: &mut [f32]| {
        let target = Target { values: Shared::new(y), channels: g.outputs, size: g.result, halve: false };
        convolve(g.batch, source, kernels, bias, target);
    };
    // SAFETY: the tiles cover the whole result, and `convolve` writes all of them.
    unsafe { written(g.batch * g.outputs * g.result[0] * g.result[1], fill) }
}

/// The convolution of `dy` with the kernels turned by half a turn.
pub(super) fn backward_data(g: Geometry, weight: &[f32], dy: &[f32]) -> Vec<f32> {
    let kernels = Kernels::new(weight, [g.outputs, g.inputs], true);
    let padding = g.padding.map(|n| 2 - n as isize);
    let source = Source { values: dy, channels: g.outputs, size: g.result, double: false, padding };
    let fill = |dx: &mut [f32]| {
        let target = Target { values: Shared::new(dx), channels: g.inputs, size: g.seen(), halve: g.upsample };
        convolve(g.batch, source, kernels, None, target);
    };
    // SAFETY: the tiles cover all of the input, and `convolve` writes all of them.
    unsafe { written(g.batch * g.inputs * g.size[0] * g.size[1], fill) }
}

/// One convolution, whatever it is for.
#[derive(Clone, Copy)]
struct Convolution<'a> {
    grid: Grid,
    source: Source<'a>,
    kernels: Kernels<'a>,
    bias: Option<&'a [f32]>,
    target: Target<'a>,
}

fn convolve(batch: usize, source: Source<'_>, kernels: Kernels<'_>, bias: Option<&[f32]>, target: Target<'_>) {
    let grid = Grid::of(batch, target.size);
    let c = Convolution { grid, source, kernels, bias, target };
    if grid.len() <= TOGETHER || grid.len() < 2 * WIDTH * rayon::current_num_threads() {
        c.by_channels();
    } else {
        c.by_tiles();
    }
}

impl Convolution<'_> {
    /// For many tiles: kernels are transformed once, and each task has all channels of some tiles.
    fn by_tiles(self) {
        let panel = self.source.channels * ROWS + 16;
        let panels = self.target.channels.div_ceil(ROWS);
        let held = (HELD / (POINTS * panel)).clamp(1, panels);
        // Large kernels come from beyond the cache: they serve more tiles at a time.
        let count = if held * panel * POINTS > 1 << 20 { 2 * WIDTH } else { WIDTH };
        for first in (0..panels).step_by(held) {
            let held = held.min(panels - first);
            with_shared(POINTS * held * panel, |memory| {
                let memory = Shared::new(memory);
                let pitch = held * panel;
                share(held, |i| {
                    self.kernels.transform(first + i, 0..self.source.channels, memory, [i * panel, pitch]);
                });
                share(self.grid.len().div_ceil(count), |i| {
                    let tiles = i * count..self.grid.len().min((i + 1) * count);
                    self.block(tiles, first * ROWS, memory, [held, panel]);
                });
            });
        }
    }

    /// Some tiles of the rows that the held kernels give, from row `first` on.
    fn block(self, tiles: Range<usize>, first: usize, kernels: Shared<'_>, [held, panel]: [usize; 2]) {
        let from = self.source.channels;
        let sizes = [from, AT_ONCE * ROWS].map(|channels| Panels::size(tiles.len(), channels, WIDTH));
        with_scratch(sizes, |[seen, mixed]| {
            let seen = Panels { values: Shared::new(seen), first: 0, channels: from, width: WIDTH };
            let mixed = Shared::new(mixed);
            inputs(self.source, self.grid, tiles.clone(), 0..from, seen);
            for group in (0..held).step_by(AT_ONCE) {
                let panels = group..held.min(group + AT_ONCE);
                let start = first + group * ROWS;
                let rows = start..self.target.channels.min(first + panels.end * ROWS);
                let mixed = Panels { values: mixed, first: start, channels: rows.len(), width: WIDTH };
                for (point, start) in (0..POINTS).flat_map(|p| (0..from).step_by(DEPTH).map(move |start| (p, start))) {
                    let depths = start..from.min(start + DEPTH);
                    for (i, held_panel) in panels.clone().enumerate() {
                        let at = (point * held + held_panel) * panel + start * ROWS;
                        // SAFETY: the kernels are written, and only read until all tasks have ended.
                        let right = unsafe { kernels.read(at, depths.len() * ROWS) };
                        let rows = i * ROWS..rows.len().min((i + 1) * ROWS);
                        products(seen, mixed, point, tiles.len(), depths.clone(), rows, right);
                    }
                }
                outputs(self.target, self.bias, self.grid, tiles.clone(), rows, mixed);
            }
        });
    }

    /// For few tiles: their transforms are shared, and each task transforms and applies the kernels of some rows.
    fn by_channels(self) {
        let from = self.source.channels;
        for start in (0..self.grid.len()).step_by(TOGETHER) {
            let tiles = start..self.grid.len().min(start + TOGETHER);
            let width = if tiles.len() <= 16 { 16 } else { WIDTH };
            with_shared(Panels::size(tiles.len(), from, width), |memory| {
                let seen = Panels { values: Shared::new(memory), first: 0, channels: from, width };
                share(from.div_ceil(16), |i| {
                    inputs(self.source, self.grid, tiles.clone(), i * 16..from.min((i + 1) * 16), seen);
                });
                let panels = self.target.channels.div_ceil(ROWS);
                let count = if panels >= 4 * rayon::current_num_threads() { 2 } else { 1 };
                share(panels.div_ceil(count), |i| {
                    self.rows(tiles.clone(), i * count..panels.min((i + 1) * count), seen);
                });
            });
        }
    }

    /// Some rows of all transformed tiles.
    fn rows(self, tiles: Range<usize>, panels: Range<usize>, seen: Panels<'_>) {
        let (from, width) = (self.source.channels, seen.width);
        let rows = panels.start * ROWS..self.target.channels.min(panels.end * ROWS);
        let panel = DEPTH.min(from) * ROWS + 16;
        let sizes = [POINTS * panels.len() * panel, Panels::size(tiles.len(), rows.len(), width)];
        with_scratch(sizes, |[kernels, mixed]| {
            let kernels = Shared::new(kernels);
            let mixed = Panels { values: Shared::new(mixed), first: rows.start, channels: rows.len(), width };
            for start in (0..from).step_by(DEPTH) {
                let depths = start..from.min(start + DEPTH);
                for (i, row) in panels.clone().enumerate() {
                    self.kernels.transform(row, depths.clone(), kernels, [i * panel, panels.len() * panel]);
                }
                for (point, i) in (0..POINTS).flat_map(|point| (0..panels.len()).map(move |i| (point, i))) {
                    // SAFETY: the kernels are this task's, and not written meanwhile.
                    let right = unsafe { kernels.read((point * panels.len() + i) * panel, depths.len() * ROWS) };
                    let rows = i * ROWS..rows.len().min((i + 1) * ROWS);
                    products(seen, mixed, point, tiles.len(), depths.clone(), rows, right);
                }
            }
            outputs(self.target, self.bias, self.grid, tiles, rows, mixed);
        });
    }
}

/// Adds to some rows of `mixed` at one point the products of the channels `depths` of `seen` with a panel of kernels; the
/// first channel starts new sums.
fn products(
    seen: Panels<'_>,
    mixed: Panels<'_>,
    point: usize,
    tiles: usize,
    depths: Range<usize>,
    rows: Range<usize>,
    right: &[f32],
) {
    let width = seen.width;
    for panel in 0..tiles.div_ceil(width) {
        let lanes = (tiles - panel * width).min(width).next_multiple_of(16);
        let start = mixed.matrix(panel, point) + rows.start * width;
        let place = Place { values: mixed.values, start, stride: width };
        let begin = if depths.start == 0 { Start::Zero } else { Start::Sum };
        // SAFETY: transformed tiles are only read now; the rows of `mixed` are this task's, and written from the first
        // channel on.
        unsafe {
            let left = seen.values.read(seen.matrix(panel, point) + depths.start * width, depths.len() * width);
            multiply(depths.len(), (left, width), right, place, [rows.len(), lanes], begin);
        }
    }
}
