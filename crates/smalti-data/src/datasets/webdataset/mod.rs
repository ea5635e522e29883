//! WebDataset tars: members that share a key are one sample. img2dataset's output can be read as it is.
//!
//! Headers are scanned once; samples are then read by offset, in any order. A tar that is cut off or damaged gives the samples
//! before that place and a warning that names the place. A gzipped tar is unpacked into a nameless temporary file first.

mod scan;
mod tar;

use self::scan::{Found, Scan};
use self::tar::Tar;
use super::labels::number;
use super::metadata::{keywords_of, text_of};
use super::{About, Dataset, Source, check_size, past_end, some_captions};
use serde_json::{Map, Value};
use smalti_base::{Error, Result};
use std::path::{Path, PathBuf};

/// Where a member's bytes are.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u64,
    length: u64,
}

#[derive(Clone, Debug)]
struct Sample {
    key: String,
    tar: u32,
    image: Span,
    text: Option<Span>,
    json: Option<Span>,
    label: Option<u32>,
}

/// Samples in one or more tars, in the order of the tars and of the first member of each sample.
#[derive(Debug)]
pub struct WebDataset {
    path: PathBuf,
    tars: Vec<Tar>,
    samples: Vec<Sample>,
    classes: Vec<String>,
    caption: Option<String>,
    warnings: Vec<String>,
}

impl WebDataset {
    /// Scans `tars`; `path` is what the whole is called. The caption is the `.txt` member, or the JSON member's field `text` or
    /// `caption`; if `caption` is given, that field. The label is the `.cls` member or the JSON member's `label`.
    ///
    /// # Errors
    /// [`Error::Io`] if a tar cannot be read, [`Error::Invalid`] if one is not a tar at all.
    pub fn open(path: &Path, tars: &[PathBuf], caption: Option<&str>) -> Result<Self> {
        let (mut samples, mut labels, mut warnings, mut opened) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut captions = 0;
        for tar in tars {
            let scanned = Tar::open(tar, &mut warnings).and_then(|tar| Ok((Scan::run(&tar, caption)?, tar)));
            let ((found, passed_over), tar) = match scanned {
                // One that is no tar does not take the others with it.
                Err(error @ Error::Invalid { .. }) if tars.len() > 1 => {
                    warnings.push(format!("left out: {error}"));
                    continue;
                }
                scanned => scanned?,
            };
            warnings.extend(passed_over);
            captions += found.iter().filter(|found| found.has_text(caption.is_some())).count();
            for Found { key, image, text, json, label, .. } in found {
                if let Some(image) = image {
                    samples.push(Sample { key, tar: opened.len() as u32, image, text, json, label: None });
                    labels.push(label);
                }
            }
            opened.push(tar);
        }
        if let Some(field) = caption
            && captions == 0
            && !samples.is_empty()
        {
            return Err(Error::file(path, format!("no image has a text in the field `{field}`")));
        }
        warnings.extend(some_captions(path, captions, samples.len()));
        let (labels, classes) = number(labels, path)?;
        for (sample, label) in samples.iter_mut().zip(labels) {
            sample.label = label;
        }
        let (tars, caption) = (opened, caption.map(str::to_string));
        Ok(Self { path: path.to_path_buf(), tars, samples, classes, caption, warnings })
    }

    /// Says what was not read beside the tars.
    pub(super) fn warn(&mut self, warning: String) {
        self.warnings.push(warning);
    }

    fn sample(&self, index: usize) -> Result<&Sample> {
        self.samples.get(index).ok_or_else(|| past_end(&self.path, index, self.samples.len()))
    }

    fn bytes(&self, sample: &Sample, span: Span) -> Result<Vec<u8>> {
        let tar = &self.tars[sample.tar as usize];
        let place = place(&tar.path, span.start);
        check_size(span.length, &place)?;
        let mut bytes = vec![0; span.length as usize];
        let read = tar.read_at(span.start, &mut bytes);
        read.map_err(|e| Error::invalid(place, format!("`{}` cannot be read: {e}", sample.key)))?;
        Ok(bytes)
    }

    /// Caption and keywords.
    fn texts(&self, sample: &Sample) -> Result<(Option<String>, Vec<String>)> {
        let row: Map<String, Value> = match sample.json {
            None => Map::new(),
            Some(span) => serde_json::from_slice(&self.bytes(sample, span)?).map_err(|e| {
                let path = &self.tars[sample.tar as usize].path;
                Error::invalid(place(path, span.start), format!("`{}.json`: {e}", sample.key))
            })?,
        };
        let text = match (&self.caption, sample.text) {
            (None, Some(span)) => {
                let text = String::from_utf8_lossy(&self.bytes(sample, span)?).trim().to_string();
                Some(text).filter(|text| !text.is_empty())
            }
            (caption, _) => text_of(&row, caption.as_deref()),
        };
        Ok((text, keywords_of(&row)))
    }
}

impl Dataset for WebDataset {
    fn kind(&self) -> &'static str {
        "webdataset"
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn len(&self) -> usize {
        self.samples.len()
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn key(&self, index: usize) -> String {
        self.samples.get(index).map(|sample| sample.key.clone()).unwrap_or_default()
    }

    fn about(&self, index: usize) -> Result<About> {
        let sample = self.sample(index)?;
        let (text, keywords) = self.texts(sample)?;
        Ok(About { key: sample.key.clone(), label: sample.label, text, keywords })
    }

    fn bytes(&self, index: usize) -> u64 {
        self.samples.get(index).map_or(0, |sample| sample.image.length)
    }

    fn source(&self, index: usize) -> Result<Source> {
        let sample = self.sample(index)?;
        Ok(Source::Encoded(self.bytes(sample, sample.image)?))
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// Whether a path is a pattern such as `{00000..00010}.tar`.
pub(super) fn is_pattern(path: &Path) -> bool {
    let text = path.to_string_lossy();
    text.contains('{') && text.ends_with(".tar") && !path.exists()
}

/// The paths of a pattern: `a-{00..10}.tar` counts with as many digits as the first number has.
pub(super) fn expand(pattern: &Path) -> Result<Vec<PathBuf>> {
    const MOST: u64 = 1_000_000;
    let text = pattern.to_string_lossy();
    let parts = text.split_once('{').and_then(|(before, rest)| {
        let (range, after) = rest.split_once('}')?;
        let (first, last) = range.split_once("..")?;
        Some((before, first, first.parse::<u64>().ok()?, last.parse::<u64>().ok()?, after))
    });
    match parts {
        Some((before, digits, first, last, after)) if first <= last && last - first < MOST => {
            let width = digits.len();
            Ok((first..=last).map(|n| PathBuf::from(format!("{before}{n:0width$}{after}"))).collect())
        }
        _ => Err(Error::invalid_hint(
            pattern.display(),
            "not a pattern of tars",
            "expected, for example, `folder/{00000..00010}.tar`",
        )),
    }
}

fn place(path: &Path, offset: u64) -> String {
    format!("{}: byte {offset}", path.display())
}
