//! Times decoding steps of a GPT with fresh weights: `cargo run --release -p smalti-models --example decode [width] [depth]
//! [sequences] [weights]`, by default 768, 12, and all, with 256 tokens of 1024 codes.
//!
//! Milliseconds for each step, the smallest of a few runs over all 256 places, for unpacked weights and for each precision.

use burn::module::Module;
use burn::tensor::Device;
use smalti_base::{Layout, TokenSpec};
use smalti_kernels::WeightPrecision;
use smalti_models::generators::{GeneratorConfig, GeneratorModel, GptConfig};
use smalti_models::{Condition, ConditionConfig, ImageRequest, Request, Sampling};
use smalti_nn::dense::Pack;
use std::time::Instant;

const RUNS: usize = 2;

fn main() {
    let number = |place| std::env::args().nth(place).and_then(|text| text.parse().ok());
    let width = number(1).unwrap_or(768);
    let tokens = TokenSpec::discrete(Layout::Grid { h: 16, w: 16 }, 1024, (256, 256));
    let (depth, heads) = (number(2).unwrap_or(12), (width / 64).max(1));
    let config = GptConfig::new(tokens, ConditionConfig::Class { classes: 10 }, width, depth, heads);
    let Ok(model) = GeneratorConfig::Gpt(config).init(&Device::flex()) else {
        return eprintln!("such a model is not possible");
    };
    println!(
        "{:>9} {:>9} {:>9} {:>9}   {} parameters",
        "sequences",
        "weights",
        "ms/step",
        "seconds",
        model.num_params()
    );
    for n in number(3).map_or(vec![1, 2, 4, 8], |n| vec![n]) {
        let row = |name: &str, model: &GeneratorModel| {
            let seconds = (0..RUNS).map(|_| seconds(model, n)).fold(f64::INFINITY, f64::min);
            println!("{n:>9} {name:>9} {:>9.2} {seconds:>9.2}", 1e3 * seconds / 256.0);
        };
        let asked = std::env::args().nth(4);
        let wanted = |name: &str| asked.as_deref().is_none_or(|asked| asked == name);
        if wanted("unpacked") {
            row("unpacked", &model);
        }
        for precision in WeightPrecision::ALL.into_iter().filter(|precision| wanted(precision.name())) {
            row(precision.name(), &model.pack(precision));
        }
    }
}

/// Makes the tokens of `n` images.
fn seconds(model: &GeneratorModel, n: usize) -> f64 {
    let image = |seed| ImageRequest::new(Condition::class(1), seed);
    let images = (0..n as u64).map(image).collect();
    let sampling = Sampling { temperature: 0.0, ..Default::default() };
    let Ok(mut generation) = model.start(&Request::new(images, sampling)) else {
        return f64::NAN;
    };
    let start = Instant::now();
    generation.finish().map_or(f64::NAN, |_| start.elapsed().as_secs_f64())
}
