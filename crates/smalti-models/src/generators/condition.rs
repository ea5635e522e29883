//! What pictures are conditioned on: what a generator takes, and what is given for a picture.

use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smalti_base::{Error, Layout, Result, TokenSpec, rng::Stream};
use std::fmt;

/// One thing that is given for a picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Given {
    /// A class, counted from 0.
    Class(u32),
    /// Token ids of a caption, without padding.
    Text(Vec<u32>),
    /// A code for each place of an image's grid, row by row.
    Codes(Vec<u32>),
    /// Vectors that a frozen network made, such as a text encoder's, one place after the other.
    Features(Vec<f32>),
    /// Plain numbers, such as the corners of a crop.
    Numbers(Vec<f32>),
}

impl Given {
    fn name(&self) -> &'static str {
        match self {
            Self::Class(_) => "class",
            Self::Text(_) => "text token",
            Self::Codes(_) => "code",
            Self::Features(_) => "features",
            Self::Numbers(_) => "numbers",
        }
    }
}

/// What a picture should show: a list of given things, at most one for each that the generator takes, in any order. Nothing given is
/// no condition.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Condition {
    given: Vec<Given>,
}

impl Condition {
    /// Nothing is asked for.
    pub fn none() -> Self {
        Self::default()
    }

    /// A class, counted from 0.
    pub fn class(class: u32) -> Self {
        Given::Class(class).into()
    }

    /// Token ids of a caption, without padding.
    pub fn text(ids: Vec<u32>) -> Self {
        Given::Text(ids).into()
    }

    /// A code for each place of an image's grid, row by row.
    pub fn codes(codes: Vec<u32>) -> Self {
        Given::Codes(codes).into()
    }

    /// The same with another thing that is given.
    pub fn and(mut self, other: impl Into<Self>) -> Self {
        self.given.extend(other.into().given);
        self
    }

    /// Gives this instead of what was given of its kind.
    pub fn replace(&mut self, given: Given) {
        self.given.retain(|other| std::mem::discriminant(other) != std::mem::discriminant(&given));
        self.given.push(given);
    }

    /// All that is given.
    pub fn given(&self) -> &[Given] {
        &self.given
    }

    /// Whether nothing is given.
    pub fn is_none(&self) -> bool {
        self.given.is_empty()
    }
}

impl From<Given> for Condition {
    fn from(given: Given) -> Self {
        Self { given: vec![given] }
    }
}

/// What fills a caption that is shorter than a generator reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Padding {
    /// The null id, which also stands for no caption.
    #[default]
    Null,
    /// One of the text tokens; a picture without a caption has an empty one.
    Id(u32),
    /// An id of its own for each place, after those of the text tokens (DALL·E).
    PerPlace,
}

impl Padding {
    fn is_null(&self) -> bool {
        *self == Self::Null
    }
}

/// One thing that a generator understands. Each is a fixed number of ids in front of the image tokens; unless padding says otherwise,
/// the null id stands for no condition and for padding.
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
        /// What shorter captions are padded with.
        #[serde(default, skip_serializing_if = "Padding::is_null")]
        padding: Padding,
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
    /// Vectors that a frozen network makes, such as a text encoder's.
    Features {
        /// Most vectors; a picture may have fewer.
        length: usize,
        /// Numbers of a vector.
        channels: usize,
    },
    /// Plain numbers, such as the corners of a crop.
    Numbers {
        /// How many.
        count: usize,
    },
}

impl ConditionConfig {
    /// A caption that the null id pads.
    pub fn text(vocabulary: usize, length: usize) -> Self {
        Self::Text { vocabulary, length, padding: Padding::Null }
    }

    /// Number of ids that can be given; the null id follows them.
    pub fn null(&self) -> usize {
        match self {
            Self::None | Self::Features { .. } | Self::Numbers { .. } => 0,
            Self::Class { classes } => *classes,
            Self::Text { vocabulary, .. } => *vocabulary,
            Self::Codes { codes, .. } | Self::Coordinates { codes, .. } => *codes,
        }
    }

