//! What the number of threads does not change.
#![allow(clippy::unwrap_used)]

mod stage;

use assert_cmd::Command;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Runs the program with so many threads.
fn run(threads: &str, args: &[&str]) {
    let mut command = Command::cargo_bin("smalti").unwrap();
    command.env_remove("SMALTI_MODEL").current_dir(root()).args(["--device", "cpu", "--threads", threads]);
    command.args(args).assert().success();
}

/// Forward passes add up in an order of their own, whatever the number of threads: the same picture, byte for byte.
#[test]
fn a_picture() {
    let folder = tempfile::tempdir().unwrap();
    let pictures = ["1", "2", "5"].map(|threads| {
        let path = folder.path().join(format!("{threads}.png"));
        run(threads, &["generate", "a blue fish", "--count", "2", "-o", stage::text(&path)]);
        std::fs::read(path).unwrap()
    });
    assert!(pictures[0] == pictures[1] && pictures[1] == pictures[2]);
}

/// So do the backward passes of convolutional networks with their losses.
#[test]
fn the_training_of_a_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let weights = ["1", "2", "3"].map(|threads| {
        let out = folder.path().join(threads);
        let recipe = ["train", "recipes/vqgan/emoji3d-64.toml", "--out", stage::text(&out)];
        let small = ["schedule.steps=2", "batch.size=4", "evaluation.images=1", "evaluation.pictures=1"];
        let loss = ["task.loss.adversarial={ kind = \"hinge\", weight = 0.8, start_step = 0, adaptive = true }"];
        run(threads, &[&recipe[..], &small, &loss].concat());
        std::fs::read(out.join("checkpoints/step-00000002/model.safetensors")).unwrap()
    });
    assert!(weights[0] == weights[1] && weights[1] == weights[2]);
}

/// And those of transformers.
#[test]
fn the_training_of_a_generator() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    let data = "assets/emoji3d/validation.tar";
    run("2", &["tokenize", data, stage::text(&tokens), "--model", "assets/demo"]);
    let weights = ["1", "2", "3"].map(|threads| {
        let out = folder.path().join(threads);
        let paths = ["train", "validation"].map(|part| format!("task.{part}={}", stage::text(&tokens)));
        let recipe = ["train", "recipes/gpt/emoji3d-64.toml", "--out", stage::text(&out), "task.tokenizer=assets/demo"];
        let small = ["task.model.width=64", "task.model.depth=2", "schedule.steps=3", "evaluation.images=1"];
        run(threads, &[&recipe[..], &small, &[&paths[0], &paths[1], "evaluation.pictures=2"]].concat());
        std::fs::read(out.join("checkpoints/step-00000003/model.safetensors")).unwrap()
    });
    assert!(weights[0] == weights[1] && weights[1] == weights[2]);
}
