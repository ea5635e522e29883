//! `bench`.
#![allow(clippy::unwrap_used)]

mod stage;

use assert_cmd::Command;
use serde_json::{Value, json};

#[test]
fn bench_times_kernels_and_models() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    stage::bundle(&model, Some(stage::generator("gpt", json!({ "kind": "none" }))), &[]);
    let quick = ["--seconds", "0.001", "--batch", "1,3"];
    let outcome = stage::json_of(&[&["bench", "--only", "layer_norm", stage::text(&model)][..], &quick].concat());
    for limit in ["gemm_gflops", "read_gbs"] {
        assert!(outcome["machine"][limit].as_f64().unwrap() > 0.0, "{outcome}");
    }
    let kernels = outcome["kernels"].as_array().unwrap();
    assert!(kernels.len() > 1 && kernels.iter().all(|row| row["name"].as_str().unwrap().starts_with("layer_norm")));
    assert!(kernels.iter().all(|row| row["backward_ms"].as_f64() > Some(0.0)), "{outcome}");
    let rows: Vec<(&str, u64)> = outcome["models"].as_array().unwrap().iter().map(what_and_batch).collect();
    let expected = ["encode", "decode", "generate"];
    let expected: Vec<(&str, u64)> = [1, 3].into_iter().flat_map(|n| expected.map(|what| (what, n))).collect();
    assert_eq!(rows, expected);
    assert_eq!(outcome["models"][2]["steps"], 16);
}

fn what_and_batch(row: &Value) -> (&str, u64) {
    (row["what"].as_str().unwrap(), row["batch"].as_u64().unwrap())
}

#[test]
fn bench_refuses_what_it_cannot_time() {
    let error = stage::error_of(&["bench", "--only", "convd"], 1);
    assert!(error.contains("did you mean `conv2d`?"), "{error}");
    let error = stage::error_of(&["bench", "--seconds", "0"], 1);
    assert!(error.contains("--seconds"), "{error}");
    let error = stage::error_of(&["bench", "--weights", "int8"], 1);
    assert!(error.contains("none of the models is a generator"), "{error}");
    let error = stage::error_of(&["bench", "--batch", "0"], 1);
    assert!(error.contains("--batch") && error.contains("1..="), "{error}");
    let mut command = Command::cargo_bin("smalti").unwrap();
    let output = command.args(["--threads", "0", "systems"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("at least one thread is needed"));
}
