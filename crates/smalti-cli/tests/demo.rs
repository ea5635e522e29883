//! The model that comes with the program, used as the README says.
#![allow(clippy::unwrap_used)]

mod stage;

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[test]
fn the_readmes_first_command() {
    let folder = tempfile::tempdir().unwrap();
    let [one, again, three] = ["one.png", "again.png", "three"].map(|name| folder.path().join(name));
    for path in [&one, &again] {
        let args = ["generate", "a red heart", "-o", stage::text(path), "--seed", "2"];
        stage::smalti().current_dir(root()).args(args).assert().success();
    }
    assert_eq!(std::fs::read(&one).unwrap(), std::fs::read(&again).unwrap());
    let args = ["generate", "a red heart", "-o", stage::text(&three), "--count", "3", "--batch", "2"];
    stage::smalti().current_dir(root()).args(args).assert().success();
    // Picture 2 of seed 0 is the picture of seed 2, whatever the batch.
    let mut files: Vec<PathBuf> = std::fs::read_dir(&three).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let pixels = |path: &Path| smalti::data::image::open(path, [255; 3], &Default::default()).unwrap();
    assert_eq!(files.len(), 3);
    assert_eq!(pixels(&files[2]), pixels(&one));
    let picture = pixels(&one);
    assert_eq!((picture.width, picture.height), (64, 64));
    let pixel = |x: usize, y: usize| &picture.pixels[(y * 64 + x) * 3..][..3];
    assert!(pixel(1, 1).iter().all(|v| *v > 230), "a white background: {:?}", pixel(1, 1));
    let facts = stage::json_of(&["inspect", stage::text(&one)]);
    assert!(facts.to_string().contains("a red heart"), "{facts}");
}

#[test]
fn the_demo_model_is_as_good_as_its_page_says() {
    let root = root();
    let (model, data) = (root.join("assets/demo"), root.join("assets/emoji3d/validation.tar"));
    let facts = stage::json_of(&["evaluate", stage::text(&model), "--data", stage::text(&data)]);
    let psnr = facts["tokenizer"]["psnr"].as_f64().unwrap();
    assert!(psnr >= 24.0, "{facts}");
}

#[test]
fn reduced_weights_are_said_and_measured() {
    let folder = tempfile::tempdir().unwrap();
    let root = root();
    let (model, data) = (root.join("assets/demo"), root.join("assets/emoji3d/validation.tar"));
    let [one, again, three] = ["one.png", "again.png", "three"].map(|name| folder.path().join(name));
    let make = |out: &Path, more: &[&str]| {
        let args = ["generate", "a red heart", "-o", stage::text(out), "--weights", "int8"];
        stage::smalti().current_dir(&root).args(args).args(more).assert().success();
    };
    make(&one, &["--seed", "2"]);
    make(&again, &["--seed", "2"]);
    make(&three, &["--count", "3", "--batch", "2"]);
    let pixels = |path: &Path| smalti::data::image::open(path, [255; 3], &Default::default()).unwrap();
    assert_eq!(pixels(&one), pixels(&again));
    assert_eq!(pixels(&one), pixels(&three.join("000002.png")));
    let facts = stage::json_of(&["inspect", stage::text(&one)]);
    assert_eq!(facts["parameters"]["weights"], "int8", "{facts}");

    let evaluate = ["evaluate", stage::text(&model), "--data", stage::text(&data), "--limit", "16"];
    assert!(stage::json_of(&evaluate)["weights"].is_null());
    let facts = stage::json_of(&[&evaluate[..], &["--weights", "int8"]].concat());
    let effect = &facts["weights"];
    let number = |name: &str| effect[name].as_f64().unwrap();
    assert_eq!((effect["weights"].as_str(), number("bytes_f32")), (Some("int8"), 19_922_944.0), "{facts}");
    assert!(number("bytes") < 0.26 * number("bytes_f32"));
    assert!((number("bits_per_token") - number("bits_per_token_f32")).abs() < 0.01, "{facts}");
    assert!(number("logit_difference_mean") < 0.055 && number("changed_argmax") < 0.05, "{facts}");
}

/// Direct sums round otherwise than the fast algorithm: by less than a level of a pixel here and there.
#[test]
fn direct_convolution_gives_the_same_reconstruction() {
    let root = root();
    let (model, data) = (root.join("assets/demo"), root.join("assets/emoji3d/validation.tar"));
    let psnr = |extra: &[&str]| {
        let facts = stage::json_of(&[&["evaluate", stage::text(&model), "--data", stage::text(&data)], extra].concat());
        facts["tokenizer"]["psnr"].as_f64().unwrap()
    };
    let (fast, direct) = (psnr(&[]), psnr(&["--direct-convolution"]));
    assert!(fast != direct && (fast - direct).abs() < 1e-3, "{fast} and {direct}");
}
