//! The discriminator of StyleGAN2 (arXiv 1912.04958), as ViT-VQGAN's public code uses it: it judges whole images.
//!
//! Its R1 penalty (arXiv 1801.04406) is the squared length of the gradient of the logits with respect to the images. The
//! network is made of linear maps, leaky ReLUs and one statistic over the batch, so that gradient is a network of the maps'
//! adjoints, of fixed slopes and of that statistic's derivative. Written with ordinary operations, it can be differentiated.

use crate::init::Init;
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, activation::leaky_relu, module::conv_transpose2d, ops::ConvTransposeOptions};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result};
use smalti_kernels::{Conv2dOptions, conv2d, linear};
use std::f64::consts::{FRAC_1_SQRT_2, SQRT_2};

/// Settings of a [`StyleGan`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StyleGanConfig {
    /// Channels of the images.
    pub in_channels: usize,
    /// Side of the images in pixels: a power of two, at least 8.
    pub image_size: usize,
    /// A map with a side of `n` pixels has `capacity / n` channels, at most [`Self::max_channels`].
    pub capacity: usize,
    /// Most channels of a map.
    pub max_channels: usize,
}

/// Side of the last map.
const LAST: usize = 4;
/// Slope of the activation below 0; what comes out is scaled by the square root of 2 to keep the variance.
const SLOPE: f64 = 0.2;
/// Images of a batch over which the last map's deviation is taken, at least.
const GROUP: usize = 4;

impl StyleGanConfig {
    /// The published sizes for images of this side.
    pub fn new(image_size: usize) -> Self {
        Self { in_channels: 3, image_size, capacity: 32768, max_channels: 512 }
    }

    /// # Errors
    /// [`Error::Invalid`] if the numbers make no network.
    pub fn check(&self) -> Result<()> {
        if !self.image_size.is_power_of_two() || self.image_size < 2 * LAST {
            let problem = format!("images must have a power of two pixels a side, at least 8, not {}", self.image_size);
            return Err(Error::invalid("discriminator (stylegan)", problem));
        }
        if self.in_channels == 0 || self.max_channels == 0 || self.capacity < self.image_size {
            let problem =
                format!("channels and max_channels must be at least 1, capacity at least {}", self.image_size);
            return Err(Error::invalid("discriminator (stylegan)", problem));
        }
        Ok(())
    }

    fn channels(&self, side: usize) -> usize {
        (self.capacity / side).min(self.max_channels)
    }

    /// A discriminator with fresh weights: all normal with deviation 1, biases 0.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn init(&self, device: &Device) -> Result<StyleGan> {
        self.check()?;
        let levels = (self.image_size / LAST).ilog2();
        let blocks = (0..levels).map(|level| {
            let side = LAST << level;
            let (inputs, outputs) = (self.channels(2 * side), self.channels(side));
            StyleBlock {
                conv1: ScaledConv::new(inputs, inputs, 3, device),
                conv2: ScaledConv::new(inputs, outputs, 3, device).halving(),
                skip: ScaledConv::new(inputs, outputs, 1, device).halving().linear(),
            }
        });
        let last = self.channels(LAST);
        Ok(StyleGan {
            from_rgb: ScaledConv::new(self.in_channels, self.channels(self.image_size), 1, device),
            blocks: blocks.collect(),
            conv_out: ScaledConv::new(last + 1, last, 3, device),
            hidden: ScaledDense::new(last * LAST * LAST, last, device),
            head: ScaledDense::new(last, 1, device),
        })
    }
}

/// StyleGAN2's discriminator. The official code numbers the blocks from 1, from the finest.
#[derive(Module, Debug)]
pub struct StyleGan {
    /// Colours to channels.
    pub from_rgb: ScaledConv,
    /// Residual blocks that halve the image, coarsest first: the last one runs first.
    pub blocks: Vec<StyleBlock>,
    /// Sees the last map and its deviation over the batch.
    pub conv_out: ScaledConv,
    /// Of the whole last map.
    pub hidden: ScaledDense,
    /// To the logit.
    pub head: ScaledDense,
}

/// `(conv2(conv1(x)) + skip(x)) / sqrt 2`, with half of the pixels a side.
#[derive(Module, Debug)]
pub struct StyleBlock {
    /// 3x3, keeps size and channels.
    pub conv1: ScaledConv,
    /// 3x3, halves.
    pub conv2: ScaledConv,
    /// 1x1 without activation, halves.
    pub skip: ScaledConv,
}

