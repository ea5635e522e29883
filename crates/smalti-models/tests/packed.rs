//! Models whose weights are packed while they are read.

#![allow(clippy::unwrap_used)]

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use smalti_base::{Layout, TokenSpec};
use smalti_models::ConditionConfig;
use smalti_models::checkpoint::{
    Precision, Stored, Values, load_module, load_packed, read_tensors, save_module, write_tensors,
};
use smalti_models::generators::{GeneratorConfig, GeneratorModel, GptConfig};
use smalti_nn::dense::{Pack, WeightPrecision};
use std::collections::BTreeMap;
use std::path::Path;

fn fresh() -> GeneratorModel {
    let tokens = TokenSpec::discrete(Layout::Grid { h: 2, w: 2 }, 20, (8, 8));
    let config = GptConfig { mlp_ratio: 2, ..GptConfig::new(tokens, ConditionConfig::Class { classes: 3 }, 16, 2, 2) };
    GeneratorConfig::Gpt(config).init(&Device::flex()).unwrap()
}

fn save(model: &GeneratorModel, path: &Path) {
    save_module(model, path, Precision::F32, &BTreeMap::new()).unwrap();
}

fn logits(model: &GeneratorModel) -> Vec<f32> {
    let GeneratorModel::Gpt(model) = model else { unreachable!() };
    let device = Device::flex();
    let condition = Tensor::from_ints([[1]], &device);
    model.logits(condition, Tensor::from_ints([[3, 19, 0, 7]], &device)).into_data().try_to_vec().unwrap()
}

#[test]
fn packing_while_reading_equals_packing_afterwards() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    save(&fresh(), &path);
    let whole = load_module(fresh(), &path).unwrap();
    let mut sizes = Vec::new();
    for precision in WeightPrecision::ALL {
        let mut read = load_packed(fresh(), &path, precision).unwrap();
        assert_eq!(logits(&read), logits(&whole.pack(precision)), "{precision}");
        assert_eq!(read.num_params(), whole.num_params());
        assert!(Pack::dense_layers(&mut read).iter().all(|layer| !layer.weight.is_initialized()));
        sizes.push(read.packed_bytes());
    }
    assert!(sizes[0] > sizes[1] && sizes[1] > sizes[2] && sizes[2] > 0, "{sizes:?}");
}

#[test]
fn a_packed_model_is_saved_with_the_values_that_it_uses() {
    let folder = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    save(&fresh(), &one);
    for precision in WeightPrecision::ALL {
        let packed = load_packed(fresh(), &one, precision).unwrap();
        let before = logits(&packed);
        save(&packed, &two);
        assert_eq!(read_tensors(&one).unwrap() == read_tensors(&two).unwrap(), precision == WeightPrecision::F32);
        let after = logits(&load_module(fresh(), &two).unwrap());
        assert!(before.iter().zip(after).all(|(a, b)| (a - b).abs() < 1e-5), "{precision}");
    }
}

#[test]
fn files_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    save(&fresh(), &path);
    let tensors = read_tensors(&path).unwrap();
    let refused = |change: &dyn Fn(&mut BTreeMap<String, Stored>), text: &str| {
        let mut tensors = tensors.clone();
        change(&mut tensors);
        write_tensors(&path, &tensors, Precision::F32, &BTreeMap::new()).unwrap();
        let error = load_packed(fresh(), &path, WeightPrecision::Int8).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    };
    refused(&|tensors| drop(tensors.remove("head.weight")), "1 missing: `head.weight`");
    refused(&|tensors| drop(tensors.remove("norm.gamma")), "`norm.gamma`");
    let odd = Stored { shape: vec![16, 21], values: Values::Floats(vec![0.0; 16 * 21]) };
    refused(&|tensors| drop(tensors.insert("head.weight".into(), odd.clone())), "expected [16, 20]");
    let whole = Stored { shape: vec![16, 20], values: Values::Ints(vec![1; 16 * 20]) };
    refused(&|tensors| drop(tensors.insert("head.weight".into(), whole.clone())), "holds integers, expected floats");
}
