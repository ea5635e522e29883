//! The transformer: teacher forcing, whole generations, editing and smooth sampling.

use super::read;
use super::tokenizer::{Autoencoder, compare_gradient, known, multi_scale};
use crate::golden::case::{Case, Comparison, gradient};
use burn::module::Param;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::Deserialize;
use smalti_base::{Error, Layout, Result};
use smalti_models::checkpoint::Rules;
use smalti_models::generators::var::{Modulation, VarGeneration};
use smalti_models::generators::{Var, VarConfig};
use smalti_models::sampling::{Draws, GuidanceSchedule, Sampling, argmax};
use smalti_models::tokenizers::{Tokenizer, TokenizerModel, Vqgan};
use smalti_models::{Codes, Condition, ConditionConfig, Generation, ImageRequest, Known, Request};
use smalti_nn::attention::Visible;

const VAE: &str = "vae_weights.safetensors";

/// The official settings of a transformer.
#[derive(Deserialize)]
struct Transformer {
    num_classes: usize,
    depth: usize,
    embed_dim: usize,
    num_heads: usize,
    mlp_ratio: f64,
    norm_eps: f64,
    shared_aln: bool,
    cond_drop_rate: f32,
    attn_l2_norm: bool,
}

/// Both networks of a case.
fn networks(case: &Case, device: &Device) -> Result<(Vqgan, Var)> {
    let vae: Autoencoder = read(case, &case.setting("vae")?)?;
    let vqgan = vae.import(case, VAE, device)?;
    let transformer: Transformer = case.setting("var")?;
    let config = VarConfig {
        tokens: vqgan.spec().clone(),
        channels: vae.scales.z_channels,
        refinement: vae.scales.config().refinement,
        condition: ConditionConfig::Class { classes: transformer.num_classes },
        condition_dropout: transformer.cond_drop_rate,
        width: transformer.embed_dim,
        depth: transformer.depth,
        heads: transformer.num_heads,
        mlp_ratio: transformer.mlp_ratio as usize,
        unit_attention: transformer.attn_l2_norm,
        shared_modulation: transformer.shared_aln,
        drop_path: 0.0,
        label_smoothing: 0.0,
        norm_epsilon: transformer.norm_eps,
        first_gain: 1e-5,
    };
    let (var, _) = Rules::builtin("var", "generator")?.import(config.init(device)?, &case.weights("")?)?;
    let var = var.adopt(multi_scale(&vqgan)?)?;
    Ok((vqgan, var))
}

pub(in crate::golden) fn knows_transformer(case: &Case) -> bool {
    case.has(&["image", "labels", "gt_tokens", "var_input", "logits", "tokens_in", "loss"])
        && case.setting::<f64>("var.mlp_ratio").is_ok_and(|ratio| ratio.fract() == 0.0)
        && case.setting::<Vec<usize>>("var.patch_nums").ok() == case.setting("vae.v_patch_nums").ok()
}

pub(in crate::golden) fn transformer(case: &Case, compare: &mut Comparison) -> Result<()> {
    let (vqgan, var) = networks(case, case.device())?;
    let codes = vqgan.encode(case.tensor("image")?);
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
    Ok(case.ints("labels")?.iter().map(|label| Condition::Class(*label as u32)).collect())
}

