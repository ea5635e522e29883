//! VQGAN: a convolutional autoencoder around a quantizer ("Taming Transformers for High-Resolution Image Synthesis",
//! arXiv 2012.09841). Field names are the keys of the official checkpoints. With the multi-scale quantizer and 3x3
//! convolutions around it, it is the tokenizer of VAR (arXiv 2404.02905).

use super::{
    Tokenizer, TokenizerPass, TokenizerSettings, codes_of, latents_on_grid, prefix_latents, quantized_latents,
};
use crate::Codes;
use crate::quantizers::{Pass, Quantized, QuantizerConfig, QuantizerModel, Stats, UpdateReport};
use crate::role::Described;
use crate::systems::Facts;
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Planes, Result, TokenSpec, rng::Stream};
use smalti_nn::{Conv, ConvAutoencoderConfig, ConvDecoder, ConvEncoder, Shortcut};

/// Settings of a [`Vqgan`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VqganConfig {
    /// Side of the images in pixels.
    pub image_size: usize,
    /// Channels of the images that go in: 3 for RGB, 1 for grey ones such as depth maps, the number of classes for label maps.
    #[serde(default = "rgb")]
    pub in_channels: usize,
    /// Channels of the images that come out, as many as go in.
    #[serde(default = "rgb")]
    pub out_channels: usize,
    /// Whether images are label maps: a pixel's class goes in as a one-hot vector and comes out as a score for each class (the
    /// official VQSegmentationModel).
    #[serde(default)]
    pub label_maps: bool,
    /// What is added to the labels of a file, see [`Planes::Labels`].
    #[serde(default)]
    pub label_shift: u8,
    /// Channels of the finest level are `ch * ch_mult[0]`.
    pub ch: usize,
    /// Channels of each level, fine to coarse; the side halves from one to the next.
    pub ch_mult: Vec<usize>,
    /// Residual blocks per level; the decoder has one more.
    pub num_res_blocks: usize,
    /// Sides of feature maps with attention after each block.
    #[serde(default)]
    pub attn_resolutions: Vec<usize>,
    /// Whether the middle has attention.
    #[serde(default = "yes")]
    pub mid_attention: bool,
    /// Dropout inside residual blocks.
    #[serde(default)]
    pub dropout: f64,
    /// Channels between the convolutional networks and the convolutions around the quantizer.
    pub z_channels: usize,
    /// Channels of the quantizer.
    pub embed_dim: usize,
    /// Side of the kernels of the convolutions around the quantizer, an odd number.
    #[serde(default = "pointwise")]
    pub quant_kernel: usize,
    /// Groups of the normalisations, at most as many as channels.
    #[serde(default = "groups")]
    pub norm_groups: usize,
    /// Added to variances.
    #[serde(default = "epsilon")]
    pub norm_epsilon: f64,
    /// Whether halving and doubling have a convolution.
    #[serde(default = "yes")]
    pub resamp_with_conv: bool,
    /// Shortcut of blocks that change the number of channels.
    #[serde(default)]
    pub shortcut: Shortcut,
    /// What turns latents into codes.
    pub quantizer: QuantizerConfig,
}

fn rgb() -> usize {
    3
}

fn pointwise() -> usize {
    1
}

fn yes() -> bool {
    true
}

fn groups() -> usize {
    32
}

fn epsilon() -> f64 {
    1e-6
}

impl Described for VqganConfig {
    const FACTS: Facts = Facts {
        arxiv: "2012.09841",
        tokens: "as its quantizer's",
        about: "convolutional autoencoder with a codebook (VQGAN, VAR)",
    };
}

impl VqganConfig {
    /// A model with fresh weights.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the numbers do not fit each other.
    pub fn init(&self, device: &Device) -> Result<Vqgan> {
        let spec = self.spec()?;
        let autoencoder = self.autoencoder();
        Ok(Vqgan {
            encoder: autoencoder.encoder(device),
            quant_conv: Conv::new(self.z_channels, self.embed_dim, self.quant_kernel, device),
            quantize: self.quantizer.init(device)?,
            post_quant_conv: Conv::new(self.embed_dim, self.z_channels, self.quant_kernel, device),
            decoder: autoencoder.decoder(device),
            planes: self.planes()?,
            spec,
        })
    }

