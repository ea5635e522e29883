//! Tokenizers: image to [`Codes`] to image.

use crate::Codes;
use crate::codes::NO_CODE;
use crate::losses::LossTerm;
use crate::quantizers::{Pass, QuantizerModel, Stats, UpdateReport};
use crate::role::role;
use burn::tensor::{Int, Tensor};
use smalti_base::{Error, Layout, Planes, Result, TokenSpec, rng::Stream};

pub mod kl;
pub mod patches;
pub mod vit;
pub mod vqgan;

pub use kl::{Kl, KlConfig, Posterior};
pub use patches::{Patches, PatchesConfig};
pub use vit::{Vit, VitTokenizerConfig};
pub use vqgan::{Vqgan, VqganConfig};

role! {
    /// Settings of any tokenizer; `kind` names it.
    TokenizerConfig: TokenizerSettings;
    /// Any tokenizer.
    TokenizerModel: Tokenizer;
    /// What there is.
    SYSTEMS: Tokenizer;
    /// Convolutional autoencoder of VQGAN, VAR and RQ-VAE.
    "vqgan" => Vqgan(VqganConfig),
    /// Vision transformer of ViT-VQGAN.
    "vit" => Vit(VitTokenizerConfig),
    /// Convolutional autoencoder with continuous latents.
    "kl" => Kl(KlConfig),
    /// Patches of pixels.
    "patches" => Patches(PatchesConfig),
}

/// What is known of a tokenizer before it has weights.
pub trait TokenizerSettings {
    /// The tokens that the tokenizer will make.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the numbers do not fit each other.
    fn spec(&self) -> Result<TokenSpec>;

    /// What the images are that go in and come out.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Unsupported`] for a number of channels that no image has.
    fn planes(&self) -> Result<Planes> {
        Ok(Planes::Colour)
    }

    /// Whether it makes pictures of any size, not only of the spec's.
    fn any_size(&self) -> bool {
        false
    }

    /// The rules file that exports its weights, if the official layout can hold them.
    fn official(&self) -> Option<&'static str> {
        None
    }

    /// The factor of the tokens, if training is to set it in the end: such that their deviation is about 1.
    fn open_scale(&mut self) -> Option<&mut Option<f64>> {
        None
    }
}

/// Turns images into codes and back.
pub trait Tokenizer: Send + Sync {
    /// The tokens that this tokenizer makes.
    fn spec(&self) -> &TokenSpec;

    /// What the images are that go in and come out.
    fn planes(&self) -> Planes {
        Planes::Colour
    }

    /// Codes of images, the most likely ones.
    ///
    /// # Shapes
    /// `images_bchw` is `[batch, channels, height, width]`, the spec's size, with the planes and values that [`Self::planes`] says.
    ///
    /// # Errors
    /// Of tokenizers that cannot encode.
    fn encode(&self, images_bchw: Tensor<4>) -> Result<Codes>;

    /// Images of codes, `[batch, channels, height, width]`. Values are about -1..1 and not clamped, or labels.
    ///
    /// # Errors
    /// [`Error::Invalid`] for codes of another kind or number than the spec's; of tokenizers that do not make images.
    fn decode(&self, codes: &Codes) -> Result<Tensor<4>>;

    /// The training pass, with gradients.
    ///
    /// # Shapes
    /// As [`Self::encode`].
    fn train_forward(&self, images_bchw: Tensor<4>, pass: &Pass) -> TokenizerPass;

    /// The last layer: what [`TokenizerPass::features`] is to the reconstruction `[b, c, h, w]`, about -1..1 and not clamped; scores of
    /// label maps.
    fn to_pixels(&self, features: Tensor<4>) -> Tensor<4>;

    /// The last layer's weight, by whose gradients adversarial training is balanced; none if nothing can be trained.
    fn last_weight(&self) -> Option<Tensor<4>> {
        None
    }

    /// Tokens of images with what is uncertain about them, if tokens are vectors.
    fn token_moments(&self, _images_bchw: Tensor<4>) -> Option<TokenMoments> {
        None
    }

