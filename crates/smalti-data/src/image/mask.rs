//! Masks for editing: which pixels are to be painted anew.

use super::decode::{Limits, decode_any};
use smalti_base::{Error, Result};

/// Which pixels of an image are to be repainted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `height * width` values, row by row; true where the image is to be repainted.
    pub repaint: Vec<bool>,
}

/// Decodes a mask. In an image with transparent pixels (alpha below 128) those are repainted and colours do not count, so that an
/// erased copy of the image is a mask; in any other image the light pixels (from 128) are.
///
/// # Errors
/// As [`super::decode`].
pub fn decode_mask(bytes: &[u8], name: &str, limits: &Limits) -> Result<Mask> {
    let decoded = decode_any(bytes, name, limits)?;
    let (width, height) = (decoded.width() as usize, decoded.height() as usize);
    let pairs = decoded.into_luma_alpha8().into_raw();
    let pairs = pairs.as_chunks::<2>().0;
    let erased = pairs.iter().any(|[_, alpha]| *alpha < 128);
    let repaint = pairs.iter().map(|[light, alpha]| if erased { *alpha < 128 } else { *light >= 128 }).collect();
    Mask::new(width, height, repaint)
}

impl Mask {
    /// A mask from its values.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a side is 0 or there are not `width * height` values.
    pub fn new(width: usize, height: usize, repaint: Vec<bool>) -> Result<Self> {
        match width.checked_mul(height) {
            Some(area) if area > 0 && area == repaint.len() => Ok(Self { width, height, repaint }),
            _ => {
                Err(Error::invalid("mask", format!("{} values do not make a mask of {width}x{height}", repaint.len())))
            }
        }
    }

    /// The mask on a coarser or finer grid: a cell is repainted if any pixel under it is.
    pub fn on_grid(&self, columns: usize, rows: usize) -> Vec<bool> {
        // Pixels under cell `i` of `n`: never empty, also where cells are smaller than pixels.
        let span = |i: usize, n: usize, all: usize| i * all / n..((i + 1) * all).div_ceil(n);
        let mut cells = Vec::with_capacity(columns.saturating_mul(rows));
        for row in 0..rows {
            for column in 0..columns {
                let mut ys = span(row, rows, self.height);
                cells.push(ys.any(|y| span(column, columns, self.width).any(|x| self.repaint[y * self.width + x])));
            }
        }
        cells
    }
}
