//! The programs in `examples/` run, and make what they say.
#![allow(clippy::unwrap_used)]

use smalti::data::Shards;
use smalti::data::image::{Limits, open};
use smalti::generate::{self, GenerateArgs};
use smalti::model::ModelPlan;
use smalti::{Settings, base::progress::Silent, data::RowTokens};
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::tempdir;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// Runs an example from the repository's folder; what it prints.
fn run(example: &str, arguments: &[&str]) -> String {
    // Cargo builds examples beside the folder of the tests.
    let tests = std::env::current_exe().unwrap();
    let program = tests.parent().unwrap().with_file_name("examples").join(example);
    assert!(
        program.with_extension(std::env::consts::EXE_EXTENSION).is_file(),
        "`cargo test -p smalti` builds examples"
    );
    let output = Command::new(&program).args(arguments).current_dir(root()).output().unwrap();
    assert!(output.status.success(), "{example}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn generate_makes_the_picture_of_the_verb() {
    let folder = tempdir().unwrap();
    let (picture, same) = (folder.path().join("heart.png"), folder.path().join("same.png"));
    run("generate", &["a red heart", "assets/demo", text(&picture)]);
    let args = GenerateArgs {
        prompt: Some("a red heart".into()),
        model: Some(root().join("assets/demo")),
        out: same.clone(),
        ..GenerateArgs::default()
    };
    let settings = Settings { device: Some("cpu".into()), seed: Some(1), ..Settings::default() };
    generate::run(&generate::plan(&args, &settings).unwrap(), &Silent).unwrap();
    let [picture, same] = [picture, same].map(|file| open(&file, [255; 3], &Limits::default()).unwrap());
    assert_eq!((picture.width, picture.height), (64, 64));
    assert!(picture == same);
}

#[test]
fn codes_are_those_that_tokenize_writes() {
    let folder = tempdir().unwrap();
    let (picture, tokens) = (folder.path().join("kept.png"), folder.path().join("tokens"));
    let images = "assets/emoji3d/validation.tar";
    let printed = run("codes", &[images, "assets/demo", text(&picture)]);
    let printed: Vec<u32> = printed
        .lines()
        .skip(1)
        .flat_map(|row| row.trim_matches(['[', ']']).split(", "))
        .map(|code| code.parse().unwrap())
        .collect();
    assert_eq!(open(&picture, [255; 3], &Limits::default()).unwrap().width, 64);

    assert!(run("tokenize", &[images, "assets/demo", text(&tokens)]).starts_with("186 rows in 2 shards"));
    let RowTokens::Discrete(written) = Shards::open(&tokens).unwrap().tokens(0).unwrap() else {
        panic!("the demo's tokens are codes")
    };
    assert_eq!(printed, written);
}

#[test]
fn train_leaves_a_bundle() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("run");
    let printed = run("train", &[text(&out), "3"]);
    assert!(printed.contains("3 steps: ") && printed.contains("psnr"), "{printed}");
    let model = ModelPlan::find(Some(&out)).unwrap();
    assert_eq!((model.tokens.length(), model.tokens.vocabulary()), (64, Some(128)));
}

#[test]
fn import_brings_back_what_was_exported() {
    let folder = tempdir().unwrap();
    let (weights, bundle) = (folder.path().join("vqgan.safetensors"), folder.path().join("bundle"));
    let printed = run("import", &[text(&weights), "vqgan", text(&bundle)]);
    assert!(printed.starts_with("tokenizer is vqgan/emoji3d-64"), "{printed}");
    let numbers = |bundle: &str| {
        let printed = run("evaluate", &[bundle, "assets/emoji3d/validation.tar", "8"]);
        let numbers: serde_json::Value = serde_json::from_str(&printed).unwrap();
        assert_eq!(numbers["images"], 8, "{printed}");
        numbers["tokenizer"].clone()
    };
    let demo = numbers("assets/demo");
    assert_eq!(numbers(text(&bundle)), demo);
    assert!(demo["psnr"].as_f64().unwrap() > 20.0, "{demo}");
}
