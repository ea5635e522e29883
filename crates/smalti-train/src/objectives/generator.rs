//! Training a generator on tokens.

use super::captions::{Captions, phrases};
use super::pictures;
use crate::objective::{Evaluation, Objective, StepOutput};
use crate::recipe::{EvaluationConfig, GeneratorTask, Recipe, TextConfig};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use smalti_base::{Error, Progress, Result, Rng, files};
use smalti_data::image::grid;
use smalti_data::loader::Order;
use smalti_data::shard::Shards;
use smalti_data::text::TextTokenizer;
use smalti_models::checkpoint::bundle::{self, BundlePaths, Manifest, Part};
use smalti_models::checkpoint::weights::Precision;
use smalti_models::generators::{Condition, ConditionConfig, Generator, GeneratorModel, ImageRequest, Request};
use smalti_models::tokenizers::{Tokenizer, TokenizerConfig, TokenizerModel};
use std::path::Path;

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
    train: Tokens,
    validation: Tokens,
    text: Option<TextTokenizer>,
    captions: Option<Captions>,
    tokenizer_paths: BundlePaths,
    tokenizer_config: TokenizerConfig,
    tokenizer: TokenizerModel,
}

/// Token shards in memory, with their conditions.
struct Tokens {
    codes: Vec<Vec<i32>>,
    conditions: Vec<Condition>,
    classes: Vec<String>,
}

/// A micro-batch of tokens.
pub struct TokenBatch {
    codes: Vec<i32>,
    conditions: Vec<Condition>,
}

impl GeneratorObjective {
    /// Opens tokens, tokenizer and text tokenizer, and checks that they fit the model. `device` is the plain device.
    ///
    /// # Errors
    /// Parts that cannot be read or do not fit.
    pub fn open(recipe: &Recipe, task: &GeneratorTask, device: &Device) -> Result<Self> {
        let train = Shards::open(&task.train)?;
        let validation = Shards::open(&task.validation)?;
        let model_spec = task.model.tokens();
        model_spec.must_equal("the recipe's model", train.spec(), &task.train.display().to_string())?;
        model_spec.must_equal("the recipe's model", validation.spec(), &task.validation.display().to_string())?;
        if matches!(task.model.condition(), ConditionConfig::Class { .. }) && train.classes() != validation.classes() {
            return Err(Error::Mismatch {
                what: "the classes of the tokens".into(),
                left_name: task.train.display().to_string(),
                left: train.classes().join(", "),
                right_name: task.validation.display().to_string(),
                right: validation.classes().join(", "),
                hint: Some("class numbers come from the names in order: both data sets need the same classes".into()),
            });
        }
        let tokenizer_paths = BundlePaths::find(&task.tokenizer)?;
        let tokenizer_config: TokenizerConfig = bundle::read_config(&tokenizer_paths, Part::Tokenizer)?;
        tokenizer_config.spec()?.must_equal(&task.tokenizer.display().to_string(), model_spec, "the recipe's model")?;
        let made_by = &train.manifest().origin.tokenizer.sha256;
        let manifest = tokenizer_paths.manifest()?;
        if let Some(part) = manifest.parts.get(&Part::Tokenizer)
            && part.sha256 != *made_by
        {
            return Err(Error::Mismatch {
                what: "tokens and tokenizer".into(),
                left_name: task.train.display().to_string(),
                left: format!("made by a tokenizer with weights {made_by}"),
                right_name: task.tokenizer.display().to_string(),
                right: format!("weights {}", part.sha256),
                hint: Some("run `smalti tokenize` again with this tokenizer".into()),
            });
        }
        let tokenizer = bundle::read_weights(&tokenizer_paths, Part::Tokenizer, tokenizer_config.init(device)?)?;
        let text = text_tokenizer(task, &train)?;
        let condition = task.model.condition();
        let captions = match (&task.captions, &text) {
            (Some(config), Some(text)) => Some(Captions::read(&train, &task.train, config, text.clone(), recipe.seed)?),
            _ => None,
        };
        Ok(Self {
            captions,
            train: Tokens::read(&train, &task.train, condition, text.as_ref())?,
            validation: Tokens::read(&validation, &task.validation, condition, text.as_ref())?,
            task: task.clone(),
            evaluation: recipe.evaluation.clone(),
            name: recipe.name.clone(),
            seed: recipe.seed,
            micro_batch: recipe.batch.size,
            device: device.clone(),
            text,
            tokenizer_paths,
            tokenizer_config,
            tokenizer,
        })
    }

