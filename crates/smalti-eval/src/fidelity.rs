//! How near reconstructions are to their images, of whatever kind the images are.

use crate::{Confusion, Pair, Scores};
use serde::Serialize;
use smalti_base::{Planes, Result};
use smalti_data::Image;

/// The values over which pictures are compared. The scores differ in the rounding of the values only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// The levels 0..255, as a viewer of the files sees them.
    Levels,
    /// Levels mapped to -1..1, as a model sees them; without the SSIM, which takes longest.
    Signed,
}

impl Compared {
    /// The scores of a reconstruction.
    ///
    /// # Errors
    /// [`smalti_base::Error::Invalid`] if the sizes differ.
    pub fn scores(self, original: &Image, reconstruction: &Image) -> Result<Scores> {
        let shape = [3, original.height, original.width];
        match self {
            Self::Levels => {
                let (left, right) = (levels(original), levels(reconstruction));
                Ok(Scores::of(Pair::new(&left, &right, shape)?, 255.0))
            }
            Self::Signed => {
                let (left, right) = (original.to_signed(), reconstruction.to_signed());
                Ok(Scores::without_ssim(Pair::new(&left, &right, shape)?, 2.0))
            }
        }
    }
}

/// The levels 0..255 channel by channel.
fn levels(image: &Image) -> Vec<f32> {
    (0..3).flat_map(|channel| image.pixels.iter().skip(channel).step_by(3).map(|level| f32::from(*level))).collect()
}

/// How near reconstructions are to their images, one of them or the mean of many.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Fidelity {
    /// Of pictures.
    Pictures(Scores),
    /// Of label maps.
    Labels {
        /// Share of the pixels with the right label.
        label_accuracy: f64,
        /// Mean intersection over union of the classes that occur.
        label_mean_iou: f64,
    },
}

impl Fidelity {
    /// The most telling number, in words.
    pub fn note(&self) -> String {
        match self {
            Self::Pictures(scores) => format!("psnr {:.2}", scores.psnr),
            Self::Labels { label_accuracy, .. } => format!("labels right {:.2}%", 100.0 * label_accuracy),
        }
    }
}

/// Collects how near reconstructions are.
#[derive(Clone, Debug)]
pub enum FidelitySum {
    /// The scores of each picture, over these values.
    Pictures(Vec<Scores>, Compared),
    /// Of all label maps together, and the shift of their labels.
    Labels(Confusion, u8),
}

impl FidelitySum {
    /// Nothing yet. Label maps are compared label by label.
    pub fn new(planes: Planes, compared: Compared) -> Self {
        match planes {
            Planes::Labels { classes, shift } => Self::Labels(Confusion::new(classes), shift),
            Planes::Grey | Planes::Colour => Self::Pictures(Vec::new(), compared),
        }
    }

    /// Adds one reconstruction and says how near it is.
    ///
    /// # Errors
    /// As [`Compared::scores`].
    pub fn add(&mut self, original: &Image, reconstruction: &Image) -> Result<Fidelity> {
        match self {
            Self::Pictures(all, compared) => {
                let scores = compared.scores(original, reconstruction)?;
                all.push(scores);
                Ok(Fidelity::Pictures(scores))
            }
            Self::Labels(sum, shift) => {
                let mut one = Confusion::new(sum.classes());
                for confusion in [&mut *sum, &mut one] {
                    confusion.add(original.classes(*shift), reconstruction.classes(*shift));
                }
                Ok(Self::Labels(one, *shift).mean())
            }
        }
    }

    /// Of pictures the mean of each score; of label maps the numbers of all pixels.
    pub fn mean(&self) -> Fidelity {
        match self {
            Self::Pictures(all, _) => Fidelity::Pictures(Scores::mean(all)),
            Self::Labels(sum, _) => {
                Fidelity::Labels { label_accuracy: sum.accuracy(), label_mean_iou: sum.mean_intersection_over_union() }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of three channels is off by 51 levels, a fifth of the range.
    #[test]
    fn levels_and_signed_values_agree() {
        let (image, off) = (Image::filled(16, 16, [100; 3]), Image::filled(16, 16, [100, 151, 100]));
        let scores = [Compared::Levels, Compared::Signed].map(|compared| compared.scores(&image, &off).unwrap());
        let expected = -10.0 * (0.2f64 * 0.2 / 3.0).log10();
        for scores in scores {
            assert!((scores.psnr - expected).abs() < 1e-5, "{scores:?}");
            assert!((scores.l1 - 0.2 / 3.0).abs() < 1e-7, "{scores:?}");
        }
        assert!(scores[0].ssim.is_some() && scores[1].ssim.is_none());
    }
}
