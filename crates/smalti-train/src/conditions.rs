//! Rows of data sets as conditions: the one place where labels, captions and codes become what a generator is told.

use smalti_base::{Error, Result};
use smalti_data::text::TextTokenizer;
use smalti_models::generators::{Condition, ConditionConfig, Conditions};

/// What a data set says of an image.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts<'a> {
    /// The image's class.
    pub label: Option<u32>,
    /// Its caption.
    pub text: Option<&'a str>,
    /// Codes of another image that belongs to it, such as a depth map.
    pub codes: Option<&'a [u32]>,
}

/// Turns what a data set says into conditions of a generator.
#[derive(Clone, Debug)]
pub struct ConditionReader {
    takes: Conditions,
    text: Option<TextTokenizer>,
}

impl ConditionReader {
    /// For a generator that takes these; `text` makes ids of captions.
    ///
    /// # Errors
    /// [`Error::Invalid`] if captions are taken and there is no text tokenizer, or it has more ids than the generator.
    pub fn new(takes: &Conditions, text: Option<TextTokenizer>) -> Result<Self> {
        match (takes.text(), &text) {
            (Some(_), None) => {
                Err(Error::invalid("condition: text", "is a caption, but there is no text tokenizer to read it"))
            }
            (Some((vocabulary, _)), Some(text)) if text.vocabulary() > vocabulary => Err(Error::invalid(
                "condition: vocabulary",
                format!("is {vocabulary}, but the text tokenizer has {} ids", text.vocabulary()),
            )),
            _ => Ok(Self { takes: takes.clone(), text }),
        }
    }

    /// The condition of an image of which everything that the generator takes is known.
    ///
    /// # Errors
    /// [`Error::Invalid`] at `place` if something is missing or out of range.
    pub fn whole(&self, place: &str, facts: Facts<'_>) -> Result<Condition> {
        must_say(&self.takes, place, facts)?;
        self.known(facts)
    }

    /// The condition of what is known of an image; what is missing is not given.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a caption cannot be encoded.
    pub fn known(&self, facts: Facts<'_>) -> Result<Condition> {
        let mut condition = Condition::none();
        for one in self.takes.all() {
            condition = match (one, &self.text) {
                (ConditionConfig::Class { .. }, _) => {
                    facts.label.into_iter().map(Condition::class).fold(condition, Condition::and)
                }
                (ConditionConfig::Text { .. }, Some(text)) => match facts.text {
                    Some(caption) => condition.and(Condition::text(text.encode(caption)?)),
                    None => condition,
                },
                (ConditionConfig::Codes { .. }, _) => facts
                    .codes
                    .into_iter()
                    .map(|codes| Condition::codes(codes.to_vec()))
                    .fold(condition, Condition::and),
                _ => condition,
            };
        }
        Ok(condition)
    }

    /// What makes ids of captions, if captions are taken.
    pub fn text(&self) -> Option<&TextTokenizer> {
        self.text.as_ref()
    }
}

/// Checks that everything is known of an image that the generator takes.
///
/// # Errors
/// As [`ConditionReader::whole`].
pub fn must_say(takes: &Conditions, place: &str, facts: Facts<'_>) -> Result<()> {
    let missing =
        |what: &str, is: &str| Err(Error::invalid(place, format!("has no {what}, but the model's condition is {is}")));
    for one in takes.all() {
        match one {
            ConditionConfig::Class { classes } => match facts.label {
                Some(label) if label as usize >= *classes => {
                    let problem = format!("has class {label}, but the model has {classes}");
                    return Err(Error::invalid(place, problem));
                }
                None => return missing("class", "a class"),
                Some(_) => {}
            },
            ConditionConfig::Text { .. } if facts.text.is_none() => {
                let problem = "has no caption, but the model's condition is text";
                let hint = "`require_caption = true` in the data's section leaves out images without a caption";
                return Err(Error::invalid_hint(place, problem, hint));
            }
            ConditionConfig::Codes { .. } if facts.codes.is_none() => return missing("codes", "codes"),
            ConditionConfig::Features { .. } | ConditionConfig::Numbers { .. } => {
                return missing("features or numbers", "said by numbers");
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_say_what_the_generator_takes_and_no_more() {
        let text = TextTokenizer::train_bpe(&["a red heart", "a cat"], 300).unwrap();
        let ids = text.encode("a cat").unwrap();
        let takes = Conditions::new([ConditionConfig::Class { classes: 3 }, ConditionConfig::text(300, 8)]);
        let reader = ConditionReader::new(&takes, Some(text.clone())).unwrap();
        let facts = Facts { label: Some(2), text: Some("a cat"), codes: Some(&[1, 2]) };
        let both = Condition::class(2).and(Condition::text(ids));
        assert_eq!(reader.whole("row 1", facts).unwrap(), both);
        assert_eq!(reader.known(Facts { text: None, ..facts }).unwrap(), Condition::class(2));
        let refused = |facts| reader.whole("row 1", facts).unwrap_err().to_string();
        assert!(refused(Facts { text: None, ..facts }).contains("row 1: has no caption"));
        assert!(refused(Facts { label: None, ..facts }).contains("has no class"));
        assert!(refused(Facts { label: Some(3), ..facts }).contains("has class 3, but the model has 3"));
        let small = Conditions::from(ConditionConfig::text(9, 8));
        assert!(ConditionReader::new(&small, Some(text)).unwrap_err().to_string().contains("is 9, but"));
        assert!(ConditionReader::new(&small, None).unwrap_err().to_string().contains("no text tokenizer"));
    }
}
