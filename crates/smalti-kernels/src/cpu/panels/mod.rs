//! Products of packed matrices on one thread.
//!
//! The left factor lies in panels `[depth, width]` of 16 or 32 lanes, the right one in panels `[depth, ROWS]`. Each value
//! of a product is one sum over the depth in its order, on every CPU with fused multiplication to the same bits.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod plain;

use super::buffer::Shared;
#[cfg(target_arch = "x86_64")]
use super::simd::{Level, level};

/// Rows of a product: columns of a right panel.
pub(crate) const ROWS: usize = 12;

/// Lanes of a wide left panel.
pub(crate) const WIDTH: usize = 32;

/// What a product is added to.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    Zero,
    /// A value for each row.
    Bias(&'a [f32]),
    /// A value for each lane.
    Lanes(&'a [f32]),
    /// What the place holds.
    Sum,
}

/// Where a product goes: lane `l` of row `r` to `start + r * stride + l`.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub values: Shared<'a>,
    pub start: usize,
    pub stride: usize,
}

/// The product of a left panel `[depth, width]` and a right panel `[depth, ROWS]`: its first `rows` rows and `lanes` lanes.
///
/// # Safety
/// Nothing else may access these values of `place` meanwhile, and `Start::Sum` needs them written before.
// Inlined, so that the task is built where it is read: a copy would wait for the stores of the product before.
#[inline(always)]
pub(crate) unsafe fn multiply(
    depth: usize,
    (left, width): (&[f32], usize),
    right: &[f32],
    place: Place<'_>,
    [rows, lanes]: [usize; 2],
    start: Start<'_>,
) {
    assert!(rows > 0 && rows <= ROWS && lanes > 0 && lanes <= width && width <= WIDTH && width.is_multiple_of(16));
    assert!(left.len() >= depth * width && right.len() >= depth * ROWS, "panels shorter than their depth");
    match start {
        Start::Bias(bias) => assert!(bias.len() >= rows, "a bias for each row"),
        Start::Lanes(bias) => assert!(bias.len() >= lanes, "a bias for each lane"),
        Start::Zero | Start::Sum => {}
    }
    let target = place.values.pointer(place.start, (rows - 1) * place.stride + lanes);
    let task = Task {
        depth,
        left: left.as_ptr(),
        width,
        right: right.as_ptr(),
        target,
        stride: place.stride,
        rows,
        lanes,
        start,
    };
    #[cfg(target_arch = "x86_64")]
    match level() {
        // SAFETY: `level` found these features; the task's sizes fit its slices, as checked above.
        Level::Avx512 => return unsafe { avx512::multiply(&task) },
        // SAFETY: as above.
        Level::Avx2 => return unsafe { avx2::multiply(&task) },
        Level::Base => {}
    }
    // SAFETY: the task's sizes fit its slices, as checked above.
    unsafe { plain::multiply(&task) }
}

/// A checked product.
struct Task<'a> {
    depth: usize,
    left: *const f32,
    width: usize,
    right: *const f32,
    target: *mut f32,
    stride: usize,
    rows: usize,
    lanes: usize,
    start: Start<'a>,
}

impl Task<'_> {
    /// What the sums of a row begin with, from a lane on.
    #[inline(always)]
    fn begin(&self, row: usize, lane: usize, sums: &mut [f32]) {
        match self.start {
            Start::Zero | Start::Sum => sums.fill(0.0),
            Start::Bias(bias) => sums.fill(bias[row]),
            Start::Lanes(bias) => sums.iter_mut().zip(&bias[lane..]).for_each(|(sum, bias)| *sum = *bias),
        }
    }
}

/// Runs a kernel of `A` lanes and `B` rows over all parts of a task. `kernel` computes into an array, of which the
/// part that exists is stored.
///
/// # Safety
/// The task's sizes fit its slices, and `kernel` reads `A` lanes and `B` rows at most from where its panels begin.
#[inline(always)]
unsafe fn in_parts<const A: usize, const B: usize>(
    task: &Task<'_>,
    kernel: impl Fn(usize, *const f32, usize, *const f32, &mut [[f32; A]; B]),
) {
    let adds = matches!(task.start, Start::Sum);
    for lane in (0..task.lanes).step_by(A) {
        for row in (0..task.rows).step_by(B) {
            let (lanes, rows) = (A.min(task.lanes - lane), B.min(task.rows - row));
            let mut sums = [[0.0; A]; B];
            for (r, sums) in sums.iter_mut().enumerate().take(rows) {
                task.begin(row + r, lane, sums);
            }
            // SAFETY: `A` divides the width and `B` divides `ROWS`, so that both panels hold what the kernel reads.
            let (left, right) = unsafe { (task.left.add(lane), task.right.add(row)) };
            kernel(task.depth, left, task.width, right, &mut sums);
            for (r, sums) in sums.iter().enumerate().take(rows) {
                // SAFETY: inside of the target, and not accessed by anyone else.
                let target =
                    unsafe { std::slice::from_raw_parts_mut(task.target.add((row + r) * task.stride + lane), lanes) };
                if adds {
                    target.iter_mut().zip(sums).for_each(|(target, sum)| *target += sum);
                } else {
                    target.copy_from_slice(&sums[..lanes]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small whole numbers, so that every order of sums gives the same.
    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7 + seed * 13) % 11) as f32 - 5.0).collect()
    }

    #[test]
    fn every_size_equals_the_plain_sum() {
        for (case, (depth, rows)) in [0, 1, 7, 40].into_iter().flat_map(|d| (1..=ROWS).map(move |r| (d, r))).enumerate()
        {
            for (width, lanes) in [(16, 16), (16, 5), (32, 32), (32, 16), (32, 17), (32, 1), (32, 31)] {
                let (left, right) = (values(depth * width, case), values(depth * ROWS, case + 1));
                let (bias, by_lane) = (values(rows, case + 2), values(lanes, case + 4));
                let stride = lanes + case % 3;
                for start in [Start::Zero, Start::Bias(&bias), Start::Lanes(&by_lane), Start::Sum] {
                    let before = values(rows * stride + 3, case + 3);
                    let mut found = before.clone();
                    let place = Place { values: Shared::new(&mut found), start: 2, stride };
                    // SAFETY: nothing else has the slice.
                    unsafe { multiply(depth, (&left, width), &right, place, [rows, lanes], start) };
                    let mut expected = before.clone();
                    for (r, l) in (0..rows).flat_map(|r| (0..lanes).map(move |l| (r, l))) {
                        let first = match start {
                            Start::Zero => 0.0,
                            Start::Bias(bias) => bias[r],
                            Start::Lanes(bias) => bias[l],
                            Start::Sum => before[2 + r * stride + l],
                        };
                        let sum: f32 = (0..depth).map(|k| left[k * width + l] * right[k * ROWS + r]).sum();
                        expected[2 + r * stride + l] = first + sum;
                    }
                    assert!(found == expected, "depth {depth}, {rows} rows, {lanes} of {width} lanes");
                }
            }
        }
    }
}
