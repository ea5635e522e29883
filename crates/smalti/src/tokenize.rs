//! `tokenize`: a data set to token shards. Run again, it continues where it stopped.

use crate::Settings;
use crate::model::ModelPlan;
use crate::output::{is_same, must_be_a_name, prepare_folder};
use crate::source::{Batches, Images, SourceArgs};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Progress, Result, TokenSpec, Tokens, device, files};
use smalti_data::loader::Skipped;
use smalti_data::shard::{Contents, Origin, TokenizerId};
use smalti_data::{Image, ImageBatch, RowTokens, ShardWriter, TokenRow};
use smalti_models::Codes;
use smalti_models::tokenizers::{TokenMoments, TokenizerModel};
use smalti_train::pixels;
use std::collections::HashMap;
use std::path::PathBuf;

/// What `tokenize` is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct TokenizeArgs {
    /// A folder of images, WebDataset tars or IDX files
    #[arg(value_name = "SRC")]
    pub source: PathBuf,
    /// The folder for the token shards
    #[arg(value_name = "DEST")]
    pub out: PathBuf,
    /// Bundle or run folder [default: $SMALTI_MODEL, else the demo bundle]
    #[arg(short, long, value_name = "BUNDLE")]
    pub model: Option<PathBuf>,
    /// Number of images to process at once
    #[arg(long, value_name = "N", default_value_t = TokenizeArgs::default().batch)]
    pub batch: usize,
    /// Also add the mirror image of each image
    #[arg(long)]
    pub flip: bool,
    /// Rows per shard
    #[arg(long, value_name = "N", default_value_t = TokenizeArgs::default().per_shard)]
    pub per_shard: usize,
    /// Which images.
    #[command(flatten)]
    pub images: SourceArgs,
}

impl Default for TokenizeArgs {
    fn default() -> Self {
        Self {
            source: PathBuf::new(),
            out: PathBuf::new(),
            model: None,
            batch: 32,
            flip: false,
            per_shard: 10_000,
            images: SourceArgs::default(),
        }
    }
}

/// A resolved and checked `tokenize`.
#[derive(Clone, Debug, Serialize)]
pub struct TokenizePlan {
    /// The folder to write into.
    pub out: PathBuf,
    /// Images at the same time.
    pub batch: usize,
    /// Whether mirror images are added.
    pub flip: bool,
    /// Rows of a shard.
    pub per_shard: usize,
    /// Where to compute.
    pub device: String,
    /// The images.
    pub source: Images,
    /// The model.
    pub model: ModelPlan,
}

/// What `tokenize` made.
#[derive(Clone, Debug, Serialize)]
pub struct TokenizeOutcome {
    /// The folder of shards.
    pub folder: PathBuf,
    /// The tokens of an image.
    pub tokens: TokenSpec,
    /// Number of shards.
    pub shards: usize,
    /// Number of rows in them.
    pub rows: usize,
    /// Rows and skipped images that were there already.
    pub resumed_at: usize,
    /// Bytes of all shards.
    pub bytes: u64,
    /// Images that could not be used.
    pub skipped: Vec<Skipped>,
}

/// Resolves and checks everything; reads no weight and no image.
///
/// # Errors
/// A model that is missing or does not fit, a source that cannot be used, an unknown device, or a setting out of range.
pub fn plan(args: &TokenizeArgs, settings: &Settings) -> Result<TokenizePlan> {
    if args.per_shard == 0 {
        return Err(Error::invalid("--per-shard", "a shard needs at least one row"));
    }
    must_be_a_name(&args.out)?;
    let model = ModelPlan::find(args.model.as_deref())?;
    let planes = model.planes()?;
    let source = Images::open(args.images.config(&args.source, model.tokens.image_size, planes)?, planes, None)?;
    if is_same(&args.out, source.dataset().path()) {
        let problem = "is where the images are: shards do not go between them";
        return Err(Error::invalid_hint(args.out.display(), problem, "choose another folder"));
    }
    Ok(TokenizePlan {
        out: args.out.clone(),
        batch: args.batch.max(1),
        flip: args.flip,
        per_shard: args.per_shard,
        device: settings.device_name()?,
        source,
        model,
    })
}

/// Writes the shards.
///
/// # Errors
/// A folder of other tokens, what reading, computing and writing return, or [`Error::Interrupted`]; finished shards stay.
pub fn run(plan: &TokenizePlan, progress: &dyn Progress) -> Result<TokenizeOutcome> {
    prepare_folder(&plan.out)?;
    let mut rows = Rows::open(plan, progress)?;
    let resumed_at = rows.writer.next();
    if !rows.writer.manifest().complete {
        let device = device::open(&plan.device)?;
        let tokenizer = plan.model.open_tokenizer(&device)?;
        let start = resumed_at / rows.copies;
        let batches = plan.source.batches("tokenizing", start, plan.batch, progress)?;
        let mut batches = batches.with_hint("finished shards are kept; run the same command again to continue");
        while let Some(batch) = batches.next() {
            let batch = batch?;
            let tokens = encode(&tokenizer, &batch, plan.flip, &device)?;
            rows.add(&batch, tokens, &mut batches)?;
            batches.done("");
        }
        let skipped = batches.finish()?;
        let skipped: HashMap<usize, &Skipped> = skipped.iter().map(|skipped| (skipped.index, skipped)).collect();
        rows.skip_until(plan.source.images * rows.copies, |image| skipped.get(&image).copied().cloned())?;
    }
    let manifest = rows.writer.finish()?;
    Ok(TokenizeOutcome {
        folder: plan.out.clone(),
        tokens: plan.model.tokens.clone(),
        shards: manifest.shards.len(),
        rows: manifest.rows(),
        resumed_at,
        bytes: manifest.shards.iter().map(|shard| shard.bytes).sum(),
        skipped: manifest.skipped,
    })
}

