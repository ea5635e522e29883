//! Layers and networks that several systems share.
//!
//! Layers are Burn modules with public named fields. Their names differ from Burn's own layers on purpose: Burn's checkpoint
//! adapters act on type names.

mod autoencoders;
mod discriminators;
mod layers;
mod perceptual;
mod transformers;

pub use autoencoders::{
    AttnBlock, ConvAutoencoderConfig, ConvDecoder, ConvEncoder, DownLevel, Middle, ResnetBlock, ResnetBlockConfig,
    Shortcut, UpLevel,
};
pub use discriminators::{
    PatchGan, PatchGanConfig, PatchStage, ScaledConv, ScaledDense, StyleBlock, StyleGan, StyleGanConfig,
};
pub use layers::{BatchStatistics, Conv, Downsample, Interpolation, Norm, Resize, Upsample, dense, init, positions};
pub use perceptual::{MobileNetV2, Vgg16, mobilenet_v2, vgg16};
pub use transformers::{attention, cache, transformer, vit};
