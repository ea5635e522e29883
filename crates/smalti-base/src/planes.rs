//! What the values of an image are to a model.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// How an image goes into a model and comes out of it: which planes, and what their values mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Planes {
    /// One plane in -1..1.
    Grey,
    /// Red, green and blue in -1..1.
    #[default]
    Colour,
    /// A label map: one plane of whole numbers, for each pixel its class.
    Labels {
        /// Number of classes, at most 256.
        classes: usize,
        /// What is added to a label of a file to make the class, 255 going on to 0: with 1 the pixels without a label, which have
        /// 255 in many data sets, are class 0.
        shift: u8,
    },
}

impl Planes {
    /// The planes of pictures with so many channels: 1 (grey) or 3 (colour).
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other numbers.
    pub fn of_channels(channels: usize) -> Result<Self> {
        match channels {
            1 => Ok(Self::Grey),
            3 => Ok(Self::Colour),
            _ => Err(Error::unsupported(
                format!("pictures of {channels} channels"),
                "images are read and written with 1 channel (grey) or 3 (RGB), or as label maps",
            )),
        }
    }

    /// Number of planes.
    pub fn count(self) -> usize {
        match self {
            Self::Grey | Self::Labels { .. } => 1,
            Self::Colour => 3,
        }
    }

    /// Whether the values are labels.
    pub fn are_labels(self) -> bool {
        matches!(self, Self::Labels { .. })
    }
}
