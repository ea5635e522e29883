//! Equal pieces of the last axis.

use crate::cpu::chunks::add;
use crate::flex::{Values, changed, dims, serves, tensor};
use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::ops::FloatTensorOps;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension, tensor::FloatTensor};
use burn::tensor::{Slice, Tensor};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// `N` pieces of as many channels, from the first to the last. On the CPU all write their gradients into one tensor; as slices each
/// would have one of the whole size, mostly zeros.
///
/// # Shapes
/// `[b, t, N d]` to `[b, t, d]`.
///
/// # Panics
/// If the number of channels is not a multiple of `N`.
pub fn chunks<const N: usize>(x: Tensor<3>) -> [Tensor<3>; N] {
    let channels = x.dims()[2];
    assert!(channels.is_multiple_of(N), "{channels} channels in {N} pieces");
    // A parameter's gradient stays where it is, so that nothing can be added to it in place.
    if !(x.is_autodiff() && serves(&x)) || x.is_require_grad() || x.shape().num_elements() == 0 {
        return portable(x);
    }
    let begun = Arc::new(AtomicBool::new(false));
    std::array::from_fn(|i| {
        let piece = Piece { first: i * (channels / N), width: channels / N, begun: begun.clone() };
        Tensor::from_dispatch(<Dispatch as Chunk>::smalti_chunk(x.clone().into_dispatch(), piece))
    })
}

/// [`chunks`] as slices.
pub fn portable<const N: usize>(x: Tensor<3>) -> [Tensor<3>; N] {
    let d = x.dims()[2] / N;
    std::array::from_fn(|i| x.clone().narrow(2, i * d, d))
}

#[derive(Debug, Clone)]
pub(crate) struct Piece {
    first: usize,
    width: usize,
    /// Whether the whole has a gradient from another piece.
    begun: Arc<AtomicBool>,
}

#[backend_extension(Autodiff, Flex)]
trait Chunk: Backend {
    fn smalti_chunk(x: FloatTensor<Self>, piece: Piece) -> FloatTensor<Self>;
}

impl Chunk for Flex {
    fn smalti_chunk(x: FloatTensor<Self>, piece: Piece) -> FloatTensor<Self> {
        let columns = Slice::from(piece.first..piece.first + piece.width);
        Flex::float_slice(x, &[Slice::full(), Slice::full(), columns])
    }
}

impl<C: CheckpointStrategy> Chunk for Autodiff<Flex, C> {
    fn smalti_chunk(x: FloatTensor<Self>, piece: Piece) -> FloatTensor<Self> {
        let shape = dims::<3>(x.primitive());
        match ChunkStep.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                prep.finish((shape, piece.clone()), Flex::smalti_chunk(x.into_primitive(), piece))
            }
            OpsKind::UnTracked(prep) => prep.finish(Flex::smalti_chunk(x.into_primitive(), piece)),
        }
    }
}

#[derive(Debug)]
struct ChunkStep;

impl Backward<Flex, 1> for ChunkStep {
    type State = ([usize; 3], Piece);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = Values::of(grads.consume::<Flex>(&ops.node));
        let ([b, t, channels], Piece { first, width, begun }) = ops.state;
        let [Some(node)] = ops.parents else { return };
        let whole = match begun.swap(true, Ordering::Relaxed) {
            true => grads.consume::<Flex>(&node),
            false => tensor(vec![0.0; b * t * channels], [b, t, channels]),
        };
        let whole = changed(whole, |values| add(values, channels, first, &dy, width));
        grads.register::<Flex>(node.id, whole);
    }
}
