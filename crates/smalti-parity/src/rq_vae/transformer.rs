//! The generator: both networks, losses and gradients, a greedy generation and the completion of a picture.

use super::official::{RqVae, SYSTEM, residual};
use crate::case::Case;
use crate::comparison::Comparison;
use crate::gradients::Official;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::Deserialize;
use smalti_base::{Error, Layout, Result, TokenSpec, Vocabulary};
use smalti_models::checkpoint::Rules;
use smalti_models::generators::Padding;
use smalti_models::generators::rq_transformer::{CodebookConfig, Gelu, RqGeneration, Vectors};
use smalti_models::generators::{RqTransformer, RqTransformerConfig};
use smalti_models::sampling::{Draws, Sampling, argmax};
use smalti_models::tokenizers::{TokenizerModel, Vqgan};
use smalti_models::{Codes, Condition, ConditionConfig, Generation, Generator, ImageRequest, Known, Request};

const VAE: &str = "rqvae_weights.safetensors";

/// Settings of a generator.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Transformer {
    #[serde(rename = "type")]
    _kind: Kind,
    block_size: [usize; 3],
    vocab_size: Vocabulary,
    embed_dim: usize,
    input_embed_dim: usize,
    shared_tok_emb: bool,
    shared_cls_emb: bool,
    input_emb_vqvae: bool,
    head_emb_vqvae: bool,
    cumsum_depth_ctx: bool,
    vocab_size_cond: usize,
    block_size_cond: usize,
    #[serde(default)]
    embd_pdrop: f64,
    body: Stack,
    head: Stack,
}

