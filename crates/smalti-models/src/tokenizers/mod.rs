//! Tokenizers: image to [`Codes`] to image.

use crate::Codes;
use crate::quantizers::{Pass, Quantizer, QuantizerModel, Stats};
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Layout, Planes, Result, TokenSpec};

pub mod kl;
pub mod patches;
pub mod vit;
pub mod vqgan;

pub use kl::{Kl, KlConfig, Posterior};
pub use patches::{Patches, PatchesConfig};
pub use vit::{Vit, VitTokenizerConfig};
pub use vqgan::{Vqgan, VqganConfig};

/// Turns images into codes and back.
pub trait Tokenizer: Send + Sync {
    /// The tokens that this tokenizer makes.
    fn spec(&self) -> &TokenSpec;

    /// Codes of images, the most likely ones.
    ///
    /// # Shapes
    /// `images_bchw` is `[batch, channels, height, width]`, the spec's size, with the planes and values that
    /// [`TokenizerConfig::planes`] says.
    fn encode(&self, images_bchw: Tensor<4>) -> Codes;

    /// Images of codes of the spec's kind, `[batch, channels, height, width]`. Values are about -1..1 and not clamped, or labels.
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
    /// Convolutional autoencoder with continuous latents.
    Kl(KlConfig),
    /// Patches of pixels.
    Patches(PatchesConfig),
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
            Self::Kl(config) => config.spec(),
            Self::Patches(config) => config.spec(),
        }
    }

    /// What the images are that go in and come out.
    ///
    /// # Errors
    /// As [`VqganConfig::planes`].
    pub fn planes(&self) -> Result<Planes> {
        match self {
            Self::Vqgan(config) => config.planes(),
            Self::Vit(_) | Self::Kl(_) | Self::Patches(_) => Ok(Planes::Colour),
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
            Self::Kl(config) => TokenizerModel::Kl(config.init(device)?),
            Self::Patches(config) => TokenizerModel::Patches(config.init()?),
        })
    }
}

/// Any tokenizer, as training sees it: encoder, bottleneck, and a decoder in two parts.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "a program holds one or two of them")]
pub enum TokenizerModel {
    /// Convolutional autoencoder of VQGAN and VAR.
    Vqgan(Vqgan),
    /// Vision transformer of ViT-VQGAN.
    Vit(Vit),
    /// Convolutional autoencoder with continuous latents.
    Kl(Kl),
    /// Patches of pixels.
    Patches(Patches),
}

/// What the step between encoder and decoder gives in training.
#[derive(Clone, Debug)]
pub struct Bottleneck {
    /// What the decoder sees, `[b, c, h', w']`.
    pub latents_bchw: Tensor<4>,
    /// Codes `[b, length]`, of a quantizer.
    pub codes: Option<Tensor<2, Int>>,
    /// The bottleneck's own loss, one element.
    pub loss: BottleneckLoss,
    /// What a quantizer's update needs.
    pub stats: Option<Stats>,
}

/// The own loss of a bottleneck.
#[derive(Clone, Debug)]
pub enum BottleneckLoss {
    /// None.
    None,
    /// Commitment and codebook terms of a quantizer.
    Codebook(Tensor<1>),
    /// Divergence of the latents from a standard normal distribution, summed over an image, mean over images.
    Divergence(Tensor<1>),
}

/// Tokens of images that are vectors, as a tokenizer knows them, `[b, n, c]` each.
#[derive(Clone, Debug)]
pub struct TokenMoments {
    /// Most likely tokens.
    pub means_bnc: Tensor<3>,
    /// Standard deviations, unless the tokens are certain.
    pub deviations_bnc: Option<Tensor<3>>,
}

impl TokenizerModel {
    /// What the images are that go in and come out.
    pub fn planes(&self) -> Planes {
        match self {
            Self::Vqgan(model) => model.planes(),
            Self::Vit(_) | Self::Kl(_) | Self::Patches(_) => Planes::Colour,
        }
    }

