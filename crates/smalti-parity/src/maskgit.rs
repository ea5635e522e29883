//! MaskGIT: the official JAX code.

use super::case::Case;
use super::comparison::Comparison;
use super::gradients;
use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::Device;
use serde::Deserialize;
use smalti_base::{Error, Layout, Result, TokenSpec};
use smalti_models::checkpoint::Rules;
use smalti_models::generators::{MaskGit, MaskGitConfig};
use smalti_models::sampling::{Draws, Sampling, Schedule, argmax};
use smalti_models::{Condition, ConditionConfig, Generation, ImageRequest, Known, Request};

pub(super) fn knows_schedules(case: &Case) -> bool {
    case.has(&["ratio"]) && case.has_settings(&["methods", "totals"])
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
    case.has(&["tokens", "labels", "mask", "logits"]) && case.has_settings(&["hidden_size", "intermediate_size"])
}

/// The official settings.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Official {
    codebook_size: usize,
    num_class: usize,
    latent: usize,
    hidden_size: usize,
    num_layers: usize,
    num_heads: usize,
    intermediate_size: usize,
    choice_temperature: f32,
    vocab_size: Option<usize>,
    #[serde(default = "tenth")]
    label_smoothing: f32,
}

fn tenth() -> f32 {
    0.1
}

fn official(case: &Case) -> Result<Official> {
    case.only("mask_token_id", -1)?;
    case.only("layer_norm_eps", 1e-12)?;
    case.only("gelu", "tanh approximation")?;
    case.ignore(&["dropout", "num_iter"]);
    let official: Official = case.setting("")?;
    let words = official.codebook_size + official.num_class + 1;
    match official.vocab_size {
        Some(found) if found != words => Err(Error::unsupported(
            format!("{}: config.vocab_size = {found}", case.title()),
            format!("codes, classes and the mask are {words}"),
        )),
        _ => Ok(official),
    }
}

/// The model of a case.
fn model(case: &Case, schedule: Schedule, device: &Device) -> Result<MaskGit> {
    let official = official(case)?;
    let (side, codes) = (official.latent, official.codebook_size);
    let config = MaskGitConfig {
        tokens: TokenSpec::discrete(Layout::Grid { h: side, w: side }, codes, (16 * side, 16 * side)),
        condition: ConditionConfig::Class { classes: official.num_class }.into(),
        condition_dropout: 0.0,
        width: official.hidden_size,
        depth: official.num_layers,
        heads: official.num_heads,
        mlp_ratio: 4,
        hidden: Some(official.intermediate_size),
        dropout: 0.0,
        attention_dropout: 0.0,
        schedule,
        label_smoothing: official.label_smoothing,
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
    let loss = model.masked_loss(case.ids("tokens")?, labels, &masks, model.config.label_smoothing).loss;
    compare.floats("loss", loss.clone())?;
    let gradients = GradientsParams::from_grads(loss.backward(), &model);
    gradients::Official::new(case, "maskgit", "generator")?.compare(case, compare, &model, &gradients)?;

    for stage in case.names().filter_map(|name| name.strip_suffix(".result")) {
        let name = stage.strip_prefix("gen_").unwrap_or("cosine").to_string();
        let name = case.told(&format!("{stage}.result"), "schedule").unwrap_or(name);
        replay(case, compare, stage, Schedule::try_from(name)?)?;
    }
    Ok(())
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
    let (codes, places) = (official(case)?.codebook_size, model.config.tokens.length() + 1);
    let shape = case.shape(&name("all_steps"))?;
    let noise = case.shape(&name("gumbel_choice"))?;
    let ([images, steps, _], [executed, ..]) = (&shape[..], &noise[..]) else {
        return Err(Error::invalid(case.title(), format!("{stage} has {shape:?} and {noise:?}")));
    };
    let (images, steps, first_step) = (*images, *steps, steps.saturating_sub(*executed));
    let start = case.ints(&name("input_ids"))?;
    let requests = start.chunks(places).map(|row| ImageRequest {
        known: Some(Known {
            tokens: row[1..].iter().map(|id| (*id).max(0) as u32).collect::<Vec<u32>>().into(),
            keep: row[1..].iter().map(|id| *id >= 0).collect(),
        }),
        ..ImageRequest::new(Condition::class((row[0] - codes as i64) as u32), 0)
    });
    let sampling = Sampling {
        steps: Some(steps),
        first_step,
        choice_temperature: match case.told(&name("result"), "choice_temperature") {
            Ok(temperature) => temperature,
            Err(_) => official(case)?.choice_temperature,
        },
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
        generation.step()?;
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
