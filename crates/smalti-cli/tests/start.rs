//! Training that begins with weights that are there, leaves some of them alone, and learns from another model.

#![allow(clippy::unwrap_used)]

mod stage;

use serde_json::{Value, json};
use smalti::models::checkpoint::tensors::Precision;
use smalti::models::checkpoint::{Source, WeightsFile, read_tensors, write_tensors};
use stage::{SIDE, error_of, json_of, official, picture, root, text, tokenizer};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::{TempDir, tempdir};

const FEATURES: &str = "assets/models/mobilenet_v2_imagenet_features_f16.safetensors";

/// A folder with images of two classes.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempdir().unwrap());
        for (class, name) in ["cat", "dog"].iter().enumerate() {
            let folder = place.path("images").join(name);
            fs::create_dir_all(&folder).unwrap();
            (0..4).for_each(|i| picture(&folder.join(format!("{i}.png")), SIDE, SIDE, i + 7 * class));
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn task(&self, kind: &str, model: Value) -> Value {
        let transforms = json!([{ "kind": "center_crop", "size": SIDE }, { "kind": "to_signed" }]);
        let data = json!({ "path": self.path("images"), "transforms": transforms });
        json!({ "kind": kind, "model": model, "train": data, "validation": data })
    }

    fn tokenizer(&self) -> Value {
        let mut task = self.task("tokenizer", tokenizer());
        task["loss"] = json!({ "l1": 1.0 });
        task
    }

    /// Writes a recipe of three steps and gives what is typed to train it.
    fn recipe(&self, name: &str, task: Value, more: Value) -> [String; 4] {
        let mut recipe = json!({
            "name": "tiny", "seed": 1, "task": task, "batch": { "size": 4 }, "schedule": { "steps": 3 },
            "optimizer": { "learning_rate": 1e-2, "betas": [0.9, 0.99], "weight_decay": 0.1 }, "ema": { "decay": 0.9 },
            "evaluation": { "every": 3, "images": 8, "pictures": 2 }, "checkpoint": { "every": 3, "keep": 1 },
        });
        recipe.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let file = self.path(&format!("{name}.toml"));
        fs::write(&file, toml::to_string(&recipe).unwrap()).unwrap();
        ["train", text(&file), "--out", text(&self.path(name))].map(str::to_string)
    }

    fn train(&self, name: &str, task: Value, more: Value) -> Value {
        json_of(&self.recipe(name, task, more).each_ref().map(String::as_str))
    }

    fn refused(&self, task: Value, more: Value) -> String {
        error_of(&self.recipe("refused", task, more).each_ref().map(String::as_str), 1)
    }

    fn checkpoint(&self, name: &str, file: &str) -> WeightsFile {
        WeightsFile::open(&self.path(name).join("checkpoints/step-00000003").join(file)).unwrap()
    }
}

fn classifier(classes: usize) -> Value {
    json!({ "kind": "mobilenet_v2", "image_size": SIDE, "classes": classes })
}

fn from_features() -> Value {
    json!({ "from": root().join(FEATURES), "allow": ["head"] })
}

#[test]
fn frozen_parameters_keep_the_values_that_they_started_with() {
    let place = Place::new();
    place.train("first", place.tokenizer(), json!({}));
    let more = json!({ "start": place.path("first"), "frozen": ["encoder", "quant_conv\\.w"] });
    place.train("second", place.tokenizer(), more);
    let before = read_tensors(&place.path("first/bundle/tokenizer/model.safetensors")).unwrap();
    let (mut still, mut moved) = (0, 0);
    for file in ["model.safetensors", "ema.safetensors"] {
        let after = place.checkpoint("second", file);
        for (name, value) in &before {
            let same = after.read(&format!("model.{name}")).unwrap() == *value;
            let frozen = name.starts_with("encoder.") || name == "quant_conv.weight";
            assert!(same || !frozen, "{file}: {name} is frozen and moved");
            still += usize::from(frozen);
            moved += usize::from(!same);
        }
    }
    assert!(still > 20 && moved > 20, "{still} {moved}");
    let moments = |name: &str| place.checkpoint(name, "optimizer.safetensors").names().count();
    assert_eq!(moments("first") - moments("second"), still, "two moments for each, and two files were counted");
    let sha256 = |name: &str| json_of(&["inspect", text(&place.path(name))])["bundle"]["manifest"].clone();
    let (first, second) = (sha256("first"), sha256("second"));
    assert_eq!(second["training"]["tokenizer"]["start"]["sha256"], first["parts"]["tokenizer"]["sha256"]);
    assert_eq!(first["training"]["tokenizer"].get("start"), None);
    let recipe = |name: &str| fs::read_to_string(place.path(name).join("recipe.toml")).unwrap();
    assert!(recipe("second").contains("frozen") && !recipe("first").contains("frozen"));
    assert!(!["start", "teacher"].iter().any(|key| recipe("first").contains(key)));
}

