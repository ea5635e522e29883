//! VQGAN: images to codes and back.

use super::inputs::{self, Inputs};
use super::{Outputs, Task};
use crate::rows::Row;
use burn::tensor::{Device, Int, Tensor};
use smalti::base::{Error, Result};
use smalti::models::Codes;
use smalti::models::checkpoint::Rules;
use smalti::models::tokenizers::{TokenizerConfig, TokenizerModel};
use std::path::Path;

/// The row's tokenizer with the shared weights.
pub fn tokenizer(row: &Row, folder: &Path, device: &Device) -> Result<TokenizerModel> {
    let config: TokenizerConfig = inputs::model(row)?;
    inputs::import(&Rules::builtin("vqgan", "tokenizer")?, config.init(device)?, folder)
}

/// Images to codes.
pub struct Encode {
    model: TokenizerModel,
    images: Tensor<4>,
}

impl Encode {
    /// Reads weights and images.
    pub fn open(row: &Row, folder: &Path) -> Result<Self> {
        let device = Device::flex();
        let images = Inputs::read(folder, &device)?.floats("images")?;
        Ok(Self { model: tokenizer(row, folder, &device)?, images })
    }

    fn codes(&self) -> Result<Tensor<2, Int>> {
        let codes = self.model.encode(self.images.clone())?.discrete();
        codes.ok_or_else(|| Error::invalid("vqgan", "its codes are not discrete"))
    }
}

impl Task for Encode {
    fn check(&mut self) -> Result<Outputs> {
        let TokenizerModel::Vqgan(model) = &self.model else {
            return Err(Error::invalid("vqgan", "the row's tokenizer is of another kind"));
        };
        let latents = inputs::floats(model.latents(self.images.clone()));
        Ok(inputs::outputs([("latents", latents), ("codes", inputs::ints(self.codes()?))]))
    }

    fn run(&mut self) -> Result<()> {
        std::hint::black_box(self.codes()?.into_data());
        Ok(())
    }
}

/// Codes to images.
pub struct Decode {
    model: TokenizerModel,
    codes: Codes,
}

impl Decode {
    /// Reads weights and codes.
    pub fn open(row: &Row, folder: &Path) -> Result<Self> {
        let device = Device::flex();
        let codes = Codes::Discrete(Inputs::read(folder, &device)?.ids("codes", row.batch)?);
        Ok(Self { model: tokenizer(row, folder, &device)?, codes })
    }
}

impl Task for Decode {
    fn check(&mut self) -> Result<Outputs> {
        Ok(inputs::outputs([("images", inputs::floats(self.model.decode(&self.codes)?))]))
    }

    fn run(&mut self) -> Result<()> {
        std::hint::black_box(self.model.decode(&self.codes)?.into_data());
        Ok(())
    }
}
