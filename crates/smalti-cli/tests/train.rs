//! From a folder of images to pictures, with nothing but the program; and what recipes may not say.

#![allow(clippy::unwrap_used)]

mod stage;

use serde_json::{Value, json};
use stage::{SIDE, error_of, generator, json_of, picture, pyramid_generator, pyramid_tokenizer, text, tokenizer};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::{TempDir, tempdir};

/// A folder of images in two parts, with captions and classes.
fn images(folder: &Path) {
    for (part, count) in [("train", 12), ("validation", 4)] {
        let part = folder.join(part);
        fs::create_dir_all(&part).unwrap();
        let mut lines = String::new();
        for i in 0..count {
            let name = format!("{i}.png");
            picture(&part.join(&name), SIDE, SIDE, i);
            let caption = format!("a pattern number {}", i % 3);
            lines += &json!({ "file_name": name, "text": caption, "label": format!("kind {}", i % 3) }).to_string();
            lines.push('\n');
        }
        fs::write(part.join("metadata.jsonl"), lines).unwrap();
    }
}

fn write_recipe(path: &Path, task: Value) {
    let recipe = json!({
        "name": "tiny", "seed": 1, "task": task,
        "batch": { "size": 4 },
        "schedule": { "steps": 4, "warmup": 1 },
        "optimizer": { "learning_rate": 1e-3, "betas": [0.9, 0.99] },
        "evaluation": { "every": 4, "images": 4, "pictures": 2 },
        "checkpoint": { "every": 2, "keep": 1 },
    });
    fs::write(path, toml::to_string(&recipe).unwrap()).unwrap();
}

/// A folder with images and the recipe of a tokenizer.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        Self::with(tokenizer())
    }

    fn with(tokenizer: Value) -> Self {
        let folder = tempdir().unwrap();
        images(&folder.path().join("images"));
        let place = Self { folder };
        let data = |split: &str| {
            let path = place.path("images");
            json!({ "path": path, "split": split, "transforms": [{ "kind": "center_crop", "size": SIDE }, { "kind": "to_signed" }] })
        };
        let task = json!({
            "kind": "tokenizer", "model": tokenizer, "loss": { "l1": 1.0 },
            "train": data("train"), "validation": data("validation"),
        });
        write_recipe(&place.path("tokenizer.toml"), task);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn train(&self, recipe: &str, out: &str) -> Value {
        json_of(&["train", text(&self.path(recipe)), "--out", text(&self.path(out))])
    }

    fn tokenize(&self, split: &str) {
        let (images, out, model) = (self.path("images"), self.path("tokens").join(split), self.path("run"));
        let outcome = json_of(&["tokenize", text(&images), text(&out), "--split", split, "--model", text(&model)]);
        assert!(outcome["rows"].as_u64().unwrap() >= 4, "{outcome}");
    }
}

#[test]
fn a_trained_tokenizer_reconstructs() {
    let place = Place::new();
    let outcome = place.train("tokenizer.toml", "run");
    assert_eq!((&outcome["step"], &outcome["finished"]), (&json!(4), &json!(true)));
    let run = place.path("run");
    let facts = json_of(&["inspect", text(&run)]);
    assert_eq!(facts["kind"], json!("run"));
    assert_eq!(facts["recipe"]["schedule"]["steps"], json!(4));
    assert_eq!(facts["bundle"]["tokens"]["vocabulary"], json!(16));
    let (images, out) = (place.path("images/validation"), place.path("out"));
    let pairs = json_of(&["reconstruct", text(&images), "--model", text(&run), "-o", text(&out)]);
    assert_eq!(pairs["images"].as_array().unwrap().len(), 4);
    assert!(pairs["mean"]["psnr"].as_f64().unwrap() > 3.0);
}

