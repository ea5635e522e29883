//! `edit`: part of an image repainted, the rest kept pixel by pixel.

use crate::generating::{Generating, Typed, generate};
use crate::model::Wish;
use crate::output::{Output, must_not_overwrite};
use crate::{SamplingArgs, Settings, WeightsArgs};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Layout, Progress, Result, device, files};
use smalti_data::Image;
use smalti_data::image::{self, Limits, Mask, decode_mask, save_png};
use smalti_data::transforms::{Filter, resize};
use smalti_models::{ImageRequest, Known, Request};
use smalti_train::pixels;
use std::path::PathBuf;

const BACKGROUND: [u8; 3] = [255; 3];

/// What of the mask says where to repaint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum MaskChannel {
    /// Its transparent pixels
    Alpha,
    /// Its light pixels
    Light,
}

impl From<MaskChannel> for image::MaskChannel {
    fn from(channel: MaskChannel) -> Self {
        match channel {
            MaskChannel::Alpha => Self::Alpha,
            MaskChannel::Light => Self::Light,
        }
    }
}

/// What `edit` is told.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct EditArgs {
    /// The image to change
    pub image: PathBuf,
    /// What the picture should show
    pub prompt: Option<String>,
    /// An image whose white parts mark what to repaint, or a copy of the image with transparent holes; it is stretched to the
    /// image's size
    #[arg(long, value_name = "MASK")]
    pub mask: PathBuf,
    /// What of the mask marks [default: found out; a mask that can be read in two ways is refused]
    #[arg(long, value_name = "CHANNEL")]
    pub mask_channel: Option<MaskChannel>,
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
    /// The .png file to write
    #[arg(short, long, value_name = "FILE")]
    pub out: PathBuf,
    /// How the generator's weights are kept.
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// How tokens are drawn.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// A resolved and checked `edit`.
#[derive(Clone, Debug, Serialize)]
pub struct EditPlan {
    /// The image.
    pub image: PathBuf,
    /// The mask.
    pub mask: PathBuf,
    /// Height and width of the image.
    pub size: (usize, usize),
    /// Tokens that are generated, of so many.
    pub tokens: (usize, usize),
    /// The file to write.
    pub out: PathBuf,
    /// What the picture shows and what makes it.
    #[serde(flatten)]
    pub generating: Generating,
    #[serde(skip)]
    pixels: Image,
    #[serde(skip)]
    repaint: Mask,
    #[serde(skip)]
    keep: Vec<bool>,
}

/// What `edit` made.
#[derive(Clone, Debug, Serialize)]
pub struct EditOutcome {
    /// The file that was written.
    pub file: PathBuf,
    /// Share of the pixels that were repainted.
    pub repainted: f64,
    /// Tokens that were generated, of so many.
    pub tokens: (usize, usize),
    /// The parameters that the file carries.
    pub parameters: serde_json::Value,
}

