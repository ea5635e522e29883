//! Which kind of data set is at a path.

use super::notes::listed;
use super::{Dataset, Idx, ImageFolder, SingleImage, WebDataset, extension, idx, metadata, webdataset};
use crate::image::{EXTENSIONS, KINDS};
use smalti_base::{Error, Result, files};
use std::path::{Path, PathBuf};

/// What a data set may consist of, for messages.
const EXPECTED: &str = "expected a folder of images, WebDataset .tar or .tar.gz files, IDX files or an image";

/// What is known of a data set before it is looked at.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct How<'a> {
    pub(super) split: Option<&'a str>,
    pub(super) caption: Option<&'a str>,
    pub(super) classes_from_folders: Option<bool>,
}

/// Opens whatever is at `path`: a folder of images (classes as folders, or `metadata.jsonl`/`metadata.csv`), WebDataset tars, IDX
/// files, or one image. `caption` names the field of the metadata to use as caption.
///
/// # Errors
/// [`Error::Io`] if nothing is there; [`Error::Invalid`] if there are no images in it, its metadata are broken or it could be read in
/// several ways; [`Error::Unknown`] if it has no such split.
pub fn open(path: &Path, split: Option<&str>, caption: Option<&str>) -> Result<Box<dyn Dataset>> {
    open_as(path, How { split, caption, ..How::default() })
}

/// [`open`] with all that is known.
pub(super) fn open_as(path: &Path, how: How<'_>) -> Result<Box<dyn Dataset>> {
    let dataset = detect(path, how)?;
    if dataset.is_empty() {
        let notes: Vec<String> = dataset.warnings().iter().map(|w| format!("; {w}")).collect();
        let problem = format!("contains no images{}", notes.concat());
        return Err(Error::invalid_hint(path.display(), problem, format!("{EXPECTED}; {KINDS}")));
    }
    Ok(dataset)
}

fn detect(path: &Path, how: How<'_>) -> Result<Box<dyn Dataset>> {
    if webdataset::is_pattern(path) {
        no_split(path, how.split)?;
        return tars(path, &webdataset::expand(path)?, how);
    }
    let found = std::fs::metadata(path).map_err(|e| Error::io("read", path, e))?;
    if found.is_dir() {
        return match how.split {
            Some(split) => open_split(path, split, how),
            None => open_folder(path, how),
        };
    }
    files::open(path)?;
    no_split(path, how.split)?;
    if is_tar(path) {
        return tars(path, &[path.to_path_buf()], how);
    }
    no_caption(path, how)?;
    if idx::is_images(path) {
        return Ok(Box::new(Idx::open(path)?));
    }
    if EXTENSIONS.contains(&extension(path).as_str()) {
        return Ok(Box::new(SingleImage::new(path)));
    }
    Err(Error::invalid_hint(path.display(), "not a data set of a known kind", format!("{EXPECTED}; {KINDS}")))
}

fn tars(path: &Path, tars: &[PathBuf], how: How<'_>) -> Result<Box<dyn Dataset>> {
    Ok(Box::new(WebDataset::open(path, tars, how.caption)?))
}

fn no_split(path: &Path, split: Option<&str>) -> Result<()> {
    match split {
        None => Ok(()),
        Some(split) => Err(Error::file(path, format!("is one file, so there is no split `{split}` in it"))),
    }
}

fn no_caption(path: &Path, how: How<'_>) -> Result<()> {
    match how.caption {
        None => Ok(()),
        Some(field) => {
            Err(Error::file(path, format!("has no metadata, so no image has a text in the field `{field}`")))
        }
    }
}

fn open_split(path: &Path, split: &str, how: How<'_>) -> Result<Box<dyn Dataset>> {
    let folder = path.join(split);
    if folder.is_dir() {
        return open_folder(&folder, how);
    }
    let parts = Parts::of(path)?;
    let of_split = |files: &[PathBuf]| files.iter().filter(|file| split_of(file) == split).cloned().collect::<Vec<_>>();
    let found = of_split(&parts.tars);
    if !found.is_empty() {
        return tars(path, &found, how);
    }
    if let Some(file) = of_split(&parts.idx).first() {
        no_caption(path, how)?;
        return Ok(Box::new(Idx::open(file)?));
    }
    Err(Error::unknown(path.display(), "split", split, parts.names()))
}

