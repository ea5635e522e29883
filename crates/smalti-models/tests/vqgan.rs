//! VQGAN's configuration.
#![allow(clippy::unwrap_used)]

use burn::tensor::{Device, Tensor};
use smalti_models::tokenizers::TokenizerConfig;

const TINY: &str = r#"{ "kind": "vqgan", "image_size": 32, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
    "attn_resolutions": [16], "z_channels": 16, "embed_dim": 8, "quantizer": QUANTIZER }"#;

/// The released models put 0.25 on the codebook term.
const QUANTIZER: &str =
    r#"{ "kind": "vq", "codes": 64, "channels": 8, "codebook": { "kind": "gradient", "legacy": true } }"#;

#[test]
fn numbers_that_do_not_fit_are_errors() {
    for (from, to, part) in [
        ("\"image_size\": 32", "\"image_size\": 33", "not a multiple of 2"),
        ("\"ch_mult\": [1, 1]", "\"ch_mult\": []", "ch_mult needs"),
        ("\"attn_resolutions\": [16]", "\"attn_resolutions\": [8]", "attn_resolutions has 8"),
        ("\"ch\": 32", "\"ch\": 40", "does not divide 40 channels"),
        ("\"embed_dim\": 8", "\"embed_dim\": 9", "quantizer has 8 channels"),
        ("\"z_channels\": 16", "\"z_channels\": 0", "z_channels must be at least 1"),
    ] {
        let text = TINY.replace("QUANTIZER", QUANTIZER).replace(from, to);
        let config: TokenizerConfig = serde_json::from_str(&text).unwrap();
        let error = config.init(&Device::flex()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let misspelt = TINY.replace("QUANTIZER", QUANTIZER).replace("num_res_blocks", "num_resblocks");
    assert!(serde_json::from_str::<TokenizerConfig>(&misspelt).unwrap_err().to_string().contains("num_resblocks"));
}

/// An image whose latents are no numbers has no tokens, and is named; the others keep theirs.
#[test]
fn images_without_latents_are_named() {
    let device = Device::flex();
    let names = ["a.png".to_string(), "b.png".to_string()];
    for quantizer in [QUANTIZER, r#"{ "kind": "fsq", "levels": [3, 3, 3], "channels": 8 }"#] {
        let config: TokenizerConfig = serde_json::from_str(&TINY.replace("QUANTIZER", quantizer)).unwrap();
        let model = config.init(&device).unwrap();
        let image = Tensor::<4>::ones([1, 3, 32, 32], &device) * 0.5;
        let broken = image.clone() * f32::NAN;
        let codes = model.encode(Tensor::cat(vec![image.clone(), broken], 0)).unwrap();
        for error in [codes.must_be_whole(&names).unwrap_err(), codes.to_host_of(&names).unwrap_err()] {
            assert!(error.to_string().starts_with("b.png: the tokenizer's latents of it are not finite"), "{error}");
        }
        let whole = model.encode(image).unwrap();
        whole.must_be_whole(&names).unwrap();
        assert_eq!(whole.to_host().unwrap().len(), 1);
    }
}
