//! The convolutional trunk of VGG16 (arXiv 1409.1556) with the five taps of LPIPS.

use crate::Conv;
use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData, activation::relu, module::max_pool2d, ops::MaxPoolOptions};
use smalti_base::{Error, Result};

/// torchvision's layer numbers of the convolutions in each slice; a slice ends in a tap.
const SLICES: [&[usize]; 5] = [&[0, 2], &[5, 7], &[10, 12, 14], &[17, 19, 21], &[24, 26, 28]];

/// The smallest image side that four poolings leave something of.
pub const SMALLEST_IMAGE: usize = 16;

/// VGG16 up to `relu5_3`.
#[derive(Module, Debug)]
pub struct Vgg16 {
    /// Convolutions of each slice.
    pub slices: Vec<Vec<Conv>>,
}

impl Vgg16 {
    /// Builds the trunk from tensors that `tensor(slice, layer, "weight" | "bias")` returns; slices count from 1 and layers
    /// as in torchvision's `features`. Widths are taken from the tensors.
    ///
    /// # Errors
    /// What `tensor` returns, or [`Error::Invalid`] if a shape does not fit the layer before.
    pub fn load(mut tensor: impl FnMut(usize, usize, &str) -> Result<TensorData>, device: &Device) -> Result<Self> {
        let mut inputs = 3;
        let mut slices = Vec::new();
        for (slice, layers) in SLICES.iter().enumerate() {
            let mut convs = Vec::new();
            for &layer in *layers {
                let (weight, bias) = (tensor(slice + 1, layer, "weight")?, tensor(slice + 1, layer, "bias")?);
                let outputs = weight.shape().first().copied().unwrap_or(0);
                if weight.shape()[..] != [outputs, inputs, 3, 3] || bias.shape()[..] != [outputs] {
                    return Err(Error::invalid(
                        format!("VGG16 layer {layer}"),
                        format!(
                            "weight {:?} and bias {:?} do not follow {inputs} channels",
                            weight.shape(),
                            bias.shape()
                        ),
                    ));
                }
                convs
                    .push(Conv::from_tensors(Tensor::from_data(weight, device), Some(Tensor::from_data(bias, device))));
                inputs = outputs;
            }
            slices.push(convs);
        }
        Ok(Self { slices })
    }

    /// The five taps of normalised images `[b, 3, h, w]`: `[b, c_l, h >> l, w >> l]` for l in 0..5.
    pub fn features(&self, x_bchw: Tensor<4>) -> Vec<Tensor<4>> {
        let mut x = x_bchw;
        let mut taps = Vec::with_capacity(self.slices.len());
        for (level, slice) in self.slices.iter().enumerate() {
            if level > 0 {
                x = max_pool2d(x, pool());
            }
            for conv in slice {
                x = relu(conv.forward(x));
            }
            taps.push(x.clone());
        }
        taps
    }
}

fn pool() -> MaxPoolOptions<2> {
    MaxPoolOptions { kernel_size: [2, 2], stride: [2, 2], padding: [(0, 0); 2], dilation: [1, 1], ceil_mode: false }
}
