//! Tokenizers: image to [`Codes`] to image.

use crate::Codes;
use burn::tensor::Tensor;
use smalti_base::TokenSpec;

/// Turns images into codes and back.
pub trait Tokenizer: Send + Sync {
    /// The tokens that this tokenizer makes.
    fn spec(&self) -> &TokenSpec;

    /// Codes of images.
    ///
    /// # Shapes
    /// `images_bchw` is `[batch, 3, height, width]` with values in -1..1 and the spec's size.
    fn encode(&self, images_bchw: Tensor<4>) -> Codes;

    /// Images of codes, `[batch, 3, height, width]`. Values are about -1..1 and not clamped.
    fn decode(&self, codes: &Codes) -> Tensor<4>;
}
