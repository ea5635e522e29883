//! Moves between rows of an image and tiles, by the permutations of AVX-512. The lanes of a register are 16 tiles.

use super::tiles::{Segment, Source, Target};
use crate::cpu::simd::LANES;
use std::arch::x86_64::*;

/// `k % across * step + k / across * stride`.
const fn pattern(across: i32, step: i32, stride: i32) -> [i32; 16] {
    let mut indices = [0; 16];
    let mut k = 0;
    while k < 16 {
        indices[k as usize] = k % across * step + k / across * stride;
        k += 1;
    }
    indices
}

#[target_feature(enable = "avx512f")]
#[inline]
fn vector(indices: &[i32; 16]) -> __m512i {
    // SAFETY: 16 values of 4 bytes, and no alignment is needed.
    unsafe { _mm512_loadu_si512(indices.as_ptr().cast()) }
}

/// The mask of the lanes `from..to`, each limited to `0..=16`.
#[inline(always)]
fn lanes(from: isize, to: isize) -> __mmask16 {
    let (from, to) = (from.clamp(0, 16), to.clamp(0, 16));
    (((1u32 << to) - 1) & !((1u32 << from) - 1)) as u16
}

/// Reads columns of a row; zeros outside, and each value twice when `double`.
#[derive(Clone, Copy)]
struct Row<'a> {
    stored: &'a [f32],
    double: bool,
}

impl Row<'_> {
    /// The columns `x..x + 16`.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn load(self, x: isize) -> __m512 {
        let from = if self.double { x >> 1 } else { x };
        let inside = lanes(-from, self.stored.len() as isize - from);
        // SAFETY: only lanes whose column lies inside of the row are read.
        let values = unsafe { _mm512_maskz_loadu_ps(inside, self.stored.as_ptr().wrapping_offset(from)) };
        if !self.double {
            return values;
        }
        let twice = vector(&const { pattern(1, 0, 1) });
        let twice = _mm512_srli_epi32::<1>(_mm512_add_epi32(twice, _mm512_set1_epi32((x & 1) as i32)));
        _mm512_permutexvar_ps(twice, values)
    }

    /// Lane `lane + t` of register `j` is the value in column `x + 4 t + j`, for `t < len` and `j < N`, `N` 4 or 6; the other
    /// lanes are arbitrary.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn spread<const N: usize>(self, x: isize, lane: usize, len: usize) -> [__m512; N] {
        let mut found = [_mm512_setzero_ps(); N];
        // Indices count modulo 32.
        let first = _mm512_sub_epi32(vector(&const { pattern(1, 0, 4) }), _mm512_set1_epi32(4 * lane as i32));
        let from = |j: usize| _mm512_add_epi32(first, _mm512_set1_epi32(j as i32));
        if len <= 4 {
            let parts = [self.load(x), if N > 4 { self.load(x + 4) } else { _mm512_setzero_ps() }];
            for j in 0..N {
                found[j] = _mm512_permutexvar_ps(from(j % 4), parts[j / 4]);
            }
            return found;
        }
        let values = [self.load(x), self.load(x + 16), self.load(x + 32), self.load(x + 48)];
        let upper = lanes(lane as isize + 8, 16);
        for j in 0..4 {
            let low = _mm512_permutex2var_ps(values[0], from(j), values[1]);
            let high = _mm512_permutex2var_ps(values[2], from(j), values[3]);
            found[j] = _mm512_mask_blend_ps(upper, low, high);
        }
        if N > 4 {
            // The next tile's columns 0 and 1, of which the last lane's lie beyond.
            let beyond = _mm512_castps_si512(self.load(x + 4 * len as isize));
            let (first, second) = (_mm512_castps_si512(found[0]), _mm512_castps_si512(found[1]));
            let after = _mm512_alignr_epi32::<1>(beyond, beyond);
            found[4] = _mm512_castsi512_ps(_mm512_alignr_epi32::<1>(beyond, first));
            found[5] = _mm512_castsi512_ps(_mm512_alignr_epi32::<1>(after, second));
        }
        found
    }
}

/// Row `i` of the values that the tiles of some segments see: one register for each of `N` columns.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn gather<const N: usize>(
    source: Source<'_>,
    channel: usize,
    segments: &[Segment],
    i: usize,
) -> [__m512; N] {
    let [height, width] = source.size;
    let shift = usize::from(source.double);
    let mut found = [_mm512_setzero_ps(); N];
    for &Segment { image, row, column, lane, len, .. } in segments {
        let y = 4 * row as isize - source.padding[0] + i as isize;
        if y < 0 || y as usize >= height << shift {
            continue;
        }
        let start = (image * source.channels + channel) * height * width + (y as usize >> shift) * width;
        let stored = &source.values[start..start + width];
        let x = 4 * column as isize - source.padding[1];
        prefetch(stored.as_ptr().wrapping_offset((height * width) as isize + (x >> shift)), (4 * len) >> shift);
        let values = Row { stored, double: source.double }.spread::<N>(x, lane, len);
        if len == LANES {
            return values;
        }
        let mask = lanes(lane as isize, (lane + len) as isize);
        for j in 0..N {
            found[j] = _mm512_mask_mov_ps(found[j], mask, values[j]);
        }
    }
    found
}

