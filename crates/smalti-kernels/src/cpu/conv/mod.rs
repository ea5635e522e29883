//! Convolution of `[batch, channels, height, width]`: by Winograd's algorithm or by direct sums.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod columns;
mod gather;
mod kernels;
mod tiles;
mod transforms;
mod weights;
#[cfg(target_arch = "x86_64")]
mod wide;
mod winograd;

use super::simd::sum;
use rayon::prelude::*;

/// Sizes of one convolution.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub batch: usize,
    pub inputs: usize,
    pub outputs: usize,
    /// Height and width of the input as it is stored.
    pub size: [usize; 2],
    /// Whether the convolution sees each stored pixel as two by two.
    pub upsample: bool,
    pub kernel: [usize; 2],
    pub stride: usize,
    /// Zeros above and on the left.
    pub padding: [usize; 2],
    /// Height and width of the result.
    pub result: [usize; 2],
    /// Whether Winograd's algorithm is out.
    pub direct: bool,
}

impl Geometry {
    /// Height and width of what is convolved.
    fn seen(&self) -> [usize; 2] {
        self.size.map(|n| if self.upsample { 2 * n } else { n })
    }

    /// Whether Winograd's algorithm, which handles blocks of 4 by 4 results, is the faster one. The batch has no say, so
    /// that an image's result does not depend on it.
    fn winograd(&self, inputs: usize, outputs: usize, [h, w]: [usize; 2]) -> bool {
        let useful = 36 * h.div_ceil(4) * w.div_ceil(4) <= 6 * h * w;
        !self.direct && self.kernel == [3, 3] && self.stride == 1 && useful && inputs >= 8 && outputs >= 8
    }
}

/// `y [batch, outputs, ..result]`.
pub(crate) fn forward(geometry: Geometry, x: &[f32], weight: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    if geometry.winograd(geometry.inputs, geometry.outputs, geometry.result) {
        winograd::forward(geometry, x, weight, bias)
    } else {
        columns::forward(geometry, x, weight, bias)
    }
}

/// The gradient of `x` for the gradient `dy` of the result.
pub(crate) fn backward_data(geometry: Geometry, weight: &[f32], dy: &[f32]) -> Vec<f32> {
    if geometry.winograd(geometry.outputs, geometry.inputs, geometry.seen()) {
        winograd::backward_data(geometry, weight, dy)
    } else {
        columns::backward_data(geometry, weight, dy)
    }
}

/// The gradient of `weight` for the gradient `dy` of the result.
pub(crate) fn backward_weight(geometry: Geometry, x: &[f32], dy: &[f32]) -> Vec<f32> {
    if geometry.winograd(geometry.inputs, geometry.outputs, geometry.result) {
        weights::backward(geometry, x, dy)
    } else {
        columns::backward_weight(geometry, x, dy)
    }
}

/// The gradient of `bias` for the gradient `dy` of the result.
pub(crate) fn backward_bias(geometry: Geometry, dy: &[f32]) -> Vec<f32> {
    let area = geometry.result[0] * geometry.result[1];
    let of_channel = |channel: usize| {
        let planes = (0..geometry.batch).map(|image| (image * geometry.outputs + channel) * area);
        planes.map(|start| total(&dy[start..start + area])).sum()
    };
    (0..geometry.outputs).into_par_iter().map(of_channel).collect()
}

super::simd::simd! {
    fn total(values: &[f32]) -> f32 {
        sum(values, |v| v)
    }
}
