//! What the operations share at the border to the CPU backend.

use burn::backend::ops::IntTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{DType, Device, IntDType, Tensor, TensorData};
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
