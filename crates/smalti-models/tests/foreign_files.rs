//! Weights that other programs wrote: by PyTorch 2.15 in both of its formats and by the `safetensors` package; and broken and
//! hostile ones.

#![allow(clippy::unwrap_used)]

use smalti_base::Rng;
use smalti_base::rng::Stream;
use smalti_models::checkpoint::{Below, Source, Stored, Values, WeightsFile, choose_weights, open_weights};
use std::path::{Path, PathBuf};

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/files").join(name)
}

/// What each of the files holds.
fn expected() -> Vec<(&'static str, Stored)> {
    let counted: Vec<f32> = (0..24).map(|i| i as f32 / 8.0).collect();
    // [2, 3, 2, 2] at the first pixel, transposed by strides.
    let first = [0, 12, 4, 16, 8, 20].map(|i| counted[i]).to_vec();
    let floats =
        |shape: &[usize], values: &[f32]| Stored { shape: shape.to_vec(), values: Values::Floats(values.to_vec()) };
    vec![
        ("bf", floats(&[3], &[1.5, -2.25, 3.0])),
        ("double", floats(&[2], &[1.0, 2.0])),
        ("encoder.conv_in.bias", floats(&[2], &[0.5, -1.0])),
        ("encoder.conv_in.weight", floats(&[2, 3, 2, 2], &counted)),
        ("ids", Stored { shape: vec![2, 2], values: Values::Ints(vec![1, 2, 3, -4]) }),
        ("mask", Stored { shape: vec![2], values: Values::Bools(vec![true, false]) }),
        ("scalar", floats(&[], &[7.0])),
        ("transposed", floats(&[3, 2], &first)),
    ]
}

fn holds_all(source: &dyn Source) {
    let shapes = source.shapes();
    for (name, stored) in expected() {
        assert_eq!(shapes[name], stored.shape, "{name} of {}", source.place());
        assert_eq!(source.read(name).unwrap(), stored, "{name} of {}", source.place());
    }
}

#[test]
fn files_of_other_programs() {
    for name in ["wrapped.pth", "wrapped-legacy.pth"] {
        let source = open_weights(&file(name)).unwrap();
        assert!(source.shapes().contains_key("optimizer_states.0.state.0.exp_avg"));
        holds_all(&Below::new(source.as_ref(), "state_dict").unwrap());
        assert!(Below::new(source.as_ref(), "model_ema").is_none());
    }
    // A folder with an index, and the index itself.
    holds_all(open_weights(&file("model.safetensors.index.json")).unwrap().as_ref());
    holds_all(open_weights(&file("")).unwrap().as_ref());
}

/// These pickles ask to run a program that makes a file when they are loaded by Python.
#[test]
fn nothing_is_executed() {
    for name in ["evil.pth", "evil-legacy.pth"] {
        let source = open_weights(&file(name)).unwrap();
        holds_all(&Below::new(source.as_ref(), "state_dict").unwrap());
        assert!(!Path::new("/tmp/smalti-was-here").exists());
    }
}

/// All that Lightning and others pickle beside the weights, and the oldest container; `files/odd.py` made them.
#[test]
fn what_holds_no_tensor_is_passed_over() {
    let floats = |source: &dyn Source, name: &str| source.read(name).unwrap().floats().unwrap().to_vec();
    for name in ["odd-2.ckpt", "odd-4.ckpt", "odd-legacy.ckpt", "odd-tar.ckpt"] {
        let source = open_weights(&file(name)).unwrap();
        let below = Below::new(source.as_ref(), "state_dict").unwrap();
        let shapes = [("encoder.bias".to_string(), vec![2]), ("encoder.weight".to_string(), vec![2, 3])];
        assert_eq!(below.shapes(), shapes.into(), "{name}");
        assert_eq!(floats(&below, "encoder.weight"), [0.0, 0.5, 1.0, 1.5, 2.0, 2.5], "{name}");
        assert_eq!(floats(&below, "encoder.bias"), [-1.0, 2.0], "{name}");
        if name == "odd-tar.ckpt" {
            continue;
        }
        let found = |name: &str| floats(source.as_ref(), name);
        assert_eq!(found("callbacks.lightning_parts.ModelCheckpoint.best"), [0.25]);
        assert_eq!(found("optimizer_states.0.state.0.exp_avg"), [0.0; 6]);
        assert_eq!(found("keys.(1,a)"), [1.0; 3]);
        assert_eq!(found("args.mean"), [1.0; 2]);
        assert_eq!(found("queue.2.t"), [1.0]);
        assert_eq!(found("slots.b"), [1.0]);
        assert_eq!(found("listed.1"), [0.0; 2]);
        assert_eq!(found("listed.extra"), [3.0]);
        assert!(source.shapes().keys().all(|name| !name.starts_with("itself") && !name.contains("hyper")));
    }
}

