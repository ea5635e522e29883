//! ViT-VQGAN with its losses and StyleGAN2's discriminator, against enhancing-transformers.

use super::case::{Case, Comparison, gradient, turned};
use burn::tensor::{Device, Tensor};
use serde::Deserialize;
use smalti_base::{Error, Result};
use smalti_models::Codes;
use smalti_models::checkpoint::Rules;
use smalti_models::losses::reconstruction::l1;
use smalti_models::losses::{AdversarialConfig, AdversarialKind, Critic, CriticConfig, Perceptual, StyleCriticConfig};
use smalti_models::losses::{TokenizerLossConfig, TokenizerStep};
use smalti_models::quantizers::vq::Metric;
use smalti_models::quantizers::{Pass, Quantizer, QuantizerConfig, QuantizerModel, VqConfig};
use smalti_models::tokenizers::{Tokenizer, TokenizerModel, Vit, VitTokenizerConfig};
use smalti_nn::StyleGan;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    embed_dim: usize,
    n_embed: usize,
}

/// The official loss's settings; those that change its form are not known here.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Losses {
    loglaplace_weight: f64,
    loggaussian_weight: f64,
    perceptual_weight: f64,
    adversarial_weight: f64,
    #[serde(default = "one")]
    codebook_weight: f64,
}