    /// Images `[b, c, h, w]` to what the bottleneck sees, `[b, c, h', w']`.
    pub fn latents(&self, images_bchw: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Vqgan(model) => model.latents(images_bchw),
            Self::Vit(model) => model.latents(images_bchw),
            Self::Kl(model) => model.moments(images_bchw),
            Self::Patches(_) => images_bchw,
        }
    }

    /// Whether only encoding needs the parameter of this path.
    pub fn only_encodes(path: &str) -> bool {
        ["encoder.", "quant_conv.", "to_patch.", "pre_quant."].iter().any(|part| path.starts_with(part))
    }

    /// The quantizer between encoder and decoder, if tokens are codes.
    pub fn quantizer(&self) -> Option<&QuantizerModel> {
        match self {
            Self::Vqgan(model) => Some(&model.quantize),
            Self::Vit(model) => Some(&model.quantizer),
            Self::Kl(_) | Self::Patches(_) => None,
        }
    }

    /// The same tokenizer with another quantizer, if it has one.
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
            Self::Kl(_) | Self::Patches(_) => self,
        }
    }

    /// The training pass of the bottleneck over what [`Self::latents`] made.
    pub fn bottleneck(&self, latents_bchw: Tensor<4>, pass: Pass) -> Bottleneck {
        if let Some(quantizer) = self.quantizer() {
            let quantized = quantizer.train_forward_with(latents_bchw, pass);
            return Bottleneck {
                latents_bchw: quantized.latents_bchw,
                codes: Some(quantized.codes),
                loss: quantized.loss.map_or(BottleneckLoss::None, BottleneckLoss::Codebook),
                stats: Some(quantized.stats),
            };
        }
        let (latents_bchw, loss) = match self {
            Self::Kl(_) => {
                let noise = pass.noise_bchw.unwrap_or_else(|| Kl::noise(&latents_bchw));
                let posterior = Posterior::new(latents_bchw);
                (posterior.sample(noise), BottleneckLoss::Divergence(posterior.divergence().mean()))
            }
            _ => (latents_bchw, BottleneckLoss::None),
        };
        Bottleneck { latents_bchw, codes: None, loss, stats: None }
    }

    /// Latents `[b, c, h', w']` after the bottleneck to what the decoder's last layer sees.
    pub fn features(&self, latents_bchw: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Vqgan(model) => model.features(latents_bchw),
            Self::Vit(model) => model.features(latents_bchw),
            Self::Kl(model) => model.features(latents_bchw),
            Self::Patches(_) => latents_bchw,
        }
    }

    /// Images as their reconstruction is measured against: labels as one-hot vectors `[b, classes, h, w]`, pictures as they are.
    pub fn target(&self, images_bchw: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Vqgan(model) => model.seen(images_bchw),
            Self::Vit(_) | Self::Kl(_) | Self::Patches(_) => images_bchw,
        }
    }

    /// What [`Self::to_pixels`] made as images of the kind that went in.
    fn images(&self, pixels_bchw: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Vqgan(model) => model.images(pixels_bchw),
            Self::Vit(_) | Self::Kl(_) | Self::Patches(_) => pixels_bchw,
        }
    }

    /// The decoder's last layer: features to images `[b, c, h, w]`, about -1..1 and not clamped; scores of label maps.
    pub fn to_pixels(&self, features: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Vqgan(model) => model.to_pixels(features),
            Self::Vit(model) => model.to_pixels(features),
            Self::Kl(model) => model.to_pixels(features),
            Self::Patches(_) => features,
        }
    }

    /// The last layer's weight, by whose gradients adversarial training is balanced; none if nothing can be trained.
    pub fn last_weight(&self) -> Option<Tensor<4>> {
        match self {
            Self::Vqgan(model) => Some(model.last_weight()),
            Self::Vit(model) => Some(model.last_weight()),
            Self::Kl(model) => Some(model.decoder.conv_out.weight.val()),
            Self::Patches(_) => None,
        }
    }

    /// Tokens of images `[b, 3, h, w]` with what is uncertain about them, if tokens are vectors.
    pub fn token_moments(&self, images_bchw: Tensor<4>) -> Option<TokenMoments> {
        match self {
            Self::Vqgan(_) | Self::Vit(_) => None,
            Self::Kl(model) => {
                let [means_bnc, deviations_bnc] = model.token_moments(images_bchw);
                Some(TokenMoments { means_bnc, deviations_bnc: Some(deviations_bnc) })
            }
            Self::Patches(model) => Some(TokenMoments { means_bnc: model.encode(images_bchw), deviations_bnc: None }),
        }
    }

    /// Images of codes `[b, h w]` on another grid than the spec's, `[b, 3, height, width]`, about -1..1 and not clamped.
    ///
    /// # Errors
    /// [`Error::Unsupported`] unless the decoder is convolutional and the codes are one grid.
    pub fn decode_grid(&self, codes: &Codes, (h, w): (usize, usize)) -> Result<Tensor<4>> {
        match (self, codes) {
            (Self::Vqgan(model), Codes::Discrete(ids)) if matches!(self.spec().layout, Layout::Grid { .. }) => {
                Ok(self.images(self.to_pixels(self.features(model.quantize.decode(ids.clone(), h, w)))))
            }
            _ => Err(Error::unsupported(
                "pictures of another size by this tokenizer",
                "only a convolutional tokenizer whose codes are one grid makes pictures of any size",
            )),
        }
    }

    /// Codes as latents after the bottleneck.
    fn codes_to_latents(&self, codes: &Codes) -> Tensor<4> {
        let (h, w) = self.spec().layout.finest();
        match (self, codes, self.quantizer()) {
            (_, Codes::Discrete(ids), Some(quantizer)) => quantizer.decode(ids.clone(), h, w),
            (Self::Kl(model), Codes::Continuous(tokens), _) => model.latents(tokens.clone()),
            (Self::Patches(model), Codes::Continuous(tokens), _) => model.decode(tokens.clone()),
            // For a quantizer's decoder vectors are quantized latents, one for each place of the finest level.
            (_, Codes::Continuous(vectors), _) => {
                let [b, _, c] = vectors.dims();
                vectors.clone().swap_dims(1, 2).reshape([b, c, h, w])
            }
            // Codes mean nothing here: the image of zeros.
            (_, Codes::Discrete(ids), None) => {
                let [b, n] = ids.dims();
                let zeros = Tensor::zeros([b, n, self.spec().channels().unwrap_or(1)], &ids.device());
                self.codes_to_latents(&Codes::Continuous(zeros))
            }
        }
    }
}

