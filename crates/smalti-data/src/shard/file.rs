//! The bytes of one shard.

use super::{Origin, RowTokens, TokenRow};
use half::f16;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use smalti_base::{Error, Result, TokenKind, TokenSpec};
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// Vocabularies up to this size are stored as u16.
const NARROW: usize = 1 << 16;
/// Between the keywords of a row.
const SEPARATOR: &str = "\n";

/// Whether a row's tokens have no deviations.
pub(super) fn is_certain(row: &TokenRow) -> bool {
    !matches!(&row.tokens, RowTokens::Continuous { deviations, .. } if !deviations.is_empty())
}

/// A shard's bytes. Equal rows give equal bytes.
pub(super) fn encode(rows: &[TokenRow], origin: &Origin) -> Result<Vec<u8>> {
    let failed = |e: &dyn std::fmt::Display| Error::invalid("token shard", e.to_string());
    let n = rows.len();
    let label = |row: &TokenRow| row.label.and_then(|l| i32::try_from(l).ok()).unwrap_or(-1);
    let labels: Vec<u8> = rows.iter().flat_map(|row| label(row).to_le_bytes()).collect();
    let (keys, key_offsets) = pack(rows.iter().map(|row| row.key.as_str()));
    let (texts, text_offsets) = pack(rows.iter().map(|row| row.text.as_deref().unwrap_or_default()));
    let keywords: Vec<String> = rows.iter().map(|row| row.keywords.join(SEPARATOR)).collect();
    let (keywords, keyword_offsets) = pack(keywords.iter().map(String::as_str));
    let tokens = token_tensors(rows, &origin.spec);
    let mut others = vec![
        ("labels", Dtype::I32, vec![n], &labels),
        ("keys", Dtype::U8, vec![keys.len()], &keys),
        ("key_offsets", Dtype::U64, vec![n + 1], &key_offsets),
        ("texts", Dtype::U8, vec![texts.len()], &texts),
        ("text_offsets", Dtype::U64, vec![n + 1], &text_offsets),
    ];
    if !keywords.is_empty() {
        others.push(("keywords", Dtype::U8, vec![keywords.len()], &keywords));
        others.push(("keyword_offsets", Dtype::U64, vec![n + 1], &keyword_offsets));
    }
    let tokens = tokens.iter().map(|(name, kind, shape, bytes)| (*name, *kind, shape.clone(), bytes));
    let mut views = Vec::new();
    for (name, kind, shape, bytes) in tokens.chain(others) {
        views.push((name, TensorView::new(kind, shape, bytes).map_err(|e| failed(&e))?));
    }
    // One metadata key only: a map with more has no fixed order.
    let about = serde_json::json!({"format": super::FORMAT, "version": super::VERSION, "spec": origin.spec, "tokenizer": origin.tokenizer});
    let metadata = HashMap::from([("smalti".to_string(), about.to_string())]);
    safetensors::serialize(views, Some(metadata)).map_err(|e| failed(&e))
}

/// Name, type, shape and bytes.
type NamedBytes = (&'static str, Dtype, Vec<usize>, Vec<u8>);

/// The tensors that hold the tokens of rows that fit the spec.
fn token_tensors(rows: &[TokenRow], spec: &TokenSpec) -> Vec<NamedBytes> {
    match &spec.kind {
        TokenKind::Discrete { vocabulary } => {
            let wide = vocabulary.most() > NARROW;
            let mut bytes = Vec::with_capacity(rows.len() * spec.length() * if wide { 4 } else { 2 });
            for row in rows {
                let RowTokens::Discrete(codes) = &row.tokens else { continue };
                for code in codes {
                    match wide {
                        true => bytes.extend(code.to_le_bytes()),
                        false => bytes.extend((*code as u16).to_le_bytes()),
                    }
                }
            }
            vec![("codes", if wide { Dtype::U32 } else { Dtype::U16 }, vec![rows.len(), spec.length()], bytes)]
        }
        TokenKind::Continuous { channels } => {
            let (mut all_means, mut all_deviations) = (Vec::new(), Vec::new());
            let half = |value: &f32| f16::from_f32(*value).to_le_bytes();
            for row in rows {
                let RowTokens::Continuous { means, deviations } = &row.tokens else { continue };
                all_means.extend(means.iter().flat_map(half));
                all_deviations.extend(deviations.iter().flat_map(half));
            }
            let shape = vec![rows.len(), spec.length(), *channels];
            let certain = rows.iter().all(is_certain);
            let mut tensors = vec![("means", Dtype::F16, shape.clone(), all_means)];
            tensors.extend((!certain).then_some(("deviations", Dtype::F16, shape, all_deviations)));
            tensors
        }
    }
}

fn pack<'a>(strings: impl Iterator<Item = &'a str>) -> (Vec<u8>, Vec<u8>) {
    let (mut bytes, mut offsets) = (Vec::new(), 0u64.to_le_bytes().to_vec());
    for string in strings {
        bytes.extend_from_slice(string.as_bytes());
        offsets.extend((bytes.len() as u64).to_le_bytes());
    }
    (bytes, offsets)
}

/// A shard in memory, checked: its rows can be read without an error.
#[derive(Debug)]
pub(super) struct Shard {
    bytes: Vec<u8>,
    /// Values of a row's tokens: places, times channels for vectors.
    length: usize,
    tokens: TokenBytes,
    labels: Range<usize>,
    keys: Strings,
    texts: Strings,
    keywords: Option<Strings>,
}

