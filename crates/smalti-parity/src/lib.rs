//! Golden cases: tensors that official implementations made, compared with ours.
//!
//! A case is a folder with `case.json` (system, configuration, tolerance, a line for each tensor), `io.safetensors` and mostly
//! `weights.safetensors` under official names. A stage knows which cases it can run by the tensors in them, imports the weights
//! through the ordinary rules, and compares everything it makes. Whatever the official configuration allows runs: a setting that is
//! not known or not supported is an error that names it. A case that no stage knows is reported as not implemented, with its
//! tensors and settings.

mod case;
mod codebooks;
mod comparison;
mod diffusion;
mod fsq;
mod gradients;
mod gumbel;
mod kl;
mod lpips;
mod mar;
mod maskgit;
mod metrics;
mod mobilenet_v2;
mod net2net;
mod patch_losses;
mod rq_vae;
mod var;
mod vit;
mod vqgan;

pub use case::{Case, Tolerance};
pub use comparison::{Comparison, Row};

use burn::tensor::Device;
use serde::Serialize;
use smalti_base::{Error, Result};
use std::path::Path;

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// All tensors that were compared are within tolerance.
    Passed,
    /// At least one is not.
    Failed,
    /// No stage knows cases with such tensors, or of such a system.
    NotImplemented,
}

/// What running a case gave.
#[derive(Clone, Debug, Serialize)]
pub struct CaseReport {
    /// `system/name`.
    pub case: String,
    /// How it ended.
    pub status: Status,
    /// The tensors that were compared.
    pub rows: Vec<Row>,
    /// Tensors of the case that were neither read nor compared.
    pub not_compared: Vec<String>,
    /// Why the case could not be run to its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl CaseReport {
    /// The report of a case that could not be run.
    pub fn broken(folder: &Path, error: &Error) -> Self {
        let case = folder.display().to_string();
        Self {
            case,
            status: Status::Failed,
            rows: Vec::new(),
            not_compared: Vec::new(),
            error: Some(error.to_string()),
        }
    }
}

/// A kind of case.
struct Stage {
    system: &'static str,
    /// Whether the case is of this kind, whatever its numbers are. Settings that tell kinds apart are asked for with
    /// [`Case::has_settings`]: what is read here does not count as understood.
    knows: fn(&Case) -> bool,
    run: fn(&Case, &mut Comparison) -> Result<()>,
}