/// A convolution whose weights are drawn with deviation 1 and scaled by `1 / sqrt(inputs)` when they are used, so that all
/// of them learn equally fast under Adam. Before it halves an image it blurs it.
#[derive(Module, Debug)]
pub struct ScaledConv {
    /// `[o, c, kernel, kernel]`, unscaled.
    pub weight: Param<Tensor<4>>,
    /// `[o]`, added before the activation; a layer without it has no activation either.
    pub bias: Option<Param<Tensor<1>>>,
    halves: bool,
}

/// A dense layer whose weights are scaled like those of [`ScaledConv`].
#[derive(Module, Debug)]
pub struct ScaledDense {
    /// `[inputs, outputs]`, unscaled.
    pub weight: Param<Tensor<2>>,
    /// `[outputs]`.
    pub bias: Param<Tensor<1>>,
}

/// What the layers with an activation gave, in the modules' order, and the logits.
struct Trace {
    from_rgb: Tensor<4>,
    blocks: Vec<[Tensor<4>; 2]>,
    last: Tensor<4>,
    conv_out: Tensor<4>,
    hidden: Tensor<2>,
    logits: Tensor<2>,
}

impl StyleGan {
    /// One logit per image, `[b, 1, 1, 1]`, of images `[b, c, s, s]` in 0..1; higher means more real. It depends on the
    /// images beside it in the batch.
    pub fn forward(&self, images_bchw: Tensor<4>) -> Tensor<4> {
        self.trace(images_bchw).logits.unsqueeze_dims(&[-1, -1])
    }

    fn trace(&self, images_bchw: Tensor<4>) -> Trace {
        let from_rgb = self.from_rgb.forward(images_bchw);
        let (mut x, mut blocks) = (from_rgb.clone(), Vec::with_capacity(self.blocks.len()));
        for block in self.blocks.iter().rev() {
            let inner = block.conv1.forward(x.clone());
            let outer = block.conv2.forward(inner.clone());
            x = (outer.clone() + block.skip.forward(x)) * FRAC_1_SQRT_2;
            blocks.push([inner, outer]);
        }
        blocks.reverse();
        let conv_out = self.conv_out.forward(Tensor::cat(vec![x.clone(), deviation(x.clone())], 1));
        let hidden = activate(self.hidden.forward(conv_out.clone().flatten(1, 3)));
        let logits = self.head.forward(hidden.clone());
        Trace { from_rgb, blocks, last: x, conv_out, hidden, logits }
    }

    /// The gradient of the sum of the logits with respect to images `[b, c, s, s]` in 0..1. It can be differentiated with
    /// respect to the parameters.
    pub fn image_gradient(&self, images_bchw: Tensor<4>) -> Tensor<4> {
        let trace = self.trace(images_bchw);
        let from_logits = self.head.adjoint(trace.logits.ones_like());
        let from_hidden = self.hidden.adjoint(from_logits * slopes(trace.hidden));
        let [_, c, h, w] = trace.conv_out.dims();
        let stacked = self.conv_out.back(from_hidden.reshape([-1, c as i32, h as i32, w as i32]), trace.conv_out);
        let channels = trace.last.dims()[1];
        let from_deviation = deviation_back(trace.last, stacked.clone().narrow(1, channels, 1));
        let mut gradient = stacked.narrow(1, 0, channels) + from_deviation;
        for (block, [inner, outer]) in self.blocks.iter().zip(trace.blocks) {
            let here = gradient * FRAC_1_SQRT_2;
            let through = block.conv1.back(block.conv2.back(here.clone(), outer), inner);
            gradient = through + block.skip.adjoint(here);
        }
        self.from_rgb.back(gradient, trace.from_rgb)
    }

    /// R1: the squared length of an image's gradient, mean over images `[b, c, s, s]` in 0..1.
    pub fn gradient_penalty(&self, images_bchw: Tensor<4>) -> Tensor<1> {
        let images = images_bchw.dims()[0];
        self.image_gradient(images_bchw).square().sum() / images as f64
    }
}

