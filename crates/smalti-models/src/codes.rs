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

    /// An error unless there are codes or finite vectors of each image. Reads a number for each from the device; [`Self::to_host`] sees
    /// it by itself. `names` are the images', if they have any.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the first image without.
    pub fn must_be_whole(&self, names: &[String]) -> Result<()> {
        let broken: Vec<bool> = match self {
            Self::Discrete(ids) | Self::Soft { codes: ids, .. } => {
                host::ints(ids.clone().min_dim(1))?.into_iter().map(|least| least < 0).collect()
            }
            Self::Continuous(vectors) => {
                let [batch, length, channels] = vectors.dims();
                let none = vectors.clone().mul_scalar(0.0).reshape([batch, length * channels]).sum_dim(1);
                host::floats(none)?.into_iter().map(|none| none != 0.0).collect()
            }
        };
        match broken.iter().position(|broken| *broken) {
            Some(image) => Err(not_finite(image, names)),
            None => Ok(()),
        }
    }

    /// The tokens of each image on the host. One download.
    ///
    /// # Errors
    /// As [`Self::to_host_of`].
    pub fn to_host(self) -> Result<Vec<Tokens>> {
        self.to_host_of(&[])
    }

    /// [`Self::to_host`] of images with these names, for messages.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the device returns something else, or an image has no codes or no finite vectors.
    pub fn to_host_of(self, names: &[String]) -> Result<Vec<Tokens>> {
        match self {
            Self::Discrete(ids) | Self::Soft { codes: ids, .. } => {
                let length = ids.dims()[1].max(1);
                let row = |(image, ids): (usize, &[i64])| {
                    let row: Result<Vec<u32>, _> = ids.iter().map(|id| u32::try_from(*id)).collect();
                    row.map(Tokens::Discrete).map_err(|_| not_finite(image, names))
                };
                host::ints(ids)?.chunks_exact(length).enumerate().map(row).collect()
            }
            Self::Continuous(vectors) => {
                let [_, length, channels] = vectors.dims();
                let row = |(image, row): (usize, &[f32])| match row.iter().all(|value| value.is_finite()) {
                    true => Ok(Tokens::Continuous(row.to_vec())),
                    false => Err(not_finite(image, names)),
                };
                host::floats(vectors)?.chunks_exact((length * channels).max(1)).enumerate().map(row).collect()
            }
        }
    }
}

/// What stands in place of the codes of latents that are not finite: no code. It costs no download of its own.
pub const NO_CODE: i32 = -1;

fn not_finite(image: usize, names: &[String]) -> Error {
    let name = names.get(image).cloned().unwrap_or_else(|| format!("image {image} of the batch"));
    Error::invalid_hint(
        name,
        "the tokenizer's latents of it are not finite, so it has no tokens",
        "the tokenizer's weights are too large or damaged: take an earlier checkpoint or the official file",
    )
}
