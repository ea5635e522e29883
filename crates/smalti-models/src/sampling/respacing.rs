//! Which steps of a diffusion are taken in generating.

use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result};
use std::fmt;

/// Which steps of a diffusion are kept in generating: `100` of all, `10,20,30` of equal sections, or `ddim50` at a fixed stride.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Respacing {
    /// Numbers of steps of equal sections, evenly spread in each, its first and last among them.
    Sections(Vec<usize>),
    /// Every s-th step from 0 on, with the smallest s that gives this number.
    Stride(usize),
}

impl Respacing {
    /// The kept ones of `total` steps, ascending.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there are not so many.
    pub fn timesteps(&self, total: usize) -> Result<Vec<usize>> {
        let refuse = || Error::invalid("diffusion steps", format!("`{self}` cannot be taken from {total} steps"));
        match self {
            Self::Stride(count) => {
                let stride = (1..total.max(2)).find(|stride| total.div_ceil(*stride) == *count).ok_or_else(refuse)?;
                Ok((0..total).step_by(stride).collect())
            }
            Self::Sections(counts) => {
                let mut kept = Vec::new();
                let mut start = 0;
                for (section, &count) in counts.iter().enumerate() {
                    let size = total / counts.len() + usize::from(section < total % counts.len());
                    if count == 0 || count > size {
                        return Err(refuse());
                    }
                    let stride = if count == 1 { 1.0 } else { (size - 1) as f64 / (count - 1) as f64 };
                    let mut at = 0.0f64;
                    for _ in 0..count {
                        kept.push(start + at.round_ties_even() as usize);
                        at += stride;
                    }
                    start += size;
                }
                Ok(kept)
            }
        }
    }
}

impl fmt::Display for Respacing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stride(count) => write!(f, "ddim{count}"),
            Self::Sections(counts) => {
                write!(f, "{}", counts.iter().map(usize::to_string).collect::<Vec<String>>().join(","))
            }
        }
    }
}

impl From<Respacing> for String {
    fn from(respacing: Respacing) -> Self {
        respacing.to_string()
    }
}

impl TryFrom<String> for Respacing {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        let number = |text: &str| text.trim().parse::<usize>().ok().filter(|count| *count > 0);
        let read = match text.strip_prefix("ddim") {
            Some(count) => number(count).map(Self::Stride),
            None => text.split(',').map(number).collect::<Option<Vec<usize>>>().map(Self::Sections),
        };
        read.ok_or_else(|| {
            Error::invalid(
                "diffusion steps",
                format!("`{text}` is not a list of diffusion steps; expected, for example, 100 or 10,20,30 or ddim50"),
            )
        })
    }
}

impl std::str::FromStr for Respacing {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::try_from(text.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(text: &str, total: usize) -> Result<Vec<usize>> {
        Respacing::try_from(text.to_string())?.timesteps(total)
    }

    #[test]
    fn kept_steps() {
        assert_eq!(kept("4", 10).unwrap(), [0, 3, 6, 9]);
        assert_eq!(kept("1", 10).unwrap(), [0]);
        assert_eq!(kept("2,3", 10).unwrap(), [0, 4, 5, 7, 9]);
        assert_eq!(kept("ddim5", 10).unwrap(), [0, 2, 4, 6, 8]);
        assert_eq!(kept("10", 10).unwrap(), (0..10).collect::<Vec<_>>());
        for text in ["11", "0", "5,6", "ddim7", "ddim", "x", ""] {
            assert!(kept(text, 10).is_err(), "{text}");
        }
        assert_eq!(Respacing::Sections(vec![10, 20]).to_string(), "10,20");
        assert_eq!(Respacing::Stride(50).to_string(), "ddim50");
    }
}
