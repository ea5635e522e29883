//! Training a generator on tokens.

use super::captions::{Captions, phrases};
use crate::objective::{Evaluation, Objective, StepOutput};
use crate::pixels;
use crate::recipe::{ConditionTokens, EvaluationConfig, GeneratorTask, Recipe, TextConfig};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use smalti_base::{Error, Progress, Result, Rng, TokenSpec, files, rng::Stream};
use smalti_data::image::grid;
use smalti_data::loader::Order;
use smalti_data::shard::{RowTokens, Shards};
use smalti_data::text::TextTokenizer;
use smalti_models::Codes;
use smalti_models::checkpoint::bundle::{self, BundlePaths, Manifest, Part};
use smalti_models::checkpoint::weights::Precision;
use smalti_models::generators::{Condition, ConditionConfig, Generator, GeneratorModel, ImageRequest, Request};
use smalti_models::tokenizers::{Tokenizer, TokenizerConfig, TokenizerModel};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Draws of a step use streams of their own, apart from those that order the data.
const STEP_STREAM: u64 = 1 << 32;
/// So have those of tokens that are drawn anew in each epoch.
const TOKEN_STREAM: u64 = 3 << 32;

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
    tokenizer: TokenizerModel,
    condition_paths: Option<BundlePaths>,
}

/// Token shards in memory, with their conditions.
struct Tokens {
    shards: Shards,
    conditions: Vec<Condition>,
    classes: Vec<String>,
}

/// A micro-batch of tokens.
pub struct TokenBatch {
    tokens: Values,
    conditions: Vec<Condition>,
}

/// Tokens of images, one after the other.
enum Values {
    Discrete(Vec<i32>),
    Continuous(Vec<f32>),
}

impl Values {
    fn empty(spec: &TokenSpec) -> Self {
        match spec.channels() {
            None => Self::Discrete(Vec::new()),
            Some(_) => Self::Continuous(Vec::new()),
        }
    }

    /// Adds an image's tokens; vectors with deviations are drawn.
    fn push(&mut self, row: RowTokens, mut stream: Stream) {
        match (self, row) {
            (Self::Discrete(all), RowTokens::Discrete(codes)) => all.extend(codes.iter().map(|code| *code as i32)),
            (Self::Continuous(all), RowTokens::Continuous { means, deviations }) => match deviations.is_empty() {
                true => all.extend(means),
                false => all.extend(means.iter().zip(deviations).map(|(mean, d)| mean + d * stream.normal())),
            },
            // Shards hold tokens of their spec's kind.
            (Self::Discrete(_), RowTokens::Continuous { .. }) | (Self::Continuous(_), RowTokens::Discrete(_)) => {}
        }
    }

