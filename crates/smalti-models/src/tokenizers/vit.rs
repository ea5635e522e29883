//! ViT-VQGAN: a vision transformer encoder and decoder around a quantizer ("Vector-quantized Image Modeling with Improved
//! VQGAN", arXiv 2110.04627).
//!
//! Patches become tokens by a linear map, places are told by a fixed table, and pixels come back by another linear map. The
//! networks see images in 0..1; in and out they are in -1..1 as everywhere.

use super::{Tokenizer, TokenizerPass, TokenizerSettings, codes_of, prefix_latents, quantized_latents};
use crate::Codes;
use crate::quantizers::vq::Metric;
use crate::quantizers::{Pass, Quantized, QuantizerConfig, QuantizerModel, Stats, UpdateReport};
use crate::role::Described;
use crate::systems::Facts;
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result, TokenSpec, rng::Stream};
use smalti_nn::dense::Dense;
use smalti_nn::init::Init;
use smalti_nn::vit::{FeedForward, VitConfig, VitTransformer, sincos_2d, xavier};

/// Settings of a [`Vit`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VitTokenizerConfig {
    /// Side of the images in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Transformer of the encoder.
    pub encoder: VitConfig,
    /// Transformer of the decoder.
    pub decoder: VitConfig,
    /// What turns latents into codes.
    pub quantizer: QuantizerConfig,
}

const PLACE: &str = "tokenizer (vit)";
const CHANNELS: usize = 3;

impl Described for VitTokenizerConfig {
    const FACTS: Facts = Facts {
        arxiv: "2110.04627",
        tokens: "as its quantizer's",
        about: "vision transformer autoencoder with a codebook (ViT-VQGAN)",
    };
}

impl VitTokenizerConfig {
    /// A model with fresh weights.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the numbers do not fit each other.
    pub fn init(&self, device: &Device) -> Result<Vit> {
        let spec = self.spec()?;
        let (side, p, channels) = (self.image_size / self.patch_size, self.patch_size, self.quantizer.channels());
        let (from, to) = (self.encoder.dim, self.decoder.dim);
        let pixels = CHANNELS * p * p;
        let dense = |inputs, outputs| Dense::new(inputs, outputs, xavier(inputs, outputs), device);
        let table = |dim| sincos_2d(side, side, dim, &device.clone().without_autodiff());
        Ok(Vit {
            to_patch: PatchMap::new([from, CHANNELS, p, p], from, pixels, device),
            encoder: self.encoder.init(device),
            pre_quant: dense(from, channels),
            quantizer: self.quantizer.init(device)?,
            post_quant: dense(channels, to),
            decoder: self.decoder.init(device),
            to_pixel: PatchMap::new([to, CHANNELS, p, p], CHANNELS, pixels, device),
            encoder_places: table(from),
            decoder_places: table(to),
            spec,
        })
    }
}

impl TokenizerSettings for VitTokenizerConfig {
    /// The tokens that the model makes of latents with a place for each patch.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the numbers do not fit each other.
    fn spec(&self) -> Result<TokenSpec> {
        let (size, patch) = (self.image_size, self.patch_size);
        if size == 0 || patch == 0 || !size.is_multiple_of(patch) {
            return Err(Error::invalid(PLACE, format!("image_size {size} is not a multiple of patch_size {patch}")));
        }
        for (key, config) in [("encoder", &self.encoder), ("decoder", &self.decoder)] {
            config.check(&format!("{PLACE}: {key}"))?;
            if !config.dim.is_multiple_of(4) {
                let problem = format!("{key}.dim {} is not a multiple of 4, as the table of places needs", config.dim);
                return Err(Error::invalid(PLACE, problem));
            }
        }
        let layout = self.quantizer.layout(size / patch, size / patch)?;
        Ok(TokenSpec::discrete(layout, self.quantizer.vocabulary(), (size, size)))
    }

    /// The official networks compare codes by angle, and their non-linearity is the hyperbolic tangent.
    fn official(&self) -> Option<&'static str> {
        let by_angle = match &self.quantizer {
            QuantizerConfig::Vq(vq) => vq.metric != Metric::Euclidean && vq.projected.is_none(),
            _ => false,
        };
        let networks = [&self.encoder, &self.decoder];
        let is_official = by_angle && networks.iter().all(|network| network.feed_forward == FeedForward::Tanh);
        is_official.then_some("vit-vqgan")
    }
}

/// The autoencoder with its quantizer.
#[derive(Module, Debug)]
pub struct Vit {
    /// Patches to tokens.
    pub to_patch: PatchMap,
    /// Transformer of the encoder.
    pub encoder: VitTransformer,
    /// To the quantizer's channels.
    pub pre_quant: Dense,
    /// Latents to codes and back.
    pub quantizer: QuantizerModel,
    /// To the decoder's channels.
    pub post_quant: Dense,
    /// Transformer of the decoder.
    pub decoder: VitTransformer,
    /// Tokens to patches.
    pub to_pixel: PatchMap,
    encoder_places: Tensor<2>,
    decoder_places: Tensor<2>,
    #[module(skip)]
    spec: TokenSpec,
}

/// A linear map between tokens and patches, stored like the convolution (or transposed convolution) that it equals.
#[derive(Module, Debug)]
pub struct PatchMap {
    /// `[dim, channels, patch, patch]`.
    pub weight: Param<Tensor<4>>,
    /// One for each output channel: `[dim]` to tokens, `[channels]` to pixels.
    pub bias: Param<Tensor<1>>,
}

impl PatchMap {
    /// Xavier-uniform over `[dim, channels * patch^2]`; the bias as in PyTorch's convolutions.
    fn new(shape: [usize; 4], biases: usize, pixels: usize, device: &Device) -> Self {
        // PyTorch counts the second axis and the kernel, for a transposed convolution too.
        let bias = Init::Uniform(1.0 / (pixels as f64).sqrt());
        Self { weight: xavier(shape[0], pixels).param(shape, device), bias: bias.param([biases], device) }
    }

