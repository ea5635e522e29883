//! The tokenizer: from image to codes and back, its training forward, and what moves its tables.

use super::official::{Official, Reconstruction, RqVae, SYSTEM, residual};
use crate::case::Case;
use crate::comparison::Comparison;
use crate::gradients;
use burn::tensor::{Tensor, TensorData};
use smalti_base::{Error, Result};
use smalti_models::checkpoint::Rules;
use smalti_models::losses::{
    AdversarialConfig, AdversarialKind, Discriminator, DiscriminatorConfig, TokenizerLossConfig, TokenizerStep,
};
use smalti_models::quantizers::{Pass, Quantized, Quantizer, QuantizerModel, Residual};
use smalti_models::tokenizers::{Tokenizer, TokenizerModel, Vqgan};
use smalti_nn::{PatchGan, PatchGanConfig};

const WEIGHTS: &str = "weights.safetensors";

pub(crate) fn knows_tokenizer(case: &Case) -> bool {
    case.has(&["image", "encoder_out", "z_e", "z_code_shape", "codes", "quant_cum_0", "commitment_loss", "recon"])
}

pub(crate) fn tokenizer(case: &Case, compare: &mut Comparison) -> Result<()> {
    let official: RqVae = case.setting("")?;
    let vqgan = official.import(case, WEIGHTS, true, case.device())?;
    reconstruction(case, compare, &official, &vqgan)?;
    if case.names().any(|name| name.starts_with("train.")) {
        training(case, compare, &official)?;
    }
    match case.names().any(|name| name.starts_with("train_restart.")) {
        true => restart(case, compare, &official),
        false => Ok(()),
    }
}

/// From image to codes and back.
fn reconstruction(case: &Case, compare: &mut Comparison, official: &RqVae, vqgan: &Vqgan) -> Result<()> {
    let quantizer = residual(vqgan)?;
    let image = case.tensor::<4>("image")?;
    compare.floats("encoder_out", vqgan.encoder.forward(image.clone()))?;
    let z = vqgan.latents(image.clone());
    compare.floats("z_e", channels_last(z.clone()))?;
    compare.floats("z_code_shape", quantizer.rows(z.clone()))?;
    let codes = quantizer.encode(z.clone());
    compare.ids("codes", codes.clone())?;
    compare.floats("code_emb_with_depth", quantizer.embed(codes.clone()))?;
    let ([h, w, depth], decode) = (official.code_shape, |latents: Tensor<4>| vqgan.to_pixels(vqgan.features(latents)));
    for end in 1..=depth {
        let last = end - 1;
        let latents = quantizer.decode_prefix(codes.clone(), h, w, end)?;
        compare.floats(&format!("quant_cum_{last}"), quantizer.rows(latents.clone()))?;
        let (sum, alone) = (format!("partial_add_{last}"), format!("partial_select_{last}"));
        if case.has(&[&sum]) {
            compare.floats(&sum, decode(latents))?;
        }
        if case.has(&[&alone]) {
            compare.floats(&alone, decode(quantizer.decode_depths(codes.clone(), h, w, last..end)?))?;
        }
    }
    let recon = decode(quantizer.decode(codes.clone(), h, w));
    compare.floats("recon", recon.clone())?;
    compare.floats("recon_from_codes", recon.clone())?;
    let names: Vec<String> = case.names().map(str::to_string).collect();
    for name in &names {
        if let Some(Ok(temperature)) = name.strip_prefix("soft_codes_t").map(str::parse) {
            let (nearest, shares) = quantizer.soft(z.clone(), temperature, None)?;
            compare.floats(name, shares)?;
            compare.ids("codes", nearest)?;
        }
    }
    let errors = (1..=depth).map(|end| {
        let latents = quantizer.decode_prefix(codes.clone(), h, w, end)?;
        Ok((z.clone() - latents).square().mean())
    });
    let errors: Vec<Tensor<1>> = errors.collect::<Result<_>>()?;
    let commitment = Tensor::cat(errors, 0).mean();
    compare.floats("commitment_loss", commitment.clone())?;
    if case.has(&["compute_loss.total", "compute_loss.recon"]) {
        let loss = match official.loss_type {
            Reconstruction::Mse => (recon - image).square().mean(),
            Reconstruction::L1 => (recon - image).abs().mean(),
        };
        compare.floats("compute_loss.recon", loss.clone())?;
        compare.floats("compute_loss.total", loss + commitment * official.latent_loss_weight)?;
    }
    Ok(())
}

fn channels_last(x_bchw: Tensor<4>) -> Tensor<4> {
    x_bchw.permute([0, 2, 3, 1])
}

/// The ordinary step of training without restarts, with a discriminator where the case has one.
fn training(case: &Case, compare: &mut Comparison, official: &RqVae) -> Result<()> {
    let vqgan = official.import(case, WEIGHTS, false, &case.autodiff())?;
    let model = TokenizerModel::Vqgan(vqgan.clone());
    let image = case.tensor::<4>("image")?;
    let step =
        loss(official, None).init(model.spec(), case.device())?.step(&model, None, image.clone(), &Pass::default());
    let codes = step.codes.clone().ok_or_else(|| Error::invalid(case.title(), "the training step has no codes"))?;
    compare.ids("train.codes", codes)?;
    compare.floats("train.recon", step.reconstruction.clone())?;
    compare.floats("train.loss_total", term(&step, "loss")?)?;
    let reconstruction = match official.loss_type {
        Reconstruction::Mse => "l2",
        Reconstruction::L1 => "l1",
    };
    compare.floats("train.loss_recon", term(&step, reconstruction)?)?;
    compare.floats("train.loss_latent", term(&step, "commitment")?)?;
    let rules = official.export()?;
    gradients::Official::new(case, SYSTEM, "tokenizer")?.after("train.grad.").compare(
        case,
        compare,
        &model,
        &step.gradients,
    )?;
    let stats = step.stats.ok_or_else(|| Error::invalid(case.title(), "the training step has no statistics"))?;
    let mut quantizer = residual(&vqgan)?.clone();
    quantizer.update_with(&stats, None);
    let after = Official::parameters(&rules, &with(&vqgan, quantizer))?;
    let names: Vec<String> = case.names().map(str::to_string).collect();
    for (name, tensor) in names.iter().filter_map(|name| Some((name, name.strip_prefix("train.after.")?))) {
        compare.values(name, after.values(&format!("quantizer.{tensor}"))?)?;
    }
    match case.has(&["disc.logits_real", "disc.d_loss"]) {
        true => discriminator(case, compare, official, &model),
        false => Ok(()),
    }
}

