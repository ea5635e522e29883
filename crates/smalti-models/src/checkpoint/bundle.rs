//! A bundle: the folder that holds a usable model.
//!
//! ```text
//! bundle.json                                     what it is, checksums, sampling defaults, class names
//! README.md                                       the model card
//! tokenizer/config.json  tokenizer/model.safetensors
//! generator/config.json  generator/model.safetensors
//! condition/config.json  condition/model.safetensors     for generators that read an image
//! text/tokenizer.json                             for generators that read captions
//! encoder/config.json    encoder/model.safetensors       a network that makes features of images
//! judge/config.json      judge/model.safetensors         an encoder that tells how well a picture shows its condition
//! next/bundle.json ...                            a bundle whose generator reads this one's tokens
//! ```
//! A part may be absent: a tokenizer alone is a bundle, and so is an encoder. A part may refer to weights elsewhere by file and checksum.

pub use super::reading::{read_config, read_decoder, read_packed, read_weights, verified};
use super::tensors::{Source, copy_tensors};
use super::weights::{Precision, parameter_map, save_module};
use crate::sampling::Sampling;
use burn::module::Module;
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result, config, files};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The version of the folder's layout that this library writes and reads.
pub const FORMAT: u32 = 1;

/// A part of a bundle that has weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Image to tokens and back.
    Tokenizer,
    /// Condition to tokens.
    Generator,
    /// Image to the codes that a generator is conditioned on: a tokenizer, of depth maps for example.
    Condition,
    /// Image to features.
    Encoder,
    /// What tells how well a picture of the generator shows its condition: an encoder with a head.
    Judge,
}

impl Part {
    /// All parts.
    pub const ALL: [Self; 5] = [Self::Tokenizer, Self::Generator, Self::Condition, Self::Encoder, Self::Judge];

    /// The name of the part's folder.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tokenizer => "tokenizer",
            Self::Generator => "generator",
            Self::Condition => "condition",
            Self::Encoder => "encoder",
            Self::Judge => "judge",
        }
    }
}

/// What a manifest says about a part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartFacts {
    /// SHA-256 of `model.safetensors`, in hexadecimal digits. It stands for the part: token shards carry the tokenizer's.
    pub sha256: String,
    /// Number of parameters and buffers.
    pub parameters: usize,
    /// Where the weights are, if the bundle does not hold them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refers: Option<Reference>,
}

/// Weights outside of a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reference {
    /// The file, a `model.safetensors` of another bundle; a relative path begins at the bundle's folder.
    pub file: PathBuf,
    /// SHA-256 that the file must have.
    pub sha256: String,
}

/// The contents of `bundle.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the layout, [`FORMAT`].
    pub format: u32,
    /// The model's name.
    pub name: String,
    /// Program and version that wrote the bundle.
    pub created_by: String,
    /// The parts with weights.
    pub parts: BTreeMap<Part, PartFacts>,
    /// SHA-256 of `text/tokenizer.json`, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_sha256: Option<String>,
    /// SHA-256 of `next/bundle.json`, if there is a next stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_sha256: Option<String>,
    /// Sampling settings that suit the model.
    #[serde(default)]
    pub sampling: Sampling,
    /// Names of the classes, by number; empty if the model has none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<String>,
    /// Facts of the training, such as data, steps and results, for the reader.
    #[serde(default)]
    pub training: serde_json::Map<String, serde_json::Value>,
}

impl Manifest {
    /// A manifest without parts.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            format: FORMAT,
            name: name.into(),
            created_by: concat!("smalti ", env!("CARGO_PKG_VERSION")).into(),
            parts: BTreeMap::new(),
            text_sha256: None,
            next_sha256: None,
            sampling: Sampling::default(),
            classes: Vec::new(),
            training: serde_json::Map::new(),
        }
    }

    /// Writes `bundle.json` and the model card `README.md` into the bundle folder.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, folder: &Path) -> Result<()> {
        files::write_bytes(&folder.join("README.md"), self.card().as_bytes())?;
        config::write_json(&folder.join("bundle.json"), self)
    }

    /// The model card in Markdown.
    pub fn card(&self) -> String {
        let mut card =
            format!("---\nlibrary_name: smalti\ntags: [image-generation, image-tokenizer]\n---\n\n# {}\n\n", self.name);
        card += &format!(
            "A model for smalti, written by {}.\n\n| part | parameters | sha256 of the weights |\n|---|---|---|\n",
            self.created_by
        );
        for (part, facts) in &self.parts {
            card += &format!("| {} | {} | `{}` |\n", part.name(), facts.parameters, facts.sha256);
        }
        let outside = self.parts.iter().filter_map(|(part, facts)| Some((part, facts.refers.as_ref()?)));
        for (part, Reference { file, .. }) in outside {
            card += &format!("\nThe weights of the {} are not here but in `{}`.\n", part.name(), file.display());
        }
        if self.next_sha256.is_some() {
            card += "\nThe folder `next` holds a second stage, which reads the tokens of this one.\n";
        }
        if !self.training.is_empty() {
            card += "\n## Training\n\n| fact | value |\n|---|---|\n";
            for (fact, value) in &self.training {
                let value = value.as_str().map(str::to_string).unwrap_or_else(|| value.to_string());
                card += &format!("| {fact} | {} |\n", value.replace('|', "\\|").replace('\n', " "));
            }
        }
        if !self.classes.is_empty() {
            card += &format!("\n## Classes\n\n{}\n", self.classes.join(", "));
        }
        card
    }
}

