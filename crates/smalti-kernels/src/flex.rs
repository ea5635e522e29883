//! What the operations share at the border to the CPU backend.

use crate::cpu::gated;
use burn::backend::autodiff::{
    NodeId,
    checkpoint::{retro_forward::RetroForward, state::BackwardStates},
};
use burn::backend::ops::IntTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{DType, Device, IntDType, Tensor, TensorData};
use std::fmt;
use std::ops::{Deref, Range};

/// Whether a tensor lives on the CPU backend, recorded for gradients or not, in the data type of the own bodies.
pub(crate) fn serves<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.dtype() == DType::F32 && tensor.device() == Device::flex()
}

/// The values of an `f32` tensor in row-major order: its memory, or a copy where that is a strided view.
pub(crate) struct Values {
    tensor: FloatTensor<Flex>,
    range: Range<usize>,
}

impl Values {
    pub(crate) fn of(tensor: FloatTensor<Flex>) -> Self {
        match tensor.layout().contiguous_offsets() {
            Some((start, end)) => Self { tensor, range: start..end },
            None => {
                let n = tensor.layout().num_elements();
                Self { tensor: tensor.to_contiguous(), range: 0..n }
            }
        }
    }
}

impl Deref for Values {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.tensor.storage::<f32>()[self.range.clone()]
    }
}

/// The values of an `f32` tensor by rows of its last axis, which are evenly spaced: its memory, as of a piece of each row of a larger
/// tensor, or a copy where they are not.
pub(crate) struct Rows {
    tensor: FloatTensor<Flex>,
    stride: usize,
}

impl Rows {
    pub(crate) fn of(tensor: FloatTensor<Flex>) -> Self {
        match spacing(tensor.layout().shape(), tensor.layout().strides()) {
            Some(stride) => Self { tensor, stride },
            None => {
                let width = tensor.layout().shape().last().copied().unwrap_or(1);
                Self { tensor: tensor.to_contiguous(), stride: width }
            }
        }
    }

    pub(crate) fn view(&self) -> gated::Rows<'_> {
        let values = &self.tensor.storage::<f32>()[self.tensor.layout().start_offset()..];
        gated::Rows { values, stride: self.stride }
    }
}

/// The distance of neighbouring rows of the last axis, if it is the same for all and their values lie side by side.
fn spacing(shape: &[usize], strides: &[isize]) -> Option<usize> {
    let (width, shape) = shape.split_last()?;
    let (step, strides) = strides.split_last()?;
    if *width > 1 && *step != 1 {
        return None;
    }
    let (mut between, mut next) = (None, None);
    for (&size, &stride) in shape.iter().zip(strides).rev().filter(|(size, _)| **size > 1) {
        let stride = usize::try_from(stride).ok()?;
        if next.is_some_and(|next| next != stride) {
            return None;
        }
        between = between.or(Some(stride));
        next = Some(stride * size);
    }
    Some(between.unwrap_or(*width))
}

/// A tensor whose values were changed, in row-major order: in its own memory if nobody else holds it, else in a copy.
pub(crate) fn changed(tensor: FloatTensor<Flex>, change: impl FnOnce(&mut [f32])) -> FloatTensor<Flex> {
    let mut tensor = if tensor.layout().contiguous_offsets().is_some() { tensor } else { tensor.to_contiguous() };
    let (start, end) = tensor.layout().contiguous_offsets().unwrap_or((0, tensor.layout().num_elements()));
    change(&mut tensor.storage_mut::<f32>()[start..end]);
    tensor
}

/// A tensor of the CPU backend from its values.
pub(crate) fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FloatTensor<Flex> {
    FloatTensor::<Flex>::from_data(TensorData::new(values, shape))
}

/// A tensor of the shape of another one.
pub(crate) fn tensor_like(values: Vec<f32>, other: &FloatTensor<Flex>) -> FloatTensor<Flex> {
    FloatTensor::<Flex>::from_data(TensorData::new(values, other.shape()))
}

/// The sizes of a tensor of rank `D`.
pub(crate) fn dims<const D: usize>(tensor: &FloatTensor<Flex>) -> [usize; D] {
    tensor.shape().dims()
}

/// The values of an integer tensor in row-major order.
pub(crate) fn integers(tensor: IntTensor<Flex>) -> Vec<i64> {
    let tensor = Flex::int_cast(tensor, IntDType::I64).to_contiguous();
    tensor.as_slice::<i64>().map(<[i64]>::to_vec).unwrap_or_default()
}

/// A forward pass that backward passes run again from inputs that the graph keeps. With Burn's `BalancedCheckpointing` for an
/// operation its result is not kept, whatever the strategy of the others.
pub(crate) struct Again<const N: usize, F> {
    pub inputs: [NodeId; N],
    pub forward: F,
}

impl<const N: usize, F> fmt::Debug for Again<N, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Again").field("inputs", &self.inputs).finish_non_exhaustive()
    }
}

impl<const N: usize, F> RetroForward for Again<N, F>
where
    F: Fn([FloatTensor<Flex>; N]) -> FloatTensor<Flex> + Send + 'static,
{
    fn forward(&self, states: &mut BackwardStates, out_node: NodeId) {
        let inputs = self.inputs.map(|id| states.get_state::<FloatTensor<Flex>>(&id));
        states.save(out_node, (self.forward)(inputs));
    }
}
