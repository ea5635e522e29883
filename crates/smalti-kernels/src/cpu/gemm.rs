//! Matrix products: large ones from packed pieces of both factors on all threads, small ones by the `gemm` crate.

use super::buffer::{Shared, with_scratch, with_shared};
use super::panels::{self, Place, ROWS, Start, WIDTH};
use super::share::share;
use super::simd::simd;
use super::transpose::transpose_rows;
use gemm::Parallelism;
use rayon::prelude::*;
use std::ops::Range;

/// A matrix in a slice: element `(row, column)` is at `row * strides[0] + column * strides[1]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub values: &'a [f32],
    pub strides: [usize; 2],
}

/// `dst = lhs rhs`, or `dst += lhs rhs` when `add`, for `lhs [m, k]` and `rhs [k, n]`; `strides` are those of `dst`.
/// On one thread: for callers that spread tasks of their own.
pub(crate) fn multiply(
    sizes: [usize; 3],
    dst: &mut [f32],
    strides: [usize; 2],
    add: bool,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
) {
    product(sizes, dst, strides, add, lhs, rhs, Parallelism::None);
}

/// Products with fewer rows, columns or summands than these are not worth packing.
const LEAST: [usize; 3] = [48, WIDTH, 32];

/// Most summands that are packed at a time: the panels of a task stay in the second-level cache.
const DEPTH: usize = 1024;

/// About the most values of what all threads pack together, 8 MiB.
const PACKED: usize = 2 << 20;

/// Most values of the panels that a task goes over for each panel of the other factor, 384 KiB.
const GROUP: usize = 96 << 10;

/// Values that are worth a task to fill.
const FILL: usize = 1 << 15;

/// Summands of a task that packs them.
const SUMMANDS: usize = 32;

/// Most panels of rows of a task, where rows are packed together.
const STRIP: usize = 12;

/// `lhs rhs + bias` for `lhs [m, k]`, `rhs [k, n]` and a bias for each column, row by row into `dst`, by all threads of the pool.
/// All of `dst` is written before it is read. In a product that is packed each value is one sum over at most [`DEPTH`] summands in their
/// order, or the sum of such sums; whether it is packed depends on the sizes.
pub(crate) fn multiply_on_all_threads(
    [m, n, k]: [usize; 3],
    dst: &mut [f32],
    bias: Option<&[f32]>,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
) {
    assert!(bias.is_none_or(|bias| bias.len() == n), "a bias for each of {n} columns");
    if [m, n, k].iter().zip(LEAST).any(|(size, least)| *size < least) {
        if let Some(bias) = bias {
            let fill = |rows: &mut [f32]| rows.chunks_exact_mut(n).for_each(|row| row.copy_from_slice(bias));
            dst.par_chunks_mut((FILL / n).max(1) * n).for_each(fill);
        }
        let threads = match m * n * k < 1 << 19 {
            true => Parallelism::None,
            false => Parallelism::Rayon(rayon::current_num_threads()),
        };
        return product([m, n, k], dst, [n, 1], bias.is_some(), lhs, rhs, threads);
    }
    assert!(fits(dst.len(), [m, n], [n, 1]), "product outside of its slice");
    let depth = k.div_ceil(k.div_ceil(DEPTH));
    let target = Shared::new(dst);
    for first in (0..k).step_by(depth) {
        let summands = first..k.min(first + depth);
        let start = |column: usize| match bias {
            _ if first > 0 => Start::Sum,
            Some(bias) => Start::Lanes(&bias[column..]),
            None => Start::Zero,
        };
        let call = Call { lhs, columns: rhs.turned(), summands, target, stride: n, start };
        // The smaller factor is packed together, and a task packs its part of the larger one where it stays in the task's cache. Where the
        // rows' summands lie apart in memory, so do the columns' (the gradient of a weight), and parts would be read piece by piece.
        if lhs.strides[1] != 1 {
            call.together(m, n);
        } else if m >= n {
            call.rows_by_task(m, n);
        } else {
            call.columns_by_task(m, n);
        }
    }
}

/// The product for some summands.
struct Call<'a, S> {
    lhs: Matrix<'a>,
    /// The right factor's transpose.
    columns: Matrix<'a>,
    summands: Range<usize>,
    target: Shared<'a>,
    /// Columns of the target.
    stride: usize,
    /// What the sums of a panel that begins with this column begin with.
    start: S,
}

