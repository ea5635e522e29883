//! Two images of the same size.

use smalti_base::{Error, Result};

/// Two images that are compared: values channel by channel, each channel row by row.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a> {
    pub(crate) left: &'a [f32],
    pub(crate) right: &'a [f32],
    /// Number of channels.
    pub channels: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl<'a> Pair<'a> {
    /// Compares `left` with `right`, both `[channels, height, width]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a slice has another length, or if there are no pixels.
    pub fn new(left: &'a [f32], right: &'a [f32], [channels, height, width]: [usize; 3]) -> Result<Self> {
        let length = channels * height * width;
        if length == 0 || left.len() != length || right.len() != length {
            return Err(Error::invalid(
                "image comparison",
                format!(
                    "images of {} and {} values cannot be compared as {channels}x{height}x{width}",
                    left.len(),
                    right.len()
                ),
            ));
        }
        Ok(Self { left, right, channels, height, width })
    }
}
