//! Official weights to a bundle, by the program.

#![allow(clippy::unwrap_used)]

mod stage;

use smalti::models::checkpoint::{Source, Stored, WeightsFile};
use stage::{error_of, json_of, official, root, text};
use std::collections::BTreeMap;

#[test]
fn official_weights_become_a_bundle_of_the_same_values() {
    let folder = tempfile::tempdir().unwrap();
    let (file, bundle) = (folder.path().join("model.safetensors"), folder.path().join("bundle"));
    official(&file, |_| {});
    let outcome = json_of(&["import", text(&file), "--system", "vqgan", "-o", text(&bundle)]);
    assert_eq!(outcome["parts"][0]["variant"], "vqgan/emoji3d-64");
    assert_eq!(outcome["parts"][0]["dropped"], serde_json::json!(["loss.logvar"]));
    let [made, demo] = [&bundle, &root().join("assets/demo")]
        .map(|bundle| WeightsFile::open(&bundle.join("tokenizer/model.safetensors")).unwrap());
    assert_eq!(made.shapes(), demo.shapes());
    for name in
        ["encoder.mid.attn_1.q.weight", "decoder.norm_out.gamma", "quantize.embedding.weight", "quantize.started"]
    {
        assert_eq!(made.read(name).unwrap(), demo.read(name).unwrap());
    }
    let back = folder.path().join("back.safetensors");
    let outcome = json_of(&["export", text(&bundle), "--layout", "official", "-o", text(&back)]);
    assert_eq!(outcome["system"], "vqgan");
    let (back, official) = (WeightsFile::open(&back).unwrap(), WeightsFile::open(&file).unwrap());
    for name in official.names().filter(|name| *name != "loss.logvar") {
        assert_eq!(back.read(name).unwrap(), official.read(name).unwrap());
    }
    let picture = folder.path().join("out");
    let image = root().join("docs/demo-reconstructions.png");
    json_of(&["reconstruct", text(&image), "--model", text(&bundle), "-o", text(&picture)]);
}

#[test]
fn what_does_not_fit_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    let bundle = folder.path().join("bundle");
    let refused = |change: &dyn Fn(&mut BTreeMap<String, Stored>), more: &[&str]| {
        official(&file, change);
        let message = error_of(&[&["import", text(&file), "--system", "vqgan", "-o", text(&bundle)], more].concat(), 1);
        assert!(!bundle.exists());
        message
    };
    let renamed = refused(
        &|tensors| {
            let weight = tensors.remove("decoder.conv_out.weight").unwrap();
            tensors.insert("decoder.conv_outt.weight".into(), weight);
            tensors.get_mut("quant_conv.weight").unwrap().shape.swap(0, 1);
        },
        &[],
    );
    for part in [
        "`decoder.conv_out.weight` (nearest: `decoder.conv_outt.weight`)",
        "is [96, 32, 1, 1], expected [32, 96, 1, 1]",
    ] {
        assert!(renamed.contains(part), "{renamed}");
    }
    let variant = refused(&|_| {}, &["--variant", "imagenet-f16-1024"]);
    assert!(variant.contains("the variant `vqgan/emoji3d-64` would fit"), "{variant}");
    assert!(variant.contains("`decoder.conv_in.bias` is [128], expected [512]"), "{variant}");
}
