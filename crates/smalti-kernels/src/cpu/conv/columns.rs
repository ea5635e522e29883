//! Convolution as a direct sum: a matrix product with packed columns. A column holds what one result sees, in the order
//! `[channel, tap]`; the results of an image are cut into panels of neighbours.

use super::Geometry;
use super::gather::Columns;
use crate::cpu::buffer::{Shared, with_scratch, with_shared, written};
use crate::cpu::panels::{Place, ROWS, Start, WIDTH, multiply};
use crate::cpu::share::share;
use crate::cpu::simd::LANES;
use crate::cpu::transpose::transpose;
use rayon::prelude::*;
use std::ops::Range;

/// Depth that is multiplied at once: a panel of it fits into the first level cache.
const DEPTH: usize = 128;

/// Values of packed gradients that are held at a time: 8 MiB.
const HELD: usize = 2 << 20;

pub(super) fn forward(g: Geometry, x: &[f32], weight: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let taps = g.kernel[0] * g.kernel[1];
    let columns = Columns::seen(g, x);
    let all: Vec<usize> = (0..taps).collect();
    let weights = Weights { values: weight, rows: g.outputs, strides: [g.inputs * taps, taps], taps: &all };
    let fill = |y: &mut [f32]| {
        let target = Target { values: Shared::new(y), size: g.result, start: [0; 2], step: 1 };
        convolve(g.batch, &columns, weights, bias, target);
    };
    // SAFETY: `convolve` writes all results.
    unsafe { written(g.batch * g.outputs * g.result[0] * g.result[1], fill) }
}

pub(super) fn backward_data(g: Geometry, weight: &[f32], dy: &[f32]) -> Vec<f32> {
    let taps = g.kernel[0] * g.kernel[1];
    let [h, w] = g.seen();
    let mut dx = vec![0.0; g.batch * g.inputs * h * w];
    // Inputs at the same place modulo the stride see the same taps, and neighbours of them neighbouring results.
    for (y, x) in (0..g.stride.min(h)).flat_map(|y| (0..g.stride.min(w)).map(move |x| (y, x))) {
        let (columns, used) = Columns::reached(g, dy, [y, x]);
        if used.is_empty() {
            continue;
        }
        let weights = Weights { values: weight, rows: g.inputs, strides: [taps, g.inputs * taps], taps: &used };
        let target = Target { values: Shared::new(&mut dx), size: [h, w], start: [y, x], step: g.stride };
        convolve(g.batch, &columns, weights, None, target);
    }
    if g.upsample { halved(&dx, g.size) } else { dx }
}

/// Planes of half the size from sums of 2 by 2 values.
fn halved(values: &[f32], [h, w]: [usize; 2]) -> Vec<f32> {
    let mut sums = vec![0.0; values.len() / 4];
    sums.par_chunks_mut((h * w).max(1)).zip(values.par_chunks(4 * h * w)).for_each(|(sums, values)| {
        for (sums, rows) in sums.chunks_exact_mut(w).zip(values.chunks_exact(4 * w)) {
            let (upper, lower) = rows.split_at(2 * w);
            for ((sum, upper), lower) in sums.iter_mut().zip(upper.as_chunks::<2>().0).zip(lower.as_chunks::<2>().0) {
                *sum = upper[0] + upper[1] + (lower[0] + lower[1]);
            }
        }
    });
    sums
}

/// A weight as the right factor: row `r`, channel `c` and the `i`-th tap are at `r * strides[0] + c * strides[1] + taps[i]`.
#[derive(Clone, Copy)]
struct Weights<'a> {
    values: &'a [f32],
    rows: usize,
    strides: [usize; 2],
    taps: &'a [usize],
}

impl Weights<'_> {
    /// The panel `[channels, taps, ROWS]` of some rows.
    fn pack(self, panel: usize, target: &mut [f32]) {
        let first = panel * ROWS;
        let count = ROWS.min(self.rows - first);
        for (i, values) in target.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
            let (channel, tap) = (i / self.taps.len(), self.taps[i % self.taps.len()]);
            let start = channel * self.strides[1] + tap;
            for (r, value) in values.iter_mut().enumerate() {
                *value = if r < count { self.values[(first + r) * self.strides[0] + start] } else { 0.0 };
            }
        }
    }
}

