//! Sums with gains: `base + y (gain + offset)`, row by row.

use super::buffer::{Shared, written};
use super::simd::simd;
use rayon::prelude::*;

/// Values that are worth a task.
const TASK: usize = 1 << 14;

/// Rows that lie evenly spaced in memory; row `i` begins at `i * stride`.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub values: &'a [f32],
    pub stride: usize,
}

impl<'a> Rows<'a> {
    fn row(self, i: usize, width: usize) -> &'a [f32] {
        &self.values[i * self.stride..][..width]
    }
}

/// The sum for `y` and `base` with rows of `width` values; each of `groups` rows of `gain` is for as many rows of them.
pub(crate) fn forward(base: Rows<'_>, y: &[f32], gain: Rows<'_>, offset: f32, [width, groups]: [usize; 2]) -> Vec<f32> {
    let (per_group, rows) = (rows_of_group(y, width, groups), (TASK / width).max(1));
    let fill = |out: &mut [f32]| {
        out.par_chunks_mut(rows * width).zip(y.par_chunks(rows * width)).enumerate().for_each(|(task, (out, y))| {
            for (i, (out, y)) in out.chunks_exact_mut(width).zip(y.chunks_exact(width)).enumerate() {
                let row = task * rows + i;
                sum(base.row(row, width), y, gain.row(row / per_group, width), offset, out);
            }
        });
    };
    // SAFETY: `y` is made of whole rows, and `sum` writes each value of a row.
    unsafe { written(y.len(), fill) }
}

/// The gradients of `y` and of `gain` for the gradient `d` of the sum, which is that of `base` too. Rows of a group are added up in
/// their order, whatever the number of threads.
pub(crate) fn backward(
    d: &[f32],
    y: &[f32],
    gain: Rows<'_>,
    offset: f32,
    [width, groups]: [usize; 2],
) -> [Vec<f32>; 2] {
    let (per_group, total) = (rows_of_group(y, width, groups), y.len() / width);
    let rows = (TASK / width).max(1);
    // A task has whole groups if each is one row, else a part of one group.
    let each = per_group == 1;
    let parts_of_group = if each { 1 } else { per_group.div_ceil(rows) };
    let tasks = if each { total.div_ceil(rows) } else { groups * parts_of_group };
    let mut parts = vec![0.0; groups * parts_of_group * width];
    let fill = |dy: &mut [f32]| {
        let (dy, parts) = (Shared::new(dy), Shared::new(&mut parts));
        (0..tasks).into_par_iter().for_each(|task| {
            let (group, part) = (task / parts_of_group, task % parts_of_group);
            let first = if each { task * rows } else { group * per_group + part * rows };
            let end = (first + rows).min(if each { total } else { (group + 1) * per_group });
            for row in first..end {
                let (d, y) = (&d[row * width..][..width], &y[row * width..][..width]);
                // SAFETY: each row, and each part of the sums, belongs to one task.
                let (dy, sums) = unsafe {
                    (dy.range(row * width, width), parts.range(if each { row } else { task } * width, width))
                };
                scale(d, gain.row(row / per_group, width), offset, dy);
                add_products(d, y, sums);
            }
        });
    };
    // SAFETY: the tasks have all rows, and `scale` writes each value of a row.
    let dy = unsafe { written(y.len(), fill) };
    if parts_of_group == 1 {
        return [dy, parts];
    }
    let mut dgain = vec![0.0; groups * width];
    for (sums, parts) in dgain.chunks_exact_mut(width).zip(parts.chunks_exact(parts_of_group * width)) {
        for part in parts.chunks_exact(width) {
            sums.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
        }
    }
    [dy, dgain]
}

/// Rows of each group, at least 1.
fn rows_of_group(y: &[f32], width: usize, groups: usize) -> usize {
    let rows = y.len() / width;
    assert!(groups > 0 && rows.is_multiple_of(groups), "{rows} rows in {groups} groups");
    (rows / groups).max(1)
}

simd! {
    fn sum(base: &[f32], y: &[f32], gain: &[f32], offset: f32, out: &mut [f32]) {
        for (((out, &base), &y), &gain) in out.iter_mut().zip(base).zip(y).zip(gain) {
            *out = base + y * (gain + offset);
        }
    }
}

simd! {
    fn scale(d: &[f32], gain: &[f32], offset: f32, dy: &mut [f32]) {
        for ((dy, &d), &gain) in dy.iter_mut().zip(d).zip(gain) {
            *dy = d * (gain + offset);
        }
    }
}

simd! {
    fn add_products(d: &[f32], y: &[f32], sums: &mut [f32]) {
        for ((sum, &d), &y) in sums.iter_mut().zip(d).zip(y) {
            *sum += d * y;
        }
    }
}
