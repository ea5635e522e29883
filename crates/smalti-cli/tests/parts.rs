//! Bundles inside of bundles: a next stage, a judge, and weights that are referred to.

#![allow(clippy::unwrap_used)]

mod stage;

use burn::tensor::{Device, Tensor, TensorData};
use serde_json::{Value, json};
use smalti::data::image::{Limits, open};
use smalti::model::ModelPlan;
use smalti::models::checkpoint::{
    BundlePaths, Manifest, Part, Precision, Source, WeightsFile, read_config, read_weights, write_part,
};
use smalti::models::encoders::{EncoderConfig, EncoderModel};
use smalti::models::{Condition, ImageRequest, Request, host};
use smalti::nn::MobileNetV2;
use smalti::nn::dense::WeightPrecision;
use stage::{SIDE, bundle, class_bundle, error_of, generator, json_of, root, smalti, text, text_bundle};
use std::fs;
use std::path::Path;
use tempfile::tempdir;

/// Writes the bundle of an encoder with a fresh head over the features of the repository.
fn encoder(folder: &Path, classes: Option<usize>, names: &[&str]) {
    let device = Device::flex();
    device.seed(7);
    let config: EncoderConfig =
        serde_json::from_value(json!({ "kind": "mobilenet_v2", "image_size": SIDE, "classes": classes })).unwrap();
    let mut manifest = Manifest::new("judge");
    manifest.classes = names.iter().map(|name| name.to_string()).collect();
    let mut model = config.init(&device).unwrap();
    let EncoderModel::MobileNetEncoder(encoder) = &mut model;
    let file = WeightsFile::open(&root().join("assets/models/mobilenet_v2_imagenet_features_f16.safetensors")).unwrap();
    let data = |name: &str| {
        let stored = file.read(name)?;
        Ok(TensorData::new(stored.floats().unwrap().to_vec(), stored.shape))
    };
    encoder.network = MobileNetV2::load(data, &device).unwrap();
    let facts = write_part(&BundlePaths::at(folder), Part::Encoder, &config, &model, Precision::F32).unwrap();
    manifest.parts.insert(Part::Encoder, facts);
    manifest.training.insert("encoder".into(), json!({ "steps": 0 }));
    manifest.write(folder).unwrap();
}

/// A bundle whose generator reads a 4x4 grid of so many codes.
fn upscaler(folder: &Path, codes: usize) {
    bundle(folder, Some(generator("gpt", json!({ "kind": "codes", "codes": codes, "h": 4, "w": 4 }))), &[]);
}

fn pixels(path: &Path) -> Vec<u8> {
    open(path, [255; 3], &Limits::default()).unwrap().pixels
}

