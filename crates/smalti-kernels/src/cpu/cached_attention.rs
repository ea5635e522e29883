//! Attention of a few queries over the filled part of a cache.

use super::buffer::with_scratch;
use super::simd::{LANES, exp, simd};
use rayon::prelude::*;

/// Multiplications that are not worth sharing.
const SMALL: usize = 1 << 16;

/// Sizes of an attention over caches.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    /// New tokens of each head.
    pub queries: usize,
    /// Places of each head's memory.
    pub capacity: usize,
    /// Channels of a key.
    pub key: usize,
    /// Channels of a value.
    pub value: usize,
}

/// For each head the mixed values `[queries, value]`. Query `i` sees the first `visible[i]` places, at least one and at
/// most the capacity.
pub(crate) fn attend(sizes: Sizes, q: &[f32], keys: &[f32], values: &[f32], visible: &[usize]) -> Vec<f32> {
    let Sizes { queries, capacity, key, value } = sizes;
    let mut mixed = vec![0.0; q.len() / key * value];
    let one = |(row, mixed): (usize, &mut [f32])| {
        let (head, query) = (row / queries, row % queries);
        let seen = visible[query];
        let keys = &keys[head * capacity * key..][..seen * key];
        let values = &values[head * capacity * value..][..seen * value];
        with_scratch([seen], |[weights]| {
            score(&q[row * key..][..key], keys, weights);
            mix(weights, values, mixed);
        });
    };
    let work = q.len() / queries * visible.iter().sum::<usize>();
    match work <= SMALL {
        true => mixed.chunks_exact_mut(value).enumerate().for_each(one),
        false => mixed.par_chunks_exact_mut(value).enumerate().for_each(one),
    }
    mixed
}

simd! {
    /// The softmax of the scaled products of a query with each key, but for a common factor: the largest is 1.
    fn score(q: &[f32], keys: &[f32], weights: &mut [f32]) {
        let scale = 1.0 / (q.len() as f32).sqrt();
        for (weight, key) in weights.iter_mut().zip(keys.chunks_exact(q.len())) {
            *weight = dot(q, key) * scale;
        }
        let largest = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for weight in weights {
            *weight = exp(*weight - largest);
        }
    }
}

simd! {
    fn mix(weights: &[f32], values: &[f32], mixed: &mut [f32]) {
        let mut total = 0.0;
        for (&weight, value) in weights.iter().zip(values.chunks_exact(mixed.len())) {
            total += weight;
            for (mixed, &value) in mixed.iter_mut().zip(value) {
                *mixed += weight * value;
            }
        }
        for mixed in mixed {
            *mixed /= total;
        }
    }
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for l in 0..LANES {
            lanes[l] += a[l] * b[l];
        }
    }
    // In halves, so that the additions do not wait for each other.
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0] + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}