#[test]
fn a_frozen_codebook_does_not_follow_what_is_encoded() {
    let place = Place::new();
    let mut task = place.tokenizer();
    task["model"]["quantizer"] = json!({ "kind": "vq", "codes": 8, "channels": 2, "codebook": { "kind": "ema" } });
    let frozen = json!({ "frozen": ["quantize"], "schedule": { "steps": 3 } });
    place.train("first", task.clone(), json!({}));
    place.train("second", task, json!({ "start": place.path("first"), "frozen": frozen["frozen"] }));
    let before = read_tensors(&place.path("first/bundle/tokenizer/model.safetensors")).unwrap();
    let (first, second) =
        (place.checkpoint("first", "model.safetensors"), place.checkpoint("second", "model.safetensors"));
    let name = "model.quantize.embedding.weight";
    assert_eq!(second.read(name).unwrap(), before["quantize.embedding.weight"]);
    assert_eq!(first.read(name).unwrap().shape, second.read(name).unwrap().shape);
}

#[test]
fn what_does_not_fit_is_named_before_data_is_read() {
    let place = Place::new();
    place.train("first", place.tokenizer(), json!({}));
    let mut other = place.tokenizer();
    other["train"]["path"] = json!(place.path("nowhere"));
    other["model"]["z_channels"] = json!(8);
    let error = place.refused(other.clone(), json!({ "start": place.path("first") }));
    assert!(error.contains("of another shape") && error.contains("decoder.conv_in.weight"), "{error}");
    assert!(error.contains("allow = "), "{error}");
    let allow = ["decoder\\.conv_in", "encoder\\.conv_out", "quant_conv", "post_quant_conv"];
    let error = place.refused(other, json!({ "start": { "from": place.path("first"), "allow": allow } }));
    assert!(error.contains("nowhere"), "all fits, and the data are next: {error}");
    let refused = |more: Value| place.refused(place.tokenizer(), more);
    assert!(refused(json!({ "frozen": ["encodr"] })).contains("no parameter's path begins with `encodr`"));
    assert!(refused(json!({ "frozen": ["("] })).contains("regex"));
    assert!(refused(json!({ "frozen": [".*"] })).contains("nothing to train"));
    assert!(refused(json!({ "start": place.path("nowhere") })).contains("no such file"));
    assert!(refused(json!({ "start": { "form": "x" } })).contains("form"));
    let teacher = json!({ "bundle": place.path("first") });
    assert!(refused(json!({ "teacher": teacher })).contains("only a task of kind `encoder`"));
    let teacher = json!({ "bundle": place.path("first"), "target": "codes" });
    assert!(refused(json!({ "teacher": teacher })).contains("target = \"codes\""));
    let encoder = |model: Value, more: Value| place.refused(place.task("encoder", model), more);
    let headless = json!({ "kind": "mobilenet_v2", "image_size": SIDE });
    assert!(encoder(headless, json!({})).contains("nothing to learn"));
    assert!(encoder(classifier(3), json!({})).contains("has 2 classes"));
    assert!(encoder(classifier(2), json!({ "teacher": { "bundle": place.path("first") } })).contains("has no encoder"));
    assert!(encoder(classifier(2), json!({ "start": place.path("first") })).contains("has no encoder"));
    let features = json!({ "start": root().join(FEATURES) });
    assert!(encoder(classifier(2), features).contains("`head.weight`"));
}

#[test]
fn official_weights_are_a_start() {
    let place = Place::new();
    let file = place.path("taming.safetensors");
    official(&file, |_| {});
    let recipe = root().join("recipes/vqgan/emoji3d-64.toml");
    // The recipe's paths are from the workspace's folder.
    let path = |part: &str| format!("task.{part}.path={}", root().join(format!("assets/emoji3d/{part}.tar")).display());
    let start = format!("start=\"{}\"", file.display());
    let args = ["train", text(&recipe), &start, &path("train"), &path("validation"), "--dry-run"];
    let plan = json_of(&args);
    assert_eq!(plan["recipe"]["start"]["from"], json!(file));
    official(&file, |tensors| drop(tensors.remove("decoder.conv_in.bias")));
    let error = error_of(&args, 1);
    assert!(error.contains("1 missing: `decoder.conv_in.bias`"), "{error}");
}

