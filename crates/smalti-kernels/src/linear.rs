//! Affine maps of the last axis.

use crate::cpu::linear::{backward_bias, backward_data, backward_weight, forward};
use crate::flex::{Values, dims, serves, tensor, tensor_like};
use burn::backend::autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, NodeGuard, Ops, OpsKind},
};
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension, tensor::FloatTensor};
use burn::backend::{TensorMetadata, ops::FloatTensorOps};
use burn::tensor::{Tensor, module};

/// `x weight + bias` over the last axis.
///
/// # Shapes
/// `x [.., inputs]`, `weight [inputs, outputs]`, `bias [outputs]` → `[.., outputs]`.
///
/// # Panics
/// Where Burn's operations do: shapes that do not fit, mixed data types.
pub fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    if !(serves(&x) && fits(&x, &weight, bias.as_ref())) {
        return portable(x, weight, bias);
    }
    let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(match bias.map(Tensor::into_dispatch) {
        Some(bias) => <Dispatch as Linear>::smalti_linear_biased(x, weight, bias),
        None => <Dispatch as Linear>::smalti_linear(x, weight),
    })
}

/// Whether weight and bias are of a kind that the own bodies serve, and of sizes that suit `x`.
pub(crate) fn fits<const D: usize>(x: &Tensor<D>, weight: &Tensor<2>, bias: Option<&Tensor<1>>) -> bool {
    let [inputs, outputs] = weight.dims();
    let shape = x.dims();
    let fits = shape[D - 1] == inputs && bias.is_none_or(|bias| bias.dims() == [outputs]);
    let filled = outputs > 0 && shape.iter().all(|&n| n > 0);
    fits && filled && serves(weight) && bias.is_none_or(serves)
}

/// [`linear`] by Burn's own operation.
pub fn portable<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    module::linear(x, weight, bias)
}

#[backend_extension(Autodiff, Flex)]
pub(crate) trait Linear: Backend {
    fn smalti_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;

    fn smalti_linear_biased(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

impl Linear for Flex {
    fn smalti_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        map(x, weight, None)
    }

    fn smalti_linear_biased(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        map(x, weight, Some(bias))
    }
}

impl<C: CheckpointStrategy> Linear for Autodiff<Flex, C> {
    fn smalti_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        record::<C, 2>([x.node(), weight.node()], x, weight, None)
    }

    fn smalti_linear_biased(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        record::<C, 3>([x.node(), weight.node(), bias.node()], x, weight, Some(bias))
    }
}

fn map(x: FloatTensor<Flex>, weight: FloatTensor<Flex>, bias: Option<FloatTensor<Flex>>) -> FloatTensor<Flex> {
    let sizes = dims::<2>(&weight);
    let mut shape = x.shape();
    let last = shape.num_dims() - 1;
    shape[last] = sizes[1];
    let bias = bias.map(Values::of);
    let y = forward(&Values::of(x), &Values::of(weight), bias.as_deref(), sizes);
    let n = y.len();
    Flex::float_reshape(tensor(y, [n]), shape)
}

/// The forward pass, with a backward step for the `N` inputs that there are.
fn record<C: CheckpointStrategy, const N: usize>(
    nodes: [NodeGuard; N],
    x: FloatTensor<Autodiff<Flex, C>>,
    weight: FloatTensor<Autodiff<Flex, C>>,
    bias: Option<FloatTensor<Autodiff<Flex, C>>>,
) -> FloatTensor<Autodiff<Flex, C>> {
    let bias = bias.map(|bias| bias.into_primitive());
    match LinearStep.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let inputs = [prep.checkpoint(&x), prep.checkpoint(&weight)];
            prep.finish(inputs, map(x.into_primitive(), weight.into_primitive(), bias))
        }
        OpsKind::UnTracked(prep) => prep.finish(map(x.into_primitive(), weight.into_primitive(), bias)),
    }
}

#[derive(Debug)]
struct LinearStep;

impl<const N: usize> Backward<Flex, N> for LinearStep {
    /// The inputs are kept by the graph.
    type State = [NodeId; 2];

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let dy = Values::of(grads.consume::<Flex>(&ops.node));
        let [x, weight] = ops.state.map(|id| checkpointer.retrieve_node_output::<FloatTensor<Flex>>(id));
        let sizes = dims::<2>(&weight);
        for (input, node) in ops.parents.into_iter().enumerate() {
            let Some(node) = node else { continue };
            let gradient = match input {
                0 => tensor_like(backward_data(&dy, &Values::of(weight.clone()), sizes), &x),
                1 => tensor(backward_weight(&Values::of(x.clone()), &dy, sizes), sizes),
                _ => tensor(backward_bias(&dy, sizes[1]), [sizes[1]]),
            };
            grads.register::<Flex>(node.id, gradient);
        }
    }
}
