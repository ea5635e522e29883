//! ImageFolder, the Hugging Face convention: one folder per class, or `metadata.jsonl`/`metadata.csv` with `file_name`, `text`, `label`.

use super::labels::{Label, number};
use super::metadata::{self, MOST_CAPTION, keywords_of, text_of};
use super::notes::Notes;
use super::walk::{Entry, walk};
use super::{About, Dataset, Source, past_end, read_file};
use serde_json::Value;
use smalti_base::{Error, Result, files};
use std::collections::HashSet;
use std::path::{Component, Path, PathBuf};

/// A folder of image files, in sorted order or in the order of its metadata.
#[derive(Clone, Debug)]
pub struct ImageFolder {
    path: PathBuf,
    images: Vec<Named>,
    classes: Vec<String>,
    warnings: Vec<String>,
    /// What is below the folder beside images, for the case that there are none.
    others: Vec<String>,
}

/// An image, and where it and its caption are if that is not what its key says.
#[derive(Clone, Debug)]
struct Named {
    about: About,
    path: Option<PathBuf>,
    /// Whether a text file beside it is its caption.
    has_text: bool,
}

impl ImageFolder {
    /// All images below `path`, sorted by path. If the images are in folders, the outermost folder of each is its class; `classes` says
    /// whether they are, if that is known. The caption of `a/0.png` is `a/0.txt`.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be read; [`Error::Invalid`] if as many images are beside the folders as in them.
    pub fn from_classes(path: &Path, classes: Option<bool>) -> Result<Self> {
        let found = walk(path)?;
        let (mut images, texts, mut notes) = (found.images, found.texts, found.notes);
        let is_inside = |entry: &Entry| entry.key.contains('/');
        let inside = images.iter().filter(|entry| is_inside(entry)).count();
        let outside = images.len() - inside;
        let has_classes = classes.unwrap_or(inside > 0);
        if has_classes && outside > 0 {
            if classes.is_none() && outside >= inside {
                return Err(Error::invalid_hint(
                    path.display(),
                    format!("{outside} images are beside the folders and {inside} in them: are the folders classes?"),
                    "`classes_from_folders = true` (`--classes-from-folders`) uses the images in folders, each folder a class; \
                     `classes_from_folders = false` (`--classes-from-folders=false`) uses all, without classes",
                ));
            }
            images.iter().filter(|entry| !is_inside(entry)).for_each(|entry| {
                notes.add("images beside the class folders", entry.key.clone());
            });
            images.retain(is_inside);
        }
        let class = |entry: &Entry| entry.key.split_once('/').map(|(class, _)| Label::Name(class.into()));
        let labels = images.iter().map(|entry| class(entry).filter(|_| has_classes)).collect();
        let text_of = |key: &str| texts.get(key.rsplit_once('.').map_or(key, |(stem, _)| stem)).copied();
        let named = images.into_iter().map(|Entry { key, path }| Named {
            has_text: text_of(&key).is_some(),
            about: About { key, ..About::default() },
            path,
        });
        let mut folder = Self::build(path, named.collect(), labels)?;
        folder.images.retain(|image| {
            let is_long =
                image.has_text && text_of(&image.about.key).is_some_and(|length| length > MOST_CAPTION as u64);
            is_long.then(|| notes.add(LONG_CAPTIONS, image.about.key.clone()));
            !is_long
        });
        folder.warnings = notes.lines(path, false);
        folder.others = notes.lines(path, true);
        folder.count_captions(|image| image.has_text);
        Ok(folder)
    }

