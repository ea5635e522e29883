//! What a generator learns from: token shards, or images that its tokenizer turns into tokens at each step.

use super::images;
use super::skipped::Seen;
use crate::conditions::{ConditionReader, Facts, must_say};
use crate::pixels;
use crate::recipe::ExampleSource;
use burn::tensor::{Device, Tensor, TensorData};
use smalti_base::{Error, Planes, Result, Rng, TokenSpec, files, rng::Stream};
use smalti_data::DataConfig;
use smalti_data::datasets::{About, Dataset};
use smalti_data::loader::{ImageBatch, Loader, LoaderConfig, Order, Skipped};
use smalti_data::shard::{RowTokens, Shards};
use smalti_models::Codes;
use smalti_models::generators::{Condition, Conditions, SoftTargets};
use smalti_models::tokenizers::{TokenMoments, TokenizerModel};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

/// Tokens that are drawn anew in each epoch use streams of their own.
const TOKEN_STREAM: u64 = 3 << 32;

/// Where examples are, opened, before their conditions are read.
#[allow(clippy::large_enum_variant, reason = "a run holds two of them")]
pub(super) enum Opened {
    /// Tokens that `smalti tokenize` wrote.
    Tokens(Shards, PathBuf),
    /// Images.
    Images(Arc<dyn Dataset>, DataConfig),
}

impl Opened {
    /// Opens the source, whose section in the recipe is `key`, for a tokenizer of this kind of images; `classes`, if given, are the names that labels of images count by.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for tokens of another kind than the model's, or what opening returns.
    pub(super) fn open(
        source: &ExampleSource,
        key: &str,
        (spec, planes): (&TokenSpec, Planes),
        classes: Option<&[String]>,
    ) -> Result<Self> {
        match source {
            ExampleSource::Tokens(path) => {
                let shards = Shards::open(path)?;
                spec.must_equal("the recipe's model", shards.spec(), &path.display().to_string())?;
                Ok(Self::Tokens(shards, path.clone()))
            }
            ExampleSource::Images(config) => {
                let classes = classes.filter(|classes| !classes.is_empty());
                let dataset = images::open(config, key, spec.image_size, planes, classes)?;
                Ok(Self::Images(dataset.into(), config.clone()))
            }
        }
    }

    pub(super) fn place(&self) -> String {
        match self {
            Self::Tokens(_, path) => path.display().to_string(),
            Self::Images(_, config) => config.path.display().to_string(),
        }
    }

    pub(super) fn classes(&self) -> &[String] {
        match self {
            Self::Tokens(shards, _) => shards.classes(),
            Self::Images(dataset, _) => dataset.classes(),
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Tokens(shards, _) => shards.len(),
            Self::Images(dataset, _) => dataset.len(),
        }
    }

    /// Name, class, caption and keywords of an example.
    pub(super) fn about(&self, index: usize) -> Result<About> {
        match self {
            Self::Tokens(shards, _) => {
                let row = shards.row(index)?;
                Ok(About { key: row.key, label: row.label, text: row.text, keywords: row.keywords })
            }
            Self::Images(dataset, _) => dataset.about(index),
        }
    }

    /// What identifies the examples.
    ///
    /// # Errors
    /// What reading labels and captions returns.
    pub(super) fn identity(&self) -> Result<String> {
        match self {
            Self::Tokens(shards, _) => {
                let manifest = shards.manifest();
                let sums: Vec<&str> = manifest.shards.iter().map(|shard| shard.sha256.as_str()).collect();
                let sha256 = files::sha256_bytes(sums.join("\n").as_bytes());
                Ok(format!("{} token shards of {} rows, contents {sha256}", sums.len(), shards.len()))
            }
            Self::Images(dataset, _) => images::identity(&**dataset),
        }
    }

    pub(super) fn warnings(&self) -> Vec<String> {
        match self {
            Self::Tokens(..) => Vec::new(),
            Self::Images(dataset, _) => images::warnings(&**dataset).collect(),
        }
    }

    /// Caption and keywords of an example, each once.
    pub(super) fn phrases(&self, index: usize) -> Result<Vec<String>> {
        let about = self.about(index)?;
        let mut phrases: Vec<String> = about.text.into_iter().collect();
        for keyword in about.keywords {
            if !phrases.contains(&keyword) {
                phrases.push(keyword);
            }
        }
        Ok(phrases)
    }
}

/// The codes that images are conditioned on, by the images' keys.
pub(super) struct CodesByKey {
    pub(super) folder: PathBuf,
    pub(super) codes: HashMap<String, Vec<u32>>,
}

impl CodesByKey {
    fn of(&self, key: &str, place: &str) -> Result<&[u32]> {
        let problem = || format!("{} has no row with this key, which would be its condition", self.folder.display());
        self.codes.get(key).map(Vec::as_slice).ok_or_else(|| Error::invalid(place, problem()))
    }
}

