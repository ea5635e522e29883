//! What can be trained: one file for each kind of task.

mod captions;
pub mod generator;
pub mod tokenizer;

use burn::tensor::{Int, Tensor};
use smalti_base::{Error, Planes, Result};
use smalti_data::image::Image;

/// The pictures of a batch `[b, planes, h, w]`, brought to the host in one read.
///
/// # Errors
/// [`Error::Invalid`] if the device cannot be read.
pub fn pictures(images_bchw: Tensor<4>, planes: Planes) -> Result<Vec<Image>> {
    let [_, c, h, w] = images_bchw.dims();
    let values: Vec<f32> =
        images_bchw.into_data().try_into_vec::<f32>().map_err(|e| Error::invalid("pictures", format!("{e:?}")))?;
    values.chunks(c * h * w).map(|chw| Image::from_planes(planes, chw, w, h)).collect()
}

/// Codes brought to the host in one read.
///
/// # Errors
/// [`Error::Invalid`] if the device cannot be read.
pub fn indices<const D: usize>(codes: Tensor<D, Int>) -> Result<Vec<i64>> {
    codes.into_data().convert::<i64>().try_into_vec::<i64>().map_err(|e| Error::invalid("codes", format!("{e:?}")))
}
