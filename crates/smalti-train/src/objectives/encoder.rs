//! Training an encoder on images: on what they show, and on the features of a teacher.

use super::images;
use super::skipped::{Purpose, SkippedImages};
use crate::conditions::{ConditionReader, Facts, must_say};
use crate::objective::{Evaluation, Objective, StepOutput};
use crate::pixels;
use crate::recipe::{EncoderTask, EvaluationConfig, Recipe, TeacherConfig};
use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use smalti_base::{Error, Planes, Progress, Result, Rng};
use smalti_data::DataConfig;
use smalti_data::datasets::Dataset;
use smalti_data::loader::{ImageBatch, Loader, LoaderConfig};
use smalti_models::checkpoint::bundle::{self, BundlePaths, Manifest, Part};
use smalti_models::checkpoint::weights::Precision;
use smalti_models::encoders::{EncoderConfig, EncoderModel};
use smalti_models::generators::Draw;
use smalti_models::{Condition, host};
use smalti_nn::dense::Dense;
use smalti_nn::init::Init;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Draws of a step use streams of their own, apart from those that order the data.
const STEP_STREAM: u64 = 4 << 32;

/// The encoder, and what is trained beside it.
#[derive(Module, Debug)]
pub struct EncoderTraining {
    /// What the run is for.
    pub model: EncoderModel,
    /// From the encoder's features to as many numbers as the teacher's have, if theirs are others.
    pub map: Option<Dense>,
}

/// A finished encoder whose features are imitated.
struct Teacher {
    model: EncoderModel,
    weight: f64,
    /// What is known of it, for the bundle.
    facts: serde_json::Value,
}

impl Teacher {
    /// Where it is, which part of the bundle, and its configuration.
    fn find(config: &TeacherConfig) -> Result<(BundlePaths, Part, EncoderConfig)> {
        let paths = BundlePaths::find(&config.bundle)?;
        let part = if paths.has(Part::Encoder) { Part::Encoder } else { Part::Judge };
        if !paths.has(part) {
            return Err(Error::invalid_hint(
                config.bundle.display(),
                "this bundle has no encoder, so it has no features to teach",
                "give the bundle of an encoder as teacher.bundle",
            ));
        }
        let encoder = bundle::read_config(&paths, part)?;
        Ok((paths, part, encoder))
    }

    fn open(config: &TeacherConfig, device: &Device) -> Result<Self> {
        let (paths, part, encoder) = Self::find(config)?;
        let model = bundle::read_weights(&paths, part, encoder.init(device)?)?;
        let sha256 = paths.manifest()?.parts.get(&part).map(|facts| facts.sha256.clone());
        let facts = serde_json::json!({ "bundle": config.bundle, "sha256": sha256, "weight": config.weight });
        Ok(Self { model, weight: config.weight, facts })
    }
}

/// What is learned of an image.
struct Lesson {
    /// Turns labels into what the encoder tells; none without a head.
    reader: Option<ConditionReader>,
    teacher: Option<Teacher>,
    /// The plain device.
    device: Device,
}

/// An encoder with its images.
pub struct EncoderObjective {
    task: EncoderTask,
    evaluation: EvaluationConfig,
    name: String,
    seed: u64,
    micro_batch: usize,
    lesson: Lesson,
    train: Arc<dyn Dataset>,
    validation: Arc<dyn Dataset>,
    skipped: SkippedImages,
}

/// Loss terms of a batch, the sum among them.
struct Terms {
    loss: Tensor<1>,
    own: Option<Tensor<1>>,
    accuracy: Option<Tensor<1>>,
    distance: Option<Tensor<1>>,
}

impl Lesson {
    fn conditions(&self, batch: &ImageBatch) -> Result<Option<Vec<Condition>>> {
        let Some(reader) = &self.reader else { return Ok(None) };
        let of = |(key, label): (&String, &Option<u32>)| {
            reader.whole(&format!("image `{key}`"), Facts { label: *label, ..Facts::default() })
        };
        batch.keys.iter().zip(&batch.labels).map(of).collect::<Result<_>>().map(Some)
    }

