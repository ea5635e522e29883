//! The learning rate as a pure function of the step, so that a resumed run continues exactly.

use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result};

/// Linear warm-up, then a fall to a fraction of the peak.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Number of optimiser steps of the whole run.
    pub steps: u64,
    /// Steps of linear warm-up from 0.
    #[serde(default)]
    pub warmup: u64,
    /// Where the warm-up begins, as a fraction of the peak. With it the first step has this rate, step `warmup` the peak and
    /// the last step the final rate; without it no step has rate 0, and the step after the last would have the final rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup_from: Option<f64>,
    /// With `warmup_from`: whether the step after the last one would have the final rate all the same.
    #[serde(default, skip_serializing_if = "is_off")]
    pub open_end: bool,
    /// The rate at the last step as a fraction of the peak: 1 keeps the rate constant, 0 goes down to nothing.
    #[serde(default)]
    pub final_fraction: f64,
    /// The way down.
    #[serde(default, skip_serializing_if = "Fall::is_cosine")]
    pub fall: Fall,
    /// The weight decay at the last step as a multiple of that of the first, which it reaches on half a cosine.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub final_weight_decay: f64,
}

/// How the rate falls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Fall {
    /// Half a cosine.
    #[default]
    Cosine,
    /// The peak for a share of the way, then a straight line.
    Linear {
        /// Share of the way at the peak, 0 <= hold < 1.
        #[serde(default)]
        hold: f64,
    },
    /// Two straight lines that meet half-way between the peak and where one line would be: a slow one, then a fast one.
    Bent {
        /// Share of the way where they meet, 0 < knee < 1.
        knee: f64,
    },
    /// The peak for a share of the way, then by the same factor at each step.
    Exponential {
        /// Share of the way at the peak, 0 <= hold < 1.
        #[serde(default)]
        hold: f64,
    },
}

fn one() -> f64 {
    1.0
}

fn is_off(value: &bool) -> bool {
    !value
}

fn is_one(value: &f64) -> bool {
    *value == 1.0
}

impl Fall {
    fn is_cosine(&self) -> bool {
        *self == Self::Cosine
    }

    /// From 1 at `progress` 0 to `end` at 1.
    fn factor(self, progress: f64, end: f64) -> f64 {
        let line = |rest: f64| end + (1.0 - end) * rest;
        match self {
            Self::Cosine => line(0.5 * (1.0 + (std::f64::consts::PI * progress).cos())),
            Self::Linear { hold } if progress < hold => 1.0,
            Self::Linear { hold } => line((1.0 - progress) / (1.0 - hold)),
            Self::Bent { knee } => {
                let middle = 0.5 * (1.0 + line(1.0 - knee));
                match progress < knee {
                    true => 1.0 + (middle - 1.0) * progress / knee,
                    false => end + (middle - end) * (1.0 - progress) / (1.0 - knee),
                }
            }
            Self::Exponential { hold } if progress < hold => 1.0,
            Self::Exponential { hold } => end.powf((progress - hold) / (1.0 - hold)),
        }
    }
}

impl Schedule {
    /// The factor of the peak rate at `step`, counted from 0.
    pub fn factor(&self, step: u64) -> f64 {
        let closed = self.warmup_from.is_some() && !self.open_end;
        if step < self.warmup {
            return match self.warmup_from {
                Some(first) => first + (1.0 - first) * step as f64 / self.warmup as f64,
                None => (step + 1) as f64 / self.warmup as f64,
            };
        }
        let span = self.steps.saturating_sub(self.warmup + u64::from(closed)).max(1) as f64;
        let progress = ((step - self.warmup) as f64 / span).min(1.0);
        self.fall.factor(progress, self.final_fraction)
    }

    /// Whether a step has the peak rate.
    pub fn reaches_its_peak(&self) -> bool {
        // With a warm-up from somewhere the step after it is the first with the peak, without one the last of it.
        self.warmup == 0 || self.warmup + u64::from(self.warmup_from.is_some()) <= self.steps
    }

