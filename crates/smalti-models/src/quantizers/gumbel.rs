//! Gumbel-softmax quantization ("Categorical Reparameterization with Gumbel-Softmax", arXiv 1611.01144), as VQGAN's
//! `GumbelVQ` (arXiv 2012.09841) and ViT-VQGAN's public code have it: a place has a logit for each code, and training draws
//! from them with a temperature that falls.

use super::vq::unit_rows;
use super::{Pass, Quantized, Quantizer, QuantizerSettings, Stats, from_rows, to_rows};
use crate::losses::LossTerm;
use crate::role::Described;
use crate::systems::Facts;
use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig};
use burn::tensor::{Device, Distribution, Int, Tensor, activation::softmax};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result, Vocabulary};
use smalti_nn::Conv;

/// Settings of a [`Gumbel`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GumbelConfig {
    /// Number of codes.
    pub codes: usize,
    /// Channels of the latents and of the code vectors.
    pub channels: usize,
    /// What a code's logit is.
    #[serde(default)]
    pub logits: Logits,
    /// Whether training decodes the drawn code's vector, with the gradient of the soft mixture, as decoding tokens does.
    /// Otherwise it decodes the mixture.
    #[serde(default = "yes")]
    pub straight_through: bool,
    /// Weight of the divergence of the codes' probabilities from even ones.
    #[serde(default = "kl_weight")]
    pub kl_weight: f64,
    /// What logits and noise are divided by.
    #[serde(default)]
    pub temperature: Temperature,
}

fn yes() -> bool {
    true
}

fn kl_weight() -> f64 {
    1e-8
}

/// What a code's logit at a place is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Logits {
    /// A learned 1x1 convolution of the latents (taming-transformers).
    #[default]
    Projection,
    /// Minus the squared distance of latent and code, both scaled to unit length; the unit code comes out (ViT-VQGAN's
    /// public code).
    Distance,
}

/// The temperature as a pure function of the training step, so that a resumed run continues exactly.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Temperature {
    /// Always the same.
    Constant {
        /// The temperature, above 0.
        value: f64,
    },
    /// A straight line from `start` to `max`, then half a cosine down to `min`, where it stays.
    Cosine {
        /// At the first step; counts only with a warm-up.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        start: Option<f64>,
        /// The highest.
        max: f64,
        /// The lowest, above 0.
        min: f64,
        /// Steps of the straight line.
        #[serde(default)]
        warmup: u64,
        /// The step, counted from the first of all, that has the lowest.
        steps: u64,
    },
}

impl Default for Temperature {
    fn default() -> Self {
        Self::Constant { value: 1.0 }
    }
}

impl Temperature {
    /// The temperature at `step`, counted from 0.
    pub fn at(self, step: u64) -> f64 {
        match self {
            Self::Constant { value } => value,
            Self::Cosine { start, max, warmup, .. } if step < warmup => {
                let start = start.unwrap_or(max);
                start + (max - start) / warmup as f64 * step as f64
            }
            Self::Cosine { max, min, warmup, steps, .. } => {
                let span = steps.saturating_sub(warmup).max(1) as f64;
                let progress = ((step - warmup) as f64 / span).min(1.0);
                min + 0.5 * (max - min) * (1.0 + (std::f64::consts::PI * progress).cos())
            }
        }
    }

    fn check(self) -> Result<()> {
        let usable = |value: f64| value > 0.0 && value.is_finite();
        let fine = match self {
            Self::Constant { value } => usable(value),
            Self::Cosine { start, max, min, warmup, steps } => {
                [start.unwrap_or(max), max, min].into_iter().all(usable) && min <= max && warmup < steps
            }
        };
        match fine {
            true => Ok(()),
            false => Err(Error::invalid(
                "quantizer: temperature",
                format!("is {self:?}, expected temperatures above 0, min <= max, and warmup < steps"),
            )),
        }
    }
}

impl Described for GumbelConfig {
    const FACTS: Facts = Facts {
        arxiv: "1611.01144",
        tokens: "grid",
        about: "codebook whose codes are drawn with a falling temperature while it learns (Gumbel-softmax)",
    };
}

