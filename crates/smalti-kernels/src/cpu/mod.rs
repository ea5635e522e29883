//! Bodies for the CPU, over plain `f32` slices in row-major order.

pub(crate) mod buffer;
pub(crate) mod conv;
pub(crate) mod gemm;
pub(crate) mod group_norm;
pub(crate) mod simd;
