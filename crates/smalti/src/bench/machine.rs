//! What the machine can do at most.

use super::clock::Clock;
use burn::tensor::{Device, Distribution, Tensor};
use serde::Serialize;
use smalti_base::{Result, threads};

/// Rows and columns of the matrices whose product shows the peak.
const SIDE: usize = 1024;
/// Values that are read for the bandwidth, far more than caches hold.
const VALUES: usize = 1 << 26;

/// A machine and its measured limits.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The processor's name, where the system tells.
    pub processor: String,
    /// Instruction set that the kernels use.
    pub instructions: &'static str,
    /// Threads that compute.
    pub threads: usize,
    /// Product of two 1024x1024 matrices in `f32`: 10^9 operations a second.
    pub gemm_gflops: f64,
    /// Reading 256 MiB in order: 10^9 bytes a second.
    pub read_gbs: f64,
}

impl Machine {
    /// Measures on a device.
    pub(super) fn measure(clock: &Clock, device: &Device) -> Result<Self> {
        let random = || Tensor::<2>::random([SIDE, SIDE], Distribution::Normal(0.0, 1.0), device);
        let (a, b) = (random(), random());
        let product = clock.median(&|| drop(a.clone().matmul(b.clone())))?;
        let values = Tensor::<1>::ones([VALUES], device);
        let read = clock.median(&|| drop(smalti_kernels::sum_of_squares(values.clone())))?;
        Ok(Self {
            processor: processor(),
            instructions: smalti_kernels::instructions(),
            threads: threads::count(),
            gemm_gflops: 2.0 * (SIDE as f64).powi(3) / product / 1e6,
            read_gbs: 4.0 * VALUES as f64 / read / 1e6,
        })
    }
}

fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("model name"));
    let name = line.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim().to_string());
    name.unwrap_or_else(|| std::env::consts::ARCH.to_string())
}

/// Largest resident memory of this process so far in bytes.
pub(super) fn peak_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
