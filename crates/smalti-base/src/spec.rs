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

    /// Number of parts that may have codes of their own: levels of a pyramid, depths of a stack, else 1.
    pub fn parts(&self) -> usize {
        match self {
            Self::Grid { .. } | Self::Sequence { .. } => 1,
            Self::Stack { depth, .. } => *depth,
            Self::Pyramid { levels } => levels.len(),
        }
    }

    /// The level or depth of a place.
    pub fn part_of(&self, place: usize) -> usize {
        match self {
            Self::Grid { .. } | Self::Sequence { .. } => 0,
            Self::Stack { depth, .. } => place % (*depth).max(1),
            Self::Pyramid { levels } => {
                let ends = levels.iter().scan(0, |end, (h, w)| {
                    *end += h * w;
                    Some(*end)
                });
                ends.take_while(|end| *end <= place).count()
            }
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

/// Number of codes. In files it is a number or a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Vocabulary {
    /// The same for all tokens.
    One(usize),
    /// One for each level of a pyramid, or for each depth of a stack.
    Each(Vec<usize>),
}

impl Vocabulary {
    /// The largest number of codes: every code is below it.
    pub fn most(&self) -> usize {
        match self {
            Self::One(codes) => *codes,
            Self::Each(codes) => codes.iter().copied().max().unwrap_or_default(),
        }
    }

    /// Number of codes of a level or depth.
    pub fn of(&self, part: usize) -> usize {
        match self {
            Self::One(codes) => *codes,
            Self::Each(codes) => codes.get(part).copied().unwrap_or_default(),
        }
    }

    /// Number of codes, if it is the same for all tokens.
    pub fn single(&self) -> Option<usize> {
        match self {
            Self::One(codes) => Some(*codes),
            Self::Each(_) => None,
        }
    }
}

impl From<usize> for Vocabulary {
    fn from(codes: usize) -> Self {
        Self::One(codes)
    }
}

impl From<Vec<usize>> for Vocabulary {
    fn from(codes: Vec<usize>) -> Self {
        Self::Each(codes)
    }
}

impl std::fmt::Display for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::One(codes) => write!(f, "{codes}"),
            Self::Each(codes) => {
                let codes: Vec<String> = codes.iter().map(usize::to_string).collect();
                write!(f, "{}", codes.join("/"))
            }
        }
    }
}

/// What a token is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// A code, `0..vocabulary`.
    Discrete {
        /// Number of codes.
        vocabulary: Vocabulary,
    },
    /// A vector of numbers.
    Continuous {
        /// Numbers of a token.
        channels: usize,
    },
}

impl std::fmt::Display for TokenKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Discrete { vocabulary } => write!(f, "{vocabulary} codes"),
            Self::Continuous { channels } => write!(f, "vectors of {channels} numbers"),
        }
    }
}

/// Which tokens stand for an image. Two parts fit if their specs are equal.
///
/// On disk the kind is one of the keys `vocabulary` and `channels`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "StoredSpec", into = "StoredSpec")]
pub struct TokenSpec {
    /// Arrangement of the tokens.
    pub layout: Layout,
    /// What a token is.
    pub kind: TokenKind,
    /// Height and width in pixels of the images that the layout belongs to.
    pub image_size: (usize, usize),
}

impl TokenSpec {
    /// Tokens that are codes, `0..vocabulary`.
    pub fn discrete(layout: Layout, vocabulary: impl Into<Vocabulary>, image_size: (usize, usize)) -> Self {
        Self { layout, kind: TokenKind::Discrete { vocabulary: vocabulary.into() }, image_size }
    }

    /// The same kind of tokens for pictures of another size: a grid of `h` by `w`, each token with as many pixels as before.
    pub fn on_grid(&self, h: usize, w: usize) -> Self {
        let ((rows, columns), (height, width)) = (self.layout.finest(), self.image_size);
        let image_size = (height * h / rows.max(1), width * w / columns.max(1));
        Self { layout: Layout::Grid { h, w }, kind: self.kind.clone(), image_size }
    }

    /// Tokens that are vectors of so many channels.
    pub fn continuous(layout: Layout, channels: usize, image_size: (usize, usize)) -> Self {
        Self { layout, kind: TokenKind::Continuous { channels }, image_size }
    }

    /// The largest number of codes of any place, if tokens are codes: every code is below it.
    pub fn vocabulary(&self) -> Option<usize> {
        self.vocabularies().map(Vocabulary::most)
    }

