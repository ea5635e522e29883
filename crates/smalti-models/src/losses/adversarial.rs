//! Adversarial losses of VQGAN (arXiv 2012.09841): a discriminator learns to tell images from reconstructions.

use super::discriminator::{Discriminator, DiscriminatorConfig};
use burn::tensor::{
    Device, Tensor,
    activation::{relu, softplus},
};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result};
use smalti_nn::PatchGanConfig;

/// Settings of adversarial training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdversarialConfig {
    /// The discriminator's loss.
    pub kind: AdversarialKind,
    /// Weight of the adversarial term, times the adaptive weight if that is on.
    pub weight: f64,
    /// The step at which the discriminator begins to learn and to be listened to.
    pub start_step: u64,
    /// Whether the term is balanced against the reconstruction by their gradients in the decoder's last layer.
    #[serde(default = "yes")]
    pub adaptive: bool,
    /// Which network the discriminator is.
    #[serde(default, alias = "critic")]
    pub discriminator: DiscriminatorConfig,
    /// Channels of the patch discriminator's first convolution.
    #[serde(default = "ndf")]
    pub ndf: usize,
    /// Convolutions with stride 2 in the patch discriminator.
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

    fn patch(&self, channels: usize) -> PatchGanConfig {
        PatchGanConfig { in_channels: channels, ndf: self.ndf, layers: self.layers }
    }

    /// A fresh discriminator of images of this height, width and number of channels.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn init(&self, image_size: (usize, usize), channels: usize, device: &Device) -> Result<Discriminator> {
        self.check(image_size)?;
        Ok(match &self.discriminator {
            DiscriminatorConfig::Patch => self.patch(channels).init(device)?.into(),
            DiscriminatorConfig::Stylegan(style) => style.network(image_size.0, channels).init(device)?.into(),
        })
    }

    /// # Errors
    /// [`Error::Invalid`] if the weight is negative or not a number, or the discriminator cannot judge images of this size.
    pub fn check(&self, image_size: (usize, usize)) -> Result<()> {
        if !(self.weight.is_finite() && self.weight >= 0.0) {
            return Err(Error::invalid("adversarial", format!("weight must be at least 0, but is {}", self.weight)));
        }
        match &self.discriminator {
            DiscriminatorConfig::Patch => {
                let (side, smallest) = (image_size.0.min(image_size.1), self.patch(1).smallest_image());
                if side < smallest {
                    let problem =
                        format!("the discriminator needs images of at least {smallest} pixels, but these have {side}");
                    return Err(Error::invalid("adversarial", problem));
                }
                Ok(())
            }
            DiscriminatorConfig::Stylegan(_) if (self.ndf, self.layers) != (ndf(), layers()) => {
                Err(Error::invalid("adversarial", "ndf and layers are of the patch discriminator: leave them out"))
            }
            DiscriminatorConfig::Stylegan(style) => style.check(image_size),
        }
    }

    /// What the discriminator's gradient penalty is multiplied with at a step, if it counts there.
    pub fn penalty_weight(&self, step: u64) -> Option<f64> {
        match &self.discriminator {
            DiscriminatorConfig::Patch => None,
            DiscriminatorConfig::Stylegan(style) => style.penalty_weight(step),
        }
    }
}

/// How the discriminator's logits become losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdversarialKind {
    /// The discriminator's is `(mean relu(1 - real) + mean relu(1 + fake)) / 2`, the generator's `mean -fake`.
    Hinge,
    /// The discriminator's is `(mean softplus(-real) + mean softplus(fake)) / 2`, the generator's `mean -fake` (VQGAN).
    Vanilla,
    /// The discriminator's as in `vanilla`, the generator's `mean softplus(-fake)` (StyleGAN2, ViT-VQGAN's public code).
    NonSaturating,
    /// The discriminator's is `(mean (1 - real)^2 + mean (1 + fake)^2) / 2`, the generator's `mean fake^2` (ViT-VQGAN's public code).
    LeastSquares,
}

impl AdversarialKind {
    /// The discriminator's loss for its logits of images and of reconstructions, of any shape.
    pub fn discriminator_loss(self, real: Tensor<4>, fake: Tensor<4>) -> Tensor<1> {
        let (real, fake) = match self {
            Self::Hinge => (relu(1.0 - real), relu(fake + 1.0)),
            Self::LeastSquares => ((real - 1.0).square(), (fake + 1.0).square()),
            Self::Vanilla | Self::NonSaturating => (softplus(-real, 1.0), softplus(fake, 1.0)),
        };
        (real.mean() + fake.mean()) * 0.5
    }

    /// The generator's loss for the discriminator's logits of reconstructions.
    pub fn generator_loss(self, fake: Tensor<4>) -> Tensor<1> {
        match self {
            Self::Hinge | Self::Vanilla => -fake.mean(),
            Self::NonSaturating => softplus(-fake, 1.0).mean(),
            Self::LeastSquares => fake.square().mean(),
        }
    }
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
        let hinge = value(AdversarialKind::Hinge.discriminator_loss(logits(real), logits(fake)));
        assert!((hinge - 0.5 * (0.25 + 0.625)).abs() < 1e-6, "{hinge}");
        let softplus = |x: f64| x.exp().ln_1p();
        let expected = 0.25 * (softplus(-2.0) + softplus(-0.5) + softplus(-3.0) + softplus(0.25));
        let vanilla = value(AdversarialKind::Vanilla.discriminator_loss(logits(real), logits(fake)));
        assert!((vanilla - expected).abs() < 1e-6, "{vanilla}");
        assert!((value(AdversarialKind::Hinge.generator_loss(logits(fake))) - 1.375).abs() < 1e-6);
        let non_saturating = value(AdversarialKind::NonSaturating.generator_loss(logits(fake)));
        assert!((non_saturating - 0.5 * (softplus(3.0) + softplus(-0.25))).abs() < 1e-6, "{non_saturating}");
        let squares = value(AdversarialKind::LeastSquares.discriminator_loss(logits(real), logits(fake)));
        assert!((squares - 0.5 * (0.625 + 2.78125)).abs() < 1e-6, "{squares}");
        assert!((value(AdversarialKind::LeastSquares.generator_loss(logits(fake))) - 4.53125).abs() < 1e-6);
    }

    #[test]
    fn the_adaptive_weight_is_bounded() {
        assert!((value(adaptive_weight(logits([3.0, 4.0]), logits([0.0, 2.0]))) - 2.5).abs() < 1e-3);
        assert_eq!(value(adaptive_weight(logits([3.0, 4.0]), logits([0.0, 0.0]))), 1e4);
        assert_eq!(value(adaptive_weight(logits([0.0, 0.0]), logits([0.0, 2.0]))), 0.0);
    }
}
