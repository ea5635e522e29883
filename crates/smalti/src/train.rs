//! `train`: a recipe to a run folder and a bundle. Run again, it continues where it stopped.

use crate::Settings;
use crate::output::prepare_folder;
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Progress, Result, device};
use smalti_train::Recipe;
use std::path::PathBuf;

pub use smalti_train::Outcome as TrainOutcome;

/// What `train` is told.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct TrainArgs {
    /// The recipe, a TOML file
    pub recipe: PathBuf,
    /// The run folder: checkpoints, logs, samples, and finally the bundle [default: runs/NAME]
    #[arg(short, long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Values to replace in the recipe, such as optimizer.learning_rate=1e-3
    #[arg(value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// A resolved and checked `train`.
#[derive(Clone, Debug, Serialize)]
pub struct TrainPlan {
    /// The run folder.
    pub out: PathBuf,
    /// Where to compute.
    pub device: String,
    /// The recipe with every value written out.
    #[serde(rename = "recipe")]
    pub table: toml::Table,
    #[serde(skip)]
    recipe: Recipe,
}

/// Resolves and checks the recipe.
///
/// # Errors
/// [`Error::Unknown`] with the nearest key, [`Error::Invalid`] for a value of the wrong type or out of range, or an unknown device.
pub fn plan(args: &TrainArgs, settings: &Settings) -> Result<TrainPlan> {
    let seed = settings.seed.map(|seed| format!("seed={seed}"));
    let set: Vec<String> = args.set.iter().cloned().chain(seed).collect();
    let recipe = Recipe::read(&args.recipe, &set)?;
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from("runs").join(&recipe.name));
    smalti_train::check(&recipe, &out)?;
    Ok(TrainPlan { out, device: settings.device_name()?, table: recipe.table()?, recipe })
}

/// Trains.
///
/// # Errors
/// As [`smalti_train::run`], and [`Error::Interrupted`] if the user stopped it: then a checkpoint was saved.
pub fn run(plan: &TrainPlan, progress: &dyn Progress) -> Result<TrainOutcome> {
    prepare_folder(&plan.out)?;
    let outcome = smalti_train::run(&plan.recipe, &plan.out, &device::open(&plan.device)?, progress)?;
    match outcome.finished {
        true => Ok(outcome),
        false => {
            let saved = format!(
                "step {} is saved in {}; run the same command again to continue",
                outcome.step,
                plan.out.display()
            );
            Err(Error::Interrupted { hint: Some(saved) })
        }
    }
}
