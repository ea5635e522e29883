//! Adversarial losses of VQGAN (arXiv 2012.09841): a critic learns to tell images from reconstructions.

use burn::tensor::{
    Tensor,
    activation::{relu, softplus},
};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result};
use smalti_nn::PatchGanConfig;

/// Settings of adversarial training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdversarialConfig {
    /// The critic's loss.
    pub kind: AdversarialKind,
    /// Weight of the adversarial term, times the adaptive weight if that is on.
    pub weight: f64,
    /// The step at which the critic begins to learn and to be listened to.
    pub start_step: u64,
    /// Whether the term is balanced against the reconstruction by their gradients in the decoder's last layer.
    #[serde(default = "yes")]
    pub adaptive: bool,
    /// Channels of the critic's first convolution.
    #[serde(default = "ndf")]
    pub ndf: usize,
    /// Convolutions with stride 2 in the critic.
    #[serde(default = "layers")]
    pub layers: usize,
}

fn yes() -> bool {
    true
}

fn ndf() -> usize {
    PatchGanConfig::default().ndf
}

fn layers() -> usize {
    PatchGanConfig::default().layers
}

impl AdversarialConfig {
    /// Whether the term counts at a step.
    pub fn active(&self, step: u64) -> bool {
        step >= self.start_step
    }

    /// Settings of the critic for images with so many channels.
    pub fn critic(&self, in_channels: usize) -> PatchGanConfig {
        PatchGanConfig { in_channels, ndf: self.ndf, layers: self.layers }
    }

    /// # Errors
    /// [`Error::Invalid`] if the weight is negative or not a number.
    pub fn check(&self) -> Result<()> {
        if self.weight.is_finite() && self.weight >= 0.0 {
            return Ok(());
        }
        Err(Error::invalid("adversarial", format!("weight must be at least 0, but is {}", self.weight)))
    }
}

/// How the critic's logits become a loss. The generator's loss is the same for both: minus the mean logit of what it made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdversarialKind {
    /// `(mean relu(1 - real) + mean relu(1 + fake)) / 2`.
    Hinge,
    /// `(mean softplus(-real) + mean softplus(fake)) / 2`.
    Vanilla,
}

impl AdversarialKind {
    /// The critic's loss for its logits of images and of reconstructions, of any shape.
    pub fn critic_loss(self, real: Tensor<4>, fake: Tensor<4>) -> Tensor<1> {
        let (real, fake) = match self {
            Self::Hinge => (relu(1.0 - real), relu(fake + 1.0)),
            Self::Vanilla => (softplus(-real, 1.0), softplus(fake, 1.0)),
        };
        (real.mean() + fake.mean()) * 0.5
    }
}

/// The generator's loss for the critic's logits of reconstructions.
pub fn generator_loss(fake: Tensor<4>) -> Tensor<1> {
    -fake.mean()
}

/// `|reconstruction| / (|adversarial| + 1e-4)`, at most 1e4, for the gradients of both terms with respect to the decoder's last
/// weight.
pub fn adaptive_weight(reconstruction: Tensor<4>, adversarial: Tensor<4>) -> Tensor<1> {
    let norm = |gradient: Tensor<4>| gradient.square().sum().sqrt();
    (norm(reconstruction) / (norm(adversarial) + 1e-4)).clamp(0.0, 1e4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    fn logits(values: [f32; 2]) -> Tensor<4> {
        Tensor::<1>::from_floats(values, &Device::flex()).reshape([1, 1, 1, 2])
    }

    fn value(loss: Tensor<1>) -> f64 {
        f64::from(loss.into_scalar::<f32>())
    }

    #[test]
    fn losses_by_hand() {
        let (real, fake) = ([2.0, 0.5], [-3.0, 0.25]);
        let hinge = value(AdversarialKind::Hinge.critic_loss(logits(real), logits(fake)));
        assert!((hinge - 0.5 * (0.25 + 0.625)).abs() < 1e-6, "{hinge}");
        let softplus = |x: f64| x.exp().ln_1p();
        let expected = 0.25 * (softplus(-2.0) + softplus(-0.5) + softplus(-3.0) + softplus(0.25));
        let vanilla = value(AdversarialKind::Vanilla.critic_loss(logits(real), logits(fake)));
        assert!((vanilla - expected).abs() < 1e-6, "{vanilla}");
        assert!((value(generator_loss(logits(fake))) - 1.375).abs() < 1e-6);
    }

    #[test]
    fn the_adaptive_weight_is_bounded() {
        assert!((value(adaptive_weight(logits([3.0, 4.0]), logits([0.0, 2.0]))) - 2.5).abs() < 1e-3);
        assert_eq!(value(adaptive_weight(logits([3.0, 4.0]), logits([0.0, 0.0]))), 1e4);
        assert_eq!(value(adaptive_weight(logits([0.0, 0.0]), logits([0.0, 2.0]))), 0.0);
    }
}
