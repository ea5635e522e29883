//! The Gaussian error linear unit.

use crate::cpu::gelu::{backward, forward};
use crate::flex::{Values, serves, tensor_like};
use burn::backend::autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension, tensor::FloatTensor};
use burn::tensor::{Tensor, activation};

/// `x Phi(x)` of each element, `Phi` the normal distribution function (arXiv 1606.08415); with `tanh` its approximation
/// `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x³))) / 2`.
///
/// # Shapes
/// Any, to the same.
pub fn gelu<const D: usize>(x: Tensor<D>, tanh: bool) -> Tensor<D> {
    if !serves(&x) {
        return portable(x, tanh);
    }
    Tensor::from_dispatch(<Dispatch as Gelu>::smalti_gelu(x.into_dispatch(), tanh))
}

/// [`gelu`] by Burn's own operations.
pub fn portable<const D: usize>(x: Tensor<D>, tanh: bool) -> Tensor<D> {
    if tanh { activation::gelu_approximate(x) } else { activation::gelu(x) }
}

#[backend_extension(Autodiff, Flex)]
trait Gelu: Backend {
    fn smalti_gelu(x: FloatTensor<Self>, tanh: bool) -> FloatTensor<Self>;
}

impl Gelu for Flex {
    fn smalti_gelu(x: FloatTensor<Self>, tanh: bool) -> FloatTensor<Self> {
        tensor_like(forward(&Values::of(x.clone()), tanh), &x)
    }
}

impl<C: CheckpointStrategy> Gelu for Autodiff<Flex, C> {
    fn smalti_gelu(x: FloatTensor<Self>, tanh: bool) -> FloatTensor<Self> {
        match GeluStep.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let id = prep.checkpoint(&x);
                prep.finish((id, tanh), Flex::smalti_gelu(x.into_primitive(), tanh))
            }
            OpsKind::UnTracked(prep) => prep.finish(Flex::smalti_gelu(x.into_primitive(), tanh)),
        }
    }
}

#[derive(Debug)]
struct GeluStep;

impl Backward<Flex, 1> for GeluStep {
    /// The input is kept by the graph.
    type State = (NodeId, bool);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let dy = grads.consume::<Flex>(&ops.node);
        let (id, tanh) = ops.state;
        let x: FloatTensor<Flex> = checkpointer.retrieve_node_output(id);
        if let [Some(node)] = ops.parents {
            let dx = backward(&Values::of(x.clone()), &Values::of(dy), tanh);
            grads.register::<Flex>(node.id, tensor_like(dx, &x));
        }
    }
}
