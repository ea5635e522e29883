//! The transformer: teacher forcing, whole generations, editing and smooth sampling.

use super::tokenizer::{Scales, known};
use crate::case::Case;
use crate::comparison::Comparison;
use crate::gradients::Official;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::Deserialize;
use smalti_base::{Error, Layout, Result};
use smalti_models::checkpoint::Rules;
use smalti_models::generators::var::VarGeneration;
use smalti_models::generators::{Var, VarConfig};
use smalti_models::sampling::{Draws, GuidanceSchedule, Sampling, argmax};
use smalti_models::tokenizers::{Tokenizer, Vqgan};
use smalti_models::{Codes, Condition, ConditionConfig, Generation, Generator, ImageRequest, Known, Request};
use smalti_nn::attention::Visible;

const VAE: &str = "vae_weights.safetensors";

/// The official settings of a transformer.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Transformer {
    num_classes: usize,
    depth: usize,
    embed_dim: usize,
    num_heads: usize,
    #[serde(default = "four")]
    mlp_ratio: f64,
    #[serde(default = "epsilon")]
    norm_eps: f64,
    #[serde(default)]
    shared_aln: bool,
    #[serde(default = "tenth")]
    cond_drop_rate: f32,
    #[serde(default)]
    attn_l2_norm: bool,
    patch_nums: Vec<usize>,
}

fn four() -> f64 {
    4.0
}

fn epsilon() -> f64 {
    1e-6
}

fn tenth() -> f32 {
    0.1
}

impl Transformer {
    fn read(case: &Case) -> Result<Self> {
        // Cases have no dropout: what they hold is compared without. The rest is about speed.
        for key in ["drop_rate", "attn_drop_rate", "drop_path_rate", "flash_if_available", "fused_if_available"] {
            case.ignore(&[&format!("var.{key}")]);
        }
        let transformer: Self = case.setting("var")?;
        let levels: Vec<usize> = case.setting("vae.v_patch_nums")?;
        match transformer.patch_nums == levels {
            true => Ok(transformer),
            false => Err(Error::Mismatch {
                what: format!("the levels of {}", case.title()),
                left_name: "var.patch_nums".into(),
                left: format!("{:?}", transformer.patch_nums),
                right_name: "vae.v_patch_nums".into(),
                right: format!("{levels:?}"),
                hint: None,
            }),
        }
    }
}

/// Both networks of a case.
fn networks(case: &Case, device: &Device) -> Result<(Vqgan, Var)> {
    let vae = Scales::read(case, "vae")?;
    let vqgan = vae.import(case, VAE, device)?;
    let transformer = Transformer::read(case)?;
    let config = VarConfig {
        tokens: vqgan.spec().clone(),
        channels: vae.z_channels,
        refinement: vae.config().refinement,
        condition: ConditionConfig::Class { classes: transformer.num_classes }.into(),
        condition_dropout: transformer.cond_drop_rate,
        width: transformer.embed_dim,
        depth: transformer.depth,
        heads: transformer.num_heads,
        mlp_ratio: 4,
        hidden: Some((transformer.embed_dim as f64 * transformer.mlp_ratio).round_ties_even() as usize),
        unit_attention: transformer.attn_l2_norm,
        shared_modulation: transformer.shared_aln,
        drop_path: 0.0,
        label_smoothing: 0.0,
        norm_epsilon: transformer.norm_eps,
        first_gain: 1e-5,
    };
    let (mut var, _) = Rules::builtin("var", "generator")?.import(config.init(device)?, &case.weights("")?)?;
    var.adopt(&vqgan)?;
    Ok((vqgan, var))
}

pub(crate) fn knows_transformer(case: &Case) -> bool {
    case.has(&["image", "labels", "gt_tokens", "var_input", "logits", "tokens_in", "loss"])
}

