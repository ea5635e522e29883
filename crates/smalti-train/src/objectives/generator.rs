//! Training a generator on tokens.

use super::captions::{self, Captions};
use super::examples::{Batch, CodesByKey, Examples, Opened, must_all_say};
use super::skipped::{Purpose, SkippedImages};
use crate::conditions::ConditionReader;
use crate::objective::{Evaluation, Objective, StepOutput};
use crate::pixels;
use crate::recipe::{ConditionTokens, EvaluationConfig, GeneratorTask, Recipe, TextConfig};
use burn::optim::GradientsParams;
use burn::tensor::Device;
use smalti_base::{Error, Progress, Result, Rng, files};
use smalti_data::image::grid;
use smalti_data::shard::{RowTokens, Shards};
use smalti_data::text::{self, TextTokenizer};
use smalti_models::checkpoint::bundle::{self, BundlePaths, Manifest, Part};
use smalti_models::checkpoint::weights::Precision;
use smalti_models::generators::{Conditions, Draw, GeneratorModel, ImageRequest, Request, check_sampling};
use smalti_models::host;
use smalti_models::tokenizers::{TokenizerConfig, TokenizerModel};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// Draws of a step use streams of their own, apart from those that order the data.
const STEP_STREAM: u64 = 1 << 32;

/// A generator with its tokens.
pub struct GeneratorObjective {
    task: GeneratorTask,
    evaluation: EvaluationConfig,
    name: String,
    seed: u64,
    micro_batch: usize,
    device: Device,
    train: Examples,
    validation: Examples,
    skipped: SkippedImages,
    text: Option<TextTokenizer>,
    captions: Option<Captions>,
    tokenizer_paths: BundlePaths,
    tokenizer: TokenizerModel,
    condition_paths: Option<BundlePaths>,
}

impl GeneratorObjective {
    /// Opens tokens, tokenizer and text tokenizer, and checks that they fit the model. `device` is the plain device.
    ///
    /// # Errors
    /// Parts that cannot be read or do not fit.
    pub fn open(recipe: &Recipe, task: &GeneratorTask, device: &Device) -> Result<Self> {
        let Parts { train, validation, paths: tokenizer_paths, tokenizer } = Parts::open(task)?;
        let tokenizer = bundle::read_weights(&tokenizer_paths, Part::Tokenizer, tokenizer.init(device)?)?;
        let reader = ConditionReader::new(task.model.conditions(), text_tokenizer(task, &train)?)?;
        let takes = task.model.conditions();
        let codes = task.condition_tokens.as_ref().map(|tokens| ConditionCodes::open(tokens, takes)).transpose()?;
        let [train_codes, validation_codes] = match &codes {
            Some(codes) => codes.of_images.each_ref().map(Some),
            None => [None, None],
        };
        let captions = match (&task.captions, reader.text()) {
            (Some(config), Some(text)) => Some(Captions::read(&train, config, text.clone(), recipe.seed)?),
            _ => None,
        };
        Ok(Self {
            captions,
            train: Examples::read(train, &reader, train_codes)?,
            validation: Examples::read(validation, &reader, validation_codes)?,
            skipped: SkippedImages::default(),
            condition_paths: codes.map(|codes| codes.paths),
            task: task.clone(),
            evaluation: recipe.evaluation.clone(),
            name: recipe.name.clone(),
            seed: recipe.seed,
            micro_batch: recipe.batch.size,
            device: device.clone(),
            text: reader.text().cloned(),
            tokenizer_paths,
            tokenizer,
        })
    }

