//! A training step of a VQGAN with discriminator and LPIPS, by the objective of `smalti train`.

use super::inputs::{self, Inputs};
use super::training::{self, Trained};
use super::{Outputs, Task};
use crate::home;
use crate::rows::Row;
use burn::module::Param;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use serde::Deserialize;
use serde_json::json;
use smalti::base::{Error, Planes, Result};
use smalti::data::ImageBatch;
use smalti::models::checkpoint::Rules;
use smalti::models::tokenizers::TokenizerModel;
use smalti::training::objective::Objective;
use smalti::training::objectives::tokenizer::{TokenizerObjective, TokenizerTraining};
use smalti::training::{Recipe, Task as TrainingTask};
use std::path::Path;

#[derive(Deserialize)]
struct Options {
    ndf: usize,
    layers: usize,
    adversarial_weight: f64,
    learning_rate: f64,
    betas: (f64, f64),
}

/// Loss, gradients of both networks, AdamW without decay, the codebook's update.
pub struct Step {
    objective: TokenizerObjective,
    trained: Trained<TokenizerTraining>,
    pixels: Vec<f32>,
    size: [usize; 2],
    batch: usize,
    steps: u64,
}

/// The terms of a step, by name.
type Terms = Vec<(&'static str, Tensor<1>)>;

/// The recipe of a run with the official losses from its first step on. Its data is opened, but not used.
fn recipe(row: &Row, folder: &Path) -> Result<Recipe> {
    let Options { ndf, layers, adversarial_weight, learning_rate, betas } = inputs::options(row)?;
    let data = json!({ "path": home().join("../../assets/emoji3d/validation.tar"), "transforms": [
        { "kind": "resize_short", "size": 64 }, { "kind": "center_crop", "size": 64 }, { "kind": "to_signed" }
    ] });
    let recipe = json!({
        "name": row.name, "seed": 0,
        "task": {
            "kind": "tokenizer",
            "model": row.model,
            "loss": {
                "l1": 1.0,
                "perceptual": { "kind": "lpips_vgg16", "weights": folder.join("weights.safetensors") },
                "adversarial": {
                    "kind": "hinge", "weight": adversarial_weight, "start_step": 0, "ndf": ndf, "layers": layers,
                },
            },
            "train": data,
            "validation": data,
        },
        "batch": { "size": row.batch },
        "schedule": { "steps": 1000, "final_fraction": 1.0 },
        "optimizer": { "learning_rate": learning_rate, "betas": betas },
    });
    serde_json::from_value(recipe).map_err(|e| Error::invalid(&row.name, format!("as a recipe: {e}")))
}

impl Step {
    /// Reads weights and images.
    pub fn open(row: &Row, folder: &Path) -> Result<Self> {
        let recipe = recipe(row, folder)?;
        let TrainingTask::Tokenizer(task) = &recipe.task else {
            return Err(Error::invalid(&row.name, "its recipe trains no tokenizer"));
        };
        let objective = TokenizerObjective::open(&recipe, task, &Device::flex())?;
        let TokenizerTraining { model, critic } = objective.init(&training::device())?;
        let model = inputs::import(&Rules::builtin("vqgan", "tokenizer")?, model, folder)?;
        let rules = Rules::builtin("vqgan", "discriminator")?;
        let critic = critic.map(|discriminator| inputs::import(&rules, discriminator, folder)).transpose()?;
        let inputs = Inputs::read(folder, &Device::flex())?;
        let stored = inputs.stored("images")?;
        let (pixels, shape) = (stored.floats().unwrap_or_default().to_vec(), &stored.shape);
        let trained = Trained::new(row, TokenizerTraining { model, critic }, objective.discriminator_prefix())?;
        Ok(Self { objective, trained, pixels, size: [shape[2], shape[3]], batch: row.batch, steps: 0 })
    }

    fn images(&self) -> ImageBatch {
        let names = 0..self.batch;
        ImageBatch {
            planes: Planes::Colour,
            indices: names.clone().collect(),
            keys: names.map(|i| i.to_string()).collect(),
            pixels: self.pixels.clone(),
            height: self.size[0],
            width: self.size[1],
            labels: vec![None; self.batch],
            texts: vec![None; self.batch],
            keywords: vec![Vec::new(); self.batch],
        }
    }

    /// One step; `look` sees its gradients before they are applied.
    fn step(&mut self, look: impl FnOnce(&GradientsParams)) -> Result<Terms> {
        let out = self.objective.step(self.trained.model(), self.images(), self.steps, 0)?;
        look(&out.gradients);
        self.trained.apply(out.gradients)?;
        self.trained.change(|model| self.objective.update(model, out.stats, self.steps).0);
        self.steps += 1;
        Ok(out.terms)
    }

    fn watched(&self) -> Result<&Param<Tensor<4>>> {
        let TokenizerModel::Vqgan(model) = &self.trained.model().model else {
            return Err(Error::invalid("vqgan_training", "the row's model is of another kind"));
        };
        let block = model.decoder.up.first().and_then(|level| level.block.first());
        let block = block.ok_or_else(|| Error::invalid("vqgan_training", "the decoder has no blocks"))?;
        Ok(&block.conv1.weight)
    }
}

impl Task for Step {
    fn check(&mut self) -> Result<Outputs> {
        let (id, before, mut gradient) = (self.watched()?.id, self.watched()?.val(), None);
        let terms = self.step(|gradients| gradient = gradients.get::<4>(id))?;
        let gradient = gradient.ok_or_else(|| Error::invalid("vqgan_training", "no gradient reached the decoder"))?;
        let term = |name: &str| {
            let found = terms.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone().reshape([1]));
            found.map(inputs::floats::<1>).ok_or_else(|| Error::invalid(name, "the training step has no such term"))
        };
        Ok(inputs::outputs([
            ("loss", term("loss")?),
            ("discriminator_loss", term("discriminator")?),
            ("adversarial_weight", term("adversarial_weight")?),
            ("gradient", inputs::floats(gradient)),
            ("update", inputs::floats(training::change(before, self.watched()?.val()))),
        ]))
    }

    fn run(&mut self) -> Result<()> {
        let terms = self.step(|_| ())?;
        std::hint::black_box(terms.into_iter().map(|(_, term)| term.into_data()).collect::<Vec<_>>());
        Ok(())
    }
}
