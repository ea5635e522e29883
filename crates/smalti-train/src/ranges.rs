//! The range of every number in a recipe, by the end of its key. A number without a row must still be finite.

use smalti_base::{Error, Result};
use toml::Value;

/// What a number may be.
#[derive(Clone, Copy, Debug)]
struct Range {
    least: f64,
    most: f64,
    without_least: bool,
    without_most: bool,
    hint: &'static str,
}

const fn range(least: f64, most: f64) -> Range {
    Range { least, most, without_least: false, without_most: false, hint: "" }
}

const fn above(least: f64, most: f64) -> Range {
    Range { without_least: true, ..range(least, most) }
}

const fn below(least: f64, most: f64) -> Range {
    Range { without_most: true, ..range(least, most) }
}

const fn or(range: Range, hint: &'static str) -> Range {
    Range { hint, ..range }
}

/// More is taken for a mistake: no list of numbers of this length fits into memory.
const MANY: f64 = (1u64 << 24) as f64;
/// Steps, images and the like, which cost nothing by themselves.
const COUNT: f64 = 1e15;
const WEIGHT: Range = range(0.0, 1e9);
const SHARE: Range = range(0.0, 1.0);
const NOT_ALL: Range = below(0.0, 1.0);
const TINY: Range = range(1e-30, 1.0);
const STEPS: Range = range(1.0, COUNT);
const FROM_0: Range = range(0.0, COUNT);
const SIDE: Range = range(1.0, 16384.0);
const WIDTH: Range = range(1.0, 1_048_576.0);
const LAYERS: Range = range(1.0, 1024.0);
const CODES: Range = range(1.0, MANY);
const ANY: Range = range(-1e9, 1e9);