    fn upload(self, spec: &TokenSpec, device: &Device) -> Codes {
        let length = spec.length();
        match self {
            Self::Discrete(codes) => {
                let shape = [codes.len() / length, length];
                Codes::Discrete(Tensor::from_data(TensorData::new(codes, shape), device))
            }
            Self::Continuous(values) => {
                let channels = spec.channels().unwrap_or(1);
                let shape = [values.len() / (length * channels), length, channels];
                Codes::Continuous(Tensor::from_data(TensorData::new(values, shape), device))
            }
        }
    }
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
        must_be_made_by(&train, &task.train, &tokenizer_paths, &task.tokenizer)?;
        let tokenizer = bundle::read_weights(&tokenizer_paths, Part::Tokenizer, tokenizer_config.init(device)?)?;
        let text = text_tokenizer(task, &train)?;
        let condition = task.model.condition();
        let codes = task.condition_tokens.as_ref().map(|tokens| ConditionCodes::open(tokens, condition)).transpose()?;
        let [train_codes, validation_codes] = match &codes {
            Some(codes) => codes.of_images.each_ref().map(Some),
            None => [None, None],
        };
        let captions = match (&task.captions, &text) {
            (Some(config), Some(text)) => Some(Captions::read(&train, &task.train, config, text.clone(), recipe.seed)?),
            _ => None,
        };
        Ok(Self {
            captions,
            train: Tokens::read(train, &task.train, condition, text.as_ref(), train_codes)?,
            validation: Tokens::read(validation, &task.validation, condition, text.as_ref(), validation_codes)?,
            condition_paths: codes.map(|codes| codes.paths),
            task: task.clone(),
            evaluation: recipe.evaluation.clone(),
            name: recipe.name.clone(),
            seed: recipe.seed,
            micro_batch: recipe.batch.size,
            device: device.clone(),
            text,
            tokenizer_paths,
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

    /// Pictures of training captions above, of validation captions below.
    fn samples(&self, model: &GeneratorModel) -> Result<smalti_data::image::Image> {
        let half = (self.evaluation.pictures / 2).max(1);
        let images = [&self.train, &self.validation]
            .into_iter()
            .flat_map(|tokens| tokens.spread(half))
            .enumerate()
            .map(|(i, condition)| ImageRequest { condition, seed: i as u64, known: None })
            .collect();
        let mut generation = model.start(&Request::new(images, self.task.sampling.clone()))?;
        while generation.done() < generation.steps() {
            generation.next();
        }
        let planes = self.tokenizer.planes();
        let images = pixels::download(self.tokenizer.decode(&generation.codes()), planes)?;
        let images: Vec<_> = images.into_iter().map(|image| image.visible(planes)).collect();
        grid(&images, half, 2)
    }
}

impl Objective for GeneratorObjective {
    type Model = GeneratorModel;
    type Batch = TokenBatch;

    fn batches(&self, start: u64) -> Result<Box<dyn Iterator<Item = Result<TokenBatch>> + '_>> {
        let order = Order::new(self.seed, self.train.conditions.len());
        let mut at = start;
        let mut batch = move || {
            let mut batch = TokenBatch { tokens: Values::empty(self.task.model.tokens()), conditions: Vec::new() };
            for _ in 0..self.micro_batch {
                let (epoch, row) = order.at(at);
                let stream = Rng::new(self.seed).stream(TOKEN_STREAM + row as u64, epoch);
                batch.tokens.push(self.train.shards.tokens(row)?, stream);
                let drawn = self.captions.as_ref().map_or(Ok(None), |captions| captions.draw(row, epoch))?;
                batch.conditions.push(drawn.unwrap_or_else(|| self.train.conditions[row].clone()));
                at += 1;
            }
            Ok(batch)
        };
        Ok(Box::new(std::iter::from_fn(move || Some(batch()))))
    }

    fn epoch(&self) -> u64 {
        self.train.conditions.len() as u64
    }

    fn step(&self, model: &GeneratorModel, batch: TokenBatch, step: u64, micro: u64) -> Result<StepOutput> {
        let device = self.device.clone().autodiff();
        let mut stream = Rng::new(self.seed).stream(STEP_STREAM + micro, step);
        let codes = batch.tokens.upload(self.task.model.tokens(), &device);
        smalti_kernels::on_pool(&self.device, || {
            let loss = model.loss(codes, &batch.conditions, &mut stream)?;
            let mut terms = vec![("loss", loss.loss.clone().inner())];
            let bits = loss.nats_per_token.map(|nats| nats.inner() / std::f64::consts::LN_2);
            terms.extend(bits.map(|bits| ("bits_per_token", bits)));
            let gradients = GradientsParams::from_grads(loss.loss.backward(), model);
            Ok(StepOutput { gradients, terms, stats: None, codes: None })
        })
    }

    fn evaluate(&self, model: &GeneratorModel, _: &dyn Progress) -> Result<Evaluation> {
        let images = self.validation.conditions.len().min(self.evaluation.images);
        let spec = self.task.model.tokens();
        let (mut sum, mut has_bits) = (0.0, false);
        for first in (0..images).step_by(self.micro_batch) {
            let rows = first..(first + self.micro_batch).min(images);
            let mut tokens = Values::empty(spec);
            for row in rows.clone() {
                tokens.push(self.validation.shards.tokens(row)?, Rng::new(0).stream(TOKEN_STREAM + row as u64, 0));
            }
            let conditions = &self.validation.conditions[rows.clone()];
            let loss = model.validation_loss(tokens.upload(spec, &self.device), conditions, first as u64)?;
            has_bits = loss.nats_per_token.is_some();
            sum += f64::from(loss.nats_per_token.unwrap_or(loss.loss).into_scalar::<f32>()) * rows.len() as f64;
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

struct CodesByKey {
    folder: PathBuf,
    codes: HashMap<String, Vec<u32>>,
}

impl ConditionCodes {
    fn open(tokens: &ConditionTokens, condition: &ConditionConfig) -> Result<Self> {
        let paths = BundlePaths::find(&tokens.tokenizer)?;
        let spec = bundle::read_config::<TokenizerConfig>(&paths, Part::Tokenizer)?.spec()?;
        let place = tokens.tokenizer.display().to_string();
        condition.must_fit(&spec, &place)?;
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

impl Tokens {
    fn read(
        shards: Shards,
        path: &Path,
        condition: &ConditionConfig,
        text: Option<&TextTokenizer>,
        codes: Option<&CodesByKey>,
    ) -> Result<Self> {
        let mut conditions = Vec::with_capacity(shards.len());
        for index in 0..shards.len() {
            let row = shards.row(index)?;
            let place = || format!("{}: image `{}`", path.display(), row.key);
            conditions.push(match (condition, text) {
                (ConditionConfig::None | ConditionConfig::Coordinates { .. }, _) => Condition::None,
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
                (ConditionConfig::Codes { .. }, _) => match codes.map(|codes| (codes, codes.codes.get(&row.key))) {
                    Some((_, Some(codes))) => Condition::Codes(codes.clone()),
                    Some((codes, None)) => {
                        let problem = format!(
                            "{} has no row with this key, which would be its condition",
                            codes.folder.display()
                        );
                        return Err(Error::invalid(place(), problem));
                    }
                    None => return Err(Error::invalid("recipe: task.condition_tokens", "is missing")),
                },
                (ConditionConfig::Text { .. }, None) => {
                    return Err(Error::invalid("recipe: task.text", "is missing, but the model's condition is text"));
                }
            });
        }
        match conditions.is_empty() {
            true => Err(Error::file(path, "holds no images")),
            false => Ok(Self { classes: shards.classes().to_vec(), shards, conditions }),
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
