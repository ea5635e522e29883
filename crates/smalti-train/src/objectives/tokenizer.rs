//! Training a tokenizer on images.

use super::images;
use super::skipped::{Purpose, SkippedImages};
use crate::gradients::accumulate;
use crate::objective::{Evaluation, Objective, StepOutput};
use crate::pixels;
use crate::recipe::{EvaluationConfig, Recipe, TokenizerTask};
use crate::start;
use burn::module::Module;
use burn::tensor::{Device, Tensor};
use smalti_base::{Error, Layout, Progress, Result, Rng, TokenSpec, rng::Stream};
use smalti_data::DataConfig;
use smalti_data::datasets::Dataset;
use smalti_data::image::grid;
use smalti_data::loader::{ImageBatch, Loader, LoaderConfig};
use smalti_eval::{Compared, Fidelity, FidelitySum, Scores};
use smalti_models::checkpoint::bundle::{self, BundlePaths, Manifest, Part};
use smalti_models::checkpoint::weights::Precision;
use smalti_models::host;
use smalti_models::losses::{Discriminator, TokenizerLoss};
use smalti_models::quantizers::{Pass, Stats, usage::Usage};
use smalti_models::tokenizers::TokenizerModel;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Draws of a quantizer's update use streams of their own.
const UPDATE_STREAM: u64 = 2 << 32;

/// How the codes of validation images are used, of all places and of each level or depth.
struct CodeUsage {
    all: Usage,
    /// Coarse levels and deep residuals are the first to collapse.
    by_part: Vec<Usage>,
    /// The level or depth of each place.
    parts: Vec<usize>,
    /// What a part is called.
    name: &'static str,
}

impl CodeUsage {
    /// Nothing counted yet; none for tokens that are vectors.
    fn new(spec: &TokenSpec) -> Option<Self> {
        let (codes, layout) = (spec.vocabularies()?, &spec.layout);
        let name = if matches!(layout, Layout::Pyramid { .. }) { "level" } else { "depth" };
        let has_parts = matches!(layout, Layout::Pyramid { .. } | Layout::Stack { .. });
        let by_part = (0..layout.parts()).filter(|_| has_parts).map(|part| Usage::new(codes.of(part))).collect();
        let parts = (0..layout.length()).map(|place| layout.part_of(place)).collect();
        Some(Self { all: Usage::new(codes.most()), by_part, parts, name })
    }

    fn add(&mut self, codes: Vec<i64>) {
        if !self.by_part.is_empty() {
            codes.iter().zip(self.parts.iter().cycle()).for_each(|(code, part)| self.by_part[*part].add([*code]));
        }
        self.all.add(codes);
    }

    fn values(&self) -> Vec<(String, f64)> {
        let all = [("codebook_usage", self.all.used_fraction()), ("codebook_perplexity", self.all.perplexity())];
        let all = all.map(|(name, value)| (name.to_string(), value));
        let part = |(i, usage): (usize, &Usage)| (format!("codebook_perplexity_{}_{i}", self.name), usage.perplexity());
        all.into_iter().chain(self.by_part.iter().enumerate().map(part)).collect()
    }
}

/// Named values of an evaluation, and the score, of which less is better.
fn values_and_score(fidelity: &Fidelity) -> (Vec<(String, f64)>, f64) {
    match *fidelity {
        // It is infinite if nothing is lost, which a run's state cannot hold.
        Fidelity::Pictures(Scores { psnr, .. }) => (vec![("psnr".into(), psnr)], -psnr.min(f64::MAX)),
        Fidelity::Labels { label_accuracy, label_mean_iou } => {
            let values = [("label_accuracy", label_accuracy), ("label_mean_iou", label_mean_iou)];
            (values.map(|(name, value)| (name.to_string(), value)).to_vec(), -label_accuracy)
        }
    }
}

/// The tokenizer and, in adversarial training, its discriminator.
#[derive(Module, Debug)]
pub struct TokenizerTraining {
    /// What the run is for.
    pub model: TokenizerModel,
    /// Tells images from reconstructions. Checkpoints know it by this name.
    pub critic: Option<Discriminator>,
}

/// A tokenizer with its images.
pub struct TokenizerObjective {
    task: TokenizerTask,
    evaluation: EvaluationConfig,
    name: String,
    seed: u64,
    micro_batch: usize,
    device: Device,
    loss: TokenizerLoss,
    /// Codebooks that are frozen do not follow what is encoded either.
    still: bool,
    train: Arc<dyn Dataset>,
    validation: Arc<dyn Dataset>,
    skipped: SkippedImages,
}

