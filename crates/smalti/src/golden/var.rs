//! VAR: resampling, sampling, the quantizer, the tokenizer and the transformer, against the official code.

use super::case::{Case, Comparison, gradient};
use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::{Deserialize, de::DeserializeOwned};
use smalti_base::{Error, Layout, Result};
use smalti_models::checkpoint::Rules;
use smalti_models::generators::var::{Modulation, VarGeneration};
use smalti_models::generators::{Var, VarConfig};
use smalti_models::losses::TokenizerLossConfig;
use smalti_models::quantizers::multi_scale::Refinement;
use smalti_models::quantizers::vq::Metric;
use smalti_models::quantizers::{MultiScale, MultiScaleConfig, Quantizer, QuantizerConfig, QuantizerModel, VqConfig};
use smalti_models::sampling::{Draws, GuidanceSchedule, Sampling, argmax, filter, softmax};
use smalti_models::tokenizers::{Tokenizer, TokenizerModel, Vqgan, VqganConfig};
use smalti_models::{Codes, Condition, ConditionConfig, Generation, ImageRequest, Known, Request};
use smalti_nn::attention::Visible;
use smalti_nn::{Interpolation, Resize, Shortcut};
use smalti_train::Schedule;
use smalti_train::schedule::Fall;

const VAE: &str = "vae_weights.safetensors";

fn read<T: DeserializeOwned>(case: &Case, value: &serde_json::Value) -> Result<T> {
    serde_json::from_value(value.clone()).map_err(|e| Error::invalid(case.title(), format!("config: {e}")))
}

pub(super) fn knows_resampling(case: &Case) -> bool {
    case.names().any(|name| name.starts_with("bicubic_out_")) && case.names().any(|name| name.starts_with("area_out_"))
}

pub(super) fn resampling(case: &Case, compare: &mut Comparison) -> Result<()> {
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

pub(super) fn knows_sampling(case: &Case) -> bool {
    case.has(&["logits", "sched_it"]) && case.names().any(|name| name.starts_with("probs_k"))
}

pub(super) fn sampling(case: &Case, compare: &mut Comparison) -> Result<()> {
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
                top_k: (k > 0.0).then_some(k as usize),
                top_p: (p > 0.0).then_some(p),
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
        final_fraction: case.said(name, "wpe=")?,
        fall,
        final_weight_decay,
    })
}

/// The official settings of a quantizer.
#[derive(Deserialize)]
struct Scales {
    vocab_size: usize,
    #[serde(alias = "Cvae")]
    z_channels: usize,
    using_znorm: bool,
    beta: f64,
    #[serde(default)]
    default_qresi_counts: usize,
    quant_resi: f64,
    share_quant_resi: usize,
    v_patch_nums: Vec<usize>,
}

impl Scales {
    fn config(&self) -> MultiScaleConfig {
        let levels: Vec<(usize, usize)> = self.v_patch_nums.iter().map(|side| (*side, *side)).collect();
        let convolutions = match (self.share_quant_resi, self.default_qresi_counts) {
            (0, 0) => levels.len(),
            (0, counts) => counts,
            (shared, _) => shared,
        };
        MultiScaleConfig {
            table: VqConfig {
                metric: if self.using_znorm { Metric::Cosine } else { Metric::Euclidean },
                beta: self.beta,
                ..VqConfig::new(self.vocab_size, self.z_channels)
            },
            refinement: Refinement { weight: self.weight(), convolutions },
            levels,
        }
    }

    /// The official code leaves convolutions of almost no weight out.
    fn weight(&self) -> f64 {
        Some(self.quant_resi.abs()).filter(|weight| *weight > 1e-6).unwrap_or(0.0)
    }
}

pub(super) fn knows_quantizer(case: &Case) -> bool {
    case.has(&["f", "idx_0", "fhat_0", "var_input", "train_out", "grad_embedding"])
}

