//! KL autoencoders: latent-diffusion's with its losses, MAR's, and diffusers'.

use super::case::Case;
use super::comparison::Comparison;
use super::gradients::Official;
use super::patch_losses::Losses;
use burn::tensor::{Device, Tensor};
use serde::Deserialize;
use serde_json::Value;
use smalti_base::{Error, Result};
use smalti_models::checkpoint::Rules;
use smalti_models::losses::tokenizer::LikelihoodConfig;
use smalti_models::losses::{Discriminator, Perceptual, TokenizerLossConfig, TokenizerStep};
use smalti_models::quantizers::Pass;
use smalti_models::tokenizers::patches::unpatchify;
use smalti_models::tokenizers::{Kl, KlConfig, Posterior, Tokenizer, TokenizerModel, TokenizerSettings};

/// The network's settings as latent-diffusion and MAR write them.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Network {
    resolution: usize,
    ch: usize,
    ch_mult: Vec<usize>,
    num_res_blocks: usize,
    #[serde(default)]
    z_channels: Option<usize>,
    #[serde(default)]
    attn_resolutions: Vec<usize>,
    #[serde(default)]
    encoder_attn_resolutions: Option<Vec<usize>>,
    #[serde(default)]
    decoder_attn_resolutions: Option<Vec<usize>>,
    #[serde(default)]
    dropout: f64,
}

/// diffusers' `config.json`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Diffusers {
    block_out_channels: Vec<usize>,
    down_block_types: Vec<String>,
    up_block_types: Vec<String>,
    layers_per_block: usize,
    latent_channels: usize,
    norm_num_groups: usize,
    scaling_factor: f64,
    #[serde(default)]
    shift_factor: Option<f64>,
    #[serde(default = "yes")]
    mid_block_add_attention: bool,
    #[serde(default = "yes")]
    use_quant_conv: bool,
    #[serde(default = "yes")]
    use_post_quant_conv: bool,
}

fn yes() -> bool {
    true
}

pub(super) fn knows(case: &Case) -> bool {
    case.has(&["image", "mean", "logvar", "eps", "recon_mode"])
}

fn config(case: &Case) -> Result<KlConfig> {
    let config = match case.has_settings(&["block_out_channels"]) {
        true => of_diffusers(case)?,
        false => of_network(case)?,
    };
    config.spec().map(|_| config)
}

fn of_network(case: &Case) -> Result<KlConfig> {
    let inside = case.has_settings(&["ddconfig"]);
    let place = if inside { "ddconfig" } else { "" };
    super::vqgan::only_usual_network(case, place)?;
    let key = |name: &str| if inside { format!("{place}.{name}") } else { name.to_string() };
    case.only(&key("double_z"), true)?;
    for name in ["in_channels", "out_ch"] {
        case.only(&key(name), 3)?;
    }
    case.only(&key("resamp_with_conv"), true)?;
    // Read elsewhere, or, as the size of the images and scaling by deviation, not needed.
    case.ignore(&["embed_dim", "scale", "patch_size", "loss", "image_size", "image_key", "monitor", "scale_by_std"]);
    let network: Network = case.setting(place)?;
    let embed_dim = case.setting("embed_dim")?;
    let attention = network.attn_resolutions;
    Ok(KlConfig {
        image_size: network.resolution,
        ch: network.ch,
        ch_mult: network.ch_mult,
        num_res_blocks: network.num_res_blocks,
        encoder_attn_resolutions: network.encoder_attn_resolutions.unwrap_or_else(|| attention.clone()),
        decoder_attn_resolutions: network.decoder_attn_resolutions.unwrap_or(attention),
        mid_attention: true,
        dropout: network.dropout,
        z_channels: network.z_channels.unwrap_or(embed_dim),
        embed_dim,
        quant_conv: true,
        post_quant_conv: true,
        norm_groups: 32,
        norm_epsilon: 1e-6,
        latent_scale: case.setting_or("scale", None)?,
        latent_shift: 0.0,
        patch_size: case.setting_or("patch_size", 1)?,
    })
}