/// Examples with their conditions.
pub(super) struct Examples {
    pub(super) conditions: Vec<Condition>,
    pub(super) classes: Vec<String>,
    opened: Opened,
}

/// Checks that each example says what the model's condition is, without making conditions of it.
///
/// # Errors
/// As [`Examples::read`].
pub(super) fn must_all_say(opened: &Opened, takes: &Conditions, codes: Option<&CodesByKey>) -> Result<()> {
    for index in 0..opened.len() {
        let about = opened.about(index)?;
        let place = format!("{}: image `{}`", opened.place(), about.key);
        let codes = codes.map(|codes| codes.of(&about.key, &place)).transpose()?;
        must_say(takes, &place, Facts { label: about.label, text: about.text.as_deref(), codes })?;
    }
    match opened.len() {
        0 => Err(Error::invalid(opened.place(), "holds no images")),
        _ => Ok(()),
    }
}

impl Examples {
    /// Reads the condition of every example.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names an example without what the model's condition is.
    pub(super) fn read(opened: Opened, reader: &ConditionReader, codes: Option<&CodesByKey>) -> Result<Self> {
        let mut conditions = Vec::with_capacity(opened.len());
        for index in 0..opened.len() {
            let about = opened.about(index)?;
            let place = format!("{}: image `{}`", opened.place(), about.key);
            let codes = codes.map(|codes| codes.of(&about.key, &place)).transpose()?;
            let facts = Facts { label: about.label, text: about.text.as_deref(), codes };
            conditions.push(reader.whole(&place, facts)?);
        }
        match conditions.is_empty() {
            true => Err(Error::invalid(opened.place(), "holds no images")),
            false => Ok(Self { classes: opened.classes().to_vec(), opened, conditions }),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.conditions.len()
    }

    pub(super) fn opened(&self) -> &Opened {
        &self.opened
    }

    /// So many conditions, spread over the data.
    pub(super) fn spread(&self, count: usize) -> Vec<Condition> {
        let images = self.len();
        (0..count).map(|i| self.conditions[i * images / count % images].clone()).collect()
    }

    /// Endless batches in the order of training, from example `start` on.
    ///
    /// # Errors
    /// Images that cannot be loaded in batches.
    pub(super) fn endless(&self, batch: usize, planes: Planes, seed: u64, start: u64) -> Result<Endless<'_>> {
        let loader = match &self.opened {
            Opened::Tokens(..) => None,
            Opened::Images(dataset, config) => {
                let config = LoaderConfig::new(config, batch)?.with_planes(planes)?;
                Some(Loader::new(dataset.clone(), config, seed, start)?)
            }
        };
        Ok(Endless {
            examples: self,
            order: Order::new(seed, self.len()),
            batch,
            seed,
            at: start,
            loader,
            seen: Seen::default(),
        })
    }

    /// Every example once, at most so many, in batches.
    ///
    /// # Errors
    /// As [`Self::endless`].
    pub(super) fn once(&self, batch: usize, planes: Planes, most: usize) -> Result<Once<'_>> {
        let loader = match &self.opened {
            Opened::Tokens(..) => None,
            Opened::Images(dataset, config) => {
                let config = LoaderConfig::new(config, batch)?.with_planes(planes)?;
                Some(Loader::ordered(dataset.clone(), config, 0, 0)?)
            }
        };
        Ok(Once { examples: self, batch, most: most.min(self.len()), at: 0, loader, seen: Seen::default() })
    }

    fn rows(&self, rows: &[usize], streams: impl Fn(usize, usize) -> Stream) -> Result<Batch> {
        let Opened::Tokens(shards, _) = &self.opened else {
            return Err(Error::invalid(self.opened.place(), "holds images, not tokens"));
        };
        let mut values = Values::empty(shards.spec());
        for (i, row) in rows.iter().enumerate() {
            values.push(shards.tokens(*row)?, streams(i, *row))?;
        }
        let conditions = rows.iter().map(|row| self.conditions[*row].clone()).collect();
        Ok(Batch { indices: rows.to_vec(), content: Content::Tokens(values), conditions })
    }

    fn images(&self, images: ImageBatch) -> Batch {
        let conditions = images.indices.iter().map(|index| self.conditions[*index].clone()).collect();
        Batch { indices: images.indices.clone(), content: Content::Images(images), conditions }
    }
}

/// A micro-batch of examples on the host.
pub struct Batch {
    /// The number of each example.
    pub(super) indices: Vec<usize>,
    pub(super) conditions: Vec<Condition>,
    content: Content,
}

enum Content {
    Tokens(Values),
    Images(ImageBatch),
}