impl<'a, S: Fn(usize) -> Start<'a> + Sync> Call<'a, S> {
    /// Both factors packed by all threads.
    fn together(&self, m: usize, n: usize) {
        let depth = self.summands.len();
        let (columns, rows) = (piece::<WIDTH>(n, depth), piece::<ROWS>(m, depth));
        with_shared((columns + rows) * depth, |memory| {
            // The kernel has a panel of columns in its lanes, and calls that the left one.
            let (left, right) = memory.split_at_mut(columns * depth);
            for columns in parts(0..n, columns) {
                pack_together::<WIDTH>(left, self.columns, columns.clone(), self.summands.clone());
                for rows in parts(0..m, rows) {
                    pack_together::<ROWS>(right, self.lhs, rows.clone(), self.summands.clone());
                    let group = even(columns.len().div_ceil(WIDTH), GROUP / (WIDTH * depth)) * WIDTH;
                    let strip = STRIP * ROWS;
                    let strips = rows.len().div_ceil(strip);
                    share(columns.len().div_ceil(group) * strips, |task| {
                        let (first, top) = (task / strips * group, task % strips * strip);
                        let part = columns.start + first..columns.end.min(columns.start + first + group);
                        let lines = rows.start + top..rows.end.min(rows.start + top + strip);
                        // SAFETY: each tile belongs to one task.
                        unsafe { self.tiles([&left[first * depth..], &right[top * depth..]], [lines, part]) };
                    });
                }
            }
        });
    }

    /// Columns packed by all threads, rows by the task that needs them.
    fn rows_by_task(&self, m: usize, n: usize) {
        let depth = self.summands.len();
        let columns = piece::<WIDTH>(n, depth);
        let strip = even(m.div_ceil(ROWS), GROUP / (ROWS * depth)) * ROWS;
        with_shared(columns * depth, |left| {
            for columns in parts(0..n, columns) {
                pack_together::<WIDTH>(left, self.columns, columns.clone(), self.summands.clone());
                let group = (GROUP / (WIDTH * depth)).max(1) * WIDTH;
                share(m.div_ceil(strip), |task| {
                    let rows = task * strip..m.min((task + 1) * strip);
                    with_scratch([strip * depth], |[right]| {
                        let summands = self.summands.clone();
                        // SAFETY: the scratch memory is this thread's.
                        unsafe { pack::<ROWS>(Shared::new(right), self.lhs, rows.clone(), summands, 0..depth) };
                        for part in parts(columns.clone(), group) {
                            let left = &left[(part.start - columns.start) * depth..];
                            // SAFETY: each row belongs to one task.
                            unsafe { self.tiles([left, right], [rows.clone(), part]) };
                        }
                    });
                });
            }
        });
    }

    /// Rows packed by all threads, columns by the task that needs them.
    fn columns_by_task(&self, m: usize, n: usize) {
        let depth = self.summands.len();
        let rows = piece::<ROWS>(m, depth);
        let group = even(n.div_ceil(WIDTH), GROUP / (WIDTH * depth)) * WIDTH;
        with_shared(rows * depth, |right| {
            for rows in parts(0..m, rows) {
                pack_together::<ROWS>(right, self.lhs, rows.clone(), self.summands.clone());
                share(n.div_ceil(group), |task| {
                    let columns = task * group..n.min((task + 1) * group);
                    with_scratch([group * depth], |[left]| {
                        let summands = self.summands.clone();
                        // SAFETY: the scratch memory is this thread's, and each column belongs to one task.
                        unsafe {
                            pack::<WIDTH>(Shared::new(left), self.columns, columns.clone(), summands, 0..depth);
                            self.tiles([left, right], [rows.clone(), columns]);
                        }
                    });
                });
            }
        });
    }

    /// All tiles of packed columns and rows, on this thread.
    ///
    /// # Safety
    /// No other thread may access them meanwhile.
    unsafe fn tiles(&self, [left, right]: [&[f32]; 2], [rows, columns]: [Range<usize>; 2]) {
        let depth = self.summands.len();
        for row in (0..rows.len()).step_by(ROWS) {
            for column in (0..columns.len()).step_by(WIDTH) {
                let size = [ROWS.min(rows.len() - row), WIDTH.min(columns.len() - column)];
                let start = (rows.start + row) * self.stride + columns.start + column;
                let place = Place { values: self.target, start, stride: self.stride };
                // A panel of so many columns or rows begins at the first of them times the depth.
                let (left, right) = (&left[column * depth..], &right[row * depth..]);
                // SAFETY: the caller's promise; the tile was written for the summands before.
                unsafe {
                    let start = (self.start)(columns.start + column);
                    panels::multiply(depth, (left, WIDTH), right, place, size, start);
                }
            }
        }
    }
}