    /// Number of codes of each level or depth, if tokens are codes.
    pub fn vocabularies(&self) -> Option<&Vocabulary> {
        match &self.kind {
            TokenKind::Discrete { vocabulary } => Some(vocabulary),
            TokenKind::Continuous { .. } => None,
        }
    }

    /// Number of codes of a place, if tokens are codes.
    pub fn codes_at(&self, place: usize) -> Option<usize> {
        self.vocabularies().map(|codes| codes.of(self.layout.part_of(place)))
    }

    /// What is wrong with the number of vocabularies, if anything.
    pub fn vocabulary_misfit(&self) -> Option<String> {
        let Some(Vocabulary::Each(codes)) = self.vocabularies() else { return None };
        let parts = self.layout.parts();
        (codes.len() != parts).then(|| {
            format!("{} vocabularies for a {}; expected one number, or a list of {parts}", codes.len(), self.layout)
        })
    }

    /// Numbers of a token, if tokens are vectors.
    pub fn channels(&self) -> Option<usize> {
        match self.kind {
            TokenKind::Discrete { .. } => None,
            TokenKind::Continuous { channels } => Some(channels),
        }
    }

    /// Tokens of one image.
    pub fn length(&self) -> usize {
        self.layout.length()
    }

    /// What is wrong with codes as the tokens of an image, if anything.
    pub fn codes_misfit(&self, codes: &[u32]) -> Option<String> {
        let TokenKind::Discrete { vocabulary } = &self.kind else {
            return Some(format!("codes where tokens are {}", self.kind));
        };
        if codes.len() != self.length() {
            return Some(format!("{} codes for {} places", codes.len(), self.length()));
        }
        if let Vocabulary::One(vocabulary) = vocabulary {
            let wrong = codes.iter().find(|code| **code as usize >= *vocabulary);
            return wrong.map(|code| format!("{code} is not in 0..{vocabulary}"));
        }
        let wrong = codes.iter().zip(0..).find_map(|(code, place)| {
            let vocabulary = vocabulary.of(self.layout.part_of(place));
            (*code as usize >= vocabulary).then_some((code, place, vocabulary))
        });
        wrong.map(|(code, place, vocabulary)| format!("{code} at place {place} is not in 0..{vocabulary}"))
    }

    /// What is wrong with numbers as the tokens of an image, if anything.
    pub fn vectors_misfit(&self, values: &[f32]) -> Option<String> {
        let TokenKind::Continuous { channels } = self.kind else {
            return Some(format!("vectors where tokens are {}", self.kind));
        };
        if values.len() != self.length() * channels {
            return Some(format!("{} numbers for {} places of {channels}", values.len(), self.length()));
        }
        values.iter().any(|value| !value.is_finite()).then(|| "a number is not finite".into())
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
        write!(f, "{} of {} for {h}x{w} pixels", self.layout, self.kind)
    }
}

/// A spec as files hold it.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredSpec {
    layout: Layout,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vocabulary: Option<Vocabulary>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    channels: Option<usize>,
    image_size: (usize, usize),
}

impl From<TokenSpec> for StoredSpec {
    fn from(spec: TokenSpec) -> Self {
        let (vocabulary, channels) = (spec.vocabularies().cloned(), spec.channels());
        Self { layout: spec.layout, vocabulary, channels, image_size: spec.image_size }
    }
}

impl TryFrom<StoredSpec> for TokenSpec {
    type Error = String;

    fn try_from(stored: StoredSpec) -> Result<Self, String> {
        let kind = match (stored.vocabulary, stored.channels) {
            (Some(vocabulary), None) => TokenKind::Discrete { vocabulary },
            (None, Some(channels)) => TokenKind::Continuous { channels },
            (None, None) => return Err("tokens need one of the keys vocabulary and channels".into()),
            (Some(_), Some(_)) => return Err("tokens have vocabulary or channels, not both".into()),
        };
        let spec = Self { layout: stored.layout, kind, image_size: stored.image_size };
        spec.vocabulary_misfit().map_or(Ok(spec), Err)
    }
}

/// The tokens of one image on the host, in the order of the layout.
#[derive(Clone, Debug, PartialEq)]
pub enum Tokens {
    /// A code for each place.
    Discrete(Vec<u32>),
    /// The numbers of each place, one place after the other.
    Continuous(Vec<f32>),
}

impl Tokens {
    /// What is wrong with them as the tokens of a spec, if anything.
    pub fn misfit(&self, spec: &TokenSpec) -> Option<String> {
        match self {
            Self::Discrete(codes) => spec.codes_misfit(codes),
            Self::Continuous(values) => spec.vectors_misfit(values),
        }
    }
}

