//! GPT: decoding, a whole forward pass, a training step.

use super::inputs::{self, Inputs};
use super::training::{self, Lesson, Step};
use super::{Outputs, Task, bundle};
use crate::rows::Row;
use burn::tensor::{Device, Int, Tensor};
use smalti::base::{Error, Result, Rng};
use smalti::models::checkpoint::Rules;
use smalti::models::generators::Draw;
use smalti::models::generators::{GeneratorConfig, GeneratorModel, Gpt};
use smalti::models::{Codes, Condition, ImageRequest, Request, Sampling};
use std::path::Path;

/// The row's generator with the shared weights.
fn generator(row: &Row, folder: &Path, device: &Device) -> Result<GeneratorModel> {
    let config: GeneratorConfig = inputs::model(row)?;
    let rules = Rules::parse(include_str!("../../rules/gpt.toml"), "benches/peers/rules/gpt.toml", "generator")?;
    inputs::import(&rules, config.init(device)?, folder)
}

/// Writes the bundle that inference opens.
pub fn prepare(row: &Row, folder: &Path) -> Result<()> {
    bundle::prepare(row, folder, &generator(row, folder, &Device::flex())?, None)
}

fn gpt(model: &GeneratorModel) -> Result<&Gpt> {
    match model {
        GeneratorModel::Gpt(model) => Ok(model),
        _ => Err(Error::invalid("gpt", "the row's model is of another kind")),
    }
}

/// All tokens of an image, one after the other, always the most likely.
pub struct Decode {
    model: GeneratorModel,
    request: Request,
    classes: Tensor<2, Int>,
    codes: Tensor<2, Int>,
}

impl Decode {
    /// Reads weights and classes.
    pub fn open(row: &Row, folder: &Path) -> Result<Self> {
        let device = Device::flex();
        let inputs = Inputs::read(folder, &device)?;
        let images = inputs.classes()?.into_iter().map(|condition| ImageRequest::new(condition, 0));
        let sampling = Sampling { temperature: 0.0, ..Default::default() };
        Ok(Self {
            request: Request::new(images.collect(), sampling),
            classes: inputs.ids("classes", row.batch)?,
            codes: inputs.ids("codes", row.batch)?,
            model: bundle::open(row, folder, &device)?,
        })
    }

    fn tokens(&self) -> Result<Tensor<2, Int>> {
        let mut generation = self.model.start(&self.request)?;
        generation.finish()?;
        generation.codes().discrete().ok_or_else(|| Error::invalid("gpt", "its codes are not discrete"))
    }
}

impl Task for Decode {
    fn check(&mut self) -> Result<Outputs> {
        let first = |ids: &Tensor<2, Int>| ids.clone().narrow(0, 0, 1);
        let logits = gpt(&self.model)?.logits(first(&self.classes), first(&self.codes));
        Ok(inputs::outputs([("logits", inputs::floats(logits)), ("tokens", inputs::ints(self.tokens()?))]))
    }

    fn run(&mut self) -> Result<()> {
        std::hint::black_box(self.tokens()?.into_data());
        Ok(())
    }
}

/// Logits of all tokens at once.
pub struct Forward {
    model: GeneratorModel,
    classes: Tensor<2, Int>,
    codes: Tensor<2, Int>,
}

impl Forward {
    /// Reads weights and tokens.
    pub fn open(row: &Row, folder: &Path) -> Result<Self> {
        let device = Device::flex();
        let inputs = Inputs::read(folder, &device)?;
        let (classes, codes) = (inputs.ids("classes", row.batch)?, inputs.ids("codes", row.batch)?);
        Ok(Self { model: bundle::open(row, folder, &device)?, classes, codes })
    }

    fn logits(&self) -> Result<Tensor<3>> {
        Ok(gpt(&self.model)?.logits(self.classes.clone(), self.codes.clone()))
    }
}

impl Task for Forward {
    fn check(&mut self) -> Result<Outputs> {
        Ok(inputs::outputs([("logits", inputs::floats(self.logits()?))]))
    }

    fn run(&mut self) -> Result<()> {
        std::hint::black_box(self.logits()?);
        Ok(())
    }
}

/// Loss, gradients, AdamW.
pub struct Train {
    codes: Tensor<2, Int>,
    conditions: Vec<Condition>,
}

impl Train {
    /// Reads weights and tokens.
    pub fn open(row: &Row, folder: &Path) -> Result<Step<Self>> {
        let device = training::device();
        let inputs = Inputs::read(folder, &device)?;
        let lesson = Self { codes: inputs.ids("codes", row.batch)?, conditions: inputs.classes()? };
        Step::new(row, generator(row, folder, &device)?, lesson)
    }
}

impl Lesson for Train {
    type Model = GeneratorModel;

    fn loss(&self, model: &GeneratorModel) -> Result<Tensor<1>> {
        let codes = Codes::Discrete(self.codes.clone());
        Ok(model.loss(codes, &self.conditions, &mut Draw::new(&mut Rng::new(0).stream(0, 0), 0))?.loss)
    }

    fn watched(model: &GeneratorModel) -> Result<Tensor<2>> {
        let block = gpt(model)?.blocks.first();
        Ok(block.ok_or_else(|| Error::invalid("gpt", "the model has no blocks"))?.mlp.expand.weight.val())
    }
}
