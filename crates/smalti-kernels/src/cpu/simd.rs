//! Code compiled for several instruction sets, chosen at run time.

use smalti_base::{Error, Result};
#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

/// Defines a function whose body is compiled for AVX-512, for AVX2 and for the build's base line; a call runs the widest
/// that this CPU has. The loops of the body are left to the compiler to vectorise: keep them plain. In the body the constants
/// `WIDE` and `FUSED` tell whether it is compiled for AVX-512, and for fused multiplication.
macro_rules! simd {
    ($(#[$attribute:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$attribute])*
        #[allow(clippy::too_many_arguments)]
        $visibility fn $name($($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            #[allow(clippy::extra_unused_type_parameters)]
            fn body<const WIDE: bool, const FUSED: bool>($($argument: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                fn wide($($argument: $type),*) $(-> $result)? {
                    body::<true, true>($($argument),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn middle($($argument: $type),*) $(-> $result)? {
                    body::<false, true>($($argument),*)
                }
                match $crate::cpu::simd::level() {
                    // SAFETY: `level` found all of these features on this CPU.
                    $crate::cpu::simd::Level::Avx512 => return unsafe { wide($($argument),*) },
                    // SAFETY: as above.
                    $crate::cpu::simd::Level::Avx2 => return unsafe { middle($($argument),*) },
                    $crate::cpu::simd::Level::Base => {}
                }
            }
            body::<false, false>($($argument),*)
        }
    };
}
pub(crate) use simd;

const VARIABLE: &str = "SMALTI_SIMD";

/// Checks the variables of the environment that the kernels read; once, before anything computes.
///
/// # Errors
/// [`Error::Unknown`] for an instruction set that is none, [`Error::Unsupported`] for one that this CPU does not have.
pub fn check_environment() -> Result<()> {
    let Some(wished) = std::env::var_os(VARIABLE).filter(|wished| !wished.is_empty()) else { return Ok(()) };
    let there: &[&str] = match level_of_cpu() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => &["base", "avx2", "avx512"],
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => &["base", "avx2"],
        Level::Base => &["base"],
    };
    match wished.to_string_lossy() {
        wished if there.contains(&&*wished) => Ok(()),
        wished if ["avx2", "avx512"].contains(&&*wished) => Err(Error::unsupported(
            format!("{VARIABLE}={wished} on this CPU"),
            format!("it has {}; without the variable the widest is taken", there.join(", ")),
        )),
        wished => Err(Error::unknown(VARIABLE, "instruction set", wished, ["base", "avx2", "avx512"])),
    }
}

#[cfg(target_arch = "x86_64")]
fn level_of_cpu() -> Level {
    widest(true)
}

#[cfg(not(target_arch = "x86_64"))]
fn level_of_cpu() -> Level {
    Level::Base
}

/// Instruction sets that [`simd!`] compiles for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Base,
}

/// The widest instruction set of this CPU, or a narrower one that the environment names: `SMALTI_SIMD=avx2` or `base`, read
/// once.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| match std::env::var(VARIABLE).as_deref() {
        Ok("base") => Level::Base,
        Ok("avx2") => widest(false),
        _ => widest(true),
    })
}

#[cfg(target_arch = "x86_64")]
fn widest(avx512: bool) -> Level {
    let fused = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let wide = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq");
    match (fused, wide && avx512) {
        (true, true) => Level::Avx512,
        (true, false) => Level::Avx2,
        (false, _) => Level::Base,
    }
}

/// `a + factor * b`, rounded once where `FUSED`.
#[inline(always)]
pub(crate) fn plus<const FUSED: bool>(a: f32, factor: f32, b: f32) -> f32 {
    if FUSED { factor.mul_add(b, a) } else { a + factor * b }
}

/// Values handled together in reductions: one AVX-512 register, or two of AVX2.
pub(crate) const LANES: usize = 16;

/// `e^x` to 2 units in the last place; 0 below -87.3, infinity-free: saturates near the largest float above 88.3.
///
/// Range reduction to `2^n e^r`, `|r| <= ln 2 / 2`, and a polynomial of degree 6 for `e^r` (Cephes' `expf`).
/// Without branches, so that loops over it vectorise.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
    let clamped = x.clamp(-87.336_54, 88.376_26);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * 0.693_359_4;
    let r = r + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    let power = f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23);
    y * power
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Sum over `values` of `term`, in [`LANES`] partial sums: the same order on every instruction set.
#[inline(always)]
pub(crate) fn sum(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += term(value);
        }
    }
    let tail: f32 = rest.iter().map(|&value| term(value)).sum();
    lanes.iter().sum::<f32>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_libm_of_f64() {
        for i in -8_700..8_800 {
            let x = i as f32 / 100.0;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) - expected).abs() / expected;
            assert!(error < 3e-7, "exp({x}): relative error {error}");
        }
        assert!(exp(-1000.0) < 1.3e-38);
        assert!(exp(1000.0).is_finite());
    }
}
