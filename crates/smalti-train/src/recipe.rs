//! A recipe: a TOML file that holds all of a training run. Complete and strict.

use crate::ema::EmaConfig;
use crate::optimizer::OptimizerConfig;
use crate::schedule::Schedule;
use crate::start::StartConfig;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smalti_base::{Error, Result, config};
use smalti_data::datasets::DataConfig;
use smalti_models::encoders::EncoderConfig;
use smalti_models::generators::GeneratorConfig;
use smalti_models::losses::tokenizer::TokenizerLossConfig;
use smalti_models::sampling::Sampling;
use smalti_models::tokenizers::TokenizerConfig;
use std::fmt;
use std::path::{Path, PathBuf};

/// All of a training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Name of the run and of the bundle that it makes.
    pub name: String,
    /// Seed of the initial weights, of the order of the data and of every draw in training. TOML has no whole numbers above
    /// 9223372036854775807: those stand in quotes.
    #[serde(serialize_with = "write_seed", deserialize_with = "read_seed")]
    pub seed: u64,
    /// Where the initial weights come from; absent means fresh ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<StartConfig>,
    /// Regular expressions that parameter paths of the model begin with, such as `encoder`: those are not trained.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub frozen: Vec<String>,
    /// A finished model that the trained one imitates, beside its own loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<TeacherConfig>,
    /// What is trained, on what.
    pub task: Task,
    /// Images of a step.
    pub batch: Batch,
    /// Learning rate over the run, and its length.
    pub schedule: Schedule,
    /// AdamW.
    pub optimizer: OptimizerConfig,
    /// Averaged weights, used for evaluation and the bundle; absent means the trained weights are used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema: Option<EmaConfig>,
    /// How often a line is logged.
    #[serde(default)]
    pub logging: Logging,
    /// How often the model is measured.
    #[serde(default)]
    pub evaluation: EvaluationConfig,
    /// How often the run is saved.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
}

/// What is trained, on what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[allow(clippy::large_enum_variant)]
pub enum Task {
    /// A tokenizer, on images.
    Tokenizer(TokenizerTask),
    /// A generator, on the tokens that `smalti tokenize` wrote.
    Generator(GeneratorTask),
    /// An encoder, on images.
    Encoder(EncoderTask),
}

/// A tokenizer, on images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerTask {
    /// The network.
    pub model: TokenizerConfig,
    /// The loss.
    pub loss: TokenizerLossConfig,
    /// Images to learn from.
    pub train: DataConfig,
    /// Images to measure on.
    pub validation: DataConfig,
}

/// A generator, on tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GeneratorTask {
    /// The network.
    pub model: GeneratorConfig,
    /// Bundle or run folder of the tokenizer that made the tokens; it becomes a part of the bundle.
    pub tokenizer: PathBuf,
    /// What to learn from: a folder of token shards, or images.
    pub train: ExampleSource,
    /// What to measure on.
    pub validation: ExampleSource,
    /// How captions become token ids; only with a model whose condition is text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<TextConfig>,
    /// How training varies captions; only with a model whose condition is text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub captions: Option<CaptionConfig>,
    /// Where the condition of an image is; only with a model whose condition is codes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub condition_tokens: Option<ConditionTokens>,
    /// Sampling settings of the pictures shown in evaluations, which become the bundle's defaults.
    #[serde(default)]
    pub sampling: Sampling,
}

/// What a generator learns from: a folder of token shards, or a data section as for tokenizers. Images go through the tokenizer at
/// each step, so that they can be cropped and flipped anew, and targets can be soft; that costs the encoder's time.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "a recipe holds two of them")]
pub enum ExampleSource {
    /// The folder of token shards.
    Tokens(PathBuf),
    /// Images.
    Images(DataConfig),
}

impl Serialize for ExampleSource {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Tokens(path) => path.serialize(serializer),
            Self::Images(config) => config.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for ExampleSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PathOrImages;
        impl<'de> Visitor<'de> for PathOrImages {
            type Value = ExampleSource;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a folder of token shards, or a table of images with path and transforms")
            }

            fn visit_str<E: serde::de::Error>(self, path: &str) -> Result<ExampleSource, E> {
                Ok(ExampleSource::Tokens(path.into()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ExampleSource, A::Error> {
                DataConfig::deserialize(MapAccessDeserializer::new(map)).map(ExampleSource::Images)
            }
        }
        deserializer.deserialize_any(PathOrImages)
    }
}

/// An encoder, on images: on their classes if it has a head, on a teacher's features if there is one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderTask {
    /// The network.
    pub model: EncoderConfig,
    /// Images to learn from.
    pub train: DataConfig,
    /// Images to measure on.
    pub validation: DataConfig,
}

