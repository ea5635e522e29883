//! Distances of a reconstruction from its image, pixel by pixel.

use burn::tensor::Tensor;

/// Mean of `|a - b|` over all values, a tensor of one element.
pub fn l1(a_bchw: Tensor<4>, b_bchw: Tensor<4>) -> Tensor<1> {
    (a_bchw - b_bchw).abs().mean()
}

/// Mean of `(a - b)^2` over all values, a tensor of one element.
pub fn l2(a_bchw: Tensor<4>, b_bchw: Tensor<4>) -> Tensor<1> {
    (a_bchw - b_bchw).square().mean()
}
