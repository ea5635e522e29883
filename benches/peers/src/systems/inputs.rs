//! Between the shared files and tensors.

use crate::rows::Row;
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::de::DeserializeOwned;
use smalti::base::{Error, Result};
use smalti::models::Condition;
use smalti::models::checkpoint::{Rules, Stored, Values, WeightsFile, read_tensors};
use std::collections::BTreeMap;
use std::path::Path;

/// Tensors of `inputs.safetensors`.
pub struct Inputs {
    tensors: BTreeMap<String, Stored>,
    device: Device,
}

impl Inputs {
    /// Reads them.
    pub fn read(folder: &Path, device: &Device) -> Result<Self> {
        Ok(Self { tensors: read_tensors(&folder.join("inputs.safetensors"))?, device: device.clone() })
    }

    /// One of them as it is stored.
    pub fn stored(&self, name: &str) -> Result<&Stored> {
        self.tensors.get(name).ok_or_else(|| Error::unknown("inputs.safetensors", "tensor", name, self.tensors.keys()))
    }

    /// Floats.
    pub fn floats<const D: usize>(&self, name: &str) -> Result<Tensor<D>> {
        match self.stored(name)? {
            Stored { shape, values: Values::Floats(values) } => {
                Ok(Tensor::from_data(TensorData::new(values.clone(), shape.clone()), &self.device))
            }
            _ => Err(Error::invalid("inputs.safetensors", format!("`{name}` holds no floats"))),
        }
    }

    /// Integers.
    pub fn ints(&self, name: &str) -> Result<&[i64]> {
        let stored = self.stored(name)?;
        stored.ints().ok_or_else(|| Error::invalid("inputs.safetensors", format!("`{name}` holds no integers")))
    }

    /// Integers `[rows, n]`.
    pub fn ids(&self, name: &str, rows: usize) -> Result<Tensor<2, Int>> {
        let values: Vec<i32> = self.ints(name)?.iter().map(|id| *id as i32).collect();
        let n = values.len() / rows.max(1);
        Ok(Tensor::from_data(TensorData::new(values, [rows, n]), &self.device))
    }

    /// The classes of the images.
    pub fn classes(&self) -> Result<Vec<Condition>> {
        Ok(self.ints("classes")?.iter().map(|class| Condition::class(*class as u32)).collect())
    }

    /// Truth values, a row for each image.
    pub fn masks(&self, name: &str) -> Result<Vec<Vec<bool>>> {
        match self.stored(name)? {
            Stored { shape, values: Values::Bools(values) } => {
                let n = shape.last().copied().unwrap_or(1).max(1);
                Ok(values.chunks(n).map(<[bool]>::to_vec).collect())
            }
            _ => Err(Error::invalid("inputs.safetensors", format!("`{name}` holds no truth values"))),
        }
    }
}

/// The row's model, read as what it should be.
pub fn model<T: DeserializeOwned>(row: &Row) -> Result<T> {
    serde_json::from_value(row.model.clone()).map_err(|e| Error::invalid(&row.name, format!("model: {e}")))
}

/// The row's options, read as what they should be.
pub fn options<T: DeserializeOwned>(row: &Row) -> Result<T> {
    serde_json::from_value(row.options.clone()).map_err(|e| Error::invalid(&row.name, format!("options: {e}")))
}

/// Loads `weights.safetensors` into a module.
pub fn import<M: Module>(rules: &Rules, module: M, folder: &Path) -> Result<M> {
    import_named("weights", rules, module, folder)
}

/// The same with another file.
pub fn import_named<M: Module>(name: &str, rules: &Rules, module: M, folder: &Path) -> Result<M> {
    Ok(rules.import(module, &WeightsFile::open(&folder.join(format!("{name}.safetensors")))?)?.0)
}

/// A tensor of floats as an output.
pub fn floats<const D: usize>(tensor: Tensor<D>) -> Stored {
    let shape = tensor.dims().to_vec();
    Stored { shape, values: Values::Floats(tensor.into_data().iter::<f32>().collect()) }
}

/// A tensor of integers as an output.
pub fn ints<const D: usize>(tensor: Tensor<D, Int>) -> Stored {
    let shape = tensor.dims().to_vec();
    Stored { shape, values: Values::Ints(tensor.into_data().iter::<i64>().collect()) }
}

/// Outputs by name.
pub fn outputs<const N: usize>(named: [(&str, Stored); N]) -> super::Outputs {
    named.into_iter().map(|(name, stored)| (name.to_string(), stored)).collect()
}
