//! One pass over a tar's headers.

use super::super::labels::Label;
use super::super::metadata::{MOST_CAPTION, text_of};
use super::super::notes::Notes;
use super::tar::Tar;
use super::{Span, place};
use crate::image::EXTENSIONS;
use serde_json::{Map, Value};
use smalti_base::{Error, Result};
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

/// Most bytes of a metadata record or a long member name.
const SMALL: u64 = 1 << 20;
const BLOCK: u64 = 512;

/// What the members with one key amount to.
#[derive(Clone, Debug, Default)]
pub(super) struct Found {
    pub(super) key: String,
    pub(super) image: Option<Span>,
    pub(super) text: Option<Span>,
    pub(super) json: Option<Span>,
    pub(super) label: Option<Label>,
    /// Whether the JSON member holds a caption.
    pub(super) has_caption: bool,
    /// Where its first member is.
    at: u64,
    /// Whether an image with dots in its name uses its caption.
    is_lent: bool,
}

impl Found {
    pub(super) fn has_text(&self, by_field: bool) -> bool {
        self.has_caption || (!by_field && self.text.is_some_and(|span| span.length > 0))
    }
}

/// The members with one key, in the order of their first members.
#[derive(Debug, Default)]
struct Keys {
    found: Vec<Found>,
    by_key: HashMap<String, usize>,
}

impl Keys {
    fn entry(&mut self, key: &str, at: u64) -> &mut Found {
        let index = *self.by_key.entry(key.to_string()).or_insert_with(|| {
            self.found.push(Found { key: key.to_string(), at, ..Found::default() });
            self.found.len() - 1
        });
        &mut self.found[index]
    }

    fn get(&mut self, key: &str) -> Option<&mut Found> {
        self.by_key.get(key).map(|index| &mut self.found[*index])
    }
}

/// What was found in a tar.
#[derive(Debug)]
pub(super) struct Scan<'a> {
    path: &'a Path,
    caption: Option<&'a str>,
    size: u64,
    keys: Keys,
    /// Members whose names have more dots than one, by the name up to the last.
    dotted: Keys,
    notes: Notes,
    warnings: Vec<String>,
}

/// A name's key, which ends at the first dot of the base name, and what follows: `a/b.seg.png` is the member `seg.png` of `a/b`.
fn split(name: &str) -> Option<(&str, &str)> {
    let base = name.rfind('/').map_or(0, |at| at + 1);
    let dot = name[base..].find('.').filter(|&dot| dot > 0)?;
    Some((&name[..base + dot], &name[base + dot + 1..]))
}

impl<'a> Scan<'a> {
    /// Scans a tar; the samples that have an image, and what was passed over.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] if it is not a tar at all.
    pub(super) fn run(tar: &'a Tar, caption: Option<&'a str>) -> Result<(Vec<Found>, Vec<String>)> {
        let (file, size) = tar.reader()?;
        let (keys, dotted, notes) = (Keys::default(), Keys::default(), Notes::default());
        let mut scan = Self { path: &tar.path, caption, size, keys, dotted, notes, warnings: Vec::new() };
        scan.headers(&mut BufReader::new(file))?;
        Ok(scan.finish())
    }