/// Rows of equal pieces that are packed together, in whole panels of `N`.
fn piece<const N: usize>(size: usize, depth: usize) -> usize {
    size.div_ceil(size.div_ceil(PACKED / depth)).next_multiple_of(N)
}

/// Pieces of a range, all but the last one of this length.
fn parts(range: Range<usize>, length: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(length).map(move |first| first..range.end.min(first + length))
}

/// How many of the panels a task takes, `most` or fewer, so that the threads finish together; of those numbers the largest.
fn even(panels: usize, most: usize) -> usize {
    let threads = rayon::current_num_threads();
    let last = |each: &usize| panels.div_ceil(*each).div_ceil(threads) * each;
    (1..=most.clamp(1, panels)).rev().min_by_key(last).unwrap_or(1)
}

impl Matrix<'_> {
    /// The transpose.
    fn turned(self) -> Self {
        let [rows, columns] = self.strides;
        Self { strides: [columns, rows], ..self }
    }
}

/// [`pack`] on all threads.
fn pack_together<const N: usize>(panels: &mut [f32], matrix: Matrix<'_>, rows: Range<usize>, summands: Range<usize>) {
    let (depth, panels) = (summands.len(), Shared::new(panels));
    if matrix.strides[1] == 1 {
        return share(rows.len().div_ceil(N), |panel| {
            let first = rows.start + panel * N;
            // SAFETY: each panel belongs to one task.
            unsafe {
                let panel = Shared::new(panels.range(panel * N * depth, N * depth));
                pack::<N>(panel, matrix, first..rows.end.min(first + N), summands.clone(), 0..depth);
            }
        });
    }
    // Some summands of all panels, so that memory is read line by line.
    share(depth.div_ceil(SUMMANDS), |task| {
        let part = task * SUMMANDS..depth.min((task + 1) * SUMMANDS);
        // SAFETY: these summands belong to one task.
        unsafe { pack::<N>(panels, matrix, rows.clone(), summands.clone(), part) };
    });
}

/// Packs the summands of these rows into panels `[summands, N]`, with zeros where there is no row: `part` of them, all if each row's
/// lie side by side.
///
/// # Safety
/// No other thread may access these meanwhile.
unsafe fn pack<const N: usize>(
    panels: Shared<'_>,
    matrix: Matrix<'_>,
    rows: Range<usize>,
    summands: Range<usize>,
    part: Range<usize>,
) {
    let (depth, [of_row, of_summand]) = (summands.len(), matrix.strides);
    let count = rows.len();
    let values = &matrix.values[rows.start * of_row + summands.start * of_summand..];
    if of_summand == 1 {
        for first in (0..count).step_by(N) {
            // SAFETY: the caller's promise.
            let panel = unsafe { panels.range(first * depth, N * depth) };
            let rows = (first..count.min(first + N)).map(|row| &values[row * of_row..]);
            transpose_rows(rows, panel, [depth, N]);
        }
    } else if of_row == 1 {
        match N {
            WIDTH => copy_lanes(panels, values, [count, of_summand, depth], part),
            _ => copy_rows(panels, values, [count, of_summand, depth], part),
        }
    } else {
        for (summand, first) in part.flat_map(|summand| (0..count).step_by(N).map(move |first| (summand, first))) {
            // SAFETY: the caller's promise.
            let lanes = unsafe { panels.range(first * depth + summand * N, N) };
            for (row, lane) in lanes.iter_mut().enumerate() {
                let row = first + row;
                *lane = if row < count { values[summand * of_summand + row * of_row] } else { 0.0 };
            }
        }
    }
}

simd! {
    fn copy_lanes(panels: Shared<'_>, values: &[f32], sizes: [usize; 3], part: Range<usize>) {
        copy::<WIDTH>(panels, values, sizes, part);
    }
}

