//! The whole loss of training a tokenizer, and its gradients.
//!
//! Reconstruction, perceptual and codebook terms are one forward and one backward pass. An adversarial term adds the critic;
//! its adaptive weight needs the gradients of both sides at the reconstruction, which are taken on leaves of their own and
//! then sent through the decoder and encoder in one pass.

use super::adversarial::adaptive_weight;
use super::reconstruction::{binary_cross_entropy, l1, l2};
use super::{AdversarialConfig, Critic, Perceptual, PerceptualConfig};
use crate::quantizers::{Pass, Stats};
use crate::tokenizers::{BottleneckLoss, TokenizerModel};
use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Planes, Result, TokenSpec};

/// The terms of the loss. A weight of 0 or a missing part costs nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerLossConfig {
    /// Weight of the mean absolute error.
    #[serde(default)]
    pub l1: f64,
    /// Weight of the mean squared error.
    #[serde(default)]
    pub l2: f64,
    /// Weight of the mean binary cross-entropy of a label map's scores: the term of label maps.
    #[serde(default)]
    pub binary_cross_entropy: f64,
    /// Network of the perceptual term.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perceptual: Option<PerceptualConfig>,
    /// Weight of the perceptual term.
    #[serde(default = "one")]
    pub perceptual_weight: f64,
    /// Adversarial term.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adversarial: Option<AdversarialConfig>,
    /// Weight of the quantizer's own loss.
    #[serde(default = "one")]
    pub codebook_weight: f64,
    /// Weight of a KL autoencoder's divergence, which is summed over an image's latents; 1e-6 if it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_weight: Option<f64>,
    /// Makes a likelihood of the reconstruction terms; without it they are means over an image's values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub likelihood: Option<LikelihoodConfig>,
}

/// Reconstruction terms as a negative log-likelihood, summed over an image's values: `terms / exp(s) + s` at each of them
/// (latent-diffusion). The adaptive adversarial weight grows with it, and a KL weight means what it means there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LikelihoodConfig {
    /// The fixed `s`.
    #[serde(default)]
    pub log_variance: f64,
}

impl Default for TokenizerLossConfig {
    /// No reconstruction term yet, the others at their usual weights.
    fn default() -> Self {
        Self {
            l1: 0.0,
            l2: 0.0,
            binary_cross_entropy: 0.0,
            perceptual: None,
            perceptual_weight: 1.0,
            adversarial: None,
            codebook_weight: 1.0,
            kl_weight: None,
            likelihood: None,
        }
    }
}

/// The usual weight of the divergence.
const KL_WEIGHT: f64 = 1e-6;

fn one() -> f64 {
    1.0
}

impl TokenizerLossConfig {
    /// Opens the networks of the loss for a tokenizer's images, which are in colour unless [`TokenizerLoss::with_planes`] follows.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a weight is negative, all are 0, or images are too small for a network; [`Error::Io`] if
    /// weights cannot be read.
    pub fn init(&self, spec: &TokenSpec, device: &Device) -> Result<TokenizerLoss> {
        let weights = [
            ("l1", self.l1),
            ("l2", self.l2),
            ("binary_cross_entropy", self.binary_cross_entropy),
            ("perceptual_weight", self.perceptual_weight),
            ("codebook_weight", self.codebook_weight),
            ("kl_weight", self.kl_weight.unwrap_or(KL_WEIGHT)),
        ];
        for (key, weight) in weights {
            if !weight.is_finite() || weight < 0.0 {
                return Err(Error::invalid("loss", format!("{key} must be at least 0, but is {weight}")));
            }
        }
        if let Some(LikelihoodConfig { log_variance }) = self.likelihood
            && !log_variance.is_finite()
        {
            return Err(Error::invalid("loss: likelihood", format!("log_variance {log_variance} is not a number")));
        }
        let perceptual = match (&self.perceptual, self.perceptual_weight > 0.0) {
            (Some(config), true) => Some(config.init(device)?),
            _ => None,
        };
        if self.l1 == 0.0 && self.l2 == 0.0 && self.binary_cross_entropy == 0.0 && perceptual.is_none() {
            let problem = "l1, l2, binary_cross_entropy and the perceptual term are all off: nothing is reconstructed";
            return Err(Error::invalid("loss", problem));
        }
        let side = spec.image_size.0.min(spec.image_size.1);
        let smallest = perceptual.as_ref().map_or(1, Perceptual::smallest_image);
        if side < smallest {
            let problem = format!("its networks need images of at least {smallest} pixels, but these have {side}");
            return Err(Error::invalid("loss", problem));
        }
        if let Some(adversarial) = &self.adversarial {
            adversarial.check(spec.image_size)?;
        }
        Ok(TokenizerLoss { config: self.clone(), planes: Planes::Colour, perceptual, image_size: spec.image_size })
    }
}