impl TokenizerObjective {
    /// Opens the data and the parts of the loss. `device` is the plain device.
    ///
    /// # Errors
    /// Data or weights that cannot be read.
    pub fn open(recipe: &Recipe, task: &TokenizerTask, device: &Device) -> Result<Self> {
        let is_quantizer = |path: &str| path.starts_with("quantize.") || path.starts_with("quantizer.");
        let still = !recipe.frozen.is_empty() && start::freezes(recipe, &task.model.init(device)?, is_quantizer)?;
        Ok(Self {
            still,
            loss: loss(task, device)?,
            train: open_images(task, Which::Train)?.into(),
            validation: open_images(task, Which::Validation)?.into(),
            skipped: SkippedImages::default(),
            task: task.clone(),
            evaluation: recipe.evaluation.clone(),
            name: recipe.name.clone(),
            seed: recipe.seed,
            micro_batch: recipe.batch.size,
            device: device.clone(),
        })
    }

    /// Checks the task as [`Self::open`] does. Of the model no weight is made.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn check(task: &TokenizerTask) -> Result<()> {
        loss(task, &Device::flex())?.discriminator(&Device::flex())?;
        open_images(task, Which::Train)?;
        open_images(task, Which::Validation).map(|_| ())
    }

    /// A model with fresh weights.
    ///
    /// # Errors
    /// A configuration whose numbers do not fit.
    pub fn init(&self, device: &Device) -> Result<TokenizerTraining> {
        Ok(TokenizerTraining { model: self.task.model.init(device)?, critic: self.loss.discriminator(device)? })
    }

    /// Standard deviation of the tokens of validation images, at most as many as are evaluated; 1 if there is none.
    fn deviation(&self, model: &TokenizerModel) -> Result<f64> {
        let loader = Loader::ordered(self.validation.clone(), self.loading(&self.task.validation)?, self.seed, 0)?;
        let (mut images, mut batches, mut sums) = (0, 0.0, [0.0f64; 2]);
        for batch in loader {
            let batch = batch?;
            let Some(tokens) = model.token_moments(pixels::upload_batch(&batch, &self.device)) else { break };
            let noise = tokens.deviations_bnc.map(|d| host::float(d.square().mean())).transpose()?;
            let mean = f64::from(host::float(tokens.means_bnc.clone().mean())?);
            let square =
                f64::from(host::float(tokens.means_bnc.square().mean())?) + f64::from(noise.unwrap_or_default());
            sums = [sums[0] + mean, sums[1] + square];
            batches += 1.0;
            images += batch.len();
            if images >= self.evaluation.images {
                break;
            }
        }
        let (mean, square) = (sums[0] / batches, sums[1] / batches);
        let deviation = (square - mean * mean).sqrt();
        Ok(if deviation.is_finite() && deviation > 0.0 { deviation } else { 1.0 })
    }

    /// Random numbers of the update after a step.
    fn update_stream(&self, step: u64) -> Stream {
        Rng::new(self.seed).stream(UPDATE_STREAM, step)
    }

    /// How images become batches of the model's kind.
    fn loading(&self, data: &DataConfig) -> Result<LoaderConfig> {
        LoaderConfig::new(data, self.micro_batch)?.with_planes(self.task.model.planes()?)
    }
}

/// One of a task's two data sections.
#[derive(Clone, Copy)]
enum Which {
    Train,
    Validation,
}

fn open_images(task: &TokenizerTask, which: Which) -> Result<Box<dyn Dataset>> {
    let (config, key) = match which {
        Which::Train => (&task.train, "task.train"),
        Which::Validation => (&task.validation, "task.validation"),
    };
    images::open(config, key, task.model.spec()?.image_size, task.model.planes()?, None)
}

fn loss(task: &TokenizerTask, device: &Device) -> Result<TokenizerLoss> {
    task.loss.init(&task.model.spec()?, device)?.with_planes(task.model.planes()?)
}

impl Objective for TokenizerObjective {
    type Model = TokenizerTraining;
    type Batch = ImageBatch;

    fn inputs(&self) -> Result<BTreeMap<String, String>> {
        let of = |key: &str, dataset: &dyn Dataset| Ok((key.to_string(), images::identity(dataset)?));
        Ok(BTreeMap::from([of("task.train", &*self.train)?, of("task.validation", &*self.validation)?]))
    }

    fn warnings(&self) -> Vec<String> {
        images::warnings(&*self.train).chain(images::warnings(&*self.validation)).collect()
    }

