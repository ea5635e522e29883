//! The program on tiny models with fresh weights: what it writes, what it prints, and that results depend on what they should.

#![allow(clippy::unwrap_used)]

mod stage;

use serde_json::{Value, json};
use smalti::data::Image;
use smalti::data::image::{Limits, open, read_parameters, save_png};
use stage::{SIDE, class_bundle, error_of, json_of, picture, smalti, text, text_bundle};
use std::fs;
use std::path::Path;
use tempfile::tempdir;

fn image(path: &Path) -> Image {
    open(path, [255; 3], &Limits::default()).unwrap()
}

#[test]
fn systems_are_listed() {
    let kinds: Vec<Value> =
        json_of(&["systems"])["systems"].as_array().unwrap().iter().map(|system| system["kind"].clone()).collect();
    for kind in ["vqgan", "vq", "fsq", "gpt", "maskgit"] {
        assert!(kinds.contains(&json!(kind)), "{kinds:?}");
    }
    let table = smalti().arg("systems").output().unwrap().stdout;
    assert!(String::from_utf8(table).unwrap().contains("arXiv:2202.04200"));
}

#[test]
fn help_has_examples_and_completions_are_scripts() {
    for verb in ["generate", "edit", "reconstruct", "evaluate", "inspect", "systems", "completions"] {
        let help = String::from_utf8(smalti().args([verb, "--help"]).output().unwrap().stdout).unwrap();
        assert!(help.contains("Examples:") && help.contains("--json"), "{verb}: {help}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = String::from_utf8(smalti().args(["completions", shell]).output().unwrap().stdout).unwrap();
        assert!(script.contains("reconstruct") && script.contains("smalti"), "{shell}");
    }
}

#[test]
fn a_picture_depends_on_its_seed_alone_and_says_what_made_it() {
    let folder = tempdir().unwrap();
    let (model, many, one) = (folder.path().join("model"), folder.path().join("many"), folder.path().join("one.png"));
    class_bundle(&model);
    let common = ["generate", "--model", text(&model), "--class", "DOG", "--temperature", "2"];
    let outcome = json_of(&[&common[..], &["--seed", "5", "-n", "3", "--batch", "3", "-o", text(&many)]].concat());
    assert_eq!(outcome["seeds"], json!([5, 6, 7]));
    assert_eq!(outcome["files"].as_array().unwrap().len(), 3);
    json_of(&[&common[..], &["--seed", "6", "-o", text(&one)]].concat());
    assert_eq!(image(&one), image(&many.join("000006.png")));
    assert_ne!(image(&one), image(&many.join("000005.png")));

    let parameters = read_parameters(&one).unwrap().unwrap();
    assert_eq!((&parameters["seed"], &parameters["class"]), (&json!(6), &json!("DOG")));
    assert_eq!(parameters["sampling"]["temperature"], json!(2.0));
    assert_eq!(parameters["model"]["generator_sha256"].as_str().unwrap().len(), 64);
    assert_eq!(json_of(&["inspect", text(&one)])["parameters"], parameters);
}

#[test]
fn several_pictures_in_one_file_are_a_grid() {
    let folder = tempdir().unwrap();
    let (model, out) = (folder.path().join("model"), folder.path().join("new/grid.png"));
    class_bundle(&model);
    json_of(&["generate", "--model", text(&model), "-n", "3", "--scale", "2", "-o", text(&out)]);
    let side = 2 * (2 * SIDE) + 3 * 4;
    assert_eq!((image(&out).width, image(&out).height), (side, side));
}

#[test]
fn captions_are_read_and_long_ones_are_cut_aloud() {
    let folder = tempdir().unwrap();
    let (model, out) = (folder.path().join("model"), folder.path().join("heart.png"));
    text_bundle(&model);
    let common = ["--model", text(&model), "-o", text(&out)];
    let outcome = json_of(&[&["generate", "a red heart", "--guidance", "3"][..], &common].concat());
    assert_eq!(outcome["parameters"]["prompt"], json!("a red heart"));
    assert_eq!(outcome["parameters"]["sampling"]["guidance"], json!(3.0));
    // Without a caption there is nothing to be guided by.
    let outcome = json_of(&[&["generate", "--guidance", "3"][..], &common].concat());
    assert_eq!(outcome["parameters"]["sampling"]["guidance"], json!(1.0));
    let long = smalti().args(["generate", "a zebra zigzagging zealously"]).args(common).output().unwrap();
    assert!(long.status.success());
    assert!(String::from_utf8(long.stderr).unwrap().contains("reads the first 6"));
    let error = error_of(&[&["generate", "--class", "1"][..], &common].concat(), 1);
    assert!(error.contains("this model takes a caption"), "{error}");
}

#[test]
fn the_default_model_is_named_by_the_environment() {
    let folder = tempdir().unwrap();
    let (model, out) = (folder.path().join("model"), folder.path().join("a.png"));
    class_bundle(&model);
    let mut command = smalti();
    let output = command.env("SMALTI_MODEL", &model).args(["generate", "--class", "bird", "-o", text(&out)]).output();
    let said = String::from_utf8(output.unwrap().stdout).unwrap();
    assert!(said.contains("a.png (16x16, seed 0)"), "{said}");
}

#[test]
fn a_plan_is_shown_and_nothing_is_done() {
    let folder = tempdir().unwrap();
    let (model, out) = (folder.path().join("model"), folder.path().join("out/a.png"));
    class_bundle(&model);
    // The weights are not read.
    fs::remove_file(model.join("generator/model.safetensors")).unwrap();
    let plan = json_of(&["generate", "--model", text(&model), "--class", "1", "--dry-run", "-o", text(&out)]);
    assert_eq!(plan["model"]["tokens"]["vocabulary"], json!(16));
    assert_eq!(plan["sampling"]["guidance"], json!(1.0));
    assert!(!out.parent().unwrap().exists());
    let human = smalti().args(["generate", "--model", text(&model), "--dry-run", "-o", text(&out)]).output().unwrap();
    assert!(String::from_utf8(human.stdout).unwrap().contains("vocabulary = 16"));
}

#[test]
fn reconstructions_are_measured_and_bad_images_listed() {
    let folder = tempdir().unwrap();
    let (model, images, out) = (folder.path().join("model"), folder.path().join("images"), folder.path().join("out"));
    class_bundle(&model);
    fs::create_dir(&images).unwrap();
    picture(&images.join("a.png"), 20, 16, 1);
    picture(&images.join("b.png"), 40, 70, 2);
    let whole = fs::read(images.join("b.png")).unwrap();
    fs::write(images.join("cut.png"), &whole[..whole.len() / 2]).unwrap();
    fs::write(images.join("not.png"), "no picture").unwrap();

    let run = ["reconstruct", text(&images), "--model", text(&model), "-o", text(&out)];
    let outcome = json_of(&run);
    let found = outcome["images"].as_array().unwrap();
    assert_eq!(found.iter().map(|image| &image["key"]).collect::<Vec<_>>(), ["a.png", "b.png"]);
    let mean = |name: &str| (found[0][name].as_f64().unwrap() + found[1][name].as_f64().unwrap()) / 2.0;
    assert!((mean("psnr") - outcome["mean"]["psnr"].as_f64().unwrap()).abs() < 1e-9);
    assert!((mean("ssim") - outcome["mean"]["ssim"].as_f64().unwrap()).abs() < 1e-9);
    assert_eq!(outcome["skipped"].as_array().unwrap().len(), 2);
    assert_eq!(image(&out.join("a.png")).width, 2 * SIDE + 6);
    assert!(out.join("grid.png").is_file());

    let human = smalti().args(run).output().unwrap();
    let (table, said) = (String::from_utf8(human.stdout).unwrap(), String::from_utf8(human.stderr).unwrap());
    assert!(table.contains("mean of 2") && table.contains("2 images could not be used"), "{table}");
    assert!(said.contains("cut.png") && said.contains("not.png"), "{said}");
}

#[test]
fn evaluation_measures_both_parts() {
    let folder = tempdir().unwrap();
    let (model, images) = (folder.path().join("model"), folder.path().join("images"));
    class_bundle(&model);
    for (i, class) in ["cat", "dog", "bird"].iter().enumerate() {
        fs::create_dir_all(images.join(class)).unwrap();
        picture(&images.join(class).join("x.png"), SIDE, SIDE, i);
    }
    let numbers = |batch: &str| json_of(&["evaluate", text(&model), "--data", text(&images), "--batch", batch]);
    let (one, three) = (numbers("1"), numbers("3"));
    assert_eq!(one["images"], json!(3));
    let near = |a: &Value, b: &Value| (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-4;
    let bits = &one["generator"]["bits_per_token"];
    assert!(near(bits, &three["generator"]["bits_per_token"]), "{one} {three}");
    // 16 tokens for 16 x 16 pixels.
    assert!(near(&json!(bits.as_f64().unwrap() / 16.0), &one["generator"]["bits_per_pixel"]));
    assert!(near(&one["tokenizer"]["psnr"], &three["tokenizer"]["psnr"]));
    assert!((0.0..=1.0).contains(&one["tokenizer"]["usage"].as_f64().unwrap()));
    assert!((1.0..=16.1).contains(&one["tokenizer"]["perplexity"].as_f64().unwrap()));
}

#[test]
fn an_edit_changes_only_what_is_masked() {
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    class_bundle(&path("model"));
    picture(&path("image.png"), 40, 24, 3);
    let mut mask = Image::filled(40, 24, [0; 3]);
    // The right quarter is white.
    mask.pixels.chunks_exact_mut(40 * 3).for_each(|row| row[30 * 3..].fill(255));
    save_png(&path("mask.png"), &mask, None).unwrap();
    let (model, original) = (path("model"), path("image.png"));
    let (mask, out) = (path("mask.png"), path("out.png"));
    let edit = ["edit", text(&original), "--mask", text(&mask), "--model", text(&model), "--class", "cat"];
    let outcome = json_of(&[&edit[..], &["-o", text(&out)]].concat());
    assert_eq!(outcome["tokens"], json!([4, 16]));
    assert_eq!(outcome["repainted"], json!(0.25));
    let (before, after) = (image(&original), image(&out));
    assert_eq!(before.crop(0, 0, 30, 24).unwrap(), after.crop(0, 0, 30, 24).unwrap());
    assert_ne!(before.crop(30, 0, 10, 24).unwrap(), after.crop(30, 0, 10, 24).unwrap());
}

#[test]
fn inspect_knows_what_things_are() {
    let folder = tempdir().unwrap();
    let model = folder.path().join("model");
    class_bundle(&model);
    let facts = json_of(&["inspect", text(&model), "--verify"]);
    assert_eq!((&facts["kind"], &facts["verified"]), (&json!("bundle"), &json!(true)));
    assert_eq!(facts["manifest"]["classes"], json!(["cat", "dog", "bird"]));
    let weights = json_of(&["inspect", text(&model.join("tokenizer/model.safetensors"))]);
    assert_eq!(weights["kind"], json!("weights"));
    assert_eq!(weights["parameters"], facts["manifest"]["parts"]["tokenizer"]["parameters"]);
    picture(&model.join("p.png"), 5, 4, 0);
    let picture = json_of(&["inspect", text(&model.join("p.png"))]);
    assert_eq!((&picture["width"], &picture["parameters"]), (&json!(5), &Value::Null));
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_the_work_cleanly() {
    let folder = tempdir().unwrap();
    let (model, out) = (folder.path().join("model"), folder.path().join("out"));
    class_bundle(&model);
    let child = std::process::Command::new(assert_cmd::cargo::cargo_bin("smalti"))
        .args(["generate", "--model", text(&model), "-n", "1000000", "--batch", "1", "-o", text(&out)])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let begun = std::time::Instant::now();
    while !out.join("000000.png").exists() {
        assert!(begun.elapsed().as_secs() < 60, "nothing was generated");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(String::from_utf8(output.stderr).unwrap().contains("error: interrupted"));
    // No file is half written.
    for file in fs::read_dir(&out).unwrap() {
        let path = file.unwrap().path();
        assert_eq!(image(&path).width, SIDE, "{}", path.display());
    }
}
