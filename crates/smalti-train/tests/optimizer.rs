//! The optimiser, clipping and averaging against their formulas in `f64`.
#![allow(clippy::unwrap_used)]

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use smalti_train::optimizer::{AdamW, GroupConfig, OptimizerConfig};
use smalti_train::{ema, gradients};

#[derive(Module, Debug)]
struct Layer {
    weight: Param<Tensor<2>>,
    bias: Param<Tensor<1>>,
}

#[derive(Module, Debug)]
struct Net {
    first: Layer,
    second: Layer,
}

const WEIGHT: [f64; 4] = [0.5, -1.0, 2.0, 0.25];
const BIAS: [f64; 2] = [0.1, -0.2];

fn layer(device: &Device) -> Layer {
    let weight = Tensor::from_data(TensorData::new(WEIGHT.map(|x| x as f32).to_vec(), [2, 2]), device);
    let bias = Tensor::from_data(TensorData::new(BIAS.map(|x| x as f32).to_vec(), [2]), device);
    Layer { weight: Param::from_tensor(weight), bias: Param::from_tensor(bias) }
}

fn net() -> Net {
    let device = Device::flex().autodiff();
    Net { first: layer(&device), second: layer(&device) }
}

/// Gradients of `sum(w^2) + 3 sum(b)` in both layers: `2 w` and 3.
fn gradients_of(net: &Net) -> GradientsParams {
    let loss = [&net.first, &net.second]
        .map(|layer| layer.weight.val().powi_scalar(2).sum() + layer.bias.val().sum() * 3.0)
        .into_iter()
        .reduce(|a, b| a + b)
        .unwrap();
    GradientsParams::from_grads(loss.backward(), net)
}

fn config() -> OptimizerConfig {
    OptimizerConfig {
        learning_rate: 0.05,
        betas: (0.9, 0.98),
        epsilon: 1e-6,
        weight_decay: 0.1,
        clip_norm: None,
        groups: vec![GroupConfig { matches: "^second".into(), rate_factor: 0.5, weight_decay: Some(0.0) }],
    }
}

/// AdamW of one number as PyTorch documents it.
fn reference(mut x: f64, gradient: impl Fn(f64) -> f64, rate: f64, decay: f64, factors: &[f64]) -> f64 {
    let (mut m, mut v) = (0.0, 0.0);
    for (t, factor) in factors.iter().enumerate() {
        let g = gradient(x);
        let rate = rate * factor;
        x -= rate * decay * x;
        m = 0.9 * m + 0.1 * g;
        v = 0.98 * v + 0.02 * g * g;
        let t = t as i32 + 1;
        x -= rate * (m / (1.0 - 0.9f64.powi(t))) / ((v / (1.0 - 0.98f64.powi(t))).sqrt() + 1e-6);
    }
    x
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().try_into_vec::<f32>().unwrap().into_iter().map(f64::from).collect()
}

fn close(found: &[f64], expected: &[f64]) {
    for (f, e) in found.iter().zip(expected) {
        assert!((f - e).abs() < 1e-5, "{found:?} against {expected:?}");
    }
}

#[test]
fn adamw_follows_its_formula_with_groups() {
    let mut net = net();
    let mut optimizer = AdamW::new(&config(), &net).unwrap();
    let factors = [0.5, 1.0, 0.8, 0.3];
    for (step, factor) in factors.iter().enumerate() {
        let mut found = gradients_of(&net);
        net = optimizer.step(net, &mut found, step as u64, *factor);
    }
    for (layer, rate, decay) in [(&net.first, 0.05, 0.1), (&net.second, 0.025, 0.0)] {
        let weight = WEIGHT.map(|x| reference(x, |x| 2.0 * x, rate, decay, &factors));
        close(&values(layer.weight.val()), &weight);
        // Biases have no decay.
        let bias = BIAS.map(|x| reference(x, |_| 3.0, rate, 0.0, &factors));
        close(&values(layer.bias.val()), &bias);
        assert!(layer.weight.val().is_require_grad(), "still trained after the step");
    }
}

#[test]
fn a_pattern_that_matches_nothing_is_refused() {
    let mut config = config();
    config.groups[0].matches = "^third".into();
    let error = AdamW::new(&config, &net()).unwrap_err().to_string();
    assert!(error.contains("matches no parameter") && error.contains("first.weight"), "{error}");
}

#[test]
fn norms_scales_and_sums_of_gradients() {
    let net = net();
    let mut found = gradients_of(&net);
    let squares: f64 = WEIGHT.iter().map(|x| 4.0 * x * x).sum::<f64>() + 2.0 * 9.0;
    let norm = |found: &GradientsParams, part: &str| {
        let part = gradients::select(&net, |path| path.starts_with(part));
        values(gradients::global_norm(&net, found, &part).unwrap())[0]
    };
    close(&[norm(&found, ""), norm(&found, "first")], &[(2.0 * squares).sqrt(), squares.sqrt()]);
    gradients::scale(&net, &mut found, 0.5, &gradients::select(&net, |path| path.starts_with("first")));
    close(&[norm(&found, "first"), norm(&found, "second")], &[0.5 * squares.sqrt(), squares.sqrt()]);
    let mut sum = GradientsParams::new();
    for _ in 0..2 {
        gradients::accumulate(&net, &mut sum, &mut gradients_of(&net), 0.5);
    }
    close(&[norm(&sum, "")], &[(2.0 * squares).sqrt()]);
}

#[test]
fn the_average_moves_by_its_decay() {
    let net = net();
    let shifted = net.clone().map(&mut AddOne);
    let config = ema::EmaConfig { decay: 0.75 };
    // Early steps use the warmed-up decay (1 + step) / (10 + step), later ones the configured.
    for (step, decay) in [(0, 0.1), (1000, 0.75)] {
        let average = ema::update(&config, net.valid(), &shifted, step);
        let expected = WEIGHT.map(|x| decay * x + (1.0 - decay) * (x + 1.0));
        close(&values(average.first.weight.val()), &expected);
    }
}

struct AddOne;

impl burn::module::ModuleMapper for AddOne {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|value| (value.inner() + 1.0).autodiff().require_grad())
    }
}
