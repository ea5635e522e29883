//! Layer normalisation (Ba, Kiros and Hinton 2016, arXiv 1607.06450) over the last axis.

use crate::cpu::layer_norm::{backward, forward};
use crate::flex::{Values, dims, serves, tensor};
use burn::backend::autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension, tensor::FloatTensor};
use burn::tensor::Tensor;
use std::sync::Arc;

/// `(x - mean) / sqrt(var + epsilon) * gamma + beta`, mean and biased variance over the last axis.
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

/// [`layer_norm`] as a composition of tensor operations.
pub fn portable(x: Tensor<3>, gamma: Tensor<1>, beta: Tensor<1>, epsilon: f64) -> Tensor<3> {
    let centred = x.clone() - x.mean_dim(2);
    let variance = centred.clone().square().mean_dim(2);
    centred / (variance + epsilon).sqrt() * gamma.unsqueeze() + beta.unsqueeze()
}

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
        tensor(forward(&Values::of(x), &Values::of(gamma), &Values::of(beta), epsilon as f32).0, shape)
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
        match LayerNormStep.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let shape = dims::<3>(x.primitive());
                let inputs = [prep.checkpoint(&x), prep.checkpoint(&gamma)];
                let [x, gamma, beta] = [x, gamma, beta].map(|input| Values::of(input.into_primitive()));
                let (y, moments) = forward(&x, &gamma, &beta, epsilon as f32);
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
        let found = backward(&x, &gamma, &moments, &dy);
        let [x, gamma, beta] = ops.parents;
        if let Some(node) = x {
            grads.register::<Flex>(node.id, tensor(found.x, shape));
        }
        if let Some(node) = gamma {
            grads.register::<Flex>(node.id, tensor(found.gamma, [shape[2]]));
        }
        if let Some(node) = beta {
            grads.register::<Flex>(node.id, tensor(found.beta, [shape[2]]));
        }
    }
}
