//! The residual block of convolutional autoencoders.

use crate::{Conv, Norm};
use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

/// How a block's input reaches its output when the number of channels changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shortcut {
    /// A 1x1 convolution of the block's input.
    #[default]
    Pointwise,
    /// A 3x3 convolution of the block's input.
    Full,
    /// A 1x1 convolution of the second convolution's output, so that the input does not pass (MaskGIT's code).
    PointwiseOfOutput,
}

/// Settings of a [`ResnetBlock`].
#[derive(Clone, Debug)]
pub struct ResnetBlockConfig {
    /// Channels in.
    pub inputs: usize,
    /// Channels out.
    pub outputs: usize,
    /// The shortcut where the two differ.
    pub shortcut: Shortcut,
    /// Groups of the normalisations, at most as many as channels.
    pub norm_groups: usize,
    /// Added to variances.
    pub epsilon: f64,
    /// Share of values dropped before the second convolution in training.
    pub dropout: f64,
    /// Whether the 3x3 convolutions and the shortcut have a bias.
    pub bias: bool,
}

impl ResnetBlockConfig {
    /// The block of taming-transformers: 32 groups, epsilon 1e-6, 1x1 shortcut, no dropout.
    pub fn new(inputs: usize, outputs: usize) -> Self {
        Self {
            inputs,
            outputs,
            shortcut: Shortcut::Pointwise,
            norm_groups: 32,
            epsilon: 1e-6,
            dropout: 0.0,
            bias: true,
        }
    }

    /// A block with fresh weights.
    pub fn init(&self, device: &Device) -> ResnetBlock {
        let norm = |channels| Norm::new(channels, self.norm_groups, self.epsilon, device);
        let conv = |inputs, kernel| {
            let conv = Conv::new(inputs, self.outputs, kernel, device);
            if self.bias { conv } else { conv.without_bias() }
        };
        let shortcut = (self.inputs != self.outputs).then_some(self.shortcut);
        ResnetBlock {
            norm1: norm(self.inputs),
            conv1: conv(self.inputs, 3),
            norm2: norm(self.outputs),
            dropout: DropoutConfig::new(self.dropout).init(),
            conv2: conv(self.outputs, 3),
            nin_shortcut: match shortcut {
                Some(Shortcut::Pointwise) => Some(conv(self.inputs, 1)),
                Some(Shortcut::PointwiseOfOutput) => Some(conv(self.outputs, 1)),
                Some(Shortcut::Full) | None => None,
            },
            conv_shortcut: matches!(shortcut, Some(Shortcut::Full)).then(|| conv(self.inputs, 3)),
            shortcut_of_output: matches!(shortcut, Some(Shortcut::PointwiseOfOutput)),
        }
    }
}

/// Twice norm, `x * sigmoid(x)`, 3x3 convolution, added to a shortcut.
#[derive(Module, Debug)]
pub struct ResnetBlock {
    /// First normalisation.
    pub norm1: Norm,
    /// First convolution.
    pub conv1: Conv,
    /// Second normalisation.
    pub norm2: Norm,
    /// Before the second convolution.
    pub dropout: Dropout,
    /// Second convolution.
    pub conv2: Conv,
    /// 1x1 shortcut.
    pub nin_shortcut: Option<Conv>,
    /// 3x3 shortcut.
    pub conv_shortcut: Option<Conv>,
    shortcut_of_output: bool,
}

impl ResnetBlock {
    /// `[b, inputs, h, w]` to `[b, outputs, h, w]`.
    pub fn forward(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        let h = self.conv1.forward_normed(&self.norm1, x_bchw.clone());
        let h = match self.dropout.prob == 0.0 {
            true => self.conv2.forward_normed(&self.norm2, h),
            false => self.conv2.forward(self.dropout.forward(self.norm2.forward_silu(h))),
        };
        let source = if self.shortcut_of_output { h.clone() } else { x_bchw };
        let shortcut = match self.nin_shortcut.as_ref().or(self.conv_shortcut.as_ref()) {
            Some(conv) => conv.forward(source),
            None => source,
        };
        shortcut + h
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::Param;
    use burn::tensor::Distribution;

    /// MaskGIT's shortcut takes the second convolution's output: once that is constant, so is the block.
    #[test]
    fn a_shortcut_of_the_output_does_not_see_the_input() {
        let device = Device::flex();
        let block = |shortcut| {
            let mut block =
                ResnetBlockConfig { shortcut, norm_groups: 4, ..ResnetBlockConfig::new(8, 12) }.init(&device);
            block.conv2.weight = Param::from_tensor(Tensor::zeros([12, 12, 3, 3], &device));
            block
        };
        let x = || Tensor::<4>::random([1, 8, 5, 6], Distribution::Default, &device);
        let differs = |shortcut| {
            let block = block(shortcut);
            (block.forward(x()) - block.forward(x())).abs().max().into_scalar::<f32>() > 1e-3
        };
        assert!(!differs(Shortcut::PointwiseOfOutput));
        assert!(differs(Shortcut::Pointwise));
        assert!(differs(Shortcut::Full));
    }
}