    fn headers(&mut self, reader: &mut BufReader<File>) -> Result<()> {
        let (mut offset, mut long_name) = (0, None);
        while let Some(header) = self.header(reader, offset)? {
            let span = Span { start: offset + BLOCK, length: header.entry_size().unwrap_or(u64::MAX) };
            let end = span.start.saturating_add(span.length);
            if end > self.size {
                self.stop(offset, format!("cut off: a member ends at byte {end}, the file at {}", self.size))?;
                return Ok(());
            }
            let kind = header.entry_type();
            if kind.is_gnu_longname() || kind.is_pax_local_extensions() {
                let bytes = if self.is_small(span) { self.small(reader, span)? } else { Vec::new() };
                let name = if kind.is_gnu_longname() { gnu_name(&bytes) } else { pax_name(&bytes) };
                long_name = name.or(long_name);
            } else {
                let name =
                    long_name.take().unwrap_or_else(|| String::from_utf8_lossy(&header.path_bytes()).into_owned());
                let name = name.strip_prefix("./").unwrap_or(&name);
                if kind.is_file() || kind.is_contiguous() {
                    self.member(reader, name, span)?;
                } else if kind.is_hard_link() || kind.is_symlink() || kind.is_gnu_sparse() {
                    self.notes.add("members that are links or sparse files", name);
                }
            }
            // No overflow: `end` is within the file.
            offset = end.div_ceil(BLOCK) * BLOCK;
        }
        Ok(())
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
        let samples = self.keys.found.len() + self.dotted.found.len();
        self.warnings.push(format!("{place}: {problem}; {samples} samples before it are used"));
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
        let Some((key, rest)) = split(name) else {
            let base = name.rsplit('/').next().unwrap_or(name);
            let ending = base.rsplit_once('.').map_or_else(String::new, |(_, ending)| ending.to_lowercase());
            match EXTENSIONS.contains(&ending.as_str()) {
                // `._a.png` is what macOS keeps beside `a.png`.
                true if base.starts_with("._") => {}
                true => self.notes.add("hidden images", name),
                false => self.notes.other(&ending),
            }
            return Ok(());
        };
        let (key, rest) = (key.to_string(), rest.to_lowercase());
        let ending = rest.rsplit('.').next().unwrap_or(&rest).to_string();
        let image = EXTENSIONS.contains(&ending.as_str());
        if !image && !["txt", "json", "cls"].contains(&ending.as_str()) {
            self.notes.other(&ending);
            return Ok(());
        }
        if !image && !self.is_small(span) {
            return Ok(());
        }
        let (mut label, mut has_caption) = (None, false);
        match ending.as_str() {
            "cls" => label = Label::from_word(&String::from_utf8_lossy(&self.small(reader, span)?)),
            "json" => match self.record(reader, name, span)? {
                Some(found) => (label, has_caption) = found,
                None => return Ok(()),
            },
            "txt" if span.length > MOST_CAPTION as u64 => {
                self.notes.add(LONG_CAPTIONS, name);
                return Ok(());
            }
            _ => {}
        }
        let is_dotted = ending != rest;
        let keys = if is_dotted { &mut self.dotted } else { &mut self.keys };
        let key = if is_dotted { &name[..name.len() - ending.len() - 1] } else { &key };
        let found = keys.entry(key, span.start);
        if !put(found, &ending, span, label) {
            self.warnings.push(format!(
                "{}: `{name}` is a second member of its kind and was left out",
                place(self.path, span.start)
            ));
        } else {
            found.has_caption |= has_caption;
        }
        Ok(())
    }

    /// The label of a record and whether it has a caption; `None` if it is left out.
    fn record(
        &mut self,
        reader: &mut BufReader<File>,
        name: &str,
        span: Span,
    ) -> Result<Option<(Option<Label>, bool)>> {
        let row: Map<String, Value> = match serde_json::from_slice(&self.small(reader, span)?) {
            Ok(row) => row,
            Err(error) => {
                self.notes.add("records that are not JSON", format!("{name} ({error})"));
                return Ok(None);
            }
        };
        let label = row.get("label").and_then(|label| Label::from_json(label).ok()?);
        let text = text_of(&row, self.caption);
        let has_caption = text.as_ref().is_some_and(|text| !text.trim().is_empty());
        if text.is_some_and(|text| text.len() > MOST_CAPTION) {
            self.notes.add(LONG_CAPTIONS, name);
            return Ok(None);
        }
        Ok(Some((label, has_caption)))
    }

    /// The samples with an image, in the order of their first members.
    ///
    /// A member `x.seg.png` belongs to the sample `x`, if that has an image of its own; else its name is one with dots in it, such as
    /// `photo 1.5.png`, and it is a sample by itself.
    fn finish(mut self) -> (Vec<Found>, Vec<String>) {
        for mut found in std::mem::take(&mut self.dotted.found) {
            if found.image.is_none() {
                continue;
            }
            let owner = split(&found.key).map_or(found.key.as_str(), |(key, _)| key).to_string();
            match self.keys.get(&owner) {
                Some(owner) if owner.image.is_some() => {
                    self.notes.add("images that belong to a sample with an image of its own", found.key);
                    continue;
                }
                Some(owner) => {
                    found.text = found.text.or(owner.text);
                    found.json = found.json.or(owner.json);
                    found.label = found.label.or(owner.label.clone());
                    found.has_caption |= owner.has_caption;
                    owner.is_lent = true;
                }
                None => {}
            }
            self.keys.found.push(found);
        }
        let mut samples = self.keys.found;
        samples.sort_by_key(|found| found.at);
        let imageless = samples.iter().filter(|found| found.image.is_none() && !found.is_lent).count();
        samples.retain(|found| found.image.is_some());
        let mut warnings = self.warnings;
        if imageless > 0 {
            warnings.push(format!("{}: {imageless} keys without an image were left out", self.path.display()));
        }
        warnings.extend(self.notes.lines(self.path, samples.is_empty()));
        (samples, warnings)
    }
}

const LONG_CAPTIONS: &str = "captions and records of captions with more than 64 KiB";

/// Puts a member into its place; false if that is taken.
fn put(found: &mut Found, ending: &str, span: Span, label: Option<Label>) -> bool {
    let slot = match ending {
        "txt" => &mut found.text,
        "json" => &mut found.json,
        "cls" => &mut None,
        _ => &mut found.image,
    };
    if slot.is_some() {
        return false;
    }
    *slot = Some(span);
    // A `.cls` member is the explicit label.
    if ending == "cls" || found.label.is_none() {
        found.label = label.or(found.label.take());
    }
    true
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