/// The tokens of each image of a batch; with `flip` each followed by those of its mirror image.
fn encode(tokenizer: &TokenizerModel, batch: &ImageBatch, flip: bool, device: &Device) -> Result<Vec<RowTokens>> {
    let tokens = |images| rows(tokenizer, images, &batch.keys);
    let plain = tokens(pixels::upload_batch(batch, device))?;
    if !flip {
        return Ok(plain);
    }
    let mirrored: Vec<Image> = pixels::batch_images(batch)?.iter().map(Image::flipped).collect();
    let mirrored = tokens(pixels::upload(&mirrored, batch.planes, device)?)?;
    Ok(plain.into_iter().zip(mirrored).flat_map(|(plain, mirrored)| [plain, mirrored]).collect())
}

/// What a shard holds of images: codes, or the distributions of vectors. One download.
fn rows(tokenizer: &TokenizerModel, images_bchw: Tensor<4>, names: &[String]) -> Result<Vec<RowTokens>> {
    let moments = tokenizer.token_moments(images_bchw.clone());
    let codes = match &moments {
        None => tokenizer.encode(images_bchw)?,
        Some(TokenMoments { means_bnc, deviations_bnc: None }) => Codes::Continuous(means_bnc.clone()),
        Some(TokenMoments { means_bnc, deviations_bnc: Some(deviations_bnc) }) => {
            Codes::Continuous(Tensor::cat(vec![means_bnc.clone(), deviations_bnc.clone()], 1))
        }
    };
    let with_deviations = moments.is_some_and(|moments| moments.deviations_bnc.is_some());
    let row = |tokens| match tokens {
        Tokens::Discrete(codes) => RowTokens::Discrete(codes),
        Tokens::Continuous(mut means) => {
            let deviations = if with_deviations { means.split_off(means.len() / 2) } else { Vec::new() };
            RowTokens::Continuous { means, deviations }
        }
    };
    Ok(codes.to_host_of(names)?.into_iter().map(row).collect())
}

/// Rows on their way to shards. With mirror images, rows `2 i` and `2 i + 1` belong to image `i`.
struct Rows {
    writer: ShardWriter,
    copies: usize,
}

impl Rows {
    fn open(plan: &TokenizePlan, progress: &dyn Progress) -> Result<Self> {
        let dataset = plan.source.dataset();
        let copies = if plan.flip { 2 } else { 1 };
        let mut data = dataset.describe();
        if plan.flip {
            data.images *= copies;
            data.keys = files::sha256_bytes(format!("{} and mirror images", data.keys).as_bytes());
        }
        let config = &plan.source.config;
        let transforms = serde_json::json!({
            "background": config.background, "transforms": config.transforms, "flip": plan.flip,
        });
        let origin = Origin {
            spec: plan.model.tokens.clone(),
            tokenizer: TokenizerId { name: plan.model.name.clone(), sha256: plan.model.tokenizer_sha256.clone() },
            data,
            transforms: transforms.to_string(),
            classes: dataset.classes().to_vec(),
        };
        let writer = ShardWriter::open(&plan.out, origin, plan.per_shard)?;
        if writer.next() > 0 {
            progress.say("comparing the images with those of the finished shards");
        }
        Ok(Self { writer: writer.with_contents(Contents::new(dataset.clone(), copies))?, copies })
    }

    /// Adds the rows of a batch. Images that it left out are noted as skipped.
    fn add(&mut self, batch: &ImageBatch, tokens: Vec<RowTokens>, batches: &mut Batches<'_>) -> Result<()> {
        for (place, tokens) in tokens.into_iter().enumerate() {
            let (i, copy) = (place / self.copies, place % self.copies);
            let index = batch.indices[i] * self.copies + copy;
            if index > self.writer.next() {
                self.skip_until(index, |image| batches.skipped(image).cloned())?;
            }
            // A run may have stopped between an image and its mirror image.
            if index == self.writer.next() {
                let key = if copy == 0 { batch.keys[i].clone() } else { format!("{}#mirrored", batch.keys[i]) };
                let (text, keywords) = (batch.texts[i].clone(), batch.keywords[i].clone());
                let row = TokenRow { key, tokens, label: batch.labels[i], text, keywords };
                self.writer.push(index, row)?;
            }
        }
        Ok(())
    }

    /// Notes the rows before `end` as skipped; `why` knows it of each image.
    fn skip_until(&mut self, end: usize, mut why: impl FnMut(usize) -> Option<Skipped>) -> Result<()> {
        while self.writer.next() < end {
            let index = self.writer.next();
            let known = why(index / self.copies);
            let known = known.ok_or_else(|| Error::invalid("tokenize", format!("image {index} was lost")))?;
            self.writer.skip(Skipped { index, ..known })?;
        }
        Ok(())
    }
}