/// Where the tokens are in a shard's bytes.
#[derive(Debug)]
enum TokenBytes {
    Narrow(Range<usize>),
    Wide(Range<usize>),
    Vectors { means: Range<usize>, deviations: Option<Range<usize>> },
}

/// Where strings and their offsets are in a shard's bytes.
#[derive(Debug)]
struct Strings {
    bytes: Range<usize>,
    offsets: Range<usize>,
}

impl Shard {
    /// Reads and checks a shard of `rows` rows.
    pub(super) fn decode(path: &Path, bytes: Vec<u8>, rows: usize, spec: &TokenSpec) -> Result<Self> {
        let broken = |problem: String| Error::file(path, problem);
        let (header, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| broken(e.to_string()))?;
        let find = |name: &str, kind: Dtype, shape: Option<&[usize]>| {
            let info = metadata.info(name).ok_or_else(|| broken(format!("no tensor `{name}`")))?;
            if info.dtype != kind || shape.is_some_and(|shape| shape != info.shape) {
                return Err(broken(format!(
                    "`{name}` is {:?} {:?}; expected {kind:?} {shape:?}",
                    info.dtype, info.shape
                )));
            }
            // The header's length itself takes 8 bytes.
            let (start, end) = info.data_offsets;
            Ok(header + 8 + start..header + 8 + end)
        };
        let places = [rows, spec.length()];
        let (length, tokens) = match &spec.kind {
            TokenKind::Discrete { vocabulary } if vocabulary.most() > NARROW => {
                (spec.length(), TokenBytes::Wide(find("codes", Dtype::U32, Some(&places))?))
            }
            TokenKind::Discrete { .. } => {
                (spec.length(), TokenBytes::Narrow(find("codes", Dtype::U16, Some(&places))?))
            }
            TokenKind::Continuous { channels } => {
                let shape = [rows, spec.length(), *channels];
                let means = find("means", Dtype::F16, Some(&shape))?;
                let uncertain = metadata.info("deviations").is_some();
                let deviations = uncertain.then(|| find("deviations", Dtype::F16, Some(&shape))).transpose()?;
                (spec.length() * channels, TokenBytes::Vectors { means, deviations })
            }
        };
        let strings = |bytes: &str, offsets: &str| {
            Ok(Strings { bytes: find(bytes, Dtype::U8, None)?, offsets: find(offsets, Dtype::U64, Some(&[rows + 1]))? })
        };
        let shard = Self {
            length,
            tokens,
            labels: find("labels", Dtype::I32, Some(&[rows]))?,
            keys: strings("keys", "key_offsets")?,
            texts: strings("texts", "text_offsets")?,
            keywords: metadata.info("keywords").map(|_| strings("keywords", "keyword_offsets")).transpose()?,
            bytes,
        };
        for row in 0..rows {
            if let Some(problem) = shard.tokens(row).misfit(spec) {
                return Err(broken(format!("row {row}: {problem}; the tokens are a {spec}")));
            }
            let mut all = [&shard.keys, &shard.texts].into_iter().chain(&shard.keywords);
            if !all.all(|strings| shard.string(strings, row).is_some()) {
                return Err(broken(format!("row {row}: its key, text or keywords are damaged")));
            }
        }
        Ok(shard)
    }

    pub(super) fn row(&self, row: usize) -> TokenRow {
        let string = |strings| self.string(strings, row).unwrap_or_default().to_string();
        let keywords = self.keywords.as_ref().map(string).unwrap_or_default();
        let label = self.words::<4>(&self.labels).get(row).map_or(-1, |word| i32::from_le_bytes(*word));
        TokenRow {
            key: string(&self.keys),
            tokens: self.tokens(row),
            label: u32::try_from(label).ok(),
            text: Some(string(&self.texts)).filter(|text| !text.is_empty()),
            keywords: keywords.split_terminator(SEPARATOR).map(str::to_string).collect(),
        }
    }

    pub(super) fn tokens(&self, row: usize) -> RowTokens {
        let places = row * self.length..(row + 1) * self.length;
        let halves = |range: &Range<usize>| {
            let words = self.words::<2>(range)[places.clone()].iter();
            words.map(|w| f16::from_le_bytes(*w).to_f32()).collect::<Vec<f32>>()
        };
        match &self.tokens {
            TokenBytes::Wide(codes) => {
                let words = self.words::<4>(codes)[places].iter();
                RowTokens::Discrete(words.map(|w| u32::from_le_bytes(*w)).collect())
            }
            TokenBytes::Narrow(codes) => {
                let words = self.words::<2>(codes)[places].iter();
                RowTokens::Discrete(words.map(|w| u32::from(u16::from_le_bytes(*w))).collect())
            }
            TokenBytes::Vectors { means, deviations } => RowTokens::Continuous {
                means: halves(means),
                deviations: deviations.as_ref().map(halves).unwrap_or_default(),
            },
        }
    }

    fn words<const N: usize>(&self, range: &Range<usize>) -> &[[u8; N]] {
        self.bytes[range.clone()].as_chunks::<N>().0
    }

    /// String `row`; none if its offsets are out of order or it is not UTF-8.
    fn string(&self, strings: &Strings, row: usize) -> Option<&str> {
        let offsets = self.words::<8>(&strings.offsets);
        let offset = |at: usize| usize::try_from(u64::from_le_bytes(*offsets.get(at)?)).ok();
        let bytes = self.bytes[strings.bytes.clone()].get(offset(row)?..offset(row + 1)?)?;
        std::str::from_utf8(bytes).ok()
    }
}
