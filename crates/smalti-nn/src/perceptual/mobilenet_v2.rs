//! MobileNetV2 (arXiv 1801.04381) as torchvision has it: for perceptual distances, as an encoder and as a classifier's trunk.

use burn::module::{Initializer, Module, Param, ParamId};
use burn::tensor::{Device, Shape, Tensor, TensorData, module::conv2d, ops::ConvOptions};
use smalti_base::{Error, Result};
use smalti_kernels::Conv2dOptions;

/// Expansion, output channels, repetitions and first stride of the seven stages.
const STAGES: [(usize, usize, usize, usize); 7] =
    [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)];
const STEM: usize = 32;
const WIDTH: usize = 1280;
/// torchvision's default in its batch normalisation.
const EPSILON: f64 = 1e-5;

/// The layers `features.0` to `features.18` of MobileNetV2.
///
/// Batch normalisations use their stored statistics, in training too: those are buffers that no gradient reaches.
#[derive(Module, Debug)]
pub struct MobileNetV2 {
    /// In torchvision's order.
    pub features: Vec<Layer>,
}

/// A layer of the network.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "a network has a few of them")]
pub enum Layer {
    /// The first and the last one.
    Conv(NormedConv),
    /// Those between.
    Block(InvertedResidual),
}

/// Expand, convolve each channel, project.
#[derive(Module, Debug)]
pub struct InvertedResidual {
    /// 1x1 to more channels; the first block has none.
    pub expand: Option<NormedConv>,
    /// 3x3 of each channel.
    pub depthwise: NormedConv,
    /// 1x1 to fewer channels.
    pub project: NormedConv,
    residual: bool,
}

/// A convolution without bias, and the batch normalisation that follows it.
#[derive(Module, Debug)]
pub struct NormedConv {
    /// `[o, c, k, k]`; one input channel each if it convolves each channel by itself.
    pub weight: Param<Tensor<4>>,
    /// Scale `[o]`.
    pub gamma: Param<Tensor<1>>,
    /// Shift `[o]`.
    pub beta: Param<Tensor<1>>,
    /// Mean of what comes out of the convolution, `[o]`; not trained.
    pub mean: Param<Tensor<1>>,
    /// Variance of what comes out of the convolution, `[o]`; not trained.
    pub variance: Param<Tensor<1>>,
    stride: usize,
    depthwise: bool,
}

/// A parameter that no gradient reaches.
fn buffer(size: usize, value: f32, device: &Device) -> Param<Tensor<1>> {
    let fill = move |device: &Device, _: bool| Tensor::<1>::full([size], value, device).set_require_grad(false);
    Param::uninitialized(ParamId::new(), fill, device.clone(), false, Shape::from([size]))
}

impl NormedConv {
    /// Fresh weights as torchvision draws them: normal, scaled by what comes out.
    fn new(inputs: usize, outputs: usize, kernel: usize, stride: usize, device: &Device) -> Self {
        Self::of([outputs, inputs, kernel, kernel], stride, false, device)
    }

    fn each_channel(channels: usize, stride: usize, device: &Device) -> Self {
        Self::of([channels, 1, 3, 3], stride, true, device)
    }

    fn of(shape: [usize; 4], stride: usize, depthwise: bool, device: &Device) -> Self {
        let [outputs, _, kernel, _] = shape;
        let init = Initializer::Normal { mean: 0.0, std: (2.0 / (outputs * kernel * kernel) as f64).sqrt() };
        Self {
            weight: init.init(shape, device),
            gamma: Initializer::Ones.init([outputs], device),
            beta: Initializer::Zeros.init([outputs], device),
            mean: buffer(outputs, 0.0, device),
            variance: buffer(outputs, 1.0, device),
            stride,
            depthwise,
        }
    }

    /// The normalisation is folded into the convolution: `w' = w * g / sqrt(v + eps)`, `b' = b - m * g / sqrt(v + eps)`.
    fn forward(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        let [outputs, _, kernel, _] = self.weight.dims();
        let scale = self.gamma.val() / (self.variance.val() + EPSILON).sqrt();
        let bias = self.beta.val() - self.mean.val() * scale.clone();
        let weight = self.weight.val() * scale.reshape([outputs, 1, 1, 1]);
        if self.depthwise {
            let options = ConvOptions::new([self.stride; 2], [kernel / 2; 2], [1, 1], outputs);
            return conv2d(x_bchw, weight, Some(bias), options);
        }
        let options = Conv2dOptions { stride: self.stride, padding: [kernel / 2; 4], upsample: false };
        smalti_kernels::conv2d(x_bchw, weight, Some(bias), options)
    }

    fn load(
        mut self,
        read: &mut impl FnMut(&str, &[usize]) -> Result<TensorData>,
        conv: &str,
        norm: &str,
    ) -> Result<Self> {
        let weight = read(&format!("{conv}.weight"), &self.weight.lazy_shape().to_vec())?;
        let device = self.weight.lazy_device();
        self.weight = Param::from_tensor(Tensor::from_data(weight, &device));
        let [outputs, ..] = self.weight.dims();
        let mut vector = |name: &str| -> Result<Param<Tensor<1>>> {
            Ok(Param::from_tensor(Tensor::from_data(read(&format!("{norm}.{name}"), &[outputs])?, &device)))
        };
        self.gamma = vector("weight")?;
        self.beta = vector("bias")?;
        self.mean = vector("running_mean")?.set_require_grad(false);
        self.variance = vector("running_var")?.set_require_grad(false);
        Ok(self)
    }
}

