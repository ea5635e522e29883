//! Which images a verb works on, as typed.

use serde::{Deserialize, Serialize};
use smalti_base::{Error, Planes, Progress, Result};
use smalti_data::loader::{LoaderConfig, Skipped};
use smalti_data::{DataConfig, Dataset, ImageBatch, Loader, Transform};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// What is taken from a source of images.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
#[command(next_help_heading = "Images")]
pub struct SourceArgs {
    /// Part of the data set: train, validation, ...
    #[arg(long, value_name = "NAME")]
    pub split: Option<String>,
    /// Use only the first N images
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Colour behind transparent pixels, as RRGGBB [default: ffffff]
    #[arg(long, value_name = "COLOUR")]
    pub background: Option<String>,
    /// Field of the metadata that holds the caption [default: text, else caption]
    #[arg(long, value_name = "FIELD")]
    pub caption: Option<String>,
    /// Folders of images are classes, also where one is called train or test; `false`: they are not [default: found out]
    #[arg(long, value_name = "YES", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub classes_from_folders: Option<bool>,
    /// Leave out images without a caption
    #[arg(long)]
    pub require_caption: bool,
}

impl SourceArgs {
    /// The data section for images of a kind at `path`, the middle cut out at this height and width.
    ///
    /// # Errors
    /// [`Error::Invalid`] for text that is not a colour.
    pub fn config(&self, path: &Path, size: (usize, usize), planes: Planes) -> Result<DataConfig> {
        let mut config = DataConfig::new(path, Transform::center(size, planes));
        config.split = self.split.clone();
        config.caption = self.caption.clone();
        config.classes_from_folders = self.classes_from_folders;
        config.require_caption = self.require_caption;
        config.limit = self.limit;
        if let Some(typed) = &self.background {
            config.background = colour(typed)?;
        }
        Ok(config)
    }
}

/// An opened source of images.
#[derive(Clone, Serialize)]
pub struct Images {
    /// Where they are and what is done to them.
    #[serde(flatten)]
    pub config: DataConfig,
    /// What their values are to the model.
    pub planes: Planes,
    /// Number of images.
    pub images: usize,
    #[serde(skip)]
    dataset: Arc<dyn Dataset>,
}

impl std::fmt::Debug for Images {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Images").field("config", &self.config).field("images", &self.images).finish()
    }
}

impl Images {
    /// Opens the source for a model of images of a kind and checks the transforms; `classes` as in [`DataConfig::open`].
    ///
    /// # Errors
    /// As [`DataConfig::open`], and transforms that do not suit the images.
    pub fn open(config: DataConfig, planes: Planes, classes: Option<&[String]>) -> Result<Self> {
        config.pipeline()?.must_suit(planes)?;
        let dataset: Arc<dyn Dataset> = config.open(classes)?.into();
        Ok(Self { images: dataset.len(), planes, config, dataset })
    }

    /// The images, their keys and classes.
    pub fn dataset(&self) -> &Arc<dyn Dataset> {
        &self.dataset
    }

    /// All images from image `start` on, in order and in batches.
    ///
    /// # Errors
    /// As [`LoaderConfig::new`] and [`Loader::ordered`].
    pub fn batches<'a>(
        &'a self,
        what: &str,
        start: usize,
        batch: usize,
        progress: &'a dyn Progress,
    ) -> Result<Batches<'a>> {
        self.dataset.warnings().iter().for_each(|warning| progress.say(&format!("warning: {warning}")));
        let config = LoaderConfig::new(&self.config, batch)?.with_planes(self.planes)?;
        let loader = Loader::ordered(self.dataset.clone(), config, 0, start)?;
        progress.begin(what, self.images as u64, "images");
        Ok(Batches { images: self, loader, progress, start, used: 0, hint: None, skipped: HashMap::new() })
    }
}

/// The batches of a source. A verb pulls one, works on it and says so with [`Batches::done`]; at the end it calls
/// [`Batches::finish`]. When the user asks to stop, the next batch is [`Error::Interrupted`].
pub struct Batches<'a> {
    images: &'a Images,
    loader: Loader,
    progress: &'a dyn Progress,
    start: usize,
    used: usize,
    hint: Option<String>,
    /// As far as anybody has asked.
    skipped: HashMap<usize, Skipped>,
}

impl Batches<'_> {
    /// With what the user should know when the work is stopped.
    pub fn with_hint(self, hint: &str) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// The batch was worked on; `note` is a short state to show.
    pub fn done(&self, note: &str) {
        self.progress.advance(self.loader.position().min(self.images.images as u64), note);
    }

    /// Why an image before the next batch could not be used.
    pub fn skipped(&mut self, index: usize) -> Option<&Skipped> {
        if !self.skipped.contains_key(&index) {
            let new = self.loader.skipped_after(self.skipped.len());
            self.skipped.extend(new.into_iter().map(|skipped| (skipped.index, skipped)));
        }
        self.skipped.get(&index)
    }

    /// The images that could not be used, after saying which.
    ///
    /// # Errors
    /// [`Error::Invalid`] if no image could be used.
    pub fn finish(self) -> Result<Vec<Skipped>> {
        self.progress.end();
        let skipped = self.loader.skipped();
        skipped.iter().for_each(|image| self.progress.say(&format!("skipped: {}", image.error)));
        if self.used == 0 && self.start == 0 {
            let problem = format!("none of its {} images can be used", self.images.images);
            return Err(Error::file(&self.images.config.path, problem));
        }
        Ok(skipped)
    }
}

impl Iterator for Batches<'_> {
    type Item = Result<ImageBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = self.loader.next()?;
        if self.progress.cancelled() {
            self.progress.end();
            return Some(Err(Error::Interrupted { hint: self.hint.clone() }));
        }
        self.used += batch.as_ref().map_or(0, ImageBatch::len);
        Some(batch)
    }
}

fn colour(typed: &str) -> Result<[u8; 3]> {
    let digits = typed.strip_prefix('#').unwrap_or(typed);
    match u32::from_str_radix(digits, 16) {
        Ok(value) if digits.len() == 6 && !digits.starts_with('+') => {
            let [_, red, green, blue] = value.to_be_bytes();
            Ok([red, green, blue])
        }
        _ => Err(Error::invalid(
            "--background",
            format!("`{typed}` is not a colour; expected RRGGBB, for example ffffff"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::colour;

    #[test]
    fn colours_are_six_digits() {
        assert_eq!(colour("#ff8000").unwrap(), [255, 128, 0]);
        assert!(colour("red").is_err() && colour("+12345").is_err() && colour("fff").is_err());
    }
}
