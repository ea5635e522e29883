//! Cases that are made from golden ones: other settings, and tensors that follow from theirs by a formula.
#![allow(dead_code, reason = "each test file uses a part")]

use burn::tensor::Device;
use serde_json::Value;
use smalti_models::checkpoint::tensors::Precision;
use smalti_models::checkpoint::{Stored, Values, read_tensors, write_tensors};
use smalti_parity::{CaseReport, Status, run};
use std::collections::BTreeMap;
use std::path::PathBuf;

pub type Tensors = BTreeMap<String, Stored>;

/// A case that is not yet written.
pub struct Made {
    pub file: Value,
    pub io: Tensors,
    pub weights: Tensors,
    folder: PathBuf,
}

impl Made {
    pub fn from(case: &str) -> Self {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(case);
        Self {
            file: serde_json::from_str(&std::fs::read_to_string(folder.join("case.json")).unwrap()).unwrap(),
            io: read_tensors(&folder.join("io.safetensors")).unwrap(),
            weights: read_tensors(&folder.join("weights.safetensors")).unwrap_or_default(),
            folder,
        }
    }

    /// With another value of a setting, which may be a new one.
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        let parts = key.split('.');
        let place = parts.fold(&mut self.file["config"], |inside, part| &mut inside[part]);
        *place = value.into();
        self
    }

    /// With other values, or another tensor.
    pub fn put(mut self, name: &str, shape: &[usize], values: Vec<f32>) -> Self {
        self.io.insert(name.into(), Stored { shape: shape.to_vec(), values: Values::Floats(values) });
        self
    }

    /// With another number.
    pub fn number(self, name: &str, value: f32) -> Self {
        assert!(self.io.contains_key(name), "{name}");
        self.put(name, &[1], vec![value])
    }

    /// Without the tensors whose names begin so.
    pub fn without(mut self, prefix: &str) -> Self {
        self.io.retain(|name, _| !name.starts_with(prefix));
        self
    }

    pub fn floats(&self, name: &str) -> &[f32] {
        self.io[name].floats().unwrap()
    }

    pub fn scalar(&self, name: &str) -> f32 {
        self.floats(name)[0]
    }

    pub fn run(&self) -> CaseReport {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(&self.folder).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
        std::fs::write(folder.path().join("case.json"), self.file.to_string()).unwrap();
        let write = |name: &str, tensors: &Tensors| {
            write_tensors(&folder.path().join(name), tensors, Precision::F32, &BTreeMap::new()).unwrap();
        };
        write("io.safetensors", &self.io);
        if !self.weights.is_empty() {
            write("weights.safetensors", &self.weights);
        }
        run(folder.path(), &Device::flex()).unwrap()
    }

    /// Fails unless all is within tolerance, these tensors among the rest.
    pub fn passes(&self, compared: &[&str]) {
        let report = self.run();
        let outside: Vec<_> = report.rows.iter().filter(|row| !row.within).collect();
        assert_eq!(report.status, Status::Passed, "{:?} {outside:?}", report.error);
        for name in compared {
            assert!(report.rows.iter().any(|row| row.tensor == *name), "{name} was not compared");
        }
    }

    /// The error of a case whose settings are not supported.
    pub fn refused(&self) -> String {
        let report = self.run();
        assert_eq!(report.status, Status::Failed);
        report.error.unwrap()
    }
}
