//! `generate`: text, a class or nothing to pictures.

use crate::generating::{Generating, Typed};
use crate::judge::{self, JudgePlan};
use crate::model::{ModelPlan, Wish};
use crate::output::{Output, is_inside, must_not_overwrite};
use crate::stages::{Stages, StopAt};
use crate::{SamplingArgs, Settings, WeightsArgs};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Progress, Result, device};
use smalti_data::image::{Image, grid, save_png};
use smalti_models::ImageRequest;
use smalti_train::pixels;
use std::path::{Path, PathBuf};

/// Most pictures that are asked for at once.
const MOST: usize = 1_000_000;
/// Pixels between the pictures of a grid.
const GAP: usize = 2;

/// What `generate` is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct GenerateArgs {
    /// What the picture should show
    pub prompt: Option<String>,
    /// Bundle or run folder [default: $SMALTI_MODEL, else the demo bundle]
    #[arg(short, long, value_name = "BUNDLE")]
    pub model: Option<PathBuf>,
    /// Class, by number or name, for models conditioned on classes
    #[arg(long, value_name = "N|NAME")]
    pub class: Option<String>,
    /// An image such as a depth map, for models conditioned on one; it is stretched to the picture's size
    #[arg(long, value_name = "IMAGE")]
    pub condition: Option<PathBuf>,
    /// What guidance is to lead away from, for models of captions
    #[arg(long, value_name = "PROMPT")]
    pub negative: Option<String>,
    /// Number of pictures
    #[arg(short = 'n', long, value_name = "N", default_value_t = GenerateArgs::default().count)]
    pub count: usize,
    /// A .png file (several pictures become a grid), or a folder (a file for each picture)
    #[arg(short, long, value_name = "FILE|DIR")]
    pub out: PathBuf,
    /// Height and width of a picture, if larger than the model's own: a window slides over it (only gpt over a
    /// convolutional tokenizer)
    #[arg(long, value_name = "HxW")]
    pub size: Option<String>,
    /// Enlarge each pixel to a square of N
    #[arg(long, value_name = "N", default_value_t = GenerateArgs::default().scale)]
    pub scale: usize,
    /// Number of pictures to make at once; does not change them
    #[arg(long, value_name = "N", default_value_t = GenerateArgs::default().batch)]
    pub batch: usize,
    /// Keep the N of --count pictures that the judge scores highest, the best first
    #[arg(long, value_name = "N")]
    pub keep: Option<usize>,
    /// Encoder that scores how well a picture shows its class [default: the model's own, with --keep]
    #[arg(long, value_name = "BUNDLE")]
    pub judge: Option<PathBuf>,
    /// Where to stop, for models of several stages
    #[arg(long, value_enum, default_value_t = GenerateArgs::default().stage)]
    pub stage: StopAt,
    /// How the generator's weights are kept.
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// How tokens are drawn.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

impl Default for GenerateArgs {
    fn default() -> Self {
        Self {
            prompt: None,
            model: None,
            class: None,
            condition: None,
            negative: None,
            count: 1,
            out: PathBuf::new(),
            size: None,
            scale: 1,
            batch: 16,
            keep: None,
            judge: None,
            stage: StopAt::Last,
            weights: WeightsArgs::default(),
            sampling: SamplingArgs::default(),
        }
    }
}

/// A resolved and checked `generate`.
#[derive(Clone, Debug, Serialize)]
pub struct GeneratePlan {
    /// Number of pictures.
    pub count: usize,
    /// Pictures made at the same time.
    pub batch: usize,
    /// Enlargement.
    pub scale: usize,
    /// Height and width of a picture before it is enlarged.
    pub size: (usize, usize),
    /// Rows and columns of tokens, if they are more than the model's own.
    pub grid: Option<(usize, usize)>,
    /// Where the pictures go.
    pub out: Output,
    /// What scores the pictures.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub judge: Option<JudgePlan>,
    /// How many of them are kept, if they are scored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<usize>,
    /// Where a model of several stages stops.
    pub stage: StopAt,
    /// What they show and what makes them.
    #[serde(flatten)]
    pub generating: Generating,
}

/// What `generate` made.
#[derive(Clone, Debug, Serialize)]
pub struct GenerateOutcome {
    /// The files that were written.
    pub files: Vec<PathBuf>,
    /// The seed of each picture.
    pub seeds: Vec<u64>,
    /// What the judge says of each picture: the logarithm of its class's probability.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<f64>,
    /// Height and width of a picture in pixels.
    pub size: (usize, usize),
    /// The parameters that the first file carries.
    pub parameters: serde_json::Value,
}

