//! VAR: a whole image, a forward pass, a training step.

use super::inputs::{self, Inputs};
use super::training::{self, Lesson, Step};
use super::{Outputs, Task, bundle};
use crate::rows::Row;
use burn::tensor::{Device, Int, Tensor};
use serde::Deserialize;
use smalti::base::{Error, Result};
use smalti::models::checkpoint::Rules;
use smalti::models::generators::{GeneratorConfig, GeneratorModel, Var};
use smalti::models::sampling::GuidanceSchedule;
use smalti::models::tokenizers::{TokenDecoder, TokenizerConfig, TokenizerModel};
use smalti::models::{Codes, Condition, Generator, ImageRequest, Request, Sampling};
use std::path::Path;

/// The row's generator with the shared weights, and the quantizer of its tokenizer.
fn generator(row: &Row, folder: &Path, device: &Device) -> Result<Var> {
    let GeneratorModel::Var(model) = inputs::model::<GeneratorConfig>(row)?.init(device)? else {
        return Err(another_kind());
    };
    let quantizer = model.quantize.config.init(device)?;
    let mut model = inputs::import(&Rules::builtin("var", "generator")?, model, folder)?;
    let rules = Rules::builtin("var", "quantizer")?;
    model.adopt_quantizer(&inputs::import_named("quantizer", &rules, quantizer, folder)?)?;
    Ok(model)
}

fn another_kind() -> Error {
    Error::invalid("var", "the row's model is of another kind")
}

/// The row's tokenizer with the shared weights.
fn tokenizer(row: &Row, folder: &Path) -> Result<TokenizerModel> {
    let config: TokenizerConfig = serde_json::from_value(row.tokenizer.clone())
        .map_err(|e| Error::invalid(&row.name, format!("tokenizer: {e}")))?;
    let rules = Rules::builtin("var", "tokenizer")?;
    inputs::import_named("tokenizer", &rules, config.init(&Device::flex())?, folder)
}

/// Writes the bundle that inference opens.
pub fn prepare(row: &Row, folder: &Path) -> Result<()> {
    let tokenizer = (row.task == "image").then(|| tokenizer(row, folder)).transpose()?;
    bundle::prepare(row, folder, &generator(row, folder, &Device::flex())?, tokenizer.as_ref())
}

#[derive(Deserialize)]
struct Options {
    guidance: f32,
}

/// Tokens with guidance, always the most likely ones, and their image.
pub struct Image {
    model: GeneratorModel,
    decoder: TokenDecoder,
    request: Request,
}

impl Image {
    /// Reads weights and classes.
    pub fn open(row: &Row, folder: &Path) -> Result<Self> {
        let device = Device::flex();
        let Options { guidance } = inputs::options(row)?;
        let conditions = Inputs::read(folder, &device)?.classes()?;
        let images = conditions.into_iter().map(|condition| ImageRequest::new(condition, 0));
        let guidance_schedule = GuidanceSchedule::Linear;
        let sampling = Sampling { temperature: 0.0, guidance, guidance_schedule, ..Default::default() };
        Ok(Self {
            request: Request::new(images.collect(), sampling),
            model: bundle::open(row, folder, &device)?,
            decoder: bundle::open_decoder(folder, &device)?,
        })
    }

    fn picture(&self) -> Result<(Codes, Tensor<4>)> {
        let mut generation = self.model.start(&self.request)?;
        let codes = generation.finish()?;
        // What generating needs is given back before the decoder needs memory.
        drop(generation);
        let images = self.decoder.decode(&codes)?;
        Ok((codes, images))
    }
}

impl Task for Image {
    fn check(&mut self) -> Result<Outputs> {
        let (codes, images) = self.picture()?;
        let codes = codes.discrete().ok_or_else(|| Error::invalid("var", "its codes are not discrete"))?;
        Ok(inputs::outputs([("codes", inputs::ints(codes)), ("images", inputs::floats(images))]))
    }

    fn run(&mut self) -> Result<()> {
        std::hint::black_box(self.picture()?.1.into_data());
        Ok(())
    }
}

/// Logits of all tokens at once.
pub struct Forward {
    model: Var,
    classes: Tensor<2, Int>,
    codes: Tensor<2, Int>,
}

impl Forward {
    /// Reads weights and tokens.
    pub fn open(row: &Row, folder: &Path) -> Result<Self> {
        let device = Device::flex();
        let inputs = Inputs::read(folder, &device)?;
        let (classes, codes) = (inputs.ids("classes", row.batch)?, inputs.ids("codes", row.batch)?);
        match bundle::open(row, folder, &device)? {
            GeneratorModel::Var(model) => Ok(Self { model, classes, codes }),
            _ => Err(another_kind()),
        }
    }

    fn logits(&self) -> Tensor<3> {
        self.model.logits(self.classes.clone(), self.codes.clone())
    }
}

impl Task for Forward {
    fn check(&mut self) -> Result<Outputs> {
        Ok(inputs::outputs([("logits", inputs::floats(self.logits()))]))
    }

    fn run(&mut self) -> Result<()> {
        std::hint::black_box(self.logits());
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
    type Model = Var;

    fn loss(&self, model: &Var) -> Result<Tensor<1>> {
        Ok(model.predictions(Codes::Discrete(self.codes.clone()), &self.conditions, 0)?.loss().loss)
    }

    fn watched(model: &Var) -> Result<Tensor<2>> {
        let block = model.blocks.first();
        Ok(block.ok_or_else(|| Error::invalid("var", "the model has no blocks"))?.mlp.expand.weight.val())
    }
}