#[derive(Deserialize)]
enum Kind {
    #[serde(rename = "rq-transformer")]
    RqTransformer,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Stack {
    n_layer: usize,
    block: Block,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Block {
    n_head: usize,
    #[serde(default)]
    embed_dim: Option<usize>,
    #[serde(default)]
    attn_bias: Option<bool>,
    #[serde(default)]
    mlp_bias: Option<bool>,
    #[serde(default)]
    attn_pdrop: f64,
    #[serde(default)]
    resid_pdrop: f64,
    #[serde(default)]
    gelu: Option<String>,
}

impl Transformer {
    fn config(&self, quantizer: &RqVae) -> Result<RqTransformerConfig> {
        let [h, w, depth] = self.block_size;
        let from = |tokenizer: bool| if tokenizer { Vectors::Codebook } else { Vectors::Own };
        let uses = self.input_emb_vqvae || self.head_emb_vqvae;
        let codebook = CodebookConfig { channels: self.input_embed_dim, shared: quantizer.quantizer(true)?.shared };
        let condition = match (self.vocab_size_cond, self.block_size_cond) {
            (0 | 1, 0 | 1) => ConditionConfig::None,
            (classes, 0 | 1) => ConditionConfig::Class { classes },
            (vocabulary, length) => ConditionConfig::Text { vocabulary, length, padding: Padding::Id(0) },
        };
        for block in [&self.body.block, &self.head.block] {
            for (name, given) in [("attn_bias", block.attn_bias), ("mlp_bias", block.mlp_bias)] {
                if given == Some(false) {
                    return Err(Error::unsupported(format!("{name} = false"), "official layers have biases"));
                }
            }
            if block.embed_dim.is_some_and(|width| width != self.embed_dim) {
                return Err(Error::unsupported("blocks of another width than the model", "give one embed_dim"));
            }
        }
        let (body, head) = (&self.body.block, &self.head.block);
        let same = |a: f64, b: f64| a == b;
        if !same(body.attn_pdrop, head.attn_pdrop)
            || !same(body.resid_pdrop, head.resid_pdrop)
            || body.gelu != head.gelu
        {
            return Err(Error::unsupported("another dropout or gelu in head than in body", "give both the same"));
        }
        Ok(RqTransformerConfig {
            tokens: TokenSpec::discrete(Layout::Stack { h, w, depth }, self.vocab_size.clone(), quantizer.image_size()),
            condition: condition.into(),
            condition_dropout: 0.0,
            width: self.embed_dim,
            depth: self.body.n_layer,
            head_depth: self.head.n_layer,
            heads: body.n_head,
            head_heads: Some(head.n_head),
            mlp_ratio: 4,
            activation: match body.gelu.as_deref() {
                None | Some("v1") => Gelu::Exact,
                Some("v2") => Gelu::Sigmoid,
                Some(other) => return Err(Error::unknown("config", "gelu", other, ["v1", "v2"])),
            },
            dropout: body.resid_pdrop,
            embedding_dropout: self.embd_pdrop,
            attention_dropout: body.attn_pdrop,
            body_vectors: from(self.input_emb_vqvae),
            head_vectors: from(self.head_emb_vqvae),
            codebook: uses.then_some(codebook),
            shared_vectors: self.shared_tok_emb,
            cumulative: self.cumsum_depth_ctx && self.head_emb_vqvae,
            shared_classifier: self.shared_cls_emb,
            text_share: 0.1,
            soft_targets: None,
        })
    }
}

/// Both networks of a case.
struct Networks {
    vqgan: Vqgan,
    generator: RqTransformer,
}

impl Networks {
    fn import(case: &Case, device: &Device) -> Result<Self> {
        let tokenizer: RqVae = case.setting("rqvae")?;
        let vqgan = tokenizer.import(case, VAE, true, case.device())?;
        let config = case.setting::<Transformer>("rqtransformer")?.config(&tokenizer)?;
        let mut generator: RqTransformer =
            Rules::builtin(SYSTEM, "generator")?.import(config.init(device)?, &case.weights("")?)?.0;
        generator.adopt(&vqgan)?;
        Ok(Self { vqgan, generator })
    }
}

/// The ids of a case's conditions; 0 where a picture begins without one.
fn condition_ids(case: &Case, b: usize, device: &Device) -> Result<Tensor<2, Int>> {
    match case.has(&["cond"]) {
        true => ids(case, "cond", device),
        false => Ok(Tensor::zeros([b, 1], device)),
    }
}

fn ids(case: &Case, name: &str, device: &Device) -> Result<Tensor<2, Int>> {
    let (values, shape) = (case.ints(name)?.to_vec(), case.shape(name)?);
    let rows = shape.first().copied().unwrap_or(1).max(1);
    let columns = values.len() / rows;
    Ok(Tensor::from_data(TensorData::new(values, [rows, columns]), device))
}

fn conditions(case: &Case, generator: &RqTransformer, b: usize) -> Result<Vec<Condition>> {
    if generator.config.condition.is_none() {
        return Ok(vec![Condition::none(); b]);
    }
    let ids = case.ints("cond")?;
    let row = |row: &[i64]| match generator.config.condition.text() {
        Some(_) => Condition::text(row.iter().map(|id| *id as u32).collect()),
        None => Condition::class(row[0] as u32),
    };
    Ok(ids.chunks(ids.len() / b).map(row).collect())
}

pub(crate) fn knows_transformer(case: &Case) -> bool {
    case.has(&["image", "codes", "body_in", "body_out", "head_in", "head_out", "logits", "loss_hard"])
}

pub(crate) fn transformer(case: &Case, compare: &mut Comparison) -> Result<()> {
    let networks = Networks::import(case, case.device())?;
    let Networks { vqgan, generator } = &networks;
    let latents = vqgan.latents(case.tensor("image")?);
    let codes = vqgan.quantize.encode(latents.clone());
    compare.ids("codes", codes.clone())?;
    let [b, _] = codes.dims();
    let pass = generator.pass(condition_ids(case, b, case.device())?, codes.clone());
    compare.floats("body_in", pass.body_in.clone())?;
    compare.floats("body_out", pass.body_out.clone())?;
    compare.floats("head_in", pass.head_in.clone())?;
    compare.floats("head_out", pass.head_out.clone())?;
    compare.floats("logits", generator.logits(pass.head_out.clone()))?;
    compare.floats("loss_per_depth", generator.depth_losses(&pass, codes))?;
    if let Some(logits) = generator.text_logits(pass.body_out) {
        compare.floats("cond_logits", logits)?;
    }
    let temperature = case.said("soft_targets", "softmax(-d/")?;
    let (_, shares) = residual(vqgan)?.soft(latents, temperature, None)?;
    compare.floats("soft_targets", shares)?;
    losses(case, compare)?;
    greedy(case, compare, &networks)?;
    completion(case, compare, &networks)
}

/// Losses, and the gradients of the one that training makes small.
fn losses(case: &Case, compare: &mut Comparison) -> Result<()> {
    let device = case.autodiff();
    let generator = Networks::import(case, &device)?.generator;
    let codes = ids(case, "codes", &device)?;
    let [b, length] = codes.dims();
    let ids = condition_ids(case, b, &device)?;
    let given = conditions(case, &generator, b)?;
    let hard = generator.predictions(Codes::Discrete(codes.clone()), &given, 0)?.loss();
    compare.floats("loss_hard", hard.loss)?;
    let pass = generator.pass(ids.clone(), codes);
    let shares = case.floats("soft_targets")?.to_vec();
    let vocabulary = shares.len() / (b * length);
    let shares = Tensor::<3>::from_data(TensorData::new(shares, [b, length, vocabulary]), case.device());
    let soft = generator.soft_loss(&pass, shares);
    compare.floats("loss_soft", soft.clone())?;
    let total = match generator.text_loss(&pass, ids) {
        Some(text) => {
            compare.floats("loss_text", text.clone())?;
            let share = generator.config.text_share;
            let total = soft * (1.0 - share) + text * share;
            compare.floats("loss_total", total.clone())?;
            total
        }
        None => soft,
    };
    let gradients = GradientsParams::from_grads(total.backward(), &generator);
    Official::new(case, SYSTEM, "generator")?.compare(case, compare, &generator, &gradients)
}

/// The most likely codes.
struct Greedy;

impl Draws for Greedy {
    fn token(&self, _: usize, _: usize, _: usize, logits: &[f32]) -> usize {
        argmax(logits)
    }

    fn confidence_noise(&self, _: usize, _: usize, _: usize) -> f32 {
        0.0
    }

    fn noise(&self, _: usize, _: usize, _: usize, codes: usize) -> Vec<f32> {
        vec![0.0; codes]
    }
}

fn start(case: &Case, generator: &RqTransformer, known: Vec<Option<Known>>) -> Result<RqGeneration> {
    let given = conditions(case, generator, known.len())?;
    let images = given
        .into_iter()
        .zip(known)
        .map(|(condition, known)| ImageRequest { known, ..ImageRequest::new(condition, 0) });
    let sampling = Sampling { top_k: Some(1.into()), ..Default::default() };
    generator.start_with(&Request::new(images.collect(), sampling), Box::new(Greedy))
}

fn greedy(case: &Case, compare: &mut Comparison, networks: &Networks) -> Result<()> {
    let images = case.shape("greedy.codes")?.first().copied().unwrap_or_default();
    let mut generation = start(case, &networks.generator, vec![None; images])?;
    let mut steps = Vec::with_capacity(generation.steps());
    while generation.done() < generation.steps() {
        let logits = generation.logits()?;
        steps.push(logits.clone());
        generation.decide(logits);
    }
    let row = |image: usize, logits: &Vec<f32>| {
        let codes = logits.len() / images;
        logits[image * codes..][..codes].to_vec()
    };
    let by_image: Vec<f32> =
        (0..images).flat_map(|image| steps.iter().flat_map(move |step| row(image, step))).collect();
    compare.values("greedy.step_logits", &by_image)?;
    let codes = generation.codes();
    if let Codes::Discrete(codes) = &codes {
        compare.ids("greedy.codes", codes.clone())?;
    }
    let model = TokenizerModel::Vqgan(networks.vqgan.clone());
    compare.floats("greedy.image", model.decode(&codes)? * 0.5 + 0.5)
}

/// A picture whose first rows are known.
fn completion(case: &Case, compare: &mut Comparison, networks: &Networks) -> Result<()> {
    if !case.has(&["complete.codes"]) {
        return Ok(());
    }
    let layout = &networks.generator.config.tokens.layout;
    let (h, w) = layout.finest();
    let rows = case.said("complete.codes", "rows < ")? as usize;
    let place: Vec<bool> = (0..h * w).map(|i| i / w < rows).collect();
    let keep = Known::keep(layout, &place);
    let known = case.ints("codes")?.chunks(layout.length()).map(|row| {
        let codes: Vec<u32> = row.iter().map(|code| *code as u32).collect();
        Some(Known { tokens: codes.into(), keep: keep.clone() })
    });
    let mut generation = start(case, &networks.generator, known.collect())?;
    let codes = generation.finish()?.discrete();
    compare.ids("complete.codes", codes.ok_or_else(|| Error::invalid("complete.codes", "vectors were generated"))?)
}
