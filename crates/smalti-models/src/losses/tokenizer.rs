//! The whole loss of training a tokenizer, and its gradients.
//!
//! Reconstruction, perceptual and codebook terms are one forward and one backward pass. An adversarial term adds the discriminator;
//! its adaptive weight needs the gradients of both sides at the reconstruction, which are taken on leaves of their own and
//! then sent through the decoder and encoder in one pass.

use super::adversarial::adaptive_weight;
use super::reconstruction::{binary_cross_entropy, l1, l2};
use super::{AdversarialConfig, Discriminator, LossTerm, Perceptual, PerceptualConfig, Weight};
use crate::quantizers::{Pass, Stats};
use crate::tokenizers::{TokenizerModel, TokenizerPass};
use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Planes, Result, TokenSpec};
use std::collections::BTreeMap;

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
    /// Weight of the term `codebook`, a quantizer's own loss.
    #[serde(default = "one")]
    pub codebook_weight: f64,
    /// Weight of the term `kl`, the divergence of an autoencoder's latents, which is summed over an image's; 1e-6 if it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_weight: Option<f64>,
    /// Weights of the model's own terms by name, such as `commitment` or `kl`, which may change over the steps; a term that is not here
    /// has the weight that is usual for it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub weights: BTreeMap<String, Weight>,
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
            weights: BTreeMap::new(),
            likelihood: None,
        }
    }
}

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
        self.check_weights()?;
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

    fn check_weights(&self) -> Result<()> {
        let weights = [
            ("l1", self.l1),
            ("l2", self.l2),
            ("binary_cross_entropy", self.binary_cross_entropy),
            ("perceptual_weight", self.perceptual_weight),
            ("codebook_weight", self.codebook_weight),
            ("kl_weight", self.kl_weight.unwrap_or_default()),
        ];
        weights.into_iter().try_for_each(|(key, weight)| Weight::Constant(weight).check(key))?;
        self.weights.iter().try_for_each(|(name, weight)| weight.check(&format!("weights.{name}")))?;
        for (name, key, given) in [
            ("codebook", "codebook_weight", self.codebook_weight != 1.0),
            ("kl", "kl_weight", self.kl_weight.is_some()),
        ] {
            if given && self.weights.contains_key(name) {
                return Err(Error::invalid("loss", format!("{key} and weights.{name} say the same: leave one out")));
            }
        }
        match self.likelihood {
            Some(LikelihoodConfig { log_variance }) if !log_variance.is_finite() => {
                Err(Error::invalid("loss: likelihood", format!("log_variance {log_variance} is not a number")))
            }
            _ => Ok(()),
        }
    }

    /// How much a model's own term counts at a step.
    fn weight_of(&self, term: &LossTerm, step: u64) -> f64 {
        match (self.weights.get(term.name), term.name) {
            (Some(weight), _) => weight.at(step),
            (None, "codebook") => term.weight * self.codebook_weight,
            (None, "kl") => self.kl_weight.unwrap_or(term.weight),
            (None, _) => term.weight,
        }
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
    /// Gradients of the discriminator's parameters, if it learns at this step.
    pub discriminator_gradients: Option<GradientsParams>,
    /// Named values of the terms, tensors of one element on the device; `loss` is the weighted sum.
    pub terms: Vec<(&'static str, Tensor<1>)>,
    /// The names of the terms that are the model's own.
    pub own: Vec<&'static str>,
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

    /// A fresh discriminator, if the loss has an adversarial term.
    ///
    /// # Errors
    /// [`Error::Invalid`] if its numbers make no network.
    pub fn discriminator(&self, device: &Device) -> Result<Option<Discriminator>> {
        let discriminator = |config: &AdversarialConfig| config.init(self.image_size, self.planes.count(), device);
        self.config.adversarial.as_ref().map(discriminator).transpose()
    }

    /// One micro-batch: forward, losses and gradients. Nothing is read back from the device.
    ///
    /// `model` and `discriminator` are on an autodiff device; `images_bchw` `[b, c, h, w]` in -1..1, or labels. Without a discriminator, and before the
    /// adversarial term's first step, that term is left out.
    pub fn step(
        &self,
        model: &TokenizerModel,
        discriminator: Option<&Discriminator>,
        images_bchw: Tensor<4>,
        pass: &Pass,
    ) -> TokenizerStep {
        let step = pass.step;
        let TokenizerPass { target_bchw, features, codes, terms: own, stats } =
            model.train_forward(images_bchw.inner(), pass);
        let rec = model.to_pixels(features.clone());
        let adversary = discriminator.zip(self.config.adversarial.as_ref().filter(|config| config.active(step)));
        let (objective, mut terms) = match adversary {
            None => {
                let nll = self.reconstruction(target_bchw.clone(), rec.clone());
                (nll.total, nll.terms)
            }
            Some((discriminator, config)) => {
                self.adversarial(model, discriminator, config, &target_bchw, features, rec.clone())
            }
        };
        let total = own.iter().fold(objective, |total, term| {
            let weight = self.config.weight_of(term, step);
            total + term.value.clone() * weight
        });
        // A tokenizer without weights has no gradients.
        let gradients = match total.is_tracked() {
            true => GradientsParams::from_grads(total.backward(), model),
            false => GradientsParams::new(),
        };
        own.iter().for_each(|term| self.log(term, step, &mut terms));
        let rec = rec.inner();
        let discriminator_gradients = adversary
            .map(|(discriminator, config)| judged(discriminator, config, target_bchw, rec.clone(), step, &mut terms));
        let own = own.iter().map(|term| term.name).collect();
        TokenizerStep { gradients, discriminator_gradients, terms, own, stats, codes, reconstruction: rec }
    }

    /// Fails for a weight of a term that the model did not have.
    ///
    /// # Errors
    /// [`Error::Unknown`] that names it.
    pub fn check_terms(&self, step: &TokenizerStep) -> Result<()> {
        let known = || step.own.iter().copied();
        match self.config.weights.keys().find(|name| known().all(|term| term != name.as_str())) {
            Some(name) => Err(Error::unknown("loss: weights", "term of this model", name, known())),
            None => Ok(()),
        }
    }

    /// Adds one of the model's own terms to those that are logged.
    fn log(&self, term: &LossTerm, step: u64, terms: &mut Vec<(&'static str, Tensor<1>)>) {
        let (value, weight) = (term.value.clone().inner(), self.config.weight_of(term, step));
        if let Some((_, loss)) = terms.iter_mut().find(|(name, _)| *name == "loss") {
            *loss = loss.clone() + value.clone() * weight;
        }
        // The codebook's term is logged with its weight, as it always was; the others as they are.
        terms.push((term.name, if term.name == "codebook" { value * weight } else { value }));
    }

    /// Reconstruction and perceptual terms of `rec`, as in evaluation: named values, `loss` is their weighted sum. Of label maps the
    /// image is [`TokenizerPass::target_bchw`]'s.
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
        discriminator: &Discriminator,
        config: &AdversarialConfig,
        images: &Tensor<4>,
        features: Tensor<4>,
        rec: Tensor<4>,
    ) -> (Tensor<1>, Vec<(&'static str, Tensor<1>)>) {
        // A snapshot with plain weights: the generator's term neither gives gradients to the discriminator nor moves its statistics.
        let discriminator = discriminator.valid();
        let last_weight = model.last_weight().filter(|_| config.adaptive);
        let Some(last_weight) = last_weight else {
            let nll = self.reconstruction(images.clone(), rec.clone());
            let generator = config.kind.generator_loss(discriminator.forward(rec));
            let mut terms = nll.terms;
            terms.push(("generator", generator.clone().inner()));
            let objective = nll.total + generator * config.weight;
            terms[0] = ("loss", objective.clone().inner());
            return (objective, terms);
        };
        let (nll_leaf, generator_leaf) = (leaf(&rec), leaf(&rec));
        let nll = self.reconstruction(images.clone(), nll_leaf.clone());
        let generator = config.kind.generator_loss(discriminator.forward(generator_leaf.clone()));
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

/// The discriminator's gradients, for images and their reconstructions.
fn judged(
    discriminator: &Discriminator,
    config: &AdversarialConfig,
    images: Tensor<4>,
    rec: Tensor<4>,
    step: u64,
    terms: &mut Vec<(&'static str, Tensor<1>)>,
) -> GradientsParams {
    let (real, fake) = (discriminator.forward(images.clone()), discriminator.forward(rec));
    let mut loss = config.kind.discriminator_loss(real, fake);
    terms.push(("discriminator", loss.clone().inner()));
    if let Some(weight) = config.penalty_weight(step)
        && let Some(penalty) = discriminator.gradient_penalty(images)
    {
        terms.push(("r1", penalty.clone().inner()));
        loss = loss + penalty * weight;
    }
    GradientsParams::from_grads(loss.backward(), discriminator)
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