simd! {
    fn copy_rows(panels: Shared<'_>, values: &[f32], sizes: [usize; 3], part: Range<usize>) {
        copy::<ROWS>(panels, values, sizes, part);
    }
}

/// Summands of `count` rows, each summand's side by side and `stride` apart, to panels `[depth, N]`.
#[inline(always)]
fn copy<const N: usize>(panels: Shared<'_>, values: &[f32], [count, stride, depth]: [usize; 3], part: Range<usize>) {
    for summand in part {
        let line = &values[summand * stride..][..count];
        // SAFETY: the caller of `pack` promises that nobody else accesses these lanes.
        let lanes = |panel: usize| unsafe { panels.range((panel * depth + summand) * N, N) };
        let (whole, rest) = line.as_chunks::<N>();
        for (panel, values) in whole.iter().enumerate() {
            lanes(panel).copy_from_slice(values);
        }
        if !rest.is_empty() {
            let lanes = lanes(whole.len());
            lanes[..rest.len()].copy_from_slice(rest);
            lanes[rest.len()..].fill(0.0);
        }
    }
}

fn product(
    [m, n, k]: [usize; 3],
    dst: &mut [f32],
    strides: [usize; 2],
    add: bool,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    threads: Parallelism,
) {
    assert!(fits(dst.len(), [m, n], strides), "product outside of its slice");
    assert!(fits(lhs.values.len(), [m, k], lhs.strides), "left factor outside of its slice");
    assert!(fits(rhs.values.len(), [k, n], rhs.strides), "right factor outside of its slice");
    let [dst_rs, dst_cs] = strides.map(|s| s as isize);
    let [lhs_rs, lhs_cs] = lhs.strides.map(|s| s as isize);
    let [rhs_rs, rhs_cs] = rhs.strides.map(|s| s as isize);
    // SAFETY: all elements that the sizes and strides reach are inside of the slices, as checked above, and `dst` is
    // borrowed exclusively.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            dst_cs,
            dst_rs,
            add,
            lhs.values.as_ptr(),
            lhs_cs,
            lhs_rs,
            rhs.values.as_ptr(),
            rhs_cs,
            rhs_rs,
            1.0,
            1.0,
            false,
            false,
            false,
            threads,
        );
    }
}

/// Whether the last element of a matrix lies inside of a slice.
fn fits(len: usize, [rows, columns]: [usize; 2], [rs, cs]: [usize; 2]) -> bool {
    rows == 0 || columns == 0 || (rows - 1) * rs + (columns - 1) * cs < len
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small whole numbers, so that every order of sums gives the same.
    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7 + i / 13 + seed * 5) % 9) as f32 - 4.0).collect()
    }

    #[test]
    fn every_size_and_layout_equals_the_plain_sum() {
        // Small ones, edges of panels, and several pieces of summands, columns and rows.
        let sizes = [[3, 40, 50], [48, 32, 32], [49, 65, 33], [60, 3100, 2100], [3100, 33, 700], [97, 131, 1025]];
        for (case, [m, n, k]) in sizes.into_iter().enumerate() {
            let (a, b, bias) = (values(m * k, case), values(k * n, case + 1), values(n, case + 2));
            for turned in 0..4 {
                let lhs = Matrix { values: &a, strides: if turned & 1 == 0 { [k, 1] } else { [1, m] } };
                let rhs = Matrix { values: &b, strides: if turned & 2 == 0 { [n, 1] } else { [1, k] } };
                let bias = (turned != 1).then_some(&bias[..]);
                let mut found = vec![f32::NAN; m * n];
                multiply_on_all_threads([m, n, k], &mut found, bias, lhs, rhs);
                let mut expected = vec![0.0; m * n];
                for (row, expected) in expected.chunks_exact_mut(n).enumerate() {
                    expected.copy_from_slice(bias.unwrap_or(&vec![0.0; n]));
                    for i in 0..k {
                        let left = a[row * lhs.strides[0] + i * lhs.strides[1]];
                        let right = (0..n).map(|column| b[i * rhs.strides[0] + column * rhs.strides[1]]);
                        expected.iter_mut().zip(right).for_each(|(sum, right)| *sum += left * right);
                    }
                }
                assert!(found == expected, "{:?}, layout {turned}", [m, n, k]);
            }
        }
    }
}