#[test]
fn from_images_to_pictures_of_captions() {
    let place = Place::new();
    place.train("tokenizer.toml", "run");
    place.tokenize("train");
    place.tokenize("validation");
    for kind in ["gpt", "maskgit"] {
        let condition = json!({ "kind": "text", "vocabulary": 300, "length": 6 });
        let (tokens, recipe) = (place.path("tokens"), format!("{kind}.toml"));
        let task = json!({
            "kind": "generator", "model": generator(kind, condition), "tokenizer": place.path("run"),
            "train": tokens.join("train"), "validation": tokens.join("validation"),
            "text": { "kind": "bpe", "vocabulary": 300 }, "sampling": { "guidance": 2.0 },
        });
        write_recipe(&place.path(&recipe), task);
        let outcome = place.train(&recipe, kind);
        assert_eq!((&outcome["step"], &outcome["finished"]), (&json!(4), &json!(true)));

        let (model, out) = (place.path(kind), place.path(&format!("{kind}.png")));
        let made = json_of(&["generate", "a pattern number 2", "--model", text(&model), "-o", text(&out)]);
        assert_eq!(made["parameters"]["sampling"]["guidance"], json!(2.0));
        let images = place.path("images");
        let evaluate = ["evaluate", text(&model), "--data", text(&images), "--split", "validation"];
        let numbers = json_of(&evaluate);
        // Little was learned, so a token costs about the 4 bits of 16 codes.
        let bits = numbers["generator"]["bits_per_token"].as_f64().unwrap();
        assert!((3.0..5.0).contains(&bits), "{numbers}");
        assert_eq!(numbers["images"], json!(4));
    }
}

