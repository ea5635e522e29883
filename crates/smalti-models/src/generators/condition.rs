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
}

impl ConditionConfig {
    /// The id that stands for no condition; the others are below it.
    pub fn null(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Class { classes } => *classes,
            Self::Text { vocabulary, .. } => *vocabulary,
            Self::Codes { codes, .. } => *codes,
        }
    }

    /// Ids in front of the image tokens; 1 without a condition, the null id.
    pub fn length(&self) -> usize {
        match self {
            Self::None | Self::Class { .. } => 1,
            Self::Text { length, .. } => *length,
            Self::Codes { h, w, .. } => h * w,
        }
    }

    /// # Errors
    /// [`Error::Invalid`] if there are no classes, no text tokens, no codes or no places for them.
    pub fn validate(&self, place: &str) -> Result<()> {
        let problem = match self {
            Self::Class { classes: 0 } => "classes = 0; expected at least 1",
            Self::Text { vocabulary: 0, .. } => "vocabulary = 0; expected at least 1",
            Self::Text { length: 0, .. } => "length = 0; expected at least 1",
            Self::Codes { codes: 0, .. } => "codes = 0; expected at least 1",
            Self::Codes { h, w, .. } if h * w == 0 => "no places for codes; expected h and w of at least 1",
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
        }
    }
}

fn kind(condition: &Condition) -> &'static str {
    match condition {
        Condition::None => "null condition",
        Condition::Class(_) => "class",
        Condition::Text(_) => "text token",
        Condition::Codes(_) => "code",
    }
}
