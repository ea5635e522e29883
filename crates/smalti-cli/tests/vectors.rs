//! From images to pictures with tokens that are vectors: every verb on KL latents and on patches of pixels.

#![allow(clippy::unwrap_used)]

mod stage;

use serde_json::{Value, json};
use smalti::data::image::save_png;
use smalti::data::{Image, RowTokens, Shards};
use stage::{SIDE, error_of, json_of, picture, text};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::{TempDir, tempdir};

struct Place {
    folder: TempDir,
}

impl Place {
    /// Class folders of images, for training and for validation.
    fn new() -> Self {
        let place = Self { folder: tempdir().unwrap() };
        for (part, count) in [("train", 5), ("validation", 2)] {
            for (class, name) in ["cat", "dog"].iter().enumerate() {
                let folder = place.path("images").join(part).join(name);
                fs::create_dir_all(&folder).unwrap();
                (0..count).for_each(|i| picture(&folder.join(format!("{i}.png")), SIDE, SIDE, i + 7 * class));
            }
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn train(&self, name: &str, task: Value, steps: u64) -> Value {
        let recipe = json!({
            "name": "tiny", "seed": 1, "task": task, "batch": { "size": 4 },
            "schedule": { "steps": steps, "warmup": 1 },
            "optimizer": { "learning_rate": 1e-3, "betas": [0.9, 0.99] }, "ema": { "decay": 0.9 },
            "evaluation": { "every": 4, "images": 4, "pictures": 2 }, "checkpoint": { "every": 2, "keep": 1 },
        });
        let path = self.path(&format!("{name}.toml"));
        fs::write(&path, toml::to_string(&recipe).unwrap()).unwrap();
        json_of(&["train", text(&path), "--out", text(&self.path(name))])
    }

    fn tokenizer(&self, model: Value, steps: u64) -> Value {
        let data = |part: &str| {
            let path = self.path("images").join(part);
            json!({ "path": path, "transforms": [{ "kind": "center_crop", "size": SIDE }, { "kind": "to_signed" }] })
        };
        let loss = json!({ "l1": 1.0, "likelihood": {}, "kl_weight": 1e-3 });
        let (train, validation) = (data("train"), data("validation"));
        let task =
            json!({ "kind": "tokenizer", "model": model, "loss": loss, "train": train, "validation": validation });
        self.train("run", task, steps)
    }

    fn tokenize(&self, part: &str, more: &[&str]) -> Value {
        let (images, out, model) = (self.path("images").join(part), self.path("tokens").join(part), self.path("run"));
        json_of(&[&["tokenize", text(&images), text(&out), "--model", text(&model)], more].concat())
    }

    fn generator(&self, kind: &str, channels: usize) -> Value {
        let stack = json!({ "width": 8, "depth": 1, "heads": 2 });
        let mut model = json!({
            "kind": kind, "condition": { "kind": "class", "classes": 2 }, "condition_dropout": 0.1, "decoder": stack,
            "tokens": { "layout": { "kind": "grid", "h": 4, "w": 4 }, "channels": channels, "image_size": [SIDE, SIDE] },
            "diffusion": { "width": 8, "depth": 1, "sampling_steps": "3", "repeats": 2 },
        });
        if kind == "mar" {
            model["encoder"] = stack;
            model["buffer"] = json!(2);
        }
        let tokens = self.path("tokens");
        let task = json!({
            "kind": "generator", "model": model, "tokenizer": self.path("run"), "train": tokens.join("train"),
            "validation": tokens.join("validation"), "sampling": { "guidance": 2.0, "guidance_schedule": "linear" },
        });
        self.train(kind, task, 4)
    }
}

fn kl() -> Value {
    json!({
        "kind": "kl", "image_size": SIDE, "ch": 4, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "mid_attention": false,
        "z_channels": 3, "embed_dim": 3, "norm_groups": 2,
    })
}

/// What each verb says of a model of vectors.
fn try_verbs(place: &Place, model: &Path) {
    let out = place.path("out.png");
    let generate = ["generate", "--class", "dog", "-n", "2", "--model", text(model), "-o", text(&out)];
    let made = json_of(&generate);
    assert_eq!(made["parameters"]["sampling"]["guidance_schedule"], json!("linear"));
    let first = fs::read(&out).unwrap();
    json_of(&generate);
    assert_eq!(fs::read(&out).unwrap(), first, "the same seed makes the same picture");
    json_of(&[&generate[..], &["--diffusion-steps", "5"]].concat());
    assert_ne!(fs::read(&out).unwrap(), first);
    assert!(error_of(&[&generate[..], &["--top-k", "5"]].concat(), 1).contains("top_k"));

    let (image, mask, edited) = (place.path("image.png"), place.path("mask.png"), place.path("edited.png"));
    picture(&image, SIDE, SIDE, 3);
    let mut half = Image::filled(SIDE, SIDE, [0; 3]);
    half.pixels.chunks_exact_mut(SIDE * 3).for_each(|row| row[SIDE / 2 * 3..].fill(255));
    save_png(&mask, &half, None).unwrap();
    let edit = ["edit", text(&image), "--mask", text(&mask), "--model", text(model), "--class", "cat"];
    assert_eq!(json_of(&[&edit[..], &["-o", text(&edited)]].concat())["tokens"], json!([8, 16]));

    let images = place.path("images/validation");
    let evaluate = ["evaluate", text(model), "--data", text(&images)];
    let numbers = |batch: &str| json_of(&[&evaluate[..], &["--batch", batch]].concat());
    let (one, all) = (numbers("1"), numbers("4"));
    assert!(one["tokenizer"]["usage"].is_null() && one["tokenizer"]["l1"].is_f64(), "{one}");
    let loss = |numbers: &Value| numbers["generator"]["diffusion_loss"].as_f64().unwrap();
    assert!((loss(&one) - loss(&all)).abs() < 1e-3 * loss(&one), "{one} {all}");
    assert!(error_of(&[&evaluate[..], &["--weights", "int8"]].concat(), 1).contains("no probabilities"));
    let facts = json_of(&["inspect", text(model)]);
    assert!(facts["bundle"]["tokens"]["channels"].is_u64(), "{facts}");
}

#[test]
fn from_images_to_pictures_by_kl_latents() {
    let place = Place::new();
    let outcome = place.tokenizer(kl(), 4);
    assert!(outcome["evaluation"]["psnr"].is_f64() && outcome["evaluation"]["codebook_usage"].is_null(), "{outcome}");
    let config = fs::read_to_string(place.path("run/bundle/tokenizer/config.json")).unwrap();
    let scale = serde_json::from_str::<Value>(&config).unwrap()["latent_scale"].as_f64().unwrap();
    assert!(scale > 0.0 && scale != 1.0, "measured: {scale}");
    assert_eq!(place.tokenize("train", &["--flip"])["rows"], json!(20));
    place.tokenize("validation", &[]);
    let shards = Shards::open(&place.path("tokens/train")).unwrap();
    for row in [0, 1] {
        let RowTokens::Continuous { means, deviations } = shards.tokens(row).unwrap() else { panic!("vectors") };
        assert_eq!((means.len(), deviations.len()), (48, 48));
        assert!(deviations.iter().all(|deviation| *deviation > 0.0));
    }
    assert_ne!(shards.tokens(0).unwrap(), shards.tokens(1).unwrap(), "a mirror image has other tokens");
    for kind in ["mar", "causal_mar"] {
        let outcome = place.generator(kind, 3);
        assert!(outcome["evaluation"]["loss"].as_f64().unwrap() > 0.0, "{outcome}");
        try_verbs(&place, &place.path(kind));
    }
    // The same recipe makes the same bytes, drawn tokens included.
    let recipe = place.path("mar.toml");
    let whole = fs::read(place.path("mar/bundle/generator/model.safetensors")).unwrap();
    json_of(&["train", text(&recipe), "--out", text(&place.path("again"))]);
    assert!(fs::read(place.path("again/bundle/generator/model.safetensors")).unwrap() == whole);
}

#[test]
fn from_images_to_pictures_by_patches_of_pixels() {
    let place = Place::new();
    place.tokenizer(json!({ "kind": "patches", "image_size": SIDE, "patch_size": 4 }), 1);
    place.tokenize("train", &[]);
    place.tokenize("validation", &[]);
    let (images, out) = (place.path("images/validation"), place.path("out"));
    let pairs = json_of(&["reconstruct", text(&images), "--model", text(&place.path("run")), "-o", text(&out)]);
    assert_eq!(pairs["mean"]["l1"], json!(0.0));
    place.generator("mar", 48);
    try_verbs(&place, &place.path("mar"));
}