/// Resolves and checks everything; reads no weight.
///
/// # Errors
/// A model that is missing, does not fit or cannot generate, a condition that it does not understand, an unknown device, or a
/// setting out of range.
pub fn plan(args: &GenerateArgs, settings: &Settings) -> Result<GeneratePlan> {
    for (name, value, most) in
        [("--count", args.count, MOST), ("--batch", args.batch, 4096), ("--scale", args.scale, 64)]
    {
        if !(1..=most).contains(&value) {
            return Err(Error::invalid(name, format!("{value} is not in 1..={most}")));
        }
    }
    let out = Output::of(&args.out)?;
    let wish = Wish { prompt: args.prompt.as_deref(), class: args.class.as_deref(), image: args.condition.as_deref() };
    let (model, negative) = (args.model.as_deref(), args.negative.as_deref());
    let typed = Typed { model, wish, negative, sampling: &args.sampling, weights: &args.weights };
    let generating = Generating::plan(typed, settings)?;
    let last = later(&generating, args.stage).last().copied().unwrap_or(&generating.model);
    let (size, grid) = match &args.size {
        None => (last.tokens.image_size, None),
        Some(_) if !later(&generating, args.stage).is_empty() => {
            let what = "pictures of another size by a model of several stages";
            return Err(Error::unsupported(what, "leave out --size, or add `--stage base`"));
        }
        Some(size) => {
            let size = parse_size(size)?;
            (size, generating.model.grid_of(size)?)
        }
    };
    let judge = judge_of(args, &generating)?;
    must_keep_condition(args, &out, settings.seed())?;
    Ok(GeneratePlan {
        count: args.count,
        batch: args.batch.min(args.count),
        scale: args.scale,
        size,
        grid,
        out,
        keep: judge.as_ref().map(|_| args.keep.unwrap_or(args.count)),
        judge,
        stage: args.stage,
        generating,
    })
}

/// The condition's image must not be among the files that are written.
fn must_keep_condition(args: &GenerateArgs, out: &Output, seed: u64) -> Result<()> {
    let Some(image) = &args.condition else { return Ok(()) };
    let read = || [("the condition's image", image.as_path())];
    match out {
        Output::File(path) => must_not_overwrite(path, read()),
        Output::Folder(folder) if is_inside(image, folder) => {
            let names = (0..args.count as u64).map(|i| name(folder, seed.wrapping_add(i)));
            names.into_iter().try_for_each(|path| must_not_overwrite(&path, read()))
        }
        Output::Folder(_) => Ok(()),
    }
}

/// The stages after the base that run.
fn later(generating: &Generating, stage: StopAt) -> Vec<&ModelPlan> {
    match stage {
        StopAt::Base => Vec::new(),
        StopAt::Last => generating.model.later(),
    }
}

/// The judge that was given, or the model's own if pictures are to be chosen.
fn judge_of(args: &GenerateArgs, generating: &Generating) -> Result<Option<JudgePlan>> {
    let judge = match (&args.judge, args.keep, &generating.model.judge) {
        (None, None, _) => return Ok(None),
        (Some(path), ..) => JudgePlan::find(path)?,
        (None, Some(_), Some(own)) => own.clone(),
        (None, Some(_), None) => {
            return Err(Error::invalid_hint(
                "--keep",
                "there is nothing to choose by: this model has no judge",
                "give an encoder with a head with --judge",
            ));
        }
    };
    if let Some(keep) = args.keep.filter(|keep| !(1..=args.count).contains(keep)) {
        return Err(Error::invalid("--keep", format!("{keep} is not in 1..={}, the number of pictures", args.count)));
    }
    judge.must_suit(&generating.model)?;
    match generating.class {
        Some(_) => Ok(Some(judge)),
        None => Err(Error::invalid_hint(
            "--judge",
            "the judge scores how well a picture shows its class, and no class was given",
            "give one with --class",
        )),
    }
}

/// `HxW`, or one number for a square.
fn parse_size(text: &str) -> Result<(usize, usize)> {
    let (height, width) = text.split_once(['x', 'X']).unwrap_or((text, text));
    match (height.trim().parse(), width.trim().parse()) {
        (Ok(height), Ok(width)) => Ok((height, width)),
        _ => Err(Error::invalid("--size", format!("`{text}` is not a size; expected height x width, such as 256x384"))),
    }
}

/// A picture that was made.
struct Made {
    image: Image,
    seed: u64,
    /// What the judge says of it, if there is one.
    score: Option<f64>,
}

