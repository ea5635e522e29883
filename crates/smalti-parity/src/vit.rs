//! ViT-VQGAN with its losses and StyleGAN2's discriminator, against enhancing-transformers.

use super::case::{Case, gradient};
use super::comparison::Comparison;
use super::gradients::Official;
use burn::tensor::{Device, Tensor};
use serde::Deserialize;
use smalti_base::{Error, Result};
use smalti_models::Codes;
use smalti_models::checkpoint::Rules;
use smalti_models::losses::reconstruction::{l1, l2};
use smalti_models::losses::{
    AdversarialConfig, AdversarialKind, Discriminator, DiscriminatorConfig, Perceptual, StyleDiscriminatorConfig,
};
use smalti_models::losses::{TokenizerLoss, TokenizerLossConfig, TokenizerStep};
use smalti_models::quantizers::vq::Metric;
use smalti_models::quantizers::{Pass, QuantizerConfig, VqConfig};
use smalti_models::tokenizers::{Tokenizer, TokenizerModel, Vit, VitTokenizerConfig};
use smalti_nn::StyleGan;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    embed_dim: usize,
    n_embed: usize,
    #[serde(default = "quarter")]
    beta: f64,
    #[serde(default = "yes")]
    use_norm: bool,
    #[serde(default)]
    use_residual: bool,
    num_quantizers: Option<usize>,
}

fn quarter() -> f64 {
    0.25
}

fn yes() -> bool {
    true
}

/// The official loss's settings, with its class's defaults.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Losses {
    disc_start: u64,
    disc_loss: String,
    codebook_weight: f64,
    loglaplace_weight: f64,
    loggaussian_weight: f64,
    perceptual_weight: f64,
    adversarial_weight: f64,
    use_adaptive_adv: bool,
    r1_gamma: f64,
    do_r1_every: u64,
}

impl Default for Losses {
    fn default() -> Self {
        Self {
            disc_start: 0,
            disc_loss: "vanilla".into(),
            codebook_weight: 1.0,
            loglaplace_weight: 1.0,
            loggaussian_weight: 1.0,
            perceptual_weight: 1.0,
            adversarial_weight: 1.0,
            use_adaptive_adv: false,
            r1_gamma: 10.0,
            do_r1_every: 16,
        }
    }
}

impl Losses {
    /// Ours, with the discriminator's gradient penalty or without.
    fn config(&self, case: &Case, penalty: bool) -> Result<TokenizerLossConfig> {
        let kind = match self.disc_loss.as_str() {
            "vanilla" => AdversarialKind::NonSaturating,
            "hinge" => AdversarialKind::Hinge,
            "least_square" => AdversarialKind::LeastSquares,
            other => {
                let known = ["vanilla", "hinge", "least_square"];
                return Err(Error::unknown(case.title(), "discriminator loss", other, known));
            }
        };
        let r1 = if penalty { self.r1_gamma } else { 0.0 };
        let discriminator = StyleDiscriminatorConfig { r1, r1_every: self.do_r1_every, ..discriminator_config(case)? };
        let patch = smalti_nn::PatchGanConfig::default();
        let adversarial = AdversarialConfig {
            kind,
            weight: self.adversarial_weight,
            start_step: self.disc_start,
            adaptive: self.use_adaptive_adv,
            discriminator: DiscriminatorConfig::Stylegan(discriminator),
            ndf: patch.ndf,
            layers: patch.layers,
        };
        Ok(TokenizerLossConfig {
            // The official code measures in 0..1, where errors are half and squares a quarter of ours.
            l1: self.loglaplace_weight * 0.5,
            l2: self.loggaussian_weight * 0.25,
            perceptual_weight: self.perceptual_weight,
            adversarial: Some(adversarial),
            codebook_weight: self.codebook_weight,
            ..Default::default()
        })
    }

