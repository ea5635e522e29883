//! Between tensors and images.

use burn::tensor::{Device, Tensor, TensorData};
use serde::Serialize;
use smalti_base::{Error, Planes, Result};
use smalti_data::{Image, ImageBatch};
use smalti_eval::{Confusion, Pair, Scores};

/// Images `[n, planes, height, width]` as 8-bit images. One download.
///
/// # Errors
/// [`Error::Invalid`] if the device returns something else.
pub fn download(images_bchw: Tensor<4>, planes: Planes) -> Result<Vec<Image>> {
    let [_, c, h, w] = images_bchw.dims();
    let values: Vec<f32> = images_bchw
        .into_data()
        .convert::<f32>()
        .try_into_vec()
        .map_err(|error| Error::invalid("decoded images", format!("{error:?}")))?;
    values.chunks_exact((c * h * w).max(1)).map(|image| Image::from_planes(planes, image, w, h)).collect()
}

/// Images of one size as `[n, planes, height, width]`. One upload.
///
/// # Errors
/// As [`Image::planes`].
pub fn upload(images: &[Image], planes: Planes, device: &Device) -> Result<Tensor<4>> {
    let (h, w) = images.first().map_or((0, 0), |image| (image.height, image.width));
    let values = images.iter().map(|image| image.planes(planes)).collect::<Result<Vec<_>>>()?.concat();
    Ok(Tensor::from_data(TensorData::new(values, [images.len(), planes.count(), h, w]), device))
}

/// A batch as `[n, planes, height, width]`. One upload.
pub fn upload_batch(batch: &ImageBatch, device: &Device) -> Tensor<4> {
    let shape = [batch.len(), batch.planes.count(), batch.height, batch.width];
    Tensor::from_data(TensorData::new(batch.pixels.clone(), shape), device)
}

/// The images of a batch.
///
/// # Errors
/// As [`Image::from_planes`].
pub fn batch_images(batch: &ImageBatch) -> Result<Vec<Image>> {
    let size = batch.planes.count() * batch.height * batch.width;
    let image = |values| Image::from_planes(batch.planes, values, batch.width, batch.height);
    batch.pixels.chunks_exact(size.max(1)).map(image).collect()
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
    /// The scores of each picture.
    Pictures(Vec<Scores>),
    /// Of all label maps together, and the shift of their labels.
    Labels(Confusion, u8),
}

impl FidelitySum {
    /// Nothing yet.
    pub fn new(planes: Planes) -> Self {
        match planes {
            Planes::Labels { classes, shift } => Self::Labels(Confusion::new(classes), shift),
            Planes::Grey | Planes::Colour => Self::Pictures(Vec::new()),
        }
    }

    /// Adds one reconstruction and says how near it is.
    ///
    /// # Errors
    /// As [`compare`].
    pub fn add(&mut self, original: &Image, reconstruction: &Image) -> Result<Fidelity> {
        match self {
            Self::Pictures(all) => {
                let scores = compare(original, reconstruction)?;
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
            Self::Pictures(all) => Fidelity::Pictures(Scores::mean(all)),
            Self::Labels(sum, _) => {
                Fidelity::Labels { label_accuracy: sum.accuracy(), label_mean_iou: sum.mean_intersection_over_union() }
            }
        }
    }
}

/// The scores of a reconstruction, computed from 8-bit levels as a viewer of the files would.
///
/// # Errors
/// [`Error::Invalid`] if the sizes differ.
pub fn compare(original: &Image, reconstruction: &Image) -> Result<Scores> {
    let (left, right) = (levels(original), levels(reconstruction));
    Ok(Scores::of(Pair::new(&left, &right, [3, original.height, original.width])?, 255.0))
}

/// The levels 0..255 channel by channel.
fn levels(image: &Image) -> Vec<f32> {
    (0..3).flat_map(|channel| image.pixels.iter().skip(channel).step_by(3).map(|level| f32::from(*level))).collect()
}

/// Each pixel as a square of `scale` pixels.
///
/// # Errors
/// As [`Image::new`].
pub fn enlarged(image: &Image, scale: usize) -> Result<Image> {
    if scale == 1 {
        return Ok(image.clone());
    }
    let row = |row: &[u8]| row.chunks_exact(3).flat_map(|pixel| pixel.repeat(scale)).collect::<Vec<u8>>().repeat(scale);
    let pixels = image.pixels.chunks_exact(image.width * 3).flat_map(row).collect();
    Ok(Image { grey: image.grey, ..Image::new(image.width * scale, image.height * scale, pixels)? })
}
