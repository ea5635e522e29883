//! What is read is not written over, what is asked for has an effect, and what is printed is harmless.

#![allow(clippy::unwrap_used)]

mod stage;

use serde_json::json;
use smalti::data::Image;
use smalti::data::image::save_png;
use stage::{bundle, error_of, generator, json_of, picture, smalti, text, text_bundle};
use std::fs;
use std::path::Path;
use tempfile::tempdir;

/// The bytes of each file in a folder.
fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let files = entries.filter(|entry| entry.path().is_file());
    let mut found: Vec<_> =
        files.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect();
    found.sort();
    found
}

#[test]
fn what_is_read_is_not_written_over() {
    let place = tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    let model = at("model");
    text_bundle(&model);
    fs::create_dir(at("photos")).unwrap();
    for (name, seed) in [("a.png", 1), ("grid.png", 2), ("mask.png", 3)] {
        picture(&at("photos").join(name), 20, 20, seed);
    }
    let before = files(&at("photos"));
    let with = |verb: &str, more: &[&Path]| {
        let more: Vec<&str> = more.iter().map(|path| text(path)).collect();
        error_of(&[&[verb, "--model", text(&model)], &more[..]].concat(), 1)
    };
    let [photos, inside, mask] = [at("photos"), at("photos/new"), at("photos/mask.png")];
    let [one, sheet, flag] = [at("photos/a.png"), at("photos/grid.png"), "-o".into()];
    for out in [&photos, &inside] {
        assert!(with("reconstruct", &[&photos, &flag, out]).contains("in the folder of the images"));
    }
    for image in [&one, &sheet] {
        assert!(with("reconstruct", &[image, &flag, &photos]).contains("would be written over the image"));
    }
    assert!(with("tokenize", &[&photos, &photos]).contains("is where the images are"));
    for out in [&one, &mask] {
        assert!(with("edit", &[&one, "--mask".as_ref(), &mask, &flag, out]).contains("would be written over the"));
    }
    assert_eq!(files(&photos), before);
    // A folder beside them, and one image with its folder, are as before.
    json_of(&["reconstruct", "--model", text(&model), text(&photos), "-o", text(&at("out"))]);
    json_of(&["reconstruct", "--model", text(&model), text(&photos), "-o", text(&at("photos2"))]);
    assert_eq!(files(&at("out")).len(), 4);

    let weights = model.join("tokenizer/model.safetensors");
    let sum = fs::read(&weights).unwrap();
    let refused = error_of(&["export", text(&model), "--part", "tokenizer", "-o", text(&weights)], 1);
    assert!(refused.contains("into the bundle that is read"), "{refused}");
    assert_eq!(fs::read(&weights).unwrap(), sum);
}

#[test]
fn names_of_outputs_mean_what_they_say() {
    let place = tempdir().unwrap();
    let at = |name: &str| text(&place.path().join(name)).to_string();
    bundle(Path::new(&at("model")), Some(generator("gpt", json!({ "kind": "none" }))), &[]);
    let generate = |out: &str| ["generate", "--model", &at("model"), "-o", out].map(str::to_string);
    let run = |out: &str| json_of(&generate(out).each_ref().map(String::as_str));
    let refused = |out: &str| error_of(&generate(out).each_ref().map(String::as_str), 1);
    for folder in ["v1.0", "dir.png/", "plain"] {
        assert_eq!(run(&at(folder))["files"][0], format!("{}/000000.png", at(folder).trim_end_matches('/')));
    }
    assert!(refused("-").contains("standard output") && refused(&at("a.webp")).contains("not written as .webp"));
    let reconstruct = ["reconstruct", "--model", &at("model"), &at("v1.0"), "-o", "-"];
    assert!(error_of(&reconstruct, 1).contains("standard output"));
    assert!(!Path::new("-").exists());
    // The longest name that a file can have.
    let long = "x".repeat(251) + ".png";
    fs::create_dir(at("long")).unwrap();
    picture(Path::new(&at(&format!("long/{long}"))), 20, 20, 1);
    let made = json_of(&["reconstruct", "--model", &at("model"), &at("long"), "-o", &at("out")]);
    assert_eq!(made["images"][0]["key"], long);
    assert!(Path::new(made["images"][0]["file"].as_str().unwrap()).is_file());
}