const STAGES: &[Stage] = &[
    Stage { system: "autoencoder-kl", knows: kl::knows, run: kl::model },
    Stage { system: "fid", knows: metrics::knows_pixels, run: metrics::pixels },
    Stage { system: "fsq", knows: fsq::knows_official, run: fsq::official },
    Stage { system: "fsq", knows: fsq::knows_library, run: fsq::library },
    Stage { system: "lpips", knows: lpips::knows, run: lpips::distances },
    Stage { system: "mar", knows: diffusion::knows, run: diffusion::diffusion },
    Stage { system: "mar", knows: mar::knows_masked, run: mar::masked },
    Stage { system: "mar", knows: mar::knows_causal, run: mar::causal },
    Stage { system: "maskgit", knows: maskgit::knows_schedules, run: maskgit::schedules },
    Stage { system: "maskgit", knows: maskgit::knows_transformer, run: maskgit::transformer },
    Stage { system: "mobilenet_v2", knows: mobilenet_v2::knows, run: mobilenet_v2::features },
    Stage { system: "quantizers", knows: codebooks::knows_usage, run: codebooks::usage },
    Stage { system: "quantizers", knows: codebooks::knows_ties, run: codebooks::ties },
    Stage { system: "quantizers", knows: codebooks::knows_factorized, run: codebooks::factorized },
    Stage { system: "rq-vae", knows: rq_vae::knows_tables, run: rq_vae::tables },
    Stage { system: "rq-vae", knows: rq_vae::knows_tokenizer, run: rq_vae::tokenizer },
    Stage { system: "rq-vae", knows: rq_vae::knows_transformer, run: rq_vae::transformer },
    Stage { system: "var", knows: var::knows_resampling, run: var::resampling },
    Stage { system: "var", knows: var::knows_sampling, run: var::sampling },
    Stage { system: "var", knows: var::knows_quantizer, run: var::quantizer },
    Stage { system: "var", knows: var::knows_tokenizer, run: var::tokenizer },
    Stage { system: "var", knows: var::knows_transformer, run: var::transformer },
    Stage { system: "vit-vqgan", knows: gumbel::knows_distances, run: gumbel::distances },
    Stage { system: "vit-vqgan", knows: vit::knows, run: vit::model },
    Stage { system: "vq-vae", knows: codebooks::knows_library, run: codebooks::library },
    Stage { system: "vq-vae", knows: codebooks::knows_sonnet, run: codebooks::sonnet },
    Stage { system: "vqgan", knows: codebooks::knows_taming, run: codebooks::taming },
    Stage { system: "vqgan", knows: net2net::knows_orders, run: net2net::orders },
    Stage { system: "vqgan", knows: net2net::knows_transformer, run: net2net::transformer },
    Stage { system: "vqgan", knows: net2net::knows_window, run: net2net::window },
    Stage { system: "vqgan", knows: vqgan::knows_blocks, run: vqgan::blocks },
    Stage { system: "vqgan", knows: vqgan::knows_model, run: vqgan::model },
];

/// Runs a case.
///
/// # Errors
/// [`smalti_base::Error`] if the case cannot be read, its weights do not fit, or it lacks a tensor. What is not supported is no
/// error here but in the report.
pub fn run(folder: &Path, device: &Device) -> Result<CaseReport> {
    let case = Case::open(folder, device)?;
    let Some(stage) = STAGES.iter().find(|stage| stage.system == case.system && (stage.knows)(&case)) else {
        return unknown(folder, &case);
    };
    let mut comparison = Comparison::new(&case);
    let unsupported = match (stage.run)(&case, &mut comparison) {
        Err(error @ (Error::Unsupported { .. } | Error::Unknown { .. })) => Some(error),
        other => other.map(|()| unread(&case))?,
    };
    let rows = comparison.into_rows();
    let passed = unsupported.is_none() && !rows.is_empty() && rows.iter().all(|row| row.within);
    Ok(CaseReport {
        case: case.title(),
        status: if passed { Status::Passed } else { Status::Failed },
        rows,
        not_compared: case.untouched(),
        error: unsupported.map(|error| error.to_string()),
    })
}

/// Settings that the stage did not look at may mean anything.
fn unread(case: &Case) -> Option<Error> {
    let unread = case.unread();
    let names = unread.iter().map(|key| format!("config.{key}")).collect::<Vec<_>>().join(", ");
    let hint = "nothing here knows what it changes, so what was compared may be something else";
    (!unread.is_empty()).then(|| Error::unsupported(format!("{}: {names}", case.title()), hint))
}

/// The report of a case that no stage runs, with all that was not understood.
fn unknown(folder: &Path, case: &Case) -> Result<CaseReport> {
    let known = STAGES.iter().any(|stage| stage.system == case.system);
    if known && case.is_empty() {
        return Err(Error::file(folder, "holds no io.safetensors"));
    }
    let error = match known {
        true => format!("no stage of {} compares these tensors: {}", case.system, case.untouched().join(", ")),
        false => format!("there is no system {} here", case.system),
    };
    let settings = case.unread();
    let settings = if settings.is_empty() { "none".into() } else { settings.join(", ") };
    Ok(CaseReport {
        case: case.title(),
        status: Status::NotImplemented,
        rows: Vec::new(),
        not_compared: case.untouched(),
        error: Some(format!("{error}; its settings: {settings}")),
    })
}
