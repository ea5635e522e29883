//! Group normalisation (Wu and He 2018, arXiv 1803.08494), with SiLU fused on request.

use burn::tensor::{Tensor, activation};

/// Normalises each group of channels of each image to mean 0 and variance 1, then scales and shifts each channel:
/// `y = (x - mean) / sqrt(var + epsilon) * gamma + beta`, and `y * sigmoid(y)` when `silu` is set.
///
/// # Shapes
/// `x [b, c, h, w]`, `gamma [c]`, `beta [c]` → `[b, c, h, w]`; `groups` divides `c`. The variance is the biased one.
///
/// # Panics
/// Where Burn's operations do: shapes that do not fit, mixed data types.
pub fn group_norm(
    x: Tensor<4>,
    gamma: Tensor<1>,
    beta: Tensor<1>,
    groups: usize,
    epsilon: f64,
    silu: bool,
) -> Tensor<4> {
    portable(x, gamma, beta, groups, epsilon, silu)
}

/// [`group_norm`] as a composition of tensor operations.
pub fn portable(x: Tensor<4>, gamma: Tensor<1>, beta: Tensor<1>, groups: usize, epsilon: f64, silu: bool) -> Tensor<4> {
    let [b, c, h, w] = x.dims();
    let rows = x.reshape([b, groups, c / groups * h * w]);
    let centred = rows.clone() - rows.mean_dim(2);
    let variance = centred.clone().square().mean_dim(2);
    let normal = (centred / (variance + epsilon).sqrt()).reshape([b, c, h, w]);
    let y = normal * gamma.reshape([1, c, 1, 1]) + beta.reshape([1, c, 1, 1]);
    if silu { activation::silu(y) } else { y }
}
