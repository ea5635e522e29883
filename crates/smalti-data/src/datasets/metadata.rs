//! `metadata.jsonl` and `metadata.csv`: a row of fields for each image.

use super::extension;
use super::labels::Label;
use serde_json::{Map, Value};
use smalti_base::{Error, Result, files};
use std::path::{Path, PathBuf};

/// Most bytes of a caption.
pub(super) const MOST_CAPTION: usize = 64 << 10;

/// A row with the number of its first line.
pub(super) type Rows = Vec<(u64, Map<String, Value>)>;

/// The metadata file of a folder, if it has one.
pub(super) fn find(folder: &Path) -> Option<PathBuf> {
    // Whatever has the name counts: what cannot be read is an error then, not nothing.
    let is_there = |path: &PathBuf| std::fs::symlink_metadata(path).is_ok();
    ["metadata.jsonl", "metadata.csv"].map(|name| folder.join(name)).into_iter().find(is_there)
}

/// All rows of a metadata file.
///
/// # Errors
/// [`Error::Io`], or [`Error::Invalid`] with the line that is broken.
pub(super) fn read(path: &Path) -> Result<Rows> {
    let text = files::read_text(path)?;
    // Old files end their lines with CR alone.
    let text = if text.contains('\n') { text } else { text.replace('\r', "\n") };
    match extension(path).as_str() {
        "csv" => read_csv(path, &text),
        _ => read_jsonl(path, &text),
    }
}

/// The words and phrases of a record's metadata: the list `keywords`, or one string with commas between them.
pub(super) fn keywords_of(row: &Map<String, Value>) -> Vec<String> {
    let found: Vec<&str> = match row.get("keywords") {
        Some(Value::Array(words)) => words.iter().filter_map(Value::as_str).collect(),
        Some(Value::String(words)) => words.split(',').collect(),
        _ => Vec::new(),
    };
    found.into_iter().map(str::trim).filter(|word| !word.is_empty()).map(str::to_string).collect()
}

/// The caption in a record's metadata.
pub(super) fn text_of(row: &Map<String, Value>, caption: Option<&str>) -> Option<String> {
    let fields: &[&str] = match &caption {
        Some(field) => std::slice::from_ref(field),
        None => &["text", "caption"],
    };
    fields.iter().find_map(|field| row.get(*field)?.as_str().map(str::to_string))
}

fn line(path: &Path, number: u64) -> String {
    format!("{}: line {number}", path.display())
}

fn read_jsonl(path: &Path, text: &str) -> Result<Rows> {
    let lines = text.lines().zip(1u64..).filter(|(line, _)| !line.trim().is_empty());
    lines
        .map(|(text, number)| match serde_json::from_str(text) {
            Ok(row) => Ok((number, row)),
            Err(e) => Err(Error::invalid(line(path, number), e.to_string())),
        })
        .collect()
}

fn read_csv(path: &Path, text: &str) -> Result<Rows> {
    quotes_must_match(path, text)?;
    let failed = |e: csv::Error| Error::file(path, e.to_string());
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let header = reader.headers().map_err(failed)?.clone();
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(failed)?;
        let line = record.position().map_or(0, csv::Position::line);
        let cell = |(field, value): (&str, &str)| {
            let value = match (field, Label::from_word(value)) {
                ("label", None) => Value::Null,
                ("label", Some(Label::Number(number))) => Value::from(number),
                _ => Value::from(value),
            };
            (field.to_string(), value)
        };
        rows.push((line, header.iter().zip(record.iter()).map(cell).collect()));
    }
    Ok(rows)
}

/// A quoted cell ends with its quote. One that does not would take the rows below it in, up to the next quote.
fn quotes_must_match(path: &Path, text: &str) -> Result<()> {
    let (mut number, mut opened, mut at_start) = (1u64, None, true);
    let mut bytes = text.bytes().peekable();
    while let Some(byte) = bytes.next() {
        number += u64::from(byte == b'\n');
        match (opened, byte) {
            (None, b'"') if at_start => opened = Some(number),
            (Some(_), b'"') if bytes.peek() == Some(&b'"') => drop(bytes.next()),
            (Some(from), b'"') => {
                opened = None;
                if !matches!(bytes.peek(), None | Some(b',' | b'\n' | b'\r')) {
                    let problem =
                        format!("the quote that opens here is closed in line {number} in the middle of a cell");
                    return Err(Error::invalid_hint(line(path, from), problem, "a quote within a cell is doubled"));
                }
            }
            _ => {}
        }
        at_start = opened.is_none() && matches!(byte, b',' | b'\n' | b'\r');
    }
    match opened {
        None => Ok(()),
        Some(from) => Err(Error::invalid(line(path, from), "the quote that opens here is not closed")),
    }
}
