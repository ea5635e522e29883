//! The transforms of Winograd's algorithm in AVX-512 registers, to the same bits as the plain ones.

use super::avx512::{gather, scatter, scatter_halved};
use super::tiles::{POINTS, Panels, Segment, Source, Target};
use crate::cpu::simd::LANES;
use std::arch::x86_64::*;

#[target_feature(enable = "avx512f")]
#[inline]
fn plus(a: __m512, factor: f32, b: __m512) -> __m512 {
    _mm512_fmadd_ps(_mm512_set1_ps(factor), b, a)
}

/// Six registers in a row of memory.
type Line = [[f32; LANES]; 6];

#[target_feature(enable = "avx512f")]
#[inline]
fn store<const N: usize>(line: &mut [[f32; LANES]; N], values: [__m512; N]) {
    for j in 0..N {
        // SAFETY: 16 values.
        unsafe { _mm512_storeu_ps(line[j].as_mut_ptr(), values[j]) };
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load(values: &[f32; LANES]) -> __m512 {
    // SAFETY: 16 values.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

/// Column `j` of `half`, transformed, to the points `6 i + j`.
#[target_feature(enable = "avx512f")]
#[inline]
fn store_points(panels: Panels<'_>, [start, pitch]: [usize; 2], j: usize, values: [__m512; 6]) {
    // SAFETY: the group of this channel lies inside, and belongs to the task.
    let first = panels.values.pointer(start, (POINTS - 1) * pitch + LANES);
    for i in 0..6 {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(first.add((6 * i + j) * pitch), values[i]) };
    }
}

/// `Bᵀ d B` of one group of tiles.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn inputs(source: Source<'_>, channel: usize, segments: &[Segment], panels: Panels<'_>, place: [usize; 2]) {
    let mut half: [Line; 6] = [[[0.0; LANES]; 6]; 6];
    for i in 0..6 {
        store(&mut half[i], input_line(gather::<6>(source, channel, segments, i)));
    }
    for j in 0..6 {
        let d = |i: usize| load(&half[i][j]);
        store_points(panels, place, j, input_line([d(0), d(1), d(2), d(3), d(4), d(5)]));
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn input_line(d: [__m512; 6]) -> [__m512; 6] {
    let (even, odd) = (plus(d[4], -4.0, d[2]), plus(d[3], -4.0, d[1]));
    let (even2, odd2) = (_mm512_sub_ps(d[4], d[2]), _mm512_sub_ps(d[3], d[1]));
    [
        plus(plus(d[4], -5.0, d[2]), 4.0, d[0]),
        _mm512_add_ps(even, odd),
        _mm512_sub_ps(even, odd),
        plus(even2, 2.0, odd2),
        plus(even2, -2.0, odd2),
        plus(plus(d[5], -5.0, d[3]), 4.0, d[1]),
    ]
}

/// `A g Aᵀ` of one group of tiles.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn gradients(
    source: Source<'_>,
    channel: usize,
    segments: &[Segment],
    panels: Panels<'_>,
    place: [usize; 2],
) {
    let mut half: [Line; 4] = [[[0.0; LANES]; 6]; 4];
    for i in 0..4 {
        store(&mut half[i], gradient_line(gather::<4>(source, channel, segments, i)));
    }
    for j in 0..6 {
        let g = |i: usize| load(&half[i][j]);
        store_points(panels, place, j, gradient_line([g(0), g(1), g(2), g(3)]));
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn gradient_line(g: [__m512; 4]) -> [__m512; 6] {
    let (even, odd) = (_mm512_add_ps(g[0], g[2]), _mm512_add_ps(g[1], g[3]));
    let (even2, odd2) = (plus(g[0], 4.0, g[2]), plus(g[1], 4.0, g[3]));
    [g[0], _mm512_add_ps(even, odd), _mm512_sub_ps(even, odd), plus(even2, 2.0, odd2), plus(even2, -2.0, odd2), g[3]]
}

/// `Aᵀ m A` of one group of tiles, plus the bias.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn outputs(
    target: Target<'_>,
    bias: f32,
    channel: usize,
    segments: &[Segment],
    panels: Panels<'_>,
    [start, pitch]: [usize; 2],
) {
    let first = panels.values.pointer(start, (POINTS - 1) * pitch + LANES).cast_const();
    let mut half = [[[0.0; LANES]; 4]; 6];
    for i in 0..6 {
        // SAFETY: the group of this channel lies inside, and nobody writes to it now.
        let m = |j: usize| unsafe { _mm512_loadu_ps(first.add((6 * i + j) * pitch)) };
        store(&mut half[i], output_line([m(0), m(1), m(2), m(3), m(4), m(5)]));
    }
    let bias = _mm512_set1_ps(bias);
    let mut rows = [_mm512_setzero_ps(); 16];
    for j in 0..4 {
        let m = |i: usize| load(&half[i][j]);
        let out = output_line([m(0), m(1), m(2), m(3), m(4), m(5)]);
        for i in 0..4 {
            rows[4 * i + j] = _mm512_add_ps(out[i], bias);
        }
    }
    if target.halve {
        scatter_halved(target, channel, segments, &rows);
    } else {
        scatter(target, channel, segments, &rows);
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn output_line(m: [__m512; 6]) -> [__m512; 4] {
    let (sum, difference) = (_mm512_add_ps(m[1], m[2]), _mm512_sub_ps(m[1], m[2]));
    let (sum2, difference2) = (_mm512_add_ps(m[3], m[4]), _mm512_sub_ps(m[3], m[4]));
    [
        _mm512_add_ps(_mm512_add_ps(m[0], sum), sum2),
        plus(difference, 2.0, difference2),
        plus(sum, 4.0, sum2),
        _mm512_add_ps(plus(difference, 8.0, difference2), m[5]),
    ]
}
