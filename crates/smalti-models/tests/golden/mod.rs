//! Reads golden cases: tensors that the official implementations made.

use burn::tensor::{Int, Tensor, TensorData};
use smalti_models::checkpoint::{Stored, read_tensors};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The tensors of one file of a case.
pub struct Case(BTreeMap<String, Stored>);

impl Case {
    /// Opens `golden/<case>/<file>.safetensors`.
    pub fn open(case: &str, file: &str) -> Self {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../golden");
        Self(read_tensors(&root.join(case).join(format!("{file}.safetensors"))).unwrap())
    }

    pub fn get(&self, name: &str) -> &Stored {
        self.0.get(name).unwrap_or_else(|| panic!("the case has no tensor `{name}`"))
    }

    pub fn floats(&self, name: &str) -> &[f32] {
        self.get(name).floats().unwrap()
    }

    pub fn ids<const D: usize>(&self, name: &str) -> Tensor<D, Int> {
        let stored = self.get(name);
        let data = TensorData::new(stored.ints().unwrap().to_vec(), stored.shape.clone());
        Tensor::from_data(data, &burn::tensor::Device::flex())
    }

    pub fn into_tensors(self) -> BTreeMap<String, Stored> {
        self.0
    }
}
