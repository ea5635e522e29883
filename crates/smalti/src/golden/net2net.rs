//! VQGAN's second stage against taming-transformers: token orders, teacher forcing, generation, and the sliding window.

use super::case::{Case, Comparison, gradient, turned};
use super::vqgan;
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::Deserialize;
use smalti_base::{Error, Layout, Result, TokenSpec};
use smalti_models::checkpoint::Rules;
use smalti_models::generators::gpt::{GptGeneration, Window};
use smalti_models::generators::{Gpt, GptConfig, TokenOrder};
use smalti_models::quantizers::Quantizer;
use smalti_models::sampling::{Draws, Sampling, argmax, filter};
use smalti_models::{Codes, Condition, ConditionConfig, Generation, ImageRequest, Known, Request};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// minGPT's settings.
#[derive(Deserialize)]
struct MinGpt {
    vocab_size: usize,
    block_size: usize,
    n_layer: usize,
    n_head: usize,
    n_embd: usize,
    #[serde(default)]
    n_unmasked: usize,
}

impl MinGpt {
    fn config(&self, tokens: TokenSpec, condition: ConditionConfig) -> GptConfig {
        GptConfig {
            visible_prefix: self.n_unmasked > 0,
            shared_table: true,
            block_size: Some(self.block_size),
            ..GptConfig::new(tokens, condition, self.n_embd, self.n_layer, self.n_head)
        }
    }
}

/// A permuter by the name of its class, or by that in the case of permuters.
fn order(name: &str) -> Option<TokenOrder> {
    Some(match name {
        "Identity" | "identity" => TokenOrder::Raster,
        "AlternateParsing" | "alternate" => TokenOrder::Alternate,
        "ZCurve" | "zcurve" => TokenOrder::ZCurve,
        "Subsample" | "subsample" => TokenOrder::Subsample,
        "SpiralOut" | "spiral_out" => TokenOrder::SpiralOut,
        "SpiralIn" | "spiral_in" => TokenOrder::SpiralIn,
        "Random" | "random" => TokenOrder::Random,
        _ => return None,
    })
}

pub(super) fn knows_orders(case: &Case) -> bool {
    let mut names = case.names().peekable();
    names.peek().is_some() && names.all(|name| permutation(name).is_some())
}

/// Order and size of `zcurve.8.forward`, and whether it is the inverse.
fn permutation(name: &str) -> Option<(TokenOrder, usize, bool)> {
    let mut parts = name.split('.');
    let (order, size) = (order(parts.next()?)?, parts.next()?.parse().ok()?);
    match (parts.next()?, parts.next()) {
        ("forward", None) => Some((order, size, false)),
        ("backward", None) => Some((order, size, true)),
        _ => None,
    }
}

pub(super) fn orders(case: &Case, compare: &mut Comparison) -> Result<()> {
    for name in case.names() {
        let Some((order, size, inverse)) = permutation(name) else { continue };
        let mut places = order.places(&Layout::Grid { h: size, w: size })?;
        if inverse {
            let position = |place: usize| places.iter().position(|at| *at == place).unwrap_or_default();
            places = (0..places.len()).map(position).collect();
        }
        compare.ints(name, &places.into_iter().map(|place| place as i64).collect::<Vec<_>>())?;
    }
    Ok(())
}

pub(super) fn knows_transformer(case: &Case) -> bool {
    let fits = |transformer: MinGpt| {
        let prefix = case.shape("c_indices").map_or(0, |shape| shape.last().copied().unwrap_or_default());
        prefix == 1 && [0, prefix].contains(&transformer.n_unmasked)
    };
    case.has(&["c_indices", "z_indices", "logits", "greedy_tokens", "pkeep_logits"])
        && case.setting::<MinGpt>("transformer").is_ok_and(fits)
        && permuter(case).is_ok_and(|permuter| permuter.is_some())
}

fn permuter(case: &Case) -> Result<Option<TokenOrder>> {
    Ok(order(&case.setting_or("permuter", "Identity".to_string())?))
}

/// Rows and columns of the tokens.
fn grid(case: &Case) -> Result<(usize, usize)> {
    let tokens = case.shape("z_indices")?.last().copied().unwrap_or_default();
    let [h, w] = case.setting_or("latent_hw", [1, tokens])?;
    Ok((h, w))
}