    /// Number of ids in all, those of padding included.
    pub fn rows(&self) -> usize {
        match self {
            Self::Text { vocabulary, length, padding: Padding::PerPlace } => vocabulary + length,
            Self::Text { vocabulary, padding: Padding::Id(_), .. } => *vocabulary,
            Self::Features { .. } | Self::Numbers { .. } => 0,
            _ => self.null() + 1,
        }
    }

    /// Whether there is nothing to say: no condition, or one that follows from the size.
    pub fn is_silent(&self) -> bool {
        matches!(self, Self::None | Self::Coordinates { .. })
    }

    /// Tokens in front of the image tokens; 1 without a condition, the null id.
    pub fn length(&self) -> usize {
        match self {
            Self::None | Self::Class { .. } | Self::Numbers { .. } => 1,
            Self::Text { length, .. } | Self::Features { length, .. } => *length,
            Self::Codes { h, w, .. } | Self::Coordinates { h, w, .. } => h * w,
        }
    }

    /// Whether it is said by ids, not by numbers.
    pub fn has_ids(&self) -> bool {
        !matches!(self, Self::Features { .. } | Self::Numbers { .. })
    }

    /// # Errors
    /// [`Error::Invalid`] for a number that is out of range; `place` says whose condition it is.
    pub(super) fn validate(&self, place: &str) -> Result<()> {
        let problem = match self {
            Self::Class { classes: 0 } => "classes = 0; expected at least 1",
            Self::Text { vocabulary: 0, .. } => "vocabulary = 0; expected at least 1",
            Self::Text { length: 0, .. } => "length = 0; expected at least 1",
            Self::Text { vocabulary, padding: Padding::Id(id), .. } if *id as usize >= *vocabulary => {
                "padding is not one of the vocabulary's ids"
            }
            Self::Codes { codes: 0, .. } | Self::Coordinates { codes: 0, .. } => "codes = 0; expected at least 1",
            Self::Codes { h, w, .. } | Self::Coordinates { h, w, .. } if h * w == 0 => {
                "no places for codes; expected h and w of at least 1"
            }
            Self::Coordinates { pixels: 0, .. } => "pixels = 0; expected at least 1",
            Self::Features { length: 0, .. } | Self::Features { channels: 0, .. } => {
                "length or channels = 0; expected at least 1"
            }
            Self::Numbers { count: 0 } => "count = 0; expected at least 1",
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

    /// Whether a given thing is of this kind.
    pub fn takes(&self, given: &Given) -> bool {
        matches!(
            (self, given),
            (Self::Class { .. }, Given::Class(_))
                | (Self::Text { .. }, Given::Text(_))
                | (Self::Codes { .. }, Given::Codes(_))
                | (Self::Features { .. }, Given::Features(_))
                | (Self::Numbers { .. }, Given::Numbers(_))
        )
    }

    /// What fills place `at` if nothing is said there.
    fn filling(&self, at: usize) -> usize {
        match self {
            Self::Text { padding: Padding::Id(id), .. } => *id as usize,
            Self::Text { vocabulary, padding: Padding::PerPlace, .. } => vocabulary + at,
            _ => self.null(),
        }
    }

    /// The ids of what is given, [`Self::length`] of them.
    fn ids(&self, given: Option<&Given>) -> Result<Vec<usize>> {
        let said: Vec<usize> = match (self, given) {
            (Self::Coordinates { codes, h, w, pixels }, _) => coordinates(*codes, (*h, *w), *pixels),
            (_, Some(Given::Class(class))) => vec![*class as usize],
            (_, Some(Given::Text(text))) => text.iter().map(|id| *id as usize).collect(),
            (_, Some(Given::Codes(codes))) => {
                if codes.len() != self.length() {
                    let problem = format!("{} codes for {} places; expected one for each", codes.len(), self.length());
                    return Err(Error::invalid("condition", problem));
                }
                codes.iter().map(|id| *id as usize).collect()
            }
            _ => Vec::new(),
        };
        if let Some((id, given)) = said.iter().find(|id| **id >= self.null()).zip(given) {
            let problem = format!("{} {id} is not in 0..{}", given.name(), self.null());
            return Err(Error::invalid("condition", problem));
        }
        let mut ids: Vec<usize> = (0..self.length()).map(|at| self.filling(at)).collect();
        ids.iter_mut().zip(said).for_each(|(place, id)| *place = id);
        Ok(ids)
    }

    /// What it is, for messages.
    pub fn describe(&self) -> &'static str {
        match self {
            Self::None => "no condition",
            Self::Class { .. } => "a class",
            Self::Text { .. } => "text",
            Self::Codes { .. } => "a code for each place",
            Self::Coordinates { .. } => "nothing beside the size",
            Self::Features { .. } => "features",
            Self::Numbers { .. } => "numbers",
        }
    }
}

/// The things that a generator understands, in the order of their tokens. In files it is one table, or a list of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conditions(Vec<ConditionConfig>);

impl Conditions {
    /// No condition.
    pub fn none() -> Self {
        Self::default()
    }