/// Tokens of images, such as depth maps, that belong to the images to learn from: those with the same keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConditionTokens {
    /// Bundle or run folder of the tokenizer that made them; it becomes a part of the bundle.
    pub tokenizer: PathBuf,
    /// Folder of token shards, for the images to learn from.
    pub train: PathBuf,
    /// Folder of token shards, for the images to measure on.
    pub validation: PathBuf,
}

/// How training varies captions, so that words count by themselves and not only as parts of one caption.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptionConfig {
    /// How often a caption is replaced by some of the image's phrases in random order, 0..=1. Its phrases are the caption itself
    /// and its keywords.
    #[serde(serialize_with = "smalti_base::config::decimal")]
    pub keywords: f32,
    /// Most phrases that such a caption has.
    #[serde(default = "three")]
    pub most: usize,
}

/// How captions become token ids.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum TextConfig {
    /// A `tokenizer.json` in the format of the `tokenizers` library.
    File {
        /// The file.
        path: PathBuf,
    },
    /// Byte-pair encoding trained on the captions of the training tokens.
    Bpe {
        /// Largest number of ids.
        vocabulary: usize,
    },
}

/// A finished model that is imitated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TeacherConfig {
    /// Its bundle or run folder.
    pub bundle: PathBuf,
    /// What of it is imitated.
    #[serde(default)]
    pub target: TeacherTarget,
    /// How much the mean squared error counts beside the model's own loss.
    #[serde(default = "full")]
    pub weight: f64,
}

/// What of a teacher is imitated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TeacherTarget {
    /// An encoder's features of the same images.
    #[default]
    Features,
    /// A tokenizer's codes of the same images.
    Codes,
}

/// Images of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Batch {
    /// Images of a micro-batch.
    pub size: usize,
    /// Micro-batches whose gradients are averaged before a step.
    #[serde(default = "one")]
    pub accumulate: usize,
}

/// How often a line is logged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logging {
    /// Steps between lines.
    pub every: u64,
}

/// How often the model is measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluationConfig {
    /// Steps between evaluations.
    pub every: u64,
    /// At most so many validation images.
    pub images: usize,
    /// Pictures in the sample grid.
    pub pictures: usize,
}

/// How often the run is saved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Steps between checkpoints.
    pub every: u64,
    /// The newest so many are kept, and the best.
    pub keep: usize,
}

impl Default for Logging {
    fn default() -> Self {
        Self { every: 20 }
    }
}

impl Default for EvaluationConfig {
    fn default() -> Self {
        Self { every: 1000, images: 1000, pictures: 16 }
    }
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every: 1000, keep: 2 }
    }
}

fn one() -> usize {
    1
}

fn full() -> f64 {
    1.0
}

fn three() -> usize {
    3
}

fn write_seed<S: Serializer>(seed: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    match i64::try_from(*seed) {
        Ok(seed) => serializer.serialize_i64(seed),
        Err(_) => serializer.serialize_str(&seed.to_string()),
    }
}

fn read_seed<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    struct NumberOrText;
    impl Visitor<'_> for NumberOrText {
        type Value = u64;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("u64, a whole number from 0 to 18446744073709551615")
        }

        fn visit_u64<E>(self, seed: u64) -> Result<u64, E> {
            Ok(seed)
        }

        fn visit_i64<E: serde::de::Error>(self, seed: i64) -> Result<u64, E> {
            u64::try_from(seed).map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(seed), &self))
        }

        fn visit_str<E: serde::de::Error>(self, seed: &str) -> Result<u64, E> {
            seed.parse().map_err(|_| E::invalid_value(serde::de::Unexpected::Str(seed), &self))
        }
    }
    deserializer.deserialize_any(NumberOrText)
}

impl Recipe {
    /// Reads a recipe and applies `key=value` settings.
    ///
    /// # Errors
    /// A file that cannot be read, a key that is not known, a value of the wrong type or out of range.
    pub fn read(path: &Path, settings: &[String]) -> Result<Self> {
        let recipe: Self = config::read_toml(path, settings)?;
        recipe.check(&path.display().to_string())?;
        Ok(recipe)
    }

