//! MAR's diffusion: tables, respacing, reverse steps and losses against the official code.

use super::case::Case;
use super::comparison::Comparison;
use burn::tensor::Tensor;
use smalti_base::{Error, Result};
use smalti_models::generators::denoiser::timestep_table;
use smalti_models::generators::diffusion::{Diffusion, NoiseSchedule};
use smalti_models::sampling::Respacing;

pub(super) fn knows(case: &Case) -> bool {
    case.has(&["full.betas", "train.model_out"]) && case.has_settings(&["respacings"])
}

/// Timesteps of a case.
pub(super) fn timesteps(case: &Case, name: &str) -> Result<Vec<usize>> {
    let step = |t: &i64| usize::try_from(*t).map_err(|e| Error::invalid(name, e.to_string()));
    case.ints(name)?.iter().map(step).collect()
}

pub(super) fn diffusion(case: &Case, compare: &mut Comparison) -> Result<()> {
    case.only("learn_sigma", true)?;
    case.only("predict", "epsilon")?;
    case.only("loss", "MSE (+vb for variances)")?;
    case.ignore(&["channels"]);
    let schedule: NoiseSchedule = case.setting("noise_schedule")?;
    let full = Diffusion::new(schedule, case.setting("diffusion_steps")?);
    tables(&full, compare)?;
    for respacing in case.setting::<Vec<Respacing>>("respacings")? {
        let kept = respacing.timesteps(full.steps())?;
        let name = format!("respaced.{respacing}");
        compare.ints(&format!("{name}.timestep_map"), &kept.iter().map(|t| *t as i64).collect::<Vec<_>>())?;
        compare.values(&format!("{name}.betas"), &narrowed(&full.respaced(&kept).betas))?;
    }
    for respacing in case.setting::<Vec<Respacing>>("p_sample_respacings")? {
        reverse(case, compare, &full.respaced(&respacing.timesteps(full.steps())?), &format!("p.{respacing}"))?;
    }
    let t = timesteps(case, "train.t")?;
    let (clean, noise) = (case.tensor::<2>("train.x0")?, case.tensor::<2>("train.noise")?);
    let noisy = full.add_noise(clean.clone(), &t, noise.clone());
    compare.floats("train.x_t", noisy.clone())?;
    let losses = full.losses(clean, noisy, &t, noise, case.tensor("train.model_out")?);
    compare.floats("train.loss", losses.noise.clone() + losses.bound.clone())?;
    compare.floats("train.mse", losses.noise)?;
    compare.floats("train.vb", losses.bound)?;
    compare.floats("temb.out", timestep_table(&timesteps(case, "temb.t")?, case.device()))
}

fn narrowed(values: &[f64]) -> Vec<f32> {
    values.iter().map(|value| *value as f32).collect()
}

fn tables(full: &Diffusion, compare: &mut Comparison) -> Result<()> {
    let left = |number: fn(f64) -> f64| full.alphas_cumprod.iter().map(|left| number(*left)).collect::<Vec<f64>>();
    for (name, table) in [
        ("betas", full.betas.clone()),
        ("alphas_cumprod", full.alphas_cumprod.clone()),
        ("alphas_cumprod_prev", full.alphas_cumprod_prev.clone()),
        ("sqrt_alphas_cumprod", left(f64::sqrt)),
        ("sqrt_one_minus_alphas_cumprod", left(|left| (1.0 - left).sqrt())),
        ("log_one_minus_alphas_cumprod", left(|left| (1.0 - left).ln())),
        ("sqrt_recip_alphas_cumprod", left(|left| (1.0 / left).sqrt())),
        ("sqrt_recipm1_alphas_cumprod", left(|left| (1.0 / left - 1.0).sqrt())),
        ("posterior_variance", full.posterior_variance.clone()),
        ("posterior_log_variance_clipped", full.posterior_log_variance.clone()),
        ("posterior_mean_coef1", full.posterior_mean_clean.clone()),
        ("posterior_mean_coef2", full.posterior_mean_noisy.clone()),
    ] {
        compare.values(&format!("full.{name}"), &narrowed(&table))?;
    }
    Ok(())
}

/// Reverse steps of rows that are each at another step.
fn reverse(case: &Case, compare: &mut Comparison, few: &Diffusion, prefix: &str) -> Result<()> {
    let name = |part: &str| format!("{prefix}.{part}");
    let t: Vec<usize> = (0..few.steps()).collect();
    let (noisy, noise) = (case.tensor::<2>(&name("x"))?, case.tensor::<2>(&name("noise"))?);
    let step = few.reverse(noisy.clone(), &t, case.tensor(&name("model_out"))?);
    compare.floats(&name("mean"), step.mean.clone())?;
    compare.floats(&name("log_variance"), step.log_variance.clone())?;
    compare.floats(&name("pred_xstart"), step.clean.clone())?;
    // The next rows are made for one step at a time.
    let rows = |make: &dyn Fn(usize, [Tensor<2>; 5]) -> Tensor<2>| {
        let row = |x: &Tensor<2>, t: usize| x.clone().narrow(0, t, 1);
        let parts = [&step.mean, &step.log_variance, &step.clean, &noisy, &noise];
        Tensor::cat(t.iter().map(|t| make(*t, parts.map(|x| row(x, *t)))).collect(), 0)
    };
    let found = |[mean, log_variance, clean, noisy, noise]: [Tensor<2>; 5]| {
        (smalti_models::generators::diffusion::ReverseStep { mean, log_variance, clean }, noisy, noise)
    };
    let temperature = said(case, &name("sample"), "temperature")?;
    compare.floats(
        &name("sample"),
        rows(&|t, parts| {
            let (step, _, noise) = found(parts);
            few.ancestral(step, t, noise, temperature)
        }),
    )?;
    let ddim = |eta: f32| {
        rows(&|t, parts| {
            let (step, noisy, noise) = found(parts);
            few.ddim(noisy, step, t, noise, eta)
        })
    };
    compare.floats(&name("ddim"), ddim(0.0))?;
    for eta in case.names().filter_map(|found| found.strip_prefix(&name("ddim_eta"))) {
        let value = eta.parse().map_err(|_| Error::invalid(case.title(), format!("`{eta}` is not a number")))?;
        compare.floats(&name(&format!("ddim_eta{eta}")), ddim(value))?;
    }
    Ok(())
}

/// The number after a word in the line about a tensor.
fn said(case: &Case, tensor: &str, word: &str) -> Result<f32> {
    let line = case.description(tensor);
    let after = line.split_once(word).map(|(_, after)| after.trim_start());
    let number = after.and_then(|after| after.split([' ', ',', '(', ';']).next()?.parse().ok());
    number.ok_or_else(|| Error::invalid(case.title(), format!("its line about `{tensor}` says no {word}")))
}
