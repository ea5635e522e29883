//! What every verb can be told.

use burn::tensor::Device;
use serde::{Deserialize, Serialize};
use smalti_base::{Result, device, threads};

/// Settings that all verbs share.
///
/// The argument types of this crate carry clap's derive, so that a flag is declared once, with its help, for every front end.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Where to compute: cpu or, for example, cuda, cuda:1, vulkan in a build with that feature [default: the best one present]
    #[arg(long, global = true, value_name = "NAME")]
    pub device: Option<String>,
    /// Seed of all random draws; of several images, image i uses seed + i [default: 0, or the recipe's]
    #[arg(long, global = true, value_name = "N")]
    pub seed: Option<u64>,
    /// Number of threads that compute; at most as many more prepare images [default: one per core]
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<usize>,
    /// Convolve by direct sums on the CPU: slower, with a tenth of the rounding error
    #[arg(long, global = true)]
    pub direct_convolution: bool,
}

impl Settings {
    /// The name of the device that is meant.
    ///
    /// # Errors
    /// As [`device::open`].
    pub fn device_name(&self) -> Result<String> {
        let name = self.device.clone().unwrap_or_else(|| device::best().to_string());
        device::open(&name).map(|_: Device| name)
    }

    /// Applies what holds for the whole process; once, before anything computes.
    ///
    /// # Errors
    /// As [`threads::start`] and [`smalti_kernels::check_environment`].
    pub fn apply(&self) -> Result<()> {
        smalti_kernels::check_environment()?;
        if self.direct_convolution {
            smalti_kernels::set_convolution(smalti_kernels::Convolution::Direct);
        }
        threads::start(self.threads)
    }

    /// The seed, 0 if none was given.
    pub fn seed(&self) -> u64 {
        self.seed.unwrap_or(0)
    }
}
