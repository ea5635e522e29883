//! Bad input: one clear line, the right exit code, and nothing lost.

#![allow(clippy::unwrap_used)]

mod stage;

use serde_json::{Value, json};
use stage::{bundle, class_bundle, error_of, generator, picture, smalti, text};
use std::fs;
use tempfile::tempdir;

#[test]
fn usage_errors_are_two() {
    assert!(error_of(&["generat"], 2).contains("generate"));
    assert!(error_of(&["generate", "a cat"], 2).contains("--out"));
    let output = smalti().args(["generate", "--json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(document["error"].as_str().unwrap().contains("required"), "{document}");
}

#[test]
fn errors_are_documents_for_machines() {
    let output = smalti().args(["inspect", "/nowhere/at/all", "--json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(document["error"].as_str().unwrap().contains("/nowhere/at/all"), "{document}");
    assert!(String::from_utf8(output.stderr).unwrap().starts_with("error: "));
}

#[test]
fn unknown_names_show_the_nearest() {
    let folder = tempdir().unwrap();
    let model = folder.path().join("model");
    class_bundle(&model);
    let out = folder.path().join("a.png");
    let generate = ["generate", "--model", text(&model), "-o", text(&out)];
    let error = |more: &[&str]| error_of(&[&generate[..], more].concat(), 1);
    assert!(error(&["--class", "dgo"]).contains("did you mean `dog`?"));
    assert!(error(&["--class", "3"]).contains("class 3 is not in 0..3"));
    assert!(error(&["a cat"]).contains("this model takes a class"));
    assert!(error(&["--top-p", "1.5"]).contains("top_p"));
    assert!(error(&["--count", "0"]).contains("--count"));
    let unknown = error(&["--weights", "int9"]);
    assert!(unknown.contains("did you mean `int8`?") && unknown.contains("`bf16`"), "{unknown}");
    let mut command = smalti_on("cpux");
    let output = command.args(generate).output().unwrap();
    assert!(String::from_utf8(output.stderr).unwrap().contains("did you mean `cpu`?"));
    assert!(!out.exists());
}

fn smalti_on(device: &str) -> assert_cmd::Command {
    let mut command = assert_cmd::Command::cargo_bin("smalti").unwrap();
    command.args(["--device", device]);
    command
}

#[test]
fn parts_that_do_not_fit_are_shown_side_by_side() {
    let folder = tempdir().unwrap();
    let model = folder.path().join("model");
    let mut other = generator("gpt", json!({ "kind": "none" }));
    other["tokens"]["vocabulary"] = json!(32);
    bundle(&model, Some(other), &[]);
    let error = error_of(&["generate", "--model", text(&model), "-o", text(&folder.path().join("a.png"))], 1);
    assert!(error.contains("4x4 grid of 16 codes") && error.contains("4x4 grid of 32 codes"), "{error}");
}

#[test]
fn missing_models_say_how_to_get_one() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("a.png");
    let error = error_of(&["generate", "--model", text(&folder.path().join("none")), "-o", text(&out)], 1);
    assert!(error.contains("there is no such file or folder") && error.contains("run folder"), "{error}");
    bundle(&folder.path().join("tokenizer"), None, &[]);
    let error = error_of(&["generate", "--model", text(&folder.path().join("tokenizer")), "-o", text(&out)], 1);
    assert!(error.contains("no generator") && error.contains("smalti train"), "{error}");
}

#[test]
fn damaged_weights_are_an_error() {
    let folder = tempdir().unwrap();
    let model = folder.path().join("model");
    class_bundle(&model);
    let weights = model.join("generator/model.safetensors");
    let whole = fs::read(&weights).unwrap();
    fs::write(&weights, &whole[..whole.len() - 10]).unwrap();
    let out = folder.path().join("a.png");
    let error = error_of(&["generate", "--model", text(&model), "-o", text(&out)], 1);
    assert!(error.contains("model.safetensors"), "{error}");
    let error = error_of(&["inspect", "--verify", text(&model)], 1);
    assert!(error.contains("checksum"), "{error}");
}

#[test]
fn output_that_cannot_be_written_is_found_first() {
    let folder = tempdir().unwrap();
    let model = folder.path().join("model");
    class_bundle(&model);
    let file = folder.path().join("file");
    fs::write(&file, "x").unwrap();
    // A folder cannot be made inside a file, whoever asks.
    let inside = file.join("a.png");
    let error = error_of(&["generate", "--model", text(&model), "-o", text(&inside)], 1);
    assert!(error.contains("cannot create folder"), "{error}");
    let error = error_of(&["generate", "--model", text(&model), "-o", "a.jpg"], 1);
    assert!(error.contains("ends in .png"), "{error}");
}

#[test]
fn empty_and_useless_sources_are_errors() {
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    class_bundle(&path("model"));
    fs::create_dir(path("empty")).unwrap();
    fs::create_dir(path("bad")).unwrap();
    fs::write(path("bad").join("x.png"), "no picture").unwrap();
    let (model, out) = (path("model"), path("out"));
    let reconstruct = |source: &str| {
        let source = path(source);
        error_of(&["reconstruct", text(&source), "--model", text(&model), "-o", text(&out)], 1)
    };
    assert!(reconstruct("empty").contains("no images"));
    assert!(reconstruct("bad").contains("none of its 1 images can be used"));
    assert!(reconstruct("nowhere").contains("nowhere"));
}

#[test]
fn masks_must_mark_something() {
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    class_bundle(&path("model"));
    picture(&path("image.png"), 20, 20, 0);
    let black = smalti::data::Image::filled(20, 20, [0; 3]);
    smalti::data::image::save_png(&path("mask.png"), &black, None).unwrap();
    let (image, mask, model, out) = (path("image.png"), path("mask.png"), path("model"), path("out.png"));
    let error = error_of(&["edit", text(&image), "--mask", text(&mask), "--model", text(&model), "-o", text(&out)], 1);
    assert!(error.contains("marks nothing") && error.contains("white"), "{error}");
    assert!(!out.exists());
}
