//! Contact sheets.

use super::Image;
use smalti_base::{Error, Result};

const PAPER: [u8; 3] = [255; 3];
/// Most pixels of a sheet.
const LIMIT: usize = 1 << 28;

/// Places images row by row on white paper, each centred in a cell as large as the largest image, `gap` pixels between cells and
/// around them. Of grey images the sheet is grey.
///
/// # Errors
/// [`Error::Invalid`] without images or columns, or if the sheet would pass 2^28 pixels.
pub fn grid(images: &[Image], columns: usize, gap: usize) -> Result<Image> {
    if images.is_empty() || columns == 0 {
        return Err(Error::invalid("contact sheet", "needs at least one image and one column"));
    }
    let columns = columns.min(images.len());
    let cell_w = images.iter().map(|i| i.width).max().unwrap_or(0);
    let cell_h = images.iter().map(|i| i.height).max().unwrap_or(0);
    let side = |cells: usize, cell: usize| cell.checked_add(gap)?.checked_mul(cells)?.checked_add(gap);
    let (width, height) = match (side(columns, cell_w), side(images.len().div_ceil(columns), cell_h)) {
        (Some(w), Some(h)) if w.checked_mul(h).is_some_and(|area| area <= LIMIT) => (w, h),
        _ => {
            return Err(Error::invalid(
                "contact sheet",
                format!("{} images of {cell_w}x{cell_h}: too large", images.len()),
            ));
        }
    };
    let mut sheet = Image { grey: images.iter().all(|image| image.grey), ..Image::filled(width, height, PAPER) };
    for (i, image) in images.iter().enumerate() {
        image.check()?;
        let left = gap + (i % columns) * (cell_w + gap) + (cell_w - image.width) / 2;
        let top = gap + (i / columns) * (cell_h + gap) + (cell_h - image.height) / 2;
        for (y, row) in image.pixels.chunks_exact(image.width * 3).enumerate() {
            let start = ((top + y) * width + left) * 3;
            sheet.pixels[start..start + row.len()].copy_from_slice(row);
        }
    }
    Ok(sheet)
}
