//! Metrics of reconstructions against their definitions.

use super::case::Case;
use super::comparison::Comparison;
use smalti_base::{Error, Result};
use smalti_eval::{Pair, Scores};

/// The distance between black and white of 8-bit pixels.
const RANGE: f64 = 255.0;

pub(super) fn knows_pixels(case: &Case) -> bool {
    case.has(&["image_u8", "recon_u8", "mse", "psnr", "ssim_gaussian"])
}

pub(super) fn pixels(case: &Case, compare: &mut Comparison) -> Result<()> {
    case.ignore(&["noise"]);
    let pixels = |name: &str| Ok(case.ints(name)?.iter().map(|value| *value as f32).collect::<Vec<f32>>());
    let (images, recons) = (pixels("image_u8")?, pixels("recon_u8")?);
    let [_, c, h, w] = case.shape("image_u8")?[..] else {
        return Err(Error::invalid(case.title(), "`image_u8` is not [b, c, h, w]"));
    };
    let size = (c * h * w).max(1);
    let pairs = images.chunks(size).zip(recons.chunks(size));
    let scores: Vec<Scores> = pairs
        .map(|(image, recon)| Ok(Scores::of(Pair::new(image, recon, [c, h, w])?, RANGE)))
        .collect::<Result<_>>()?;
    let column = |of: fn(&Scores) -> f64| scores.iter().map(|scores| of(scores) as f32).collect::<Vec<f32>>();
    compare.values("mse", &column(|scores| scores.mse))?;
    compare.values("psnr", &column(|scores| scores.psnr))?;
    // Smaller images than the window have no similarity, which is no number.
    compare.values("ssim_gaussian", &column(|scores| scores.ssim.unwrap_or(f64::NAN)))
}
