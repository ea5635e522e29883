//! RQ-Transformer: a whole image, a training step.

use super::inputs::{self, Inputs};
use super::training::{self, Lesson, Step};
use super::{Outputs, Task, bundle};
use crate::rows::Row;
use burn::tensor::{Device, Int, Tensor};
use smalti::base::{Error, Result};
use smalti::models::checkpoint::Rules;
use smalti::models::generators::{GeneratorConfig, GeneratorModel, RqTransformer};
use smalti::models::tokenizers::{TokenDecoder, TokenizerConfig, TokenizerModel};
use smalti::models::{Codes, Condition, ImageRequest, Request, Sampling};
use std::path::Path;

/// The row's generator with the shared weights, and the code vectors of its tokenizer.
fn generator(row: &Row, folder: &Path, device: &Device) -> Result<GeneratorModel> {
    let model = inputs::model::<GeneratorConfig>(row)?.init(device)?;
    let mut model = inputs::import(&Rules::builtin("rq-vae", "generator")?, model, folder)?;
    model.adopt(&*tokenizer(row, folder)?)?;
    Ok(model)
}

/// The row's tokenizer with the shared weights.
fn tokenizer(row: &Row, folder: &Path) -> Result<TokenizerModel> {
    let config: TokenizerConfig = serde_json::from_value(row.tokenizer.clone())
        .map_err(|e| Error::invalid(&row.name, format!("tokenizer: {e}")))?;
    let rules = Rules::builtin("rq-vae", "tokenizer")?;
    inputs::import_named("tokenizer", &rules, config.init(&Device::flex())?, folder)
}

fn rq(model: &GeneratorModel) -> Result<&RqTransformer> {
    match model {
        GeneratorModel::RqTransformer(model) => Ok(model),
        _ => Err(Error::invalid("rq", "the row's model is of another kind")),
    }
}

/// Writes the bundle that inference opens.
pub fn prepare(row: &Row, folder: &Path) -> Result<()> {
    let tokenizer = tokenizer(row, folder)?;
    bundle::prepare(row, folder, &generator(row, folder, &Device::flex())?, Some(&tokenizer))
}

/// All codes of a picture, always the most likely, and the picture.
pub struct Image {
    model: GeneratorModel,
    decoder: TokenDecoder,
    request: Request,
    classes: Tensor<2, Int>,
    codes: Tensor<2, Int>,
}

impl Image {
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
        let first = |ids: &Tensor<2, Int>| ids.clone().narrow(0, 0, 1);
        let model = rq(&self.model)?;
        let logits = model.logits(model.pass(first(&self.classes), first(&self.codes)).head_out);
        let (codes, images) = self.picture()?;
        let codes = codes.discrete().ok_or_else(|| Error::invalid("rq", "its codes are not discrete"))?;
        Ok(inputs::outputs([
            ("logits", inputs::floats(logits)),
            ("codes", inputs::ints(codes)),
            ("images", inputs::floats(images)),
        ]))
    }

    fn run(&mut self) -> Result<()> {
        std::hint::black_box(self.picture()?.1.into_data());
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
        Ok(model.predictions(Codes::Discrete(self.codes.clone()), &self.conditions, 0)?.loss().loss)
    }

    fn watched(model: &GeneratorModel) -> Result<Tensor<2>> {
        let block = rq(model)?.body.first();
        Ok(block.ok_or_else(|| Error::invalid("rq", "the model has no blocks"))?.mlp.expand.weight.val())
    }
}
