//! Two-dimensional convolution.

use crate::cpu::conv::{self, Geometry};
use crate::flex::{Values, dims, serves, tensor};
use burn::backend::autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, NodeGuard, Ops, OpsKind},
};
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension, tensor::FloatTensor};
use burn::tensor::{
    Tensor, module,
    ops::{ConvOptions, InterpolateMode, InterpolateOptions},
};
use std::sync::atomic::{AtomicBool, Ordering};

/// How a [`conv2d`] walks over its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv2dOptions {
    /// Step between outputs, in both directions; at least 1.
    pub stride: usize,
    /// Rows and columns of zeros around the (upsampled) input: top, left, bottom, right.
    pub padding: [usize; 4],
    /// Whether the input is first enlarged twofold by repeating each pixel (nearest).
    pub upsample: bool,
}

impl Conv2dOptions {
    /// Stride 1, the same padding on all four sides.
    #[must_use]
    pub fn padded(padding: usize) -> Self {
        Self { stride: 1, padding: [padding; 4], upsample: false }
    }

    /// With another stride.
    #[must_use]
    pub fn with_stride(self, stride: usize) -> Self {
        Self { stride, ..self }
    }

    /// With another padding: top, left, bottom, right.
    #[must_use]
    pub fn with_padding(self, padding: [usize; 4]) -> Self {
        Self { padding, ..self }
    }

    /// With the input enlarged twofold first.
    #[must_use]
    pub fn upsampled(self) -> Self {
        Self { upsample: true, ..self }
    }

    /// Height and width of the result; none where the kernel does not fit into the padded input.
    fn result(&self, size: [usize; 2], kernel: [usize; 2]) -> Option<[usize; 2]> {
        let [top, left, bottom, right] = self.padding;
        let along = |n: usize, padding: usize, kernel: usize| {
            let n = if self.upsample { 2 * n } else { n };
            Some((n + padding).checked_sub(kernel)?.checked_div(self.stride)? + 1)
        };
        Some([along(size[0], top + bottom, kernel[0])?, along(size[1], left + right, kernel[1])?])
    }
}

/// How the CPU bodies of [`conv2d`] sum up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Convolution {
    /// 3×3 kernels of stride 1 by Winograd's algorithm, with a quarter of the multiplications. Against a sum in `f64`, for
    /// normal values and 64 to 512 channels, the root mean square of the error is below 1e-6 of the largest result and
    /// the largest error below 1.2e-5.
    Fast,
    /// Every kernel by direct sums. The root mean square of the error is below 1e-7 of the largest result, the
    /// largest error below 1e-6.
    Direct,
}

static DIRECT: AtomicBool = AtomicBool::new(false);

/// Sets the algorithm of all following calls in this process; it begins as [`Convolution::Fast`]. A backward pass takes that
/// of its forward pass.
pub fn set_convolution(algorithm: Convolution) {
    DIRECT.store(algorithm == Convolution::Direct, Ordering::Relaxed);
}

/// Cross-correlation of `x` with `weight`, as in PyTorch's `conv2d`.
///
/// # Shapes
/// `x [b, in, h, w]`, `weight [out, in, kh, kw]`, `bias [out]` → `[b, out, h', w']` with
/// `h' = (h + top + bottom - kh) / stride + 1` rounded down, `h` doubled first when upsampling; `w'` likewise.
///
/// # Panics
/// Where Burn's operations do: shapes that do not fit, a stride of 0, mixed data types.
pub fn conv2d(x: Tensor<4>, weight: Tensor<4>, bias: Option<Tensor<1>>, options: Conv2dOptions) -> Tensor<4> {
    if !fits(&x, &weight, bias.as_ref(), options) {
        return portable(x, weight, bias, options);
    }
    let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(match bias.map(Tensor::into_dispatch) {
        Some(bias) => <Dispatch as Convolve>::smalti_conv2d_biased(x, weight, bias, options),
        None => <Dispatch as Convolve>::smalti_conv2d(x, weight, options),
    })
}

/// Whether all inputs are of a kind that the own bodies serve, and of sizes that suit each other.
pub(crate) fn fits(x: &Tensor<4>, weight: &Tensor<4>, bias: Option<&Tensor<1>>, options: Conv2dOptions) -> bool {
    let ([_, inputs, h, w], [outputs, expected, kh, kw]) = (x.dims(), weight.dims());
    let result = options.result([h, w], [kh, kw]);
    let fits = inputs == expected && bias.is_none_or(|bias| bias.dims() == [outputs]);
    let filled = result.is_some() && [inputs, outputs, h, w, kh, kw].iter().all(|&n| n > 0);
    fits && filled && serves(x) && serves(weight) && bias.is_none_or(serves)
}

