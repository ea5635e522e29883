//! Quantizers: latents to codes and back.
//!
//! All quantizers share one signature, and none changes itself in a forward pass: what a training step saw comes back as
//! [`Stats`] and is applied by an explicit [`Quantizer::update`].

use burn::tensor::{Int, Tensor};

/// What a quantizer returns in training.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// Quantized latents `[b, c, h, w]`, with the gradient of the straight-through estimator or of the rotation trick.
    pub latents_bchw: Tensor<4>,
    /// Codes `[b, h * w]` in raster order.
    pub codes: Tensor<2, Int>,
    /// The quantizer's own loss, a tensor of one element: commitment and codebook terms, weighted. `None` if it has none.
    pub loss: Option<Tensor<1>>,
    /// What [`Quantizer::update`] needs, detached.
    pub stats: Stats,
}

/// What a training batch did to the codebook, kept off the gradient tape.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// The latents as they met the codebook (after a projection or normalisation), `[n, c]`.
    pub latents_nc: Option<Tensor<2>>,
    /// The code of each, `[n]`.
    pub codes_n: Option<Tensor<1, Int>>,
}

/// Latents to codes and back.
pub trait Quantizer {
    /// Number of codes.
    fn vocabulary(&self) -> usize;
    /// Channels of the latents that go in and come out.
    fn channels(&self) -> usize;
    /// Codes `[b, h * w]`, in raster order, of latents `[b, c, h, w]`.
    fn encode(&self, latents_bchw: Tensor<4>) -> Tensor<2, Int>;
    /// Quantized latents `[b, c, h, w]` of codes `[b, h * w]`.
    fn decode(&self, codes: Tensor<2, Int>, h: usize, w: usize) -> Tensor<4>;
    /// The training pass: differentiable quantized latents, codes, loss and statistics.
    fn train_forward(&self, latents_bchw: Tensor<4>) -> Quantized;
}
