//! What files of official weights hold: the layouts of KL autoencoders, and ViT-VQGAN's table of places.
#![allow(clippy::unwrap_used)]

mod cases;

use burn::tensor::{Device, Tensor};
use cases::{Tensors, agree, close, open, values};
use smalti_models::checkpoint::{Rules, Stored};
use smalti_models::tokenizers::{Posterior, Tokenizer, TokenizerConfig, TokenizerModel};

/// The tiny model of the case from tensors in any layout.
fn import(weights: &Tensors, device: &Device) -> TokenizerModel {
    let text = r#"{ "kind": "kl", "image_size": 16, "ch": 16, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4,
        "embed_dim": 4, "norm_groups": 8, "latent_scale": 0.18215 }"#;
    let config: TokenizerConfig = serde_json::from_str(text).unwrap();
    let rules = Rules::builtin("autoencoder-kl", "tokenizer").unwrap();
    rules.import(config.init(device).unwrap(), weights).unwrap().0
}

fn renamed(weights: &Tensors, rename: impl Fn(&str, &Stored) -> (String, Vec<usize>)) -> Tensors {
    let tensors = weights.iter().map(|(name, stored)| {
        let (name, shape) = rename(name, stored);
        (name, Stored { shape, values: stored.values.clone() })
    });
    tensors.collect()
}

#[test]
fn every_layout_of_the_file_gives_the_same_model() {
    let case = open("autoencoder-kl/diffusers_kl");
    let diffusers = case.weights("").unwrap();
    let ldm = case.weights_of("weights_ldm_layout.safetensors", "").unwrap();
    // Names of older files, with the attention's weights as they are or as 1x1 convolutions.
    let old = |convolutions: bool| {
        renamed(&diffusers, |name, stored| {
            let pairs = [("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")];
            let new = pairs.iter().fold(name.to_string(), |name, (from, to)| name.replace(from, to));
            let mut shape = stored.shape.clone();
            if convolutions && new != name && shape.len() == 2 {
                shape.extend([1, 1]);
            }
            (new, shape)
        })
    };
    let mut whole = renamed(&ldm, |name, stored| (format!("first_stage_model.{name}"), stored.shape.clone()));
    let other = ldm["quant_conv.bias"].clone();
    whole.insert("model.diffusion_model.out.0.weight".into(), other.clone());
    whole.insert("betas".into(), other);
    let mar = renamed(&ldm, |name, stored| (format!("model.{name}"), stored.shape.clone()));
    for weights in [diffusers.clone(), ldm, old(false), old(true), whole, mar] {
        let TokenizerModel::Kl(kl) = import(&weights, case.device()) else { panic!("a KL autoencoder") };
        let posterior = Posterior::new(kl.moments(case.tensor("image").unwrap()));
        agree(&case, "mean", posterior.mean_bchw.clone());
        agree(&case, "kl", posterior.divergence());
        let pixels: Tensor<4> = kl.to_pixels(kl.features(posterior.mean_bchw));
        agree(&case, "recon_mode", pixels);
    }
}

#[test]
fn the_table_of_places_is_the_official_one() {
    let case = open("vit-vqgan/vitvq-tiny");
    let weights = case.weights("").unwrap();
    for (name, width) in [("encoder.en_pos_embedding", 32), ("decoder.de_pos_embedding", 48)] {
        let found = values(smalti_nn::vit::sincos_2d(4, 4, width, case.device()));
        close(&found, weights[name].floats().unwrap(), 1e-4, 1e-3, name);
    }
}
