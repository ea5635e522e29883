//! Tokenizers of which only the decoder is read.
#![allow(clippy::unwrap_used)]

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Distribution, Tensor};
use smalti_models::checkpoint::{BundlePaths, Part, Precision, load_without, read_decoder, write_part, write_tensors};
use smalti_models::checkpoint::{read_tensors, read_weights};
use smalti_models::tokenizers::TokenizerConfig;
use std::collections::BTreeMap;

const CONVOLUTIONS: &str = r#""image_size": 16, "ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4,
    "z_channels": 4, "embed_dim": 4"#;

fn configs() -> [TokenizerConfig; 3] {
    let vit = r#"{ "dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "mlp_dim": 32 }"#;
    let quantizer = r#""quantizer": { "kind": "vq", "codes": 16, "channels": 4 }"#;
    [
        format!(r#"{{ "kind": "vqgan", {CONVOLUTIONS}, {quantizer} }}"#),
        format!(
            r#"{{ "kind": "vit", "image_size": 16, "patch_size": 8, "encoder": {vit}, "decoder": {vit}, {quantizer} }}"#
        ),
        format!(r#"{{ "kind": "kl", {CONVOLUTIONS} }}"#),
    ]
    .map(|text| serde_json::from_str(&text).unwrap())
}

#[derive(Default)]
struct Read {
    parameters: usize,
    others: usize,
}

impl ModuleVisitor for Read {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        match param.is_initialized() {
            true => self.parameters += 1,
            false => self.others += 1,
        }
    }
}

#[test]
fn a_decoder_makes_the_same_images_and_its_encoder_stays_unread() {
    let device = Device::flex();
    for config in configs() {
        let folder = tempfile::tempdir().unwrap();
        let paths = BundlePaths::at(folder.path());
        let fresh = || config.init(&device).unwrap();
        write_part(&paths, Part::Tokenizer, &config, &fresh(), Precision::F32).unwrap();
        let whole = read_weights(&paths, Part::Tokenizer, fresh()).unwrap();
        let images = Tensor::<4>::random([2, 3, 16, 16], Distribution::Uniform(-1.0, 1.0), &device);
        let codes = whole.encode(images).unwrap();
        let decoder = read_decoder(&paths, fresh()).unwrap();
        let [expected, found] = [whole.decode(&codes), decoder.decode(&codes)].map(Result::unwrap);
        assert_eq!(expected.into_data(), found.into_data());

        let weights = paths.weights(Part::Tokenizer);
        let only_encodes = |path: &str| whole.encoder_paths().iter().any(|part| path.starts_with(part));
        let half = load_without(fresh(), &weights, &only_encodes).unwrap();
        let mut read = Read::default();
        half.visit(&mut read);
        assert!(read.parameters > 0 && 3 * read.others > read.parameters, "{} unread", read.others);

        // What is not read must be there all the same.
        let mut tensors = read_tensors(&weights).unwrap();
        let name = tensors.keys().find(|name| name.starts_with("encoder.")).unwrap().clone();
        tensors.remove(&name);
        write_tensors(&weights, &tensors, Precision::F32, &BTreeMap::new()).unwrap();
        let error = read_decoder(&paths, fresh()).unwrap_err().to_string();
        assert!(error.contains(&name), "{error}");
    }
}
