//! WebDataset tars: members that share a key are one sample. img2dataset's output can be read as it is.
//!
//! Headers are scanned once; samples are then read by offset, in any order. A tar that is cut off or damaged gives the samples
//! before that place and a warning that names the place.

use super::folder::{keywords_of, text_of};
use super::labels::{Label, number};
use super::{About, Dataset, Source, check_size, past_end};
use crate::image::EXTENSIONS;
use serde_json::{Map, Value};
use smalti_base::{Error, Result};
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Most bytes of a caption, a metadata record or a long member name.
const SMALL: u64 = 1 << 20;
const BLOCK: u64 = 512;

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
    tars: Vec<PathBuf>,
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
        let (mut samples, mut labels, mut warnings) = (Vec::new(), Vec::new(), Vec::new());
        for (tar, tar_index) in tars.iter().zip(0u32..) {
            let mut scan = Scan::new(tar)?;
            scan.run()?;
            let mut imageless = 0;
            for found in scan.found {
                match found.image {
                    None => imageless += 1,
                    Some(image) => {
                        let Found { key, text, json, .. } = found;
                        samples.push(Sample { key, tar: tar_index, image, text, json, label: None });
                        labels.push(found.label);
                    }
                }
            }
            warnings.extend(scan.warnings);
            if imageless > 0 {
                warnings.push(format!("{}: {imageless} keys without an image were left out", tar.display()));
            }
        }
        let (labels, classes) = number(labels, path)?;
        for (sample, label) in samples.iter_mut().zip(labels) {
            sample.label = label;
        }
        let (tars, caption) = (tars.to_vec(), caption.map(str::to_string));
        Ok(Self { path: path.to_path_buf(), tars, samples, classes, caption, warnings })
    }

    fn sample(&self, index: usize) -> Result<&Sample> {
        self.samples.get(index).ok_or_else(|| past_end(&self.path, index, self.samples.len()))
    }

    fn bytes(&self, sample: &Sample, span: Span) -> Result<Vec<u8>> {
        let path = &self.tars[sample.tar as usize];
        check_size(span.length, &place(path, span.start))?;
        let mut bytes = vec![0; span.length as usize];
        // Opened for each read: a data set may have more tars than a process may have open files.
        let read = File::open(path).and_then(|mut file| {
            file.seek(SeekFrom::Start(span.start))?;
            file.read_exact(&mut bytes)
        });
        read.map_err(|e| Error::invalid(place(path, span.start), format!("`{}` cannot be read: {e}", sample.key)))?;
        Ok(bytes)
    }

    /// Caption and keywords.
    fn texts(&self, sample: &Sample) -> Result<(Option<String>, Vec<String>)> {
        let row: Map<String, Value> = match sample.json {
            None => Map::new(),
            Some(span) => serde_json::from_slice(&self.bytes(sample, span)?).map_err(|e| {
                let path = &self.tars[sample.tar as usize];
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

/// What the members with one key amount to.
#[derive(Debug, Default)]
struct Found {
    key: String,
    image: Option<Span>,
    text: Option<Span>,
    json: Option<Span>,
    label: Option<Label>,
}

/// One pass over a tar's headers.
struct Scan<'a> {
    path: &'a Path,
    size: u64,
    found: Vec<Found>,
    by_key: HashMap<String, usize>,
    warnings: Vec<String>,
}

impl<'a> Scan<'a> {
    fn new(path: &'a Path) -> Result<Self> {
        let size = std::fs::metadata(path).map_err(|e| Error::io("read", path, e))?.len();
        Ok(Self { path, size, found: Vec::new(), by_key: HashMap::new(), warnings: Vec::new() })
    }

    fn run(&mut self) -> Result<()> {
        let file = File::open(self.path).map_err(|e| Error::io("read", self.path, e))?;
        let mut reader = BufReader::new(file);
        let (mut offset, mut long_name) = (0, None);
        loop {
            let header = match self.header(&mut reader, offset)? {
                Some(header) => header,
                None => return Ok(()),
            };
            let span = Span { start: offset + BLOCK, length: header.entry_size().unwrap_or(u64::MAX) };
            let end = span.start.saturating_add(span.length);
            if end > self.size {
                self.stop(offset, format!("cut off: a member ends at byte {end}, the file at {}", self.size))?;
                return Ok(());
            }
            let kind = header.entry_type();
            if kind.is_gnu_longname() || kind.is_pax_local_extensions() {
                let bytes = if self.is_small(span) { self.small(&mut reader, span)? } else { Vec::new() };
                let name = if kind.is_gnu_longname() { gnu_name(&bytes) } else { pax_name(&bytes) };
                long_name = name.or(long_name);
            } else {
                let name =
                    long_name.take().unwrap_or_else(|| String::from_utf8_lossy(&header.path_bytes()).into_owned());
                if kind.is_file() {
                    self.member(&mut reader, &name, span)?;
                }
            }
            // No overflow: `end` is within the file.
            offset = end.div_ceil(BLOCK) * BLOCK;
        }
    }

    /// The header at `offset`; none at the end, and where nothing can follow.
    fn header(&mut self, reader: &mut BufReader<File>, offset: u64) -> Result<Option<tar::Header>> {
        if offset + BLOCK > self.size {
            self.stop(offset, "cut off: no end mark".into())?;
            return Ok(None);
        }
        let mut header = tar::Header::new_old();
        let read = seek(reader, offset).and_then(|()| reader.read_exact(header.as_mut_bytes()));
        read.map_err(|e| Error::io("read", self.path, e))?;
        if header.as_bytes().iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        let bytes = header.as_bytes();
        // The checksum counts its own field as blanks.
        let sum: u32 =
            bytes[..148].iter().chain(&bytes[156..]).map(|&b| u32::from(b)).sum::<u32>() + 8 * u32::from(b' ');
        if header.cksum().ok() != Some(sum) {
            self.stop(offset, "damaged: not a tar header".into())?;
            return Ok(None);
        }
        Ok(Some(header))
    }

    /// Notes where the scan ended early. At the very start the file is not a tar.
    fn stop(&mut self, offset: u64, problem: String) -> Result<()> {
        let place = place(self.path, offset);
        if offset == 0 {
            return Err(Error::invalid(place, problem));
        }
        self.warnings.push(format!("{place}: {problem}; {} samples before it are used", self.found.len()));
        Ok(())
    }

    fn is_small(&mut self, span: Span) -> bool {
        if span.length > SMALL {
            self.warnings.push(format!(
                "{}: {} bytes of metadata were left out",
                place(self.path, span.start),
                span.length
            ));
        }
        span.length <= SMALL
    }

    fn small(&self, reader: &mut BufReader<File>, span: Span) -> Result<Vec<u8>> {
        let mut bytes = vec![0; span.length as usize];
        let read = seek(reader, span.start).and_then(|()| reader.read_exact(&mut bytes));
        read.map_err(|e| Error::io("read", self.path, e))?;
        Ok(bytes)
    }

    fn member(&mut self, reader: &mut BufReader<File>, name: &str, span: Span) -> Result<()> {
        let name = name.strip_prefix("./").unwrap_or(name);
        let base = name.rfind('/').map_or(0, |at| at + 1);
        // The key ends at the first dot of the base name: `a/b.seg.png` is the member `seg.png` of `a/b`.
        let Some(dot) = name[base..].find('.').filter(|&dot| dot > 0) else { return Ok(()) };
        let (key, extension) = (&name[..base + dot], name[base + dot + 1..].to_lowercase());
        let image = EXTENSIONS.contains(&extension.as_str());
        if !image && (!["txt", "json", "cls"].contains(&extension.as_str()) || !self.is_small(span)) {
            return Ok(());
        }
        let label = match extension.as_str() {
            "cls" => Label::from_word(&String::from_utf8_lossy(&self.small(reader, span)?)),
            "json" => json_label(&self.small(reader, span)?),
            _ => None,
        };
        let at = *self.by_key.entry(key.to_string()).or_insert_with(|| {
            self.found.push(Found { key: key.to_string(), ..Found::default() });
            self.found.len() - 1
        });
        let found = &mut self.found[at];
        let slot = match extension.as_str() {
            "txt" => &mut found.text,
            "json" => &mut found.json,
            "cls" => &mut None,
            _ => &mut found.image,
        };
        if slot.is_some() {
            self.warnings.push(format!(
                "{}: `{name}` is a second member of its kind and was left out",
                place(self.path, span.start)
            ));
            return Ok(());
        }
        *slot = Some(span);
        // A `.cls` member is the explicit label.
        if extension == "cls" || found.label.is_none() {
            found.label = label.or(found.label.take());
        }
        Ok(())
    }
}

fn json_label(bytes: &[u8]) -> Option<Label> {
    let row: Map<String, Value> = serde_json::from_slice(bytes).ok()?;
    Label::from_json(row.get("label")?).ok()?
}

/// Seeks within the buffer where it can.
fn seek(reader: &mut BufReader<File>, to: u64) -> std::io::Result<()> {
    let from = reader.stream_position()?;
    reader.seek_relative(to as i64 - from as i64)
}

fn gnu_name(bytes: &[u8]) -> Option<String> {
    let name = bytes.split(|&byte| byte == 0).next()?;
    Some(String::from_utf8_lossy(name).into_owned()).filter(|name| !name.is_empty())
}

fn pax_name(bytes: &[u8]) -> Option<String> {
    let mut extensions = tar::PaxExtensions::new(bytes).flatten();
    extensions.find(|e| e.key_bytes() == b"path").map(|e| String::from_utf8_lossy(e.value_bytes()).into_owned())
}