    fn terms(
        &self,
        model: &EncoderTraining,
        batch: &ImageBatch,
        device: &Device,
        draw: Option<&mut Draw<'_>>,
    ) -> Result<Terms> {
        let images = pixels::upload_batch(batch, device);
        let (own, features) = match self.conditions(batch)? {
            Some(given) => {
                let loss = model.model.loss(images.clone(), &given, draw)?;
                (Some((loss.loss, loss.accuracy)), loss.features_bd)
            }
            None => (None, model.model.features(images.clone())?),
        };
        let (own, accuracy) = own.unzip();
        let distance = match &self.teacher {
            Some(teacher) => {
                let target = teacher.model.features(pixels::upload_batch(batch, &self.device))?;
                let features = model.map.as_ref().map_or(features.clone(), |map| map.forward(features));
                // The target is without gradient, on the device that the features are on.
                let target = Tensor::from_data(target.into_data(), &features.device());
                Some((features - target).square().mean())
            }
            None => None,
        };
        let weighted = self.teacher.as_ref().zip(distance.clone()).map(|(teacher, distance)| distance * teacher.weight);
        let loss = match (own.clone(), weighted) {
            (Some(own), Some(weighted)) => own + weighted,
            (Some(loss), None) | (None, Some(loss)) => loss,
            (None, None) => return Err(Error::invalid("task", "neither a head nor a teacher: nothing to learn")),
        };
        Ok(Terms { loss, own, accuracy, distance })
    }
}

impl EncoderObjective {
    /// Opens the data and the teacher. `device` is the plain device.
    ///
    /// # Errors
    /// Data or weights that cannot be read; data of other classes than the model's.
    pub fn open(recipe: &Recipe, task: &EncoderTask, device: &Device) -> Result<Self> {
        let teacher = recipe.teacher.as_ref().map(|teacher| Teacher::open(teacher, device)).transpose()?;
        let takes = task.model.tells();
        let (train, validation) = open_images(task)?;
        Ok(Self {
            validation: validation.into(),
            lesson: Lesson {
                reader: (!takes.is_none()).then(|| ConditionReader::new(&takes, None)).transpose()?,
                teacher,
                device: device.clone(),
            },
            train: train.into(),
            skipped: SkippedImages::default(),
            task: task.clone(),
            evaluation: recipe.evaluation.clone(),
            name: recipe.name.clone(),
            seed: recipe.seed,
            micro_batch: recipe.batch.size,
        })
    }

    /// Checks the task as [`Self::open`] does. Of the model no weight is made.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn check(recipe: &Recipe, task: &EncoderTask) -> Result<()> {
        if let Some(teacher) = &recipe.teacher {
            let encoder = Teacher::find(teacher)?.2;
            if encoder.image_size() != task.model.image_size() {
                return Err(Error::Mismatch {
                    what: "the image sizes of the encoder and its teacher".into(),
                    left_name: "task.model".into(),
                    left: format!("{:?}", task.model.image_size()),
                    right_name: teacher.bundle.display().to_string(),
                    right: format!("{:?}", encoder.image_size()),
                    hint: Some("both see the same images".into()),
                });
            }
        }
        open_images(task).map(|_| ())
    }

    /// A model with fresh weights.
    ///
    /// # Errors
    /// A configuration whose numbers do not fit.
    pub fn init(&self, device: &Device) -> Result<EncoderTraining> {
        let width = self.task.model.width();
        let other = self.lesson.teacher.as_ref().map(|teacher| teacher.model.settings().width());
        let deviation = 1.0 / (width as f64).sqrt();
        let map = other.filter(|other| *other != width);
        let map = map.map(|other| Dense::new(width, other, Init::Normal(deviation), device));
        Ok(EncoderTraining { model: self.task.model.init(device)?, map })
    }

    fn loading(&self, data: &DataConfig) -> Result<LoaderConfig> {
        LoaderConfig::new(data, self.micro_batch)
    }
}

/// The images to learn from and to measure on: with a head each with a class of the model's.
fn open_images(task: &EncoderTask) -> Result<(Box<dyn Dataset>, Box<dyn Dataset>)> {
    let (size, takes) = (task.model.image_size(), task.model.tells());
    let train = images::open(&task.train, "task.train", size, Planes::default(), None)?;
    if let Some(classes) = takes.classes().filter(|classes| *classes != train.classes().len()) {
        let problem = format!("has {} classes, but the model tells {classes} apart", train.classes().len());
        return Err(Error::invalid_hint(task.train.path.display(), problem, "set task.model.classes"));
    }
    let classes = takes.classes().map(|_| train.classes());
    let validation = images::open(&task.validation, "task.validation", size, Planes::default(), classes)?;
    if takes.is_none() {
        return Ok((train, validation));
    }
    for dataset in [&train, &validation] {
        for index in 0..dataset.len() {
            let about = dataset.about(index)?;
            let place = format!("{}: image `{}`", dataset.path().display(), about.key);
            must_say(&takes, &place, Facts { label: about.label, ..Facts::default() })?;
        }
    }
    Ok((train, validation))
}

