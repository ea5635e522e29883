//! `parity`: golden cases, tensors that official implementations made, compared with what this program makes of the same weights.

use crate::Settings;
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Progress, Result, device};
pub use smalti_parity::{CaseReport, Row, Status, Tolerance};
use std::path::PathBuf;

/// What `parity` is told.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct ParityArgs {
    /// Folders with case.json, io.safetensors and weights.safetensors
    #[arg(value_name = "CASE", required = true)]
    pub cases: Vec<PathBuf>,
    /// Compute in double precision, where the device can. Products in single precision are rounded to TF32 by many accelerators; this
    /// shows whether anything else differs. On the CPU it uses Burn's operations instead of this program's own
    #[arg(long)]
    pub double: bool,
}

/// A resolved and checked `parity`.
#[derive(Clone, Debug, Serialize)]
pub struct ParityPlan {
    /// The cases' folders.
    pub cases: Vec<PathBuf>,
    /// Where to compute.
    pub device: String,
    /// Whether in double precision.
    pub double: bool,
}

/// What `parity` found.
#[derive(Clone, Debug, Serialize)]
pub struct ParityOutcome {
    /// One report for each case, in the order given.
    pub cases: Vec<CaseReport>,
}

impl ParityOutcome {
    /// How all cases together ended: failed if one failed, else not implemented if one was not.
    pub fn status(&self) -> Status {
        let has = |status| self.cases.iter().any(|case| case.status == status);
        match (has(Status::Failed), has(Status::NotImplemented)) {
            (true, _) => Status::Failed,
            (false, true) => Status::NotImplemented,
            (false, false) => Status::Passed,
        }
    }
}

/// Checks that the cases are there.
///
/// # Errors
/// A folder without a case, or an unknown device.
pub fn plan(args: &ParityArgs, settings: &Settings) -> Result<ParityPlan> {
    for case in &args.cases {
        if !case.join("case.json").is_file() {
            return Err(Error::invalid_hint(
                case.display(),
                "has no case.json, so it is not a golden case",
                "give folders such as golden/vqgan/vqmodel-tiny",
            ));
        }
    }
    Ok(ParityPlan { cases: args.cases.clone(), device: settings.device_name()?, double: args.double })
}

/// Runs the cases. One that cannot be run is reported as failed, with the reason, and the others go on.
///
/// # Errors
/// An unknown device, or [`Error::Interrupted`].
pub fn run(plan: &ParityPlan, progress: &dyn Progress) -> Result<ParityOutcome> {
    let device = if plan.double { device::open_double(&plan.device) } else { device::open(&plan.device) }?;
    let mut cases = Vec::with_capacity(plan.cases.len());
    progress.begin("comparing", plan.cases.len() as u64, "cases");
    for (done, folder) in plan.cases.iter().enumerate() {
        if progress.cancelled() {
            return Err(Error::Interrupted { hint: None });
        }
        cases.push(smalti_parity::run(folder, &device).unwrap_or_else(|error| CaseReport::broken(folder, &error)));
        progress.advance(done as u64 + 1, "");
    }
    progress.end();
    Ok(ParityOutcome { cases })
}
