//! Halving and doubling of feature maps.

use crate::Conv;
use burn::module::Module;
use burn::tensor::{Device, Tensor, module, ops::AvgPoolOptions};

/// Halves a feature map: a 3x3 convolution with stride 2 after a row and a column of zeros at the bottom and right, or the
/// mean of 2x2 places.
#[derive(Module, Debug)]
pub struct Downsample {
    /// The convolution, if there is one.
    pub conv: Option<Conv>,
}

impl Downsample {
    /// With or without a convolution.
    pub fn new(channels: usize, with_conv: bool, device: &Device) -> Self {
        let conv =
            with_conv.then(|| Conv::new(channels, channels, 3, device).with_stride(2).with_padding([0, 0, 1, 1]));
        Self { conv }
    }

    /// `[b, c, h, w]` to `[b, c, h / 2, w / 2]`.
    pub fn forward(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        match &self.conv {
            Some(conv) => conv.forward(x_bchw),
            None => module::avg_pool2d(
                x_bchw,
                AvgPoolOptions {
                    kernel_size: [2, 2],
                    stride: [2, 2],
                    padding: [(0, 0); 2],
                    count_include_pad: true,
                    ceil_mode: false,
                },
            ),
        }
    }
}

/// Doubles a feature map by repeating places, then a 3x3 convolution if there is one.
#[derive(Module, Debug)]
pub struct Upsample {
    /// The convolution, if there is one.
    pub conv: Option<Conv>,
}

impl Upsample {
    /// With or without a convolution.
    pub fn new(channels: usize, with_conv: bool, device: &Device) -> Self {
        Self { conv: with_conv.then(|| Conv::new(channels, channels, 3, device).with_upsample()) }
    }

    /// `[b, c, h, w]` to `[b, c, 2 * h, 2 * w]`.
    pub fn forward(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        match &self.conv {
            Some(conv) => conv.forward(x_bchw),
            None => {
                let [b, c, h, w] = x_bchw.dims();
                x_bchw.reshape([b, c, h, 1, w, 1]).expand([b, c, h, 2, w, 2]).reshape([b, c, 2 * h, 2 * w])
            }
        }
    }
}