fn of_diffusers(case: &Case) -> Result<KlConfig> {
    for (key, channels) in [("in_channels", 3), ("out_channels", 3)] {
        case.only(key, channels)?;
    }
    case.only("act_fn", "silu")?;
    for key in ["latents_mean", "latents_std"] {
        case.only(key, Value::Null)?;
    }
    case.ignore(&["_class_name", "_diffusers_version", "_name_or_path", "sample_size", "force_upcast"]);
    let image_size = case.shape("image")?.last().copied().unwrap_or_default();
    let diffusers: Diffusers = case.setting("")?;
    let ch = diffusers.block_out_channels.first().copied().unwrap_or(1).max(1);
    if let Some(channels) = diffusers.block_out_channels.iter().find(|channels| *channels % ch != 0) {
        let what = format!("{}: config.block_out_channels with {channels}", case.title());
        return Err(Error::unsupported(what, format!("channels are multiples of the first level's {ch}")));
    }
    let known = ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"];
    let kinds = || diffusers.down_block_types.iter().chain(&diffusers.up_block_types);
    if let Some(kind) = kinds().find(|kind| !known.contains(&kind.as_str())) {
        return Err(Error::unknown(case.title(), "kind of block", kind, known));
    }
    let levels = diffusers.block_out_channels.len();
    let attends = |kind: &String| kind.starts_with("Attn");
    let side = |level: usize| image_size >> level;
    let down = diffusers.down_block_types.iter().enumerate().filter(|(_, kind)| attends(kind));
    let up = diffusers.up_block_types.iter().enumerate().filter(|(_, kind)| attends(kind));
    Ok(KlConfig {
        image_size,
        ch,
        ch_mult: diffusers.block_out_channels.iter().map(|channels| channels / ch).collect(),
        num_res_blocks: diffusers.layers_per_block,
        encoder_attn_resolutions: down.map(|(level, _)| side(level)).collect(),
        decoder_attn_resolutions: up.map(|(block, _)| side(levels - 1 - block)).collect(),
        mid_attention: diffusers.mid_block_add_attention,
        dropout: 0.0,
        z_channels: diffusers.latent_channels,
        embed_dim: diffusers.latent_channels,
        quant_conv: diffusers.use_quant_conv,
        post_quant_conv: diffusers.use_post_quant_conv,
        norm_groups: diffusers.norm_num_groups,
        norm_epsilon: 1e-6,
        latent_scale: Some(diffusers.scaling_factor),
        latent_shift: diffusers.shift_factor.unwrap_or(0.0),
        patch_size: 1,
    })
}

fn tokenizer(case: &Case, file: &str, device: &Device) -> Result<Kl> {
    let rules = Rules::builtin("autoencoder-kl", "tokenizer")?;
    Ok(rules.import(config(case)?.init(device)?, &case.weights_of(file, "")?)?.0)
}

pub(super) fn model(case: &Case, compare: &mut Comparison) -> Result<()> {
    compare_all(case, compare, &tokenizer(case, "weights.safetensors", case.device())?)?;
    // The same parameters in another layout.
    let other = "weights_ldm_layout.safetensors";
    if !case.weights_of(other, "")?.is_empty() {
        compare_all(case, compare, &tokenizer(case, other, case.device())?)?;
    }
    match case.has(&["ae_loss", "lpips"]) {
        true => training(case, compare),
        false => Ok(()),
    }
}

