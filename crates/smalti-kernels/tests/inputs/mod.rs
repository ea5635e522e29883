//! Random tensors for the comparisons, and the comparison.
#![allow(clippy::unwrap_used)] // Helpers of tests are not in test functions.
#![allow(dead_code)]

use burn::tensor::{Device, Shape, Tensor, TensorData};
use smalti_base::Rng;
use smalti_base::rng::Stream;

/// The stream of a test.
pub fn stream(seed: u64) -> Stream {
    Rng::new(seed).stream(0, 0)
}

/// Standard normal values.
pub fn normal<const D: usize>(stream: &mut Stream, shape: [usize; D], device: &Device) -> Tensor<D> {
    let shape = Shape::from(shape);
    let values: Vec<f32> = (0..shape.num_elements()).map(|_| stream.normal()).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// Standard normal values, at random contiguous, or a transposed or sliced view.
pub fn strided(stream: &mut Stream, [b, c, h, w]: [usize; 4], device: &Device) -> Tensor<4> {
    match stream.below(4) {
        0 => normal(stream, [b, c, w, h], device).swap_dims(2, 3),
        1 => normal(stream, [b, h, w, c], device).permute([0, 3, 1, 2]),
        2 => normal(stream, [b + 1, c + 2, h + 1, w + 3], device).slice([1..b + 1, 1..c + 1, 0..h, 2..w + 2]),
        _ => normal(stream, [b, c, h, w], device),
    }
}

/// Checks that the largest difference is at most `tolerance` times the largest expected magnitude (at least 1).
#[track_caller]
pub fn assert_close<const D: usize>(found: Tensor<D>, expected: Tensor<D>, tolerance: f32, what: &str) {
    assert_eq!(found.dims(), expected.dims(), "{what}: shape");
    let found = found.inner().into_data().try_to_vec::<f32>().unwrap();
    let expected = expected.inner().into_data().try_to_vec::<f32>().unwrap();
    let scale = expected.iter().fold(1.0f32, |m, v| m.max(v.abs()));
    for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
        assert!((f - e).abs() <= tolerance * scale, "{what}: value {i} is {f}, expected {e} (largest {scale})");
    }
}
