//! Attention over the places of a feature map.

use crate::{Conv, Norm};
use burn::module::Module;
use burn::tensor::{Device, Tensor};

/// Single-head self-attention over `h * w` places, added to its input.
#[derive(Module, Debug)]
pub struct AttnBlock {
    /// Normalises the input.
    pub norm: Norm,
    /// Queries, 1x1.
    pub q: Conv,
    /// Keys, 1x1.
    pub k: Conv,
    /// Values, 1x1.
    pub v: Conv,
    /// Projects the mixed values, 1x1.
    pub proj_out: Conv,
}

impl AttnBlock {
    /// A block with fresh weights; see [`Norm::new`] for the groups.
    pub fn new(channels: usize, norm_groups: usize, epsilon: f64, device: &Device) -> Self {
        let conv = || Conv::new(channels, channels, 1, device);
        Self {
            norm: Norm::new(channels, norm_groups, epsilon, device),
            q: conv(),
            k: conv(),
            v: conv(),
            proj_out: conv(),
        }
    }

    /// `[b, c, h, w]` to the same shape.
    pub fn forward(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        let [b, c, h, w] = x_bchw.dims();
        let n = self.norm.forward(x_bchw.clone());
        let tokens = |conv: &Conv| conv.forward(n.clone()).reshape([b, 1, c, h * w]).swap_dims(2, 3);
        let mixed = smalti_kernels::attention(tokens(&self.q), tokens(&self.k), tokens(&self.v), false, None);
        x_bchw + self.proj_out.forward(mixed.swap_dims(2, 3).reshape([b, c, h, w]))
    }
}