#[test]
fn settings_without_an_effect_are_refused() {
    let place = tempdir().unwrap();
    let model = place.path().join("model");
    bundle(&model, Some(generator("gpt", json!({ "kind": "class", "classes": 3 }))), &["cat", "dog", "bird"]);
    let out = place.path().join("a.png");
    for verb in [vec!["generate"], vec!["generate", "--dry-run"]] {
        let with = |more: &[&str]| {
            error_of(&[&verb[..], &["--model", text(&model), "--class", "dog", "-o", text(&out)], more].concat(), 1)
        };
        assert!(with(&["--steps", "8"]).contains("leave out `steps`"));
        assert!(with(&["--smooth"]).contains("only var can mix codes"));
        assert!(with(&["--diffusion-steps", "5"]).contains("leave out `diffusion_steps`"));
        assert!(with(&["--top-k", "3,4"]).contains("top_k"));
    }
    assert!(!out.exists());
}

#[test]
fn a_model_is_not_measured_without_its_condition_unasked() {
    let place = tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    text_bundle(&at("model"));
    fs::create_dir(at("photos")).unwrap();
    for (name, seed) in [("a.png", 1), ("b.png", 2)] {
        picture(&at("photos").join(name), 20, 20, seed);
    }
    let evaluate = ["evaluate", text(&at("model")), "--data", text(&at("photos"))].map(str::to_string);
    let evaluate = evaluate.each_ref().map(String::as_str);
    let captions = |second: &str| {
        let lines = format!("{{\"file_name\":\"a.png\",\"text\":\"a cat\"}}\n{{\"file_name\":\"b.png\"{second}}}\n");
        fs::write(at("photos/metadata.jsonl"), lines).unwrap();
    };
    assert!(error_of(&evaluate, 1).contains("2 of its 2 images have no caption"));
    captions("");
    assert!(error_of(&[&evaluate[..], &["--dry-run"]].concat(), 1).contains("1 of its 2 images have no caption"));
    captions(",\"text\":\"a dog\"");
    let conditional = json_of(&evaluate);
    let without = json_of(&[&evaluate[..], &["--unconditional"]].concat());
    assert!(conditional["unconditional"].is_null() && without["unconditional"] == true);
    assert_ne!(conditional["generator"], without["generator"]);
    bundle(&at("plain"), Some(generator("gpt", json!({ "kind": "none" }))), &[]);
    let plain = ["evaluate", text(&at("plain")), "--data", text(&at("photos")), "--unconditional"].map(str::to_string);
    assert!(error_of(&plain.each_ref().map(String::as_str), 1).contains("takes no class and no caption"));
}

#[cfg(target_os = "linux")]
#[test]
fn a_result_that_cannot_be_written_is_an_error() {
    for json in [&["--json"][..], &[]] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_smalti"));
        let output = program.arg("systems").args(json).stdout(full).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains("cannot write standard output"));
    }
    // A reader that has seen enough is no error.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_smalti")).arg("systems").stdout(writer).output();
    assert!(output.unwrap().status.success());
}

#[test]
fn instruction_sets_that_are_none_are_refused() {
    let output = smalti().env("SMALTI_SIMD", "nonsense").args(["systems"]).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("SMALTI_SIMD") && error.contains("`avx2`"), "{error}");
    assert!(smalti().env("SMALTI_SIMD", "base").args(["systems"]).output().unwrap().status.success());
}

#[cfg(unix)]
#[test]
fn nothing_in_a_file_moves_the_cursor() {
    let place = tempdir().unwrap();
    let image = Image::filled(8, 8, [1, 2, 3]);
    let told = json!({ "prompt": "\u{1b}]0;title\u{7}\u{1b}[2J\u{9b}31m" });
    let path = place.path().join("a\u{1b}[31m.png");
    save_png(&path, &image, Some(&told)).unwrap();
    fs::write(place.path().join("b\u{1b}[2J.png"), b"no picture").unwrap();
    for json in [&["--json"][..], &[]] {
        for arguments in [vec!["inspect", text(&path)], vec!["inspect", text(&place.path().join("b\u{1b}[2J.png"))]] {
            let output = smalti().args(arguments).args(json).output().unwrap();
            for printed in [output.stdout, output.stderr] {
                let printed = String::from_utf8(printed).unwrap();
                assert!(!printed.chars().any(|c| c.is_control() && c != '\n' && c != '\t'), "{printed:?}");
            }
        }
    }
}