    /// Images `[b, c, h, w]` to tokens `[b, n, dim]` in raster order.
    pub fn tokens(&self, images_bchw: Tensor<4>) -> Tensor<3> {
        let [b, c, h, w] = images_bchw.dims();
        let [dim, _, p, _] = self.weight.dims();
        let (rows, columns) = (h / p, w / p);
        let patches = images_bchw.reshape([b, c, rows, p, columns, p]).permute([0, 2, 4, 1, 3, 5]);
        let patches_nc = patches.reshape([b * rows * columns, c * p * p]);
        let weight = self.weight.val().reshape([dim, c * p * p]).transpose();
        let tokens = patches_nc.matmul(weight) + self.bias.val().reshape([1, dim]);
        tokens.reshape([b, rows * columns, dim])
    }

    /// A map of tokens `[b, dim, h, w]` to images `[b, c, h * p, w * p]`.
    pub fn pixels(&self, tokens_bdhw: Tensor<4>) -> Tensor<4> {
        let [b, dim, rows, columns] = tokens_bdhw.dims();
        let [_, c, p, _] = self.weight.dims();
        let tokens_nd = tokens_bdhw.permute([0, 2, 3, 1]).reshape([b * rows * columns, dim]);
        let patches = tokens_nd.matmul(self.weight.val().reshape([dim, c * p * p]));
        let patches = patches.reshape([b, rows, columns, c, p, p]).permute([0, 3, 1, 4, 2, 5]);
        patches.reshape([b, c, rows * p, columns * p]) + self.bias.val().reshape([1, c, 1, 1])
    }
}

impl Vit {
    /// Images `[b, 3, h, w]` of the spec's size in -1..1 to latents `[b, c, h / p, w / p]` before quantization.
    pub fn latents(&self, images_bchw: Tensor<4>) -> Tensor<4> {
        let tokens_bnd = self.encode_tokens(images_bchw);
        self.as_map(self.pre_quant.forward(tokens_bnd))
    }

    /// What the encoder makes of images, `[b, n, dim]`.
    pub fn encode_tokens(&self, images_bchw: Tensor<4>) -> Tensor<3> {
        let tokens_bnd = self.to_patch.tokens((images_bchw + 1.0) * 0.5);
        self.encoder.forward(tokens_bnd + self.encoder_places.clone().unsqueeze())
    }

    /// Quantized latents `[b, c, h, w]` to what the last layer sees, `[b, dim, h, w]`.
    pub fn features(&self, latents_bchw: Tensor<4>) -> Tensor<4> {
        let [b, c, h, w] = latents_bchw.dims();
        let latents_bnc = latents_bchw.reshape([b, c, h * w]).swap_dims(1, 2);
        let tokens_bnd = self.post_quant.forward(latents_bnc) + self.decoder_places.clone().unsqueeze();
        self.as_map(self.decoder.forward(tokens_bnd))
    }

    /// Tokens `[b, n, c]` as a map `[b, c, h, w]`.
    fn as_map(&self, tokens_bnc: Tensor<3>) -> Tensor<4> {
        let [b, n, c] = tokens_bnc.dims();
        let side = self.spec.image_size.1 / self.to_patch.weight.dims()[2];
        tokens_bnc.swap_dims(1, 2).reshape([b, c, n / side, side])
    }
}

impl Tokenizer for Vit {
    fn spec(&self) -> &TokenSpec {
        &self.spec
    }

    fn encode(&self, images_bchw: Tensor<4>) -> Result<Codes> {
        Ok(codes_of(&self.quantizer, self.latents(images_bchw)))
    }

    fn decode(&self, codes: &Codes) -> Result<Tensor<4>> {
        Ok(self.to_pixels(self.features(quantized_latents(&self.quantizer, &self.spec, codes)?)))
    }

    fn decode_prefix(&self, codes: &Codes, parts: usize) -> Result<Tensor<4>> {
        Ok(self.to_pixels(self.features(prefix_latents(&self.quantizer, &self.spec, codes, parts)?)))
    }

    fn train_forward(&self, images_bchw: Tensor<4>, pass: &Pass) -> TokenizerPass {
        let Quantized { latents_bchw, codes, terms, stats } =
            self.quantizer.train_forward(self.latents(images_bchw.clone()), pass);
        TokenizerPass {
            target_bchw: images_bchw,
            features: self.features(latents_bchw),
            codes: Some(codes),
            terms,
            stats: Some(stats),
        }
    }

    /// `[b, dim, h, w]` to images `[b, 3, h * p, w * p]` in about -1..1, not clamped.
    fn to_pixels(&self, features: Tensor<4>) -> Tensor<4> {
        self.to_pixel.pixels(features) * 2.0 - 1.0
    }

    /// `[dim, 3, patch, patch]`.
    fn last_weight(&self) -> Option<Tensor<4>> {
        Some(self.to_pixel.weight.val())
    }

    fn soft_codes(&self, images_bchw: Tensor<4>, temperature: f64, draw: Option<&mut Stream>) -> Result<Codes> {
        self.quantizer.soft_codes(self.latents(images_bchw), temperature, draw)
    }

    fn quantizer(&self) -> Option<&QuantizerModel> {
        Some(&self.quantizer)
    }

    fn update(&mut self, stats: &Stats, step: u64, stream: &mut Stream) -> UpdateReport {
        self.quantizer.update(stats, step, stream)
    }

    fn encoder_paths(&self) -> &'static [&'static str] {
        &["encoder.", "to_patch.", "pre_quant."]
    }
}