pub(super) fn quantizer(case: &Case, compare: &mut Comparison) -> Result<()> {
    let config = read::<Scales>(case, &case.config)?.config();
    let quantizer = config.init(&case.autodiff())?;
    let (quantizer, _) = Rules::builtin("var", "quantizer")?.import(quantizer, &case.weights("")?)?;
    let codes = levels_of(compare, &quantizer.valid(), case.tensor("f")?)?;
    compare.floats("var_input", known(&quantizer.valid(), codes)?)?;
    if case.has(&["phi_index", "phi_ticks"]) {
        let choice = config.refinement.choice(config.levels.len());
        compare.ints("phi_index", &choice.iter().map(|i| *i as i64).collect::<Vec<_>>())?;
        let ticks = config.refinement.ticks();
        compare.values("phi_ticks", &ticks.iter().map(|tick| *tick as f32).collect::<Vec<_>>())?;
    }
    let f = case.tensor::<4>("f")?.autodiff().require_grad();
    let out = quantizer.train_forward(f.clone());
    compare.floats("train_out", out.latents_bchw.clone())?;
    let loss = out.loss.ok_or_else(|| Error::invalid("train_vq_loss", "the quantizer has no loss"))?;
    compare.floats("train_vq_loss", loss.clone())?;
    let n = f.shape().num_elements();
    let ramp: Vec<f32> = (0..n).map(|i| (-1.0 + 2.0 * i as f64 / (n - 1) as f64) as f32).collect();
    let ramp = Tensor::<4>::from_data(TensorData::new(ramp, f.shape()), case.device());
    let gradients = (loss + (out.latents_bchw * ramp).mean()).backward();
    compare.floats("grad_f", gradient("f", f.grad(&gradients))?)?;
    let table = gradient("embedding", quantizer.table.embedding.weight.grad(&gradients))?;
    compare.floats("grad_embedding", table)
}

/// Compares the codes of latents and their sums level by level; returns all codes.
fn levels_of(compare: &mut Comparison, quantizer: &MultiScale, f: Tensor<4>) -> Result<Tensor<2, Int>> {
    let codes = quantizer.encode(f);
    let mut first = 0;
    for (level, sum) in quantizer.sums(codes.clone()).into_iter().enumerate() {
        let (h, w) = quantizer.config.levels[level];
        compare.ids(&format!("idx_{level}"), codes.clone().narrow(1, first, h * w))?;
        compare.floats(&format!("fhat_{level}"), sum)?;
        first += h * w;
    }
    Ok(codes)
}

fn known(quantizer: &MultiScale, codes: Tensor<2, Int>) -> Result<Tensor<3>> {
    quantizer.known_before(codes).ok_or_else(|| Error::invalid("var_input", "there is one level only"))
}

/// The official settings of a tokenizer.
#[derive(Deserialize)]
struct Autoencoder {
    #[serde(flatten)]
    scales: Scales,
    ch: usize,
    norm_groups: usize,
    dropout: f64,
    quant_conv_ks: usize,
}

impl Autoencoder {
    /// With the levels and blocks that the official code always has.
    fn import(&self, case: &Case, weights: &str, device: &Device) -> Result<Vqgan> {
        let [_, _, image_size, _] = case.tensor::<4>("image")?.dims();
        let ch_mult = vec![1, 1, 2, 2, 4];
        let config = VqganConfig {
            image_size,
            in_channels: 3,
            out_channels: 3,
            ch: self.ch,
            num_res_blocks: 2,
            attn_resolutions: vec![image_size >> (ch_mult.len() - 1)],
            ch_mult,
            mid_attention: true,
            dropout: self.dropout,
            z_channels: self.scales.z_channels,
            embed_dim: self.scales.z_channels,
            quant_kernel: self.quant_conv_ks,
            norm_groups: self.norm_groups,
            norm_epsilon: 1e-6,
            resamp_with_conv: true,
            shortcut: Shortcut::Pointwise,
            quantizer: QuantizerConfig::MultiScale(self.scales.config()),
        };
        let weights = case.weights_of(weights, "")?;
        Ok(Rules::builtin("var", "tokenizer")?.import(config.init(device)?, &weights)?.0)
    }
}

fn multi_scale(vqgan: &Vqgan) -> Result<&MultiScale> {
    match &vqgan.quantize {
        QuantizerModel::MultiScale(quantizer) => Ok(quantizer),
        _ => Err(Error::invalid("tokenizer", "its quantizer is of another kind")),
    }
}

pub(super) fn knows_tokenizer(case: &Case) -> bool {
    case.has(&["image", "encoder_out", "f", "idx_0", "fhat_0", "recon_last", "train_vq_loss"])
}

