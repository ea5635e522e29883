//! Training and tokenizing that are killed at some moment and run again leave what an undisturbed run leaves, and nothing else.
#![allow(clippy::unwrap_used)]
#![cfg(unix)]

mod stage;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// After how many changes in the output folder a run is killed.
const MOMENTS: [usize; 9] = [1, 2, 4, 6, 9, 12, 16, 21, 27];

/// What the recipes have in common.
const COMMON: &str = r#"
seed = 3
batch = { size = 2 }
schedule = { steps = 7, warmup = 2 }
optimizer = { learning_rate = 1e-3, betas = [0.9, 0.99], clip_norm = 1.0 }
ema = { decay = 0.9 }
logging = { every = 1 }
evaluation = { every = 3, pictures = 2 }
checkpoint = { every = 2, keep = 1 }
"#;

fn images(folder: &Path, count: usize) -> PathBuf {
    let data = folder.join("images");
    fs::create_dir_all(&data).unwrap();
    (0..count).for_each(|i| stage::picture(&data.join(format!("{i:03}.png")), 18, 17, i));
    data
}

/// A recipe of this text and model.
fn written(path: PathBuf, text: &str, model: serde_json::Value) -> PathBuf {
    let mut recipe: toml::Table = text.parse().unwrap();
    let task = recipe["task"].as_table_mut().unwrap();
    task.insert("model".into(), toml::Value::try_from(model).unwrap());
    fs::write(&path, recipe.to_string()).unwrap();
    path
}

fn tokenizer_recipe(folder: &Path) -> PathBuf {
    let data = images(folder, 8);
    let transforms = r#"[{ kind = "center_crop", size = 16 }, { kind = "to_signed" }]"#;
    let text = format!(
        "name = 'kill-tokenizer'\n{COMMON}\n[task]\nkind = 'tokenizer'\nloss = {{ l1 = 1.0 }}\n\
         train = {{ path = '{data}', transforms = {transforms} }}\n\
         validation = {{ path = '{data}', transforms = {transforms} }}",
        data = data.display(),
    );
    written(folder.join("tokenizer.toml"), &text, stage::tokenizer())
}

fn generator_recipe(folder: &Path) -> PathBuf {
    let (model, tokens) = (folder.join("model"), folder.join("tokens"));
    stage::bundle(&model, None, &[]);
    let data = images(folder, 8);
    stage::json_of(&["tokenize", stage::text(&data), stage::text(&tokens), "--model", stage::text(&model)]);
    let generator = stage::generator("maskgit", serde_json::json!({ "kind": "none" }));
    let text = format!(
        "name = 'kill-generator'\n{COMMON}\n[task]\nkind = 'generator'\ntokenizer = '{model}'\ntrain = '{tokens}'\n\
         validation = '{tokens}'\nsampling = {{ steps = 2 }}",
        model = model.display(),
        tokens = tokens.display(),
    );
    written(folder.join("generator.toml"), &text, generator)
}

fn start(args: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_smalti"))
        .args(["--device", "cpu", "--threads", "1", "--quiet"])
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn finish(child: Child) {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// All files below a folder, by their paths in it; what goes while it is looked at is left out.
fn files(root: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                _ => drop(found.insert(entry.path().strip_prefix(root).unwrap().to_path_buf())),
            }
        }
    }
    found
}

fn contents(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    files(root).into_iter().map(|path| (path.clone(), fs::read(root.join(&path)).unwrap())).collect()
}

/// Kills a run after so many changes in its folder; false if it ended before.
fn kill_after(mut child: Child, out: &Path, changes: usize) -> bool {
    let limit = Instant::now() + Duration::from_secs(60);
    let (mut seen, mut changed) = (files(out), 0);
    while changed < changes {
        if child.try_wait().unwrap().is_some() {
            finish(child);
            return false;
        }
        assert!(Instant::now() < limit, "{changed} changes after a minute");
        let now = files(out);
        changed += usize::from(now != seen);
        seen = now;
    }
    child.kill().unwrap(); // SIGKILL: nothing can be cleaned up
    child.wait().unwrap();
    true
}

/// Kills the command at each moment and runs it again; `part` of its folder must be that of a run that was never killed.
fn must_end_alike(folder: &Path, part: &str, args: impl Fn(&str) -> Vec<String>) {
    let run = |out: &Path| {
        let args = args(stage::text(out));
        start(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let whole = folder.join("whole");
    finish(run(&whole));
    let want = contents(&whole.join(part));
    assert!(want.len() > 1, "{want:?}");
    let mut killed = 0;
    for moment in MOMENTS {
        let out = folder.join(format!("killed-{moment}"));
        if !kill_after(run(&out), &out, moment) {
            break;
        }
        killed += 1;
        finish(run(&out));
        let got = contents(&out.join(part));
        assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "killed at {moment}");
        want.iter().for_each(|(path, bytes)| assert!(got[path] == *bytes, "killed at {moment}: {}", path.display()));
        let left: Vec<_> = files(&out).into_iter().filter(|path| path.display().to_string().contains("/.")).collect();
        assert!(left.is_empty(), "killed at {moment}: {left:?}");
        assert!(!out.join(".smalti.lock").exists(), "killed at {moment}");
    }
    assert!(killed > 2, "only {killed} were killed in time");
    // A finished run that is started again changes nothing.
    finish(run(&whole));
    assert!(contents(&whole.join(part)) == want);
}

#[test]
fn tokenizers_end_alike() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = tokenizer_recipe(folder.path());
    must_end_alike(folder.path(), "bundle", |out| {
        ["train", stage::text(&recipe), "--out", out].map(str::to_string).to_vec()
    });
    let bundle = fs::read_to_string(folder.path().join("whole/bundle/bundle.json")).unwrap();
    assert!(bundle.contains("psnr"), "{bundle}");
}

