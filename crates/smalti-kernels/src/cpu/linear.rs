//! Affine maps of rows.

use super::buffer::{Shared, written};
use super::gemm::{Matrix, multiply_on_all_threads};
use super::packed::{Panels, Product, multiply};
use super::simd::simd;
use rayon::prelude::*;

/// Values that are worth a task.
const TASK: usize = 1 << 15;

/// So many rows make packing the transposed matrix worth its time.
const ROWS: usize = 64;

/// `x weight + bias` for `x [n, inputs]` and `weight [inputs, outputs]`.
pub(crate) fn forward(x: &[f32], weight: &[f32], bias: Option<&[f32]>, [inputs, outputs]: [usize; 2]) -> Vec<f32> {
    let rows = x.len() / inputs;
    let lhs = Matrix { values: x, strides: [inputs, 1] };
    let rhs = Matrix { values: weight, strides: [outputs, 1] };
    let fill = |y: &mut [f32]| {
        if let Some(bias) = bias {
            let rows = (TASK / outputs).max(1);
            y.par_chunks_mut(rows * outputs)
                .for_each(|y| y.chunks_exact_mut(outputs).for_each(|y| y.copy_from_slice(bias)));
        }
        multiply_on_all_threads([rows, outputs, inputs], y, [outputs, 1], bias.is_some(), lhs, rhs);
    };
    // SAFETY: the bias, or without one the product, is written to every value before it is read.
    unsafe { written(rows * outputs, fill) }
}

/// `dy weightᵀ`.
pub(crate) fn backward_data(dy: &[f32], weight: &[f32], [inputs, outputs]: [usize; 2]) -> Vec<f32> {
    let rows = dy.len() / outputs;
    if rows >= ROWS {
        return Panels::with_transposed(weight, [outputs, inputs], |panels| {
            let fill = |dx: &mut [f32]| multiply(dy, rows, vec![Product { panels, bias: None, y: dx }]);
            // SAFETY: the product writes every value.
            unsafe { written(rows * inputs, fill) }
        });
    }
    let lhs = Matrix { values: dy, strides: [outputs, 1] };
    let rhs = Matrix { values: weight, strides: [1, outputs] };
    let fill = |dx: &mut [f32]| multiply_on_all_threads([rows, inputs, outputs], dx, [inputs, 1], false, lhs, rhs);
    // SAFETY: the product writes every value.
    unsafe { written(rows * inputs, fill) }
}

/// `xᵀ dy`.
pub(crate) fn backward_weight(x: &[f32], dy: &[f32], [inputs, outputs]: [usize; 2]) -> Vec<f32> {
    let rows = x.len() / inputs;
    let lhs = Matrix { values: x, strides: [1, inputs] };
    let rhs = Matrix { values: dy, strides: [outputs, 1] };
    let fill = |dw: &mut [f32]| multiply_on_all_threads([inputs, outputs, rows], dw, [outputs, 1], false, lhs, rhs);
    // SAFETY: the product writes every value.
    unsafe { written(inputs * outputs, fill) }
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
