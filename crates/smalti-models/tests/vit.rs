//! The ViT tokenizer's sizes and adversarial training; `smalti parity` compares its tensors.
#![allow(clippy::unwrap_used)]

use burn::tensor::{Device, Tensor, TensorData};
use smalti_models::losses::{
    AdversarialConfig, AdversarialKind, DiscriminatorConfig, TokenizerLossConfig, TokenizerStep,
};
use smalti_models::quantizers::Pass;
use smalti_models::tokenizers::{TokenizerConfig, TokenizerModel};

const TINY: &str = r#"{ "kind": "vit", "image_size": 32, "patch_size": 8,
    "encoder": { "dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "mlp_dim": 64 },
    "decoder": { "dim": 48, "depth": 1, "heads": 3, "dim_head": 16, "mlp_dim": 96 },
    "quantizer": { "kind": "vq", "codes": 64, "channels": 8, "metric": "cosine_raw" } }"#;

#[test]
fn sizes_that_do_not_divide_are_errors() {
    for (from, to, part) in [
        ("\"patch_size\": 8", "\"patch_size\": 7", "multiple of patch_size 7"),
        ("\"dim\": 48", "\"dim\": 46", "decoder.dim 46"),
        ("\"heads\": 3", "\"heads\": 0", "heads must be at least 1"),
    ] {
        let config: TokenizerConfig = serde_json::from_str(&TINY.replace(from, to)).unwrap();
        let error = config.init(&Device::flex()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

/// The adaptive weight's detour over leaves gives the gradients of the plain sum with that weight.
#[test]
fn the_adaptive_step_equals_the_weighted_sum() {
    let device = Device::flex().autodiff();
    let config: TokenizerConfig = serde_json::from_str(TINY).unwrap();
    let model = config.init(&device).unwrap();
    let values = (0..2 * 3 * 32 * 32).map(|i| (i as f32 * 0.37).sin()).collect::<Vec<_>>();
    let images = Tensor::<4>::from_data(TensorData::new(values, [2, 3, 32, 32]), &Device::flex());
    let loss = |weight: f64, adaptive: bool| {
        let (kind, discriminator) = (AdversarialKind::Hinge, DiscriminatorConfig::Patch);
        let adversarial = AdversarialConfig { kind, weight, start_step: 0, adaptive, discriminator, ndf: 4, layers: 2 };
        let config = TokenizerLossConfig {
            l1: 1.0,
            l2: 0.0,
            perceptual: None,
            perceptual_weight: 0.0,
            adversarial: Some(adversarial),
            codebook_weight: 1.0,
            ..Default::default()
        };
        config.init(model.spec(), &device).unwrap()
    };
    let discriminator = loss(1.0, true).discriminator(&device).unwrap().unwrap();
    let adaptive = loss(0.5, true).step(&model, Some(&discriminator), images.clone(), &Pass::at(0));
    let weight = adaptive.terms.iter().find(|(name, _)| *name == "adversarial_weight").unwrap().1.clone();
    let weight = weight.into_scalar::<f32>();
    let plain = loss(f64::from(weight), false).step(&model, Some(&discriminator), images, &Pass::at(0));
    let TokenizerModel::Vit(vit) = &model else { panic!("a vit") };
    for (name, param) in [("to_patch", &vit.to_patch.weight), ("to_pixel", &vit.to_pixel.weight)] {
        let of = |step: &TokenizerStep| {
            step.gradients.get::<4>(param.id).unwrap().into_data().try_into_vec::<f32>().unwrap()
        };
        let (found, expected) = (of(&adaptive), of(&plain));
        let scale = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!(scale > 0.0);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() <= 1e-5 * scale + 1e-4 * expected.abs(), "{name}: {found}, {expected}");
        }
    }
}
