//! Weights and bundles on disk.
//!
//! [`open_weights`] reads safetensors and PyTorch files, [`tensors`] reads and writes named tensors, [`weights`] moves them in and out of a module, [`bundle`] is the folder that holds
//! a usable model, [`rules`] turn official checkpoints into ours.

mod axes;
pub mod bundle;
mod finite;
pub mod import;
mod open;
pub mod packed;
mod pytorch;
mod reading;
pub mod rules;
pub mod tensors;
pub mod weights;

pub use bundle::{
    BundlePaths, Manifest, Part, PartFacts, copy_part, read_config, read_decoder, read_packed, read_weights, verified,
    write_part,
};
pub use finite::Finite;
pub use open::{Below, WEIGHTS_ENDINGS, choose_weights, indexed_files, is_index, open_weights};
pub use packed::load_packed;
pub use pytorch::PytorchFile;
pub use rules::{Plan, Rules};
pub use tensors::{Source, Stored, Values, WeightsFile, copy_tensors, read_tensors, write_tensors};
pub use weights::{
    Entry, Kind, Precision, Report, load_from, load_module, load_without, parameter_map, parameters, save_module,
};
