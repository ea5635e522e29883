//! The transforms of 3×3 kernels and of their gradients.

use crate::cpu::buffer::Shared;
use crate::cpu::panels::{ROWS, WIDTH};
use crate::cpu::simd::{LANES, simd};
use std::ops::Range;

/// The kernels that map channels to rows of a product.
#[derive(Clone, Copy)]
pub(super) struct Kernels<'a> {
    /// `[outputs, inputs, 9]`.
    weight: &'a [f32],
    rows: usize,
    /// Distance between the kernels of two rows, and of two channels.
    strides: [usize; 2],
    turned: bool,
}

impl<'a> Kernels<'a> {
    /// Inputs to outputs; turned, the kernels turned by half a turn, outputs to inputs.
    pub fn new(weight: &'a [f32], [outputs, inputs]: [usize; 2], turned: bool) -> Self {
        let (rows, strides) = if turned { (inputs, [9, 9 * inputs]) } else { (outputs, [9 * inputs, 9]) };
        Self { weight, rows, strides, turned }
    }

    /// `G w Gᵀ` of a panel of rows for some channels: at each of the 36 points `[channels, ROWS]`, with some more values
    /// behind, which are arbitrary. The first point goes to `start`, the others follow at the distance `pitch`.
    ///
    /// No other task may access this memory at the same time.
    pub fn transform(self, panel: usize, channels: Range<usize>, target: Shared<'_>, [start, pitch]: [usize; 2]) {
        transform(self, panel * ROWS, channels, target, start, pitch);
    }
}

simd! {
    fn transform(
        kernels: Kernels<'_>,
        first: usize,
        channels: Range<usize>,
        target: Shared<'_>,
        start: usize,
        pitch: usize,
    ) {
        let count = ROWS.min(kernels.rows - first);
        let mut w = [[0.0; LANES]; 9];
        let mut half = [[0.0; LANES]; 18];
        for (depth, channel) in channels.enumerate() {
            for l in 0..count {
                let from = (first + l) * kernels.strides[0] + channel * kernels.strides[1];
                let Some(kernel) = kernels.weight[from..].first_chunk::<9>() else { continue };
                for tap in 0..9 {
                    w[tap][l] = kernel[if kernels.turned { 8 - tap } else { tap }];
                }
            }
            for j in 0..3 {
                for l in 0..LANES {
                    let out = kernel_line(w[j][l], w[3 + j][l], w[6 + j][l]);
                    for i in 0..6 {
                        half[3 * i + j][l] = out[i];
                    }
                }
            }
            for i in 0..6 {
                let mut whole = [[0.0; LANES]; 6];
                for l in 0..LANES {
                    let out = kernel_line(half[3 * i][l], half[3 * i + 1][l], half[3 * i + 2][l]);
                    for j in 0..6 {
                        whole[j][l] = out[j];
                    }
                }
                for j in 0..6 {
                    // The lanes beyond the panel are overwritten by the next channel.
                    // SAFETY: this task's own, one slice at a time.
                    let target = unsafe { target.range(start + (6 * i + j) * pitch + depth * ROWS, LANES) };
                    target.copy_from_slice(&whole[j]);
                }
            }
        }
    }
}

/// One column of `G w`.
#[inline(always)]
fn kernel_line(w0: f32, w1: f32, w2: f32) -> [f32; 6] {
    let (outer, outer4) = ((w0 + w2) * (-1.0 / 6.0), w0 * (1.0 / 24.0) + w2 * (1.0 / 6.0));
    let (inner, inner2) = (w1 * (-1.0 / 6.0), w1 * (1.0 / 12.0));
    [w0 * 0.25, outer + inner, outer - inner, outer4 + inner2, outer4 - inner2, w2]
}

simd! {
    /// `Gᵀ s G`: gradients of kernels `[rows, lanes, 9]` from the sums of a product at each point, `[ROWS, WIDTH]`, the
    /// points at the distance `pitch`. Row `r` goes to `start + r * stride`.
    ///
    /// No other task may access this part of the target at the same time.
    pub(super) fn gradients(
        sums: &[f32],
        pitch: usize,
        rows: usize,
        lanes: usize,
        target: Shared<'_>,
        start: usize,
        stride: usize,
    ) {
        for (row, lane) in (0..rows).flat_map(|row| (0..lanes).step_by(LANES).map(move |lane| (row, lane))) {
            let at = |point: usize| sums[point * pitch + row * WIDTH + lane..].first_chunk::<LANES>();
            let mut half = [[0.0; LANES]; 18];
            for j in 0..6 {
                let points = [at(j), at(6 + j), at(12 + j), at(18 + j), at(24 + j), at(30 + j)];
                let [Some(s0), Some(s1), Some(s2), Some(s3), Some(s4), Some(s5)] = points else { continue };
                for l in 0..LANES {
                    let out = gradient_line(s0[l], s1[l], s2[l], s3[l], s4[l], s5[l]);
                    for i in 0..3 {
                        half[6 * i + j][l] = out[i];
                    }
                }
            }
            let mut whole = [[0.0; LANES]; 9];
            for i in 0..3 {
                for l in 0..LANES {
                    let h = |j: usize| half[6 * i + j][l];
                    let out = gradient_line(h(0), h(1), h(2), h(3), h(4), h(5));
                    for j in 0..3 {
                        whole[3 * i + j][l] = out[j];
                    }
                }
            }
            let count = LANES.min(lanes - lane);
            // SAFETY: this task's own, one slice at a time.
            let target = unsafe { target.range(start + row * stride + 9 * lane, 9 * count) };
            for (l, kernel) in target.as_chunks_mut::<9>().0.iter_mut().enumerate() {
                for tap in 0..9 {
                    kernel[tap] = whole[tap][l];
                }
            }
        }
    }
}

/// One column of `Gᵀ s`.
#[inline(always)]
fn gradient_line(s0: f32, s1: f32, s2: f32, s3: f32, s4: f32, s5: f32) -> [f32; 3] {
    let (sixth, sum) = ((s1 + s2) * (-1.0 / 6.0), s3 + s4);
    [
        s0 * 0.25 + sixth + sum * (1.0 / 24.0),
        (s2 - s1) * (1.0 / 6.0) + (s3 - s4) * (1.0 / 12.0),
        sixth + sum * (1.0 / 6.0) + s5,
    ]
}