impl GumbelConfig {
    /// `codes` vectors for latents of `channels` channels, with GumbelVQ's settings and a constant temperature.
    pub fn new(codes: usize, channels: usize) -> Self {
        Self {
            codes,
            channels,
            logits: Logits::default(),
            straight_through: yes(),
            kl_weight: kl_weight(),
            temperature: Temperature::default(),
        }
    }

    /// Makes the quantizer. Code vectors are normal.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a setting is out of range.
    pub fn init(&self, device: &Device) -> Result<Gumbel> {
        self.init_for(self.channels, device)
    }

    /// A quantizer that stands alone, for latents of another number of channels than the code vectors that it returns.
    ///
    /// # Errors
    /// As [`Self::init`], and [`Error::Invalid`] if logits are distances, which need equal numbers.
    pub fn init_for(&self, inputs: usize, device: &Device) -> Result<Gumbel> {
        let problem = |problem: String| Err(Error::invalid("quantizer (gumbel)", problem));
        if self.codes == 0 || self.codes > i32::MAX as usize {
            return problem(format!("codes is {}, expected 1 to {}", self.codes, i32::MAX));
        }
        if self.channels == 0 || inputs == 0 {
            return problem("channels must be at least 1".into());
        }
        if !(self.kl_weight.is_finite() && self.kl_weight >= 0.0) {
            return problem(format!("kl_weight is {}, expected 0 or more", self.kl_weight));
        }
        if self.logits == Logits::Distance && inputs != self.channels {
            return problem(format!("latents have {inputs} channels, codes {}: they have no distance", self.channels));
        }
        self.temperature.check()?;
        Ok(Gumbel {
            proj: (self.logits == Logits::Projection).then(|| Conv::new(inputs, self.codes, 1, device)),
            embed: EmbeddingConfig::new(self.codes, self.channels).init(device),
            config: self.clone(),
        })
    }
}

impl QuantizerSettings for GumbelConfig {
    fn vocabulary(&self) -> Vocabulary {
        self.codes.into()
    }

    fn channels(&self) -> usize {
        self.channels
    }

    fn official(&self) -> Option<&'static str> {
        Some("vqgan")
    }
}

/// Gumbel-softmax quantization.
#[derive(Module, Debug)]
pub struct Gumbel {
    /// Latents to logits, if that is how they are made.
    pub proj: Option<Conv>,
    /// The code vectors, `weight [codes, c]`.
    pub embed: Embedding,
    /// The settings.
    #[module(skip)]
    pub config: GumbelConfig,
}

impl Gumbel {
    /// The logits of the codes at each place, `[b * h * w, codes]`, for latents `[b, c, h, w]`.
    pub fn logits(&self, latents_bchw: Tensor<4>) -> Tensor<2> {
        let Some(proj) = &self.proj else {
            let (z_nc, table_kc) = (unit_rows(to_rows(latents_bchw)), self.table());
            let squares = |rows: Tensor<2>| rows.square().sum_dim(1);
            let codes_1k = squares(table_kc.clone()).transpose();
            return z_nc.clone().matmul(table_kc.transpose()).mul_scalar(2.0) - squares(z_nc) - codes_1k;
        };
        to_rows(proj.forward(latents_bchw))
    }

    /// The code vectors as they come out, `[codes, c]`.
    fn table(&self) -> Tensor<2> {
        match self.config.logits {
            Logits::Projection => self.embed.weight.val(),
            Logits::Distance => unit_rows(self.embed.weight.val()),
        }
    }

    /// `kl_weight * mean sum q log(q * codes + 1e-10)` over places, for the probabilities q without noise and temperature.
    fn divergence(&self, logits_nk: Tensor<2>) -> Tensor<1> {
        let q_nk = softmax(logits_nk, 1);
        let ratio_nk = q_nk.clone().mul_scalar(self.config.codes as f64).add_scalar(1e-10);
        (q_nk * ratio_nk.log()).sum_dim(1).mean().mul_scalar(self.config.kl_weight)
    }
}

