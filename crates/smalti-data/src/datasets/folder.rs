//! ImageFolder, the Hugging Face convention: one folder per class, or `metadata.jsonl`/`metadata.csv` with `file_name`, `text`, `label`.

use super::labels::{Label, number};
use super::{About, Dataset, Source, extension, list, past_end, read_file};
use crate::image::EXTENSIONS;
use serde_json::{Map, Value};
use smalti_base::{Error, Result, files};
use std::path::{Component, Path, PathBuf};

/// Deepest nesting of folders that is followed; a loop of links ends here.
const DEEPEST: usize = 32;

/// A folder of image files, in sorted order or in the order of its metadata.
#[derive(Clone, Debug)]
pub struct ImageFolder {
    path: PathBuf,
    images: Vec<About>,
    classes: Vec<String>,
}

/// The metadata file of a folder, if it has one.
pub(super) fn metadata_file(folder: &Path) -> Option<PathBuf> {
    ["metadata.jsonl", "metadata.csv"].map(|name| folder.join(name)).into_iter().find(|path| path.is_file())
}

/// Key, caption and keywords.
type Named = (String, Option<String>, Vec<String>);

impl ImageFolder {
    /// All images below `path`, sorted by path. If every image is in some folder below `path`, the outermost folder is its class.
    ///
    /// # Errors
    /// [`Error::Io`] if a folder cannot be read.
    pub fn from_classes(path: &Path) -> Result<Self> {
        let mut names = Vec::new();
        walk(path, "", 0, &mut names)?;
        let class = |name: &String| name.split_once('/').map(|(class, _)| Label::Name(class.into()));
        let labels: Vec<Option<Label>> = names.iter().map(class).collect();
        let labels = if labels.contains(&None) { vec![None; names.len()] } else { labels };
        Self::build(path, names.into_iter().map(|name| (name, None, Vec::new())).collect(), labels)
    }

    /// The images that a metadata file lists, in its order. The caption is the field `caption`, or else `text` or `caption`.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] with the line that is broken.
    pub fn from_metadata(path: &Path, metadata: &Path, caption: Option<&str>) -> Result<Self> {
        let rows = match extension(metadata).as_str() {
            "csv" => read_csv(metadata)?,
            _ => read_jsonl(metadata)?,
        };
        let (mut images, mut labels) = (Vec::new(), Vec::new());
        for (line, row) in rows {
            let place = format!("{}: line {line}", metadata.display());
            let Some(name) = row.get("file_name").and_then(Value::as_str) else {
                return Err(Error::invalid(place, "no `file_name`"));
            };
            if !Path::new(name).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
                return Err(Error::invalid(place, format!("`{name}` leads out of the folder")));
            }
            let label = row.get("label").map_or(Ok(None), Label::from_json);
            labels.push(label.map_err(|problem| Error::invalid(&place, problem))?);
            images.push((name.to_string(), text_of(&row, caption), keywords_of(&row)));
        }
        if let Some(field) = caption
            && !images.is_empty()
            && images.iter().all(|(_, text, _)| text.is_none())
        {
            return Err(Error::file(metadata, format!("no line has a text in the field `{field}`")));
        }
        Self::build(path, images, labels)
    }

    fn build(path: &Path, images: Vec<Named>, labels: Vec<Option<Label>>) -> Result<Self> {
        let (labels, classes) = number(labels, path)?;
        let images = images.into_iter().zip(labels);
        let images = images.map(|((key, text, keywords), label)| About { key, label, text, keywords }).collect();
        Ok(Self { path: path.to_path_buf(), images, classes })
    }

    fn image(&self, index: usize) -> Result<&About> {
        self.images.get(index).ok_or_else(|| past_end(&self.path, index, self.images.len()))
    }
}

impl Dataset for ImageFolder {
    fn kind(&self) -> &'static str {
        "image_folder"
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn len(&self) -> usize {
        self.images.len()
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn key(&self, index: usize) -> String {
        self.images.get(index).map(|about| about.key.clone()).unwrap_or_default()
    }

    fn about(&self, index: usize) -> Result<About> {
        self.image(index).cloned()
    }

    fn source(&self, index: usize) -> Result<Source> {
        read_file(&self.path.join(&self.image(index)?.key))
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

fn walk(folder: &Path, prefix: &str, depth: usize, names: &mut Vec<String>) -> Result<()> {
    if depth > DEEPEST {
        return Err(Error::file(folder, format!("folders are nested deeper than {DEEPEST}")));
    }
    for entry in list(folder)? {
        let name = entry.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if entry.is_dir() {
            walk(&entry, &format!("{prefix}{name}/"), depth + 1, names)?;
        } else if EXTENSIONS.contains(&extension(&entry).as_str()) {
            names.push(format!("{prefix}{name}"));
        }
    }
    Ok(())
}

type Rows = Vec<(u64, Map<String, Value>)>;

fn read_jsonl(path: &Path) -> Result<Rows> {
    let text = files::read_text(path)?;
    let lines = text.lines().zip(1u64..).filter(|(line, _)| !line.trim().is_empty());
    lines
        .map(|(line, number)| match serde_json::from_str(line) {
            Ok(row) => Ok((number, row)),
            Err(e) => Err(Error::invalid(format!("{}: line {number}", path.display()), e.to_string())),
        })
        .collect()
}

fn read_csv(path: &Path) -> Result<Rows> {
    let failed = |e: csv::Error| Error::file(path, e.to_string());
    let mut reader = csv::Reader::from_path(path).map_err(failed)?;
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
