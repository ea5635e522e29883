//! The product in plain code, for the vectors of the build's base line.

use super::{ROWS, Task, in_parts};

/// # Safety
/// The task's sizes fit its slices.
pub(super) unsafe fn multiply(task: &Task<'_>) {
    // SAFETY: the kernel reads 8 lanes and 4 rows at each depth, which `in_parts` gives.
    unsafe { in_parts::<8, 4>(task, |depth, left, width, right, sums| kernel(depth, left, width, right, sums)) };
}

/// # Safety
/// `left` has 8 values and `right` 4 at each depth, at distances of `width` and `ROWS`.
#[inline(always)]
unsafe fn kernel(depth: usize, left: *const f32, width: usize, right: *const f32, target: &mut [[f32; 8]; 4]) {
    let mut sums = *target;
    for k in 0..depth {
        // SAFETY: as the caller promises; arrays of `f32` need no more alignment than one.
        let (lanes, values) =
            unsafe { (&*left.add(k * width).cast::<[f32; 8]>(), &*right.add(k * ROWS).cast::<[f32; 4]>()) };
        for n in 0..4 {
            for l in 0..8 {
                sums[n][l] += lanes[l] * values[n];
            }
        }
    }
    *target = sums;
}
