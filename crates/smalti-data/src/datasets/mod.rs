//! Data sets: numbered images with label and caption, whatever the files look like.

mod folder;
mod idx;
mod labels;
mod metadata;
mod notes;
mod open;
mod single;
mod walk;
mod webdataset;

pub use folder::ImageFolder;
pub use idx::Idx;
pub use open::open;
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
    /// As [`image::decode_as`], naming the key; raw pixels past the limit.
    pub fn decode(&self, planes: Planes, background: [u8; 3], limits: &Limits) -> Result<Image> {
        match &self.image {
            Source::Encoded(bytes) => image::decode_as(planes, bytes, &self.about.key, background, limits),
            Source::Grey { width, height, .. } if (*width as u64).saturating_mul(*height as u64) > limits.pixels => {
                let problem = format!("{width}x{height} pixels are more than the limit, {}", limits.pixels);
                Err(Error::invalid(&self.about.key, problem))
            }
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

    /// Bytes that [`Dataset::source`] of image `index` will read, as far as that is known without reading them; else 0.
    fn bytes(&self, index: usize) -> u64 {
        let _ = index;
        0
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
    /// Whether the folders of images are classes, where they could also be parts of a data set, or neither: in `boat`, `bus`, `train`
    /// one has the name of a part. `true`: each folder is a class and images beside them are left out; `false`: all images
    /// are used, without classes. Unless given, that is found out, and what could be both is an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classes_from_folders: Option<bool>,
    /// Leave out images that have no caption; they are counted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub require_caption: bool,
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
            classes_from_folders: None,
            require_caption: false,
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
        let how = open::How {
            split: self.split.as_deref(),
            caption: self.caption.as_deref(),
            classes_from_folders: self.classes_from_folders,
        };
        let mut dataset = open::open_as(&self.path, how)?;
        if let Some(classes) = classes
            && !dataset.classes().is_empty()
        {
            dataset = Box::new(labels::Relabelled::new(dataset, classes)?);
        }
        if self.require_caption {
            dataset = Box::new(labels::Captioned::new(dataset)?);
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

/// Lower-case extension of a path, empty without one.
fn extension(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default()
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
    Ok(Source::Encoded(files::read_at_most(path, Limits::default().bytes)?))
}

fn past_end(path: &Path, index: usize, len: usize) -> Error {
    Error::file(path, format!("image {index} of {len}: past the end"))
}

/// A warning if only some images have a caption.
fn some_captions(path: &Path, with: usize, images: usize) -> Option<String> {
    let hint = "`require_caption = true` (`--require-caption`) leaves the others out";
    let is_some = with > 0 && with < images;
    is_some.then(|| format!("{}: {with} of {images} images have a caption; {hint}", path.display()))
}