#[test]
fn generators_end_alike() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = generator_recipe(folder.path());
    must_end_alike(folder.path(), "bundle", |out| {
        ["train", stage::text(&recipe), "--out", out].map(str::to_string).to_vec()
    });
}

#[test]
fn token_folders_end_alike() {
    let folder = tempfile::tempdir().unwrap();
    let (data, model) = (images(folder.path(), 60), folder.path().join("model"));
    stage::bundle(&model, None, &[]);
    must_end_alike(folder.path(), "", |out| {
        let args = ["tokenize", stage::text(&data), out, "--model", stage::text(&model), "--per-shard", "4"];
        args.map(str::to_string).to_vec()
    });
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = tokenizer_recipe(folder.path());
    let (whole, out) = (folder.path().join("whole"), folder.path().join("run"));
    let run = |out: &Path| start(&["train", stage::text(&recipe), "--out", stage::text(out), "checkpoint.keep=9"]);
    finish(run(&whole));
    finish(run(&out));
    let newest = out.join("checkpoints/step-00000007");
    let weights = newest.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    fs::write(out.join("checkpoints/step-00000006/state.json"), "{").unwrap();
    let again = ["train", stage::text(&recipe), "--out", stage::text(&out), "checkpoint.keep=9"];
    let output = stage::smalti().args(again).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("checkpoint of step 7 cannot be used") && said.contains("SHA-256"), "{said}");
    assert!(said.contains("checkpoint of step 6") && said.contains("continuing from step 4"), "{said}");
    assert!(contents(&out.join("bundle")) == contents(&whole.join("bundle")));
    assert!(contents(&newest) == contents(&whole.join("checkpoints/step-00000007")));
}

#[test]
fn one_process_at_a_time_works_in_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = tokenizer_recipe(folder.path());
    let out = folder.path().join("run");
    let mut holder = start(&["train", stage::text(&recipe), "--out", stage::text(&out), "schedule.steps=100000"]);
    let limit = Instant::now() + Duration::from_secs(60);
    while !out.join("checkpoints/step-00000002").exists() && !out.join("checkpoints/step-00000004").exists() {
        assert!(holder.try_wait().unwrap().is_none() && Instant::now() < limit);
        std::thread::sleep(Duration::from_millis(5));
    }
    let args = ["train", stage::text(&recipe), "--out", stage::text(&out), "schedule.steps=100000"];
    let error = stage::error_of(&args, 1);
    let process = format!("training, process {}", holder.id());
    assert!(error.contains("another smalti works in this folder") && error.contains(&process), "{error}");
    stage::smalti().args(args).arg("--dry-run").assert().success();
    holder.kill().unwrap();
    holder.wait().unwrap();
    // What a killed process held is free.
    let other = start(&args);
    std::thread::sleep(Duration::from_millis(300));
    assert!(Command::new("kill").args(["-TERM", &other.id().to_string()]).status().unwrap().success());
    let output = other.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn other_data_are_refused_unless_they_are_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = tokenizer_recipe(folder.path());
    let out = folder.path().join("run");
    let args = ["train", stage::text(&recipe), "--out", stage::text(&out)];
    finish(start(&args));
    fs::remove_file(folder.path().join("images/005.png")).unwrap();
    let error = stage::error_of(&args, 1);
    for part in ["task.train", "of 8 images", "of 7 images", "--data-changed"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    finish(start(&[&args[..], &["--data-changed"]].concat()));
    // From now on those are its data. A folder of an earlier version does not say.
    finish(start(&args));
    fs::remove_file(out.join("data.json")).unwrap();
    finish(start(&args));
    assert!(out.join("data.json").is_file());
}

#[test]
fn tokens_of_other_pixels_are_not_taken_for_those_of_the_images() {
    let folder = tempfile::tempdir().unwrap();
    let (data, model, out) = (images(folder.path(), 6), folder.path().join("model"), folder.path().join("tokens"));
    stage::bundle(&model, None, &[]);
    let run = |data: &Path| {
        let args =
            ["tokenize", stage::text(data), stage::text(&out), "--model", stage::text(&model), "--per-shard", "4"];
        args.map(str::to_string)
    };
    let strings = |args: &[String]| stage::smalti().args(args).output().unwrap();
    assert!(strings(&run(&data)).status.success());
    // A copy with other times is the same; the same names with other pixels are not.
    let copy = folder.path().join("copy");
    fs::create_dir(&copy).unwrap();
    for name in files(&data) {
        fs::copy(data.join(&name), copy.join(&name)).unwrap();
    }
    assert!(strings(&run(&copy)).status.success());
    stage::picture(&copy.join("005.png"), 18, 17, 77);
    let output = strings(&run(&copy));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("tokens-00001.safetensors is of images"), "{error}");
}
