//! KL autoencoders and MAR as they are published: their sizes.
#![allow(clippy::unwrap_used)]

use burn::module::Module;
use burn::tensor::Device;
use smalti_models::generators::GeneratorModel;
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
