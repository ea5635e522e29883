//! VQGAN: blocks, and the whole model with its losses, against taming-transformers.

use super::case::{Case, Comparison};
use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use serde::Deserialize;
use smalti_base::{Error, Planes, Result};
use smalti_models::checkpoint::Rules;
use smalti_models::losses::{
    AdversarialConfig, AdversarialKind, Critic, CriticConfig, Perceptual, TokenizerLoss, TokenizerLossConfig,
};
use smalti_models::quantizers::vq::Learning;
use smalti_models::quantizers::{Pass, Quantizer, QuantizerConfig, VqConfig};
use smalti_models::tokenizers::{Tokenizer, TokenizerModel, Vqgan, VqganConfig};
use smalti_nn::{AttnBlock, Downsample, PatchGan, PatchGanConfig, ResnetBlockConfig, Shortcut, Upsample};

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
struct Network {
    z_channels: usize,
    resolution: usize,
    in_channels: usize,
    out_ch: usize,
    ch: usize,
    ch_mult: Vec<usize>,
    num_res_blocks: usize,
    attn_resolutions: Vec<usize>,
    dropout: f64,
    #[serde(default)]
    resamp_with_conv: Option<bool>,
    #[serde(default)]
    double_z: bool,
}

#[derive(Deserialize)]
struct Losses {
    disc_start: u64,
    disc_weight: f64,
    codebook_weight: f64,
    perceptual_weight: f64,
    disc_num_layers: usize,
    disc_ndf: usize,
}

pub(super) fn knows_model(case: &Case) -> bool {
    case.has(&["image", "h_enc", "z", "indices", "rec"])
        && case
            .setting::<Network>("ddconfig")
            .is_ok_and(|network| !network.double_z && network.in_channels == network.out_ch)
}

/// The autoencoder whose settings are below `place`, such as `first_stage.`.
pub(super) fn tokenizer(case: &Case, place: &str, legacy: bool, device: &Device) -> Result<Vqgan> {
    let network: Network = case.setting(&format!("{place}ddconfig"))?;
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
        let loss = tokenizer(case, "", legacy, device)?.quantize.train_forward(z.clone()).loss;
        compare.floats(name, loss.ok_or_else(|| Error::invalid(name, "the quantizer has no loss"))?)?;
    }
    let [_, _, h, w] = z.dims();
    let codes = vqgan.quantize.encode(z.clone());
    compare.ids("indices", codes.clone())?;
    let model = TokenizerModel::Vqgan(vqgan);
    if let Some(quantizer) = model.quantizer() {
        compare.floats("z_q", quantizer.decode(codes.clone(), h, w))?;
    }
    let quantized = model.bottleneck(z, Pass::default()).latents_bchw;
    compare.floats("rec", model.to_pixels(model.features(quantized)))?;
    compare.floats("rec_from_indices", model.decode(&smalti_models::Codes::Discrete(codes)))?;
    if case.has(&["disc_eval_logits", "ae_loss_step100"]) {
        compare.floats("disc_eval_logits", critic(case, device)?.forward(image.clone()))?;
        let perceptual = perceptual(case)?;
        compare.floats("p_loss", perceptual.distance(image, case.tensor("rec")?))?;
        training(case, compare)?;
    }
    Ok(())
}

fn perceptual(case: &Case) -> Result<Perceptual> {
    let weights = case.weights("")?;
    Perceptual::lpips(&weights, &weights, case.device())
}

fn critic(case: &Case, device: &Device) -> Result<PatchGan> {
    let Losses { disc_ndf: ndf, disc_num_layers: layers, .. } = case.setting("lossconfig")?;
    let config = PatchGanConfig { in_channels: case.setting("lossconfig.disc_in_channels")?, ndf, layers };
    Ok(Rules::builtin("vqgan", "discriminator")?.import(config.init(device)?, &case.weights("")?)?.0)
}

