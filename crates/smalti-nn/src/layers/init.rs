//! First values of parameters.
//!
//! Values are drawn by the device when a parameter is first looked at, so that a model into which a checkpoint is loaded
//! never draws them. For reproducible first values seed the device and look at every parameter in order.

use burn::module::{Param, ParamId};
use burn::tensor::{Device, Distribution, Shape, Tensor};

/// How a weight is filled before training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Normal with mean 0 and this standard deviation, without values beyond two deviations.
    TruncatedNormal(f64),
    /// Uniform between minus and plus this bound.
    Uniform(f64),
}

impl Init {
    /// A trainable parameter that is filled when it is first used.
    pub fn param<const D: usize>(self, shape: [usize; D], device: &Device) -> Param<Tensor<D>> {
        let fill = move |device: &Device, require_grad: bool| {
            let value = self.draw(shape, device);
            if require_grad { value.require_grad() } else { value }
        };
        Param::uninitialized(ParamId::new(), fill, device.clone(), true, Shape::from(shape))
    }

    /// A trainable matrix whose columns follow several laws: so many for each, from left to right.
    pub fn columns(rows: usize, groups: &[(usize, Self)], device: &Device) -> Param<Tensor<2>> {
        let shape = Shape::from([rows, groups.iter().map(|(columns, _)| columns).sum()]);
        let groups = groups.to_vec();
        let fill = move |device: &Device, require_grad: bool| {
            let parts = groups.iter().map(|(columns, init)| init.draw([rows, *columns], device));
            let value = Tensor::cat(parts.collect(), 1);
            if require_grad { value.require_grad() } else { value }
        };
        Param::uninitialized(ParamId::new(), fill, device.clone(), true, shape)
    }

    /// A tensor of fresh values.
    pub fn draw<const D: usize>(self, shape: [usize; D], device: &Device) -> Tensor<D> {
        match self {
            Self::Zeros => Tensor::zeros(shape, device),
            Self::Ones => Tensor::ones(shape, device),
            Self::Normal(std) => Tensor::random(shape, Distribution::Normal(0.0, std), device),
            Self::TruncatedNormal(std) => truncated_normal(shape, device) * std,
            Self::Uniform(bound) => Tensor::random(shape, Distribution::Uniform(-bound, bound), device),
        }
    }
}

/// Standard normal without values beyond 2: those are drawn again; what is still outside after five draws (one value in
/// five million) is clamped.
fn truncated_normal<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    let draw = || Tensor::<D>::random(shape, Distribution::Normal(0.0, 1.0), device);
    let mut values = draw();
    for _ in 0..4 {
        let outside = values.clone().abs().greater_elem(2.0);
        values = values.mask_where(outside, draw());
    }
    values.clamp(-2.0, 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncated_normal_has_the_moments_of_the_law() {
        let values =
            Init::TruncatedNormal(0.02).draw([400, 500], &Device::flex()).into_data().try_to_vec::<f32>().unwrap();
        let n = values.len() as f64;
        let variance = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n;
        // Variance of the standard normal cut at 2: 1 - 2 * 2 * phi(2) / (2 * Phi(2) - 1).
        let expected = 1.0 - 4.0 * 0.053_990_966_5 / 0.954_499_736_1;
        assert!((variance / 0.02f64.powi(2) - expected).abs() < 0.01, "{variance}");
        assert!(values.iter().all(|v| v.abs() <= 0.04 + 1e-6));
    }
}
