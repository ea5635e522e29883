//! VQGAN's configuration.
#![allow(clippy::unwrap_used)]

use burn::tensor::Device;
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