fn damaged(s: &mut Stream, whole: &[u8]) -> Vec<u8> {
    let mut bytes = whole.to_vec();
    for _ in 0..1 + s.below(3) {
        let (at, n) = (s.below(bytes.len()), bytes.len());
        match s.below(6) {
            0 => bytes.truncate(at),
            1 => bytes[at] ^= 1 << s.below(8),
            2 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff, b'(', b'R', b'Q'][s.below(8)],
            // A length or an offset that is far too large.
            3 => bytes[at..(at + 8).min(n)].fill(0xff),
            4 => {
                let piece = bytes[at..(at + 1 + s.below(40)).min(n)].to_vec();
                let to = s.below(n);
                bytes.splice(to..to, piece);
            }
            _ => drop(bytes.drain(at..(at + 1 + s.below(40)).min(n))),
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
    }
    bytes
}

const CHILD: &str = "SMALTI_DAMAGED_FILES";

/// 12,000 damaged files: each is read or refused with an error that names it. All in a process of 1 GiB of address space, which
/// ends if a length is believed.
#[test]
fn damaged_files_are_refused() {
    if cfg!(target_os = "linux") && std::env::var_os(CHILD).is_none() {
        let program = std::env::current_exe().unwrap();
        let command = "ulimit -v 1048576; exec \"$0\" damaged_files_are_refused --test-threads 1";
        let run = std::process::Command::new("sh").args(["-c", command]).arg(program).env(CHILD, "1").output().unwrap();
        assert!(
            run.status.success(),
            "{}{}",
            String::from_utf8_lossy(&run.stdout),
            String::from_utf8_lossy(&run.stderr)
        );
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut refused = 0;
    for (kind, name) in
        ["wrapped.pth", "wrapped-legacy.pth", "evil.pth", "model-00001-of-00002.safetensors"].into_iter().enumerate()
    {
        let whole = std::fs::read(file(name)).unwrap();
        let path = folder.path().join(name);
        for case in 0..3000 {
            std::fs::write(&path, damaged(&mut Rng::new(3).stream(case, kind as u64), &whole)).unwrap();
            let read = open_weights(&path).and_then(|source| {
                let small =
                    |shape: &Vec<usize>| shape.iter().try_fold(1usize, |n, axis| n.checked_mul(*axis)) < Some(1 << 20);
                let names: Vec<String> =
                    source.shapes().into_iter().filter(|(_, shape)| small(shape)).map(|(name, _)| name).collect();
                names.iter().try_for_each(|name| source.read(name).map(|_| ()))
            });
            if let Err(error) = read {
                refused += 1;
                assert!(error.to_string().contains(name), "{error}");
            }
        }
    }
    assert!(refused > 6000, "only {refused} of 12000 were refused");
}

#[test]
fn what_is_no_weights_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let message = |path: &Path| open_weights(path).err().unwrap().to_string();
    assert!(message(folder.path()).contains("holds no weights"));
    let text = folder.path().join("a.ckpt");
    std::fs::write(&text, "not found").unwrap();
    assert!(message(&text).contains("not a whole PyTorch file"), "{}", message(&text));
    std::fs::write(folder.path().join("b.ckpt"), "x").unwrap();
    assert!(message(folder.path()).contains("several"), "{}", message(folder.path()));
    std::fs::remove_file(folder.path().join("b.ckpt")).unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    std::fs::write(&index, r#"{"weight_map": {"a": "../x.safetensors"}}"#).unwrap();
    assert!(message(folder.path()).contains("leads out of the folder"));
    assert!(message(&folder.path().join("none.pth")).contains("none.pth"));
}

#[test]
fn the_weights_of_a_folder_are_chosen() {
    let chosen = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        choose_weights(&names).map(|name| name.map(str::to_string)).map_err(|several| several.join(" "))
    };
    for (names, choice) in [
        (&["README.md", "a.json"][..], Ok(None)),
        (&["a.ckpt", "b.safetensors"], Ok(Some("b.safetensors"))),
        (&["a.safetensors", "b.safetensors", "c.ckpt"], Err("a.safetensors b.safetensors")),
        (&["a-1.safetensors", "a-2.safetensors", "a.safetensors.index.json"], Ok(Some("a.safetensors.index.json"))),
        (
            &["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"],
            Ok(Some("diffusion_pytorch_model.safetensors")),
        ),
        (&["model.safetensors", "model.safetensors.index.json"], Ok(Some("model.safetensors"))),
        (&["a-1.bin", "a-2.bin", "a.bin.index.json"], Ok(Some("a.bin.index.json"))),
        (&["optimizer.bin", "pytorch_model.bin"], Ok(Some("pytorch_model.bin"))),
        (&["pytorch_model.bin", "x.safetensors"], Ok(Some("x.safetensors"))),
        (&["a.ckpt", "pytorch_model.bin.index.json"], Ok(Some("a.ckpt"))),
    ] {
        assert_eq!(chosen(names), choice.map(|name| name.map(String::from)).map_err(String::from), "{names:?}");
    }
}

