//! `inspect`: what is in a bundle, a run folder, a weights file, a recipe, token shards, a set of images, or a picture made here.

use crate::model::ModelPlan;
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result, TokenSpec, files};
use smalti_data::loader::Skipped;
use smalti_data::{Shards, image, shard};
use smalti_models::checkpoint::{BundlePaths, Manifest, Part, Source, WeightsFile, read_config};
use smalti_models::encoders::EncoderConfig;
use smalti_train::Recipe;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What `inspect` is told.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct InspectArgs {
    /// A bundle, run folder, .safetensors file, recipe, folder of token shards, set of images, or picture made by smalti
    pub path: PathBuf,
    /// Read every byte of a bundle or of token shards and compare checksums
    #[arg(long)]
    pub verify: bool,
    /// Of a set of images: the part, such as train
    #[arg(long, value_name = "NAME")]
    pub split: Option<String>,
    /// Of a set of images: its folders are classes, also where one is called train or test; `false`: they are not [default: found out]
    #[arg(long, value_name = "YES", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub classes_from_folders: Option<bool>,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum InspectOutcome {
    /// A model.
    Bundle(Box<BundleFacts>),
    /// A training run.
    Run(Box<RunFacts>),
    /// A weights file.
    Weights(WeightsFacts),
    /// Token shards.
    Tokens(Box<TokensFacts>),
    /// A recipe.
    Recipe(RecipeFacts),
    /// A picture.
    Picture(PictureFacts),
    /// Images of a data set.
    Images(ImagesFacts),
}

/// A model.
#[derive(Clone, Debug, Serialize)]
pub struct BundleFacts {
    /// Its folder.
    pub path: PathBuf,
    /// The tokens that its parts share; none of an encoder alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<TokenSpec>,
    /// What its encoder makes and tells, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoder: Option<EncoderFacts>,
    /// What scores its pictures, if it has a judge.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub judge: Option<EncoderFacts>,
    /// The next stage, which makes pictures of its tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<Box<BundleFacts>>,
    /// What its generator can be conditioned on, if it has one.
    pub condition: Option<smalti_models::generators::Conditions>,
    /// Whether the files have the checksums of the manifest; none if that was not asked for.
    pub verified: Option<bool>,
    /// Its manifest.
    pub manifest: Manifest,
}

/// An encoder.
#[derive(Clone, Debug, Serialize)]
pub struct EncoderFacts {
    /// Its kind.
    pub kind: &'static str,
    /// Height and width of the images that it looks at.
    pub image_size: (usize, usize),
    /// Numbers of the features of an image.
    pub width: usize,
    /// What it can tell of an image.
    pub tells: smalti_models::generators::Conditions,
}

/// A training run.
#[derive(Clone, Debug, Serialize)]
pub struct RunFacts {
    /// Its folder.
    pub path: PathBuf,
    /// The recipe as it was resolved.
    pub recipe: toml::Table,
    /// Its checkpoints.
    pub checkpoints: Vec<String>,
    /// The last line of its metrics.
    pub last_metrics: Option<serde_json::Value>,
    /// The bundle it made, if it has finished.
    pub bundle: Option<Box<BundleFacts>>,
}

/// A weights file.
#[derive(Clone, Debug, Serialize)]
pub struct WeightsFacts {
    /// The file.
    pub path: PathBuf,
    /// Number of values in all tensors.
    pub parameters: usize,
    /// What the file says of itself.
    pub metadata: BTreeMap<String, String>,
    /// The shape of each tensor.
    pub tensors: BTreeMap<String, Vec<usize>>,
}

/// Token shards.
#[derive(Clone, Debug, Serialize)]
pub struct TokensFacts {
    /// Their folder.
    pub path: PathBuf,
    /// Number of rows.
    pub rows: usize,
    /// Whether all shards are there.
    pub complete: bool,
    /// Whether the files have the checksums of the manifest; none if that was not asked for.
    pub verified: Option<bool>,
    /// What made the tokens, and from what.
    pub origin: shard::Origin,
    /// The shards.
    pub shards: Vec<shard::ShardEntry>,
    /// Images that have no row.
    pub skipped: Vec<Skipped>,
}

/// A recipe.
#[derive(Clone, Debug, Serialize)]
pub struct RecipeFacts {
    /// The file.
    pub path: PathBuf,
    /// The recipe with every value written out.
    pub recipe: toml::Table,
}

/// A picture.
#[derive(Clone, Debug, Serialize)]
pub struct PictureFacts {
    /// The file.
    pub path: PathBuf,
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// What it was made with, if it says so.
    pub parameters: Option<serde_json::Value>,
}

/// Images of a data set.
#[derive(Clone, Debug, Serialize)]
pub struct ImagesFacts {
    /// Kind of files, path, number of images and the hash of their names.
    #[serde(flatten)]
    pub description: smalti_data::datasets::Description,
    /// Names of the classes.
    pub classes: Vec<String>,
    /// The first caption.
    pub first_caption: Option<String>,
    /// What was found wrong but did not hinder.
    pub warnings: Vec<String>,
}

