//! Finding and comparing with golden cases.
#![allow(dead_code, reason = "each test file uses a part")]

use burn::tensor::{Device, Tensor};
use smalti_models::checkpoint::Stored;
use smalti_parity::Case;
use std::collections::BTreeMap;
use std::path::PathBuf;

pub type Tensors = BTreeMap<String, Stored>;

/// A case's folder of this repository.
pub fn folder(case: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(case)
}

/// A case of this repository on the CPU.
pub fn open(case: &str) -> Case {
    Case::open(&folder(case), &Device::flex()).unwrap()
}

/// Fails unless all values agree to `absolute + relative * |expected|`.
pub fn close(found: &[f32], expected: &[f32], absolute: f32, relative: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    for (found, expected) in found.iter().zip(expected) {
        let within = (found - expected).abs() <= absolute + relative * expected.abs();
        assert!(within, "{what}: {found} instead of {expected}");
    }
}

/// Compares with a tensor of the case at the case's own tolerance.
pub fn agree<const D: usize>(case: &Case, name: &str, found: Tensor<D>) {
    let tolerance = case.tolerance(name);
    close(&values(found), case.floats(name).unwrap(), tolerance.absolute, tolerance.relative, name);
}

pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_into_vec().unwrap()
}
