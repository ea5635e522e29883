//! The official settings, and our tensors under the official names.

use crate::case::Case;
use burn::module::Module;
use burn::tensor::Device;
use serde::Deserialize;
use smalti_base::{Error, OneOrEach, Result, Vocabulary};
use smalti_models::checkpoint::{Rules, Source, Stored, parameter_map, parameters};
use smalti_models::quantizers::residual::Moment;
use smalti_models::quantizers::{QuantizerConfig, QuantizerModel, Residual, ResidualConfig};
use smalti_models::tokenizers::{Vqgan, VqganConfig};
use smalti_nn::Shortcut;
use std::collections::BTreeMap;

pub(super) const SYSTEM: &str = "rq-vae";

/// Settings of a tokenizer.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RqVae {
    #[serde(default = "groups")]
    norm_groups: usize,
    embed_dim: usize,
    n_embed: Vocabulary,
    decay: OneOrEach<f64>,
    pub(super) loss_type: Reconstruction,
    pub(super) latent_loss_weight: f64,
    #[serde(rename = "bottleneck_type")]
    _bottleneck: Bottleneck,
    latent_shape: [usize; 3],
    pub(super) code_shape: [usize; 3],
    shared_codebook: bool,
    restart_unused_codes: bool,
    ddconfig: Network,
}

fn groups() -> usize {
    32
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Reconstruction {
    Mse,
    L1,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Bottleneck {
    Rq,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Network {
    #[serde(default)]
    double_z: bool,
    z_channels: usize,
    resolution: usize,
    in_channels: usize,
    out_ch: usize,
    ch: usize,
    ch_mult: Vec<usize>,
    num_res_blocks: usize,
    attn_resolutions: Vec<usize>,
    #[serde(default)]
    dropout: f64,
    #[serde(default = "yes")]
    resamp_with_conv: bool,
}

fn yes() -> bool {
    true
}

impl RqVae {
    /// The quantizer, with or without restarts.
    pub(super) fn quantizer(&self, restart: bool) -> Result<ResidualConfig> {
        let ([h, w, channels], [rows, columns, depth]) = (self.latent_shape, self.code_shape);
        let fits = rows * columns > 0 && h.is_multiple_of(rows) && w.is_multiple_of(columns);
        if !fits || channels != self.embed_dim {
            let problem = format!("latent_shape {:?}, code_shape {:?}", self.latent_shape, self.code_shape);
            return Err(Error::invalid("config", format!("{problem} and embed_dim {channels} do not fit")));
        }
        Ok(ResidualConfig {
            depth,
            codes: self.n_embed.clone(),
            channels,
            fold: [h / rows, w / columns],
            shared: self.shared_codebook,
            decay: self.decay.clone(),
            epsilon: 1e-5,
            restart: restart && self.restart_unused_codes,
            update: Moment::BetweenDepths,
            beta: self.latent_loss_weight,
        })
    }

    /// The tokenizer with the weights of a case.
    pub(super) fn import(&self, case: &Case, file: &str, restart: bool, device: &Device) -> Result<Vqgan> {
        let network = &self.ddconfig;
        if network.double_z {
            return Err(Error::unsupported("double_z in an RQ-VAE", "its latents are not a distribution"));
        }
        let config = VqganConfig {
            image_size: network.resolution,
            in_channels: network.in_channels,
            out_channels: network.out_ch,
            label_maps: false,
            label_shift: 0,
            ch: network.ch,
            ch_mult: network.ch_mult.clone(),
            num_res_blocks: network.num_res_blocks,
            attn_resolutions: network.attn_resolutions.clone(),
            mid_attention: true,
            dropout: network.dropout,
            z_channels: network.z_channels,
            embed_dim: self.embed_dim,
            quant_kernel: 1,
            norm_groups: self.norm_groups,
            norm_epsilon: 1e-6,
            resamp_with_conv: network.resamp_with_conv,
            shortcut: Shortcut::Pointwise,
            quantizer: QuantizerConfig::Residual(self.quantizer(restart)?),
        };
        let rules = Rules::builtin(SYSTEM, "tokenizer")?;
        Ok(rules.import(config.init(device)?, &case.weights_of(file, "")?)?.0)
    }

    /// Height and width of the images.
    pub(super) fn image_size(&self) -> (usize, usize) {
        (self.ddconfig.resolution, self.ddconfig.resolution)
    }

    /// The rules that give our tensors the official names.
    pub(super) fn export(&self) -> Result<Rules> {
        Ok(Rules::export(SYSTEM, "tokenizer")?.with_numbers([("depth", self.code_shape[2])]))
    }
}

pub(super) fn residual(vqgan: &Vqgan) -> Result<&Residual> {
    match &vqgan.quantize {
        QuantizerModel::Residual(quantizer) => Ok(quantizer),
        _ => Err(Error::invalid("tokenizer", "its quantizer is of another kind")),
    }
}

/// A module's parameters under the official names.
pub(super) struct Official(BTreeMap<String, Stored>);

impl Official {
    pub(super) fn parameters<M: Module>(rules: &Rules, module: &M) -> Result<Self> {
        let names: Vec<String> = parameter_map(module).into_keys().collect();
        let ours = parameters(module, &names)?;
        let plan = rules.plan(&ours)?;
        let read = |name: String| Ok((name.clone(), plan.read(&name)?));
        plan.shapes().into_keys().map(read).collect::<Result<_>>().map(Self)
    }

    /// The values of a tensor.
    pub(super) fn values(&self, name: &str) -> Result<&[f32]> {
        let found = self.0.get(name).and_then(Stored::floats);
        found.ok_or_else(|| Error::unknown("our tensors", "tensor", name, self.0.keys()))
    }
}
