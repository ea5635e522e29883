//! Layer normalisation (Ba, Kiros and Hinton 2016, arXiv 1607.06450) over the last axis.

use burn::tensor::Tensor;

/// `(x - mean) / sqrt(var + epsilon) * gamma + beta`, mean and biased variance over the last axis.
///
/// # Shapes
/// `x [b, t, d]`, `gamma [d]`, `beta [d]` → `[b, t, d]`.
///
/// # Panics
/// Where Burn's operations do: shapes that do not fit, mixed data types.
pub fn layer_norm(x: Tensor<3>, gamma: Tensor<1>, beta: Tensor<1>, epsilon: f64) -> Tensor<3> {
    portable(x, gamma, beta, epsilon)
}

/// [`layer_norm`] as a composition of tensor operations.
pub fn portable(x: Tensor<3>, gamma: Tensor<1>, beta: Tensor<1>, epsilon: f64) -> Tensor<3> {
    let centred = x.clone() - x.mean_dim(2);
    let variance = centred.clone().square().mean_dim(2);
    centred / (variance + epsilon).sqrt() * gamma.unsqueeze() + beta.unsqueeze()
}
