//! Inputs as they really are, seen from outside: every verb says what it leaves out, and refuses what could mean two things.

#![allow(clippy::unwrap_used)]

mod stage;

use serde_json::json;
use smalti::data::Image;
use smalti::data::image::save_png;
use stage::{class_bundle, error_of, json_of, smalti, text};
use std::fs;
use std::path::Path;
use tempfile::{TempDir, tempdir};

const JPEG: &[u8] = include_bytes!("../../smalti-data/tests/data/decode/plain.jpg");

/// A folder with pictures under these names.
fn pictures(names: &[&str]) -> TempDir {
    let folder = tempdir().unwrap();
    for (level, name) in (1u8..).zip(names) {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        save_png(&path, &Image::filled(20, 20, [level * 20; 3]), None).unwrap();
    }
    folder
}

/// What the program says on the standard error when it succeeds.
fn says(args: &[&str]) -> String {
    let output = smalti().args(args).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{args:?}: {said}");
    said
}

#[test]
fn folders_are_what_is_said() {
    let folder = pictures(&["boat/1.png", "bus/1.png", "train/1.png"]);
    let path = text(folder.path());
    let error = error_of(&["inspect", path], 1);
    assert!(error.contains("--classes-from-folders") && error.contains("classes_from_folders = true"), "{error}");
    let facts = json_of(&["inspect", path, "--classes-from-folders"]);
    assert_eq!((&facts["images"], &facts["classes"]), (&json!(3), &json!(["boat", "bus", "train"])));
    let none = json_of(&["inspect", path, "--classes-from-folders=false"]);
    assert_eq!((&none["images"], &none["classes"]), (&json!(3), &json!([])));
    assert_eq!(json_of(&["inspect", path, "--split", "train"])["images"], json!(1));

    let folder = pictures(&["cat/1.png", "cat/2.png", "dog/1.png", "cover.png"]);
    let facts = json_of(&["inspect", text(folder.path())]);
    assert_eq!((&facts["images"], &facts["classes"]), (&json!(3), &json!(["cat", "dog"])));
    assert!(facts["warnings"][0].as_str().unwrap().contains("cover.png"), "{facts}");
}

#[test]
fn every_verb_says_what_it_leaves_out() {
    let folder = pictures(&["1.png", "2.png", "3.png"]);
    let at = |name: &str| folder.path().join(name);
    fs::write(at("half.jpg"), &JPEG[..JPEG.len() / 2]).unwrap();
    fs::write(at("x.heic"), b"x").unwrap();
    let out = tempdir().unwrap();
    let out = |name: &str| out.path().join(name);
    let model = out("model");
    class_bundle(&model);
    let (data, model) = (text(folder.path()), text(&model));
    let (tokens, pairs) = (out("tokens"), out("pairs"));
    let verbs: [&[&str]; 3] = [
        &["reconstruct", data, "-o", text(&pairs), "--model", model],
        &["tokenize", data, text(&tokens), "--model", model],
        &["evaluate", model, "--data", data, "--unconditional"],
    ];
    for verb in verbs {
        let said = says(verb);
        assert!(said.contains("1 .heic"), "{verb:?}: {said}");
        assert!(said.contains("half.jpg: the file is cut off"), "{verb:?}: {said}");
    }
    assert_eq!(json_of(&["inspect", text(&tokens)])["skipped"][0]["key"], json!("half.jpg"));
    let error = error_of(&["reconstruct", text(&at("half.jpg")), "-o", text(&out("one")), "--model", model], 1);
    assert!(error.contains("none of its 1 images can be used"), "{error}");
}

/// A PNG with a box of one colour on another.
fn mask(path: &Path, inside: [u8; 4], outside: [u8; 4]) {
    let is_inside = |at: usize| (20..=40).contains(&(at % 64)) && (20..=40).contains(&(at / 64));
    let pixels: Vec<u8> = (0..64 * 64).flat_map(|at| if is_inside(at) { inside } else { outside }).collect();
    let mut encoder = png::Encoder::new(fs::File::create(path).unwrap(), 64, 64);
    encoder.set_color(png::ColorType::Rgba);
    encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
}

#[test]
fn a_mask_means_one_thing() {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (model, image, marks, out) = (at("model"), at("image.png"), at("mask.png"), at("out.png"));
    class_bundle(&model);
    save_png(&image, &Image::filled(64, 64, [90, 120, 150]), None).unwrap();
    let edit =
        ["edit", text(&image), "--mask", text(&marks), "--class", "cat", "--model", text(&model), "-o", text(&out)];
    let share = |more: &[&str]| json_of(&[&edit[..], more].concat())["repainted"].as_f64().unwrap();
    let (own, white, black, clear) = ([90, 120, 150, 255], [255; 4], [0, 0, 0, 255], [0; 4]);
    for (inside, outside) in [(white, clear), (white, black), (clear, own)] {
        mask(&marks, inside, outside);
        assert_eq!(share(&[]), 441.0 / 4096.0, "{inside:?} on {outside:?}");
    }
    mask(&marks, clear, black);
    let error = error_of(&edit, 1);
    assert!(error.contains("two ways") && error.contains("--mask-channel alpha"), "{error}");
    assert_eq!(share(&["--mask-channel", "alpha"]), 441.0 / 4096.0);
    assert!(error_of(&[&edit[..], &["--mask-channel", "light"]].concat(), 1).contains("the mask marks nothing"));
}
