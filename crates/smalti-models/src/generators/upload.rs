//! From the host to tensors.

use burn::tensor::{Device, Int, Tensor, TensorData};

/// Rows of codes, all of the same length, as a tensor `[rows, n]`.
pub(super) fn upload(rows: &[Vec<u32>], device: &Device) -> Tensor<2, Int> {
    let n = rows.first().map_or(0, Vec::len);
    let flat: Vec<i32> = rows.iter().flatten().map(|code| *code as i32).collect();
    Tensor::from_data(TensorData::new(flat, [rows.len(), n]), device)
}

/// Tokens of images, all of the same size, as `[b, length, channels]`.
pub(super) fn upload_vectors(values: &[&[f32]], channels: usize, device: &Device) -> Tensor<3> {
    let length = values.first().map_or(0, |row| row.len() / channels.max(1));
    let flat: Vec<f32> = values.iter().flat_map(|row| row.iter().copied()).collect();
    Tensor::from_data(TensorData::new(flat, [values.len(), length, channels]), device)
}

/// Indices as a tensor.
pub(super) fn index(values: Vec<usize>, device: &Device) -> Tensor<1, Int> {
    let n = values.len();
    let values: Vec<i32> = values.into_iter().map(|i| i as i32).collect();
    Tensor::from_data(TensorData::new(values, [n]), device)
}

/// The rows of an image's places in a batch, one after the other: place `p` of image `i` is row `i * length + p`.
fn rows_of(places: &[Vec<usize>], length: usize) -> Vec<usize> {
    let images = places.iter().enumerate();
    images.flat_map(|(image, places)| places.iter().map(move |place| image * length + place)).collect()
}

/// The tokens `[b, length, c]` in these places of each image, `[b, n, c]`; as many of each.
pub(super) fn gathered(tokens_blc: Tensor<3>, places: &[Vec<usize>]) -> Tensor<3> {
    let [b, length, c] = tokens_blc.dims();
    let rows = rows_of(places, length);
    let n = rows.len() / b.max(1);
    let device = tokens_blc.device();
    tokens_blc.reshape([b * length, c]).select(0, index(rows, &device)).reshape([b, n, c])
}