#[test]
fn a_next_stage_reads_the_codes_of_the_base() {
    let place = tempdir().unwrap();
    let [base, next, both] = ["base", "next", "both"].map(|name| place.path().join(name));
    class_bundle(&base);
    upscaler(&next, 16);
    let assemble = ["assemble", text(&base), "-o", text(&both), "--next", text(&next)];
    let plan = json_of(&[&assemble[..], &["--dry-run"]].concat());
    assert_eq!(plan["next"]["condition"]["kind"], json!("codes"));
    assert!(!both.exists(), "a dry run writes nothing");
    let parts =
        json_of(&assemble)["parts"].as_array().unwrap().iter().map(|part| part["part"].clone()).collect::<Vec<_>>();
    assert_eq!(parts, ["tokenizer", "generator", "next/tokenizer", "next/generator"]);

    let out = place.path().join("out.png");
    let generate = |model: &Path, more: &[&str]| {
        let made = json_of(
            &[&["generate", "--class", "dog", "--seed", "3", "--model", text(model), "-o", text(&out)], more].concat(),
        );
        (made["parameters"].clone(), pixels(&out))
    };
    let (alone, expected) = generate(&base, &[]);
    let (parameters, found) = generate(&both, &["--stage", "base"]);
    assert!(found == expected, "the base makes what it made alone");
    assert_eq!((&parameters["stage"], &parameters["next"]), (&json!("base"), &Value::Null));
    assert_eq!(alone.get("stage"), None, "nothing is said of stages where there are none");
    let (parameters, found) = generate(&both, &[]);
    assert_eq!(
        parameters["next"]["generator_sha256"],
        json_of(&["inspect", text(&next)])["manifest"]["parts"]["generator"]["sha256"]
    );

    // The same by hand: the base's codes are the condition of the next generator.
    let device = Device::flex();
    let (base_plan, next_plan) = (ModelPlan::find(Some(&base)).unwrap(), ModelPlan::find(Some(&next)).unwrap());
    let run = |plan: &ModelPlan, image: ImageRequest| {
        let model = plan.open_generator(&device, WeightPrecision::F32).unwrap();
        model.start(&Request::new(vec![image], plan.sampling().clone())).unwrap().finish().unwrap()
    };
    let codes = run(&base_plan, ImageRequest::new(Condition::class(1), 3)).discrete().unwrap();
    let codes = host::ints(codes).unwrap().into_iter().map(|code| code as u32).collect();
    let second = run(&next_plan, ImageRequest::new(Condition::codes(codes), 3u64.wrapping_add(0x9E37_79B9_7F4A_7C15)));
    let picture = host::floats(next_plan.open_decoder(&device).unwrap().decode(&second).unwrap()).unwrap();
    let plane = SIDE * SIDE;
    let expected = (0..plane * 3).map(|i| picture[i % 3 * plane + i / 3]);
    for (found, expected) in found.iter().zip(expected) {
        assert!((f32::from(*found) - (expected.clamp(-1.0, 1.0) + 1.0) * 127.5).abs() < 0.51, "{found} {expected}");
    }

    let facts = json_of(&["inspect", text(&both), "--verify"]);
    assert_eq!((&facts["next"]["verified"], &facts["next"]["condition"]["codes"]), (&json!(true), &json!(16)));
    let weights = both.join("next/generator/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    assert!(error_of(&["inspect", text(&both), "--verify"], 1).contains("next/generator/model.safetensors"));
}

#[test]
fn what_does_not_fit_is_not_assembled() {
    let place = tempdir().unwrap();
    let [base, next, few, judge, out] = ["base", "next", "few", "judge", "out"].map(|name| place.path().join(name));
    class_bundle(&base);
    upscaler(&next, 16);
    upscaler(&few, 9);
    encoder(&judge, Some(3), &["cat", "dog", "bird"]);
    let refused = |base: &Path, more: &[&str]| {
        let error = error_of(&[&["assemble", text(base), "-o", text(&out)], more].concat(), 1);
        assert!(!out.exists());
        error
    };
    assert!(refused(&base, &[]).contains("nothing is to be added"));
    assert!(refused(&base, &["--next", text(&base)]).contains("reads no tokens of another image"));
    assert!(refused(&base, &["--next", text(&few)]).contains("at most 9 codes"));
    // Codes of another tokenizer on the same grid.
    let mut manifest = BundlePaths::at(&next).manifest().unwrap();
    let facts = manifest.parts[&Part::Tokenizer].clone();
    manifest.parts.insert(Part::Condition, facts);
    manifest.write(&next).unwrap();
    assert!(refused(&base, &["--next", text(&next)]).contains("train the next stage on tokens of the base model's"));
    upscaler(&next, 16);
    assert!(refused(&base, &["--judge", text(&next)]).contains("has no encoder"));
    assert!(refused(&next, &["--judge", text(&judge)]).contains("makes pictures of no class"));
    assert!(refused(&judge, &["--refer"]).contains("is an encoder"));
    // Weights that are not those of their manifest.
    let weights = base.join("generator/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    assert!(refused(&base, &["--next", text(&next)]).contains("checksum"));
    fs::create_dir(&out).unwrap();
    let error = error_of(&["assemble", text(&base), "-o", text(&out), "--refer"], 1);
    assert!(error.contains("is there already"), "{error}");
}

#[test]
fn the_judge_keeps_the_best() {
    let place = tempdir().unwrap();
    let [base, judge, both, all, best] = ["base", "judge", "both", "all", "best"].map(|name| place.path().join(name));
    class_bundle(&base);
    encoder(&judge, Some(3), &["cat", "dog", "bird"]);
    let generate = ["generate", "--class", "bird", "--seed", "5", "--count", "6", "--batch", "4"];
    let scored = [&generate[..], &["--model", text(&base), "--judge", text(&judge)]].concat();
    let made = json_of(&[&scored[..], &["-o", text(&all)]].concat());
    let numbers = |value: &Value| value.as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect::<Vec<_>>();
    let (seeds, scores) = (numbers(&made["seeds"]), numbers(&made["scores"]));
    assert_eq!(scores.len(), 6);
    assert!(
        scores.windows(2).all(|pair| pair[0] >= pair[1]) && scores[0] > scores[5] && scores[0] <= 0.0,
        "{scores:?}"
    );

    // The scores are the encoder's, of the pictures as they were written.
    let paths = BundlePaths::at(&judge);
    let config: EncoderConfig = read_config(&paths, Part::Encoder).unwrap();
    let device = Device::flex();
    let model = read_weights(&paths, Part::Encoder, config.init(&device).unwrap()).unwrap();
    for (seed, score) in seeds.iter().zip(&scores) {
        let file = all.join(format!("{seed:06}.png"));
        let told = json_of(&["inspect", text(&file)])["parameters"].clone();
        assert_eq!((&told["seed"], &numbers(&told["scores"])[0]), (&json!(*seed as u64), score));
        let values: Vec<f32> = pixels(&file).into_iter().map(|value| f32::from(value) / 127.5 - 1.0).collect();
        let image = Tensor::<3>::from_data(TensorData::new(values, [SIDE, SIDE, 3]), &device).permute([2, 0, 1]);
        let again = host::floats(model.scores(image.unsqueeze(), &[Condition::class(2)]).unwrap()).unwrap()[0];
        assert!((f64::from(again) - score).abs() < 0.05 * (scores[0] - scores[5]) + 1e-4, "{again} {score}");
    }

    // The best are the same from a bundle that holds or refers to the judge.
    let expected = json_of(&[&scored[..], &["--keep", "2", "-o", text(&best)]].concat());
    assert_eq!(numbers(&expected["seeds"]), seeds[..2]);
    assert_eq!(fs::read_dir(&best).unwrap().count(), 2);
    for more in [&[][..], &["--refer"]] {
        let assemble = ["assemble", text(&base), "-o", text(&both), "--judge", text(&judge)];
        json_of(&[&assemble[..], more].concat());
        assert_eq!(both.join("judge/model.safetensors").exists(), more.is_empty());
        let made = json_of(&[&generate[..], &["--model", text(&both), "--keep", "2", "-o", text(&best)]].concat());
        assert_eq!((&made["seeds"], &made["scores"]), (&expected["seeds"], &expected["scores"]));
        assert_eq!(json_of(&["inspect", text(&both), "--verify"])["judge"]["kind"], json!("mobilenet_v2"));
        if more.is_empty() {
            fs::remove_dir_all(&both).unwrap();
        }
    }
    // What is referred to is opened only if it is what it was.
    let weights = judge.join("encoder/model.safetensors");
    let again = [&generate[..], &["--model", text(&both), "--keep", "2", "-o", text(&best)]].concat();
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    assert!(error_of(&again, 1).contains("was replaced since the bundle was made"));
    fs::remove_file(&weights).unwrap();
    assert!(error_of(&again, 1).contains("put back the file with the SHA-256"));
}

#[test]
fn judges_that_cannot_judge_are_refused() {
    let place = tempdir().unwrap();
    let [base, words, judge, four, headless, other] =
        ["base", "words", "judge", "four", "headless", "other"].map(|name| place.path().join(name));
    class_bundle(&base);
    text_bundle(&words);
    encoder(&judge, Some(3), &["cat", "dog", "bird"]);
    encoder(&four, Some(4), &[]);
    encoder(&headless, None, &[]);
    encoder(&other, Some(3), &["dog", "cat", "bird"]);
    let out = place.path().join("out.png");
    let refused = |more: &[&str]| error_of(&[&["generate", "-o", text(&out), "--count", "3"], more].concat(), 1);
    let dog = ["--model", text(&base), "--class", "dog"];
    let error = refused(&[&dog[..], &["--judge", text(&four)]].concat());
    assert!(error.contains("3 classes: cat, dog, bird") && error.contains("4 classes"), "{error}");
    assert!(refused(&[&dog[..], &["--judge", text(&other)]].concat()).contains("dog, cat, bird"));
    assert!(refused(&[&dog[..], &["--judge", text(&headless)]].concat()).contains("has no head"));
    assert!(refused(&[&dog[..], &["--judge", text(&base)]].concat()).contains("has no encoder"));
    assert!(refused(&[&dog[..], &["--keep", "2"]].concat()).contains("this model has no judge"));
    assert!(refused(&[&dog[..], &["--judge", text(&judge), "--keep", "4"]].concat()).contains("4 is not in 1..=3"));
    assert!(refused(&["--model", text(&base), "--judge", text(&judge)]).contains("no class was given"));
    assert!(refused(&["a red heart", "--model", text(&words), "--judge", text(&judge)]).contains("of no class"));
    assert!(refused(&["--model", text(&judge)]).contains("is an encoder"));
    let facts = json_of(&["inspect", text(&headless)]);
    assert_eq!((&facts["encoder"]["width"], &facts["tokens"]), (&json!(1280), &Value::Null));
    let help = smalti().args(["assemble", "--help"]).output().unwrap();
    assert!(String::from_utf8_lossy(&help.stdout).contains("smalti assemble runs/digits"));
}