/// Keys by their ends, of which the longest counts, with their ranges.
const RANGES: &[(&[&str], Range)] = &[
    // The run.
    (&["recipe.seed"], range(0.0, 18_446_744_073_709_551_615.0)),
    (&["batch.size", "batch.accumulate"], range(1.0, 1_048_576.0)),
    (&["schedule.steps", "logging.every", "evaluation.every", "checkpoint.every"], STEPS),
    (&["evaluation.images", "checkpoint.keep"], STEPS),
    (&["evaluation.pictures"], range(1.0, 1024.0)),
    (&["schedule.warmup"], FROM_0),
    (&["schedule.warmup_from", "schedule.final_fraction"], SHARE),
    (&["schedule.final_weight_decay"], range(0.0, 1000.0)),
    (&["fall.hold"], NOT_ALL),
    (&["fall.knee"], Range { without_least: true, ..NOT_ALL }),
    (&["optimizer.learning_rate"], above(0.0, 10.0)),
    (&["optimizer.betas", "ema.decay"], NOT_ALL),
    (&["optimizer.epsilon"], TINY),
    (&["optimizer.weight_decay", "groups.weight_decay"], range(0.0, 1000.0)),
    (&["optimizer.clip_norm"], or(range(1e-9, 1e9), "leave it out for no clipping")),
    (&["groups.rate_factor"], range(0.0, 1000.0)),
    (&["teacher.weight"], above(0.0, 1e9)),
    (&["captions.keywords"], SHARE),
    (&["captions.most"], range(1.0, 1024.0)),
    (&["text.vocabulary"], CODES),
    // Images.
    (&["background"], range(0.0, 255.0)),
    (&["train.limit", "validation.limit"], STEPS),
    (&["limits.pixels", "limits.bytes"], range(1.0, 1e18)),
    (&["transforms.size"], SIDE),
    (&["transforms.scale"], Range { without_least: true, ..SHARE }),
    (&["transforms.ratio"], above(0.0, 1000.0)),
    (&["transforms.p"], SHARE),
    // Losses.
    (&["loss.l1", "loss.l2", "loss.binary_cross_entropy", "loss.perceptual_weight"], WEIGHT),
    (&["loss.codebook_weight", "loss.kl_weight", "adversarial.weight", "refinement.weight"], WEIGHT),
    (&["quantizer.kl_weight"], WEIGHT),
    (&["from", "to", "discriminator.r1"], WEIGHT),
    (&["weights.*.start", "adversarial.start_step"], FROM_0),
    (&["weights.*.steps", "discriminator.r1_every"], STEPS),
    (&["weights.*"], WEIGHT),
    (&["likelihood.log_variance"], range(-50.0, 50.0)),
    (&["adversarial.ndf", "discriminator.capacity", "discriminator.max_channels"], range(1.0, 65536.0)),
    (&["adversarial.layers"], range(0.0, 16.0)),
    // Quantizers.
    (&["codes", "vocabulary", "classes", "kept"], CODES),
    (&["quantizer.beta", "table.beta"], WEIGHT),
    (&["decay"], NOT_ALL),
    (&["epsilon", "norm_epsilon"], TINY),
    (&["kmeans_init"], range(0.0, 1000.0)),
    (&["revive.threshold"], above(0.0, 1e9)),
    (&["revive.every"], STEPS),
    (&["levels"], CODES),
    (&["fold"], range(1.0, 64.0)),
    (&["convolutions"], range(0.0, 1024.0)),
    (&["temperature.value", "temperature.start", "temperature.max", "temperature.min"], above(0.0, 1e6)),
    (&["temperature.warmup"], FROM_0),
    (&["temperature.steps"], STEPS),
    // Networks.
    (&["image_size", "encoder_attn_resolutions", "decoder_attn_resolutions", "attn_resolutions"], SIDE),
    (&["patch_size", "pixels"], SIDE),
    (&["ch", "z_channels", "embed_dim", "channels", "projected", "norm_groups"], range(1.0, 65536.0)),
    (&["in_channels", "out_channels"], range(1.0, 65536.0)),
    (&["label_shift"], range(0.0, 255.0)),
    (&["ch_mult"], range(1.0, 1024.0)),
    (&["num_res_blocks"], range(1.0, 64.0)),
    (&["quant_kernel"], range(1.0, 31.0)),
    (&["latent_scale"], above(0.0, 1e6)),
    (&["latent_shift"], ANY),
    (&["dim", "dim_head", "mlp_dim", "width", "hidden"], WIDTH),
    (&["depth", "head_depth", "heads", "head_heads", "mlp_ratio", "repeats"], LAYERS),
    (&["dropout", "attention_dropout", "embedding_dropout", "drop_path"], NOT_ALL),
    (&["condition_dropout", "pkeep", "text_share", "mask_ratio_min", "min_masking_rate"], SHARE),
    (&["label_smoothing"], NOT_ALL),
    (&["first_gain"], range(0.0, 1e6)),
    (&["soft_targets.temperature"], above(0.0, 1e6)),
    (&["diffusion.steps", "diffusion.sampling_steps", "sampling.diffusion_steps"], range(1.0, 1e6)),
    (&["eta"], SHARE),
    (&["buffer", "start_token", "visible_places", "unknown.token"], range(0.0, MANY)),
    (&["block_size", "length", "count", "h", "w", "n"], range(1.0, MANY)),
    (&["padding.id"], range(0.0, MANY)),
    // Pictures shown.
    (&["sampling.temperature", "sampling.choice_temperature"], range(0.0, 1e6)),
    (&["sampling.top_k"], CODES),
    (&["sampling.top_p"], Range { without_least: true, ..SHARE }),
    (&["sampling.guidance"], range(-1e4, 1e4)),
    (&["sampling.steps"], range(1.0, MANY)),
    (&["sampling.first_step"], range(0.0, MANY)),
];

/// Checks all numbers of a recipe with every value written out.
///
/// # Errors
/// [`Error::Invalid`] with the key of the first number that is not finite or out of its range.
pub(crate) fn check(place: &str, recipe: &toml::Table) -> Result<()> {
    let mut path = vec!["recipe".to_string()];
    recipe.iter().try_for_each(|(key, value)| {
        path.push(key.clone());
        let checked = walk(place, &mut path, value);
        path.pop();
        checked
    })
}

fn walk(place: &str, path: &mut Vec<String>, value: &Value) -> Result<()> {
    let number = match value {
        Value::Float(number) => *number,
        Value::Integer(number) => *number as f64,
        Value::Array(values) => return values.iter().try_for_each(|value| walk(place, path, value)),
        Value::Table(table) => {
            return table.iter().try_for_each(|(key, value)| {
                path.push(key.clone());
                let checked = walk(place, path, value);
                path.pop();
                checked
            });
        }
        _ => return Ok(()),
    };
    must_be_in(number, range_of(path)).map_err(|(expected, hint)| {
        let key = format!("{place}: {}", path[1..].join("."));
        let problem = format!("is {number}, expected {expected}");
        if hint.is_empty() { Error::invalid(key, problem) } else { Error::invalid_hint(key, problem, hint) }
    })
}

