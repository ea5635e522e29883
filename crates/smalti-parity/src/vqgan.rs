//! VQGAN: blocks, and the whole model with its losses, against taming-transformers.

use super::case::Case;
use super::comparison::Comparison;
use super::gradients::Official;
use super::patch_losses::Losses;
use burn::module::Module;
use burn::tensor::{Device, Tensor};
use serde::Deserialize;
use smalti_base::{Error, Planes, Result};
use smalti_models::checkpoint::Rules;
use smalti_models::losses::{Discriminator, Perceptual, TokenizerLoss, TokenizerStep};
use smalti_models::quantizers::vq::Learning;
use smalti_models::quantizers::{Pass, QuantizerConfig, VqConfig};
use smalti_models::tokenizers::{Tokenizer, TokenizerModel, Vqgan, VqganConfig};
use smalti_nn::{AttnBlock, Downsample, PatchGan, ResnetBlockConfig, Shortcut, Upsample};

pub(super) fn knows_blocks(case: &Case) -> bool {
    case.has(&["x32", "x64", "res_nin", "attn", "down", "up"])
}

pub(super) fn blocks(case: &Case, compare: &mut Comparison) -> Result<()> {
    let device = case.device();
    let (narrow, wide) = (case.tensor::<4>("x32")?, case.tensor::<4>("x64")?);
    let ([_, inputs, ..], [_, outputs, ..]) = (narrow.dims(), wide.dims());
    for (name, shortcut, x) in [
        ("res_nin", Shortcut::Pointwise, &narrow),
        ("res_same", Shortcut::Pointwise, &wide),
        ("res_convshort", Shortcut::Full, &narrow),
    ] {
        let config = ResnetBlockConfig { shortcut, ..ResnetBlockConfig::new(x.dims()[1], outputs) };
        compare.floats(name, block(case, config.init(device), name)?.forward(x.clone()))?;
    }
    let attention = block(case, AttnBlock::new(outputs, 32, 1e-6, device), "attn")?;
    compare.floats("attn", attention.forward(wide.clone()))?;
    compare.floats("down", block(case, Downsample::new(outputs, true, device), "down")?.forward(wide.clone()))?;
    compare.floats("up", block(case, Upsample::new(inputs, true, device), "up")?.forward(narrow))?;
    compare.floats("down_avgpool", Downsample::new(outputs, false, device).forward(wide))
}

