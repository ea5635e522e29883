//! `reconstruct`: images through a tokenizer and back, side by side with the originals.

use crate::Settings;
use crate::model::ModelPlan;
use crate::output::{Names, file_stem, is_inside, must_be_a_name, must_not_overwrite, prepare_folder};
use crate::source::{Images, SourceArgs};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Progress, Result, TokenSpec, device};
use smalti_data::image::{Image, grid, save_png};
use smalti_data::loader::Skipped;
use smalti_eval::{Compared, Fidelity, FidelitySum};
use smalti_train::pixels;
use std::path::{Path, PathBuf};

/// Pixels between an image and its reconstruction.
const GAP: usize = 2;
/// The contact sheet's name.
const SHEET: &str = "grid";
/// Most images on the contact sheet.
const ON_SHEET: usize = 64;
/// Pairs in a row of it, if only pairs are shown.
const COLUMNS: usize = 4;

/// What `reconstruct` is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct ReconstructArgs {
    /// An image, a folder of images, WebDataset tars or IDX files
    #[arg(value_name = "SRC")]
    pub source: PathBuf,
    /// Bundle or run folder [default: $SMALTI_MODEL, else the demo bundle]
    #[arg(short, long, value_name = "BUNDLE")]
    pub model: Option<PathBuf>,
    /// The folder for the pictures (original left, reconstruction right) and the contact sheet grid.png
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,
    /// Show too what the first levels or depths of the codes give alone: numbers such as 1,2,4, or `all`
    #[arg(long, value_name = "N,..")]
    pub levels: Option<String>,
    /// Number of images to process at once
    #[arg(long, value_name = "N", default_value_t = ReconstructArgs::default().batch)]
    pub batch: usize,
    /// Which images.
    #[command(flatten)]
    pub images: SourceArgs,
}

impl Default for ReconstructArgs {
    fn default() -> Self {
        Self {
            source: PathBuf::new(),
            model: None,
            out: PathBuf::new(),
            levels: None,
            batch: 16,
            images: SourceArgs::default(),
        }
    }
}

/// A resolved and checked `reconstruct`.
#[derive(Clone, Debug, Serialize)]
pub struct ReconstructPlan {
    /// The folder to write into.
    pub out: PathBuf,
    /// Numbers of levels or depths whose pictures are shown too, growing.
    pub levels: Vec<usize>,
    /// Images at the same time.
    pub batch: usize,
    /// Where to compute.
    pub device: String,
    /// The images.
    pub source: Images,
    /// The model.
    pub model: ModelPlan,
}

/// One image.
#[derive(Clone, Debug, Serialize)]
pub struct Reconstruction {
    /// Its name in the source.
    pub key: String,
    /// The side-by-side picture: the original, what the first levels or depths give if they were asked for, the reconstruction.
    pub file: PathBuf,
    /// How near the reconstruction is.
    #[serde(flatten)]
    pub scores: Fidelity,
}

/// What the first levels or depths of the codes give alone.
#[derive(Clone, Debug, Serialize)]
pub struct LevelScores {
    /// How many of them.
    pub levels: usize,
    /// The mean of each score over the images.
    pub mean: Fidelity,
}

/// What `reconstruct` made.
#[derive(Clone, Debug, Serialize)]
pub struct ReconstructOutcome {
    /// Each image, in the source's order.
    pub images: Vec<Reconstruction>,
    /// The mean of each score; of label maps the numbers of all pixels.
    pub mean: Fidelity,
    /// The means of what the first levels or depths give alone.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub levels: Vec<LevelScores>,
    /// The contact sheet.
    pub grid: PathBuf,
    /// Images that could not be used.
    pub skipped: Vec<Skipped>,
}

/// Resolves and checks everything; reads no weight and no image.
///
/// # Errors
/// A model that is missing or does not fit, a source that cannot be used, an unknown device, or a setting out of range.
pub fn plan(args: &ReconstructArgs, settings: &Settings) -> Result<ReconstructPlan> {
    let model = ModelPlan::find(args.model.as_deref())?;
    let planes = model.planes()?;
    let levels = levels(args.levels.as_deref(), &model.tokens)?;
    must_be_a_name(&args.out)?;
    let source = Images::open(args.images.config(&args.source, model.tokens.image_size, planes)?, planes, None)?;
    must_keep_source(&args.out, &source)?;
    Ok(ReconstructPlan {
        out: args.out.clone(),
        levels,
        batch: args.batch.max(1),
        device: settings.device_name()?,
        source,
        model,
    })
}

