//! The sum of squares.

use crate::cpu::squares;
use crate::flex::{Values, serves};
use burn::backend::Flex;
use burn::tensor::Tensor;

/// The sum of the squares of all elements of a plain tensor: `[1]`. The same on the CPU for any number of threads.
pub fn sum_of_squares<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    let device = x.device();
    if !serves(&x) || x.is_autodiff() {
        return x.square().sum();
    }
    match x.try_into_primitive::<Flex>() {
        Ok(x) => Tensor::from_data([squares::sum_of_squares(&Values::of(x))], &device),
        Err(_) => Tensor::full([1], f32::NAN, &device),
    }
}