impl ScaledConv {
    fn new(inputs: usize, outputs: usize, kernel: usize, device: &Device) -> Self {
        Self {
            weight: Init::Normal(1.0).param([outputs, inputs, kernel, kernel], device),
            bias: Some(Init::Zeros.param([outputs], device)),
            halves: false,
        }
    }

    fn halving(self) -> Self {
        Self { halves: true, ..self }
    }

    fn linear(self) -> Self {
        Self { bias: None, ..self }
    }

    fn scaled(&self) -> Tensor<4> {
        let [_, inputs, k, _] = self.weight.dims();
        self.weight.val() / ((inputs * k * k) as f64).sqrt()
    }

    fn kernel(&self) -> usize {
        self.weight.dims()[2]
    }

    fn forward(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        let y = match self.halves {
            true => {
                let options = Conv2dOptions::padded(0).with_stride(2);
                conv2d(blur(x_bchw, self.kernel().div_ceil(2)), self.scaled(), None, options)
            }
            false => conv2d(x_bchw, self.scaled(), None, Conv2dOptions::padded(self.kernel() / 2)),
        };
        match &self.bias {
            Some(bias) => activate(y + bias.val().reshape([1, -1, 1, 1])),
            None => y,
        }
    }

    /// The adjoint of the convolution alone.
    fn adjoint(&self, upstream_bohw: Tensor<4>) -> Tensor<4> {
        let spread = |stride, padding| {
            let options = ConvTransposeOptions::new([stride; 2], [padding; 2], [0; 2], [1; 2], 1);
            conv_transpose2d(upstream_bohw, self.scaled(), None, options)
        };
        match self.halves {
            // The filter is symmetric, so its adjoint is itself with the rest of the margin.
            true => blur(spread(2, 0), FILTER.len() - 1 - self.kernel().div_ceil(2)),
            false => spread(1, self.kernel() / 2),
        }
    }

    /// From the gradient at the activation's output, and that output, to the gradient at the layer's input.
    fn back(&self, upstream_bohw: Tensor<4>, output_bohw: Tensor<4>) -> Tensor<4> {
        self.adjoint(upstream_bohw * slopes(output_bohw))
    }
}

impl ScaledDense {
    fn new(inputs: usize, outputs: usize, device: &Device) -> Self {
        let weight = Init::Normal(1.0).param([inputs, outputs], device);
        Self { weight, bias: Init::Zeros.param([outputs], device) }
    }

    fn scaled(&self) -> Tensor<2> {
        self.weight.val() / (self.weight.dims()[0] as f64).sqrt()
    }

    fn forward(&self, x_bn: Tensor<2>) -> Tensor<2> {
        linear(x_bn, self.scaled(), Some(self.bias.val()))
    }

    fn adjoint(&self, upstream_bn: Tensor<2>) -> Tensor<2> {
        upstream_bn.matmul(self.scaled().transpose())
    }
}

fn activate<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    leaky_relu(x, SLOPE) * SQRT_2
}

/// The activation's slopes, told by its output; constants of differentiation.
fn slopes<const D: usize>(output: Tensor<D>) -> Tensor<D> {
    (output.greater_elem(0).float() * (1.0 - SLOPE) + SLOPE) * SQRT_2
}

/// Of each row and column; its sum is 8.
const FILTER: [f32; 4] = [1.0, 3.0, 3.0, 1.0];

/// Filters every channel, with so many zeros around it; the image shrinks by 3 less twice as many pixels.
fn blur(x_bchw: Tensor<4>, margin: usize) -> Tensor<4> {
    let [b, c, h, w] = x_bchw.dims();
    let filter: Vec<f32> = FILTER.iter().flat_map(|row| FILTER.map(|column| row * column / 64.0)).collect();
    let filter = Tensor::<1>::from_floats(filter.as_slice(), &x_bchw.device()).reshape([1, 1, 4, 4]);
    let y = conv2d(x_bchw.reshape([b * c, 1, h, w]), filter, None, Conv2dOptions::padded(margin));
    let [_, _, h, w] = y.dims();
    y.reshape([b, c, h, w])
}

/// How many groups the images of a batch form: all equal, none smaller than [`GROUP`] unless the batch is.
fn groups(images: usize) -> usize {
    (1..=images / GROUP).rev().find(|groups| images.is_multiple_of(*groups)).unwrap_or(1)
}

