//! The transforms of Winograd's algorithm F(4×4, 3×3) (Lavin and Gray 2015, arXiv 1509.09308), on 16 tiles at a time.

use super::tiles::{Grid, POINTS, Panels, Source, Target, gather, scatter, scatter_halved, segments};
use crate::cpu::simd::{LANES, plus, simd};
use std::ops::Range;

simd! {
    /// `Bᵀ d B` of some channels of `tiles`; the last group of 16 is filled up with zeros.
    ///
    /// No other task may access these channels of the panels at the same time.
    pub(super) fn inputs(
        source: Source<'_>,
        grid: Grid,
        tiles: Range<usize>,
        channels: Range<usize>,
        panels: Panels<'_>,
    ) {
        let count = tiles.len();
        let segments = segments(grid, tiles.start, count);
        let mut seen = [[0.0; LANES]; POINTS];
        let mut half = [[0.0; LANES]; POINTS];
        for channel in channels {
            for group in segments.chunk_by(|a, b| a.group == b.group) {
                let [start, pitch] = panels.group(group[0].group, channel);
                #[cfg(target_arch = "x86_64")]
                if WIDE {
                    // SAFETY: `WIDE` code runs only where AVX-512 was found.
                    unsafe { super::wide::inputs(source, channel, group, panels, [start, pitch]) };
                    continue;
                }
                if count - group[0].group * LANES < LANES {
                    seen = [[0.0; LANES]; POINTS];
                }
                for &segment in group {
                    gather::<6>(source, channel, segment, &mut seen);
                }
                for j in 0..6 {
                    for l in 0..LANES {
                        let d = |i: usize| seen[6 * i + j][l];
                        let out = input_line::<FUSED>(d(0), d(1), d(2), d(3), d(4), d(5));
                        for i in 0..6 {
                            half[6 * i + j][l] = out[i];
                        }
                    }
                }
                for i in 0..6 {
                    let mut whole = [[0.0; LANES]; 6];
                    for l in 0..LANES {
                        let d = |j: usize| half[6 * i + j][l];
                        let out = input_line::<FUSED>(d(0), d(1), d(2), d(3), d(4), d(5));
                        for j in 0..6 {
                            whole[j][l] = out[j];
                        }
                    }
                    for j in 0..6 {
                        // SAFETY: the group of this channel belongs to this task.
                        let target = unsafe { panels.values.range(start + (6 * i + j) * pitch, LANES) };
                        target.copy_from_slice(&whole[j]);
                    }
                }
            }
        }
    }
}

/// One column of `Bᵀ d`.
#[inline(always)]
fn input_line<const FUSED: bool>(d0: f32, d1: f32, d2: f32, d3: f32, d4: f32, d5: f32) -> [f32; 6] {
    let (even, odd) = (plus::<FUSED>(d4, -4.0, d2), plus::<FUSED>(d3, -4.0, d1));
    let (even2, odd2) = (d4 - d2, d3 - d1);
    [
        plus::<FUSED>(plus::<FUSED>(d4, -5.0, d2), 4.0, d0),
        even + odd,
        even - odd,
        plus::<FUSED>(even2, 2.0, odd2),
        plus::<FUSED>(even2, -2.0, odd2),
        plus::<FUSED>(plus::<FUSED>(d5, -5.0, d3), 4.0, d1),
    ]
}

simd! {
    /// `A g Aᵀ` of the gradients of `tiles`, otherwise as [`inputs`].
    pub(super) fn gradients(
        source: Source<'_>,
        grid: Grid,
        tiles: Range<usize>,
        channels: Range<usize>,
        panels: Panels<'_>,
    ) {
        let count = tiles.len();
        let segments = segments(grid, tiles.start, count);
        let mut seen = [[0.0; LANES]; 16];
        let mut half = [[0.0; LANES]; 24];
        for channel in channels {
            for group in segments.chunk_by(|a, b| a.group == b.group) {
                let [start, pitch] = panels.group(group[0].group, channel);
                #[cfg(target_arch = "x86_64")]
                if WIDE {
                    // SAFETY: `WIDE` code runs only where AVX-512 was found.
                    unsafe { super::wide::gradients(source, channel, group, panels, [start, pitch]) };
                    continue;
                }
                if count - group[0].group * LANES < LANES {
                    seen = [[0.0; LANES]; 16];
                }
                for &segment in group {
                    gather::<4>(source, channel, segment, &mut seen);
                }
                for j in 0..4 {
                    for l in 0..LANES {
                        let g = |i: usize| seen[4 * i + j][l];
                        let out = gradient_line::<FUSED>(g(0), g(1), g(2), g(3));
                        for i in 0..6 {
                            half[4 * i + j][l] = out[i];
                        }
                    }
                }
                for i in 0..6 {
                    let mut whole = [[0.0; LANES]; 6];
                    for l in 0..LANES {
                        let g = |j: usize| half[4 * i + j][l];
                        let out = gradient_line::<FUSED>(g(0), g(1), g(2), g(3));
                        for j in 0..6 {
                            whole[j][l] = out[j];
                        }
                    }
                    for j in 0..6 {
                        // SAFETY: the group of this channel belongs to this task.
                        let target = unsafe { panels.values.range(start + (6 * i + j) * pitch, LANES) };
                        target.copy_from_slice(&whole[j]);
                    }
                }
            }
        }
    }
}