impl Batch {
    /// The tokens, on the device of `device`. Images go through the tokenizer, which is on the plain device; vectors with deviations
    /// and soft codes are drawn from `stream`, unless there is none.
    ///
    /// # Errors
    /// What the tokenizer returns.
    pub(super) fn tokens(
        self,
        tokenizer: &TokenizerModel,
        soft: Option<SoftTargets>,
        stream: Option<&mut Stream>,
        device: &Device,
    ) -> Result<Codes> {
        let (images, names) = match self.content {
            Content::Tokens(values) => return Ok(values.upload(tokenizer.spec(), device)),
            Content::Images(images) => {
                (pixels::upload_batch(&images, &device.clone().without_autodiff()), images.keys.clone())
            }
        };
        let codes = match (soft, stream) {
            (Some(soft), Some(stream)) => {
                tokenizer.soft_codes(images, soft.temperature, soft.stochastic.then_some(stream))?
            }
            (_, stream) => match (tokenizer.token_moments(images.clone()), stream) {
                (Some(TokenMoments { means_bnc, deviations_bnc: Some(deviations) }), Some(stream)) => {
                    let noise: Vec<f32> = (0..means_bnc.dims().iter().product()).map(|_| stream.normal()).collect();
                    let noise = Tensor::from_data(TensorData::new(noise, means_bnc.dims()), &means_bnc.device());
                    Codes::Continuous(means_bnc + deviations * noise)
                }
                (Some(moments), _) => Codes::Continuous(moments.means_bnc),
                (None, _) => tokenizer.encode(images)?,
            },
        };
        codes.must_be_whole(&names)?;
        Ok(if device.is_autodiff() { codes.autodiff() } else { codes })
    }

    pub(super) fn len(&self) -> usize {
        self.indices.len()
    }
}

/// See [`Examples::endless`].
pub(super) struct Endless<'a> {
    examples: &'a Examples,
    order: Order,
    batch: usize,
    seed: u64,
    /// The next example.
    at: u64,
    loader: Option<Loader>,
    seen: Seen,
}

impl Endless<'_> {
    /// Images that could not be used, since the last call.
    pub(super) fn skipped(&mut self) -> Vec<Skipped> {
        self.loader.as_ref().map(|loader| self.seen.new_of(loader)).unwrap_or_default()
    }

    fn rows(&mut self) -> Result<Batch> {
        let places: Vec<(u64, usize)> = (0..self.batch as u64).map(|i| self.order.at(self.at + i)).collect();
        let rows: Vec<usize> = places.iter().map(|(_, row)| *row).collect();
        let stream = |i: usize, row: usize| Rng::new(self.seed).stream(TOKEN_STREAM + row as u64, places[i].0);
        self.examples.rows(&rows, stream)
    }
}

impl Iterator for Endless<'_> {
    /// The batch, and the epoch of each of its examples.
    type Item = Result<(Batch, Vec<u64>)>;

    fn next(&mut self) -> Option<Self::Item> {
        let epochs = (0..self.batch as u64).map(|i| self.order.at(self.at + i).0).collect();
        let batch = match &mut self.loader {
            None => self.rows(),
            Some(loader) => loader.next()?.map(|images| self.examples.images(images)),
        };
        self.at += self.batch as u64;
        Some(batch.map(|batch| (batch, epochs)))
    }
}

/// See [`Examples::once`].
pub(super) struct Once<'a> {
    examples: &'a Examples,
    batch: usize,
    most: usize,
    /// The next example.
    at: usize,
    loader: Option<Loader>,
    seen: Seen,
}

impl Once<'_> {
    /// Images that could not be used so far.
    pub(super) fn skipped(&mut self) -> Vec<Skipped> {
        self.loader.as_ref().map(|loader| self.seen.new_of(loader)).unwrap_or_default()
    }
}

impl Iterator for Once<'_> {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.most {
            return None;
        }
        let batch = match &mut self.loader {
            None => {
                let rows: Vec<usize> = (self.at..(self.at + self.batch).min(self.most)).collect();
                self.examples.rows(&rows, |_, row| Rng::new(0).stream(TOKEN_STREAM + row as u64, 0))
            }
            Some(loader) => loader.next()?.map(|images| self.examples.images(images)),
        };
        self.at += self.batch;
        Some(batch)
    }
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
    ///
    /// # Errors
    /// [`Error::Invalid`] for tokens of another kind than the spec's, or deviations of another number than means.
    fn push(&mut self, row: RowTokens, mut stream: Stream) -> Result<()> {
        match (self, row) {
            (Self::Discrete(all), RowTokens::Discrete(codes)) => all.extend(codes.iter().map(|code| *code as i32)),
            (Self::Continuous(all), RowTokens::Continuous { means, deviations }) => match deviations.is_empty() {
                true => all.extend(means),
                false if means.len() == deviations.len() => {
                    all.extend(means.iter().zip(deviations).map(|(mean, d)| mean + d * stream.normal()));
                }
                false => {
                    let problem = format!("{} means and {} deviations", means.len(), deviations.len());
                    return Err(Error::invalid("tokens of an image", problem));
                }
            },
            (Self::Discrete(_), RowTokens::Continuous { .. }) | (Self::Continuous(_), RowTokens::Discrete(_)) => {
                return Err(Error::invalid("tokens of an image", "codes and vectors are mixed"));
            }
        }
        Ok(())
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