/// Looks at a path.
///
/// # Errors
/// [`Error::Invalid`] if it is nothing that smalti knows, or what reading it returns.
pub fn run(args: &InspectArgs) -> Result<InspectOutcome> {
    let path = args.path.as_path();
    if path.join("recipe.toml").is_file() {
        return run_folder(path, args.verify).map(|facts| InspectOutcome::Run(Box::new(facts)));
    }
    if path.join("bundle.json").is_file() || path.ends_with("bundle.json") {
        return bundle(path, args.verify).map(|facts| InspectOutcome::Bundle(Box::new(facts)));
    }
    if shard::Manifest::path(path).is_file() {
        return tokens(path, args.verify).map(|facts| InspectOutcome::Tokens(Box::new(facts)));
    }
    match extension(path).as_str() {
        "toml" => {
            let recipe = Recipe::read(path, &[])?.table()?;
            Ok(InspectOutcome::Recipe(RecipeFacts { path: path.to_path_buf(), recipe }))
        }
        "safetensors" => weights(path).map(InspectOutcome::Weights),
        "png" => picture(path).map(InspectOutcome::Picture),
        _ => images(args).map(InspectOutcome::Images),
    }
}

fn bundle(path: &Path, verify: bool) -> Result<BundleFacts> {
    let paths = BundlePaths::find(path)?;
    if verify {
        paths.verify()?;
    }
    let encoder = encoder(&paths, Part::Encoder)?;
    let verified = verify.then_some(true);
    match paths.has(Part::Tokenizer) || encoder.is_none() {
        true => Ok(BundleFacts { encoder, ..facts(ModelPlan::find(Some(path))?, verified)? }),
        false => Ok(BundleFacts {
            path: paths.root().to_path_buf(),
            tokens: None,
            encoder,
            judge: None,
            next: None,
            condition: None,
            verified,
            manifest: paths.manifest()?,
        }),
    }
}

/// What a model and its next stages are.
fn facts(model: ModelPlan, verified: Option<bool>) -> Result<BundleFacts> {
    Ok(BundleFacts {
        condition: model.has_generator().then(|| model.condition.clone()),
        encoder: None,
        judge: encoder(&BundlePaths::at(&model.bundle), Part::Judge)?,
        next: model.next.map(|next| facts(*next, verified).map(Box::new)).transpose()?,
        path: model.bundle,
        tokens: Some(model.tokens),
        verified,
        manifest: model.manifest,
    })
}

fn encoder(paths: &BundlePaths, part: Part) -> Result<Option<EncoderFacts>> {
    if !paths.has(part) {
        return Ok(None);
    }
    let config: EncoderConfig = read_config(paths, part)?;
    let (kind, image_size, width, tells) = (config.kind(), config.image_size(), config.width(), config.tells());
    Ok(Some(EncoderFacts { kind, image_size, width, tells }))
}

fn run_folder(path: &Path, verify: bool) -> Result<RunFacts> {
    let recipe = path.join("recipe.toml");
    let table = files::read_text(&recipe)?.parse::<toml::Table>();
    let metrics = path.join("metrics.jsonl");
    let metrics = if metrics.is_file() { files::read_text(&metrics)? } else { String::new() };
    Ok(RunFacts {
        path: path.to_path_buf(),
        recipe: table.map_err(|error| Error::file(&recipe, error.message()))?,
        checkpoints: names(&path.join("checkpoints"))?,
        // A line that was being written when the run was killed is no JSON: the one before it counts.
        last_metrics: metrics.lines().rev().find_map(|line| serde_json::from_str(line).ok()),
        bundle: match path.join("bundle").join("bundle.json").is_file() {
            true => Some(Box::new(bundle(&path.join("bundle"), verify)?)),
            false => None,
        },
    })
}

fn weights(path: &Path) -> Result<WeightsFacts> {
    let file = WeightsFile::open(path)?;
    let tensors = file.shapes();
    Ok(WeightsFacts {
        path: path.to_path_buf(),
        parameters: tensors.values().map(|shape| shape.iter().product::<usize>()).sum(),
        metadata: file.metadata().clone(),
        tensors,
    })
}

fn tokens(path: &Path, verify: bool) -> Result<TokensFacts> {
    if verify {
        Shards::open(path)?.verify()?;
    }
    let manifest = shard::Manifest::read(path)?;
    Ok(TokensFacts {
        path: path.to_path_buf(),
        rows: manifest.rows(),
        complete: manifest.complete,
        verified: verify.then_some(true),
        origin: manifest.origin,
        shards: manifest.shards,
        skipped: manifest.skipped,
    })
}

fn picture(path: &Path) -> Result<PictureFacts> {
    let picture = image::open(path, [255; 3], &image::Limits::default())?;
    let (width, height) = (picture.width, picture.height);
    Ok(PictureFacts { path: path.to_path_buf(), width, height, parameters: image::read_parameters(path)? })
}

fn images(args: &InspectArgs) -> Result<ImagesFacts> {
    let mut config = smalti_data::DataConfig::new(&args.path, Vec::new());
    config.split.clone_from(&args.split);
    config.classes_from_folders = args.classes_from_folders;
    let dataset = config.open(None)?;
    Ok(ImagesFacts {
        description: dataset.describe(),
        classes: dataset.classes().to_vec(),
        first_caption: dataset.about(0)?.text,
        warnings: dataset.warnings().to_vec(),
    })
}

/// The names in a folder, sorted; none if there is no such folder.
fn names(folder: &Path) -> Result<Vec<String>> {
    let failed = |error| Error::io("read folder", folder, error);
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        names.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn extension(path: &Path) -> String {
    path.extension().map(|ending| ending.to_string_lossy().to_lowercase()).unwrap_or_default()
}
