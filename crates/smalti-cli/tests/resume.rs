//! A run that is killed and run again ends with the same bytes as one that never stopped.
#![allow(clippy::unwrap_used)]
#![cfg(unix)]

mod stage;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const STEPS: u64 = 40;

/// A recipe with every part that has a state: random crops and flips, dropout, k-means, EMA codebook, revival, a discriminator,
/// accumulation, clipping, averaged weights.
fn recipe(folder: &Path) -> PathBuf {
    let data = folder.join("images");
    fs::create_dir_all(&data).unwrap();
    for i in 0..12 {
        stage::picture(&data.join(format!("{i:02}.png")), 20, 18, i);
    }
    let path = folder.join("recipe.toml");
    let text = format!(
        r#"
name = "resume"
seed = 5
batch = {{ size = 3, accumulate = 2 }}
schedule = {{ steps = {STEPS}, warmup = 3 }}
optimizer = {{ learning_rate = 1e-3, betas = [0.9, 0.99], weight_decay = 0.1, clip_norm = 0.5 }}
ema = {{ decay = 0.9 }}
logging = {{ every = 2 }}
evaluation = {{ every = 10, pictures = 2 }}
checkpoint = {{ every = 4, keep = 3 }}

[task]
kind = "tokenizer"

[task.train]
path = "{data}"
transforms = [{{ kind = "random_crop", size = 16 }}, {{ kind = "flip" }}, {{ kind = "to_signed" }}]

[task.validation]
path = "{data}"
transforms = [{{ kind = "center_crop", size = 16 }}, {{ kind = "to_signed" }}]

[task.loss]
l1 = 1.0
l2 = 1.0
adversarial = {{ kind = "hinge", weight = 0.1, start_step = 6, adaptive = true, ndf = 4, layers = 1 }}

[task.model]
kind = "vqgan"
image_size = 16
ch = 8
ch_mult = [1, 2]
num_res_blocks = 1
dropout = 0.1
z_channels = 8
embed_dim = 4
norm_groups = 4
quantizer = {{ kind = "vq", codes = 8, channels = 4, codebook = {{ kind = "ema", decay = 0.8 }}, kmeans_init = 3, revive = {{ threshold = 0.5 }} }}
"#,
        data = data.display()
    );
    fs::write(&path, text).unwrap();
    path
}

/// An encoder whose trunk is frozen, with dropout, that starts from given weights.
fn encoder_recipe(folder: &Path) -> PathBuf {
    let data = folder.join("classes");
    for (class, name) in ["cat", "dog"].iter().enumerate() {
        fs::create_dir_all(data.join(name)).unwrap();
        (0..6).for_each(|i| stage::picture(&data.join(name).join(format!("{i}.png")), 20, 18, i + 9 * class));
    }
    let path = folder.join("encoder.toml");
    let text = format!(
        r#"
name = "resume-encoder"
seed = 5
frozen = ["network.features.([0-9]|1[0-7])\\."]
start = {{ from = "{features}", allow = ["head"] }}
batch = {{ size = 3, accumulate = 2 }}
schedule = {{ steps = {STEPS}, warmup = 3 }}
optimizer = {{ learning_rate = 1e-3, betas = [0.9, 0.99], weight_decay = 0.1, clip_norm = 0.5 }}
ema = {{ decay = 0.9 }}
logging = {{ every = 2 }}
evaluation = {{ every = 10 }}
checkpoint = {{ every = 4, keep = 3 }}

[task]
kind = "encoder"
model = {{ kind = "mobilenet_v2", image_size = 16, classes = 2, dropout = 0.3 }}

[task.train]
path = "{data}"
transforms = [{{ kind = "random_crop", size = 16 }}, {{ kind = "flip" }}, {{ kind = "to_signed" }}]

[task.validation]
path = "{data}"
transforms = [{{ kind = "center_crop", size = 16 }}, {{ kind = "to_signed" }}]
"#,
        features = stage::root().join("assets/models/mobilenet_v2_imagenet_features_f16.safetensors").display(),
        data = data.display()
    );
    fs::write(&path, text).unwrap();
    path
}

