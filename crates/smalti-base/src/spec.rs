//! The contract between stages: which tokens a tokenizer makes and a generator predicts.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// How an image's tokens are arranged. Tokens are stored in raster order, coarse levels before fine ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Layout {
    /// One grid, row by row (VQGAN).
    Grid {
        /// Rows.
        h: usize,
        /// Columns.
        w: usize,
    },
    /// A sequence without geometry (TiTok).
    Sequence {
        /// Tokens.
        n: usize,
    },
    /// A grid with several codes at each place, depth innermost (RQ-VAE).
    Stack {
        /// Rows.
        h: usize,
        /// Columns.
        w: usize,
        /// Codes at each place.
        depth: usize,
    },
    /// Several grids, coarse to fine (VAR, VQ-VAE-2).
    Pyramid {
        /// Rows and columns of each level.
        levels: Vec<(usize, usize)>,
    },
}

impl Layout {
    /// Tokens of one image.
    pub fn length(&self) -> usize {
        match self {
            Self::Grid { h, w } => h * w,
            Self::Sequence { n } => *n,
            Self::Stack { h, w, depth } => h * w * depth,
            Self::Pyramid { levels } => levels.iter().map(|(h, w)| h * w).sum(),
        }
    }

    /// Rows and columns of the finest level, which are those of the tokenizer's latents; a sequence is one row.
    pub fn finest(&self) -> (usize, usize) {
        match self {
            Self::Grid { h, w } | Self::Stack { h, w, .. } => (*h, *w),
            Self::Sequence { n } => (1, *n),
            Self::Pyramid { levels } => levels.last().copied().unwrap_or_default(),
        }
    }
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Grid { h, w } => write!(f, "{h}x{w} grid"),
            Self::Sequence { n } => write!(f, "sequence of {n}"),
            Self::Stack { h, w, depth } => write!(f, "{h}x{w}x{depth} stack"),
            Self::Pyramid { levels } => {
                let sizes: Vec<String> = levels.iter().map(|(h, w)| format!("{h}x{w}")).collect();
                write!(f, "pyramid of {}", sizes.join(", "))
            }
        }
    }
}

/// Which tokens stand for an image. Two parts fit if their specs are equal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenSpec {
    /// Arrangement of the tokens.
    pub layout: Layout,
    /// Number of codes; tokens are `0..vocabulary`.
    pub vocabulary: usize,
    /// Height and width in pixels of the images that the layout belongs to.
    pub image_size: (usize, usize),
}

impl TokenSpec {
    /// Tokens of one image.
    pub fn length(&self) -> usize {
        self.layout.length()
    }

    /// An error that shows both specs, unless they are equal.
    ///
    /// # Errors
    /// [`Error::Mismatch`] with both names.
    pub fn must_equal(&self, name: &str, other: &Self, other_name: &str) -> Result<()> {
        if self == other {
            return Ok(());
        }
        Err(Error::Mismatch {
            what: format!("the tokens of {name} and {other_name}"),
            left_name: name.into(),
            left: self.to_string(),
            right_name: other_name.into(),
            right: other.to_string(),
            hint: Some("a generator works only with the tokenizer whose tokens it was trained on".into()),
        })
    }
}

impl std::fmt::Display for TokenSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (h, w) = self.image_size;
        write!(f, "{} of {} codes for {h}x{w} pixels", self.layout, self.vocabulary)
    }
}