fn one() -> f64 {
    1.0
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Discriminator {
    size: usize,
    channel_divisor: usize,
    channel_multiplier: usize,
}

pub(super) fn knows(case: &Case) -> bool {
    case.has(&["image", "h_enc", "z", "codes", "z_q", "rec", "gen_loss"])
        && case.setting::<Losses>("loss").is_ok()
        && config(case).is_ok_and(|config| config.spec().is_ok())
        && discriminator(case).is_ok()
}

fn config(case: &Case) -> Result<VitTokenizerConfig> {
    let Table { embed_dim, n_embed } = case.setting("quantizer")?;
    Ok(VitTokenizerConfig {
        image_size: case.setting("image_size")?,
        patch_size: case.setting("patch_size")?,
        encoder: case.setting("encoder")?,
        decoder: case.setting("decoder")?,
        quantizer: QuantizerConfig::Vq(VqConfig { metric: Metric::CosineRaw, ..VqConfig::new(n_embed, embed_dim) }),
    })
}

fn tokenizer(case: &Case, device: &Device) -> Result<Vit> {
    Ok(Rules::builtin("vit-vqgan", "tokenizer")?.import(config(case)?.init(device)?, &case.weights("")?)?.0)
}

fn discriminator(case: &Case) -> Result<StyleCriticConfig> {
    let Discriminator { size, channel_divisor, channel_multiplier } = case.setting("style_discriminator")?;
    let defaults = StyleCriticConfig::default();
    // Twice as many channels as in the paper; wider maps than 512 channels occur for larger factors alone.
    if !matches!(channel_multiplier, 1 | 2) || channel_divisor == 0 {
        return Err(Error::invalid(case.title(), "its discriminator has other widths"));
    }
    let style = StyleCriticConfig {
        capacity: defaults.capacity / 2 * channel_multiplier / channel_divisor,
        max_channels: defaults.max_channels / channel_divisor,
        ..defaults
    };
    style.check((size, size)).map(|()| style)
}

fn critic(case: &Case, device: &Device) -> Result<StyleGan> {
    let size = case.setting("style_discriminator.size")?;
    let network = discriminator(case)?.network(size, 3).init(device)?;
    Ok(Rules::builtin("vit-vqgan", "discriminator")?.import(network, &case.weights("")?)?.0)
}

/// Images of the case, which are in 0..1, as ours.
fn image(case: &Case) -> Result<Tensor<4>> {
    Ok(case.tensor::<4>("image")? * 2.0 - 1.0)
}

fn as_unit(image: Tensor<4>) -> Tensor<4> {
    (image + 1.0) * 0.5
}

/// A map `[b, c, h, w]` as tokens `[b, h * w, c]`.
fn tokens(map_bchw: Tensor<4>) -> Tensor<3> {
    map_bchw.flatten::<3>(2, 3).swap_dims(1, 2)
}

pub(super) fn model(case: &Case, compare: &mut Comparison) -> Result<()> {
    let (vit, image) = (tokenizer(case, case.device())?, image(case)?);
    compare.floats("h_enc", vit.encode_tokens(image.clone()))?;
    let z = vit.latents(image.clone());
    compare.floats("z", tokens(z.clone()))?;
    let [_, _, h, w] = z.dims();
    let codes = vit.quantizer.encode(z.clone());
    compare.ids("codes", codes.clone())?;
    compare.floats("z_q", tokens(vit.quantizer.decode(codes.clone(), h, w)))?;
    let loss = vit.quantizer.train_forward(z.clone()).loss;
    compare.floats("emb_loss", loss.ok_or_else(|| Error::invalid("emb_loss", "the quantizer has no loss"))?)?;
    let model = TokenizerModel::Vit(vit);
    let rec = model.to_pixels(model.features(model.bottleneck(z, Pass::default()).latents_bchw));
    compare.floats("rec", as_unit(rec.clone()))?;
    compare.floats("rec_from_codes", as_unit(model.decode(&Codes::Discrete(codes))))?;
    // Half of the range, half of the error.
    compare.floats("loglaplace", l1(rec.clone(), image.clone()) * 0.5)?;
    let critic = Critic::from(critic(case, case.device())?);
    compare.floats("disc_logits_real", critic.forward(image))?;
    compare.floats("disc_logits_fake", critic.forward(rec))?;
    training(case, compare)
}

fn loss(case: &Case) -> Result<TokenizerLossConfig> {
    let losses: Losses = case.setting("loss")?;
    let adversarial = AdversarialConfig {
        kind: AdversarialKind::NonSaturating,
        weight: losses.adversarial_weight,
        start_step: 0,
        adaptive: false,
        critic: CriticConfig::Stylegan(discriminator(case)?),
        ndf: smalti_nn::PatchGanConfig::default().ndf,
        layers: smalti_nn::PatchGanConfig::default().layers,
    };
    Ok(TokenizerLossConfig {
        // The official code measures in 0..1, where errors are half and squares a quarter of ours.
        l1: losses.loglaplace_weight * 0.5,
        l2: losses.loggaussian_weight * 0.25,
        perceptual_weight: losses.perceptual_weight,
        adversarial: Some(adversarial),
        codebook_weight: losses.codebook_weight,
        ..Default::default()
    })
}

/// Losses and gradients of a step with the critic's gradient penalty, and of the next, without.
fn training(case: &Case, compare: &mut Comparison) -> Result<()> {
    let device = case.autodiff();
    let (vit, style, image) = (tokenizer(case, &device)?, critic(case, &device)?, image(case)?);
    let weights = case.weights("")?;
    let perceptual = Perceptual::lpips(&weights, &weights, case.device())?;
    let config = loss(case)?;
    let loss = config.init(vit.spec(), case.device())?.with_perceptual(Some(perceptual));
    let (model, judge) = (TokenizerModel::Vit(vit.clone()), Critic::from(style.clone()));
    let step = loss.step(&model, Some(&judge), image.clone(), 0);
    compare.floats("loggaussian", term(&step, "l2")? * 0.25)?;
    for (name, ours) in [("perceptual", "perceptual"), ("g_loss", "generator"), ("gen_loss", "loss")] {
        compare.floats(name, term(&step, ours)?)?;
    }
    let terms = loss.evaluate(image.clone(), step.reconstruction.clone());
    let nll = terms.into_iter().find(|(name, _)| *name == "loss").map(|(_, value)| value);
    compare.floats("nll", nll.ok_or_else(|| Error::invalid(case.title(), "there is no reconstruction loss"))?)?;
    for (name, layer) in [("encoder.to_patch_embedding.0", &vit.to_patch), ("decoder.to_pixel.1", &vit.to_pixel)] {
        compare.floats(&format!("grad.{name}.weight"), gradient(name, step.gradients.get::<4>(layer.weight.id))?)?;
    }
    let pre_quant = turned("pre_quant", step.gradients.get(vit.pre_quant.weight.id))?;
    compare.floats("grad.pre_quant.weight", pre_quant)?;
    if let QuantizerModel::Vq(vq) = &vit.quantizer {
        let table: Tensor<2> = gradient("codebook", step.gradients.get(vq.embedding.weight.id))?;
        compare.floats("grad.quantizer.embedding.weight", table)?;
    }
    let next = loss.step(&model, Some(&judge), image, 1);
    let penalty = config.adversarial.as_ref().and_then(|adversarial| adversarial.penalty_weight(0));
    let penalty = penalty.ok_or_else(|| Error::invalid(case.title(), "there is no gradient penalty"))?;
    let r1 = term(&step, "r1")?;
    compare.floats("r1_reg", r1.clone())?;
    compare.floats("disc_loss_r1", term(&step, "critic")? + r1 * penalty)?;
    compare.floats("disc_loss_nor1", term(&next, "critic")?)?;
    for (step, name) in [(&step, "r1"), (&next, "nor1")] {
        let gradients = step.critic_gradients.as_ref();
        let gradients = gradients.ok_or_else(|| Error::invalid(case.title(), "the critic has no gradients"))?;
        let colours: Tensor<4> = gradient("from_rgb", gradients.get(style.from_rgb.weight.id))?;
        compare.floats(&format!("disc_grad_{name}"), colours)?;
        let linear = format!("disc_grad_linear_{name}");
        let columns = case.shape(&linear)?.last().copied().unwrap_or_default();
        let hidden = turned("hidden", gradients.get(style.hidden.weight.id))?;
        compare.floats(&linear, hidden.narrow(1, 0, columns))?;
    }
    Ok(())
}

fn term(step: &TokenizerStep, name: &str) -> Result<Tensor<1>> {
    let found = step.terms.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone());
    found.ok_or_else(|| Error::invalid(name, "the training step has no such term"))
}