pub(super) fn tokenizer(case: &Case, compare: &mut Comparison) -> Result<()> {
    let official: Autoencoder = read(case, &case.config)?;
    let vqgan = official.import(case, "weights.safetensors", case.device())?;
    let quantizer = multi_scale(&vqgan)?;
    let image = case.tensor::<4>("image")?;
    compare.floats("encoder_out", vqgan.encoder.forward(image.clone()))?;
    let f = vqgan.latents(image);
    compare.floats("f", f.clone())?;
    let codes = levels_of(compare, quantizer, f)?;
    compare.floats("var_input", known(quantizer, codes.clone())?)?;
    let sums = quantizer.sums(codes.clone());
    let decode = |latents: &Tensor<4>| vqgan.to_pixels(vqgan.features(latents.clone()));
    compare.floats("recon_0", decode(&sums[0]).clamp(-1.0, 1.0))?;
    let next = sums[0].clone() + quantizer.contribution(quantizer.map_of(case.ids("idx_1")?, 1), 1);
    compare.floats("step1_next_input", quantizer.shrunk(next.clone(), 2))?;
    compare.floats("step1_fhat", next)?;
    let raw = TokenizerModel::Vqgan(vqgan.clone()).decode(&Codes::Discrete(codes));
    compare.floats("decoder_raw_last", raw.clone())?;
    compare.floats("recon_last", raw.clamp(-1.0, 1.0))?;
    training(case, compare, &official)
}

/// The ordinary step of training a tokenizer.
fn training(case: &Case, compare: &mut Comparison, official: &Autoencoder) -> Result<()> {
    let model = TokenizerModel::Vqgan(official.import(case, "weights.safetensors", &case.autodiff())?);
    let config = TokenizerLossConfig {
        l1: 0.0,
        l2: 1.0,
        perceptual: None,
        perceptual_weight: 0.0,
        adversarial: None,
        codebook_weight: 1.0,
    };
    let step = config.init(model.spec(), case.device())?.step(&model, None, case.tensor("image")?, 0);
    compare.floats("train_recon", step.reconstruction)?;
    for (name, ours) in [("train_rec_loss", "l2"), ("train_vq_loss", "codebook")] {
        let term = step.terms.iter().find(|(term, _)| *term == ours).map(|(_, value)| value.clone());
        compare.floats(name, term.ok_or_else(|| Error::invalid(name, "the training step has no such term"))?)?;
    }
    let TokenizerModel::Vqgan(vqgan) = &model else { return Ok(()) };
    let quantizer = multi_scale(vqgan)?;
    let mut convolutions = vec![
        ("encoder.conv_in".to_string(), &vqgan.encoder.conv_in),
        ("decoder.conv_out".into(), &vqgan.decoder.conv_out),
        ("quant_conv".into(), &vqgan.quant_conv),
        ("post_quant_conv".into(), &vqgan.post_quant_conv),
    ];
    for (i, conv) in quantizer.phi.iter().enumerate() {
        convolutions.push(match (official.scales.share_quant_resi, i) {
            (0, i) => (format!("quantize.quant_resi.{i}"), conv),
            (1, _) => ("quantize.quant_resi.qresi".into(), conv),
            (_, i) => (format!("quantize.quant_resi.qresi_ls.{i}"), conv),
        });
    }
    for (name, conv) in convolutions {
        compare_gradient(case, compare, &step.gradients, &format!("{name}.weight"), &conv.weight)?;
    }
    let table = &quantizer.table.embedding.weight;
    compare_gradient(case, compare, &step.gradients, "quantize.embedding.weight", table)
}

fn compare_gradient<const D: usize>(
    case: &Case,
    compare: &mut Comparison,
    gradients: &GradientsParams,
    official: &str,
    param: &Param<Tensor<D>>,
) -> Result<()> {
    let name = format!("grad.{official}");
    match case.has(&[&name]) {
        true => compare.floats(&name, gradient(&name, gradients.get::<D>(param.id))?),
        false => Ok(()),
    }
}

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

pub(super) fn knows_transformer(case: &Case) -> bool {
    case.has(&["image", "labels", "gt_tokens", "var_input", "logits", "tokens_in", "loss"])
        && case.setting::<f64>("var.mlp_ratio").is_ok_and(|ratio| ratio.fract() == 0.0)
        && case.setting::<Vec<usize>>("var.patch_nums").ok() == case.setting("vae.v_patch_nums").ok()
}

pub(super) fn transformer(case: &Case, compare: &mut Comparison) -> Result<()> {
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
    let predictions = var.predictions(codes, &labels(case)?)?;
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
    fn token(&mut self, _: usize, _: usize, _: usize, logits: &[f32]) -> usize {
        argmax(logits)
    }

    fn confidence_noise(&mut self, _: usize, _: usize, _: usize) -> f32 {
        0.0
    }

    fn noise(&mut self, image: usize, step: usize, place: usize, codes: usize) -> Vec<f32> {
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
    var.start_with(&Request { images, sampling }, Box::new(draws))
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
        let codes = row.iter().map(|code| *code as u32).collect();
        (condition, Some(Known { codes, keep: keep.clone() }))
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