    /// Images of the first `parts` levels or depths of the codes: what the picture is so far.
    ///
    /// # Errors
    /// [`Error::Unsupported`] by a tokenizer whose codes have one part, [`Error::Invalid`] for another number of parts.
    fn decode_prefix(&self, _codes: &Codes, _parts: usize) -> Result<Tensor<4>> {
        Err(Error::unsupported(
            "a picture of a part of the codes by this tokenizer",
            "only codes in levels or depths can be decoded in part",
        ))
    }

    /// Images of codes `[b, h w]` on another grid than the spec's, `[b, c, height, width]`, about -1..1 and not clamped.
    ///
    /// # Errors
    /// [`Error::Unsupported`] unless the decoder is convolutional and the codes are one grid.
    fn decode_grid(&self, _codes: &Codes, _grid: (usize, usize)) -> Result<Tensor<4>> {
        Err(Error::unsupported(
            "pictures of another size by this tokenizer",
            "only a convolutional tokenizer whose codes are one grid makes pictures of any size",
        ))
    }

    /// Codes of images with the distributions that they are drawn from; see [`Quantizer::soft_codes`](crate::Quantizer::soft_codes).
    ///
    /// # Errors
    /// [`Error::Unsupported`] by a tokenizer that has none.
    fn soft_codes(&self, _images_bchw: Tensor<4>, _temperature: f64, _draw: Option<&mut Stream>) -> Result<Codes> {
        Err(Error::unsupported("soft codes by this tokenizer", "train the generator on codes as they are"))
    }

    /// The quantizer between encoder and decoder, if there is one.
    fn quantizer(&self) -> Option<&QuantizerModel> {
        None
    }

    /// Applies what a training step did outside of the gradients, such as to codebooks; see [`Quantizer::update`](crate::Quantizer::update).
    fn update(&mut self, _stats: &Stats, _step: u64, _stream: &mut Stream) -> UpdateReport {
        UpdateReport::default()
    }

    /// How the paths of those parameters begin that only encoding needs.
    fn encoder_paths(&self) -> &'static [&'static str] {
        &[]
    }
}

/// What a tokenizer gives in training.
#[derive(Clone, Debug)]
pub struct TokenizerPass {
    /// What the reconstruction is measured against, `[b, c, h, w]`: pictures as they are, labels as one-hot vectors.
    pub target_bchw: Tensor<4>,
    /// What the last layer sees; see [`Tokenizer::to_pixels`].
    pub features: Tensor<4>,
    /// Codes `[b, length]`, if tokens are codes.
    pub codes: Option<Tensor<2, Int>>,
    /// The tokenizer's own loss terms.
    pub terms: Vec<LossTerm>,
    /// What [`Tokenizer::update`] needs.
    pub stats: Option<Stats>,
}

/// Tokens of images that are vectors, as a tokenizer knows them, `[b, n, c]` each.
#[derive(Clone, Debug)]
pub struct TokenMoments {
    /// Most likely tokens.
    pub means_bnc: Tensor<3>,
    /// Standard deviations, unless the tokens are certain.
    pub deviations_bnc: Option<Tensor<3>>,
}

/// Codes as quantized latents `[b, c, h, w]`. Vectors are taken as quantized latents, one for each place of the finest level, as a
/// generator makes them that mixes codes.
///
/// # Errors
/// [`Error::Invalid`] for another number of places or channels than the spec and the quantizer have.
fn quantized_latents(quantizer: &QuantizerModel, spec: &TokenSpec, codes: &Codes) -> Result<Tensor<4>> {
    let (h, w) = spec.layout.finest();
    match codes {
        Codes::Discrete(ids) | Codes::Soft { codes: ids, .. } => {
            let [_, length] = ids.dims();
            must_have("codes", [length, 1], [spec.length(), 1])?;
            Ok(quantizer.decode(ids.clone(), h, w))
        }
        Codes::Continuous(vectors) => {
            let [b, n, c] = vectors.dims();
            must_have("vectors", [n, c], [h * w, quantizer.channels()])?;
            Ok(vectors.clone().swap_dims(1, 2).reshape([b, c, h, w]))
        }
    }
}

/// Quantized latents of the first `parts` levels or depths of the codes.
///
/// # Errors
/// As [`quantized_latents`] and [`Quantizer::decode_prefix`].
fn prefix_latents(quantizer: &QuantizerModel, spec: &TokenSpec, codes: &Codes, parts: usize) -> Result<Tensor<4>> {
    let (h, w) = spec.layout.finest();
    match codes {
        Codes::Discrete(ids) | Codes::Soft { codes: ids, .. } => {
            must_have("codes", [ids.dims()[1], 1], [spec.length(), 1])?;
            quantizer.decode_prefix(ids.clone(), h, w, parts)
        }
        Codes::Continuous(_) => Err(Error::invalid("tokens to decode", "vectors have no levels or depths")),
    }
}