    fn batches(&self, start: u64) -> Result<Box<dyn Iterator<Item = Result<ImageBatch>> + '_>> {
        let loader = Loader::new(self.train.clone(), self.loading(&self.task.train)?, self.seed, start)?;
        Ok(self.skipped.watch(loader, Purpose::Training))
    }

    fn skipped(&self) -> Vec<(String, String)> {
        self.skipped.take()
    }

    fn epoch(&self) -> u64 {
        self.train.len() as u64
    }

    fn vocabulary(&self) -> Option<usize> {
        self.task.model.spec().ok()?.vocabulary()
    }

    fn discriminator_prefix(&self) -> Option<&'static str> {
        Some("critic.")
    }

    fn step(&self, model: &TokenizerTraining, batch: ImageBatch, step: u64, _: u64) -> Result<StepOutput> {
        let images = pixels::upload_batch(&batch, &self.device.clone().autodiff());
        let pass = Pass { step, stream: Some(self.update_stream(step)), ..Pass::default() };
        let loss = &self.loss;
        let out =
            smalti_kernels::on_pool(&self.device, || loss.step(&model.model, model.critic.as_ref(), images, &pass));
        loss.check_terms(&out)?;
        let mut gradients = out.gradients;
        if let (Some(discriminator), Some(mut found)) = (&model.critic, out.discriminator_gradients) {
            accumulate(discriminator, &mut gradients, &mut found, 1.0);
        }
        Ok(StepOutput { gradients, terms: out.terms, stats: out.stats, codes: out.codes })
    }

    fn update(
        &self,
        mut model: TokenizerTraining,
        stats: Option<Stats>,
        step: u64,
    ) -> (TokenizerTraining, Vec<(&'static str, Tensor<1>)>) {
        let Some(stats) = stats.filter(|_| !self.still) else { return (model, Vec::new()) };
        let report = model.model.update(&stats, step, &mut self.update_stream(step));
        let revived = report.revived.map(|count| ("codes_revived", count.float().sum()));
        (model, revived.into_iter().collect())
    }

    fn evaluate(&self, model: &TokenizerTraining, _: &dyn Progress) -> Result<Evaluation> {
        let loader = Loader::ordered(self.validation.clone(), self.loading(&self.task.validation)?, self.seed, 0)?;
        let planes = self.task.model.planes()?;
        let (mut images, mut fidelity) = (0usize, FidelitySum::new(planes, Compared::Signed));
        let mut usage = CodeUsage::new(&self.task.model.spec()?);
        let mut shown = Vec::new();
        let count = self.validation.len().min(self.evaluation.images).max(1);
        let pictures = self.evaluation.pictures;
        for batch in self.skipped.watch(loader, Purpose::Validation) {
            let batch = batch?;
            let original = pixels::upload_batch(&batch, &self.device);
            let codes = model.model.encode(original.clone())?;
            codes.must_be_whole(&batch.keys)?;
            let decoded = model.model.decode(&codes)?;
            let originals = pixels::download(original, planes)?;
            let reconstructions = pixels::download(decoded, planes)?;
            for (left, right) in originals.iter().zip(&reconstructions) {
                fidelity.add(left, right)?;
            }
            if let Some((usage, codes)) = usage.as_mut().zip(codes.discrete()) {
                usage.add(host::ints(codes)?);
            }
            for (left, right) in originals.into_iter().zip(reconstructions) {
                // Pictures are spread over the data, which is often sorted by kind.
                if images * pictures / count != (images + 1) * pictures / count {
                    shown.extend([left.visible(planes), right.visible(planes)]);
                }
                images += 1;
            }
            if images >= self.evaluation.images {
                break;
            }
        }
        if images == 0 {
            return Err(Error::invalid("task.validation", "none of its images can be used"));
        }
        let (mut values, score) = values_and_score(&fidelity.mean());
        values.extend(usage.iter().flat_map(CodeUsage::values));
        Ok(Evaluation { values, score, picture: Some(grid(&shown, 8, 2)?) })
    }

    fn export(&self, model: &TokenizerTraining, folder: &Path, facts: &serde_json::Value) -> Result<()> {
        let paths = BundlePaths::at(folder);
        let mut manifest = Manifest::new(&self.name);
        let mut config = self.task.model.clone();
        if let Some(scale) = config.open_scale() {
            *scale = Some(1.0 / self.deviation(&model.model)?);
        }
        let part = bundle::write_part(&paths, Part::Tokenizer, &config, &model.model, Precision::F16)?;
        manifest.parts.insert(Part::Tokenizer, part);
        manifest.training.insert("tokenizer".into(), facts.clone());
        manifest.write(folder)
    }
}
