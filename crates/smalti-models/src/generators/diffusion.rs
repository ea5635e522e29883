//! Gaussian diffusion of single vectors (arXiv 2006.11239, 2102.09672), as MAR's loss uses it (arXiv 2406.11838).
//!
//! A network predicts the noise in a row and, as a share between two bounds, the variance of a reverse step. Tables are in
//! double precision and read in single. Nothing is clipped: at the noisiest step the estimate of the clean row is off by
//! thousands where the noise is off by a little, and later steps correct it.

use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use std::f64::consts::{FRAC_PI_2, LN_2};

/// How much noise each step adds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoiseSchedule {
    /// What is left of a signal falls like a squared cosine.
    #[default]
    Cosine,
    /// The added variance grows from 1e-4 to 0.02 over 1000 steps, and so much faster over fewer.
    Linear,
}

impl NoiseSchedule {
    /// The variance that each of so many steps adds.
    pub fn betas(self, steps: usize) -> Vec<f64> {
        let total = steps as f64;
        match self {
            Self::Cosine => {
                let left = |u: f64| ((u + 0.008) / 1.008 * FRAC_PI_2).cos().powi(2);
                let beta = |i: usize| 1.0 - left((i + 1) as f64 / total) / left(i as f64 / total);
                (0..steps).map(|i| beta(i).min(0.999)).collect()
            }
            Self::Linear => {
                let (first, last) = (0.1 / total, 20.0 / total);
                let stride = (last - first) / steps.saturating_sub(1).max(1) as f64;
                (0..steps).map(|i| first + i as f64 * stride).collect()
            }
        }
    }
}

/// The numbers of a diffusion, one for each of its steps.
#[derive(Clone, Debug)]
pub struct Diffusion {
    /// The step of the whole diffusion that each step is; the network is told this one.
    pub timesteps: Vec<usize>,
    /// Added variance.
    pub betas: Vec<f64>,
    /// Share of the signal's variance that is left.
    pub alphas_cumprod: Vec<f64>,
    /// The same one step before; 1 before the first.
    pub alphas_cumprod_prev: Vec<f64>,
    /// Variance of a reverse step that knows the clean row.
    pub posterior_variance: Vec<f64>,
    /// Its logarithm, the first replaced by the second.
    pub posterior_log_variance: Vec<f64>,
    /// Weight of the clean row in the mean of such a step.
    pub posterior_mean_clean: Vec<f64>,
    /// Weight of the noisy row.
    pub posterior_mean_noisy: Vec<f64>,
}

/// What a network's output says of a reverse step, `[n, c]` each.
#[derive(Clone, Debug)]
pub struct ReverseStep {
    /// Mean of the row one step before.
    pub mean: Tensor<2>,
    /// Logarithm of its variance.
    pub log_variance: Tensor<2>,
    /// The clean row.
    pub clean: Tensor<2>,
}

/// Losses of rows, `[n]` each.
#[derive(Clone, Debug)]
pub struct RowLosses {
    /// Mean squared error of the predicted noise.
    pub noise: Tensor<1>,
    /// Variational bound of the step in bits; gives gradients to the variance only.
    pub bound: Tensor<1>,
}

impl Diffusion {
    /// All steps of a schedule.
    pub fn new(schedule: NoiseSchedule, steps: usize) -> Self {
        Self::of(schedule.betas(steps), (0..steps).collect())
    }

    /// The steps of this diffusion at ascending places, as a diffusion of its own.
    pub fn respaced(&self, kept: &[usize]) -> Self {
        let mut last = 1.0;
        let betas = kept.iter().map(|&t| {
            let beta = 1.0 - self.alphas_cumprod[t] / last;
            last = self.alphas_cumprod[t];
            beta
        });
        Self::of(betas.collect(), kept.iter().map(|&t| self.timesteps[t]).collect())
    }

    fn of(betas: Vec<f64>, timesteps: Vec<usize>) -> Self {
        let mut left = 1.0;
        let alphas_cumprod: Vec<f64> = betas
            .iter()
            .map(|beta| {
                left *= 1.0 - beta;
                left
            })
            .collect();
        let alphas_cumprod_prev: Vec<f64> = std::iter::once(1.0).chain(alphas_cumprod.iter().copied()).collect();
        let steps = || betas.iter().zip(&alphas_cumprod).zip(&alphas_cumprod_prev).map(|((b, a), p)| (*b, *a, *p));
        let posterior_variance: Vec<f64> =
            steps().map(|(beta, left, before)| beta * (1.0 - before) / (1.0 - left)).collect();
        let second = posterior_variance.get(1).or(betas.first()).copied().unwrap_or(1.0);
        let clipped = std::iter::once(second).chain(posterior_variance.iter().skip(1).copied());
        Self {
            posterior_log_variance: clipped.take(betas.len()).map(f64::ln).collect(),
            posterior_mean_clean: steps().map(|(beta, left, before)| beta * before.sqrt() / (1.0 - left)).collect(),
            posterior_mean_noisy: steps()
                .map(|(beta, left, before)| (1.0 - before) * (1.0 - beta).sqrt() / (1.0 - left))
                .collect(),
            alphas_cumprod_prev: alphas_cumprod_prev[..betas.len()].to_vec(),
            posterior_variance,
            alphas_cumprod,
            timesteps,
            betas,
        }
    }

