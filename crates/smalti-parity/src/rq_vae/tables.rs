//! Sampling, the loss with soft targets, and schedules, as tables.

use crate::case::Case;
use crate::comparison::Comparison;
use smalti_base::{Error, Result};
use smalti_models::generators::rq_transformer::soft_cross_entropy;
use smalti_models::sampling::{Sampling, filter, softmax};
use smalti_train::schedule::{Fall, Schedule};

pub(crate) fn knows_tables(case: &Case) -> bool {
    case.has(&["logits", "soft_target", "soft_ce_none"]) && case.names().any(|name| name.starts_with("lr_"))
}

pub(crate) fn tables(case: &Case, compare: &mut Comparison) -> Result<()> {
    let logits = case.tensor::<2>("logits")?;
    let soft = soft_cross_entropy(logits.clone(), logits.clone(), case.tensor("soft_target")?);
    compare.floats("soft_ce_none", soft)?;
    let [_, vocabulary] = logits.dims();
    let names: Vec<String> = case.names().map(str::to_string).collect();
    for name in &names {
        if let Some(settings) = name.strip_prefix("probs_") {
            compare.values(name, &probabilities(case, settings, vocabulary)?)?;
        }
        if name.starts_with("lr_") {
            let rates = rates(case, name)?;
            compare.values(name, &rates)?;
        }
    }
    Ok(())
}

/// Probabilities of the case's logits by `t{temperature}_k{top-k}_p{top-p}`.
fn probabilities(case: &Case, settings: &str, vocabulary: usize) -> Result<Vec<f32>> {
    let number = |part: Option<&str>, mark: char| part?.strip_prefix(mark)?.parse::<f32>().ok();
    let mut parts = settings.split('_');
    let (Some(temperature), Some(k), Some(p)) =
        (number(parts.next(), 't'), number(parts.next(), 'k'), number(parts.next(), 'p'))
    else {
        return Err(Error::invalid(case.title(), format!("`probs_{settings}` does not say t, k and p")));
    };
    let (top_k, top_p) = (Some((k as usize).into()), Some(p.into()));
    let sampling = Sampling { temperature, top_k, top_p, ..Default::default() };
    sampling.validate()?;
    let mut rows = case.floats("logits")?.to_vec();
    for row in rows.chunks_exact_mut(vocabulary) {
        filter(row, &sampling);
        softmax(row);
    }
    Ok(rows)
}

/// The rate at each step of a table whose line says the official settings of warm-up and fall.
fn rates(case: &Case, name: &str) -> Result<Vec<f32>> {
    let steps_per_epoch = case.said(name, "(")?;
    let (base, least) = (case.said(name, "base lr ")?, case.said(name, "'min_lr': ")?);
    let settings = case.description(name);
    for (setting, value) in [("mode", "'fix'"), ("start_from_zero", "True")] {
        if !settings.contains(&format!("'{setting}': {value}")) {
            let problem = format!("`{name}`: only {setting} = {value} is supported");
            return Err(Error::invalid(case.title(), problem));
        }
    }
    let buffer = case.said(name, "'buffer_epoch': ")?;
    if buffer != 0.0 {
        return Err(Error::invalid(case.title(), format!("`{name}`: buffer_epoch = {buffer}, only 0 is supported")));
    }
    let peak = base * case.said(name, "'multiplier': ")?.max(1.0);
    let steps = case.floats(name)?.len() as u64;
    let schedule = Schedule {
        steps,
        warmup: (case.said(name, "'epoch': ")? * steps_per_epoch).round() as u64,
        warmup_from: Some(0.0),
        open_end: true,
        final_fraction: least / peak,
        fall: Fall::Cosine,
        final_weight_decay: 1.0,
    };
    schedule.check(name)?;
    Ok((0..steps).map(|step| (peak * schedule.factor(step)) as f32).collect())
}