/// One column of `A g`.
#[inline(always)]
fn gradient_line<const FUSED: bool>(g0: f32, g1: f32, g2: f32, g3: f32) -> [f32; 6] {
    let (even, odd) = (g0 + g2, g1 + g3);
    let (even2, odd2) = (plus::<FUSED>(g0, 4.0, g2), plus::<FUSED>(g1, 4.0, g3));
    [g0, even + odd, even - odd, plus::<FUSED>(even2, 2.0, odd2), plus::<FUSED>(even2, -2.0, odd2), g3]
}

simd! {
    /// `Aᵀ m A` of `tiles`, plus the bias, to some channels of the target.
    ///
    /// No other task may access these channels of the tiles or write to the panels at the same time.
    pub(super) fn outputs(
        target: Target<'_>,
        bias: Option<&[f32]>,
        grid: Grid,
        tiles: Range<usize>,
        channels: Range<usize>,
        panels: Panels<'_>,
    ) {
        let mut half = [[0.0; LANES]; 24];
        let mut whole = [[0.0; LANES]; 16];
        let segments = segments(grid, tiles.start, tiles.len());
        for channel in channels {
            let bias = bias.map_or(0.0, |bias| bias[channel]);
            for group in segments.chunk_by(|a, b| a.group == b.group) {
                let [start, pitch] = panels.group(group[0].group, channel);
                #[cfg(target_arch = "x86_64")]
                if WIDE {
                    // SAFETY: `WIDE` code runs only where AVX-512 was found.
                    unsafe { super::wide::outputs(target, bias, channel, group, panels, [start, pitch]) };
                    continue;
                }
                for i in 0..6 {
                    let mut points = [[0.0; LANES]; 6];
                    for j in 0..6 {
                        // SAFETY: nobody writes to the panels now.
                        points[j].copy_from_slice(unsafe { panels.values.read(start + (6 * i + j) * pitch, LANES) });
                    }
                    for l in 0..LANES {
                        let m = |j: usize| points[j][l];
                        let out = output_line::<FUSED>(m(0), m(1), m(2), m(3), m(4), m(5));
                        for j in 0..4 {
                            half[4 * i + j][l] = out[j];
                        }
                    }
                }
                for j in 0..4 {
                    for l in 0..LANES {
                        let m = |i: usize| half[4 * i + j][l];
                        let out = output_line::<FUSED>(m(0), m(1), m(2), m(3), m(4), m(5));
                        for i in 0..4 {
                            whole[4 * i + j][l] = out[i] + bias;
                        }
                    }
                }
                for &segment in group {
                    if target.halve {
                        scatter_halved(target, channel, segment, &whole);
                    } else {
                        scatter(target, channel, segment, &whole);
                    }
                }
            }
        }
    }
}

/// One column of `Aᵀ m`.
#[inline(always)]
fn output_line<const FUSED: bool>(m0: f32, m1: f32, m2: f32, m3: f32, m4: f32, m5: f32) -> [f32; 4] {
    let (sum, difference) = (m1 + m2, m1 - m2);
    let (sum2, difference2) = (m3 + m4, m3 - m4);
    [
        m0 + sum + sum2,
        plus::<FUSED>(difference, 2.0, difference2),
        plus::<FUSED>(sum, 4.0, sum2),
        plus::<FUSED>(difference, 8.0, difference2) + m5,
    ]
}
