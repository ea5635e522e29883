//! MaskGIT: the official JAX code.

use super::case::{Case, Comparison, gradient};
use burn::module::Module;
use burn::tensor::Device;
use smalti_base::{Error, Layout, Result, TokenSpec};
use smalti_models::checkpoint::Rules;
use smalti_models::generators::{MaskGit, MaskGitConfig};
use smalti_models::sampling::{Draws, Sampling, Schedule, argmax};
use smalti_models::{Condition, ConditionConfig, Generation, ImageRequest, Known, Request};

pub(super) fn knows_schedules(case: &Case) -> bool {
    case.has(&["ratio"]) && case.setting::<Vec<String>>("methods").is_ok()
}

pub(super) fn schedules(case: &Case, compare: &mut Comparison) -> Result<()> {
    for name in case.setting::<Vec<String>>("methods")? {
        let schedule = Schedule::try_from(name.clone())?;
        for total in case.setting::<Vec<usize>>("totals")? {
            let found: Vec<f32> = case.floats("ratio")?.iter().map(|at| schedule.ratio(*at, total)).collect();
            compare.values(&format!("{name}.{total}"), &found)?;
        }
    }
    Ok(())
}

pub(super) fn knows_transformer(case: &Case) -> bool {
    case.has(&["tokens", "labels", "mask", "logits"])
        && case.setting::<usize>("mask_token_id").is_err()
        && case.setting::<usize>("intermediate_size").is_ok()
}

/// The model of a case.
fn model(case: &Case, schedule: Schedule, device: &Device) -> Result<MaskGit> {
    let (latent, width): (usize, usize) = (case.setting("latent")?, case.setting("hidden_size")?);
    let config = MaskGitConfig {
        tokens: TokenSpec::discrete(
            Layout::Grid { h: latent, w: latent },
            case.setting("codebook_size")?,
            (16 * latent, 16 * latent),
        ),
        condition: ConditionConfig::Class { classes: case.setting("num_class")? },
        condition_dropout: 0.0,
        width,
        depth: case.setting("num_layers")?,
        heads: case.setting("num_heads")?,
        mlp_ratio: case.setting::<usize>("intermediate_size")? / width.max(1),
        dropout: 0.0,
        attention_dropout: 0.0,
        schedule,
        label_smoothing: 0.1,
        min_masking_rate: 0.0,
    };
    Ok(Rules::builtin("maskgit", "generator")?.import(config.init(device)?, &case.weights("")?)?.0)
}

pub(super) fn transformer(case: &Case, compare: &mut Comparison) -> Result<()> {
    let model = model(case, Schedule::Cosine, &case.autodiff())?;
    let length = model.config.tokens.length();
    let labels = case.ids::<1>("labels")?.unsqueeze_dim::<2>(1);
    let plain = model.valid();
    // In the official input the class comes first and -1 is the mask.
    let ids = case.ids::<2>("input_ids")?.narrow(1, 1, length);
    let ids = ids.clone().mask_fill(ids.lower_elem(0), model.config.mask_id() as i32);
    let words = model.config.mask_id() + 1;
    compare.floats("logits", plain.logits(plain.features(labels.clone(), ids), words))?;

    let masks: Vec<Vec<bool>> =
        case.ints("mask")?.chunks(length).map(|row| row.iter().map(|masked| *masked == 1).collect()).collect();
    let loss = model.masked_loss(case.ids("tokens")?, labels, &masks, 0.1).loss;
    compare.floats("loss", loss.clone())?;
    let gradients = loss.backward();
    let block = model.blocks.first().ok_or_else(|| Error::invalid(case.title(), "the model has no blocks"))?;
    let words = gradient("words", model.words.table.grad(&gradients))?;
    compare.floats("grad.Embed_0/word_embeddings/embedding", words)?;
    let query = gradient("query", block.attention.query.weight.grad(&gradients))?;
    compare.floats("grad.TransformerLayer_0/Attention_0/self_attention/query/kernel", query)?;
    compare.floats("grad.MlmLayer_0/mlm_bias/bias", gradient("head_bias", model.head_bias.grad(&gradients))?)?;

    for name in ["cosine", "uniform", "pow2", "log", "exp"] {
        let stage = format!("gen_{name}");
        if case.has(&[format!("{stage}.result").as_str()]) {
            replay(case, compare, &stage, Schedule::try_from(name.to_string())?)?;
        }
    }
    match case.has(&["edit.result"]) {
        true => replay(case, compare, "edit", Schedule::Cosine),
        false => Ok(()),
    }
}

