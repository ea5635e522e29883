//! The transpose of 16 by 16 values.

use super::buffer::Shared;
#[cfg(target_arch = "x86_64")]
use super::simd::{Level, level};

/// Row `i` of the transpose of `block [16, 16]` goes to `start + i * stride`: its first `lanes` values, 16 or the stride.
///
/// No other task may access these values of each row at the same time.
pub(super) fn transpose(block: &[f32], target: Shared<'_>, start: usize, stride: usize, lanes: usize) {
    assert!(block.len() >= 256 && (lanes == 16 && stride >= 16 || lanes == stride && stride <= 16));
    let pointer = target.pointer(start, 15 * stride + lanes);
    #[cfg(target_arch = "x86_64")]
    if level() == Level::Avx512 {
        // SAFETY: the features are there, the block has 256 values, and 16 rows of `lanes` lie inside of the target.
        unsafe { avx512::transpose(block.as_ptr(), pointer, stride, lanes) };
        return;
    }
    for i in 0..16 {
        for l in 0..lanes {
            // SAFETY: inside of the target, and this task's own.
            unsafe { *pointer.add(i * stride + l) = block[16 * l + i] };
        }
    }
}

/// The next rows of at least `depth` values, as many as there are lanes, to the columns of `panel [depth, lanes]`; zeros where there is
/// no row. A panel has 32, 16 or fewer lanes.
pub(super) fn transpose_rows<'a>(rows: impl Iterator<Item = &'a [f32]>, panel: &mut [f32], [depth, lanes]: [usize; 2]) {
    let mut all = [&[][..]; 32];
    for (place, row) in all[..lanes].iter_mut().zip(rows) {
        *place = &row[..depth];
    }
    let whole = depth - depth % 16;
    for (part, rows) in all[..lanes].chunks(16).enumerate() {
        let lane = 16 * part;
        let mut block = [0.0; 256];
        for first in (0..whole).step_by(16) {
            for (line, row) in block.as_chunks_mut::<16>().0.iter_mut().zip(rows) {
                if let Some(values) = row.get(first..first + 16) {
                    line.copy_from_slice(values);
                }
            }
            transpose(&block, Shared::new(&mut *panel), first * lanes + lane, lanes, rows.len());
        }
        for (i, row) in rows.iter().enumerate() {
            for k in whole..depth {
                panel[k * lanes + lane + i] = row.get(k).copied().unwrap_or(0.0);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    /// # Safety
    /// `block` has 256 values, and each of 16 rows of the target at the distance `stride` has `lanes`, 16 or the stride.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn transpose(block: *const f32, target: *mut f32, stride: usize, lanes: usize) {
        let mut rows = [_mm512_setzero_ps(); 16];
        for i in 0..16 {
            // SAFETY: a row of the block.
            rows[i] = unsafe { _mm512_loadu_ps(block.add(16 * i)) };
        }
        // Of each four by four values in each quarter.
        let mut fours = rows;
        for i in (0..16).step_by(4) {
            let (a, b) = (_mm512_unpacklo_ps(rows[i], rows[i + 1]), _mm512_unpackhi_ps(rows[i], rows[i + 1]));
            let (c, d) = (_mm512_unpacklo_ps(rows[i + 2], rows[i + 3]), _mm512_unpackhi_ps(rows[i + 2], rows[i + 3]));
            let pair = |x: __m512, y: __m512| (_mm512_castps_pd(x), _mm512_castps_pd(y));
            let ((a, c), (b, d)) = (pair(a, c), pair(b, d));
            fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
            fours[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
            fours[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
            fours[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
        }
        // Quarter `q` of `fours[4 r + c]` is part `r` of row `4 q + c`.
        for c in 0..4 {
            let [p, q, r, s] = [fours[c], fours[4 + c], fours[8 + c], fours[12 + c]];
            let (low, high) = (_mm512_shuffle_f32x4::<0x88>(p, q), _mm512_shuffle_f32x4::<0xDD>(p, q));
            let (low2, high2) = (_mm512_shuffle_f32x4::<0x88>(r, s), _mm512_shuffle_f32x4::<0xDD>(r, s));
            rows[c] = _mm512_shuffle_f32x4::<0x88>(low, low2);
            rows[8 + c] = _mm512_shuffle_f32x4::<0xDD>(low, low2);
            rows[4 + c] = _mm512_shuffle_f32x4::<0x88>(high, high2);
            rows[12 + c] = _mm512_shuffle_f32x4::<0xDD>(high, high2);
        }
        for i in 0..15 {
            // SAFETY: a row of the target; what is beyond its lanes lies in the next row, which is written next.
            unsafe { _mm512_storeu_ps(target.add(i * stride), rows[i]) };
        }
        // SAFETY: no more than the lanes of the last row.
        unsafe { _mm512_mask_storeu_ps(target.add(15 * stride), ((1u32 << lanes) - 1) as u16, rows[15]) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_columns() {
        let block: Vec<f32> = (0..256).map(|i| i as f32).collect();
        for (stride, lanes) in [(12, 12), (16, 16), (32, 16)] {
            let mut target = vec![0.0; 15 * stride + lanes + 3];
            transpose(&block, Shared::new(&mut target), 3, stride, lanes);
            for (i, l) in (0..16).flat_map(|i| (0..lanes).map(move |l| (i, l))) {
                assert!(target[3 + i * stride + l] == block[16 * l + i], "row {i}, value {l}");
            }
        }
    }
}