/// Planes of results, of which every `step`-th in both directions is written.
#[derive(Clone, Copy)]
struct Target<'a> {
    values: Shared<'a>,
    size: [usize; 2],
    start: [usize; 2],
    step: usize,
}

/// Writes the product of the columns and the weights.
fn convolve(batch: usize, columns: &Columns<'_>, weights: Weights<'_>, bias: Option<&[f32]>, target: Target<'_>) {
    let depth = columns.depth();
    let panels = weights.rows.div_ceil(ROWS);
    let across = columns.area().div_ceil(WIDTH);
    // Few columns: the rows are shared out too.
    let groups = (4 * rayon::current_num_threads()).div_ceil((batch * across).max(1)).min(panels);
    let group = panels.div_ceil(groups);
    with_shared(panels * depth * ROWS, |packed| {
        packed.par_chunks_exact_mut(depth * ROWS).enumerate().for_each(|(panel, packed)| weights.pack(panel, packed));
        let packed = &*packed;
        share(batch * across * groups, |i| {
            let (image, first, some) = (i / groups / across, i / groups % across * WIDTH, i % groups * group);
            let some = some..panels.min(some + group);
            let lanes = WIDTH.min(columns.area() - first);
            let width = if lanes <= 16 { 16 } else { WIDTH };
            with_scratch([depth * width, ROWS * WIDTH], |[left, aside]| {
                columns.gather(image, first..first + lanes, left, width);
                let block = Block { image, first, lanes, left, width, depth };
                if target.step == 1 {
                    block.multiply(packed, some, weights.rows, bias, target);
                } else {
                    block.multiply_aside(packed, some, weights.rows, columns.grid, aside, target);
                }
            });
        });
    });
}

/// The packed columns of neighbouring results of an image.
struct Block<'a> {
    image: usize,
    first: usize,
    lanes: usize,
    left: &'a [f32],
    width: usize,
    depth: usize,
}

impl Block<'_> {
    /// Products with some panels of rows, right to where they belong.
    fn multiply(&self, packed: &[f32], panels: Range<usize>, rows: usize, bias: Option<&[f32]>, target: Target<'_>) {
        let area = target.size[0] * target.size[1];
        for start in (0..self.depth).step_by(DEPTH) {
            for panel in panels.clone() {
                let row = panel * ROWS;
                let place =
                    Place { values: target.values, start: (self.image * rows + row) * area + self.first, stride: area };
                let begin = match bias {
                    _ if start > 0 => Start::Sum,
                    Some(bias) => Start::Bias(&bias[row..]),
                    None => Start::Zero,
                };
                self.add(packed, panel, start, place, ROWS.min(rows - row), begin);
            }
        }
    }

    /// Products with some panels of rows, by way of `aside` to every `step`-th place.
    fn multiply_aside(
        &self,
        packed: &[f32],
        panels: Range<usize>,
        rows: usize,
        [_, across]: [usize; 2],
        aside: &mut [f32],
        target: Target<'_>,
    ) {
        for panel in panels {
            let row = panel * ROWS;
            let count = ROWS.min(rows - row);
            for start in (0..self.depth).step_by(DEPTH) {
                let place = Place { values: Shared::new(aside), start: 0, stride: WIDTH };
                let begin = if start > 0 { Start::Sum } else { Start::Zero };
                self.add(packed, panel, start, place, count, begin);
            }
            let [height, width] = target.size;
            for (r, values) in aside.chunks_exact(WIDTH).enumerate().take(count) {
                for (at, value) in values[..self.lanes].iter().enumerate() {
                    let place = [(self.first + at) / across, (self.first + at) % across];
                    let [y, x] = [0, 1].map(|i| target.start[i] + place[i] * target.step);
                    let start = ((self.image * rows + row + r) * height + y) * width + x;
                    // SAFETY: each place belongs to one task.
                    let place = unsafe { target.values.range(start, 1) };
                    place[0] = *value;
                }
            }
        }
    }

    fn add(&self, packed: &[f32], panel: usize, start: usize, place: Place<'_>, rows: usize, begin: Start<'_>) {
        let depth = DEPTH.min(self.depth - start);
        let right = &packed[(panel * self.depth + start) * ROWS..][..depth * ROWS];
        let left = &self.left[start * self.width..][..depth * self.width];
        // SAFETY: these results belong to this task, and the first part of the depth begins them.
        unsafe { multiply(depth, (left, self.width), right, place, [rows, self.lanes], begin) };
    }
}

