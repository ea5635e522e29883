//! Reading of golden cases for tests.
#![allow(dead_code, reason = "each test file uses a part")]

use burn::tensor::{Device, Tensor, TensorData};
use smalti_models::checkpoint::tensors::{Stored, read_tensors};
use std::collections::BTreeMap;
use std::path::PathBuf;

pub type Tensors = BTreeMap<String, Stored>;

/// A case's folder, if it is there.
pub fn folder(case: &str) -> Option<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    [root.join("golden"), root.join("../shared/golden")]
        .map(|golden| golden.join(case))
        .into_iter()
        .find(|f| f.exists())
}

/// Expected tensors and weights of a case.
pub fn open(case: &str) -> Option<(Tensors, Tensors)> {
    let folder = folder(case)?;
    let read = |name| read_tensors(&folder.join(name)).unwrap();
    Some((read("io.safetensors"), read("weights.safetensors")))
}

/// A float tensor.
pub fn tensor<const D: usize>(tensors: &Tensors, name: &str, device: &Device) -> Tensor<D> {
    let stored = tensors.get(name).unwrap_or_else(|| panic!("{name} is in the case"));
    Tensor::from_data(TensorData::new(stored.floats().unwrap().to_vec(), stored.shape.clone()), device)
}

/// The tensors whose names begin with `prefix`, without it, with a norm's `weight` and `bias` as `gamma` and `beta`.
pub fn below(weights: &Tensors, prefix: &str) -> Tensors {
    let weights = weights.iter().filter(|(name, _)| !name.ends_with("num_batches_tracked"));
    let inside = weights.filter_map(|(name, stored)| Some((name.strip_prefix(prefix)?, stored)));
    inside.map(|(name, stored)| (with_norms(name), stored.clone())).collect()
}

fn with_norms(name: &str) -> String {
    let Some((parent, part)) = name.rsplit_once('.') else { return name.to_string() };
    let layer = parent.rsplit('.').next().unwrap_or(parent);
    match (layer.starts_with("norm"), part) {
        (true, "weight") => format!("{parent}.gamma"),
        (true, "bias") => format!("{parent}.beta"),
        _ => name.to_string(),
    }
}

/// Fails unless all values agree to `absolute + relative * |expected|`.
pub fn close(found: &[f32], expected: &[f32], absolute: f32, relative: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    let worst = found
        .iter()
        .zip(expected)
        .map(|(f, e)| ((f - e).abs() - relative * e.abs(), f, e))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .unwrap();
    assert!(worst.0 <= absolute && found.iter().all(|f| f.is_finite()), "{what}: {} instead of {}", worst.1, worst.2);
}

/// Compares with a tensor of the case at the cases' common tolerance.
pub fn agree<const D: usize>(found: Tensor<D>, expected: &Tensors, name: &str) {
    let stored = expected.get(name).unwrap_or_else(|| panic!("{name} is in the case"));
    assert_eq!(found.dims().iter().product::<usize>(), stored.values.len(), "{name}: size");
    let found = found.into_data().convert::<f32>().try_into_vec::<f32>().unwrap();
    close(&found, stored.floats().unwrap(), 1e-4, 1e-3, name);
}
