//! Group normalisation with SiLU and the convolution after it, the half of a residual block, as one operation.

use crate::conv2d::{Conv2dOptions, Convolve, fits, geometry};
use crate::cpu::conv::{self, Geometry};
use crate::cpu::group_norm::{self as cpu, Spec};
use crate::flex::{Values, dims, serves, tensor};
use crate::group_norm::spec;
use burn::backend::autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, NodeGuard, Ops, OpsKind},
};
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension, tensor::FloatTensor};
use burn::tensor::Tensor;

/// What comes before the convolution of [`norm_silu_conv2d`]; see [`crate::group_norm`].
#[derive(Debug, Clone)]
pub struct GroupNormalization {
    /// Scale `[in]`.
    pub gamma: Tensor<1>,
    /// Shift `[in]`.
    pub beta: Tensor<1>,
    /// Divides the channels.
    pub groups: usize,
    /// Added to the variance.
    pub epsilon: f64,
}

/// `conv2d(group_norm(x) with SiLU, weight, bias)`, see [`crate::group_norm`] and [`crate::conv2d`]. In training only `x` is
/// kept: the backward pass normalises again, which takes little time and saves half of the memory of residual blocks.
///
/// # Shapes
/// As those operations: `x [b, in, h, w]`, `weight [out, in, kh, kw]`, `bias [out]` → `[b, out, h', w']`.
///
/// # Panics
/// Where Burn's operations do: shapes that do not fit, mixed data types.
pub fn norm_silu_conv2d(
    x: Tensor<4>,
    norm: GroupNormalization,
    weight: Tensor<4>,
    bias: Option<Tensor<1>>,
    options: Conv2dOptions,
) -> Tensor<4> {
    let GroupNormalization { gamma, beta, groups, epsilon } = norm;
    let [_, c, ..] = x.dims();
    let divides = groups > 0 && c % groups == 0 && gamma.dims() == [c] && beta.dims() == [c];
    let own = x.is_autodiff() && divides && serves(&gamma) && serves(&beta);
    if !(own && fits(&x, &weight, bias.as_ref(), options)) {
        return crate::conv2d(crate::group_norm(x, gamma, beta, groups, epsilon, true), weight, bias, options);
    }
    let (x, gamma, beta) = (x.into_dispatch(), gamma.into_dispatch(), beta.into_dispatch());
    let weight = weight.into_dispatch();
    Tensor::from_dispatch(match bias.map(Tensor::into_dispatch) {
        Some(bias) => <Dispatch as NormConvolve>::smalti_norm_conv2d_biased(
            x, gamma, beta, weight, bias, groups, epsilon, options,
        ),
        None => <Dispatch as NormConvolve>::smalti_norm_conv2d(x, gamma, beta, weight, groups, epsilon, options),
    })
}

#[backend_extension(Autodiff, Flex)]
trait NormConvolve: Backend {
    fn smalti_norm_conv2d(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        groups: usize,
        epsilon: f64,
        options: Conv2dOptions,
    ) -> FloatTensor<Self>;

    #[allow(clippy::too_many_arguments, reason = "the macro passes tensors one by one")]
    fn smalti_norm_conv2d_biased(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        groups: usize,
        epsilon: f64,
        options: Conv2dOptions,
    ) -> FloatTensor<Self>;
}

impl NormConvolve for Flex {
    fn smalti_norm_conv2d(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        groups: usize,
        epsilon: f64,
        options: Conv2dOptions,
    ) -> FloatTensor<Self> {
        let spec = spec(dims(&x), groups, epsilon, true);
        Flex::smalti_conv2d(normalized(spec, &x, gamma, beta).0, weight, options)
    }

    fn smalti_norm_conv2d_biased(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        groups: usize,
        epsilon: f64,
        options: Conv2dOptions,
    ) -> FloatTensor<Self> {
        let spec = spec(dims(&x), groups, epsilon, true);
        Flex::smalti_conv2d_biased(normalized(spec, &x, gamma, beta).0, weight, bias, options)
    }
}

impl<C: CheckpointStrategy> NormConvolve for Autodiff<Flex, C> {
    fn smalti_norm_conv2d(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        groups: usize,
        epsilon: f64,
        options: Conv2dOptions,
    ) -> FloatTensor<Self> {
        let spec = spec(dims(x.primitive()), groups, epsilon, true);
        let nodes = [x.node(), gamma.node(), beta.node(), weight.node()];
        record::<C, 4>(nodes, spec, [x, gamma, beta, weight], None, options)
    }

