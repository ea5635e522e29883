//! Convolution as a matrix product with strips of columns: column `p` of a strip holds the inputs that result `p` sees,
//! in the order `[input channel, kernel row, kernel column]` of a row of the weight. Results are counted over the batch.

use super::{Geometry, add_up};
use crate::cpu::buffer::{Shared, with_scratch, written};
use crate::cpu::gemm::{Matrix, multiply};
use crate::cpu::shares;
use rayon::prelude::*;
use std::ops::Range;

impl Geometry {
    /// Results of one channel of one image.
    fn area(&self) -> usize {
        self.result[0] * self.result[1]
    }

    /// Rows of a strip: inputs of one result.
    fn depth(&self) -> usize {
        self.inputs * self.kernel[0] * self.kernel[1]
    }

    /// Columns of a strip, so that it stays in the second level cache and all threads have some.
    fn strip(&self, columns: usize) -> usize {
        let cached = 200_000 / (self.depth() + self.outputs);
        let even = columns.div_ceil(rayon::current_num_threads());
        cached.clamp(64, 1024).min(even).next_multiple_of(16)
    }

    /// The runs of `columns` that lie in one row of results: image, row, first and last column, offset in `columns`.
    fn runs(self, columns: Range<usize>) -> impl Iterator<Item = Run> {
        let (area, width) = (self.area(), self.result[1]);
        let mut at = columns.start;
        std::iter::from_fn(move || {
            (at < columns.end).then(|| {
                let (image, row, start) = (at / area, at % area / width, at % width);
                let len = (width - start).min(columns.end - at);
                let run = Run { image, row, start, len, offset: at - columns.start };
                at += len;
                run
            })
        })
    }
}

/// Neighbouring results in a row.
#[derive(Clone, Copy)]
struct Run {
    image: usize,
    row: usize,
    start: usize,
    len: usize,
    offset: usize,
}

pub(super) fn forward(g: Geometry, x: &[f32], weight: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let (depth, area) = (g.depth(), g.area());
    let columns = g.batch * area;
    let strip = g.strip(columns);
    let fill = |y: &mut [f32]| {
        let y = Shared::new(y);
        (0..columns.div_ceil(strip)).into_par_iter().for_each(|i| {
            let range = i * strip..columns.min((i + 1) * strip);
            with_scratch([depth * strip, g.outputs * strip], |[inputs, results]| {
                gather(g, x, range.clone(), inputs, strip);
                let lhs = Matrix { values: inputs, strides: [1, strip] };
                let rhs = Matrix { values: weight, strides: [1, depth] };
                multiply([range.len(), g.outputs, depth], results, [1, strip], false, lhs, rhs);
                for (channel, results) in results.chunks_exact(strip).enumerate() {
                    let bias = bias.map_or(0.0, |bias| bias[channel]);
                    for (image, part, offset) in images(range.clone(), area) {
                        let start = (image * g.outputs + channel) * area + part.start;
                        // SAFETY: each result belongs to one strip, and each strip to one task.
                        let y = unsafe { y.range(start, part.len()) };
                        y.iter_mut().zip(&results[offset..]).for_each(|(y, r)| *y = r + bias);
                    }
                }
            });
        });
    };
    // SAFETY: the strips cover all columns, and each channel of each column is written.
    unsafe { written(columns * g.outputs, fill) }
}

pub(super) fn backward_data(g: Geometry, weight: &[f32], dy: &[f32]) -> Vec<f32> {
    let (depth, area) = (g.depth(), g.area());
    let taps = g.kernel[0] * g.kernel[1];
    let plane = g.size[0] * g.size[1];
    let mut turned = vec![0.0; weight.len()];
    for (output, row) in weight.chunks_exact(depth.max(1)).enumerate() {
        row.iter().enumerate().for_each(|(i, &w)| turned[i * g.outputs + output] = w);
    }
    // A task is an image, or some channels of it when there are few images.
    let split = rayon::current_num_threads().div_ceil(g.batch.max(1)).min(g.inputs);
    let channels = g.inputs.div_ceil(split);
    let mut dx = vec![0.0; g.batch * g.inputs * plane];
    let tasks = dx.par_chunks_mut(g.inputs * plane).enumerate();
    let tasks = tasks.flat_map(|(image, dx)| {
        dx.par_chunks_mut(channels * plane).enumerate().map(move |(i, dx)| (image, i * channels, dx))
    });
    let strip = (150_000 / (channels * taps + g.outputs)).clamp(64, 1024).min(area).next_multiple_of(16);
    tasks.for_each(|(image, first, dx)| {
        let rows = dx.len() / plane * taps;
        with_scratch([rows * strip, g.outputs * strip], |[inputs, results]| {
            for start in (0..area).step_by(strip) {
                let range = image * area + start..image * area + area.min(start + strip);
                gather_results(g, dy, range.clone(), results, strip);
                let lhs = Matrix { values: results, strides: [1, strip] };
                let rhs = Matrix { values: &turned[first * taps * g.outputs..], strides: [1, g.outputs] };
                multiply([range.len(), rows, g.outputs], inputs, [1, strip], false, lhs, rhs);
                scatter(g, inputs, range, strip, dx);
            }
        });
    });
    dx
}

