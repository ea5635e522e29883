//! `parity`: the verdict as an exit code, and double precision.
#![allow(clippy::unwrap_used)]

mod stage;

use serde_json::Value;
use stage::{smalti, text};
use std::path::{Path, PathBuf};

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(name)
}

/// The exit code and the document.
fn compare(case: &Path, more: &[&str]) -> (Option<i32>, Value) {
    let output = smalti().args(["parity", text(case), "--json"]).args(more).output().unwrap();
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
fn the_exit_code_is_the_verdict() {
    let (code, document) = compare(&case("mar/ar-causal"), &[]);
    assert_eq!((code, &document["cases"][0]["status"]), (Some(0), &Value::from("passed")));
    let folder = tempfile::tempdir().unwrap();
    let other = r#"{ "system": "another", "config": {}, "tolerance": { "abs": 0, "rel": 0 } }"#;
    std::fs::write(folder.path().join("case.json"), other).unwrap();
    let (code, document) = compare(folder.path(), &[]);
    assert_eq!((code, &document["cases"][0]["status"]), (Some(2), &Value::from("not_implemented")));
    // The weights of four heads read as those of two.
    for file in ["io.safetensors", "weights.safetensors"] {
        std::fs::copy(case("mar/ar-causal").join(file), folder.path().join(file)).unwrap();
    }
    let settings = std::fs::read_to_string(case("mar/ar-causal").join("case.json")).unwrap();
    assert!(settings.contains("\"num_heads\": 4"));
    let settings = settings.replace("\"num_heads\": 4", "\"num_heads\": 2");
    std::fs::write(folder.path().join("case.json"), settings).unwrap();
    let (code, document) = compare(folder.path(), &[]);
    assert_eq!((code, &document["cases"][0]["status"]), (Some(1), &Value::from("failed")));
}

/// In double precision no kernel of this program's own is in use, and official outputs, losses and gradients are met all the same.
#[test]
fn double_precision_agrees() {
    for name in ["mar/ar-causal", "vqgan/net2net-class", "vqgan/vqmodel-tiny", "var/transformer-l2norm"] {
        let errors = |more: &[&str]| -> Vec<f64> {
            let (code, document) = compare(&case(name), more);
            assert_eq!(code, Some(0), "{name} {more:?}");
            let rows = document["cases"][0]["rows"].as_array().unwrap();
            rows.iter().map(|row| row["max_abs"].as_f64().unwrap()).collect()
        };
        let (single, double) = (errors(&[]), errors(&["--double"]));
        assert_eq!(single.len(), double.len());
        // Other numbers did the work.
        assert!(single != double, "{name}");
    }
}