    /// Checks the task as [`Self::open`] does, without reading weights or training a text tokenizer.
    ///
    /// # Errors
    /// As [`Self::open`], and sampling settings that the model does not have.
    pub fn check(task: &GeneratorTask) -> Result<()> {
        let Parts { train, validation, tokenizer, .. } = Parts::open(task)?;
        let (takes, device) = (task.model.conditions(), Device::flex());
        task.model.init(&device)?.adopt(&*tokenizer.init(&device)?)?;
        match &task.text {
            Some(TextConfig::File { path }) => {
                ConditionReader::new(takes, Some(TextTokenizer::load(path)?))?;
            }
            Some(TextConfig::Bpe { vocabulary }) if *vocabulary < text::LEAST => {
                let problem = format!("is {vocabulary}, expected at least {}, one for each byte", text::LEAST);
                return Err(Error::invalid("task.text.vocabulary", problem));
            }
            _ => {}
        }
        let codes = task.condition_tokens.as_ref().map(|tokens| ConditionCodes::open(tokens, takes)).transpose()?;
        let [train_codes, validation_codes] = match &codes {
            Some(codes) => codes.of_images.each_ref().map(Some),
            None => [None, None],
        };
        must_all_say(&train, takes, train_codes)?;
        must_all_say(&validation, takes, validation_codes)?;
        if task.captions.is_some() {
            captions::phrases(&train)?;
        }
        check_sampling(&*task.model, &task.sampling)
    }

    /// A model with fresh weights, and what it needs of the tokenizer's.
    ///
    /// # Errors
    /// A configuration whose numbers do not fit, or a quantizer that does not fit it.
    pub fn init(&self, device: &Device) -> Result<GeneratorModel> {
        let mut model = self.task.model.init(device)?;
        model.adopt(&*self.tokenizer)?;
        Ok(model)
    }

    /// Pictures of training captions above, of validation captions below.
    fn samples(&self, model: &GeneratorModel) -> Result<smalti_data::image::Image> {
        let half = (self.evaluation.pictures / 2).max(1);
        let images = [&self.train, &self.validation]
            .into_iter()
            .flat_map(|tokens| tokens.spread(half))
            .enumerate()
            .map(|(i, condition)| ImageRequest::new(condition, i as u64))
            .collect();
        let codes = model.start(&Request::new(images, self.task.sampling.clone()))?.finish()?;
        let planes = self.tokenizer.planes();
        let images = pixels::download(self.tokenizer.decode(&codes)?, planes)?;
        let images: Vec<_> = images.into_iter().map(|image| image.visible(planes)).collect();
        grid(&images, half, 2)
    }
}

impl Objective for GeneratorObjective {
    type Model = GeneratorModel;
    type Batch = Batch;

    fn inputs(&self) -> Result<BTreeMap<String, String>> {
        let mut inputs = BTreeMap::from([
            ("task.train".to_string(), self.train.opened().identity()?),
            ("task.validation".to_string(), self.validation.opened().identity()?),
        ]);
        let tokenizers =
            [("task.tokenizer", Some(&self.tokenizer_paths)), ("task.condition_tokens", self.condition_paths.as_ref())];
        for (key, paths) in tokenizers {
            let manifest = paths.map(BundlePaths::manifest).transpose()?;
            let facts = manifest.and_then(|mut manifest| manifest.parts.remove(&Part::Tokenizer));
            inputs.extend(facts.map(|facts| (key.to_string(), format!("weights {}", facts.sha256))));
        }
        if let Some(TextConfig::File { path }) = &self.task.text {
            inputs.insert("task.text".into(), format!("file {}", files::sha256_file(path)?));
        }
        Ok(inputs)
    }

    fn warnings(&self) -> Vec<String> {
        [self.train.opened(), self.validation.opened()].into_iter().flat_map(Opened::warnings).collect()
    }

