//! Label maps: their tokenizer, and pictures of them.

#![allow(clippy::unwrap_used)]

mod stage;

use serde_json::{Value, json};
use smalti::data::Image;
use smalti::data::image::save_png;
use stage::{SIDE, error_of, generator, json_of, picture, text, tokenizer};
use std::fs;
use std::path::Path;
use tempfile::{TempDir, tempdir};

const CLASSES: usize = 3;

/// A label map: pixels without a label (255), label 0 below, and a block of label 1, whose place depends on `i`.
fn map(path: &Path, i: usize) {
    let label = |x: usize, y: usize| match (y >= 10, (2 * (i % 6)..2 * (i % 6) + 5).contains(&x) && y >= 4) {
        (_, true) => 2,
        (below, false) => u8::from(below),
    };
    let pixels = (0..SIDE * SIDE).flat_map(|at| [label(at % SIDE, at / SIDE).wrapping_sub(1); 3]).collect();
    let map = Image { grey: true, ..Image::new(SIDE, SIDE, pixels).unwrap() };
    save_png(path, &map, None).unwrap();
}

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempdir().unwrap());
        for folder in ["maps", "pictures"] {
            fs::create_dir(place.0.path().join(folder)).unwrap();
        }
        for i in 0..12 {
            map(Path::new(&place.path(&format!("maps/{i}.png"))), i);
            picture(Path::new(&place.path(&format!("pictures/{i}.png"))), SIDE, SIDE, i);
        }
        place
    }

    fn path(&self, name: &str) -> String {
        text(&self.0.path().join(name)).into()
    }

    fn recipe(&self, name: &str, steps: usize, task: &Value) -> String {
        let recipe = json!({
            "name": "tiny", "seed": 1, "task": task, "batch": { "size": 4 },
            "schedule": { "steps": steps, "warmup": 1 },
            "optimizer": { "learning_rate": 1e-2, "betas": [0.9, 0.99] },
            "evaluation": { "every": steps, "images": 12, "pictures": 2 },
            "checkpoint": { "every": steps },
        });
        let path = self.path(name);
        fs::write(&path, toml::to_string(&recipe).unwrap()).unwrap();
        path
    }

    fn data(&self, folder: &str, resize: Value) -> Value {
        json!({ "path": self.path(folder), "transforms": [resize, { "kind": "to_signed" }] })
    }

    fn labels(&self, loss: Value, resize: Value) -> Value {
        let mut model = tokenizer();
        for (key, value) in [
            ("in_channels", json!(CLASSES)),
            ("out_channels", json!(CLASSES)),
            ("label_maps", json!(true)),
            ("label_shift", json!(1)),
        ] {
            model[key] = value;
        }
        model["quantizer"] = json!({ "kind": "vq", "codes": 16, "channels": 2, "kmeans_init": 2 });
        let data = self.data("maps", resize);
        json!({ "kind": "tokenizer", "model": model, "loss": loss, "train": data, "validation": data })
    }
}

fn nearest() -> Value {
    json!({ "kind": "resize", "size": SIDE, "filter": "nearest" })
}

#[test]
fn from_label_maps_to_pictures_of_them() {
    let place = Place::new();
    let labels = place.labels(json!({ "binary_cross_entropy": 1.0 }), nearest());
    let (recipe, run) = (place.recipe("labels.toml", 60, &labels), place.path("labels"));
    json_of(&["train", &recipe, "--out", &run]);
    let maps = place.path("maps");
    let found = json_of(&["evaluate", &run, "--data", &maps]);
    // Always the commonest class would be right at 44 % of the pixels.
    let accuracy = found["tokenizer"]["label_accuracy"].as_f64().unwrap();
    assert!(accuracy > 0.8, "{found}");
    assert!(found["tokenizer"]["psnr"].is_null());
    let pairs = json_of(&["reconstruct", &maps, "--model", &run, "-o", &place.path("pairs")]);
    assert_eq!(pairs["mean"]["label_accuracy"], found["tokenizer"]["label_accuracy"]);
    let sheet = smalti::data::image::open(Path::new(&place.path("pairs/0.png")), [0; 3], &Default::default()).unwrap();
    let colours: std::collections::BTreeSet<_> = sheet.pixels.chunks(3).collect();
    assert!(colours.contains(&[0u8, 0, 0][..]) && colours.contains(&[128u8, 0, 0][..]), "{colours:?}");

    survives_official_names(&place, &run, &recipe, &found);
    leaves_out_what_is_no_label(&place, &run);
    conditions_pictures(&place, &run);
}

