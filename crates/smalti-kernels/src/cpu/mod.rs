//! Bodies for the CPU, over plain `f32` slices in row-major order.

pub(crate) mod adamw;
pub(crate) mod attention;
pub(crate) mod buffer;
pub(crate) mod cached_attention;
pub(crate) mod conv;
pub(crate) mod cross_entropy;
pub(crate) mod gelu;
pub(crate) mod gemm;
pub(crate) mod group_norm;
pub(crate) mod layer_norm;
pub(crate) mod linear;
pub(crate) mod nearest_code;
pub(crate) mod packed;
pub(crate) mod simd;
pub(crate) mod squares;

/// `0..n` in at most as many equal ranges as there are threads: the unit of work where sums must keep their order.
pub(crate) fn shares(n: usize) -> Vec<std::ops::Range<usize>> {
    let share = n.div_ceil(rayon::current_num_threads()).max(1);
    (0..n).step_by(share).map(|start| start..(start + share).min(n)).collect()
}
