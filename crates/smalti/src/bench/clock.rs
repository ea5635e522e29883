//! Medians of repeated calls.

use burn::tensor::Device;
use smalti_base::{Error, Result};
use std::time::Instant;

/// Fewest and most rounds of a number.
const ROUNDS: (usize, usize) = (3, 200);

/// Times calls on a device.
pub struct Clock {
    seconds: f64,
    device: Device,
}

impl Clock {
    /// A clock that spends about so many seconds on each number.
    pub fn new(seconds: f64, device: &Device) -> Self {
        Self { seconds, device: device.clone() }
    }

    /// The median of the milliseconds of `calls`, which run in turn: A B A B. One round warms up.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the device fails.
    pub fn alternate<const N: usize>(&self, calls: [&dyn Fn(); N]) -> Result<[f64; N]> {
        let mut first = 0.0;
        for call in calls {
            first += self.once(call)?;
        }
        // The first call is often slower than the others, so that more rounds than this fit.
        let rounds = (1.5 * self.seconds * 1e3 * N as f64 / first.max(1e-3)) as usize;
        let mut times = calls.map(|_| Vec::new());
        for _ in 0..rounds.clamp(ROUNDS.0, ROUNDS.1) {
            for (times, call) in times.iter_mut().zip(calls) {
                times.push(self.once(call)?);
            }
        }
        Ok(times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        }))
    }

    /// The median milliseconds of a call.
    ///
    /// # Errors
    /// As [`Clock::alternate`].
    pub fn median(&self, call: &dyn Fn()) -> Result<f64> {
        self.alternate([call]).map(|[time]| time)
    }

    fn once(&self, call: &dyn Fn()) -> Result<f64> {
        let start = Instant::now();
        call();
        self.device.sync().map_err(|error| Error::invalid("device", format!("{error:?}")))?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }
}