/// The loss with its frozen networks open.
#[derive(Clone, Debug)]
pub struct TokenizerLoss {
    config: TokenizerLossConfig,
    /// Of the images.
    planes: Planes,
    perceptual: Option<Perceptual>,
    image_size: (usize, usize),
}

/// What one micro-batch gives.
#[derive(Debug)]
pub struct TokenizerStep {
    /// Gradients of the tokenizer's parameters.
    pub gradients: GradientsParams,
    /// Gradients of the critic's parameters, if it learns at this step.
    pub critic_gradients: Option<GradientsParams>,
    /// Named values of the terms, tensors of one element on the device; `loss` is the weighted sum.
    pub terms: Vec<(&'static str, Tensor<1>)>,
    /// What the quantizer's update needs, if there is one.
    pub stats: Option<Stats>,
    /// Codes `[b, length]`, if tokens are codes.
    pub codes: Option<Tensor<2, Int>>,
    /// The reconstruction `[b, c, h, w]`, not clamped; scores of label maps.
    pub reconstruction: Tensor<4>,
}

/// The terms that compare a reconstruction with its image.
struct Reconstruction {
    total: Tensor<1>,
    terms: Vec<(&'static str, Tensor<1>)>,
}

impl TokenizerLoss {
    /// The settings.
    pub fn config(&self) -> &TokenizerLossConfig {
        &self.config
    }

    /// The same loss with another perceptual network, or none.
    pub fn with_perceptual(self, perceptual: Option<Perceptual>) -> Self {
        Self { perceptual, ..self }
    }

    /// The same loss for images of another kind.
    ///
    /// # Errors
    /// [`Error::Invalid`] for terms of pictures with label maps, or the other way round.
    pub fn with_planes(self, planes: Planes) -> Result<Self> {
        let config = &self.config;
        let of_pictures = config.l1 > 0.0
            || config.l2 > 0.0
            || self.perceptual.is_some()
            || config.adversarial.is_some()
            || config.likelihood.is_some();
        match (planes.are_labels(), of_pictures, config.binary_cross_entropy > 0.0) {
            (true, true, _) => Err(Error::invalid_hint(
                "loss",
                "l1, l2, the perceptual, adversarial and likelihood terms compare pictures, but the model takes label maps",
                "leave binary_cross_entropy and codebook_weight only",
            )),
            (false, _, true) => {
                Err(Error::invalid("loss", "binary_cross_entropy is for label maps, but the model takes pictures"))
            }
            _ => Ok(Self { planes, ..self }),
        }
    }

    /// A fresh critic, if the loss has an adversarial term.
    ///
    /// # Errors
    /// [`Error::Invalid`] if its numbers make no network.
    pub fn critic(&self, device: &Device) -> Result<Option<Critic>> {
        let critic = |config: &AdversarialConfig| config.init(self.image_size, self.planes.count(), device);
        self.config.adversarial.as_ref().map(critic).transpose()
    }