/// Loss and gradients of teacher forcing.
fn losses(case: &Case, compare: &mut Comparison) -> Result<()> {
    let (_, var) = networks(case, &case.autodiff())?;
    let codes = TensorData::new(case.ints("gt_tokens")?.to_vec(), case.shape("gt_tokens")?);
    let codes = Tensor::<2, Int>::from_data(codes, &case.autodiff());
    let predictions = var.predictions(Codes::Discrete(codes), &labels(case)?)?;
    let names: Vec<String> = case.names().map(str::to_string).collect();
    for name in &names {
        if let Some(Ok(share)) = name.strip_prefix("loss_label_smooth_").map(str::parse) {
            compare.floats(name, predictions.smoothed_loss(share).loss)?;
        }
    }
    let loss = predictions.loss().loss;
    compare.floats("loss", loss.clone())?;
    let gradients = GradientsParams::from_grads(loss.backward(), &var);
    let dense = |param: &Param<Tensor<2>>| gradients.get::<2>(param.id).map(Tensor::transpose);
    compare_gradient(case, compare, &gradients, "class_emb.weight", &var.classes.table)?;
    for (official, table) in
        [("lvl_embed.weight", &var.levels.table), ("pos_start", &var.start.table), ("pos_1LC", &var.positions.table)]
    {
        compare_gradient(case, compare, &gradients, official, table)?;
    }
    let mut found = vec![
        ("word_embed.weight".to_string(), dense(&var.words.weight)),
        ("head.weight".into(), dense(&var.head.weight)),
        ("head_nm.ada_lin.1.weight".into(), dense(&var.head_modulation.weight)),
    ];
    if let Some(shared) = &var.shared {
        found.push(("shared_ada_lin.1.weight".into(), dense(&shared.weight)));
    }
    for (i, block) in var.blocks.iter().enumerate() {
        let layers = [&block.attention.query, &block.attention.key, &block.attention.value];
        let qkv: Option<Vec<_>> = layers.iter().map(|layer| dense(&layer.weight)).collect();
        found.push((format!("blocks.{i}.attn.mat_qkv.weight"), qkv.map(|qkv| Tensor::cat(qkv, 0))));
        found.push((format!("blocks.{i}.attn.proj.weight"), dense(&block.attention.output.weight)));
        found.push((format!("blocks.{i}.ffn.fc1.weight"), dense(&block.mlp.expand.weight)));
        found.push((format!("blocks.{i}.ffn.fc2.weight"), dense(&block.mlp.contract.weight)));
        match &block.modulation {
            Modulation::Own(layer) => found.push((format!("blocks.{i}.ada_lin.1.weight"), dense(&layer.weight))),
            Modulation::Shared(offsets) => {
                compare_gradient(case, compare, &gradients, &format!("blocks.{i}.ada_gss"), offsets)?;
            }
        }
        if let Some(log_scale) = &block.attention.log_scale {
            compare_gradient(case, compare, &gradients, &format!("blocks.{i}.attn.scale_mul_1H11"), log_scale)?;
        }
    }
    for (official, value) in found {
        let name = format!("grad.{official}");
        if case.has(&[&name]) {
            compare.floats(&name, gradient(&name, value)?)?;
        }
    }
    Ok(())
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
    let images = images.into_iter().map(|(condition, known)| ImageRequest { condition, seed: 0, known }).collect();
    var.start_with(&Request::new(images, sampling), Box::new(draws))
}

/// Decodes what came out, in 0..1.
fn picture(vqgan: &Vqgan, generation: &VarGeneration) -> Tensor<4> {
    (TokenizerModel::Vqgan(vqgan.clone()).decode(&generation.codes()).clamp(-1.0, 1.0) + 1.0) * 0.5
}

fn finish(compare: &mut Comparison, vqgan: &Vqgan, generation: &VarGeneration, stage: &str) -> Result<()> {
    let latents = generation.latents().cloned();
    let latents = latents.ok_or_else(|| Error::invalid(stage, "nothing was generated"))?;
    compare.floats(&format!("{stage}.fhat_last"), latents)?;
    compare.floats(&format!("{stage}.image"), picture(vqgan, generation))
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
        generation.next();
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
        generation.next();
    }
    compare.floats("edit.image", picture(vqgan, &generation))
}

fn smooth(case: &Case, compare: &mut Comparison, vqgan: &Vqgan, var: &Var) -> Result<()> {
    let noise = (0..var.quantize.levels()).map(|level| Ok(case.floats(&format!("smooth.gumbel_{level}"))?.to_vec()));
    let images = labels(case)?.into_iter().map(|condition| (condition, None)).collect();
    let cfg = case.said("smooth.fhat_last", "cfg=")? as f32;
    let mut generation = start(var, images, cfg, Some(noise.collect::<Result<_>>()?))?;
    while generation.done() < generation.steps() {
        generation.next();
    }
    finish(compare, vqgan, &generation, "smooth")
}
