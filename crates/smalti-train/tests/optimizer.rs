//! The optimiser, clipping and averaging against their formulas in `f64`.
#![allow(clippy::unwrap_used)]

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use smalti_train::optimizer::{AdamW, GroupConfig, OptimizerConfig, Pace};
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
        let pace = Pace { update: step as u64, rate_factor: *factor, ..Pace::default() };
        net = optimizer.step(net, None, &mut found, &pace).0;
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
    let found = gradients_of(&net);
    let squares: f64 = WEIGHT.iter().map(|x| 4.0 * x * x).sum::<f64>() + 2.0 * 9.0;
    let norm = |found: &GradientsParams, part: &str| {
        let part = gradients::select(&net, |path| path.starts_with(part));
        values(gradients::global_norm(&net, found, &part).unwrap())[0]
    };
    close(&[norm(&found, ""), norm(&found, "first")], &[(2.0 * squares).sqrt(), squares.sqrt()]);
    let mut sum = GradientsParams::new();
    for _ in 0..2 {
        gradients::accumulate(&net, &mut sum, &mut gradients_of(&net), 0.5);
    }
    close(&[norm(&sum, "")], &[(2.0 * squares).sqrt()]);
}

/// Clipping scales the gradients of its part only: Adam's first step has the size of the rate whatever the scale, so a
/// second step with another gradient tells.
#[test]
fn clipping_acts_on_its_part() {
    let run = |clip: bool| {
        let mut net = net();
        let mut optimizer =
            AdamW::new(&OptimizerConfig { groups: Vec::new(), weight_decay: 0.0, ..config() }, &net).unwrap();
        for update in 0..2 {
            let part = gradients::select(&net, |path| path.starts_with("first"));
            let clip = if clip && update == 1 { vec![(part, 0.25)] } else { Vec::new() };
            let pace = Pace { update, clip, ..Pace::default() };
            net = optimizer.step(net.clone(), None, &mut gradients_of(&net), &pace).0;
        }
        [values(net.first.bias.val())[0], values(net.second.bias.val())[0]]
    };
    let (free, clipped) = (run(false), run(true));
    assert_eq!(free[1], clipped[1]);
    // The gradient of the bias is 3, in the second step 0.75 where it is clipped.
    let [m, v] = [[0.1 * 3.0, 0.9], [0.02 * 9.0, 0.98]].map(|[first, beta]| (first, beta));
    let second = |g: f64| {
        let (m, v) = (m.1 * m.0 + 0.1 * g, v.1 * v.0 + 0.02 * g * g);
        0.05 * (m / (1.0 - 0.9f64.powi(2))) / ((v / (1.0 - 0.98f64.powi(2))).sqrt() + 1e-6)
    };
    close(&[free[0] - clipped[0]], &[second(0.75) - second(3.0)]);
}

#[test]
fn the_average_moves_by_its_decay_with_the_step() {
    let config = OptimizerConfig { groups: Vec::new(), ..config() };
    let ema = ema::EmaConfig { decay: 0.75 };
    // Early steps use the warmed-up decay (1 + step) / (10 + step), later ones the configured.
    for (step, decay) in [(0, 0.1), (1000, 0.75)] {
        let net = net();
        let mut optimizer = AdamW::new(&config, &net).unwrap();
        let average = net.valid();
        // One parameter has no gradient: it stays, and the average still follows it.
        let mut found = gradients_of(&net);
        let _ = found.remove::<1>(net.second.bias.id);
        let pace = Pace { rate_factor: 1.0, average_decay: Some(ema.decay_at(step)), ..Pace::default() };
        let (moved, average) = optimizer.step(net, Some(average.map(&mut AddOne)), &mut found, &pace);
        let average = average.unwrap();
        let between = |old: &[f64], new: Vec<f64>| -> Vec<f64> {
            old.iter().zip(new).map(|(old, new)| decay * (old + 1.0) + (1.0 - decay) * new).collect()
        };
        close(&values(average.first.weight.val()), &between(&WEIGHT, values(moved.first.weight.val())));
        close(&values(average.second.bias.val()), &between(&BIAS, BIAS.to_vec()));
        assert_eq!(values(moved.second.bias.val())[1] as f32, BIAS[1] as f32);
        assert_eq!(average.first.weight.val().dims(), [2, 2]);
        assert!(!average.first.weight.val().is_autodiff());
    }
}

struct AddOne;

impl burn::module::ModuleMapper for AddOne {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|value| value + 1.0)
    }
}