/// Standard Gumbel noise `-ln(-ln u)` from the device's generator.
fn noise(shape: [usize; 2], device: &Device) -> Tensor<2> {
    let uniform = Tensor::random(shape, Distribution::Uniform(0.0, 1.0), &device.clone().without_autodiff());
    uniform.clamp_min(f64::from(f32::MIN_POSITIVE)).log().neg().log().neg()
}

impl Quantizer for Gumbel {
    fn vocabulary(&self) -> Vocabulary {
        self.config.vocabulary()
    }

    fn channels(&self) -> usize {
        self.config.channels
    }

    /// The most likely codes. The official code draws noise here too, so that its tokens are not always the same.
    fn encode(&self, latents_bchw: Tensor<4>) -> Tensor<2, Int> {
        let [b, _, h, w] = latents_bchw.dims();
        self.logits(latents_bchw).inner().argmax(1).reshape([b, h * w])
    }

    fn decode(&self, codes: Tensor<2, Int>, h: usize, w: usize) -> Tensor<4> {
        let [b, n] = codes.dims();
        from_rows(self.table().select(0, codes.reshape([b * n])), b, h, w)
    }

    fn train_forward(&self, latents_bchw: Tensor<4>, pass: &Pass) -> Quantized {
        let [b, _, h, w] = latents_bchw.dims();
        let logits_nk = self.logits(latents_bchw);
        let noise_nk = match &pass.noise_bchw {
            Some(noise_bchw) => to_rows(noise_bchw.clone()),
            None => noise(logits_nk.dims(), &logits_nk.device()),
        };
        let drawn_nk = (logits_nk.clone() + noise_nk).div_scalar(self.config.temperature.at(pass.step));
        let codes_n = drawn_nk.clone().inner().argmax(1).squeeze_dim::<1>(1);
        let (soft_nk, table_kc) = (softmax(drawn_nk, 1), self.table());
        let rows_nc = match self.config.straight_through {
            // The values of the drawn codes. Their vectors learn where they were drawn, the logits as in the mixture.
            true => {
                let mixed_nc = soft_nk.matmul(table_kc.clone().detach());
                table_kc.select(0, codes_n.clone()) + (mixed_nc.clone() - mixed_nc.detach())
            }
            false => soft_nk.matmul(table_kc),
        };
        Quantized {
            latents_bchw: from_rows(rows_nc, b, h, w),
            codes: codes_n.reshape([b, h * w]),
            terms: vec![LossTerm::new("codebook", self.divergence(logits_nk))],
            stats: Stats::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_temperature_warms_up_and_falls() {
        let cosine = Temperature::Cosine { start: Some(0.5), max: 0.9, min: 0.1, warmup: 10, steps: 110 };
        for (step, expected) in [(0, 0.5), (5, 0.7), (10, 0.9), (60, 0.5), (110, 0.1), (9999, 0.1)] {
            assert!((cosine.at(step) - expected).abs() < 1e-12, "step {step}: {}", cosine.at(step));
        }
        assert_eq!(Temperature::default().at(7), 1.0);
        for text in [
            "kind = 'constant'\nvalue = 0.0",
            "kind = 'cosine'\nmax = 0.1\nmin = 0.9\nsteps = 5",
            "kind = 'cosine'\nmax = 0.9\nmin = 0.1\nwarmup = 5\nsteps = 5",
        ] {
            let temperature: Temperature = toml::from_str(text).unwrap();
            assert!(temperature.check().unwrap_err().to_string().contains("temperature"), "{text}");
        }
    }

    #[test]
    fn noise_has_the_mean_of_its_distribution() {
        let noise = noise([400, 500], &Device::flex());
        let mean = noise.clone().mean().into_scalar::<f32>();
        assert!((mean - 0.5772).abs() < 0.02, "{mean}");
        assert!(noise.into_data().iter::<f32>().all(f32::is_finite));
    }
}