impl Objective for EncoderObjective {
    type Model = EncoderTraining;
    type Batch = ImageBatch;

    fn inputs(&self) -> Result<BTreeMap<String, String>> {
        let of = |key: &str, dataset: &dyn Dataset| Ok((key.to_string(), images::identity(dataset)?));
        let mut inputs = BTreeMap::from([of("task.train", &*self.train)?, of("task.validation", &*self.validation)?]);
        let teacher = self.lesson.teacher.as_ref().and_then(|teacher| teacher.facts["sha256"].as_str());
        inputs.extend(teacher.map(|sha256| ("teacher".to_string(), format!("weights {sha256}"))));
        Ok(inputs)
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

    fn step(&self, model: &EncoderTraining, batch: ImageBatch, step: u64, micro: u64) -> Result<StepOutput> {
        let mut stream = Rng::new(self.seed).stream(STEP_STREAM + micro, step);
        let lesson = &self.lesson;
        smalti_kernels::on_pool(&lesson.device, || {
            let device = lesson.device.clone().autodiff();
            let found = lesson.terms(model, &batch, &device, Some(&mut Draw::new(&mut stream, step)))?;
            let mut terms = vec![("loss", found.loss.clone().inner())];
            let named = [("cross_entropy", found.own), ("accuracy", found.accuracy), ("teacher", found.distance)];
            terms.extend(named.into_iter().filter_map(|(name, value)| Some((name, value?.inner()))));
            let gradients = GradientsParams::from_grads(found.loss.backward(), model);
            Ok(StepOutput { gradients, terms, stats: None, codes: None })
        })
    }

    fn evaluate(&self, model: &EncoderTraining, _: &dyn Progress) -> Result<Evaluation> {
        let loader = Loader::ordered(self.validation.clone(), self.loading(&self.task.validation)?, self.seed, 0)?;
        let (mut images, mut sums) = (0, [0.0; 3]);
        let (mut labelled, mut taught) = (false, false);
        for batch in self.skipped.watch(loader, Purpose::Validation) {
            let batch = batch?;
            let found = self.lesson.terms(model, &batch, &self.lesson.device, None)?;
            (labelled, taught) = (found.own.is_some(), found.distance.is_some());
            for (sum, value) in sums.iter_mut().zip([found.accuracy, found.own, found.distance]) {
                *sum += value.map_or(Ok(0.0), host::float).map(f64::from)? * batch.len() as f64;
            }
            images += batch.len();
            if images >= self.evaluation.images {
                break;
            }
        }
        if images == 0 {
            return Err(Error::invalid("task.validation", "none of its images can be used"));
        }
        let [accuracy, cross_entropy, distance] = sums.map(|sum| sum / images as f64);
        let mut values = Vec::new();
        if labelled {
            values.extend([("accuracy".to_string(), accuracy), ("cross_entropy".to_string(), cross_entropy)]);
        }
        if taught {
            values.push(("teacher_distance".into(), distance));
        }
        Ok(Evaluation { values, score: if labelled { -accuracy } else { distance }, picture: None })
    }

    fn export(&self, model: &EncoderTraining, folder: &Path, facts: &serde_json::Value) -> Result<()> {
        let paths = BundlePaths::at(folder);
        let mut manifest = Manifest::new(&self.name);
        if self.lesson.reader.is_some() {
            manifest.classes = self.train.classes().to_vec();
        }
        // Stored variances are small numbers, which 16 bits would not hold.
        let part = bundle::write_part(&paths, Part::Encoder, &self.task.model, &model.model, Precision::F32)?;
        manifest.parts.insert(Part::Encoder, part);
        manifest.training.insert("encoder".into(), facts.clone());
        if let Some(teacher) = &self.lesson.teacher {
            manifest.training.insert("teacher".into(), teacher.facts.clone());
        }
        manifest.write(folder)
    }
}
