//! `generate`: text, a class or nothing to pictures.

use crate::model::{ModelPlan, PlannedCondition, Wish};
use crate::output::Output;
use crate::pixels;
use crate::{SamplingArgs, Settings, WeightsArgs};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Progress, Result, device};
use smalti_data::image::{Image, grid, save_png};
use smalti_models::sampling::Sampling;
use smalti_models::{Codes, Generator, ImageRequest, Request};
use smalti_nn::dense::WeightPrecision;
use std::path::{Path, PathBuf};

/// Most pictures that are asked for at once.
const MOST: usize = 1_000_000;
/// Pixels between the pictures of a grid.
const GAP: usize = 2;

/// What `generate` is told.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct GenerateArgs {
    /// What the picture should show
    pub prompt: Option<String>,
    /// Bundle or run folder [default: $SMALTI_MODEL, else the demo bundle]
    #[arg(short, long, value_name = "BUNDLE")]
    pub model: Option<PathBuf>,
    /// Class by number or name, for models of classes
    #[arg(long, value_name = "N|NAME")]
    pub class: Option<String>,
    /// An image such as a depth map, for models of one; it is stretched to the picture's size
    #[arg(long, value_name = "IMAGE")]
    pub condition: Option<PathBuf>,
    /// Number of pictures
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1)]
    pub count: usize,
    /// A .png file (several pictures become a grid), or a folder (a file for each picture)
    #[arg(short, long, value_name = "FILE|DIR")]
    pub out: PathBuf,
    /// Height and width of a picture, larger than the model's own: a window slides over it, for gpt over a convolutional
    /// tokenizer
    #[arg(long, value_name = "HxW")]
    pub size: Option<String>,
    /// Enlarge each pixel to a square of N
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub scale: usize,
    /// Pictures that are made at the same time; does not change them
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub batch: usize,
    /// How the generator's weights are kept.
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// How tokens are drawn.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// A resolved and checked `generate`.
#[derive(Clone, Debug, Serialize)]
pub struct GeneratePlan {
    /// What the pictures should show.
    pub prompt: Option<String>,
    /// The class as typed.
    pub class: Option<String>,
    /// The image that is the condition.
    #[serde(rename = "condition")]
    pub condition_image: Option<PathBuf>,
    /// Seed of the first picture; picture i has this seed + i.
    pub seed: u64,
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
    /// Where to compute.
    pub device: String,
    /// How the generator's weights are kept.
    #[serde(serialize_with = "crate::weights::name")]
    pub weights: WeightPrecision,
    /// Where the pictures go.
    pub out: Output,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// The model.
    pub model: ModelPlan,
    #[serde(skip)]
    condition: PlannedCondition,
}

/// What `generate` made.
#[derive(Clone, Debug, Serialize)]
pub struct GenerateOutcome {
    /// The files that were written.
    pub files: Vec<PathBuf>,
    /// The seed of each picture.
    pub seeds: Vec<u64>,
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
    let device = settings.device_name()?;
    let weights = args.weights.resolve(&device)?;
    let model = ModelPlan::find(args.model.as_deref())?;
    model.must_generate()?;
    let condition = model.condition(Wish {
        prompt: args.prompt.as_deref(),
        class: args.class.as_deref(),
        image: args.condition.as_deref(),
    })?;
    let mut sampling = args.sampling.over(model.sampling())?;
    if condition.is_none() {
        // Guidance strengthens a condition: without one it only doubles the work.
        sampling.guidance = 1.0;
    }
    let (size, grid) = match &args.size {
        None => (model.tokens.image_size, None),
        Some(size) => {
            let size = parse_size(size)?;
            (size, model.grid_of(size)?)
        }
    };
    Ok(GeneratePlan {
        prompt: args.prompt.clone(),
        class: args.class.clone(),
        condition_image: args.condition.clone(),
        seed: settings.seed(),
        count: args.count,
        batch: args.batch.min(args.count),
        scale: args.scale,
        size,
        grid,
        device,
        weights,
        out,
        sampling,
        model,
        condition,
    })
}

/// `HxW`, or one number for a square.
fn parse_size(text: &str) -> Result<(usize, usize)> {
    let (height, width) = text.split_once(['x', 'X']).unwrap_or((text, text));
    match (height.trim().parse(), width.trim().parse()) {
        (Ok(height), Ok(width)) => Ok((height, width)),
        _ => Err(Error::invalid("--size", format!("`{text}` is no size; expected height x width, such as 256x384"))),
    }
}