fn start(recipe: &Path, out: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_smalti"))
        .args(["--device", "cpu", "--threads", "1", "train", stage::text(recipe), "--out", stage::text(out)])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn finish(child: Child) {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Waits for a checkpoint after step `after`; false if the run ended first.
fn wait_for_checkpoint(child: &mut Child, out: &Path, after: u64) -> bool {
    let limit = Instant::now() + Duration::from_secs(120);
    while newest(out) <= after {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(Instant::now() < limit, "no checkpoint after two minutes");
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

fn newest(out: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(out.join("checkpoints")) else { return 0 };
    let step = |entry: fs::DirEntry| entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok();
    entries.filter_map(|entry| step(entry.ok()?)).max().unwrap_or(0)
}

/// The files that must be the same: weights, averages, moments, state, bundle, samples, and the metrics but for the speed.
fn contents(out: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let last = format!("checkpoints/step-{STEPS:08}");
    for folder in [&last, "", "bundle", "bundle/tokenizer", "bundle/encoder", "samples"] {
        let folder = out.join(folder);
        for entry in fs::read_dir(&folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            let varies = path.extension().is_some_and(|ending| ending != "json" && ending != "toml");
            if path.is_file() && (folder != out || !varies) {
                found.insert(path.strip_prefix(out).unwrap().display().to_string(), fs::read(&path).unwrap());
            }
        }
    }
    let without_speed = |line: &str| {
        let mut line: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).unwrap();
        line.remove("images_per_second");
        serde_json::Value::Object(line).to_string()
    };
    let metrics: Vec<String> =
        fs::read_to_string(out.join("metrics.jsonl")).unwrap().lines().map(without_speed).collect();
    found.insert("metrics.jsonl".into(), metrics.join("\n").into_bytes());
    found
}

#[test]
fn killed_runs_end_with_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    must_end_alike(folder.path(), &recipe(folder.path()), "tokenizer");
}

#[test]
fn killed_runs_of_encoders_end_with_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let contents = must_end_alike(folder.path(), &encoder_recipe(folder.path()), "encoder");
    assert!(contents.contains_key("start.json"), "{:?}", contents.keys());
}

/// Runs the recipe at once and killed three times; returns what is the same.
fn must_end_alike(folder: &Path, recipe: &Path, part: &str) -> BTreeMap<String, Vec<u8>> {
    let (whole, killed) = (folder.join("whole"), folder.join("killed"));
    finish(start(recipe, &whole));
    let mut last = 0;
    for pause in [0, 13, 31] {
        let mut child = start(recipe, &killed);
        if !wait_for_checkpoint(&mut child, &killed, last) {
            break;
        }
        std::thread::sleep(Duration::from_millis(pause));
        child.kill().unwrap(); // SIGKILL: nothing can be cleaned up
        child.wait().unwrap();
        last = newest(&killed);
    }
    assert!(last > 0 && last < STEPS, "killed in the middle, at {last}");
    finish(start(recipe, &killed));
    let (whole, killed) = (contents(&whole), contents(&killed));
    assert_eq!(whole.keys().collect::<Vec<_>>(), killed.keys().collect::<Vec<_>>());
    for (name, bytes) in &whole {
        assert!(bytes == &killed[name], "{name} differs");
    }
    assert!(whole.contains_key(&format!("bundle/{part}/model.safetensors")));
    whole
}

#[test]
fn sigterm_saves_and_another_recipe_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path());
    let out = folder.path().join("run");
    let mut child = start(&recipe, &out);
    assert!(wait_for_checkpoint(&mut child, &out, 0));
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{text}");
    assert!(text.contains("interrupted"), "{text}");
    assert!(!out.join("bundle").exists());

    let other = ["train", stage::text(&recipe), "--out", stage::text(&out), "optimizer.learning_rate=0.5"];
    let error = stage::error_of(&other, 1);
    assert!(error.contains("another recipe") && error.contains("optimizer.learning_rate"), "{error}");
    finish(start(&recipe, &out));
    assert!(out.join("bundle/tokenizer/model.safetensors").exists());
}