    /// The factor of the first step's weight decay at `step`, counted from 0.
    pub fn weight_decay_factor(&self, step: u64) -> f64 {
        let last = self.steps.saturating_sub(1).max(1) as f64;
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * (step as f64 / last).min(1.0)).cos());
        self.final_weight_decay + (1.0 - self.final_weight_decay) * cosine
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the key.
    pub fn check(&self, place: &str) -> Result<()> {
        let refuse = |key: &str, found: f64, expected: &str| {
            Err(Error::invalid(format!("{place}: schedule.{key}"), format!("is {found}, expected {expected}")))
        };
        match self.fall {
            Fall::Linear { hold } | Fall::Exponential { hold } if !(0.0..1.0).contains(&hold) => {
                refuse("fall.hold", hold, "0 <= x < 1")
            }
            Fall::Bent { knee } if !(knee > 0.0 && knee < 1.0) => refuse("fall.knee", knee, "0 < x < 1"),
            Fall::Exponential { .. } if self.final_fraction <= 0.0 => {
                refuse("final_fraction", self.final_fraction, "more than 0 for an exponential fall")
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(text: &str) -> Schedule {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn warms_up_then_falls() {
        let schedule = schedule("steps = 110\nwarmup = 10\nfinal_fraction = 0.1");
        assert!((schedule.factor(0) - 0.1).abs() < 1e-12);
        assert!((schedule.factor(9) - 1.0).abs() < 1e-12);
        assert!((schedule.factor(10) - 1.0).abs() < 1e-12);
        assert!((schedule.factor(60) - 0.55).abs() < 1e-12, "half-way is the middle of 1 and 0.1");
        assert!((schedule.factor(110) - 0.1).abs() < 1e-12);
        assert!((schedule.factor(999) - 0.1).abs() < 1e-12);
        assert_eq!(schedule.weight_decay_factor(50), 1.0);
        assert!(schedule.reaches_its_peak() && !super::Schedule { warmup: 111, ..schedule }.reaches_its_peak());
    }

    #[test]
    fn a_closed_schedule_ends_at_its_last_step() {
        for fall in ["cosine", "linear", "exponential"] {
            let text =
                format!("steps = 111\nwarmup = 10\nwarmup_from = 0.5\nfinal_fraction = 0.1\nfall.kind = '{fall}'");
            let schedule = schedule(&text);
            assert_eq!((schedule.factor(0), schedule.factor(5)), (0.5, 0.75));
            assert!((schedule.factor(10) - 1.0).abs() < 1e-12 && (schedule.factor(110) - 0.1).abs() < 1e-12, "{fall}");
        }
        let open = schedule("steps = 110\nwarmup = 10\nwarmup_from = 0.0\nopen_end = true");
        assert!(open.factor(0) == 0.0 && (open.factor(5) - 0.5).abs() < 1e-12, "the official RQ-VAE's warm-up");
        assert!((open.factor(60) - 0.5).abs() < 1e-12 && open.factor(109) > 0.0 && open.factor(110).abs() < 1e-12);
        let bent = schedule("steps = 101\nwarmup_from = 1.0\nfall = { kind = 'bent', knee = 0.2 }");
        assert!((bent.factor(20) - 0.9).abs() < 1e-12 && (bent.factor(60) - 0.45).abs() < 1e-12);
        let growing = schedule("steps = 101\nfinal_weight_decay = 1.6");
        assert!((growing.weight_decay_factor(50) - 1.3).abs() < 1e-12);
        assert!((growing.weight_decay_factor(100) - 1.6).abs() < 1e-12);
        let wrong = schedule("steps = 9\nfall = { kind = 'linear', hold = 1.0 }");
        assert!(wrong.check("r.toml").unwrap_err().to_string().contains("schedule.fall.hold: is 1"));
    }
}
