//! Between images and tensors: the only places where pictures cross to the device and back.

use burn::tensor::{Device, Tensor, TensorData};
use smalti_base::{Planes, Result};
use smalti_data::{Image, ImageBatch};
use smalti_models::host;

/// Images `[n, planes, height, width]` as 8-bit images. One download.
///
/// # Errors
/// [`smalti_base::Error::Invalid`] if the device cannot be read or returns something else.
pub fn download(images_bchw: Tensor<4>, planes: Planes) -> Result<Vec<Image>> {
    let [_, c, h, w] = images_bchw.dims();
    let values = host::floats(images_bchw)?;
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
