//! Where many small operations run best, and memory to begin with.

use crate::flex::serves;
use burn::tensor::{Device, Tensor, TensorData};

/// Runs `work`, on the CPU as a task of the thread pool that the operations share: from there its threads need not be
/// woken from outside for each of many small operations.
pub fn on_pool<R: Send>(device: &Device, work: impl FnOnce() -> R + Send) -> R {
    match *device == Device::flex() {
        true => rayon::scope(|_| work()),
        false => work(),
    }
}

/// Zeros for the device and the data type of another tensor. On the CPU they come from the system, which has them at no cost;
/// Burn's own operation fills memory and copies it.
pub fn zeros<const D: usize>(shape: [usize; D], like: &Tensor<D>) -> Tensor<D> {
    let options = (&like.device(), like.dtype());
    match serves(like) {
        true => Tensor::from_data(TensorData::new(vec![0f32; shape.iter().product()], shape), options),
        false => Tensor::zeros(shape, options),
    }
}