impl From<Vec<u32>> for Tokens {
    fn from(codes: Vec<u32>) -> Self {
        Self::Discrete(codes)
    }
}

impl From<Vec<f32>> for Tokens {
    fn from(values: Vec<f32>) -> Self {
        Self::Continuous(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<TokenSpec, serde_json::Error> {
        serde_json::from_str(text)
    }

    #[test]
    fn specs_on_disk_say_what_a_token_is() {
        let grid = Layout::Grid { h: 2, w: 3 };
        for (spec, text) in [
            (
                TokenSpec::discrete(grid.clone(), 1024, (32, 48)),
                r#"{"layout":{"kind":"grid","h":2,"w":3},"vocabulary":1024,"image_size":[32,48]}"#,
            ),
            (
                TokenSpec::continuous(grid, 16, (32, 48)),
                r#"{"layout":{"kind":"grid","h":2,"w":3},"channels":16,"image_size":[32,48]}"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&spec).unwrap(), text);
            assert_eq!(read(text).unwrap(), spec);
        }
        let both = r#"{"layout":{"kind":"sequence","n":2},"vocabulary":4,"channels":2,"image_size":[1,1]}"#;
        assert!(read(both).unwrap_err().to_string().contains("not both"));
        assert!(
            read(&both.replace(r#""vocabulary":4,"channels":2,"#, "")).unwrap_err().to_string().contains("need one")
        );
        assert!(read(&both.replace("vocabulary", "vocabular")).unwrap_err().to_string().contains("vocabular"));
    }

    #[test]
    fn vocabularies_of_levels_and_depths() {
        let levels = vec![(1, 1), (2, 2)];
        let text = r#"{"layout":{"kind":"pyramid","levels":[[1,1],[2,2]]},"vocabulary":[9,4],"image_size":[8,8]}"#;
        let pyramid = TokenSpec::discrete(Layout::Pyramid { levels }, vec![9, 4], (8, 8));
        assert_eq!(serde_json::to_string(&pyramid).unwrap(), text);
        assert_eq!(read(text).unwrap(), pyramid);
        assert_eq!((0..5).map(|place| pyramid.codes_at(place).unwrap()).collect::<Vec<_>>(), [9, 4, 4, 4, 4]);
        assert_eq!((pyramid.vocabulary(), pyramid.vocabularies().unwrap().single()), (Some(9), None));
        assert_eq!(Tokens::Discrete(vec![8, 0, 1, 2, 3]).misfit(&pyramid), None);
        assert!(
            Tokens::Discrete(vec![8, 0, 1, 2, 4]).misfit(&pyramid).unwrap().contains("4 at place 4 is not in 0..4")
        );
        assert!(read(&text.replace("[9,4]", "[9,4,4]")).unwrap_err().to_string().contains("expected one number"));
        let stack = TokenSpec::discrete(Layout::Stack { h: 1, w: 2, depth: 3 }, vec![5, 6, 7], (8, 8));
        assert_eq!((0..6).map(|place| stack.codes_at(place).unwrap()).collect::<Vec<_>>(), [5, 6, 7, 5, 6, 7]);
        assert_eq!(stack.to_string(), "1x2x3 stack of 5/6/7 codes for 8x8 pixels");
    }

    #[test]
    fn tokens_that_do_not_fit_say_why() {
        let layout = Layout::Sequence { n: 2 };
        let (codes, vectors) =
            (TokenSpec::discrete(layout.clone(), 4, (1, 1)), TokenSpec::continuous(layout, 3, (1, 1)));
        assert_eq!(Tokens::Discrete(vec![0, 3]).misfit(&codes), None);
        assert_eq!(Tokens::Continuous(vec![0.5; 6]).misfit(&vectors), None);
        for (tokens, spec, part) in [
            (Tokens::Discrete(vec![0, 4]), &codes, "4 is not in 0..4"),
            (Tokens::Discrete(vec![0]), &codes, "1 codes for 2 places"),
            (Tokens::Continuous(vec![0.0; 2]), &codes, "vectors where"),
            (Tokens::Discrete(vec![0, 0]), &vectors, "codes where"),
            (Tokens::Continuous(vec![0.0; 5]), &vectors, "5 numbers"),
            (Tokens::Continuous(vec![f32::NAN; 6]), &vectors, "not finite"),
        ] {
            assert!(tokens.misfit(spec).unwrap().contains(part), "{part}");
        }
    }
}
