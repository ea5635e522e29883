//! Between tensors and images.

use burn::tensor::{Device, Tensor, TensorData};
use smalti_base::{Error, Result};
use smalti_data::{Image, ImageBatch};
use smalti_eval::{Pair, Scores};

/// Images `[n, channels, height, width]` in -1..1, 1 or 3 channels, as 8-bit images. One download.
///
/// # Errors
/// [`Error::Invalid`] if the device returns something else.
pub fn download(images_bchw: Tensor<4>) -> Result<Vec<Image>> {
    let [_, c, h, w] = images_bchw.dims();
    let values: Vec<f32> = images_bchw
        .into_data()
        .convert::<f32>()
        .try_into_vec()
        .map_err(|error| Error::invalid("decoded images", format!("{error:?}")))?;
    values.chunks_exact((c * h * w).max(1)).map(|image| Image::from_signed(image, w, h)).collect()
}

/// Images of one size as `[n, channels, height, width]` in -1..1. One upload.
///
/// # Errors
/// As [`Image::planes`].
pub fn upload(images: &[Image], channels: usize, device: &Device) -> Result<Tensor<4>> {
    let (h, w) = images.first().map_or((0, 0), |image| (image.height, image.width));
    let values = images.iter().map(|image| image.planes(channels)).collect::<Result<Vec<_>>>()?.concat();
    Ok(Tensor::from_data(TensorData::new(values, [images.len(), channels, h, w]), device))
}

/// A batch as `[n, channels, height, width]` in -1..1. One upload.
pub fn upload_batch(batch: &ImageBatch, device: &Device) -> Tensor<4> {
    let shape = [batch.len(), batch.channels, batch.height, batch.width];
    Tensor::from_data(TensorData::new(batch.pixels.clone(), shape), device)
}

/// The images of a batch.
///
/// # Errors
/// As [`Image::from_signed`].
pub fn batch_images(batch: &ImageBatch) -> Result<Vec<Image>> {
    let size = batch.channels * batch.height * batch.width;
    batch.pixels.chunks_exact(size.max(1)).map(|image| Image::from_signed(image, batch.width, batch.height)).collect()
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