#[test]
fn an_encoder_learns_classes_over_frozen_features_and_teaches() {
    let place = Place::new();
    let more = json!({ "start": from_features(), "frozen": ["network"], "schedule": { "steps": 3 } });
    let outcome = place.train("classifier", place.task("encoder", classifier(2)), more);
    assert!(outcome["evaluation"]["accuracy"].as_f64().unwrap() >= 0.5, "{outcome}");
    let bundle = place.path("classifier/bundle");
    // The bundle exports what was imported, under torchvision's names, with the new head.
    let exported = place.path("torchvision.safetensors");
    json_of(&["export", text(&bundle), "-o", text(&exported)]);
    let (all, features) = (read_tensors(&exported).unwrap(), read_tensors(&root().join(FEATURES)).unwrap());
    assert_eq!(all.len(), features.len() + 2);
    assert!(features.iter().all(|(name, value)| all[name] == *value));
    assert_eq!(all["classifier.1.weight"].shape, [2, 1280]);
    let manifest = json_of(&["inspect", text(&bundle), "--verify"])["manifest"].clone();
    assert_eq!(manifest["classes"], json!(["cat", "dog"]));
    assert_eq!(manifest["training"]["encoder"]["start"]["fresh"], json!(["head.bias", "head.weight"]));

    // A student that starts as its teacher stays near it at a small rate; one without these weights is far away.
    let headless = json!({ "kind": "mobilenet_v2", "image_size": SIDE });
    let run = |name: &str, more: Value| {
        let mut all =
            json!({ "teacher": { "bundle": bundle, "weight": 2.0 }, "frozen": ["network.features.[0-9]\\."] });
        all["optimizer"] = json!({ "learning_rate": 1e-7, "betas": [0.9, 0.99] });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        place.train(name, place.task("encoder", headless.clone()), all)["evaluation"].clone()
    };
    let distance = |values: &Value| values["teacher_distance"].as_f64().unwrap();
    let (near, far) = (run("same", json!({ "start": root().join(FEATURES) })), run("apart", json!({})));
    assert!(far.get("accuracy").is_none() && distance(&near) < 0.01 * distance(&far), "{near} {far}");
    let lines = fs::read_to_string(place.path("apart/metrics.jsonl")).unwrap();
    let line: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    let (loss, term) = (line["loss"].as_f64().unwrap(), line["teacher"].as_f64().unwrap());
    assert!((loss - 2.0 * term).abs() < 1e-5 * loss, "the weight of the teacher: {line}");
    let told = json_of(&["inspect", text(&place.path("apart"))])["bundle"]["manifest"]["training"]["teacher"].clone();
    assert_eq!(told["sha256"], manifest["parts"]["encoder"]["sha256"]);
}

#[test]
fn torchvisions_weights_are_imported_and_exported_as_they_are() {
    let place = Place::new();
    let mut tensors = read_tensors(&root().join(FEATURES)).unwrap();
    let head = |shape: &[usize]| smalti::models::checkpoint::Stored {
        shape: shape.to_vec(),
        values: smalti::models::checkpoint::Values::Floats(
            (0..shape.iter().product()).map(|i: usize| i as f32 / 7.0).collect(),
        ),
    };
    tensors.insert("classifier.1.weight".into(), head(&[1000, 1280]));
    tensors.insert("classifier.1.bias".into(), head(&[1000]));
    let [file, bundle, again] = ["all.safetensors", "bundle", "again.safetensors"].map(|name| place.path(name));
    write_tensors(&file, &tensors, Precision::F32, &BTreeMap::new()).unwrap();
    let imported = json_of(&["import", text(&file), "--system", "mobilenet_v2", "-o", text(&bundle)]);
    assert_eq!(imported["parts"][0]["variant"], json!("encoder/imagenet-mobilenet-v2"));
    json_of(&["export", text(&bundle), "-o", text(&again)]);
    assert!(read_tensors(Path::new(&again)).unwrap() == tensors);
}
