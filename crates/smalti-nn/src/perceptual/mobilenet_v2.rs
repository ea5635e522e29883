//! MobileNetV2 (arXiv 1801.04381) with torchvision's weights, for perceptual distances and evaluation.

use crate::Conv;
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData, module::conv2d, ops::ConvOptions};
use smalti_base::{Error, Result};

/// Expansion, output channels, repetitions and first stride of the seven stages.
const STAGES: [(usize, usize, usize, usize); 7] =
    [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)];
const STEM: usize = 32;
const HEAD: usize = 1280;
/// torchvision's default in its batch normalisation.
const EPSILON: f32 = 1e-5;

/// MobileNetV2 for inference. Batch normalisations are folded into the convolutions.
#[derive(Module, Debug)]
pub struct MobileNetV2 {
    /// `features.0`.
    pub stem: Conv,
    /// `features.1` to `features.17`.
    pub blocks: Vec<InvertedResidual>,
    /// `features.18`.
    pub head: Conv,
    /// `classifier.1` as a 1x1 convolution, if the file has it.
    pub classifier: Option<Conv>,
}

/// Expand, convolve each channel, project.
#[derive(Module, Debug)]
pub struct InvertedResidual {
    /// 1x1 to more channels; the first block has none.
    pub expand: Option<Conv>,
    /// 3x3 of each channel.
    pub depthwise: Depthwise,
    /// 1x1 to fewer channels.
    pub project: Conv,
    residual: bool,
}

/// A 3x3 convolution of each channel by itself.
#[derive(Module, Debug)]
pub struct Depthwise {
    /// `[c, 1, 3, 3]`.
    pub weight: Param<Tensor<4>>,
    /// `[c]`.
    pub bias: Param<Tensor<1>>,
    stride: usize,
}

impl Depthwise {
    fn forward(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        let [channels, ..] = self.weight.dims();
        let options = ConvOptions::new([self.stride; 2], [1, 1], [1, 1], channels);
        conv2d(x_bchw, self.weight.val(), Some(self.bias.val()), options)
    }
}

impl InvertedResidual {
    fn forward(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        let expanded = match &self.expand {
            Some(expand) => relu6(expand.forward(x_bchw.clone())),
            None => x_bchw.clone(),
        };
        let projected = self.project.forward(relu6(self.depthwise.forward(expanded)));
        if self.residual { x_bchw + projected } else { projected }
    }
}

impl MobileNetV2 {
    /// Builds the network from tensors with torchvision's names (`features.0.0.weight`, ...); without
    /// `classifier.1.weight` there are no logits.
    ///
    /// # Errors
    /// What `tensor` returns for a `features` tensor, or [`Error::Invalid`] if a shape differs.
    pub fn load(mut tensor: impl FnMut(&str) -> Result<TensorData>, device: &Device) -> Result<Self> {
        let mut read = |name: &str, shape: &[usize]| -> Result<Vec<f32>> {
            let data = tensor(name)?;
            if data.shape()[..] != *shape {
                return Err(Error::invalid(name, format!("its shape is {:?}, expected {shape:?}", data.shape())));
            }
            data.convert::<f32>().try_to_vec::<f32>().map_err(|e| Error::invalid(name, format!("{e:?}")))
        };
        let stem = folded(&mut read, "features.0.0", "features.0.1", [STEM, 3, 3, 3])?.conv(device).with_stride(2);
        let mut blocks = Vec::new();
        let mut inputs = STEM;
        for (expansion, outputs, repetitions, first_stride) in STAGES {
            for repetition in 0..repetitions {
                let stride = if repetition == 0 { first_stride } else { 1 };
                let name = format!("features.{}.conv", blocks.len() + 1);
                blocks.push(block(&mut read, &name, inputs, inputs * expansion, outputs, stride, device)?);
                inputs = outputs;
            }
        }
        let head = folded(&mut read, "features.18.0", "features.18.1", [HEAD, inputs, 1, 1])?.conv(device);
        let classifier = match tensor("classifier.1.weight") {
            Ok(weight) if weight.shape().len() == 2 => {
                let [classes, inputs] = [weight.shape()[0], weight.shape()[1]];
                let weight = Tensor::<2>::from_data(weight, device).reshape([classes, inputs, 1, 1]);
                Some(Conv::from_tensors(weight, Some(Tensor::from_data(tensor("classifier.1.bias")?, device))))
            }
            _ => None,
        };
        Ok(Self { stem, blocks, head, classifier })
    }