/// The pictures must not be written over the images, nor between them, where the next run would read them.
fn must_keep_source(out: &Path, source: &Images) -> Result<()> {
    let dataset = source.dataset();
    let path = dataset.path();
    if path.is_dir() && is_inside(out, path) && dataset.kind() == "image_folder" {
        let problem = format!("is in the folder of the images that are read, {}", path.display());
        return Err(Error::invalid_hint(out.display(), problem, "choose a folder outside of it with --out"));
    }
    let file = |stem: &str| out.join(format!("{stem}.png"));
    let written = [SHEET.to_string(), file_stem(&dataset.key(0))];
    let written = written.iter().filter(|_| path.is_file());
    written.into_iter().try_for_each(|stem| must_not_overwrite(&file(stem), [("the image", path)]))
}

/// The numbers of `--levels`.
fn levels(asked: Option<&str>, tokens: &TokenSpec) -> Result<Vec<usize>> {
    let Some(asked) = asked else { return Ok(Vec::new()) };
    let parts = tokens.layout.parts();
    if parts < 2 {
        return Err(Error::invalid_hint(
            "--levels",
            "the codes of this tokenizer have no levels or depths",
            "leave --levels out",
        ));
    }
    if asked == "all" {
        return Ok((1..parts).collect());
    }
    let number = |text: &str| match text.trim().parse() {
        Ok(levels) if (1..=parts).contains(&levels) => Ok(levels),
        _ => Err(Error::invalid_hint(
            "--levels",
            format!("`{}` is not one of 1 to {parts}", text.trim()),
            "give numbers with commas between them, such as 1,2, or `all`",
        )),
    };
    let mut levels: Vec<usize> = asked.split(',').map(number).collect::<Result<_>>()?;
    levels.sort_unstable();
    levels.dedup();
    Ok(levels)
}

/// Reconstructs all images.
///
/// # Errors
/// What reading, computing and writing return, or [`smalti_base::Error::Interrupted`]; pictures already written stay.
pub fn run(plan: &ReconstructPlan, progress: &dyn Progress) -> Result<ReconstructOutcome> {
    prepare_folder(&plan.out)?;
    let device = device::open(&plan.device)?;
    let tokenizer = plan.model.open_tokenizer(&device)?;
    let planes = tokenizer.planes();
    let mut fidelity = FidelitySum::new(planes, Compared::Levels);
    let mut of_levels = vec![fidelity.clone(); plan.levels.len()];
    let (mut images, mut rows, mut names) = (Vec::new(), Vec::new(), Names::without([SHEET]));
    let mut batches = plan.source.batches("reconstructing", 0, plan.batch, progress)?;
    while let Some(batch) = batches.next() {
        let batch = batch?;
        let originals = pixels::batch_images(&batch)?;
        let codes = tokenizer.encode(pixels::upload_batch(&batch, &device))?;
        codes.must_be_whole(&batch.keys)?;
        let mut shown: Vec<Vec<Image>> = originals.iter().map(|image| vec![image.clone().visible(planes)]).collect();
        for (levels, fidelity) in plan.levels.iter().zip(&mut of_levels) {
            let pictures = pixels::download(tokenizer.decode_prefix(&codes, *levels)?, planes)?;
            for ((shown, original), picture) in shown.iter_mut().zip(&originals).zip(pictures) {
                fidelity.add(original, &picture)?;
                shown.push(picture.visible(planes));
            }
        }
        let pictures = pixels::download(tokenizer.decode(&codes)?, planes)?;
        for (((key, original), picture), mut shown) in batch.keys.iter().zip(&originals).zip(pictures).zip(shown) {
            let scores = fidelity.add(original, &picture)?;
            shown.push(picture.visible(planes));
            let row = grid(&shown, shown.len(), GAP)?;
            let file = plan.out.join(names.take(&file_stem(key)) + ".png");
            save_png(&file, &row, None)?;
            if rows.len() < ON_SHEET {
                rows.push(row);
            }
            images.push(Reconstruction { key: key.clone(), file, scores });
        }
        batches.done(&images.last().map(|image: &Reconstruction| image.scores.note()).unwrap_or_default());
    }
    let skipped = batches.finish()?;
    let sheet = plan.out.join(format!("{SHEET}.png"));
    // About as wide as a sheet of pairs.
    let columns = (2 * COLUMNS + plan.levels.len()) / (plan.levels.len() + 2);
    save_png(&sheet, &grid(&rows, columns.max(1), 2 * GAP)?, None)?;
    let levels =
        plan.levels.iter().zip(&of_levels).map(|(levels, sum)| LevelScores { levels: *levels, mean: sum.mean() });
    Ok(ReconstructOutcome { mean: fidelity.mean(), levels: levels.collect(), images, grid: sheet, skipped })
}