    /// Number of steps.
    pub fn steps(&self) -> usize {
        self.betas.len()
    }

    /// A number for each row, from the step that it is at: `[n, 1]`, or `[1, 1]` if all are at one.
    fn at(&self, t: &[usize], device: &Device, number: impl Fn(usize) -> f64) -> Tensor<2> {
        let rows = if t.iter().all(|step| Some(step) == t.first()) { &t[..t.len().min(1)] } else { t };
        let values: Vec<f32> = rows.iter().map(|&t| number(t) as f32).collect();
        let n = values.len();
        Tensor::from_data(TensorData::new(values, [n, 1]), device)
    }

    /// Rows `[n, c]` with noise `[n, c]` added, each as far as its step says.
    pub fn add_noise(&self, clean: Tensor<2>, t: &[usize], noise: Tensor<2>) -> Tensor<2> {
        let device = clean.device();
        let signal = self.at(t, &device, |t| self.alphas_cumprod[t].sqrt());
        clean * signal + noise * self.at(t, &device, |t| (1.0 - self.alphas_cumprod[t]).sqrt())
    }

    /// The reverse step of noisy rows `[n, c]` with a network's output `[n, 2 c]`: noise, then variance.
    pub fn reverse(&self, noisy: Tensor<2>, t: &[usize], output: Tensor<2>) -> ReverseStep {
        let [_, c] = noisy.dims();
        let (noise, share) = (output.clone().narrow(1, 0, c), output.narrow(1, c, c));
        let device = noisy.device();
        let left = |t: usize| self.alphas_cumprod[t];
        let clean = noisy.clone() * self.at(t, &device, |t| (1.0 / left(t)).sqrt())
            - noise * self.at(t, &device, |t| (1.0 / left(t) - 1.0).sqrt());
        ReverseStep {
            mean: self.posterior_mean(clean.clone(), noisy, t),
            log_variance: self.log_variance(share, t),
            clean,
        }
    }

    fn posterior_mean(&self, clean: Tensor<2>, noisy: Tensor<2>, t: &[usize]) -> Tensor<2> {
        let device = noisy.device();
        clean * self.at(t, &device, |t| self.posterior_mean_clean[t])
            + noisy * self.at(t, &device, |t| self.posterior_mean_noisy[t])
    }

    /// Between the posterior's (-1) and that of the added noise (1); beyond them too.
    fn log_variance(&self, share: Tensor<2>, t: &[usize]) -> Tensor<2> {
        let device = share.device();
        let (least, most) = (|t: usize| self.posterior_log_variance[t], |t: usize| self.betas[t].ln());
        let middle = self.at(t, &device, |t| (most(t) + least(t)) / 2.0);
        share * self.at(t, &device, |t| (most(t) - least(t)) / 2.0) + middle
    }

    /// Draws the rows one step before, all of them at step `t`, with given noise that counts `temperature` times.
    pub fn ancestral(&self, step: ReverseStep, t: usize, noise: Tensor<2>, temperature: f32) -> Tensor<2> {
        match t {
            0 => step.mean,
            _ => step.mean + (step.log_variance * 0.5).exp() * noise * temperature,
        }
    }

    /// The rows one step before by DDIM (arXiv 2010.02502), all of them at step `t`: without randomness at `eta` 0.
    pub fn ddim(&self, noisy: Tensor<2>, step: ReverseStep, t: usize, noise: Tensor<2>, eta: f32) -> Tensor<2> {
        let (left, before) = (self.alphas_cumprod[t], self.alphas_cumprod_prev[t]);
        let found = (noisy * (1.0 / left).sqrt() - step.clean.clone()) / (1.0 / left - 1.0).sqrt();
        let deviation = f64::from(eta) * ((1.0 - before) / (1.0 - left)).sqrt() * (1.0 - left / before).sqrt();
        let mean = step.clean * before.sqrt() + found * (1.0 - before - deviation * deviation).max(0.0).sqrt();
        match t {
            0 => mean,
            _ => mean + noise * deviation,
        }
    }