fn must_be_in(number: f64, range: Option<Range>) -> Result<(), (String, &'static str)> {
    let Some(Range { least, most, without_least, without_most, hint }) = range else {
        return if number.is_finite() { Ok(()) } else { Err(("a finite number".into(), "")) };
    };
    let fits = if without_least { number > least } else { number >= least };
    let fits = fits && if without_most { number < most } else { number <= most };
    let sign = |without: bool| if without { "<" } else { "<=" };
    match number.is_finite() && fits {
        true => Ok(()),
        false => Err((format!("{least} {} x {} {most}", sign(without_least), sign(without_most)), hint)),
    }
}

/// The range of the longest end that is the key's.
fn range_of(path: &[String]) -> Option<Range> {
    let ends = |end: &str| {
        let parts: Vec<&str> = end.split('.').collect();
        let fits = parts.iter().rev().zip(path.iter().rev()).all(|(part, key)| *part == "*" || part == key);
        (fits && parts.len() <= path.len()).then_some(parts.len())
    };
    let rows = RANGES.iter().flat_map(|(keys, range)| keys.iter().map(move |key| (*key, *range)));
    let fitting = rows.filter_map(|(key, range)| Some((ends(key)?, range)));
    fitting.max_by_key(|(length, _)| *length).map(|(_, range)| range)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::Recipe;
    use std::path::{Path, PathBuf};

    fn recipes() -> Vec<PathBuf> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
        let systems = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let files = systems.flat_map(|system| std::fs::read_dir(system).unwrap().map(|entry| entry.unwrap().path()));
        files.filter(|path| path.extension().is_some_and(|ending| ending == "toml")).collect()
    }

    fn numbers(path: &mut Vec<String>, value: &Value, found: &mut Vec<Vec<String>>) {
        match value {
            Value::Float(_) | Value::Integer(_) => found.push(path.clone()),
            Value::Array(values) => values.iter().for_each(|value| numbers(path, value, found)),
            Value::Table(table) => table.iter().for_each(|(key, value)| {
                path.push(key.clone());
                numbers(path, value, found);
                path.pop();
            }),
            _ => {}
        }
    }

    #[test]
    fn every_number_of_the_published_recipes_has_a_range_and_is_in_it() {
        let paths = recipes();
        assert!(paths.len() > 20, "{}", paths.len());
        for path in paths {
            let table = Recipe::read(&path, &[]).unwrap_or_else(|error| panic!("{error}")).table().unwrap();
            let mut found = Vec::new();
            numbers(&mut vec!["recipe".into()], &Value::Table(table), &mut found);
            for key in found {
                assert!(range_of(&key).is_some(), "{}: {} has no range", path.display(), key.join("."));
            }
        }
    }

    #[test]
    fn numbers_out_of_range_are_named() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/vqgan/tiny.toml");
        let refused = |setting: &str| Recipe::read(&path, &[setting.to_string()]).unwrap_err().to_string();
        for (setting, expected) in [
            (
                "optimizer.clip_norm=0",
                "optimizer.clip_norm: is 0, expected 0.000000001 <= x <= 1000000000; leave it out",
            ),
            ("optimizer.clip_norm=-1", "optimizer.clip_norm: is -1"),
            ("optimizer.weight_decay=-5", "optimizer.weight_decay: is -5"),
            ("optimizer.weight_decay=nan", "optimizer.weight_decay: is NaN"),
            ("schedule.final_fraction=5", "schedule.final_fraction: is 5, expected 0 <= x <= 1"),
            ("schedule.final_fraction=nan", "schedule.final_fraction: is NaN"),
            ("optimizer.learning_rate=inf", "optimizer.learning_rate: is inf"),
            ("task.model.num_res_blocks=0", "task.model.num_res_blocks: is 0, expected 1 <= x <= 64"),
            ("task.model.quantizer.kmeans_init=2147483648", "task.model.quantizer.kmeans_init: is 2147483648"),
            ("task.loss.l1=-0.1", "task.loss.l1: is -0.1"),
            ("task.loss.weights={commitment=inf}", "task.loss.weights.commitment: is inf"),
            ("evaluation.pictures=0", "evaluation.pictures: is 0, expected 1 <= x"),
            ("batch.size=0", "batch.size: is 0"),
            ("ema.decay=1.0", "ema.decay: is 1, expected 0 <= x < 1"),
        ] {
            let error = refused(setting);
            assert!(error.contains(expected), "{setting}: {error}");
        }
    }
}