/// Where the files of a bundle are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundlePaths {
    root: PathBuf,
}

impl BundlePaths {
    /// The bundle at `path`: a bundle folder, its `bundle.json`, or a run folder that holds a finished bundle in `bundle/`.
    ///
    /// # Errors
    /// [`Error::Invalid`] that says what was looked for.
    pub fn find(path: &Path) -> Result<Self> {
        let candidates = [path.to_path_buf(), path.join("bundle")];
        if let Some(root) = candidates.iter().find(|root| root.join("bundle.json").is_file()) {
            return Ok(Self { root: root.clone() });
        }
        if path.is_file() && path.file_name().is_some_and(|name| name == "bundle.json") {
            return Ok(Self { root: path.parent().unwrap_or(Path::new(".")).to_path_buf() });
        }
        let problem = match path.exists() {
            false => "there is no such file or folder",
            true => "not a bundle: neither bundle.json nor bundle/bundle.json is in it",
        };
        Err(Error::invalid_hint(
            path.display(),
            problem,
            "give a bundle folder, or a run folder whose training has finished",
        ))
    }

    /// The bundle that is being written in `root`, whatever is there.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The bundle's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether a part is there.
    pub fn has(&self, part: Part) -> bool {
        self.config(part).is_file()
    }

    /// A part's `config.json`.
    pub fn config(&self, part: Part) -> PathBuf {
        self.root.join(part.name()).join("config.json")
    }

    /// A part's `model.safetensors` inside the bundle; [`Self::located`] says where the weights are.
    pub fn weights(&self, part: Part) -> PathBuf {
        self.root.join(part.name()).join("model.safetensors")
    }

    /// The file of a part's weights: inside the bundle, or the one that it refers to. Whose checksum it has is seen when it is read.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the file that is referred to is missing.
    pub fn located(&self, part: Part) -> Result<PathBuf> {
        let own = self.weights(part);
        if own.is_file() || !self.root.join("bundle.json").is_file() {
            return Ok(own);
        }
        let Some(Reference { file, sha256 }) = self.manifest()?.parts.remove(&part).and_then(|facts| facts.refers)
        else {
            return Ok(own);
        };
        let file = self.root.join(file);
        if !file.is_file() {
            let problem = format!("the weights of its {} are in {}, which is not there", part.name(), file.display());
            let hint =
                format!("put back the file with the SHA-256 {sha256}, or assemble the bundle again without --refer");
            return Err(Error::invalid_hint(self.root.display(), problem, hint));
        }
        Ok(file)
    }

    /// [`Self::located`] for a file that is used as a whole: every byte was read, and the checksum is the bundle's.
    ///
    /// # Errors
    /// As [`Self::located`]; [`Error::Mismatch`] with both checksums.
    pub fn intact(&self, part: Part) -> Result<PathBuf> {
        let file = self.located(part)?;
        if let Some(expected) = self.expected_sum(part)? {
            must_have_sum(&file, &expected)?;
        }
        Ok(file)
    }

    /// The checksum that `bundle.json` says a part's weights have; `None` while there is no `bundle.json`.
    ///
    /// # Errors
    /// As [`Self::manifest`]; [`Error::Invalid`] if it does not tell of the part.
    pub(super) fn expected_sum(&self, part: Part) -> Result<Option<String>> {
        if !self.root.join("bundle.json").is_file() {
            return Ok(None);
        }
        match self.manifest()?.parts.remove(&part) {
            Some(PartFacts { sha256, refers: Some(refers), .. }) if !self.weights(part).is_file() => {
                must_be_sum(&refers.file.display().to_string(), &refers.sha256, &sha256)?;
                Ok(Some(sha256))
            }
            Some(facts) => Ok(Some(facts.sha256)),
            None => {
                let problem = format!("bundle.json says nothing of its {}", part.name());
                Err(Error::invalid_hint(self.root.display(), problem, "copy or import the bundle again, whole"))
            }
        }
    }

    /// The bundle of the next stage, if there is one.
    pub fn next(&self) -> Option<Self> {
        let root = self.root.join(NEXT);
        root.join("bundle.json").is_file().then_some(Self { root })
    }

    /// `text/tokenizer.json`.
    pub fn text_tokenizer(&self) -> PathBuf {
        self.root.join("text").join("tokenizer.json")
    }

