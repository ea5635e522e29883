//! How many threads compute. There is one pool for all kernels, rayon's global one; data workers are threads of their own, as
//! many at most, and sleep while enough batches are ready.

use crate::{Error, Result};

/// Sets the number of threads, once and before anything computes. The default is one for each core, or `RAYON_NUM_THREADS`.
///
/// # Errors
/// [`Error::Invalid`] for 0, and if threads have started already.
pub fn set(threads: usize) -> Result<()> {
    if threads == 0 {
        return Err(Error::invalid("--threads", "is 0, but at least one thread is needed"));
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|error| Error::invalid("--threads", error.to_string()))
}

/// The number of threads that compute.
pub fn count() -> usize {
    rayon::current_num_threads()
}
