//! The whole loss of training a tokenizer, and its gradients.
//!
//! Reconstruction, perceptual and codebook terms are one forward and one backward pass. An adversarial term adds the critic;
//! its adaptive weight needs the gradients of both sides at the reconstruction, which are taken on leaves of their own and
//! then sent through the decoder and encoder in one pass.

use super::adversarial::{adaptive_weight, generator_loss};
use super::reconstruction::{l1, l2};
use super::{AdversarialConfig, Perceptual, PerceptualConfig};
use crate::quantizers::{Quantizer, Stats};
use crate::tokenizers::TokenizerModel;
use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result, TokenSpec};
use smalti_nn::PatchGan;

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
}

fn one() -> f64 {
    1.0
}

impl TokenizerLossConfig {
    /// Opens the networks of the loss for a tokenizer's images.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a weight is negative, all are 0, or images are too small for a network; [`Error::Io`] if
    /// weights cannot be read.
    pub fn init(&self, spec: &TokenSpec, device: &Device) -> Result<TokenizerLoss> {
        let weights = [
            ("l1", self.l1),
            ("l2", self.l2),
            ("perceptual_weight", self.perceptual_weight),
            ("codebook_weight", self.codebook_weight),
        ];
        for (key, weight) in weights {
            if !weight.is_finite() || weight < 0.0 {
                return Err(Error::invalid("loss", format!("{key} must be at least 0, but is {weight}")));
            }
        }
        let perceptual = match (&self.perceptual, self.perceptual_weight > 0.0) {
            (Some(config), true) => Some(config.init(device)?),
            _ => None,
        };
        if self.l1 == 0.0 && self.l2 == 0.0 && perceptual.is_none() {
            return Err(Error::invalid("loss", "l1, l2 and the perceptual term are all off: nothing is reconstructed"));
        }
        let side = spec.image_size.0.min(spec.image_size.1);
        let mut smallest = perceptual.as_ref().map_or(1, Perceptual::smallest_image);
        if let Some(adversarial) = &self.adversarial {
            adversarial.check()?;
            smallest = smallest.max(adversarial.critic(CHANNELS).smallest_image());
        }
        if side < smallest {
            let problem = format!("its networks need images of at least {smallest} pixels, but these have {side}");
            return Err(Error::invalid("loss", problem));
        }
        Ok(TokenizerLoss { config: self.clone(), perceptual })
    }
}

const CHANNELS: usize = 3;

/// The loss with its frozen networks open.
#[derive(Clone, Debug)]
pub struct TokenizerLoss {
    config: TokenizerLossConfig,
    perceptual: Option<Perceptual>,
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
    /// What the quantizer's update needs.
    pub stats: Stats,
    /// Codes `[b, length]`.
    pub codes: Tensor<2, Int>,
    /// The reconstruction `[b, 3, h, w]`, not clamped.
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

    /// A fresh critic, if the loss has an adversarial term.
    ///
    /// # Errors
    /// [`Error::Invalid`] if its numbers make no network.
    pub fn critic(&self, device: &Device) -> Result<Option<PatchGan>> {
        self.config.adversarial.as_ref().map(|config| config.critic(CHANNELS).init(device)).transpose()
    }

    /// One micro-batch: forward, losses and gradients. Nothing is read back from the device.
    ///
    /// `model` and `critic` are on an autodiff device; `images_bchw` `[b, 3, h, w]` in -1..1. Without a critic, and before the
    /// adversarial term's first step, that term is left out.
    pub fn step(
        &self,
        model: &TokenizerModel,
        critic: Option<&PatchGan>,
        images_bchw: Tensor<4>,
        step: u64,
    ) -> TokenizerStep {
        let images = images_bchw.inner();
        let quantized = model.quantizer().train_forward(model.latents(images.clone()));
        let features = model.features(quantized.latents_bchw);
        let rec = model.to_pixels(features.clone());
        let codebook = quantized.loss.map(|loss| loss * self.config.codebook_weight);
        let adversary = critic.zip(self.config.adversarial.as_ref().filter(|config| config.active(step)));

        let (objective, mut terms) = match adversary {
            None => {
                let nll = self.reconstruction(images.clone(), rec.clone());
                (nll.total, nll.terms)
            }
            Some((critic, config)) => self.adversarial(model, critic, config, &images, features, rec.clone()),
        };
        let total = match codebook.clone() {
            Some(codebook) => objective + codebook,
            None => objective,
        };
        let gradients = GradientsParams::from_grads(total.backward(), model);
        if let Some(codebook) = codebook.map(Tensor::inner) {
            let loss = terms.iter_mut().find(|(name, _)| *name == "loss");
            if let Some((_, loss)) = loss {
                *loss = loss.clone() + codebook.clone();
            }
            terms.push(("codebook", codebook));
        }
        let rec = rec.inner();
        let critic_gradients = adversary.map(|(critic, config)| {
            let (real, fake) = (critic.forward(images), critic.forward(rec.clone()));
            let loss = config.kind.critic_loss(real, fake);
            terms.push(("critic", loss.clone().inner()));
            GradientsParams::from_grads(loss.backward(), critic)
        });
        TokenizerStep {
            gradients,
            critic_gradients,
            terms,
            stats: quantized.stats,
            codes: quantized.codes,
            reconstruction: rec,
        }
    }

    /// Reconstruction and perceptual terms of `rec`, as in evaluation: named values, `loss` is their weighted sum.
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
        if let Some(perceptual) = &self.perceptual {
            weighted.push((
                "perceptual",
                self.config.perceptual_weight,
                perceptual.distance(images, rec.clone()).mean(),
            ));
        }
        let mut terms: Vec<_> = weighted.iter().map(|(name, _, value)| (*name, value.clone().inner())).collect();
        let sum = weighted.into_iter().map(|(_, weight, value)| value * weight).reduce(|a, b| a + b);
        let total = sum.unwrap_or_else(|| Tensor::zeros([1], &rec.device()));
        terms.insert(0, ("loss", total.clone().inner()));
        Reconstruction { total, terms }
    }

    /// The objective whose gradient is that of `nll + weight * generator`, and the terms' values.
    fn adversarial(
        &self,
        model: &TokenizerModel,
        critic: &PatchGan,
        config: &AdversarialConfig,
        images: &Tensor<4>,
        features: Tensor<4>,
        rec: Tensor<4>,
    ) -> (Tensor<1>, Vec<(&'static str, Tensor<1>)>) {
        // A snapshot with plain weights: the generator's term neither gives gradients to the critic nor moves its statistics.
        let critic = critic.valid();
        if !config.adaptive {
            let nll = self.reconstruction(images.clone(), rec.clone());
            let generator = generator_loss(critic.forward(rec));
            let mut terms = nll.terms;
            terms.push(("generator", generator.clone().inner()));
            let objective = nll.total + generator * config.weight;
            terms[0] = ("loss", objective.clone().inner());
            return (objective, terms);
        }
        let (nll_leaf, generator_leaf) = (leaf(&rec), leaf(&rec));
        let nll = self.reconstruction(images.clone(), nll_leaf.clone());
        let generator = generator_loss(critic.forward(generator_leaf.clone()));
        let from_nll = gradient(&nll.total, &nll_leaf);
        let from_generator = gradient(&generator, &generator_leaf);

        let features = features.inner();
        let at_last = |upstream: &Tensor<4>| {
            let pixels = model.to_pixels(features.clone()) * upstream.clone();
            gradient(&pixels.sum(), &model.last_weight())
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