    /// One micro-batch: forward, losses and gradients. Nothing is read back from the device.
    ///
    /// `model` and `critic` are on an autodiff device; `images_bchw` `[b, c, h, w]` in -1..1, or labels. Without a critic, and before the
    /// adversarial term's first step, that term is left out.
    pub fn step(
        &self,
        model: &TokenizerModel,
        critic: Option<&Critic>,
        images_bchw: Tensor<4>,
        step: u64,
    ) -> TokenizerStep {
        self.step_with(model, critic, images_bchw, step, None)
    }

    /// [`Self::step`] with the noise of latents that are drawn; see [`Pass`].
    pub fn step_with(
        &self,
        model: &TokenizerModel,
        critic: Option<&Critic>,
        images_bchw: Tensor<4>,
        step: u64,
        noise_bchw: Option<Tensor<4>>,
    ) -> TokenizerStep {
        let images = images_bchw.inner();
        let bottleneck = model.bottleneck(model.latents(images.clone()), Pass { step, noise_bchw });
        let features = model.features(bottleneck.latents_bchw);
        let rec = model.to_pixels(features.clone());
        let images = model.target(images);
        let own = match bottleneck.loss {
            BottleneckLoss::None => None,
            BottleneckLoss::Codebook(loss) => Some(("codebook", loss, self.config.codebook_weight)),
            BottleneckLoss::Divergence(loss) => Some(("kl", loss, self.config.kl_weight.unwrap_or(KL_WEIGHT))),
        };
        let adversary = critic.zip(self.config.adversarial.as_ref().filter(|config| config.active(step)));

        let (objective, mut terms) = match adversary {
            None => {
                let nll = self.reconstruction(images.clone(), rec.clone());
                (nll.total, nll.terms)
            }
            Some((critic, config)) => self.adversarial(model, critic, config, &images, features, rec.clone()),
        };
        let total = match &own {
            Some((_, loss, weight)) => objective + loss.clone() * *weight,
            None => objective,
        };
        // A tokenizer without weights has no gradients.
        let gradients = match total.is_tracked() {
            true => GradientsParams::from_grads(total.backward(), model),
            false => GradientsParams::new(),
        };
        if let Some((name, value, weight)) = own {
            let value = value.inner();
            let loss = terms.iter_mut().find(|(name, _)| *name == "loss");
            if let Some((_, loss)) = loss {
                *loss = loss.clone() + value.clone() * weight;
            }
            // The codebook's term is logged with its weight, as it always was; the divergence as it is.
            terms.push((name, if name == "codebook" { value * weight } else { value }));
        }
        let rec = rec.inner();
        let critic_gradients = adversary.map(|(critic, config)| {
            let (real, fake) = (critic.forward(images.clone()), critic.forward(rec.clone()));
            let mut loss = config.kind.critic_loss(real, fake);
            terms.push(("critic", loss.clone().inner()));
            if let Some(weight) = config.penalty_weight(step)
                && let Some(penalty) = critic.gradient_penalty(images)
            {
                terms.push(("r1", penalty.clone().inner()));
                loss = loss + penalty * weight;
            }
            GradientsParams::from_grads(loss.backward(), critic)
        });
        TokenizerStep {
            gradients,
            critic_gradients,
            terms,
            stats: bottleneck.stats,
            codes: bottleneck.codes,
            reconstruction: rec,
        }
    }

    /// Reconstruction and perceptual terms of `rec`, as in evaluation: named values, `loss` is their weighted sum. Of label maps the
    /// image is [`TokenizerModel::target`]'s.
    pub fn evaluate(&self, images_bchw: Tensor<4>, rec_bchw: Tensor<4>) -> Vec<(&'static str, Tensor<1>)> {
        self.reconstruction(images_bchw, rec_bchw).terms
    }

