//! VQGAN's second stage against taming-transformers: token orders, teacher forcing, generation, and the sliding window.

use super::case::Case;
use super::comparison::Comparison;
use super::gradients::Official;
use super::vqgan;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::Deserialize;
use serde_json::Value;
use smalti_base::{Error, Layout, Result, TokenSpec};
use smalti_models::checkpoint::Rules;
use smalti_models::generators::gpt::{GptGeneration, Window};
use smalti_models::generators::{Gpt, GptConfig, TokenOrder};
use smalti_models::sampling::{Draws, Sampling, argmax, filter};
use smalti_models::tokenizers::Tokenizer;
use smalti_models::{Codes, Condition, ConditionConfig, Generation, Generator, ImageRequest, Known, Request};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// minGPT's settings.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
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
    /// The settings at `place` of the configuration. Cases have no dropout: what they hold is compared without.
    fn read(case: &Case, place: &str) -> Result<Self> {
        for key in ["embd_pdrop", "resid_pdrop", "attn_pdrop"] {
            case.ignore(&[&format!("{place}.{key}")]);
        }
        case.setting(place)
    }

    fn config(&self, tokens: TokenSpec, condition: ConditionConfig) -> GptConfig {
        GptConfig {
            visible_prefix: self.n_unmasked > 0,
            visible_places: (self.n_unmasked > 0).then_some(self.n_unmasked),
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
        "Random" | "RandomPermute" | "random" => TokenOrder::Random,
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
    // Names say the sizes again.
    case.ignore(&["sizes"]);
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
    case.has(&["c_indices", "z_indices", "logits"]) && case.has_settings(&["transformer"])
}

/// The order, by the name of the official class, which may be a whole path in a `target`.
fn permuter(case: &Case) -> Result<TokenOrder> {
    let key = if case.has_settings(&["permuter.target"]) { "permuter.target" } else { "permuter" };
    case.ignore(&["permuter.params"]);
    let name: String = case.setting_or(key, "Identity".to_string())?;
    let class = name.rsplit('.').next().unwrap_or_default();
    let known = ["Identity", "AlternateParsing", "ZCurve", "Subsample", "SpiralOut", "SpiralIn", "Random"];
    order(class).ok_or_else(|| Error::unknown(case.title(), "permuter", name.clone(), known))
}

/// Rows and columns of the tokens: a square, if nothing is said and there can be one.
fn grid(case: &Case) -> Result<(usize, usize)> {
    let tokens = case.shape("z_indices")?.last().copied().unwrap_or_default();
    let side = tokens.isqrt();
    let [h, w] = case.setting_or("latent_hw", if side * side == tokens { [side, side] } else { [1, tokens] })?;
    Ok((h, w))
}

/// What stands in front of the image tokens.
fn condition(case: &Case, network: &MinGpt) -> Result<ConditionConfig> {
    let prefix = case.shape("c_indices")?.last().copied().unwrap_or_default();
    Ok(match (starts_alike(case)?, prefix) {
        (true, 1) => ConditionConfig::None,
        (false, 1) => ConditionConfig::Class { classes: network.vocab_size },
        // Tokens of another stage; how they lie in their picture is nothing to the transformer.
        (_, places) => ConditionConfig::Codes { codes: network.vocab_size, h: 1, w: places },
    })
}

/// The transformer, over images whose pixels are tokens: their size does not matter.
fn transformer_of(case: &Case, device: &Device) -> Result<Gpt> {
    let network = MinGpt::read(case, "transformer")?;
    let (h, w) = grid(case)?;
    let tokens = TokenSpec::discrete(Layout::Grid { h, w }, network.vocab_size, (h, w));
    let config = GptConfig {
        order: permuter(case)?,
        start_token: case.ints("c_indices")?.first().map_or(0, |token| *token as usize),
        ..network.config(tokens, condition(case, &network)?)
    };
    Ok(Rules::builtin("vqgan", "generator")?.import(config.init(device)?, &case.weights("")?)?.0)
}

/// Whether the condition is one constant token (`SOSProvider`) and no class (`Labelator`).
fn starts_alike(case: &Case) -> Result<bool> {
    let tokens = case.ints("c_indices")?;
    let is_class = case.setting_or("cond", Value::Null)?.to_string().to_lowercase().contains("label");
    Ok(!is_class && tokens.iter().all(|token| token == &tokens[0]))
}

fn conditions(case: &Case) -> Result<Vec<Condition>> {
    let rows = case.ints("c_indices")?;
    let prefix = case.shape("c_indices")?.last().copied().unwrap_or_default();
    match (starts_alike(case)?, prefix) {
        (true, 1) => Ok(vec![Condition::none(); rows.len()]),
        // Of a class the token is its number.
        (false, 1) => {
            let name = if case.has(&["cond"]) { "cond" } else { "c_indices" };
            Ok(case.ints(name)?.iter().map(|class| Condition::class(*class as u32)).collect())
        }
        (_, places) => {
            let row = |codes: &[i64]| Condition::codes(codes.iter().map(|code| *code as u32).collect());
            Ok(rows.chunks(places.max(1)).map(row).collect())
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
    // The case says itself which tokens are replaced.
    case.ignore(&["pkeep"]);
    let gpt = transformer_of(case, device)?;
    let vocabulary = gpt.tokens.table.dims()[0];
    let codes = row_by_row(case, &gpt, "z_indices")?;
    let given = ["c_indices", "z_indices", "pkeep_random"];
    for name in given.into_iter().filter(|name| case.has(&[name])) {
        if let Some(token) = case.ints(name)?.iter().find(|token| !(0..vocabulary as i64).contains(*token)) {
            return Err(Error::invalid(
                case.title(),
                format!("`{name}` holds {token}, which is not in 0..{vocabulary}"),
            ));
        }
    }
    let (condition, ordered) = (case.ids::<2>("c_indices")?, case.ids::<2>("z_indices")?);
    compare.floats("logits", gpt.logits(condition.clone(), ordered.clone()))?;
    let predictions = gpt.predictions(Codes::Discrete(upload(&codes, device)), &conditions(case)?, 0)?;
    if case.has(&["loss"]) {
        compare.floats("loss", predictions.loss().loss)?;
    }
    filtered(case, compare, &gpt)?;
    generations(case, compare, &gpt, &codes)?;
    match case.has(&["pkeep_mask", "pkeep_random"]) {
        true => replaced_tokens(case, compare),
        false => taught(case, compare),
    }
}

/// The first logits after top-k and top-p.
fn filtered(case: &Case, compare: &mut Comparison, gpt: &Gpt) -> Result<()> {
    let vocabulary = gpt.tokens.table.dims()[0];
    let (condition, ordered) = (case.ids::<2>("c_indices")?, case.ids::<2>("z_indices")?);
    let first = |row: &[f32], sampling: &Sampling| {
        let mut row = row[..vocabulary].to_vec();
        filter(&mut row, sampling);
        row.into_iter().map(|logit| logit.max(-1e30)).collect::<Vec<f32>>()
    };
    for (name, top_p) in [("topk_logits", false), ("topk_topp_logits", true)] {
        if case.has(&[name]) {
            let sampling = Sampling {
                top_k: Some((case.said(name, "top-k=")? as usize).into()),
                top_p: top_p.then(|| case.said(name, "top-p=")).transpose()?.map(|p| (p as f32).into()),
                ..Default::default()
            };
            let logits = gpt.logits(condition.clone(), ordered.clone()).into_data();
            let logits: Vec<f32> = logits.iter::<f32>().collect();
            let rows = logits.chunks(vocabulary * gpt.order.len());
            compare.values(name, &rows.flat_map(|rows| first(rows, &sampling)).collect::<Vec<_>>())?;
        }
    }

    Ok(())
}

/// Most likely tokens: all, the second half, and the picture of all.
fn generations(case: &Case, compare: &mut Comparison, gpt: &Gpt, codes: &[Vec<u32>]) -> Result<()> {
    let device = case.device();
    if !case.has(&["greedy_tokens"]) {
        case.ignore(&["first_stage"]);
        return Ok(());
    }
    let greedy = generate(case, gpt, |_| None)?;
    compare.ids("greedy_tokens", gpt.ordered(greedy.clone()))?;
    if case.has(&["half_tokens"]) {
        let mut keep = vec![false; gpt.order.len()];
        gpt.order[..gpt.order.len() / 2].iter().for_each(|place| keep[*place] = true);
        let known = |image: usize| Some(Known { tokens: codes[image].clone().into(), keep: keep.clone() });
        compare.ids("half_tokens", gpt.ordered(generate(case, gpt, known)?))?;
    }
    if !case.has(&["image", "greedy_image"]) {
        // Nothing was made with it.
        case.ignore(&["first_stage"]);
    } else {
        let vqgan = vqgan::tokenizer(case, "first_stage.", true, device)?;
        let found = vqgan.quantize.encode(vqgan.latents(case.tensor("image")?));
        compare.ids("z_indices", gpt.ordered(found))?;
        let (h, w) = grid(case)?;
        let latents = vqgan.quantize.decode(greedy, h, w);
        compare.floats("greedy_image", vqgan.to_pixels(vqgan.features(latents)))?;
    }
    Ok(())
}

/// Loss and gradients where some of the tokens that are fed are others (`pkeep`).
fn replaced_tokens(case: &Case, compare: &mut Comparison) -> Result<()> {
    let gpt = transformer_of(case, &case.autodiff())?;
    let ordered = learning_ids(case, "z_indices")?;
    let keep = learning_ids(case, "pkeep_mask")?.equal_elem(1);
    let fed = learning_ids(case, "pkeep_random")?.mask_where(keep, ordered.clone());
    let logits = gpt.logits(learning_ids(case, "c_indices")?, fed);
    compare.floats("pkeep_logits", logits.clone().inner())?;
    let loss = smalti_kernels::softmax_cross_entropy(logits.flatten(0, 1), ordered.flatten(0, 1), None, 0.0);
    compare.floats("pkeep_loss", loss.clone().inner())?;
    gradients(case, compare, &gpt, loss)
}

/// Gradients of the plain loss.
fn taught(case: &Case, compare: &mut Comparison) -> Result<()> {
    let gpt = transformer_of(case, &case.autodiff())?;
    let ordered = learning_ids(case, "z_indices")?;
    let logits = gpt.logits(learning_ids(case, "c_indices")?, ordered.clone());
    let loss = smalti_kernels::softmax_cross_entropy(logits.flatten(0, 1), ordered.flatten(0, 1), None, 0.0);
    gradients(case, compare, &gpt, loss)
}

fn learning_ids(case: &Case, name: &str) -> Result<Tensor<2, Int>> {
    let data = TensorData::new(case.ints(name)?.to_vec(), case.shape(name)?);
    Ok(Tensor::from_data(data, &case.autodiff()))
}

fn gradients(case: &Case, compare: &mut Comparison, gpt: &Gpt, loss: Tensor<1>) -> Result<()> {
    let gradients = GradientsParams::from_grads(loss.backward(), gpt);
    Official::new(case, "vqgan", "generator")?.compare(case, compare, gpt, &gradients)
}

/// The most likely tokens, row by row.
fn generate(case: &Case, gpt: &Gpt, known: impl Fn(usize) -> Option<Known>) -> Result<Tensor<2, Int>> {
    let images = conditions(case)?.into_iter().enumerate();
    let images = images
        .map(|(image, condition)| ImageRequest { known: known(image), ..ImageRequest::new(condition, 0) })
        .collect();
    let request = Request::new(images, Sampling { temperature: 0.0, ..Default::default() });
    finish(gpt.start_with(&request, Box::new(MostLikely::default()))?, case)
}

fn finish(mut generation: GptGeneration, case: &Case) -> Result<Tensor<2, Int>> {
    generation.finish()?;
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
    case.has(&["c_indices", "indices", "trace"]) && case.has_settings(&["window", "gpt"])
}

pub(super) fn window(case: &Case, compare: &mut Comparison) -> Result<()> {
    let network = MinGpt::read(case, "gpt")?;
    case.ignore(&["grid"]);
    let size: usize = case.setting("window")?;
    let shape = case.shape("indices")?;
    let [_, rows, columns] = shape[..] else {
        return Err(Error::invalid(case.title(), format!("`indices` is {shape:?}, expected 3 axes")));
    };
    let grid = (rows, columns);
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

    let row = |codes: &[i64]| Condition::codes(codes.iter().map(|code| *code as u32).collect());
    let conditions = case.ints("c_indices")?.chunks(grid.0 * grid.1).map(row);
    let images: Vec<ImageRequest> = conditions.map(|condition| ImageRequest::new(condition, 0)).collect();
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