impl Tokenizer for TokenizerModel {
    fn spec(&self) -> &TokenSpec {
        match self {
            Self::Vqgan(model) => model.spec(),
            Self::Vit(model) => model.spec(),
            Self::Kl(model) => model.spec(),
            Self::Patches(model) => model.spec(),
        }
    }

    fn encode(&self, images_bchw: Tensor<4>) -> Codes {
        match self {
            Self::Vqgan(model) => Codes::Discrete(model.quantize.encode(model.latents(images_bchw))),
            Self::Vit(model) => Codes::Discrete(model.quantizer.encode(model.latents(images_bchw))),
            Self::Kl(model) => Codes::Continuous(model.tokens(Posterior::new(model.moments(images_bchw)).mean_bchw)),
            Self::Patches(model) => Codes::Continuous(model.encode(images_bchw)),
        }
    }

    fn decode(&self, codes: &Codes) -> Tensor<4> {
        self.images(self.to_pixels(self.features(self.codes_to_latents(codes))))
    }
}

/// The half of a tokenizer that makes images of codes. The other half may have no weights, so it cannot be reached.
#[derive(Debug)]
pub struct TokenDecoder(TokenizerModel);

impl TokenDecoder {
    /// The decoder of a tokenizer whose parameters are loaded, those aside of which [`TokenizerModel::only_encodes`] says so.
    pub fn new(tokenizer: TokenizerModel) -> Self {
        Self(tokenizer)
    }

    /// See [`TokenizerModel::planes`].
    pub fn planes(&self) -> Planes {
        self.0.planes()
    }

    /// See [`Tokenizer::decode`].
    pub fn decode(&self, codes: &Codes) -> Tensor<4> {
        self.0.decode(codes)
    }

    /// See [`TokenizerModel::decode_grid`].
    ///
    /// # Errors
    /// As there.
    pub fn decode_grid(&self, codes: &Codes, size: (usize, usize)) -> Result<Tensor<4>> {
        self.0.decode_grid(codes, size)
    }
}
