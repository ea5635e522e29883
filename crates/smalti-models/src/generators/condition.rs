//! What generators are conditioned on, as tokens in front of the image's.

use super::Condition;
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Layout, Result, TokenSpec, rng::Stream};

/// Which condition a generator understands. Each is a fixed number of ids in front of the image tokens; the null id stands
/// for no condition and for padding.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ConditionConfig {
    /// None.
    #[default]
    None,
    /// One of so many classes.
    Class {
        /// Number of classes.
        classes: usize,
    },
    /// A caption.
    Text {
        /// Number of text tokens.
        vocabulary: usize,
        /// Tokens in front of the image: longer captions are cut, shorter ones padded.
        length: usize,
    },
    /// A code for each place of the image's grid, such as tokens of a depth map (VQGAN).
    Codes {
        /// Number of codes.
        codes: usize,
        /// Rows.
        h: usize,
        /// Columns.
        w: usize,
    },
    /// Where each token lies in the picture, as codes (the official CoordStage). It follows from the picture's size, so that
    /// nothing is said; in a picture larger than the grid a window sees where it is.
    Coordinates {
        /// Number of codes.
        codes: usize,
        /// Rows.
        h: usize,
        /// Columns.
        w: usize,
        /// Pixels of a token along each side.
        pixels: usize,
    },
}

impl ConditionConfig {
    /// The id that stands for no condition; the others are below it.
    pub fn null(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Class { classes } => *classes,
            Self::Text { vocabulary, .. } => *vocabulary,
            Self::Codes { codes, .. } | Self::Coordinates { codes, .. } => *codes,
        }
    }

    /// Whether there is nothing to say: no condition, or one that follows from the size.
    pub fn is_silent(&self) -> bool {
        matches!(self, Self::None | Self::Coordinates { .. })
    }

    /// Ids in front of the image tokens; 1 without a condition, the null id.
    pub fn length(&self) -> usize {
        match self {
            Self::None | Self::Class { .. } => 1,
            Self::Text { length, .. } => *length,
            Self::Codes { h, w, .. } | Self::Coordinates { h, w, .. } => h * w,
        }
    }

    /// # Errors
    /// [`Error::Invalid`] if there are no classes, no text tokens, no codes or no places for them.
    pub fn validate(&self, place: &str) -> Result<()> {
        let problem = match self {
            Self::Class { classes: 0 } => "classes = 0; expected at least 1",
            Self::Text { vocabulary: 0, .. } => "vocabulary = 0; expected at least 1",
            Self::Text { length: 0, .. } => "length = 0; expected at least 1",
            Self::Codes { codes: 0, .. } | Self::Coordinates { codes: 0, .. } => "codes = 0; expected at least 1",
            Self::Codes { h, w, .. } | Self::Coordinates { h, w, .. } if h * w == 0 => {
                "no places for codes; expected h and w of at least 1"
            }
            Self::Coordinates { pixels: 0, .. } => "pixels = 0; expected at least 1",
            _ => return Ok(()),
        };
        Err(Error::invalid(format!("{place}: condition"), problem))
    }

    /// # Errors
    /// [`Error::Unsupported`] unless tokens of this spec can be the condition; `name` says whose they are.
    pub fn must_fit(&self, spec: &TokenSpec, name: &str) -> Result<()> {
        let Self::Codes { codes, h, w } = self else { return Ok(()) };
        let fits = spec.layout == Layout::Grid { h: *h, w: *w } && spec.vocabulary().is_some_and(|have| have <= *codes);
        match fits {
            true => Ok(()),
            false => Err(Error::unsupported(
                format!("{spec} of {name} as the condition"),
                format!("the generator reads a {h}x{w} grid of at most {codes} codes"),
            )),
        }
    }

    /// The ids of one condition, [`Self::length`] of them.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the condition is of another kind or an id is out of range.
    pub fn ids(&self, condition: &Condition) -> Result<Vec<usize>> {
        let mut ids = vec![self.null(); self.length()];
        let given: Vec<usize> = match (self, condition) {
            (Self::Coordinates { codes, h, w, pixels }, Condition::None) => coordinates(*codes, (*h, *w), *pixels),
            (_, Condition::None) => Vec::new(),
            (Self::Class { .. }, Condition::Class(class)) => vec![*class as usize],
            (Self::Text { .. }, Condition::Text(text)) => text.iter().map(|id| *id as usize).collect(),
            (Self::Codes { .. }, Condition::Codes(codes)) => {
                if codes.len() != self.length() {
                    let problem = format!("{} codes for {} places; expected one for each", codes.len(), self.length());
                    return Err(Error::invalid("condition", problem));
                }
                codes.iter().map(|id| *id as usize).collect()
            }
            (_, other) => {
                let problem = format!("a {} was given to a generator that takes {}", kind(other), self.describe());
                return Err(Error::invalid("condition", problem));
            }
        };
        if let Some(id) = given.iter().find(|id| **id >= self.null()) {
            let problem = format!("{} {id} is not in 0..{}", kind(condition), self.null());
            return Err(Error::invalid("condition", problem));
        }
        ids.iter_mut().zip(given).for_each(|(place, id)| *place = id);
        Ok(ids)
    }

    /// The ids of a batch, each condition dropped with probability `dropout`.
    ///
    /// # Shapes
    /// `[b, length]`.
    ///
    /// # Errors
    /// As [`Self::ids`].
    pub fn batch(
        &self,
        conditions: &[Condition],
        dropout: Option<(f32, &mut Stream)>,
        device: &Device,
    ) -> Result<Tensor<2, Int>> {
        let mut flat = Vec::with_capacity(conditions.len() * self.length());
        let mut dropout = dropout;
        for condition in conditions {
            let dropped = dropout.as_mut().is_some_and(|(share, stream)| stream.uniform() < *share);
            flat.extend(self.ids(if dropped { &Condition::None } else { condition })?.iter().map(|id| *id as i32));
        }
        Ok(Tensor::from_data(TensorData::new(flat, [conditions.len(), self.length()]), device))
    }

    fn describe(&self) -> &'static str {
        match self {
            Self::None => "no condition",
            Self::Class { .. } => "a class",
            Self::Text { .. } => "text",
            Self::Codes { .. } => "a code for each place",
            Self::Coordinates { .. } => "nothing beside the size",
        }
    }
}