/// Asks for `len` values that are needed soon.
#[target_feature(enable = "avx512f")]
#[inline]
fn prefetch(start: *const f32, len: usize) {
    for at in (0..len).step_by(16) {
        _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(at).cast());
    }
}

/// Writes 4 by 4 values for each tile of the segments, as far as they lie inside: `rows[4 i + j]` has row `i`, column `j`.
///
/// No other task may access these tiles of the channel at the same time.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn scatter(target: Target<'_>, channel: usize, segments: &[Segment], rows: &[__m512; 16]) {
    let [height, width] = target.size;
    for &Segment { image, row, column, lane, len, .. } in segments {
        let count = (4 * len).min(width - 4 * column);
        for i in 0..4.min(height - 4 * row) {
            let start = ((image * target.channels + channel) * height + 4 * row + i) * width + 4 * column;
            // SAFETY: each value belongs to one tile, and no other task writes this tile.
            let target = unsafe { target.values.range(start, count) };
            interleave([rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]], lane, target);
        }
    }
}

/// Writes the sums of each 2 by 2 values, otherwise as [`scatter`].
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn scatter_halved(target: Target<'_>, channel: usize, segments: &[Segment], rows: &[__m512; 16]) {
    let [height, width] = target.size.map(|n| n / 2);
    for &Segment { image, row, column, lane, len, .. } in segments {
        let count = (2 * len).min(width - 2 * column);
        for i in 0..2.min(height - 2 * row) {
            let mut sums = [_mm512_setzero_ps(); 2];
            for j in 0..2 {
                let at = |k: usize| rows[8 * i + 2 * j + k];
                sums[j] = _mm512_add_ps(_mm512_add_ps(at(0), at(1)), _mm512_add_ps(at(4), at(5)));
            }
            let start = ((image * target.channels + channel) * height + 2 * row + i) * width + 2 * column;
            // SAFETY: each value belongs to one tile, and no other task writes this tile.
            let target = unsafe { target.values.range(start, count) };
            interleave_two(sums, lane, target);
        }
    }
}

/// Value `4 t + j` of `target` becomes lane `lane + t` of register `j`.
#[target_feature(enable = "avx512f")]
#[inline]
fn interleave([a, b, c, d]: [__m512; 4], lane: usize, target: &mut [f32]) {
    // Lane `k` of a part is from `k & 1` of the two, at `4 part + k / 4`.
    let mut from = _mm512_add_epi32(vector(&const { pattern_of_four() }), _mm512_set1_epi32(lane as i32));
    for target in target.chunks_mut(LANES) {
        let (ab, cd) = (_mm512_permutex2var_ps(a, from, b), _mm512_permutex2var_ps(c, from, d));
        let values = _mm512_mask_blend_ps(0xCCCC, ab, cd);
        // SAFETY: as many lanes are written as the slice has values.
        unsafe { _mm512_mask_storeu_ps(target.as_mut_ptr(), lanes(0, target.len() as isize), values) };
        from = _mm512_add_epi32(from, _mm512_set1_epi32(4));
    }
}

/// Value `2 t + j` of `target` becomes lane `lane + t` of register `j`.
#[target_feature(enable = "avx512f")]
#[inline]
fn interleave_two([a, b]: [__m512; 2], lane: usize, target: &mut [f32]) {
    let mut from = _mm512_add_epi32(vector(&const { pattern(2, 16, 1) }), _mm512_set1_epi32(lane as i32));
    for target in target.chunks_mut(LANES) {
        let values = _mm512_permutex2var_ps(a, from, b);
        // SAFETY: as many lanes are written as the slice has values.
        unsafe { _mm512_mask_storeu_ps(target.as_mut_ptr(), lanes(0, target.len() as isize), values) };
        from = _mm512_add_epi32(from, _mm512_set1_epi32(8));
    }
}

/// `k / 4 + 16 (k & 1)`.
const fn pattern_of_four() -> [i32; 16] {
    let mut indices = pattern(4, 0, 1);
    let mut k = 1;
    while k < 16 {
        indices[k] += 16;
        k += 2;
    }
    indices
}