/// Noise from a case: `[steps, images, places, codes]` on tokens, `[steps, images, places]` on confidences, where the first place
/// is the class.
struct Given {
    sample: Vec<f32>,
    choice: Vec<f32>,
    first_step: usize,
    images: usize,
    places: usize,
}

impl Given {
    fn index(&self, image: usize, step: usize, place: usize) -> usize {
        ((step - self.first_step) * self.images + image) * self.places + place + 1
    }
}

impl Draws for Given {
    fn token(&self, image: usize, step: usize, place: usize, logits: &[f32]) -> usize {
        let noise = self.sample[self.index(image, step, place) * logits.len()..].iter();
        argmax(&logits.iter().zip(noise).map(|(logit, noise)| logit + noise).collect::<Vec<f32>>())
    }

    fn confidence_noise(&self, image: usize, step: usize, place: usize) -> f32 {
        self.choice[self.index(image, step, place)]
    }

    fn noise(&self, image: usize, step: usize, place: usize, codes: usize) -> Vec<f32> {
        self.sample[self.index(image, step, place) * codes..][..codes].to_vec()
    }
}

/// A whole decode with given noise, compared after each step.
fn replay(case: &Case, compare: &mut Comparison, stage: &str, schedule: Schedule) -> Result<()> {
    let name = |part: &str| format!("{stage}.{part}");
    let model = model(case, schedule, case.device())?;
    let (codes, places) = (case.setting::<usize>("codebook_size")?, model.config.tokens.length() + 1);
    let shape = case.shape(&name("all_steps"))?;
    let noise = case.shape(&name("gumbel_choice"))?;
    let ([images, steps, _], [executed, ..]) = (&shape[..], &noise[..]) else {
        return Err(Error::invalid(case.title(), format!("{stage} has {shape:?} and {noise:?}")));
    };
    let (images, steps, first_step) = (*images, *steps, steps.saturating_sub(*executed));
    let start = case.ints(&name("input_ids"))?;
    let requests = start.chunks(places).map(|row| ImageRequest {
        condition: Condition::Class((row[0] - codes as i64) as u32),
        seed: 0,
        known: Some(Known {
            tokens: row[1..].iter().map(|id| (*id).max(0) as u32).collect::<Vec<u32>>().into(),
            keep: row[1..].iter().map(|id| *id >= 0).collect(),
        }),
    });
    let sampling = Sampling {
        steps: Some(steps),
        first_step,
        choice_temperature: case.setting("choice_temperature")?,
        ..Default::default()
    };
    let draws = Given {
        sample: case.floats(&name("gumbel_sample"))?.to_vec(),
        choice: case.floats(&name("gumbel_choice"))?.to_vec(),
        first_step,
        images,
        places,
    };
    let request = Request::new(requests.collect(), sampling);
    let mut generation = model.start_with(&request, Box::new(draws))?;
    // Steps that are left out hold the start; the last step masks nothing.
    let mut all: Vec<i64> = (0..images).flat_map(|i| start[i * places..(i + 1) * places].repeat(steps)).collect();
    let mut masked = case.ints(&name("masked_after"))?.to_vec();
    let executed = generation.steps();
    for done in 0..executed {
        generation.next();
        let found = host(&generation);
        for image in 0..images {
            let row = &found[image * (places - 1)..(image + 1) * (places - 1)];
            let at = (image * steps + first_step + done) * places + 1;
            all[at..at + places - 1].copy_from_slice(row);
            if done + 1 < executed {
                let kept = generation.kept()[image].iter().map(|code| code.map_or(-1, i64::from));
                let at = (image * executed + done) * places + 1;
                masked[at..at + places - 1].copy_from_slice(&kept.collect::<Vec<i64>>());
            }
        }
    }
    compare.ints(&name("all_steps"), &all)?;
    compare.ints(&name("masked_after"), &masked)?;
    compare.ints(&name("result"), &host(&generation))
}

fn host(generation: &dyn Generation) -> Vec<i64> {
    generation.codes().discrete().map(|codes| codes.into_data().iter::<i64>().collect()).unwrap_or_default()
}
