//! Bodies for the CPU, over plain `f32` slices in row-major order.

pub(crate) mod buffer;
pub(crate) mod group_norm;
pub(crate) mod simd;