/// Makes the pictures.
///
/// # Errors
/// What reading the weights, generating and writing return, or [`Error::Interrupted`]; pictures that were already written stay.
pub fn run(plan: &GeneratePlan, progress: &dyn Progress) -> Result<GenerateOutcome> {
    plan.out.prepare()?;
    let device = device::open(&plan.device)?;
    let condition = plan.model.resolve(&plan.condition, plan.grid, &device)?;
    plan.model.remark(&condition).iter().for_each(|line| progress.say(line));
    let decoder = plan.model.open_decoder(&device)?;
    let mut generator = Some(plan.model.open_generator(&device, plan.weights)?);
    let seeds: Vec<u64> = (0..plan.count as u64).map(|i| plan.seed.wrapping_add(i)).collect();
    let (mut files, mut images) = (Vec::new(), Vec::new());
    let batches = seeds.len().div_ceil(plan.batch);
    for (batch, seeds) in seeds.chunks(plan.batch).enumerate() {
        let Some(model) = &generator else { break };
        let request = ImageRequest { condition: condition.clone(), seed: 0, known: None };
        let requests = seeds.iter().map(|seed| ImageRequest { seed: *seed, ..request.clone() }).collect();
        let request = Request { grid: plan.grid, ..Request::new(requests, plan.sampling.clone()) };
        let what = if batches > 1 { format!("generating {}/{batches}", batch + 1) } else { "generating".into() };
        let codes = generate(model, &request, &what, progress)?;
        // The last pictures are decoded in the memory that the generator had.
        generator = generator.filter(|_| batch + 1 < batches);
        let decoded = match plan.grid {
            None => decoder.decode(&codes),
            Some(grid) => decoder.decode_grid(&codes, grid)?,
        };
        for (image, seed) in pixels::download(decoded, decoder.planes())?.iter().zip(seeds) {
            let image = pixels::enlarged(image, plan.scale)?;
            match &plan.out {
                Output::Folder(folder) => files.push(save(plan, &name(folder, *seed), &image, *seed, 1)?),
                Output::File(_) => images.push(image),
            }
        }
    }
    if let Output::File(path) = &plan.out {
        let columns = (plan.count as f64).sqrt().ceil() as usize;
        let sheet = if images.len() == 1 { images.swap_remove(0) } else { grid(&images, columns, GAP * plan.scale)? };
        files.push(save(plan, path, &sheet, plan.seed, plan.count)?);
    }
    let (height, width) = plan.size;
    Ok(GenerateOutcome {
        parameters: parameters(plan, plan.seed, if matches!(plan.out, Output::File(_)) { plan.count } else { 1 }),
        size: (height * plan.scale, width * plan.scale),
        files,
        seeds,
    })
}

/// Pulls a generation to its end.
pub(crate) fn generate(
    generator: &dyn Generator,
    request: &Request,
    what: &str,
    progress: &dyn Progress,
) -> Result<Codes> {
    let mut generation = generator.start(request)?;
    progress.begin(what, generation.steps() as u64, "steps");
    while generation.done() < generation.steps() {
        if progress.cancelled() {
            progress.end();
            return Err(Error::Interrupted { hint: None });
        }
        generation.next();
        progress.advance(generation.done() as u64, "");
    }
    progress.end();
    Ok(generation.codes())
}

fn name(folder: &Path, seed: u64) -> PathBuf {
    folder.join(format!("{seed:06}.png"))
}

fn save(plan: &GeneratePlan, path: &Path, image: &Image, seed: u64, count: usize) -> Result<PathBuf> {
    save_png(path, image, Some(&parameters(plan, seed, count)))?;
    Ok(path.to_path_buf())
}

/// What a picture was made with, for its text chunk.
fn parameters(plan: &GeneratePlan, seed: u64, count: usize) -> serde_json::Value {
    serde_json::json!({
        "program": concat!("smalti ", env!("CARGO_PKG_VERSION")),
        "verb": "generate",
        "prompt": plan.prompt,
        "class": plan.class,
        "condition": plan.condition_image,
        "seed": seed,
        "count": count,
        "size": [plan.size.0, plan.size.1],
        "weights": plan.weights.name(),
        "sampling": plan.sampling,
        "model": plan.model.provenance(),
    })
}