/// The vectors `[b, n, c]` of a tokenizer of vectors.
///
/// # Errors
/// [`Error::Invalid`] for codes, or another number of places or channels than the spec's.
fn vectors<'a>(spec: &TokenSpec, codes: &'a Codes) -> Result<&'a Tensor<3>> {
    match codes {
        Codes::Continuous(vectors) => {
            let [_, n, c] = vectors.dims();
            must_have("vectors", [n, c], [spec.length(), spec.channels().unwrap_or_default()])?;
            Ok(vectors)
        }
        Codes::Discrete(_) | Codes::Soft { .. } => {
            Err(Error::invalid("tokens to decode", format!("codes were given, but the tokens are {}", spec.kind)))
        }
    }
}

fn must_have(what: &str, found: [usize; 2], expected: [usize; 2]) -> Result<()> {
    match found == expected {
        true => Ok(()),
        false => {
            let [n, c] = found;
            let [places, channels] = expected;
            let problem = format!("{what} for {n} places of {c} numbers; expected {places} places of {channels}");
            Err(Error::invalid("tokens to decode", problem))
        }
    }
}

/// Quantized latents of codes on another grid than the spec's.
///
/// # Errors
/// [`Error::Unsupported`] unless the codes are one grid, [`Error::Invalid`] for another number of codes.
fn latents_on_grid(
    quantizer: &QuantizerModel,
    spec: &TokenSpec,
    codes: &Codes,
    (h, w): (usize, usize),
) -> Result<Tensor<4>> {
    match (codes, &spec.layout) {
        (Codes::Discrete(ids), Layout::Grid { .. }) => {
            must_have("codes", [ids.dims()[1], 1], [h * w, 1])?;
            Ok(quantizer.decode(ids.clone(), h, w))
        }
        _ => Err(Error::unsupported(
            format!("pictures of another size of a {}", spec.layout),
            "only codes of one grid make pictures of any size",
        )),
    }
}

/// Codes of latents `[b, c, h, w]`. Of an image whose latents are not finite they are [`NO_CODE`], which is seen where codes are read.
fn codes_of(quantizer: &QuantizerModel, latents_bchw: Tensor<4>) -> Codes {
    let [b, c, h, w] = latents_bchw.dims();
    let plain = latents_bchw.clone().inner();
    // Squares, since distances have them.
    let sums = (plain.clone() * plain).reshape([b, c * h * w]).sum_dim(1);
    let codes = quantizer.encode(latents_bchw);
    let without = sums.is_finite().bool_not().expand(codes.dims());
    Codes::Discrete(codes.mask_fill(without, NO_CODE))
}

/// The half of a tokenizer that makes images of codes. The other half may have no weights, so it cannot be reached.
#[derive(Debug)]
pub struct TokenDecoder(TokenizerModel);

impl TokenDecoder {
    /// The decoder of a tokenizer whose parameters are loaded, those aside that [`Tokenizer::encoder_paths`] names.
    pub fn new(tokenizer: TokenizerModel) -> Self {
        Self(tokenizer)
    }

    /// See [`Tokenizer::planes`].
    pub fn planes(&self) -> Planes {
        self.0.planes()
    }

    /// See [`Tokenizer::decode`].
    ///
    /// # Errors
    /// As there.
    pub fn decode(&self, codes: &Codes) -> Result<Tensor<4>> {
        self.0.decode(codes)
    }

    /// See [`Tokenizer::decode_prefix`].
    ///
    /// # Errors
    /// As there.
    pub fn decode_prefix(&self, codes: &Codes, parts: usize) -> Result<Tensor<4>> {
        self.0.decode_prefix(codes, parts)
    }

    /// See [`Tokenizer::decode_grid`].
    ///
    /// # Errors
    /// As there.
    pub fn decode_grid(&self, codes: &Codes, size: (usize, usize)) -> Result<Tensor<4>> {
        self.0.decode_grid(codes, size)
    }
}
