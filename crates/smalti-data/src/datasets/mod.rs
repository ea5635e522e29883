//! Data sets: numbered images with label and caption, whatever the files look like.

mod folder;
mod idx;
mod labels;
mod single;
mod webdataset;

pub use folder::ImageFolder;
pub use idx::Idx;
pub use single::SingleImage;
pub use webdataset::WebDataset;

use crate::image::{self, Image, Limits};
use crate::transforms::{Pipeline, Transform};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Planes, Result, files};
use std::path::{Path, PathBuf};

/// Pixels as a data set holds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// An image file's bytes.
    Encoded(Vec<u8>),
    /// Raw grey levels, row by row.
    Grey {
        /// Columns.
        width: usize,
        /// Rows.
        height: usize,
        /// `height * width` levels.
        pixels: Vec<u8>,
    },
}

/// What a data set knows about an image without reading it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    /// Its name within the data set: a relative path or a WebDataset key.
    pub key: String,
    /// Its class, an index into [`Dataset::classes`].
    pub label: Option<u32>,
    /// Its caption.
    pub text: Option<String>,
    /// Words and phrases that name what it shows (the metadata field `keywords`).
    pub keywords: Vec<String>,
}

/// One image of a data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Name, class and caption.
    pub about: About,
    /// The pixels.
    pub image: Source,
}

impl Record {
    /// The image, transparency composited on `background`; a label map if `planes` says so.
    ///
    /// # Errors
    /// As [`image::decode_as`], naming the key.
    pub fn decode(&self, planes: Planes, background: [u8; 3], limits: &Limits) -> Result<Image> {
        match &self.image {
            Source::Encoded(bytes) => image::decode_as(planes, bytes, &self.about.key, background, limits),
            Source::Grey { width, height, pixels } => {
                Image::new(*width, *height, pixels.iter().flat_map(|&level| [level; 3]).collect())
            }
        }
    }
}

/// What a data set is: enough to tell whether two are the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// Kind of files.
    pub kind: String,
    /// Where it was opened, as it was given.
    pub path: String,
    /// Number of images.
    pub images: usize,
    /// SHA-256 over the keys in order.
    pub keys: String,
}

/// Numbered images with label and caption. The order is always the same.
pub trait Dataset: Send + Sync {
    /// Kind of files, such as `webdataset`.
    fn kind(&self) -> &'static str;
    /// Where it was opened.
    fn path(&self) -> &Path;
    /// Number of images.
    fn len(&self) -> usize;
    /// Names of the classes; a label is an index into it. Empty if images have no label.
    fn classes(&self) -> &[String];
    /// Name of image `index`.
    fn key(&self, index: usize) -> String;
    /// Name, class and caption of image `index`.
    ///
    /// # Errors
    /// [`Error`] naming the file, or an index past the end.
    fn about(&self, index: usize) -> Result<About>;
    /// The pixels of image `index`.
    ///
    /// # Errors
    /// As [`Dataset::about`].
    fn source(&self, index: usize) -> Result<Source>;

    /// What was found wrong when the data set was opened but did not hinder it, such as a tar that was cut off.
    fn warnings(&self) -> &[String] {
        &[]
    }

    /// Whether there are no images.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Image `index` with all that is known about it.
    ///
    /// # Errors
    /// As [`Dataset::about`].
    fn read(&self, index: usize) -> Result<Record> {
        Ok(Record { about: self.about(index)?, image: self.source(index)? })
    }

    /// What this data set is.
    fn describe(&self) -> Description {
        let keys: Vec<String> = (0..self.len()).map(|i| self.key(i)).collect();
        Description {
            kind: self.kind().into(),
            path: self.path().display().to_string(),
            images: self.len(),
            keys: files::sha256_bytes(keys.join("\n").as_bytes()),
        }
    }
}

