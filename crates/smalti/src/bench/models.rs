//! Whole models: those of bundles with their weights, those of recipes with fresh ones.

use super::clock::Clock;
use crate::model::ModelPlan;
use burn::tensor::{Device, Distribution, Tensor};
use serde::Serialize;
use smalti_base::Result;
use smalti_models::encoders::EncoderModel;
use smalti_models::generators::GeneratorModel;
use smalti_models::sampling::Sampling;
use smalti_models::tokenizers::TokenizerModel;
use smalti_models::{ImageRequest, Request};
use smalti_nn::dense::{Pack, WeightPrecision};
use smalti_train::Recipe;
use smalti_train::recipe::Task;
use std::path::Path;
use std::time::Instant;

/// A model to time.
#[derive(Clone, Debug, Serialize)]
pub struct Subject {
    /// Its name.
    pub name: String,
    /// Whether its weights are fresh.
    pub fresh: bool,
    #[serde(skip)]
    source: Source,
}

#[derive(Clone, Debug)]
enum Source {
    Bundle(Box<ModelPlan>),
    Recipe(Box<Task>),
}

/// A number of a model.
#[derive(Clone, Debug, Serialize)]
pub struct ModelRow {
    /// The model's name.
    pub model: String,
    /// `encode`, `decode`, `generate` or `features`.
    pub what: &'static str,
    /// Images at the same time.
    pub batch: usize,
    /// Milliseconds of a batch.
    pub ms: f64,
    /// Images a second.
    pub images_per_second: f64,
    /// Decoding steps, for `generate`.
    pub steps: Option<usize>,
}

impl Subject {
    /// A bundle, a run folder, or a recipe.
    ///
    /// # Errors
    /// What reading them returns.
    pub(super) fn find(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|ending| ending == "toml") {
            let recipe = Recipe::read(path, &[])?;
            return Ok(Self { name: recipe.name, fresh: true, source: Source::Recipe(Box::new(recipe.task)) });
        }
        let plan = ModelPlan::find(Some(path))?;
        Ok(Self { name: plan.name.clone(), fresh: false, source: Source::Bundle(Box::new(plan)) })
    }

    /// Whether it has a generator.
    pub(super) fn generates(&self) -> bool {
        match &self.source {
            Source::Bundle(plan) => plan.has_generator(),
            Source::Recipe(task) => matches!(**task, Task::Generator(_)),
        }
    }

    /// Times what the model can do, for each batch size.
    pub(super) fn measure(
        &self,
        batches: &[usize],
        weights: WeightPrecision,
        clock: &Clock,
        device: &Device,
    ) -> Result<Vec<ModelRow>> {
        if let Source::Recipe(task) = &self.source
            && let Task::Encoder(task) = &**task
        {
            let encoder = task.model.init(device)?;
            return batches.iter().map(|batch| self.time_encoder(&encoder, *batch, clock, device)).collect();
        }
        let (tokenizer, generator, sampling) = match &self.source {
            Source::Bundle(plan) => {
                let generator = plan.has_generator().then(|| plan.open_generator(device, weights)).transpose()?;
                (Some(plan.open_tokenizer(device)?), generator, plan.sampling().clone())
            }
            Source::Recipe(task) => match &**task {
                Task::Tokenizer(task) => (Some(task.model.init(device)?), None, Sampling::default()),
                Task::Generator(task) => {
                    let generator = task.model.init(device)?;
                    // As `open_generator` does for weights that are read.
                    let packs = *device == Device::flex();
                    let generator = if packs { generator.pack(weights) } else { generator };
                    (None, Some(generator), task.sampling.clone())
                }
                Task::Encoder(_) => (None, None, Sampling::default()),
            },
        };
        let mut rows = Vec::new();
        for &batch in batches {
            if let Some(tokenizer) = &tokenizer {
                rows.extend(self.time_tokenizer(tokenizer, batch, clock, device)?);
            }
            if let Some(generator) = &generator {
                rows.push(self.time_generator(generator, batch, &sampling)?);
            }
        }
        Ok(rows)
    }

    fn row(&self, what: &'static str, batch: usize, ms: f64, steps: Option<usize>) -> ModelRow {
        let images_per_second = batch as f64 / ms * 1e3;
        ModelRow { model: self.name.clone(), what, batch, ms, images_per_second, steps }
    }

    fn time_tokenizer(
        &self,
        tokenizer: &TokenizerModel,
        batch: usize,
        clock: &Clock,
        device: &Device,
    ) -> Result<[ModelRow; 2]> {
        let (height, width) = tokenizer.spec().image_size;
        let images = Tensor::<4>::random(
            [batch, tokenizer.planes().count(), height, width],
            Distribution::Uniform(-1.0, 1.0),
            device,
        );
        let codes = tokenizer.encode(images.clone())?;
        let encode = clock.median(&|| drop(tokenizer.encode(images.clone())))?;
        let decode = clock.median(&|| drop(tokenizer.decode(&codes)))?;
        Ok([self.row("encode", batch, encode, None), self.row("decode", batch, decode, None)])
    }

    fn time_encoder(&self, encoder: &EncoderModel, batch: usize, clock: &Clock, device: &Device) -> Result<ModelRow> {
        let (height, width) = encoder.settings().image_size();
        let images = Tensor::<4>::random([batch, 3, height, width], Distribution::Uniform(-1.0, 1.0), device);
        encoder.features(images.clone())?;
        let ms = clock.median(&|| drop(encoder.features(images.clone())))?;
        Ok(self.row("features", batch, ms, None))
    }

    /// One batch after a step of another one, which warms up: a whole generation is long.
    fn time_generator(&self, generator: &GeneratorModel, batch: usize, sampling: &Sampling) -> Result<ModelRow> {
        let condition = generator.settings().conditions().example();
        let image = |i: usize| ImageRequest::new(condition.clone(), i as u64);
        let request = Request::new((0..batch).map(image).collect(), sampling.clone());
        generator.start(&request)?.step()?;
        let start = Instant::now();
        let mut generation = generator.start(&request)?;
        generation.finish()?.to_host()?;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        Ok(self.row("generate", batch, ms, Some(generation.steps())))
    }
}