impl InvertedResidual {
    fn new(inputs: usize, hidden: usize, outputs: usize, stride: usize, device: &Device) -> Self {
        Self {
            expand: (hidden != inputs).then(|| NormedConv::new(inputs, hidden, 1, 1, device)),
            depthwise: NormedConv::each_channel(hidden, stride, device),
            project: NormedConv::new(hidden, outputs, 1, 1, device),
            residual: stride == 1 && inputs == outputs,
        }
    }

    fn forward(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        let expanded = match &self.expand {
            Some(expand) => relu6(expand.forward(x_bchw.clone())),
            None => x_bchw.clone(),
        };
        let projected = self.project.forward(relu6(self.depthwise.forward(expanded)));
        if self.residual { x_bchw + projected } else { projected }
    }

    fn load(self, read: &mut impl FnMut(&str, &[usize]) -> Result<TensorData>, name: &str) -> Result<Self> {
        let mut pair =
            |layer: NormedConv, i: usize| layer.load(read, &format!("{name}.{i}.0"), &format!("{name}.{i}.1"));
        let expand = self.expand.map(|layer| pair(layer, 0)).transpose()?;
        let at = usize::from(expand.is_some());
        let depthwise = pair(self.depthwise, at)?;
        let project = self.project.load(read, &format!("{name}.{}", at + 1), &format!("{name}.{}", at + 2))?;
        Ok(Self { expand, depthwise, project, residual: self.residual })
    }
}

impl Layer {
    fn forward(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Conv(layer) => relu6(layer.forward(x_bchw)),
            Self::Block(block) => block.forward(x_bchw),
        }
    }
}

impl MobileNetV2 {
    /// The numbers of [`Self::pooled`].
    pub const WIDTH: usize = WIDTH;

    /// A network with fresh weights.
    pub fn new(device: &Device) -> Self {
        let mut features = vec![Layer::Conv(NormedConv::new(3, STEM, 3, 2, device))];
        let mut inputs = STEM;
        for (expansion, outputs, repetitions, first_stride) in STAGES {
            for repetition in 0..repetitions {
                let stride = if repetition == 0 { first_stride } else { 1 };
                let block = InvertedResidual::new(inputs, inputs * expansion, outputs, stride, device);
                features.push(Layer::Block(block));
                inputs = outputs;
            }
        }
        features.push(Layer::Conv(NormedConv::new(inputs, WIDTH, 1, 1, device)));
        Self { features }
    }

    /// Builds the network from tensors with torchvision's names (`features.0.0.weight`, ...); others are not asked for.
    ///
    /// # Errors
    /// What `tensor` returns, or [`Error::Invalid`] if a shape differs.
    pub fn load(mut tensor: impl FnMut(&str) -> Result<TensorData>, device: &Device) -> Result<Self> {
        let mut read = |name: &str, shape: &[usize]| -> Result<TensorData> {
            let data = tensor(name)?;
            match data.shape()[..] == *shape {
                true => Ok(data),
                false => Err(Error::invalid(name, format!("its shape is {:?}, expected {shape:?}", data.shape()))),
            }
        };
        let load = |(i, layer)| {
            let name = format!("features.{i}");
            Ok(match layer {
                Layer::Conv(layer) => Layer::Conv(layer.load(&mut read, &format!("{name}.0"), &format!("{name}.1"))?),
                Layer::Block(block) => Layer::Block(block.load(&mut read, &format!("{name}.conv"))?),
            })
        };
        let features = Self::new(device).features.into_iter().enumerate().map(load).collect::<Result<_>>()?;
        Ok(Self { features })
    }

    /// Outputs of `features.{i}` for the given increasing `i` in 0..=18, of images normalised with ImageNet's mean and
    /// deviation. What comes after the last is not computed.
    pub fn features(&self, x_bchw: Tensor<4>, wanted: &[usize]) -> Vec<Tensor<4>> {
        let mut taps = Vec::with_capacity(wanted.len());
        let last = wanted.last().copied().unwrap_or(0);
        let mut x = x_bchw;
        for (index, layer) in self.features.iter().enumerate().take(last + 1) {
            x = layer.forward(x);
            if wanted.contains(&index) {
                taps.push(x.clone());
            }
        }
        taps
    }

    /// The mean over places of `features.18`: `[b, 1280]` of normalised images `[b, 3, h, w]`.
    pub fn pooled(&self, x_bchw: Tensor<4>) -> Tensor<2> {
        let [b, ..] = x_bchw.dims();
        let last = self.features(x_bchw, &[self.features.len() - 1]).remove(0);
        last.mean_dim(3).mean_dim(2).reshape([b, WIDTH])
    }
}

fn relu6(x: Tensor<4>) -> Tensor<4> {
    x.clamp(0.0, 6.0)
}
