//! GELU (arXiv 1606.08415), exact or with the hyperbolic tangent, and SiLU (arXiv 1702.03118), with their derivatives.

use super::buffer::written;
use super::simd::{exp, sigmoid, simd};
use rayon::prelude::*;

/// Values of a task.
const TASK: usize = 1 << 14;

/// A function of one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Curve {
    /// `x Phi(x)`, `Phi` the normal distribution function.
    Gelu,
    /// Its approximation with the hyperbolic tangent.
    GeluTanh,
    /// `x / (1 + e^-x)`.
    Silu,
}

impl Curve {
    pub(crate) fn gelu(tanh: bool) -> Self {
        if tanh { Self::GeluTanh } else { Self::Gelu }
    }
}

/// The curve at each value.
pub(crate) fn forward(x: &[f32], curve: Curve) -> Vec<f32> {
    let part = match curve {
        Curve::Gelu => exact,
        Curve::GeluTanh => bent,
        Curve::Silu => swish,
    };
    let fill = |y: &mut [f32]| y.par_chunks_mut(TASK).zip(x.par_chunks(TASK)).for_each(|(y, x)| part(x, y));
    // SAFETY: the chunks cover all values, and the functions write all of theirs.
    unsafe { written(x.len(), fill) }
}

/// Turns the gradient of the result into that of `x`, in its place.
pub(crate) fn backward(x: &[f32], gradient: &mut [f32], curve: Curve) {
    let part = match curve {
        Curve::Gelu => exact_slope,
        Curve::GeluTanh => bent_slope,
        Curve::Silu => swish_slope,
    };
    gradient.par_chunks_mut(TASK).zip(x.par_chunks(TASK)).for_each(|(gradient, x)| part(x, gradient));
}

simd! {
    fn exact(x: &[f32], y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x * normal_cdf(x);
        }
    }
}

simd! {
    fn exact_slope(x: &[f32], gradient: &mut [f32]) {
        for (gradient, &x) in gradient.iter_mut().zip(x) {
            let density = exp(-0.5 * x * x) * 0.398_942_3;
            *gradient *= normal_cdf(x) + x * density;
        }
    }
}

simd! {
    fn bent(x: &[f32], y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x * bent_cdf(x)[0];
        }
    }
}

simd! {
    fn bent_slope(x: &[f32], gradient: &mut [f32]) {
        for (gradient, &x) in gradient.iter_mut().zip(x) {
            let [cdf, slope] = bent_cdf(x);
            *gradient *= cdf + x * slope;
        }
    }
}

simd! {
    fn swish(x: &[f32], y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x * sigmoid(x);
        }
    }
}

simd! {
    fn swish_slope(x: &[f32], gradient: &mut [f32]) {
        for (gradient, &x) in gradient.iter_mut().zip(x) {
            let s = sigmoid(x);
            *gradient *= s * (1.0 + x * (1.0 - s));
        }
    }
}

/// The distribution function of the normal distribution, to some 1e-6 of itself.
///
/// Half the complementary error function, whose logarithm is a polynomial in `1 / (1 + z / 2)` plus `-z²` (fitted by
/// Chebyshev's method as in Numerical Recipes, section 6.2).
#[inline(always)]
fn normal_cdf(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.5 * z);
    let p = 0.170_872_77;
    let p = p * t - 0.822_152_23;
    let p = p * t + 1.488_515_9;
    let p = p * t - 1.135_204;
    let p = p * t + 0.278_868_07;
    let p = p * t - 0.186_288_06;
    let p = p * t + 0.096_784_18;
    let p = p * t + 0.374_091_96;
    let p = p * t + 1.000_023_7;
    let p = p * t - 1.265_512_2;
    let tail = 0.5 * t * exp(p - z * z);
    if x < 0.0 { tail } else { 1.0 - tail }
}

/// `(1 + tanh(sqrt(2 / pi) (x + 0.044715 x³))) / 2` and its derivative.
#[inline(always)]
fn bent_cdf(x: f32) -> [f32; 2] {
    const FACTOR: f32 = 2.0 * 0.797_884_6;
    // Far out the distribution function is 0 or 1: no square that is infinite.
    let square = (x * x).min(1e10);
    let s = 1.0 / (1.0 + exp(-FACTOR * x * (1.0 + 0.044_715 * square)));
    [s, s * (1.0 - s) * FACTOR * (1.0 + 3.0 * 0.044_715 * square)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The distribution function by a sum over its density, in `f64`.
    fn integral(x: f64) -> f64 {
        let density = |t: f64| (-0.5 * t * t).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let steps = 20_000;
        let h = x.abs() / f64::from(steps);
        let ends = density(0.0) + density(x);
        let inner: f64 = (1..steps).map(|i| density(h * f64::from(i)) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
        0.5 + x.signum() * (ends + inner) * h / 3.0
    }

    #[test]
    fn the_distribution_function_is_close_to_the_integral() {
        for i in -50..=50 {
            let x = i as f32 / 10.0;
            let error = (f64::from(normal_cdf(x)) - integral(f64::from(x))).abs();
            assert!(error < 3e-7, "cdf({x}): error {error}");
        }
        assert_eq!(normal_cdf(40.0), 1.0);
        assert!(normal_cdf(-40.0) < 1e-30);
        assert!(normal_cdf(f32::NAN).is_nan());
    }
}
