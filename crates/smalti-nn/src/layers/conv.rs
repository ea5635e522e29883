//! The convolution layer.

use crate::Norm;
use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor};
use smalti_kernels::Conv2dOptions;

/// A convolution `[b, c, h, w] -> [b, o, h', w']` with PyTorch's default initialisation: weight and bias uniform in
/// `+-1 / sqrt(c * kernel^2)`.
#[derive(Module, Debug)]
pub struct Conv {
    /// `[o, c, kernel, kernel]`.
    pub weight: Param<Tensor<4>>,
    /// `[o]`.
    pub bias: Option<Param<Tensor<1>>>,
    stride: usize,
    #[module(skip)]
    padding: [usize; 4],
    upsample: bool,
}

impl Conv {
    /// A convolution with stride 1, a bias, and zeros around the image that keep its size (for an odd kernel).
    pub fn new(inputs: usize, outputs: usize, kernel: usize, device: &Device) -> Self {
        let fan_in = inputs * kernel * kernel;
        // Bound gain * sqrt(3 / fan_in) = 1 / sqrt(fan_in).
        let init = Initializer::KaimingUniform { gain: 1.0 / 3f64.sqrt(), fan_out_only: false };
        Self {
            weight: init.init_with([outputs, inputs, kernel, kernel], Some(fan_in), None, device),
            bias: Some(init.init_with([outputs], Some(fan_in), None, device)),
            stride: 1,
            padding: [kernel / 2; 4],
            upsample: false,
        }
    }

    /// A convolution with given weights `[o, c, k, k]`, with stride 1 and the size kept.
    pub fn from_tensors(weight: Tensor<4>, bias: Option<Tensor<1>>) -> Self {
        let [_, _, kernel, _] = weight.dims();
        Self {
            weight: Param::from_tensor(weight),
            bias: bias.map(Param::from_tensor),
            stride: 1,
            padding: [kernel / 2; 4],
            upsample: false,
        }
    }

    /// Sets the stride, at least 1.
    pub fn with_stride(self, stride: usize) -> Self {
        Self { stride, ..self }
    }

    /// Sets how many zeros go around the image: top, left, bottom, right.
    pub fn with_padding(self, padding: [usize; 4]) -> Self {
        Self { padding, ..self }
    }

    /// Leaves the bias out.
    pub fn without_bias(self) -> Self {
        Self { bias: None, ..self }
    }

    /// Doubles the image by repeating pixels before it is convolved.
    pub fn with_upsample(self) -> Self {
        Self { upsample: true, ..self }
    }

    /// Replaces the weights' distribution by a normal one with mean 0.
    pub fn with_normal_weight(self, deviation: f64, device: &Device) -> Self {
        let init = Initializer::Normal { mean: 0.0, std: deviation };
        Self { weight: init.init(self.weight.lazy_shape(), device), ..self }
    }

    /// Convolves `[b, c, h, w]`.
    pub fn forward(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        smalti_kernels::conv2d(x_bchw, self.weight.val(), self.bias.as_ref().map(Param::val), self.options())
    }

    /// Normalises `[b, c, h, w]`, applies `x * sigmoid(x)` and convolves: in training with less memory than one by one.
    pub fn forward_normed(&self, norm: &Norm, x_bchw: Tensor<4>) -> Tensor<4> {
        let bias = self.bias.as_ref().map(Param::val);
        smalti_kernels::norm_silu_conv2d(x_bchw, norm.parameters(), self.weight.val(), bias, self.options())
    }

    fn options(&self) -> Conv2dOptions {
        Conv2dOptions { stride: self.stride, padding: self.padding, upsample: self.upsample }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_weights_have_pytorchs_bound() {
        let conv = Conv::new(7, 50, 3, &Device::flex());
        let bound = 1.0 / (7.0f32 * 9.0).sqrt();
        for values in [conv.weight.val().reshape([-1]), conv.bias.as_ref().unwrap().val()] {
            let largest = values.abs().max().into_scalar::<f32>();
            assert!(largest <= bound && largest > 0.8 * bound, "{largest} of {bound}");
        }
    }
}
