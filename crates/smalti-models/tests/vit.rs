//! The ViT tokenizer against the public implementation.
#![allow(clippy::unwrap_used)]

mod cases;

use burn::tensor::{Device, Tensor, TensorData};
use cases::{Tensors, agree, close, open, tensor};
use smalti_base::{Layout, TokenSpec};
use smalti_models::checkpoint::tensors::{Stored, Values};
use smalti_models::checkpoint::weights::load_from;
use smalti_models::losses::{AdversarialConfig, AdversarialKind, Perceptual, TokenizerLossConfig, TokenizerStep};
use smalti_models::tokenizers::{Tokenizer, TokenizerConfig, TokenizerModel};

const TINY: &str = r#"{ "kind": "vit", "image_size": 32, "patch_size": 8,
    "encoder": { "dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "mlp_dim": 64 },
    "decoder": { "dim": 48, "depth": 1, "heads": 3, "dim_head": 16, "mlp_dim": 96 },
    "quantizer": { "kind": "vq", "codes": 64, "channels": 8, "metric": "cosine_raw" } }"#;

/// The official name's counterpart, if the tensor belongs to the model.
fn rename(name: &str) -> Option<String> {
    if name.starts_with("loss.") || name.ends_with("pos_embedding") {
        return None;
    }
    let pairs = [
        ("encoder.to_patch_embedding.0.", "to_patch."),
        ("decoder.to_pixel.1.", "to_pixel."),
        (".transformer.layers.", ".blocks."),
        (".transformer.norm.weight", ".norm.gamma"),
        (".transformer.norm.bias", ".norm.beta"),
        (".0.norm.weight", ".norm_attention.gamma"),
        (".0.norm.bias", ".norm_attention.beta"),
        (".1.norm.weight", ".norm_feed_forward.gamma"),
        (".1.norm.bias", ".norm_feed_forward.beta"),
        (".0.fn.to_qkv.", ".qkv."),
        (".0.fn.to_out.", ".output."),
        (".1.fn.net.0.", ".expand."),
        (".1.fn.net.2.", ".contract."),
    ];
    Some(pairs.iter().fold(name.to_string(), |name, (from, to)| name.replace(from, to)))
}

/// Linear weights lie the other way round.
fn transposed(stored: &Stored) -> Stored {
    let (rows, columns) = (stored.shape[0], stored.shape[1]);
    let values = stored.floats().unwrap();
    let turned = (0..rows * columns).map(|i| values[(i % rows) * columns + i / rows]).collect();
    Stored { shape: vec![columns, rows], values: Values::Floats(turned) }
}

fn tiny(weights: &Tensors, device: &Device) -> TokenizerModel {
    let config: TokenizerConfig = serde_json::from_str(TINY).unwrap();
    let renamed: Tensors = weights
        .iter()
        .filter_map(|(name, stored)| {
            let name = rename(name)?;
            let linear = stored.shape.len() == 2 && !name.contains("embedding");
            Some((name, if linear { transposed(stored) } else { stored.clone() }))
        })
        .collect();
    load_from(config.init(device).unwrap(), &renamed, &|_| false).unwrap().0
}

#[test]
fn encoding_and_decoding() {
    let Some((io, weights)) = open("vit-vqgan/vitvq-tiny") else { return };
    let device = Device::flex();
    let model = tiny(&weights, &device);
    let image = tensor::<4>(&io, "image", &device) * 2.0 - 1.0;
    let TokenizerModel::Vit(vit) = &model else { panic!("a vit") };
    agree(vit.encode_tokens(image.clone()), &io, "h_enc");
    let as_tokens = |map: Tensor<4>| map.reshape([2, -1, 16]).swap_dims(1, 2);
    agree(as_tokens(model.latents(image.clone())), &io, "z");
    let codes = model.encode(image).discrete().unwrap();
    let ids = codes.clone().into_data().convert::<i64>().try_into_vec::<i64>().unwrap();
    assert_eq!(ids, io["codes"].ints().unwrap());
    let rec = model.decode(&smalti_models::Codes::Discrete(codes));
    agree((rec + 1.0) * 0.5, &io, "rec");
}

#[test]
fn the_table_of_places_is_the_official_one() {
    let Some((_, weights)) = open("vit-vqgan/vitvq-tiny") else { return };
    let device = Device::flex();
    agree(smalti_nn::vit::sincos_2d(4, 4, 32, &device), &weights, "encoder.en_pos_embedding");
    agree(smalti_nn::vit::sincos_2d(4, 4, 48, &device), &weights, "decoder.de_pos_embedding");
}

#[test]
fn gradients_of_the_losses() {
    let Some((io, weights)) = open("vit-vqgan/vitvq-tiny") else { return };
    let device = Device::flex().autodiff();
    let model = tiny(&weights, &device);
    let image = tensor::<4>(&io, "image", &Device::flex()) * 2.0 - 1.0;
    // The public code measures in 0..1, where squares are a quarter.
    let config = TokenizerLossConfig {
        l1: 0.0,
        l2: 0.25,
        perceptual: None,
        perceptual_weight: 0.1,
        adversarial: None,
        codebook_weight: 1.0,
        ..Default::default()
    };
    let spec = TokenSpec::discrete(Layout::Grid { h: 4, w: 4 }, 64, (32, 32));
    let perceptual = Perceptual::lpips(&weights, &weights, &Device::flex()).unwrap();
    let loss = config.init(&spec, &device).unwrap().with_perceptual(Some(perceptual));
    let step = loss.step(&model, None, image, 0);
    let term = |name: &str| step.terms.iter().find(|(n, _)| *n == name).unwrap().1.clone();
    agree(term("l2") * 0.25, &io, "loggaussian");
    agree(term("perceptual"), &io, "perceptual");
    agree(term("codebook"), &io, "emb_loss");
    agree(term("loss") - term("codebook"), &io, "nll");
}

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
        let adversarial =
            AdversarialConfig { kind: AdversarialKind::Hinge, weight, start_step: 0, adaptive, ndf: 4, layers: 2 };
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
    let critic = loss(1.0, true).critic(&device).unwrap().unwrap();
    let adaptive = loss(0.5, true).step(&model, Some(&critic), images.clone(), 0);
    let weight = adaptive.terms.iter().find(|(name, _)| *name == "adversarial_weight").unwrap().1.clone();
    let weight = weight.into_scalar::<f32>();
    let plain = loss(f64::from(weight), false).step(&model, Some(&critic), images, 0);
    let TokenizerModel::Vit(vit) = &model else { panic!("a vit") };
    for (name, param) in [("to_patch", &vit.to_patch.weight), ("to_pixel", &vit.to_pixel.weight)] {
        let of = |step: &TokenizerStep| {
            step.gradients.get::<4>(param.id).unwrap().into_data().try_into_vec::<f32>().unwrap()
        };
        let (found, expected) = (of(&adaptive), of(&plain));
        let scale = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!(scale > 0.0);
        close(&found, &expected, 1e-5 * scale, 1e-4, name);
    }
}
