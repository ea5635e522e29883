//! PyTorch's files: `torch.save` of any version (zip, legacy, tar), with what was pickled beside the tensors left aside.
//!
//! The pickle is read by an interpreter that builds tensors and plain values and calls nothing.

use super::tensors::{Source, Stored, decode};
use pytorch_reader::{DType, PytorchReader, Tensor};
use safetensors::tensor::Dtype;
use smalti_base::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A PyTorch file. Tensors in dictionaries inside of dictionaries have their keys joined by dots; each is read when asked for.
pub struct PytorchFile {
    path: PathBuf,
    tensors: BTreeMap<String, Tensor>,
}

impl PytorchFile {
    /// Reads what tensors there are.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] if the file is damaged, holds no tensors, or some of a kind that is not known.
    pub fn open(path: &Path) -> Result<Self> {
        std::fs::File::open(path).map_err(|e| Error::io("read", path, e))?;
        let reader =
            PytorchReader::new(path).map_err(|e| Error::file(path, format!("not a whole PyTorch file: {e}")))?;
        let tensors: BTreeMap<String, Tensor> = reader.into_tensors().into_iter().collect();
        match tensors.is_empty() {
            true => Err(Error::file(path, "holds no tensors")),
            false => Ok(Self { path: path.to_path_buf(), tensors }),
        }
    }
}

impl Source for PytorchFile {
    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shape().to_vec())).collect()
    }

    fn read(&self, name: &str) -> Result<Stored> {
        let Some(tensor) = self.tensors.get(name) else {
            return Err(Error::unknown(self.place(), "tensor", name, self.tensors.keys()));
        };
        let broken = |problem: String| Error::file(&self.path, format!("tensor `{name}` {problem}"));
        let bytes = tensor.read().map_err(|e| broken(format!("cannot be read: {e}")))?;
        let kind = dtype(tensor.dtype());
        let values = kind.and_then(|kind| decode(kind, &bytes));
        let values = values.ok_or_else(|| broken(format!("is of type {:?}, which is not known", tensor.dtype())))?;
        match values.len() == tensor.num_elements() {
            true => Ok(Stored { shape: tensor.shape().to_vec(), values }),
            false => Err(broken(format!("has {} values, its shape is {:?}", values.len(), tensor.shape()))),
        }
    }
}

fn dtype(kind: DType) -> Option<Dtype> {
    Some(match kind {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::I16 => Dtype::I16,
        DType::I8 => Dtype::I8,
        DType::U32 => Dtype::U32,
        DType::U16 => Dtype::U16,
        DType::U8 => Dtype::U8,
        DType::Bool => Dtype::BOOL,
        _ => return None,
    })
}
