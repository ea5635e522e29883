//! Resampling of feature maps between fixed sizes, with PyTorch's arithmetic.
//!
//! A resampling is linear in rows and in columns, so it is two small matrices: exact on every device, differentiable, and
//! computed once.

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};

/// How a place of the new map is made from the old one. Edges are not aligned with the centres of corner places, and
/// making a map smaller does not blur it first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interpolation {
    /// The mean of the places under the new one, those at its borders whole (adaptive average pooling, PyTorch's `area`).
    Area,
    /// Straight lines between the centres of places.
    Bilinear,
    /// Cubic convolution with a = -0.75; outside, the border's places are repeated.
    Bicubic,
}

impl Interpolation {
    /// The weights of the old places for each new one, `to` rows of `from`.
    pub fn weights(self, from: usize, to: usize) -> Vec<Vec<f64>> {
        (0..to).map(|place| self.row(place, from, to)).collect()
    }

    fn row(self, place: usize, from: usize, to: usize) -> Vec<f64> {
        let mut row = vec![0.0; from];
        let centre = (place as f64 + 0.5) * from as f64 / to as f64 - 0.5;
        let last = from as i64 - 1;
        match self {
            Self::Area => {
                let (start, end) = (place * from / to, ((place + 1) * from).div_ceil(to));
                row[start..end].fill(1.0 / (end - start) as f64);
            }
            Self::Bilinear => {
                let centre = centre.max(0.0);
                let (first, part) = (centre.floor() as i64, centre.fract());
                row[first.min(last) as usize] += 1.0 - part;
                row[(first + 1).min(last) as usize] += part;
            }
            Self::Bicubic => {
                let first = centre.floor();
                for tap in -1..=2 {
                    let at = (first as i64 + tap).clamp(0, last) as usize;
                    row[at] += cubic(centre - first - tap as f64);
                }
            }
        }
        row
    }
}

/// The kernel of cubic convolution at a distance.
fn cubic(distance: f64) -> f64 {
    const A: f64 = -0.75;
    let x = distance.abs();
    match x {
        x if x <= 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
        x if x < 2.0 => A * (((x - 5.0) * x + 8.0) * x - 4.0),
        _ => 0.0,
    }
}

/// Resampling from one size to another. It has no parameters.
#[derive(Module, Debug)]
pub struct Resize {
    /// `[w, w']`
    columns: Tensor<2>,
    /// `[h, h']`
    rows: Tensor<2>,
    identity: bool,
}

impl Resize {
    /// From `from` to `to`, rows and columns, each at least 1.
    pub fn new(interpolation: Interpolation, from: [usize; 2], to: [usize; 2], device: &Device) -> Self {
        let device = device.clone().without_autodiff();
        let matrix = |axis: usize| {
            let weights = interpolation.weights(from[axis], to[axis]).concat();
            let weights: Vec<f32> = weights.into_iter().map(|weight| weight as f32).collect();
            Tensor::<2>::from_data(TensorData::new(weights, [to[axis], from[axis]]), &device).transpose()
        };
        Self { rows: matrix(0), columns: matrix(1), identity: from == to }
    }

    /// Resamples.
    ///
    /// # Shapes
    /// `[b, c, h, w]` to `[b, c, h', w']`.
    pub fn forward(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        if self.identity {
            return x_bchw;
        }
        let [b, c, h, w] = x_bchw.dims();
        let ([_, new_h], [_, new_w]) = (self.rows.dims(), self.columns.dims());
        let wide = x_bchw.reshape([b * c * h, w]).matmul(self.columns.clone());
        let turned = wide.reshape([b, c, h, new_w]).swap_dims(2, 3).reshape([b * c * new_w, h]);
        turned.matmul(self.rows.clone()).reshape([b, c, new_w, new_h]).swap_dims(2, 3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_sum_to_one_and_the_identity_is_exact() {
        for interpolation in [Interpolation::Area, Interpolation::Bilinear, Interpolation::Bicubic] {
            for (from, to) in [(16, 5), (5, 16), (1, 7), (7, 1), (13, 16)] {
                for row in interpolation.weights(from, to) {
                    assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-12, "{interpolation:?} {from} to {to}");
                }
            }
            for (place, row) in interpolation.weights(6, 6).iter().enumerate() {
                assert!(row.iter().enumerate().all(|(i, weight)| *weight == f64::from(i == place)));
            }
        }
    }

    #[test]
    fn rows_and_columns_are_resampled() {
        let device = Device::flex();
        let x = Tensor::<4>::from_data([[[[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]]]], &device);
        let mean = Resize::new(Interpolation::Area, [2, 3], [1, 2], &device).forward(x);
        // The middle column belongs to both halves.
        assert_eq!(mean.into_data().iter::<f32>().collect::<Vec<_>>(), [3.5, 4.5]);
    }
}
