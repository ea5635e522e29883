//! What an earlier build of the program wrote is opened, continued and used by today's.
#![allow(clippy::unwrap_used)]

mod stage;

use serde_json::Value;
use smalti::data::{RowTokens, Shards};
use smalti::training::Recipe;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::{TempDir, tempdir};

const TOKENIZERS: [&str; 3] = ["vqgan", "kl", "scales"];
/// Each generator and its tokenizer.
const GENERATORS: [(&str, &str); 4] = [("gpt", "vqgan"), ("maskgit", "vqgan"), ("mar", "kl"), ("var", "scales")];

fn written() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/written")
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if path.is_dir() {
            copy(&path, &to);
        } else {
            fs::copy(&path, &to).unwrap();
        }
    }
}

/// A copy of everything, with the tokenizers that generators share in their places.
fn place() -> TempDir {
    let place = tempdir().unwrap();
    copy(&written(), place.path());
    for (generator, tokenizer) in GENERATORS {
        let runs = place.path().join("runs");
        copy(&runs.join(tokenizer).join("bundle/tokenizer"), &runs.join(generator).join("bundle/tokenizer"));
    }
    place
}

/// What the program prints as JSON when it is run in this folder.
fn json_in(place: &TempDir, args: &[&str]) -> Value {
    let output = stage::smalti().current_dir(place.path()).args(args).arg("--json").output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn lines(file: &Path) -> Vec<String> {
    fs::read_to_string(file).unwrap().lines().map(str::to_string).collect()
}

/// The numbers of a line of metrics, but for the speed.
fn numbers(line: &str) -> BTreeMap<String, f64> {
    let line: BTreeMap<String, f64> = serde_json::from_str(line).unwrap();
    line.into_iter().filter(|(name, _)| name != "images_per_second").collect()
}

#[test]
fn recipes_say_what_they_said() {
    let runs = TOKENIZERS.into_iter().chain(GENERATORS.map(|(generator, _)| generator));
    for run in runs {
        let typed = Recipe::read(&written().join(format!("{run}.toml")), &[]).unwrap();
        let resolved = Recipe::read(&written().join("runs").join(run).join("recipe.toml"), &[]).unwrap();
        assert_eq!(typed.table().unwrap(), resolved.table().unwrap(), "{run}");
    }
}

#[test]
fn bundles_and_tokens_are_whole() {
    let place = place();
    for run in TOKENIZERS.into_iter().chain(GENERATORS.map(|(generator, _)| generator)) {
        let facts = json_in(&place, &["inspect", &format!("runs/{run}/bundle"), "--verify"]);
        assert_eq!((&facts["kind"], &facts["verified"]), (&"bundle".into(), &true.into()), "{facts}");
    }
    for tokenizer in TOKENIZERS {
        let facts = json_in(&place, &["inspect", &format!("tokens/{tokenizer}"), "--verify"]);
        assert_eq!((&facts["rows"], &facts["verified"]), (&8.into(), &true.into()), "{facts}");
    }
}

#[test]
fn runs_go_on_where_they_stopped() {
    let place = place();
    // Generators first: their tokens are those of the tokenizers that are there, which continued runs write again.
    for run in GENERATORS.map(|(generator, _)| generator).into_iter().chain(TOKENIZERS) {
        let metrics = place.path().join("runs").join(run).join("metrics.jsonl");
        let before = lines(&metrics);
        let outcome = json_in(&place, &["train", &format!("{run}.toml")]);
        assert_eq!((&outcome["step"], &outcome["finished"]), (&4.into(), &true.into()), "{outcome}");
        let after = lines(&metrics);
        // The first steps were not taken again, and the others end with the same numbers.
        assert_eq!((&after[..2], after.len()), (&before[..2], before.len()), "{run}");
        for (before, after) in
            before[2..].iter().map(|line| numbers(line)).zip(after[2..].iter().map(|line| numbers(line)))
        {
            for (name, value) in &before {
                let difference = (after[name] - value).abs();
                assert!(difference <= 1e-3 * value.abs().max(1e-3), "{run}, {name}: {value} was {}", after[name]);
            }
        }
        let facts = json_in(&place, &["inspect", &format!("runs/{run}/bundle"), "--verify"]);
        assert_eq!(facts["verified"], true, "{facts}");
    }
}

#[test]
fn bundles_make_pictures() {
    let place = place();
    for (run, _) in GENERATORS {
        let (model, out) = (format!("runs/{run}"), format!("{run}.png"));
        let class: &[&str] = if run == "maskgit" { &[] } else { &["--class", "dog"] };
        let made = json_in(&place, &[&["generate", "--model", &model, "-n", "2", "-o", &out], class].concat());
        assert_eq!(made["size"], serde_json::json!([16, 16]), "{made}");
        assert!(place.path().join(out).is_file());
        let numbers = json_in(&place, &["evaluate", &model, "--data", "images"]);
        assert_eq!(numbers["images"], 8, "{numbers}");
    }
}

#[test]
fn tokens_are_those_of_their_tokenizer() {
    let place = place();
    for tokenizer in TOKENIZERS {
        let (model, tokens, again) =
            (format!("runs/{tokenizer}"), format!("tokens/{tokenizer}"), format!("again/{tokenizer}"));
        let file = |folder: &str| place.path().join(folder).join("tokens-00000.safetensors");
        let before = fs::read(file(&tokens)).unwrap();
        let outcome = json_in(&place, &["tokenize", "images", &tokens, "--model", &model]);
        assert_eq!((&outcome["rows"], &outcome["resumed_at"]), (&8.into(), &8.into()), "nothing is left to do");
        assert!(fs::read(file(&tokens)).unwrap() == before);
        json_in(&place, &["tokenize", "images", &again, "--model", &model]);
        let of = |folder: &str| Shards::open(&place.path().join(folder)).unwrap();
        let (old, new) = (of(&tokens), of(&again));
        for row in 0..8 {
            let (old, new) = (old.row(row).unwrap(), new.row(row).unwrap());
            assert_eq!((&old.key, old.label), (&new.key, new.label));
            match (old.tokens, new.tokens) {
                (RowTokens::Discrete(old), RowTokens::Discrete(new)) => assert_eq!(old, new, "{tokenizer}"),
                (
                    RowTokens::Continuous { means: old, deviations },
                    RowTokens::Continuous { means: new, deviations: others },
                ) => {
                    assert_eq!((old.len(), deviations.len()), (new.len(), others.len()));
                    let same = |(old, new): (&f32, &f32)| (old - new).abs() <= 2e-3 * old.abs().max(1.0);
                    assert!(old.iter().zip(&new).all(same) && deviations.iter().zip(&others).all(same), "{tokenizer}");
                }
                _ => panic!("{tokenizer}: codes and vectors"),
            }
        }
    }
}
