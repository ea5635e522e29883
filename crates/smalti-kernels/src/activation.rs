//! Activations: the Gaussian and the sigmoid error linear unit. In training their inputs are kept; the results, which are as large,
//! are made again for the backward passes that need them.

use crate::cpu::activation::{Curve, backward, forward};
use crate::flex::{Again, Values, changed, serves, tensor_like};
use burn::backend::autodiff::{
    NodeId,
    checkpoint::base::Checkpointer,
    checkpoint::strategy::{BalancedCheckpointing, CheckpointStrategy},
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
        return portable_gelu(x, tanh);
    }
    Tensor::from_dispatch(<Dispatch as Activation>::smalti_activation(x.into_dispatch(), Curve::gelu(tanh)))
}

/// [`gelu`] by Burn's own operations.
pub fn portable_gelu<const D: usize>(x: Tensor<D>, tanh: bool) -> Tensor<D> {
    if tanh { activation::gelu_approximate(x) } else { activation::gelu(x) }
}

/// `x / (1 + e^-x)` of each element (arXiv 1702.03118).
///
/// # Shapes
/// Any, to the same.
pub fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if !serves(&x) {
        return portable_silu(x);
    }
    Tensor::from_dispatch(<Dispatch as Activation>::smalti_activation(x.into_dispatch(), Curve::Silu))
}

/// [`silu`] by Burn's own operations.
pub fn portable_silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activation::silu(x)
}

#[backend_extension(Autodiff, Flex)]
trait Activation: Backend {
    fn smalti_activation(x: FloatTensor<Self>, curve: Curve) -> FloatTensor<Self>;
}

impl Activation for Flex {
    fn smalti_activation(x: FloatTensor<Self>, curve: Curve) -> FloatTensor<Self> {
        tensor_like(forward(&Values::of(x.clone()), curve), &x)
    }
}

impl<C: CheckpointStrategy> Activation for Autodiff<Flex, C> {
    fn smalti_activation(x: FloatTensor<Self>, curve: Curve) -> FloatTensor<Self> {
        let node = x.node();
        let again = Again { inputs: [node.id()], forward: move |[x]: [_; 1]| Flex::smalti_activation(x, curve) };
        let prep = ActivationStep.prepare::<BalancedCheckpointing>([node]).memory_bound().retro_forward(again);
        match prep.parents([&x]).stateful() {
            OpsKind::Tracked(mut prep) => {
                let id = prep.checkpoint(&x);
                prep.finish((id, curve), Flex::smalti_activation(x.into_primitive(), curve))
            }
            OpsKind::UnTracked(prep) => prep.finish(Flex::smalti_activation(x.into_primitive(), curve)),
        }
    }
}

#[derive(Debug)]
struct ActivationStep;

impl Backward<Flex, 1> for ActivationStep {
    /// The input is kept by the graph.
    type State = (NodeId, Curve);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let dy = grads.consume::<Flex>(&ops.node);
        let (id, curve) = ops.state;
        let x: FloatTensor<Flex> = checkpointer.retrieve_node_output(id);
        if let [Some(node)] = ops.parents {
            let x = Values::of(x);
            grads.register::<Flex>(node.id, changed(dy, |gradient| backward(&x, gradient, curve)));
        }
    }
}
