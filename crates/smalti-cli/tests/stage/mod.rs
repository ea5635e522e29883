//! Tiny models with fresh weights, images, and the program itself.
#![allow(dead_code, clippy::unwrap_used)] // Each test file is a program of its own and uses a part.

use assert_cmd::Command;
use serde_json::{Value, json};
use smalti::data::image::save_png;
use smalti::data::{Image, TextTokenizer};
use smalti::models::checkpoint::tensors::Precision;
use smalti::models::checkpoint::{BundlePaths, Manifest, Part, Source, Stored, WeightsFile, write_part, write_tensors};
use smalti::models::generators::GeneratorConfig;
use smalti::models::tokenizers::TokenizerConfig;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Side of the models' images.
pub const SIDE: usize = 16;

/// The program, without a default model.
pub fn smalti() -> Command {
    let mut command = Command::cargo_bin("smalti").unwrap();
    command.env_remove("SMALTI_MODEL").args(["--device", "cpu", "--threads", "1"]);
    command
}

/// What the program prints as JSON when it succeeds.
pub fn json_of(args: &[&str]) -> Value {
    let output = smalti().args(args).arg("--json").output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The error of the program when it fails with this exit code.
pub fn error_of(args: &[&str], code: i32) -> String {
    let output = smalti().args(args).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    text
}

/// Settings of a tokenizer of 16x16 pixels: a 4x4 grid of 16 codes.
pub fn tokenizer() -> Value {
    json!({
        "kind": "vqgan", "image_size": SIDE, "ch": 4, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "mid_attention": false,
        "z_channels": 4, "embed_dim": 2, "norm_groups": 2, "quantizer": { "kind": "fsq", "levels": [4, 4], "channels": 2 },
    })
}

/// The same with token maps of 1x1, 2x2 and 4x4.
pub fn pyramid_tokenizer() -> Value {
    let mut tokenizer = tokenizer();
    tokenizer["quant_kernel"] = json!(3);
    tokenizer["quantizer"] = json!({
        "kind": "multi_scale", "levels": [[1, 1], [2, 2], [4, 4]], "refinement": { "convolutions": 2 },
        "table": { "codes": 16, "channels": 2, "kmeans_init": 2, "revive": { "threshold": 0.1 } },
    });
    tokenizer
}

/// Settings of a generator over its tokens.
pub fn pyramid_generator(condition: Value) -> Value {
    let mut generator = generator("var", condition);
    generator["tokens"]["layout"] = json!({ "kind": "pyramid", "levels": [[1, 1], [2, 2], [4, 4]] });
    generator["channels"] = json!(2);
    generator["refinement"] = json!({ "convolutions": 2 });
    generator
}

/// Settings of a generator over its tokens, `gpt` or `maskgit`.
pub fn generator(kind: &str, condition: Value) -> Value {
    json!({
        "kind": kind, "condition": condition, "condition_dropout": 0.1, "width": 8, "depth": 1, "heads": 2,
        "tokens": { "layout": { "kind": "grid", "h": 4, "w": 4 }, "vocabulary": 16, "image_size": [SIDE, SIDE] },
    })
}

/// Holds the process's only random numbers, so that tests that run side by side do not draw from each other's.
static DRAWS: Mutex<()> = Mutex::new(());

/// Writes a bundle with fresh weights, the same each time for a folder of this name.
pub fn bundle(folder: &Path, generator: Option<Value>, classes: &[&str]) {
    let _alone = DRAWS.lock().unwrap_or_else(PoisonError::into_inner);
    let device = burn::tensor::Device::flex();
    device.seed(
        folder
            .file_name()
            .unwrap()
            .as_encoded_bytes()
            .iter()
            .fold(0, |seed, byte| seed ^ (seed << 5) ^ u64::from(*byte)),
    );
    let paths = BundlePaths::at(folder);
    let mut manifest = Manifest::new("tiny");
    manifest.classes = classes.iter().map(|name| name.to_string()).collect();
    let config: TokenizerConfig = serde_json::from_value(tokenizer()).unwrap();
    let model = config.init(&device).unwrap();
    let facts = write_part(&paths, Part::Tokenizer, &config, &model, Precision::F32).unwrap();
    manifest.parts.insert(Part::Tokenizer, facts);
    if let Some(generator) = generator {
        let config: GeneratorConfig = serde_json::from_value(generator).unwrap();
        let model = config.init(&device).unwrap();
        let facts = write_part(&paths, Part::Generator, &config, &model, Precision::F32).unwrap();
        manifest.parts.insert(Part::Generator, facts);
    }
    manifest.write(folder).unwrap();
}

/// Writes a bundle whose generator knows three classes.
pub fn class_bundle(folder: &Path) {
    bundle(folder, Some(generator("maskgit", json!({ "kind": "class", "classes": 3 }))), &["cat", "dog", "bird"]);
}

/// Writes a bundle whose generator reads captions, up to 6 tokens of them.
pub fn text_bundle(folder: &Path) {
    let captions = ["a red heart", "a green heart", "a red car"];
    let text = TextTokenizer::train_bpe(&captions, 280).unwrap();
    let condition = json!({ "kind": "text", "vocabulary": text.vocabulary(), "length": 6 });
    bundle(folder, Some(generator("gpt", condition)), &[]);
    fs::create_dir(folder.join("text")).unwrap();
    text.save(&folder.join("text/tokenizer.json")).unwrap();
}

/// Writes an image of this size with a pattern that depends on `seed`.
pub fn picture(path: &Path, width: usize, height: usize, seed: usize) {
    let pixels = (0..width * height * 3).map(|i| ((i * 7 + i / width * 13 + seed * 50) % 256) as u8).collect();
    save_png(path, &Image::new(width, height, pixels).unwrap(), None).unwrap();
}

/// The workspace's folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The demo's tokenizer under taming-transformers' names.
pub fn official(path: &Path, change: impl FnOnce(&mut BTreeMap<String, Stored>)) {
    let demo = WeightsFile::open(&root().join("assets/demo/tokenizer/model.safetensors")).unwrap();
    let mut tensors: BTreeMap<String, Stored> = demo
        .names()
        .filter(|name| !["quantize.cluster_size", "quantize.embed_avg", "quantize.started"].contains(name))
        .map(|name| (name.replace(".gamma", ".weight").replace(".beta", ".bias"), demo.read(name).unwrap()))
        .collect();
    tensors.insert("loss.logvar".into(), tensors["quant_conv.bias"].clone());
    change(&mut tensors);
    write_tensors(path, &tensors, Precision::F32, &BTreeMap::new()).unwrap();
}

/// A path as text.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
