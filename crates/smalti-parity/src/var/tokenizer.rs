//! The multi-scale quantizer by itself and inside its tokenizer.

use crate::case::{Case, gradient};
use crate::comparison::Comparison;
use crate::gradients::Official;
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::Deserialize;
use smalti_base::{Error, Result};
use smalti_models::Codes;
use smalti_models::checkpoint::Rules;
use smalti_models::losses::TokenizerLossConfig;
use smalti_models::quantizers::multi_scale::Refinement;
use smalti_models::quantizers::vq::Metric;
use smalti_models::quantizers::{
    MultiScale, MultiScaleConfig, Pass, Quantizer, QuantizerConfig, QuantizerModel, VqConfig,
};
use smalti_models::tokenizers::{Tokenizer, TokenizerModel, Vqgan, VqganConfig};
use smalti_nn::Shortcut;

/// The official settings of a quantizer, and of the tokenizer around it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Scales {
    vocab_size: usize,
    #[serde(alias = "Cvae")]
    pub(super) z_channels: usize,
    #[serde(default)]
    using_znorm: bool,
    #[serde(default = "quarter")]
    beta: f64,
    #[serde(default)]
    default_qresi_counts: usize,
    #[serde(default = "half")]
    quant_resi: f64,
    #[serde(default = "four")]
    share_quant_resi: usize,
    v_patch_nums: Vec<usize>,
    // Of tokenizers.
    #[serde(default)]
    ch: usize,
    #[serde(default = "groups")]
    norm_groups: usize,
    #[serde(default)]
    dropout: f64,
    #[serde(default = "three")]
    quant_conv_ks: usize,
}

fn quarter() -> f64 {
    0.25
}

fn half() -> f64 {
    0.5
}

fn four() -> usize {
    4
}

fn groups() -> usize {
    32
}

fn three() -> usize {
    3
}

impl Scales {
    /// The settings at `place` of the configuration.
    ///
    /// # Errors
    /// As [`Case::setting`].
    pub(super) fn read(case: &Case, place: &str) -> Result<Self> {
        let key = |name: &str| if place.is_empty() { name.to_string() } else { format!("{place}.{name}") };
        case.ignore(&[&key("test_mode")]);
        case.setting(place)
    }

    pub(super) fn config(&self) -> MultiScaleConfig {
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

pub(crate) fn knows_quantizer(case: &Case) -> bool {
    case.has(&["f", "idx_0", "fhat_0", "var_input", "train_out", "grad_embedding"])
}

pub(crate) fn quantizer(case: &Case, compare: &mut Comparison) -> Result<()> {
    let config = Scales::read(case, "")?.config();
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
    let out = quantizer.train_forward(f.clone(), &Pass::default());
    compare.floats("train_out", out.latents_bchw.clone())?;
    let loss = out.loss().ok_or_else(|| Error::invalid("train_vq_loss", "the quantizer has no loss"))?;
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

pub(super) fn known(quantizer: &MultiScale, codes: Tensor<2, Int>) -> Result<Tensor<3>> {
    quantizer.known_before(codes).ok_or_else(|| Error::invalid("var_input", "there is one level only"))
}

impl Scales {
    /// With the levels and blocks that the official code always has.
    pub(super) fn import(&self, case: &Case, weights: &str, device: &Device) -> Result<Vqgan> {
        let [_, _, image_size, _] = case.tensor::<4>("image")?.dims();
        let ch_mult = vec![1, 1, 2, 2, 4];
        let config = VqganConfig {
            image_size,
            in_channels: 3,
            out_channels: 3,
            label_maps: false,
            label_shift: 0,
            ch: self.ch,
            num_res_blocks: 2,
            attn_resolutions: vec![image_size >> (ch_mult.len() - 1)],
            ch_mult,
            mid_attention: true,
            dropout: self.dropout,
            z_channels: self.z_channels,
            embed_dim: self.z_channels,
            quant_kernel: self.quant_conv_ks,
            norm_groups: self.norm_groups,
            norm_epsilon: 1e-6,
            resamp_with_conv: true,
            shortcut: Shortcut::Pointwise,
            quantizer: QuantizerConfig::MultiScale(self.config()),
        };
        let weights = case.weights_of(weights, "")?;
        Ok(Rules::builtin("var", "tokenizer")?.import(config.init(device)?, &weights)?.0)
    }
}

pub(super) fn multi_scale(vqgan: &Vqgan) -> Result<&MultiScale> {
    match &vqgan.quantize {
        QuantizerModel::MultiScale(quantizer) => Ok(quantizer),
        _ => Err(Error::invalid("tokenizer", "its quantizer is of another kind")),
    }
}

pub(crate) fn knows_tokenizer(case: &Case) -> bool {
    case.has(&["image", "encoder_out", "f", "idx_0", "fhat_0", "recon_last", "train_vq_loss"])
}

pub(crate) fn tokenizer(case: &Case, compare: &mut Comparison) -> Result<()> {
    let official = Scales::read(case, "")?;
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
    let raw = vqgan.decode(&Codes::Discrete(codes))?;
    compare.floats("decoder_raw_last", raw.clone())?;
    compare.floats("recon_last", raw.clamp(-1.0, 1.0))?;
    training(case, compare, &official)
}

/// The ordinary step of training a tokenizer.
fn training(case: &Case, compare: &mut Comparison, official: &Scales) -> Result<()> {
    let model = TokenizerModel::Vqgan(official.import(case, "weights.safetensors", &case.autodiff())?);
    let config = TokenizerLossConfig {
        l1: 0.0,
        l2: 1.0,
        perceptual: None,
        perceptual_weight: 0.0,
        adversarial: None,
        codebook_weight: 1.0,
        ..Default::default()
    };
    let step = config.init(model.spec(), case.device())?.step(&model, None, case.tensor("image")?, &Pass::at(0));
    compare.floats("train_recon", step.reconstruction)?;
    for (name, ours) in [("train_rec_loss", "l2"), ("train_vq_loss", "codebook")] {
        let term = step.terms.iter().find(|(term, _)| *term == ours).map(|(_, value)| value.clone());
        compare.floats(name, term.ok_or_else(|| Error::invalid(name, "the training step has no such term"))?)?;
    }
    let TokenizerModel::Vqgan(vqgan) = &model else { return Ok(()) };
    Official::new(case, "var", "tokenizer")?.compare(case, compare, vqgan, &step.gradients)
}
