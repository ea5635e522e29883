//! Matrix products: large ones from packed pieces of both factors on all threads, small ones by the `gemm` crate.

use super::buffer::{Shared, with_shared};
use super::panels::{self, Place, ROWS, Start, WIDTH};
use super::share::share;
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

/// About the most values of the packed columns of the right factor, 8 MiB, and of the packed rows of the left one.
const PACKED: usize = 2 << 20;

/// Values of the panels of columns that a task goes over for each panel of rows, 384 KiB.
const GROUP: usize = 96 << 10;

/// Values that are worth a task to fill.
const FILL: usize = 1 << 15;

/// Summands of a task that packs them.
const SUMMANDS: usize = 32;

/// Panels of rows of a task.
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
    // Equal pieces.
    let piece = |size: usize, most: usize, unit: usize| size.div_ceil(size.div_ceil(most)).next_multiple_of(unit);
    let depth = piece(k, DEPTH, 1);
    let columns = piece(n, PACKED / depth, WIDTH);
    let lines = piece(m, PACKED / depth, ROWS);
    let target = Shared::new(dst);
    // The kernel has a panel of columns in its lanes, and calls that the left one.
    with_shared((columns + lines) * depth, |memory| {
        let (left, right) = memory.split_at_mut(columns * depth);
        for first in (0..k).step_by(depth) {
            let summands = first..k.min(first + depth);
            for column in (0..n).step_by(columns) {
                let part = column..n.min(column + columns);
                pack(left, WIDTH, rhs.turned(), part.clone(), summands.clone());
                for row in (0..m).step_by(lines) {
                    let rows = row..m.min(row + lines);
                    pack(right, ROWS, lhs, rows.clone(), summands.clone());
                    let start = |column: usize| match bias {
                        _ if first > 0 => Start::Sum,
                        Some(bias) => Start::Lanes(&bias[column..]),
                        None => Start::Zero,
                    };
                    tiles([left, right], summands.len(), (target, n), [rows, part.clone()], start);
                }
            }
        }
    });
}

/// All tiles of packed rows and columns.
fn tiles<'a>(
    [left, right]: [&[f32]; 2],
    depth: usize,
    (target, stride): (Shared<'_>, usize),
    [rows, columns]: [Range<usize>; 2],
    start: impl Fn(usize) -> Start<'a> + Sync,
) {
    let panels = columns.len().div_ceil(WIDTH);
    let groups = panels.div_ceil((GROUP / (WIDTH * depth)).max(1));
    let (group, strip) = (panels.div_ceil(groups) * WIDTH, STRIP * ROWS);
    let strips = rows.len().div_ceil(strip);
    share(columns.len().div_ceil(group) * strips, |task| {
        let (first, top) = (task / strips * group, task % strips * strip);
        for row in (top..rows.len().min(top + strip)).step_by(ROWS) {
            for column in (first..columns.len().min(first + group)).step_by(WIDTH) {
                let size = [ROWS.min(rows.len() - row), WIDTH.min(columns.len() - column)];
                let place =
                    Place { values: target, start: (rows.start + row) * stride + columns.start + column, stride };
                // A panel of so many columns or rows begins at the first of them times the depth.
                let (left, right) = (&left[column * depth..], &right[row * depth..]);
                // SAFETY: each tile belongs to one task, and was written for the summands before.
                unsafe {
                    panels::multiply(depth, (left, WIDTH), right, place, size, start(columns.start + column));
                }
            }
        }
    });
}

impl Matrix<'_> {
    /// The transpose.
    fn turned(self) -> Self {
        let [rows, columns] = self.strides;
        Self { strides: [columns, rows], ..self }
    }
}

/// Packs the summands of these rows: panels `[summands, width]`, with zeros where there is no row.
fn pack(panels: &mut [f32], width: usize, matrix: Matrix<'_>, rows: Range<usize>, summands: Range<usize>) {
    let (depth, panels) = (summands.len(), Shared::new(panels));
    let [of_row, of_summand] = matrix.strides;
    let count = rows.len().div_ceil(width);
    let part = |panel: usize, first: usize| {
        let row = panel * width;
        let values = &matrix.values[(rows.start + row) * of_row + (summands.start + first) * of_summand..];
        (values, width.min(rows.len() - row))
    };
    if of_summand == 1 {
        return share(count, |panel| {
            let (values, count) = part(panel, 0);
            // SAFETY: each panel belongs to one task.
            let panel = unsafe { panels.range(panel * width * depth, width * depth) };
            transpose_rows((0..count).map(|row| &values[row * of_row..]), panel, [depth, width]);
        });
    }
    // Some summands of all panels, so that memory is read line by line.
    share(depth.div_ceil(SUMMANDS), |task| {
        let first = task * SUMMANDS;
        let size = SUMMANDS.min(depth - first) * width;
        for panel in 0..count {
            let (values, count) = part(panel, first);
            // SAFETY: these summands belong to this task.
            let lanes = unsafe { panels.range((panel * depth + first) * width, size) };
            let whole = of_row == 1 && count == width && of_summand >= width;
            match width {
                WIDTH if whole => copy_lanes::<WIDTH>(lanes, values, of_summand),
                ROWS if whole => copy_lanes::<ROWS>(lanes, values, of_summand),
                _ => {
                    for (summand, lanes) in lanes.chunks_exact_mut(width).enumerate() {
                        for (row, lane) in lanes.iter_mut().enumerate() {
                            *lane = if row < count { values[summand * of_summand + row * of_row] } else { 0.0 };
                        }
                    }
                }
            }
        }
    });
}

/// Whole groups of `N` values, so many apart.
fn copy_lanes<const N: usize>(panel: &mut [f32], values: &[f32], stride: usize) {
    for (lanes, values) in panel.as_chunks_mut::<N>().0.iter_mut().zip(values.chunks(stride)) {
        lanes.copy_from_slice(&values[..N]);
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
