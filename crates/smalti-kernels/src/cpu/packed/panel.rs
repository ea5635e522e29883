//! A few rows times one panel of a packed matrix.
//!
//! Each sum runs over the inputs from first to last in one chain, whatever the number of rows: a row's result does not
//! depend on its neighbours.

#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::{Level, level};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Outputs of a panel.
pub(crate) const WIDTH: usize = 32;
/// Most rows of a call.
pub(crate) const ROWS: usize = 8;

/// The sums of the rows of a call.
pub(crate) type Sums = [[f32; WIDTH]; ROWS];

/// How a weight is kept. Every bit pattern is a value.
pub(crate) trait Weight: Copy + Send + Sync + 'static {
    /// The weight as a float.
    fn widen(self) -> f32;

    /// The 16 weights at an address.
    ///
    /// # Safety
    /// They must lie inside of one slice, and the CPU must have AVX-512 F.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load16(from: *const Self) -> __m512;

    /// The 8 weights at an address.
    ///
    /// # Safety
    /// They must lie inside of one slice, and the CPU must have AVX2.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load8(from: *const Self) -> __m256;
}

impl Weight for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load16(from: *const Self) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(from: *const Self) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(from) }
    }
}

/// A bfloat16: the upper half of an `f32`.
impl Weight for u16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load16(from: *const Self) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())))) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(from: *const Self) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())))) }
    }
}

impl Weight for i8 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load16(from: *const Self) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(from: *const Self) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
    }
}

/// Writes into `sums` the products of the rows of `x` with a panel: for each input its [`WIDTH`] weights.
pub(crate) fn multiply<W: Weight>(panel: &[W], x: &[f32], inputs: usize, sums: &mut Sums) {
    let rows = x.len().checked_div(inputs).unwrap_or(0);
    assert!(panel.len() == inputs * WIDTH && x.len() == rows * inputs && rows <= ROWS, "rows and panel do not fit");
    #[cfg(target_arch = "x86_64")]
    match level() {
        // SAFETY: `level` found the features, and the sizes were checked.
        Level::Avx512 => return unsafe { wide(panel, x, rows, inputs, sums) },
        // SAFETY: as above.
        Level::Avx2 => return unsafe { middle(panel, x, rows, inputs, sums) },
        Level::Base => {}
    }
    for (x, sums) in x.chunks_exact(inputs.max(1)).zip(sums) {
        plain(panel, x, sums);
    }
}

fn plain<W: Weight>(panel: &[W], x: &[f32], sums: &mut [f32; WIDTH]) {
    let mut lanes = [0.0; WIDTH];
    for (weights, x) in panel.as_chunks::<WIDTH>().0.iter().zip(x) {
        for (lane, weight) in lanes.iter_mut().zip(weights) {
            *lane += x * weight.widen();
        }
    }
    *sums = lanes;
}

/// # Safety
/// The CPU must have the features; `panel` has `WIDTH * inputs` weights, `x` has `rows * inputs` values.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
unsafe fn wide<W: Weight>(panel: &[W], x: &[f32], rows: usize, inputs: usize, sums: &mut Sums) {
    let (panel, x) = (panel.as_ptr(), x.as_ptr());
    // SAFETY: the caller's promise, for each number of rows.
    unsafe {
        match rows {
            0 => {}
            1 => wide_rows::<W, 1>(panel, x, inputs, sums),
            2 => wide_rows::<W, 2>(panel, x, inputs, sums),
            3 => wide_rows::<W, 3>(panel, x, inputs, sums),
            4 => wide_rows::<W, 4>(panel, x, inputs, sums),
            5 => wide_rows::<W, 5>(panel, x, inputs, sums),
            6 => wide_rows::<W, 6>(panel, x, inputs, sums),
            7 => wide_rows::<W, 7>(panel, x, inputs, sums),
            _ => wide_rows::<W, 8>(panel, x, inputs, sums),
        }
    }
}

