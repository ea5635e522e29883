//! The convolutional autoencoder of VQGAN (arXiv 2012.09841), which a dozen systems use with small differences.

use crate::{AttnBlock, Conv, Downsample, Norm, ResnetBlock, ResnetBlockConfig, Shortcut, Upsample};
use burn::module::Module;
use burn::tensor::{Device, Tensor};
use smalti_base::{Error, Result};

/// Settings of a [`ConvEncoder`] and [`ConvDecoder`].
#[derive(Clone, Debug)]
pub struct ConvAutoencoderConfig {
    /// Side of the images in pixels. It only places the attention: networks run on other sizes too.
    pub image_size: usize,
    /// Channels of the encoder's input.
    pub in_channels: usize,
    /// Channels of the decoder's output.
    pub out_channels: usize,
    /// Channels of the finest level are `ch * ch_mult[0]`.
    pub ch: usize,
    /// Channels of each level, fine to coarse; the side halves from one to the next.
    pub ch_mult: Vec<usize>,
    /// Residual blocks per level; the decoder has one more.
    pub num_res_blocks: usize,
    /// Sides of feature maps with attention after each block.
    pub attn_resolutions: Vec<usize>,
    /// Whether the middle has attention.
    pub mid_attention: bool,
    /// Dropout inside residual blocks.
    pub dropout: f64,
    /// Channels of the latents.
    pub z_channels: usize,
    /// Groups of the normalisations.
    pub norm_groups: usize,
    /// Added to variances.
    pub norm_epsilon: f64,
    /// Whether halving and doubling have a convolution.
    pub resamp_with_conv: bool,
    /// Shortcut of blocks that change the number of channels.
    pub shortcut: Shortcut,
}

impl ConvAutoencoderConfig {
    /// Side of the latents.
    pub fn latent_size(&self) -> usize {
        self.image_size >> self.ch_mult.len().saturating_sub(1)
    }

    /// Checks that the numbers fit each other.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the key and what was expected.
    pub fn check(&self, place: &str) -> Result<()> {
        let wrong = |problem: String| Err(Error::invalid(place, problem));
        let positive = [
            ("image_size", self.image_size),
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("ch", self.ch),
            ("z_channels", self.z_channels),
            ("norm_groups", self.norm_groups),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return wrong(format!("{key} must be at least 1"));
        }
        if self.ch_mult.is_empty() || self.ch_mult.len() > 16 || self.ch_mult.contains(&0) {
            return wrong(format!("ch_mult needs 1 to 16 factors of at least 1, but is {:?}", self.ch_mult));
        }
        let factor = 1usize << (self.ch_mult.len() - 1);
        if !self.image_size.is_multiple_of(factor) {
            return wrong(format!(
                "image_size {} is not a multiple of {factor} (ch_mult has {} levels)",
                self.image_size,
                self.ch_mult.len()
            ));
        }
        for channels in std::iter::once(self.ch).chain(self.ch_mult.iter().map(|mult| mult * self.ch)) {
            let groups = self.norm_groups.min(channels);
            if !channels.is_multiple_of(groups) {
                return wrong(format!("norm_groups {groups} does not divide {channels} channels"));
            }
        }
        let sides: Vec<usize> = (0..self.ch_mult.len()).map(|level| self.image_size >> level).collect();
        if let Some(side) = self.attn_resolutions.iter().find(|side| !sides.contains(side)) {
            return wrong(format!("attn_resolutions has {side}, but feature maps are {sides:?} pixels wide"));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return wrong(format!("dropout {} is not in 0..1", self.dropout));
        }
        if !(self.norm_epsilon > 0.0 && self.norm_epsilon < 1.0) {
            return wrong(format!("norm_epsilon {} is not between 0 and 1", self.norm_epsilon));
        }
        Ok(())
    }

    /// A fresh encoder. The settings must pass [`Self::check`].
    pub fn encoder(&self, device: &Device) -> ConvEncoder {
        let mut inputs = self.ch;
        let last = self.ch_mult.len() - 1;
        let down = self.ch_mult.iter().enumerate().map(|(level, mult)| {
            let (block, attn) = self.level(inputs, mult * self.ch, level, self.num_res_blocks, device);
            inputs = mult * self.ch;
            let downsample = (level < last).then(|| Downsample::new(inputs, self.resamp_with_conv, device));
            DownLevel { block, attn, downsample }
        });
        ConvEncoder {
            conv_in: Conv::new(self.in_channels, self.ch, 3, device),
            down: down.collect(),
            mid: self.mid(device),
            norm_out: self.norm(self.coarsest(), device),
            conv_out: Conv::new(self.coarsest(), self.z_channels, 3, device),
        }
    }

    /// A fresh decoder. The settings must pass [`Self::check`].
    pub fn decoder(&self, device: &Device) -> ConvDecoder {
        let mut inputs = self.coarsest();
        let up = self.ch_mult.iter().enumerate().rev().map(|(level, mult)| {
            let (block, attn) = self.level(inputs, mult * self.ch, level, self.num_res_blocks + 1, device);
            inputs = mult * self.ch;
            let upsample = (level > 0).then(|| Upsample::new(inputs, self.resamp_with_conv, device));
            UpLevel { block, attn, upsample }
        });
        let mut up: Vec<UpLevel> = up.collect();
        up.reverse();
        ConvDecoder {
            conv_in: Conv::new(self.z_channels, self.coarsest(), 3, device),
            mid: self.mid(device),
            up,
            norm_out: self.norm(inputs, device),
            conv_out: Conv::new(inputs, self.out_channels, 3, device),
        }
    }

