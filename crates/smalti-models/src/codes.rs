//! Tokens of a batch of images.

use burn::tensor::{Int, Tensor};

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

    /// Number of images.
    pub fn batch(&self) -> usize {
        match self {
            Self::Discrete(ids) => ids.dims()[0],
            Self::Continuous(vectors) => vectors.dims()[0],
        }
    }
}
