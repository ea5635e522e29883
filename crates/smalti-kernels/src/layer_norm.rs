//! Layer normalisation (Ba, Kiros and Hinton 2016, arXiv 1607.06450) over the last axis.

use crate::cpu::layer_norm::{backward, forward};
use crate::flex::{Again, Values, dims, serves, tensor};
use burn::backend::autodiff::{
    NodeId,
    checkpoint::base::Checkpointer,
    checkpoint::strategy::{BalancedCheckpointing, CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, NodeGuard, Ops, OpsKind},
};
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension, tensor::FloatTensor};
use burn::tensor::Tensor;
use std::sync::Arc;

/// `(x - mean) / sqrt(var + epsilon) * gamma + beta`, mean and biased variance over the last axis. In training `x` is kept; the
/// result is made again for the backward passes that need it.
///
/// # Shapes
/// `x [b, t, d]`, `gamma [d]`, `beta [d]` → `[b, t, d]`.
///
/// # Panics
/// Where Burn's operations do: shapes that do not fit, mixed data types.
pub fn layer_norm(x: Tensor<3>, gamma: Tensor<1>, beta: Tensor<1>, epsilon: f64) -> Tensor<3> {
    let [_, _, d] = x.dims();
    let fits = d > 0 && gamma.dims() == [d] && beta.dims() == [d];
    if !(fits && serves(&x) && serves(&gamma) && serves(&beta)) {
        return portable(x, gamma, beta, epsilon);
    }
    let (x, gamma, beta) = (x.into_dispatch(), gamma.into_dispatch(), beta.into_dispatch());
    Tensor::from_dispatch(<Dispatch as LayerNorm>::smalti_layer_norm(x, gamma, beta, epsilon))
}

/// [`layer_norm`] without gamma and beta, scaled by `1 + scale` and shifted by what differs between images or tokens: adaptive
/// layer normalisation (DiT, arXiv 2212.09748).
///
/// # Shapes
/// `x [b, t, d]`, `scale` and `shift` `[b, 1, d]` or `[b, t, d]` → `[b, t, d]`.
///
/// # Panics
/// As [`layer_norm`].
pub fn modulated_layer_norm(x: Tensor<3>, scale: Tensor<3>, shift: Tensor<3>, epsilon: f64) -> Tensor<3> {
    let [b, t, d] = x.dims();
    let groups = match scale.dims() {
        dims if dims != shift.dims() || b * t * d == 0 => 0,
        [1, 1, last] if last == d => 1,
        [images, 1, last] if (images, last) == (b, d) => b,
        dims if dims == [b, t, d] => b * t,
        _ => 0,
    };
    if !(groups > 0 && serves(&x) && serves(&scale) && serves(&shift)) {
        return portable_modulated(x, scale, shift, epsilon);
    }
    let (gamma, beta) = ((scale + 1.0).reshape([groups * d]), shift.reshape([groups * d]));
    let (x, gamma, beta) = (x.into_dispatch(), gamma.into_dispatch(), beta.into_dispatch());
    Tensor::from_dispatch(<Dispatch as LayerNorm>::smalti_layer_norm(x, gamma, beta, epsilon))
}

/// [`modulated_layer_norm`] as a composition of tensor operations.
pub fn portable_modulated(x: Tensor<3>, scale: Tensor<3>, shift: Tensor<3>, epsilon: f64) -> Tensor<3> {
    let centred = x.clone() - x.mean_dim(2);
    let variance = centred.clone().square().mean_dim(2);
    centred / (variance + epsilon).sqrt() * (scale + 1.0) + shift
}

/// [`layer_norm`] as a composition of tensor operations.
pub fn portable(x: Tensor<3>, gamma: Tensor<1>, beta: Tensor<1>, epsilon: f64) -> Tensor<3> {
    let centred = x.clone() - x.mean_dim(2);
    let variance = centred.clone().square().mean_dim(2);
    centred / (variance + epsilon).sqrt() * gamma.unsqueeze() + beta.unsqueeze()
}

/// `gamma` and `beta` have `d` values for each of some groups of as many tokens.
#[backend_extension(Autodiff, Flex)]
trait LayerNorm: Backend {
    fn smalti_layer_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self>;
}

impl LayerNorm for Flex {
    fn smalti_layer_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        let shape = dims::<3>(&x);
        let [x, gamma, beta] = [x, gamma, beta].map(Values::of);
        tensor(forward(&x, shape[2], &gamma, &beta, epsilon as f32).0, shape)
    }
}

impl<C: CheckpointStrategy> LayerNorm for Autodiff<Flex, C> {
    fn smalti_layer_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        let nodes = [x.node(), gamma.node(), beta.node()];
        let again = Again {
            inputs: nodes.each_ref().map(NodeGuard::id),
            forward: move |[x, gamma, beta]: [_; 3]| Flex::smalti_layer_norm(x, gamma, beta, epsilon),
        };
        let prep = LayerNormStep.prepare::<BalancedCheckpointing>(nodes).memory_bound().retro_forward(again);
        match prep.parents([&x, &gamma, &beta]).stateful() {
            OpsKind::Tracked(mut prep) => {
                let shape = dims::<3>(x.primitive());
                let inputs = [prep.checkpoint(&x), prep.checkpoint(&gamma)];
                let [x, gamma, beta] = [x, gamma, beta].map(|input| Values::of(input.into_primitive()));
                let (y, moments) = forward(&x, shape[2], &gamma, &beta, epsilon as f32);
                prep.finish(Saved { shape, inputs, moments: moments.into() }, tensor(y, shape))
            }
            OpsKind::UnTracked(prep) => {
                let [x, gamma, beta] = [x, gamma, beta].map(|input| input.into_primitive());
                prep.finish(Flex::smalti_layer_norm(x, gamma, beta, epsilon))
            }
        }
    }
}

#[derive(Debug)]
struct LayerNormStep;

/// What the backward step needs; the inputs are kept by the graph.
#[derive(Debug, Clone)]
struct Saved {
    shape: [usize; 3],
    inputs: [NodeId; 2],
    moments: Arc<[[f32; 2]]>,
}

impl Backward<Flex, 3> for LayerNormStep {
    type State = Saved;

    fn backward(self, ops: Ops<Saved, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let dy = Values::of(grads.consume::<Flex>(&ops.node));
        let Saved { shape, inputs, moments } = ops.state;
        let [x, gamma] = inputs.map(|id| Values::of(checkpointer.retrieve_node_output(id)));
        let found = backward(&x, shape[2], &gamma, &moments, &dy);
        let ([x, gamma, beta], scales) = (ops.parents, found.gamma.len());
        if let Some(node) = x {
            grads.register::<Flex>(node.id, tensor(found.x, shape));
        }
        if let Some(node) = gamma {
            grads.register::<Flex>(node.id, tensor(found.gamma, [scales]));
        }
        if let Some(node) = beta {
            grads.register::<Flex>(node.id, tensor(found.beta, [scales]));
        }
    }
}