/// Makes the pictures.
///
/// # Errors
/// What reading the weights, generating and writing return, or [`Error::Interrupted`]; pictures that were already written stay.
pub fn run(plan: &GeneratePlan, progress: &dyn Progress) -> Result<GenerateOutcome> {
    plan.out.prepare()?;
    let generating = &plan.generating;
    let device = device::open(&generating.device)?;
    let picture = generating.picture(plan.grid, &device, progress)?;
    let later = later(generating, plan.stage);
    let decoder = later.last().copied().unwrap_or(&generating.model).open_decoder(&device)?;
    let judge = plan.judge.as_ref().map(|judge| judge.open(&device)).transpose()?;
    let mut stages = Some(Stages::open(generating, &later, &device)?);
    let seeds: Vec<u64> = (0..plan.count as u64).map(|i| generating.seed.wrapping_add(i)).collect();
    let (mut files, mut kept) = (Vec::new(), Vec::new());
    let batches = seeds.len().div_ceil(plan.batch);
    for (batch, seeds) in seeds.chunks(plan.batch).enumerate() {
        let Some(running) = &stages else { break };
        let requests = seeds.iter().map(|seed| ImageRequest { seed: *seed, ..picture.clone() }).collect();
        let what = if batches > 1 { format!("generating {}/{batches}", batch + 1) } else { "generating".into() };
        let codes = running.codes(requests, plan.grid, &what, progress)?;
        // The last pictures are decoded in the memory that the generators had.
        stages = stages.filter(|_| batch + 1 < batches);
        let decoded = match plan.grid {
            None => decoder.decode(&codes)?,
            Some(grid) => decoder.decode_grid(&codes, grid)?,
        };
        let scores =
            judge.as_ref().map(|judge| judge::scores(judge, decoded.clone(), &picture.condition)).transpose()?;
        for (i, (image, seed)) in pixels::download(decoded, decoder.planes())?.iter().zip(seeds).enumerate() {
            let score = scores.as_ref().map(|scores| scores[i]);
            let made = Made { image: enlarged(image, plan.scale)?, seed: *seed, score };
            match &plan.out {
                Output::Folder(folder) if judge.is_none() => files.push(save(plan, &name(folder, *seed), &made)?),
                _ => kept.push(made),
            }
        }
        keep_best(&mut kept, plan.keep);
    }
    finish(plan, kept, files, seeds)
}

/// Leaves only the best so many, the best first; of equals the first seed.
fn keep_best(made: &mut Vec<Made>, keep: Option<usize>) {
    if let Some(keep) = keep {
        let score = |made: &Made| made.score.unwrap_or(f64::NEG_INFINITY);
        made.sort_by(|a, b| score(b).total_cmp(&score(a)).then(a.seed.cmp(&b.seed)));
        made.truncate(keep);
    }
}

/// Writes the pictures that are not written yet.
fn finish(plan: &GeneratePlan, kept: Vec<Made>, files: Vec<PathBuf>, seeds: Vec<u64>) -> Result<GenerateOutcome> {
    let mut files = files;
    let seeds = if plan.judge.is_some() { kept.iter().map(|made| made.seed).collect() } else { seeds };
    let scores: Vec<f64> = kept.iter().filter_map(|made| made.score).collect();
    let parameters = match &plan.out {
        Output::File(path) => {
            let parameters = parameters(plan, &seeds, &scores);
            let columns = (kept.len() as f64).sqrt().ceil() as usize;
            let mut images: Vec<Image> = kept.into_iter().map(|made| made.image).collect();
            let sheet =
                if images.len() == 1 { images.swap_remove(0) } else { grid(&images, columns, GAP * plan.scale)? };
            save_png(path, &sheet, Some(&parameters))?;
            files.push(path.clone());
            parameters
        }
        Output::Folder(folder) => {
            for made in &kept {
                files.push(save(plan, &name(folder, made.seed), made)?);
            }
            parameters(plan, &seeds[..seeds.len().min(1)], &scores[..scores.len().min(1)])
        }
    };
    let (height, width) = plan.size;
    let size = (height * plan.scale, width * plan.scale);
    Ok(GenerateOutcome { files, seeds, scores, size, parameters })
}

fn name(folder: &Path, seed: u64) -> PathBuf {
    folder.join(format!("{seed:06}.png"))
}

fn save(plan: &GeneratePlan, path: &Path, made: &Made) -> Result<PathBuf> {
    let scores: Vec<f64> = made.score.into_iter().collect();
    save_png(path, &made.image, Some(&parameters(plan, &[made.seed], &scores)))?;
    Ok(path.to_path_buf())
}

/// What a file of pictures with these seeds was made with.
fn parameters(plan: &GeneratePlan, seeds: &[u64], scores: &[f64]) -> serde_json::Value {
    let mut own = serde_json::json!({ "count": seeds.len(), "size": [plan.size.0, plan.size.1] });
    if let Some(judge) = &plan.judge {
        own["judge"] = serde_json::json!({ "kind": judge.kind, "sha256": judge.sha256, "of": plan.count });
        own["seeds"] = serde_json::json!(seeds);
        own["scores"] = serde_json::json!(scores);
    }
    if let Some(next) = &plan.generating.model.next {
        own["stage"] = serde_json::json!(plan.stage);
        if plan.stage == StopAt::Last {
            own["next"] = next.provenance();
        }
    }
    plan.generating.parameters("generate", seeds.first().copied().unwrap_or(plan.generating.seed), own)
}

/// Each pixel as a square of `scale` pixels.
fn enlarged(image: &Image, scale: usize) -> Result<Image> {
    if scale == 1 {
        return Ok(image.clone());
    }
    let row = |row: &[u8]| row.chunks_exact(3).flat_map(|pixel| pixel.repeat(scale)).collect::<Vec<u8>>().repeat(scale);
    let pixels = image.pixels.chunks_exact(image.width * 3).flat_map(row).collect();
    Ok(Image { grey: image.grey, ..Image::new(image.width * scale, image.height * scale, pixels)? })
}
