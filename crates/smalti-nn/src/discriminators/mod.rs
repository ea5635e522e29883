//! Networks that tell images from reconstructions.

mod patchgan;
mod stylegan;

pub use patchgan::{PatchGan, PatchGanConfig, PatchStage};
pub use stylegan::{ScaledConv, ScaledDense, StyleBlock, StyleGan, StyleGanConfig};