fn survives_official_names(place: &Place, run: &str, recipe: &str, found: &Value) {
    let (official, again) = (place.path("official.safetensors"), place.path("again"));
    json_of(&["export", run, "--layout", "official", "-o", &official]);
    json_of(&["import", &official, "--system", "vqgan", "--variant", recipe, "-o", &again]);
    let back = json_of(&["evaluate", &again, "--data", &place.path("maps")]);
    assert_eq!(back["tokenizer"]["label_accuracy"], found["tokenizer"]["label_accuracy"]);
}

fn leaves_out_what_is_no_label(place: &Place, run: &str) {
    let odd = place.path("odd");
    fs::create_dir(&odd).unwrap();
    map(&Path::new(&odd).join("0.png"), 0);
    let pixels = vec![9; SIDE * SIDE * 3];
    let outside = Image { grey: true, ..Image::new(SIDE, SIDE, pixels).unwrap() };
    save_png(&Path::new(&odd).join("1.png"), &outside, None).unwrap();
    let found = json_of(&["evaluate", run, "--data", &odd]);
    assert_eq!(found["images"], json!(1));
    assert!(
        found["skipped"][0]["error"].as_str().unwrap().contains("label 9, shifted by 1, is not in 0..3"),
        "{found}"
    );
    let refused = error_of(&["evaluate", run, "--data", &place.path("pictures")], 1);
    assert!(refused.contains("none of its 12 images can be used"), "{refused}");
}

/// Pictures whose tokens follow those of label maps.
fn conditions_pictures(place: &Place, run: &str) {
    let (maps, pictures) = (place.path("maps"), place.path("pictures"));
    let images = json!({
        "kind": "tokenizer", "model": tokenizer(), "loss": { "l1": 1.0 },
        "train": place.data("pictures", nearest()), "validation": place.data("pictures", nearest()),
    });
    let second = place.path("pixels");
    json_of(&["train", &place.recipe("pixels.toml", 2, &images), "--out", &second]);
    for (source, model, tokens) in [(&maps, run, "label-tokens"), (&pictures, second.as_str(), "pixel-tokens")] {
        json_of(&["tokenize", source, &place.path(tokens), "--model", model]);
    }
    let task = json!({
        "kind": "generator", "tokenizer": second, "train": place.path("pixel-tokens"), "validation": place.path("pixel-tokens"),
        "condition_tokens": { "tokenizer": run, "train": place.path("label-tokens"), "validation": place.path("label-tokens") },
        "model": generator("gpt", json!({ "kind": "codes", "codes": 16, "h": 4, "w": 4 })),
    });
    let model = place.path("gpt");
    json_of(&["train", &place.recipe("gpt.toml", 2, &task), "--out", &model]);
    let (out, condition) = (place.path("out.png"), place.path("maps/3.png"));
    let generate = ["generate", "--model", &model, "-o", &out, "--size", "16x24", "--condition"];
    assert_eq!(json_of(&[&generate[..], &[&condition]].concat())["size"], json!([16, 24]));
    let refused = error_of(&[&generate[..], &[&place.path("pictures/3.png")]].concat(), 1);
    assert!(refused.contains("is not a label map"), "{refused}");
}

#[test]
fn what_spoils_labels_is_refused() {
    let place = Place::new();
    let refused = |loss: Value, resize: Value| {
        let recipe = place.recipe("refused.toml", 2, &place.labels(loss, resize));
        error_of(&["train", &recipe, "--out", &place.path("none")], 1)
    };
    assert!(refused(json!({ "l1": 1.0 }), nearest()).contains("compare pictures"));
    let bicubic = json!({ "kind": "resize", "size": SIDE });
    assert!(refused(json!({ "binary_cross_entropy": 1.0 }), bicubic).contains("mix the labels"));
    let mut pictures = place.labels(json!({ "binary_cross_entropy": 1.0 }), nearest());
    for (model, expected) in [
        (tokenizer(), "binary_cross_entropy is for label maps"),
        (json!({ "label_shift": 1 }), "label_shift is for label maps"),
    ] {
        let mut changed = tokenizer();
        changed.as_object_mut().unwrap().extend(model.as_object().unwrap().clone());
        pictures["model"] = changed;
        let recipe = place.recipe("pictures.toml", 2, &pictures);
        let message = error_of(&["train", &recipe, "--out", &place.path("none")], 1);
        assert!(message.contains(expected), "{message}");
    }
}