    fn smalti_norm_conv2d_biased(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        groups: usize,
        epsilon: f64,
        options: Conv2dOptions,
    ) -> FloatTensor<Self> {
        let spec = spec(dims(x.primitive()), groups, epsilon, true);
        let nodes = [x.node(), gamma.node(), beta.node(), weight.node(), bias.node()];
        record::<C, 5>(nodes, spec, [x, gamma, beta, weight], Some(bias), options)
    }
}

/// The normalised input, and the moments of its groups.
fn normalized(
    spec: Spec,
    x: &FloatTensor<Flex>,
    gamma: FloatTensor<Flex>,
    beta: FloatTensor<Flex>,
) -> (FloatTensor<Flex>, Vec<[f32; 2]>) {
    let (y, moments) = cpu::forward(spec, &Values::of(x.clone()), &Values::of(gamma), &Values::of(beta));
    (tensor(y, dims::<4>(x)), moments)
}

/// The forward pass, with a backward step for the `N` inputs that there are.
fn record<C: CheckpointStrategy, const N: usize>(
    nodes: [NodeGuard; N],
    spec: Spec,
    inputs: [FloatTensor<Autodiff<Flex, C>>; 4],
    bias: Option<FloatTensor<Autodiff<Flex, C>>>,
    options: Conv2dOptions,
) -> FloatTensor<Autodiff<Flex, C>> {
    let geometry = geometry(dims(inputs[0].primitive()), dims(inputs[3].primitive()), options);
    let bias = bias.map(|bias| bias.into_primitive());
    let forward = |inputs: [FloatTensor<Autodiff<Flex, C>>; 4]| {
        let [x, gamma, beta, weight] = inputs.map(|input| input.into_primitive());
        let (y, moments) = normalized(spec, &x, gamma, beta);
        (crate::conv2d::forward(geometry, y, weight, bias), moments)
    };
    match NormConvolveStep.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let ids = [0, 1, 2, 3].map(|i| prep.checkpoint(&inputs[i]));
            let (y, moments) = forward(inputs);
            prep.finish(Saved { spec, geometry, inputs: ids, moments }, y)
        }
        OpsKind::UnTracked(prep) => prep.finish(forward(inputs).0),
    }
}

#[derive(Debug)]
struct NormConvolveStep;

/// What the backward step needs; the inputs are kept by the graph.
#[derive(Debug, Clone)]
struct Saved {
    spec: Spec,
    geometry: Geometry,
    inputs: [NodeId; 4],
    moments: Vec<[f32; 2]>,
}

impl<const N: usize> Backward<Flex, N> for NormConvolveStep {
    type State = Saved;

    fn backward(self, ops: Ops<Saved, N>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let dy = Values::of(grads.consume::<Flex>(&ops.node));
        let Saved { spec, geometry, inputs, moments } = ops.state;
        let [x, gamma, beta, weight] = inputs.map(|id| checkpointer.retrieve_node_output::<FloatTensor<Flex>>(id));
        let (shape, weight_shape) = (dims::<4>(&x), dims::<4>(&weight));
        let [x, gamma, beta, weight] = [x, gamma, beta, weight].map(Values::of);
        let mut nodes = ops.parents.into_iter().map(|node| node.map(|node| node.id)).collect::<Vec<_>>().into_iter();
        let mut next = || nodes.next().flatten();
        let before = [next(), next(), next()];
        if let Some(id) = next() {
            let normal = cpu::again(spec, &x, &gamma, &beta, &moments);
            grads.register::<Flex>(id, tensor(conv::backward_weight(geometry, &normal, &dy), weight_shape));
        }
        if let Some(id) = next() {
            grads.register::<Flex>(id, tensor(conv::backward_bias(geometry, &dy), [geometry.outputs]));
        }
        if before.iter().any(Option::is_some) {
            let slope = conv::backward_data(geometry, &weight, &dy);
            let found = cpu::backward(spec, &x, &gamma, &beta, &moments, &slope);
            let gradients =
                [tensor(found.x, shape), tensor(found.gamma, [spec.channels]), tensor(found.beta, [spec.channels])];
            for (id, gradient) in before.into_iter().zip(gradients) {
                if let Some(id) = id {
                    grads.register::<Flex>(id, gradient);
                }
            }
        }
    }
}
