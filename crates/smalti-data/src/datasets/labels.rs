//! Labels as found, as names and as numbers; and views of a data set: other class numbers, fewer images.

use super::{About, Dataset, Source, past_end};
use serde_json::Value;
use smalti_base::{Error, Result};
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

/// Most classes; a larger number is taken for a mistake.
const MOST: u64 = 1 << 20;

/// A label as it stands in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Label {
    Number(u64),
    Name(String),
}

impl Label {
    /// A JSON value as label: null is none, numbers and strings are; anything else is an error text.
    pub(super) fn from_json(value: &Value) -> Result<Option<Self>, String> {
        match value {
            Value::Null => Ok(None),
            Value::String(name) => Ok(Some(Self::Name(name.clone()))),
            Value::Number(number) => match number.as_u64() {
                Some(number) => Ok(Some(Self::Number(number))),
                None => Err(format!("label {number} is not a whole number from 0")),
            },
            other => Err(format!("label {other} is neither a name nor a number")),
        }
    }

    /// A word from a CSV cell or a `.cls` file.
    pub(super) fn from_word(word: &str) -> Option<Self> {
        let word = word.trim();
        match word.parse() {
            _ if word.is_empty() => None,
            Ok(number) => Some(Self::Number(number)),
            Err(_) => Some(Self::Name(word.into())),
        }
    }
}

/// Turns labels into indices and gives the classes' names. Names are sorted; numbers stay what they are, unless names are among
/// them, in which case they are names too.
pub(super) fn number(labels: Vec<Option<Label>>, place: &Path) -> Result<(Vec<Option<u32>>, Vec<String>)> {
    let named = labels.iter().flatten().any(|label| matches!(label, Label::Name(_)));
    if !named {
        let numbers: Vec<Option<u64>> =
            labels.iter().map(|l| l.as_ref().map(|l| if let Label::Number(n) = l { *n } else { 0 })).collect();
        let Some(most) = numbers.iter().flatten().copied().max() else {
            return Ok((vec![None; labels.len()], Vec::new()));
        };
        if most >= MOST {
            return Err(Error::file(place, format!("label {most} is not below {MOST}, the largest number of classes")));
        }
        let indices = numbers.iter().map(|n| n.map(|n| n as u32)).collect();
        return Ok((indices, (0..=most).map(|n| n.to_string()).collect()));
    }
    let name = |label: Label| match label {
        Label::Number(number) => number.to_string(),
        Label::Name(name) => name,
    };
    let names: Vec<Option<String>> = labels.into_iter().map(|l| l.map(name)).collect();
    let classes: Vec<String> = names.iter().flatten().collect::<BTreeSet<_>>().into_iter().cloned().collect();
    let index: HashMap<&String, u32> = classes.iter().zip(0..).collect();
    let indices = names.iter().map(|n| n.as_ref().and_then(|n| index.get(n).copied())).collect();
    Ok((indices, classes))
}

/// A data set whose labels count by another list of names.
pub(super) struct Relabelled {
    dataset: Box<dyn Dataset>,
    classes: Vec<String>,
    new: Vec<u32>,
}

impl Relabelled {
    pub(super) fn new(dataset: Box<dyn Dataset>, classes: &[String]) -> Result<Self> {
        let place = dataset.path().display().to_string();
        let position = |name: &String| {
            let found = classes.iter().position(|c| c == name).and_then(|at| u32::try_from(at).ok());
            found.ok_or_else(|| Error::unknown(&place, "class", name.clone(), classes.to_vec()))
        };
        let new = dataset.classes().iter().map(position).collect::<Result<_>>()?;
        Ok(Self { dataset, classes: classes.to_vec(), new })
    }
}

