//! Models that the laws are held to beside those of the tests' own code: one file for each system in `generators/` and
//! `quantizers/`, so that a new one needs only its own.
#![allow(dead_code, clippy::unwrap_used)] // Each test file is a program of its own and uses a part.

use serde::de::DeserializeOwned;
use smalti_models::generators::Given;
use smalti_models::quantizers::QuantizerConfig;
use smalti_models::{Condition, ConditionConfig, GeneratorConfig};
use std::path::Path;

/// The `models` of each file of a folder, read as strictly as recipes.
fn models<C: DeserializeOwned>(folder: &str) -> Vec<C> {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File<C> {
        models: Vec<C>,
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/laws").join(folder);
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let read = |file| smalti_base::config::read_toml::<File<C>>(file, &[]).unwrap_or_else(|error| panic!("{error}"));
    let models: Vec<C> = files.iter().flat_map(|file| read(file).models).collect();
    assert!(!models.is_empty());
    models
}

/// Quantizers for latents of 4 channels, 3 rows and 5 columns.
pub fn quantizers() -> Vec<QuantizerConfig> {
    models("quantizers")
}

/// Generators, each with a condition that it takes: of codes or of vectors.
pub fn generators(of_codes: bool) -> Vec<(GeneratorConfig, Condition)> {
    let given = |config: &ConditionConfig| match config {
        ConditionConfig::Class { .. } => Given::Class(3),
        ConditionConfig::Text { .. } => Given::Text(vec![4, 29, 0]),
        other => panic!("the laws know no condition for {other:?}"),
    };
    let with_condition = |config: GeneratorConfig| {
        let all = config.conditions().all().iter().filter(|one| **one != ConditionConfig::None);
        let condition = all.map(given).fold(Condition::none(), |condition, given| condition.and(given));
        (config, condition)
    };
    let all = models::<GeneratorConfig>("generators").into_iter();
    all.filter(|config| config.tokens().vocabulary().is_some() == of_codes).map(with_condition).collect()
}
