//! Group normalisation (Wu and He 2018, arXiv 1803.08494), with SiLU fused on request.

use crate::cpu::group_norm::{Spec, backward, forward};
use crate::flex::{Values, dims, serves, tensor};
use burn::backend::autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension, tensor::FloatTensor};
use burn::tensor::{Tensor, activation};
use std::sync::Arc;

/// Normalises each group of channels of each image to mean 0 and variance 1, then scales and shifts each channel:
/// `y = (x - mean) / sqrt(var + epsilon) * gamma + beta`, and `y * sigmoid(y)` when `silu` is set.
///
/// # Shapes
/// `x [b, c, h, w]`, `gamma [c]`, `beta [c]` → `[b, c, h, w]`; `groups` divides `c`. The variance is the biased one.
///
/// # Panics
/// Where Burn's operations do: shapes that do not fit, mixed data types.
pub fn group_norm(
    x: Tensor<4>,
    gamma: Tensor<1>,
    beta: Tensor<1>,
    groups: usize,
    epsilon: f64,
    silu: bool,
) -> Tensor<4> {
    let [_, c, h, w] = x.dims();
    let fits = groups > 0 && c % groups == 0 && gamma.dims() == [c] && beta.dims() == [c] && c * h * w > 0;
    if !(fits && serves(&x) && serves(&gamma) && serves(&beta)) {
        return portable(x, gamma, beta, groups, epsilon, silu);
    }
    let (x, gamma, beta) = (x.into_dispatch(), gamma.into_dispatch(), beta.into_dispatch());
    Tensor::from_dispatch(<Dispatch as GroupNorm>::smalti_group_norm(x, gamma, beta, groups, epsilon, silu))
}

/// [`group_norm`] as a composition of tensor operations.
pub fn portable(x: Tensor<4>, gamma: Tensor<1>, beta: Tensor<1>, groups: usize, epsilon: f64, silu: bool) -> Tensor<4> {
    let [b, c, h, w] = x.dims();
    let rows = x.reshape([b, groups, c / groups * h * w]);
    let centred = rows.clone() - rows.mean_dim(2);
    let variance = centred.clone().square().mean_dim(2);
    let normal = (centred / (variance + epsilon).sqrt()).reshape([b, c, h, w]);
    let y = normal * gamma.reshape([1, c, 1, 1]) + beta.reshape([1, c, 1, 1]);
    if silu { activation::silu(y) } else { y }
}

#[backend_extension(Autodiff, Flex)]
trait GroupNorm: Backend {
    fn smalti_group_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        groups: usize,
        epsilon: f64,
        silu: bool,
    ) -> FloatTensor<Self>;
}

impl GroupNorm for Flex {
    fn smalti_group_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        groups: usize,
        epsilon: f64,
        silu: bool,
    ) -> FloatTensor<Self> {
        let shape = dims::<4>(&x);
        let spec = spec(shape, groups, epsilon, silu);
        tensor(forward(spec, &Values::of(x), &Values::of(gamma), &Values::of(beta)).0, shape)
    }
}

impl<C: CheckpointStrategy> GroupNorm for Autodiff<Flex, C> {
    fn smalti_group_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        groups: usize,
        epsilon: f64,
        silu: bool,
    ) -> FloatTensor<Self> {
        let nodes = [x.node(), gamma.node(), beta.node()];
        match GroupNormStep.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let shape = dims::<4>(x.primitive());
                let spec = spec(shape, groups, epsilon, silu);
                let inputs = [prep.checkpoint(&x), prep.checkpoint(&gamma), prep.checkpoint(&beta)];
                let (x, gamma, beta) = (x.into_primitive(), gamma.into_primitive(), beta.into_primitive());
                let (y, moments) = forward(spec, &Values::of(x), &Values::of(gamma), &Values::of(beta));
                prep.finish(Saved { spec, shape, inputs, moments: moments.into() }, tensor(y, shape))
            }
            OpsKind::UnTracked(prep) => {
                let (x, gamma, beta) = (x.into_primitive(), gamma.into_primitive(), beta.into_primitive());
                prep.finish(Flex::smalti_group_norm(x, gamma, beta, groups, epsilon, silu))
            }
        }
    }
}

pub(crate) fn spec([batch, channels, h, w]: [usize; 4], groups: usize, epsilon: f64, silu: bool) -> Spec {
    Spec { batch, channels, area: h * w, groups, epsilon: epsilon as f32, silu }
}

#[derive(Debug)]
struct GroupNormStep;

/// What the backward step needs; the inputs are kept by the graph.
#[derive(Debug, Clone)]
struct Saved {
    spec: Spec,
    shape: [usize; 4],
    inputs: [NodeId; 3],
    moments: Arc<[[f32; 2]]>,
}

impl Backward<Flex, 3> for GroupNormStep {
    type State = Saved;

    fn backward(self, ops: Ops<Saved, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let dy = Values::of(grads.consume::<Flex>(&ops.node));
        let Saved { spec, shape, inputs, moments } = ops.state;
        let [x, gamma, beta] = inputs.map(|id| Values::of(checkpointer.retrieve_node_output(id)));
        let found = backward(spec, &x, &gamma, &beta, &moments, &dy);
        let [x, gamma, beta] = ops.parents;
        if let Some(node) = x {
            grads.register::<Flex>(node.id, tensor(found.x, shape));
        }
        if let Some(node) = gamma {
            grads.register::<Flex>(node.id, tensor(found.gamma, [spec.channels]));
        }
        if let Some(node) = beta {
            grads.register::<Flex>(node.id, tensor(found.beta, [spec.channels]));
        }
    }
}