    /// A model with fresh weights, and what it needs of the tokenizer's.
    ///
    /// # Errors
    /// A configuration whose numbers do not fit, or a quantizer that does not fit it.
    pub fn init(&self, device: &Device) -> Result<GeneratorModel> {
        self.task.model.init(device)?.adopt(self.tokenizer.quantizer())
    }

    fn codes(&self, codes: Vec<i32>, device: &Device) -> Tensor<2, Int> {
        let length = self.task.model.tokens().length();
        let rows = codes.len() / length;
        Tensor::from_data(TensorData::new(codes, [rows, length]), device)
    }

    /// Pictures of training captions above, of validation captions below.
    fn samples(&self, model: &GeneratorModel) -> Result<smalti_data::image::Image> {
        let half = (self.evaluation.pictures / 2).max(1);
        let images = [&self.train, &self.validation]
            .into_iter()
            .flat_map(|tokens| tokens.spread(half))
            .enumerate()
            .map(|(i, condition)| ImageRequest { condition, seed: i as u64, known: None })
            .collect();
        let mut generation = model.start(&Request { images, sampling: self.task.sampling.clone() })?;
        while generation.done() < generation.steps() {
            generation.next();
        }
        grid(&pictures(self.tokenizer.decode(&generation.codes()))?, half, 2)
    }
}

impl Objective for GeneratorObjective {
    type Model = GeneratorModel;
    type Batch = TokenBatch;

    fn batches(&self, start: u64) -> Result<Box<dyn Iterator<Item = Result<TokenBatch>> + '_>> {
        let order = Order::new(self.seed, self.train.codes.len());
        let mut at = start;
        Ok(Box::new(std::iter::from_fn(move || {
            let mut batch = TokenBatch { codes: Vec::new(), conditions: Vec::new() };
            for _ in 0..self.micro_batch {
                let (epoch, row) = order.at(at);
                batch.codes.extend(&self.train.codes[row]);
                let drawn = self.captions.as_ref().map_or(Ok(None), |captions| captions.draw(row, epoch));
                match drawn {
                    Ok(drawn) => batch.conditions.push(drawn.unwrap_or_else(|| self.train.conditions[row].clone())),
                    Err(error) => return Some(Err(error)),
                }
                at += 1;
            }
            Some(Ok(batch))
        })))
    }

    fn epoch(&self) -> u64 {
        self.train.codes.len() as u64
    }

    fn step(&self, model: &GeneratorModel, batch: TokenBatch, step: u64, micro: u64) -> Result<StepOutput> {
        let device = self.device.clone().autodiff();
        let mut stream = Rng::new(self.seed).stream(STEP_STREAM + micro, step);
        let loss = model.loss(self.codes(batch.codes, &device), &batch.conditions, &mut stream)?;
        let bits = loss.nats_per_token.inner() / std::f64::consts::LN_2;
        let terms = vec![("loss", loss.loss.clone().inner()), ("bits_per_token", bits)];
        let gradients = GradientsParams::from_grads(loss.loss.backward(), model);
        Ok(StepOutput { gradients, terms, stats: None, codes: None })
    }

    fn evaluate(&self, model: &GeneratorModel, _: &dyn Progress) -> Result<Evaluation> {
        let images = self.validation.codes.len().min(self.evaluation.images);
        let mut nats = 0.0;
        for first in (0..images).step_by(self.micro_batch) {
            let rows = first..(first + self.micro_batch).min(images);
            let codes: Vec<i32> = rows.clone().flat_map(|row| self.validation.codes[row].iter().copied()).collect();
            let conditions = &self.validation.conditions[rows.clone()];
            let loss = model.validation_loss(self.codes(codes, &self.device), conditions, first as u64)?;
            nats += f64::from(loss.nats_per_token.into_scalar::<f32>()) * rows.len() as f64;
        }
        let bits_per_token = nats / images as f64 / std::f64::consts::LN_2;
        let spec = self.task.model.tokens();
        let (h, w) = spec.image_size;
        let bits_per_pixel = bits_per_token * spec.length() as f64 / (h * w) as f64;
        Ok(Evaluation {
            values: vec![("bits_per_token".into(), bits_per_token), ("bits_per_pixel".into(), bits_per_pixel)],
            score: bits_per_token,
            picture: Some(self.samples(model)?),
        })
    }

    fn export(&self, model: &GeneratorModel, folder: &Path, facts: &serde_json::Value) -> Result<()> {
        let paths = BundlePaths::at(folder);
        let old = self.tokenizer_paths.manifest()?;
        let mut manifest = Manifest::new(&self.name);
        manifest.sampling = self.task.sampling.clone();
        manifest.classes = match self.task.model.condition() {
            ConditionConfig::Class { .. } => self.train.classes.clone(),
            _ => Vec::new(),
        };
        manifest.training.insert("generator".into(), facts.clone());
        if let Some(tokenizer) = old.training.get("tokenizer") {
            manifest.training.insert("tokenizer".into(), tokenizer.clone());
        }
        let precision = Precision::F16;
        let part = bundle::write_part(&paths, Part::Generator, &self.task.model, model, precision)?;
        manifest.parts.insert(Part::Generator, part);
        // The tokenizer's files are copied as they are, so that their checksum still names the tokenizer of the tokens.
        files::create_folder(&folder.join(Part::Tokenizer.name()))?;
        files::write_bytes(
            &paths.weights(Part::Tokenizer),
            &files::read(&self.tokenizer_paths.weights(Part::Tokenizer))?,
        )?;
        smalti_base::config::write_json(&paths.config(Part::Tokenizer), &self.tokenizer_config)?;
        if let Some(part) = old.parts.get(&Part::Tokenizer) {
            manifest.parts.insert(Part::Tokenizer, part.clone());
        }
        if let Some(text) = &self.text {
            files::create_folder(&folder.join("text"))?;
            text.save(&paths.text_tokenizer())?;
            manifest.text_sha256 = Some(files::sha256_file(&paths.text_tokenizer())?);
        }
        manifest.write(folder)
    }
}

