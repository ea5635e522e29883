//! The engine: what every front end calls.
//!
//! One file for each verb. A verb is told what was typed (`XArgs`); `plan` resolves and checks everything before a weight is read, and
//! gives an `XPlan` that can be shown; `run` does it and gives an `XOutcome`.

pub mod assemble;
pub mod bench;
pub mod edit;
pub mod evaluate;
pub mod export;
pub mod generate;
pub mod generating;
#[cfg(feature = "hub")]
pub mod hub;
pub mod import;
pub mod inspect;
pub mod judge;
pub mod model;
pub mod output;
pub mod parity;
pub mod reconstruct;
mod sampling;
mod settings;
pub mod source;
pub mod stages;
pub mod systems;
pub mod tokenize;
pub mod train;
pub mod variants;
pub mod weights;

pub use sampling::SamplingArgs;
pub use settings::Settings;
pub use smalti_base as base;
pub use smalti_base::{Error, Progress, Result};
pub use smalti_data as data;
pub use smalti_eval as eval;
pub use smalti_kernels::Keeping;
pub use smalti_models as models;
pub use smalti_nn as nn;
pub use smalti_train as training;
pub use weights::WeightsArgs;
