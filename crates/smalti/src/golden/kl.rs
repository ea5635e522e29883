//! KL autoencoders: latent-diffusion's with its losses, MAR's, and diffusers'.

use super::case::{Case, Comparison, gradient};
use burn::tensor::{Device, Tensor};
use serde::Deserialize;
use smalti_base::{Error, Result};
use smalti_models::checkpoint::Rules;
use smalti_models::losses::tokenizer::LikelihoodConfig;
use smalti_models::losses::{
    AdversarialConfig, AdversarialKind, Critic, CriticConfig, Perceptual, TokenizerLossConfig, TokenizerStep,
};
use smalti_models::tokenizers::patches::unpatchify;
use smalti_models::tokenizers::{Kl, KlConfig, Posterior, TokenizerModel};
use smalti_nn::{PatchGan, PatchGanConfig};

/// The network's settings as latent-diffusion and MAR write them.
#[derive(Deserialize)]
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
    case.has(&["image", "mean", "logvar", "eps", "recon_mode"]) && config(case).is_ok()
}

fn config(case: &Case) -> Result<KlConfig> {
    let config = match serde_json::from_value::<Diffusers>(case.config.clone()) {
        Ok(diffusers) => of_diffusers(&diffusers, case.shape("image")?.last().copied().unwrap_or_default()),
        Err(_) => of_network(case)?,
    };
    config.spec().map(|_| config)
}

fn of_network(case: &Case) -> Result<KlConfig> {
    let network = case.config.get("ddconfig").unwrap_or(&case.config).clone();
    let network: Network =
        serde_json::from_value(network).map_err(|e| Error::invalid(case.title(), format!("config: {e}")))?;
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

fn of_diffusers(diffusers: &Diffusers, image_size: usize) -> KlConfig {
    let ch = diffusers.block_out_channels.first().copied().unwrap_or(1).max(1);
    let levels = diffusers.block_out_channels.len();
    let attends = |kind: &String| kind.starts_with("Attn");
    let side = |level: usize| image_size >> level;
    let down = diffusers.down_block_types.iter().enumerate().filter(|(_, kind)| attends(kind));
    let up = diffusers.up_block_types.iter().enumerate().filter(|(_, kind)| attends(kind));
    KlConfig {
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
    }
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

#[derive(Deserialize)]
struct Losses {
    disc_start: u64,
    kl_weight: f64,
    disc_weight: f64,
    disc_num_layers: usize,
    ndf: usize,
    perceptual_weight: f64,
    logvar_init: f64,
    global_step: u64,
}

/// Losses and gradients of a step with given noise and perceptual distance.
fn training(case: &Case, compare: &mut Comparison) -> Result<()> {
    let losses: Losses = case.setting("loss")?;
    let device = case.autodiff();
    let model = TokenizerModel::Kl(tokenizer(case, "weights.safetensors", &device)?);
    let critic = PatchGanConfig { in_channels: 3, ndf: losses.ndf, layers: losses.disc_num_layers };
    let critic: PatchGan =
        Rules::builtin("vqgan", "discriminator")?.import(critic.init(&device)?, &case.weights("")?)?.0;
    let config = TokenizerLossConfig {
        l1: 1.0,
        perceptual_weight: losses.perceptual_weight,
        adversarial: Some(AdversarialConfig {
            kind: AdversarialKind::Hinge,
            weight: losses.disc_weight,
            start_step: losses.disc_start,
            adaptive: true,
            critic: CriticConfig::default(),
            ndf: losses.ndf,
            layers: losses.disc_num_layers,
        }),
        kl_weight: Some(losses.kl_weight),
        likelihood: Some(LikelihoodConfig { log_variance: losses.logvar_init }),
        ..Default::default()
    };
    let image = case.tensor::<4>("image")?;
    let [images, c, h, w] = image.dims();
    let distances = case.tensor::<4>("lpips")?.reshape([images]);
    let loss = config.init(&config_spec(case)?, case.device())?.with_perceptual(Some(Perceptual::given(distances)));
    let noise = Some(case.tensor("eps")?);
    let step = loss.step_with(&model, Some(&Critic::from(critic)), image.clone(), losses.global_step, noise);
    for (name, ours) in [
        ("ae_loss", "loss"),
        ("kl_loss", "kl"),
        ("g_loss", "generator"),
        ("d_weight", "adversarial_weight"),
        ("disc_loss", "critic"),
    ] {
        compare.floats(name, term(&step, ours)?)?;
    }
    compare.floats("train_recon", step.reconstruction.clone())?;
    let terms = loss.evaluate(image, step.reconstruction.clone());
    let nll = terms.into_iter().find(|(name, _)| *name == "loss").map(|(_, value)| value);
    let nll = nll.ok_or_else(|| Error::invalid(case.title(), "there is no reconstruction loss"))?;
    compare.floats("nll_loss", nll.clone())?;
    // The likelihood is `a / exp(s) + n s` for n values; ours keeps `s`, and its gradient is `n - a / exp(s)`.
    let values = (c * h * w) as f64;
    compare.floats("grad.loss.logvar", -nll + values * (1.0 + losses.logvar_init))?;
    let TokenizerModel::Kl(kl) = &model else { return Ok(()) };
    let quant_conv = kl.quant_conv.as_ref().map(|conv| ("quant_conv", conv));
    let convs = [("encoder.conv_in", &kl.encoder.conv_in), ("decoder.conv_out", &kl.decoder.conv_out)];
    for (name, conv) in convs.into_iter().chain(quant_conv) {
        let found: Tensor<4> = gradient(name, step.gradients.get(conv.weight.id))?;
        compare.floats(&format!("grad.{name}.weight"), found)?;
    }
    Ok(())
}

fn config_spec(case: &Case) -> Result<smalti_base::TokenSpec> {
    config(case)?.spec()
}

fn term(step: &TokenizerStep, name: &str) -> Result<Tensor<1>> {
    let found = step.terms.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone());
    found.ok_or_else(|| Error::invalid(name, "the training step has no such term"))
}
