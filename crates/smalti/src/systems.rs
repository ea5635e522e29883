//! `systems`: what this build can train, load and run.

use serde::Serialize;
use smalti_models::systems::{self, System};

/// What exists.
#[derive(Clone, Debug, Serialize)]
pub struct SystemsOutcome {
    /// Tokenizers, quantizers and generators.
    pub systems: Vec<System>,
    /// Devices that this build knows by name.
    pub devices: Vec<&'static str>,
}

/// Lists all systems.
pub fn run() -> SystemsOutcome {
    SystemsOutcome { systems: systems::all(), devices: smalti_base::device::known() }
}