    /// These, in this order.
    pub fn new(all: impl IntoIterator<Item = ConditionConfig>) -> Self {
        Self(all.into_iter().filter(|one| *one != ConditionConfig::None).collect())
    }

    /// All of them; none if there is no condition.
    pub fn all(&self) -> &[ConditionConfig] {
        &self.0
    }

    /// Whether there is no condition.
    pub fn is_none(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether there is nothing to say: no condition, or ones that follow from the size.
    pub fn is_silent(&self) -> bool {
        self.0.iter().all(ConditionConfig::is_silent)
    }

    /// The only one; [`ConditionConfig::None`] without a condition.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if there are several; `place` says who takes one only.
    pub fn single(&self, place: &str) -> Result<&ConditionConfig> {
        match self.0.as_slice() {
            [] => Ok(&ConditionConfig::None),
            [one] => Ok(one),
            several => {
                let kinds: Vec<&str> = several.iter().map(ConditionConfig::describe).collect();
                let what = format!("{} together as the condition of {place}", kinds.join(" and "));
                Err(Error::unsupported(what, "it takes one of them"))
            }
        }
    }

    /// Number of classes, if a class is understood.
    pub fn classes(&self) -> Option<usize> {
        self.0.iter().find_map(|one| if let ConditionConfig::Class { classes } = one { Some(*classes) } else { None })
    }

    /// Number of text tokens and of those that are read, if a caption is understood.
    pub fn text(&self) -> Option<(usize, usize)> {
        self.0.iter().find_map(|one| match one {
            ConditionConfig::Text { vocabulary, length, .. } => Some((*vocabulary, *length)),
            _ => None,
        })
    }

    /// The one that reads codes of an image, if there is one.
    pub fn codes(&self) -> Option<&ConditionConfig> {
        self.0.iter().find(|one| matches!(one, ConditionConfig::Codes { .. }))
    }

    /// Tokens in front of the image tokens; 1 without a condition.
    pub fn length(&self) -> usize {
        if self.is_none() { 1 } else { self.0.iter().map(ConditionConfig::length).sum() }
    }

    /// Number of ids of all conditions together; 1 without a condition. The ids of each come after those of the ones before.
    pub fn rows(&self) -> usize {
        if self.is_none() { 1 } else { self.0.iter().map(ConditionConfig::rows).sum() }
    }

    /// The last id: of a single condition that of no condition.
    pub fn null(&self) -> usize {
        self.rows().saturating_sub(1)
    }

    /// # Errors
    /// [`Error::Invalid`] for a number that is out of range or two of a kind; `place` says whose they are.
    pub(super) fn validate(&self, place: &str) -> Result<()> {
        for (i, one) in self.0.iter().enumerate() {
            one.validate(place)?;
            if self.0[..i].iter().any(|other| other.describe() == one.describe()) {
                let problem = format!("{} is there twice; expected each kind once", one.describe());
                return Err(Error::invalid(format!("{place}: condition"), problem));
            }
        }
        Ok(())
    }

    /// # Errors
    /// [`Error::Unsupported`] unless tokens of this spec can be the condition; `name` says whose they are.
    pub fn must_fit(&self, spec: &TokenSpec, name: &str) -> Result<()> {
        self.0.iter().try_for_each(|one| one.must_fit(spec, name))
    }

    /// What is given for each of them, in their order.
    ///
    /// # Errors
    /// [`Error::Invalid`] if something is given that none of them takes, or twice.
    pub fn sorted<'a>(&self, condition: &'a Condition) -> Result<Vec<Option<&'a Given>>> {
        let mut found = vec![None; self.0.len()];
        for given in condition.given() {
            let at = (0..self.0.len()).find(|at| self.0[*at].takes(given) && found[*at].is_none());
            let Some(at) = at else {
                let takes: Vec<&str> = match self.is_none() {
                    true => vec![ConditionConfig::None.describe()],
                    false => self.0.iter().map(ConditionConfig::describe).collect(),
                };
                let problem = format!("a {} was given to a generator that takes {}", given.name(), takes.join(" and "));
                return Err(Error::invalid("condition", problem));
            };
            found[at] = Some(given);
        }
        Ok(found)
    }

