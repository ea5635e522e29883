//! The learning rate as a pure function of the step, so that a resumed run continues exactly.

use serde::{Deserialize, Serialize};

/// Linear warm-up, then a cosine down to a fraction of the peak.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Number of optimiser steps of the whole run.
    pub steps: u64,
    /// Steps of linear warm-up from 0.
    #[serde(default)]
    pub warmup: u64,
    /// The rate at the last step as a fraction of the peak: 1 keeps the rate constant, 0 goes down to nothing.
    #[serde(default)]
    pub final_fraction: f64,
}

impl Schedule {
    /// The factor of the peak rate at `step`, counted from 0. It is above 0 from the first step on.
    pub fn factor(&self, step: u64) -> f64 {
        if step < self.warmup {
            return (step + 1) as f64 / self.warmup as f64;
        }
        let span = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let progress = ((step - self.warmup) as f64 / span).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        self.final_fraction + (1.0 - self.final_fraction) * cosine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_then_falls() {
        let schedule = Schedule { steps: 110, warmup: 10, final_fraction: 0.1 };
        assert!((schedule.factor(0) - 0.1).abs() < 1e-12);
        assert!((schedule.factor(9) - 1.0).abs() < 1e-12);
        assert!((schedule.factor(10) - 1.0).abs() < 1e-12);
        assert!((schedule.factor(60) - 0.55).abs() < 1e-12, "half-way is the middle of 1 and 0.1");
        assert!((schedule.factor(110) - 0.1).abs() < 1e-12);
        assert!((schedule.factor(999) - 0.1).abs() < 1e-12);
    }
}