    fn reconstruction(&self, images: Tensor<4>, rec: Tensor<4>) -> Reconstruction {
        let mut weighted = Vec::new();
        if self.config.l1 > 0.0 {
            weighted.push(("l1", self.config.l1, l1(rec.clone(), images.clone())));
        }
        if self.config.l2 > 0.0 {
            weighted.push(("l2", self.config.l2, l2(rec.clone(), images.clone())));
        }
        if self.config.binary_cross_entropy > 0.0 {
            let entropy = binary_cross_entropy(rec.clone(), images.clone());
            weighted.push(("binary_cross_entropy", self.config.binary_cross_entropy, entropy));
        }
        if let Some(perceptual) = &self.perceptual {
            weighted.push((
                "perceptual",
                self.config.perceptual_weight,
                perceptual.distance(images, rec.clone()).mean(),
            ));
        }
        let mut terms: Vec<_> = weighted.iter().map(|(name, _, value)| (*name, value.clone().inner())).collect();
        let sum = weighted.into_iter().map(|(_, weight, value)| value * weight).reduce(|a, b| a + b);
        let mut total = sum.unwrap_or_else(|| Tensor::zeros([1], &rec.device()));
        if let Some(LikelihoodConfig { log_variance }) = self.config.likelihood {
            let [_, c, h, w] = rec.dims();
            let values = (c * h * w) as f64;
            total = total * (values * (-log_variance).exp()) + values * log_variance;
        }
        terms.insert(0, ("loss", total.clone().inner()));
        Reconstruction { total, terms }
    }

    /// The objective whose gradient is that of `nll + weight * generator`, and the terms' values.
    fn adversarial(
        &self,
        model: &TokenizerModel,
        critic: &Critic,
        config: &AdversarialConfig,
        images: &Tensor<4>,
        features: Tensor<4>,
        rec: Tensor<4>,
    ) -> (Tensor<1>, Vec<(&'static str, Tensor<1>)>) {
        // A snapshot with plain weights: the generator's term neither gives gradients to the critic nor moves its statistics.
        let critic = critic.valid();
        let last_weight = model.last_weight().filter(|_| config.adaptive);
        let Some(last_weight) = last_weight else {
            let nll = self.reconstruction(images.clone(), rec.clone());
            let generator = config.kind.generator_loss(critic.forward(rec));
            let mut terms = nll.terms;
            terms.push(("generator", generator.clone().inner()));
            let objective = nll.total + generator * config.weight;
            terms[0] = ("loss", objective.clone().inner());
            return (objective, terms);
        };
        let (nll_leaf, generator_leaf) = (leaf(&rec), leaf(&rec));
        let nll = self.reconstruction(images.clone(), nll_leaf.clone());
        let generator = config.kind.generator_loss(critic.forward(generator_leaf.clone()));
        let from_nll = gradient(&nll.total, &nll_leaf);
        let from_generator = gradient(&generator, &generator_leaf);

        let features = features.inner();
        let at_last = |upstream: &Tensor<4>| {
            let pixels = model.to_pixels(features.clone()) * upstream.clone();
            gradient(&pixels.sum(), &last_weight)
        };
        let weight = adaptive_weight(at_last(&from_nll), at_last(&from_generator)) * config.weight;

        let upstream = from_nll + from_generator * weight.clone().reshape([1, 1, 1, 1]);
        let mut terms = nll.terms;
        let generator = generator.inner();
        terms[0].1 = terms[0].1.clone() + generator.clone() * weight.clone();
        terms.extend([("generator", generator), ("adversarial_weight", weight)]);
        ((rec * upstream).sum(), terms)
    }
}

/// A leaf with the same values, off the tensor's own graph.
fn leaf(x: &Tensor<4>) -> Tensor<4> {
    let leaf = x.clone().inner().autodiff();
    let leaf = match x.gradient_checkpointing_strategy() {
        Some(strategy) => leaf.with_gradient_checkpointing_strategy(strategy),
        None => leaf,
    };
    leaf.require_grad()
}

/// The gradient of `loss` with respect to a leaf; zeros if it does not depend on it.
fn gradient(loss: &Tensor<1>, leaf: &Tensor<4>) -> Tensor<4> {
    let mut gradients = loss.backward();
    leaf.grad_remove(&mut gradients).unwrap_or_else(|| leaf.clone().inner().zeros_like())
}