fn loss(case: &Case, model: &TokenizerModel) -> Result<TokenizerLoss> {
    let losses: Losses = case.setting("lossconfig")?;
    let kind = match case.setting::<String>("lossconfig.disc_loss")?.as_str() {
        "hinge" => AdversarialKind::Hinge,
        "vanilla" => AdversarialKind::Vanilla,
        other => return Err(Error::unknown(case.title(), "discriminator loss", other, ["hinge", "vanilla"])),
    };
    let config = TokenizerLossConfig {
        l1: 1.0,
        l2: 0.0,
        perceptual: None,
        perceptual_weight: losses.perceptual_weight,
        adversarial: Some(AdversarialConfig {
            kind,
            weight: losses.disc_weight,
            start_step: losses.disc_start,
            adaptive: true,
            critic: CriticConfig::default(),
            ndf: losses.disc_ndf,
            layers: losses.disc_num_layers,
        }),
        codebook_weight: losses.codebook_weight,
        ..Default::default()
    };
    let loss = config.init(model.spec(), case.device())?.with_perceptual(Some(perceptual(case)?));
    loss.with_planes(Planes::of_channels(case.setting("ddconfig.in_channels")?)?)
}

/// Losses before and after the critic's start, and gradients.
fn training(case: &Case, compare: &mut Comparison) -> Result<()> {
    let device = case.autodiff();
    let (vqgan, critic) = (tokenizer(case, "", true, &device)?, critic(case, &device)?);
    let model = TokenizerModel::Vqgan(vqgan);
    let (loss, image) = (loss(case, &model)?, case.tensor::<4>("image")?);
    let term = |terms: &[(&'static str, Tensor<1>)], name: &str| {
        let found = terms.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone());
        found.ok_or_else(|| Error::invalid(name, "the training step has no such term"))
    };
    let judge = Critic::from(critic.clone());
    let before = loss.step(&model, Some(&judge), image.clone(), 0);
    compare.floats("ae_loss_step0", term(&before.terms, "loss")?)?;
    let step = loss.step(&model, Some(&judge), image.clone(), 100);
    for (name, ours) in [
        ("g_loss", "generator"),
        ("d_weight", "adversarial_weight"),
        ("ae_loss_step100", "loss"),
        ("disc_loss_step100", "critic"),
    ] {
        compare.floats(name, term(&step.terms, ours)?)?;
    }
    let nll = term(&loss.evaluate(image.clone(), step.reconstruction.clone()), "loss")?;
    compare.floats("nll_loss", nll)?;
    compare.floats("logits_real", critic.forward(image.autodiff()))?;
    compare.floats("logits_fake", critic.forward(step.reconstruction.autodiff()))?;
    let TokenizerModel::Vqgan(vqgan) = &model else {
        return Ok(());
    };
    for (name, conv) in [
        ("encoder.conv_in", &vqgan.encoder.conv_in),
        ("decoder.conv_out", &vqgan.decoder.conv_out),
        ("quant_conv", &vqgan.quant_conv),
    ] {
        compare.floats(&format!("grad.{name}.weight"), taken(&step.gradients, &conv.weight, name)?)?;
    }
    if let smalti_models::quantizers::QuantizerModel::Vq(vq) = &vqgan.quantize {
        let table = taken(&step.gradients, &vq.embedding.weight, "codebook")?;
        compare.floats("grad.quantize.embedding.weight", table)?;
    }
    let Some(gradients) = step.critic_gradients else {
        return Err(Error::invalid(case.title(), "the critic has no gradients"));
    };
    compare.floats("grad.loss.discriminator.main.0.weight", taken(&gradients, &critic.conv_in.weight, "critic")?)
}

fn taken<const D: usize>(gradients: &GradientsParams, param: &Param<Tensor<D>>, name: &str) -> Result<Tensor<D>> {
    super::case::gradient(name, gradients.get(param.id))
}