#[test]
fn from_images_to_pictures_of_images() {
    let place = Place::new();
    place.train("tokenizer.toml", "run");
    place.tokenize("train");
    place.tokenize("validation");
    let (run, tokens) = (place.path("run"), place.path("tokens"));
    // The images are their own conditions.
    let task = |condition: Value| {
        json!({
            "kind": "generator", "model": generator("gpt", json!({ "kind": "codes", "codes": 16, "h": 4, "w": 4 })),
            "tokenizer": run, "train": tokens.join("train"), "validation": tokens.join("validation"),
            "condition_tokens": condition,
        })
    };
    let paths = json!({ "tokenizer": run, "train": tokens.join("train"), "validation": tokens.join("validation") });
    write_recipe(&place.path("gpt.toml"), task(paths));
    place.train("gpt.toml", "gpt");
    let (model, out, depth) = (place.path("gpt"), place.path("out.png"), place.path("images/train/3.png"));
    assert!(model.join("bundle/condition/model.safetensors").is_file());
    let generate = |more: &[&str]| {
        let generate = ["generate", "--model", text(&model), "-o", text(&out)];
        [&generate[..], more].concat().into_iter().map(String::from).collect::<Vec<_>>()
    };
    let made = |more: &[&str]| json_of(&generate(more).iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(made(&["--condition", text(&depth)])["size"], json!([SIDE, SIDE]));
    assert_eq!(made(&["--condition", text(&depth), "--size", "24x32"])["size"], json!([24, 32]));
    made(&[]);
    let edit = ["edit", text(&depth), "--mask", text(&depth), "--condition", text(&depth), "--model", text(&model)];
    json_of(&[&edit[..], &["-o", text(&out)]].concat());
    let refused = |more: &[&str]| error_of(&generate(more).iter().map(String::as_str).collect::<Vec<_>>(), 1);
    assert!(refused(&["--class", "1"]).contains("a class was given, but this model takes an image"));
    let numbers = json_of(&["evaluate", text(&model), "--data", text(&place.path("images/validation"))]);
    assert!(numbers["generator"].is_null() && numbers["tokenizer"]["psnr"].as_f64().is_some());

    let (recipe, out) = (place.path("gpt.toml"), place.path("none"));
    let refused = |condition: Value| {
        write_recipe(&recipe, task(condition));
        error_of(&["train", text(&recipe), "--out", text(&out)], 1)
    };
    let swapped =
        json!({ "tokenizer": run, "train": tokens.join("validation"), "validation": tokens.join("validation") });
    assert!(refused(swapped).contains("has no row with this key, which would be its condition"));
    let mut without = task(Value::Null);
    without.as_object_mut().unwrap().remove("condition_tokens");
    write_recipe(&recipe, without);
    assert!(error_of(&["train", text(&recipe), "--out", text(&out)], 1).contains("task.condition_tokens"));
}

#[test]
fn from_images_to_token_maps_to_pictures_of_classes() {
    let place = Place::with(pyramid_tokenizer());
    place.train("tokenizer.toml", "run");
    place.tokenize("train");
    place.tokenize("validation");
    let tokens = place.path("tokens");
    let task = json!({
        "kind": "generator", "model": pyramid_generator(json!({ "kind": "class", "classes": 3 })),
        "tokenizer": place.path("run"), "train": tokens.join("train"), "validation": tokens.join("validation"),
        "sampling": { "guidance": 2.5, "guidance_schedule": "linear" },
    });
    write_recipe(&place.path("var.toml"), task);
    assert_eq!(place.train("var.toml", "var")["finished"], json!(true));
    let (model, out) = (place.path("var"), place.path("var.png"));
    let generate = ["generate", "--class", "kind 2", "--model", text(&model), "-o", text(&out)];
    assert_eq!(json_of(&generate)["parameters"]["sampling"]["guidance"], json!(2.5));
    json_of(&[&generate[..], &["--smooth"]].concat());

    // The generator carries the tokenizer's own code vectors.
    let weights = |part: &str| model.join("bundle").join(part).join("model.safetensors");
    let shapes = |part: &str| json_of(&["inspect", text(&weights(part))])["tensors"].clone();
    let (tokenizer, generator) = (shapes("tokenizer"), shapes("generator"));
    assert_eq!(tokenizer["quantize.table.embedding.weight"], generator["quantize.table.embedding.weight"]);
    assert!(tokenizer["quantize.table.cluster_size"].is_array() && generator["quantize.table.cluster_size"].is_null());

    // Editing keeps tokens at each level.
    let (images, mask) = (place.path("images/validation/0.png"), place.path("mask.png"));
    picture(&mask, SIDE, SIDE, 3);
    let edited = place.path("edited.png");
    let edit =
        ["edit", text(&images), "--mask", text(&mask), "--class", "0", "--model", text(&model), "-o", text(&edited)];
    let tokens = json_of(&edit)["tokens"].clone();
    assert_eq!(tokens[1], json!(21));
    let images = place.path("images");
    let numbers = json_of(&["evaluate", text(&model), "--data", text(&images), "--split", "validation"]);
    let bits = numbers["generator"]["bits_per_token"].as_f64().unwrap();
    assert!((2.0..6.0).contains(&bits), "{numbers}");
}

#[test]
fn recipes_are_strict() {
    let place = Place::new();
    let recipe = place.path("tokenizer.toml");
    let out = place.path("run");
    let train = |set: &[&str]| error_of(&[&["train", text(&recipe), "--out", text(&out)], set].concat(), 1);
    assert!(train(&["optimizer.learning_rat=1"]).contains("did you mean `learning_rate`?"));
    assert!(train(&["schedule.steps=many"]).contains("schedule.steps"));
    assert!(train(&["task.model.kind=vqgam"]).contains("did you mean `vqgan`?"));
    assert!(train(&["seed"]).contains("expected key=value"));
    assert!(error_of(&["train", text(&place.path("none.toml"))], 1).contains("none.toml"));
    assert!(!out.exists());
    let plan = json_of(&["train", text(&recipe), "--dry-run", "--seed", "7", "schedule.steps=9"]);
    assert_eq!((&plan["recipe"]["seed"], &plan["recipe"]["schedule"]["steps"]), (&json!(7), &json!(9)));
    assert_eq!(plan["out"], json!("runs/tiny"));
}

#[test]
fn a_run_of_another_recipe_is_not_overwritten() {
    let place = Place::new();
    place.train("tokenizer.toml", "run");
    let (recipe, run) = (place.path("tokenizer.toml"), place.path("run"));
    let error = error_of(&["train", text(&recipe), "--out", text(&run), "optimizer.learning_rate=0.5"], 1);
    assert!(error.contains("recipe"), "{error}");
    // The same recipe is already finished.
    assert_eq!(place.train("tokenizer.toml", "run")["step"], json!(4));
}