impl Dataset for Relabelled {
    fn kind(&self) -> &'static str {
        self.dataset.kind()
    }

    fn path(&self) -> &Path {
        self.dataset.path()
    }

    fn len(&self) -> usize {
        self.dataset.len()
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn key(&self, index: usize) -> String {
        self.dataset.key(index)
    }

    fn about(&self, index: usize) -> Result<About> {
        let mut about = self.dataset.about(index)?;
        about.label = about.label.and_then(|old| self.new.get(old as usize).copied());
        Ok(about)
    }

    fn bytes(&self, index: usize) -> u64 {
        self.dataset.bytes(index)
    }

    fn source(&self, index: usize) -> Result<Source> {
        self.dataset.source(index)
    }

    fn warnings(&self) -> &[String] {
        self.dataset.warnings()
    }
}

/// The first images of a data set.
pub(super) struct First {
    pub(super) dataset: Box<dyn Dataset>,
    pub(super) limit: usize,
}

impl Dataset for First {
    fn kind(&self) -> &'static str {
        self.dataset.kind()
    }

    fn path(&self) -> &Path {
        self.dataset.path()
    }

    fn len(&self) -> usize {
        self.limit
    }

    fn classes(&self) -> &[String] {
        self.dataset.classes()
    }

    fn key(&self, index: usize) -> String {
        self.dataset.key(index)
    }

    fn about(&self, index: usize) -> Result<About> {
        match index < self.limit {
            true => self.dataset.about(index),
            false => Err(past_end(self.path(), index, self.limit)),
        }
    }

    fn bytes(&self, index: usize) -> u64 {
        self.dataset.bytes(index)
    }

    fn source(&self, index: usize) -> Result<Source> {
        match index < self.limit {
            true => self.dataset.source(index),
            false => Err(past_end(self.path(), index, self.limit)),
        }
    }

    fn warnings(&self) -> &[String] {
        self.dataset.warnings()
    }
}

/// The images of a data set that have a caption.
pub(super) struct Captioned {
    dataset: Box<dyn Dataset>,
    images: Vec<usize>,
    warnings: Vec<String>,
}

impl Captioned {
    /// Reads all captions. An image whose caption cannot be read has none.
    ///
    /// # Errors
    /// [`Error::Invalid`] if no image has one.
    pub(super) fn new(dataset: Box<dyn Dataset>) -> Result<Self> {
        let has_caption = |index: &usize| {
            dataset.about(*index).is_ok_and(|about| about.text.is_some_and(|text| !text.trim().is_empty()))
        };
        let images: Vec<usize> = (0..dataset.len()).filter(has_caption).collect();
        if images.is_empty() {
            let problem =
                format!("none of its {} images has a caption, and `require_caption` asks for one", dataset.len());
            return Err(Error::file(dataset.path(), problem));
        }
        let mut warnings = dataset.warnings().to_vec();
        match dataset.len() - images.len() {
            0 => {}
            without => {
                warnings.push(format!("{}: left out images without a caption ({without})", dataset.path().display()))
            }
        }
        Ok(Self { dataset, images, warnings })
    }

    fn index(&self, index: usize) -> Result<usize> {
        let image = self.images.get(index).copied();
        image.ok_or_else(|| past_end(self.path(), index, self.images.len()))
    }
}

impl Dataset for Captioned {
    fn kind(&self) -> &'static str {
        self.dataset.kind()
    }

    fn path(&self) -> &Path {
        self.dataset.path()
    }

    fn len(&self) -> usize {
        self.images.len()
    }

    fn classes(&self) -> &[String] {
        self.dataset.classes()
    }

    fn key(&self, index: usize) -> String {
        self.index(index).map(|index| self.dataset.key(index)).unwrap_or_default()
    }

    fn about(&self, index: usize) -> Result<About> {
        self.dataset.about(self.index(index)?)
    }

    fn bytes(&self, index: usize) -> u64 {
        self.index(index).map_or(0, |index| self.dataset.bytes(index))
    }

    fn source(&self, index: usize) -> Result<Source> {
        self.dataset.source(self.index(index)?)
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }
}
