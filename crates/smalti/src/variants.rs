//! The models of this repository's recipes, by name: what official weights may fit.

use smalti_base::{Error, Result, config};
use smalti_models::checkpoint::Part;
use smalti_models::encoders::EncoderConfig;
use smalti_models::generators::GeneratorConfig;
use smalti_models::sampling::Sampling;
use smalti_models::tokenizers::TokenizerConfig;
use smalti_train::recipe::{Recipe, Task};
use std::path::Path;

macro_rules! recipes {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../../recipes/", $name, ".toml")))),*]
    };
}

/// Every recipe of the repository; a test compares the list with the folder.
const RECIPES: &[(&str, &str)] = recipes![
    "encoder/fashion-classifier",
    "encoder/imagenet-mobilenet-v2",
    "gpt/emoji3d-64",
    "gpt/faces-coordinates-f16",
    "gpt/faces-f16",
    "gpt/imagenet-depth-f16",
    "gpt/imagenet-f16-16384",
    "gpt/landscapes-f16",
    "gpt/tiny",
    "kl/imagenet-kl16",
    "kl/openimages-f16",
    "kl/openimages-f32",
    "kl/openimages-f4",
    "kl/openimages-f8",
    "kl/tiny",
    "mar/imagenet-b",
    "mar/imagenet-h",
    "mar/imagenet-l",
    "mar/tiny",
    "maskgit/imagenet-256",
    "maskgit/tiny",
    "patches/imagenet-64",
    "rq-vae/bedroom-612m",
    "rq-vae/bedroom-f32",
    "rq-vae/cat-612m",
    "rq-vae/cat-f32",
    "rq-vae/cc3m-654m",
    "rq-vae/cc3m-f32",
    "rq-vae/church-370m",
    "rq-vae/church-f32",
    "rq-vae/ffhq-350m",
    "rq-vae/ffhq-f32",
    "rq-vae/imagenet-1400m",
    "rq-vae/imagenet-3800m",
    "rq-vae/imagenet-481m",
    "rq-vae/imagenet-821m",
    "rq-vae/imagenet-f32",
    "rq-vae/tiny",
    "rq-vae/tiny-vqvae",
    "var/imagenet-512-d36",
    "var/imagenet-d16",
    "var/imagenet-d20",
    "var/imagenet-d24",
    "var/imagenet-d30",
    "var/imagenet-vqvae",
    "var/fashion",
    "var/fashion-vqvae",
    "var/tiny",
    "var/tiny-vqvae",
    "vit/imagenet-base",
    "vit/imagenet-small",
    "vit/tiny",
    "vqgan/coco-labels-f16",
    "vqgan/emoji3d-64",
    "vqgan/faces-f16",
    "vqgan/imagenet-depth-f16",
    "vqgan/imagenet-f16-1024",
    "vqgan/imagenet-f16-16384",
    "vqgan/landscapes-labels-f16",
    "vqgan/openimages-gumbel-f8",
    "vqgan/tiny",
];

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