    fn autoencoder(&self) -> ConvAutoencoderConfig {
        ConvAutoencoderConfig {
            image_size: self.image_size,
            in_channels: self.in_channels,
            out_channels: self.out_channels,
            ch: self.ch,
            ch_mult: self.ch_mult.clone(),
            num_res_blocks: self.num_res_blocks,
            attn_resolutions: self.attn_resolutions.clone(),
            mid_attention: self.mid_attention,
            dropout: self.dropout,
            z_channels: self.z_channels,
            norm_groups: self.norm_groups,
            norm_epsilon: self.norm_epsilon,
            resamp_with_conv: self.resamp_with_conv,
            shortcut: self.shortcut,
        }
    }
}

impl TokenizerSettings for VqganConfig {
    /// The tokens that the model makes of square latents of side `image_size / 2^(levels - 1)`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the numbers do not fit each other.
    fn spec(&self) -> Result<TokenSpec> {
        let autoencoder = self.autoencoder();
        autoencoder.check(PLACE)?;
        let channels = self.quantizer.channels();
        if self.embed_dim != channels {
            let problem = format!("embed_dim is {}, but the quantizer has {channels} channels", self.embed_dim);
            return Err(Error::invalid(PLACE, problem));
        }
        if self.in_channels != self.out_channels {
            let problem = format!(
                "in_channels is {}, but out_channels is {}: the model reconstructs its images, so they must be equal",
                self.in_channels, self.out_channels
            );
            return Err(Error::invalid(PLACE, problem));
        }
        self.planes()?;
        if self.quant_kernel.is_multiple_of(2) {
            return Err(Error::invalid(
                PLACE,
                format!("quant_kernel is {}, expected an odd number", self.quant_kernel),
            ));
        }
        let side = autoencoder.latent_size();
        let layout = self.quantizer.layout(side, side)?;
        Ok(TokenSpec::discrete(layout, self.quantizer.vocabulary(), (self.image_size, self.image_size)))
    }

    /// What the images are.
    ///
    /// # Errors
    /// [`Error::Unsupported`] or [`Error::Invalid`] for a number of channels that no image has.
    fn planes(&self) -> Result<Planes> {
        match (self.label_maps, self.in_channels) {
            (false, _) if self.label_shift > 0 => {
                Err(Error::invalid(PLACE, "label_shift is for label maps: add label_maps = true, or leave it out"))
            }
            (false, channels) => Planes::of_channels(channels),
            (true, classes @ 2..=256) => Ok(Planes::Labels { classes, shift: self.label_shift }),
            (true, n) => {
                Err(Error::invalid(PLACE, format!("label maps with in_channels = {n}; expected 2 to 256 classes")))
            }
        }
    }

    fn any_size(&self) -> bool {
        true
    }

    fn official(&self) -> Option<&'static str> {
        self.quantizer.official()
    }
}

const PLACE: &str = "tokenizer (vqgan)";

/// The autoencoder with its quantizer. Images are in -1..1, or label maps.
#[derive(Module, Debug)]
pub struct Vqgan {
    /// Images to `z_channels`.
    pub encoder: ConvEncoder,
    /// `z_channels` to `embed_dim`.
    pub quant_conv: Conv,
    /// Latents to codes and back.
    pub quantize: QuantizerModel,
    /// `embed_dim` to `z_channels`.
    pub post_quant_conv: Conv,
    /// `z_channels` to images.
    pub decoder: ConvDecoder,
    #[module(skip)]
    planes: Planes,
    #[module(skip)]
    spec: TokenSpec,
}