pub(crate) fn transformer(case: &Case, compare: &mut Comparison) -> Result<()> {
    let (vqgan, var) = networks(case, case.device())?;
    let codes = vqgan.quantize.encode(vqgan.latents(case.tensor("image")?));
    compare.ids("gt_tokens", codes.clone())?;
    compare.floats("var_input", known(&var.quantize, codes.clone())?)?;
    compare.ints("lvl_1L", &var.level_ids().into_iter().map(i64::from).collect::<Vec<_>>())?;
    if let Visible::Except(hidden) = var.visible(case.device()) {
        compare.ids("attn_mask", hidden.int())?;
    }
    let labels = case.ids::<1>("labels")?.unsqueeze_dim::<2>(1);
    let modulations = var.modulations(labels.clone());
    let mut x = var.inputs(&modulations, codes.clone());
    compare.floats("tokens_in", x.clone())?;
    for (i, (block, parts)) in var.blocks.iter().zip(&modulations.blocks).enumerate() {
        x = block.forward(x, parts, &var.visible(case.device()));
        let name = format!("block{i}_out");
        if case.has(&[&name]) {
            compare.floats(&name, x.clone())?;
        }
    }
    compare.floats("logits", var.logits(labels.clone(), codes.clone()))?;
    let null = labels.zeros_like() + var.config.condition.null() as i32;
    compare.floats("logits_uncond", var.logits(null, codes))?;
    losses(case, compare)?;
    let names: Vec<String> = case.names().map(str::to_string).collect();
    for stage in names.iter().filter_map(|name| name.strip_suffix(".fhat_last")) {
        if let Some(Ok(cfg)) = stage.strip_prefix("gen_cfg").map(str::parse::<f32>) {
            generation(case, compare, (&vqgan, &var), stage, cfg)?;
        }
    }
    if case.has(&["edit.mask", "edit.image"]) {
        editing(case, compare, &vqgan, &var)?;
    }
    match case.has(&["smooth.fhat_last", "smooth.image"]) {
        true => smooth(case, compare, &vqgan, &var),
        false => Ok(()),
    }
}

fn labels(case: &Case) -> Result<Vec<Condition>> {
    Ok(case.ints("labels")?.iter().map(|label| Condition::class(*label as u32)).collect())
}

/// Loss and gradients of teacher forcing.
fn losses(case: &Case, compare: &mut Comparison) -> Result<()> {
    let (_, var) = networks(case, &case.autodiff())?;
    let codes = TensorData::new(case.ints("gt_tokens")?.to_vec(), case.shape("gt_tokens")?);
    let codes = Tensor::<2, Int>::from_data(codes, &case.autodiff());
    let predictions = var.predictions(Codes::Discrete(codes), &labels(case)?, 0)?;
    let names: Vec<String> = case.names().map(str::to_string).collect();
    for name in &names {
        if let Some(Ok(share)) = name.strip_prefix("loss_label_smooth_").map(str::parse) {
            compare.floats(name, predictions.smoothed_loss(share).loss)?;
        }
    }
    let loss = predictions.loss().loss;
    compare.floats("loss", loss.clone())?;
    let gradients = GradientsParams::from_grads(loss.backward(), &var);
    Official::new(case, "var", "generator")?.compare(case, compare, &var, &gradients)
}

/// Draws of a case: the most likely token, and noise by level, `[images, places, codes]`.
struct Given {
    first: Vec<usize>,
    noise: Vec<Vec<f32>>,
    images: usize,
}

impl Given {
    fn new(var: &Var, images: usize) -> Self {
        let sizes = var.quantize.config.levels.iter().map(|(h, w)| h * w);
        let first = sizes.scan(0, |end, size| Some(std::mem::replace(end, *end + size))).collect();
        Self { first, noise: Vec::new(), images }
    }
}

impl Draws for Given {
    fn token(&self, _: usize, _: usize, _: usize, logits: &[f32]) -> usize {
        argmax(logits)
    }

    fn confidence_noise(&self, _: usize, _: usize, _: usize) -> f32 {
        0.0
    }

