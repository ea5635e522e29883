//! `train`: a recipe to a run folder and a bundle. Run again, it continues where it stopped.

use crate::Settings;
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Progress, Result, device};
use smalti_train::{Changes, Recipe};
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
    /// Go on although the data are not those that the run began with
    #[arg(long)]
    pub data_changed: bool,
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
    /// Whether a run may go on with other data than it began with.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub data_changed: bool,
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
    // In quotes, since TOML has no whole number above an i64.
    let seed = settings.seed.map(|seed| format!("seed=\"{seed}\""));
    let set: Vec<String> = args.set.iter().cloned().chain(seed).collect();
    let recipe = Recipe::read(&args.recipe, &set)?;
    recipe.check_warmup(&args.recipe.display().to_string(), &set)?;
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from("runs").join(&recipe.name));
    smalti_train::check(&recipe, &out)?;
    let data_changed = args.data_changed;
    Ok(TrainPlan { out, device: settings.device_name()?, data_changed, table: recipe.table()?, recipe })
}

/// Trains.
///
/// # Errors
/// As [`smalti_train::run`], and [`Error::Interrupted`] if the user stopped it: then a checkpoint was saved.
pub fn run(plan: &TrainPlan, progress: &dyn Progress) -> Result<TrainOutcome> {
    let changes = if plan.data_changed { Changes::Accept } else { Changes::Refuse };
    let outcome = smalti_train::go_on(&plan.recipe, &plan.out, changes, &device::open(&plan.device)?, progress)?;
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
