//! `bench`: how fast this machine is, each kernel on it, and each model.
//!
//! Rows are medians of rounds that follow each other on an otherwise idle machine. A comparison with another framework needs
//! both in one run: that is `benches/peers`.

mod clock;
mod kernels;
mod machine;
mod models;

pub use kernels::KernelRow;
pub use machine::Machine;
pub use models::ModelRow;

use crate::{Settings, WeightsArgs};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Progress, Result, device};
use smalti_nn::dense::WeightPrecision;
use std::path::PathBuf;

/// Most images at the same time.
const MOST: usize = 256;

/// What `bench` is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct BenchArgs {
    /// Bundles, run folders, or recipes (with fresh weights) to time as a whole [default: no model, all kernels]
    #[arg(value_name = "MODEL")]
    pub models: Vec<PathBuf>,
    /// Kernels whose name contains this; given with models, both are timed
    #[arg(long, value_name = "TEXT")]
    pub only: Option<String>,
    /// Seconds for each number
    #[arg(long, value_name = "S", default_value_t = 0.4)]
    pub seconds: f64,
    /// Batch sizes for the models
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 4])]
    pub batch: Vec<usize>,
    /// How the generators' weights are kept.
    #[command(flatten)]
    pub weights: WeightsArgs,
}

impl Default for BenchArgs {
    fn default() -> Self {
        Self { models: Vec::new(), only: None, seconds: 0.4, batch: vec![1, 4], weights: WeightsArgs::default() }
    }
}

/// A resolved and checked `bench`.
#[derive(Clone, Debug, Serialize)]
pub struct BenchPlan {
    /// Where to compute.
    pub device: String,
    /// Threads that compute.
    pub threads: usize,
    /// Seconds for each number.
    pub seconds: f64,
    /// Names of the kernels.
    pub kernels: Vec<String>,
    /// Batch sizes.
    pub batch: Vec<usize>,
    /// How the generators' weights are kept.
    #[serde(serialize_with = "crate::weights::name")]
    pub weights: WeightPrecision,
    /// The models.
    pub models: Vec<models::Subject>,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct BenchOutcome {
    /// The machine.
    pub machine: Machine,
    /// The kernels.
    pub kernels: Vec<KernelRow>,
    /// The models.
    pub models: Vec<ModelRow>,
    /// Largest resident memory of the process so far in bytes, where the system tells.
    pub peak_memory: Option<u64>,
}

/// Resolves and checks everything; reads no weight.
///
/// # Errors
/// A model that is missing or no model, a name that no kernel has, an unknown device, a setting out of range.
pub fn plan(args: &BenchArgs, settings: &Settings) -> Result<BenchPlan> {
    if !(args.seconds > 0.0 && args.seconds <= 60.0) {
        return Err(Error::invalid("--seconds", format!("{} is not above 0 and at most 60", args.seconds)));
    }
    if let Some(batch) = args.batch.iter().find(|batch| !(1..=MOST).contains(*batch)) {
        return Err(Error::invalid("--batch", format!("{batch} is not in 1..={MOST}")));
    }
    let all = kernels::names();
    let wanted = |name: &String| args.only.as_ref().map_or(args.models.is_empty(), |only| name.contains(only));
    let kernels: Vec<String> = all.iter().filter(|name| wanted(name)).cloned().collect();
    if let (Some(only), true) = (&args.only, kernels.is_empty()) {
        let kinds = all.iter().filter_map(|name| name.split(' ').next()).map(str::to_string);
        return Err(Error::unknown("--only", "kernel", only, kinds));
    }
    let device = settings.device_name()?;
    let models: Vec<_> = args.models.iter().map(|path| models::Subject::find(path)).collect::<Result<_>>()?;
    let weights = args.weights.resolve(&device)?;
    if weights != WeightPrecision::F32 && !models.iter().any(models::Subject::generates) {
        let hint = "give a bundle or a recipe that has one, or leave out --weights";
        return Err(Error::invalid_hint("--weights", "none of the models is a generator", hint));
    }
    Ok(BenchPlan {
        weights,
        device,
        threads: smalti_base::threads::count(),
        seconds: args.seconds,
        kernels,
        batch: args.batch.clone(),
        models,
    })
}

/// Measures.
///
/// # Errors
/// What opening models and computing return, or [`Error::Interrupted`].
pub fn run(plan: &BenchPlan, progress: &dyn Progress) -> Result<BenchOutcome> {
    let device = device::open(&plan.device)?;
    let clock = clock::Clock::new(plan.seconds, &device);
    let total = 1 + plan.kernels.len() + plan.models.len();
    progress.begin("timing", total as u64, "rows");
    let machine = Machine::measure(&clock, &device)?;
    let (mut kernels, mut models) = (Vec::new(), Vec::new());
    for name in &plan.kernels {
        next(progress, 1 + kernels.len(), name)?;
        kernels.push(kernels::measure(name, &machine, &clock, &device)?);
    }
    for subject in &plan.models {
        next(progress, 1 + kernels.len() + models.len(), &subject.name)?;
        models.extend(subject.measure(&plan.batch, plan.weights, &clock, &device)?);
    }
    progress.end();
    Ok(BenchOutcome { machine, kernels, models, peak_memory: machine::peak_memory() })
}

fn next(progress: &dyn Progress, done: usize, name: &str) -> Result<()> {
    progress.advance(done as u64, name);
    if progress.cancelled() {
        progress.end();
        return Err(Error::Interrupted { hint: None });
    }
    Ok(())
}
