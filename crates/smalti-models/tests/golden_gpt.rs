//! GPT against the minGPT of taming-transformers, whose class is a row of the token table.

#![allow(clippy::unwrap_used)]

mod golden;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use golden::Case;
use smalti_base::{Layout, TokenSpec};
use smalti_models::checkpoint::{Stored, Values, load_from};
use smalti_models::generators::{Gpt, GptConfig};
use smalti_models::sampling::{Sampling, filter};
use smalti_models::{Codes, Condition, ConditionConfig, Generator, ImageRequest, Known, Request};
use smalti_nn::dense::{Pack, WeightPrecision};
use std::collections::BTreeMap;

const CASE: &str = "gpt/net2net-class";
const LENGTH: usize = 16;
const CODES: usize = 40;

fn transposed(tensor: Stored) -> Stored {
    let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
    let values = tensor.floats().unwrap();
    let swapped = (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect();
    Stored { shape: vec![columns, rows], values: Values::Floats(swapped) }
}

fn rows(tensor: &Stored, n: usize) -> Stored {
    let width = *tensor.shape.last().unwrap();
    let mut values = tensor.floats().unwrap().to_vec();
    values.resize(n * width, 0.0);
    Stored { shape: vec![n, width], values: Values::Floats(values) }
}

fn model(device: &Device) -> Gpt {
    let mut weights = BTreeMap::new();
    for (name, tensor) in Case::open(CASE, "weights").into_tensors() {
        let name = name.trim_start_matches("transformer.").to_string();
        let is_norm = name.contains("ln");
        let path = name
            .replace("tok_emb.weight", "tokens.table")
            .replace("pos_emb", "positions.table")
            .replace("ln_f", "norm")
            .replace("ln1", "attention_norm")
            .replace("ln2", "mlp_norm")
            .replace("attn.proj", "attention.output")
            .replace("attn.", "attention.")
            .replace("mlp.0", "mlp.expand")
            .replace("mlp.2", "mlp.contract");
        let (path, tensor) = match path.as_str() {
            _ if is_norm => (path.replace("weight", "gamma").replace("bias", "beta"), tensor),
            "positions.table" => (path, rows(&tensor, LENGTH)),
            "tokens.table" => {
                weights.insert("condition.table".to_string(), rows(&tensor, CODES + 1));
                (path, tensor)
            }
            _ if path.ends_with("weight") => (path, transposed(tensor)),
            _ => (path, tensor),
        };
        weights.insert(path, tensor);
    }
    let config = GptConfig {
        tokens: TokenSpec::discrete(Layout::Grid { h: 8, w: 2 }, CODES, (16, 4)),
        condition: ConditionConfig::Class { classes: CODES },
        condition_dropout: 0.0,
        width: 32,
        depth: 2,
        heads: 4,
        mlp_ratio: 4,
        dropout: 0.0,
        attention_dropout: 0.0,
        visible_prefix: false,
    };
    load_from(config.init(device).unwrap(), &weights, &|_| false).unwrap().0
}

fn classes(io: &Case) -> Vec<Condition> {
    io.ints("c_indices").iter().map(|class| Condition::Class(*class as u32)).collect()
}

#[test]
fn logits_loss_and_gradients() {
    let io = Case::open(CASE, "io");
    let model = model(&Device::flex().autodiff());
    let plain = model.valid();
    let (classes_bl, codes) = (io.ids::<2>("c_indices"), io.ids::<2>("z_indices"));
    io.check("logits", plain.logits(classes_bl.clone(), codes.clone()), 1e-4, 1e-3);
    let loss = plain.predictions(Codes::Discrete(codes.clone()), &classes(&io)).unwrap().loss();
    io.check("loss", loss.loss, 1e-4, 1e-3);

    let keep = io.ids::<2>("pkeep_mask").equal_elem(1);
    let noisy = io.ids::<2>("pkeep_random").mask_where(keep, codes.clone());
    let logits = model.logits(classes_bl, noisy);
    io.check("pkeep_logits", logits.clone().inner(), 1e-4, 1e-3);
    let loss = smalti_kernels::softmax_cross_entropy(logits.flatten(0, 1), codes.flatten(0, 1), None, 0.0);
    io.check("pkeep_loss", loss.clone(), 1e-4, 1e-3);
    let gradients = loss.backward();
    let condition = model.condition.table.grad(&gradients).unwrap().narrow(0, 0, CODES);
    let shared = model.tokens.table.grad(&gradients).unwrap() + condition;
    io.check("grad.transformer.tok_emb.weight", shared, 1e-4, 1e-3);
    let key = model.blocks[0].attention.key.weight.grad(&gradients).unwrap();
    io.check("grad.transformer.blocks.0.attn.key.weight", key.transpose(), 1e-4, 1e-3);
    io.check("grad.transformer.head.weight", model.head.weight.grad(&gradients).unwrap().transpose(), 1e-4, 1e-3);
    let positions = model.positions.table.grad(&gradients).unwrap();
    let unused = Tensor::zeros([20 - LENGTH, 32], &Device::flex());
    io.check("grad.transformer.pos_emb", Tensor::cat(vec![positions, unused], 0), 1e-4, 1e-3);
}

/// The largest and the mean difference to the reference logits.
fn differences(io: &Case, model: &Gpt) -> [f32; 2] {
    let logits = model.logits(io.ids::<2>("c_indices"), io.ids::<2>("z_indices"));
    let logits = logits.into_data().try_to_vec::<f32>().unwrap();
    let differences: Vec<f32> = logits.iter().zip(io.floats("logits")).map(|(a, b)| (a - b).abs()).collect();
    [differences.iter().copied().fold(0.0, f32::max), differences.iter().sum::<f32>() / differences.len() as f32]
}

#[test]
fn packed_weights() {
    let io = Case::open(CASE, "io");
    let model = model(&Device::flex());
    let logits = io.floats("logits");
    let size = (logits.iter().map(|logit| logit * logit).sum::<f32>() / logits.len() as f32).sqrt();
    // int8: a step is the largest of 32 normal weights by 127, so that rounding adds about 0.5 % of noise to each matrix;
    // nine matrices in a row make it about 1 % of the logits. bf16 rounds four times finer.
    for (precision, largest, mean) in
        [(WeightPrecision::F32, 1e-5, 1e-5), (WeightPrecision::Bf16, 0.025, 0.005), (WeightPrecision::Int8, 0.1, 0.02)]
    {
        let found = differences(&io, &model.pack(precision));
        assert!(found[0] <= largest * size && found[1] <= mean * size, "{precision}: {found:?}, logits {size}");
    }
}

fn greedy(io: &Case, known: impl Fn(usize) -> Option<Known>) -> Vec<i64> {
    let images = classes(io).into_iter().enumerate();
    let images = images.map(|(image, condition)| ImageRequest { condition, seed: 0, known: known(image) }).collect();
    let model = model(&Device::flex());
    let mut generation =
        model.start(&Request { images, sampling: Sampling { temperature: 0.0, ..Default::default() } }).unwrap();
    while generation.done() < generation.steps() {
        generation.next();
    }
    generation.codes().discrete().unwrap().into_data().iter::<i64>().collect()
}

#[test]
fn greedy_generation_and_completion() {
    let io = Case::open(CASE, "io");
    assert_eq!(greedy(&io, |_| None), io.ints("greedy_tokens"));
    let half = |image: usize| {
        let codes = &io.ints("z_indices")[image * LENGTH..(image + 1) * LENGTH];
        Some(Known {
            tokens: codes.iter().map(|code| *code as u32).collect::<Vec<u32>>().into(),
            keep: (0..LENGTH).map(|place| place < LENGTH / 2).collect(),
        })
    };
    assert_eq!(greedy(&io, half), io.ints("half_tokens"));
}

#[test]
fn filters() {
    let io = Case::open(CASE, "io");
    let top_k = Sampling { top_k: Some(7), ..Default::default() };
    let both = Sampling { top_p: Some(0.8), ..top_k.clone() };
    for (name, sampling) in [("topk_logits", top_k), ("topk_topp_logits", both)] {
        for (image, expected) in io.floats(name).chunks(CODES).enumerate() {
            let first = image * LENGTH * CODES;
            let mut row = io.floats("logits")[first..first + CODES].to_vec();
            filter(&mut row, &sampling);
            row.iter_mut().for_each(|logit| *logit = logit.max(-1e30));
            assert_eq!(row, expected, "{name}, image {image}");
        }
    }
}
