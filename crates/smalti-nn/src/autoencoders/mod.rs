//! Convolutional encoders and decoders, and their blocks.

mod attn_block;
mod autoencoder;
mod resnet;

pub use attn_block::AttnBlock;
pub use autoencoder::{ConvAutoencoderConfig, ConvDecoder, ConvEncoder, DownLevel, Middle, UpLevel};
pub use resnet::{ResnetBlock, ResnetBlockConfig, Shortcut};
