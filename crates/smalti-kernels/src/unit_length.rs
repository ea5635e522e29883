//! Vectors scaled to unit length, then by a factor of their head: queries and keys of cosine attention.

use crate::cpu::unit_length::{backward, forward};
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

/// The least square of a length that vectors are divided by, so that zero stays zero.
pub(crate) const LEAST: f32 = 1e-24;

/// `x / |x| * factors`, the length over the last axis; zero stays zero. In training `x` and one number for each vector
/// are kept; the result is made again for the backward passes that need it.
///
/// # Shapes
/// `x [b, n, h, d]`, `factors [h]` → `[b, n, h, d]`.
///
/// # Panics
/// Where Burn's operations do: shapes that do not fit, mixed data types.
pub fn unit_length(x: Tensor<4>, factors: Tensor<1>) -> Tensor<4> {
    let [.., h, d] = x.dims();
    let fits = x.shape().num_elements() > 0 && d > 0 && factors.dims() == [h];
    if !(fits && serves(&x) && serves(&factors)) {
        return portable(x, factors);
    }
    let (x, factors) = (x.into_dispatch(), factors.into_dispatch());
    Tensor::from_dispatch(<Dispatch as UnitLength>::smalti_unit_length(x, factors))
}

/// [`unit_length`] as a composition of tensor operations.
pub fn portable(x: Tensor<4>, factors: Tensor<1>) -> Tensor<4> {
    let [h] = factors.dims();
    let length = x.clone().square().sum_dim(3).clamp_min(f64::from(LEAST)).sqrt();
    x / length * factors.reshape([1, 1, h, 1])
}

#[backend_extension(Autodiff, Flex)]
trait UnitLength: Backend {
    fn smalti_unit_length(x: FloatTensor<Self>, factors: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl UnitLength for Flex {
    fn smalti_unit_length(x: FloatTensor<Self>, factors: FloatTensor<Self>) -> FloatTensor<Self> {
        let shape = dims::<4>(&x);
        tensor(forward(&Values::of(x), shape[3], &Values::of(factors)).0, shape)
    }
}

impl<C: CheckpointStrategy> UnitLength for Autodiff<Flex, C> {
    fn smalti_unit_length(x: FloatTensor<Self>, factors: FloatTensor<Self>) -> FloatTensor<Self> {
        let nodes = [x.node(), factors.node()];
        let again = Again {
            inputs: nodes.each_ref().map(NodeGuard::id),
            forward: |[x, factors]: [_; 2]| Flex::smalti_unit_length(x, factors),
        };
        let prep = UnitLengthStep.prepare::<BalancedCheckpointing>(nodes).memory_bound().retro_forward(again);
        match prep.parents([&x, &factors]).stateful() {
            OpsKind::Tracked(mut prep) => {
                let shape = dims::<4>(x.primitive());
                let inputs = [prep.checkpoint(&x), prep.checkpoint(&factors)];
                let [x, factors] = [x, factors].map(|input| Values::of(input.into_primitive()));
                let (y, inverses) = forward(&x, shape[3], &factors);
                prep.finish(Saved { shape, inputs, inverses: inverses.into() }, tensor(y, shape))
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(Flex::smalti_unit_length(x.into_primitive(), factors.into_primitive()))
            }
        }
    }
}

#[derive(Debug)]
struct UnitLengthStep;

/// What the backward step needs; the inputs are kept by the graph.
#[derive(Debug, Clone)]
struct Saved {
    shape: [usize; 4],
    inputs: [NodeId; 2],
    inverses: Arc<[f32]>,
}

impl Backward<Flex, 2> for UnitLengthStep {
    type State = Saved;

    fn backward(self, ops: Ops<Saved, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let dy = Values::of(grads.consume::<Flex>(&ops.node));
        let Saved { shape, inputs, inverses } = ops.state;
        let [x, factors] = inputs.map(|id| Values::of(checkpointer.retrieve_node_output(id)));
        let (dx, dfactors) = backward(&x, shape[3], &factors, &inverses, &dy);
        let [x, factors] = ops.parents;
        if let Some(node) = x {
            grads.register::<Flex>(node.id, tensor(dx, shape));
        }
        if let Some(node) = factors {
            grads.register::<Flex>(node.id, tensor(dfactors, [shape[2]]));
        }
    }
}
