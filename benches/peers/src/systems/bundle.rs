//! Generators from bundles, opened as `smalti generate` opens them.

use super::inputs;
use crate::rows::Row;
use burn::module::Module;
use burn::tensor::Device;
use serde_json::json;
use smalti::WeightsArgs;
use smalti::base::{Result, config, files};
use smalti::model::ModelPlan;
use smalti::models::checkpoint::{BundlePaths, Manifest, Part, Precision, write_part};
use smalti::models::generators::{GeneratorConfig, GeneratorModel};
use smalti::models::tokenizers::{TokenDecoder, TokenizerModel};
use std::path::Path;

/// Writes a bundle of a generator with the shared weights. It has a tokenizer's configuration, to which the tokens belong, and
/// its weights only if they are given.
pub fn prepare<M: Module>(row: &Row, folder: &Path, generator: &M, weights: Option<&TokenizerModel>) -> Result<()> {
    let bundle = BundlePaths::at(folder.join("bundle"));
    let configuration: GeneratorConfig = inputs::model(row)?;
    let codes = configuration.tokens().vocabulary().unwrap_or_default();
    let stand_in = || {
        json!({
            "kind": "vqgan", "image_size": 256, "ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1,
            "z_channels": 32, "embed_dim": 32, "quantizer": { "kind": "vq", "codes": codes, "channels": 32 },
        })
    };
    let tokenizer = if row.tokenizer.is_null() { stand_in() } else { row.tokenizer.clone() };
    files::create_folder(&bundle.root().join(Part::Tokenizer.name()))?;
    config::write_json(&bundle.config(Part::Tokenizer), &tokenizer)?;
    let mut manifest = Manifest::new(&row.name);
    if let Some(weights) = weights {
        let part = write_part(&bundle, Part::Tokenizer, &tokenizer, weights, Precision::F32)?;
        manifest.parts.insert(Part::Tokenizer, part);
    }
    let part = write_part(&bundle, Part::Generator, &configuration, generator, Precision::F32)?;
    manifest.parts.insert(Part::Generator, part);
    manifest.write(bundle.root())
}

/// What makes images of codes in the row's bundle.
pub fn open_decoder(folder: &Path, device: &Device) -> Result<TokenDecoder> {
    ModelPlan::find(Some(&folder.join("bundle")))?.open_decoder(device)
}

/// The generator of the row's bundle, its weights kept in the type that the row names.
pub fn open(row: &Row, folder: &Path, device: &Device) -> Result<GeneratorModel> {
    let plan = ModelPlan::find(Some(&folder.join("bundle")))?;
    let weights = row.options.get("weights").and_then(serde_json::Value::as_str).map(str::to_string);
    plan.open_generator(device, WeightsArgs { weights }.resolve("cpu")?)
}
