//! Token shards: the tokens of a data set on disk, in one place for all verbs.
//!
//! A folder holds `manifest.json` and `tokens-00000.safetensors`, `tokens-00001.safetensors`, ... Each shard stands for a fixed range of
//! the data set, so that a rerun goes on at the first shard that is not there. A shard holds
//!
//! | tensor | type | shape | |
//! |---|---|---|---|
//! | `codes` | u16, or u32 for more than 65536 codes | `[rows, length]` | in the order of the spec's layout |
//! | `means` | f16 | `[rows, length, channels]` | instead of `codes`, for tokens that are vectors |
//! | `deviations` | f16 | as `means` | only for tokenizers that are not certain: how far a token may be off |
//! | `labels` | i32 | `[rows]` | -1 is none |
//! | `keys`, `texts` | u8 | `[bytes]` | UTF-8, one after another; an empty text is none |
//! | `key_offsets`, `text_offsets` | u64 | `[rows + 1]` | where each begins and the last ends |
//! | `keywords`, `keyword_offsets` | u8, u64 | as those | keywords of a row with line feeds between them; left out if no row has any |
//!
//! and in its metadata, as JSON under `smalti`, the spec and the tokenizer that made it.

mod contents;
mod file;
mod read;
mod write;

pub use contents::Contents;
pub use read::Shards;
pub use write::ShardWriter;

use crate::datasets::Description;
use crate::loader::Skipped;
use half::f16;
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result, TokenSpec, config};
use std::path::{Path, PathBuf};

/// Value of [`Manifest::format`].
pub const FORMAT: &str = "smalti-tokens";
/// The only version so far.
pub const VERSION: u32 = 1;
const MANIFEST: &str = "manifest.json";

/// Which tokenizer made tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerId {
    /// Kind or name, for people.
    pub name: String,
    /// SHA-256 of its weights.
    pub sha256: String,
}

impl std::fmt::Display for TokenizerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} with weights {}", self.name, self.sha256)
    }
}

/// What all shards of a folder have in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// Arrangement and kind of the tokens.
    pub spec: TokenSpec,
    /// What made them.
    pub tokenizer: TokenizerId,
    /// What they were made from.
    pub data: Description,
    /// What was done to the images first, as text; compared, not interpreted.
    pub transforms: String,
    /// Names of the classes.
    pub classes: Vec<String>,
}

impl Origin {
    /// An error that shows the first difference. The data set's path does not count, only what is in it.
    fn must_equal(&self, place: &Path, other: &Self) -> Result<()> {
        let data = |d: &Description| format!("{} of {} images, keys {}", d.kind, d.images, d.keys);
        let pairs = [
            ("tokenizers", self.tokenizer.to_string(), other.tokenizer.to_string()),
            ("tokens", self.spec.to_string(), other.spec.to_string()),
            ("data sets", data(&self.data), data(&other.data)),
            ("transforms", self.transforms.clone(), other.transforms.clone()),
            ("classes", self.classes.join(", "), other.classes.join(", ")),
        ];
        match pairs.into_iter().find(|(_, found, asked)| found != asked) {
            None => Ok(()),
            Some((what, left, right)) => Err(Error::Mismatch {
                what: format!("the {what} of {} and of this run", place.display()),
                left_name: "there".into(),
                left,
                right_name: "this run".into(),
                right,
                hint: Some("write to another folder".into()),
            }),
        }
    }
}

/// One finished shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// File name.
    pub name: String,
    /// First image of the data set that it stands for.
    pub first: usize,
    /// The image after the last one.
    pub end: usize,
    /// Rows in it; fewer than images where some were skipped.
    pub rows: usize,
    /// Bytes of the file.
    pub bytes: u64,
    /// SHA-256 of the file.
    pub sha256: String,
    /// SHA-256 over the bytes of the images that it stands for, as [`Contents::of`]; earlier versions did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contents: Option<String>,
}

/// What `manifest.json` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// What made the tokens, and from what.
    pub origin: Origin,
    /// Images of the data set that one shard stands for.
    pub per_shard: usize,
    /// Whether all shards are there.
    pub complete: bool,
    /// Finished shards, in order.
    pub shards: Vec<ShardEntry>,
    /// Images that have no row, and why.
    pub skipped: Vec<Skipped>,
}

impl Manifest {
    /// Reads the manifest of a folder.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] if it is not a manifest of this version or contradicts itself.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = Self::path(folder);
        let manifest: Self = config::read_json(&path)?;
        if (manifest.format.as_str(), manifest.version) != (FORMAT, VERSION) {
            return Err(Error::file(
                path,
                format!("format {} {}; expected {FORMAT} {VERSION}", manifest.format, manifest.version),
            ));
        }
        let mut next = 0;
        for (number, shard) in manifest.shards.iter().enumerate() {
            if shard.name != shard_name(number)
                || shard.first != next
                || shard.end <= next
                || shard.rows > shard.end - next
            {
                return Err(Error::file(
                    path,
                    format!("entry {number}, `{}`, does not follow the one before it", shard.name),
                ));
            }
            next = shard.end;
        }
        if next > manifest.origin.data.images {
            return Err(Error::file(path, format!("{next} images of {}", manifest.origin.data.images)));
        }
        Ok(manifest)
    }

    /// The manifest's path in a folder.
    pub fn path(folder: &Path) -> PathBuf {
        folder.join(MANIFEST)
    }

    /// Rows in all shards.
    pub fn rows(&self) -> usize {
        self.shards.iter().map(|shard| shard.rows).sum()
    }

    fn write(&self, folder: &Path) -> Result<()> {
        config::write_json(&Self::path(folder), self)
    }
}

/// What is stored of an image's tokens, in the order of the spec's layout.
#[derive(Clone, Debug, PartialEq)]
pub enum RowTokens {
    /// A code for each place.
    Discrete(Vec<u32>),
    /// Normal distributions of vectors: whoever reads them draws anew each time.
    Continuous {
        /// `channels` means for each place.
        means: Vec<f32>,
        /// As many standard deviations; empty if the tokens are certain.
        deviations: Vec<f32>,
    },
}

impl Default for RowTokens {
    fn default() -> Self {
        Self::Discrete(Vec::new())
    }
}

impl RowTokens {
    /// What is wrong with them as the tokens of a spec, if anything.
    fn misfit(&self, spec: &TokenSpec) -> Option<String> {
        match self {
            Self::Discrete(codes) => spec.codes_misfit(codes),
            Self::Continuous { means, deviations } => {
                let wrong = spec.vectors_misfit(means);
                let stored = |value: &f32| f16::from_f32(*value).is_finite();
                wrong.or_else(|| match deviations.is_empty() || deviations.len() == means.len() {
                    false => Some(format!("{} means and {} deviations", means.len(), deviations.len())),
                    true if !means.iter().chain(deviations).all(stored) => Some("a number is too large".into()),
                    true => deviations.iter().any(|d| *d < 0.0).then(|| "a deviation is negative".into()),
                })
            }
        }
    }
}

/// The tokens of one image.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenRow {
    /// The image's name in its data set.
    pub key: String,
    /// Its tokens.
    pub tokens: RowTokens,
    /// Class.
    pub label: Option<u32>,
    /// Caption; an empty one is none.
    pub text: Option<String>,
    /// Words and phrases that name what the image shows.
    pub keywords: Vec<String>,
}

fn shard_name(number: usize) -> String {
    format!("tokens-{number:05}.safetensors")
}
