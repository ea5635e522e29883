//! Images in memory: reading them under limits, masks, writing PNG with its parameters, contact sheets.

mod decode;
mod grid;
mod mask;
mod png;

pub use decode::{EXTENSIONS, Limits, decode, open};
pub use grid::grid;
pub use mask::{Mask, decode_mask};
pub use png::{encode_png, parameters, read_parameters, save_png};

use smalti_base::{Error, Result};

/// An RGB image, 8 bits per channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `height * width * 3` bytes, row by row, red first.
    pub pixels: Vec<u8>,
}

impl Image {
    /// An image from its bytes.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a side is 0 or there are not `width * height * 3` bytes.
    pub fn new(width: usize, height: usize, pixels: Vec<u8>) -> Result<Self> {
        let image = Self { width, height, pixels };
        image.check()?;
        Ok(image)
    }

    /// An image of one colour.
    pub fn filled(width: usize, height: usize, colour: [u8; 3]) -> Self {
        Self { width, height, pixels: colour.repeat(width * height) }
    }

    /// An image from planes in -1..1; values outside are clamped and NaN becomes black.
    ///
    /// # Shapes
    /// `signed_chw`: `[3, height, width]`.
    ///
    /// # Errors
    /// As [`Image::new`].
    pub fn from_signed(signed_chw: &[f32], width: usize, height: usize) -> Result<Self> {
        let area = width.saturating_mul(height);
        if signed_chw.len() != area.saturating_mul(3) {
            return Err(wrong_length(width, height, signed_chw.len(), "values"));
        }
        let level = |value: f32| ((value + 1.0) * 127.5).round() as u8;
        let pixels = (0..area).flat_map(|i| [0, 1, 2].map(|c| level(signed_chw[c * area + i]))).collect();
        Self::new(width, height, pixels)
    }

    /// The planes `[3, height, width]`, levels 0..255 mapped to -1..1.
    pub fn to_signed(&self) -> Vec<f32> {
        let mut planes = Vec::with_capacity(self.pixels.len());
        for channel in 0..3 {
            let levels = self.pixels.iter().skip(channel).step_by(3);
            planes.extend(levels.map(|&level| f32::from(level) / 127.5 - 1.0));
        }
        planes
    }

    /// The part that begins at (`left`, `top`).
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is empty or reaches outside.
    pub fn crop(&self, left: usize, top: usize, width: usize, height: usize) -> Result<Self> {
        self.check()?;
        let inside = |start: usize, length: usize, all: usize| start.checked_add(length).is_some_and(|end| end <= all);
        if !inside(left, width, self.width) || !inside(top, height, self.height) {
            return Err(Error::invalid(
                "crop",
                format!("{width}x{height} at {left},{top} is not inside an image of {}x{}", self.width, self.height),
            ));
        }
        let rows = (top..top + height).flat_map(|y| {
            let start = (y * self.width + left) * 3;
            self.pixels[start..start + width * 3].iter().copied()
        });
        Self::new(width, height, rows.collect())
    }

    /// The mirror image, left and right exchanged.
    pub fn flipped(&self) -> Self {
        let mut pixels = Vec::with_capacity(self.pixels.len());
        for row in self.pixels.chunks_exact((self.width * 3).max(1)) {
            pixels.extend(row.as_chunks::<3>().0.iter().rev().flatten());
        }
        Self { width: self.width, height: self.height, pixels }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let bytes = self.width.checked_mul(self.height).and_then(|area| area.checked_mul(3));
        match bytes {
            Some(bytes) if bytes > 0 && bytes == self.pixels.len() => Ok(()),
            _ => Err(wrong_length(self.width, self.height, self.pixels.len(), "bytes")),
        }
    }
}

fn wrong_length(width: usize, height: usize, found: usize, unit: &str) -> Error {
    Error::invalid("image", format!("{found} {unit} are not an RGB image of {width}x{height}"))
}
