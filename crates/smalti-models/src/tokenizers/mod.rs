//! Tokenizers: image to [`Codes`] to image.

use crate::Codes;
use crate::quantizers::{Quantizer, QuantizerModel};
use burn::module::Module;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Result, TokenSpec};

pub mod vit;
pub mod vqgan;

pub use vit::{Vit, VitTokenizerConfig};
pub use vqgan::{Vqgan, VqganConfig};

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

/// Settings of any tokenizer; `kind` names it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum TokenizerConfig {
    /// Convolutional autoencoder of VQGAN and VAR.
    Vqgan(VqganConfig),
    /// Vision transformer of ViT-VQGAN.
    Vit(VitTokenizerConfig),
}

impl TokenizerConfig {
    /// The tokens that the tokenizer will make.
    ///
    /// # Errors
    /// [`smalti_base::Error::Invalid`] if the numbers do not fit each other.
    pub fn spec(&self) -> Result<TokenSpec> {
        match self {
            Self::Vqgan(config) => config.spec(),
            Self::Vit(config) => config.spec(),
        }
    }

    /// A tokenizer with fresh weights.
    ///
    /// # Errors
    /// [`smalti_base::Error::Invalid`] if the numbers do not fit each other.
    pub fn init(&self, device: &Device) -> Result<TokenizerModel> {
        Ok(match self {
            Self::Vqgan(config) => TokenizerModel::Vqgan(config.init(device)?),
            Self::Vit(config) => TokenizerModel::Vit(config.init(device)?),
        })
    }
}

/// Any tokenizer, as training sees it: encoder, quantizer, and a decoder in two parts.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "a program holds one or two of them")]
pub enum TokenizerModel {
    /// Convolutional autoencoder of VQGAN and VAR.
    Vqgan(Vqgan),
    /// Vision transformer of ViT-VQGAN.
    Vit(Vit),
}

impl TokenizerModel {
    /// Images `[b, 3, h, w]` in -1..1 to latents `[b, c, h', w']` before quantization.
    pub fn latents(&self, images_bchw: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Vqgan(model) => model.latents(images_bchw),
            Self::Vit(model) => model.latents(images_bchw),
        }
    }

    /// The quantizer between encoder and decoder.
    pub fn quantizer(&self) -> &QuantizerModel {
        match self {
            Self::Vqgan(model) => &model.quantize,
            Self::Vit(model) => &model.quantizer,
        }
    }

    /// The same tokenizer with another quantizer.
    pub fn with_quantizer(self, quantizer: QuantizerModel) -> Self {
        match self {
            Self::Vqgan(mut model) => {
                model.quantize = quantizer;
                Self::Vqgan(model)
            }
            Self::Vit(mut model) => {
                model.quantizer = quantizer;
                Self::Vit(model)
            }
        }
    }

    /// Quantized latents `[b, c, h', w']` to what the decoder's last layer sees.
    pub fn features(&self, latents_bchw: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Vqgan(model) => model.features(latents_bchw),
            Self::Vit(model) => model.features(latents_bchw),
        }
    }

    /// The decoder's last layer: features to images `[b, 3, h, w]`, about -1..1 and not clamped.
    pub fn to_pixels(&self, features: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Vqgan(model) => model.to_pixels(features),
            Self::Vit(model) => model.to_pixels(features),
        }
    }

    /// The last layer's weight, by whose gradients adversarial training is balanced.
    pub fn last_weight(&self) -> Tensor<4> {
        match self {
            Self::Vqgan(model) => model.last_weight(),
            Self::Vit(model) => model.last_weight(),
        }
    }
}

impl Tokenizer for TokenizerModel {
    fn spec(&self) -> &TokenSpec {
        match self {
            Self::Vqgan(model) => model.spec(),
            Self::Vit(model) => model.spec(),
        }
    }

    fn encode(&self, images_bchw: Tensor<4>) -> Codes {
        Codes::Discrete(self.quantizer().encode(self.latents(images_bchw)))
    }

    /// Continuous codes are taken as quantized latents, one vector for each place of the finest level.
    fn decode(&self, codes: &Codes) -> Tensor<4> {
        let (h, w) = self.spec().layout.finest();
        let latents_bchw = match codes {
            Codes::Discrete(ids) => self.quantizer().decode(ids.clone(), h, w),
            Codes::Continuous(vectors) => {
                let [b, _, c] = vectors.dims();
                vectors.clone().swap_dims(1, 2).reshape([b, c, h, w])
            }
        };
        self.to_pixels(self.features(latents_bchw))
    }
}