/// Resolves and checks everything; reads image and mask, but no weight.
///
/// # Errors
/// As for `generate`, an image or mask that cannot be read, a mask that marks nothing, or tokens that are not in grids.
pub fn plan(args: &EditArgs, settings: &Settings) -> Result<EditPlan> {
    let out = Output::file(&args.out)?;
    let read = [("the image", Some(&args.image)), ("the mask", Some(&args.mask))];
    let read = read.into_iter().chain([("the condition's image", args.condition.as_ref())]);
    must_not_overwrite(&out, read.filter_map(|(what, path)| Some((what, path?.as_path()))))?;
    let wish = Wish { prompt: args.prompt.as_deref(), class: args.class.as_deref(), image: args.condition.as_deref() };
    let (model, negative) = (args.model.as_deref(), args.negative.as_deref());
    let typed = Typed { model, wish, negative, sampling: &args.sampling, weights: &args.weights };
    let generating = Generating::plan(typed, settings)?;
    let model = &generating.model;
    let layout = &model.tokens.layout;
    if !matches!(layout, Layout::Grid { .. } | Layout::Stack { .. } | Layout::Pyramid { .. }) {
        return Err(Error::unsupported(
            format!("editing with tokens in a {layout}"),
            "each token must stand for a place in the image: use a model whose tokens form grids",
        ));
    }
    let (h, w) = layout.finest();
    let limits = Limits::default();
    let pixels = smalti_data::image::open_as(model.planes()?, &args.image, BACKGROUND, &limits)?;
    let bytes = files::read_at_most(&args.mask, limits.bytes)?;
    let name = args.mask.display().to_string();
    let mask = decode_mask(&bytes, &name, &limits, Some(&pixels), args.mask_channel.map(Into::into))?;
    if !mask.repaint.contains(&true) {
        return Err(Error::invalid_hint(
            args.mask.display(),
            "the mask marks nothing",
            "white parts are repainted, or the transparent holes of a copy of the image; `--mask-channel alpha|light` says which",
        ));
    }
    let repaint = Mask::new(pixels.width, pixels.height, mask.on_grid(pixels.width, pixels.height))?;
    let finest: Vec<bool> = repaint.on_grid(w, h).into_iter().map(|repaint| !repaint).collect();
    let keep = Known::keep(layout, &finest);
    Ok(EditPlan {
        image: args.image.clone(),
        mask: args.mask.clone(),
        size: (pixels.height, pixels.width),
        tokens: (keep.iter().filter(|keep| !**keep).count(), keep.len()),
        out,
        generating,
        pixels,
        repaint,
        keep,
    })
}

/// Repaints.
///
/// # Errors
/// What reading the weights, generating and writing return, or [`Error::Interrupted`].
pub fn run(plan: &EditPlan, progress: &dyn Progress) -> Result<EditOutcome> {
    Output::File(plan.out.clone()).prepare()?;
    let generating = &plan.generating;
    generating.model.say_first_stage(progress);
    let device = device::open(&generating.device)?;
    let picture = generating.picture(None, &device, progress)?;
    let tokenizer = generating.model.open_tokenizer(&device)?;
    let generator = generating.open_generator(&device)?;
    let planes = tokenizer.planes();
    let small = resize(&plan.pixels, generating.model.tokens.image_size, Filter::of(planes))?;
    let tokens = tokenizer.encode(pixels::upload(&[small], planes, &device)?)?;
    let mut tokens = tokens.to_host_of(&[plan.image.display().to_string()])?;
    let known = Known { tokens: tokens.swap_remove(0), keep: plan.keep.clone() };
    let request = Request::new(vec![ImageRequest { known: Some(known), ..picture }], generating.sampling.clone());
    let codes = generate(&*generator, &request, "editing", progress)?;
    let painted = pixels::download(tokenizer.decode(&codes)?, planes)?.swap_remove(0);
    let painted = resize(&painted, plan.size, Filter::of(planes))?;
    let own = serde_json::json!({ "image": plan.image, "mask": plan.mask, "tokens_made": plan.tokens.0 });
    let parameters = generating.parameters("edit", generating.seed, own);
    save_png(&plan.out, &composite(&plan.pixels, &painted, &plan.repaint), Some(&parameters))?;
    let repainted = plan.repaint.repaint.iter().filter(|r| **r).count() as f64 / plan.repaint.repaint.len() as f64;
    Ok(EditOutcome { file: plan.out.clone(), repainted, tokens: plan.tokens, parameters })
}

/// The painted pixels where the mask says so, else the image's own.
fn composite(image: &Image, painted: &Image, mask: &Mask) -> Image {
    let mut result = image.clone();
    let pixels = result.pixels.as_chunks_mut::<3>().0.iter_mut();
    for ((pixel, new), repaint) in pixels.zip(painted.pixels.as_chunks::<3>().0).zip(&mask.repaint) {
        if *repaint {
            *pixel = *new;
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_pixels_are_the_images_own() {
        let image = Image::filled(2, 1, [1, 2, 3]);
        let painted = Image::filled(2, 1, [7, 8, 9]);
        let mask = Mask::new(2, 1, vec![false, true]).unwrap();
        assert_eq!(composite(&image, &painted, &mask).pixels, [1, 2, 3, 7, 8, 9]);
    }
}