fn compare_all(case: &Case, compare: &mut Comparison, model: &Kl) -> Result<()> {
    let image = case.tensor::<4>("image")?;
    let decode = |latents: Tensor<4>| model.to_pixels(model.features(latents));
    if case.has(&["encoder_out", "moments"]) {
        compare.floats("encoder_out", model.encoder.forward(image.clone()))?;
        compare.floats("moments", model.moments(image.clone()))?;
    }
    let posterior = Posterior::new(model.moments(image));
    compare.floats("mean", posterior.mean_bchw.clone())?;
    compare.floats("logvar", posterior.log_variance_bchw.clone())?;
    compare.floats("kl", posterior.divergence())?;
    let z = posterior.sample(case.tensor("eps")?);
    compare.floats("z", z.clone())?;
    compare.floats("recon_mode", decode(posterior.mean_bchw))?;
    compare.floats("recon_sample", decode(z.clone()))?;
    let [_, _, h, w] = z.dims();
    for name in ["tokens", "scaled_latent"] {
        if case.has(&[name]) {
            let tokens = model.tokens(z.clone());
            compare.floats(name, unpatchify(tokens.clone(), model.config.patch_size, (h, w)))?;
            // Decoding takes the scale away again.
            compare.floats("recon_sample", decode(model.latents(tokens)))?;
        }
    }
    Ok(())
}

/// Losses and gradients of a step with given noise and perceptual distance.
fn training(case: &Case, compare: &mut Comparison) -> Result<()> {
    let losses = Losses::read(case, "loss")?;
    let device = case.autodiff();
    let model = TokenizerModel::Kl(tokenizer(case, "weights.safetensors", &device)?);
    let discriminator = losses.discriminator(case, &device)?;
    let image = case.tensor::<4>("image")?;
    let [images, c, h, w] = image.dims();
    let distances = case.tensor::<4>("lpips")?.reshape([images]);
    let settings = TokenizerLossConfig {
        kl_weight: Some(losses.kl_weight),
        likelihood: Some(LikelihoodConfig { log_variance: losses.logvar_init }),
        ..losses.config(case)?
    };
    let loss = settings.init(&config(case)?.spec()?, case.device())?;
    let loss = loss.with_perceptual((losses.perceptual_weight > 0.0).then(|| Perceptual::given(distances)));
    let pass = Pass { noise_bchw: Some(case.tensor("eps")?), ..Pass::at(losses.global_step) };
    let judge = Discriminator::from(discriminator.clone());
    let step = loss.step(&model, Some(&judge), image.clone(), &pass);
    compare.floats("ae_loss", term(&step, "loss")?)?;
    compare.floats("kl_loss", term(&step, "kl")?)?;
    match losses.global_step >= losses.disc_start {
        true => {
            compare.floats("g_loss", term(&step, "generator")?)?;
            compare.floats("d_weight", term(&step, "adversarial_weight")? / losses.disc_factor)?;
            compare.floats("disc_loss", term(&step, "discriminator")? * losses.disc_factor)?;
        }
        // The discriminator is not asked before it counts.
        false => compare.values("disc_loss", &[0.0])?,
    }
    compare.floats("train_recon", step.reconstruction.clone())?;
    let terms = loss.evaluate(image, step.reconstruction.clone());
    let nll = terms.into_iter().find(|(name, _)| *name == "loss").map(|(_, value)| value);
    let nll = nll.ok_or_else(|| Error::invalid(case.title(), "there is no reconstruction loss"))?;
    compare.floats("nll_loss", nll.clone())?;
    // The likelihood is `a / exp(s) + n s` for n values; ours keeps `s`, and its gradient is `n - a / exp(s)`.
    if case.has(&["grad.loss.logvar"]) {
        let values = (c * h * w) as f64;
        compare.floats("grad.loss.logvar", -nll + values * (1.0 + losses.logvar_init))?;
    }
    let TokenizerModel::Kl(kl) = &model else { return Ok(()) };
    Official::new(case, "autoencoder-kl", "tokenizer")?.compare(case, compare, kl, &step.gradients)?;
    match &step.discriminator_gradients {
        Some(gradients) => Official::new(case, "vqgan", "discriminator")?.scaled(losses.disc_factor).compare(
            case,
            compare,
            &discriminator,
            gradients,
        ),
        None => Ok(()),
    }
}

fn term(step: &TokenizerStep, name: &str) -> Result<Tensor<1>> {
    let found = step.terms.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone());
    found.ok_or_else(|| Error::invalid(name, "the training step has no such term"))
}
