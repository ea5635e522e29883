//! Affine maps of rows.

use super::buffer::{Shared, written};
use super::gemm::{Matrix, multiply_on_all_threads};
use super::simd::simd;
use rayon::prelude::*;

/// `x weight + bias` for `x [n, inputs]` and `weight [inputs, outputs]`.
pub(crate) fn forward(x: &[f32], weight: &[f32], bias: Option<&[f32]>, [inputs, outputs]: [usize; 2]) -> Vec<f32> {
    let lhs = Matrix { values: x, strides: [inputs, 1] };
    let rhs = Matrix { values: weight, strides: [outputs, 1] };
    product([x.len() / inputs, outputs, inputs], bias, lhs, rhs)
}

/// `dy weightᵀ`.
pub(crate) fn backward_data(dy: &[f32], weight: &[f32], [inputs, outputs]: [usize; 2]) -> Vec<f32> {
    let lhs = Matrix { values: dy, strides: [outputs, 1] };
    let rhs = Matrix { values: weight, strides: [1, outputs] };
    product([dy.len() / outputs, inputs, outputs], None, lhs, rhs)
}

/// `xᵀ dy`.
pub(crate) fn backward_weight(x: &[f32], dy: &[f32], [inputs, outputs]: [usize; 2]) -> Vec<f32> {
    let lhs = Matrix { values: x, strides: [1, inputs] };
    let rhs = Matrix { values: dy, strides: [outputs, 1] };
    product([inputs, outputs, x.len() / inputs], None, lhs, rhs)
}

fn product(sizes: [usize; 3], bias: Option<&[f32]>, lhs: Matrix<'_>, rhs: Matrix<'_>) -> Vec<f32> {
    // SAFETY: every value is written before it is read.
    unsafe { written(sizes[0] * sizes[1], |y| multiply_on_all_threads(sizes, y, bias, lhs, rhs)) }
}

/// The sum of the rows of `dy`; each column is added up in the order of the rows, whatever the number of threads.
pub(crate) fn backward_bias(dy: &[f32], outputs: usize) -> Vec<f32> {
    let mut sums = vec![0.0; outputs];
    let columns = outputs.div_ceil(rayon::current_num_threads()).next_multiple_of(16);
    let target = Shared::new(&mut sums);
    (0..outputs.div_ceil(columns)).into_par_iter().for_each(|i| {
        let first = i * columns;
        // SAFETY: each column belongs to one task.
        let sums = unsafe { target.range(first, columns.min(outputs - first)) };
        add_columns(dy, outputs, first, sums);
    });
    sums
}

simd! {
    fn add_columns(dy: &[f32], outputs: usize, first: usize, sums: &mut [f32]) {
        for row in dy.chunks_exact(outputs) {
            sums.iter_mut().zip(&row[first..]).for_each(|(sum, value)| *sum += value);
        }
    }
}
