//! `generate`: text, a class or nothing to pictures.

use crate::generating::{Generating, Typed, generate};
use crate::model::Wish;
use crate::output::Output;
use crate::{SamplingArgs, Settings, WeightsArgs};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Progress, Result, device};
use smalti_data::image::{Image, grid, save_png};
use smalti_models::{ImageRequest, Request};
use smalti_train::pixels;
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
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1)]
    pub count: usize,
    /// A .png file (several pictures become a grid), or a folder (a file for each picture)
    #[arg(short, long, value_name = "FILE|DIR")]
    pub out: PathBuf,
    /// Height and width of a picture, if larger than the model's own: a window slides over it (only gpt over a
    /// convolutional tokenizer)
    #[arg(long, value_name = "HxW")]
    pub size: Option<String>,
    /// Enlarge each pixel to a square of N
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub scale: usize,
    /// Number of pictures to make at once; does not change them
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
    let (size, grid) = match &args.size {
        None => (generating.model.tokens.image_size, None),
        Some(size) => {
            let size = parse_size(size)?;
            (size, generating.model.grid_of(size)?)
        }
    };
    Ok(GeneratePlan {
        count: args.count,
        batch: args.batch.min(args.count),
        scale: args.scale,
        size,
        grid,
        out,
        generating,
    })
}

/// `HxW`, or one number for a square.
fn parse_size(text: &str) -> Result<(usize, usize)> {
    let (height, width) = text.split_once(['x', 'X']).unwrap_or((text, text));
    match (height.trim().parse(), width.trim().parse()) {
        (Ok(height), Ok(width)) => Ok((height, width)),
        _ => Err(Error::invalid("--size", format!("`{text}` is not a size; expected height x width, such as 256x384"))),
    }
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
    let decoder = generating.model.open_decoder(&device)?;
    let mut generator = Some(generating.open_generator(&device)?);
    let seeds: Vec<u64> = (0..plan.count as u64).map(|i| generating.seed.wrapping_add(i)).collect();
    let (mut files, mut images) = (Vec::new(), Vec::new());
    let batches = seeds.len().div_ceil(plan.batch);
    for (batch, seeds) in seeds.chunks(plan.batch).enumerate() {
        let Some(model) = &generator else { break };
        let requests = seeds.iter().map(|seed| ImageRequest { seed: *seed, ..picture.clone() }).collect();
        let request = Request { grid: plan.grid, ..Request::new(requests, generating.sampling.clone()) };
        let what = if batches > 1 { format!("generating {}/{batches}", batch + 1) } else { "generating".into() };
        let codes = generate(&**model, &request, &what, progress)?;
        // The last pictures are decoded in the memory that the generator had.
        generator = generator.filter(|_| batch + 1 < batches);
        let decoded = match plan.grid {
            None => decoder.decode(&codes)?,
            Some(grid) => decoder.decode_grid(&codes, grid)?,
        };
        for (image, seed) in pixels::download(decoded, decoder.planes())?.iter().zip(seeds) {
            let image = enlarged(image, plan.scale)?;
            match &plan.out {
                Output::Folder(folder) => files.push(save(plan, &name(folder, *seed), &image, *seed, 1)?),
                Output::File(_) => images.push(image),
            }
        }
    }
    if let Output::File(path) = &plan.out {
        let columns = (plan.count as f64).sqrt().ceil() as usize;
        let sheet = if images.len() == 1 { images.swap_remove(0) } else { grid(&images, columns, GAP * plan.scale)? };
        files.push(save(plan, path, &sheet, generating.seed, plan.count)?);
    }
    let (height, width) = plan.size;
    Ok(GenerateOutcome {
        parameters: parameters(plan, generating.seed, if matches!(plan.out, Output::File(_)) { plan.count } else { 1 }),
        size: (height * plan.scale, width * plan.scale),
        files,
        seeds,
    })
}

fn name(folder: &Path, seed: u64) -> PathBuf {
    folder.join(format!("{seed:06}.png"))
}

fn save(plan: &GeneratePlan, path: &Path, image: &Image, seed: u64, count: usize) -> Result<PathBuf> {
    save_png(path, image, Some(&parameters(plan, seed, count)))?;
    Ok(path.to_path_buf())
}

/// What a file of so many pictures, the first with this seed, was made with.
fn parameters(plan: &GeneratePlan, seed: u64, count: usize) -> serde_json::Value {
    let own = serde_json::json!({ "count": count, "size": [plan.size.0, plan.size.1] });
    plan.generating.parameters("generate", seed, own)
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