    /// The ids of one condition, those of each kind after each other; what is said by numbers has none.
    ///
    /// # Errors
    /// [`Error::Invalid`] if something of another kind is given or an id is out of range.
    pub fn ids(&self, condition: &Condition) -> Result<Vec<usize>> {
        let given = self.sorted(condition)?;
        if self.is_none() {
            return Ok(vec![0]);
        }
        let (mut ids, mut first) = (Vec::with_capacity(self.length()), 0);
        for (one, given) in self.0.iter().zip(given).filter(|(one, _)| one.has_ids()) {
            ids.extend(one.ids(given)?.into_iter().map(|id| first + id));
            first += one.rows();
        }
        Ok(ids)
    }

    /// The ids of a batch, each condition dropped with probability `dropout`.
    ///
    /// # Shapes
    /// `[b, n]`, with [`Self::length`] ids unless some are said by numbers.
    ///
    /// # Errors
    /// As [`Self::ids`].
    pub fn batch(
        &self,
        conditions: &[Condition],
        dropout: Option<(f32, &mut Stream)>,
        device: &Device,
    ) -> Result<Tensor<2, Int>> {
        let mut flat: Vec<i32> = Vec::with_capacity(conditions.len() * self.length());
        let (mut dropout, nothing) = (dropout, Condition::none());
        for condition in conditions {
            let dropped = dropout.as_mut().is_some_and(|(share, stream)| stream.uniform() < *share);
            flat.extend(self.ids(if dropped { &nothing } else { condition })?.iter().map(|id| *id as i32));
        }
        let n = flat.len() / conditions.len().max(1);
        Ok(Tensor::from_data(TensorData::new(flat, [conditions.len(), n]), device))
    }

    /// A condition that fits, for measurements.
    pub fn example(&self) -> Condition {
        let one = |config: &ConditionConfig| match config {
            ConditionConfig::None | ConditionConfig::Coordinates { .. } => Condition::none(),
            ConditionConfig::Class { .. } => Condition::class(0),
            ConditionConfig::Text { length, .. } => Condition::text(vec![0; *length]),
            ConditionConfig::Codes { h, w, .. } => Condition::codes(vec![0; h * w]),
            ConditionConfig::Features { length, channels } => Given::Features(vec![0.0; length * channels]).into(),
            ConditionConfig::Numbers { count } => Given::Numbers(vec![0.0; *count]).into(),
        };
        self.0.iter().fold(Condition::none(), |all, config| all.and(one(config)))
    }
}

impl From<ConditionConfig> for Conditions {
    fn from(one: ConditionConfig) -> Self {
        Self::new([one])
    }
}

