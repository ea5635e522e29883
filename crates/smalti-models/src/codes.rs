//! Tokens of a batch of images.

use burn::tensor::{Int, Tensor};
use smalti_base::{Error, Result, Tokens};

/// The tokens of a batch, in the order of the spec's layout.
#[derive(Clone, Debug)]
pub enum Codes {
    /// Indices into a codebook, `[batch, length]`, each in `0..vocabulary`.
    Discrete(Tensor<2, Int>),
    /// Vectors, `[batch, length, channels]`.
    Continuous(Tensor<3>),
}

impl Codes {
    /// The indices `[batch, length]`, if the codes are discrete.
    pub fn discrete(self) -> Option<Tensor<2, Int>> {
        match self {
            Self::Discrete(ids) => Some(ids),
            Self::Continuous(_) => None,
        }
    }

    /// The vectors `[batch, length, channels]`, if the codes are continuous.
    pub fn continuous(self) -> Option<Tensor<3>> {
        match self {
            Self::Discrete(_) => None,
            Self::Continuous(vectors) => Some(vectors),
        }
    }

    /// Number of images.
    pub fn batch(&self) -> usize {
        match self {
            Self::Discrete(ids) => ids.dims()[0],
            Self::Continuous(vectors) => vectors.dims()[0],
        }
    }

    /// The images `first..first + count`.
    pub fn narrow(&self, first: usize, count: usize) -> Self {
        match self {
            Self::Discrete(ids) => Self::Discrete(ids.clone().narrow(0, first, count)),
            Self::Continuous(vectors) => Self::Continuous(vectors.clone().narrow(0, first, count)),
        }
    }

    /// The tokens of each image on the host. One download.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the device returns something else.
    pub fn to_host(self) -> Result<Vec<Tokens>> {
        let failed = |problem: String| Error::invalid("tokens", problem);
        match self {
            Self::Discrete(ids) => {
                let length = ids.dims()[1].max(1);
                let ids = ids.into_data().convert::<i64>().try_into_vec::<i64>();
                let ids = ids.map_err(|error| failed(format!("{error:?}")))?;
                let row = |row: &[i64]| row.iter().map(|id| u32::try_from(*id)).collect::<Result<Vec<u32>, _>>();
                let rows = ids.chunks_exact(length).map(|ids| row(ids).map(Tokens::Discrete));
                rows.collect::<Result<_, _>>().map_err(|error| failed(error.to_string()))
            }
            Self::Continuous(vectors) => {
                let [_, length, channels] = vectors.dims();
                let values = vectors.into_data().convert::<f32>().try_into_vec::<f32>();
                let values = values.map_err(|error| failed(format!("{error:?}")))?;
                Ok(values
                    .chunks_exact((length * channels).max(1))
                    .map(|row| Tokens::Continuous(row.to_vec()))
                    .collect())
            }
        }
    }
}