pub(super) fn backward_weight(g: Geometry, x: &[f32], dy: &[f32]) -> Vec<f32> {
    let (depth, area) = (g.depth(), g.area());
    let columns = g.batch * area;
    let strip = g.strip(columns);
    let of_share = |strips: Range<usize>| {
        let mut dw = vec![0.0; g.outputs * depth];
        with_scratch([depth * strip, g.outputs * strip], |[inputs, results]| {
            for i in strips {
                let range = i * strip..columns.min((i + 1) * strip);
                gather(g, x, range.clone(), inputs, strip);
                gather_results(g, dy, range.clone(), results, strip);
                let lhs = Matrix { values: inputs, strides: [strip, 1] };
                let rhs = Matrix { values: results, strides: [1, strip] };
                multiply([depth, g.outputs, range.len()], &mut dw, [1, depth], true, lhs, rhs);
            }
        });
        dw
    };
    let parts = shares(columns.div_ceil(strip)).into_par_iter().map(of_share).collect();
    let dw = add_up(parts);
    if dw.is_empty() { vec![0.0; g.outputs * depth] } else { dw }
}

/// The parts of a range of results that lie in one image: image, range in the image, offset in the range.
fn images(range: Range<usize>, area: usize) -> impl Iterator<Item = (usize, Range<usize>, usize)> {
    (range.start / area..range.end.div_ceil(area)).map(move |image| {
        let start = range.start.max(image * area);
        let end = range.end.min((image + 1) * area);
        (image, start - image * area..end - image * area, start - range.start)
    })
}

/// Fills a strip with inputs.
fn gather(g: Geometry, x: &[f32], columns: Range<usize>, strip: &mut [f32], width: usize) {
    let taps = g.kernel[0] * g.kernel[1];
    let plane = g.size[0] * g.size[1];
    for run in g.runs(columns) {
        for (depth, row) in strip.chunks_exact_mut(width).enumerate() {
            let (channel, tap) = (depth / taps, depth % taps);
            let row = &mut row[run.offset..run.offset + run.len];
            let source = &x[(run.image * g.inputs + channel) * plane..][..plane];
            match source_row(g, run, tap) {
                Some(span) => span.copy(&source[span.row * g.size[1]..][..g.size[1]], row),
                None => row.fill(0.0),
            }
        }
    }
}

/// Fills a strip with the gradients of results.
fn gather_results(g: Geometry, dy: &[f32], columns: Range<usize>, strip: &mut [f32], width: usize) {
    let area = g.area();
    for (channel, row) in strip.chunks_exact_mut(width).enumerate() {
        for (image, part, offset) in images(columns.clone(), area) {
            let start = (image * g.outputs + channel) * area;
            row[offset..offset + part.len()].copy_from_slice(&dy[start + part.start..start + part.end]);
        }
    }
}

/// Adds a strip of gradients of inputs to the planes of the channels that it holds.
fn scatter(g: Geometry, strip: &[f32], columns: Range<usize>, width: usize, dx: &mut [f32]) {
    let taps = g.kernel[0] * g.kernel[1];
    let plane = g.size[0] * g.size[1];
    for (channel, dx) in dx.chunks_exact_mut(plane).enumerate() {
        for run in g.runs(columns.clone()) {
            for tap in 0..taps {
                if let Some(span) = source_row(g, run, tap) {
                    let from = (channel * taps + tap) * width + run.offset;
                    span.add(&strip[from..from + run.len], &mut dx[span.row * g.size[1]..][..g.size[1]]);
                }
            }
        }
    }
}

/// Where the inputs of a run lie for one tap of the kernel: in one stored row, the `i`-th of `inside` at
/// `(first + i * step) / shrink`; those before and after are zeros.
struct Span {
    row: usize,
    inside: Range<usize>,
    first: usize,
    step: usize,
    shrink: usize,
}

fn source_row(g: Geometry, run: Run, tap: usize) -> Option<Span> {
    let [height, width] = g.seen();
    let y = (run.row * g.stride + tap / g.kernel[1]).checked_sub(g.padding[0]).filter(|&y| y < height)?;
    // Result `i` of the run sees column `at + i * stride - left`.
    let (at, left) = (run.start * g.stride + tap % g.kernel[1], g.padding[1]);
    let begin = left.saturating_sub(at).div_ceil(g.stride).min(run.len);
    let end = (width + left).saturating_sub(at).div_ceil(g.stride).clamp(begin, run.len);
    let first = (at + begin * g.stride).saturating_sub(left);
    let shrink = if g.upsample { 2 } else { 1 };
    Some(Span { row: y / shrink, inside: begin..end, first, step: g.stride, shrink })
}

impl Span {
    fn copy(&self, source: &[f32], target: &mut [f32]) {
        target[..self.inside.start].fill(0.0);
        target[self.inside.end..].fill(0.0);
        let target = &mut target[self.inside.clone()];
        match (self.shrink, self.step) {
            _ if target.is_empty() => {}
            (1, 1) => target.copy_from_slice(&source[self.first..self.first + target.len()]),
            (1, 2) => target.iter_mut().zip(source[self.first..].iter().step_by(2)).for_each(|(t, s)| *t = *s),
            (shrink, step) => {
                for (i, target) in target.iter_mut().enumerate() {
                    *target = source[(self.first + i * step) / shrink];
                }
            }
        }
    }

    fn add(&self, source: &[f32], target: &mut [f32]) {
        let source = &source[self.inside.clone()];
        match (self.shrink, self.step) {
            _ if source.is_empty() => {}
            (1, 1) => target[self.first..].iter_mut().zip(source).for_each(|(t, s)| *t += s),
            (1, 2) => target[self.first..].iter_mut().step_by(2).zip(source).for_each(|(t, s)| *t += s),
            (shrink, step) => {
                for (i, source) in source.iter().enumerate() {
                    target[(self.first + i * step) / shrink] += source;
                }
            }
        }
    }
}
