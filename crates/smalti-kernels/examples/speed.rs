//! Times each operation against its portable body on the CPU: `cargo run --release --example speed [filter]`.
//!
//! Both run alternately; the numbers are medians in milliseconds, forward, and forward with backward.

use burn::tensor::{Device, Distribution, Tensor};
use smalti_kernels::portable;
use std::time::Instant;

/// An operation on one input that gradients are taken of, and parameters caught by the closure.
type Operation = Box<dyn Fn(Tensor<4>) -> Tensor<4>>;

struct Row {
    name: String,
    shape: [usize; 4],
    own: fn(&Device) -> Operation,
}

fn main() {}