    /// The recipe as a table with every default written out.
    ///
    /// # Errors
    /// A value that TOML cannot hold.
    pub fn table(&self) -> Result<toml::Table> {
        toml::Table::try_from(self).map_err(|e| Error::invalid(&self.name, e.to_string()))
    }

    /// Checks the name, the range of every number, and that the parts fit each other.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Unsupported`] with the key; `place` names the recipe.
    pub fn check(&self, place: &str) -> Result<()> {
        self.check_name(place)?;
        crate::ranges::check(place, &self.table()?)?;
        self.schedule.check(place)?;
        if let Task::Generator(task) = &self.task {
            task.check(place)?;
        }
        self.check_teacher(place)
    }

    /// The name becomes that of a folder.
    fn check_name(&self, place: &str) -> Result<()> {
        let plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.');
        let fits = self.name.chars().all(plain) && !self.name.starts_with('.') && (1..=100).contains(&self.name.len());
        match fits {
            true => Ok(()),
            false => Err(Error::invalid(
                format!("{place}: name"),
                format!(
                    "is {:?}, expected 1 to 100 letters, digits, `-`, `_` or `.`, and no `.` in front: the run's folder gets it",
                    self.name
                ),
            )),
        }
    }

    /// That the learning rate reaches its peak. A run that the settings make shorter than its recipe, to try it out, may end before.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the key.
    pub fn check_warmup(&self, place: &str, settings: &[String]) -> Result<()> {
        let sets =
            |key: &str| settings.iter().any(|setting| setting.split('=').next().is_some_and(|k| k.trim() == key));
        let is_shortened = sets("schedule.steps") && !sets("schedule.warmup");
        match self.schedule.reaches_its_peak() || is_shortened {
            true => Ok(()),
            false => Err(Error::invalid_hint(
                format!("{place}: schedule.warmup"),
                format!(
                    "is {}, but the run has only {} steps: it would never reach its learning rate",
                    self.schedule.warmup, self.schedule.steps
                ),
                "make it smaller",
            )),
        }
    }

    /// Only encoders learn from teachers, and an encoder without a head from nothing else.
    fn check_teacher(&self, place: &str) -> Result<()> {
        match (&self.task, &self.teacher) {
            (_, Some(TeacherConfig { target: TeacherTarget::Codes, .. })) => Err(Error::unsupported(
                format!("{place}: teacher.target = \"codes\""),
                "only an encoder's features are imitated: use target = \"features\" in a task of kind `encoder`",
            )),
            (Task::Encoder(task), None) if task.model.tells().is_none() => Err(Error::invalid_hint(
                format!("{place}: task.model"),
                "has no head and there is no teacher, so there is nothing to learn",
                "set task.model.classes, or give a teacher",
            )),
            (Task::Encoder(_), _) | (_, None) => Ok(()),
            (Task::Tokenizer(_) | Task::Generator(_), Some(_)) => Err(Error::unsupported(
                format!("{place}: a teacher of this task"),
                "only a task of kind `encoder` learns from a teacher's features; leave out `teacher`",
            )),
        }
    }
}

impl GeneratorTask {
    /// Text, codes and captions are given if the model's condition needs them, and only then.
    fn check(&self, place: &str) -> Result<()> {
        let reads_text = self.model.conditions().text().is_some();
        let reads_codes = self.model.conditions().codes().is_some();
        if self.model.soft_targets().is_some() && matches!(self.train, ExampleSource::Tokens(_)) {
            return Err(Error::invalid_hint(
                format!("{place}: task.train"),
                "is a folder of token shards, but the model's soft targets need the tokenizer's probabilities",
                "give the images as a table with path and transforms, or leave out the model's soft_targets",
            ));
        }
        for (key, given, condition, needed) in [
            ("text", self.text.is_some(), "text", reads_text),
            ("condition_tokens", self.condition_tokens.is_some(), "codes", reads_codes),
        ] {
            let problem = match (given, needed) {
                (false, true) => format!("is missing, but the model's condition is {condition}"),
                (true, false) => format!("is given, but the model's condition is not {condition}; leave it out"),
                _ => continue,
            };
            return Err(Error::invalid(format!("{place}: task.{key}"), problem));
        }
        match &self.captions {
            Some(_) if !reads_text => Err(Error::invalid(
                format!("{place}: task.captions"),
                "is given, but the model's condition is not text; leave it out",
            )),
            _ => Ok(()),
        }
    }
}
