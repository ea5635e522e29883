//! A task's images, checked before anything is computed.

use smalti_base::{Error, Planes, Result, files};
use smalti_data::DataConfig;
use smalti_data::datasets::{About, Dataset};

/// Opens images for a model that takes this size and kind; `key` is the section's in the recipe.
///
/// # Errors
/// Images that cannot be opened, or that come out of the transforms in another size or kind.
pub(super) fn open(
    config: &DataConfig,
    key: &str,
    (height, width): (usize, usize),
    planes: Planes,
    classes: Option<&[String]>,
) -> Result<Box<dyn Dataset>> {
    let transforms = format!("{key}.transforms");
    let here = |error: Error| match error {
        Error::Invalid { place, problem, hint } if place == "transforms" => {
            Error::Invalid { place: transforms.clone(), problem, hint }
        }
        other => other,
    };
    let pipeline = config.pipeline().map_err(here)?;
    pipeline.must_suit(planes).map_err(here)?;
    match pipeline.size() {
        Some(size) if size == (height, width) => {}
        Some((h, w)) => {
            return Err(Error::invalid_hint(
                transforms,
                format!("images come out as {h}x{w} pixels, but the model takes {height}x{width}"),
                "change the sizes here or the model's image_size",
            ));
        }
        None => {
            return Err(Error::invalid_hint(
                transforms,
                "images would differ in size, so they cannot be batched",
                format!("add, for example, {{ kind = \"center_crop\", size = {height} }}"),
            ));
        }
    }
    config.open(classes)
}

/// What identifies images: kind, number, and what is known of each, but not their pixels.
///
/// # Errors
/// What reading labels and captions returns.
pub(super) fn identity(dataset: &dyn Dataset) -> Result<String> {
    let about = (0..dataset.len()).map(|index| dataset.about(index)).collect::<Result<Vec<_>>>()?;
    let classes = dataset.classes().join("\n");
    let line = |About { key, label, text, keywords }: &About| format!("{key:?} {label:?} {text:?} {keywords:?}\n");
    let lines: String = about.iter().map(line).collect();
    let sha256 = files::sha256_bytes(format!("{classes}\n{lines}").as_bytes());
    Ok(format!("{} of {} images, names, classes and captions {sha256}", dataset.kind(), dataset.len()))
}

/// Says what was found wrong in the data set.
pub(super) fn warnings(dataset: &dyn Dataset) -> impl Iterator<Item = String> {
    let place = dataset.path().display();
    dataset
        .warnings()
        .iter()
        .map(|warning| match warning.contains(&place.to_string()) {
            true => warning.clone(),
            false => format!("{place}: {warning}"),
        })
        .collect::<Vec<_>>()
        .into_iter()
}