impl Tokens {
    fn read(shards: &Shards, path: &Path, condition: &ConditionConfig, text: Option<&TextTokenizer>) -> Result<Self> {
        let mut tokens = Self {
            codes: Vec::with_capacity(shards.len()),
            conditions: Vec::with_capacity(shards.len()),
            classes: shards.classes().to_vec(),
        };
        for index in 0..shards.len() {
            let row = shards.row(index)?;
            let place = || format!("{}: image `{}`", path.display(), row.key);
            tokens.conditions.push(match (condition, text) {
                (ConditionConfig::None, _) => Condition::None,
                (ConditionConfig::Class { classes }, _) => match row.label {
                    Some(label) if (label as usize) < *classes => Condition::Class(label),
                    Some(label) => {
                        let problem = format!("has class {label}, but the model has {classes}");
                        return Err(Error::invalid(place(), problem));
                    }
                    None => return Err(Error::invalid(place(), "has no class, but the model's condition is a class")),
                },
                (ConditionConfig::Text { .. }, Some(text)) => match &row.text {
                    Some(caption) => Condition::Text(text.encode(caption)?),
                    None => return Err(Error::invalid(place(), "has no caption, but the model's condition is text")),
                },
                (ConditionConfig::Text { .. }, None) => {
                    return Err(Error::invalid("recipe: task.text", "is missing, but the model's condition is text"));
                }
            });
            tokens.codes.push(row.codes.iter().map(|code| *code as i32).collect());
        }
        match tokens.codes.is_empty() {
            true => Err(Error::file(path, "holds no images")),
            false => Ok(tokens),
        }
    }

    /// So many conditions, spread over the data.
    fn spread(&self, count: usize) -> Vec<Condition> {
        let images = self.conditions.len();
        (0..count).map(|i| self.conditions[i * images / count % images].clone()).collect()
    }
}

fn text_tokenizer(task: &GeneratorTask, train: &Shards) -> Result<Option<TextTokenizer>> {
    let tokenizer = match &task.text {
        None => return Ok(None),
        Some(TextConfig::File { path }) => TextTokenizer::load(path)?,
        Some(TextConfig::Bpe { vocabulary }) => {
            let words = |i| match &task.captions {
                Some(_) => phrases(train, i),
                None => Ok(vec![train.row(i)?.text.unwrap_or_default()]),
            };
            let captions = (0..train.len()).map(words).collect::<Result<Vec<_>>>()?.concat();
            TextTokenizer::train_bpe(&captions, *vocabulary)?
        }
    };
    if let ConditionConfig::Text { vocabulary, .. } = task.model.condition()
        && tokenizer.vocabulary() > *vocabulary
    {
        return Err(Error::invalid(
            "recipe: task.model.condition.vocabulary",
            format!("is {vocabulary}, but the text tokenizer has {} ids", tokenizer.vocabulary()),
        ));
    }
    Ok(Some(tokenizer))
}