/// The sum over all results of the products of their gradients and what they saw.
pub(super) fn backward_weight(g: Geometry, x: &[f32], dy: &[f32]) -> Vec<f32> {
    let (columns, results) = (Columns::seen(g, x), Columns::results(g, dy));
    let (depth, area) = (columns.depth(), columns.area());
    let (across, down) = (depth.div_ceil(WIDTH), g.outputs.div_ceil(ROWS));
    let groups = (4 * rayon::current_num_threads()).div_ceil(across.max(1)).min(down);
    let group = down.div_ceil(groups);
    let held = (HELD / (down * ROWS)).max(DEPTH).min(area).next_multiple_of(LANES);
    let pitch = held * ROWS + 16;
    let mut dw = vec![0.0; g.outputs * depth];
    let target = Shared::new(&mut dw);
    with_shared(down * pitch, |packed| {
        for (image, start) in (0..g.batch).flat_map(|image| (0..area).step_by(held).map(move |start| (image, start))) {
            let part = start..area.min(start + held);
            packed.par_chunks_exact_mut(pitch).enumerate().for_each(|(panel, packed)| {
                let rows = panel * ROWS..g.outputs.min((panel + 1) * ROWS);
                pack(&results, image, part.clone(), rows, packed, ROWS);
            });
            let packed = &*packed;
            share(across * groups, |i| {
                let (first, some) = (i / groups * WIDTH, i % groups * group);
                let lanes = first..depth.min(first + WIDTH);
                with_scratch([DEPTH * WIDTH + 16], |[left]| {
                    for start in part.clone().step_by(DEPTH) {
                        let few = start..part.end.min(start + DEPTH);
                        pack(&columns, image, few.clone(), lanes.clone(), left, WIDTH);
                        let count = few.len().next_multiple_of(LANES);
                        for panel in some..down.min(some + group) {
                            let right = &packed[panel * pitch + (start - part.start) * ROWS..][..count * ROWS];
                            let row = panel * ROWS;
                            let place = Place { values: target, start: row * depth + first, stride: depth };
                            let size = [ROWS.min(g.outputs - row), lanes.len()];
                            // SAFETY: these sums belong to this task, and began as zeros.
                            unsafe { multiply(count, (left, WIDTH), right, place, size, Start::Sum) };
                        }
                    }
                });
            });
        }
    });
    dw
}

/// Packs some rows of the depth of some columns with the columns as depth, `[columns, width]`, zeros up to a multiple of 16
/// columns.
fn pack(columns: &Columns<'_>, image: usize, part: Range<usize>, rows: Range<usize>, target: &mut [f32], width: usize) {
    let mut block = [0.0; LANES * LANES];
    let target = Shared::new(target);
    for (first, start) in
        part.clone().step_by(LANES).flat_map(|first| rows.clone().step_by(LANES).map(move |start| (first, start)))
    {
        let few = first..part.end.min(first + LANES);
        if few.len() < LANES {
            block.fill(0.0);
        }
        columns.gather_rows(image, few, start..rows.end.min(start + LANES), &mut block, LANES);
        let at = (first - part.start) * width + start - rows.start;
        transpose(&block, target, at, width, LANES.min(width));
    }
}
