//! Nearest row of a codebook: distances are made tile by tile and reduced at once.

use super::buffer::with_scratch;
use super::gemm::{Matrix, multiply};
use super::simd::{LANES, simd, sum};
use rayon::prelude::*;

/// Codes of a tile.
const CODES: usize = 256;

/// For each row of `latents [n, width]` the index of the nearest row of `codebook [k, width]`, the first on ties.
pub(crate) fn nearest(latents: &[f32], codebook: &[f32], width: usize) -> Vec<i32> {
    let squares: Vec<f32> = codebook.par_chunks_exact(width).map(norm).collect();
    let n = latents.len() / width;
    let even = n.div_ceil(rayon::current_num_threads());
    let tile = (100_000 / width).clamp(64, 512).min(even).next_multiple_of(64);
    let mut indices = vec![0; n];
    indices.par_chunks_mut(tile).zip(latents.par_chunks(tile * width)).for_each(|(indices, latents)| {
        with_scratch([width * tile, CODES * tile, tile], |[turned, products, best]| {
            turn(latents, width, turned, tile);
            best.fill(f32::INFINITY);
            let mut found = vec![0; tile];
            let rows = indices.len().next_multiple_of(LANES);
            for (i, codes) in codebook.chunks(CODES * width).enumerate() {
                let lhs = Matrix { values: turned, strides: [1, tile] };
                let rhs = Matrix { values: codes, strides: [1, width] };
                multiply([rows, codes.len() / width, width], products, [1, tile], false, lhs, rhs);
                let first = i * CODES;
                reduce(&products[..codes.len() / width * tile], &squares[first..], first as i32, best, &mut found);
            }
            indices.copy_from_slice(&found[..indices.len()]);
        });
    });
    indices
}

/// `-2 latents`, transposed to rows of `tile` values; zeros where there are fewer latents.
fn turn(latents: &[f32], width: usize, turned: &mut [f32], tile: usize) {
    turned.fill(0.0);
    for (i, latent) in latents.chunks_exact(width).enumerate() {
        for (row, value) in turned.chunks_exact_mut(tile).zip(latent) {
            row[i] = -2.0 * value;
        }
    }
}

simd! {
    fn norm(code: &[f32]) -> f32 {
        sum(code, |value| value * value)
    }
}

simd! {
    /// Updates the smallest `square + product` of each column and the row where it was found.
    fn reduce(products: &[f32], squares: &[f32], first: i32, best: &mut [f32], found: &mut [i32]) {
        let width = best.len();
        for column in (0..width).step_by(LANES) {
            let mut least = [0.0; LANES];
            let mut at = [0; LANES];
            least.copy_from_slice(&best[column..column + LANES]);
            at.copy_from_slice(&found[column..column + LANES]);
            for (i, (row, &square)) in products.chunks_exact(width).zip(squares).enumerate() {
                let row = &row[column..column + LANES];
                for l in 0..LANES {
                    let distance = row[l] + square;
                    let closer = distance < least[l];
                    least[l] = if closer { distance } else { least[l] };
                    at[l] = if closer { first + i as i32 } else { at[l] };
                }
            }
            best[column..column + LANES].copy_from_slice(&least);
            found[column..column + LANES].copy_from_slice(&at);
        }
    }
}