/// [`conv2d`] by Burn's own operations.
pub fn portable(x: Tensor<4>, weight: Tensor<4>, bias: Option<Tensor<1>>, options: Conv2dOptions) -> Tensor<4> {
    let [_, _, h, w] = x.dims();
    let x = if options.upsample {
        let nearest = InterpolateOptions::new(InterpolateMode::Nearest).with_output_size([2 * h, 2 * w]);
        module::interpolate(x, nearest)
    } else {
        x
    };
    let [top, left, bottom, right] = options.padding;
    let padding = [(top, bottom), (left, right)];
    let convolution = ConvOptions { stride: [options.stride; 2], padding, dilation: [1, 1], groups: 1 };
    module::conv2d(x, weight, bias, convolution)
}

#[backend_extension(Autodiff, Flex)]
pub(crate) trait Convolve: Backend {
    fn smalti_conv2d(x: FloatTensor<Self>, weight: FloatTensor<Self>, options: Conv2dOptions) -> FloatTensor<Self>;

    fn smalti_conv2d_biased(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        options: Conv2dOptions,
    ) -> FloatTensor<Self>;
}

impl Convolve for Flex {
    fn smalti_conv2d(x: FloatTensor<Self>, weight: FloatTensor<Self>, options: Conv2dOptions) -> FloatTensor<Self> {
        forward(geometry(dims(&x), dims(&weight), options), x, weight, None)
    }

    fn smalti_conv2d_biased(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        options: Conv2dOptions,
    ) -> FloatTensor<Self> {
        forward(geometry(dims(&x), dims(&weight), options), x, weight, Some(bias))
    }
}

impl<C: CheckpointStrategy> Convolve for Autodiff<Flex, C> {
    fn smalti_conv2d(x: FloatTensor<Self>, weight: FloatTensor<Self>, options: Conv2dOptions) -> FloatTensor<Self> {
        record::<C, 2>([x.node(), weight.node()], x, weight, None, options)
    }

    fn smalti_conv2d_biased(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        options: Conv2dOptions,
    ) -> FloatTensor<Self> {
        record::<C, 3>([x.node(), weight.node(), bias.node()], x, weight, Some(bias), options)
    }
}

pub(crate) fn forward(
    geometry: Geometry,
    x: FloatTensor<Flex>,
    weight: FloatTensor<Flex>,
    bias: Option<FloatTensor<Flex>>,
) -> FloatTensor<Flex> {
    let bias = bias.map(Values::of);
    let y = conv::forward(geometry, &Values::of(x), &Values::of(weight), bias.as_deref());
    tensor(y, [geometry.batch, geometry.outputs, geometry.result[0], geometry.result[1]])
}

/// The forward pass, with a backward step for the `N` inputs that there are.
fn record<C: CheckpointStrategy, const N: usize>(
    nodes: [NodeGuard; N],
    x: FloatTensor<Autodiff<Flex, C>>,
    weight: FloatTensor<Autodiff<Flex, C>>,
    bias: Option<FloatTensor<Autodiff<Flex, C>>>,
    options: Conv2dOptions,
) -> FloatTensor<Autodiff<Flex, C>> {
    let geometry = geometry(dims(x.primitive()), dims(weight.primitive()), options);
    let bias = bias.map(|bias| bias.into_primitive());
    match ConvolveStep.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let inputs = [prep.checkpoint(&x), prep.checkpoint(&weight)];
            let y = forward(geometry, x.into_primitive(), weight.into_primitive(), bias);
            prep.finish((geometry, inputs), y)
        }
        OpsKind::UnTracked(prep) => prep.finish(forward(geometry, x.into_primitive(), weight.into_primitive(), bias)),
    }
}

pub(crate) fn geometry(
    [batch, inputs, h, w]: [usize; 4],
    [outputs, _, kh, kw]: [usize; 4],
    options: Conv2dOptions,
) -> Geometry {
    let Conv2dOptions { stride, upsample, .. } = options;
    let [top, left, ..] = options.padding;
    let result = options.result([h, w], [kh, kw]).unwrap_or_default();
    Geometry {
        batch,
        inputs,
        outputs,
        size: [h, w],
        upsample,
        kernel: [kh, kw],
        stride,
        padding: [top, left],
        result,
        direct: DIRECT.load(Ordering::Relaxed),
    }
}

#[derive(Debug)]
struct ConvolveStep;

impl<const N: usize> Backward<Flex, N> for ConvolveStep {
    /// The inputs are kept by the graph.
    type State = (Geometry, [NodeId; 2]);

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let dy = Values::of(grads.consume::<Flex>(&ops.node));
        let (geometry, [x, weight]) = ops.state;
        let x: FloatTensor<Flex> = checkpointer.retrieve_node_output(x);
        let weight: FloatTensor<Flex> = checkpointer.retrieve_node_output(weight);
        for (input, node) in ops.parents.into_iter().enumerate() {
            let Some(node) = node else { continue };
            let gradient = match input {
                0 => tensor(conv::backward_data(geometry, &Values::of(weight.clone()), &dy), dims::<4>(&x)),
                1 => tensor(conv::backward_weight(geometry, &Values::of(x.clone()), &dy), dims::<4>(&weight)),
                _ => tensor(conv::backward_bias(geometry, &dy), [geometry.outputs]),
            };
            grads.register::<Flex>(node.id, gradient);
        }
    }
}