impl Vqgan {
    /// Images `[b, c, h, w]` as the encoder sees them, `[b, in_channels, h, w]`: labels as one-hot vectors, pictures as they are.
    pub fn seen(&self, images_bchw: Tensor<4>) -> Tensor<4> {
        let Planes::Labels { classes, .. } = self.planes else { return images_bchw };
        let [b, _, h, w] = images_bchw.dims();
        let numbers = Tensor::<1, Int>::arange(0..classes as i64, &images_bchw.device()).float();
        let size = [b, classes, h, w];
        images_bchw.expand(size).equal(numbers.reshape([1, classes, 1, 1]).expand(size)).float()
    }

    /// Images `[b, c, h, w]` to latents `[b, embed_dim, h / f, w / f]` before quantization.
    pub fn latents(&self, images_bchw: Tensor<4>) -> Tensor<4> {
        self.quant_conv.forward(self.encoder.forward(self.seen(images_bchw)))
    }

    /// Quantized latents `[b, embed_dim, h, w]` to what the decoder's last convolution sees, `[b, ch, h * f, w * f]`.
    pub fn features(&self, latents_bchw: Tensor<4>) -> Tensor<4> {
        self.decoder.features(self.post_quant_conv.forward(latents_bchw))
    }

    /// Quantized latents as images: the most likely labels `[b, 1, h, w]`, pictures as they are.
    fn images(&self, latents_bchw: Tensor<4>) -> Tensor<4> {
        let pixels = self.to_pixels(self.features(latents_bchw));
        if self.planes.are_labels() { pixels.argmax(1).float() } else { pixels }
    }
}

impl Tokenizer for Vqgan {
    fn spec(&self) -> &TokenSpec {
        &self.spec
    }

    fn planes(&self) -> Planes {
        self.planes
    }

    fn encode(&self, images_bchw: Tensor<4>) -> Result<Codes> {
        Ok(codes_of(&self.quantize, self.latents(images_bchw)))
    }

    fn decode(&self, codes: &Codes) -> Result<Tensor<4>> {
        quantized_latents(&self.quantize, &self.spec, codes).map(|latents| self.images(latents))
    }

    fn decode_prefix(&self, codes: &Codes, parts: usize) -> Result<Tensor<4>> {
        prefix_latents(&self.quantize, &self.spec, codes, parts).map(|latents| self.images(latents))
    }

    fn decode_grid(&self, codes: &Codes, grid: (usize, usize)) -> Result<Tensor<4>> {
        latents_on_grid(&self.quantize, &self.spec, codes, grid).map(|latents| self.images(latents))
    }

    fn train_forward(&self, images_bchw: Tensor<4>, pass: &Pass) -> TokenizerPass {
        let Quantized { latents_bchw, codes, terms, stats } =
            self.quantize.train_forward(self.latents(images_bchw.clone()), pass);
        TokenizerPass {
            target_bchw: self.seen(images_bchw),
            features: self.features(latents_bchw),
            codes: Some(codes),
            terms,
            stats: Some(stats),
        }
    }

    /// The decoder's last convolution: `[b, ch, h, w]` to images `[b, out_channels, h, w]`, not clamped; scores (logits) of label maps.
    fn to_pixels(&self, features: Tensor<4>) -> Tensor<4> {
        self.decoder.conv_out.forward(features)
    }

    /// `[out_channels, ch, 3, 3]`.
    fn last_weight(&self) -> Option<Tensor<4>> {
        Some(self.decoder.conv_out.weight.val())
    }

    fn soft_codes(&self, images_bchw: Tensor<4>, temperature: f64, draw: Option<&mut Stream>) -> Result<Codes> {
        self.quantize.soft_codes(self.latents(images_bchw), temperature, draw)
    }

    fn quantizer(&self) -> Option<&QuantizerModel> {
        Some(&self.quantize)
    }

    fn update(&mut self, stats: &Stats, step: u64, stream: &mut Stream) -> UpdateReport {
        self.quantize.update(stats, step, stream)
    }

    fn encoder_paths(&self) -> &'static [&'static str] {
        &["encoder.", "quant_conv."]
    }
}
