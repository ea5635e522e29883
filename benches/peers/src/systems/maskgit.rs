//! MaskGIT: parallel decoding, and a training step.

use super::inputs::{self, Inputs};
use super::training::{self, Lesson, Step};
use super::{Outputs, Task, bundle};
use crate::rows::Row;
use burn::tensor::{Device, Int, Tensor};
use serde::Deserialize;
use smalti::base::{Error, Result};
use smalti::models::checkpoint::Rules;
use smalti::models::generators::{GeneratorConfig, GeneratorModel, MaskGit};
use smalti::models::{Condition, Generator, ImageRequest, Request, Sampling};
use std::path::Path;

/// The row's generator with the shared weights.
fn generator(row: &Row, folder: &Path, device: &Device) -> Result<MaskGit> {
    let config: GeneratorConfig = inputs::model(row)?;
    let place = "benches/peers/rules/maskgit.toml";
    let rules = Rules::parse(include_str!("../../rules/maskgit.toml"), place, "generator")?;
    match config.init(device)? {
        GeneratorModel::MaskGit(model) => inputs::import(&rules, model, folder),
        _ => Err(another_kind()),
    }
}

fn another_kind() -> Error {
    Error::invalid("maskgit", "the row's model is of another kind")
}

/// Writes the bundle that decoding opens.
pub fn prepare(row: &Row, folder: &Path) -> Result<()> {
    bundle::prepare(row, folder, &generator(row, folder, &Device::flex())?, None)
}

#[derive(Deserialize)]
struct DecodeOptions {
    steps: usize,
}

/// Parallel decoding of whole images.
pub struct Decode {
    model: MaskGit,
    request: Request,
    classes: Tensor<2, Int>,
}

impl Decode {
    /// Reads weights and classes.
    pub fn open(row: &Row, folder: &Path) -> Result<Self> {
        let device = Device::flex();
        let inputs = Inputs::read(folder, &device)?;
        let DecodeOptions { steps } = inputs::options(row)?;
        let images = inputs
            .ints("classes")?
            .iter()
            .enumerate()
            .map(|(image, class)| ImageRequest::new(Condition::class(*class as u32), image as u64));
        let sampling = Sampling { steps: Some(steps), ..Default::default() };
        Ok(Self {
            request: Request::new(images.collect(), sampling),
            classes: inputs.ids("classes", row.batch)?,
            model: match bundle::open(row, folder, &device)? {
                GeneratorModel::MaskGit(model) => model,
                _ => return Err(another_kind()),
            },
        })
    }
}

impl Task for Decode {
    fn check(&mut self) -> Result<Outputs> {
        let config = &self.model.config;
        let (length, rows) = (config.tokens.length(), self.classes.dims()[0]);
        let ids = Tensor::full([rows, length], config.mask_id() as i32, &Device::flex());
        let features = self.model.features(self.classes.clone(), ids).narrow(1, 1, length);
        let logits = self.model.logits(features, config.tokens.vocabulary().unwrap_or_default());
        Ok(inputs::outputs([("logits", inputs::floats(logits))]))
    }

    fn run(&mut self) -> Result<()> {
        let mut generation = self.model.start(&self.request)?;
        generation.finish()?;
        std::hint::black_box(generation.codes());
        Ok(())
    }
}

#[derive(Deserialize)]
struct TrainOptions {
    label_smoothing: f32,
}

/// Loss of given masks, gradients, AdamW.
pub struct Train {
    codes: Tensor<2, Int>,
    classes: Tensor<2, Int>,
    masks: Vec<Vec<bool>>,
    label_smoothing: f32,
}

impl Train {
    /// Reads weights, tokens and masks.
    pub fn open(row: &Row, folder: &Path) -> Result<Step<Self>> {
        let device = training::device();
        let inputs = Inputs::read(folder, &device)?;
        let TrainOptions { label_smoothing } = inputs::options(row)?;
        let lesson = Self {
            codes: inputs.ids("codes", row.batch)?,
            classes: inputs.ids("classes", row.batch)?,
            masks: inputs.masks("masked")?,
            label_smoothing,
        };
        Step::new(row, generator(row, folder, &device)?, lesson)
    }
}

impl Lesson for Train {
    type Model = MaskGit;

    fn loss(&self, model: &MaskGit) -> Result<Tensor<1>> {
        Ok(model.masked_loss(self.codes.clone(), self.classes.clone(), &self.masks, self.label_smoothing).loss)
    }

    fn watched(model: &MaskGit) -> Result<Tensor<2>> {
        let block = model.blocks.first();
        Ok(block.ok_or_else(|| Error::invalid("maskgit", "the model has no blocks"))?.mlp.expand.weight.val())
    }
}