    fn coarsest(&self) -> usize {
        self.ch * self.ch_mult.last().copied().unwrap_or(1)
    }

    fn norm(&self, channels: usize, device: &Device) -> Norm {
        Norm::new(channels, self.norm_groups, self.norm_epsilon, device)
    }

    fn block(&self, inputs: usize, outputs: usize, device: &Device) -> ResnetBlock {
        ResnetBlockConfig {
            shortcut: self.shortcut,
            norm_groups: self.norm_groups,
            epsilon: self.norm_epsilon,
            dropout: self.dropout,
            ..ResnetBlockConfig::new(inputs, outputs)
        }
        .init(device)
    }

    fn attention(&self, channels: usize, device: &Device) -> AttnBlock {
        AttnBlock::new(channels, self.norm_groups, self.norm_epsilon, device)
    }

    fn level(
        &self,
        inputs: usize,
        outputs: usize,
        level: usize,
        blocks: usize,
        device: &Device,
    ) -> (Vec<ResnetBlock>, Vec<AttnBlock>) {
        let block = |n| self.block(if n == 0 { inputs } else { outputs }, outputs, device);
        let attends = self.attn_resolutions.contains(&(self.image_size >> level));
        let attentions = if attends { blocks } else { 0 };
        ((0..blocks).map(block).collect(), (0..attentions).map(|_| self.attention(outputs, device)).collect())
    }

    fn mid(&self, device: &Device) -> Middle {
        let channels = self.coarsest();
        Middle {
            block_1: self.block(channels, channels, device),
            attn_1: self.mid_attention.then(|| self.attention(channels, device)),
            block_2: self.block(channels, channels, device),
        }
    }
}

/// Images to latents.
#[derive(Module, Debug)]
pub struct ConvEncoder {
    /// First convolution.
    pub conv_in: Conv,
    /// Levels, fine to coarse.
    pub down: Vec<DownLevel>,
    /// Coarsest blocks.
    pub mid: Middle,
    /// Last normalisation.
    pub norm_out: Norm,
    /// Last convolution.
    pub conv_out: Conv,
}

/// A level of the encoder.
#[derive(Module, Debug)]
pub struct DownLevel {
    /// Residual blocks.
    pub block: Vec<ResnetBlock>,
    /// Attention after each block, or none.
    pub attn: Vec<AttnBlock>,
    /// To the next level.
    pub downsample: Option<Downsample>,
}

/// The coarsest blocks.
#[derive(Module, Debug)]
pub struct Middle {
    /// First block.
    pub block_1: ResnetBlock,
    /// Attention.
    pub attn_1: Option<AttnBlock>,
    /// Second block.
    pub block_2: ResnetBlock,
}

/// Latents to images.
#[derive(Module, Debug)]
pub struct ConvDecoder {
    /// First convolution.
    pub conv_in: Conv,
    /// Coarsest blocks.
    pub mid: Middle,
    /// Levels by index, fine to coarse, although the coarse ones run first.
    pub up: Vec<UpLevel>,
    /// Last normalisation.
    pub norm_out: Norm,
    /// Last convolution.
    pub conv_out: Conv,
}

/// A level of the decoder.
#[derive(Module, Debug)]
pub struct UpLevel {
    /// Residual blocks.
    pub block: Vec<ResnetBlock>,
    /// Attention after each block, or none.
    pub attn: Vec<AttnBlock>,
    /// To the next finer level.
    pub upsample: Option<Upsample>,
}

impl ConvEncoder {
    /// Images `[b, in_channels, h, w]` to latents `[b, z_channels, h / f, w / f]`.
    pub fn forward(&self, images_bchw: Tensor<4>) -> Tensor<4> {
        let mut x = self.conv_in.forward(images_bchw);
        for level in &self.down {
            x = run_level(&level.block, &level.attn, x);
            if let Some(downsample) = &level.downsample {
                x = downsample.forward(x);
            }
        }
        self.conv_out.forward(self.norm_out.forward_silu(self.mid.forward(x)))
    }
}

impl Middle {
    fn forward(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        let mut x = self.block_1.forward(x_bchw);
        if let Some(attention) = &self.attn_1 {
            x = attention.forward(x);
        }
        self.block_2.forward(x)
    }
}

impl ConvDecoder {
    /// Latents `[b, z_channels, h, w]` to what the last convolution sees, `[b, c, h * f, w * f]`.
    pub fn features(&self, latents_bchw: Tensor<4>) -> Tensor<4> {
        let mut x = self.mid.forward(self.conv_in.forward(latents_bchw));
        for level in self.up.iter().rev() {
            x = run_level(&level.block, &level.attn, x);
            if let Some(upsample) = &level.upsample {
                x = upsample.forward(x);
            }
        }
        self.norm_out.forward_silu(x)
    }

    /// Latents `[b, z_channels, h, w]` to images `[b, out_channels, h * f, w * f]`, not clamped.
    pub fn forward(&self, latents_bchw: Tensor<4>) -> Tensor<4> {
        self.conv_out.forward(self.features(latents_bchw))
    }
}

fn run_level(blocks: &[ResnetBlock], attentions: &[AttnBlock], x_bchw: Tensor<4>) -> Tensor<4> {
    let mut x = x_bchw;
    for (index, block) in blocks.iter().enumerate() {
        x = block.forward(x);
        if let Some(attention) = attentions.get(index) {
            x = attention.forward(x);
        }
    }
    x
}
