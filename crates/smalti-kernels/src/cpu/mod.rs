//! Bodies for the CPU, over plain `f32` slices in row-major order.

pub(crate) mod activation;
pub(crate) mod adamw;
pub(crate) mod attention;
pub(crate) mod buffer;
pub(crate) mod cached_attention;
pub(crate) mod chunks;
pub(crate) mod conv;
pub(crate) mod cross_entropy;
pub(crate) mod gated;
pub(crate) mod gemm;
pub(crate) mod group_norm;
pub(crate) mod layer_norm;
pub(crate) mod linear;
pub(crate) mod nearest_code;
pub(crate) mod packed;
pub(crate) mod panels;
pub(crate) mod share;
pub(crate) mod simd;
pub(crate) mod squares;
mod transpose;
pub(crate) mod unit_length;
