//! Weights and bundles on disk.
//!
//! [`tensors`] reads and writes named tensors, [`weights`] moves them in and out of a module, [`bundle`] is the folder that holds
//! a usable model, [`rules`] turn official checkpoints into ours.

pub mod bundle;
pub mod packed;
pub mod rules;
pub mod tensors;
pub mod weights;

pub use bundle::{BundlePaths, Manifest, Part, PartFacts, read_config, read_packed, read_weights, write_part};
pub use packed::load_packed;
pub use rules::{Plan, Rules};
pub use tensors::{Source, Stored, Values, WeightsFile, read_tensors, write_tensors};
pub use weights::{Entry, Kind, Precision, Report, load_from, load_module, parameter_map, save_module};
