//! Nearest row of a codebook.

use crate::cpu::nearest_code::nearest;
use crate::flex::{Values, dims, serves};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Int, Tensor, TensorData};

/// Index of the codebook row with the smallest squared euclidean distance to each latent, the first one on ties.
/// No gradient flows through it.
///
/// Distances are compared as `|code|² - 2 code·latent`; the table of all distances is never kept whole.
///
/// # Shapes
/// `latents [n, c]`, `codebook [k, c]` → `[n]` in `0..k`.
///
/// # Panics
/// Where Burn's operations do: shapes that do not fit, an empty codebook.
pub fn nearest_code(latents: Tensor<2>, codebook: Tensor<2>) -> Tensor<1, Int> {
    let (latents, codebook) = (latents.inner(), codebook.inner());
    let ([_, c], [k, width]) = (latents.dims(), codebook.dims());
    if !(c == width && c > 0 && k > 0 && serves(&latents) && serves(&codebook)) {
        return portable(latents, codebook);
    }
    let (latents, codebook) = (latents.into_dispatch(), codebook.into_dispatch());
    Tensor::from_dispatch(<Dispatch as NearestCode>::smalti_nearest_code(latents, codebook))
}

/// Distances kept at a time by the portable body.
const TILE: usize = 1 << 22;

/// [`nearest_code`] as a composition of tensor operations, over tiles of latents.
pub fn portable(latents: Tensor<2>, codebook: Tensor<2>) -> Tensor<1, Int> {
    let [n, c] = latents.dims();
    let [k, _] = codebook.dims();
    let latents = latents.inner();
    let codebook = codebook.inner();
    let squares = codebook.clone().square().sum_dim(1).reshape([1, k]);
    let codes = codebook.transpose() * -2.0;
    let rows = (TILE / k.max(1)).max(1);
    let tiles = (0..n).step_by(rows).map(|start| {
        let tile = latents.clone().slice([start..(start + rows).min(n), 0..c]);
        (tile.matmul(codes.clone()) + squares.clone()).argmin(1).squeeze_dim::<1>(1)
    });
    match tiles.collect::<Vec<_>>() {
        tiles if tiles.is_empty() => Tensor::zeros([0], &latents.device()),
        tiles => Tensor::cat(tiles, 0),
    }
}

#[backend_extension(Flex)]
trait NearestCode: Backend {
    fn smalti_nearest_code(latents: FloatTensor<Self>, codebook: FloatTensor<Self>) -> IntTensor<Self>;
}

impl NearestCode for Flex {
    fn smalti_nearest_code(latents: FloatTensor<Self>, codebook: FloatTensor<Self>) -> IntTensor<Self> {
        let [n, width] = dims(&latents);
        let indices = nearest(&Values::of(latents), &Values::of(codebook), width);
        IntTensor::<Flex>::from_data(TensorData::new(indices, [n]))
    }
}