    /// The images that a metadata file lists, in its order. The caption is the field `caption`, or else `text` or `caption`.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] with the line that is broken.
    pub fn from_metadata(path: &Path, metadata: &Path, caption: Option<&str>) -> Result<Self> {
        let (mut images, mut labels, mut notes) = (Vec::new(), Vec::new(), Notes::default());
        for (line, row) in metadata::read(metadata)? {
            let place = format!("{}: line {line}", metadata.display());
            let Some(name) = row.get("file_name").and_then(Value::as_str) else {
                return Err(Error::invalid(place, "no `file_name`"));
            };
            if !Path::new(name).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
                return Err(Error::invalid(place, format!("`{name}` leads out of the folder")));
            }
            let label = row.get("label").map_or(Ok(None), Label::from_json);
            let label = label.map_err(|problem| Error::invalid(&place, problem))?;
            let text = text_of(&row, caption);
            if text.as_ref().is_some_and(|text| text.len() > MOST_CAPTION) {
                notes.add(LONG_CAPTIONS, format!("{name} (line {line})"));
                continue;
            }
            labels.push(label);
            let about = About { key: name.to_string(), label: None, text, keywords: keywords_of(&row) };
            images.push(Named { about, path: None, has_text: false });
        }
        if let Some(field) = caption
            && !images.is_empty()
            && images.iter().all(|image| image.about.text.is_none())
        {
            return Err(Error::file(metadata, format!("no line has a text in the field `{field}`")));
        }
        let mut folder = Self::build(path, images, labels)?;
        folder.warnings = notes.lines(metadata, false);
        folder.others.clone_from(&folder.warnings);
        folder.check_files(metadata);
        folder.count_captions(|image| image.about.text.as_ref().is_some_and(|text| !text.trim().is_empty()));
        Ok(folder)
    }

    fn build(path: &Path, mut images: Vec<Named>, labels: Vec<Option<Label>>) -> Result<Self> {
        let (labels, classes) = number(labels, path)?;
        images.iter_mut().zip(labels).for_each(|(image, label)| image.about.label = label);
        Ok(Self { path: path.to_path_buf(), images, classes, warnings: Vec::new(), others: Vec::new() })
    }

    /// Names rows whose file is not there, and files that several rows name.
    fn check_files(&mut self, metadata: &Path) {
        let (mut missing, mut again, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
        for image in &self.images {
            let key = &image.about.key;
            if !seen.insert(key.as_str()) {
                again.push(key.clone());
            } else if !std::fs::metadata(self.path.join(key)).is_ok_and(|found| found.is_file()) {
                missing.push(key.clone());
            }
        }
        let mut warn = |names: Vec<String>, what: &str| {
            if !names.is_empty() {
                let names = (names.len(), super::notes::listed(&names, names.len()));
                self.warnings.push(format!("{}: {what} ({}): {}", metadata.display(), names.0, names.1));
            }
        };
        warn(missing, "images that it lists are not there and will be skipped");
        warn(again, "rows name an image that an earlier row names; each row counts as an image");
    }

    /// Says if only some images have a caption.
    fn count_captions(&mut self, has_caption: impl Fn(&Named) -> bool) {
        let with = self.images.iter().filter(|image| has_caption(image)).count();
        self.warnings.extend(super::some_captions(&self.path, with, self.images.len()));
    }

    /// Says what was not read beside the images.
    pub(super) fn warn(&mut self, warning: String) {
        self.warnings.push(warning);
    }

    fn image(&self, index: usize) -> Result<&Named> {
        self.images.get(index).ok_or_else(|| past_end(&self.path, index, self.images.len()))
    }

    fn file(&self, image: &Named) -> PathBuf {
        image.path.clone().unwrap_or_else(|| self.path.join(&image.about.key))
    }
}

const LONG_CAPTIONS: &str = "images whose captions have more than 64 KiB";

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
        self.images.get(index).map(|image| image.about.key.clone()).unwrap_or_default()
    }

    fn about(&self, index: usize) -> Result<About> {
        let image = self.image(index)?;
        let mut about = image.about.clone();
        if image.has_text {
            let bytes = files::read_at_most(&self.file(image).with_extension("txt"), MOST_CAPTION as u64)?;
            let text = String::from_utf8_lossy(&bytes);
            let text = text.trim_start_matches('\u{feff}').trim();
            about.text = Some(text.to_string()).filter(|text| !text.is_empty());
        }
        Ok(about)
    }

    fn source(&self, index: usize) -> Result<Source> {
        read_file(&self.file(self.image(index)?))
    }

    fn bytes(&self, index: usize) -> u64 {
        let length = |image| Some(std::fs::metadata(self.file(image)).ok()?.len());
        self.images.get(index).and_then(length).unwrap_or_default()
    }

    fn warnings(&self) -> &[String] {
        if self.images.is_empty() { &self.others } else { &self.warnings }
    }
}
