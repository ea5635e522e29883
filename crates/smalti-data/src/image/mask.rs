//! Masks for editing: which pixels are to be painted anew.

use super::Image;
use super::decode::{Limits, decode_any};
use smalti_base::{Error, Result};
use std::collections::HashMap;

/// Of all visible pixels this share must be of a kind for a mask to be of that kind: edges may be soft.
const NEARLY_ALL: f64 = 0.95;

/// What of an image says where to repaint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaskChannel {
    /// Transparent pixels (alpha below 128) are repainted.
    Alpha,
    /// Light pixels (from 128) that are not transparent are repainted.
    Light,
}

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

/// Decodes a mask for `image`.
///
/// Without `channel` it is found out what was meant. An image without transparent pixels is read by its light. One with transparent
/// pixels is read by its alpha if it is the edited image with holes, or any picture of many colours with holes; by its light if
/// its visible pixels are black and white, or white alone, as strokes on a transparent layer are. Anything else could mean both.
///
/// # Errors
/// As [`super::decode`]; [`Error::Invalid`] for a mask that could mean both.
pub fn decode_mask(
    bytes: &[u8],
    name: &str,
    limits: &Limits,
    image: Option<&Image>,
    channel: Option<MaskChannel>,
) -> Result<Mask> {
    let decoded = decode_any(bytes, name, limits)?;
    let (width, height) = (decoded.width() as usize, decoded.height() as usize);
    let pairs = decoded.to_luma_alpha8().into_raw();
    let is_clear = |pair: &[u8; 2]| pair[1] < 128;
    let pairs = pairs.as_chunks::<2>().0;
    let channel = match channel {
        Some(channel) => channel,
        None if !pairs.iter().any(is_clear) => MaskChannel::Light,
        None => {
            let colours = decoded.into_rgba8().into_raw();
            let is_copy = image.is_some_and(|image| {
                (image.width, image.height) == (width, height) && is_erased_copy(image, colours.as_chunks::<4>().0)
            });
            let found = if is_copy { Ok(MaskChannel::Alpha) } else { meant(colours.as_chunks::<4>().0) };
            found.map_err(|problem| {
                let hint = "say what counts: `--mask-channel alpha` repaints its transparent part, `--mask-channel light` its light part";
                Error::invalid_hint(name, format!("the mask can be read in two ways: it has transparent parts, and {problem}"), hint)
            })?
        }
    };
    let repaint = pairs.iter().map(|pair| match channel {
        MaskChannel::Alpha => is_clear(pair),
        MaskChannel::Light => !is_clear(pair) && pair[0] >= 128,
    });
    Mask::new(width, height, repaint.collect())
}

/// Whether the visible pixels are the image's own.
fn is_erased_copy(image: &Image, pixels: &[[u8; 4]]) -> bool {
    let visible = pixels.iter().zip(image.pixels.as_chunks::<3>().0).filter(|(pixel, _)| pixel[3] >= 128);
    let (mut all, mut same) = (0usize, 0usize);
    for (pixel, own) in visible {
        all += 1;
        // Another program may have saved it in a lossy format.
        same += usize::from(pixel.iter().zip(own).all(|(a, b)| a.abs_diff(*b) <= 8));
    }
    all > 0 && same as f64 >= NEARLY_ALL * all as f64
}

/// What a mask with transparent pixels means by itself, or why that cannot be told.
fn meant(pixels: &[[u8; 4]]) -> std::result::Result<MaskChannel, &'static str> {
    let (mut all, mut grey, mut black, mut white) = (0usize, 0usize, 0usize, 0usize);
    let mut colours: HashMap<[u8; 3], usize> = HashMap::new();
    for [colour @ .., alpha] in pixels {
        if *alpha < 128 {
            continue;
        }
        let (least, most) = colour.iter().fold((255, 0), |(least, most): (u8, u8), c| (least.min(*c), most.max(*c)));
        all += 1;
        grey += usize::from(most - least <= 16);
        black += usize::from(most <= 32);
        white += usize::from(least >= 223);
        *colours.entry(colour.map(|c| c >> 4)).or_default() += 1;
    }
    let nearly_all = |count: usize| count as f64 >= NEARLY_ALL * all as f64;
    let mut counts: Vec<usize> = colours.into_values().collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    match () {
        () if all == 0 => Err("nothing of it is visible"),
        () if nearly_all(black + white) && white > 0 => Ok(MaskChannel::Light),
        () if nearly_all(black) => Err("all that is visible is black"),
        () if nearly_all(grey) => Err("all that is visible is grey"),
        () if nearly_all(counts.iter().take(4).sum()) => Err("what is visible has few colours, as strokes have"),
        () => Ok(MaskChannel::Alpha),
    }
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
