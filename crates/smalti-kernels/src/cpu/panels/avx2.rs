//! The product in AVX2 registers: 6 rows of 16 lanes at a time.

use super::{ROWS, Task, in_parts};
use std::arch::x86_64::*;

/// # Safety
/// The task's sizes fit its slices.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn multiply(task: &Task<'_>) {
    // SAFETY: the kernel reads 16 lanes and 6 rows at each depth, which `in_parts` gives; this function runs only where the
    // features were found.
    unsafe { in_parts::<16, 6>(task, |depth, left, width, right, sums| kernel(depth, left, width, right, sums)) };
}

/// # Safety
/// `left` has 16 values and `right` 6 at each depth, at distances of `width` and `ROWS`.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn kernel(depth: usize, mut left: *const f32, width: usize, mut right: *const f32, target: &mut [[f32; 16]; 6]) {
    let mut sums = [[_mm256_setzero_ps(); 2]; 6];
    for n in 0..6 {
        for v in 0..2 {
            // SAFETY: 8 of the row's 16 values.
            sums[n][v] = unsafe { _mm256_loadu_ps(target[n].as_ptr().add(8 * v)) };
        }
    }
    for _ in 0..depth {
        // SAFETY: 16 values, as the caller promises.
        let lanes = unsafe { [_mm256_loadu_ps(left), _mm256_loadu_ps(left.add(8))] };
        for n in 0..6 {
            // SAFETY: 6 values, as the caller promises.
            let value = _mm256_set1_ps(unsafe { *right.add(n) });
            for v in 0..2 {
                sums[n][v] = _mm256_fmadd_ps(lanes[v], value, sums[n][v]);
            }
        }
        (left, right) = (left.wrapping_add(width), right.wrapping_add(ROWS));
    }
    for n in 0..6 {
        for v in 0..2 {
            // SAFETY: 8 of the row's 16 values.
            unsafe { _mm256_storeu_ps(target[n].as_mut_ptr().add(8 * v), sums[n][v]) };
        }
    }
}
