//! Pieces of rows.

use super::simd::simd;
use rayon::prelude::*;

/// Values that are worth a task.
const TASK: usize = 1 << 14;

/// Adds rows of `width` values to the pieces that begin at `first` of rows of `whole` values.
pub(crate) fn add(values: &mut [f32], whole: usize, first: usize, piece: &[f32], width: usize) {
    let rows = (TASK / width).max(1);
    values.par_chunks_mut(rows * whole).zip(piece.par_chunks(rows * width)).for_each(|(values, piece)| {
        for (row, piece) in values.chunks_exact_mut(whole).zip(piece.chunks_exact(width)) {
            add_row(&mut row[first..][..width], piece);
        }
    });
}

simd! {
    fn add_row(sums: &mut [f32], values: &[f32]) {
        sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }
}
