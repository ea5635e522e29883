//! Weights of the terms that a model adds to the loss: ramps over the steps, and names that are none.
#![allow(clippy::unwrap_used)]

use burn::tensor::{Device, Tensor, TensorData};
use smalti_base::Rng;
use smalti_models::losses::{TokenizerLossConfig, TokenizerStep};
use smalti_models::quantizers::Pass;
use smalti_models::tokenizers::{TokenizerConfig, TokenizerModel};

fn normal(shape: [usize; 4], seed: u64, device: &Device) -> Tensor<4> {
    let mut stream = Rng::new(seed).stream(0, 0);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| stream.normal()).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn term(step: &TokenizerStep, name: &str) -> f32 {
    let found = step.terms.iter().find(|(known, _)| *known == name);
    found.unwrap_or_else(|| panic!("no {name}")).1.clone().into_scalar::<f32>()
}

fn model(device: &Device) -> TokenizerModel {
    let text = r#"{ "kind": "kl", "image_size": 16, "ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 2, "embed_dim": 2,
        "norm_groups": 4, "encoder_attn_resolutions": [], "decoder_attn_resolutions": [] }"#;
    serde_json::from_str::<TokenizerConfig>(text).unwrap().init(device).unwrap()
}

#[test]
fn a_ramp_weighs_the_term_by_the_step() {
    let device = Device::flex();
    let model = model(&device.clone().autodiff());
    let image = normal([2, 3, 16, 16], 1, &device);
    let noise = normal([2, 2, 8, 8], 2, &device.clone().autodiff());
    let step = |weights: &str, step: u64| {
        let config: TokenizerLossConfig =
            serde_json::from_str(&format!(r#"{{ "l1": 1.0, "weights": {weights} }}"#)).unwrap();
        let loss = config.init(model.spec(), &device).unwrap();
        let pass = Pass { noise_bchw: Some(noise.clone()), ..Pass::at(step) };
        let made = loss.step(&model, None, image.clone(), &pass);
        loss.check_terms(&made).unwrap();
        made
    };
    let ramp = r#"{ "kl": { "from": 0.0, "to": 0.5, "start": 10, "steps": 20 } }"#;
    for (at, weight) in [(0, 0.0), (10, 0.0), (15, 0.125), (30, 0.5), (1000, 0.5)] {
        let (ramped, constant) = (step(ramp, at), step(&format!(r#"{{ "kl": {weight} }}"#), at));
        let expected = term(&ramped, "l1") + weight * term(&ramped, "kl");
        assert!((term(&ramped, "loss") - expected).abs() < 1e-5 * expected, "step {at}");
        assert_eq!(term(&ramped, "loss"), term(&constant, "loss"), "step {at}");
    }
}

#[test]
fn a_weight_of_no_term_is_refused() {
    let device = Device::flex();
    let model = model(&device.clone().autodiff());
    let config: TokenizerLossConfig = serde_json::from_str(r#"{ "l1": 1.0, "weights": { "kI": 1e-6 } }"#).unwrap();
    let loss = config.init(model.spec(), &device).unwrap();
    let made = loss.step(&model, None, normal([1, 3, 16, 16], 1, &device), &Pass::default());
    let refused = loss.check_terms(&made).unwrap_err().to_string();
    assert!(refused.contains("kI") && refused.contains("kl"), "{refused}");
}