impl Serialize for Conditions {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.as_slice() {
            [] => ConditionConfig::None.serialize(serializer),
            [one] => one.serialize(serializer),
            several => several.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Conditions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrMore;
        impl<'de> Visitor<'de> for OneOrMore {
            type Value = Conditions;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table with the key `kind`, or a list of them")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Conditions, A::Error> {
                ConditionConfig::deserialize(MapAccessDeserializer::new(map)).map(Conditions::from)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Conditions, A::Error> {
                let mut all = Vec::new();
                while let Some(one) = list.next_element::<ConditionConfig>()? {
                    all.push(one);
                }
                Ok(Conditions::new(all))
            }
        }
        deserializer.deserialize_any(OneOrMore)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coordinates_are_means_over_the_pixels_of_a_token() {
        let (codes, h, w, pixels) = (1024, 4, 3, 16);
        let config = Conditions::from(ConditionConfig::Coordinates { codes, h, w, pixels });
        let (height, width) = (h * pixels, w * pixels);
        let mean = |row: usize, column: usize| {
            let places =
                (0..pixels * pixels).map(|i| (row * pixels + i / pixels) * width + column * pixels + i % pixels);
            places.map(|place| place as f64 / (height * width) as f64).sum::<f64>() / (pixels * pixels) as f64
        };
        let expected: Vec<usize> =
            (0..h * w).map(|i| (mean(i / w, i % w) * codes as f64).round_ties_even() as usize).collect();
        assert_eq!(config.ids(&Condition::none()).unwrap(), expected);
        assert!(config.ids(&Condition::class(1)).unwrap_err().to_string().contains("nothing beside the size"));
        // So few codes that the last share rounds to 1: the last code.
        let few = Conditions::from(ConditionConfig::Coordinates { codes: 2, h: 4, w: 4, pixels: 1 });
        assert_eq!(few.ids(&Condition::none()).unwrap().last(), Some(&1));
    }

    #[test]
    fn conditions_combine_and_each_has_ids_of_its_own() {
        let both = Conditions::new([ConditionConfig::Class { classes: 3 }, ConditionConfig::text(5, 4)]);
        assert_eq!((both.length(), both.rows()), (5, 4 + 6));
        // The order in which things are given does not count; ids of text come after the four of classes.
        let condition = Condition::text(vec![1, 0]).and(Condition::class(2));
        assert_eq!(both.ids(&condition).unwrap(), [2, 4 + 1, 4, 4 + 5, 4 + 5]);
        assert_eq!(both.ids(&Condition::class(2)).unwrap(), [2, 9, 9, 9, 9]);
        assert_eq!(both.ids(&Condition::none()).unwrap(), [3, 9, 9, 9, 9]);
        let refused = |condition| both.ids(&condition).unwrap_err().to_string();
        assert!(refused(Condition::class(1).and(Condition::class(2))).contains("takes a class and text"));
        assert!(refused(Condition::codes(vec![1])).contains("a code was given"));
        assert!(refused(Condition::text(vec![5])).contains("text token 5 is not in 0..5"));
        assert!(both.single("var").unwrap_err().to_string().contains("a class and text together"));
        let twice = Conditions::new([ConditionConfig::text(5, 4), ConditionConfig::text(9, 4)]);
        assert!(twice.validate("gpt").unwrap_err().to_string().contains("text is there twice"));
    }

    #[test]
    fn padding_is_what_the_system_has() {
        let padded = |padding| Conditions::from(ConditionConfig::Text { vocabulary: 5, length: 4, padding });
        let ids = |padding, text: Vec<u32>| padded(padding).ids(&Condition::text(text)).unwrap();
        assert_eq!(ids(Padding::Null, vec![3]), [3, 5, 5, 5]);
        assert_eq!(ids(Padding::Id(0), vec![3]), [3, 0, 0, 0]);
        assert_eq!(ids(Padding::PerPlace, vec![3, 1]), [3, 1, 7, 8]);
        assert_eq!([Padding::Null, Padding::Id(0), Padding::PerPlace].map(|p| padded(p).rows()), [6, 5, 9]);
        assert_eq!(padded(Padding::Id(0)).ids(&Condition::none()).unwrap(), [0; 4]);
    }

    #[test]
    fn one_condition_is_a_table_several_are_a_list() {
        let read = |text: &str| serde_json::from_str::<Conditions>(text);
        for (conditions, text) in [
            (Conditions::none(), r#"{"kind":"none"}"#),
            (ConditionConfig::Class { classes: 3 }.into(), r#"{"kind":"class","classes":3}"#),
            (
                Conditions::new([ConditionConfig::Class { classes: 3 }, ConditionConfig::text(5, 4)]),
                r#"[{"kind":"class","classes":3},{"kind":"text","vocabulary":5,"length":4}]"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&conditions).unwrap(), text);
            assert_eq!(read(text).unwrap(), conditions);
        }
        let wrong = read(r#"{"kind":"class","classs":3}"#).unwrap_err().to_string();
        assert!(wrong.contains("classs"), "{wrong}");
        assert!(read("3").unwrap_err().to_string().contains("or a list of them"));
    }
}
