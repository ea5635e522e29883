//! GPT with packed weights against the minGPT of taming-transformers.

#![allow(clippy::unwrap_used)]

mod cases;

use burn::tensor::Device;
use cases::{open, values};
use smalti_base::{Layout, TokenSpec};
use smalti_models::ConditionConfig;
use smalti_models::checkpoint::Rules;
use smalti_models::generators::{GeneratorModel, Gpt, GptConfig};
use smalti_nn::dense::{Pack, WeightPrecision};
use smalti_parity::Case;

const CASE: &str = "vqgan/net2net-class";
const CODES: usize = 40;

fn model(device: &Device) -> Gpt {
    let tokens = TokenSpec::discrete(Layout::Grid { h: 8, w: 2 }, CODES, (16, 4));
    let config = GptConfig {
        shared_table: true,
        block_size: Some(20),
        ..GptConfig::new(tokens, ConditionConfig::Class { classes: CODES }, 32, 2, 4)
    };
    let weights = open(CASE).weights("").unwrap();
    Rules::builtin("vqgan", "generator").unwrap().import(config.init(device).unwrap(), &weights).unwrap().0
}

/// The largest and the mean difference to the reference logits.
fn differences(case: &Case, model: &Gpt) -> [f32; 2] {
    let logits = values(model.logits(case.ids::<2>("c_indices").unwrap(), case.ids::<2>("z_indices").unwrap()));
    let differences: Vec<f32> = logits.iter().zip(case.floats("logits").unwrap()).map(|(a, b)| (a - b).abs()).collect();
    [differences.iter().copied().fold(0.0, f32::max), differences.iter().sum::<f32>() / differences.len() as f32]
}

#[test]
fn packed_weights() {
    let case = open(CASE);
    let model = model(&Device::flex());
    let logits = case.floats("logits").unwrap();
    let size = (logits.iter().map(|logit| logit * logit).sum::<f32>() / logits.len() as f32).sqrt();
    // int8: a step is the largest of 32 normal weights by 127, so that rounding adds about 0.5 % of noise to each matrix;
    // nine matrices in a row make it about 1 % of the logits. bf16 rounds four times finer.
    for (precision, largest, mean) in
        [(WeightPrecision::F32, 1e-5, 1e-5), (WeightPrecision::Bf16, 0.025, 0.005), (WeightPrecision::Int8, 0.1, 0.02)]
    {
        let GeneratorModel::Gpt(packed) = GeneratorModel::Gpt(model.clone()).pack(precision) else { unreachable!() };
        let found = differences(&case, &packed);
        assert!(found[0] <= largest * size && found[1] <= mean * size, "{precision}: {found:?}, logits {size}");
    }
}
