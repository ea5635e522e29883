//! Images in memory: reading them under limits, masks, writing PNG with its parameters, contact sheets.

mod decode;
mod grid;
mod jpeg;
mod mask;
mod png;

pub use decode::{EXTENSIONS, Limits, decode, decode_as, decode_labels, open, open_as};
pub(crate) use decode::{KINDS, cost};
pub use grid::grid;
pub use mask::{Mask, MaskChannel, decode_mask};
pub use png::{encode_png, parameters, read_parameters, save_png};

use smalti_base::{Error, Planes, Result};

/// An image, 8 bits per channel. It is RGB in memory; in a grey one the three channels of a pixel are equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `height * width * 3` bytes, row by row, red first; in a label map each three are the label.
    pub pixels: Vec<u8>,
    /// Whether it was made as a grey image, and is written as one.
    pub grey: bool,
}

impl Image {
    /// An image from its bytes.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a side is 0 or there are not `width * height * 3` bytes.
    pub fn new(width: usize, height: usize, pixels: Vec<u8>) -> Result<Self> {
        let image = Self { width, height, pixels, grey: false };
        image.check()?;
        Ok(image)
    }

    /// An image of one colour.
    pub fn filled(width: usize, height: usize, colour: [u8; 3]) -> Self {
        Self { width, height, pixels: colour.repeat(width * height), grey: false }
    }

    /// An image from planes in -1..1; values outside are clamped and NaN becomes black. One plane makes a grey image.
    ///
    /// # Shapes
    /// `signed_chw`: `[3, height, width]` or `[1, height, width]`.
    ///
    /// # Errors
    /// As [`Image::new`].
    pub fn from_signed(signed_chw: &[f32], width: usize, height: usize) -> Result<Self> {
        let area = width.saturating_mul(height);
        let level = |value: f32| ((value + 1.0) * 127.5).round() as u8;
        let pixels = match signed_chw.len() {
            len if len == area => signed_chw.iter().flat_map(|value| [level(*value); 3]).collect(),
            len if len == area.saturating_mul(3) => {
                (0..area).flat_map(|i| [0, 1, 2].map(|c| level(signed_chw[c * area + i]))).collect()
            }
            len => return Err(wrong_length(width, height, len, "values")),
        };
        Ok(Self { grey: signed_chw.len() == area, ..Self::new(width, height, pixels)? })
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

    /// One plane of grey `[1, height, width]`, levels 0..255 mapped to -1..1. Colours become grey as PIL's mode `L` has it:
    /// 0.299 red + 0.587 green + 0.114 blue, rounded.
    pub fn to_signed_grey(&self) -> Vec<f32> {
        let luma = |pixel: &[u8; 3]| {
            let [red, green, blue] = pixel.map(u32::from);
            (red * 19_595 + green * 38_470 + blue * 7_471 + 0x8000) >> 16
        };
        self.pixels.as_chunks::<3>().0.iter().map(|pixel| luma(pixel) as f32 / 127.5 - 1.0).collect()
    }

    /// The values that a model takes, `[planes.count(), height, width]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a label that is not a class.
    pub fn planes(&self, planes: Planes) -> Result<Vec<f32>> {
        match planes {
            Planes::Grey => Ok(self.to_signed_grey()),
            Planes::Colour => Ok(self.to_signed()),
            Planes::Labels { classes, shift } => {
                match self.classes(shift).find(|class| usize::from(*class) >= classes) {
                    Some(class) => {
                        let problem = match shift {
                            0 => format!("label {class} is not in 0..{classes}"),
                            _ => format!(
                                "label {}, shifted by {shift}, is not in 0..{classes}",
                                class.wrapping_sub(shift)
                            ),
                        };
                        let hint =
                            "the model has fewer classes, or needs a label_shift that moves the labels into this range";
                        Err(Error::invalid_hint("label map", problem, hint))
                    }
                    None => Ok(self.classes(shift).map(f32::from).collect()),
                }
            }
        }
    }

    /// The labels of a label map, row by row.
    pub fn labels(&self) -> impl Iterator<Item = u8> + '_ {
        self.pixels.iter().step_by(3).copied()
    }

    /// The classes of a label map, see [`Planes::Labels`].
    pub fn classes(&self, shift: u8) -> impl Iterator<Item = u8> + '_ {
        self.labels().map(move |label| label.wrapping_add(shift))
    }

    /// An image from values as [`Self::planes`] gives them; values outside are clamped and NaN becomes 0.
    ///
    /// # Errors
    /// As [`Image::new`].
    pub fn from_planes(planes: Planes, values: &[f32], width: usize, height: usize) -> Result<Self> {
        let Planes::Labels { shift, .. } = planes else {
            return Self::from_signed(values, width, height);
        };
        if values.len() != width.saturating_mul(height) {
            return Err(wrong_length(width, height, values.len(), "labels"));
        }
        let pixels = values.iter().flat_map(|class| [(class.round() as u8).wrapping_sub(shift); 3]).collect();
        Ok(Self { grey: true, ..Self::new(width, height, pixels)? })
    }

    /// An image as people look at it: in a label map each label gets a colour of its own, 0 black.
    pub fn visible(self, planes: Planes) -> Self {
        if !planes.are_labels() {
            return self;
        }
        let palette: Vec<[u8; 3]> = (0..=255).map(label_colour).collect();
        let pixels = self.labels().flat_map(|label| palette[usize::from(label)]).collect();
        Self { pixels, grey: false, ..self }
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
        Ok(Self { grey: self.grey, ..Self::new(width, height, rows.collect())? })
    }

    /// The mirror image, left and right exchanged.
    pub fn flipped(&self) -> Self {
        let mut pixels = Vec::with_capacity(self.pixels.len());
        for row in self.pixels.chunks_exact((self.width * 3).max(1)) {
            pixels.extend(row.as_chunks::<3>().0.iter().rev().flatten());
        }
        Self { pixels, ..*self }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let bytes = self.width.checked_mul(self.height).and_then(|area| area.checked_mul(3));
        match bytes {
            Some(bytes) if bytes > 0 && bytes == self.pixels.len() => Ok(()),
            _ => Err(wrong_length(self.width, self.height, self.pixels.len(), "bytes")),
        }
    }
}

/// The colour of a label. The bits of a label go to the high bits of red, green and blue in turn, as in the palettes of PASCAL VOC:
/// all 256 differ, and small labels differ most.
fn label_colour(label: u8) -> [u8; 3] {
    [0, 1, 2].map(|channel| (0..3).filter(|i| u32::from(label) >> (3 * i + channel) & 1 == 1).map(|i| 128u8 >> i).sum())
}

fn wrong_length(width: usize, height: usize, found: usize, unit: &str) -> Error {
    Error::invalid("image", format!("{found} {unit} do not make an RGB image of {width}x{height}"))
}
