//! KL autoencoder: VQGAN's convolutional networks around a normal distribution instead of a codebook ("High-Resolution Image
//! Synthesis with Latent Diffusion Models", arXiv 2112.10752). Its tokens are vectors.
//!
//! The released KL-f4 to KL-f32 of latent-diffusion, Stable Diffusion's VAE, and MAR's KL-16 (arXiv 2406.11838), whose
//! decoder has attention in the middle only. Field names are the keys of latent-diffusion's checkpoints.

use super::patches::{patchify, unpatchify};
use super::{TokenMoments, Tokenizer, TokenizerPass, TokenizerSettings, vectors};
use crate::Codes;
use crate::losses::LossTerm;
use crate::quantizers::Pass;
use crate::role::Described;
use crate::systems::Facts;
use burn::module::Module;
use burn::tensor::{Device, Distribution, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Layout, Result, TokenSpec};
use smalti_nn::{Conv, ConvAutoencoderConfig, ConvDecoder, ConvEncoder, Shortcut};

/// Settings of a [`Kl`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KlConfig {
    /// Side of the images in pixels.
    pub image_size: usize,
    /// Channels of the finest level are `ch * ch_mult[0]`.
    pub ch: usize,
    /// Channels of each level, fine to coarse; the side halves from one to the next.
    pub ch_mult: Vec<usize>,
    /// Residual blocks per level; the decoder has one more.
    pub num_res_blocks: usize,
    /// Sides of the encoder's feature maps with attention after each block.
    #[serde(default)]
    pub encoder_attn_resolutions: Vec<usize>,
    /// The same for the decoder.
    #[serde(default)]
    pub decoder_attn_resolutions: Vec<usize>,
    /// Whether the middle has attention.
    #[serde(default = "yes")]
    pub mid_attention: bool,
    /// Dropout inside residual blocks.
    #[serde(default)]
    pub dropout: f64,
    /// Half of the channels that the encoder makes, and the channels that the decoder takes.
    pub z_channels: usize,
    /// Channels of the latents.
    pub embed_dim: usize,
    /// Whether a 1x1 convolution follows the encoder; without one `embed_dim` is `z_channels`.
    #[serde(default = "yes")]
    pub quant_conv: bool,
    /// Whether a 1x1 convolution is before the decoder.
    #[serde(default = "yes")]
    pub post_quant_conv: bool,
    /// Groups of the normalisations, at most as many as channels.
    #[serde(default = "groups")]
    pub norm_groups: usize,
    /// Added to variances.
    #[serde(default = "epsilon")]
    pub norm_epsilon: f64,
    /// Tokens are `(latents - latent_shift) * latent_scale`; the scale should make their deviation about 1. If it is left out,
    /// training measures it in the end and writes it into the bundle; until then it is 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latent_scale: Option<f64>,
    /// See `latent_scale`.
    #[serde(default)]
    pub latent_shift: f64,
    /// A token is a square of so many latents a side.
    #[serde(default = "one_latent")]
    pub patch_size: usize,
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

fn one_latent() -> usize {
    1
}

const PLACE: &str = "tokenizer (kl)";
const CHANNELS: usize = 3;
/// The usual weight of the divergence.
const KL_WEIGHT: f64 = 1e-6;

impl Described for KlConfig {
    const FACTS: Facts = Facts {
        arxiv: "2112.10752",
        tokens: "grid of vectors",
        about: "convolutional autoencoder with normal latents (KL autoencoder of latent diffusion, MAR's KL-16)",
    };
}

impl KlConfig {
    /// A model with fresh weights.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the numbers do not fit each other.
    pub fn init(&self, device: &Device) -> Result<Kl> {
        let spec = self.spec()?;
        let (z, embed) = (self.z_channels, self.embed_dim);
        Ok(Kl {
            encoder: self.encoder().encoder(device),
            quant_conv: self.quant_conv.then(|| Conv::new(2 * z, 2 * embed, 1, device)),
            post_quant_conv: self.post_quant_conv.then(|| Conv::new(embed, z, 1, device)),
            decoder: self.decoder().decoder(device),
            config: self.clone(),
            spec,
        })
    }

    fn scale(&self) -> f64 {
        self.latent_scale.unwrap_or(1.0)
    }

    fn encoder(&self) -> ConvAutoencoderConfig {
        self.network(2 * self.z_channels, &self.encoder_attn_resolutions)
    }

    fn decoder(&self) -> ConvAutoencoderConfig {
        self.network(self.z_channels, &self.decoder_attn_resolutions)
    }