    fn noise(&self, image: usize, step: usize, place: usize, codes: usize) -> Vec<f32> {
        let level = &self.noise[step];
        let places = level.len() / codes / self.images;
        level[(image * places + place - self.first[step]) * codes..][..codes].to_vec()
    }
}

/// Starts a generation; the official strength of guidance is one less than ours, and grows from step to step.
fn start(
    var: &Var,
    images: Vec<(Condition, Option<Known>)>,
    cfg: f32,
    noise: Option<Vec<Vec<f32>>>,
) -> Result<VarGeneration> {
    let sampling = Sampling {
        guidance: 1.0 + cfg,
        guidance_schedule: GuidanceSchedule::Linear,
        smooth: noise.is_some(),
        ..Default::default()
    };
    let draws = Given { noise: noise.unwrap_or_default(), ..Given::new(var, images.len()) };
    let images = images
        .into_iter()
        .map(|(condition, known)| ImageRequest { known, ..ImageRequest::new(condition, 0) })
        .collect();
    var.start_with(&Request::new(images, sampling), Box::new(draws))
}

/// Decodes what came out, in 0..1.
fn picture(vqgan: &Vqgan, generation: &VarGeneration) -> Result<Tensor<4>> {
    Ok((vqgan.decode(&generation.codes())?.clamp(-1.0, 1.0) + 1.0) * 0.5)
}

fn finish(compare: &mut Comparison, vqgan: &Vqgan, generation: &VarGeneration, stage: &str) -> Result<()> {
    let latents = generation.latents().cloned();
    let latents = latents.ok_or_else(|| Error::invalid(stage, "nothing was generated"))?;
    compare.floats(&format!("{stage}.fhat_last"), latents)?;
    compare.floats(&format!("{stage}.image"), picture(vqgan, generation)?)
}

fn generation(
    case: &Case,
    compare: &mut Comparison,
    (vqgan, var): (&Vqgan, &Var),
    stage: &str,
    cfg: f32,
) -> Result<()> {
    let images = labels(case)?.into_iter().map(|condition| (condition, None)).collect();
    let mut generation = start(var, images, cfg, None)?;
    for level in 0..generation.steps() {
        let logits = generation.logits();
        compare.floats(&format!("{stage}.logits_{level}"), logits.clone())?;
        compare.ids(&format!("{stage}.idx_{level}"), logits.argmax(2))?;
        generation.step()?;
    }
    finish(compare, vqgan, &generation, stage)
}

fn editing(case: &Case, compare: &mut Comparison, vqgan: &Vqgan, var: &Var) -> Result<()> {
    let layout: &Layout = &var.config.tokens.layout;
    let finest: Vec<bool> = case.floats("edit.mask")?.iter().map(|keep| *keep > 0.5).collect();
    let keep = Known::keep(layout, &finest);
    let rows = case.ints("gt_tokens")?.chunks(layout.length());
    let images = labels(case)?.into_iter().zip(rows).map(|(condition, row)| {
        let codes: Vec<u32> = row.iter().map(|code| *code as u32).collect();
        (condition, Some(Known { tokens: codes.into(), keep: keep.clone() }))
    });
    let mut generation = start(var, images.collect(), case.said("edit.image", "cfg=")? as f32, None)?;
    for level in 0..generation.steps() {
        compare.ids(&format!("edit.idx_{level}"), generation.logits().argmax(2))?;
        generation.step()?;
    }
    compare.floats("edit.image", picture(vqgan, &generation)?)
}

fn smooth(case: &Case, compare: &mut Comparison, vqgan: &Vqgan, var: &Var) -> Result<()> {
    let noise = (0..var.quantize.levels()).map(|level| Ok(case.floats(&format!("smooth.gumbel_{level}"))?.to_vec()));
    let images = labels(case)?.into_iter().map(|condition| (condition, None)).collect();
    let cfg = case.said("smooth.fhat_last", "cfg=")? as f32;
    let mut generation = start(var, images, cfg, Some(noise.collect::<Result<_>>()?))?;
    generation.finish()?;
    finish(compare, vqgan, &generation, "smooth")
}
