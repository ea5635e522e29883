//! Patches of pixels as tokens: a tokenizer without weights that loses nothing.
//!
//! Raw pixels are what MAR's appendix generates at 64 pixels, 4x4 of them a token (arXiv 2406.11838). The order inside a
//! token is that of MAR everywhere: channel, row, column.

use super::{TokenMoments, Tokenizer, TokenizerPass, TokenizerSettings, vectors};
use crate::Codes;
use crate::quantizers::Pass;
use crate::role::Described;
use crate::systems::Facts;
use burn::module::Module;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Layout, Result, TokenSpec};

const CHANNELS: usize = 3;

/// Settings of [`Patches`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatchesConfig {
    /// Side of the images in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
}

impl Described for PatchesConfig {
    const FACTS: Facts = Facts {
        arxiv: "2406.11838",
        tokens: "grid of vectors",
        about: "patches of unchanged pixels, nothing to train",
    };
}

impl PatchesConfig {
    /// The tokenizer.
    ///
    /// # Errors
    /// As [`TokenizerSettings::spec`].
    pub fn init(&self, _: &Device) -> Result<Patches> {
        Ok(Patches { patch_size: self.patch_size, spec: self.spec()? })
    }
}

impl TokenizerSettings for PatchesConfig {
    /// The tokens that it makes: one for each patch.
    ///
    /// # Errors
    /// [`Error::Invalid`] if patches do not fill the image.
    fn spec(&self) -> Result<TokenSpec> {
        let (size, patch) = (self.image_size, self.patch_size);
        if size == 0 || patch == 0 || !size.is_multiple_of(patch) {
            let problem = format!("image_size {size} is not a multiple of patch_size {patch}");
            return Err(Error::invalid("tokenizer (patches)", problem));
        }
        let layout = Layout::Grid { h: size / patch, w: size / patch };
        Ok(TokenSpec::continuous(layout, CHANNELS * patch * patch, (size, size)))
    }
}

/// Cuts images in -1..1 into patches and puts them together again.
#[derive(Module, Debug)]
pub struct Patches {
    patch_size: usize,
    #[module(skip)]
    spec: TokenSpec,
}

impl Tokenizer for Patches {
    fn spec(&self) -> &TokenSpec {
        &self.spec
    }

    fn encode(&self, images_bchw: Tensor<4>) -> Result<Codes> {
        Ok(Codes::Continuous(patchify(images_bchw, self.patch_size)))
    }

    /// The exact inverse of [`Tokenizer::encode`].
    fn decode(&self, codes: &Codes) -> Result<Tensor<4>> {
        Ok(unpatchify(vectors(&self.spec, codes)?.clone(), self.patch_size, self.spec.image_size))
    }

    fn train_forward(&self, images_bchw: Tensor<4>, _: &Pass) -> TokenizerPass {
        let features = images_bchw.clone();
        TokenizerPass { target_bchw: images_bchw, features, codes: None, terms: Vec::new(), stats: None }
    }

    fn to_pixels(&self, features: Tensor<4>) -> Tensor<4> {
        features
    }

    fn token_moments(&self, images_bchw: Tensor<4>) -> Option<TokenMoments> {
        Some(TokenMoments { means_bnc: patchify(images_bchw, self.patch_size), deviations_bnc: None })
    }
}

/// Maps `[b, c, h, w]` to tokens `[b, h / p * w / p, c * p * p]` in raster order; `p` must divide both sides.
pub fn patchify(maps_bchw: Tensor<4>, p: usize) -> Tensor<3> {
    let [b, c, h, w] = maps_bchw.dims();
    let patches = maps_bchw.reshape([b, c, h / p, p, w / p, p]).permute([0, 2, 4, 1, 3, 5]);
    patches.reshape([b, h / p * (w / p), c * p * p])
}

/// Tokens `[b, n, c * p * p]` to maps `[b, c, h, w]`: the exact inverse of [`patchify`].
pub fn unpatchify(tokens_bnc: Tensor<3>, p: usize, (h, w): (usize, usize)) -> Tensor<4> {
    let [b, _, channels] = tokens_bnc.dims();
    let c = channels / (p * p);
    let patches = tokens_bnc.reshape([b, h / p, w / p, c, p, p]).permute([0, 3, 1, 4, 2, 5]);
    patches.reshape([b, c, h, w])
}