    /// Reads `bundle.json`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Invalid`], or [`Error::Unsupported`] for another version of the layout.
    pub fn manifest(&self) -> Result<Manifest> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let path = self.root.join("bundle.json");
        // The version comes first, since another version may have other keys.
        let Version { format } = config::read_json(&path)?;
        if format != FORMAT {
            return Err(Error::unsupported(
                format!("{}: bundle format {format}", path.display()),
                format!("this version of smalti reads format {FORMAT}"),
            ));
        }
        config::read_json(&path)
    }

    /// Compares the checksums of all files with the manifest's, those of the next stage and those that are referred to included. Reads
    /// every byte.
    ///
    /// # Errors
    /// [`Error::Mismatch`] with both checksums, or [`Error::Io`].
    pub fn verify(&self) -> Result<()> {
        let manifest = self.manifest()?;
        for part in manifest.parts.keys() {
            self.intact(*part)?;
        }
        let next = self.root.join(NEXT).join("bundle.json");
        let files = [(self.text_tokenizer(), &manifest.text_sha256), (next, &manifest.next_sha256)];
        for (path, sha256) in files {
            sha256.iter().try_for_each(|sha256| must_have_sum(&path, sha256))?;
        }
        self.next().map_or(Ok(()), |next| next.verify())
    }
}

/// The folder of the next stage.
pub const NEXT: &str = "next";

/// An error unless a file has this checksum.
///
/// # Errors
/// [`Error::Mismatch`] with both, or [`Error::Io`].
pub fn must_have_sum(path: &Path, expected: &str) -> Result<()> {
    must_be_sum(&path.display().to_string(), &files::sha256_file(path)?, expected)
}

/// # Errors
/// [`Error::Mismatch`] unless both checksums are the same.
pub(super) fn must_be_sum(place: &str, found: &str, expected: &str) -> Result<()> {
    match found == expected {
        true => Ok(()),
        false => Err(Error::Mismatch {
            what: format!("{place} and the bundle's checksum"),
            left_name: "file".into(),
            left: found.into(),
            right_name: "bundle.json".into(),
            right: expected.into(),
            hint: Some(
                "the file was replaced since the bundle was made, or damaged: copy, import or assemble it again".into(),
            ),
        }),
    }
}

/// Writes a part's configuration and weights into a bundle folder.
///
/// # Errors
/// [`Error::Io`].
pub fn write_part<C: Serialize, M: Module>(
    bundle: &BundlePaths,
    part: Part,
    config: &C,
    module: &M,
    precision: Precision,
) -> Result<PartFacts> {
    files::create_folder(&bundle.root.join(part.name()))?;
    config::write_json(&bundle.config(part), config)?;
    let metadata = BTreeMap::from([("format".to_string(), "smalti".to_string())]);
    save_module(module, &bundle.weights(part), precision, &metadata)?;
    let parameters = parameter_map(module).values().map(|entry| entry.shape.iter().product::<usize>()).sum();
    Ok(PartFacts { sha256: files::sha256_file(&bundle.weights(part))?, parameters, refers: None })
}

/// Writes a part's configuration, and weights that come from a source, one tensor in memory at a time.
///
/// # Errors
/// [`Error::Io`], and what reading the source returns.
pub fn copy_part<C: Serialize>(
    bundle: &BundlePaths,
    part: Part,
    config: &C,
    weights: &dyn Source,
    precision: Precision,
) -> Result<PartFacts> {
    files::create_folder(&bundle.root.join(part.name()))?;
    let metadata = BTreeMap::from([("format".to_string(), "smalti".to_string())]);
    copy_tensors(&bundle.weights(part), weights, precision, &metadata)?;
    config::write_json(&bundle.config(part), config)?;
    let parameters = weights.shapes().values().map(|shape| shape.iter().product::<usize>()).sum();
    Ok(PartFacts { sha256: files::sha256_file(&bundle.weights(part))?, parameters, refers: None })
}

/// Copies a tokenizer's files as they are into another bundle, so that their checksum still names it; returns what is known of it.
///
/// # Errors
/// [`Error::Io`], [`Error::Mismatch`] for other weights than the bundle names, or as [`BundlePaths::manifest`].
pub fn copy_tokenizer(from: &BundlePaths, to: &BundlePaths, part: Part) -> Result<Option<PartFacts>> {
    files::create_folder(&to.root.join(part.name()))?;
    files::write_bytes(&to.weights(part), &files::read(&from.located(Part::Tokenizer)?)?)?;
    files::write_bytes(&to.config(part), &files::read(&from.config(Part::Tokenizer))?)?;
    let facts = from.manifest()?.parts.remove(&Part::Tokenizer);
    facts.iter().try_for_each(|facts| must_have_sum(&to.weights(part), &facts.sha256))?;
    Ok(facts.map(|facts| PartFacts { refers: None, ..facts }))
}
