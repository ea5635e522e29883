//! KL autoencoders and MAR as they are published: their sizes, and the layouts of their files.
#![allow(clippy::unwrap_used)]

mod cases;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use cases::{Tensors, agree, folder, open, tensor};
use smalti_models::checkpoint::Rules;
use smalti_models::checkpoint::tensors::{Stored, read_tensors};
use smalti_models::generators::GeneratorModel;
use smalti_models::tokenizers::{Posterior, TokenizerModel};
use smalti_models::{GeneratorConfig, tokenizers::TokenizerConfig};

fn kl(levels: &str, attention: [&str; 2], z: usize) -> usize {
    let [encoder, decoder] = attention;
    let text = format!(
        r#"{{ "kind": "kl", "image_size": 256, "ch": 128, "ch_mult": {levels}, "num_res_blocks": 2, "z_channels": {z},
        "encoder_attn_resolutions": {encoder}, "decoder_attn_resolutions": {decoder}, "embed_dim": {z} }}"#
    );
    serde_json::from_str::<TokenizerConfig>(&text).unwrap().init(&Device::flex()).unwrap().num_params()
}

#[test]
fn autoencoders_have_the_published_sizes() {
    assert_eq!(kl("[1, 2, 4, 4]", ["[]", "[]"], 4), 83_653_863, "KL-f8, Stable Diffusion's");
    assert_eq!(kl("[1, 1, 2, 2, 4]", ["[16]", "[16]"], 16), 69_610_963, "KL-f16");
    assert_eq!(kl("[1, 1, 2, 2, 4]", ["[16]", "[]"], 16), 66_456_019, "MAR's KL-16");
}

#[test]
fn generators_have_the_published_sizes() {
    for (width, depth, heads, denoiser, millions) in [
        (768, 12, 12, [1024, 6], [207.9, 35.7]),
        (1024, 16, 16, [1280, 8], [478.3, 72.2]),
        (1280, 20, 16, [1536, 12], [942.4, 151.2]),
    ] {
        let stack = format!(r#"{{ "width": {width}, "depth": {depth}, "heads": {heads} }}"#);
        let [w, n] = denoiser;
        let text = format!(
            r#"{{ "kind": "mar", "encoder": {stack}, "decoder": {stack}, "condition": {{ "kind": "class", "classes": 1000 }},
            "tokens": {{ "layout": {{ "kind": "grid", "h": 16, "w": 16 }}, "channels": 16, "image_size": [256, 256] }},
            "diffusion": {{ "width": {w}, "depth": {n} }} }}"#
        );
        let config: GeneratorConfig = serde_json::from_str(&text).unwrap();
        let GeneratorModel::Mar(mar) = config.init(&Device::flex()).unwrap() else { panic!("a MAR") };
        let found = [mar.num_params(), mar.denoiser.num_params()].map(|n| (n as f64 / 1e5).round() / 10.0);
        assert_eq!(found, millions);
    }
}

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
    let Some((io, diffusers)) = open("autoencoder-kl/diffusers_kl") else { return };
    let device = Device::flex();
    let ldm =
        read_tensors(&folder("autoencoder-kl/diffusers_kl").unwrap().join("weights_ldm_layout.safetensors")).unwrap();
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
        let TokenizerModel::Kl(kl) = import(&weights, &device) else { panic!("a KL autoencoder") };
        let posterior = Posterior::new(kl.moments(tensor(&io, "image", &device)));
        agree(posterior.mean_bchw.clone(), &io, "mean");
        agree(posterior.divergence(), &io, "kl");
        let pixels: Tensor<4> = kl.to_pixels(kl.features(posterior.mean_bchw));
        agree(pixels, &io, "recon_mode");
    }
}
