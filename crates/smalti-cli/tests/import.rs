//! Official weights to a bundle, by the program.

#![allow(clippy::unwrap_used)]

mod stage;

use burn::tensor::Device;
use smalti::base::{Layout, TokenSpec};
use smalti::models::ConditionConfig;
use smalti::models::checkpoint::{Rules, Source, Stored, Values, WeightsFile, parameter_map, parameters};
use smalti::models::generators::GptConfig;

use stage::{error_of, json_of, official, root, text};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

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

/// A second stage over the demo's tokens, with random weights, and both stages in one file as the official code keeps them.
fn second_stage(path: &Path) -> PathBuf {
    let recipe = path.with_extension("toml");
    let text = r#"
        name = "second-stage"
        seed = 1
        [task]
        kind = "generator"
        tokenizer = "."
        train = "."
        validation = "."
        [task.model]
        kind = "gpt"
        width = 32
        depth = 2
        heads = 2
        shared_table = true
        block_size = 70
        tokens = { layout = { kind = "grid", h = 8, w = 8 }, vocabulary = 1024, image_size = [64, 64] }
        condition = { kind = "class", classes = 9 }
        [batch]
        size = 1
        [schedule]
        steps = 1
        [optimizer]
        learning_rate = 1e-3
        betas = [0.9, 0.95]
        weight_decay = 0.01
    "#;
    std::fs::write(&recipe, text).unwrap();
    let tokens = TokenSpec::discrete(Layout::Grid { h: 8, w: 8 }, 1024, (64, 64));
    let config = GptConfig {
        shared_table: true,
        block_size: Some(70),
        ..GptConfig::new(tokens, ConditionConfig::Class { classes: 9 }, 32, 2, 2)
    };
    let gpt = config.init(&Device::flex()).unwrap();
    let names: Vec<String> = parameter_map(&gpt).into_keys().collect();
    let ours = parameters(&gpt, &names).unwrap();
    let transformer = Rules::export("vqgan", "generator").unwrap();
    let transformer = transformer.plan(&ours).unwrap();
    official(path, |tensors| {
        *tensors = std::mem::take(tensors)
            .into_iter()
            .flat_map(|(name, stored)| {
                ["first_stage_model", "cond_stage_model"].map(|stage| (format!("{stage}.{name}"), stored.clone()))
            })
            .chain(transformer.shapes().into_keys().map(|name| (name.clone(), transformer.read(&name).unwrap())))
            .collect();
        let mask = Stored { shape: vec![1, 1, 2, 2], values: Values::Floats(vec![1.0, 0.0, 1.0, 1.0]) };
        tensors.insert("transformer.blocks.0.attn.mask".into(), mask);
    });
    recipe
}

#[test]
fn both_stages_come_from_one_file_and_make_pictures_of_any_size() {
    let folder = tempfile::tempdir().unwrap();
    let (file, bundle) = (folder.path().join("net2net.safetensors"), folder.path().join("bundle"));
    let recipe = second_stage(&file);
    let outcome = json_of(&["import", text(&file), "--system", "vqgan", "-o", text(&bundle)]);
    for (i, part) in ["tokenizer", "condition"].into_iter().enumerate() {
        assert_eq!(outcome["parts"][i]["part"], part);
        assert_eq!(outcome["parts"][i]["variant"], "vqgan/emoji3d-64");
        assert_eq!(outcome["parts"][i]["loaded"], 189);
    }
    let import = ["import", text(&file), "--system", "vqgan", "--variant", text(&recipe), "-o", text(&bundle)];
    assert_eq!(json_of(&import)["parts"][0]["part"], "generator");

    let picture = folder.path().join("picture.png");
    let generate = |more: &[&str]| {
        let generate = ["generate", "--model", text(&bundle), "-o", text(&picture)];
        [&generate[..], more].concat().into_iter().map(String::from).collect::<Vec<_>>()
    };
    let made = generate(&["--class", "2", "--size", "64x88"]);
    let made = json_of(&made.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(made["size"], serde_json::json!([64, 88]));
    let pixels = smalti::data::image::open(&picture, [255; 3], &Default::default()).unwrap();
    assert_eq!((pixels.height, pixels.width), (64, 88));
    for (more, expected) in [
        (&[][..], "makes pictures of a class only"),
        (&["--class", "2", "--size", "64x90"], "expected multiples of 8x8, at least 64x64"),
        (&["--class", "2", "--size", "56"], "at least 64x64"),
        (&["--class", "2", "--size", "axb"], "expected height x width"),
        (&["--class", "2", "--guidance", "2"], "guidance"),
    ] {
        let refused = generate(more);
        let message = error_of(&refused.iter().map(String::as_str).collect::<Vec<_>>(), 1);
        assert!(message.contains(expected), "{message}");
    }

    let back = folder.path().join("back.safetensors");
    let outcome = json_of(&["export", text(&bundle), "--part", "generator", "-o", text(&back)]);
    assert_eq!(outcome["system"], "vqgan");
    let (back, official) = (WeightsFile::open(&back).unwrap(), WeightsFile::open(&file).unwrap());
    for name in official.names().filter(|name| name.starts_with("transformer.") && !name.ends_with("mask")) {
        assert_eq!(back.read(name).unwrap(), official.read(name).unwrap(), "{name}");
    }
}

/// A bundle is replaced as a whole: what is not imported stays, and a refused import changes nothing.
#[test]
fn a_bundle_is_replaced_in_one_step() {
    let folder = tempfile::tempdir().unwrap();
    let (file, bundle) = (folder.path().join("model.safetensors"), folder.path().join("bundle"));
    official(&file, |_| {});
    let import = ["import", text(&file), "--system", "vqgan", "-o", text(&bundle)];
    let first = json_of(&import);
    std::fs::write(bundle.join("notes.txt"), "kept").unwrap();
    let kept = std::fs::read(bundle.join("bundle.json")).unwrap();
    official(&file, |tensors| {
        let tensor = tensors.get_mut("quant_conv.bias").unwrap();
        let Values::Floats(values) = &mut tensor.values else { panic!() };
        values[1] = f32::INFINITY;
    });
    let error = error_of(&import, 1);
    assert!(error.contains("values of tensor `quant_conv.bias` are not finite; the first is inf at [1]"), "{error}");
    assert_eq!(std::fs::read(bundle.join("bundle.json")).unwrap(), kept);
    official(&file, |tensors| {
        let tensor = tensors.get_mut("quant_conv.bias").unwrap();
        let Values::Floats(values) = &mut tensor.values else { panic!() };
        values[1] += 1.0;
    });
    let second = json_of(&import);
    assert_ne!(first["parts"][0]["facts"]["sha256"], second["parts"][0]["facts"]["sha256"]);
    json_of(&["inspect", text(&bundle), "--verify"]);
    assert_eq!(std::fs::read_to_string(bundle.join("notes.txt")).unwrap(), "kept");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left beside the bundle");
    // Other weights under the old checksum are used by no verb.
    let weights = bundle.join("tokenizer/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let image = root().join("docs/demo-reconstructions.png");
    let out = folder.path().join("out");
    let error = error_of(&["reconstruct", text(&image), "--model", text(&bundle), "-o", text(&out)], 1);
    assert!(error.contains("the bundle's checksum do not fit"), "{error}");
}
