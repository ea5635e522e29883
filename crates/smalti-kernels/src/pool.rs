//! Where many small operations run best.

use burn::tensor::Device;

/// Runs `work`, on the CPU as a task of the thread pool that the operations share: from there its threads need not be
/// woken from outside for each of many small operations.
pub fn on_pool<R: Send>(device: &Device, work: impl FnOnce() -> R + Send) -> R {
    match *device == Device::flex() {
        true => rayon::scope(|_| work()),
        false => work(),
    }
}