/// What people take for weights is called what it is, whatever its name.
#[test]
fn other_files_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let message = |name: &str, bytes: &[u8]| {
        std::fs::write(folder.path().join(name), bytes).unwrap();
        open_weights(&folder.path().join(name)).err().unwrap().to_string()
    };
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n";
    for name in ["a.safetensors", "b.ckpt"] {
        assert!(message(name, pointer).contains("`git lfs pull`"));
        assert!(message(name, b"<!DOCTYPE html><html>").contains("web page"));
        assert!(message(name, b"").contains("is empty"));
    }
    // A pickle by another name is read as what it is.
    std::fs::copy(file("wrapped.pth"), folder.path().join("c.safetensors")).unwrap();
    assert!(open_weights(&folder.path().join("c.safetensors")).is_ok());
    let error = WeightsFile::open(&folder.path().join("c.safetensors")).unwrap_err().to_string();
    assert!(error.contains("a file of PyTorch"), "{error}");
}

/// A run of one instruction, in a zip and without.
#[test]
fn pickles_without_end_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.ckpt");
    for op in [b'(', b']', b'}', b')', b'N', b'K'] {
        let mut pickle = vec![0x80, 2];
        pickle.resize(8 << 20, op);
        let mut zip = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
        let options = zip::write::SimpleFileOptions::default();
        zip.start_file("archive/data.pkl", options.compression_method(zip::CompressionMethod::Deflated)).unwrap();
        std::io::Write::write_all(&mut zip, &pickle).unwrap();
        zip.finish().unwrap();
        let error = open_weights(&path).err().unwrap().to_string();
        assert!(error.contains("compressed ones are too many"), "{error}");
        std::fs::write(&path, &pickle).unwrap();
        let error = open_weights(&path).err().unwrap().to_string();
        assert!(error.contains("needs more memory") || error.contains("is cut short"), "{error}");
    }
}

/// Shards of PyTorch's files by their index; one that is not there is named.
#[test]
fn shards_of_pytorch_files() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let map = r#"{"metadata": {}, "weight_map": {"state_dict.encoder.weight": "pytorch_model-1.bin", "w": "pytorch_model-2.bin"}}"#;
    std::fs::write(at("pytorch_model.bin.index.json"), map).unwrap();
    std::fs::copy(file("odd-4.ckpt"), at("pytorch_model-1.bin")).unwrap();
    let error = open_weights(folder.path()).err().unwrap().to_string();
    assert!(error.contains("`pytorch_model-2.bin` is not beside it; 1 of its 2 files"), "{error}");
    std::fs::write(at("pytorch_model.bin.index.json"), map.replace(r#", "w": "pytorch_model-2.bin""#, "")).unwrap();
    let source = open_weights(folder.path()).unwrap();
    assert_eq!(source.shapes(), [("state_dict.encoder.weight".to_string(), vec![2, 3])].into());
    assert_eq!(source.read("state_dict.encoder.weight").unwrap().floats().unwrap()[5], 2.5);
}