/// The transformer, over images whose pixels are tokens: their size does not matter.
fn transformer_of(case: &Case, device: &Device) -> Result<Gpt> {
    let network: MinGpt = case.setting("transformer")?;
    let (h, w) = grid(case)?;
    let tokens = TokenSpec::discrete(Layout::Grid { h, w }, network.vocab_size, (h, w));
    let condition = match starts_alike(case)? {
        true => ConditionConfig::None,
        false => ConditionConfig::Class { classes: network.vocab_size },
    };
    let config = GptConfig {
        order: permuter(case)?.unwrap_or_default(),
        start_token: case.ints("c_indices")?.first().map_or(0, |token| *token as usize),
        ..network.config(tokens, condition)
    };
    Ok(Rules::builtin("vqgan", "generator")?.import(config.init(device)?, &case.weights("")?)?.0)
}

/// Whether the condition is one constant token (`SOSProvider`) and no class (`Labelator`).
fn starts_alike(case: &Case) -> Result<bool> {
    let tokens = case.ints("c_indices")?;
    let is_class = case.config.get("cond").is_some_and(|cond| cond.to_string().to_lowercase().contains("label"));
    Ok(!is_class && tokens.iter().all(|token| token == &tokens[0]))
}

fn conditions(case: &Case) -> Result<Vec<Condition>> {
    match starts_alike(case)? {
        true => Ok(vec![Condition::None; case.ints("c_indices")?.len()]),
        // Of a class the token is its number.
        false => {
            let name = if case.has(&["cond"]) { "cond" } else { "c_indices" };
            Ok(case.ints(name)?.iter().map(|class| Condition::Class(*class as u32)).collect())
        }
    }
}

/// A case's tokens, in the order of prediction, as they are stored: row by row.
fn row_by_row(case: &Case, gpt: &Gpt, name: &str) -> Result<Vec<Vec<u32>>> {
    let length = gpt.order.len();
    let row = |tokens: &[i64]| {
        let mut row = vec![0; length];
        gpt.order.iter().zip(tokens).for_each(|(place, token)| row[*place] = *token as u32);
        row
    };
    Ok(case.ints(name)?.chunks(length).map(row).collect())
}

fn upload(rows: &[Vec<u32>], device: &Device) -> Tensor<2, Int> {
    let flat: Vec<i64> = rows.iter().flatten().map(|code| i64::from(*code)).collect();
    let columns = flat.len() / rows.len().max(1);
    Tensor::from_data(TensorData::new(flat, [rows.len(), columns]), device)
}

pub(super) fn transformer(case: &Case, compare: &mut Comparison) -> Result<()> {
    let device = case.device();
    let gpt = transformer_of(case, device)?;
    let vocabulary = gpt.tokens.table.dims()[0];
    let codes = row_by_row(case, &gpt, "z_indices")?;
    for name in ["c_indices", "z_indices", "pkeep_random"] {
        if let Some(token) = case.ints(name)?.iter().find(|token| !(0..vocabulary as i64).contains(*token)) {
            return Err(Error::invalid(
                case.title(),
                format!("`{name}` holds {token}, which is not in 0..{vocabulary}"),
            ));
        }
    }
    let (condition, ordered) = (case.ids::<2>("c_indices")?, case.ids::<2>("z_indices")?);
    compare.floats("logits", gpt.logits(condition.clone(), ordered.clone()))?;
    let predictions = gpt.predictions(Codes::Discrete(upload(&codes, device)), &conditions(case)?)?;
    compare.floats("loss", predictions.loss().loss)?;

    let first = |row: &[f32], sampling: &Sampling| {
        let mut row = row[..vocabulary].to_vec();
        filter(&mut row, sampling);
        row.into_iter().map(|logit| logit.max(-1e30)).collect::<Vec<f32>>()
    };
    for (name, top_p) in [("topk_logits", false), ("topk_topp_logits", true)] {
        if case.has(&[name]) {
            let sampling = Sampling {
                top_k: Some(case.said(name, "top-k=")? as usize),
                top_p: top_p.then(|| case.said(name, "top-p=")).transpose()?.map(|p| p as f32),
                ..Default::default()
            };
            let logits = gpt.logits(condition.clone(), ordered.clone()).into_data();
            let logits: Vec<f32> = logits.iter::<f32>().collect();
            let rows = logits.chunks(vocabulary * gpt.order.len());
            compare.values(name, &rows.flat_map(|rows| first(rows, &sampling)).collect::<Vec<_>>())?;
        }
    }

    let greedy = generate(case, &gpt, |_| None)?;
    compare.ids("greedy_tokens", gpt.ordered(greedy.clone()))?;
    if case.has(&["half_tokens"]) {
        let mut keep = vec![false; gpt.order.len()];
        gpt.order[..gpt.order.len() / 2].iter().for_each(|place| keep[*place] = true);
        let known = |image: usize| Some(Known { tokens: codes[image].clone().into(), keep: keep.clone() });
        compare.ids("half_tokens", gpt.ordered(generate(case, &gpt, known)?))?;
    }
    if case.has(&["image", "greedy_image"]) {
        let vqgan = vqgan::tokenizer(case, "first_stage.", true, device)?;
        let found = vqgan.quantize.encode(vqgan.latents(case.tensor("image")?));
        compare.ids("z_indices", gpt.ordered(found))?;
        let (h, w) = grid(case)?;
        let latents = vqgan.quantize.decode(greedy, h, w);
        compare.floats("greedy_image", vqgan.to_pixels(vqgan.features(latents)))?;
    }
    replaced_tokens(case, compare)
}