/// A recipe's data section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Folder, tar, pattern of tars (`{00000..00010}.tar`), IDX file or image; relative to the working folder.
    pub path: PathBuf,
    /// Part of the data set: `train`, `validation`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// Field of the metadata that is the caption; `text` or else `caption` unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caption: Option<String>,
    /// Colour behind transparent pixels, red, green, blue.
    #[serde(default = "white")]
    pub background: [u8; 3],
    /// From a decoded image to what the model sees; the last one is `to_signed`.
    pub transforms: Vec<Transform>,
    /// Use only the first so many images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// What one image may cost.
    #[serde(default)]
    pub limits: Limits,
}

fn white() -> [u8; 3] {
    [255; 3]
}

impl DataConfig {
    /// The whole of `path`, on white, with these transforms.
    pub fn new(path: impl Into<PathBuf>, transforms: Vec<Transform>) -> Self {
        Self {
            path: path.into(),
            split: None,
            caption: None,
            background: white(),
            transforms,
            limit: None,
            limits: Limits::default(),
        }
    }

    /// Opens the data set; `classes`, if given, are the names that labels count by (those of the training data).
    ///
    /// # Errors
    /// As [`open`]; [`Error::Unknown`] for a class that is not among `classes`.
    pub fn open(&self, classes: Option<&[String]>) -> Result<Box<dyn Dataset>> {
        let mut dataset = open(&self.path, self.split.as_deref(), self.caption.as_deref())?;
        if let Some(classes) = classes
            && !dataset.classes().is_empty()
        {
            dataset = Box::new(labels::Relabelled::new(dataset, classes)?);
        }
        match self.limit {
            Some(0) => Err(Error::file(&self.path, "limit = 0 leaves no images")),
            Some(limit) if limit < dataset.len() => Ok(Box::new(labels::First { dataset, limit })),
            _ => Ok(dataset),
        }
    }

    /// The checked transforms.
    ///
    /// # Errors
    /// As [`Pipeline::new`].
    pub fn pipeline(&self) -> Result<Pipeline> {
        Pipeline::new(self.transforms.clone())
    }
}

/// Opens whatever is at `path`: a folder of images (classes as folders, or `metadata.jsonl`/`metadata.csv`), WebDataset tars, IDX
/// files, or one image. `caption` names the field of the metadata to use as caption.
///
/// # Errors
/// [`Error::Io`] if nothing is there; [`Error::Invalid`] if there are no images in it or its metadata are broken;
/// [`Error::Unknown`] if it has no such split.
pub fn open(path: &Path, split: Option<&str>, caption: Option<&str>) -> Result<Box<dyn Dataset>> {
    let dataset = detect(path, split, caption)?;
    if dataset.is_empty() {
        let notes: Vec<String> = dataset.warnings().iter().map(|w| format!("; {w}")).collect();
        return Err(Error::file(path, format!("contains no images{}", notes.concat())));
    }
    Ok(dataset)
}

fn detect(path: &Path, split: Option<&str>, caption: Option<&str>) -> Result<Box<dyn Dataset>> {
    if webdataset::is_pattern(path) {
        no_split(path, split)?;
        return Ok(Box::new(WebDataset::open(path, &webdataset::expand(path)?, caption)?));
    }
    let found = std::fs::metadata(path).map_err(|e| Error::io("read", path, e))?;
    if found.is_dir() {
        return match split {
            Some(split) => open_split(path, split, caption),
            None => open_folder(path, caption),
        };
    }
    no_split(path, split)?;
    if extension(path) == "tar" {
        return Ok(Box::new(WebDataset::open(path, &[path.to_path_buf()], caption)?));
    }
    if idx::is_images(path) {
        return Ok(Box::new(Idx::open(path)?));
    }
    if image::EXTENSIONS.contains(&extension(path).as_str()) {
        return Ok(Box::new(SingleImage::new(path)));
    }
    Err(Error::invalid_hint(
        path.display(),
        "not a data set of a known kind",
        "expected a folder of images, WebDataset .tar files, IDX files or an image",
    ))
}

