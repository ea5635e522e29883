//! GELU and the affine map after it, the second half of a transformer's MLP, as one operation.

use crate::cpu::activation::{Curve, backward, forward};
use crate::cpu::linear as cpu;
use crate::flex::{Values, dims, serves, tensor, tensor_like};
use crate::linear::{Linear, fits};
use burn::backend::autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, NodeGuard, Ops, OpsKind},
};
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension, tensor::FloatTensor};
use burn::tensor::Tensor;

/// `linear(gelu(x), weight, bias)`, see [`crate::gelu`] and [`crate::linear`]. In training only `x` is kept: the backward pass
/// makes `gelu(x)` again, which saves the memory of the widest activation of a transformer block.
///
/// # Shapes
/// `x [.., inputs]`, `weight [inputs, outputs]`, `bias [outputs]` → `[.., outputs]`.
///
/// # Panics
/// Where Burn's operations do: shapes that do not fit, mixed data types.
pub fn gelu_linear<const D: usize>(x: Tensor<D>, tanh: bool, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    if !(x.is_autodiff() && serves(&x) && fits(&x, &weight, bias.as_ref())) {
        return crate::linear(crate::gelu(x, tanh), weight, bias);
    }
    let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(match bias.map(Tensor::into_dispatch) {
        Some(bias) => <Dispatch as GeluLinear>::smalti_gelu_linear_biased(x, tanh, weight, bias),
        None => <Dispatch as GeluLinear>::smalti_gelu_linear(x, tanh, weight),
    })
}

#[backend_extension(Autodiff, Flex)]
trait GeluLinear: Backend {
    fn smalti_gelu_linear(x: FloatTensor<Self>, tanh: bool, weight: FloatTensor<Self>) -> FloatTensor<Self>;

    fn smalti_gelu_linear_biased(
        x: FloatTensor<Self>,
        tanh: bool,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

impl GeluLinear for Flex {
    fn smalti_gelu_linear(x: FloatTensor<Self>, tanh: bool, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        Flex::smalti_linear(activated(&x, tanh), weight)
    }

    fn smalti_gelu_linear_biased(
        x: FloatTensor<Self>,
        tanh: bool,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        Flex::smalti_linear_biased(activated(&x, tanh), weight, bias)
    }
}

impl<C: CheckpointStrategy> GeluLinear for Autodiff<Flex, C> {
    fn smalti_gelu_linear(x: FloatTensor<Self>, tanh: bool, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        record::<C, 2>([x.node(), weight.node()], x, tanh, weight, None)
    }

    fn smalti_gelu_linear_biased(
        x: FloatTensor<Self>,
        tanh: bool,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        record::<C, 3>([x.node(), weight.node(), bias.node()], x, tanh, weight, Some(bias))
    }
}

fn activated(x: &FloatTensor<Flex>, tanh: bool) -> FloatTensor<Flex> {
    tensor_like(forward(&Values::of(x.clone()), Curve::gelu(tanh)), x)
}

/// The forward pass, with a backward step for the `N` inputs that there are.
fn record<C: CheckpointStrategy, const N: usize>(
    nodes: [NodeGuard; N],
    x: FloatTensor<Autodiff<Flex, C>>,
    tanh: bool,
    weight: FloatTensor<Autodiff<Flex, C>>,
    bias: Option<FloatTensor<Autodiff<Flex, C>>>,
) -> FloatTensor<Autodiff<Flex, C>> {
    let map = |x: FloatTensor<Flex>, weight| match bias.map(|bias| bias.into_primitive()) {
        Some(bias) => Flex::smalti_gelu_linear_biased(x, tanh, weight, bias),
        None => Flex::smalti_gelu_linear(x, tanh, weight),
    };
    match GeluLinearStep.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let inputs = [prep.checkpoint(&x), prep.checkpoint(&weight)];
            prep.finish((inputs, tanh), map(x.into_primitive(), weight.into_primitive()))
        }
        OpsKind::UnTracked(prep) => prep.finish(map(x.into_primitive(), weight.into_primitive())),
    }
}

#[derive(Debug)]
struct GeluLinearStep;

impl<const N: usize> Backward<Flex, N> for GeluLinearStep {
    /// The inputs are kept by the graph.
    type State = ([NodeId; 2], bool);

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let dy = Values::of(grads.consume::<Flex>(&ops.node));
        let (inputs, tanh) = ops.state;
        let [x, weight] = inputs.map(|id| checkpointer.retrieve_node_output::<FloatTensor<Flex>>(id));
        let sizes = dims::<2>(&weight);
        for (input, node) in ops.parents.into_iter().enumerate() {
            let Some(node) = node else { continue };
            let gradient = match input {
                0 => {
                    let mut gradient = cpu::backward_data(&dy, &Values::of(weight.clone()), sizes);
                    backward(&Values::of(x.clone()), &mut gradient, Curve::gelu(tanh));
                    tensor_like(gradient, &x)
                }
                1 => {
                    let activated = forward(&Values::of(x.clone()), Curve::gelu(tanh));
                    tensor(cpu::backward_weight(&activated, &dy, sizes), sizes)
                }
                _ => tensor(cpu::backward_bias(&dy, sizes[1]), [sizes[1]]),
            };
            grads.register::<Flex>(node.id, gradient);
        }
    }
}