    fn network(&self, z_channels: usize, attn_resolutions: &[usize]) -> ConvAutoencoderConfig {
        ConvAutoencoderConfig {
            image_size: self.image_size,
            in_channels: CHANNELS,
            out_channels: CHANNELS,
            ch: self.ch,
            ch_mult: self.ch_mult.clone(),
            num_res_blocks: self.num_res_blocks,
            attn_resolutions: attn_resolutions.to_vec(),
            mid_attention: self.mid_attention,
            dropout: self.dropout,
            z_channels,
            norm_groups: self.norm_groups,
            norm_epsilon: self.norm_epsilon,
            resamp_with_conv: true,
            shortcut: Shortcut::Pointwise,
        }
    }
}

impl TokenizerSettings for KlConfig {
    /// The tokens that the model makes: a square grid of vectors.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the numbers do not fit each other.
    fn spec(&self) -> Result<TokenSpec> {
        let refuse = |problem: String| Err(Error::invalid(PLACE, problem));
        for (part, network) in [("encoder", self.encoder()), ("decoder", self.decoder())] {
            network.check(&format!("{PLACE}: {part}"))?;
        }
        let (side, patch) = (self.decoder().latent_size(), self.patch_size);
        if self.embed_dim == 0 {
            return refuse("embed_dim must be at least 1".into());
        }
        if self.embed_dim != self.z_channels && !(self.quant_conv && self.post_quant_conv) {
            let (embed, z) = (self.embed_dim, self.z_channels);
            return refuse(format!("embed_dim {embed} and z_channels {z} differ, which takes both 1x1 convolutions"));
        }
        if patch == 0 || !side.is_multiple_of(patch) {
            return refuse(format!("patch_size {patch} does not divide the {side} latents of a side"));
        }
        let (scale, shift) = (self.scale(), self.latent_shift);
        if !(scale.is_finite() && scale > 0.0 && shift.is_finite()) {
            return refuse(format!("latent_scale {scale} must be above 0, and latent_shift {shift} a number"));
        }
        let layout = Layout::Grid { h: side / patch, w: side / patch };
        let size = (self.image_size, self.image_size);
        Ok(TokenSpec::continuous(layout, self.embed_dim * patch * patch, size))
    }

    fn official(&self) -> Option<&'static str> {
        Some("autoencoder-kl")
    }

    fn open_scale(&mut self) -> Option<&mut Option<f64>> {
        self.latent_scale.is_none().then_some(&mut self.latent_scale)
    }
}

/// What an encoder says of an image: each latent is normal by itself.
#[derive(Clone, Debug)]
pub struct Posterior {
    /// Means `[b, c, h, w]`, which are also the most likely latents.
    pub mean_bchw: Tensor<4>,
    /// Logarithms of the variances, clamped to -30..=20.
    pub log_variance_bchw: Tensor<4>,
}

impl Posterior {
    /// From the encoder's `[b, 2 c, h, w]`, means first.
    pub fn new(moments_bchw: Tensor<4>) -> Self {
        let c = moments_bchw.dims()[1] / 2;
        let log_variance = moments_bchw.clone().narrow(1, c, c).clamp(-30.0, 20.0);
        Self { mean_bchw: moments_bchw.narrow(1, 0, c), log_variance_bchw: log_variance }
    }

    /// Standard deviations `[b, c, h, w]`.
    pub fn deviation(&self) -> Tensor<4> {
        (self.log_variance_bchw.clone() * 0.5).exp()
    }

    /// Latents for given standard normal noise `[b, c, h, w]`.
    pub fn sample(&self, noise_bchw: Tensor<4>) -> Tensor<4> {
        self.mean_bchw.clone() + self.deviation() * noise_bchw
    }

    /// The divergence from a standard normal distribution of each image, summed over its latents, `[b]`.
    pub fn divergence(&self) -> Tensor<1> {
        let [b, ..] = self.mean_bchw.dims();
        let log_variance = self.log_variance_bchw.clone();
        let terms = self.mean_bchw.clone().square() + log_variance.clone().exp() - log_variance - 1.0;
        terms.reshape([b as i32, -1]).sum_dim(1).reshape([b]) * 0.5
    }
}

