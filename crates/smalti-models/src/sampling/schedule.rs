//! Mask schedules of MaskGIT (arXiv 2202.04200): which share of the tokens is masked when a share `r` of the way is done.

use serde::{Deserialize, Serialize};
use smalti_base::Error;
use std::fmt;

/// A falling function from 1 at the beginning to 0 at the end. Written `cosine`, `uniform`, `log`, `exp`, or `pow` and an
/// exponent (`pow2`, `pow0.5`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Schedule {
    /// `cos(pi r / 2)`, the paper's choice.
    #[default]
    Cosine,
    /// `1 - r`.
    Uniform,
    /// `1 - r^x`.
    Pow(f32),
    /// `-log2(r) / log2(n)`.
    Log,
    /// `1 - 2^(-log2(n) (1 - r))`.
    Exp,
}

impl Schedule {
    /// The share of `n` tokens that is masked at `progress` in 0..=1, clipped to 1e-6..=1.
    ///
    /// Evaluated in single precision as the official code does: rounding decides how many tokens some steps keep.
    pub fn ratio(self, progress: f32, n: usize) -> f32 {
        let bits = (n as f32).log2();
        let ratio = match self {
            Self::Cosine => (std::f32::consts::FRAC_PI_2 * progress).cos(),
            Self::Uniform => 1.0 - progress,
            Self::Pow(exponent) => 1.0 - progress.powf(exponent),
            Self::Log => -progress.log2() / bits,
            Self::Exp => 1.0 - (-bits * (1.0 - progress)).exp2(),
        };
        // Written so that 0 / 0, for a single token, gives 1.
        if ratio >= 1.0 || ratio.is_nan() { 1.0 } else { ratio.max(1e-6) }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cosine => write!(f, "cosine"),
            Self::Uniform => write!(f, "uniform"),
            Self::Pow(exponent) => write!(f, "pow{exponent}"),
            Self::Log => write!(f, "log"),
            Self::Exp => write!(f, "exp"),
        }
    }
}

impl From<Schedule> for String {
    fn from(schedule: Schedule) -> Self {
        schedule.to_string()
    }
}

impl TryFrom<String> for Schedule {
    type Error = Error;

    fn try_from(name: String) -> Result<Self, Error> {
        let exponent =
            name.strip_prefix("pow").and_then(|x| x.parse::<f32>().ok()).filter(|x| *x > 0.0 && x.is_finite());
        match (name.as_str(), exponent) {
            ("cosine", _) => Ok(Self::Cosine),
            ("uniform", _) => Ok(Self::Uniform),
            ("log", _) => Ok(Self::Log),
            ("exp", _) => Ok(Self::Exp),
            (_, Some(exponent)) => Ok(Self::Pow(exponent)),
            _ => Err(Error::unknown(
                "mask schedule",
                "name",
                name,
                ["cosine", "uniform", "log", "exp", "pow2", "pow0.5"],
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for name in ["cosine", "uniform", "log", "exp", "pow2", "pow0.5"] {
            assert_eq!(Schedule::try_from(name.to_string()).unwrap().to_string(), name);
        }
        assert!(Schedule::try_from("pow-1".to_string()).is_err());
        assert!(Schedule::try_from("cosin".to_string()).unwrap_err().to_string().contains("did you mean `cosine`?"));
    }
}
