//! The product in AVX-512 registers: up to 12 rows of 32 lanes.

use super::{ROWS, Start, Task};
use std::arch::x86_64::*;

/// # Safety
/// The task's sizes fit its slices.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn multiply(task: &Task<'_>) {
    macro_rules! by_rows {
        ($vectors:literal: $($rows:literal)*) => {
            match task.rows {
                // SAFETY: passed on; the task has this many rows and lanes.
                $($rows => unsafe { kernel::<$vectors, $rows>(task) },)*
                _ => {}
            }
        };
    }
    if task.lanes <= 16 {
        by_rows!(1: 1 2 3 4 5 6 7 8 9 10 11 12);
    } else {
        by_rows!(2: 1 2 3 4 5 6 7 8 9 10 11 12);
    }
}

/// # Safety
/// The task's sizes fit its slices, and it has `N` rows and at most `16 V` lanes.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn kernel<const V: usize, const N: usize>(task: &Task<'_>) {
    let &Task { depth, width, stride, target, .. } = task;
    let last = (1u32 << (task.lanes - 16 * (V - 1))) - 1;
    let masks: [__mmask16; 2] = if V == 1 { [last as u16, 0] } else { [0xFFFF, last as u16] };
    let mut sums = [[_mm512_setzero_ps(); V]; N];
    match task.start {
        Start::Zero | Start::Sum => {}
        Start::Bias(bias) => {
            for n in 0..N {
                for v in 0..V {
                    sums[n][v] = _mm512_set1_ps(bias[n]);
                }
            }
        }
        Start::Lanes(bias) => {
            for v in 0..V {
                // SAFETY: there is a bias for each lane of the mask.
                let bias = unsafe { _mm512_maskz_loadu_ps(masks[v], bias.as_ptr().wrapping_add(16 * v)) };
                for n in 0..N {
                    sums[n][v] = bias;
                }
            }
        }
    }
    let (mut left, mut right) = (task.left, task.right);
    for _ in 0..depth {
        let mut lanes = [_mm512_setzero_ps(); V];
        for v in 0..V {
            // SAFETY: the panel has `width >= 16 V` lanes at each depth.
            lanes[v] = unsafe { _mm512_loadu_ps(left.add(16 * v)) };
        }
        for n in 0..N {
            // SAFETY: the panel has `ROWS` values at each depth.
            let value = _mm512_set1_ps(unsafe { *right.add(n) });
            for v in 0..V {
                sums[n][v] = _mm512_fmadd_ps(lanes[v], value, sums[n][v]);
            }
        }
        // No more than one past the panels' ends.
        (left, right) = (left.wrapping_add(width), right.wrapping_add(ROWS));
    }
    let adds = matches!(task.start, Start::Sum);
    for n in 0..N {
        for v in 0..V {
            if adds {
                // SAFETY: the lanes of the mask lie inside of the target.
                let before = unsafe { _mm512_maskz_loadu_ps(masks[v], target.add(n * stride + 16 * v)) };
                sums[n][v] = _mm512_add_ps(before, sums[n][v]);
            }
            // SAFETY: as above.
            unsafe { _mm512_mask_storeu_ps(target.add(n * stride + 16 * v), masks[v], sums[n][v]) };
        }
    }
}
