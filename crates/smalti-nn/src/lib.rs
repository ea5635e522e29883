//! Layers and networks that several systems share.
//!
//! Layers are Burn modules with public named fields. Their names differ from Burn's own layers on purpose: Burn's checkpoint
//! adapters act on type names.

pub mod attention;
pub mod attn_block;
pub mod autoencoder;
pub mod cache;
pub mod conv;
pub mod dense;
pub mod init;
pub mod mobilenet_v2;
pub mod norm;
pub mod patchgan;
pub mod positions;
pub mod resample;
pub mod resize;
pub mod resnet;
pub mod stylegan;
pub mod transformer;
pub mod vgg16;
pub mod vit;

pub use attn_block::AttnBlock;
pub use autoencoder::{ConvAutoencoderConfig, ConvDecoder, ConvEncoder};
pub use conv::Conv;
pub use mobilenet_v2::MobileNetV2;
pub use norm::Norm;
pub use patchgan::{PatchGan, PatchGanConfig};
pub use resample::{Downsample, Upsample};
pub use resize::{Interpolation, Resize};
pub use resnet::{ResnetBlock, ResnetBlockConfig, Shortcut};
pub use stylegan::{StyleGan, StyleGanConfig};
pub use vgg16::Vgg16;
pub use vit::{FeedForward, VitConfig, VitTransformer};
