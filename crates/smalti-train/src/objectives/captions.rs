//! Captions that vary in training: words count by themselves, not only as parts of the one caption that an image has.

use super::examples::Opened;
use crate::recipe::CaptionConfig;
use smalti_base::{Error, Result, Rng};
use smalti_data::text::TextTokenizer;
use smalti_models::generators::Given;

/// Draws are apart from those that order the data and those of a step.
const STREAM: u64 = 1 << 33;

/// What the images of a data set can be called.
pub(super) struct Captions {
    config: CaptionConfig,
    rng: Rng,
    text: TextTokenizer,
    /// Caption and keywords of each row.
    phrases: Vec<Vec<String>>,
}

impl Captions {
    /// Reads the phrases of all rows.
    ///
    /// # Errors
    /// [`Error::Invalid`] if no row has keywords; what reading them returns.
    pub(super) fn read(examples: &Opened, config: &CaptionConfig, text: TextTokenizer, seed: u64) -> Result<Self> {
        let phrases = phrases(examples)?;
        Ok(Self { config: config.clone(), rng: Rng::new(seed), text, phrases })
    }

    /// The condition of row `row` in epoch `epoch`; `None` if its caption stays as it is.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the text cannot be encoded.
    pub(super) fn draw(&self, row: usize, epoch: u64) -> Result<Option<Given>> {
        let phrases = &self.phrases[row];
        let mut stream = self.rng.stream(STREAM + row as u64, epoch);
        if phrases.is_empty() || stream.uniform() >= self.config.keywords {
            return Ok(None);
        }
        let count = 1 + stream.below(self.config.most.min(phrases.len()));
        let chosen = stream.permutation(phrases.len()).into_iter().take(count);
        let caption: Vec<&str> = chosen.map(|i| phrases[i].as_str()).collect();
        Ok(Some(Given::Text(self.text.encode(&caption.join(" "))?)))
    }
}

/// The phrases of all rows.
///
/// # Errors
/// [`Error::Invalid`] if no row has keywords; what reading them returns.
pub(super) fn phrases(examples: &Opened) -> Result<Vec<Vec<String>>> {
    let phrases = (0..examples.len()).map(|index| examples.phrases(index)).collect::<Result<Vec<_>>>()?;
    if phrases.iter().all(|phrases| phrases.len() < 2) {
        return Err(Error::invalid_hint(
            examples.place(),
            "has no keywords, but the recipe's task.captions asks for them",
            "if the images have the field `keywords`, run `smalti tokenize` into a new folder; otherwise leave out task.captions",
        ));
    }
    Ok(phrases)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captions_are_made_of_phrases_as_often_as_asked() {
        let phrases: Vec<String> = ["red heart", "love", "card game"].map(str::to_string).to_vec();
        let text = TextTokenizer::train_bpe(&phrases, 300).unwrap();
        let encode = |words: &[&str]| Given::Text(text.encode(&words.join(" ")).unwrap());
        let mut possible = Vec::new();
        for first in &phrases {
            possible.push(encode(&[first]));
            for second in phrases.iter().filter(|second| *second != first) {
                possible.push(encode(&[first, second]));
            }
        }
        let config = CaptionConfig { keywords: 0.25, most: 2 };
        let captions = Captions { config, rng: Rng::new(3), text: text.clone(), phrases: vec![phrases.clone(); 2] };
        let drawn: Vec<Given> = (0..4000).filter_map(|epoch| captions.draw(1, epoch).unwrap()).collect();
        // Four standard deviations of a binomial distribution.
        assert!((drawn.len() as f64 - 1000.0).abs() < 4.0 * (4000.0_f64 * 0.25 * 0.75).sqrt(), "{}", drawn.len());
        assert!(drawn.iter().all(|condition| possible.contains(condition)));
        assert!(possible.iter().all(|condition| drawn.contains(condition)));
        assert_eq!(captions.draw(1, 7).unwrap(), captions.draw(1, 7).unwrap());
        let other = (0..100).any(|epoch| captions.draw(0, epoch).unwrap() != captions.draw(1, epoch).unwrap());
        assert!(other, "rows draw alike");
    }
}
