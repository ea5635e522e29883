//! Tokens of a batch of images.

use crate::host;
use burn::tensor::{Int, Tensor};
use smalti_base::{Error, Result, Tokens};

/// The tokens of a batch, in the order of the spec's layout.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "there are few, and they are handles")]
pub enum Codes {
    /// Indices into a codebook, `[batch, length]`, each in `0..vocabulary`.
    Discrete(Tensor<2, Int>),
    /// Vectors, `[batch, length, channels]`.
    Continuous(Tensor<3>),
    /// Indices that were drawn, and what from: soft targets of a generator's training.
    Soft {
        /// The indices, `[batch, length]`.
        codes: Tensor<2, Int>,
        /// The probability of each code at each place, `[batch, length, vocabulary]`.
        probabilities_blv: Tensor<3>,
    },
}

impl Codes {
    /// The indices `[batch, length]`, if the codes are discrete.
    pub fn discrete(self) -> Option<Tensor<2, Int>> {
        match self {
            Self::Discrete(codes) | Self::Soft { codes, .. } => Some(codes),
            Self::Continuous(_) => None,
        }
    }

    /// The vectors `[batch, length, channels]`, if the codes are continuous.
    pub fn continuous(self) -> Option<Tensor<3>> {
        match self {
            Self::Discrete(_) | Self::Soft { .. } => None,
            Self::Continuous(vectors) => Some(vectors),
        }
    }

    /// Number of images.
    pub fn batch(&self) -> usize {
        match self {
            Self::Discrete(codes) | Self::Soft { codes, .. } => codes.dims()[0],
            Self::Continuous(vectors) => vectors.dims()[0],
        }
    }

    /// The images `first..first + count`.
    pub fn narrow(&self, first: usize, count: usize) -> Self {
        match self {
            Self::Discrete(ids) => Self::Discrete(ids.clone().narrow(0, first, count)),
            Self::Continuous(vectors) => Self::Continuous(vectors.clone().narrow(0, first, count)),
            Self::Soft { codes, probabilities_blv } => Self::Soft {
                codes: codes.clone().narrow(0, first, count),
                probabilities_blv: probabilities_blv.clone().narrow(0, first, count),
            },
        }
    }

    /// The same on the autodiff device, as a constant.
    pub fn autodiff(self) -> Self {
        match self {
            Self::Discrete(codes) => Self::Discrete(codes.autodiff()),
            Self::Continuous(vectors) => Self::Continuous(vectors.autodiff()),
            Self::Soft { codes, probabilities_blv } => {
                Self::Soft { codes: codes.autodiff(), probabilities_blv: probabilities_blv.autodiff() }
            }
        }
    }

    /// The tokens of each image on the host. One download.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the device returns something else.
    pub fn to_host(self) -> Result<Vec<Tokens>> {
        match self {
            Self::Discrete(ids) | Self::Soft { codes: ids, .. } => {
                let length = ids.dims()[1].max(1);
                let ids = host::ints(ids)?;
                let row = |row: &[i64]| row.iter().map(|id| u32::try_from(*id)).collect::<Result<Vec<u32>, _>>();
                let rows = ids.chunks_exact(length).map(|ids| row(ids).map(Tokens::Discrete));
                rows.collect::<Result<_, _>>().map_err(|error| Error::invalid("tokens", error.to_string()))
            }
            Self::Continuous(vectors) => {
                let [_, length, channels] = vectors.dims();
                Ok(host::floats(vectors)?
                    .chunks_exact((length * channels).max(1))
                    .map(|row| Tokens::Continuous(row.to_vec()))
                    .collect())
            }
        }
    }
}
