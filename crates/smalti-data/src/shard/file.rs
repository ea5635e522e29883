//! The bytes of one shard.

use super::{Origin, TokenRow};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use smalti_base::{Error, Result, TokenSpec};
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// Vocabularies up to this size are stored as u16.
const NARROW: usize = 1 << 16;
/// Between the keywords of a row.
const SEPARATOR: &str = "\n";

/// A shard's bytes. Equal rows give equal bytes.
pub(super) fn encode(rows: &[TokenRow], origin: &Origin) -> Result<Vec<u8>> {
    let failed = |e: &dyn std::fmt::Display| Error::invalid("token shard", e.to_string());
    let wide = origin.spec.vocabulary > NARROW;
    let mut codes = Vec::with_capacity(rows.len() * origin.spec.length() * if wide { 4 } else { 2 });
    for code in rows.iter().flat_map(|row| &row.codes) {
        match wide {
            true => codes.extend(code.to_le_bytes()),
            false => codes.extend((*code as u16).to_le_bytes()),
        }
    }
    let label = |row: &TokenRow| row.label.and_then(|l| i32::try_from(l).ok()).unwrap_or(-1);
    let labels: Vec<u8> = rows.iter().flat_map(|row| label(row).to_le_bytes()).collect();
    let (keys, key_offsets) = pack(rows.iter().map(|row| row.key.as_str()));
    let (texts, text_offsets) = pack(rows.iter().map(|row| row.text.as_deref().unwrap_or_default()));
    let keywords: Vec<String> = rows.iter().map(|row| row.keywords.join(SEPARATOR)).collect();
    let (keywords, keyword_offsets) = pack(keywords.iter().map(String::as_str));
    let n = rows.len();
    let code_type = if wide { Dtype::U32 } else { Dtype::U16 };
    let mut tensors = vec![
        ("codes", code_type, vec![n, origin.spec.length()], &codes),
        ("labels", Dtype::I32, vec![n], &labels),
        ("keys", Dtype::U8, vec![keys.len()], &keys),
        ("key_offsets", Dtype::U64, vec![n + 1], &key_offsets),
        ("texts", Dtype::U8, vec![texts.len()], &texts),
        ("text_offsets", Dtype::U64, vec![n + 1], &text_offsets),
    ];
    if !keywords.is_empty() {
        tensors.push(("keywords", Dtype::U8, vec![keywords.len()], &keywords));
        tensors.push(("keyword_offsets", Dtype::U64, vec![n + 1], &keyword_offsets));
    }
    let mut views = Vec::new();
    for (name, kind, shape, bytes) in tensors {
        views.push((name, TensorView::new(kind, shape, bytes).map_err(|e| failed(&e))?));
    }
    // One metadata key only: a map with more has no fixed order.
    let about = serde_json::json!({"format": super::FORMAT, "version": super::VERSION, "spec": origin.spec, "tokenizer": origin.tokenizer});
    let metadata = HashMap::from([("smalti".to_string(), about.to_string())]);
    safetensors::serialize(views, Some(metadata)).map_err(|e| failed(&e))
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
    length: usize,
    wide: bool,
    codes: Range<usize>,
    labels: Range<usize>,
    keys: Strings,
    texts: Strings,
    keywords: Option<Strings>,
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
        let wide = spec.vocabulary > NARROW;
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
        let strings = |bytes: &str, offsets: &str| {
            Ok(Strings { bytes: find(bytes, Dtype::U8, None)?, offsets: find(offsets, Dtype::U64, Some(&[rows + 1]))? })
        };
        let code_type = if wide { Dtype::U32 } else { Dtype::U16 };
        let shard = Self {
            length: spec.length(),
            wide,
            codes: find("codes", code_type, Some(&[rows, spec.length()]))?,
            labels: find("labels", Dtype::I32, Some(&[rows]))?,
            keys: strings("keys", "key_offsets")?,
            texts: strings("texts", "text_offsets")?,
            keywords: metadata.info("keywords").map(|_| strings("keywords", "keyword_offsets")).transpose()?,
            bytes,
        };
        for row in 0..rows {
            if let Some(code) = shard.codes(row).into_iter().find(|&code| code as usize >= spec.vocabulary) {
                return Err(broken(format!("row {row} has code {code}, the vocabulary is {}", spec.vocabulary)));
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
            codes: self.codes(row),
            label: u32::try_from(label).ok(),
            text: Some(string(&self.texts)).filter(|text| !text.is_empty()),
            keywords: keywords.split_terminator(SEPARATOR).map(str::to_string).collect(),
        }
    }

    fn codes(&self, row: usize) -> Vec<u32> {
        let places = row * self.length..(row + 1) * self.length;
        match self.wide {
            true => self.words::<4>(&self.codes)[places].iter().map(|w| u32::from_le_bytes(*w)).collect(),
            false => self.words::<2>(&self.codes)[places].iter().map(|w| u32::from(u16::from_le_bytes(*w))).collect(),
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