fn with(vqgan: &Vqgan, quantizer: Residual) -> Vqgan {
    let mut vqgan = vqgan.clone();
    vqgan.quantize = QuantizerModel::Residual(quantizer);
    vqgan
}

fn loss(official: &RqVae, adversarial: Option<AdversarialConfig>) -> TokenizerLossConfig {
    let (l1, l2) = match official.loss_type {
        Reconstruction::Mse => (0.0, 1.0),
        Reconstruction::L1 => (1.0, 0.0),
    };
    TokenizerLossConfig { l1, l2, perceptual_weight: 0.0, adversarial, ..Default::default() }
}

fn term(step: &TokenizerStep, name: &str) -> Result<Tensor<1>> {
    let found = step.terms.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone());
    found.ok_or_else(|| Error::invalid(name, "the training step has no such term"))
}

/// The discriminator, its losses and its weight. The case has the plain ratio of gradients, so that ours counts once.
fn discriminator(case: &Case, compare: &mut Comparison, official: &RqVae, model: &TokenizerModel) -> Result<()> {
    let weights = case.weights_of("disc_weights.safetensors", "")?;
    let [ndf, in_channels, ..] =
        weights.get("main.0.weight").map(|stored| stored.shape.clone()).unwrap_or_default()[..]
    else {
        return Err(Error::invalid(case.title(), "disc_weights.safetensors has no main.0.weight"));
    };
    // The last convolution is the one with a single channel.
    let last = weights
        .iter()
        .find(|(name, stored)| name.ends_with(".weight") && stored.shape.len() == 4 && stored.shape[0] == 1);
    let last = last.and_then(|(name, _)| name.split('.').nth(1)?.parse::<usize>().ok()).unwrap_or_default();
    let config = PatchGanConfig { in_channels, ndf, layers: (last.max(5) - 2) / 3 };
    let discriminator: PatchGan =
        Rules::builtin("vqgan", "discriminator")?.import(config.init(&case.autodiff())?, &weights)?.0;
    let adversarial = AdversarialConfig {
        kind: AdversarialKind::Hinge,
        weight: 1.0,
        start_step: 0,
        adaptive: true,
        discriminator: DiscriminatorConfig::default(),
        ndf,
        layers: config.layers,
    };
    let loss = loss(official, Some(adversarial)).init(model.spec(), case.device())?;
    let image = case.tensor::<4>("image")?;
    let step = loss.step(model, Some(&Discriminator::from(discriminator.clone())), image.clone(), &Pass::default());
    for (name, ours) in
        [("disc.g_loss", "generator"), ("disc.adaptive_weight", "adversarial_weight"), ("disc.d_loss", "discriminator")]
    {
        compare.floats(name, term(&step, ours)?)?;
    }
    let fake = step.reconstruction.clone().autodiff();
    compare.floats("disc.logits_fake_gen", discriminator.forward(fake.clone()))?;
    compare.floats("disc.logits_fake", discriminator.forward(fake))?;
    compare.floats("disc.logits_real", discriminator.forward(image.autodiff()))?;
    let gradients = step.discriminator_gradients;
    let gradient = gradients.and_then(|gradients| gradients.get::<4>(discriminator.conv_in.weight.id));
    compare.floats("disc.grad.main.0.weight", crate::case::gradient("main.0.weight", gradient)?)
}

/// A training forward and its update with restarts in the order of the batch and without noise.
fn restart(case: &Case, compare: &mut Comparison, official: &RqVae) -> Result<()> {
    let vqgan = official.import(case, WEIGHTS, true, case.device())?;
    let quantizer = residual(&vqgan)?;
    let latents = vqgan.latents(case.tensor("image")?);
    let Quantized { codes, stats, .. } = quantizer.train_with(latents, Some(&mut in_order));
    compare.ids("train_restart.codes", codes)?;
    let mut moved = quantizer.clone();
    moved.update_with(&stats, Some(&mut in_order));
    let after = Official::parameters(&official.export()?, &with(&vqgan, moved))?;
    let names: Vec<String> = case.names().map(str::to_string).collect();
    for (name, tensor) in names.iter().filter_map(|name| Some((name, name.strip_prefix("train_restart.after.")?))) {
        compare.values(name, after.values(&format!("quantizer.{tensor}"))?)?;
    }
    Ok(())
}

/// The first latents of the batch, again and again if they are fewer than the codes.
fn in_order(latents_nc: &Tensor<2>, k: usize) -> Tensor<2> {
    let [n, _] = latents_nc.dims();
    let rows: Vec<i32> = (0..k).map(|row| (row % n) as i32).collect();
    latents_nc.clone().select(0, Tensor::from_data(TensorData::new(rows, [k]), &latents_nc.device()))
}
