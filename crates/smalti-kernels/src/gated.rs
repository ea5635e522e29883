//! Branches that count by a gain: gated residuals, and scales and shifts that differ between tokens (DiT, arXiv 2212.09748).

use crate::cpu::gated::{backward, forward};
use crate::flex::{Again, Rows, Values, dims, serves, tensor};
use burn::backend::autodiff::{
    NodeId,
    checkpoint::base::Checkpointer,
    checkpoint::strategy::{BalancedCheckpointing, CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, NodeGuard, Ops, OpsKind},
};
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension, tensor::FloatTensor};
use burn::tensor::Tensor;

/// `x + gain * branch`.
///
/// # Shapes
/// `x` and `branch` `[b, t, d]`, `gain` `[1, 1, d]`, `[b, 1, d]` or `[b, t, d]` → `[b, t, d]`.
///
/// # Panics
/// Where Burn's operations do: shapes that do not fit, mixed data types.
pub fn gated_residual(x: Tensor<3>, branch: Tensor<3>, gain: Tensor<3>) -> Tensor<3> {
    if !fits(&x, &branch, &gain) {
        return portable_residual(x, branch, gain);
    }
    sum(x, branch, gain, Use::Residual)
}

/// [`gated_residual`] as a composition of tensor operations.
pub fn portable_residual(x: Tensor<3>, branch: Tensor<3>, gain: Tensor<3>) -> Tensor<3> {
    x + branch * gain
}

/// `x * (1 + scale) + shift`. In training the inputs are kept; the result is made again for the backward passes that need it.
///
/// # Shapes
/// `x` and `shift` `[b, t, d]`, `scale` `[1, 1, d]`, `[b, 1, d]` or `[b, t, d]` → `[b, t, d]`.
///
/// # Panics
/// As [`gated_residual`].
pub fn modulate(x: Tensor<3>, scale: Tensor<3>, shift: Tensor<3>) -> Tensor<3> {
    if !fits(&shift, &x, &scale) {
        return portable_modulate(x, scale, shift);
    }
    sum(shift, x, scale, Use::Modulation)
}

/// [`modulate`] as a composition of tensor operations.
pub fn portable_modulate(x: Tensor<3>, scale: Tensor<3>, shift: Tensor<3>) -> Tensor<3> {
    x * (scale + 1.0) + shift
}

fn fits(base: &Tensor<3>, y: &Tensor<3>, gain: &Tensor<3>) -> bool {
    let [b, t, d] = y.dims();
    let gains = gain.dims();
    let suits = gains == [1, 1, d] || gains == [b, 1, d] || gains == [b, t, d];
    suits && base.dims() == [b, t, d] && b * t * d > 0 && serves(base) && serves(y) && serves(gain)
}

fn sum(base: Tensor<3>, y: Tensor<3>, gain: Tensor<3>, of: Use) -> Tensor<3> {
    let [base, y, gain] = [base, y, gain].map(Tensor::into_dispatch);
    Tensor::from_dispatch(<Dispatch as Gated>::smalti_gated(base, y, gain, of))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// The sums follow each other through a network, and each is needed: to make one again would take all before it.
    Residual,
    /// Cheap to make again.
    Modulation,
}

impl Use {
    /// What is added to the gain.
    fn offset(self) -> f32 {
        match self {
            Self::Residual => 0.0,
            Self::Modulation => 1.0,
        }
    }
}

/// `base + y (gain + offset)`.
#[backend_extension(Autodiff, Flex)]
trait Gated: Backend {
    fn smalti_gated(
        base: FloatTensor<Self>,
        y: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        of: Use,
    ) -> FloatTensor<Self>;
}

/// Width and number of the rows of the gain.
fn sizes(gain: &FloatTensor<Flex>) -> [usize; 2] {
    let [b, t, d] = dims::<3>(gain);
    [d, b * t]
}

impl Gated for Flex {
    fn smalti_gated(
        base: FloatTensor<Self>,
        y: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        of: Use,
    ) -> FloatTensor<Self> {
        let (shape, sizes) = (dims::<3>(&y), sizes(&gain));
        let ([base, gain], y) = ([base, gain].map(Rows::of), Values::of(y));
        tensor(forward(base.view(), &y, gain.view(), of.offset(), sizes), shape)
    }
}

impl<C: CheckpointStrategy> Gated for Autodiff<Flex, C> {
    fn smalti_gated(
        base: FloatTensor<Self>,
        y: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        of: Use,
    ) -> FloatTensor<Self> {
        let nodes = [base.node(), y.node(), gain.node()];
        let again = Again {
            inputs: nodes.each_ref().map(NodeGuard::id),
            forward: move |[base, y, gain]: [_; 3]| Flex::smalti_gated(base, y, gain, of),
        };
        let prep = GatedStep.prepare::<BalancedCheckpointing>(nodes);
        let prep = match of {
            Use::Residual => prep.compute_bound(),
            Use::Modulation => prep.memory_bound().retro_forward(again).parents([&base, &y, &gain]),
        };
        match prep.stateful() {
            OpsKind::Tracked(mut prep) => {
                let inputs = [prep.checkpoint(&y), prep.checkpoint(&gain)];
                let [base, y, gain] = [base, y, gain].map(|input| input.into_primitive());
                prep.finish((inputs, of), Flex::smalti_gated(base, y, gain, of))
            }
            OpsKind::UnTracked(prep) => {
                let [base, y, gain] = [base, y, gain].map(|input| input.into_primitive());
                prep.finish(Flex::smalti_gated(base, y, gain, of))
            }
        }
    }
}

#[derive(Debug)]
struct GatedStep;

impl Backward<Flex, 3> for GatedStep {
    /// What the branch and the gain were, which the graph keeps.
    type State = ([NodeId; 2], Use);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let d = grads.consume::<Flex>(&ops.node);
        let (inputs, of) = ops.state;
        let [y, gain] = inputs.map(|id| checkpointer.retrieve_node_output::<FloatTensor<Flex>>(id));
        let (shape, gains, sizes) = (dims::<3>(&y), dims::<3>(&gain), sizes(&gain));
        let [base_node, y_node, gain_node] = ops.parents;
        if y_node.is_some() || gain_node.is_some() {
            let [dy, dgain] =
                backward(&Values::of(d.clone()), &Values::of(y), Rows::of(gain).view(), of.offset(), sizes);
            if let Some(node) = y_node {
                grads.register::<Flex>(node.id, tensor(dy, shape));
            }
            if let Some(node) = gain_node {
                grads.register::<Flex>(node.id, tensor(dgain, gains));
            }
        }
        if let Some(node) = base_node {
            grads.register::<Flex>(node.id, d);
        }
    }
}