/// The autoencoder. Images are in -1..1.
#[derive(Module, Debug)]
pub struct Kl {
    /// Images to `2 * z_channels`.
    pub encoder: ConvEncoder,
    /// `2 * z_channels` to `2 * embed_dim`, 1x1.
    pub quant_conv: Option<Conv>,
    /// `embed_dim` to `z_channels`, 1x1.
    pub post_quant_conv: Option<Conv>,
    /// `z_channels` to images.
    pub decoder: ConvDecoder,
    /// What the network was made from.
    #[module(skip)]
    pub config: KlConfig,
    #[module(skip)]
    spec: TokenSpec,
}

impl Kl {
    /// Images `[b, 3, h, w]` to means and log-variances `[b, 2 * embed_dim, h / f, w / f]`; see [`Posterior::new`].
    pub fn moments(&self, images_bchw: Tensor<4>) -> Tensor<4> {
        let x = self.encoder.forward(images_bchw);
        match &self.quant_conv {
            Some(conv) => conv.forward(x),
            None => x,
        }
    }

    /// Standard normal noise for latents like these, from the device's generator.
    pub fn noise(moments_bchw: &Tensor<4>) -> Tensor<4> {
        let [b, c, h, w] = moments_bchw.dims();
        let device = moments_bchw.device().without_autodiff();
        Tensor::random([b, c / 2, h, w], Distribution::Normal(0.0, 1.0), &device)
    }

    /// Latents `[b, embed_dim, h, w]` as tokens `[b, n, c]`.
    pub fn tokens(&self, latents_bchw: Tensor<4>) -> Tensor<3> {
        let KlConfig { latent_shift, patch_size, .. } = self.config;
        let shifted = if latent_shift == 0.0 { latents_bchw } else { latents_bchw - latent_shift };
        patchify(shifted * self.config.scale(), patch_size)
    }

    /// Tokens `[b, n, c]` as latents `[b, embed_dim, h, w]`.
    pub fn latents(&self, tokens_bnc: Tensor<3>) -> Tensor<4> {
        let side = self.config.decoder().latent_size();
        let scaled = unpatchify(tokens_bnc, self.config.patch_size, (side, side));
        scaled / self.config.scale() + self.config.latent_shift
    }

    /// Latents `[b, embed_dim, h, w]` to what the decoder's last convolution sees, `[b, ch, h * f, w * f]`.
    pub fn features(&self, latents_bchw: Tensor<4>) -> Tensor<4> {
        let x = match &self.post_quant_conv {
            Some(conv) => conv.forward(latents_bchw),
            None => latents_bchw,
        };
        self.decoder.features(x)
    }
}

impl Tokenizer for Kl {
    fn spec(&self) -> &TokenSpec {
        &self.spec
    }

    fn encode(&self, images_bchw: Tensor<4>) -> Result<Codes> {
        Ok(Codes::Continuous(self.tokens(Posterior::new(self.moments(images_bchw)).mean_bchw)))
    }

    fn decode(&self, codes: &Codes) -> Result<Tensor<4>> {
        Ok(self.to_pixels(self.features(self.latents(vectors(&self.spec, codes)?.clone()))))
    }

    /// Its own term, `kl`, is the divergence of the latents from a standard normal distribution, summed over an image, mean over images.
    fn train_forward(&self, images_bchw: Tensor<4>, pass: &Pass) -> TokenizerPass {
        let moments = self.moments(images_bchw.clone());
        let noise = pass.noise_bchw.clone().unwrap_or_else(|| Self::noise(&moments));
        let posterior = Posterior::new(moments);
        TokenizerPass {
            target_bchw: images_bchw,
            features: self.features(posterior.sample(noise)),
            codes: None,
            terms: vec![LossTerm::weighted("kl", posterior.divergence().mean(), KL_WEIGHT)],
            stats: None,
        }
    }

    /// The decoder's last convolution: `[b, ch, h, w]` to images `[b, 3, h, w]`, not clamped.
    fn to_pixels(&self, features: Tensor<4>) -> Tensor<4> {
        self.decoder.conv_out.forward(features)
    }

    fn last_weight(&self) -> Option<Tensor<4>> {
        Some(self.decoder.conv_out.weight.val())
    }

    fn token_moments(&self, images_bchw: Tensor<4>) -> Option<TokenMoments> {
        let posterior = Posterior::new(self.moments(images_bchw));
        let deviations = patchify(posterior.deviation() * self.config.scale(), self.config.patch_size);
        Some(TokenMoments { means_bnc: self.tokens(posterior.mean_bchw), deviations_bnc: Some(deviations) })
    }

    fn encoder_paths(&self) -> &'static [&'static str] {
        &["encoder.", "quant_conv."]
    }
}
