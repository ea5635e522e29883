//! The models of this repository's recipes, by name: what official weights may fit.

use smalti_base::{Error, Result, config};
use smalti_models::checkpoint::Part;
use smalti_models::encoders::EncoderConfig;
use smalti_models::generators::GeneratorConfig;
use smalti_models::sampling::Sampling;
use smalti_models::tokenizers::TokenizerConfig;
use smalti_train::recipe::{Recipe, Task};
use std::path::Path;

/// Every recipe of the repository, as the build script found them.
const RECIPES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/recipes.rs"));

/// A configuration of a part.
#[derive(Clone, Debug, PartialEq)]
pub enum PartConfig {
    /// Of a tokenizer.
    Tokenizer(TokenizerConfig),
    /// Of a generator.
    Generator(GeneratorConfig),
    /// Of an encoder.
    Encoder(EncoderConfig),
}

/// A model that a recipe trains.
#[derive(Clone, Debug)]
pub struct Variant {
    /// `FOLDER/NAME` of the recipe, or its path.
    pub name: String,
    /// Its model.
    pub config: PartConfig,
    /// Sampling settings that suit it.
    pub sampling: Sampling,
}

impl Variant {
    /// The part of a bundle that it is.
    pub fn part(&self) -> Part {
        match self.config {
            PartConfig::Tokenizer(_) => Part::Tokenizer,
            PartConfig::Generator(_) => Part::Generator,
            PartConfig::Encoder(_) => Part::Encoder,
        }
    }

    fn of(name: &str, recipe: Recipe) -> Self {
        let (config, sampling) = match recipe.task {
            Task::Tokenizer(task) => (PartConfig::Tokenizer(task.model), Sampling::default()),
            Task::Generator(task) => (PartConfig::Generator(task.model), task.sampling),
            Task::Encoder(task) => (PartConfig::Encoder(task.model), Sampling::default()),
        };
        Self { name: name.to_string(), config, sampling }
    }
}

/// All variants.
///
/// # Errors
/// [`Error::Invalid`] if a recipe of this build is not valid.
pub fn all() -> Result<Vec<Variant>> {
    let read = |(name, text): &(&str, &str)| Ok(Variant::of(name, config::parse_toml(text, name, &[])?));
    RECIPES.iter().map(read).collect()
}

/// The variant of this name, or that of a recipe file.
///
/// # Errors
/// [`Error::Unknown`] with the nearest name, or what reading the recipe returns.
pub fn find(name: &str) -> Result<Variant> {
    let path = Path::new(name);
    if path.is_file() {
        return Ok(Variant::of(name, Recipe::read(path, &[])?));
    }
    let all = all()?;
    let names: Vec<String> = all.iter().map(|variant| variant.name.clone()).collect();
    let found = all.into_iter().find(|variant| variant.name == name || variant.name.ends_with(&format!("/{name}")));
    found.ok_or_else(|| Error::unknown("--variant", "variant", name, names))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_is_a_variant() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
        let mut files = Vec::new();
        for folder in std::fs::read_dir(root).unwrap() {
            let folder = folder.unwrap().path();
            for file in std::fs::read_dir(&folder).unwrap() {
                let file = file.unwrap().path();
                let name = |path: &Path| path.file_stem().unwrap().to_string_lossy().into_owned();
                files.push(format!("{}/{}", name(&folder), name(&file)));
            }
        }
        files.sort();
        let mut names: Vec<String> = all().unwrap().into_iter().map(|variant| variant.name).collect();
        names.sort();
        assert_eq!(names, files);
    }

    #[test]
    fn names_need_no_folder() {
        assert_eq!(find("imagenet-d16").unwrap().name, "var/imagenet-d16");
        assert!(find("imagenet-d17").unwrap_err().to_string().contains("var/imagenet-d1"));
    }
}
