//! Fresh weights that are the same in each run of a test.

use burn::tensor::Device;
use std::sync::{Mutex, MutexGuard, PoisonError};

static DRAWS: Mutex<()> = Mutex::new(());

/// Seeds the device and holds the process's only random numbers as long as the guard lives, so that tests that run side by side do not
/// draw from each other's.
pub fn seeded(device: &Device, seed: u64) -> MutexGuard<'static, ()> {
    let guard = DRAWS.lock().unwrap_or_else(PoisonError::into_inner);
    device.seed(seed);
    guard
}
