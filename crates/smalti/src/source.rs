//! Which images a verb works on, as typed.

use serde::{Deserialize, Serialize};
use smalti_base::{Error, Planes, Progress, Result};
use smalti_data::loader::{LoaderConfig, Skipped};
use smalti_data::{DataConfig, Dataset, ImageBatch, Loader, Transform};
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
}

impl SourceArgs {
    /// The data section for images of a kind at `path`, the middle cut out at this height and width.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a colour that is none.
    pub fn config(&self, path: &Path, size: (usize, usize), planes: Planes) -> Result<DataConfig> {
        let mut config = DataConfig::new(path, Transform::center(size, planes));
        config.split = self.split.clone();
        config.caption = self.caption.clone();
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

    /// Hands all images from image `start` on to `each`, in order and in batches, with the loader that knows what was skipped so
    /// far. Returns the images that could not be used, and says which.
    ///
    /// # Errors
    /// What `each` returns, [`Error::Interrupted`], or [`Error::Invalid`] if no image could be used.
    pub fn each_batch(
        &self,
        what: &str,
        start: usize,
        batch: usize,
        progress: &dyn Progress,
        mut each: impl FnMut(ImageBatch, &Loader) -> Result<String>,
    ) -> Result<Vec<Skipped>> {
        self.dataset.warnings().iter().for_each(|warning| progress.say(&format!("warning: {warning}")));
        let config = LoaderConfig::new(&self.config, batch)?.with_planes(self.planes)?;
        let mut loader = Loader::ordered(self.dataset.clone(), config, 0, start)?;
        progress.begin(what, self.images as u64, "images");
        let mut used = 0;
        while let Some(batch) = loader.next() {
            if progress.cancelled() {
                progress.end();
                return Err(Error::Interrupted { hint: None });
            }
            let batch = batch?;
            used += batch.len();
            let note = each(batch, &loader)?;
            progress.advance(loader.position().min(self.images as u64), &note);
        }
        progress.end();
        let skipped = loader.skipped();
        skipped.iter().for_each(|image| progress.say(&format!("skipped: {}", image.error)));
        if used == 0 && start == 0 {
            return Err(Error::file(&self.config.path, format!("none of its {} images can be used", self.images)));
        }
        Ok(skipped)
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
