//! The transformer of ViT encoders and decoders: pre-norm blocks that see all tokens, with fused query, key and value.

use crate::dense::{Dense, TokenNorm};
use crate::init::Init;
use burn::module::Module;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result};

/// The non-linearity inside a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeedForward {
    /// Hyperbolic tangent (ViT-VQGAN's public code).
    #[default]
    Tanh,
    /// `x Phi(x)`, exact.
    Gelu,
}

/// Settings of a [`VitTransformer`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VitConfig {
    /// Channels of a token.
    pub dim: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads.
    pub heads: usize,
    /// Channels of a head; `heads * dim_head` need not be `dim`.
    #[serde(default = "dim_head")]
    pub dim_head: usize,
    /// Channels inside the feed-forward network.
    pub mlp_dim: usize,
    /// The non-linearity inside it.
    #[serde(default)]
    pub feed_forward: FeedForward,
}

fn dim_head() -> usize {
    64
}

/// Added to variances.
const EPSILON: f64 = 1e-5;

impl VitConfig {
    /// Checks that no number is 0.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the key.
    pub fn check(&self, place: &str) -> Result<()> {
        let numbers =
            [("dim", self.dim), ("heads", self.heads), ("dim_head", self.dim_head), ("mlp_dim", self.mlp_dim)];
        match numbers.iter().find(|(_, value)| *value == 0) {
            Some((key, _)) => Err(Error::invalid(place, format!("{key} must be at least 1"))),
            None => Ok(()),
        }
    }

    /// Fresh blocks: weights Xavier-uniform, biases 0.
    pub fn init(&self, device: &Device) -> VitTransformer {
        let inner = self.heads * self.dim_head;
        let norm = || TokenNorm::new(self.dim, EPSILON, device);
        let dense = |inputs, outputs| Dense::new(inputs, outputs, xavier(inputs, outputs), device);
        let block = |_| VitBlock {
            norm_attention: norm(),
            qkv: Dense::without_bias(self.dim, 3 * inner, xavier(self.dim, 3 * inner), device),
            output: (self.heads > 1 || inner != self.dim).then(|| dense(inner, self.dim)),
            norm_feed_forward: norm(),
            expand: dense(self.dim, self.mlp_dim),
            contract: dense(self.mlp_dim, self.dim),
            heads: self.heads,
            feed_forward: self.feed_forward,
        };
        VitTransformer { blocks: (0..self.depth).map(block).collect(), norm: norm() }
    }
}

/// Uniform in `+-sqrt(6 / (inputs + outputs))` (Glorot & Bengio 2010).
pub fn xavier(inputs: usize, outputs: usize) -> Init {
    Init::Uniform((6.0 / (inputs + outputs) as f64).sqrt())
}

/// Blocks and a last normalisation.
#[derive(Module, Debug)]
pub struct VitTransformer {
    /// Blocks in the order in which they run.
    pub blocks: Vec<VitBlock>,
    /// Of the last block's output.
    pub norm: TokenNorm,
}

/// `x + attention(norm(x))`, then `x + feed_forward(norm(x))`.
#[derive(Module, Debug)]
pub struct VitBlock {
    /// Before the attention.
    pub norm_attention: TokenNorm,
    /// Queries, keys and values of all heads, in this order.
    pub qkv: Dense,
    /// Mixes the heads; left out for a single head as wide as a token.
    pub output: Option<Dense>,
    /// Before the feed-forward network.
    pub norm_feed_forward: TokenNorm,
    /// To more channels.
    pub expand: Dense,
    /// And back.
    pub contract: Dense,
    heads: usize,
    #[module(skip)]
    feed_forward: FeedForward,
}

impl VitTransformer {
    /// Tokens `[b, n, dim]` to the same shape.
    pub fn forward(&self, tokens_bnd: Tensor<3>) -> Tensor<3> {
        let x = self.blocks.iter().fold(tokens_bnd, |x, block| block.forward(x));
        self.norm.forward(x)
    }
}

impl VitBlock {
    fn forward(&self, x_bnd: Tensor<3>) -> Tensor<3> {
        let x = self.attend(self.norm_attention.forward(x_bnd.clone())) + x_bnd;
        let h = self.expand.forward(self.norm_feed_forward.forward(x.clone()));
        let h = match self.feed_forward {
            FeedForward::Tanh => h.tanh(),
            FeedForward::Gelu => smalti_kernels::gelu(h, false),
        };
        self.contract.forward(h) + x
    }

    fn attend(&self, x_bnd: Tensor<3>) -> Tensor<3> {
        let [b, n, _] = x_bnd.dims();
        let qkv = self.qkv.forward(x_bnd);
        let inner = qkv.dims()[2] / 3;
        let part = |index: usize| {
            let part = qkv.clone().narrow(2, index * inner, inner);
            part.reshape([b, n, self.heads, inner / self.heads]).swap_dims(1, 2)
        };
        let mixed = smalti_kernels::attention(part(0), part(1), part(2), false, None);
        let mixed = mixed.swap_dims(1, 2).reshape([b, n, inner]);
        match &self.output {
            Some(output) => output.forward(mixed),
            None => mixed,
        }
    }
}

/// The fixed table of sines and cosines over a grid, `[h * w, dim]` in raster order: the first half of the channels encodes the
/// column, the second the row, each as `sin(p w_k)` for all k, then `cos(p w_k)`, with `w_k = 10000^(-k / (dim / 4))`. `dim` must
/// be a multiple of 4.
pub fn sincos_2d(h: usize, w: usize, dim: usize, device: &Device) -> Tensor<2> {
    let quarter = dim / 4;
    let encode = |position: usize, values: &mut Vec<f32>| {
        let angle = |k: usize| position as f64 * 10000f64.powf(-(k as f64) / quarter as f64);
        values.extend((0..quarter).map(|k| angle(k).sin() as f32));
        values.extend((0..quarter).map(|k| angle(k).cos() as f32));
    };
    let mut values = Vec::with_capacity(h * w * dim);
    for row in 0..h {
        for column in 0..w {
            encode(column, &mut values);
            encode(row, &mut values);
        }
    }
    Tensor::from_data(burn::tensor::TensorData::new(values, [h * w, 4 * quarter]), device)
}