fn no_split(path: &Path, split: Option<&str>) -> Result<()> {
    match split {
        None => Ok(()),
        Some(split) => Err(Error::file(path, format!("is one file, so there is no split `{split}` in it"))),
    }
}

fn open_split(path: &Path, split: &str, caption: Option<&str>) -> Result<Box<dyn Dataset>> {
    let folder = path.join(split);
    if folder.is_dir() {
        return open_folder(&folder, caption);
    }
    let entries = list(path)?;
    let tars: Vec<PathBuf> =
        entries.iter().filter(|e| extension(e) == "tar" && split_of(e) == split).cloned().collect();
    if !tars.is_empty() {
        return Ok(Box::new(WebDataset::open(path, &tars, caption)?));
    }
    if let Some(file) = entries.iter().find(|e| idx::is_images(e) && split_of(e) == split) {
        return Ok(Box::new(Idx::open(file)?));
    }
    Err(Error::unknown(path.display(), "split", split, splits(&entries)))
}

fn open_folder(path: &Path, caption: Option<&str>) -> Result<Box<dyn Dataset>> {
    if let Some(metadata) = folder::metadata_file(path) {
        return Ok(Box::new(ImageFolder::from_metadata(path, &metadata, caption)?));
    }
    let entries = list(path)?;
    let known = splits(&entries);
    if known.iter().any(|name| SPLITS.contains(&name.as_str())) {
        return Err(Error::invalid_hint(
            path.display(),
            format!("has several parts: {}", known.join(", ")),
            format!("choose one: `split = \"{}\"`, or give the part's own path", known[0]),
        ));
    }
    let tars: Vec<PathBuf> = entries.iter().filter(|e| extension(e) == "tar").cloned().collect();
    if !tars.is_empty() {
        return Ok(Box::new(WebDataset::open(path, &tars, caption)?));
    }
    Ok(Box::new(ImageFolder::from_classes(path)?))
}

/// Names that are parts of a data set, not classes.
const SPLITS: [&str; 7] = ["train", "validation", "valid", "val", "test", "t10k", "dev"];

/// The parts that a folder seems to have: its folders, tars and IDX files.
fn splits(entries: &[PathBuf]) -> Vec<String> {
    let part = |e: &&PathBuf| e.is_dir() || extension(e) == "tar" || idx::is_images(e);
    let mut names: Vec<String> = entries.iter().filter(part).map(|e| split_of(e)).collect();
    names.dedup();
    names
}

/// `train` of `train/`, `train.tar`, `train-00000.tar`, `train-images-idx3-ubyte.gz`.
fn split_of(path: &Path) -> String {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    if idx::is_images(path) {
        return name.split("-images").next().unwrap_or_default().to_string();
    }
    let Some(stem) = name.strip_suffix(".tar").filter(|_| !path.is_dir()) else {
        return name;
    };
    match stem.rsplit_once('-') {
        Some((split, number)) if !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) => split.into(),
        _ => stem.into(),
    }
}

/// Lower-case extension of a path, empty without one.
fn extension(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default()
}

/// A folder's entries without hidden ones, sorted by name.
fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e: std::io::Error| Error::io("read folder", folder, e);
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !entry.file_name().to_string_lossy().starts_with('.') {
            entries.push(entry.path());
        }
    }
    entries.sort();
    Ok(entries)
}

/// Refuses a file or member of more bytes than any image may have.
fn check_size(bytes: u64, place: &str) -> Result<()> {
    let most = Limits::default().bytes;
    match bytes > most {
        true => Err(Error::invalid(place, format!("{bytes} bytes are too many for an image; the limit is {most}"))),
        false => Ok(()),
    }
}

/// Reads an image's file.
fn read_file(path: &Path) -> Result<Source> {
    let size = std::fs::metadata(path).map_err(|e| Error::io("read", path, e))?.len();
    check_size(size, &path.display().to_string())?;
    Ok(Source::Encoded(files::read(path)?))
}

fn past_end(path: &Path, index: usize, len: usize) -> Error {
    Error::file(path, format!("image {index} of {len}: past the end"))
}
