//! Moves between rows of an image and tiles, by the permutations of AVX-512: the part of the transforms that the compiler
//! does not vectorise well.

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
}

/// Lane `lane + t` of `tiles[j]` becomes the value in column `x + 4 t + j` of a row, for `t < len` and `j < N`.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn spread<const N: usize>(
    stored: &[f32],
    x: isize,
    double: bool,
    tiles: &mut [[f32; LANES]],
    lane: usize,
    len: usize,
) {
    let row = Row { stored, double };
    let every_fourth = vector(&const { pattern(1, 0, 4) });
    let written = lanes(0, len as isize);
    let mut store = |j: usize, values: __m512| {
        let target = tiles[j][lane..lane + len].as_mut_ptr();
        // SAFETY: the mask has `len` lanes, as many as the slice has values.
        unsafe { _mm512_mask_storeu_ps(target, written, values) };
    };
    if len <= 8 {
        let pairs = if len <= 4 { 1 } else { 2 };
        let mut parts = [[_mm512_setzero_ps(); 2]; 2];
        for (k, part) in parts.iter_mut().enumerate().take(if N > 4 { 2 } else { 1 }) {
            for (i, values) in part.iter_mut().enumerate().take(pairs) {
                *values = row.load(x + 4 * k as isize + 16 * i as isize);
            }
        }
        for j in 0..N {
            let [low, high] = parts[j / 4];
            let from = _mm512_add_epi32(every_fourth, _mm512_set1_epi32((j % 4) as i32));
            store(j, _mm512_permutex2var_ps(low, from, high));
        }
        return;
    }
    let values: [__m512; 4] = [row.load(x), row.load(x + 16), row.load(x + 32), row.load(x + 48)];
    let mut phases = [_mm512_setzero_ps(); 4];
    for (j, phase) in phases.iter_mut().enumerate() {
        // Indices count modulo 32: the upper eight lanes repeat the pattern of the lower.
        let from = _mm512_add_epi32(every_fourth, _mm512_set1_epi32(j as i32));
        let low = _mm512_permutex2var_ps(values[0], from, values[1]);
        let high = _mm512_permutex2var_ps(values[2], from, values[3]);
        *phase = _mm512_mask_blend_ps(0xFF00, low, high);
        store(j, *phase);
    }
    if N > 4 {
        let beyond = _mm512_castps_si512(row.load(x + 64));
        let after = _mm512_alignr_epi32::<1>(beyond, beyond);
        store(4, _mm512_castsi512_ps(_mm512_alignr_epi32::<1>(beyond, _mm512_castps_si512(phases[0]))));
        store(5, _mm512_castsi512_ps(_mm512_alignr_epi32::<1>(after, _mm512_castps_si512(phases[1]))));
    }
}

/// Column `4 t + j` of `target` becomes lane `lane + t` of `tiles[j]`.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn interleave(tiles: &[[f32; LANES]], lane: usize, target: &mut [f32]) {
    let read = lanes(0, (LANES - lane) as isize);
    // SAFETY: only the lanes from `lane` to the last are read.
    let load = |j: usize| unsafe { _mm512_maskz_loadu_ps(read, tiles[j][lane..].as_ptr()) };
    let [a, b, c, d] = [load(0), load(1), load(2), load(3)];
    // Lane `k` of a part is from `k & 1` of the two, at `4 part + k / 4`.
    let mut from = vector(&const { pattern_of_four() });
    for target in target.chunks_mut(LANES) {
        let (ab, cd) = (_mm512_permutex2var_ps(a, from, b), _mm512_permutex2var_ps(c, from, d));
        let values = _mm512_mask_blend_ps(0xCCCC, ab, cd);
        // SAFETY: as many lanes are written as the slice has values.
        unsafe { _mm512_mask_storeu_ps(target.as_mut_ptr(), lanes(0, target.len() as isize), values) };
        from = _mm512_add_epi32(from, _mm512_set1_epi32(4));
    }
}

/// Column `2 t + j` of `target` becomes lane `lane + t` of `tiles[j]`.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn interleave_two(tiles: &[[f32; LANES]; 2], lane: usize, target: &mut [f32]) {
    let read = lanes(0, (LANES - lane) as isize);
    // SAFETY: only the lanes from `lane` to the last are read.
    let [a, b] = [0, 1].map(|j| unsafe { _mm512_maskz_loadu_ps(read, tiles[j][lane..].as_ptr()) });
    let mut from = vector(&const { pattern(2, 16, 1) });
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