    /// The first step at which the discriminator learns and pays the penalty.
    fn step(&self) -> u64 {
        self.disc_start.next_multiple_of(self.do_r1_every.max(1))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Sizes {
    size: usize,
    #[serde(default = "undivided")]
    channel_divisor: usize,
    #[serde(default = "doubled")]
    channel_multiplier: usize,
}

fn undivided() -> usize {
    1
}

fn doubled() -> usize {
    2
}

pub(super) fn knows(case: &Case) -> bool {
    case.has(&["image", "h_enc", "z", "codes", "z_q", "rec"]) && case.has_settings(&["encoder", "decoder"])
}

fn config(case: &Case) -> Result<VitTokenizerConfig> {
    case.only("quantizer.straight_through", true)?;
    let Table { embed_dim, n_embed, beta, use_norm, use_residual, num_quantizers } = case.setting("quantizer")?;
    // Without residuals their number counts for nothing.
    let depth = match (use_residual, num_quantizers) {
        (true, Some(depth)) => depth,
        (true, None) => {
            return Err(Error::unsupported(
                format!("{}: config.quantizer.use_residual without num_quantizers", case.title()),
                "say how many codes a place has",
            ));
        }
        (false, _) => 1,
    };
    let metric = if use_norm { Metric::CosineRaw } else { Metric::Euclidean };
    Ok(VitTokenizerConfig {
        image_size: case.setting("image_size")?,
        patch_size: case.setting("patch_size")?,
        encoder: case.setting("encoder")?,
        decoder: case.setting("decoder")?,
        quantizer: QuantizerConfig::Vq(VqConfig { metric, beta, depth, ..VqConfig::new(n_embed, embed_dim) }),
    })
}

fn tokenizer(case: &Case, device: &Device) -> Result<Vit> {
    Ok(Rules::builtin("vit-vqgan", "tokenizer")?.import(config(case)?.init(device)?, &case.weights("")?)?.0)
}

fn discriminator_config(case: &Case) -> Result<StyleDiscriminatorConfig> {
    let Sizes { size, channel_divisor, channel_multiplier } = case.setting("style_discriminator")?;
    let defaults = StyleDiscriminatorConfig::default();
    // Twice as many channels as in the paper; wider maps than 512 channels occur for larger factors alone.
    if !matches!(channel_multiplier, 1 | 2) || channel_divisor == 0 {
        return Err(Error::unsupported(
            format!(
                "{}: config.style_discriminator with channel_multiplier {channel_multiplier} and channel_divisor \
                 {channel_divisor}",
                case.title()
            ),
            "the multiplier is 1 or 2, the divisor at least 1",
        ));
    }
    let style = StyleDiscriminatorConfig {
        capacity: defaults.capacity / 2 * channel_multiplier / channel_divisor,
        max_channels: defaults.max_channels / channel_divisor,
        ..defaults
    };
    style.check((size, size)).map(|()| style)
}

fn discriminator(case: &Case, device: &Device) -> Result<StyleGan> {
    let size = case.setting("style_discriminator.size")?;
    let network = discriminator_config(case)?.network(size, 3).init(device)?;
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
    let loss = vit.quantizer.train_forward(z.clone(), &Pass::default()).loss();
    compare.floats("emb_loss", loss.ok_or_else(|| Error::invalid("emb_loss", "the quantizer has no loss"))?)?;
    let rec = vit.to_pixels(vit.features(vit.quantizer.train_forward(z, &Pass::default()).latents_bchw));
    compare.floats("rec", as_unit(rec.clone()))?;
    compare.floats("rec_from_codes", as_unit(vit.decode(&Codes::Discrete(codes))?))?;
    // Half of the range, half of the error, and a quarter of its square.
    let distances =
        [("loglaplace", l1(rec.clone(), image.clone()) * 0.5), ("loggaussian", l2(rec.clone(), image.clone()) * 0.25)];
    for (name, found) in distances.into_iter().filter(|(name, _)| case.has(&[name])) {
        compare.floats(name, found)?;
    }
    // Widths of the perceptual network are those of its weights.
    case.ignore(&["vgg_widths", "loss.disc_params"]);
    if !case.has_settings(&["loss"]) {
        return Ok(());
    }
    let discriminator = Discriminator::from(discriminator(case, case.device())?);
    compare.floats("disc_logits_real", discriminator.forward(image))?;
    compare.floats("disc_logits_fake", discriminator.forward(rec))?;
    training(case, compare)
}

/// Losses and gradients of a step with the discriminator's gradient penalty, and of one without.
fn training(case: &Case, compare: &mut Comparison) -> Result<()> {
    let device = case.autodiff();
    let losses: Losses = case.setting("loss")?;
    let (vit, style, image) = (tokenizer(case, &device)?, discriminator(case, &device)?, image(case)?);
    let weights = case.weights("")?;
    let perceptual = Perceptual::lpips(&weights, &weights, case.device())?;
    let network = (losses.perceptual_weight > 0.0).then(|| perceptual.clone());
    let config = losses.config(case, true)?;
    let make =
        |config: &TokenizerLossConfig| Ok(config.init(vit.spec(), case.device())?.with_perceptual(network.clone()));
    let loss: TokenizerLoss = make(&config)?;
    let (model, judge) = (TokenizerModel::Vit(vit.clone()), Discriminator::from(style.clone()));
    let at = losses.step();
    let step = loss.step(&model, Some(&judge), image.clone(), &Pass::at(at));
    compare.floats("perceptual", perceptual.distance(image.clone(), step.reconstruction.clone()).mean())?;
    compare.floats("g_loss", term(&step, "generator")?)?;
    compare.floats("gen_loss", term(&step, "loss")?)?;
    if let (true, true) = (losses.use_adaptive_adv, case.has(&["d_weight"])) {
        compare.floats("d_weight", term(&step, "adversarial_weight")?)?;
    }
    let terms = loss.evaluate(image.clone(), step.reconstruction.clone());
    let nll = terms.into_iter().find(|(name, _)| *name == "loss").map(|(_, value)| value);
    compare.floats("nll", nll.ok_or_else(|| Error::invalid(case.title(), "there is no reconstruction loss"))?)?;
    Official::new(case, "vit-vqgan", "tokenizer")?.compare(case, compare, &vit, &step.gradients)?;

    let without = make(&losses.config(case, false)?)?.step(&model, Some(&judge), image, &Pass::at(at));
    let mut with = term(&step, "discriminator")?;
    if let Some(weight) = config.adversarial.as_ref().and_then(|adversarial| adversarial.penalty_weight(at)) {
        let r1 = term(&step, "r1")?;
        compare.floats("r1_reg", r1.clone())?;
        with = with + r1 * weight;
    }
    for (kind, loss, step) in [("r1", with, &step), ("nor1", term(&without, "discriminator")?, &without)] {
        if case.has(&[&format!("disc_loss_{kind}")]) {
            compare.floats(&format!("disc_loss_{kind}"), loss)?;
            discriminator_gradients(case, compare, &style, step, kind)?;
        }
    }
    Ok(())
}

/// Gradients of the discriminator's first and second-last layer.
fn discriminator_gradients(
    case: &Case,
    compare: &mut Comparison,
    style: &StyleGan,
    step: &TokenizerStep,
    kind: &str,
) -> Result<()> {
    let gradients = step.discriminator_gradients.as_ref();
    let gradients = gradients.ok_or_else(|| Error::invalid(case.title(), "the discriminator has no gradients"))?;
    let (colours, linear) = (format!("disc_grad_{kind}"), format!("disc_grad_linear_{kind}"));
    if case.has(&[&colours]) {
        let found: Tensor<4> = gradient(&colours, gradients.get(style.from_rgb.weight.id))?;
        compare.floats(&colours, found)?;
    }
    if case.has(&[&linear]) {
        let columns = case.shape(&linear)?.last().copied().unwrap_or_default();
        let found: Tensor<2> = gradient(&linear, gradients.get(style.hidden.weight.id))?;
        compare.floats(&linear, found.transpose().narrow(1, 0, columns))?;
    }
    Official::new(case, "vit-vqgan", "discriminator")?
        .after(&format!("disc_grad_{kind}."))
        .compare(case, compare, style, gradients)
}

fn term(step: &TokenizerStep, name: &str) -> Result<Tensor<1>> {
    let found = step.terms.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone());
    found.ok_or_else(|| Error::invalid(name, "the training step has no such term"))
}
