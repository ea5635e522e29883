//! Normalisation layers of convolutional networks.

use burn::module::{Initializer, Module, Param, RunningState};
use burn::tensor::{Device, Tensor};
use smalti_kernels::GroupNormalization;

/// Group normalisation with a learned scale and shift per channel (Wu & He 2018).
#[derive(Module, Debug)]
pub struct Norm {
    /// Scale `[c]`.
    pub gamma: Param<Tensor<1>>,
    /// Shift `[c]`.
    pub beta: Param<Tensor<1>>,
    groups: usize,
    epsilon: f64,
}

impl Norm {
    /// A normalisation over `min(groups, channels)` groups, which must divide `channels`; `epsilon` is added to the
    /// variance.
    pub fn new(channels: usize, groups: usize, epsilon: f64, device: &Device) -> Self {
        Self {
            gamma: Initializer::Ones.init([channels], device),
            beta: Initializer::Zeros.init([channels], device),
            groups: groups.min(channels),
            epsilon,
        }
    }

    /// Normalises `[b, c, h, w]`.
    pub fn forward(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        self.apply(x_bchw, false)
    }

    /// Normalises `[b, c, h, w]`, then applies `x * sigmoid(x)`.
    pub fn forward_silu(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        self.apply(x_bchw, true)
    }

    fn apply(&self, x_bchw: Tensor<4>, silu: bool) -> Tensor<4> {
        smalti_kernels::group_norm(x_bchw, self.gamma.val(), self.beta.val(), self.groups, self.epsilon, silu)
    }

    /// What [`smalti_kernels::norm_silu_conv2d`] needs.
    pub(crate) fn parameters(&self) -> GroupNormalization {
        let (gamma, beta) = (self.gamma.val(), self.beta.val());
        GroupNormalization { gamma, beta, groups: self.groups, epsilon: self.epsilon }
    }
}

/// Batch normalisation (Ioffe & Szegedy 2015): over the batch on an autodiff device, which also moves the running
/// statistics, and by the running statistics on a plain one.
#[derive(Module, Debug)]
pub struct BatchStatistics {
    /// Scale `[c]`.
    pub gamma: Param<Tensor<1>>,
    /// Shift `[c]`.
    pub beta: Param<Tensor<1>>,
    /// Running mean `[c]`.
    pub running_mean: RunningState<Tensor<1>>,
    /// Running variance `[c]`, of the unbiased kind as in PyTorch.
    pub running_var: RunningState<Tensor<1>>,
}

impl BatchStatistics {
    /// Share of a batch in the running statistics.
    const MOMENTUM: f64 = 0.1;
    /// Added to the variance.
    const EPSILON: f64 = 1e-5;

    /// A normalisation whose scale begins with a normal distribution around 1.
    pub fn new(channels: usize, deviation: f64, device: &Device) -> Self {
        Self {
            gamma: Initializer::Normal { mean: 1.0, std: deviation }.init([channels], device),
            beta: Initializer::Zeros.init([channels], device),
            running_mean: RunningState::new(Tensor::zeros([channels], device)),
            running_var: RunningState::new(Tensor::ones([channels], device)),
        }
    }

    /// Normalises `[b, c, h, w]`.
    pub fn forward(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        let (gamma, beta) = (self.gamma.val(), self.beta.val());
        if !x_bchw.is_autodiff() {
            let (mean, variance) = (self.running_mean.value().inner(), self.running_var.value().inner());
            return burn::tensor::module::batch_norm(x_bchw, gamma, beta, mean, variance, Self::EPSILON);
        }
        let [b, _, h, w] = x_bchw.dims();
        let unbiased = (b * h * w) as f64 / (b * h * w).saturating_sub(1).max(1) as f64;
        let batch = burn::tensor::module::batch_norm_train(x_bchw, gamma, beta, Self::EPSILON);
        follow(&self.running_mean, batch.mean);
        follow(&self.running_var, batch.variance.mul_scalar(unbiased));
        batch.output
    }
}

/// Moves a running value towards that of the batch.
fn follow(running: &RunningState<Tensor<1>>, batch: Tensor<1>) {
    let momentum = BatchStatistics::MOMENTUM;
    let old = running.value_sync();
    let device = old.device();
    running.update((old.inner() * (1.0 - momentum) + batch.inner() * momentum).to_device(&device));
    // A pending update is not seen by a visitor, so it would be missing in a checkpoint.
    let _ = running.value_sync();
}