fn open_folder(path: &Path, how: How<'_>) -> Result<Box<dyn Dataset>> {
    let metadata = metadata::find(path);
    if let Some(metadata) = &metadata
        && how.classes_from_folders != Some(true)
    {
        return Ok(Box::new(ImageFolder::from_metadata(path, metadata, how.caption)?));
    }
    let parts = Parts::of(path)?;
    if how.classes_from_folders.is_none() {
        parts.must_be_one(path)?;
        if !parts.tars.is_empty() {
            let mut dataset = WebDataset::open(path, &parts.tars, how.caption)?;
            parts.beside_tars(path).into_iter().for_each(|warning| dataset.warn(warning));
            return Ok(Box::new(dataset));
        }
        if let [file] = &parts.idx[..] {
            no_caption(path, how)?;
            return Ok(Box::new(Idx::open(file)?));
        }
    }
    no_caption(path, how)?;
    let mut folder = ImageFolder::from_classes(path, how.classes_from_folders)?;
    if let Some(metadata) = metadata {
        folder.warn(format!("{}: not read: the folders are the classes", metadata.display()));
    }
    Ok(Box::new(folder))
}

/// Names that are parts of a data set, not classes.
const SPLITS: [&str; 7] = ["train", "validation", "valid", "val", "test", "t10k", "dev"];

fn is_split(name: &str) -> bool {
    SPLITS.contains(&name.to_lowercase().as_str())
}

/// What a folder may have as parts: folders, tars, IDX files; sorted by name.
struct Parts {
    folders: Vec<String>,
    tars: Vec<PathBuf>,
    idx: Vec<PathBuf>,
    images: Vec<String>,
}

impl Parts {
    fn of(path: &Path) -> Result<Self> {
        let (mut folders, mut tars, mut idx, mut images) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for entry in list(path)? {
            if entry.is_dir() {
                folders.push(file_name(&entry));
            } else if is_tar(&entry) {
                tars.push(entry);
            } else if idx::is_images(&entry) {
                idx.push(entry);
            } else if EXTENSIONS.contains(&extension(&entry).as_str()) {
                images.push(file_name(&entry));
            }
        }
        Ok(Self { folders, tars, idx, images })
    }

    /// What is not read where there are tars.
    fn beside_tars(&self, path: &Path) -> Vec<String> {
        let left = |names: &[String], what: &str| {
            let line = || {
                format!(
                    "{}: left out {what} beside the tars ({}): {}",
                    path.display(),
                    names.len(),
                    listed(names, names.len())
                )
            };
            (!names.is_empty()).then(line)
        };
        [left(&self.folders, "folders"), left(&self.images, "images")].into_iter().flatten().collect()
    }

    fn names(&self) -> Vec<String> {
        let files = self.tars.iter().chain(&self.idx).map(|file| split_of(file));
        let mut names: Vec<String> = self.folders.iter().cloned().chain(files).collect();
        names.sort();
        names.dedup();
        names
    }

    /// Refuses a folder of several parts, and one that could be that.
    fn must_be_one(&self, path: &Path) -> Result<()> {
        let names = self.names();
        let Some(first) = names.iter().find(|name| is_split(name)) else {
            let kinds = usize::from(!self.tars.is_empty()) + self.idx.len();
            return match kinds {
                0 | 1 => Ok(()),
                _ => Err(self.several(path, &names, &names[0])),
            };
        };
        match self.folders.is_empty() && names.len() == 1 {
            true => Ok(()),
            false => Err(self.several(path, &names, first)),
        }
    }

    fn several(&self, path: &Path, names: &[String], split: &str) -> Error {
        let all = listed(names, names.len());
        let problem = match names.iter().all(|name| is_split(name)) || self.folders.is_empty() {
            true if names.len() == 1 => format!("has one folder, {all}: is it a part or a class?"),
            true => format!("has several parts: {all}"),
            false => format!("has several parts, or classes: {all}; `{split}` is the name of a part"),
        };
        let mut hint =
            format!("for one part set `split = \"{split}\"` (`--split {split}`) or give the part's own path");
        if !self.folders.is_empty() {
            hint += "; if the folders are classes, set `classes_from_folders = true` (`--classes-from-folders`)";
        }
        Error::invalid_hint(path.display(), problem, hint)
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The name of a tar without its ending.
fn tar_stem(name: &str) -> Option<&str> {
    let lower = name.to_lowercase();
    let ending = [".tar", ".tar.gz", ".tgz"].into_iter().find(|ending| lower.ends_with(ending))?;
    name.get(..name.len() - ending.len())
}

fn is_tar(path: &Path) -> bool {
    tar_stem(&file_name(path)).is_some()
}

/// `train` of `train.tar`, `train-00000.tar`, `train-images-idx3-ubyte.gz`.
fn split_of(path: &Path) -> String {
    let name = file_name(path);
    if idx::is_images(path) {
        return name.split("-images").next().unwrap_or_default().to_string();
    }
    let stem = tar_stem(&name).unwrap_or(&name);
    match stem.rsplit_once('-') {
        Some((split, number)) if !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) => split.into(),
        _ => stem.into(),
    }
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