fn block<M: Module>(case: &Case, module: M, name: &str) -> Result<M> {
    Ok(Rules::builtin("vqgan", "block")?.import(module, &case.weights(&format!("{name}."))?)?.0)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Network {
    z_channels: usize,
    resolution: usize,
    in_channels: usize,
    out_ch: usize,
    ch: usize,
    #[serde(default = "levels")]
    ch_mult: Vec<usize>,
    num_res_blocks: usize,
    attn_resolutions: Vec<usize>,
    #[serde(default)]
    dropout: f64,
    resamp_with_conv: Option<bool>,
}

fn levels() -> Vec<usize> {
    vec![1, 2, 4, 8]
}

/// What the official network can do beside this, at `place` of the configuration, is off.
pub(super) fn only_usual_network(case: &Case, place: &str) -> Result<()> {
    let key = |name: &str| if place.is_empty() { name.to_string() } else { format!("{place}.{name}") };
    for name in ["tanh_out", "use_linear_attn", "give_pre_end"] {
        case.only(&key(name), false)?;
    }
    case.only(&key("attn_type"), "vanilla")
}

pub(super) fn knows_model(case: &Case) -> bool {
    case.has(&["image", "h_enc", "z", "indices", "rec"])
}

/// The autoencoder whose settings are below `place`, such as `first_stage.`.
pub(super) fn tokenizer(case: &Case, place: &str, legacy: bool, device: &Device) -> Result<Vqgan> {
    let at = |name: &str| format!("{place}ddconfig{name}");
    only_usual_network(case, &at(""))?;
    case.only(&at(".double_z"), false)?;
    for name in ["image_key", "monitor", "ckpt_path", "ignore_keys", "vgg_widths"] {
        case.ignore(&[&format!("{place}{name}")]);
    }
    let network: Network = case.setting(&at(""))?;
    if network.in_channels != network.out_ch {
        let what = format!("{}: config.{} = {}", case.title(), at(".out_ch"), network.out_ch);
        return Err(Error::unsupported(what, format!("pictures of {} channels come out", network.in_channels)));
    }
    let embed_dim = case.setting(&format!("{place}embed_dim"))?;
    let codes = case.setting(&format!("{place}n_embed"))?;
    let quantizer = VqConfig { codebook: Learning::Gradient { legacy }, ..VqConfig::new(codes, embed_dim) };
    let config = VqganConfig {
        image_size: network.resolution,
        in_channels: network.in_channels,
        out_channels: network.out_ch,
        label_maps: false,
        label_shift: 0,
        ch: network.ch,
        ch_mult: network.ch_mult,
        num_res_blocks: network.num_res_blocks,
        attn_resolutions: network.attn_resolutions,
        mid_attention: true,
        dropout: network.dropout,
        z_channels: network.z_channels,
        embed_dim,
        quant_kernel: 1,
        norm_groups: case.setting_or("norm_groups", 32)?,
        norm_epsilon: 1e-6,
        resamp_with_conv: network.resamp_with_conv.unwrap_or(true),
        shortcut: Shortcut::Pointwise,
        quantizer: QuantizerConfig::Vq(quantizer),
    };
    Ok(Rules::builtin("vqgan", "tokenizer")?.import(config.init(device)?, &case.weights("")?)?.0)
}

pub(super) fn model(case: &Case, compare: &mut Comparison) -> Result<()> {
    let device = case.device();
    let vqgan = tokenizer(case, "", true, device)?;
    let image = case.tensor::<4>("image")?;
    compare.floats("h_enc", vqgan.encoder.forward(image.clone()))?;
    let z = vqgan.latents(image.clone());
    compare.floats("z", z.clone())?;
    for (name, legacy) in [("emb_loss", true), ("emb_loss_legacy_false", false)] {
        let loss = tokenizer(case, "", legacy, device)?.quantize.train_forward(z.clone(), &Pass::default()).loss();
        compare.floats(name, loss.ok_or_else(|| Error::invalid(name, "the quantizer has no loss"))?)?;
    }
    let [_, _, h, w] = z.dims();
    let codes = vqgan.quantize.encode(z.clone());
    compare.ids("indices", codes.clone())?;
    compare.floats("z_q", vqgan.quantize.decode(codes.clone(), h, w))?;
    let quantized = vqgan.quantize.train_forward(z, &Pass::default()).latents_bchw;
    compare.floats("rec", vqgan.to_pixels(vqgan.features(quantized)))?;
    compare.floats("rec_from_indices", vqgan.decode(&smalti_models::Codes::Discrete(codes))?)?;
    match case.has_settings(&["lossconfig"]) {
        true => training(case, compare),
        false => Ok(()),
    }
}

fn perceptual(case: &Case) -> Result<Perceptual> {
    let weights = case.weights("")?;
    Perceptual::lpips(&weights, &weights, case.device())
}

fn loss(case: &Case, losses: &Losses, model: &TokenizerModel) -> Result<TokenizerLoss> {
    let network = (losses.perceptual_weight > 0.0).then(|| perceptual(case)).transpose()?;
    let loss = losses.config(case)?.init(model.spec(), case.device())?.with_perceptual(network);
    loss.with_planes(Planes::of_channels(case.setting("ddconfig.in_channels")?)?)
}

/// Losses at the steps of the case, of which some may be before the discriminator's start, and the last step's gradients.
fn training(case: &Case, compare: &mut Comparison) -> Result<()> {
    let device = case.autodiff();
    for key in ["lossconfig.kl_weight", "lossconfig.logvar_init", "lossconfig.global_step"] {
        case.only(key, serde_json::Value::Null)?;
    }
    let losses = Losses::read(case, "lossconfig")?;
    let image = case.tensor::<4>("image")?;
    if case.has(&["disc_eval_logits"]) {
        compare.floats("disc_eval_logits", losses.discriminator(case, case.device())?.forward(image.clone()))?;
    }
    if case.has(&["p_loss"]) && losses.perceptual_weight > 0.0 {
        compare.floats("p_loss", perceptual(case)?.distance(image.clone(), case.tensor("rec")?))?;
    }
    let (vqgan, discriminator) = (tokenizer(case, "", true, &device)?, losses.discriminator(case, &device)?);
    let model = TokenizerModel::Vqgan(vqgan);
    let (loss, judge) = (loss(case, &losses, &model)?, Discriminator::from(discriminator.clone()));
    let mut steps: Vec<u64> = case.names().filter_map(|name| name.strip_prefix("ae_loss_step")?.parse().ok()).collect();
    steps.sort_unstable();
    for step in &steps {
        let made = loss.step(&model, Some(&judge), image.clone(), &Pass::at(*step));
        compare.floats(&format!("ae_loss_step{step}"), term(&made.terms, "loss")?)?;
        let discriminators = format!("disc_loss_step{step}");
        match (case.has(&[&discriminators]), made.discriminator_gradients.is_some()) {
            (true, true) => {
                compare.floats(&discriminators, term(&made.terms, "discriminator")? * losses.disc_factor)?
            }
            // It has no gradient either.
            (true, false) => compare.values(&discriminators, &[0.0])?,
            (false, _) => {}
        }
        if Some(step) == steps.last() {
            last_step(case, compare, (&loss, &losses), (&model, &discriminator), made)?;
        }
    }
    Ok(())
}

/// What a case holds of the last of its steps.
fn last_step(
    case: &Case,
    compare: &mut Comparison,
    (loss, losses): (&TokenizerLoss, &Losses),
    (model, discriminator): (&TokenizerModel, &PatchGan),
    step: TokenizerStep,
) -> Result<()> {
    let image = case.tensor::<4>("image")?;
    if step.discriminator_gradients.is_some() {
        compare.floats("g_loss", term(&step.terms, "generator")?)?;
        compare.floats("d_weight", term(&step.terms, "adversarial_weight")? / losses.disc_factor)?;
    }
    let nll = term(&loss.evaluate(image.clone(), step.reconstruction.clone()), "loss")?;
    compare.floats("nll_loss", nll)?;
    compare.floats("logits_real", discriminator.forward(image.autodiff()))?;
    compare.floats("logits_fake", discriminator.forward(step.reconstruction.autodiff()))?;
    let TokenizerModel::Vqgan(vqgan) = model else { return Ok(()) };
    Official::new(case, "vqgan", "tokenizer")?.compare(case, compare, vqgan, &step.gradients)?;
    match &step.discriminator_gradients {
        Some(gradients) => Official::new(case, "vqgan", "discriminator")?.scaled(losses.disc_factor).compare(
            case,
            compare,
            discriminator,
            gradients,
        ),
        None => Ok(()),
    }
}

fn term(terms: &[(&'static str, Tensor<1>)], name: &str) -> Result<Tensor<1>> {
    let found = terms.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone());
    found.ok_or_else(|| Error::invalid(name, "the training step has no such term"))
}