    fn batches(&self, start: u64) -> Result<Box<dyn Iterator<Item = Result<Batch>> + '_>> {
        let mut batches = self.train.endless(self.micro_batch, self.tokenizer.planes(), self.seed, start)?;
        Ok(Box::new(std::iter::from_fn(move || {
            let batch = batches.next()?.and_then(|(mut batch, epochs)| {
                if let Some(captions) = &self.captions {
                    for (i, (row, epoch)) in batch.indices.clone().into_iter().zip(epochs).enumerate() {
                        let drawn = captions.draw(row, epoch)?;
                        drawn.into_iter().for_each(|text| batch.conditions[i].replace(text));
                    }
                }
                Ok(batch)
            });
            self.skipped.add(batches.skipped(), Purpose::Training);
            Some(batch)
        })))
    }

    fn skipped(&self) -> Vec<(String, String)> {
        self.skipped.take()
    }

    fn epoch(&self) -> u64 {
        self.train.len() as u64
    }

    fn step(&self, model: &GeneratorModel, batch: Batch, step: u64, micro: u64) -> Result<StepOutput> {
        let device = self.device.clone().autodiff();
        let mut stream = Rng::new(self.seed).stream(STEP_STREAM + micro, step);
        let (tokenizer, soft) = (&self.tokenizer, self.task.model.soft_targets());
        smalti_kernels::on_pool(&self.device, || {
            let conditions = batch.conditions.clone();
            let codes = batch.tokens(tokenizer, soft, Some(&mut stream), &device)?;
            let loss = model.loss(codes, &conditions, &mut Draw::new(&mut stream, step))?;
            let mut terms = vec![("loss", loss.loss.clone().inner())];
            let bits = loss.nats_per_token.map(|nats| nats.inner() / std::f64::consts::LN_2);
            terms.extend(bits.map(|bits| ("bits_per_token", bits)));
            let gradients = GradientsParams::from_grads(loss.loss.backward(), model);
            Ok(StepOutput { gradients, terms, stats: None, codes: None })
        })
    }

    fn evaluate(&self, model: &GeneratorModel, _: &dyn Progress) -> Result<Evaluation> {
        let spec = self.task.model.tokens();
        let (mut sum, mut images, mut has_bits) = (0.0, 0, false);
        let mut batches = self.validation.once(self.micro_batch, self.tokenizer.planes(), self.evaluation.images)?;
        while let Some(batch) = batches.next() {
            let batch = batch?;
            self.skipped.add(batches.skipped(), Purpose::Validation);
            let (count, conditions) = (batch.len(), batch.conditions.clone());
            if count == 0 {
                continue;
            }
            let codes = batch.tokens(&self.tokenizer, None, None, &self.device)?;
            let loss = model.validation_loss(codes, &conditions, images as u64)?;
            has_bits = loss.nats_per_token.is_some();
            sum += f64::from(host::float(loss.nats_per_token.unwrap_or(loss.loss))?) * count as f64;
            images += count;
        }
        if images == 0 {
            return Err(Error::invalid("validation", "none of its images can be used"));
        }
        let mean = sum / images as f64;
        let (values, score) = match has_bits {
            true => {
                let bits_per_token = mean / std::f64::consts::LN_2;
                let (h, w) = spec.image_size;
                let bits_per_pixel = bits_per_token * spec.length() as f64 / (h * w) as f64;
                (
                    vec![("bits_per_token".into(), bits_per_token), ("bits_per_pixel".into(), bits_per_pixel)],
                    bits_per_token,
                )
            }
            false => (vec![("loss".into(), mean)], mean),
        };
        Ok(Evaluation { values, score, picture: Some(self.samples(model)?) })
    }

    fn export(&self, model: &GeneratorModel, folder: &Path, facts: &serde_json::Value) -> Result<()> {
        let paths = BundlePaths::at(folder);
        let old = self.tokenizer_paths.manifest()?;
        let mut manifest = Manifest::new(&self.name);
        manifest.sampling = self.task.sampling.clone();
        if self.task.model.conditions().classes().is_some() {
            manifest.classes = self.train.classes.clone();
        }
        manifest.training.insert("generator".into(), facts.clone());
        if let Some(tokenizer) = old.training.get("tokenizer") {
            manifest.training.insert("tokenizer".into(), tokenizer.clone());
        }
        let precision = Precision::F16;
        let part = bundle::write_part(&paths, Part::Generator, &self.task.model, model, precision)?;
        manifest.parts.insert(Part::Generator, part);
        let tokenizers =
            [(Part::Tokenizer, Some(&self.tokenizer_paths)), (Part::Condition, self.condition_paths.as_ref())];
        for (part, from) in tokenizers {
            let copied = from.map(|from| bundle::copy_tokenizer(from, &paths, part)).transpose()?.flatten();
            manifest.parts.extend(copied.map(|facts| (part, facts)));
        }
        if let Some(text) = &self.text {
            files::create_folder(&folder.join("text"))?;
            text.save(&paths.text_tokenizer())?;
            manifest.text_sha256 = Some(files::sha256_file(&paths.text_tokenizer())?);
        }
        manifest.write(folder)
    }
}

/// What a task is made of, opened and found to fit, but for weights.
struct Parts {
    train: Opened,
    validation: Opened,
    paths: BundlePaths,
    tokenizer: TokenizerConfig,
}