/// Loss and gradients where some of the tokens that are fed are others (`pkeep`).
fn replaced_tokens(case: &Case, compare: &mut Comparison) -> Result<()> {
    let device = case.autodiff();
    let gpt = transformer_of(case, &device)?;
    let ids = |name: &str| -> Result<Tensor<2, Int>> {
        let shape = case.shape(name)?;
        Ok(Tensor::from_data(TensorData::new(case.ints(name)?.to_vec(), shape), &device))
    };
    let ordered = ids("z_indices")?;
    let fed = ids("pkeep_random")?.mask_where(ids("pkeep_mask")?.equal_elem(1), ordered.clone());
    let logits = gpt.logits(ids("c_indices")?, fed);
    compare.floats("pkeep_logits", logits.clone().inner())?;
    let loss = smalti_kernels::softmax_cross_entropy(logits.flatten(0, 1), ordered.flatten(0, 1), None, 0.0);
    compare.floats("pkeep_loss", loss.clone().inner())?;
    let gradients = loss.backward();
    for name in case.names().filter(|name| name.starts_with("grad.")) {
        let path: Vec<&str> = name.trim_start_matches("grad.").trim_start_matches("transformer.").split('.').collect();
        match path.as_slice() {
            ["tok_emb", "weight"] => compare.floats(name, gradient(name, gpt.tokens.table.grad(&gradients))?)?,
            ["pos_emb"] => compare.floats(name, gradient(name, gpt.positions.table.grad(&gradients))?)?,
            ["head", "weight"] => compare.floats(name, turned(name, gpt.head.weight.grad(&gradients))?)?,
            ["blocks", block, part, layer, "weight"] => {
                let block = block.parse().ok().and_then(|block: usize| gpt.blocks.get(block));
                let dense = block.and_then(|block| match (*part, *layer) {
                    ("attn", "key") => Some(&block.attention.key),
                    ("attn", "query") => Some(&block.attention.query),
                    ("attn", "value") => Some(&block.attention.value),
                    ("attn", "proj") => Some(&block.attention.output),
                    ("mlp", "0") => Some(&block.mlp.expand),
                    ("mlp", "2") => Some(&block.mlp.contract),
                    _ => None,
                });
                if let Some(dense) = dense {
                    compare.floats(name, turned(name, dense.weight.grad(&gradients))?)?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// The most likely tokens, row by row.
fn generate(case: &Case, gpt: &Gpt, known: impl Fn(usize) -> Option<Known>) -> Result<Tensor<2, Int>> {
    let images = conditions(case)?.into_iter().enumerate();
    let images = images.map(|(image, condition)| ImageRequest { condition, seed: 0, known: known(image) }).collect();
    let request = Request::new(images, Sampling { temperature: 0.0, ..Default::default() });
    finish(gpt.start_with(&request, Box::new(MostLikely::default()))?, case)
}

fn finish(mut generation: GptGeneration, case: &Case) -> Result<Tensor<2, Int>> {
    while generation.done() < generation.steps() {
        generation.next();
    }
    let codes = generation.codes().discrete();
    codes.ok_or_else(|| Error::invalid(case.title(), "the generator made no codes"))
}

/// The most likely token; keeps the logits of one step, by image.
#[derive(Default)]
struct MostLikely {
    step: Option<usize>,
    seen: Arc<Mutex<BTreeMap<usize, Vec<f32>>>>,
}

impl Draws for MostLikely {
    fn token(&self, image: usize, step: usize, _: usize, logits: &[f32]) -> usize {
        if let (true, Ok(mut seen)) = (self.step == Some(step), self.seen.lock()) {
            seen.insert(image, logits.to_vec());
        }
        argmax(logits)
    }

    fn confidence_noise(&self, _: usize, _: usize, _: usize) -> f32 {
        0.0
    }

    fn noise(&self, _: usize, _: usize, _: usize, codes: usize) -> Vec<f32> {
        vec![0.0; codes]
    }
}

pub(super) fn knows_window(case: &Case) -> bool {
    let shape = |name: &str| case.shape(name).unwrap_or_default();
    case.has(&["c_indices", "indices", "trace"])
        && shape("c_indices") == shape("indices")
        && shape("indices").len() == 3
        && case.setting::<usize>("window").is_ok_and(|window| shape("indices")[1..].iter().all(|side| *side >= window))
        && case.setting::<MinGpt>("gpt").is_ok_and(|gpt| gpt.n_unmasked == 0)
}

pub(super) fn window(case: &Case, compare: &mut Comparison) -> Result<()> {
    let network: MinGpt = case.setting("gpt")?;
    let size: usize = case.setting("window")?;
    let shape = case.shape("indices")?;
    let grid = (shape[1], shape[2]);
    let tokens = TokenSpec::discrete(Layout::Grid { h: size, w: size }, network.vocab_size, (size, size));
    let condition = ConditionConfig::Codes { codes: network.vocab_size, h: size, w: size };
    let config = network.config(tokens, condition);
    let (gpt, _) = Rules::builtin("vqgan", "generator")?.import(config.init(case.device())?, &case.weights("")?)?;

    let window = Window { grid, size: (size, size) };
    let step = |(row, column): (usize, usize)| {
        let (top, left) = window.origin(row, column);
        [row, column, row - top, column - left, top, left].map(|number| number as i64)
    };
    let steps = (0..grid.0).flat_map(|row| (0..grid.1).map(move |column| (row, column)));
    compare.ints("trace", &steps.flat_map(step).collect::<Vec<_>>())?;

    let row = |codes: &[i64]| Condition::Codes(codes.iter().map(|code| *code as u32).collect());
    let conditions = case.ints("c_indices")?.chunks(grid.0 * grid.1).map(row);
    let images: Vec<ImageRequest> =
        conditions.map(|condition| ImageRequest { condition, seed: 0, known: None }).collect();
    // With temperature 1 and no cut, the draws see the logits as they are.
    let request = Request { grid: Some(grid), ..Request::new(images, Sampling::default()) };
    compare.ids("indices", finish(gpt.start_with(&request, Box::new(MostLikely::default()))?, case)?)?;
    for name in case.names() {
        let at = name.strip_prefix("logits_").and_then(|at| at.split_once('_'));
        let Some((Ok(row), Ok(column))) = at.map(|(row, column)| (row.parse(), column.parse::<usize>())) else {
            continue;
        };
        let row: usize = row;
        let seen = Arc::default();
        let draws = MostLikely { step: Some(row * grid.1 + column), seen: Arc::clone(&seen) };
        finish(gpt.start_with(&request, Box::new(draws))?, case)?;
        let seen = seen.lock().map(|seen| seen.clone()).unwrap_or_default();
        compare.values(name, &seen.into_values().flatten().collect::<Vec<f32>>())?;
    }
    Ok(())
}
