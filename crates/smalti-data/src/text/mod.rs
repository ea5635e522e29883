//! Text to token ids, by a `tokenizer.json` of the `tokenizers` library or one trained on captions.

mod check;

use smalti_base::{Error, Result, files};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::{Lowercase, NFC, Sequence};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer, TokenizerBuilder};

/// The padding token of trained tokenizers; its id is 0.
pub const PADDING: &str = "<pad>";
/// Least vocabulary: every byte and the padding.
pub const LEAST: usize = 257;

/// Turns captions into token ids.
#[derive(Clone, Debug)]
pub struct TextTokenizer {
    inner: Tokenizer,
    /// Most bytes of a text that is encoded.
    longest: usize,
}

impl TextTokenizer {
    /// Reads a `tokenizer.json`. What it says about truncation and padding is dropped: the caller does both.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] if it is not a tokenizer.
    pub fn load(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let text = String::from_utf8(files::read_at_most(path, check::MOST_BYTES)?);
        Self::from_json(&text.map_err(|error| Error::invalid(&name, format!("not a tokenizer: {error}")))?, &name)
    }

    /// [`TextTokenizer::load`] for JSON in memory; `name` is named in errors.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is not a tokenizer.
    pub fn from_json(json: &str, name: &str) -> Result<Self> {
        let failed = |problem: String| Error::invalid(name, format!("not a tokenizer: {}", cut(&problem)));
        let longest = check::check(json).map_err(failed)?;
        // Parsed by a function that the library has compiled: its generic twin takes minutes to compile here.
        let mut inner: Tokenizer = guarded(|| json.parse()).map_err(failed)?;
        guarded(|| inner.with_truncation(None).map(drop)).map_err(failed)?;
        inner.with_padding(None);
        Ok(Self { inner, longest })
    }

    /// Trains byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) on lower-cased captions. Any text can be encoded: there is no
    /// unknown token. Few captions may give fewer tokens than asked for. The same captions give the same tokenizer.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `vocabulary` is below 257 or there are no captions.
    pub fn train_bpe<S: AsRef<str> + Sync>(captions: &[S], vocabulary: usize) -> Result<Self> {
        const PLACE: &str = "text tokenizer";
        let failed = |e: tokenizers::Error| Error::invalid(PLACE, e.to_string());
        if vocabulary < LEAST || captions.is_empty() {
            return Err(Error::invalid(
                PLACE,
                format!(
                    "a vocabulary of {vocabulary} from {} captions; expected at least {LEAST} and 1",
                    captions.len()
                ),
            ));
        }
        let mut tokenizer = TokenizerBuilder::<BPE, Sequence, ByteLevel, ByteLevel, ByteLevel>::new()
            .with_model(BPE::default())
            .with_normalizer(Some(Sequence::new(vec![NFC.into(), Lowercase.into()])))
            .with_pre_tokenizer(Some(ByteLevel::new(true, true, true)))
            .with_decoder(Some(ByteLevel::default()))
            .build()
            .map_err(failed)?;
        let mut trainer = BpeTrainer::builder()
            .vocab_size(vocabulary)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(PADDING, true)])
            .build();
        tokenizer.train(&mut trainer, captions.iter().map(AsRef::as_ref)).map_err(failed)?;
        Ok(Self { inner: tokenizer.into(), longest: check::MOST_TEXT as usize })
    }

    /// The token ids of a text, with the start and end tokens that the tokenizer's file asks for, if any.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tokenizer has no token for a part of the text, or the text is too long.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let failed =
            |problem: String| Error::invalid("text", format!("`{}` cannot be encoded: {}", cut(text), cut(&problem)));
        if text.len() > self.longest {
            return Err(failed(format!("it has {} bytes, expected at most {}", text.len(), self.longest)));
        }
        let encoding = guarded(|| self.inner.encode(text, true)).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of token ids, without special tokens.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tokenizer's file names a decoder that fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        guarded(|| self.inner.decode(ids, true)).map_err(|problem| Error::invalid("text", cut(&problem)))
    }

    /// Ids are below this number.
    pub fn vocabulary(&self) -> usize {
        let most = self.inner.get_vocab(true).into_values().max();
        most.map_or(0, |id| id as usize + 1)
    }

    /// The contents of its `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it cannot be written as JSON.
    pub fn to_json(&self) -> Result<String> {
        self.inner.to_string(true).map_err(|e| Error::invalid("text tokenizer", e.to_string()))
    }

    /// Writes `tokenizer.json`, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: &Path) -> Result<()> {
        files::write_bytes(path, self.to_json()?.as_bytes())
    }
}

/// What the library returns; if it panics on something that was not seen before, that is an error too.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the tokenizers library cannot work with this tokenizer".into()),
    }
}

/// The beginning of a text that may be very long.
fn cut(text: &str) -> String {
    const SHOWN: usize = 200;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_string(),
    }
}
