//! Token shards: what is in them, and that a run that was stopped ends with the same bytes as one that was not.

#![allow(clippy::unwrap_used)]

mod stage;

use serde_json::json;
use smalti::data::{RowTokens, Shards};
use stage::{SIDE, bundle, class_bundle, error_of, json_of, picture, text};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use tempfile::tempdir;

/// Two classes of images; one file is not an image.
fn images(folder: &Path, each: usize) {
    for class in ["cat", "dog"] {
        fs::create_dir_all(folder.join(class)).unwrap();
        for i in 0..each {
            picture(&folder.join(class).join(format!("{i:03}.png")), SIDE + i % 5, SIDE, i);
        }
    }
    fs::write(folder.join("cat/bad.png"), "no picture").unwrap();
}

/// The bytes of each file of a folder.
fn bytes(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap())).collect()
}

#[test]
fn rows_carry_key_class_and_codes() {
    let folder = tempdir().unwrap();
    let (model, source, out) =
        (folder.path().join("model"), folder.path().join("images"), folder.path().join("tokens"));
    class_bundle(&model);
    images(&source, 3);
    let run = ["tokenize", text(&source), text(&out), "--model", text(&model), "--per-shard", "4", "--batch", "2"];
    let outcome = json_of(&run);
    assert_eq!((&outcome["rows"], &outcome["shards"], &outcome["resumed_at"]), (&json!(6), &json!(2), &json!(0)));
    assert!(outcome["skipped"][0]["key"].as_str().unwrap().contains("bad.png"), "{outcome}");

    let shards = Shards::open(&out).unwrap();
    assert_eq!(shards.classes(), ["cat", "dog"]);
    let row = shards.row(4).unwrap();
    let RowTokens::Discrete(codes) = &row.tokens else { panic!("the tokens are codes") };
    assert_eq!((row.key.as_str(), row.label, codes.len()), ("dog/001.png", Some(1), 16));

    let again = json_of(&run);
    assert_eq!((&again["rows"], &again["resumed_at"]), (&json!(6), &json!(7)));
    let facts = json_of(&["inspect", text(&out), "--verify"]);
    assert_eq!((&facts["kind"], &facts["rows"], &facts["verified"]), (&json!("tokens"), &json!(6), &json!(true)));

    // Another tokenizer's tokens are not mixed in.
    let other = folder.path().join("other");
    bundle(&other, None, &[]);
    let error = error_of(&["tokenize", text(&source), text(&out), "--model", text(&other), "--per-shard", "4"], 1);
    assert!(error.contains("the tokenizers of") && error.contains("another folder"), "{error}");
}

#[test]
fn mirror_images_follow_their_images() {
    let folder = tempdir().unwrap();
    let (model, source, out) =
        (folder.path().join("model"), folder.path().join("images"), folder.path().join("tokens"));
    class_bundle(&model);
    images(&source, 2);
    let outcome =
        json_of(&["tokenize", text(&source), text(&out), "--model", text(&model), "--flip", "--per-shard", "3"]);
    assert_eq!(outcome["rows"], json!(8));
    assert_eq!(outcome["skipped"].as_array().unwrap().len(), 2);
    let shards = Shards::open(&out).unwrap();
    let keys: Vec<String> = (0..3).map(|i| shards.row(i).unwrap().key).collect();
    assert_eq!(keys, ["cat/000.png", "cat/000.png#mirrored", "cat/001.png"]);
    assert_ne!(shards.row(0).unwrap().tokens, shards.row(1).unwrap().tokens);
}

#[cfg(unix)]
#[test]
fn a_killed_run_ends_with_the_same_bytes() {
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (model, source) = (path("model"), path("images"));
    class_bundle(&model);
    images(&source, 150);
    let arguments = |out: &Path| {
        let parts = ["tokenize", text(&source), text(out), "--model", text(&model), "--per-shard", "7", "--batch", "1"];
        parts.map(str::to_string)
    };
    let run = |out: &Path| json_of(&arguments(out).iter().map(String::as_str).collect::<Vec<_>>());
    run(&path("whole"));
    let out = path("killed");
    let mut child =
        std::process::Command::new(assert_cmd::cargo::cargo_bin("smalti")).args(arguments(&out)).spawn().unwrap();
    let begun = std::time::Instant::now();
    while !out.join("tokens-00003.safetensors").exists() && child.try_wait().unwrap().is_none() {
        assert!(begun.elapsed().as_secs() < 60, "no shard was written");
        std::thread::yield_now();
    }
    // Kills at once, as `kill -9` does.
    child.kill().unwrap();
    child.wait().unwrap();
    let resumed = run(&out);
    assert!(resumed["resumed_at"].as_u64().unwrap() >= 21, "{resumed}");
    let (whole, killed) = (bytes(&path("whole")), bytes(&out));
    let kept = |files: &BTreeMap<String, Vec<u8>>| {
        files.keys().filter(|name| !name.starts_with('.')).cloned().collect::<Vec<_>>()
    };
    assert_eq!(kept(&whole), kept(&killed));
    for name in kept(&whole) {
        assert!(whole[&name] == killed[&name], "{name} differs");
    }
}
