//! The engine: what every front end calls.
//!
//! ```
//! use smalti::generate::{self, GenerateArgs};
//! use smalti::{Settings, base::progress::Silent};
//!
//! fn main() -> smalti::Result<()> {
//!     # std::env::set_current_dir("../..").map_err(|e| smalti::Error::io("enter", "../..", e))?;
//!     # let folder = std::env::temp_dir().join(format!("smalti-{}", std::process::id()));
//!     # std::fs::create_dir_all(&folder).map_err(|e| smalti::Error::io("make", &folder, e))?;
//!     # let heart = folder.join("heart.png");
//!     # /*
//!     let heart = "heart.png";
//!     # */
//!     let args = GenerateArgs {
//!         prompt: Some("a red heart".into()),
//!         model: Some("assets/demo".into()),
//!         out: heart.into(),
//!         ..GenerateArgs::default()
//!     };
//!     let plan = generate::plan(&args, &Settings::default())?;
//!     let outcome = generate::run(&plan, &Silent)?;
//!     println!("{} of {:?} pixels", outcome.files[0].display(), outcome.size);
//!     # assert_eq!((outcome.size, outcome.files[0].is_file()), ((64, 64), true));
//!     # std::fs::remove_dir_all(&folder).map_err(|e| smalti::Error::io("remove", &folder, e))?;
//!     Ok(())
//! }
//! ```
//!
//! `Silent` listens to nothing: implement [`Progress`] to show how far the work is, or to stop it. Short programs for other tasks are in the
//! repository's folder `examples/`; they also show the layer below the verbs: [`model::ModelPlan`] opens a bundle,
//! [`models::Tokenizer`] and [`models::Generator`] are what is in it.
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
