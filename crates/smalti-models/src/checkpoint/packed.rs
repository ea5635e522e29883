//! Weights that are packed while they are read, so that a reduced model never needs the memory of the whole one.

use super::tensors::{Source, WeightsFile};
use super::weights::{Without, load_from, parameter_map};
use smalti_base::{Error, Result};
use smalti_nn::dense::{Pack, WeightPrecision};
use std::path::Path;

/// [`super::load_module`] for inference on the CPU: dense layers take their weights packed, one after the other.
///
/// # Errors
/// As [`super::load_module`].
pub fn load_packed<M: Pack>(module: M, path: &Path, precision: WeightPrecision) -> Result<M> {
    pack_from(module, &WeightsFile::open(path)?, precision)
}

pub(super) fn pack_from<M: Pack>(mut module: M, source: &dyn Source, precision: WeightPrecision) -> Result<M> {
    let entries = parameter_map(&module);
    let layers = module.dense_layers();
    let name = |id| entries.iter().find(|(_, entry)| entry.id == id).map(|(name, _)| name.clone());
    let dense: Vec<String> = layers.iter().filter_map(|layer| name(layer.weight.id)).collect();
    // Whether everything fits is asked for all weights together.
    super::Report::compare(&entries, &source.shapes(), &|_| false).must_fit(&source.place())?;
    let is_dense = |name: &str| dense.iter().any(|dense| dense == name);
    let (mut module, _) = load_from(module, &Without { source, left_out: &is_dense }, &is_dense)?;
    for (layer, name) in module.dense_layers().into_iter().zip(&dense) {
        let stored = source.read(name)?;
        let values = stored.floats().ok_or_else(|| {
            let problem = format!("tensor `{name}` holds {}, expected floats", stored.values.kind());
            Error::invalid(source.place(), problem)
        })?;
        layer.pack_values(values, precision);
    }
    Ok(module)
}