/// The images of each group, every `groups`-th of the batch, as rows `[members, groups, values]`: less their mean, and their
/// deviation `[1, groups, values]`.
fn spread(x_bchw: Tensor<4>) -> (Tensor<3>, Tensor<3>) {
    let [b, c, h, w] = x_bchw.dims();
    let groups = groups(b);
    let rows = x_bchw.reshape([b / groups, groups, c * h * w]);
    let centred = rows.clone() - rows.mean_dim(0);
    let deviation = (centred.clone().square().mean_dim(0) + 1e-8).sqrt();
    (centred, deviation)
}

/// The mean deviation of the values of an image's group at each place, `[b, 1, h, w]` of `[b, c, h, w]`.
fn deviation(x_bchw: Tensor<4>) -> Tensor<4> {
    let [b, _, h, w] = x_bchw.dims();
    let (centred, deviation) = spread(x_bchw);
    let [members, groups, _] = centred.dims();
    let mean = deviation.mean_dim(2).expand([members, groups, 1]);
    mean.reshape([b, 1, 1, 1]).expand([b, 1, h, w])
}

/// The gradient at [`deviation`]'s input from that at its output.
fn deviation_back(x_bchw: Tensor<4>, upstream_b1hw: Tensor<4>) -> Tensor<4> {
    let [b, c, h, w] = x_bchw.dims();
    let (centred, deviation) = spread(x_bchw);
    let [members, groups, values] = centred.dims();
    let total = upstream_b1hw.reshape([members, groups, h * w]).sum_dim(2).sum_dim(0);
    (centred / deviation * (total / (members * values) as f64)).reshape([b, c, h, w])
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Distribution;

    fn network(side: usize) -> (StyleGan, Device) {
        let device = Device::flex();
        let config = StyleGanConfig { capacity: 64, max_channels: 8, ..StyleGanConfig::new(side) };
        (config.init(&device).unwrap(), device)
    }

    #[test]
    fn the_image_gradient_is_that_of_automatic_differentiation() {
        for images in [1, 3, 8] {
            let (network, device) = network(16);
            let x = Tensor::<4>::random([images, 3, 16, 16], Distribution::Default, &device);
            let leaf = x.clone().autodiff().require_grad();
            let expected = leaf.grad(&network.forward(leaf.clone()).sum().backward()).unwrap();
            let difference = (network.image_gradient(x) - expected.clone()).abs().max().into_scalar::<f32>();
            let largest = expected.abs().max().into_scalar::<f32>();
            assert!(difference < 1e-5 * largest.max(1e-3), "{images} images: {difference} of {largest}");
        }
    }

    /// Without biases the logits grow in proportion to each layer's weights, in a block to those of both of its branches.
    /// The penalty then grows with the square, so its derivative along such weights is twice the penalty (Euler).
    #[test]
    fn the_penalty_can_be_differentiated() {
        let (network, device) = network(16);
        let x = Tensor::<4>::random([4, 3, 16, 16], Distribution::Default, &device);
        let training = network.train();
        let penalty = training.gradient_penalty(x);
        let gradients = penalty.backward();
        let along = |conv: &ScaledConv| {
            let gradient = conv.weight.grad(&gradients).unwrap();
            (gradient * conv.weight.val().inner()).sum().into_scalar::<f32>()
        };
        let twice = 2.0 * penalty.into_scalar::<f32>();
        let block = &training.blocks[0];
        for (layer, derivative) in [
            ("from_rgb", along(&training.from_rgb)),
            ("conv1 and skip", along(&block.conv1) + along(&block.skip)),
            ("conv2 and skip", along(&block.conv2) + along(&block.skip)),
            ("conv_out", along(&training.conv_out)),
        ] {
            assert!((derivative - twice).abs() < 1e-3 * twice, "{layer}: {derivative} instead of {twice}");
        }
    }

    #[test]
    fn groups_are_equal_and_of_four_where_they_can() {
        assert_eq!([1, 3, 4, 6, 8, 9, 10, 16].map(groups), [1, 1, 1, 1, 2, 1, 2, 4]);
    }

    #[test]
    fn channels_are_the_published_ones() {
        let config = StyleGanConfig::new(256);
        assert_eq!([4, 32, 64, 128, 256].map(|side| config.channels(side)), [512, 512, 512, 256, 128]);
        for side in [0, 4, 24] {
            assert!(StyleGanConfig::new(side).check().is_err());
        }
    }
}