    /// The losses of a network's output `[n, 2 c]` for rows `[n, c]` that [`Self::add_noise`] made noisy.
    pub fn losses(
        &self,
        clean: Tensor<2>,
        noisy: Tensor<2>,
        t: &[usize],
        noise: Tensor<2>,
        output: Tensor<2>,
    ) -> RowLosses {
        let [n, c] = clean.dims();
        let share = output.clone().narrow(1, c, c);
        let error = (output.clone().narrow(1, 0, c) - noise).square();
        let found = self.reverse(noisy.clone(), t, output.detach());
        let log_variance = self.log_variance(share, t);
        let device = clean.device();
        let true_mean = self.posterior_mean(clean.clone(), noisy, t);
        let true_log_variance = self.at(t, &device, |t| self.posterior_log_variance[t]);
        // Divergence of the true step from the predicted one, and at the last step the likelihood of the row itself.
        let divergence = (log_variance.clone() - true_log_variance.clone() - 1.0
            + (true_log_variance - log_variance.clone()).exp()
            + (true_mean - found.mean.clone()).square() * (-log_variance.clone()).exp())
            * 0.5;
        let bound = match t.contains(&0) {
            false => divergence,
            true => {
                let likelihood = level_log_likelihood(clean, found.mean, log_variance * 0.5);
                let last: Vec<bool> = t.iter().flat_map(|t| std::iter::repeat_n(*t == 0, c)).collect();
                let last = Tensor::from_data(TensorData::new(last, [n, c]), &device);
                divergence.mask_where(last, -likelihood)
            }
        };
        let mean = |x: Tensor<2>| x.mean_dim(1).reshape([n]);
        RowLosses { noise: mean(error), bound: mean(bound) / LN_2 }
    }
}

/// Log-likelihood of values under a normal distribution cut into levels of width 2/255, all beyond 0.999 in the outer ones.
fn level_log_likelihood(values: Tensor<2>, mean: Tensor<2>, log_deviation: Tensor<2>) -> Tensor<2> {
    const HALF: f64 = 1.0 / 255.0;
    // An approximation of the normal distribution function, as in the official code.
    let below = |x: Tensor<2>| {
        let cube = x.clone() * x.clone() * x.clone();
        let inner = (x + cube * 0.044715) * (2.0 / std::f64::consts::PI).sqrt();
        (inner.tanh() + 1.0) * 0.5
    };
    let log = |x: Tensor<2>| x.clamp_min(1e-12).log();
    let (centred, inverse) = (values.clone() - mean, (-log_deviation).exp());
    let upper = below((centred.clone() + HALF) * inverse.clone());
    let lower = below((centred - HALF) * inverse);
    let inside = log(upper.clone() - lower.clone());
    let high = inside.mask_where(values.clone().greater_elem(0.999), log(-lower + 1.0));
    high.mask_where(values.lower_elem(-0.999), log(upper))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::Respacing;
    use smalti_base::Result;

    fn kept(text: &str, total: usize) -> Result<Vec<usize>> {
        Respacing::try_from(text.to_string())?.timesteps(total)
    }

    #[test]
    fn a_respaced_diffusion_leaves_as_much_of_the_signal() {
        let whole = Diffusion::new(NoiseSchedule::Linear, 100);
        let few = whole.respaced(&kept("7", 100).unwrap());
        for (step, t) in few.timesteps.iter().enumerate() {
            assert!((few.alphas_cumprod[step] - whole.alphas_cumprod[*t]).abs() < 1e-12);
        }
        let again = few.respaced(&[0, 6]);
        assert_eq!(again.timesteps, [0, 99]);
    }

    /// A network that knows the noise brings every row back.
    #[test]
    fn perfect_noise_gives_the_clean_row() {
        let device = Device::flex();
        let diffusion = Diffusion::new(NoiseSchedule::Cosine, 50);
        let clean = Tensor::<2>::from_floats([[0.3, -0.8], [1.2, 0.1]], &device);
        let noise = Tensor::<2>::from_floats([[1.0, -0.5], [0.2, 2.0]], &device);
        let t = [40, 3];
        let noisy = diffusion.add_noise(clean.clone(), &t, noise.clone());
        let output = Tensor::cat(vec![noise.clone(), noise.zeros_like()], 1);
        let step = diffusion.reverse(noisy.clone(), &t, output.clone());
        let difference: f32 = (step.clean - clean.clone()).abs().max().into_scalar();
        assert!(difference < 1e-4, "{difference}");
        let losses = diffusion.losses(clean, noisy, &t, noise, output);
        assert!(losses.noise.max().into_scalar::<f32>() < 1e-12);
        assert!(losses.bound.min().into_scalar::<f32>() >= 0.0);
    }
}