/// # Safety
/// As [`wide`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
unsafe fn wide_rows<W: Weight, const N: usize>(panel: *const W, x: *const f32, inputs: usize, sums: &mut Sums) {
    let mut lanes = [[_mm512_setzero_ps(); 2]; N];
    for i in 0..inputs {
        // SAFETY: input `i` has `WIDTH` weights from `WIDTH * i` on.
        let weights = unsafe { [W::load16(panel.add(WIDTH * i)), W::load16(panel.add(WIDTH * i + 16))] };
        for (row, lanes) in lanes.iter_mut().enumerate() {
            // SAFETY: each row has `inputs` values.
            let x = _mm512_set1_ps(unsafe { *x.add(row * inputs + i) });
            *lanes = [_mm512_fmadd_ps(x, weights[0], lanes[0]), _mm512_fmadd_ps(x, weights[1], lanes[1])];
        }
    }
    for (sums, lanes) in sums.iter_mut().zip(lanes) {
        // SAFETY: `sums` has `WIDTH` = 2 * 16 values.
        unsafe {
            _mm512_storeu_ps(sums.as_mut_ptr(), lanes[0]);
            _mm512_storeu_ps(sums.as_mut_ptr().add(16), lanes[1]);
        }
    }
}

/// # Safety
/// The CPU must have the features; `panel` has `WIDTH * inputs` weights, `x` has `rows * inputs` values.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn middle<W: Weight>(panel: &[W], x: &[f32], rows: usize, inputs: usize, sums: &mut Sums) {
    let (panel, x) = (panel.as_ptr(), x.as_ptr());
    for first in (0..rows).step_by(2) {
        // SAFETY: the caller's promise; the rows from `first` on are those that are left.
        unsafe {
            let (x, sums) = (x.add(first * inputs), &mut sums[first..]);
            match rows - first {
                1 => middle_rows::<W, 1>(panel, x, inputs, sums),
                _ => middle_rows::<W, 2>(panel, x, inputs, sums),
            }
        }
    }
}

/// # Safety
/// As [`middle`], for `N` rows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn middle_rows<W: Weight, const N: usize>(
    panel: *const W,
    x: *const f32,
    inputs: usize,
    sums: &mut [[f32; WIDTH]],
) {
    let mut lanes = [[_mm256_setzero_ps(); 4]; N];
    for i in 0..inputs {
        for part in 0..4 {
            // SAFETY: input `i` has `WIDTH` = 4 * 8 weights from `WIDTH * i` on.
            let weights = unsafe { W::load8(panel.add(WIDTH * i + 8 * part)) };
            for (row, lanes) in lanes.iter_mut().enumerate() {
                // SAFETY: each row has `inputs` values.
                let x = _mm256_set1_ps(unsafe { *x.add(row * inputs + i) });
                lanes[part] = _mm256_fmadd_ps(x, weights, lanes[part]);
            }
        }
    }
    for (sums, lanes) in sums.iter_mut().zip(lanes) {
        for (part, lanes) in lanes.into_iter().enumerate() {
            // SAFETY: `sums` has `WIDTH` = 4 * 8 values.
            unsafe { _mm256_storeu_ps(sums.as_mut_ptr().add(8 * part), lanes) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use smalti_base::Rng;

    fn check<W: Weight>(weights: impl Fn(f32) -> W) {
        let mut stream = Rng::new(1).stream(0, 0);
        for inputs in [1, 2, 7, 64, 131] {
            let panel: Vec<W> = (0..inputs * WIDTH).map(|_| weights(stream.normal())).collect();
            let x: Vec<f32> = (0..inputs * ROWS).map(|_| stream.normal()).collect();
            let mut whole = [[0.0; WIDTH]; ROWS];
            multiply(&panel, &x, inputs, &mut whole);
            for rows in 1..=ROWS {
                let mut sums = [[f32::NAN; WIDTH]; ROWS];
                multiply(&panel, &x[..rows * inputs], inputs, &mut sums);
                assert_eq!(sums[..rows], whole[..rows], "{rows} rows alone");
                #[cfg(target_arch = "x86_64")]
                if level() != Level::Base {
                    let mut narrow = [[f32::NAN; WIDTH]; ROWS];
                    // SAFETY: a CPU of a higher level has AVX2, and the sizes fit.
                    unsafe { middle(&panel, &x[..rows * inputs], rows, inputs, &mut narrow) };
                    assert_eq!(narrow[..rows], whole[..rows], "{rows} rows by AVX2");
                }
            }
            for (x, expected) in x.chunks_exact(inputs).zip(whole) {
                let mut sums = [f32::NAN; WIDTH];
                plain(&panel, x, &mut sums);
                for (sum, expected) in sums.iter().zip(expected) {
                    assert!((sum - expected).abs() <= 1e-5 * (inputs as f32) * 128.0, "{sum}, expected {expected}");
                }
            }
        }
    }

    #[test]
    fn instruction_sets_and_numbers_of_rows_agree() {
        check::<f32>(|x| x);
        check::<u16>(|x| half::bf16::from_f32(x).to_bits());
        check::<i8>(|x| (x * 30.0) as i8);
    }
}