    /// Outputs of `features.{i}` for the given increasing `i` in 0..=18, of images normalised with ImageNet's mean and
    /// deviation. What comes after the last is not computed.
    pub fn features(&self, x_bchw: Tensor<4>, wanted: &[usize]) -> Vec<Tensor<4>> {
        let mut taps = Vec::with_capacity(wanted.len());
        let last = wanted.last().copied().unwrap_or(0);
        let mut x = relu6(self.stem.forward(x_bchw));
        for index in 0..=last.min(self.blocks.len() + 1) {
            if index > self.blocks.len() {
                x = relu6(self.head.forward(x));
            } else if index > 0 {
                x = self.blocks[index - 1].forward(x);
            }
            if wanted.contains(&index) {
                taps.push(x.clone());
            }
        }
        taps
    }

    /// The mean over places of `features.18`: `[b, 1280]` of normalised images `[b, 3, h, w]`.
    pub fn pooled(&self, x_bchw: Tensor<4>) -> Tensor<2> {
        let [b, ..] = x_bchw.dims();
        let last = self.features(x_bchw, &[self.blocks.len() + 1]).remove(0);
        last.mean_dim(3).mean_dim(2).reshape([b, HEAD])
    }

    /// Logits `[b, 1000]` of pooled features `[b, 1280]`, if the weights have a classifier.
    pub fn logits(&self, pooled: Tensor<2>) -> Option<Tensor<2>> {
        let [b, c] = pooled.dims();
        let classifier = self.classifier.as_ref()?;
        let logits = classifier.forward(pooled.reshape([b, c, 1, 1]));
        let [_, classes, ..] = logits.dims();
        Some(logits.reshape([b, classes]))
    }
}

fn relu6(x: Tensor<4>) -> Tensor<4> {
    x.clamp(0.0, 6.0)
}

fn block(
    read: &mut impl FnMut(&str, &[usize]) -> Result<Vec<f32>>,
    name: &str,
    inputs: usize,
    hidden: usize,
    outputs: usize,
    stride: usize,
    device: &Device,
) -> Result<InvertedResidual> {
    let mut pair = |i: usize, shape| folded(read, &format!("{name}.{i}.0"), &format!("{name}.{i}.1"), shape);
    let expand = if hidden == inputs { None } else { Some(pair(0, [hidden, inputs, 1, 1])?.conv(device)) };
    let at = usize::from(expand.is_some());
    let depthwise = pair(at, [hidden, 1, 3, 3])?;
    let project = folded(read, &format!("{name}.{}", at + 1), &format!("{name}.{}", at + 2), [outputs, hidden, 1, 1])?;
    Ok(InvertedResidual {
        expand,
        depthwise: Depthwise {
            weight: Param::from_tensor(depthwise.weight(device)),
            bias: Param::from_tensor(depthwise.bias(device)),
            stride,
        },
        project: project.conv(device),
        residual: stride == 1 && inputs == outputs,
    })
}

/// A convolution with the batch normalisation after it: `w' = w * g / sqrt(v + eps)`, `b' = b - m * g / sqrt(v + eps)`.
struct Folded {
    weight: Vec<f32>,
    bias: Vec<f32>,
    shape: [usize; 4],
}

impl Folded {
    fn weight(&self, device: &Device) -> Tensor<4> {
        Tensor::from_data(TensorData::new(self.weight.clone(), self.shape), device)
    }

    fn bias(&self, device: &Device) -> Tensor<1> {
        Tensor::from_data(TensorData::new(self.bias.clone(), [self.bias.len()]), device)
    }

    fn conv(&self, device: &Device) -> Conv {
        Conv::from_tensors(self.weight(device), Some(self.bias(device)))
    }
}

fn folded(
    read: &mut impl FnMut(&str, &[usize]) -> Result<Vec<f32>>,
    conv: &str,
    norm: &str,
    shape: [usize; 4],
) -> Result<Folded> {
    let [outputs, ..] = shape;
    let mut weight = read(&format!("{conv}.weight"), &shape)?;
    let mut of = |part: &str| read(&format!("{norm}.{part}"), &[outputs]);
    let (gamma, beta, mean, variance) = (of("weight")?, of("bias")?, of("running_mean")?, of("running_var")?);
    let size = weight.len() / outputs;
    let mut bias = Vec::with_capacity(outputs);
    for (o, row) in weight.chunks_mut(size).enumerate() {
        let scale = gamma[o] / (variance[o] + EPSILON).sqrt();
        row.iter_mut().for_each(|w| *w *= scale);
        bias.push(beta[o] - mean[o] * scale);
    }
    Ok(Folded { weight, bias, shape })
}