impl Parts {
    fn open(task: &GeneratorTask) -> Result<Self> {
        let paths = BundlePaths::find(&task.tokenizer)?;
        let tokenizer: TokenizerConfig = bundle::read_config(&paths, Part::Tokenizer)?;
        let (spec, planes) = (task.model.tokens(), tokenizer.planes()?);
        tokenizer.spec()?.must_equal(&task.tokenizer.display().to_string(), spec, "the recipe's model")?;
        let train = Opened::open(&task.train, "task.train", (spec, planes), None)?;
        let validation = Opened::open(&task.validation, "task.validation", (spec, planes), Some(train.classes()))?;
        if task.model.conditions().classes().is_some() && train.classes() != validation.classes() {
            return Err(Error::Mismatch {
                what: "the classes of the tokens".into(),
                left_name: train.place(),
                left: train.classes().join(", "),
                right_name: validation.place(),
                right: validation.classes().join(", "),
                hint: Some("class numbers come from the names in order: both data sets need the same classes".into()),
            });
        }
        for opened in [&train, &validation] {
            if let Opened::Tokens(shards, folder) = opened {
                must_be_made_by(shards, folder, &paths, &task.tokenizer)?;
            }
        }
        Ok(Self { train, validation, paths, tokenizer })
    }
}

/// # Errors
/// [`Error::Mismatch`] if tokens were made by another tokenizer.
fn must_be_made_by(tokens: &Shards, folder: &Path, tokenizer: &BundlePaths, tokenizer_folder: &Path) -> Result<()> {
    let made_by = &tokens.manifest().origin.tokenizer.sha256;
    match tokenizer.manifest()?.parts.get(&Part::Tokenizer) {
        Some(part) if part.sha256 != *made_by => Err(Error::Mismatch {
            what: "tokens and tokenizer".into(),
            left_name: folder.display().to_string(),
            left: format!("made by a tokenizer with weights {made_by}"),
            right_name: tokenizer_folder.display().to_string(),
            right: format!("weights {}", part.sha256),
            hint: Some("run `smalti tokenize` again with this tokenizer".into()),
        }),
        _ => Ok(()),
    }
}

/// The codes that images are conditioned on, by the images' keys.
struct ConditionCodes {
    paths: BundlePaths,
    /// Of the images to learn from and to measure on.
    of_images: [CodesByKey; 2],
}

impl ConditionCodes {
    fn open(tokens: &ConditionTokens, takes: &Conditions) -> Result<Self> {
        let paths = BundlePaths::find(&tokens.tokenizer)?;
        let spec = bundle::read_config::<TokenizerConfig>(&paths, Part::Tokenizer)?.spec()?;
        let place = tokens.tokenizer.display().to_string();
        takes.must_fit(&spec, &place)?;
        let read = |folder: &PathBuf| {
            let shards = Shards::open(folder)?;
            spec.must_equal(&place, shards.spec(), &folder.display().to_string())?;
            must_be_made_by(&shards, folder, &paths, &tokens.tokenizer)?;
            let mut codes = HashMap::with_capacity(shards.len());
            for index in 0..shards.len() {
                if let RowTokens::Discrete(row) = shards.tokens(index)? {
                    codes.insert(shards.row(index)?.key, row);
                }
            }
            Ok(CodesByKey { folder: folder.clone(), codes })
        };
        let of_images = [read(&tokens.train)?, read(&tokens.validation)?];
        Ok(Self { paths, of_images })
    }
}

fn text_tokenizer(task: &GeneratorTask, train: &Opened) -> Result<Option<TextTokenizer>> {
    let tokenizer = match &task.text {
        None => return Ok(None),
        Some(TextConfig::File { path }) => TextTokenizer::load(path)?,
        Some(TextConfig::Bpe { vocabulary }) => {
            let words = |i| match &task.captions {
                Some(_) => train.phrases(i),
                None => Ok(vec![train.about(i)?.text.unwrap_or_default()]),
            };
            let captions = (0..train.len()).map(words).collect::<Result<Vec<_>>>()?.concat();
            TextTokenizer::train_bpe(&captions, *vocabulary)?
        }
    };
    Ok(Some(tokenizer))
}
