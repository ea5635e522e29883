//! Own operations as Burn backend extensions.
//!
//! The only crate with `unsafe` or with the name of a backend in it. Each operation is a plain function on tensors. It has
//! a portable body made of tensor operations, which serves every backend and data type, and where it pays a body of its
//! own for the CPU backend (Flex, `f32`) with a hand-written backward pass.

mod activation;
mod adamw;
mod allocator;
mod attention;
mod cached_attention;
mod chunks;
mod conv2d;
mod cpu;
mod cross_entropy;
mod flex;
mod gated;
mod group_norm;
mod layer_norm;
mod linear;
mod nearest_code;
mod norm_conv2d;
mod packed;
mod pool;
mod squares;
mod unit_length;

pub use activation::{gelu, silu};
pub use adamw::{AdamW, AdamWState};
pub use allocator::Keeping;
pub use attention::{attention, attention_over};
pub use cached_attention::cached_attention;
pub use chunks::chunks;
pub use conv2d::{Conv2dOptions, Convolution, conv2d, set_convolution};
pub use cpu::simd::check_environment;
pub use cross_entropy::softmax_cross_entropy;
pub use gated::{gated_residual, modulate};
pub use group_norm::group_norm;
pub use layer_norm::{layer_norm, modulated_layer_norm};
pub use linear::linear;
pub use nearest_code::nearest_code;
pub use norm_conv2d::{GroupNormalization, norm_silu_conv2d};
pub use packed::{PackedMatrix, WeightPrecision, packed_linear, packed_linears};
pub use pool::{on_pool, zeros};
pub use squares::sum_of_squares;
pub use unit_length::unit_length;

/// The instruction set that the CPU bodies use on this machine: `AVX-512`, `AVX2`, or `base` for that of the build.
pub fn instructions() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    match cpu::simd::level() {
        cpu::simd::Level::Avx512 => return "AVX-512",
        cpu::simd::Level::Avx2 => return "AVX2",
        cpu::simd::Level::Base => {}
    }
    "base"
}

/// The same operations as compositions of tensor operations: the reference of the tests and the base line of the
/// benchmarks.
pub mod portable {
    pub use crate::activation::{portable_gelu as gelu, portable_silu as silu};
    pub use crate::attention::portable as attention;
    pub use crate::cached_attention::portable as cached_attention;
    pub use crate::chunks::portable as chunks;
    pub use crate::conv2d::portable as conv2d;
    pub use crate::cross_entropy::portable as softmax_cross_entropy;
    pub use crate::gated::{portable_modulate as modulate, portable_residual as gated_residual};
    pub use crate::group_norm::portable as group_norm;
    pub use crate::layer_norm::{portable as layer_norm, portable_modulated as modulated_layer_norm};
    pub use crate::linear::portable as linear;
    pub use crate::nearest_code::portable as nearest_code;
    pub use crate::packed::portable as packed_linear;
    pub use crate::unit_length::portable as unit_length;
}
