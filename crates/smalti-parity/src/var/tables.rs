//! Resampling, the filters of sampling, and schedules.

use crate::case::Case;
use crate::comparison::Comparison;
use smalti_base::{Error, Result};
use smalti_models::sampling::{Sampling, filter, softmax};
use smalti_nn::{Interpolation, Resize};
use smalti_train::Schedule;
use smalti_train::schedule::Fall;

pub(crate) fn knows_resampling(case: &Case) -> bool {
    case.names().any(|name| name.starts_with("bicubic_out_")) && case.names().any(|name| name.starts_with("area_out_"))
}

pub(crate) fn resampling(case: &Case, compare: &mut Comparison) -> Result<()> {
    let outputs: Vec<String> = case.names().filter(|name| name.contains("_out_")).map(str::to_string).collect();
    for name in outputs {
        let Some((kind, sizes)) = name.split_once("_out_") else { continue };
        let interpolation = match kind {
            "area" => Interpolation::Area,
            "bilinear" => Interpolation::Bilinear,
            "bicubic" => Interpolation::Bicubic,
            other => return Err(Error::unknown(case.title(), "resampling", other, ["area", "bilinear", "bicubic"])),
        };
        // Some names say the size before, others leave one input to choose from.
        let before = sizes.split_once('_').map(|(before, _)| before);
        let fits = |input: &&str| match (input.split_once("_in_"), before) {
            (Some((_, size)), Some(before)) => size == before,
            (Some((of, size)), None) => of == kind && size.contains('x') == sizes.contains('x'),
            _ => false,
        };
        let mut inputs: Vec<&str> = case.names().filter(fits).collect();
        inputs.sort_by_key(|input| !input.starts_with(kind));
        let input = inputs.first().ok_or_else(|| Error::invalid(case.title(), format!("no input for `{name}`")))?;
        let input = case.tensor::<4>(input)?;
        let ([_, _, h, w], [_, _, new_h, new_w]) = (input.dims(), case.tensor::<4>(&name)?.dims());
        compare.floats(&name, Resize::new(interpolation, [h, w], [new_h, new_w], case.device()).forward(input))?;
    }
    Ok(())
}

pub(crate) fn knows_sampling(case: &Case) -> bool {
    case.has(&["logits", "sched_it"]) && case.names().any(|name| name.starts_with("probs_k"))
}

pub(crate) fn sampling(case: &Case, compare: &mut Comparison) -> Result<()> {
    let names: Vec<String> = case.names().map(str::to_string).collect();
    let [.., vocabulary] = case.shape("logits")?[..] else {
        return Err(Error::invalid(case.title(), "logits have no axis"));
    };
    for name in &names {
        if let Some(settings) = name.strip_prefix("probs_k") {
            let mut numbers = settings.split("_p").map(|number| number.trim_end_matches("_b").parse::<f32>());
            let (Some(Ok(k)), Some(Ok(p))) = (numbers.next(), numbers.next()) else {
                return Err(Error::invalid(case.title(), format!("`{name}` does not say k and p")));
            };
            let sampling = Sampling {
                top_k: (k > 0.0).then_some((k as usize).into()),
                top_p: (p > 0.0).then_some(p.into()),
                ..Default::default()
            };
            let mut rows = case.floats("logits")?.to_vec();
            for row in rows.chunks_exact_mut(vocabulary) {
                filter(row, &sampling);
                softmax(row);
            }
            compare.values(name, &rows)?;
        }
        let Some(shape) = name.strip_prefix("sched_lr_") else { continue };
        let decay = format!("sched_wd_{shape}");
        let (first, last) = (case.said(&decay, "weight decay, ")?, case.said(&decay, "-> ")?);
        let schedule = schedule(case, name, shape, last / first)?;
        let (peak, steps) = (case.said(name, "peak ")?, case.ints("sched_it")?);
        let at = |value: &dyn Fn(u64) -> f64| steps.iter().map(|step| value(*step as u64) as f32).collect::<Vec<_>>();
        compare.values(name, &at(&|step| peak * schedule.factor(step)))?;
        compare.values(&decay, &at(&|step| first * schedule.weight_decay_factor(step)))?;
    }
    Ok(())
}

/// The schedule that the official code calls `shape`.
fn schedule(case: &Case, name: &str, shape: &str, final_weight_decay: f64) -> Result<Schedule> {
    let fall = match shape {
        "cos" => Fall::Cosine,
        "lin00" => Fall::Linear { hold: 0.0 },
        "lin0" => Fall::Linear { hold: 0.05 },
        "lin" => Fall::Linear { hold: 0.15 },
        "exp" => Fall::Exponential { hold: 0.15 },
        other => match other.strip_prefix("lin").map(str::parse) {
            Some(Ok(knee)) => Fall::Bent { knee },
            _ => return Err(Error::unknown(case.title(), "schedule", other, ["cos", "lin00", "lin0", "lin", "exp"])),
        },
    };
    Ok(Schedule {
        steps: case.said_before(name, " its in all")? as u64,
        warmup: case.said(name, "warm-up ")? as u64,
        warmup_from: Some(case.said(name, "from ratio ")?),
        open_end: false,
        final_fraction: case.said(name, "wpe=")?,
        fall,
        final_weight_decay,
    })
}