/// The number of a pixel, counted row by row, as a share of all pixels; its mean over each token's pixels, as one of so many codes.
fn coordinates(codes: usize, (h, w): (usize, usize), pixels: usize) -> Vec<usize> {
    let side = pixels as f64;
    let middle = |token: usize| token as f64 * side + (side - 1.0) / 2.0;
    let (height, width) = (h as f64 * side, w as f64 * side);
    let code = |row, column| {
        let share = (middle(row) * width + middle(column)) / (height * width);
        // A share near 1 would be one code too many.
        ((share * codes as f64).round_ties_even() as usize).min(codes - 1)
    };
    (0..h).flat_map(|row| (0..w).map(move |column| code(row, column))).collect()
}

fn kind(condition: &Condition) -> &'static str {
    match condition {
        Condition::None => "null condition",
        Condition::Class(_) => "class",
        Condition::Text(_) => "text token",
        Condition::Codes(_) => "code",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coordinates_are_means_over_the_pixels_of_a_token() {
        let (codes, h, w, pixels) = (1024, 4, 3, 16);
        let config = ConditionConfig::Coordinates { codes, h, w, pixels };
        let (height, width) = (h * pixels, w * pixels);
        let mean = |row: usize, column: usize| {
            let places =
                (0..pixels * pixels).map(|i| (row * pixels + i / pixels) * width + column * pixels + i % pixels);
            places.map(|place| place as f64 / (height * width) as f64).sum::<f64>() / (pixels * pixels) as f64
        };
        let expected: Vec<usize> =
            (0..h * w).map(|i| (mean(i / w, i % w) * codes as f64).round_ties_even() as usize).collect();
        assert_eq!(config.ids(&Condition::None).unwrap(), expected);
        assert!(config.ids(&Condition::Class(1)).unwrap_err().to_string().contains("nothing beside the size"));
        // So few codes that the last share rounds to 1: the last code.
        let few = ConditionConfig::Coordinates { codes: 2, h: 4, w: 4, pixels: 1 };
        assert_eq!(few.ids(&Condition::None).unwrap().last(), Some(&1));
    }
}
