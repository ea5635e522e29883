//! How many threads compute. There is one pool for all kernels, rayon's global one; data workers are threads of their own, as
//! many at most, and sleep while enough batches are ready.

use crate::{Error, Result};

/// More are taken for a mistake: each costs the system memory, and starting them takes long.
pub const MOST: usize = 1024;

/// What the pool itself reads.
const VARIABLE: &str = "RAYON_NUM_THREADS";

/// Starts the threads, once and before anything computes. The default is one for each core, or `RAYON_NUM_THREADS`.
///
/// # Errors
/// [`Error::Invalid`] for 0 or more than [`MOST`], if threads have started already, or if the system does not allow so many.
pub fn start(threads: Option<usize>) -> Result<()> {
    let (place, asked) = match threads {
        Some(threads) => ("--threads", threads),
        None => (VARIABLE, of_environment(std::env::var(VARIABLE).ok().as_deref())?),
    };
    if threads == Some(0) {
        return Err(Error::invalid(place, "is 0, but at least one thread is needed"));
    }
    if asked > MOST {
        return Err(Error::invalid(place, format!("is {asked}, expected 1 to {MOST}")));
    }
    // 0 stands for one for each core.
    rayon::ThreadPoolBuilder::new().num_threads(asked).build_global().map_err(|error| {
        let asked = if asked == 0 { "one for each core".to_string() } else { asked.to_string() };
        Error::invalid_hint(
            "threads",
            format!("cannot be started ({asked}): {error}"),
            "give fewer with --threads, or raise the limit of processes (ulimit -u)",
        )
    })
}

/// [`start`] with a number.
///
/// # Errors
/// As [`start`].
pub fn set(threads: usize) -> Result<()> {
    start(Some(threads))
}

/// The number that the environment asks for; 0 is one for each core.
fn of_environment(value: Option<&str>) -> Result<usize> {
    match value.map(str::trim).filter(|value| !value.is_empty()) {
        None => Ok(0),
        Some(value) => value.parse().map_err(|_| Error::invalid(VARIABLE, format!("is `{value}`, expected a number"))),
    }
}

/// The number of threads that compute.
pub fn count() -> usize {
    rayon::current_num_threads()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_bounded_before_a_thread_starts() {
        assert!(set(0).unwrap_err().to_string().contains("--threads: is 0"));
        assert!(set(100_000).unwrap_err().to_string().contains("is 100000"));
        assert_eq!((of_environment(None).unwrap(), of_environment(Some(" 3 ")).unwrap()), (0, 3));
        assert!(of_environment(Some("many")).unwrap_err().to_string().contains("RAYON_NUM_THREADS"));
    }
}
