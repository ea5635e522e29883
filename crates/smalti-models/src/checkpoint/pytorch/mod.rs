//! PyTorch's files: `torch.save` of any version (zip, legacy, tar), with what was pickled beside the tensors left aside.
//!
//! The pickle is read by an interpreter that builds tensors and plain values and calls nothing.

mod container;
mod names;
mod pickle;
mod rebuild;
mod tarred;
mod tensor;

use self::container::{Shared, Storages};
use self::names::Named;
use self::rebuild::shown;
use super::tensors::{Source, Stored, decode};
use smalti_base::{Error, Result, files};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A PyTorch file. Tensors in containers have keys, indices and attributes joined by dots; each is read when asked for.
pub struct PytorchFile {
    path: PathBuf,
    storages: Storages,
    tensors: BTreeMap<String, Named>,
}

impl PytorchFile {
    /// Reads what tensors there are. Whatever else is in the file is passed over.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] if the file is damaged, holds no tensors, or asks for more memory than a checkpoint needs.
    pub fn open(path: &Path) -> Result<Self> {
        let shared = Shared::new(files::open(path)?).map_err(|e| Error::io("read", path, e))?;
        let broken = |problem: String| Error::file(path, format!("not a whole PyTorch file: {problem}"));
        let (values, storages) = container::open(shared).map_err(broken)?;
        let tensors = names::named(&values).map_err(broken)?;
        match tensors.is_empty() {
            true => Err(Error::file(path, "holds no tensors")),
            false => Ok(Self { path: path.to_path_buf(), storages, tensors }),
        }
    }
}

impl Source for PytorchFile {
    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.tensors.iter().map(|(name, named)| (name.clone(), named.tensor.shape.clone())).collect()
    }

    fn read(&self, name: &str) -> Result<Stored> {
        let Some(Named { tensor, twice }) = self.tensors.get(name) else {
            return Err(Error::unknown(self.place(), "tensor", name, self.tensors.keys()));
        };
        let broken = |problem: String| Error::file(&self.path, format!("tensor {} {problem}", shown(name)));
        if *twice {
            return Err(broken("is there twice, with other values".into()));
        }
        let unknown = || broken(format!("is of type {}, which is not known", shown(&tensor.element.name)));
        let dtype = tensor.element.dtype.ok_or_else(unknown)?;
        let window = self.storages.read(&tensor.key, tensor.window()).map_err(broken)?;
        let values = decode(dtype, &tensor.gather(window)).ok_or_else(unknown)?;
        match values.len() == tensor.shape.iter().product::<usize>() {
            true => Ok(Stored { shape: tensor.shape.clone(), values }),
            false => Err(broken(format!("has {} values, its shape is {:?}", values.len(), tensor.shape))),
        }
    }
}
